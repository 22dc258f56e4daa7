"""Contractions as dense layers: what their rows and features are, and when they are none."""

import functools
import math
import warnings

import chex
import jax.numpy as jnp
from jax import lax

from mem_aop_jax._core.memory import LayerMemory, Memory
from mem_aop_jax._core.probe import Probe, without_probe


def as_static(dimension_numbers: lax.DotDimensionNumbers) -> lax.DotDimensionNumbers:
    """The dimension numbers as tuples of ints, which are hashable."""
    contracting, batch = ((tuple(map(int, a)), tuple(map(int, b))) for a, b in dimension_numbers)
    return contracting, batch


def contraction_sizes(
    lhs: chex.Array, rhs: chex.Array, dimension_numbers: lax.DotDimensionNumbers
) -> tuple[int, int, int]:
    """(rows, in_features, out_features) of a contraction without batch dimensions."""
    (lhs_contracting, rhs_contracting), _ = dimension_numbers
    lhs, rhs = jnp.shape(lhs), jnp.shape(rhs)
    rows = math.prod(size for d, size in enumerate(lhs) if d not in lhs_contracting)
    in_features = math.prod(lhs[d] for d in lhs_contracting)
    out_features = math.prod(size for d, size in enumerate(rhs) if d not in rhs_contracting)
    return rows, in_features, out_features


def why_exact(
    lhs: chex.Array,
    rhs: chex.Array,
    dimension_numbers: lax.DotDimensionNumbers,
    memory: LayerMemory | Probe | None = None,
    kernel_shape: tuple[int, ...] | None = None,
    slots: bool = False,
) -> str | None:
    """Why a contraction is no dense layer, or None if it is one.

    A memory, or the shape of the kernel, tells which operand is the kernel. With `slots` the
    number of the memory's rows says nothing about the batch.
    """
    _, (lhs_batch, _) = dimension_numbers
    if len(lhs_batch):
        return "it has batch dimensions, and Mem-AOP needs one kernel for all rows."
    memory = without_probe(memory)
    if isinstance(memory, LayerMemory):
        rows, in_features, out_features = contraction_sizes(lhs, rhs, dimension_numbers)
        inputs, cotangents = (() if a is None else jnp.shape(a) for a in memory[:2])
        if isinstance(memory, Memory):
            held = (*inputs[-1:], *cotangents[-1:])
            fits = slots or inputs[:1] == (out_features,)  # the rows of that layer's batch
        else:  # without directions of the cotangents it cannot tell
            held, fits = (*inputs[:1], *cotangents[:1]), True
        on_the_left = fits and held == (in_features, rows) and rows != out_features
    else:
        on_the_left = jnp.shape(rhs) != kernel_shape == jnp.shape(lhs)
    if on_the_left:
        return "its kernel is the left operand; swap the operands and transpose the result."
    return None


def first_free_size(dimension_numbers: lax.DotDimensionNumbers, x: chex.Array) -> int:
    """The size of the first of the dimensions of x that together are the rows; 1 without any."""
    (contracting, _), _ = dimension_numbers
    return next((size for d, size in enumerate(x.shape) if d not in contracting), 1)


def as_rows(
    dimension_numbers: lax.DotDimensionNumbers, groups: int, x: chex.Array, g: chex.Array
) -> tuple[chex.Array, chex.Array]:
    """x and g as `(groups, rows of a group, in_features)` and `(..., out_features)`."""
    (contracting, _), _ = dimension_numbers
    free = _others(x.ndim, contracting)
    in_features = math.prod(x.shape[d] for d in contracting)
    rows = math.prod(x.shape[d] for d in free)
    out_shape = g.shape[len(free) :]
    x = x.transpose(*free, *contracting).reshape(groups, rows // groups, in_features)
    return x, g.reshape(groups, rows // groups, math.prod(out_shape))


def as_kernel(
    dimension_numbers: lax.DotDimensionNumbers, dw: chex.Array, shape: tuple[int, ...]
) -> chex.Array:
    """dw `(in_features, out_features)` in the shape of the kernel."""
    (_, contracting), _ = dimension_numbers
    return _in_shape(dw, shape, [*contracting, *_others(len(shape), contracting)])


def as_matrix(dimension_numbers: lax.DotDimensionNumbers, kernel: chex.Array) -> chex.Array:
    """The kernel as `(in_features, out_features)`; the inverse of `as_kernel`."""
    (_, contracting), _ = dimension_numbers
    free = _others(kernel.ndim, contracting)
    in_features = math.prod(kernel.shape[d] for d in contracting)
    return kernel.transpose(*contracting, *free).reshape(in_features, -1)


def as_inputs(
    dimension_numbers: lax.DotDimensionNumbers, dx: chex.Array, shape: tuple[int, ...]
) -> chex.Array:
    """dx `(groups, rows of a group, in_features)` in the shape of the inputs."""
    (contracting, _), _ = dimension_numbers
    return _in_shape(dx, shape, [*_others(len(shape), contracting), *contracting])


def _others(ndim, dims):
    return [d for d in range(ndim) if d not in dims]


def _in_shape(a, shape, order):
    """An array whose dimensions come in that order, some of them merged, in the shape."""
    a = a.reshape([shape[d] for d in order])
    return a.transpose(sorted(range(len(shape)), key=order.__getitem__))


@functools.cache
def warn_once(message: str) -> None:
    """A warning where the user's call is; the same message never again."""
    warnings.warn(message, stacklevel=4)
