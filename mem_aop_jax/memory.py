"""What a layer keeps from one batch for the next: rows, or directions."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mem_aop_jax.config import MemAOP, floating_dtype


class Memory(NamedTuple):
    """The memory of one dense layer (the paper's mem_X and mem_G, in gradient units).

    Row m is added to row m of the next batch, whatever example stands there. The "gradient" of a
    loss with respect to a Memory is the next Memory.

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
      cotangents: `(out_features, rank)`, the same of the outputs' cotangents; None for rank 0.
      uses: as in `Memory`.
    """

    inputs: chex.Array
    cotangents: chex.Array | None
    uses: chex.Array


def is_memory(node: object) -> bool:
    """Whether a node of a pytree is the memory of a layer."""
    return isinstance(node, Memory | Subspace)


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
            dtype = config.stored_dtype(dtype)
            inputs, cotangents = (jnp.zeros((rows, n), dtype) for n in (in_features, out_features))
            return Memory(inputs, cotangents, uses)
        case "subspace":
            ranks = config.ranks(in_features, out_features)
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


def memory_name(call: int) -> str:
    """What a layer calls the memory of its n-th call in a forward pass, counted from 0."""
    return f"memory_{call}" if call else "memory"
