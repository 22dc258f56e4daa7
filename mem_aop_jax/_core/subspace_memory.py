"""Subspace memory: the directions in which the rows of a batch lie. Not the paper's.

    X = A V^T + Xr,  A = X V          V (N, q) the directions of the inputs
    G = B U^T + Gr,  B = G U          U (P, q) the directions of the cotangents
    dW = V (A^T G) + (Xr^T B) U^T     computed for all rows: q columns in place of N or P
         + Xr^T Gr                    sampled: K rows, with weights
    Xr^T B = X^T B - V (A^T B)

This holds for any V and U, so the estimate is unbiased for any; its variance is that of the last
term alone. A subspace iteration lets V and U follow the rows: V <- orth(X^T A), and
U <- orth(G^T B). Nothing of the size of X or G is formed beside them, and of the residuals Xr and
Gr only the chosen rows.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._compat import vary, varying_axes
from mem_aop_jax._core.memory import Subspace
from mem_aop_jax._kernels.row_access import gather_residuals
from mem_aop_jax._kernels.subspace_products import (
    contract_rows,
    coordinates_and_norms,
    max_abs,
    psum_own_products,
    side_products,
)
from mem_aop_jax._numerics import accumulation_dtype, row_norms, safe_divide, widest_dtype


class Side(NamedTuple):
    """The rows of X or of G, and what a basis holds of them.

    Attributes:
      rows: `(groups, rows, features)`.
      basis: `(features, q)`, in the dtype of products.
      coordinates: `(groups, rows, q)`; 0 in place of what is not finite.
      norms: `(groups, rows)`, of the rows, in the units of `row_norms`.
      own: as in `SideProducts`, of all directions, for the next basis; None where there is none.
      other: as in `SideProducts`.
      unit: `()`, of `own`.
    """

    rows: chex.Array
    basis: chex.Array
    coordinates: chex.Array
    norms: chex.Array
    own: chex.Array | None = None
    other: chex.Array | None = None
    unit: chex.Array | None = None

    def first(self, rank: int) -> "Side":
        """What the first directions of the basis hold."""
        return self._replace(basis=self.basis[:, :rank], coordinates=self.coordinates[..., :rank])

    def residual_norms(self) -> chex.Array:
        """`(groups, rows)`: of what the basis does not hold, in the units of `row_norms`."""
        share = safe_divide(
            row_norms(self.coordinates.astype(accumulation_dtype(self.rows.dtype))), self.norms
        )
        # At least a little for every row: products in bfloat16, as on TPUs, tell no less.
        return self.norms * jnp.sqrt(jnp.maximum(1 - jnp.square(share), 1e-3))

    def outside(
        self,
        chosen: chex.Array,
        weights: chex.Array | None,
        precision: lax.PrecisionLike,
        add_projection: bool = False,
        dtype=None,
    ) -> chex.Array:
        """As `gather_residuals`, of these rows; None is float32 (float64 for float64)."""
        return gather_residuals(
            self.rows,
            chosen,
            weights,
            self.coordinates,
            self.basis,
            precision,
            add_projection=add_projection,
            dtype=dtype or accumulation_dtype(self.rows.dtype),
        )


def side(rows: chex.Array, basis: chex.Array | None, precision: lax.PrecisionLike) -> Side:
    """What a basis `(features, q)` holds of rows `(groups, rows, features)`; None holds nothing."""
    basis = _of_products(rows, basis)
    return Side(rows, basis, *coordinates_and_norms(rows, basis, precision))


def sides(
    x: chex.Array,
    g: chex.Array,
    bases: tuple[chex.Array | None, chex.Array | None],
    rank: int,
    due: chex.Array | None,
    precision: lax.PrecisionLike,
) -> tuple[Side, Side]:
    """As `side`, of the inputs and of the cotangents, with what `Residuals` needs of all rows.

    Args:
      x: `(groups, rows, in_features)`.
      g: `(groups, rows, out_features)`.
      bases: of the inputs and of the cotangents.
      rank: how many directions of the cotangents the kernel's gradient takes out.
      due: `()` bool, whether this step refreshes the subspaces (on a CPU in a pass of its own over
        X and G); None is always (in the same pass).
      precision: of products.
    """
    bases = [_of_products(rows, basis) for rows, basis in zip((x, g), bases, strict=True)]
    found = side_products(x, g, *bases, due, rank, precision)
    return tuple(
        Side(rows, basis, *of, max_abs(of.coordinates))
        for rows, basis, of in zip((x, g), bases, found, strict=True)
    )


def _of_products(rows, basis):
    """The basis in the dtype of products with rows."""
    dtype = jnp.float32 if rows.dtype == jnp.float16 else rows.dtype  # in which sums could overflow
    if basis is None:
        basis = jnp.zeros((rows.shape[-1], 0), dtype)
    return vary(basis, varying_axes(rows)).astype(dtype)


class Residuals(NamedTuple):
    """The rows of a batch outside of the subspaces. Methods as in `rows.Rows`.

    Attributes:
      x: the inputs.
      g: the cotangents, with the directions that the kernel's gradient takes out. Others, which the
        gradient of the inputs takes out besides, are refreshed with them; what the memory holds
        beyond all of them stays, but for what makes it orthogonal to them.
      memory: the subspaces.
      due: as in `sides`.
      precision: of products.
    """

    x: Side
    g: Side
    memory: Subspace
    due: chex.Array | None
    precision: lax.PrecisionLike

    @property
    def show_lost(self):
        """As in `Rows`: in X^T B and G^T A, if B and A have columns."""
        return min(self.x.basis.shape[1], self.g.basis.shape[1]) > 0

    def norms(self):
        """As in `Rows`."""
        return self.x.residual_norms(), self.g.residual_norms()

    def fit(self):
        """True: none enters the memory."""
        return True

    def take(self, chosen, waiting, weights):
        """As in `Rows`."""
        del waiting
        of_both = widest_dtype(self.x.rows.dtype, self.g.rows.dtype)
        dtype = None if jnp.float16 in (of.rows.dtype for of in (self.x, self.g)) else of_both
        taken = (
            of.outside(chosen, weight, self.precision, dtype=dtype)
            for of, weight in zip((self.x, self.g), weights, strict=True)
        )
        return tuple(taken), self

    def whole(self) -> tuple[chex.Array, chex.Array, Subspace]:
        """What is computed of all rows.

        Returns:
          left `(2 q, in_features)` and right `(2 q, out_features)`, whose left^T right is the part
          of dW in the subspaces; the next memory.
        """
        x, g, memory, due, precision = self
        dtype = widest_dtype(x.basis.dtype, g.basis.dtype)

        def next_basis(side, old):
            rank = side.own.shape[1]
            if not rank:
                return old
            axes = _shared_axes(side.own, old)
            new = psum_own_products(side.own, side.unit, axes) if axes else side.own
            new = jnp.concatenate([new.astype(old.dtype), old[:, rank:]], axis=1)
            return orthonormal(new, old)

        def refreshed():
            return next_basis(x, memory.inputs), next_basis(g, memory.cotangents)

        bases = refreshed() if due is None else lax.cond(due, refreshed, lambda: tuple(memory[:2]))
        x_b, g_a = x.other, g.other
        v, u = (of.basis.astype(x_b.dtype) for of in (x, g))
        a_b = contract_rows(x.coordinates, g.coordinates, dtype, precision)
        xr_b = x_b - jnp.matmul(v, a_b, precision=precision)
        left = jnp.concatenate([v, xr_b], axis=-1).T
        right = jnp.concatenate([g_a, u], axis=-1).T
        return left, right, Subspace(*bases, memory.uses)


@jax.jit
def orthonormal(columns: chex.Array, old: chex.Array) -> chex.Array:
    """Orthonormal columns that span `columns`, and directions of `old` where these have too few.

    Cholesky-QR, three times, the first time shifted, on columns of unit length: after a few steps
    of subspace iteration they are nearly orthogonal, however different their lengths. Columns that
    are not finite leave `old` as it is.

    Args:
      columns: `(features, q)` float32 or float64, of any rank and size.
      old: `(features, q)`, orthonormal columns.
    """
    dtype = old.dtype
    columns = columns.astype(dtype)
    columns = safe_divide(columns, jnp.max(jnp.abs(columns), initial=0))
    columns = safe_divide(columns, jnp.linalg.norm(columns, axis=0, keepdims=True))
    columns += 1e-3 * old  # then the rank is q
    rank = columns.shape[1]
    identity = jnp.eye(rank, dtype=dtype)
    for shift in (rank**2 * jnp.finfo(dtype).eps, 0, 0):  # more than the rounding of the first
        gram = jnp.matmul(columns.T, columns, precision="highest") + shift * identity
        inverse = lax.platform_dependent(
            gram, cpu=inverse_in_blocks, cuda=inverse_by_elimination, default=inverse_factor
        )
        columns = jnp.matmul(columns, inverse.T, precision="highest")  # solving for N x q is slow
    return jnp.where(jnp.all(jnp.isfinite(columns)), columns, old)


def inverse_factor(gram: chex.Array) -> chex.Array:
    """The inverse of the Cholesky factor of a Gram matrix, `(q, q)`."""
    return _inverse_of_factor(jnp.linalg.cholesky(gram))


def _inverse_of_factor(lower):
    identity = jnp.eye(len(lower), dtype=lower.dtype)
    return lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)


def inverse_in_blocks(gram: chex.Array) -> chex.Array:
    """The same, of blocks for which the BLAS of JAX on CPUs starts no threads of its own.

    They would wait for those of XLA, for milliseconds.
    """

    def of_block(lower):
        half = len(lower) // 2
        if half < 12:
            return _inverse_of_factor(lower)
        first, last = (of_block(lower[part, part]) for part in (slice(half), slice(half, None)))
        below = -jnp.matmul(
            jnp.matmul(last, lower[half:, :half], precision="highest"), first, precision="highest"
        )
        return jnp.block([[first, jnp.zeros_like(below.T)], [below, last]])

    return of_block(jnp.linalg.cholesky(gram))


def inverse_by_elimination(gram: chex.Array) -> chex.Array:
    """The same in a few kernels of a GPU, which waits long for its libraries."""
    rank = len(gram)
    if rank > 64:  # so many steps
        return inverse_factor(gram)
    both = jnp.concatenate([gram, jnp.eye(rank, dtype=gram.dtype)], axis=1)
    for step in range(rank):
        below = jnp.arange(rank) > step
        factor = jnp.where(below, both[:, step] / both[step, step], 0)
        both -= jnp.outer(factor, both[step])
    return both[:, rank:] / jnp.sqrt(jnp.diagonal(both))[:, None]


def _shared_axes(of_rows, basis):
    """The mesh axes (of `jax.shard_map`) over which devices share a basis, but not the rows."""
    return tuple(sorted(varying_axes(of_rows) - varying_axes(basis)))
