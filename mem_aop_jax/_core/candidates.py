"""What a policy chooses from: the protocol that every memory follows.

The backward pass (`primitive.py`) computes the gradient of a kernel in four steps, the same for
every memory, and asks the candidates for what differs:

    select      S = policy(scores, K)          norms(), storable()
    gather      the chosen outer products      gather()
    multiply    their sum                      exact_part()
    store       the next memory                next_memory()

To add a memory, write one file beside `row_memory.py`: a subclass of `Candidates`, and a
`MemoryKind` that makes it. Then name it in two tables, `MEMORIES` in `config.py` (beside its name
in `MemoryName`) and `MEMORY_KINDS` in `memory_kinds.py`, and in the configurations of
tests/core/test_properties.py; what it keeps needs a test of its own. Reuse the state of rows
(`Memory`) or of directions (`Subspace`) if you can. A state of its own goes into `LayerMemory` in
`memory.py`, and these must know what it holds: `carried`, `why_exact`, `state_shardings`,
`Controller`.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._core import validation
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.projection import Projection, project
from mem_aop_jax._numerics import widened

# What a layer's key is folded with, one number for each use, beside those of the groups.
SIGNS_KEY, REFRESH_KEY, INPUTS_KEY, NESTED_KEY = range(2**31, 2**31 + 4)

Factors = tuple[chex.Array, chex.Array]  # of outer products: X and G, or their norms


class Call(NamedTuple):
    """The static part of one call of a layer; the sizes are (rows, in_features, out_features)."""

    config: MemAOP
    sizes: tuple[int, int, int]
    dimension_numbers: lax.DotDimensionNumbers
    precision: lax.PrecisionLike
    name: str  # for errors


class Chosen(NamedTuple):
    """The candidates that a policy chose in each group.

    Attributes:
      indices: `(groups, k)` int32; not below the number of candidates for one that is missing.
      weights: `(groups, k)` floating, NaN where the gradient is void; None is all ones.
      waiting: `(groups, candidates)` bool: not chosen, and finite.
      is_void: `()` bool, whether the gradient must be NaN: the memory was misused, or a lost
        candidate would not show in it.
    """

    indices: chex.Array
    weights: chex.Array | None
    waiting: chex.Array
    is_void: chex.Array | bool

    def side_weights(self, x: chex.Array, g: chex.Array) -> tuple[chex.Array | None, ...]:
        """The weights of the inputs and of the cotangents: the smaller factor has them."""
        return (None, self.weights) if g.shape[-1] <= x.shape[-1] else (self.weights, None)


@dataclasses.dataclass(frozen=True)
class Candidates(abc.ABC):
    """The outer products that a policy chooses from, in groups.

    Attributes:
      call: the static part of the layer's call.
      x: `(groups, rows, in_features)`, the inputs.
      g: `(groups, rows, out_features)`, the cotangents of the outputs.
      memory: of the layer; None where it has none.
      key: of the layer, for what the memory draws at random.
    """

    call: Call
    x: chex.Array
    g: chex.Array
    memory: Any
    key: chex.PRNGKey | None

    @property
    def shows_lost_rows(self) -> bool:
        """Whether a row with a NaN or an infinity shows in the gradient without being chosen."""
        return False

    @abc.abstractmethod
    def norms(self) -> Factors:
        """Euclidean norms of both factors, `(groups, candidates)` each, as `row_norms` has them."""

    def storable(self) -> chex.Array | bool:
        """`(groups, candidates)` bool: False for one that is too large for the memory's dtype.

        It is then chosen first, as one with a NaN or an infinity is; if there are too many of them,
        `next_memory` keeps what fits.
        """
        return True

    @abc.abstractmethod
    def gather(self, chosen: Chosen) -> tuple[Factors, "Candidates"]:
        """The chosen candidates, `weighted`, and whose `next_memory` to call, mostly `self`.

        Both factors are `(groups, k, features)`, in the dtype in which they are added up, or
        rounded already; NaN in place of a missing candidate.
        """

    def exact_part(self) -> Factors | None:
        """L `(n, in_features)` and R `(n, out_features)`, of all rows: L^T R is added to dW."""
        return None

    @abc.abstractmethod
    def next_memory(self, chosen: Chosen, dw: chex.Array) -> Any:
        """The memory for the next batch, in the shapes and dtypes in which the layer holds it.

        The caller sets its `uses`. `dw` is the gradient: what is stored after it (`after_gradient`
        in `row_memory.py`) overwrites a donated memory without a copy.
        """

    def cotangent_projection(self) -> Projection:
        """The cotangents on the directions that an input gradient takes out of them."""
        return project(self.g, None, self.call.precision)


def sum_of_chosen(x: chex.Array, g: chex.Array, chosen: Chosen, precision) -> chex.Array:
    """The weighted sum of the chosen rows' outer products, `(in_features, out_features)`."""

    def take(rows):
        return jnp.take_along_axis(widened(rows), chosen.indices[..., None], axis=1, mode="fill")

    xs, gs = weighted((take(x), take(g)), chosen)
    return jnp.einsum("gkn,gkp->np", xs, gs, precision=precision)


def weighted(factors: Factors, chosen: Chosen) -> Factors:
    """The gathered rows of inputs and cotangents times the weights; NaN if the gradient is void."""
    weights = chosen.side_weights(*factors)
    xs, gs = (
        rows if factor is None else rows * factor[..., None].astype(rows.dtype)
        for rows, factor in zip(factors, weights, strict=True)
    )
    return xs, gs if chosen.weights is not None else jnp.where(chosen.is_void, jnp.nan, gs)


class MemoryKind(abc.ABC):
    """A kind of memory, a name in `MemAOP(memory=...)`.

    Attributes:
      state: the NamedTuple that a layer holds from step to step; its last field is `uses`.
    """

    state: type

    @abc.abstractmethod
    def init(
        self, config: MemAOP, rows: int, in_features: int, out_features: int, dtype: jnp.dtype
    ) -> Any:
        """The first memory of a layer whose inputs have this dtype."""

    @abc.abstractmethod
    def check(
        self, name: str, config: MemAOP, x: chex.Array, sizes: tuple[int, int, int], memory: Any
    ) -> None:
        """Raises an error unless the memory is one for inputs x and (rows, in, out) features."""

    @abc.abstractmethod
    def candidates(
        self,
        call: Call,
        x: chex.Array,
        g: chex.Array,
        memory: Any,
        key: chex.PRNGKey | None,
        differentiates_inputs: bool,
    ) -> Candidates:
        """What the policy chooses from; x and g as in `Candidates`, the memory as a layer holds it.

        `differentiates_inputs` says whether the gradient of the inputs is approximate, too.
        """

    def fixed_estimate(
        self, call: Call, x: chex.Array, g: chex.Array, memory: Any, chosen: Chosen
    ) -> chex.Array:
        """dW `(in_features, out_features)` of other rows, for the derivative of a gradient.

        What was chosen, its weights and the memory are fixed: it is linear in x and in g.

        Raises:
          ValueError: rows of other steps are in dW.
        """
        validation.not_differentiable(call, f"memory={call.config.memory_kind!r}")

    def tpu_candidates(
        self, call: Call, x: chex.Array, g: chex.Array, memory: Any
    ) -> Callable[..., Candidates] | None:
        """A function of (call, x, g, memory, key) that returns candidates for a TPU's kernels.

        None where `candidates` serves there, too.
        """
        return None

    def gpu_candidates(
        self, call: Call, x: chex.Array, g: chex.Array, memory: Any
    ) -> Callable[..., Candidates] | None:
        """The same for a GPU's kernels."""
        return None
