"""Which layers of a model would gain, and how much: by their costs, before anything is trained."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx as flax_nnx

from mem_aop_jax import linen, nnx
from mem_aop_jax._analysis.subject import ExampleInput, as_args
from mem_aop_jax._approximate.approximated import Approximated, sites_of
from mem_aop_jax._core import validation
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._cost.cost import Cost, cost
from mem_aop_jax._cost.device_rates import Rates, device_rates
from mem_aop_jax._models import Layer, Rules, as_rules, config_for, rules_for
from mem_aop_jax._tables import markdown
from mem_aop_jax.linen._layers import sized_layers


class Planned(NamedTuple):
    """A layer of a `Plan`.

    Attributes:
      layer: its path, sizes and k.
      cost: of a step.
      gains: whether its predicted speedup is large enough.
    """

    layer: Layer
    cost: Cost
    gains: bool


class Plan(NamedTuple):
    """The layers that would gain, as rules; its `str` is a table.

    Attributes:
      rules: for `aop.approximate` and both `wrap`, with one rule for each layer that gains.
      layers: the layers that the given rules make approximate.
    """

    rules: Rules
    layers: list[Planned]

    def __str__(self) -> str:
        header = (
            "layer", "rows", "in", "out", "k", "FLOPs saved", "memory", "predicted speedup",
            "verdict",
        )  # fmt: skip
        return markdown(
            header,
            [
                (
                    layer.path or ".",
                    *map(str, layer[1:]),
                    f"{round(100 * (1 - step.flops / step.exact_flops))}%",
                    f"{step.memory / 1e6:.3g} MB",
                    f"{step.speedup:.2f}",
                    "approximate" if gains else "exact",
                )
                for layer, step, gains in self.layers
            ],
        )


@functools.singledispatch
def plan(
    approx: Approximated | nn.Module | flax_nnx.Module,
    params: chex.ArrayTree,
    *args: Any,
    min_speedup: float | None = 1.05,
    rates: Rates | None = None,
) -> Plan:
    """A table of a function's contractions, and rules that leave exact those that would not gain.

    `aop.cost` predicts the speedup of each. Nothing is computed or trained.

    For a model: `plan(model, config, example_input, *, min_speedup=1.05, rates=None)`, where
    `model` is a Linen or NNX model, not wrapped; `config` a configuration or rules, as in `wrap`;
    `example_input` its inputs, of the training size, a tuple for several arguments.

    Args:
      approx: what `aop.approximate` returns.
      params: the parameters, or a `jax.ShapeDtypeStruct` for each.
      *args: the function's further arguments, of the training size (on one device): each an array
        or a `jax.ShapeDtypeStruct`.
      min_speedup: a layer stays exact unless its step is predicted to be so many times faster; None
        leaves no layer exact.
      rates: of the device to train on, as in `aop.cost`.

    Raises:
      TypeError: neither a function of `aop.approximate` nor a Linen or NNX module; `config` is
        neither a configuration nor rules.
      ValueError: a rule that decides about no layer; a min_speedup that is no positive number.

    Example:
      >>> import jax, jax.numpy as jnp, mem_aop_jax as aop
      >>> def loss(params, x):
      ...     return jnp.mean((jnp.tanh(x @ params["wide"]) @ params["narrow"]) ** 2)
      >>> shapes = {"wide": (2048, 2048), "narrow": (2048, 4), "x": (4096, 2048)}
      >>> x = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
      >>> approx = aop.approximate(loss, aop.MemAOP(ratio=0.25, memory=None))
      >>> some = aop.Rates("some", 1e12, 1e12, 1e11)
      >>> plan = aop.plan(approx, x, x["x"], rates=some)
      >>> [(planned.layer.path, planned.gains) for planned in plan.layers]
      [('wide', True), ('narrow', False)]
      >>> approx = aop.approximate(loss, plan.rules)
    """
    if not isinstance(approx, Approximated):
        raise TypeError(
            f"plan: model is of type {type(approx).__name__}, neither a Linen nor an NNX module, "
            "nor what aop.approximate returns."
        )
    sites = sites_of(approx, params, *args)
    sized = [(site.layer, site.contraction.dtypes[0], site.config) for site in sites]
    return _plan(sized, min_speedup, rates)


@plan.register(flax_nnx.Module)
@plan.register(nn.Module)
def _plan_model(
    model: nn.Module | flax_nnx.Module,
    config: MemAOP | Sequence[tuple[str, MemAOP | None]],
    example_input: ExampleInput,
    *,
    min_speedup: float | None = 1.05,
    rates: Rates | None = None,
) -> Plan:
    """The same for a Linen or NNX model."""
    rules, args = as_rules("plan", config), as_args("plan", example_input)
    if isinstance(model, flax_nnx.Module):
        listed = nnx.sized_layers("plan", model, rules, args)
    else:
        found = sized_layers(linen.wrap(model, rules), jax.random.key(0), *args)
        listed = [(layer, dtype) for layer, dtype, wrapped in found if wrapped]
    sized = [(layer, dtype, config_for(rules, layer.path)) for layer, dtype in listed]
    return _plan(sized, min_speedup, rates)


def _plan(
    sized: Sequence[tuple[Layer, jnp.dtype, MemAOP | None]],
    min_speedup: float | None,
    rates: Rates | None,
) -> Plan:
    """Of layers, with the dtypes of their inputs and their configurations."""
    validation.min_speedup("plan", min_speedup)
    rates = rates or device_rates()
    planned, configs = [], {}
    for layer, dtype, config in sized:
        step = cost(config, *layer.sizes, dtype, rates=rates)
        gains = step.speedup >= (min_speedup or 0)
        planned.append(Planned(layer, step, gains))
        if gains or "#" in layer.path:  # a later use of a parameter, which may gain itself
            configs[layer.path] = config if gains else None
    return Plan(rules_for(configs) or ((r".*", None),), planned)
