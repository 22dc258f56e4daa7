"""The dense primitive: an exact layer whose weight gradient is K of M outer products.

    forward     Y  = X W                         X (M, N), W (N, P), Y (M, P); G = dL/dY (M, P)
    backward    dX = G W^T                       exact
                Xh = mem_X + X,  Gh = mem_G + G
                S  = policy(scores), K rows      scores[m] = (||Xh[m]|| ||Gh[m]||)^2
                dW = Xh[S]^T Gh[S]               in place of X^T G
    memory      mem_X, mem_G <- sqrt(decay) * (Xh, Gh with the rows of S set to 0)

This is arXiv 2110.09164 in gradient units: the optimizer applies the learning rate. Other memories
are in rows.py (signs, slots) and subspace.py; each says what the policy chooses from. The next
memory is returned as the cotangent of the memory, so every JAX transform of a gradient carries it.
"""

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from mem_aop_jax import checks, subspace
from mem_aop_jax.compat import vary, varying_axes
from mem_aop_jax.config import MemAOP
from mem_aop_jax.contractions import (
    as_kernel,
    as_rows,
    as_static,
    contraction_sizes,
    first_free_size,
    warn_once,
    why_exact,
)
from mem_aop_jax.memory import Memory, Probe, Subspace, measured_memory, wide
from mem_aop_jax.policies import POLICIES, row_scores
from mem_aop_jax.probe import measure, parts_of
from mem_aop_jax.rows import Rows, Slots

_SIGNS, _REFRESH = 2**31, 2**31 + 1  # what keys are for, beside those of the groups


class _Layer(NamedTuple):
    """What is static about one call. The name is for errors."""

    config: MemAOP
    dimension_numbers: lax.DotDimensionNumbers
    precision: lax.PrecisionLike
    name: str


