"""Subspace memory: the directions in which the rows of a batch lie. Not the paper's.

    X = A V^T + Xr,  A = X V          V (N, q) the directions of the inputs
    G = B U^T + Gr,  B = G U          U (P, q) the directions of the cotangents
    dW = V (A^T G) + (Xr^T B) U^T     computed for all rows: q columns in place of N or P
         + Xr^T Gr                    sampled: K rows, with weights
    Xr^T B = X^T B - V (A^T B)

This holds for any V and U, so the estimate is unbiased whatever they are; only the last term adds
variance. A subspace iteration lets V and U follow the rows: V <- orth(X^T A), and
U <- orth(G^T B). Nothing of the size of X or G is formed beside them, and of the residuals Xr and
Gr only the chosen rows.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._compat import varying_axes
from mem_aop_jax._core.candidates import REFRESH_KEY, Candidates, MemoryKind, sum_of_chosen
from mem_aop_jax._core.memory import Subspace, first_directions
from mem_aop_jax._core.orthonormal import orthonormal
from mem_aop_jax._core.projection import Projection, project_both
from mem_aop_jax._kernels.subspace_products import contract_rows, max_abs, psum_own_products
from mem_aop_jax._numerics import accumulation_dtype, safe_divide, widened, widest_dtype


class SubspaceMemory(MemoryKind):
    """`MemAOP(memory="subspace")`."""

    state: type = Subspace

    def init(self, config, rows, in_features, out_features, dtype):
        """A `Subspace` of random directions, always the same."""
        del rows
        v, u = (
            first_directions(shape, accumulation_dtype(dtype)) if shape[1] else None
            for shape in _shapes(config, in_features, out_features)
        )
        return Subspace(v, u, jnp.zeros((), jnp.float32))

    def check(self, name, config, x, sizes, memory):
        """Raises an error if the memory is for other features, ranks or another dtype."""
        m, n, p = sizes
        dtype = accumulation_dtype(x.dtype)

        def show(shape):
            return f"{dtype} {shape}" if shape[1] else "None"

        for field, shape in zip(("inputs", "cotangents"), _shapes(config, n, p), strict=True):
            array = getattr(memory, field)
            given = "None" if array is None else f"{array.dtype} {array.shape}"
            if given != show(shape):
                raise ValueError(
                    f"{name}: memory.{field} is {given}, but rank={config.rank} and "
                    f"input_grad={config.input_grad} for a kernel of shape {(n, p)} and inputs of "
                    f"{x.dtype} need {show(shape)}. Start anew with aop.init_memory(config, {m}, "
                    f"{n}, {p}, jnp.{x.dtype})."
                )

    def candidates(self, call, x, g, memory, key, differentiates_inputs):
        """The residuals, of the directions that this step takes out.

        Directions that only the gradient of the inputs takes out are refreshed where it is asked
        for; what the memory holds beyond stays, but for what makes it orthogonal to the others.
        """
        rank = call.config.ranks(x.shape[-1], g.shape[-1])[1]
        directions = memory.cotangents
        if directions is not None and not differentiates_inputs:
            directions = directions[:, :rank]
        due = _refresh_is_due(call.config, memory, key)
        bases = memory.inputs, directions
        projections = project_both(x, g, bases, rank, due, call.precision)
        return Residuals(call, x, g, memory, key, *projections, rank, due)

    def fixed_estimate(self, call, x, g, memory, chosen):
        """This module's dW."""
        product = functools.partial(jnp.einsum, precision=call.precision)
        x, g = map(widened, (x, g))
        v, u = (
            jnp.zeros((rows.shape[-1], 0), rows.dtype) if basis is None else basis
            for rows, basis in ((x, memory.inputs), (g, memory.cotangents))
        )
        u = u[:, : call.config.ranks(x.shape[-1], g.shape[-1])[1]]
        a, b = product("gmn,nq->gmq", x, v), product("gmp,pq->gmq", g, u)
        xr, gr = x - product("gmq,nq->gmn", a, v), g - product("gmq,pq->gmp", b, u)
        return (
            product("nq,gmq,gmp->np", v, a, g)
            + product("gmn,gmq,pq->np", xr, b, u)
            + sum_of_chosen(xr, gr, chosen, call.precision)
        )


