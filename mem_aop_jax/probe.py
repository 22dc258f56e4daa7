"""What a `Probe` measures: how good a layer's approximate gradient is, on one batch."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from mem_aop_jax.config import MemAOP
from mem_aop_jax.cost import exact_flops, relative_cost
from mem_aop_jax.memory import Measured, Probe, Subspace
from mem_aop_jax.policies import over

HELD = 0.9  # the share of the energy that `Measured.inputs_rank` directions hold
PARTS = 8  # of the batch, at most, from which its noise is told


def measure(
    probe: Probe,
    config: MemAOP,
    x: chex.Array,
    g: chex.Array,
    kernel: chex.Array,
    parts: int,
    key: chex.PRNGKey | None,
    draw: Callable[[chex.PRNGKey | None], tuple[chex.Array, chex.Array | None, chex.Array]],
) -> Probe:
    """What the probe says of a layer's approximate gradient.

    Args:
      probe: the probe.
      config: of the layer.
      x: `(rows, in_features)`.
      g: `(rows, out_features)`.
      kernel: `(in_features, out_features)`.
      parts: into how many equal, independent parts the rows fall.
      key: for the draws; None if nothing is drawn at random.
      draw: of a key, an approximate gradient `(in_features, out_features)`, that of the inputs
        `(rows, in_features)` or None, and the chosen share.
    """
    without_memory = jax.tree.map(jnp.zeros_like, probe.memory)
    if not probe.draws:
        uses = probe.measured._replace(uses=jnp.ones_like(probe.uses))
        return Probe(without_memory, uses, 0)
    x, g, kernel = (a.astype(jnp.float32) for a in (x, g, kernel))
    largest = [jnp.max(jnp.abs(a)) for a in (x, g, kernel)]  # squares of small numbers underflow
    x, g, kernel = (over(a, size) for a, size in zip((x, g, kernel), largest, strict=True))
    product = functools.partial(jnp.einsum, precision="highest")
    exact = product("mn,mp->np", x, g)
    size = jnp.linalg.norm(exact)
    unit = over(exact, size)
    exact_inputs = product("mp,np->mn", g, kernel)
    size_of_inputs = jnp.linalg.norm(exact_inputs)

    def in_units(estimate, *sizes):
        return functools.reduce(over, sizes, estimate.astype(jnp.float32))

    def one_draw(total, key):
        estimate, of_inputs, chosen = draw(key)
        estimate = in_units(estimate, *largest[:2], size)
        off = estimate - unit
        squares = jnp.sum(estimate**2), jnp.sum(estimate * unit), jnp.sum(off**2)
        input_v = jnp.zeros((), jnp.float32)
        if of_inputs is not None:
            off_inputs = in_units(of_inputs, *largest[1:], size_of_inputs)
            off_inputs -= over(exact_inputs, size_of_inputs)
            input_v = jnp.sum(off_inputs**2)
        return total + off, (*squares, input_v, chosen)

    number = 1 if key is None else probe.draws
    keys = None if key is None else jax.random.split(key, number)
    total, (squares, dots, offs, of_inputs, chosen) = jax.lax.scan(
        one_draw, jnp.zeros_like(exact), keys, length=number
    )
    variance = jnp.maximum(offs.sum() - jnp.sum(total**2) / number, 0) / max(number - 1, 1)

    by_part = product(
        "cmn,cmp->cnp", *(a.reshape(parts, -1, a.shape[-1]) for a in (x, over(g, size)))
    )
    spread = jnp.sum((by_part - unit[None] / parts) ** 2)
    noise = spread * parts / (parts - 1) if parts > 1 else jnp.nan

    v, u = probe.memory[:2] if isinstance(probe.memory, Subspace) else (None, None)
    inside, ranks = zip(_spectrum(x, v), _spectrum(g, u), strict=True)
    sizes = len(x), x.shape[1], g.shape[1]
    norm = size * largest[0] * largest[1]
    measured = Measured(
        gradient_norm=norm,
        estimate_norm=norm * jnp.sqrt(squares.mean()),
        error=jnp.sqrt(offs.mean()),
        cosine=over(dots, jnp.sqrt(squares)).mean(),
        v=variance,
        input_v=of_inputs.mean(),
        noise=noise,
        flops=exact_flops(*sizes),
        c=relative_cost(config, *sizes),
        inputs_inside=inside[0],
        cotangents_inside=inside[1],
        inputs_rank=ranks[0],
        cotangents_rank=ranks[1],
        chosen=chosen.mean(),
        uses=1.0,
    )
    measured = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), measured)
    return Probe(without_memory, measured, probe.draws)


def parts_of(rows: int) -> int:
    """The largest number of equal parts, at most `PARTS`."""
    return max(parts for parts in range(1, PARTS + 1) if rows % parts == 0)


def _spectrum(rows, basis):
    """The share of the energy inside a basis, and how many directions hold `HELD` of it."""
    total = jnp.sum(rows**2)
    inside = 0.0
    if basis is not None:
        coordinates = jnp.matmul(rows, basis.astype(rows.dtype), precision="highest")
        inside = over(jnp.sum(coordinates**2), total)
    gram = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    held = jnp.cumsum(jnp.linalg.eigvalsh(gram)[::-1])
    return inside, 1 + jnp.sum(held < HELD * total)
