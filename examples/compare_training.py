"""The trainings of compare.py: a task, a run and a seed give losses, FLOPs and seconds."""

import functools
import math
import time
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flop_counts import Cost, compiled_cost, skipped_refresh_flops
from tasks import Task
from tqdm import tqdm
from training import first_state, train_step

import mem_aop_jax as aop

EVALUATIONS = 5  # of a run, evenly spaced in FLOPs; the last is after the last step
WARM_UP = 0.1  # of the FLOPs
LAST_DECISION = 0.8  # of the FLOPs, with its own: later ones are not worth what they cost
DECISION = 15  # exact steps that a decision costs, about
ALLOCATED = aop.MemAOP(ratio=0.5, policy="priority", memory="subspace", refresh=8)


class Run(NamedTuple):
    """One way to train.

    Attributes:
      name: the text of --run.
      config: the layers' configuration; None is exact.
      keywords: the configuration's keywords with their values.
      every: steps between two decisions of a controller, which chooses what `aop.allocate` finds
        for `config`; None where there is no controller.
      batch: examples of a step: a count, or (a float) a share of --batch.
      steps: a count, or (a float) a share of --steps; None where `flops` or `bytes` decides.
      flops: of the whole run, as a share of the reference's.
      bytes: accessed in the whole run, as a share of the reference's.
    """

    name: str
    config: aop.MemAOP | None
    keywords: dict[str, Any]
    every: int | None = None
    batch: int | float | None = None
    steps: int | float | None = None
    flops: int | float | None = None
    bytes: int | float | None = None


Rates = tuple[chex.Numeric, chex.Numeric]  # the learning rate of a step, and of the next one


class Trained(NamedTuple):
    """The results of one training.

    Attributes:
      losses: validation losses when a fifth, two fifths, ... of the FLOPs were spent.
      flops: FLOPs spent until each of these steps.
      seconds: seconds spent until each of these steps, on training and on a controller's
        measurements; without compilation and evaluation.
      steps: how many there were.
      diagnostics: diagnostics by step.
      controller: the controller, or None.
      params: the parameters after the last step.
    """

    losses: list[float]
    flops: list[float]
    seconds: list[float]
    steps: int
    diagnostics: dict[int, aop.Diagnostics]
    controller: aop.Controller | None
    params: Any


def learning_rate(progress: chex.Numeric) -> chex.Array:
    """The learning rate, relative to its highest, where this share of a run is done.

    A line up and half a cosine down.
    """
    up = progress / WARM_UP
    down = 0.5 * (1 + jnp.cos(jnp.pi * (progress - WARM_UP) / (1 - WARM_UP)))
    return jnp.minimum(up, jnp.clip(down, 0, 1))


STEP_COSTS: dict[tuple, Cost] = {}  # by task, batch and rules: runs of other lengths share them


