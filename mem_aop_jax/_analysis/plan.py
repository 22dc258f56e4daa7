"""Which layers of a model would gain, and how much: by their costs, before anything is trained."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
from flax import nnx as flax_nnx

from mem_aop_jax import linen, nnx
from mem_aop_jax._analysis.model_gradients import arguments
from mem_aop_jax._analysis.tables import markdown
from mem_aop_jax._core import validation
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._cost.cost import Cost, cost
from mem_aop_jax._cost.device_rates import Rates, device_rates
from mem_aop_jax._models import Layer, Rules, as_rules, config_for
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
    """What `plan` returns; `str` of it is a table.

    Attributes:
      rules: for `aop.linen.wrap` and `aop.nnx.wrap`: one for each layer that gains.
      layers: those that the given rules make approximate.
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
                    f"{round(100 * (1 - found.flops / found.exact_flops))}%",
                    f"{found.memory / 1e6:.3g} MB",
                    f"{found.speedup:.2f}",
                    "approximate" if gains else "exact",
                )
                for layer, found, gains in self.layers
            ],
        )


def plan(
    model: nn.Module | flax_nnx.Module,
    config: MemAOP | Sequence[tuple[str, MemAOP | None]],
    example_input: chex.ArrayTree,
    *,
    min_speedup: float = 1.05,
    rates: Rates | None = None,
) -> Plan:
    """A table of a model's layers, and rules that leave exact those that would not gain.

    Predictions are those of `aop.cost`. Nothing is trained.

    Args:
      model: a Linen or NNX model, not wrapped.
      config: what `wrap` takes: a configuration, or rules.
      example_input: what the model takes, of the training size (on one device), arrays or
        `jax.ShapeDtypeStruct`s; a tuple for several arguments.
      min_speedup: a layer stays exact unless its step is predicted to be so many times faster; None
        leaves none exact.
      rates: of the device to train on, as in `aop.cost`.

    Raises:
      TypeError: no model, or what `wrap` does not take.
      ValueError: from `wrap`, a rule that decides about no layer; a min_speedup that is no positive
        number.

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
    args = arguments(example_input)
    if isinstance(model, flax_nnx.Module):
        sized = nnx.sized_layers("plan", model, rules, args)
    elif isinstance(model, nn.Module):
        found = sized_layers(linen.wrap(model, rules), jax.random.key(0), *args)
        sized = [(layer, dtype) for layer, dtype, wrapped in found if wrapped]
    else:
        raise TypeError(
            f"plan: model is of type {type(model).__name__}, neither a Linen nor an NNX module."
        )
    planned = []
    for layer, dtype in sized:
        found = cost(config_for(rules, layer.path), *layer[1:4], dtype, rates=rates)
        planned.append(Planned(layer, found, found.speedup >= (min_speedup or 0)))
    gaining = dict.fromkeys(layer.path for layer, _, gains in planned if gains)
    of_path = tuple((re.escape(path), config_for(rules, path)) for path in gaining)
    return Plan(of_path or ((r".*", None),), planned)
