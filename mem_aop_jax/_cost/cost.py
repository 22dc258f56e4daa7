"""What a dense layer's step costs, exact and approximate: FLOPs, bytes, memory, time."""

import math
import operator
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mem_aop_jax._core import validation
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.flops import exact_flops, relative_cost
from mem_aop_jax._core.memory import init_memory
from mem_aop_jax._cost.device_rates import ARRAYS, KERNELS, SUBSPACE, Rates, device_rates


class Cost(NamedTuple):
    """Of one layer's step: outputs, gradient of the inputs, gradient of the kernel.

    Attributes:
      flops: of the approximate layer, mean over the steps.
      exact_flops: of the exact one.
      bytes: that the approximate one reads and writes if every pass over an array is one.
      exact_bytes: the same of the exact one.
      memory: bytes that are held from step to step.
      speedup: predicted, the exact layer's time over the approximate one's.
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
    """What a layer's step costs, and how much faster than the exact one it will be.

    FLOPs are the formula's; the time is the sum of that of the products, each bound by arithmetic
    or by its bytes, of the passes over the rows, and of the selection.

    Args:
      config: of the layer; None is exact.
      rows: of a batch on one device.
      in_features: of the layer.
      out_features: of the layer.
      dtype: of the inputs.
      rates: of the device; None is the default device: from a table, or measured in a few seconds
        the first time.

    Raises:
      TypeError: no configuration, or sizes that are no whole numbers.
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
    size = jnp.dtype(dtype).itemsize
    exact = _products(size, *sizes)
    flops, exact_bytes = exact_flops(*sizes), sum(part.bytes for part in exact)
    if config is None:
        return Cost(flops, flops, exact_bytes, exact_bytes, 0, 1.0)
    rates = rates or device_rates()
    passes = _passes(size, *sizes, config, rates.one_pass)
    parts = [*_products(size, *sizes, config), *passes]
    memory = jax.eval_shape(lambda: init_memory(config, *sizes, dtype))
    memory_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory))
    rates = _of_sizes(rates, rows * max(in_features, out_features) * size, flops / 3)
    selections = 1 + (config.input_rows(rows) < rows)
    seconds = _seconds(parts, size, rates) + rates.layer + selections * rows * rates.row
    if config.memory_kind == "subspace":
        held = config.held_ranks(in_features, out_features)
        seconds += rates.subspace * sum(held) / SUBSPACE
    return Cost(
        flops=flops * relative_cost(config, *sizes),
        exact_flops=flops,
        bytes=sum(part.bytes for part in parts),
        exact_bytes=exact_bytes,
        memory=memory_bytes,
        speedup=_seconds(exact, size, rates) / seconds,
    )


# ---- what a step does in turn


class _Part(NamedTuple):
    """FLOPs and bytes; the speeds of these are fields of the rates, of products a relative one."""

    flops: float
    bytes: float
    speed: str | None = None
    moved_at: str = "bytes"


def _of_sizes(rates, array, product):
    """The rates for arrays of so many bytes, and a gradient of the kernel of so many FLOPs."""

    def between(sizes, size, small, large):
        large_share = min(max(math.log(size / sizes[0], sizes[1] / sizes[0]), 0), 1)
        return (small or large) ** (1 - large_share) * large**large_share

    return rates._replace(
        bytes=between(ARRAYS, array, rates.cached, rates.bytes),
        kernel=between(KERNELS, product, rates.small_kernel, rates.kernel),
    )


def _seconds(parts, size, rates):
    flops = rates.half_flops if size < 4 else rates.flops

    def of_part(part):
        speed = flops * (getattr(rates, part.speed) if part.speed else 1)
        moved_at = getattr(rates, part.moved_at) or rates.bytes
        return max(part.flops / speed, part.bytes / moved_at)

    return rates.step + sum(map(of_part, parts))


def _products(size, rows, in_features, out_features, config=None):
    """Of the outputs, of the gradient of the inputs and of that of the kernel."""

    def product(m, n, p, speed=None):
        return _Part(2 * m * n * p, (m * n + n * p + m * p) * size, speed)

    drawn = rows if config is None else config.input_rows(rows)
    summed = rows
    if config is not None:
        rank = config.ranks(in_features, out_features) if config.memory_kind == "subspace" else ()
        summed = config.selected_rows(rows) + sum(rank)
    return [
        product(rows, in_features, out_features),
        product(drawn, out_features, in_features),
        product(in_features, summed, out_features, "kernel"),
    ]


def _passes(size, rows, in_features, out_features, config, one_pass):
    """Of all else that an approximate layer does; `one_pass` as in `Rates`."""
    features, k = in_features + out_features, config.selected_rows(rows)
    passes = [_Part(0, rows * features * size), _Part(0, 2 * k * features * size)]  # norms; gathers
    if config.memory_kind == "rows":
        held = jnp.dtype(config.memory_dtype).itemsize if config.memory_dtype else size
        kept = config.memory_slots or rows
        sums = rows * size + 3 * kept * held  # for norms, and what waits
        if one_pass and kept == rows:
            sums = (2 * kept + k) * held  # what waits; zeros
        passes.append(_Part(0, features * sums, moved_at="sums"))

    def narrow(flops, moved=0):
        passes.append(_Part(flops, moved, "narrow"))

    if config.memory_kind == "subspace":
        ranks = config.ranks(in_features, out_features)
        held = config.held_ranks(in_features, out_features)
        for side, count in enumerate((in_features, out_features)):
            own, other, all_of = ranks[side], ranks[1 - side], held[side]
            column, all_rows = 2 * rows * count, 0 if one_pass else rows * count * size
            narrow(column * all_of, all_rows * (all_of > 0))  # X V
            narrow(column * other, all_rows * (other > 0))  # X^T B
            narrow(column * all_of / config.refresh)  # X^T A
            narrow(2 * k * count * own, 4 * k * count * size)  # the rest of the chosen rows
    drawn = config.input_rows(rows)
    if drawn < rows:
        rank = min(config.input_grad.rank, out_features)
        passes.append(_Part(0, 2 * drawn * features * size))
        narrow(2 * rows * rank * in_features, rows * in_features * size)
        if rank:
            narrow(2 * in_features * rank * out_features, in_features * out_features * size)  # W U
            narrow(2 * drawn * out_features * rank, 4 * drawn * out_features * size)
    return passes
