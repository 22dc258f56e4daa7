"""What a layer keeps from one batch for the next: rows, or directions."""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from mem_aop_jax._compat import varying_axes
from mem_aop_jax._numerics import accumulation_dtype


class _Rows(NamedTuple):
    inputs: chex.Array
    cotangents: chex.Array
    uses: chex.Array


class Memory(_Rows):
    """The memory of one dense layer (the paper's mem_X and mem_G, in gradient units).

    Row m is added to row m of the next batch, whatever example stands there. With
    `MemAOP(memory_slots=...)` there is a row for each slot, and the rows of the batch that wait are
    added to them. The "gradient" of a loss with respect to a Memory is the next Memory.

    Attributes:
      inputs: `(rows, in_features)` floating.
      cotangents: `(rows, out_features)` floating, the dtype of `inputs`.
      uses: `()` float32: how many times the last step used the memory. 1 after a step, 0 at the
        start and where the layer took no part in the loss. Anything else means that memories were
        added up or scaled, which makes them meaningless. The array in the tree is less by up to
        two millionths, a mark of the step (`mark_of`).
    """

    __slots__ = ()

    @property
    def uses(self):  # type: ignore[override]
        """The array in the tree without its marks; what is no array, like a sharding, as it is."""
        uses = self[2]
        if not isinstance(uses, jax.Array | np.ndarray | np.generic):
            return uses
        whole = jnp.round(uses)
        return jnp.where(jnp.abs(uses - whole) <= 4e-6 * whole, whole, uses)


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
    for value in (rate, next_rate):
        if not isinstance(value, jax.core.Tracer) and not 0 <= value < np.inf:  # NaN fails too
            raise ValueError(
                f"learning_rate: the schedule's value after {count} updates or one more is "
                f"{value}; it must be 0 or more, and finite."
            )
    divisor = jnp.where(next_rate == 0, 1, next_rate)
    return jnp.where(next_rate == 0, jnp.ones_like(next_rate), jnp.sqrt(rate / divisor))


def check_learning_rate(caller: str, learning_rate: optax.ScalarOrSchedule | None) -> None:
    """Raises a `TypeError` for what is neither a number nor a schedule."""
    number = jnp.isscalar(learning_rate) and not isinstance(learning_rate, str | bytes)
    if learning_rate is None or callable(learning_rate) or number:
        return
    raise TypeError(
        f"{caller}: learning_rate is {learning_rate!r}; it must be a number, or a schedule: a "
        "function of the number of updates, such as optax.cosine_decay_schedule(0.1, 1000)."
    )


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
    uses = jnp.asarray(new[-1])
    unused = uses[..., None, None] == 0  # a stack of memories has one for each
    kept = jax.tree.map(lambda a, b: jnp.where(unused, a, b), old[:-1], new[:-1])
    if isinstance(new, Memory):
        kept = jax.tree.map(lambda rows: _rescaled(rows, factor), kept)
    return type(new)._make([*kept, uses])


# By how much a mark is less than 1, in 2^-24. In neither half is one the mean of two others,
# and between the halves is a gap, where the mean of many lies.
MARKS = 0, 2, 6, 8, 24, 26, 30, 32
MARK_SIDE = 16  # at most the entries of so many rows and columns of a gradient decide


def mark_of(dw: chex.Array) -> chex.Array:
    """`uses` of a memory after a step with this gradient: almost 1, in one of eight ways.

    Of the averages of up to 16 memories, of different steps or devices, at least four in five are
    none of these: averaging shows after a few steps of a few layers.
    """
    row_step, column_step = (-(-size // MARK_SIDE) for size in dw.shape)
    rows = jnp.take(dw, np.arange(0, dw.shape[0], row_step), axis=0)
    entries = rows[:, ::column_step].astype(jnp.float32)
    bits = lax.bitcast_convert_type(entries, jnp.uint32).sum(dtype=jnp.uint32)
    mark = jnp.array(MARKS, jnp.float32)[(bits * np.uint32(0x9E3779B1)) >> 29]
    return 1 - mark * 2.0**-24


def is_void(memory: LayerMemory) -> chex.Array:
    """Whether a memory, or each of a stack, was added up, scaled or averaged since a step."""
    uses = memory[-1]
    marks = 1 - np.array(MARKS, np.float32) * np.float32(2**-24)
    return functools.reduce(operator.and_, (uses != allowed for allowed in (0, *marks)))


def _rescaled(rows, factor):
    if factor is None:
        return rows
    dtype = accumulation_dtype(rows.dtype)
    largest = float(jnp.finfo(rows.dtype).max)
    rescaled = jnp.clip(rows.astype(dtype) * factor.astype(dtype), -largest, largest)
    return jnp.where(jnp.isfinite(rows), rescaled.astype(rows.dtype), rows)  # a slot may not be


def _check_untouched(caller, old, new):
    known = not isinstance(new[-1], jax.core.Tracer)
    if known and is_void(new._replace(uses=np.asarray(new[-1]))).any():
        raise ValueError(
            f"{caller}: the new memory has uses={new.uses} where 1 is wanted (0: not used), or 1 "
            "that is an average. It was added up over several uses (one memory for two layers or "
            "two micro-batches, an unbatched memory under vmap or in a scan over time, a layer "
            "inside nn.remat or nn.jit that is called twice), or scaled, or averaged over "
            "micro-batches or devices. Each use in a step needs a memory of its own, whose "
            "gradient must come here unchanged; average those of the parameters alone."
        )
    old_axes, new_axes = (varying_axes(jnp.asarray(memory[0])) for memory in (old, new))
    shared = old_axes - new_axes
    if shared:
        raise ValueError(
            f"{caller}: the new memory was averaged or added up over the mesh axes "
            f"{sorted(shared)}. Each device has its own, which belongs to its rows of the batch: "
            "apply jax.lax.pmean to the gradients of the parameters alone."
        )
