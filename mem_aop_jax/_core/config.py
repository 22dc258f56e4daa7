"""The static configuration of an approximate dense layer."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import operator
from collections.abc import Hashable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mem_aop_jax._core.policies import POLICIES, RANDOM_POLICIES, UNBIASED_POLICIES, Policy

PolicyName = Literal["topk", "weightedk", "randk", "priority", "crs", "uniform"]
MemoryName = Literal["auto", "rows", "subspace"]


class MemoryRules(NamedTuple):
    """What a kind of memory asks of a configuration."""

    options: tuple[str, ...]  # the attributes of `MemAOP` that it reads, of those of memories
    weights: bool | None  # True: its policy must return weights; False: must not; None: either


MEMORIES = {
    "rows": MemoryRules(("decay", "memory_dtype", "signed", "memory_slots"), weights=False),
    "subspace": MemoryRules(("rank", "refresh"), weights=True),
}


class _KnownOptions:
    """Refuses options that a configuration does not have, and names the nearest that it has."""

    def __new__(cls, *args, **options):
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in options:
            if name not in names:
                raise TypeError(
                    f"{cls.__name__} got an unexpected keyword argument {name!r}; its options are "
                    f"{', '.join(names)}.{nearest(name, names)}"
                )
        return super().__new__(cls)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class InputGrad(_KnownOptions):
    """How the gradient of a layer's inputs is estimated, without bias (not the paper's: exact).

    The product of the cotangents with the kernel is computed for some of the rows, drawn by
    "priority" sampling and weighted; of all rows, exactly, for the part of the cotangents in the
    span of their leading directions, which a `Subspace` keeps. Rows with a NaN or infinity are
    drawn before all others, and are what they are in the exact layer; if there are more of them
    than are drawn, all rows (of their group) are NaN.

    Attributes:
      ratio: fraction of the rows to draw, in (0, 1]: at least one of each group; 1 is exact.
      rank: number of directions of the cotangents (at most as many as there are out_features); 0
        is sampling alone.

    Raises:
      TypeError: an attribute of the wrong type.
      ValueError: a value outside its range.
    """

    ratio: float = 0.25
    rank: int = 32

    def __post_init__(self):
        ratio = _fraction("ratio", self.ratio, include_zero=False, owner="InputGrad")
        object.__setattr__(self, "ratio", ratio)
        object.__setattr__(self, "rank", _count("rank", self.rank, least=0, owner="InputGrad"))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class MemAOP(_KnownOptions):
    """What a dense layer keeps of its weight gradient, and where the rest waits.

    Frozen and hashable, hence static under `jit`: two equal configurations compile once.

    Attributes:
      k: number of outer products to compute, of one per row of the batch (the paper's K).
      ratio: the same as a fraction of the rows, in (0, 1]: `k = max(1, round(ratio * rows))`.
        Give exactly one of `k` and `ratio`.
      policy: which rows: "topk", "weightedk", "randk" (the three of the paper); "priority", "crs",
        "uniform" (unbiased: they weigh what they choose); or a callable
        `policy(key, scores, k) -> Selection`. The score of a row that must not be left out, since
        it holds a NaN or an infinity or outgrows the memory, is infinite.
      memory: "rows" keeps each row that was not chosen and adds it to the same row of the next
        batch (the paper's memory); "subspace" keeps directions: the part of the gradient in the
        span of the leading directions of inputs and cotangents is computed exactly, and an unbiased
        policy samples the rest (see `Subspace`); None keeps nothing. "auto" is None for the
        unbiased policies, else "rows".
      decay: of row memory: factor on what a kept row's outer product is worth a step later, in
        [0, 1]. Every published experiment has 1.
      memory_dtype: of row memory: its floating dtype, for instance `jnp.bfloat16`; None means that
        of the layer's inputs.
      signed: of row memory: the rows that wait get random signs, the same for inputs and
        cotangents, so that a sum of several has no cross terms in expectation. Needs a key.
      memory_slots: of row memory: the rows that wait are added up in that many slots, which are
        chosen from as the rows of the batch are: row m in slot m mod memory_slots, of its group.
        None keeps one for each row of the batch. With slots, any batch size goes with a memory. A
        multiple of groups.
      rank: of subspace memory: number of directions of the inputs and of the cotangents (at most
        as many as there are features); or a pair, with 0 for no directions of the cotangents.
      refresh: of subspace memory: the directions follow the rows in one of so many steps, at
        random. They move slowly: most of the cost of a refresh is saved for little. (Under `vmap`
        over keys or memories nothing is saved: a branch is computed there in every step. A GPU,
        whose passes over the rows take as long with more columns, saves what makes them
        orthonormal.)
      groups: the rows are split into that many contiguous groups of equal size, and an equal share
        of k is chosen in each. With a multiple of the devices that share a batch under `jit`, no
        row leaves its device. Under `shard_map` and `pmap` a device selects among its own rows
        anyhow. With `ratio`, `k = groups * max(1, round(ratio * rows / groups))`.
      input_grad: how the gradient of the inputs is estimated; None is exact. Needs a key, and with
        a rank, subspace memory. What it leaves wrong is passed on to all layers below: no two
        layers may have the same key, or the gradients below them are biased. Without the key, or
        without the memory that it needs, the gradient of the inputs is exact (where the kernel is
        differentiated too, that is an error).

    Raises:
      TypeError: an attribute of the wrong type.
      ValueError: k and ratio both or neither, or a value outside its range.
    """

    k: int | None = None
    ratio: float | None = None
    policy: PolicyName | Policy = "topk"
    memory: MemoryName | None = "auto"
    decay: float = 1.0
    memory_dtype: chex.ArrayDType | None = None
    signed: bool = False
    memory_slots: int | None = None
    rank: int | tuple[int, int] = 16
    refresh: int = 1
    groups: int = 1
    input_grad: InputGrad | None = None

    def __post_init__(self):
        if (self.k is None) == (self.ratio is None):
            raise ValueError(
                f"MemAOP got k={self.k} and ratio={self.ratio}; give exactly one of them, "
                "for instance MemAOP(ratio=0.25) or MemAOP(k=32)."
            )
        if self.k is not None:
            object.__setattr__(self, "k", _count("k", self.k))
        else:
            object.__setattr__(self, "ratio", _fraction("ratio", self.ratio, include_zero=False))
        object.__setattr__(self, "groups", _count("groups", self.groups))
        if self.k is not None and self.k % self.groups:
            raise ValueError(
                f"MemAOP got k={self.k} and groups={self.groups}; each group gets an equal share, "
                "so k must be a multiple of groups. Change one of them, or use ratio=."
            )
        if not (callable(self.policy) or _is_one_of(self.policy, POLICIES)):
            raise ValueError(
                f"MemAOP got policy={self.policy!r}; the known ones are "
                f"{', '.join(map(repr, POLICIES))}, or give a callable "
                f"policy(key, scores, k) -> Selection.{nearest(self.policy, POLICIES)}"
            )
        if not isinstance(self.policy, Hashable):
            raise TypeError(
                f"MemAOP got policy={self.policy!r}, which is not hashable; give a function, or an "
                "object with __hash__ (for instance a frozen dataclass)."
            )
        if not (self.memory is None or _is_one_of(self.memory, ("auto", *MEMORIES))):
            names = ", ".join(map(repr, get_args(MemoryName)))
            raise ValueError(
                f"MemAOP got memory={self.memory!r}; it is one of {names}, None: 'rows' keeps the "
                "rows that were not chosen, 'subspace' keeps directions, None keeps nothing."
                f"{nearest(self.memory, get_args(MemoryName))}"
            )
        self._check_policy_and_memory()
        object.__setattr__(self, "decay", _fraction("decay", self.decay, include_zero=True))
        if self.memory_dtype is not None:
            dtype = floating_dtype("memory_dtype", self.memory_dtype)
            object.__setattr__(self, "memory_dtype", dtype)
        if not isinstance(self.signed, bool):
            raise TypeError(f"MemAOP got signed={self.signed!r}; it must be True or False.")
        if self.memory_slots is not None:
            object.__setattr__(self, "memory_slots", _count("memory_slots", self.memory_slots))
            if self.memory_slots % self.groups:
                raise ValueError(
                    f"MemAOP got memory_slots={self.memory_slots} and groups={self.groups}; each "
                    "group has an equal share, so memory_slots must be a multiple of groups."
                )
        object.__setattr__(self, "rank", _rank(self.rank))
        object.__setattr__(self, "refresh", _count("refresh", self.refresh))
        if not (self.input_grad is None or isinstance(self.input_grad, InputGrad)):
            raise TypeError(
                f"MemAOP got input_grad={self.input_grad!r}; it must be an aop.InputGrad, for "
                "instance aop.InputGrad(ratio=0.25, rank=32), or None for exact input gradients."
            )
        self._check_options_of_memory()

    def _check_policy_and_memory(self):
        weights = MEMORIES[self.memory].weights if self.memory in MEMORIES else None
        if callable(self.policy) or weights in (None, self.policy in UNBIASED_POLICIES):
            return
        fitting = [repr(name) for name in POLICIES if (name in UNBIASED_POLICIES) == weights]
        if not weights:
            raise ValueError(
                f"MemAOP got memory={self.memory!r} and policy={self.policy!r}, whose weights make "
                "up for the rows that it does not choose; from a memory they would come a second "
                f"time. Use memory=None or 'subspace', or one of the policies {', '.join(fitting)}."
            )
        raise ValueError(
            f"MemAOP got memory={self.memory!r} and policy={self.policy!r}, which drops the rows "
            f"that it does not choose: with a {self.memory} nothing brings them back. Use a policy "
            f"with weights, {', '.join(fitting)}."
        )

    def _check_options_of_memory(self):
        kind = self.memory_kind
        own_options = () if kind is None else MEMORIES[kind].options
        for owner, (options, _) in MEMORIES.items():
            for name in options:
                if name not in own_options and getattr(self, name) != getattr(type(self), name):
                    raise ValueError(
                        f"MemAOP got {name}={getattr(self, name)}, which memory={kind!r} does not "
                        f"have (memory={self.memory!r}, policy={self.policy!r}); leave it out, or "
                        f"use memory={owner!r}."
                    )
        if self.input_rank and kind != "subspace":
            raise ValueError(
                f"MemAOP got input_grad={self.input_grad}, whose directions a subspace keeps, and "
                f"memory={kind!r} (memory={self.memory!r}, policy={self.policy!r}). Use rank=0, or "
                "memory='subspace' with a policy that has weights."
            )

    @property
    def memory_kind(self) -> str | None:
        """ "rows" (a `Memory`), "subspace" (a `Subspace`) or None."""
        if self.memory == "auto":
            return None if self.policy in UNBIASED_POLICIES else "rows"
        return self.memory

    def ranks(self, in_features: int, out_features: int) -> tuple[int, int]:
        """The number of directions of the inputs and of the cotangents, for a layer's sizes.

        Those that the kernel's gradient takes out before it samples.
        """
        inputs, cotangents = self.rank if isinstance(self.rank, tuple) else (self.rank,) * 2
        return min(inputs, in_features), min(cotangents, out_features)

    def held_ranks(self, in_features: int, out_features: int) -> tuple[int, int]:
        """The ranks that a `Subspace` holds: the input gradient may ask for more cotangents'."""
        inputs, cotangents = self.ranks(in_features, out_features)
        return inputs, max(cotangents, min(self.input_rank, out_features))

    @property
    def input_rank(self) -> int:
        """The number of directions that the input gradient takes out; 0 without one."""
        return 0 if self.input_grad is None else self.input_grad.rank

    @property
    def why_key(self) -> str | None:
        """What draws at random and so needs a key, for an error message; None if nothing does."""
        if self.signed or self.refresh > 1:
            option = "signed=True" if self.signed else f"refresh={self.refresh}"
            return f"a memory with {option} draws at random"
        if self.policy in RANDOM_POLICIES:
            return f"policy {self.policy!r} draws at random"
        if self.input_grad is not None and self.input_grad.ratio < 1:
            return f"input_grad={self.input_grad} draws at random"
        return None

    @property
    def needs_key(self) -> bool:
        """Whether a named policy, the memory or the input gradient draws at random."""
        return self.why_key is not None

    def stored_dtype(self, inputs: chex.ArrayDType) -> jnp.dtype:
        """The dtype of the memory of a layer whose inputs have dtype `inputs`."""
        dtype = inputs if self.memory_dtype is None else self.memory_dtype
        return jnp.zeros((), dtype).dtype  # float32 for float64 where x64 is off, as JAX has it

    def selected_rows(self, rows: int, layer: str = "MemAOP") -> int:
        """The number of outer products computed for a batch of `rows` rows (the paper's K of M).

        Args:
          rows: the product of all dimensions of the layer's inputs but the last.
          layer: who asks, for the error message.

        Raises:
          ValueError: k is larger than rows, or `groups` does not divide them.
        """
        if rows == 0:
            raise ValueError(f"{layer}: the batch has no rows; there is nothing to select from.")
        if rows % self.groups:
            raise ValueError(
                f"{layer}: groups={self.groups} do not divide a batch of {rows} rows; every group "
                "has the same number of rows. Change groups or the batch size."
            )
        if self.k is None:
            return self._share_of(rows, self.ratio)
        if self.k > rows:
            raise ValueError(
                f"{layer}: k={self.k} outer products asked of a batch of {rows} rows; k must be at "
                "most the number of rows. Use ratio= instead of k=, a smaller k, or a larger "
                "batch (initialise a model on a batch of the size that it will train on)."
            )
        return self.k

    def input_rows(self, rows: int) -> int:
        """The number of rows drawn for the gradient of the inputs; all of them is exact."""
        return rows if self.input_grad is None else self._share_of(rows, self.input_grad.ratio)

    def _share_of(self, rows, ratio):
        return self.groups * max(1, round(ratio * rows / self.groups))


def nearest(name: object, known: Iterable[str]) -> str:
    """A question whether the nearest of the known names was meant, to end an error message."""
    found = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
    return f" Did you mean {found[0]!r}?" if found else ""


def _is_one_of(value: object, names: Iterable[str]) -> bool:
    return isinstance(value, str) and value in names


def _count(name: str, value: Any, least: int = 1, owner: str = "MemAOP") -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{owner} got {name}={value!r}; it must be an integer, at least {least}."
        ) from None
    if count < least:
        raise ValueError(f"{owner} got {name}={count}; it must be at least {least}.")
    return count


def _rank(rank: int | tuple[int, int]) -> int | tuple[int, int]:
    if not isinstance(rank, tuple):
        return _count("rank", rank)
    if len(rank) != 2:
        raise ValueError(
            f"MemAOP got rank={rank}; it must be an integer, or two: for inputs and cotangents."
        )
    if rank[0] == 0:
        raise ValueError(
            f"MemAOP got rank={rank}, for the inputs rank=0; it must be at least 1. Only that of "
            "the cotangents may be 0; memory=None keeps no directions."
        )
    return _count("rank[0]", rank[0]), _count("rank[1]", rank[1], least=0)


def _fraction(name: str, value: float, *, include_zero: bool, owner: str = "MemAOP") -> float:
    bounds = "[0, 1]" if include_zero else "(0, 1]"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{owner} got {name}={value!r}; it must be a number in {bounds}.")
    if not 0 <= value <= 1 or (value == 0 and not include_zero):  # NaN fails too
        raise ValueError(f"{owner} got {name}={value}; it must lie in {bounds}.")
    return float(value)


def floating_dtype(name: str, dtype: chex.ArrayDType) -> jnp.dtype:
    """`dtype` as a NumPy dtype, if it is floating; `name` is the argument, for the error."""
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or not jnp.issubdtype(resolved, jnp.floating):
        raise TypeError(
            f"mem_aop_jax got {name}={getattr(resolved, 'name', dtype)}; it must be a floating "
            "dtype, for instance jnp.float32 or jnp.bfloat16."
        )
    if np.any(np.array([0.0, -1.0]).astype(resolved).astype(np.float64) != (0, -1)):
        raise TypeError(f"mem_aop_jax got {name}={resolved.name}, which has no zero or no sign.")
    return resolved
