"""FLOPs of training steps: as the compiler counts them, and by the formulas of `aop.cost`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

import mem_aop_jax as aop

ANY_RATES = aop.Rates("any", flops=1.0, half_flops=1.0, bytes=1.0)  # FLOPs do not depend on them


class Cost(NamedTuple):
    """What XLA counts in a function; 0 where it does not count."""

    flops: float
    bytes: float


def compiled_flops(function: jax.stages.Wrapped, *args) -> float:
    """FLOPs of a jitted function; as in `compiled_cost`."""
    return compiled_cost(function, *args).flops


def compiled_cost(function: jax.stages.Wrapped, *args) -> Cost:
    """FLOPs and accessed bytes that XLA counts in a jitted function.

    On a GPU the function is compiled for the CPU: a GPU's products are calls into libraries, which
    XLA counts as nothing.
    """
    device = None
    if jax.default_backend() == "gpu":
        try:
            device = jax.devices("cpu")[0]
        except RuntimeError:  # JAX_PLATFORMS leaves it out
            return Cost(0.0, 0.0)
        args = jax.tree.map(_without_device, args)
    with jax.default_device(device):
        compiled = function.lower(*args).compile()
    counted = compiled.cost_analysis() or {}
    return Cost(counted.get("flops", 0.0), counted.get("bytes accessed", 0.0))


def _without_device(leaf):
    is_array = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array else leaf


def estimate_flops(config: aop.MemAOP, rows: int, in_features: int, out_features: int) -> float:
    """FLOPs of an approximate layer's gradients, of kernel and inputs; the mean over the steps."""
    cost = aop.cost(config, rows, in_features, out_features, rates=ANY_RATES)
    return cost.flops - cost.exact_flops / 3  # without the forward pass


def skipped_refresh_flops(
    loss: Callable, rules: Sequence[tuple[str, aop.MemAOP | None]], params: Any, *args: Any
) -> float:
    """FLOPs of the refreshes that the subspaces of a loss skip, the mean over the steps.

    XLA counts the costlier side of a branch, a refresh, in every step; with `refresh=8` seven of
    eight steps skip it. `params` and `args` are the arguments of the loss, or their shapes.
    """

    def planned_flops(rules):
        approx = aop.approximate(loss, rules)
        plan = aop.plan(approx, params, *args, min_speedup=None, rates=ANY_RATES)
        return sum(planned.cost.flops for planned in plan.layers)

    always = tuple(
        (pattern, config and dataclasses.replace(config, refresh=1)) for pattern, config in rules
    )
    return planned_flops(always) - planned_flops(rules) if always != rules else 0.0
