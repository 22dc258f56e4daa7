"""From the gradient of a memory to the memory for the next step; what the adapters share."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mem_aop_jax.compat import varying_axes
from mem_aop_jax.memory import Memory, Subspace, wide


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
    dtype = wide(rows.dtype)
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
