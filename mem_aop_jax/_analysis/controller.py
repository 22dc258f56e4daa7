"""Chooses between exact training and a few configurations, again and again as a model trains."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mem_aop_jax import linen
from mem_aop_jax._analysis import model_gradients
from mem_aop_jax._analysis.model_gradients import ExampleInput
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.flops import flops_left_out
from mem_aop_jax._core.memory import Memory, Subspace
from mem_aop_jax._core.probe import is_memory
from mem_aop_jax._models import as_rules, config_for
from mem_aop_jax._tables import markdown

EXACT = "exact"


class Decision(NamedTuple):
    """The measurements of `Controller.decide` and its choice, as floats, strings and dicts: JSON.

    Attributes:
      step: the step of training.
      choice: the name of the choice to train with from now on.
      noise: share of the square of a batch's gradient that is noise of the batch, in [0, 1].
      v: for each name, variance of the gradient of all parameters around the batch's exact
        gradient, relative to the square of the exact one; the squared error of a biased estimate.
      c: for each name, the cost of a step, relative to that of an exact step.
      spent: FLOPs of the measurement, as the compiler counts them.
    """

    step: int
    choice: str
    noise: float
    v: dict[str, float]
    c: dict[str, float]
    spent: float

    def score(self, name: str) -> float:
        """(1 + noise v) c: the cost of a step, times how many more steps it takes.

        It lies between the regimes of `Diagnostics`: (1 + v) c where the batch's gradient is all
        noise, c where the batch is so large that there is none.
        """
        return (1 + self.noise * self.v[name]) * self.c[name]


class Controller:
    """Moves between a few configurations of a model, exact training among them, as it trains.

    A training step that takes `controller.model` as a static argument compiles each choice once. A
    decision takes one exact backward pass, in which the directions of all layers turn towards the
    rows of the first batch, and for each other batch the exact gradient and an approximate one of
    every choice: some six steps for three choices and two batches. Leave hundreds of steps between
    decisions.

    Args:
      model: a Linen model, not wrapped. As a static argument it must be hashable: tuples in its
        fields, no lists.
      choices: by name, a configuration or rules as in `aop.linen.wrap`, for instance the rules of
        `aop.allocate`. "exact" is always among them, and comes first.
      example_input: as in `aop.allocate`.
      loss: as in `aop.allocate`: `loss(model, variables, batch, key)`, for the model that it gets.
      costs: for each name the cost of a step, in any unit, for instance measured times; None counts
        the FLOPs of the loss's gradient as the compiler does, without the refreshes that most steps
        leave out.
      margin: training is exact unless a choice saves so much, (1 + noise v) c < 1 - margin: a
        measurement on a few batches is uncertain, and costs FLOPs itself. Between choices the
        margin does not count.
      log: the earlier decisions, to resume a run: `controller.log`, or its dicts from JSON.

    Attributes:
      log: list of `Decision`; `str` of the controller is a table of them.

    Raises:
      TypeError: a choice that is neither a configuration nor rules.
      ValueError: a choice with a memory of rows, which belong to one batch and one choice; costs or
        a log with other names than the choices; a margin outside of [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, mem_aop_jax as aop
      >>> model, x = nn.Dense(4), jax.random.normal(jax.random.key(0), (2, 64, 32))
      >>> params = model.init(jax.random.key(1), x[0])["params"]
      >>> def loss(model, variables, batch, key):
      ...     return jnp.mean(model.apply(variables, batch, rngs={aop.linen.RNG: key}) ** 2)
      >>> config = aop.MemAOP(ratio=0.25, policy="priority", memory="subspace", rank=4)
      >>> controller = aop.Controller(model, {"a quarter": config}, x[0], loss)
      >>> memory = controller.decide(0, params, {}, x, jax.random.key(2))
      >>> sorted(controller.log[-1].v)
      ['a quarter', 'exact']
    """

    def __init__(
        self,
        model: nn.Module,
        choices: Mapping[str, MemAOP | Sequence[tuple[str, MemAOP | None]]],
        example_input: ExampleInput,
        loss: Callable,
        *,
        costs: Mapping[str, float] | None = None,
        margin: float = 0.03,
        log: Sequence[Decision | Mapping[str, Any]] = (),
    ):
        if EXACT in choices:
            raise ValueError(
                f"Controller: {EXACT!r} is the model without approximation, which is always among "
                "the choices; give another name."
            )
        if not 0 <= margin < 1:
            raise ValueError(f"Controller: got margin={margin}; it must lie in [0, 1).")
        rules = {name: as_rules("Controller", choice) for name, choice in choices.items()}
        self._models = {EXACT: model} | {
            name: linen.wrap(model, choice_rules) for name, choice_rules in rules.items()
        }
        self._costs, self._margin = costs and dict(costs), margin
        if costs and set(costs) != set(self._models):
            raise self._wrong_names("costs", costs)
        self.log = [entry if isinstance(entry, Decision) else Decision(**entry) for entry in log]
        for entry in self.log:
            if entry.choice not in self._models:
                raise self._wrong_names("the log", [entry.choice])

        args = model_gradients.as_args(example_input)
        self._shapes: dict[str, dict] = {EXACT: {}}
        self._flops_left_out = {EXACT: 0.0}
        self._rows: dict[str, int] = {}
        ranks: dict[str, tuple[int, int]] = {}  # the largest of all choices
        for name, choice_rules in rules.items():
            self._shapes[name] = model_gradients.memory_shapes(self._models[name], *args)
            _check_memories(name, self._shapes[name])
            layers = linen.layers(self._models[name], jax.random.key(0), *args)
            self._flops_left_out[name] = 0.0
            for path, rows, *features, _ in layers:
                config = config_for(choice_rules, path)
                if config is not None and config.memory_kind == "subspace":
                    self._rows[path] = rows
                    self._flops_left_out[name] += flops_left_out(config, rows, *features)
                    held, largest = config.held_ranks(*features), ranks.get(path, (1, 1))
                    ranks[path] = max(held[0], largest[0]), max(held[1], largest[1])
        widest = {path: _subspace_config(rank) for path, rank in ranks.items()}
        self._following = model_gradients.wrap_layers(model, widest) if widest else model
        self._first_memory = model_gradients.first_memory(self._following, *args)
        self._backward = model_gradients.backward_function(loss)

    @property
    def choice(self) -> str:
        """The name of the choice to train with now."""
        return self.log[-1].choice if self.log else EXACT

    @property
    def model(self) -> nn.Module:
        """The model, wrapped as chosen."""
        return self._models[self.choice]

    def decide(
        self,
        step: int,
        params: chex.ArrayTree,
        memory: chex.ArrayTree,
        batches: Sequence[chex.ArrayTree],
        key: chex.PRNGKey,
        *,
        metric: chex.ArrayTree | None = None,
    ) -> chex.ArrayTree:
        """Measures all choices, and moves to the one of the least (1 + noise v) c, or to "exact".

        Call it outside of `jit`, `pmap` and `shard_map`; params and batches may be sharded.

        Args:
          step: for the log.
          params: the parameters.
          memory: the collection `aop.linen.COLLECTION` of the model so far; empty for exact.
          batches: two or more, of the size of the example input.
          key: for the draws.
          metric: as in `aop.allocate`, for v and the noise.

        Returns:
          The memory for `controller.model`. Its directions start from those of `memory`, where it
          has some, and follow the first batch.

        Raises:
          ValueError: fewer than two batches; a gradient that is zero or not finite; no costs where
            the compiler counts none.
        """
        model_gradients.check_batches("Controller", batches)
        first, *others = batches
        start = model_gradients.map_memory_pairs(_continue_directions, self._first_memory, memory)
        probes = model_gradients.norms_probes(start, self._rows)
        first_key = jax.random.fold_in(key, 0)
        following = self._backward(self._following, params, probes, first, first_key)
        directions = model_gradients.next_memory(following.memory)
        memories = {
            name: model_gradients.truncate_directions(shapes, directions)
            for name, shapes in self._shapes.items()
        }
        exact, spent = following.gradient, following.flops
        norms, differences = [model_gradients.finite_norm("Controller", 0, exact, metric)], []
        errors, flops = dict.fromkeys(self._models, 0.0), {}
        for i, batch in enumerate(others, 1):
            batch_key = jax.random.fold_in(key, i)
            for name, model in self._models.items():
                result = self._backward(model, params, memories[name], batch, batch_key)
                if name == EXACT:  # which comes first
                    differences.append(model_gradients.squared_norm(result.gradient, exact, metric))
                    exact = result.gradient
                    norms.append(model_gradients.finite_norm("Controller", i, exact, metric))
                else:
                    errors[name] += model_gradients.squared_norm(result.gradient, exact, metric)
                flops[name] = result.flops
            spent += sum(flops.values())

        squares = np.square(norms)
        noise = min(1.0, float(np.mean(differences) / 2 / np.mean(squares)))
        v = {name: error / float(np.sum(squares[1:])) for name, error in errors.items()}
        decision = Decision(step, EXACT, noise, v, self._relative_costs(flops), spent)
        scores = {name: decision.score(name) for name in self._models}
        best = min(scores, key=lambda name: (np.isnan(scores[name]), scores[name]))
        if scores[best] < 1 - self._margin:
            decision = decision._replace(choice=best)
        self.log.append(decision)
        return memories[self.choice]

    def _wrong_names(self, argument: str, given: Iterable[str]) -> ValueError:
        return ValueError(
            f"Controller: {argument} must name the choices {', '.join(map(repr, self._models))}; "
            f"got {', '.join(map(repr, given))}."
        )

    def _relative_costs(self, flops: Mapping[str, float]) -> dict[str, float]:
        if not self._costs and min(flops.values()) <= 0:
            raise ValueError(
                "Controller: the compiler counts no FLOPs here; give costs=, for instance times of "
                "a step."
            )
        costs = self._costs or {name: flops[name] - self._flops_left_out[name] for name in flops}
        return {name: costs[name] / costs[EXACT] for name in self._models}

    def __str__(self) -> str:
        names = list(self._models)
        header = ("step", "choice", "noise", *(f"{name}: v, c, (1 + noise v) c" for name in names))
        return markdown(
            header,
            [
                (
                    str(decision.step),
                    decision.choice,
                    f"{decision.noise:.2f}",
                    *(_figures(decision, name) for name in names),
                )
                for decision in self.log
            ],
        )


def _figures(decision: Decision, name: str) -> str:
    """v, c and score of a choice; empty where the choice was not measured yet."""
    if name not in decision.v:
        return ""
    return f"{decision.v[name]:.3g}, {decision.c[name]:.3f}, {decision.score(name):.3f}"


def _subspace_config(rank: tuple[int, int]) -> MemAOP:
    return MemAOP(ratio=1.0, policy="priority", memory="subspace", rank=rank)


def _check_memories(name: str, shapes: chex.ArrayTree) -> None:
    if any(isinstance(m, Memory) for m in jax.tree.leaves(shapes, is_leaf=is_memory)):
        raise ValueError(
            f"Controller: the choice {name!r} has a memory of rows, which wait for the next batch "
            "of the same choice. Use memory='subspace' or memory=None."
        )


def _continue_directions(first: Subspace, held: Memory | Subspace | None) -> Subspace:
    """The directions that a layer's memory holds, filled up with the first ones."""
    if not isinstance(held, Subspace):
        return first
    inputs, cotangents = (
        new if old is None else _orthonormal(old, new)
        for old, new in zip(held[:2], first[:2], strict=True)
    )
    return Subspace(inputs, cotangents, first.uses)


def _orthonormal(old: chex.Array, new: chex.Array) -> chex.Array:
    """As many columns as `new` has; the first ones span the columns of `old`."""
    rank = new.shape[-1]
    columns = jnp.concatenate([old[..., :rank].astype(new.dtype), new[..., old.shape[-1] :]], -1)
    return jnp.linalg.qr(columns)[0]
