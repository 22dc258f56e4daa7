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
PARTS = 8  # at most so many parts of the batch, whose differences tell its noise
ITERATIONS = 4  # subspace iterations after each batch whose `Norms` are taken


def measured(
    call: Call,
    differentiates_inputs: bool,
    x: chex.Array,
    g: chex.Array,
    kernel: chex.Array,
    probe: Probe,
    key: chex.PRNGKey | None,
) -> tuple[chex.Array | None, chex.Array, Probe]:
    """The rule of a probe: a correction of the exact dX, the exact dW, and what was measured."""
    inputs, numbers = x, call.dimension_numbers
    parts = parts_of(first_free_size(numbers, x))
    x, g = (a[0] for a in as_rows(numbers, 1, x, g))
    call = call._replace(dimension_numbers=(((1,), (0,)), ((), ())))
    matrix = as_matrix(numbers, kernel)
    dtype = max(accumulation_dtype(x.dtype), accumulation_dtype(g.dtype))
    dw = jnp.matmul(x.T.astype(dtype), g.astype(dtype), precision=call.precision)
    dw = as_kernel(numbers, dw.astype(kernel.dtype), kernel.shape)
    dx = jnp.zeros_like(inputs) if differentiates_inputs else None
    draws_inputs = differentiates_inputs and approximates_inputs(
        call.config, len(x), probe.memory, key
    )
    nothing = jax.tree.map(jnp.zeros_like, probe)
    if probe.noise is not None:
        if draws_inputs:
            drawn = jnp.asarray(estimate(call, True, x, g, matrix, probe.memory, key).inputs)
            exact = jnp.matmul(g.astype(dtype), matrix.T.astype(dtype), precision=call.precision)
            noise = probe.noise.astype(dtype)
            error = jnp.where(noise == 0, 0, (drawn.astype(dtype) - exact) * noise)
            dx = as_inputs(numbers, error.astype(inputs.dtype), inputs.shape)
        return dx, dw, nothing
    if isinstance(probe.measured, Norms):
        return dx, dw, _norms(call.name, probe, x, g, matrix if differentiates_inputs else None)
    if not probe.draws:
        used = nothing.measured._replace(uses=jnp.ones_like(probe.uses))
        return dx, dw, dataclasses.replace(nothing, measured=used)

    def draw(key):
        drawn = estimate(call, draws_inputs, x, g, matrix, probe.memory, key)
        scores, finite = row_scores(*(norms.reshape(-1) for norms in drawn.norms))
        products = jnp.sqrt(jnp.where(finite, scores, 0))  # in units of the largest
        chosen_products = jnp.where(drawn.chosen.waiting.reshape(-1), 0, products)
        chosen_share = chosen_products.sum() / jnp.maximum(products.sum(), 1)  # the largest is 1
        return drawn.kernel, drawn.inputs, chosen_share

    measurement = _measure(probe, call.config, x, g, matrix, parts, key, draw)
    return dx, dw, dataclasses.replace(nothing, measured=measurement)


def _measure(probe, config, x, g, kernel, parts, key, draw):
    """What a `Probe` measures of a layer.

    Args:
      probe: the probe.
      config: of the layer.
      x: `(rows, in_features)`.
      g: `(rows, out_features)`.
      kernel: `(in_features, out_features)`.
      parts: into how many equal, independent parts the rows fall.
      key: for the draws; None if nothing is drawn at random.
      draw: a function of a key that returns an approximate gradient `(in_features, out_features)`,
        that of the inputs `(rows, in_features)` or None, and the chosen share.
    """
    x, g, kernel = (a.astype(jnp.float32) for a in (x, g, kernel))
    units = [jnp.max(jnp.abs(a)) for a in (x, g, kernel)]  # squares of small numbers underflow
    x, g, kernel = (safe_divide(a, unit) for a, unit in zip((x, g, kernel), units, strict=True))
    product = functools.partial(jnp.einsum, precision="highest")
    exact = product("mn,mp->np", x, g)
    norm = jnp.linalg.norm(exact)
    direction = safe_divide(exact, norm)
    exact_inputs = product("mp,np->mn", g, kernel)
    inputs_norm = jnp.linalg.norm(exact_inputs)

    def relative(estimate, *units):
        return functools.reduce(safe_divide, units, estimate.astype(jnp.float32))

    def one_draw(total_error, key):
        estimate, inputs, chosen_share = draw(key)
        estimate = relative(estimate, *units[:2], norm)
        error = estimate - direction
        squares = jnp.sum(estimate**2), jnp.sum(estimate * direction), jnp.sum(error**2)
        input_v = jnp.zeros((), jnp.float32)
        if inputs is not None:
            input_error = relative(inputs, *units[1:], inputs_norm)
            input_error -= safe_divide(exact_inputs, inputs_norm)
            input_v = jnp.sum(input_error**2)
        return total_error + error, (*squares, input_v, chosen_share)

    number = 1 if key is None else probe.draws
    keys = None if key is None else jax.random.split(key, number)
    total_error, (squares, dots, squared_errors, input_v, chosen_share) = jax.lax.scan(
        one_draw, jnp.zeros_like(exact), keys, length=number
    )
    part_gradients = product(
        "cmn,cmp->cnp", *(a.reshape(parts, -1, a.shape[-1]) for a in (x, safe_divide(g, norm)))
    )
    spread = jnp.sum((part_gradients - direction[None] / parts) ** 2)
    noise = spread * parts / (parts - 1) if parts > 1 else jnp.nan

    v, u = probe.memory[:2] if isinstance(probe.memory, Subspace) else (None, None)
    inside, ranks = zip(_spectrum(x, v), _spectrum(g, u), strict=True)
    sizes = len(x), x.shape[1], g.shape[1]
    gradient_norm = norm * units[0] * units[1]
    measurement = Measured(
        gradient_norm=gradient_norm,
        estimate_norm=gradient_norm * jnp.sqrt(squares.mean()),
        error=jnp.sqrt(squared_errors.mean()),
        cosine=safe_divide(dots, jnp.sqrt(squares)).mean(),
        v=variance_of_draws(total_error, squared_errors),
        input_v=input_v.mean(),
        noise=noise,
        flops=exact_flops(*sizes),
        c=relative_cost(config, *sizes),
        inputs_inside=inside[0],
        cotangents_inside=inside[1],
        inputs_rank=ranks[0],
        cotangents_rank=ranks[1],
        chosen=chosen_share.mean(),
        uses=1.0,
    )
    return jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), measurement)


