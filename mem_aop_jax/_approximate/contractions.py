"""Contractions of rows with a kernel, as the equations of a jaxpr write them."""

import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

Shape = tuple[int, ...]


class Contraction(NamedTuple):
    """A contraction, as `lax.dot_general` of rows on the left and a kernel on the right.

    Attributes:
      sizes: (rows, in_features, out_features), for one index of the batch dimensions.
      dtypes: of the rows and of the kernel.
      flops: of the product, for all indices of the batch dimensions.
      why_not: why it is no product of rows with a kernel; None where it is, and has what follows.
      batch: the batch dimensions' sizes: each index has rows and a kernel of its own (experts).
      dimension_numbers: of the product of what `arrange` returns, without its batch dimensions.
      options: of `lax.dot_general`.
      arrange: the rows and the kernel, batch dimensions first, from the equation's inputs.
      restore: the equation's result, from the product's: batch dimensions, rows, out_features.
    """

    sizes: tuple[int, int, int]
    dtypes: tuple[jnp.dtype, jnp.dtype]
    flops: float
    why_not: str | None = None
    batch: Shape = ()
    dimension_numbers: lax.DotDimensionNumbers = (((), ()), ((), ()))
    options: Mapping[str, Any] = types.MappingProxyType({})
    arrange: Callable[[chex.Array, chex.Array], tuple[chex.Array, chex.Array]] | None = None
    restore: Callable[[chex.Array], chex.Array] | None = None


def _dot_general(equation: jex.JaxprEqn, kernel: int) -> Contraction:
    """`kernel` is the number of the input that is the kernel, as in all of `CONTRACTIONS`."""
    order = (1 - kernel, kernel)  # of the rows and of the kernel among the inputs
    contracting, batch = (
        tuple(tuple(dims[i]) for i in order) for dims in equation.params["dimension_numbers"]
    )
    operands: list[Any] = [equation.invars[i].aval for i in order]
    shapes, numbers = [], []  # without the batch dimensions
    for operand, contracted, batched in zip(operands, contracting, batch, strict=True):
        kept = [d for d in range(operand.ndim) if d not in batched]
        shapes.append([operand.shape[d] for d in kept])
        numbers.append(tuple(kept.index(d) for d in contracted))
    batch_shape = tuple(operands[0].shape[d] for d in batch[0])
    sizes = (
        _size(shapes[0], exclude=numbers[0]),
        math.prod(shapes[0][d] for d in numbers[0]),
        _size(shapes[1], exclude=numbers[1]),
    )
    rows_ndim, out_ndim = (len(s) - len(n) for s, n in zip(shapes, numbers, strict=True))

    def arrange(lhs, rhs):
        return tuple(
            jnp.moveaxis((lhs, rhs)[i], dims, range(len(dims)))
            for i, dims in zip(order, batch, strict=True)
        )

    def restore(y):
        first = len(batch_shape)
        outs = range(first + rows_ndim, first + rows_ndim + out_ndim)
        return jnp.moveaxis(y, outs, range(first, first + out_ndim)) if kernel == 0 else y

    options = _options(equation, "out_sharding")
    why_not = None if contracting[0] else "an outer product"
    if "out_sharding" in options and (batch_shape or kernel == 0):
        why_not = "its result has a sharding, and batch dimensions or the kernel on the left"
    return Contraction(
        sizes,
        (operands[0].dtype, operands[1].dtype),
        2.0 * math.prod((*batch_shape, *sizes)),
        why_not,
        batch_shape,
        ((numbers[0], numbers[1]), ((), ())),
        options,
        arrange,
        restore,
    )


def _convolution(equation: jex.JaxprEqn, kernel: int) -> Contraction:
    """A product where no input is in two windows (the embedding of patches, windows of size 1)."""
    params = equation.params
    avals: list[Any] = [v.aval for v in (*equation.invars, *equation.outvars)]
    x, w, y = avals
    lhs, rhs, out = params["dimension_numbers"]
    windows, places = ([a.shape[d] for d in dims[2:]] for a, dims in ((w, rhs), (y, out)))
    strides = [
        window if place == 1 else stride  # of a single window there is no next one
        for window, place, stride in zip(windows, places, params["window_strides"], strict=True)
    ]
    features, out_features = w.shape[rhs[1]], w.shape[rhs[0]]
    sizes = y.shape[out[0]] * math.prod(places), features * math.prod(windows), out_features
    is_product = (
        kernel == 1
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and {*params["lhs_dilation"], *params["rhs_dilation"]} <= {1}
        and all(stride >= window for stride, window in zip(strides, windows, strict=True))
    )
    spatial = range(len(windows))

    def arrange(lhs_array, rhs_array):
        """Patches `(batch, place, window, place, window, ..., features)`."""
        patches = jnp.transpose(lhs_array, (lhs[0], *lhs[2:], lhs[1]))
        whole = [
            (low, place * stride - size - low, 0)
            for (low, _), place, stride, size in zip(
                params["padding"], places, strides, patches.shape[1:-1], strict=True
            )
        ]
        zero = jnp.zeros((), patches.dtype)
        patches = lax.pad(patches, zero, [(0, 0, 0), *whole, (0, 0, 0)])
        split = [size for pair in zip(places, strides, strict=True) for size in pair]
        patches = patches.reshape(patches.shape[0], *split, features)
        for d in spatial:
            patches = lax.slice_in_dim(patches, 0, windows[d], axis=2 + 2 * d)
        return patches, rhs_array

    def restore(y):
        natural = (out[0], *out[2:], out[1])  # where each dimension of y belongs
        return jnp.transpose(y, [natural.index(d) for d in range(y.ndim)])

    contracting = (*(2 + 2 * d for d in spatial), 1 + 2 * len(spatial)), (*rhs[2:], rhs[1])
    return Contraction(
        sizes,
        (x.dtype, w.dtype),
        2.0 * math.prod(sizes),
        None if is_product else "a convolution whose windows overlap",
        (),
        (contracting, ((), ())),
        _options(equation),
        arrange,
        restore,
    )


def _ragged_dot(equation: jex.JaxprEqn, kernel: int) -> Contraction:
    """`lax.ragged_dot`: groups of rows whose sizes nobody knows before they are counted."""
    avals: list[Any] = [v.aval for v in (*equation.invars[:2], *equation.outvars)]
    rows, w, y = avals
    sizes = math.prod(rows.shape[:-1]), rows.shape[-1], y.shape[-1]
    dtypes = rows.dtype, w.dtype
    why_not = "groups of rows of unknown sizes"
    return Contraction(sizes, dtypes, 2.0 * math.prod(sizes), why_not)


CONTRACTIONS: dict[str, Callable[[jex.JaxprEqn, int], Contraction]] = {  # by primitives' names
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "ragged_dot_general": _ragged_dot,
    "ragged_dot": _ragged_dot,
}


def _size(shape, exclude):
    """The product of all dimensions but some."""
    return math.prod(size for d, size in enumerate(shape) if d not in exclude)


def _options(equation, *others):
    """The parameters of an equation that are `lax.dot_general`'s, where they are set."""
    names = ("precision", "preferred_element_type", *others)
    return {name: equation.params[name] for name in names if equation.params.get(name) is not None}
