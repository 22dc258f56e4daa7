"""Estimates of others, as policies and memories, for compare.py; each after the core of a paper.

In a --run they stand where a policy or a memory of the library does:

  control:memory=none                      rows sampled without a subspace, with ratios that follow
                                           the measured variance; after VCAS (arXiv 2402.17227),
                                           which samples rows of dX, too: control:memory=none,
                                           input_rank=0
  winners:ratio=1/4                        the likeliest rows, and a draw from the others; after
                                           WTA-CRS (arXiv 2305.15265), which selects in the forward
                                           pass and cannot know the norms of this step's cotangents
  winners:ratio=1/4,memory=last_norms      the same by those of the step before, row by row; WTA-CRS
                                           has those of the last time that an example was seen,
                                           which for text that is seen once there are none of
  nothing:k=1,memory=subspace,rank=32      the part in the subspaces of both sides alone, which is
                                           biased; after low-rank methods, as ASI and OASIS (arXiv
                                           2604.09406), which have one side
  nothing:k=1,memory=features,rank=32x32   the subspace of the inputs, and so many random directions
                                           for the rest; after PRAC (arXiv 2602.23111), which saves
                                           memory by it
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

import mem_aop_jax as aop

FLOOR = 1e-2  # of the mean norm: no row whose last cotangents were zero is left out for good


# ---- policies


def nothing(key, scores, k) -> aop.Selection:
    """No row: those that are chosen count for nothing."""
    return aop.Selection(jnp.arange(k, dtype=jnp.int32), jnp.zeros(k))


def winners(key, scores, k) -> aop.Selection:
    """The c likeliest rows, and k - c drawn from the others with replacement, weighted.

    A row's probability p is its share of the norm products, and c minimises the others' sum of p
    over k - c, as in WTA-CRS. Unbiased.
    """
    sizes = jnp.sqrt(jnp.where(jnp.isinf(scores), 1, scores))
    p = sizes / jnp.where(sizes.sum() > 0, sizes.sum(), 1)
    order = jnp.argsort(-p)[:k]
    rest = jnp.maximum(1 - (jnp.cumsum(p[order]) - p[order]), 0)  # of all but the first 0, 1, ...
    c = jnp.argmin(rest / (k - jnp.arange(k)))
    is_first = jnp.arange(k) < c
    others = p.at[order].multiply(~is_first)
    drawn = jax.random.choice(key, len(p), (k,), p=others)
    is_some = others[drawn] > 0  # else there are fewer rows than k that are not zero
    share = (k - c) * jnp.where(is_some, others[drawn], 1) / others.sum()
    indices = jnp.where(is_first, order, drawn).astype(jnp.int32)
    return aop.Selection(indices, jnp.where(is_first, 1, jnp.where(is_some, 1 / share, 0)))


POLICIES = {"nothing": nothing, "winners": winners}


# ---- memories


class LastNormsMemory(aop.extend.MemoryKind):
    """Rows are chosen by the norms of their inputs and of the cotangents of the step before.

    Its `cotangents` are these norms, `(rows, 1)`; its `inputs` hold nothing.
    """

    state: type = aop.Memory

    def init(self, config, rows, in_features, out_features, dtype):
        """Ones: the first step chooses by the inputs."""
        empty, ones = jnp.zeros((rows, 0), jnp.float32), jnp.ones((rows, 1), jnp.float32)
        return aop.Memory(empty, ones, jnp.zeros((), jnp.float32))

    def check(self, name, config, x, sizes, memory):
        """Raises an error if the memory is for another number of rows."""
        if memory.cotangents.shape != (sizes[0], 1):
            raise ValueError(f"{name}: a memory of {memory.cotangents.shape} for {sizes[0]} rows")

    def candidates(self, call, x, g, memory, key, differentiates_inputs):
        """The rows of the batch."""
        return RowsByLastNorms(call, x, g, memory, key)


@dataclasses.dataclass(frozen=True)
class RowsByLastNorms(aop.extend.Rows):
    """The rows of the batch, with the norms of the cotangents of the step before."""

    def norms(self):
        """Of these inputs, and of the last cotangents."""
        x, _ = super().norms()
        last = self.memory.cotangents.reshape(x.shape)
        return x, jnp.maximum(last, FLOOR * last.mean())

    def next_memory(self, chosen, dw):
        """The norms of these cotangents."""
        _, g = super().norms()
        return self.memory._replace(cotangents=g.reshape(-1, 1))


class FeaturesMemory(aop.extend.SubspaceMemory):
    """Directions of the inputs that are kept, and random ones for the rest, in place of rows.

    X ~ X (V V^T + s R R^T), with R drawn in each step, orthonormal and orthogonal to V, and s so
    that the mean is X. `rank` is the number of columns of V and of R.
    """

    def init(self, config, rows, in_features, out_features, dtype):
        """As a subspace of the inputs."""
        return super().init(_of_inputs(config), rows, in_features, out_features, dtype)

    def check(self, name, config, x, sizes, memory):
        """As for a subspace of the inputs."""
        super().check(name, _of_inputs(config), x, sizes, memory)

    def candidates(self, call, x, g, memory, key, differentiates_inputs):
        """The batch on its directions."""
        features, kept = memory.inputs.shape
        drawn = jax.random.normal(key, (features, min(_ranks(call.config)[1], features - kept)))
        both = jnp.concatenate([memory.inputs, drawn], axis=1)
        basis = jnp.linalg.qr(both)[0]  # the first ones but for their signs
        basis = basis.astype(x.dtype)
        coordinates = jnp.einsum("gmn,nq->gmq", x, basis, precision=call.precision)
        return Features(call, x, g, memory, key, basis, coordinates, kept)


@dataclasses.dataclass(frozen=True)
class Features(aop.extend.Candidates):
    """A batch on directions of its inputs, kept ones and random ones.

    Attributes:
      basis: `(in_features, q)`.
      coordinates: `(groups, rows, q)`.
      kept: how many of the directions are kept, the first ones.
    """

    basis: chex.Array
    coordinates: chex.Array
    kept: int

    @property
    def shows_lost_rows(self):
        """They show in all coordinates."""
        return True

    def norms(self):
        """Ones: the policy chooses nothing."""
        return (jnp.ones(self.x.shape[:2]),) * 2

    def gather(self, chosen):
        """Rows that count for nothing."""
        return tuple(
            jnp.zeros((*chosen.indices.shape, a.shape[-1])) for a in (self.x, self.g)
        ), self

    def exact_part(self):
        """The basis, random directions scaled up; and the cotangents' product with X on it."""
        features, q = self.basis.shape
        scale = (features - self.kept) / max(1, q - self.kept)
        basis = self.basis * jnp.where(jnp.arange(q) < self.kept, 1, scale)
        products = jnp.einsum(
            "gmq,gmp->qp", self.coordinates, self.g, precision=self.call.precision
        )
        return basis.T, products

    def next_memory(self, chosen, dw):
        """One subspace iteration on."""
        own = jnp.einsum("gmn,gmq->nq", self.x, self.coordinates[..., : self.kept])
        return self.memory._replace(inputs=aop.extend.orthonormal(own, self.memory.inputs))


def _ranks(config):
    return config.rank if isinstance(config.rank, tuple) else (config.rank,) * 2


def _of_inputs(config):
    return dataclasses.replace(config, memory="subspace", rank=(_ranks(config)[0], 0))


KINDS = {
    "last_norms": (LastNormsMemory(), aop.extend.MemoryRules((), weights=True)),
    "features": (FeaturesMemory(), aop.extend.MemoryRules(("rank",), weights=True)),
}


def registered():
    """A context (or decorator) in which the library knows these memories."""
    return aop.extend.memories(KINDS)
