"""The primitive: an exact product whose kernel gradient adds up K of M outer products.

    forward     Y  = X W                  X (M, N), W (N, P), Y (M, P)
    backward    dX = G W^T                G = dL/dY (M, P); exact, unless an InputGrad is asked for
    select      S  = policy(scores, K)    scores[m] = (||Xh[m]|| ||Gh[m]||)^2
                                          Xh = mem_X + X,  Gh = mem_G + G
    gather      Xh[S], Gh[S]
    multiply    dW = Xh[S]^T Gh[S]        in place of X^T G
    store       mem_X, mem_G <- sqrt(decay) * (Xh, Gh with the rows of S set to 0)

This is arXiv 2110.09164 in gradient units: the optimizer applies the learning rate. The equations
are those of the paper's memory of rows. Other memories choose from other candidates, and store
others; each has a file, behind one protocol (`candidates.py`). The next memory is returned as the
cotangent of the memory, so every JAX transform of a gradient carries it.

The output is a sum of two terms, one for each gradient of the product. The second term is 0:

    Y = X stop(W)  +  term(stop(Y), stop(X), W, memory, key)

        dX, as JAX        dW and the next memory, by the term's custom rule:
        differentiates    select, gather, multiply, store
        a product

XLA drops the zeros. A caller that differentiates X alone meets only the first term: it selects
nothing and needs no memory. Where dX is approximate, X is stopped in the first term and goes into
the second, whose rule then returns dX, too.

What is stopped is stopped for one derivative. dX = G W^T is exact, and so are its derivatives. The
derivative of dW is the estimate's own, with the selection, its weights and the directions held
fixed: unbiased if dW is. Where dX is approximate, or rows wait from other steps, it is an error.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import AxisType

from mem_aop_jax._compat import axes_of, vary, varying_axes
from mem_aop_jax._core import validation
from mem_aop_jax._core.candidates import NESTED_KEY, Call, Candidates, Chosen, Factors
from mem_aop_jax._core.input_gradient import input_gradient
from mem_aop_jax._core.layout import as_inputs, as_kernel, as_matrix, as_rows
from mem_aop_jax._core.memory import Memory, mark_of
from mem_aop_jax._core.memory import is_void as memory_is_void
from mem_aop_jax._core.memory_kinds import MEMORY_KINDS
from mem_aop_jax._core.policies import POLICIES, map_groups, row_scores
from mem_aop_jax._core.probe import without_probe
from mem_aop_jax._kernels.dispatch import cuda_kernel_or_xla, kernel_or_xla
from mem_aop_jax._kernels.row_access import flat_rows
from mem_aop_jax._numerics import accumulation_dtype, widest_dtype

# (call, differentiates_inputs, x, g, kernel, memory, key) -> dX or None, dW, next memory
Rule = Callable[..., tuple[chex.Array | None, chex.Array, chex.ArrayTree]]


def product(
    call: Call,
    rule: Rule,
    differentiates_inputs: bool,
    exact_inputs: bool,
    x: chex.Array,
    kernel: chex.Array,
    memory,
    key: chex.PRNGKey | None,
    **options,
) -> chex.Array:
    """Y = X W, with the gradients of this module's docstring; `options` are `lax.dot_general`'s.

    `rule` is the term's backward rule. With `differentiates_inputs` it returns a gradient of the
    inputs; with `exact_inputs` JAX adds the exact one.
    """
    # In shard_map: one kernel on all devices, whose transpose sums dW.
    kernel = vary(kernel, axes_of(x, memory, key))
    multiply = functools.partial(
        lax.dot_general,
        dimension_numbers=call.dimension_numbers,
        precision=call.precision,
        **options,
    )
    y = _inputs_term(multiply, x if exact_inputs else lax.stop_gradient(x), kernel)
    term, term_x = _kernel_term, _constant_beside(kernel, x)
    if differentiates_inputs:
        term, term_x = _kernel_and_inputs_term, vary(x, axes_of(x, kernel))
    return y + term(call, rule, lax.stop_gradient(y), term_x, kernel, memory, key)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _inputs_term(multiply, x, kernel):
    """X W, whose derivative is that of X alone; the derivative's own has both."""
    return multiply(x, lax.stop_gradient(kernel))


def _inputs_tangent(multiply, primals, tangents):
    dx, _ = tangents
    y, kernel = _inputs_term(multiply, *primals), primals[1]
    return y, SymbolicZero.from_primal_value(y) if _is_zero(dx) else multiply(dx, kernel)


@jax.custom_jvp
def _constant_beside(kernel, x):
    """X, constant up to the first derivative by the kernel; to those around it X is what it is."""
    return x


