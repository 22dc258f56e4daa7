"""Memories and gradients of whole models, to measure them: what `allocate` and `Controller` share.

With `Norms` probes in place of the memories a backward pass gives exact gradients, turns the
directions of each layer towards the rows of the batch, and measures the norms of the rows outside
of these directions.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mem_aop_jax._approximate.program import Site
from mem_aop_jax._core.memory import Subspace
from mem_aop_jax._core.probe import Norms, Probe
from mem_aop_jax._numerics import accumulation_dtype, safe_divide

Memories = Mapping[str, Any]  # by the sites' names


def norms_probes(memory: Memories, sites: Sequence[Site]) -> dict[str, Probe]:
    """A probe with `Norms` for each `Subspace`."""
    rows = {site.name: site.contraction.sizes[0] for site in sites}

    def probe(name: str, subspace: Subspace) -> Probe:
        stack = jnp.shape(subspace.uses)
        inputs, cotangents, _ = subspace
        assert cotangents is not None, "a probed layer has a direction on each side"
        numbers = [1 + basis.shape[-1] for basis in (inputs, cotangents, cotangents)]
        shapes = [*((*stack, rows[name], number) for number in numbers), stack, stack]
        return Probe(subspace, Norms(*(np.zeros(shape, np.float32) for shape in shapes)), 1)

    return {name: probe(name, subspace) for name, subspace in memory.items()}


def next_memory(probes: Mapping[str, Probe]) -> dict[str, Any]:
    """The memories some subspace iterations on, from the gradient of `Norms` probes."""
    return {name: probe.memory for name, probe in probes.items()}


def truncate_directions(shapes: Memories, memory: Memories) -> dict[str, Subspace]:
    """A memory of these shapes: the leading directions of a memory that has as many or more."""

    def truncate(shape: Subspace, subspace: Subspace) -> Subspace:
        inputs, cotangents = (
            None if wanted is None else held[..., : wanted.shape[-1]].astype(wanted.dtype)
            for wanted, held in zip(shape[:2], subspace[:2], strict=True)
        )
        return Subspace(inputs, cotangents, jnp.zeros(shape.uses.shape, shape.uses.dtype))

    return {name: truncate(shape, memory[name]) for name, shape in shapes.items()}


# ---- norms of gradients


def noise_share(differences: Sequence[float], squares: Sequence[float]) -> float:
    """Share of the square of a batch's gradient that is noise of the batch, in [0, 1].

    `squares` are the squared norms of the batches' gradients, `differences` those of the
    differences of each from the next.
    """
    return min(1.0, float(np.mean(differences) / 2 / np.mean(squares)))


def floating_leaves(tree: chex.ArrayTree) -> list:
    """The leaves of a gradient that belong to floating parameters."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def squared_norm(gradient: Any, other: Any = None, metric: Any = None) -> float:
    """The squared norm of a gradient, or of its difference from another one.

    With a metric, each squared entry is multiplied by that of the metric.
    """
    size, metric_size, scaled = _scaled_square(*map(floating_leaves, (gradient, other, metric)))
    return float(scaled) * float(size) ** 2 * float(metric_size)  # which float32 could not hold


@jax.jit
def _scaled_square(leaves: list, others: list, metric: list) -> tuple:
    """The largest entry, that of the metric, and the squared norm in units of both."""
    leaves = [leaf.astype(accumulation_dtype(leaf.dtype)) for leaf in leaves]
    if others:
        leaves = [a - b.astype(a.dtype) for a, b in zip(leaves, others, strict=True)]
    metric = metric or [jnp.ones((), leaf.dtype) for leaf in leaves]
    size, metric_size = (
        functools.reduce(jnp.maximum, (jnp.max(jnp.abs(a), initial=0) for a in tree))
        for tree in (leaves, metric)
    )
    scaled = sum(
        jnp.sum(safe_divide(a, size) ** 2 * safe_divide(factor, metric_size).astype(a.dtype))
        for a, factor in zip(leaves, metric, strict=True)
    )
    return size, metric_size, scaled


def finite_norm(caller: str, batch: int, gradient: Any, metric: Any) -> float:
    """The norm of the gradient of the batch with this number.

    Raises:
      ValueError: it is zero or not finite.
    """
    norm = squared_norm(gradient, None, metric) ** 0.5
    if not 0 < norm < np.inf:
        raise ValueError(
            f"{caller}: the gradient of batch {batch} has the norm {norm}; it must be finite and "
            "not 0. Look for NaNs in the batch and in the parameters."
        )
    return norm