def _product(layer, x, kernel, memory, key, **options):
    """X W: exact and differentiable in X as usual; what W contributes is left to `_kernel_term`."""
    # In shard_map: one kernel on all devices, whose transpose sums dW.
    kernel = vary(kernel, _axes(x, memory, key))
    y = lax.dot_general(
        x,
        lax.stop_gradient(kernel),
        layer.dimension_numbers,
        precision=layer.precision,
        **options,
    )
    return y + _kernel_term(layer, lax.stop_gradient(y), lax.stop_gradient(x), kernel, memory, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_term(layer, y, x, kernel, memory, key):
    """Zeros like y, which XLA drops: a term with the approximate gradient of the kernel.

    It is apart from the product so that nobody who differentiates only the inputs pays for it or
    needs a memory.
    """
    del layer, x, kernel
    zeros = jnp.zeros_like(y)
    zeros = jnp.where(jnp.isnan(y), zeros, zeros)  # under vmap batched where y, the memory or
    for leaf in jax.tree.leaves((memory, key)):  # the key is: each example has its own cotangent
        zeros = jnp.where(_scalar(leaf) == 0, zeros, zeros)
    return zeros


def _forward(layer, y, x, kernel, memory, key):
    rows, _, _ = contraction_sizes(x, kernel, layer.dimension_numbers)
    checks.differentiable(layer.name, layer.config, rows, measured_memory(memory), key)
    return _kernel_term(layer, y, x, kernel, memory, key), (x, kernel, memory, key)


def _backward(layer, residuals, g):
    x, kernel, memory, key = residuals
    rule = _measured_gradient if isinstance(memory, Probe) else _weight_gradient
    rule = functools.partial(rule, layer, kernel)
    dw, memory = _automatic(rule, like=(kernel, memory))(x, jnp.asarray(g), memory, key)
    return None, None, dw, memory, None


_kernel_term.defvjp(_forward, _backward)


def _weight_gradient(layer, kernel, x, g, memory, key):
    """dW and the next memory."""
    return _estimate(layer, kernel, x, g, memory, key)[:2]


def _measured_gradient(layer, kernel, x, g, probe, key):
    """The exact dW and what the probe measured."""
    parts = parts_of(first_free_size(layer.dimension_numbers, x))
    x, g = (a[0] for a in as_rows(layer.dimension_numbers, 1, x, g))
    flat = layer._replace(dimension_numbers=(((1,), (0,)), ((), ())))
    like = jax.ShapeDtypeStruct((x.shape[1], g.shape[1]), jnp.float32)

    def draw(key):
        dw, _, norms, not_chosen = _estimate(flat, like, x, g, probe.memory, key)
        scores, _ = row_scores(*(n.reshape(-1) for n in norms))  # in units of the largest of all
        products = jnp.sqrt(scores)
        of_chosen = jnp.sum(jnp.where(not_chosen.reshape(-1), 0, products))
        return dw, of_chosen / jnp.maximum(products.sum(), 1)  # of which the largest is 1

    probe = measure(probe, layer.config, x, g, parts, key, draw)
    dtype = max(wide(x.dtype), wide(g.dtype))
    dw = jnp.matmul(x.T.astype(dtype), g.astype(dtype), precision=layer.precision)
    return as_kernel(layer.dimension_numbers, dw.astype(kernel.dtype), kernel.shape), probe


def _estimate(layer, kernel, x, g, memory, key):
    """dW, the next memory, the norms of the candidates, and which were not chosen.

    Inside, all rows are `(groups, rows of a group, features)`.
    """
    x, g = (vary(a, _axes(x, g, memory, key)) for a in (x, g))  # one batch for many memories
    x, g = as_rows(layer.dimension_numbers, layer.config.groups, x, g)
    candidates = _candidates(layer, x, g, memory)
    norms = candidates.norms()
    scores, finite = row_scores(*norms)
    finite &= candidates.fit()
    chosen, weights = _select(layer, x.shape[0] * x.shape[1], key, scores)
    not_chosen = jax.vmap(lambda chosen, group: group.at[chosen].set(False))(
        chosen, jnp.ones_like(finite)
    )

    xs, gs = candidates.take(chosen)
    lost = ~finite & not_chosen  # neither chosen nor fit for the memory
    bad_x, bad_g = lax.cond(jnp.any(lost), _bad_columns, _no_columns, lost, x, g)
    xs = jnp.where(bad_x, jnp.nan, xs)
    gs = jnp.where(bad_g | _misused(memory), jnp.nan, gs)
    xs, gs = (a.reshape(-1, a.shape[-1]) for a in _weigh(xs, gs, weights))
    dtypes = x.dtype, g.dtype
    if isinstance(memory, Subspace):
        left, right, new_memory = candidates.whole(_refresh_is_due(layer, memory, key))
        xs, gs = jnp.concatenate([xs, left]), jnp.concatenate([gs, right])
        dtypes = (max(dtypes, key=lambda dtype: dtype.itemsize),) * 2  # rounded to neither
    # In float16 a sum of rows could overflow, or a row with its weight.
    if jnp.float16 not in dtypes or (memory is None and weights is None):
        xs, gs = xs.astype(dtypes[0]), gs.astype(dtypes[1])
    dw = lax.dot_general(
        xs,
        gs,
        (((0,), (0,)), ((), ())),
        precision=layer.precision,
        preferred_element_type=max(wide(xs.dtype), wide(gs.dtype)),  # of mixed inputs, the wider
    )
    dw = as_kernel(layer.dimension_numbers, dw.astype(kernel.dtype), kernel.shape)

    if memory is None:
        return dw, None, norms, not_chosen
    if isinstance(memory, Memory):
        signs = _signs(layer, key, x)
        waiting = finite & not_chosen
        new_memory = candidates.next_memory(waiting, layer.config.decay, signs, after=(xs, gs))
    new_memory = new_memory._replace(uses=_used_once(memory.uses, new_memory.inputs))
    new_memory = jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), new_memory, memory)
    return dw, new_memory, norms, not_chosen


def _candidates(layer, x, g, memory):
    """What the policy chooses from: rows that were joined, rows and slots, or residuals."""
    if isinstance(memory, Subspace):
        sides = (
            subspace.split(rows, basis, layer.precision)
            for rows, basis in ((x, memory.inputs), (g, memory.cotangents))
        )
        return subspace.Residuals(*sides, memory, layer.precision)
    if memory is None:
        return Rows(x, g, None)
    memory = memory._replace(
        inputs=memory.inputs.reshape(len(x), -1, x.shape[-1]),
        cotangents=memory.cotangents.reshape(len(g), -1, g.shape[-1]),
    )
    return (Rows if layer.config.memory_slots is None else Slots)(x, g, memory)


