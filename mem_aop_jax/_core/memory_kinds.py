"""The kinds of memory by their names in `MemAOP(memory=...)`."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from mem_aop_jax._core import validation
from mem_aop_jax._core.candidates import MemoryKind
from mem_aop_jax._core.config import MEMORIES, MemAOP, floating_dtype
from mem_aop_jax._core.memory import LayerMemory
from mem_aop_jax._core.no_memory import NoMemory
from mem_aop_jax._core.row_memory import RowMemory
from mem_aop_jax._core.subspace_memory import SubspaceMemory

MEMORY_KINDS: dict[str | None, MemoryKind] = {
    None: NoMemory(),
    "rows": RowMemory(),
    "subspace": SubspaceMemory(),
}


def init_memory(
    config: MemAOP | None,
    rows: int,
    in_features: int,
    out_features: int,
    dtype: chex.ArrayDType = jnp.float32,
) -> LayerMemory | None:
    """The first memory for a layer of `in_features` x `out_features` and a batch of `rows` rows.

    Args:
      config: the layer's configuration.
      rows: the product of all dimensions of the layer's inputs but the last.
      in_features: the inputs' last dimension.
      out_features: the outputs' last dimension.
      dtype: the inputs' dtype. The memory has it, too, unless `config.memory_dtype` is set.

    Returns:
      A `Memory` of zeros; a `Subspace` of random directions, always the same; or None where the
      configuration has none.

    Raises:
      TypeError: `config` is no `MemAOP`, a size no whole number, or `dtype` not floating.
      ValueError: a size below 0, or `config.k` is larger than `rows`.
    """
    sizes = rows, in_features, out_features
    if config is None:
        return None
    if not isinstance(config, MemAOP):
        raise TypeError(f"init_memory: config is of type {type(config).__name__}, not aop.MemAOP.")
    rows, in_features, out_features = (
        validation.whole_number("init_memory", name, size)
        for name, size in zip(("rows", "in_features", "out_features"), sizes, strict=True)
    )
    config.selected_rows(rows, "init_memory")
    dtype = floating_dtype("dtype", dtype)
    kind = MEMORY_KINDS[config.memory_kind]
    return kind.init(config, rows, in_features, out_features, dtype)


def check_memory(
    name: str, config: MemAOP, x: chex.Array, sizes: tuple[int, int, int], memory
) -> LayerMemory:
    """The memory given for inputs x and (rows, in, out) features, as JAX arrays.

    Raises:
      TypeError: it is of another type or dtype than the configuration's.
      ValueError: it does not fit the sizes; or the configuration has no memory.
    """
    kind = MEMORY_KINDS[config.memory_kind]
    if config.memory_kind is None:
        raise ValueError(
            f"{name}: got a memory, but the configuration has memory={config.memory!r}, which with "
            f"policy={config.policy!r} is none; pass memory=None to the layer, or configure "
            f"MemAOP(memory=...) with one of {', '.join(map(repr, MEMORIES))}."
        )
    if not isinstance(memory, kind.state):
        wanted = f"aop.{kind.state.__name__}"
        raise TypeError(
            f"{name}: memory is of type {type(memory).__name__}; with memory="
            f"{config.memory_kind!r} it must be an {wanted} (a restored dict becomes one again "
            f"with {wanted}(**memory))."
        )
    memory = jax.tree.map(jnp.asarray, memory)
    kind.check(name, config, x, sizes, memory)
    if memory.uses.shape != () or memory.uses.dtype != jnp.float32:
        raise ValueError(
            f"{name}: memory.uses has shape {memory.uses.shape} and dtype {memory.uses.dtype}; it "
            "must be a float32 scalar. Use the memory that the last step returned, unchanged."
        )
    return memory
