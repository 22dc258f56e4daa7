"""What a dense layer's step costs, exact and approximate: FLOPs, bytes, memory, time."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mem_aop_jax._core import validation
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.flops import exact_flops, relative_cost
from mem_aop_jax._core.memory import Memory
from mem_aop_jax._core.memory_kinds import MEMORY_KINDS, init_memory
from mem_aop_jax._cost.device_rates import ARRAYS, KERNELS, SUBSPACE, Rates, device_rates

Sizes = tuple[int, int, int]  # rows, in_features, out_features


class Cost(NamedTuple):
    """The cost of one layer's step: outputs, gradient of the inputs, gradient of the kernel.

    Attributes:
      flops: FLOPs of the approximate layer, mean over the steps.
      exact_flops: FLOPs of the exact layer.
      bytes: bytes that the approximate layer reads and writes, if nothing is read twice in a pass.
      exact_bytes: bytes that the exact layer reads and writes.
      memory: bytes of the memory, which is held from step to step.
      speedup: predicted time of the exact layer over that of the approximate layer.
    """

    flops: float
    exact_flops: float
    bytes: float
    exact_bytes: float
    memory: int
    speedup: float


def cost(
    config: MemAOP | None,
    rows: int,
    in_features: int,
    out_features: int,
    dtype: chex.ArrayDType = jnp.float32,
    *,
    rates: Rates | None = None,
) -> Cost:
    """The cost of a layer's step, and how much faster than the exact layer it will be.

    FLOPs come from formulas. The predicted time adds up the products, each bound by arithmetic or
    by its bytes, the passes over the rows, and the selection.

    Args:
      config: of the layer; None is exact.
      rows: of a batch on one device.
      in_features: of the layer.
      out_features: of the layer.
      dtype: of the inputs.
      rates: of the device; None is the default device: from a table, or measured in some 20 seconds
        the first time.

    Raises:
      TypeError: `config` is no `MemAOP`, or a size is no whole number.
      ValueError: sizes below 1, or a configuration that chooses more rows than there are.

    Example:
      >>> import mem_aop_jax as aop
      >>> fast = aop.Rates("some", 1e12, 1e12, 1e12, row=0, layer=0, subspace=0)
      >>> config = aop.MemAOP(ratio=0.125, memory=None)
      >>> found = aop.cost(config, 4096, 2048, 2048, rates=fast)
      >>> round(found.flops / found.exact_flops, 2), round(found.speedup, 2)
      (0.71, 1.41)
    """
    rows, in_features, out_features = map(operator.index, (rows, in_features, out_features))
    sizes = rows, in_features, out_features
    if config is not None:
        validation.config("cost", config)
    if min(sizes) < 1:
        raise ValueError(f"cost: got the sizes {sizes}; rows and features must be at least 1.")
    itemsize = jnp.dtype(dtype).itemsize
    exact = _products(itemsize, sizes)
    flops, exact_bytes = exact_flops(*sizes), sum(work.bytes for work in exact)
    if config is None:
        return Cost(flops, flops, exact_bytes, exact_bytes, 0, 1.0)
    rates = rates or device_rates()
    approximate = _products(itemsize, sizes, config)
    approximate += _row_passes(itemsize, sizes, config, rates.one_pass)
    memory = jax.eval_shape(lambda: init_memory(config, *sizes, dtype))
    memory_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory))
    largest_array = rows * max(in_features, out_features) * itemsize
    rates = _rates_for_sizes(rates, largest_array, flops / 3)
    selections = 1 + (config.input_rows(rows) < rows)
    seconds = _seconds(approximate, itemsize, rates)
    seconds += rates.layer + selections * rows * rates.row
    if config.memory_kind == "subspace":
        held = config.held_ranks(in_features, out_features)
        seconds += rates.subspace * sum(held) / SUBSPACE
    return Cost(
        flops=flops * relative_cost(config, *sizes),
        exact_flops=flops,
        bytes=sum(work.bytes for work in approximate),
        exact_bytes=exact_bytes,
        memory=memory_bytes,
        speedup=_seconds(exact, itemsize, rates) / seconds,
    )


# ---- the work of a step, in order


class _Work(NamedTuple):
    """A product of matrices, or a pass over arrays."""

    flops: float
    bytes: float  # that it reads and writes
    speed: str | None = None  # the field of `Rates` with its relative speed; None is 1
    traffic: str = "bytes"  # the field of `Rates` with its bytes per second


def _seconds(works: Sequence[_Work], itemsize: int, rates: Rates) -> float:
    flops = rates.half_flops if itemsize < 4 else rates.flops

    def seconds(work: _Work) -> float:
        speed = flops * (getattr(rates, work.speed) if work.speed else 1)
        traffic = getattr(rates, work.traffic) or rates.bytes
        return max(work.flops / speed, work.bytes / traffic)

    return rates.step + sum(map(seconds, works))


def _rates_for_sizes(rates: Rates, array: float, product: float) -> Rates:
    """The rates for arrays of so many bytes, and a gradient of the kernel of so many FLOPs."""

    def between(bounds: tuple[int, int], size: float, small: float | None, large: float) -> float:
        large_share = min(max(math.log(size / bounds[0], bounds[1] / bounds[0]), 0), 1)
        return (small or large) ** (1 - large_share) * large**large_share

    return rates._replace(
        bytes=between(ARRAYS, array, rates.cached, rates.bytes),
        kernel=between(KERNELS, product, rates.small_kernel, rates.kernel),
    )


def _products(itemsize: int, sizes: Sizes, config: MemAOP | None = None) -> list[_Work]:
    """The products for the outputs, the gradient of the inputs and the gradient of the kernel."""
    rows, in_features, out_features = sizes

    def product(m: int, n: int, p: int, speed: str | None = None) -> _Work:
        return _Work(2 * m * n * p, (m * n + n * p + m * p) * itemsize, speed)

    input_rows = kernel_rows = rows
    if config is not None:
        subspace = config.memory_kind == "subspace"
        rank = sum(config.ranks(in_features, out_features)) if subspace else 0
        input_rows, kernel_rows = config.input_rows(rows), config.selected_rows(rows) + rank
    return [
        product(rows, in_features, out_features),
        product(input_rows, out_features, in_features),
        product(in_features, kernel_rows, out_features, "kernel"),
    ]


def _row_passes(itemsize: int, sizes: Sizes, config: MemAOP, one_pass: bool) -> list[_Work]:
    """All other work of an approximate layer on its rows; `one_pass` as in `Rates`."""
    rows, in_features, out_features = sizes
    features, k = in_features + out_features, config.selected_rows(rows)
    row = features * itemsize  # bytes, of inputs and cotangents
    works = [_Work(0, rows * row), _Work(0, 2 * k * row)]  # norms; gathers
    if MEMORY_KINDS[config.memory_kind].state is Memory:
        stored = jnp.dtype(config.memory_dtype).itemsize if config.memory_dtype else itemsize
        kept = config.memory_slots or rows
        sums = rows * itemsize + 3 * kept * stored  # for norms, and what waits
        if one_pass and kept == rows:
            sums = (2 * kept + k) * stored  # what waits; zeros
        works.append(_Work(0, features * sums, traffic="sums"))

    def narrow(flops: float, moved: float = 0) -> None:
        """Adds a product with few columns."""
        works.append(_Work(flops, moved, "narrow"))

    if config.memory_kind == "subspace":
        ranks = config.ranks(in_features, out_features)
        held = config.held_ranks(in_features, out_features)
        for side, count in enumerate((in_features, out_features)):
            own, other, all_held = ranks[side], ranks[1 - side], held[side]
            column, all_rows = 2 * rows * count, 0 if one_pass else rows * count * itemsize
            narrow(column * all_held, all_rows * (all_held > 0))  # X V
            narrow(column * other, all_rows * (other > 0))  # X^T B
            narrow(column * all_held / config.refresh)  # X^T A
            narrow(2 * k * count * own, 4 * k * count * itemsize)  # residuals of the chosen rows
    drawn = config.input_rows(rows)
    if config.input_grad and drawn < rows:
        rank = min(config.input_grad.rank, out_features)
        works.append(_Work(0, 2 * drawn * row))
        narrow(2 * rows * rank * in_features, rows * in_features * itemsize)
        if rank:
            kernel = in_features * out_features
            narrow(2 * kernel * rank, kernel * itemsize)  # W U
            narrow(2 * drawn * out_features * rank, 4 * drawn * out_features * itemsize)
    return works
