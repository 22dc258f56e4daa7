"""Which K of the M rows enter the gradient: row scores, the paper's policies and unbiased ones.

A policy is any callable `policy(key, scores, k) -> Selection`; the named ones are in `POLICIES`. A
row that must not be left out, as it holds a NaN or an infinity or outgrows the memory, has an
infinite score: the named ones choose such rows before all others. The paper's choose rows whose
rest waits in a memory. The unbiased ones weigh the rows that they choose, so that the expectation
of the weighted sum is the sum over all rows.

To add one, write it here and name it in `POLICIES` (in `UNBIASED_POLICIES` if it returns weights),
in `RANDOM_POLICIES` if it draws, and in `PolicyName` in `config.py`; then in tests/core/
test_properties.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mem_aop_jax._numerics import safe_divide


class Selection(NamedTuple):
    """The rows that a policy chose.

    Attributes:
      indices: `(k,)` int32, rows of the batch; from the number of rows on, slots of the memory.
      weights: `(k,)` floating, the factor of each chosen outer product; None means all ones.
    """

    indices: chex.Array
    weights: chex.Array | None = None


Policy = Callable[[chex.PRNGKey | None, chex.Array, int], Selection]


def topk(key: chex.PRNGKey | None, scores: chex.Array, k: int) -> Selection:
    """The k rows of largest score; among equals the first."""
    del key
    return Selection(_top_k(scores, k))


def weightedk(key: chex.PRNGKey, scores: chex.Array, k: int) -> Selection:
    """k rows without replacement, with probabilities proportional to the score.

    The k largest of log score + Gumbel noise have the distribution of k draws made one after the
    other. Rows of zero score come last.
    """
    return topk(None, jnp.log(scores) + jax.random.gumbel(key, scores.shape, scores.dtype), k)


def randk(key: chex.PRNGKey, scores: chex.Array, k: int) -> Selection:
    """k rows uniformly, without replacement."""
    bits = jax.random.bits(key, scores.shape, jnp.uint32)
    drawn = jax.lax.bitcast_convert_type((bits >> 2) + 2**23, jnp.float32)  # ordered as the bits
    return topk(None, jnp.where(scores < jnp.inf, drawn, jnp.inf), k)


def uniform(key: chex.PRNGKey, scores: chex.Array, k: int) -> Selection:
    """k rows uniformly, without replacement, each with the weight rows / k.

    (Both less the number of rows with an infinite score, whose weight is 1.)
    """
    indices = randk(key, scores, k).indices
    certain = jnp.isinf(scores)
    number = jnp.sum(certain, dtype=scores.dtype)
    weight = (scores.size - number) / jnp.maximum(k - number, 1)
    return Selection(indices, jnp.where(certain[indices], 1, weight))


def crs(key: chex.PRNGKey, scores: chex.Array, k: int) -> Selection:
    """k rows with replacement, with probabilities p in proportion to the norm product.

    Their weights are 1 / (k p) (Drineas, Kannan, Mahoney 2006). With k = rows all rows, once.
    (Rows with an infinite score come once and first, with the weight 1; the others share the rest.)
    """
    if k == scores.size:
        return uniform(key, scores, k)
    certain = jnp.isinf(scores)
    first = jnp.arange(k) < jnp.sum(certain)
    norms = jnp.sqrt(jnp.where(certain, 0, scores))
    total = norms.sum()
    indices = jax.random.choice(key, scores.size, (k,), p=safe_divide(norms, total))
    certain_indices = jnp.nonzero(certain, size=k, fill_value=0)[0].astype(indices.dtype)
    indices = jnp.where(first, certain_indices, indices)
    drawn = jnp.where(first, 0, norms[indices])  # 0 where all are
    draws = jnp.maximum(jnp.sum(~first, dtype=scores.dtype), 1)
    weights = total / (draws * jnp.where(drawn > 0, drawn, 1))
    return Selection(indices, jnp.where(drawn > 0, weights, 1))


def priority(key: chex.PRNGKey, scores: chex.Array, k: int) -> Selection:
    """Priority sampling without replacement (Duffield, Lund, Thorup 2007).

    The k rows with the largest s / u, where s is the norm product and u uniform in (0, 1]; their
    weights are max(1, t / s), where t is the (k+1)-th largest s / u. Rows that stand out are exact.
    """
    norms = jnp.sqrt(scores)
    priorities = norms / (1 - jax.random.uniform(key, scores.shape, scores.dtype))
    indices = _top_k(priorities, min(k + 1, scores.size))
    threshold = priorities[indices[k]] if k < scores.size else jnp.zeros_like(priorities[0])
    drawn = norms[indices[:k]]  # 0 where no more rows have a score, and then the threshold is too
    weights = jnp.maximum(1, threshold / jnp.where(drawn > 0, drawn, 1))
    return Selection(indices[:k], jnp.where(drawn < jnp.inf, weights, 1))


COMPARED = 2**13  # rows; GPUs sort more of them faster than they compare each with each


@functools.partial(jax.jit, static_argnums=1)  # as `row_norms`
def _top_k(scores: chex.Array, k: int) -> chex.Array:
    """The indices of `lax.top_k`."""

    def sort(scores):  # by the barrier, or XLA sorts all for two slices of the result
        return jax.lax.optimization_barrier(jax.lax.top_k(scores, k)[1])

    if scores.size > COMPARED:
        return sort(scores)
    compare = functools.partial(top_k_by_rank, k=k)
    return jax.lax.platform_dependent(scores, cuda=compare, default=sort)


def top_k_by_rank(scores: chex.Array, k: int) -> chex.Array:
    """The indices of `lax.top_k`, without NaNs: it counts the rows that come before each row."""
    row = jnp.arange(scores.size, dtype=jnp.int32)
    larger = scores[:, None] > scores[None]
    earlier_equal = (scores[:, None] == scores[None]) & (row[:, None] < row[None])
    rank = jnp.sum(larger | earlier_equal, axis=0, dtype=jnp.int32)
    return jnp.zeros((k,), jnp.int32).at[rank].set(row, mode="drop")


UNBIASED_POLICIES: dict[str, Policy] = {"priority": priority, "crs": crs, "uniform": uniform}
POLICIES: dict[str, Policy] = {
    "topk": topk, "weightedk": weightedk, "randk": randk, **UNBIASED_POLICIES,
}  # fmt: skip
RANDOM_POLICIES = frozenset({"weightedk", "randk", *UNBIASED_POLICIES})  # those that need a key


def map_groups(
    select: Callable[[chex.PRNGKey | None, chex.Array], Selection],
    key: chex.PRNGKey | None,
    scores: chex.Array,
) -> Selection:
    """`select(key, scores)` of each group of scores `(groups, candidates)`, each with its key."""
    groups = len(scores)
    if groups == 1:
        return jax.tree.map(lambda a: a[None], select(key, scores[0]))
    keys = None if key is None else jax.random.split(key, groups)
    return jax.vmap(select)(keys, scores)


def row_scores(
    input_norms: chex.Array, cotangent_norms: chex.Array, storable: chex.Array | bool = True
) -> tuple[chex.Array, chex.Array]:
    """The score of each row, (||inputs[m]|| ||cotangents[m]||)^2, relative to the largest.

    A constant factor on either changes no score, although squared norms of small gradients
    underflow: the scores are the paper's up to one common factor.

    Args:
      input_norms: `(..., rows)`, from `row_norms`.
      cotangent_norms: `(..., rows)`, from `row_norms`.
      storable: `(..., rows)` bool, which rows may be left out, if they are finite.

    Returns:
      `(..., rows)` float32 scores, and `(..., rows)` bool, which rows may be left out. The largest
      score of these is 1 in each group (all are 0 where every product is 0), the others' infinite.
    """
    storable &= jnp.isfinite(input_norms) & jnp.isfinite(cotangent_norms)
    x, g = (_relative(jnp.where(storable, n, 0)) for n in (input_norms, cotangent_norms))
    return jnp.where(storable, jnp.square(_relative(x * g)), jnp.inf), storable


def _relative(values):
    """Values in units of the largest of their group, float32."""
    largest = jnp.max(values, axis=-1, keepdims=True, initial=0)
    return safe_divide(values, largest).astype(jnp.float32)
