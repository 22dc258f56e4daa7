"""Row memory: the rows that were not chosen wait for the next batch.

The paper's: row m of the memory is added to row m of the batch, and the sum is one candidate:

    Xh = mem_X + X,  Gh = mem_G + G
    mem_X, mem_G <- sqrt(decay) * (Xh, Gh with the rows of S set to 0)

With slots, the rows that wait are added up in a fixed number of them, row m in slot m mod slots,
and the slots are candidates of their own, beside the rows of the batch.

The outer product of a sum of rows has cross terms, of one row's inputs with another's cotangents.
With random signs (the same for inputs and cotangents) every true term stays what it is, and every
cross term has the expectation 0, however the rows are chosen: it is decided when the later of two
rows enters, and comes out once. So what has come out and what still waits add up, in expectation,
to the sum of all outer products.
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._compat import varying_axes
from mem_aop_jax._core.candidates import SIGNS_KEY, Candidates, MemoryKind, weighted
from mem_aop_jax._core.memory import Memory
from mem_aop_jax._kernels import row_access, row_access_tpu, row_sums_tpu, rows_gpu
from mem_aop_jax._kernels.row_access import flat_rows, gather_rows
from mem_aop_jax._numerics import accumulation_dtype, row_norms, widened


class RowMemory(MemoryKind):
    """`MemAOP(memory="rows")`."""

    state: type = Memory

    def init(self, config, rows, in_features, out_features, dtype):
        """A `Memory` of zeros."""
        rows, dtype = config.memory_slots or rows, config.stored_dtype(dtype)
        inputs, cotangents = (jnp.zeros((rows, n), dtype) for n in (in_features, out_features))
        return Memory(inputs, cotangents, jnp.zeros((), jnp.float32))

    def check(self, name, config, x, sizes, memory):
        """Raises an error if the memory belongs to another batch size, layer, dtype or device."""
        dtype = config.stored_dtype(x.dtype)
        m, n, p = sizes
        rows, belongs = m, "batch size: keep the batch size (drop a last partial batch)"
        if config.memory_slots is not None:
            rows, belongs = config.memory_slots, "number of slots: keep memory_slots"
            share = memory.inputs.shape[0] if memory.inputs.ndim else 0
            if share and rows % share == 0 and share % config.groups == 0:
                rows = share  # of a device under shard_map
        anew = f"aop.init_memory(config, {m}, {n}, {p}, jnp.{dtype})"
        for field, shape in (("inputs", (rows, n)), ("cotangents", (rows, p))):
            array = getattr(memory, field)
            if array.shape != shape:
                raise ValueError(
                    f"{name}: memory.{field} has shape {array.shape}, but a batch of {m} rows "
                    f"through a kernel of shape {(n, p)} needs {shape}. A memory belongs to one "
                    f"layer and one {belongs}, start anew with {anew}, or, to evaluate, leave the "
                    "memory out."
                )
            replicated = varying_axes(x) - varying_axes(array)
            if replicated:
                raise ValueError(
                    f"{name}: memory.{field} is the same on all devices of the mesh axes "
                    f"{sorted(replicated)}, over which the batch is sharded. A memory's rows "
                    "belong to the batch's rows: give it the batch's PartitionSpec in shard_map's "
                    "in_specs and out_specs (and P() for `uses`)."
                )
            if array.dtype != dtype:
                raise TypeError(
                    f"{name}: memory.{field} has dtype {array.dtype}, but inputs of {x.dtype} "
                    f"with memory_dtype={config.memory_dtype} need {dtype}. Start anew with "
                    f"{anew}, or set memory_dtype=jnp.{array.dtype} in the configuration."
                )

    def candidates(self, call, x, g, memory, key, differentiates_inputs):
        """The sums of the rows and the memory; with slots, the rows and the slots."""
        del differentiates_inputs
        of_config = RowsWithMemory if call.config.memory_slots is None else RowsAndSlots
        return of_config(call, x, g, memory, key)

    def tpu_candidates(self, call, x, g, memory):
        """Sums in the memory's place, where kernels can write the next memory."""
        blocks = (
            *map(_sum_block_rows, (x, g)),
            *(row_access.choose_block_rows(rows, 1) for rows in (x, g)),
        )
        can_join = self._joins_in_place(call, x, g, memory) and None not in blocks
        return RowsJoinedInPlace.join if can_join else None

    def gpu_candidates(self, call, x, g, memory):
        """The same."""
        sizes = (rows_gpu.clears(*flat.shape) for flat in map(flat_rows, (x, g)))
        can_join = self._joins_in_place(call, x, g, memory) and all(sizes)
        return RowsJoinedInPlaceOnGpu.join if can_join else None

    def _joins_in_place(self, call, x, g, memory):
        """Whether what waits of the sums is the next memory."""
        config = call.config
        return (
            type(self) is RowMemory  # a subclass chooses from, or stores, something else
            and not callable(config.policy)
            and config.decay == 1
            and not config.signed
            and config.memory_slots is None
            and x.dtype == g.dtype == memory.inputs.dtype
            and not is_narrower(x.dtype, accumulation_dtype(x.dtype))  # in which sums fit
        )


