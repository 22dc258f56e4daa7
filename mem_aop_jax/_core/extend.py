"""`aop.extend`: what a memory of one's own is made of. For experiments: it may change.

The protocol is described at the head of `candidates.py`.
"""

import contextlib
from collections.abc import Iterator, Mapping

from mem_aop_jax._core.candidates import Candidates, Chosen, MemoryKind
from mem_aop_jax._core.config import MEMORIES, MemoryRules
from mem_aop_jax._core.memory_kinds import MEMORY_KINDS
from mem_aop_jax._core.no_memory import Rows
from mem_aop_jax._core.orthonormal import orthonormal
from mem_aop_jax._core.subspace_memory import SubspaceMemory

__all__ = [
    "Candidates",
    "Chosen",
    "MemoryKind",
    "MemoryRules",
    "Rows",
    "SubspaceMemory",
    "memories",
    "orthonormal",
]


@contextlib.contextmanager
def memories(kinds: Mapping[str, tuple[MemoryKind, MemoryRules]]) -> Iterator[None]:
    """Meanwhile `MemAOP(memory=...)` takes these names, too.

    Args:
      kinds: by name, the kind of memory and what it asks of a configuration. The state of a kind is
        an `aop.Memory` or an `aop.Subspace`. Names that are known already stay what they are.
    """
    new = kinds.keys() - MEMORIES.keys()
    for name in new:
        MEMORY_KINDS[name], MEMORIES[name] = kinds[name]
    try:
        yield
    finally:
        for name in new:
            del MEMORY_KINDS[name], MEMORIES[name]
