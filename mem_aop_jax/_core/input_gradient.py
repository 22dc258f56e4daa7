"""The approximate gradient of the inputs. Not the paper's, where it is exact.

With U (P, q) the directions of the cotangents and G = B U^T + Gr, B = G U:

    dX ~ B (W U)^T                       for all rows
         + w * Gr[S] W^T                 for the rows S that are drawn, scores ||Gr[m]||

It is unbiased, whatever U is. For the rows S both terms are one product of (B U^T + w Gr)[S] with
W^T.
"""

import functools

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._core.candidates import INPUTS_KEY, Call
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.policies import map_groups, priority, row_scores
from mem_aop_jax._core.projection import Projection
from mem_aop_jax._kernels.row_access import replace_product_rows, replace_rows
from mem_aop_jax._numerics import widest_dtype


def approximates_inputs(config: MemAOP, rows: int, memory, key: chex.PRNGKey | None) -> bool:
    """Whether a layer's gradient of the inputs is approximate: not without what it needs."""
    wanted = config.input_grad
    if wanted is None or key is None or (wanted.rank and memory is None):
        return False
    if rows == 0 or rows % config.groups or (config.k is not None and config.k > rows):
        return False
    return config.input_rows(rows) < rows


def input_gradient(
    call: Call, g: Projection, kernel: chex.Array, key: chex.PRNGKey, dtype: jnp.dtype
) -> chex.Array:
    """dX `(groups, rows, in_features)`.

    Args:
      call: the static part of the layer's call.
      g: the cotangents on the directions to take out.
      kernel: `(in_features, out_features)`.
      key: of the layer.
      dtype: of the result.
    """
    product_dtype = widest_dtype(g.basis.dtype, kernel.dtype)  # of products and their results

    def matmul(a, b):
        a, b = a.astype(product_dtype), b.astype(product_dtype)
        return jnp.matmul(a, b, precision=call.precision)

    norms = g.residual_norms()
    scores, finite = row_scores(jnp.ones_like(norms), norms)
    k = call.config.input_rows(norms.size) // len(norms)
    draw = functools.partial(priority, k=k)
    indices, weights = map_groups(draw, jax.random.fold_in(key, INPUTS_KEY), scores)
    rows = g.residuals(
        indices, weights, precision=call.precision, add_projection=True, dtype=product_dtype
    )
    sampled = matmul(rows, kernel.T).astype(dtype)
    too_many = jnp.sum(~finite, axis=1, dtype=jnp.int32)[:, None, None] > k
    zero = jnp.where(too_many, jnp.nan, 0).astype(product_dtype)  # of the rows that are not drawn
    if not g.basis.shape[1]:
        dx = jnp.broadcast_to(zero.astype(dtype), (*norms.shape, len(kernel)))
        return replace_rows(dx, indices, sampled)
    # On CPUs many times as fast as U^T W^T, to which XLA else turns it round.
    directions = lax.optimization_barrier(matmul(kernel, g.basis))
    coordinates = g.coordinates.astype(product_dtype) + zero
    return replace_product_rows(sampled, indices, coordinates, directions.T, call.precision)
