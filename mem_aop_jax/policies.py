"""Which K of the M rows enter the gradient: row scores, and the paper's three policies.

A policy is any callable `policy(key, scores, k) -> Selection`; the named ones are in `POLICIES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np


class Selection(NamedTuple):
    """The rows that a policy chose.

    Attributes:
      indices: `(k,)` int32, rows of the batch.
      weights: `(k,)` floating, the factor of each chosen outer product; None means all ones.
    """

    indices: chex.Array
    weights: chex.Array | None = None


Policy = Callable[[chex.PRNGKey | None, chex.Array, int], Selection]


def topk(key: chex.PRNGKey | None, scores: chex.Array, k: int) -> Selection:
    """The k rows of largest score; among equals the first."""
    del key
    return Selection(jax.lax.top_k(scores, k)[1])


def weightedk(key: chex.PRNGKey, scores: chex.Array, k: int) -> Selection:
    """k rows without replacement, with probabilities proportional to the score.

    The k largest of log score + Gumbel noise have the distribution of k draws made one after the
    other. Rows of zero score come last.
    """
    return topk(None, jnp.log(scores) + jax.random.gumbel(key, scores.shape, scores.dtype), k)


def randk(key: chex.PRNGKey, scores: chex.Array, k: int) -> Selection:
    """k rows uniformly, without replacement."""
    return topk(None, jax.random.bits(key, scores.shape, jnp.uint32), k)


POLICIES: dict[str, Policy] = {"topk": topk, "weightedk": weightedk, "randk": randk}
RANDOM_POLICIES = frozenset({"weightedk", "randk"})  # those that cannot do without a key


def row_scores(inputs: chex.Array, cotangents: chex.Array) -> tuple[chex.Array, chex.Array]:
    """The score of each row, (||inputs[m]|| ||cotangents[m]||)^2, relative to the largest.

    A constant factor on either array changes no score, although squared norms of small gradients
    underflow: the scores are the paper's up to one common factor.

    Args:
      inputs: `(..., rows, in_features)` floating.
      cotangents: `(..., rows, out_features)` floating.

    Returns:
      `(..., rows)` float32 scores, the largest of each group of rows 1 (all 0 where every product
      is 0), and `(..., rows)` bool, False for the rows with a NaN or infinity: their score is 0.
    """
    input_norms, cotangent_norms = _norms(inputs), _norms(cotangents)
    finite = jnp.isfinite(input_norms) & jnp.isfinite(cotangent_norms)
    relative = [_over_largest(jnp.where(finite, n, 0)) for n in (input_norms, cotangent_norms)]
    return jnp.square(_over_largest(relative[0] * relative[1])), finite


def _norms(rows: chex.Array) -> chex.Array:
    """Euclidean norms of rows of any finite size, in units of 256, without under- or overflow.

    Three scaled sums of squares, of which the first finite one is good. A single reduction of three
    operands, since only that reads the rows once and stores nothing of their size everywhere.
    """
    scales = (2.0**80, 1.0, 2.0**-80)
    squares = tuple(jnp.square(rows * scale) for scale in scales)
    zero = np.zeros((), rows.dtype)
    sums = jax.lax.reduce(squares, (zero,) * len(scales), _add_each, dimensions=(rows.ndim - 1,))
    small, medium, large = (
        jnp.sqrt(total) * (2.0**-8 / scale) for total, scale in zip(sums, scales, strict=True)
    )
    return jnp.where(sums[0] < jnp.inf, small, jnp.where(sums[1] < jnp.inf, medium, large))


def _add_each(a, b):
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _over_largest(values: chex.Array) -> chex.Array:
    """Values in units of the largest of their group, float32."""
    largest = jnp.max(values, axis=-1, keepdims=True, initial=0)
    return (values / jnp.where(largest > 0, largest, 1)).astype(jnp.float32)
