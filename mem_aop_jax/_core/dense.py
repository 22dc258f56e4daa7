"""The dense primitive: an exact layer whose weight gradient is K of M outer products.

    forward     Y  = X W                         X (M, N), W (N, P), Y (M, P); G = dL/dY (M, P)
    backward    dX = G W^T                       exact, unless an InputGrad is asked for
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

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import AxisType

from mem_aop_jax._compat import axes_of, vary
from mem_aop_jax._core import validation
from mem_aop_jax._core.backward import Layer, approximates_inputs, estimate
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.layout import as_static, contraction_sizes, warn_once, why_exact
from mem_aop_jax._core.measure import measured
from mem_aop_jax._core.memory import Memory, Subspace
from mem_aop_jax._core.probe import Probe, measured_memory


def _product(layer, x, kernel, memory, key, **options):
    """X W: exact; what is approximate of its gradients is left to a term."""
    # In shard_map: one kernel on all devices, whose transpose sums dW.
    kernel = vary(kernel, axes_of(x, memory, key))
    constant = lax.stop_gradient(x)
    rows, _, _ = contraction_sizes(x, kernel, layer.dimension_numbers)
    measures = isinstance(memory, Probe)
    of_inputs = not measures and approximates_inputs(layer.config, rows, memory, key)
    y = lax.dot_general(
        constant if of_inputs else x,  # differentiable in X as usual
        lax.stop_gradient(kernel),
        layer.dimension_numbers,
        precision=layer.precision,
        **options,
    )
    term, term_x = _kernel_term, constant
    if of_inputs or measures:
        term, term_x = _both_terms, vary(x, axes_of(x, kernel))
    return y + term(layer, lax.stop_gradient(y), term_x, kernel, memory, key)


def _zeros(layer, y, x, kernel, memory, key):
    """Zeros like y, which XLA drops: a term with the approximate gradients.

    It is apart from the product so that nobody who differentiates only the inputs, where their
    gradient is exact, pays for it or needs a memory.
    """
    del layer, x, kernel
    zeros = jnp.zeros_like(y)
    zeros = jnp.where(jnp.isnan(y), zeros, zeros)  # under vmap batched where y, the memory or
    for leaf in jax.tree.leaves((memory, key)):  # the key is: each example has its own cotangent
        zeros = jnp.where(_scalar(leaf) == 0, zeros, zeros)
    return zeros


_kernel_term = jax.custom_vjp(_zeros, nondiff_argnums=(0,))
_both_terms = jax.custom_vjp(_zeros, nondiff_argnums=(0,))  # not under an eager shard_map


def _forward(layer, *args, of_inputs=None):
    _, x, kernel, memory, key = args
    rows, _, _ = contraction_sizes(x, kernel, layer.dimension_numbers)
    validation.differentiable(layer.name, layer.config, rows, measured_memory(memory), key)
    return _zeros(layer, *args), (of_inputs, x, kernel, memory, key)


def _forward_of_both(layer, *args):
    """Knows whether the inputs are differentiated, and whether the kernel is."""
    _, of_inputs, *of_kernel = jax.tree.map(lambda arg: arg.perturbed, args[:4], is_leaf=_is_primal)
    args = jax.tree.map(lambda arg: arg.value, args, is_leaf=_is_primal)
    of_inputs = () if of_inputs else None  # static, in the structure
    if any(jax.tree.leaves(of_kernel)):
        return _forward(layer, *args, of_inputs=of_inputs)
    return _zeros(layer, *args), (of_inputs, *args[1:])


def _is_primal(node):
    return isinstance(node, CustomVJPPrimal)


def _backward(layer, residuals, g):
    of_inputs, x, kernel, memory, key = residuals
    if isinstance(g, SymbolicZero):
        return (None,) * 5
    measures, of_inputs = isinstance(memory, Probe), of_inputs is not None
    rule = functools.partial(measured if measures else _estimated, layer, of_inputs)
    like = (x if of_inputs else None), kernel, memory
    dx, dw, memory = _automatic(rule, like)(x, jnp.asarray(g), kernel, memory, key)
    return None, dx, dw, memory, None


_kernel_term.defvjp(_forward, _backward)
_both_terms.defvjp(_forward_of_both, _backward, symbolic_zeros=True)


def _estimated(layer, of_inputs, x, g, kernel, memory, key):
    """dX, dW and the next memory."""
    return estimate(layer, of_inputs, x, g, kernel, memory, key)[:3]


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

    The result is exact, and unless `config.input_grad` says otherwise the gradient of `x`. That of
    `kernel` is the sum of k of the rows' outer products, those that `config.policy` chooses
    (weighted by an unbiased policy; of residuals, beside an exact part, with a `Subspace`); the
    "gradient" of `memory` is the next memory, to be passed in the next step. Products accumulate
    in float32 (float64 for float64). A row with a NaN or infinity is chosen before all others: it
    makes the same entries of the kernel's gradient non-finite as in the exact layer, and never
    enters the memory. If there are more of them (in a group) than are chosen, or a policy of one's
    own leaves one out, the whole gradient is NaN (beside a subspace of both sides, which shows all
    rows, the same entries as in the exact layer).

    Without a memory, the layer can be evaluated on a batch of any size, and differentiated with
    respect to `x`.

    Args:
      x: `(..., in_features)` floating. All dimensions but the last together are the rows.
      kernel: `(in_features, out_features)` floating.
      memory: the layer's memory, from `init_memory` or the last step; a `Memory` is for this number
        of rows. None where the configuration has none, and to evaluate; a `Probe` to measure.
      config: what to compute; None is an exact layer.
      key: PRNG key, needed by all named policies but "topk"; handed to any policy. With
        `config.input_grad` another one for each layer.
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
    validation.shapes(name, x, kernel)
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
    validation.config(name, config)


def _approximate(x, kernel, dimension_numbers, precision, memory, config, key, name, **options):
    """`_product`, of inputs that are checked first."""
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    validation.floating(name, x, kernel)
    own = measured_memory(memory)
    if own is not None:
        sizes = contraction_sizes(x, kernel, dimension_numbers)
        own = validation.memory(name, config, x, sizes, own)
    if isinstance(memory, Probe) and memory.draw is not None:
        key = None if key is None else jax.random.fold_in(key, memory.draw)
    elif isinstance(memory, Probe):
        own = dataclasses.replace(memory, memory=own)
    layer = Layer(config, dimension_numbers, precision, name)
    return _product(layer, x, kernel, own, key, **options)


def _automatic(rule, like):
    """The rule, with explicit axes of a mesh made automatic, and results sharded like `like`.

    Selection depends on values, so shardings cannot be read off the types of its results.
    """
    types = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(like)]
    if not any(AxisType.Explicit in sharding.mesh.axis_types for sharding in types):
        return rule
    shardings = jax.tree.unflatten(jax.tree.structure(like), types)
    return jax.sharding.auto_axes(rule, out_sharding=shardings)


def _scalar(leaf):
    """Some number that depends on an array or a PRNG key."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return leaf.sum()
