"""Row memory: what was not chosen waits, as rows, for the next batch.

The paper's: row m of the memory is added to row m of the batch, and the sum is one candidate. With
slots, the rows that wait are added up in a fixed number of them, row m in slot m mod slots, and the
slots are candidates of their own, beside the rows of the batch.

The outer product of a sum of rows has cross terms, of one row's inputs with another's cotangents.
With random signs (the same for inputs and cotangents) every true term stays what it is, and every
cross term has the expectation 0, however the rows are chosen: it is decided when the later of two
rows enters, and comes out once. So what has come out and what still waits add up, in expectation,
to the sum of all outer products.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.memory import Memory
from mem_aop_jax._kernels import row_access_tpu, row_sums_tpu
from mem_aop_jax._kernels.row_access import (
    choose_block_rows,
    flat_indices,
    flat_rows,
    gather_rows,
    grouped_row_norms,
)
from mem_aop_jax._numerics import accumulation_dtype, row_norms


class Rows(NamedTuple):
    """The rows of a batch, each with the row that waited for it.

    Attributes:
      x: `(groups, rows, in_features)`.
      g: `(groups, rows, out_features)`.
      memory: None, or with the shapes of x and g.
      show_lost: whether the gradient shows non-finite rows that were not chosen.
    """

    x: chex.Array
    g: chex.Array
    memory: Memory | None
    show_lost = False

    def norms(self) -> tuple[chex.Array, chex.Array]:
        """Of the candidates, `(groups, candidates)`; as `row_norms`."""
        if self.memory is None:
            return grouped_row_norms(self.x), grouped_row_norms(self.g)
        return tuple(row_norms(rows) for rows in self._joined())

    def fit(self) -> chex.Array | bool:
        """Which finite candidates stay finite in the memory."""
        if self.memory is None:
            return True
        x, g = (_fit(rows, self.memory.inputs.dtype) for rows in self._joined())
        return x & g

    def take(
        self,
        chosen: chex.Array,
        waiting: chex.Array,
        weights: tuple[chex.Array | None, chex.Array | None],
    ) -> tuple[tuple[chex.Array, chex.Array], "Rows"]:
        """The chosen candidates, and what is to be asked for the next memory.

        Args:
          chosen: `(groups, k)`, which.
          waiting: `(groups, candidates)` bool: neither chosen nor lost.
          weights: of the inputs and of the cotangents, `(groups, k)` floating; None is all ones.

        Returns:
          `(groups, k, in_features)` and `(groups, k, out_features)` in float32 (float64 for
          float64), a missing one NaN; the candidates.
        """
        del waiting
        taken = self._joined(lambda rows: gather_rows(rows, chosen))  # then the sum is not stored
        return _weighed(taken, weights), self

    def next_memory(
        self, waiting: chex.Array, decay: float, signs: chex.Array | None, after: chex.ArrayTree
    ) -> Memory:
        """The memory for the next batch.

        Args:
          waiting: as in `take`.
          decay: as in `MemAOP`.
          signs: `(groups, rows)`, 1 or -1; None is 1.
          after: the gradient, for which the last memory was read. Only after it is a donated
            memory written over, without a copy: the rows are joined anew.
        """
        rows = self._replace(
            x=flat_rows(self.x), g=flat_rows(self.g), memory=_in_place(self.memory)
        )
        rows, waiting = _after(after, (rows, waiting.reshape(-1)))
        signs = None if signs is None else signs.reshape(-1)
        kept = (_kept(a, waiting, decay, signs) for a in rows._joined())
        return _stored(rows.memory, *kept)

    def _joined(self, of=lambda rows: rows):
        memory = self.memory or (None, None)
        return tuple(
            sum(
                of(a).astype(accumulation_dtype(fresh.dtype))
                for a in (kept, fresh)
                if a is not None
            )
            for kept, fresh in zip(memory[:2], (self.x, self.g), strict=True)
        )


class Joined(NamedTuple):
    """`Rows` that kernels of a TPU joined where the memory was. Methods as in `Rows`.

    Attributes:
      memory: of the sums.
      lengths: their norms, `(groups, rows)`.
    """

    memory: Memory
    lengths: tuple[chex.Array, chex.Array]
    show_lost = False

    @classmethod
    def of(cls, x: chex.Array, g: chex.Array, memory: Memory) -> "Joined":
        """The rows of a batch, `(groups, rows, features)`, each with the row that waited for it."""
        lengths, sums = zip(
            *(
                row_sums_tpu.norms_and_sums(flat_rows(of), kept, _block_to_join(of))
                for of, kept in zip((x, g), memory[:2], strict=True)
            ),
            strict=True,
        )
        memory = memory._replace(inputs=sums[0], cotangents=sums[1])
        return cls(memory, tuple(of.reshape(x.shape[:2]) for of in lengths))

    def norms(self):
        """As in `Rows`."""
        return self.lengths

    def fit(self):
        """True: they are in the dtype of the memory."""
        return True

    def take(self, chosen, waiting, weights):
        """As in `Rows`. The others are those that wait, and zeros."""
        at, waiting = flat_indices(chosen, waiting.shape[1]), waiting.reshape(-1)
        taken, left = zip(
            *(
                row_access_tpu.extract_rows(
                    of,
                    at,
                    waiting,
                    row_access_tpu.choose_block_rows(len(of), len(at), of.shape[1], of.dtype),
                )
                for of in self.memory[:2]
            ),
            strict=True,
        )
        memory = self.memory._replace(inputs=left[0], cotangents=left[1])
        taken = (of.reshape(*chosen.shape, -1).astype(accumulation_dtype(of.dtype)) for of in taken)
        return _weighed(taken, weights), self._replace(memory=memory)

    def next_memory(self, waiting, decay, signs, after):
        """As in `Rows`, where decay is 1 and there are no signs."""
        del waiting, decay, signs, after
        return self.memory


def join_on_tpu(config: MemAOP, x: chex.Array, g: chex.Array, memory: Memory) -> bool:
    """Whether the next memory is one that `Joined` can write."""
    return (
        isinstance(config.policy, str)
        and config.decay == 1
        and not config.signed
        and config.memory_slots is None
        and x.dtype == g.dtype == memory.inputs.dtype
        and None not in (*map(_block_to_join, (x, g)), *(choose_block_rows(of, 1) for of in (x, g)))
    )


def _block_to_join(rows):
    groups, number, features = rows.shape
    return row_sums_tpu.choose_block_rows(groups * number, features, rows.dtype, with_memory=True)


class Slots(NamedTuple):
    """The rows of a batch, and after them the slots of the memory. Methods as in `Rows`.

    Attributes:
      x: `(groups, rows, in_features)`.
      g: `(groups, rows, out_features)`.
      memory: `(groups, slots, in_features)` and `(groups, slots, out_features)`.
    """

    x: chex.Array
    g: chex.Array
    memory: Memory
    show_lost = False

    def norms(self):
        """As in `Rows`."""
        return tuple(
            jnp.concatenate(
                [
                    grouped_row_norms(fresh),
                    grouped_row_norms(kept).astype(accumulation_dtype(fresh.dtype)),
                ],
                axis=1,
            )
            for fresh, kept in self._sides()
        )

    def fit(self):
        """True: a slot that outgrows its dtype is infinite, and chosen in the next step."""
        return True

    def take(self, chosen, waiting, weights):
        """As in `Rows`."""
        del waiting
        rows = self.x.shape[1]
        slot = jnp.where(chosen < rows, 0, chosen - rows)

        def one_of_both(fresh, kept):
            fresh, kept = (
                gather_rows(a, at).astype(accumulation_dtype(fresh.dtype))
                for a, at in ((fresh, chosen), (kept, slot))
            )
            return jnp.where(chosen[..., None] < rows, fresh, kept)

        return _weighed((one_of_both(*side) for side in self._sides()), weights), self

    def next_memory(self, waiting, decay, signs, after):
        """As in `Rows`."""
        groups, number, _ = self.memory.inputs.shape
        slots, waiting = _after(after, (self._replace(memory=_in_place(self.memory)), waiting))
        rows = self.x.shape[1]

        def added(fresh, kept):
            fresh = _kept(
                fresh.astype(accumulation_dtype(fresh.dtype)), waiting[:, :rows], decay, signs
            )
            kept = _kept(kept.astype(fresh.dtype), waiting[:, rows:].reshape(-1), decay)
            fresh = jnp.pad(fresh, ((0, 0), (0, -rows % number), (0, 0)))
            of_slots = fresh.reshape(groups, -1, number, fresh.shape[-1]).sum(axis=1)
            return kept + flat_rows(of_slots)

        return _stored(slots.memory, *(added(*side) for side in slots._sides()))

    def _sides(self):
        return (self.x, self.memory.inputs), (self.g, self.memory.cotangents)


def _weighed(taken, weights):
    """Chosen rows of inputs and of cotangents, times the weights of each."""
    return tuple(
        rows if of is None else rows * of[..., None].astype(rows.dtype)
        for rows, of in zip(taken, weights, strict=True)
    )


def _in_place(memory):
    """The memory in the shape in which layers hold it: XLA writes nothing over a reshaped one."""
    return memory._replace(inputs=flat_rows(memory.inputs), cotangents=flat_rows(memory.cotangents))


def _after(first, then):
    """The candidates and which of them wait, in a computation that has to wait for `first`."""
    candidates, waiting, first = lax.optimization_barrier((*then, first))
    return candidates, after_on_cpu(first, waiting)


@jax.jit  # also where the caller is not: what depends on the platform is compiled each time
def after_on_cpu(first: chex.Array, then: chex.Array) -> chex.Array:
    """`then`, for which a CPU has to wait until `first`, a matrix, is there.

    CPUs drop barriers before they put operations in order, and run some at the same time.
    """

    def on_cpu(then, first):
        some = jnp.max(first[:1, :1], initial=0)
        return jnp.where((some != some) & (some > 0), jnp.zeros_like(then), then)  # never 0

    return lax.platform_dependent(then, first, cpu=on_cpu, default=lambda then, first: then)


def _kept(rows, waiting, decay, signs=None):
    """The rows that wait; 0 in place of the others, which may not be finite."""
    rows = math.sqrt(decay) * rows
    if signs is not None:
        rows *= signs[..., None].astype(rows.dtype)
    return jnp.where(waiting[..., None], rows, 0)


def _stored(memory, inputs, cotangents):
    return memory._replace(
        inputs=inputs.astype(memory.inputs.dtype),
        cotangents=cotangents.astype(memory.cotangents.dtype),
    )


def _fit(rows, dtype):
    """Which finite rows stay finite in a dtype: all, unless its range is narrower."""
    if jnp.finfo(dtype).maxexp >= jnp.finfo(rows.dtype).maxexp:
        return True
    return jnp.all(jnp.abs(rows) <= float(jnp.finfo(dtype).max), axis=-1)
