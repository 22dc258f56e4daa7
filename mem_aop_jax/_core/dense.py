"""What users call: a layer that is checked, then computed by the primitive."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._core import validation
from mem_aop_jax._core.candidates import Call
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.input_gradient import approximates_inputs
from mem_aop_jax._core.layout import as_static, contraction_sizes, warn_once, why_exact
from mem_aop_jax._core.measure import measured
from mem_aop_jax._core.memory import LayerMemory
from mem_aop_jax._core.memory_kinds import check_memory
from mem_aop_jax._core.primitive import estimated, product
from mem_aop_jax._core.probe import Probe, without_probe


def dense(
    x: chex.Array,
    kernel: chex.Array,
    memory: LayerMemory | None = None,
    *,
    config: MemAOP | None = None,
    key: chex.PRNGKey | None = None,
    precision: lax.PrecisionLike = None,
    name: str = "dense",
) -> chex.Array:
    """`x @ kernel`, with the weight gradient of Mem-AOP-GD (arXiv 2110.09164).

    The result is exact, and so is the gradient of `x` unless `config.input_grad` is set. The
    gradient of `kernel` is the sum of k of the rows' outer products, which `config.policy` chooses
    (and weighs, if it is unbiased; with a `Subspace` they are outer products of residuals, beside
    an exact part). The "gradient" of `memory` is the next memory, to be passed in the next step.
    Products accumulate
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
    memory: LayerMemory | None = None,
    config: MemAOP | None = None,
    key: chex.PRNGKey | None = None,
    name: str = "dot_general",
    **options,
) -> chex.Array:
    """`jax.lax.dot_general` of inputs with a kernel, with the kernel's gradient as in `dense`.

    Any contraction without batch dimensions is a dense layer: the free dimensions of `lhs` together
    are the rows, the contracted ones the in_features, the free dimensions of `rhs` the
    out_features, each in the order in which they stand in the array (in_features: in the order of
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
    """The product of inputs that are checked first."""
    if config.needs_key:  # a policy of the caller's own may be given anything
        validation.key(name, key)
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    validation.floating(name, x, kernel)
    sizes = contraction_sizes(x, kernel, dimension_numbers)
    if 0 in sizes[1:]:  # no features: there is nothing to approximate, and the memory stays
        return lax.dot_general(x, kernel, dimension_numbers, precision=precision, **options)
    own_memory = without_probe(memory)
    if own_memory is not None:
        own_memory = check_memory(name, config, x, sizes, own_memory)
    call = Call(config, sizes, dimension_numbers, precision, name)
    if isinstance(memory, Probe) and memory.draw is None:
        probe = dataclasses.replace(memory, memory=own_memory)
        return product(call, measured, True, True, x, kernel, probe, key, **options)
    if isinstance(memory, Probe) and key is not None:
        key = jax.random.fold_in(key, memory.draw)
    approximate = approximates_inputs(config, sizes[0], own_memory, key)
    exact = not approximate
    return product(call, estimated, approximate, exact, x, kernel, own_memory, key, **options)