def _constant_tangent(primals, tangents):
    kernel, x = primals
    x = _constant_beside(kernel, x) if _is_zero(tangents[0]) else x
    return x, SymbolicZero.from_primal_value(x)


def _is_zero(tangent):
    return isinstance(tangent, SymbolicZero)


_inputs_term.defjvp(_inputs_tangent, symbolic_zeros=True)
_constant_beside.defjvp(_constant_tangent, symbolic_zeros=True)


def _zeros(call, rule, y, x, kernel, memory, key):
    """Zeros like y. Under vmap they are batched if y, the memory or the key is.

    So each example of the batch gets a cotangent, and a next memory, of its own.
    """
    del call, rule, x, kernel
    zeros = jnp.zeros_like(y)
    zeros = jnp.where(jnp.isnan(y), zeros, zeros)
    for leaf in jax.tree.leaves((memory, key)):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        zeros = jnp.where(leaf.sum() == 0, zeros, zeros)
    return zeros


_kernel_term = jax.custom_vjp(_zeros, nondiff_argnums=(0, 1))
_kernel_and_inputs_term = jax.custom_vjp(  # not under an eager shard_map, for symbolic zeros
    _zeros, nondiff_argnums=(0, 1)
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("x", "kernel", "memory", "key"),
    meta_fields=("differentiates_inputs",),
)
@dataclasses.dataclass(frozen=True)
class _Residuals:
    """What the forward pass leaves for the backward pass."""

    x: chex.Array
    kernel: chex.Array
    memory: chex.ArrayTree
    key: chex.PRNGKey | None
    differentiates_inputs: bool


def _forward(call, rule, y, x, kernel, memory, key):
    """To a derivative around this one, the zeros are the term again."""
    validation.differentiable(call, without_probe(memory), key)
    inputs = _constant_beside(kernel, x)
    zeros = _kernel_term(call, _redrawn(rule), y, inputs, kernel, memory, key)
    return zeros, _Residuals(*_stored(x, kernel, memory, key), differentiates_inputs=False)


def _forward_with_inputs(call, rule, *primals):
    """As `_forward`; each primal says whether it is differentiated (`perturbed`)."""

    def each(attribute):
        is_primal = lambda node: isinstance(node, CustomVJPPrimal)  # noqa: E731
        return jax.tree.map(lambda p: getattr(p, attribute), primals, is_leaf=is_primal)

    y, x, kernel, memory, key = each("value")
    _, x_perturbed, *kernel_and_memory_perturbed, _ = each("perturbed")
    if any(jax.tree.leaves(kernel_and_memory_perturbed)):
        validation.differentiable(call, without_probe(memory), key)
    zeros = _kernel_and_inputs_term(call, _redrawn(rule), y, x, kernel, memory, key)
    return zeros, _Residuals(*_stored(x, kernel, memory, key), x_perturbed)


def _stored(*residuals):
    """The residuals, which a program stores anyway, behind a barrier.

    Without it XLA computes the norms of a batch that jit closes over as it compiles, for minutes;
    and where a scan is differentiated twice, JAX mixes up residuals that are inputs of the rule.
    """
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(residuals)):
        return residuals  # of no program

    def store(leaf):  # each alone: together they would differ over the mesh axes of all
        if not hasattr(leaf, "dtype"):
            return leaf
        if leaf.ndim > 2 and not _is_explicit(jax.typeof(leaf)):
            return cuda_kernel_or_xla(_store_as_rows, lax.optimization_barrier, leaf)
        return lax.optimization_barrier(leaf)

    return jax.tree.map(store, residuals)


def _store_as_rows(leaf):
    """In the shape that its product has, or XLA for GPUs may store it in two layouts."""
    return lax.optimization_barrier(flat_rows(leaf)).reshape(leaf.shape)


def _redrawn(rule):
    """The rule with a key of its own, so that draws of nested derivatives are independent."""

    def with_another_key(call, differentiates_inputs, x, g, kernel, memory, key):
        if call.config.needs_key:
            key = jax.random.fold_in(key, NESTED_KEY)
        return rule(call, differentiates_inputs, x, g, kernel, memory, key)

    return with_another_key


def _backward(call, rule, residuals, g):
    x, kernel, memory = residuals.x, residuals.kernel, residuals.memory
    if isinstance(g, SymbolicZero):
        return (None,) * 5
    rule = functools.partial(rule, call, residuals.differentiates_inputs)
    like = (x if residuals.differentiates_inputs else None), kernel, memory
    rule = _with_automatic_axes(rule, like)
    dx, dw, memory = rule(x, jnp.asarray(g), kernel, memory, residuals.key)
    return None, dx, dw, memory, None


