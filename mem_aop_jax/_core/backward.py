"""What the backward pass of an approximate layer computes: its gradients, and the next memory.

Inside, all rows are `(groups, rows of a group, features)`.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._compat import axes_of, vary, varying_axes
from mem_aop_jax._core import validation
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.layout import as_inputs, as_kernel, as_matrix, as_rows
from mem_aop_jax._core.memory import Memory, Subspace
from mem_aop_jax._core.policies import POLICIES, priority, row_scores
from mem_aop_jax._core.row_memory import Joined, Rows, Slots, join_on_tpu
from mem_aop_jax._core.subspace_memory import Residuals, side, sides
from mem_aop_jax._kernels.dispatch import kernel_or_xla
from mem_aop_jax._kernels.row_access import replace_product_rows, replace_rows
from mem_aop_jax._numerics import accumulation_dtype, widest_dtype

_SIGNS, _REFRESH, _INPUTS = range(2**31, 2**31 + 3)  # what keys are for, beside those of the groups


class Layer(NamedTuple):
    """What is static about one call. The name is for errors."""

    config: MemAOP
    dimension_numbers: lax.DotDimensionNumbers
    precision: lax.PrecisionLike
    name: str


class Estimate(NamedTuple):
    """The approximate gradients of a layer.

    Attributes:
      inputs: like the inputs; None where it was not asked for.
      kernel: like the kernel.
      memory: the next one.
      norms: of the candidates' inputs and cotangents, `(groups, candidates)` each.
      not_chosen: `(groups, candidates)` bool.
    """

    inputs: chex.Array | None
    kernel: chex.Array
    memory: Memory | Subspace | None
    norms: tuple[chex.Array, chex.Array]
    not_chosen: chex.Array


def estimate(
    layer: Layer,
    of_inputs: bool,
    x: chex.Array,
    g: chex.Array,
    kernel: chex.Array,
    memory: Memory | Subspace | None,
    key: chex.PRNGKey | None,
) -> Estimate:
    """The gradient of the kernel and, where asked for, that of the inputs.

    Args:
      layer: what is static.
      of_inputs: whether the gradient of the inputs is asked for. Where it is not, the directions
        that it alone takes out follow no rows.
      x: the inputs.
      g: the outputs' cotangents.
      kernel: the kernel.
      memory: of the layer.
      key: of the layer.
    """
    shape = x.shape
    x, g = (vary(a, axes_of(x, g, memory, key)) for a in (x, g))  # one batch for many memories
    x, g = as_rows(layer.dimension_numbers, layer.config.groups, x, g)
    rank = layer.config.ranks(x.shape[-1], g.shape[-1])[1]
    if isinstance(memory, Subspace):
        directions = memory.cotangents
        if directions is not None and not of_inputs:
            directions = directions[:, :rank]
        due = _refresh_is_due(layer, memory, key)
        of_x, of_g = sides(x, g, (memory.inputs, directions), rank, due, layer.precision)
        candidates = Residuals(of_x, of_g.first(rank), memory, due, layer.precision)
        of_kernel = functools.partial(_kernel_gradient, layer, kernel.dtype, candidates)
    else:
        of_g = side(g, None, layer.precision)
        of_kernel = functools.partial(_of_rows, layer, kernel.dtype)
    dx = None
    if of_inputs:
        matrix = as_matrix(layer.dimension_numbers, kernel)
        dx = _input_gradient(layer, of_g.first(layer.config.input_grad.rank), matrix, key, x.dtype)
        dx = as_inputs(layer.dimension_numbers, dx, shape)

    dw, *others = of_kernel(x, g, memory, key)
    dw = as_kernel(layer.dimension_numbers, dw, kernel.shape)
    return Estimate(dx, dw, *others)


def approximates_inputs(config, rows, memory, key):
    """Whether the gradient of the inputs is approximate; to evaluate it is not."""
    wanted = config.input_grad
    if wanted is None or key is None or (wanted.rank and memory is None):
        return False
    if rows == 0 or rows % config.groups or (config.k is not None and config.k > rows):
        return False
    return config.input_rows(rows) < rows


# ---- of the inputs


def _input_gradient(layer, g, kernel, key, dtype):
    """dX `(groups, rows, in_features)`, without bias, for a kernel `(in_features, out_features)`.

    With U the directions of the cotangents and G = (G U) U^T + Gr,

        dX ~ (G U) (W U)^T                 for all rows
             + w Gr[S] W^T                 for the rows S that are drawn, scores ||Gr[m]||

    of which the rows S are one product of ((G U) U^T + w Gr)[S] with W^T.
    """
    of_products = widest_dtype(g.basis.dtype, kernel.dtype)  # and of their results

    def times(a, b):
        return jnp.matmul(a.astype(of_products), b.astype(of_products), precision=layer.precision)

    norms = g.residual_norms()
    scores, finite = row_scores(jnp.ones_like(norms), norms)
    drawn = layer.config.input_rows(norms.size) // len(norms)

    def draw(key, scores):
        return priority(key, scores, drawn)

    chosen, weights = _in_groups(draw, jax.random.fold_in(key, _INPUTS), scores)
    rows = g.outside(chosen, weights, layer.precision, add_projection=True, dtype=of_products)
    sampled = times(rows, kernel.T).astype(dtype)
    too_many = jnp.sum(~finite, axis=1, dtype=jnp.int32)[:, None, None] > drawn
    nothing = jnp.where(too_many, jnp.nan, 0).astype(of_products)  # of rows not drawn
    if not g.basis.shape[1]:
        dx = jnp.broadcast_to(nothing.astype(dtype), (*norms.shape, len(kernel)))
        return replace_rows(dx, chosen, sampled)
    # On CPUs many times as fast as U^T W^T, to which XLA else turns it round.
    directions = lax.optimization_barrier(times(kernel, g.basis))
    coordinates = g.coordinates.astype(of_products) + nothing
    return replace_product_rows(sampled, chosen, coordinates, directions.T, layer.precision)


# ---- of the kernel


def _of_rows(layer, dtype, x, g, memory, key):
    """`_kernel_gradient`, where rows wait or none does."""
    of_kernel = functools.partial(_kernel_gradient, layer, dtype)

    def by_compiler(x, g, memory, key):
        return of_kernel(_rows(layer, x, g, memory), x, g, memory, key)

    def by_kernel(x, g, memory, key):
        return of_kernel(Joined.of(x, g, memory), x, g, memory, key)

    if memory is None or not join_on_tpu(layer.config, x, g, memory):
        return by_compiler(x, g, memory, key)
    return kernel_or_xla(by_kernel, by_compiler, x, g, memory, key)


def _kernel_gradient(layer, dtype, candidates, x, g, memory, key):
    """dW `(in_features, out_features)`, and what else an `Estimate` has."""
    norms = candidates.norms()
    scores, fit = row_scores(*norms, candidates.fit())
    chosen, weights = _select(layer, x.shape[0] * x.shape[1], key, scores)
    not_chosen = jax.vmap(lambda chosen, group: group.at[chosen].set(False))(
        chosen, jnp.ones_like(fit)
    )

    waiting = fit & not_chosen
    wrong = _misused(memory)
    if not candidates.show_lost:
        wrong |= jnp.any(~fit & not_chosen)
    if weights is not None:
        weights = jnp.where(wrong, jnp.nan, weights)
    (xs, gs), candidates = candidates.take(chosen, waiting, _of_smaller(x, g, weights))
    if weights is None:
        gs = jnp.where(wrong, jnp.nan, gs)
    xs, gs = (a.reshape(-1, a.shape[-1]) for a in (xs, gs))
    dtypes = x.dtype, g.dtype
    if isinstance(memory, Subspace):
        left, right, new_memory = candidates.whole()
        xs, gs = (
            jnp.concatenate([of.astype(all_rows.dtype), all_rows])
            for of, all_rows in ((xs, left), (gs, right))
        )
        dtypes = (widest_dtype(*dtypes),) * 2  # rounded to neither
    # In float16 a sum of rows could overflow, or a row with its weight.
    if jnp.float16 not in dtypes or (memory is None and weights is None):
        xs, gs = xs.astype(dtypes[0]), gs.astype(dtypes[1])
    dw = lax.dot_general(
        xs,
        gs,
        (((0,), (0,)), ((), ())),
        precision=layer.precision,
        preferred_element_type=max(
            accumulation_dtype(xs.dtype), accumulation_dtype(gs.dtype)
        ),  # of mixed inputs, the wider
    ).astype(dtype)

    if memory is None:
        return dw, None, norms, not_chosen
    if isinstance(memory, Memory):
        signs = _signs(layer, key, x)
        new_memory = candidates.next_memory(waiting, layer.config.decay, signs, after=dw)
    new_memory = new_memory._replace(uses=_used_once(memory.uses, new_memory.inputs))
    new_memory = jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), new_memory, memory)
    return dw, new_memory, norms, not_chosen


def _rows(layer, x, g, memory):
    """What the policy chooses from without a subspace: rows that were joined, or rows and slots."""
    if memory is None:
        return Rows(x, g, None)
    memory = memory._replace(
        inputs=memory.inputs.reshape(len(x), -1, x.shape[-1]),
        cotangents=memory.cotangents.reshape(len(g), -1, g.shape[-1]),
    )
    return (Rows if layer.config.memory_slots is None else Slots)(x, g, memory)


def _select(layer, rows, key, scores):
    """`(groups, k / groups)` indices of candidates of each group, and their weights or None."""
    k = layer.config.selected_rows(rows, layer.name) // layer.config.groups
    policy = POLICIES.get(layer.config.policy, layer.config.policy)

    def select(key, scores):
        indices, weights = validation.selection(
            layer.name, layer.config, policy, policy(key, scores, k), k
        )
        indices += jnp.where(indices < 0, scores.size, 0)  # from the end
        missing = jnp.where(indices < 0, scores.size, indices)
        return missing.astype(jnp.int32), weights

    return _in_groups(select, key, scores)


def _in_groups(select, key, scores):
    """What `select(key, scores)` returns for each group of scores `(groups, candidates)`."""
    groups = len(scores)
    if groups == 1:
        return jax.tree.map(lambda a: a[None], select(key, scores[0]))
    keys = None if key is None else jax.random.split(key, groups)
    return jax.vmap(select)(keys, scores)


def _signs(layer, key, x):
    """`(groups, rows)` random 1 and -1, or None where the memory is not signed."""
    if not layer.config.signed:
        return None
    return jax.random.rademacher(jax.random.fold_in(key, _SIGNS), x.shape[:2], jnp.float32)


def _refresh_is_due(layer, memory, key):
    """Whether a subspace is refreshed in this step, on all devices that share it; None is always.

    Drawn at random, so that no layer has to count steps; always in the first step.
    """
    if layer.config.refresh == 1:
        return None
    drawn = jax.random.uniform(jax.random.fold_in(key, _REFRESH))
    axes = tuple(varying_axes(drawn) - varying_axes(memory.uses))
    if axes:
        drawn = lax.psum(drawn, axes) % 1  # uniform, too
    return (drawn < 1 / layer.config.refresh) | (memory.uses == 0)


def _misused(memory):
    """Whether the memory was added up or scaled since the last step."""
    return False if memory is None else (memory.uses != 0) & (memory.uses != 1)


def _used_once(uses, of_batch):
    """1, and under vmap one for each batch, so that a sum of memories shows."""
    once = vary(jnp.ones_like(uses), varying_axes(uses))
    if varying_axes(of_batch) == varying_axes(once):
        once = jnp.where(jnp.any(of_batch), once, once)
    return once


def _of_smaller(x, g, weights):
    """The weights of inputs and of cotangents, which the smaller factor of the product has."""
    return (None, weights) if g.shape[-1] <= x.shape[-1] else (weights, None)