class Trainer:
    """Training of a task in one way, for any seed.

    Args:
      task: what is trained.
      run: the way to train; its batch, and its steps if it has any, are counts.
      rate: the highest learning rate.
      reference: FLOPs and bytes of a whole run, of which `run.flops` and `run.bytes` are shares.
      exact: a regular expression for more parameters whose gradients are exact.
    """

    def __init__(
        self, task: Task, run: Run, rate: float, reference: Cost, exact: str | None = None
    ):
        self.task, self.run, self.rate, self.reference = task, run, rate, reference
        patterns = [*task.exact, *([exact] if exact else [])]
        rules = (*((pattern, None) for pattern in patterns), (".*", run.config))
        self.rules = rules if run.config and not run.every else ()
        self.allocated = rules  # what a controller chooses from
        self.shapes = jax.eval_shape(task.init, jax.random.key(0))
        self.example = jax.eval_shape(self.examples, task.train, jax.random.key(0), 0)
        self.draw = jax.jit(self.examples)
        self.validation_loss = jax.jit(self._validation_loss)
        self.advance = jax.jit(self._advance, static_argnums=0, donate_argnums=1)

    def approximate(self, rules) -> aop.Approximated:
        return aop.approximate(self.task.loss, rules)

    def layers(self):
        """The contractions that are approximate, or that a controller may approximate."""
        rules = self.allocated if self.run.every else self.rules
        return self.approximate(rules).layers(self.shapes, self.example)

    def examples(self, train, key, i):
        """The examples of step i. The n-th of a run is the same for every batch size."""
        numbers = i * self.run.batch + jnp.arange(self.run.batch)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
        return jax.vmap(functools.partial(self.task.draw, train))(keys)

    # ---- what it costs

    @functools.cached_property
    def steps(self) -> int | None:
        """As many as the run may have; None where a controller decides what a step costs."""
        if self.run.steps is not None:
            return self.run.steps
        if self.run.every:
            return None
        cost, shares = self.step_cost(self.rules), Cost(self.run.flops, self.run.bytes)
        (steps,) = (
            share * whole / one
            for share, whole, one in zip(shares, self.reference, cost, strict=True)
            if share is not None
        )
        return max(1, int(steps + 1e-6))

    @property
    def budget(self) -> float:
        """FLOPs of the whole run."""
        if self.steps is None:
            return self.run.flops * self.reference.flops
        return self.steps * self.step_cost(self.rules).flops

    def step_cost(self, rules) -> Cost:
        """What XLA counts for a training step with these rules, which is exact if there are none.

        Less the FLOPs of the refreshes that most steps skip.
        """
        sizes = self.task.loss, self.run.batch, rules
        if sizes not in STEP_COSTS:
            approx, args = self.approximate(rules), (self.shapes, self.example)
            state = jax.eval_shape(functools.partial(self.first_state, approx), *args)
            step = jax.jit(self.step, static_argnums=0)
            rates, key = (1.0, 1.0), jax.random.key(0)
            cost = compiled_cost(step, approx, state, 0, rates, key, self.example)
            skipped = skipped_refresh_flops(self.task.loss, rules, *args)
            STEP_COSTS[sizes] = Cost(cost.flops - skipped, cost.bytes)
        return STEP_COSTS[sizes]

    # ---- a step

    def optimizer(self, i: chex.Numeric, rates: Rates) -> optax.GradientTransformationExtraArgs:
        """Adam in step i, with these rates."""
        rate, next_rate = rates
        return optax.chain(
            aop.carry_memory({}, lambda count: jnp.where(count == i, rate, next_rate)),
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(),
            optax.scale_by_learning_rate(rate),
        )

    def first_state(self, approx, params, example):
        return first_state(approx, self.optimizer(0, (1.0, 1.0)), params, example)

    def _validation_loss(self, params, batches):
        losses = jax.lax.map(functools.partial(self.task.loss, params), batches)
        return losses.mean()

    def step(self, approx, state, i, rates, key, examples):
        return train_step(approx, self.optimizer(i, rates), state, key, examples)[0]

    def _advance(self, approx, state, train, keys, steps, progress):
        """The steps from the first to the last of `steps`, in a run's progress of the same two."""
        (start, stop), (begin, end) = steps, progress

        def rate(i):
            share = (i + 0.5 - start) / (stop - start)
            return self.rate * learning_rate(begin + share * (end - begin))

        def body(i, state):
            key, examples = jax.random.fold_in(keys[1], i), self.examples(train, keys[0], i)
            return self.step(approx, state, i, (rate(i), rate(i + 1)), key, examples)

        return jax.lax.fori_loop(start, stop, body, state)

    # ---- a training

    def train(
        self, seed: int, progress: tqdm, *, diagnose: bool = False, params: Any = None
    ) -> Trained:
        """Trains once.

        Args:
          seed: of everything random.
          progress: updated after each evaluation.
          diagnose: whether the gradient's estimates are diagnosed, at the first and last
            evaluation.
          params: the parameters to start from; None initialises them.
        """
        init_key, *keys = jax.random.split(jax.random.key(seed), 3)
        task, rules = self.task, self.rules
        if params is None:
            params = jax.jit(task.init)(init_key)
        else:  # other examples, and copies: the first step donates them
            keys = [jax.random.fold_in(key, 1) for key in keys]
            params = jax.tree.map(jnp.copy, params)
        state = self.first_state(self.approximate(rules), params, self.example)
        controlled = Controlled(self) if self.run.every else None
        losses, spent, seconds, diagnostics = [], [], [], {}
        done, flops, stopwatch = 0, 0.0, Stopwatch()
        while len(losses) < EVALUATIONS:
            cost, approx = self.step_cost(rules).flops, self.approximate(rules)
            share = (len(losses) + 1) / EVALUATIONS
            evaluated = done + max(0, int((share * self.budget - flops) / cost + 1e-6))
            decided = controlled.next_step(done) if controlled else math.inf
            stop = min(evaluated, decided)
            progresses = flops / self.budget, (flops + (stop - done) * cost) / self.budget
            with stopwatch:
                state = self.advance(approx, state, task.train, keys, (done, stop), progresses)
                params, opt_state = jax.block_until_ready(state)
            flops += (stop - done) * cost
            done = stop
            key = jax.random.fold_in(keys[1], 2**31 + done)  # which no step has
            if done == evaluated:
                losses.append(float(self.validation_loss(params, task.validation)))
                spent.append(flops)
                seconds.append(stopwatch.seconds)
                progress.update()
                if diagnose and rules and len(losses) in (1, EVALUATIONS):
                    memory = aop.get_memory(opt_state)
                    examples = self.draw(task.train, keys[0], done)
                    diagnostics[done] = aop.diagnostics(
                        approx, params, memory, key, examples, count_flops=False
                    )
            if done == decided and controlled.can_pay(flops):
                batches = [(self.draw(task.train, keys[0], done + i),) for i in range(2)]
                with stopwatch:
                    state, decision_flops = controlled.decide(done, state, batches, key)
                rules = controlled.rules
                flops += decision_flops
        controller = controlled and controlled.controller
        return Trained(losses, spent, seconds, done, diagnostics, controller, params)