_kernel_term.defvjp(_forward, _backward)
_kernel_and_inputs_term.defvjp(_forward_with_inputs, _backward, symbolic_zeros=True)


def _with_automatic_axes(rule, like):
    """The rule, with explicit axes of a mesh made automatic, and results sharded like `like`.

    Selection depends on values, so shardings cannot be read off the types of its results.
    """
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(like)]
    if not any(map(_is_explicit, types)):
        return rule
    shardings = jax.tree.unflatten(jax.tree.structure(like), [t.sharding for t in types])
    return jax.sharding.auto_axes(rule, out_sharding=shardings)


def _is_explicit(array_type):
    """Whether an array lies on a mesh with explicit axes."""
    return AxisType.Explicit in array_type.sharding.mesh.axis_types


# ---- the backward rule


class Estimate(NamedTuple):
    """The approximate gradients of a layer, and what the policy chose from."""

    inputs: chex.Array | None  # None where it was not asked for
    kernel: chex.Array
    memory: chex.ArrayTree  # the next one
    norms: Factors  # of the candidates, `(groups, candidates)` each
    chosen: Chosen


def estimate(
    call: Call,
    differentiates_inputs: bool,
    x: chex.Array,
    g: chex.Array,
    kernel: chex.Array,
    memory,
    key: chex.PRNGKey | None,
) -> Estimate:
    """The gradient of the kernel, the next memory, and if asked for the gradient of the inputs.

    `g` are the outputs' cotangents. Where the gradient of the inputs is not asked for, directions
    that it alone takes out follow no rows.
    """
    shape = x.shape
    x, g = (vary(a, axes_of(x, g, memory, key)) for a in (x, g))  # one batch for many memories
    x, g = as_rows(call.dimension_numbers, call.config.groups, x, g)
    # Else XLA for GPUs computes rows anew, in other shapes, and keeps what they came from.
    x, g = (lax.optimization_barrier(flat_rows(rows)).reshape(rows.shape) for rows in (x, g))
    kind = MEMORY_KINDS[None if memory is None else call.config.memory_kind]
    choose_from = functools.partial(kind.candidates, differentiates_inputs=differentiates_inputs)
    candidates = choose_from(call, x, g, memory, key)
    dx = None
    if differentiates_inputs:
        directions = candidates.cotangent_projection().first(call.config.input_rank)
        matrix = as_matrix(call.dimension_numbers, kernel)
        dx = input_gradient(call, directions, matrix, key, x.dtype)
        dx = as_inputs(call.dimension_numbers, dx, shape)

    def by(choose):
        return lambda *args: _kernel_gradient(choose(call, *args), kernel.dtype)

    gradient = by(choose_from)
    if on_gpu := kind.gpu_candidates(call, x, g, memory):
        gradient = functools.partial(cuda_kernel_or_xla, by(on_gpu), gradient)
    if on_tpu := kind.tpu_candidates(call, x, g, memory):
        gradient = functools.partial(kernel_or_xla, by(on_tpu), gradient)
    dw, *rest = gradient(x, g, memory, key)
    return Estimate(dx, as_kernel(call.dimension_numbers, dw, kernel.shape), *rest)


def estimated(
    call: Call, differentiates_inputs: bool, *args
) -> tuple[chex.Array | None, chex.Array, chex.ArrayTree]:
    """The rule of training: dX, dW and the next memory of `estimate`, for its arguments."""
    *factors, _, key = args
    fixed = *lax.stop_gradient(args[:-1]), key
    found = estimate(call, differentiates_inputs, *fixed)
    dx, dw = _differentiable(call, found[:2], tuple(factors), fixed[-2], found.chosen)
    return dx, dw, found.memory


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(call, gradients, factors, memory, chosen):
    """The gradients (dX or None, dW) of the factors X, G and W, with derivatives of their own."""
    return gradients


def _second_derivative(call, primals, tangents):
    gradients, (x, g, kernel), memory, chosen = primals
    _, (x_tangent, g_tangent, _), *_ = tangents
    if gradients[0] is not None:
        validation.not_differentiable(call, f"input_grad={call.config.input_grad}")
    kind = MEMORY_KINDS[None if memory is None else call.config.memory_kind]

    def linear(x, g):
        rows = as_rows(call.dimension_numbers, call.config.groups, x, g)
        dw = kind.fixed_estimate(call, *rows, memory, chosen).astype(kernel.dtype)
        return as_kernel(call.dimension_numbers, dw, kernel.shape)

    terms = [
        linear(*pair) for pair in ((x_tangent, g), (x, g_tangent)) if not any(map(_is_zero, pair))
    ]
    tangent = sum(terms[1:], terms[0]) if terms else SymbolicZero.from_primal_value(gradients[1])
    return _differentiable(call, *primals), (None, tangent)