@dataclasses.dataclass(frozen=True)
class RowsWithMemory(Candidates):
    """Row m of the batch and row m of the memory, added: the paper's Xh and Gh."""

    def norms(self):
        """Norms of the sums."""
        return tuple(map(row_norms, self._sums()))

    def storable(self):
        """All but those that a narrower dtype of the memory cannot hold."""
        dtype = self.memory.inputs.dtype
        if not is_narrower(dtype, accumulation_dtype(self.x.dtype)):
            return True
        x, g = (jnp.all(rows == saturated(rows, dtype), axis=-1) for rows in self._sums())
        return x & g

    def gather(self, chosen):
        """Adds the chosen rows only, so that no sum of all rows is stored."""
        factors = self._sums(lambda rows: gather_rows(rows, chosen.indices))
        return weighted(factors, chosen), self

    def next_memory(self, chosen, dw):
        """Adds the rows anew, and sets the chosen ones to 0."""
        arrays = flat_rows(self.x), flat_rows(self.g), self.memory
        (x, g, memory), waiting = after_gradient(dw, arrays, chosen.waiting.reshape(-1))
        signs = row_signs(self)
        signs = None if signs is None else signs.reshape(-1)
        sums = dataclasses.replace(self, x=x, g=g, memory=memory)._sums()
        kept = (kept_rows(rows, waiting, self.call.config.decay, signs) for rows in sums)
        return stored_memory(memory, *(saturated(rows, memory.inputs.dtype) for rows in kept))

    def _sums(self, select=lambda rows: rows):
        """Xh and Gh, or a selection of their rows."""

        def add(kept, fresh):
            dtype, kept = accumulation_dtype(fresh.dtype), kept.reshape(fresh.shape)
            return select(kept).astype(dtype) + select(fresh).astype(dtype)

        return add(self.memory.inputs, self.x), add(self.memory.cotangents, self.g)


