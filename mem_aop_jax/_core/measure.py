"""What a `Probe` measures: how good a layer's approximate gradient is, on one batch."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp

from mem_aop_jax._core.candidates import Call
from mem_aop_jax._core.flops import exact_flops, relative_cost
from mem_aop_jax._core.input_gradient import approximates_inputs
from mem_aop_jax._core.layout import as_inputs, as_kernel, as_matrix, as_rows, first_free_size
from mem_aop_jax._core.memory import Subspace
from mem_aop_jax._core.orthonormal import orthonormal
from mem_aop_jax._core.policies import row_scores
from mem_aop_jax._core.primitive import estimate
from mem_aop_jax._core.probe import Measured, Norms, Probe
from mem_aop_jax._numerics import accumulation_dtype, safe_divide

HELD = 0.9  # the share of the energy that `Measured.inputs_rank` directions hold
PARTS = 8  # of the batch, at most, from which its noise is told
ITERATIONS = 4  # of the subspaces, for each batch of which the `Norms` are taken


def measured(
    call: Call,
    of_inputs: bool,
    x: chex.Array,
    g: chex.Array,
    kernel: chex.Array,
    probe: Probe,
    key: chex.PRNGKey | None,
) -> tuple[chex.Array | None, chex.Array, Probe]:
    """In place of `estimate`: what is added to the exact gradient of the inputs; the exact one of
    the kernel; and what the probe measured.
    """
    like, parts = x, parts_of(first_free_size(call.dimension_numbers, x))
    x, g = (a[0] for a in as_rows(call.dimension_numbers, 1, x, g))
    flat = call._replace(dimension_numbers=(((1,), (0,)), ((), ())))
    matrix = as_matrix(call.dimension_numbers, kernel)
    dtype = max(accumulation_dtype(x.dtype), accumulation_dtype(g.dtype))
    dw = jnp.matmul(x.T.astype(dtype), g.astype(dtype), precision=call.precision)
    dw = as_kernel(call.dimension_numbers, dw.astype(kernel.dtype), kernel.shape)
    draws_inputs = of_inputs and approximates_inputs(call.config, len(x), probe.memory, key)
    dx = jnp.zeros_like(like) if of_inputs else None

    nothing = jax.tree.map(jnp.zeros_like, probe)
    if probe.noise is not None:
        if draws_inputs:
            drawn = estimate(flat, True, x, g, matrix, probe.memory, key).inputs
            exact = jnp.matmul(g.astype(dtype), matrix.T.astype(dtype), precision=call.precision)
            noise = probe.noise.astype(dtype)
            off = jnp.where(noise == 0, 0, (drawn.astype(dtype) - exact) * noise)
            dx = as_inputs(call.dimension_numbers, off.astype(like.dtype), like.shape)
        return dx, dw, nothing
    if isinstance(probe.measured, Norms):
        return dx, dw, _norms(call.name, probe, x, g, matrix if of_inputs else None)
    if not probe.draws:
        used = nothing.measured._replace(uses=jnp.ones_like(probe.uses))
        return dx, dw, dataclasses.replace(nothing, measured=used)

    def draw(key):
        drawn = estimate(flat, draws_inputs, x, g, matrix, probe.memory, key)
        scores, finite = row_scores(*(n.reshape(-1) for n in drawn.norms))
        products = jnp.sqrt(jnp.where(finite, scores, 0))  # in units of the largest
        of_chosen = jnp.sum(jnp.where(drawn.unchosen.reshape(-1), 0, products))
        chosen = of_chosen / jnp.maximum(products.sum(), 1)  # of which the largest is 1
        return drawn.kernel, drawn.inputs, chosen

    found = _measure(probe, call.config, x, g, matrix, parts, key, draw)
    return dx, dw, dataclasses.replace(nothing, measured=found)


def _measure(probe, config, x, g, kernel, parts, key, draw):
    """What is measured of a call.

    Args:
      probe: the probe.
      config: of the call.
      x: `(rows, in_features)`.
      g: `(rows, out_features)`.
      kernel: `(in_features, out_features)`.
      parts: into how many equal, independent parts the rows fall.
      key: for the draws; None if nothing is drawn at random.
      draw: of a key, an approximate gradient `(in_features, out_features)`, that of the inputs
        `(rows, in_features)` or None, and the chosen share.
    """
    x, g, kernel = (a.astype(jnp.float32) for a in (x, g, kernel))
    largest = [jnp.max(jnp.abs(a)) for a in (x, g, kernel)]  # squares of small numbers underflow
    x, g, kernel = (safe_divide(a, size) for a, size in zip((x, g, kernel), largest, strict=True))
    product = functools.partial(jnp.einsum, precision="highest")
    exact = product("mn,mp->np", x, g)
    size = jnp.linalg.norm(exact)
    unit = safe_divide(exact, size)
    exact_inputs = product("mp,np->mn", g, kernel)
    size_of_inputs = jnp.linalg.norm(exact_inputs)

    def in_units(estimate, *sizes):
        return functools.reduce(safe_divide, sizes, estimate.astype(jnp.float32))

    def one_draw(total, key):
        estimate, of_inputs, chosen = draw(key)
        estimate = in_units(estimate, *largest[:2], size)
        off = estimate - unit
        squares = jnp.sum(estimate**2), jnp.sum(estimate * unit), jnp.sum(off**2)
        input_v = jnp.zeros((), jnp.float32)
        if of_inputs is not None:
            off_inputs = in_units(of_inputs, *largest[1:], size_of_inputs)
            off_inputs -= safe_divide(exact_inputs, size_of_inputs)
            input_v = jnp.sum(off_inputs**2)
        return total + off, (*squares, input_v, chosen)

    number = 1 if key is None else probe.draws
    keys = None if key is None else jax.random.split(key, number)
    total, (squares, dots, offs, of_inputs, chosen) = jax.lax.scan(
        one_draw, jnp.zeros_like(exact), keys, length=number
    )
    by_part = product(
        "cmn,cmp->cnp", *(a.reshape(parts, -1, a.shape[-1]) for a in (x, safe_divide(g, size)))
    )
    spread = jnp.sum((by_part - unit[None] / parts) ** 2)
    noise = spread * parts / (parts - 1) if parts > 1 else jnp.nan

    v, u = probe.memory[:2] if isinstance(probe.memory, Subspace) else (None, None)
    inside, ranks = zip(_spectrum(x, v), _spectrum(g, u), strict=True)
    sizes = len(x), x.shape[1], g.shape[1]
    norm = size * largest[0] * largest[1]
    found = Measured(
        gradient_norm=norm,
        estimate_norm=norm * jnp.sqrt(squares.mean()),
        error=jnp.sqrt(offs.mean()),
        cosine=safe_divide(dots, jnp.sqrt(squares)).mean(),
        v=variance_of_draws(total, offs),
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
    return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), found)


def _norms(name, probe, x, g, kernel):
    """The `Norms` of a layer, and its subspace some iterations on; kernel None is not asked for."""
    if len(x) != len(probe.measured.inputs):
        raise ValueError(
            f"{name}: a batch with {len(x)} rows, where the example input has "
            f"{len(probe.measured.inputs)}. Give batches of the size of the example input."
        )
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)
    units = [jnp.max(jnp.abs(a)) for a in (x, g)]  # squares of small numbers underflow
    x, g = (safe_divide(a, unit) for a, unit in zip((x, g), units, strict=True))
    product = functools.partial(jnp.matmul, precision="highest")
    bases = [basis.astype(jnp.float32) for basis in probe.memory[:2]]
    coordinates = [product(rows, basis) for rows, basis in zip((x, g), bases, strict=True)]

    def left(rows, inside):
        """Norms, of what is left when the first squares are taken out of all."""
        of_all = jnp.sum(rows**2, axis=1, keepdims=True)
        taken = jnp.concatenate([jnp.zeros_like(of_all), jnp.cumsum(inside, axis=1)], axis=1)
        return jnp.sqrt(jnp.maximum(of_all - taken, 1e-6 * of_all))

    inputs, cotangents = (
        left(rows, c**2) * unit for rows, c, unit in zip((x, g), coordinates, units, strict=True)
    )
    of_inputs = jnp.zeros_like(cotangents)
    if kernel is not None:
        # ||y - sum_{j < r} c_j b_j||^2 of each row y of G W^T, with B = W U, for all r at once
        kernel = kernel.astype(jnp.float32)
        c, b, y = coordinates[1], product(kernel, bases[1]), product(g, kernel.T)
        gram = product(b.T, b)
        squares = c * (product(c, jnp.triu(gram, 1)) * 2 + c * jnp.diagonal(gram)[None])
        of_inputs = left(y, 2 * c * product(y, b) - squares) * units[1]

    memory = []
    for rows, basis, like in zip((x, g), bases, probe.memory[:2], strict=True):
        for _ in range(ITERATIONS):
            basis = orthonormal(product(rows.T, product(rows, basis)), basis)
        memory.append(basis.astype(like.dtype))
    uses = jnp.ones_like(probe.uses)
    asked_for = jnp.full_like(uses, kernel is not None)
    found = Norms(inputs, cotangents, of_inputs, asked_for, uses)
    return Probe(Subspace(*memory, uses), found, probe.draws)


def variance_of_draws(total: chex.Array, squares: chex.Array) -> chex.Array:
    """Of draws of which there are the sum and the square of each `(draws,)`; 0 of a single one."""
    number = len(squares)
    return jnp.maximum(squares.sum() - jnp.sum(total**2) / number, 0) / max(number - 1, 1)


def parts_of(rows: int) -> int:
    """The largest number of equal parts, at most `PARTS`."""
    return max(parts for parts in range(1, PARTS + 1) if rows % parts == 0)


def _spectrum(rows, basis):
    """The share of the energy inside a basis, and how many directions hold `HELD` of it."""
    total = jnp.sum(rows**2)
    inside = 0.0
    if basis is not None:
        coordinates = jnp.matmul(rows, basis.astype(rows.dtype), precision="highest")
        inside = safe_divide(jnp.sum(coordinates**2), total)
    gram = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    held = jnp.cumsum(jnp.linalg.eigvalsh(gram)[::-1])
    return inside, 1 + jnp.sum(held < HELD * total)
