"""What a layer keeps from one batch for the next: rows, or directions."""

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mem_aop_jax.config import MemAOP, floating_dtype


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


class Measured(NamedTuple):
    """What is measured of a layer: `()` float32 each.

    Attributes:
      gradient_norm: Frobenius norm of the exact gradient of the kernel.
      estimate_norm: that of the approximate one, root mean square over the draws.
      error: norm of the difference, relative to `gradient_norm`; root mean square over the draws.
      cosine: between the two, mean over the draws.
      v: variance over the draws, relative to the square of `gradient_norm`. Of an unbiased
        estimate it is the square of `error`, up to the number of draws.
      input_v: the same of the gradient of the inputs, relative to its own square; 0 where it is
        exact.
      noise: share of the exact gradient's square that is noise of the batch, from its parts; NaN
        where the batch has only one part.
      flops: of the exact layer's step: forward, gradient of the inputs, gradient of the kernel.
      c: FLOPs of the layer's step, relative to `flops`; mean over the steps.
      inputs_inside: share of the inputs' energy (sum of squares) inside the subspace; 0 without.
      cotangents_inside: the same of the cotangents.
      inputs_rank: how many directions, of the best, would hold 90% of the inputs' energy.
      cotangents_rank: the same of the cotangents.
      chosen: share of the candidates' sum of norm products that the chosen ones have, each counted
        once; mean over the draws.
      uses: 1.
    """

    gradient_norm: chex.Array
    estimate_norm: chex.Array
    error: chex.Array
    cosine: chex.Array
    v: chex.Array
    input_v: chex.Array
    noise: chex.Array
    flops: chex.Array
    c: chex.Array
    inputs_inside: chex.Array
    cotangents_inside: chex.Array
    inputs_rank: chex.Array
    cotangents_rank: chex.Array
    chosen: chex.Array
    uses: chex.Array


class Norms(NamedTuple):
    """What is left of a layer's rows outside of the first 0, 1, ... directions of a `Subspace`.

    Attributes:
      inputs: `(rows, rank + 1)` float32, norms of the inputs' residuals.
      cotangents: `(rows, rank' + 1)` float32, of the cotangents'.
      of_inputs: `(rows, rank' + 1)` float32, of the products of the cotangents' residuals with the
        kernel; 0 where nobody asks for the gradient of the inputs.
      asked_for: `()` float32, 1 where somebody does.
      uses: as of a memory.
    """

    inputs: chex.Array
    cotangents: chex.Array
    of_inputs: chex.Array
    asked_for: chex.Array
    uses: chex.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("memory", "measured", "draw", "noise"),
    meta_fields=("draws",),
)
@dataclasses.dataclass(frozen=True)
class Probe:
    """In place of a layer's memory: the gradient is exact, and that of the probe what was measured.

    Attributes:
      memory: the memory that it stands for; None where the configuration has none. Its gradient
        is 0 (beside `Norms`, the next memory).
      measured: zeros; its "gradient" is the measurement.
      draws: how many approximate gradients are drawn; with 0 nothing is measured.
      draw: None; or a number, `()` int32, and the layer's gradients are approximate, as with the
        memory alone but with a key of that number's own. Then the probe has no gradient.
      noise: None; or a factor, `()` float32, on what is wrong with a draw of the gradient of the
        inputs, which then is added to the exact one. Then nothing is measured.
    """

    memory: Memory | Subspace | None
    measured: Measured | Norms
    draws: int
    draw: chex.Array | None = None
    noise: chex.Array | None = None

    @classmethod
    def of(cls, memory: Memory | Subspace | None, draws: int, stack: tuple[int, ...] = ()):
        """A probe of a memory, or of a stack of them."""
        zeros = (jnp.zeros(stack, jnp.float32) for _ in Measured._fields)
        return cls(memory, Measured(*zeros), draws)

    @property
    def uses(self) -> chex.Array:
        """As of a memory."""
        return self.measured.uses


def measured_memory(memory: Memory | Subspace | Probe | None) -> Memory | Subspace | None:
    """The memory that a probe stands for; any other as it is."""
    return memory.memory if isinstance(memory, Probe) else memory


def is_memory(node: object) -> bool:
    """Whether a node of a pytree is the memory of a layer, or a probe in its place."""
    return isinstance(node, Memory | Subspace | Probe)


def init_memory(
    config: MemAOP | None,
    rows: int,
    in_features: int,
    out_features: int,
    dtype: chex.ArrayDType = jnp.float32,
) -> Memory | Subspace | None:
    """The first memory for a layer of `in_features` x `out_features` and a batch of `rows` rows.

    Args:
      config: the layer's configuration.
      rows: the product of all dimensions of the layer's inputs but the last.
      in_features: the inputs' last dimension.
      out_features: the outputs' last dimension.
      dtype: the inputs' dtype, that of the memory unless `config.memory_dtype` says otherwise.

    Returns:
      A `Memory` of zeros; a `Subspace` of random directions, always the same; or None where the
      configuration has none.

    Raises:
      TypeError: `config` is no `MemAOP`, or `dtype` is not floating.
      ValueError: `config.k` is larger than `rows`.
    """
    if config is None:
        return None
    if not isinstance(config, MemAOP):
        raise TypeError(f"init_memory: config is of type {type(config).__name__}, not aop.MemAOP.")
    config.selected_rows(rows, "init_memory")
    dtype = floating_dtype("dtype", dtype)
    uses = jnp.zeros((), jnp.float32)
    match config.memory_kind:
        case "rows":
            dtype, rows = config.stored_dtype(dtype), config.memory_slots or rows
            inputs, cotangents = (jnp.zeros((rows, n), dtype) for n in (in_features, out_features))
            return Memory(inputs, cotangents, uses)
        case "subspace":
            ranks = config.held_ranks(in_features, out_features)
            return Subspace(
                first_directions((in_features, ranks[0]), wide(dtype)),
                first_directions((out_features, ranks[1]), wide(dtype)) if ranks[1] else None,
                uses,
            )
    return None


def first_directions(shape: tuple[int, ...], dtype: chex.ArrayDType) -> chex.Array:
    """Random orthonormal columns, `(..., features, rank)`, the same for each layer of a stack."""
    columns = jnp.linalg.qr(jax.random.normal(jax.random.key(0), shape[-2:], dtype))[0]
    return jnp.broadcast_to(columns, shape)


def wide(dtype: chex.ArrayDType) -> jnp.dtype:
    """The dtype in which rows are added and products accumulate: float32, or float64 for itself."""
    return jnp.zeros((), jnp.float64 if dtype == jnp.float64 else jnp.float32).dtype


def wider(*dtypes: chex.ArrayDType) -> jnp.dtype:
    """The one with the most bytes, of equals the first."""
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def memory_name(call: int) -> str:
    """What a layer calls the memory of its n-th call in a forward pass, counted from 0."""
    return f"memory_{call}" if call else "memory"