def _norms(name, probe, x, g, kernel):
    """The `Norms` of a layer, and its subspace some iterations on.

    `kernel` is None where nobody differentiates the inputs.
    """
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

    def remaining_norms(rows, squares):
        """Norms of rows without their first 0, 1, ... directions, which hold these squares."""
        all_squares = jnp.sum(rows**2, axis=1, keepdims=True)
        held = jnp.concatenate([jnp.zeros_like(all_squares), jnp.cumsum(squares, axis=1)], axis=1)
        return jnp.sqrt(jnp.maximum(all_squares - held, 1e-6 * all_squares))

    inputs, cotangents = (
        remaining_norms(rows, c**2) * unit
        for rows, c, unit in zip((x, g), coordinates, units, strict=True)
    )
    input_terms = jnp.zeros_like(cotangents)
    if kernel is not None:
        # ||y - sum_{j < r} c_j b_j||^2 of each row y of G W^T, with B = W U, for all r at once
        kernel = kernel.astype(jnp.float32)
        c, b, y = coordinates[1], product(kernel, bases[1]), product(g, kernel.T)
        gram = product(b.T, b)
        squares = c * (product(c, jnp.triu(gram, 1)) * 2 + c * jnp.diagonal(gram)[None])
        input_terms = remaining_norms(y, 2 * c * product(y, b) - squares) * units[1]

    memory = []
    for rows, basis, old in zip((x, g), bases, probe.memory[:2], strict=True):
        for _ in range(ITERATIONS):
            basis = orthonormal(product(rows.T, product(rows, basis)), basis)
        memory.append(basis.astype(old.dtype))
    uses = jnp.ones_like(probe.uses)
    differentiated = jnp.full_like(uses, kernel is not None)
    norms = Norms(inputs, cotangents, input_terms, differentiated, uses)
    return Probe(Subspace(*memory, uses), norms, probe.draws)


def variance_of_draws(total_error: chex.Array, squared_errors: chex.Array) -> chex.Array:
    """The variance over draws, from the sum of their errors and each one's square; 0 for one."""
    draws = len(squared_errors)
    spread = squared_errors.sum() - jnp.sum(total_error**2) / draws
    return jnp.maximum(spread, 0) / max(draws - 1, 1)


def parts_of(rows: int) -> int:
    """The largest number of equal parts, at most `PARTS`."""
    return max(parts for parts in range(1, PARTS + 1) if rows % parts == 0)


def _spectrum(rows, basis):
    """The share of the energy inside a basis, and how many directions hold `HELD` of it."""
    energy = jnp.sum(rows**2)
    inside = 0.0
    if basis is not None:
        coordinates = jnp.matmul(rows, basis.astype(rows.dtype), precision="highest")
        inside = safe_divide(jnp.sum(coordinates**2), energy)
    gram = rows.T @ rows if rows.shape[0] >= rows.shape[1] else rows @ rows.T
    held = jnp.cumsum(jnp.linalg.eigvalsh(gram)[::-1])
    return inside, 1 + jnp.sum(held < HELD * energy)