@dataclasses.dataclass(frozen=True)
class RowsJoinedInPlace(Candidates):
    """As `RowsWithMemory`, of sums in the memory's place, written by kernels of a TPU.

    Attributes:
      sum_norms: norms of the sums, `(groups, rows)` each.
    """

    sum_norms: tuple[chex.Array, chex.Array]

    @classmethod
    def join(cls, call, x, g, memory, key):
        """Adds the rows of the batch to those of the memory."""
        norms, sums = zip(*map(cls._norms_and_sums, (x, g), memory[:2]), strict=True)
        memory = memory._replace(inputs=sums[0], cotangents=sums[1])
        return cls(call, x, g, memory, key, tuple(n.reshape(x.shape[:2]) for n in norms))

    def norms(self):
        """Norms of the sums, known from when they were added."""
        return self.sum_norms

    def gather(self, chosen):
        """Takes the chosen rows out of the memory: zeros are left, and the rows that wait."""
        waiting = chosen.waiting.reshape(-1)
        taken, rest = self._extract(self.memory[:2], chosen.indices, waiting)
        memory = self.memory._replace(inputs=rest[0], cotangents=rest[1])
        return weighted(tuple(map(widened, taken)), chosen), dataclasses.replace(
            self, memory=memory
        )

    def next_memory(self, chosen, dw):
        """What `gather` left."""
        return self.memory

    @staticmethod
    def _norms_and_sums(fresh, kept):
        """Of the sums of fresh rows `(groups, rows, features)` and kept ones."""
        return row_sums_tpu.norms_and_sums(flat_rows(fresh), kept, _sum_block_rows(fresh))

    @staticmethod
    def _extract(sides, indices, waiting):
        """The chosen rows of both sides `(groups, k, features)`, and the sides without them."""
        flat = row_access.flat_indices(indices, len(waiting) // len(indices))

        def extract(rows):
            block_rows = row_access_tpu.choose_block_rows(
                len(rows), len(flat), rows.shape[1], rows.dtype
            )
            taken, rest = row_access_tpu.extract_rows(rows, flat, waiting, block_rows)
            return taken.reshape(*indices.shape, -1), rest

        return zip(*map(extract, sides), strict=True)


class RowsJoinedInPlaceOnGpu(RowsJoinedInPlace):
    """The same, written by XLA; a kernel clears the rows that do not wait, and reads no others."""

    @staticmethod
    def _norms_and_sums(fresh, kept):
        sums = (widened(flat_rows(fresh)) + widened(kept)).astype(kept.dtype)
        return row_norms(widened(sums)), sums

    @staticmethod
    def _extract(sides, indices, waiting):
        taken = tuple(
            gather_rows(rows.reshape(len(indices), -1, rows.shape[-1]), indices) for rows in sides
        )
        taken, sides = lax.optimization_barrier((taken, sides))  # before they are cleared
        return taken, tuple(rows_gpu.clear_rows(rows, waiting) for rows in sides)


@dataclasses.dataclass(frozen=True)
class RowsAndSlots(Candidates):
    """The rows of the batch, and after them the slots of the memory.

    A slot that outgrows its dtype is infinite, and chosen in the next step.
    """

    def norms(self):
        """Norms of the rows, then of the slots."""
        return tuple(
            jnp.concatenate([fresh_norms, kept_norms.astype(fresh_norms.dtype)], axis=1)
            for fresh_norms, kept_norms in (
                map(row_access.grouped_row_norms, side) for side in self._sides()
            )
        )

    def gather(self, chosen):
        """Rows or slots."""
        rows = self.x.shape[1]
        slots = jnp.where(chosen.indices < rows, 0, chosen.indices - rows)

        def row_or_slot(fresh, kept):
            fresh, kept = (
                gather_rows(source, indices).astype(accumulation_dtype(fresh.dtype))
                for source, indices in ((fresh, chosen.indices), (kept, slots))
            )
            return jnp.where(chosen.indices[..., None] < rows, fresh, kept)

        return weighted(tuple(row_or_slot(*side) for side in self._sides()), chosen), self

    def next_memory(self, chosen, dw):
        """Adds the rows that wait to the slots that wait."""
        arrays = self.x, self.g, self.memory
        (x, g, memory), waiting = after_gradient(dw, arrays, chosen.waiting)
        groups, rows, _ = self.x.shape
        slots = len(memory.inputs) // groups
        decay, signs = self.call.config.decay, row_signs(self)

        def add(fresh, kept):
            fresh = kept_rows(widened(fresh), waiting[:, :rows], decay, signs)
            kept = kept_rows(kept.astype(fresh.dtype), waiting[:, rows:].reshape(-1), decay)
            fresh = jnp.pad(fresh, ((0, 0), (0, -rows % slots), (0, 0)))
            return kept + flat_rows(fresh.reshape(groups, -1, slots, fresh.shape[-1]).sum(axis=1))

        return stored_memory(memory, add(x, memory.inputs), add(g, memory.cotangents))

    def _sides(self):
        return tuple(
            (fresh, kept.reshape(len(fresh), -1, fresh.shape[-1]))
            for fresh, kept in zip((self.x, self.g), self.memory[:2], strict=True)
        )


def _sum_block_rows(rows):
    """How many rows the kernel that adds them to a memory has on the chip; None: it cannot run."""
    groups, number, features = rows.shape
    return row_sums_tpu.choose_block_rows(groups * number, features, rows.dtype, with_memory=True)


def row_signs(candidates):
    """`(groups, rows)` random 1 and -1, or None where the memory is not signed."""
    if not candidates.call.config.signed:
        return None
    key = jax.random.fold_in(candidates.key, SIGNS_KEY)
    return jax.random.rademacher(key, candidates.x.shape[:2], jnp.float32)


def after_gradient(first, arrays, waiting):
    """`arrays` and `waiting`, for computations that have to wait for `first`.

    A donated memory is written over, without a copy, only after it was read for the gradient.
    """
    arrays, waiting, first = lax.optimization_barrier((arrays, waiting, first))
    return arrays, after_on_cpu(first, waiting)


@jax.jit  # also where the caller is not: what depends on the platform is compiled each time
def after_on_cpu(first: chex.Array, then: chex.Array) -> chex.Array:
    """`then`, for which a CPU has to wait until `first`, a matrix, is there.

    CPUs drop barriers before they put operations in order, and run some at the same time.
    """

    def on_cpu(then, first):
        largest = jnp.max(first[:1, :1], initial=0)
        never = (largest != largest) & (largest > 0)
        return jnp.where(never, jnp.zeros_like(then), then)

    return lax.platform_dependent(then, first, cpu=on_cpu, default=lambda then, first: then)


def kept_rows(rows, waiting, decay, signs=None):
    """The rows that wait, decayed; 0 in place of the others, which may not be finite."""
    rows = math.sqrt(decay) * rows
    if signs is not None:
        rows *= signs[..., None].astype(rows.dtype)
    return jnp.where(waiting[..., None], rows, 0)


def stored_memory(memory, inputs, cotangents):
    """A memory with these rows, in the dtypes of the old one."""
    return memory._replace(
        inputs=inputs.astype(memory.inputs.dtype),
        cotangents=cotangents.astype(memory.cotangents.dtype),
    )


def saturated(rows, dtype):
    """Rows, with the largest finite number in place of what is larger in a dtype."""
    if not is_narrower(dtype, rows.dtype):
        return rows
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(rows, -largest, largest)


def is_narrower(dtype, other):
    """Whether the range of a dtype is narrower than another's."""
    return jnp.finfo(dtype).maxexp < jnp.finfo(other).maxexp
