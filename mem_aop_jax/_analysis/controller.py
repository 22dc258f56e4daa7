"""Which of a few ways to train goes on: measured now and then, as the gradients change."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mem_aop_jax import linen
from mem_aop_jax._analysis import model_gradients
from mem_aop_jax._analysis.model_gradients import model_flops_left_out
from mem_aop_jax._analysis.tables import markdown
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.memory import Memory, Subspace
from mem_aop_jax._core.probe import is_memory
from mem_aop_jax._models import as_rules, config_for

EXACT = "exact"


class Decision(NamedTuple):
    """What `Controller.decide` measured, and what it chose. Of floats, strings and dicts: JSON.

    Attributes:
      step: as it was given.
      choice: the name of what goes on.
      noise: share of the square of a batch's gradient that is noise of the batch, in [0, 1].
      v: for each name, variance of the gradient of all parameters around the batch's exact one,
        relative to the square of that; of a biased estimate, its squared error.
      c: for each name, the cost of a step, relative to that of an exact one.
      spent: FLOPs of the measurement, as the compiler counts them.
    """

    step: int
    choice: str
    noise: float
    v: dict[str, float]
    c: dict[str, float]
    spent: float

    def score(self, name: str) -> float:
        """(1 + noise v) c: what a step costs, and how many more it needs.

        Between the regimes of `Diagnostics`: (1 + v) c where the batch is all noise, c where it is
        so large that it has none.
        """
        return (1 + self.noise * self.v[name]) * self.c[name]


class Controller:
    """Moves between a few configurations of a model, exact training among them, as it trains.

    Each is compiled once by a training step that takes `controller.model` as a static argument. A
    decision is one exact backward pass in which the directions of all layers follow the rows of the
    first batch, and for each other batch the exact gradient and an approximate one of every choice:
    some six steps for three choices and two batches. A phase between decisions should have
    hundreds.

    Args:
      model: a Linen model, not wrapped. As a static argument it must be hashable: tuples in its
        fields, no lists.
      choices: by name, what `aop.linen.wrap` takes: a configuration or rules, for instance those of
        `aop.allocate`. "exact" is always there, and comes first.
      example_input: as in `aop.allocate`.
      loss: as in `aop.allocate`: `loss(model, variables, batch, key)`, of a model that it is given.
      costs: for each name the cost of a step, in any unit, for instance measured times; None counts
        the FLOPs of the loss's gradient as the compiler does, without the refreshes that most steps
        leave out.
      margin: a choice must save so much, (1 + noise v) c < 1 - margin, or training is exact: what
        is measured on a few batches is uncertain, and costs FLOPs itself. Between choices it does
        not count.
      log: the decisions so far, of a run that goes on: `controller.log`, or its dicts from JSON.

    Attributes:
      log: list of `Decision`; `str` of the controller is a table of them.

    Raises:
      TypeError: choices that `aop.linen.wrap` does not take.
      ValueError: a choice with a memory of rows, which belong to one batch and one choice; choices,
        costs and log that name different ones; a margin outside of [0, 1).

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
        example_input: chex.ArrayTree,
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
            name: linen.wrap(model, of_choice) for name, of_choice in rules.items()
        }
        self._costs, self._margin = costs and dict(costs), margin
        if costs and set(costs) != set(self._models):
            raise self._wrong_names("costs", costs)
        self.log = [entry if isinstance(entry, Decision) else Decision(**entry) for entry in log]
        for entry in self.log:
            if entry.choice not in self._models:
                raise self._wrong_names("the log", [entry.choice])

        args = model_gradients.arguments(example_input)
        key = jax.random.key(0)
        self._shapes, self._left_out, self._sizes, ranks = {EXACT: {}}, {EXACT: 0.0}, {}, {}
        for name, of_choice in rules.items():
            self._shapes[name] = model_gradients.memory_shapes(self._models[name], *args)
            _check_memories(name, self._shapes[name])
            layers = linen.layers(self._models[name], key, *args)
            self._left_out[name] = model_flops_left_out(of_choice, layers)
            for path, *sizes, _ in layers:
                config = config_for(of_choice, path)
                if config.memory_kind == "subspace":
                    self._sizes[path] = sizes
                    held = np.maximum(config.held_ranks(*sizes[1:]), 1)
                    ranks[path] = np.maximum(held, ranks.get(path, 1))
        widest = {path: _of_rank(tuple(map(int, rank))) for path, rank in ranks.items()}
        self._following = model_gradients.wrapped(model, widest) if widest else model
        self._first = model_gradients.first_memory(self._following, *args)
        self._backward = model_gradients.backward(loss)

    @property
    def choice(self) -> str:
        """The name of what is trained with."""
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

        Outside of `jit`, `pmap` and `shard_map`; params and batches may be sharded.

        Args:
          step: for the log.
          params: the parameters.
          memory: of the model so far, the collection `aop.linen.COLLECTION`; empty for exact.
          batches: two or more, of the size of the example input.
          key: for the draws.
          metric: as in `aop.allocate`; of what v and the noise are shares.

        Returns:
          The memory for `controller.model`: its directions are those of the first batch, carried
          over where there were some.

        Raises:
          ValueError: fewer than two batches; a gradient that is zero or not finite; no costs where
            the compiler counts none.
        """
        model_gradients.check_batches("Controller", batches)
        first, *others = batches
        found = self._follow(params, memory, first, jax.random.fold_in(key, 0))
        directions = model_gradients.next_memory(found.memory)
        lent = {
            name: model_gradients.first_of(shapes, directions)
            for name, shapes in self._shapes.items()
        }
        exact, spent = found.gradient, found.flops
        norms, differences = [model_gradients.finite_norm("Controller", 0, exact, metric)], []
        errors, flops = dict.fromkeys(self._models, 0.0), {}
        for i, batch in enumerate(others, 1):
            for name, model in self._models.items():
                of_batch = jax.random.fold_in(key, i)
                found = self._backward(model, params, lent[name], batch, of_batch)
                if name == EXACT:  # which comes first
                    differences.append(model_gradients.square(found.gradient, exact, metric))
                    exact = found.gradient
                    norms.append(model_gradients.finite_norm("Controller", i, exact, metric))
                else:
                    errors[name] += model_gradients.square(found.gradient, exact, metric)
                flops[name] = found.flops
            spent += sum(flops.values())

        squares = np.square(norms)
        noise = min(1.0, float(np.mean(differences) / 2 / np.mean(squares)))
        v = {name: error / float(np.sum(squares[1:])) for name, error in errors.items()}
        c = self._relative_costs(flops)
        measured = Decision(step, EXACT, noise, v, c, spent)
        scores = {name: measured.score(name) for name in self._models}
        best = min(scores, key=lambda name: (np.isnan(scores[name]), scores[name]))
        if scores[best] < 1 - self._margin:
            measured = measured._replace(choice=best)
        self.log.append(measured)
        return lent[self.choice]

    def _follow(self, params, memory, batch, key):
        """An exact pass, in which the directions follow the batch."""
        start = _started(self._first, memory)
        probes = model_gradients.each_memory(
            start, functools.partial(model_gradients.with_norms, self._sizes)
        )
        return self._backward(self._following, params, probes, batch, key)

    def _wrong_names(self, what, given):
        return ValueError(
            f"Controller: {what} must name the choices {', '.join(map(repr, self._models))}; got "
            f"{', '.join(map(repr, given))}."
        )

    def _relative_costs(self, flops):
        if not self._costs and min(flops.values()) <= 0:
            raise ValueError(
                "Controller: the compiler counts no FLOPs here; give costs=, for instance times of "
                "a step."
            )
        costs = self._costs or {name: flops[name] - self._left_out[name] for name in flops}
        return {name: costs[name] / costs[EXACT] for name in self._models}

    def __str__(self) -> str:
        names = list(self._models)
        header = ("step", "choice", "noise", *(f"{name}: v, c, (1 + noise v) c" for name in names))
        return markdown(
            header,
            [
                (
                    str(found.step),
                    found.choice,
                    f"{found.noise:.2f}",
                    *(
                        f"{found.v[name]:.3g}, {found.c[name]:.3f}, {found.score(name):.3f}"
                        if name in found.v
                        else ""
                        for name in names
                    ),
                )
                for found in self.log
            ],
        )


def _of_rank(rank):
    return MemAOP(ratio=1.0, policy="priority", memory="subspace", rank=rank)


def _check_memories(name, tree):
    for memory in jax.tree.leaves(tree, is_leaf=is_memory):
        if isinstance(memory, Memory):
            raise ValueError(
                f"Controller: the choice {name!r} has a memory of rows, which wait for the next "
                "batch of the same choice. Use memory='subspace' or memory=None."
            )


def _started(first, held):
    """The first directions, after those that a memory holds."""

    def of_layer(first, held):
        if not isinstance(held, Subspace):
            return first
        sides = [
            _orthonormal(had, new) if had is not None else new
            for had, new in zip(held[:2], first[:2], strict=True)
        ]
        return Subspace(*sides, first.uses)

    return model_gradients.each_pair(first, held, of_layer)


def _orthonormal(had, new):
    """As many columns as `new` has, that span what `had` does first."""
    rank = new.shape[-1]
    columns = jnp.concatenate([had[..., :rank].astype(new.dtype), new[..., had.shape[-1] :]], -1)
    return jnp.linalg.qr(columns)[0]
