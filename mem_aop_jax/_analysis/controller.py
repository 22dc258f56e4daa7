"""Chooses between exact training and a few configurations, again and again as a model trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mem_aop_jax import linen
from mem_aop_jax._analysis import model_gradients
from mem_aop_jax._analysis.subject import (
    Subject,
    as_args,
    as_collection,
    by_site,
    check_batches,
)
from mem_aop_jax._approximate.approximated import Approximated, first_memories, sites_of
from mem_aop_jax._approximate.program import Site
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.flops import flops_left_out
from mem_aop_jax._core.memory import Memory, Subspace
from mem_aop_jax._models import Rules, as_rules, rules_for
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
    """Moves between a few configurations of a loss, exact training among them, as it trains.

    A training step that takes `controller.approx` as a static argument compiles each choice once. A
    decision takes one exact backward pass, in which the directions of all layers turn towards the
    rows of the first batch, and for each other batch the exact gradient and an approximate one of
    every choice: some six steps for three choices and two batches. Leave hundreds of steps between
    decisions.

    For a Linen model: `Controller(model, choices, example_input, loss, *, costs=None, margin=0.03,
    log=())`, with `model`, `example_input` and `loss` as in `aop.allocate`. Then the memories are
    the collection `aop.linen.COLLECTION`, and `controller.model` is the model to train with. As a
    static argument it must be hashable: tuples in its fields, no lists.

    Args:
      approx: `aop.approximate` of the loss, or of a pair of the loss and something else; which
        configurations it has is of no account.
      choices: by name, a configuration or rules as in `aop.approximate`, for instance the rules of
        `aop.allocate`. "exact" is always among them, and comes first.
      params: the parameters, or a `jax.ShapeDtypeStruct` for each.
      *args: the further arguments of the function, of the training size.
      costs: for each name the cost of a step, in any unit, for instance measured times; None counts
        the FLOPs of the loss's gradient as the compiler does, without the refreshes that most steps
        leave out. On narrow layers fewer FLOPs may take longer: `aop.advise` measures times.
      margin: training is exact unless a choice saves so much, (1 + noise v) c < 1 - margin: a
        measurement on a few batches is uncertain, and costs FLOPs itself. Between choices the
        margin does not count.
      log: the earlier decisions, to resume a run: `controller.log`, or its dicts from JSON.

    Attributes:
      log: list of `Decision`; `str` of the controller is a table of them.

    Raises:
      TypeError: choices that are no dict; a choice that is neither a configuration nor rules.
      ValueError: a choice with a memory of rows, which belong to one batch and one choice; costs or
        a log with other names than the choices; a margin outside of [0, 1); a rule that decides
        about nothing.

    Example:
      >>> import jax, jax.numpy as jnp, mem_aop_jax as aop
      >>> config = aop.MemAOP(ratio=0.25, policy="priority", memory="subspace", rank=4)
      >>> approx = aop.approximate(lambda kernel, x: jnp.mean((x @ kernel) ** 2), config)
      >>> kernel, x = jnp.ones((32, 4)), jax.random.normal(jax.random.key(0), (2, 64, 32))
      >>> controller = aop.Controller(approx, {"a quarter": config}, kernel, x[0])
      >>> memory = controller.decide(0, kernel, {}, [(x[0],), (x[1],)], jax.random.key(2))
      >>> sorted(controller.log[-1].v)
      ['a quarter', 'exact']
    """

    def __init__(
        self,
        approx: Approximated | nn.Module,
        choices: Mapping[str, MemAOP | Sequence[tuple[str, MemAOP | None]]],
        params: chex.ArrayTree,
        *args: Any,
        costs: Mapping[str, float] | None = None,
        margin: float = 0.03,
        log: Sequence[Decision | Mapping[str, Any]] = (),
    ):
        if not isinstance(choices, Mapping):
            raise TypeError(
                f"Controller: choices are of type {type(choices).__name__}; they must be a dict of "
                'configurations or rules by name: {"a quarter": config}.'
            )
        if EXACT in choices:
            raise ValueError(
                f"Controller: {EXACT!r} is training without approximation, which is always among "
                "the choices; give another name."
            )
        if not 0 <= margin < 1:
            raise ValueError(f"Controller: got margin={margin}; it must lie in [0, 1).")
        rules = {name: as_rules("Controller", choice) for name, choice in choices.items()}
        self._rules: dict[str, Rules] = {EXACT: (), **rules}
        self._costs, self._margin = costs and dict(costs), margin
        if costs and set(costs) != set(self._rules):
            raise self._wrong_names("costs", costs)
        self.log = [_logged(entry) for entry in log]
        for entry in self.log:
            if entry.choice not in self._rules:
                raise self._wrong_names("the log", [entry.choice])
        for name, choice_rules in rules.items():
            _check_memories(name, choice_rules)

        self._choices: dict[str, _Choice] = {}  # from the first decision on, as what follows
        self._widest: tuple[Subject, list[Site]] | None = None
        if isinstance(approx, nn.Module):
            (loss,) = args
            self._subject = Subject.of_model("Controller", approx, loss, ())
            example = as_args("Controller", params)
            self._trained: dict[str, Any] = {EXACT: approx}
            for name, choice_rules in rules.items():
                self._trained[name] = linen.wrap(approx, choice_rules)
                linen.layers(self._trained[name], jax.random.key(0), *example)  # as below
        else:
            self._subject = Subject.of_function("Controller", approx)
            self._trained = {
                name: self._subject.by("Controller", choice_rules).approx
                for name, choice_rules in self._rules.items()
            }
            for name in rules:
                sites_of(self._trained[name], params, *args)  # raises where a rule is not used

    @property
    def choice(self) -> str:
        """The name of the choice to train with now."""
        return self.log[-1].choice if self.log else EXACT

    @property
    def approx(self) -> Any:
        """The function to train with, approximate as chosen; of a model, the wrapped model."""
        return self._trained[self.choice]

    model = approx

    def decide(
        self,
        step: int,
        params: chex.ArrayTree,
        memory: chex.ArrayTree,
        batches: Sequence[Any],
        key: chex.PRNGKey,
        *,
        metric: chex.ArrayTree | None = None,
    ) -> dict[str, Any]:
        """Measures all choices, and moves to the one of the least (1 + noise v) c, or to "exact".

        Call it outside of `jit`, `pmap` and `shard_map`; params and batches may be sharded.

        Args:
          step: for the log.
          params: the parameters.
          memory: of the training so far; empty for exact.
          batches: two or more, of the training size, as in `aop.allocate`.
          key: for the draws.
          metric: as in `aop.allocate`, for v and the noise.

        Returns:
          The memory for `controller.approx`. Its directions start from those of `memory`, where it
          has some, and follow the first batch.

        Raises:
          TypeError: a batch that is no tuple of arguments.
          ValueError: fewer than two batches; a gradient that is zero or not finite; no costs where
            the compiler counts none.
        """
        check_batches("Controller", self._subject, batches)
        first, *others = batches
        if self._widest is None:
            self._choices = {
                name: _Choice.of(self._subject.by("Controller", rules), params, first, key)
                for name, rules in self._rules.items()
            }
            self._widest = self._with_largest_ranks(params, first, key)
        following, sites = self._widest
        held = by_site(memory) if self._subject.is_model else memory
        first_key = jax.random.fold_in(key, 0)
        start = {
            name: _continue_directions(new, held.get(name))
            for name, new in first_memories(sites).items()
        }
        probes = model_gradients.norms_probes(start, sites)
        result = following.backward(params, probes, first, first_key)
        directions = model_gradients.next_memory(result.memory)
        memories = {
            name: model_gradients.truncate_directions(choice.memory, directions)
            for name, choice in self._choices.items()
        }
        exact, spent = result.gradient, result.flops
        norms, differences = [model_gradients.finite_norm("Controller", 0, exact, metric)], []
        errors, flops = dict.fromkeys(self._rules, 0.0), {}
        for i, batch in enumerate(others, 1):
            batch_key = jax.random.fold_in(key, i)
            for name, choice in self._choices.items():
                result = choice.subject.backward(params, memories[name], batch, batch_key)
                if name == EXACT:  # which comes first
                    differences.append(model_gradients.squared_norm(result.gradient, exact, metric))
                    exact = result.gradient
                    norms.append(model_gradients.finite_norm("Controller", i, exact, metric))
                else:
                    errors[name] += model_gradients.squared_norm(result.gradient, exact, metric)
                flops[name] = result.flops
            spent += sum(flops.values())

        squares = [norm**2 for norm in norms]
        noise = model_gradients.noise_share(differences, squares)
        v = {name: error / float(np.sum(squares[1:])) for name, error in errors.items()}
        decision = Decision(step, EXACT, noise, v, self._relative_costs(flops), spent)
        scores = {name: decision.score(name) for name in self._rules}
        best = min(scores, key=lambda name: (np.isnan(scores[name]), scores[name]))
        if scores[best] < 1 - self._margin:
            decision = decision._replace(choice=best)
        self.log.append(decision)
        chosen = memories[self.choice]
        return as_collection(chosen) if self._subject.is_model else chosen

    def _with_largest_ranks(
        self, params: chex.ArrayTree, batch: Any, key: chex.PRNGKey
    ) -> tuple[Subject, list[Site]]:
        """The loss with the largest ranks of all choices, and its sites."""
        ranks: dict[str, tuple[int, int]] = {}
        for choice in self._choices.values():
            for path, held in choice.ranks.items():
                largest = ranks.get(path, (1, 1))
                ranks[path] = max(held[0], largest[0]), max(held[1], largest[1])
        configs = {path: _subspace_config(rank) for path, rank in ranks.items()}
        widest = self._subject.by("Controller", rules_for(configs))
        return widest, widest.sites(params, batch, key) if ranks else []

    def _wrong_names(self, argument: str, given: Iterable[str]) -> ValueError:
        return ValueError(
            f"Controller: {argument} must name the choices {', '.join(map(repr, self._rules))}; "
            f"got {', '.join(map(repr, given))}."
        )

    def _relative_costs(self, flops: Mapping[str, float]) -> dict[str, float]:
        if not self._costs and min(flops.values()) <= 0:
            raise ValueError(
                "Controller: the compiler counts no FLOPs here; give costs=, for instance times of "
                "a step."
            )
        costs = self._costs or {
            name: flops[name] - choice.flops_left_out for name, choice in self._choices.items()
        }
        return {name: costs[name] / costs[EXACT] for name in self._rules}

    def __str__(self) -> str:
        names = list(self._rules)
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


class _Choice(NamedTuple):
    """A choice for batches of one size.

    Attributes:
      subject: the loss with its rules.
      memory: its first memories, by the sites' names.
      ranks: of both sides of the subspaces that it holds, by the layers' paths.
      flops_left_out: of the refreshes that most steps leave out.
    """

    subject: Subject
    memory: dict[str, Any]
    ranks: dict[str, tuple[int, int]]
    flops_left_out: float

    @classmethod
    def of(cls, subject: Subject, params: chex.ArrayTree, batch: Any, key: chex.PRNGKey):
        """Of a loss with rules; without, the exact one."""
        if not subject.approx.settings.rules:
            return cls(subject, {}, {}, 0.0)
        sites = subject.sites(params, batch, key)
        ranks, left_out = {}, 0.0
        for site in sites:
            if site.config is not None and site.config.memory_kind == "subspace":
                path, rows, *features, _ = site.layer
                ranks[path] = site.config.held_ranks(*features)
                left_out += flops_left_out(site.config, rows, *features)
        return cls(subject, first_memories(sites), ranks, left_out)


def _figures(decision: Decision, name: str) -> str:
    """v, c and score of a choice; empty where the choice was not measured yet."""
    if name not in decision.v:
        return ""
    return f"{decision.v[name]:.3g}, {decision.c[name]:.3f}, {decision.score(name):.3f}"


def _subspace_config(rank: tuple[int, int]) -> MemAOP:
    return MemAOP(ratio=1.0, policy="priority", memory="subspace", rank=rank)


def _logged(entry):
    """A decision of a log, also from JSON."""
    if isinstance(entry, Decision):
        return entry
    if not isinstance(entry, Mapping) or set(entry) != set(Decision._fields):
        raise TypeError(
            f"Controller: the log has an entry {entry!r}; each must be an aop.Decision, or its "
            f"dict, decision._asdict(), with the keys {', '.join(Decision._fields)}."
        )
    return Decision(**entry)


def _check_memories(name: str, rules: Rules) -> None:
    if any(config is not None and config.memory_kind == "rows" for _, config in rules):
        raise ValueError(
            f"Controller: the choice {name!r} has a memory of rows, which wait for the next batch "
            "of the same choice. Use memory='subspace' or memory=None."
        )


def _continue_directions(first: Any, held: Memory | Subspace | None) -> Subspace:
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
