"""Rows and their projection onto a few orthonormal directions.

    X = A V^T + Xr,  A = X V          V (N, q) the directions, A (M, q) the coordinates

Only the chosen rows of the residuals Xr are ever formed.
"""

from typing import NamedTuple

import chex
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._compat import vary, varying_axes
from mem_aop_jax._kernels.row_access import gather_residuals
from mem_aop_jax._kernels.subspace_products import coordinates_and_norms, side_products
from mem_aop_jax._numerics import accumulation_dtype, row_norms, safe_divide


class Projection(NamedTuple):
    """The rows of X or of G, and their coordinates in a basis.

    Attributes:
      rows: `(groups, rows, features)`.
      basis: `(features, q)`, in the dtype of products.
      coordinates: `(groups, rows, q)`; 0 in place of numbers that are not finite.
      norms: `(groups, rows)`, Euclidean norms of the rows, in the units of `row_norms`.
      own: as in `SideProducts`, for the next basis; None where there is none.
      other: as in `SideProducts`.
    """

    rows: chex.Array
    basis: chex.Array
    coordinates: chex.Array
    norms: chex.Array
    own: chex.Array | None = None
    other: chex.Array | None = None

    def first(self, rank: int) -> "Projection":
        """The projection onto the first directions of the basis."""
        return self._replace(basis=self.basis[:, :rank], coordinates=self.coordinates[..., :rank])

    def residual_norms(self) -> chex.Array:
        """`(groups, rows)`: norms of the residuals, in the units of `row_norms`."""
        coordinates = self.coordinates.astype(accumulation_dtype(self.rows.dtype))
        share = safe_divide(row_norms(coordinates), self.norms)
        # At least a little for every row: products in bfloat16, as on TPUs, tell no less.
        return self.norms * jnp.sqrt(jnp.maximum(1 - jnp.square(share), 1e-3))

    def residuals(self, chosen: chex.Array, weights: chex.Array | None, **options) -> chex.Array:
        """As `gather_residuals`, of these rows."""
        side = self.coordinates, self.basis
        products = self.coordinates, self.other
        stored = all(columns is not None and columns.shape[-1] for columns in products)
        return gather_residuals(self.rows, chosen, weights, *side, stored=stored, **options)


def project(rows: chex.Array, basis: chex.Array | None, precision: lax.PrecisionLike) -> Projection:
    """The projection of rows `(groups, rows, features)` on a basis `(features, q)`; None: q = 0."""
    basis = _product_basis(rows, basis)
    return Projection(rows, basis, *coordinates_and_norms(rows, basis, precision))


def project_both(
    x: chex.Array,
    g: chex.Array,
    bases: tuple[chex.Array | None, chex.Array | None],
    rank: int,
    due: chex.Array | None,
    precision: lax.PrecisionLike,
) -> tuple[Projection, Projection]:
    """As `project`, of inputs and cotangents on their bases, with the products for a `Subspace`.

    The kernel's gradient takes out `rank` of the cotangents' directions. `due`, `()` bool, says
    whether this step refreshes the subspaces (on a CPU in a pass of its own over X and G); None is
    always (in the same pass).
    """
    v, u = (_product_basis(rows, basis) for rows, basis in zip((x, g), bases, strict=True))
    x_products, g_products = side_products(x, g, v, u, due, rank, precision)
    return Projection(x, v, *x_products), Projection(g, u, *g_products)


def _product_basis(rows, basis):
    """The basis in the dtype of products with the rows."""
    dtype = jnp.float32 if rows.dtype == jnp.float16 else rows.dtype  # in which sums could overflow
    if basis is None:
        basis = jnp.zeros((rows.shape[-1], 0), dtype)
    return vary(basis, varying_axes(rows)).astype(dtype)
