"""Which K of the M rows enter the gradient: row scores, and the paper's three policies.

A policy is any callable `policy(key, scores, k) -> Selection`; the named ones are in `POLICIES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


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


def row_scores(
    inputs: chex.Array, cotangents: chex.Array, largest: float = float("inf")
) -> tuple[chex.Array, chex.Array]:
    """The score of each row, (||inputs[m]|| ||cotangents[m]||)^2, relative to the largest.

    Both arrays are normalised before anything is squared, so a constant factor from 1e-15 to 1e15
    on either changes no score: the scores are those of the paper up to one common factor.

    Args:
      inputs: `(rows, in_features)` floating.
      cotangents: `(rows, out_features)` floating.
      largest: the magnitude beyond which an entry counts as infinite.

    Returns:
      `(rows,)` float32 scores, the largest of them 1 (all 0 where every product is 0), and
      `(rows,)` bool, False for the rows with a NaN or infinity: their score is 0.
    """
    input_norms, finite_inputs = _relative_norms(inputs, largest)
    cotangent_norms, finite_cotangents = _relative_norms(cotangents, largest)
    finite = finite_inputs & finite_cotangents
    products = jnp.where(finite, input_norms * cotangent_norms, 0)
    return jnp.square(products / _nonzero(jnp.max(products, initial=0))), finite


def _relative_norms(rows: chex.Array, largest: float) -> tuple[chex.Array, chex.Array]:
    """Row norms in units of the largest finite entry, float32, and which rows are finite."""
    peaks = jnp.max(jnp.abs(rows), axis=1, initial=0)
    finite = (peaks <= largest) & (peaks < jnp.inf)  # False for NaN too
    unit = _nonzero(jnp.max(jnp.where(finite, peaks, 0), initial=0))
    scaled = (rows / unit).astype(jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.square(scaled), axis=1)), finite


def _nonzero(scale: chex.Array) -> chex.Array:
    return jnp.where(scale > 0, scale, jnp.ones_like(scale))
