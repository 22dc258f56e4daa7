"""Which layers of a model would gain, and how much: by their costs, before anything is trained."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
from flax import nnx as flax_nnx

from mem_aop_jax import linen, nnx
from mem_aop_jax._analysis.model_gradients import ExampleInput, as_args
from mem_aop_jax._core import validation
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._cost.cost import Cost, cost
from mem_aop_jax._cost.device_rates import Rates, device_rates
from mem_aop_jax._models import Layer, Rules, as_rules, config_for
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
      rules: for `aop.linen.wrap` and `aop.nnx.wrap`, with one rule for each layer that gains.
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


def plan(
    model: nn.Module | flax_nnx.Module,
    config: MemAOP | Sequence[tuple[str, MemAOP | None]],
    example_input: ExampleInput,
    *,
    min_speedup: float | None = 1.05,
    rates: Rates | None = None,
) -> Plan:
    """A table of a model's layers, and rules that leave exact those that would not gain.

    `aop.cost` predicts each layer's speedup. Nothing is trained.

    Args:
      model: a Linen or NNX model, not wrapped.
      config: a configuration or rules, as in `wrap`.
      example_input: the model's inputs, of the training size (on one device): arrays or
        `jax.ShapeDtypeStruct`s; a tuple for several arguments.
      min_speedup: a layer stays exact unless its step is predicted to be so many times faster; None
        leaves no layer exact.
      rates: of the device to train on, as in `aop.cost`.

    Raises:
      TypeError: `model` is no Linen or NNX module; `config` is neither a configuration nor rules.
      ValueError: a rule that decides about no layer; a min_speedup that is no positive number.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp, mem_aop_jax as aop
      >>> model = nn.Sequential([nn.Dense(2048), nn.relu, nn.Dense(4)])
      >>> some = aop.Rates("some", 1e12, 1e12, 1e11)
      >>> config = aop.MemAOP(ratio=0.25, memory=None)
      >>> plan = aop.plan(model, config, jnp.ones((4096, 2048)), rates=some)
      >>> [(planned.layer.path, planned.gains) for planned in plan.layers]
      [('layers_0', True), ('layers_2', False)]
      >>> model = aop.linen.wrap(model, plan.rules)
    """
    rules = as_rules("plan", config)
    validation.min_speedup("plan", min_speedup)
    rates = rates or device_rates()
    args = as_args(example_input)
    if isinstance(model, flax_nnx.Module):
        sized = nnx.sized_layers("plan", model, rules, args)
    elif isinstance(model, nn.Module):
        listed = sized_layers(linen.wrap(model, rules), jax.random.key(0), *args)
        sized = [(layer, dtype) for layer, dtype, wrapped in listed if wrapped]
    else:
        raise TypeError(
            f"plan: model is of type {type(model).__name__}, neither a Linen nor an NNX module."
        )
    planned = []
    for layer, dtype in sized:
        step = cost(config_for(rules, layer.path), *layer.sizes, dtype, rates=rates)
        planned.append(Planned(layer, step, step.speedup >= (min_speedup or 0)))
    gaining = dict.fromkeys(layer.path for layer, _, gains in planned if gains)
    gaining_rules = tuple((re.escape(path), config_for(rules, path)) for path in gaining)
    return Plan(gaining_rules or ((r".*", None),), planned)