class Stopwatch:
    """Adds up the seconds inside its `with` blocks in which JAX did not compile."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *_):
        compiling = sum(end - start for start, end in COMPILING if start > self.start)
        self.seconds += time.perf_counter() - self.start - compiling


COMPILING: list[tuple[float, float]] = []  # start and end of each time that JAX compiled


def note_compilation(event: str, seconds: float, **_) -> None:
    """Listens to `jax.monitoring`, which calls it at the end of each event."""
    if event.startswith("/jax/core/compile/"):
        end = time.perf_counter()
        start = end - seconds
        while COMPILING and COMPILING[-1][0] > start:  # it was part of this event
            COMPILING.pop()
        COMPILING.append((start, end))


jax.monitoring.register_event_duration_secs_listener(note_compilation)


class Controlled:
    """A controller that decides between exact training and the rules that `aop.allocate` finds.

    `aop.allocate` is called at the first, second, fourth, ... decision; each time its rules join
    the choices.
    """

    def __init__(self, trainer: Trainer):
        self.approx, self.choices = trainer.approximate(trainer.allocated), {}
        self.every = trainer.run.every
        self.affordable = LAST_DECISION * trainer.budget - DECISION * trainer.step_cost(()).flops
        self.controller = None  # until the first decision

    @property
    def rules(self):
        """The rules of the last choice; there are none for exact training."""
        return self.choices.get(self.controller.choice, ()) if self.controller else ()

    def next_step(self, done: int) -> int:
        """The step of the next decision, after so many steps."""
        first = max(1, self.every // 10)
        return first if done < first else self.every * (done // self.every + 1)

    def can_pay(self, spent: float) -> bool:
        """Whether another decision is worth its FLOPs, after so many of the run's."""
        return spent < self.affordable

    def decide(self, step: int, state, batches, key):
        """The state with the memory for the chosen rules, and FLOPs of all measurements."""
        params, opt_state = state
        second_moments = optax.tree_utils.tree_get(opt_state, "nu")
        metric = jax.tree.map(lambda nu: 1 / (jnp.sqrt(nu) + 1e-8), second_moments)  # Adam's
        log = self.controller.log if self.controller else []
        flops = 0.0
        if len(log) & (len(log) + 1) == 0:
            allocation = aop.allocate(self.approx, params, batches, key, metric=metric)
            flops += allocation.spent
            self.choices[f"allocated at {step}"] = allocation.rules
            self.controller = aop.Controller(
                self.approx, self.choices, params, *batches[0], log=log
            )
        memory = aop.get_memory(opt_state)
        memory = self.controller.decide(step, params, memory, batches, key, metric=metric)
        state = params, aop.replace_memory(opt_state, memory)
        return state, flops + self.controller.log[-1].spent
