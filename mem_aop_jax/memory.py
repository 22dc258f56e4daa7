"""The rows of a batch that wait for the next one."""

from typing import NamedTuple

import chex
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


def init_memory(
    config: MemAOP | None,
    rows: int,
    in_features: int,
    out_features: int,
    dtype: chex.ArrayDType = jnp.float32,
) -> Memory | None:
    """An empty memory for a layer of `in_features` x `out_features` and a batch of `rows` rows.

    Args:
      config: the layer's configuration.
      rows: the product of all dimensions of the layer's inputs but the last.
      in_features: the inputs' last dimension.
      out_features: the outputs' last dimension.
      dtype: the inputs' dtype, that of the memory unless `config.memory_dtype` says otherwise.

    Returns:
      A `Memory` of zeros, or None where the configuration has none.

    Raises:
      TypeError: `config` is no `MemAOP`, or `dtype` is not floating.
      ValueError: `config.k` is larger than `rows`.
    """
    if config is None:
        return None
    if not isinstance(config, MemAOP):
        raise TypeError(f"init_memory: config is of type {type(config).__name__}, not aop.MemAOP.")
    config.selected_rows(rows, "init_memory")
    if not config.keeps_rows:
        return None
    dtype = config.stored_dtype(floating_dtype("dtype", dtype))
    return Memory(
        inputs=jnp.zeros((rows, in_features), dtype),
        cotangents=jnp.zeros((rows, out_features), dtype),
        uses=jnp.zeros((), jnp.float32),
    )


def wide(dtype: chex.ArrayDType) -> jnp.dtype:
    """The dtype in which rows are added and products accumulate: float32, or float64 for itself."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def memory_name(call: int) -> str:
    """What a layer calls the memory of its n-th call in a forward pass, counted from 0."""
    return f"memory_{call}" if call else "memory"