def dense(
    x: chex.Array,
    kernel: chex.Array,
    memory: Memory | Subspace | None = None,
    *,
    config: MemAOP | None = None,
    key: chex.PRNGKey | None = None,
    precision: lax.PrecisionLike = None,
    name: str = "dense",
) -> chex.Array:
    """`x @ kernel`, with the weight gradient of Mem-AOP-GD (arXiv 2110.09164).

    The result and the gradient of `x` are exact. The gradient of `kernel` is the sum of k of the
    rows' outer products, those that `config.policy` chooses (weighted by an unbiased policy; of
    residuals, beside an exact part, with a `Subspace`); the "gradient" of `memory` is the next
    memory, to be passed in the next step. Products accumulate in float32 (float64 for
    float64). A row with a NaN or infinity makes the same entries of the kernel's gradient
    non-finite as in the exact layer, and never enters the memory.

    Without a memory, the layer can be evaluated on a batch of any size, and differentiated with
    respect to `x`.

    Args:
      x: `(..., in_features)` floating. All dimensions but the last together are the rows.
      kernel: `(in_features, out_features)` floating.
      memory: the layer's memory, from `init_memory` or the last step; a `Memory` is for this number
        of rows. None where the configuration has none, and to evaluate; a `Probe` to measure.
      config: what to compute; None is an exact layer.
      key: PRNG key, needed by all named policies but "topk"; handed to any policy.
      precision: as in `jax.lax.dot_general`, for all products.
      name: the layer's name in error messages.

    Returns:
      `(..., out_features)`, in the dtype of `jax.lax.dot_general`.

    Raises:
      TypeError: integer or complex `x` or `kernel`; a `memory` of another type than the
        configuration's, or of another dtype.
      ValueError: shapes that do not fit each other, the memory or the configuration; while
        differentiating with respect to `kernel`: a missing memory or key, or k larger than the
        number of rows.

    Example:
      >>> import jax, jax.numpy as jnp, mem_aop_jax as aop
      >>> config = aop.MemAOP(k=2)
      >>> x, kernel = jnp.ones((8, 3)), jnp.ones((3, 4))
      >>> memory = aop.init_memory(config, 8, 3, 4)
      >>> def loss(kernel, memory):
      ...     return aop.dense(x, kernel, memory, config=config).sum()
      >>> grad, memory = jax.grad(loss, argnums=(0, 1))(kernel, memory)
      >>> float(grad[0, 0]), float(memory.inputs.sum())  # 2 of 8 rows; 6 wait
      (2.0, 18.0)
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    checks.shapes(name, x, kernel)
    _check_config(name, config, memory)
    numbers = ((x.ndim - 1,), (0,)), ((), ())
    if config is None:
        return lax.dot_general(x, kernel, numbers, precision=precision)
    return _approximate(x, kernel, numbers, precision, memory, config, key, name)


def dot_general(
    lhs: chex.Array,
    rhs: chex.Array,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: chex.ArrayDType | None = None,
    *,
    memory: Memory | Subspace | None = None,
    config: MemAOP | None = None,
    key: chex.PRNGKey | None = None,
    name: str = "dot_general",
    **options,
) -> chex.Array:
    """`jax.lax.dot_general` of inputs with a kernel, with the kernel's gradient as in `dense`.

    Any contraction without batch dimensions is a dense layer: the free dimensions of `lhs` together
    are the rows, the contracted ones the in_features, the free dimensions of `rhs` the
    out_features, each in the order in which they stand in the array (in_features: in that of
    `dimension_numbers`). A contraction with batch dimensions, or with a memory that makes the left
    operand the kernel (a `Subspace` without directions of the cotangents cannot tell), runs exact
    and says so once.

    Args:
      lhs: the inputs, floating.
      rhs: the kernel, floating.
      dimension_numbers: as in `jax.lax.dot_general`.
      precision: as in `jax.lax.dot_general`, for all products.
      preferred_element_type: the dtype of the result, as in `jax.lax.dot_general`.
      memory: as in `dense`, for these rows, in_features and out_features.
      config: as in `dense`.
      key: as in `dense`.
      name: the layer's name in messages.
      **options: further arguments of `jax.lax.dot_general`, for the product.

    Returns:
      The free dimensions of `lhs`, then those of `rhs`.

    Raises:
      TypeError: as in `dense`.
      ValueError: as in `dense`.
    """
    _check_config(name, config, memory)
    slots = config is not None and config.memory_slots is not None
    reason = config and why_exact(lhs, rhs, dimension_numbers, memory, slots=slots)
    if reason:
        warn_once(f"{name}: the contraction {dimension_numbers} runs exact: {reason}")
    options |= {"preferred_element_type": preferred_element_type}
    if config is None or reason:
        return lax.dot_general(lhs, rhs, dimension_numbers, precision=precision, **options)
    return _approximate(
        lhs, rhs, as_static(dimension_numbers), precision, memory, config, key, name, **options
    )


def _check_config(name, config, memory):
    if config is None and memory is not None:
        raise ValueError(f"{name}: got a memory but no config; pass config=aop.MemAOP(...).")
    checks.config(name, config)


def _approximate(x, kernel, dimension_numbers, precision, memory, config, key, name, **options):
    """`_product`, of inputs that are checked first."""
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    checks.floating(name, x, kernel)
    own = measured_memory(memory)
    if own is not None:
        sizes = contraction_sizes(x, kernel, dimension_numbers)
        own = checks.memory(name, config, x, sizes, own)
    memory = dataclasses.replace(memory, memory=own) if isinstance(memory, Probe) else own
    layer = _Layer(config, dimension_numbers, precision, name)
    return _product(layer, x, kernel, memory, key, **options)


# ---- the steps of the backward rule


def _axes(*trees):
    """The manual mesh axes over which any of the arrays differs from device to device."""
    return frozenset().union(*map(varying_axes, jax.tree.leaves(trees)))


def _automatic(rule, like):
    """The rule, with explicit axes of a mesh made automatic, and results sharded like `like`.

    Selection depends on values, so shardings cannot be read off the types of its results.
    """
    types = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(like)]
    if not any(AxisType.Explicit in sharding.mesh.axis_types for sharding in types):
        return rule
    shardings = jax.tree.unflatten(jax.tree.structure(like), types)
    return jax.sharding.auto_axes(rule, out_sharding=shardings)


def _used_once(uses, of_batch):
    """1, and under vmap one for each batch, so that a sum of memories shows."""
    once = vary(jnp.ones_like(uses), varying_axes(uses))
    if varying_axes(of_batch) == varying_axes(once):
        once = jnp.where(jnp.any(of_batch), once, once)
    return once


def _select(layer, rows, key, scores):
    """`(groups, k / groups)` indices of candidates of each group, and their weights or None."""
    groups = layer.config.groups
    k = layer.config.selected_rows(rows, layer.name) // groups
    policy = POLICIES.get(layer.config.policy, layer.config.policy)

    def select(key, scores):
        indices, weights = checks.selection(
            layer.name, layer.config, policy, policy(key, scores, k), k
        )
        from_the_end = jnp.where(indices < 0, scores.size, 0)
        return (indices + from_the_end).astype(jnp.int32), weights

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


def _bad_columns(lost, x, g):
    """`(groups, 1, in_features)` and `(groups, 1, out_features)`: where a lost row is not finite.

    (0 * NaN is NaN: where a chosen row is not finite, too, but there the gradient is not either.)
    A row that only grew too large for the memory's dtype when it was added up is bad throughout,
    as is a slot.
    """
    lost, slots = lost[:, : x.shape[1]], lost[:, x.shape[1] :]

    def product(a, b):
        return jnp.matmul(a, b, preferred_element_type=wide(a.dtype))

    small = 2.0**-20  # no sum of finite numbers overflows
    fresh = jnp.stack([product(a, jnp.full(a.shape[-1], small, a.dtype)) for a in (x, g)])
    lost = lost[:, None, :]
    outgrown = jnp.any(lost & jnp.all(jnp.isfinite(fresh), axis=0)[:, None, :], -1, keepdims=True)
    outgrown |= jnp.any(slots, axis=-1)[:, None, None]
    return tuple(~jnp.isfinite(product(lost.astype(a.dtype), a)) | outgrown for a in (x, g))


def _no_columns(lost, x, g):
    del lost
    return tuple(vary(jnp.zeros((len(a), 1, a.shape[-1]), bool), varying_axes(a)) for a in (x, g))


def _misused(memory):
    """Whether the memory was added up or scaled since the last step."""
    return False if memory is None else (memory.uses != 0) & (memory.uses != 1)


def _weigh(xs, gs, weights):
    """The rows with the weights folded into the smaller factor."""
    if weights is None:
        return xs, gs
    if gs.shape[-1] <= xs.shape[-1]:
        return xs, gs * weights[..., None].astype(gs.dtype)
    return xs * weights[..., None].astype(xs.dtype), gs


def _scalar(leaf):
    """Some number that depends on an array or a PRNG key."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return leaf.sum()