@dataclasses.dataclass(frozen=True)
class Residuals(Candidates):
    """The rows of a batch outside of the subspaces.

    Attributes:
      inputs: the inputs on their directions.
      cotangents: the cotangents on all directions that this step takes out of them.
      rank: how many of these the kernel's gradient takes out.
      due: as in `project_both`.
    """

    inputs: Projection
    cotangents: Projection
    rank: int
    due: chex.Array | None

    @property
    def shows_lost_rows(self):
        """They show in X^T B and G^T A, if B and A have columns."""
        return min(side.basis.shape[1] for side in self._sides()) > 0

    def norms(self):
        """Norms of the residuals."""
        return tuple(side.residual_norms() for side in self._sides())

    def gather(self, chosen):
        """The chosen rows of Xr and Gr; there are weights."""
        widest = widest_dtype(self.x.dtype, self.g.dtype)
        half = jnp.float16 in (self.x.dtype, self.g.dtype)  # in which a weighted row could overflow
        return tuple(
            side.residuals(
                chosen.indices,
                weights,
                precision=self.call.precision,
                dtype=accumulation_dtype(side.rows.dtype) if half else widest,
            )
            for side, weights in zip(
                self._sides(), chosen.side_weights(self.x, self.g), strict=True
            )
        ), self

    def exact_part(self):
        """[V, Xr^T B]^T and [G^T A, U]^T, for all rows."""
        (x, g), precision = self._sides(), self.call.precision
        x_b, g_a = x.other, g.other
        v, u = (side.basis.astype(x_b.dtype) for side in (x, g))
        dtype = widest_dtype(x.basis.dtype, g.basis.dtype)
        a_b = contract_rows(x.coordinates, g.coordinates, dtype, precision)
        xr_b = x_b - jnp.matmul(v, a_b, precision=precision)
        return jnp.concatenate([v, xr_b], axis=-1).T, jnp.concatenate([g_a, u], axis=-1).T

    def next_memory(self, chosen, dw):
        """One subspace iteration on, if a refresh is due."""
        del chosen, dw
        old = tuple(self.memory[:2])

        def refreshed():
            return tuple(map(_next_basis, (self.inputs, self.cotangents), old))

        bases = refreshed() if self.due is None else lax.cond(self.due, refreshed, lambda: old)
        return Subspace(*bases, self.memory.uses)

    def cotangent_projection(self):
        """On the directions of the memory."""
        return self.cotangents

    def _sides(self):
        """What the kernel's gradient takes out."""
        return self.inputs, self.cotangents.first(self.rank)


def _shapes(config, in_features, out_features):
    """`(features, rank)` of the directions of each side that a `Subspace` holds."""
    return tuple(
        zip((in_features, out_features), config.held_ranks(in_features, out_features), strict=True)
    )


def _next_basis(side, old):
    """The directions of a side, one subspace iteration on; those beyond its rank follow."""
    rank = side.own.shape[1]
    if not rank:
        return old
    # The mesh axes (of `jax.shard_map`) over which devices share a basis, but not the rows.
    axes = tuple(sorted(varying_axes(side.own) - varying_axes(old)))
    new, unit = side.own, max_abs(side.coordinates)
    if axes:
        new, unit = psum_own_products(new, unit, axes), lax.pmax(unit, axes)
    columns = safe_divide(new.astype(old.dtype), unit)
    return orthonormal(jnp.concatenate([columns, old[:, rank:]], axis=1), old)


def _refresh_is_due(config, memory, key):
    """`()` bool, whether this step refreshes a subspace, on all devices that share it; None always.

    Drawn at random, so that no layer has to count steps; always in the first step.
    """
    if config.refresh == 1:
        return None
    drawn = jax.random.uniform(jax.random.fold_in(key, REFRESH_KEY))
    axes = tuple(varying_axes(drawn) - varying_axes(memory.uses))
    if axes:
        drawn = lax.psum(drawn, axes) % 1  # uniform, too
    return (drawn < 1 / config.refresh) | (memory.uses == 0)