_differentiable.defjvp(_second_derivative, symbolic_zeros=True)


def _kernel_gradient(candidates, dtype):
    """dW `(in_features, out_features)`, and what else an `Estimate` has."""
    norms = candidates.norms()
    chosen = _select(candidates, norms)
    factors, candidates = candidates.gather(chosen)
    dw = _multiply(candidates, chosen, factors, dtype).astype(dtype)
    return dw, _store(candidates, chosen, dw), norms, chosen


def _select(candidates: Candidates, norms: Factors) -> Chosen:
    """S, the candidates that the policy chooses by their scores."""
    call, memory = candidates.call, candidates.memory
    groups, rows, _ = candidates.x.shape
    k = call.config.selected_rows(groups * rows, call.name) // groups
    policy = call.config.policy
    policy = policy if callable(policy) else POLICIES[policy]

    def select(key, scores):
        selection = validation.selection(call.name, call.config, policy(key, scores, k), k)
        indices = selection.indices + jnp.where(selection.indices < 0, scores.size, 0)
        missing = jnp.where(indices < 0, scores.size, indices)
        return selection._replace(indices=missing.astype(jnp.int32))

    storable = candidates.storable()
    chosen_first = storable is True and not callable(call.config.policy)  # where not finite
    scores, _ = row_scores(*norms, storable)
    finite = jnp.isfinite(norms[0]) & jnp.isfinite(norms[1])
    indices, weights = map_groups(select, candidates.key, scores)
    unchosen = jax.vmap(lambda group, indices: group.at[indices].set(False))(
        jnp.ones_like(finite), indices
    )
    is_void = False if memory is None else memory_is_void(memory)
    if not candidates.shows_lost_rows:
        lost = jnp.sum(~finite, axis=1) > k if chosen_first else ~finite & unchosen
        is_void |= jnp.any(lost)
    if weights is not None:
        weights = jnp.where(is_void, jnp.nan, weights)
    return Chosen(indices, weights, finite & unchosen, is_void)


def _multiply(candidates: Candidates, chosen: Chosen, factors, dtype) -> chex.Array:
    """Xh[S]^T Gh[S] + L^T R, one product, accumulated in float32 (float64 for float64).

    It is rounded to `dtype`, that of the kernel, at once where it can be: a GPU would else write it
    in float32, and round it in a pass of its own.
    """
    xs, gs = (rows.reshape(-1, rows.shape[-1]) for rows in factors)
    dtypes = candidates.x.dtype, candidates.g.dtype
    exact = candidates.exact_part()
    if exact is not None:
        xs, gs = (
            jnp.concatenate([rows.astype(all_rows.dtype), all_rows])
            for rows, all_rows in zip((xs, gs), exact, strict=True)
        )
        dtypes = (widest_dtype(*dtypes),) * 2  # rounded to neither
    # In float16 a sum of rows could overflow, or a row with its weight.
    if jnp.float16 not in dtypes or (candidates.memory is None and chosen.weights is None):
        xs, gs = xs.astype(dtypes[0]), gs.astype(dtypes[1])
    accumulated = max(map(accumulation_dtype, (xs.dtype, gs.dtype)))
    rounded_at_once = xs.dtype == gs.dtype == dtype == jnp.bfloat16
    return lax.dot_general(
        xs,
        gs,
        (((0,), (0,)), ((), ())),
        precision=candidates.call.precision,
        preferred_element_type=dtype if rounded_at_once else accumulated,
    )


def _store(candidates: Candidates, chosen: Chosen, dw):
    """The next memory, used once."""
    memory = candidates.next_memory(chosen, dw)
    if memory is None:
        return None
    uses = candidates.memory[-1]
    # Devices that share it, but not the rows, share no mark: there an average differs by its axes.
    marked = isinstance(memory, Memory) and varying_axes(dw) <= varying_axes(uses)
    once = vary(mark_of(dw) if marked else jnp.ones_like(uses), varying_axes(uses))
    first = jax.tree.leaves(memory)[0]
    if varying_axes(first) == varying_axes(once):  # under vmap: one for each batch,
        once = jnp.where(jnp.any(first), once, once)  # so that a sum of memories shows
    return memory._replace(uses=once)
