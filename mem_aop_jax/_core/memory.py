"""What a layer keeps from one batch for the next: rows, or directions."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mem_aop_jax._compat import varying_axes
from mem_aop_jax._numerics import accumulation_dtype


class Memory(NamedTuple):
    """The memory of one dense layer (the paper's mem_X and mem_G, in gradient units).

    Row m is added to row m of the next batch, whatever example stands there. With
    `MemAOP(memory_slots=...)` there is a row for each slot, and the rows of the batch that wait are
    added to them. The "gradient" of a loss with respect to a Memory is the next Memory.

    Attributes:
      inputs: `(rows, in_features)` floating.
      cotangents: `(rows, out_features)` floating, the dtype of `inputs`.
      uses: `()` float32: how many times the last step used the memory. 1 after a step, 0 at the
        start and where the layer took no part in the loss. Anything else means that memories were
        added up or scaled, which makes them meaningless.
    """

    inputs: chex.Array
    cotangents: chex.Array
    uses: chex.Array


class Subspace(NamedTuple):
    """The memory of one dense layer in which the leading directions are kept (not the paper's).

    Columns are orthonormal. They belong to the layer, not to the rows of a batch, so any batch size
    goes with them. The "gradient" of a loss with respect to a Subspace is the next Subspace, one
    subspace iteration on.

    Attributes:
      inputs: `(in_features, rank)` float32 (float64 for float64 inputs), which span the leading
        directions of the layer's inputs.
      cotangents: `(out_features, rank)`, the same of the outputs' cotangents, as many as the
        kernel's gradient or the inputs' takes out; None for rank 0.
      uses: as in `Memory`.
    """

    inputs: chex.Array
    cotangents: chex.Array | None
    uses: chex.Array


def first_directions(shape: tuple[int, ...], dtype: chex.ArrayDType) -> chex.Array:
    """Random orthonormal columns, `(..., features, rank)`, the same for each layer of a stack."""
    columns = jnp.linalg.qr(jax.random.normal(jax.random.key(0), shape[-2:], dtype))[0]
    return jnp.broadcast_to(columns, shape)


def memory_name(call: int) -> str:
    """What a layer calls the memory of its n-th call in a forward pass, counted from 0."""
    return f"memory_{call}" if call else "memory"


def rate_factor(
    learning_rate: optax.ScalarOrSchedule | None, count: chex.Array
) -> chex.Array | None:
    """sqrt(eta_t / eta_{t+1}), 1 where eta_{t+1} is 0; None for a constant rate.

    The paper's memory has a factor sqrt(eta) that one in gradient units has not.
    """
    if not callable(learning_rate):
        return None
    now, then = jnp.asarray(learning_rate(count)), jnp.asarray(learning_rate(count + 1))
    return jnp.where(then == 0, jnp.ones_like(then), jnp.sqrt(now / jnp.where(then == 0, 1, then)))


def carried(
    caller: str, old: Memory | Subspace, new: Memory | Subspace, factor: chex.Array | None
) -> Memory | Subspace:
    """The memory for the next step, after a step with `old` whose gradient is `new`.

    That of a layer which took no part in the loss is the old one. `factor` is from `rate_factor`,
    for rows; memories may be stacked.

    Raises:
      ValueError: a memory that was added up, scaled or averaged on its way.
    """
    _check_untouched(caller, old, new)
    uses = jnp.asarray(new.uses)
    unused = uses[..., None, None] == 0  # of stacked memories each has its own
    inputs, cotangents = jax.tree.map(
        lambda was, now: jnp.where(unused, was, now), tuple(old[:2]), tuple(new[:2])
    )
    if isinstance(new, Memory):
        inputs, cotangents = _rescaled(inputs, factor), _rescaled(cotangents, factor)
    return type(new)(inputs, cotangents, uses)


def _rescaled(rows, factor):
    if factor is None:
        return rows
    dtype = accumulation_dtype(rows.dtype)
    largest = float(jnp.finfo(rows.dtype).max)
    rescaled = jnp.clip(rows.astype(dtype) * factor.astype(dtype), -largest, largest)
    return jnp.where(jnp.isfinite(rows), rescaled.astype(rows.dtype), rows)  # a slot may not be


def _check_untouched(caller, old, new):
    known = not isinstance(new.uses, jax.core.Tracer)
    if known and not np.isin(np.asarray(new.uses), (0, 1)).all():
        raise ValueError(
            f"{caller}: the new memory has uses={new.uses} where 1 is wanted (0: not used). It was "
            "added up over several uses (one memory for two layers or two micro-batches, an "
            "unbatched memory under vmap or in a scan over time, a layer inside nn.remat or nn.jit "
            "that is called twice) or scaled. Each use in a step needs a memory of its own, whose "
            "gradient must come here unchanged."
        )
    shared = varying_axes(jnp.asarray(old.inputs)) - varying_axes(jnp.asarray(new.inputs))
    if shared:
        raise ValueError(
            f"{caller}: the new memory was averaged or added up over the mesh axes "
            f"{sorted(shared)}. Each device has its own, which belongs to its rows of the batch: "
            "apply jax.lax.pmean to the gradients of the parameters alone."
        )
