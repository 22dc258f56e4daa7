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
      cotangents: `(out_features, rank)`, which span the leading directions of the outputs'
        cotangents, as many as the gradient of the kernel or of the inputs takes out; None for 0.
      uses: as in `Memory`.
    """

    inputs: chex.Array
    cotangents: chex.Array | None
    uses: chex.Array


LayerMemory = Memory | Subspace  # what a layer may hold


def first_directions(shape: tuple[int, ...], dtype: chex.ArrayDType) -> chex.Array:
    """Random orthonormal columns, `(..., features, rank)`, the same for each layer of a stack."""
    columns = jnp.linalg.qr(jax.random.normal(jax.random.key(0), shape[-2:], dtype))[0]
    return jnp.broadcast_to(columns, shape)


def memory_name(call: int) -> str:
    """The name of the memory of a layer's n-th call in a forward pass, counted from 0."""
    return f"memory_{call}" if call else "memory"


def rate_factor(
    learning_rate: optax.ScalarOrSchedule | None, count: chex.Array
) -> chex.Array | None:
    """sqrt(eta_t / eta_{t+1}), 1 where eta_{t+1} is 0; None for a constant rate.

    The paper's memory has a factor sqrt(eta) that a memory in gradient units lacks.
    """
    if not callable(learning_rate):
        return None
    rate, next_rate = (jnp.asarray(learning_rate(step)) for step in (count, count + 1))
    divisor = jnp.where(next_rate == 0, 1, next_rate)
    return jnp.where(next_rate == 0, jnp.ones_like(next_rate), jnp.sqrt(rate / divisor))


def carried(
    caller: str, old: LayerMemory, new: LayerMemory, factor: chex.Array | None
) -> LayerMemory:
    """The memory for the next step, after a step with `old` whose gradient is `new`.

    A layer that took no part in the loss keeps the old one. Rows are rescaled by `factor`, from
    `rate_factor`. Memories may be stacked.

    Raises:
      ValueError: a memory that was added up, scaled or averaged on its way.
    """
    _check_untouched(caller, old, new)
    uses = jnp.asarray(new.uses)
    unused = uses[..., None, None] == 0  # a stack of memories has one for each
    kept = jax.tree.map(lambda a, b: jnp.where(unused, a, b), old[:-1], new[:-1])
    if isinstance(new, Memory):
        kept = jax.tree.map(lambda rows: _rescaled(rows, factor), kept)
    return type(new)._make([*kept, uses])


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
    old_axes, new_axes = (varying_axes(jnp.asarray(memory[0])) for memory in (old, new))
    shared = old_axes - new_axes
    if shared:
        raise ValueError(
            f"{caller}: the new memory was averaged or added up over the mesh axes "
            f"{sorted(shared)}. Each device has its own, which belongs to its rows of the batch: "
            "apply jax.lax.pmean to the gradients of the parameters alone."
        )
