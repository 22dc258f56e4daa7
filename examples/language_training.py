"""The model of language_model.py, a character transformer in stock Flax, and its training."""

import argparse
import dataclasses
import functools
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import language_text
import optax
from flop_counts import compiled_flops, skipped_refresh_flops
from tqdm import tqdm

import mem_aop_jax as aop

EVALUATIONS = 10  # of a run, evenly spaced; the last is after the last step
WARM_UP = 0.1  # of the steps
ALLOCATED = aop.MemAOP(ratio=0.5, policy="priority", memory="subspace", refresh=8)
WITH_INPUTS = dataclasses.replace(ALLOCATED, input_grad=aop.InputGrad())


class Run(NamedTuple):
    """One way to train.

    Attributes:
      name: the text of --run.
      config: the layers' configuration; None for "exact" and "control".
      keywords: the configuration's keywords with their values.
      every: steps between two decisions of a controller; None where there is no controller.
      inputs: whether the controller may approximate gradients of inputs, too.
      batch: windows of a step: a count, or (a float) a share of --batch.
      steps: a count, or (a float) a share of --steps; None where `flops` decides.
      flops: of the whole run, as a share of the reference's; None where `steps` decides.
    """

    name: str
    config: aop.MemAOP | None
    keywords: dict[str, Any]
    every: int | None = None
    inputs: bool = False
    batch: int | float | None = None
    steps: int | float | None = None
    flops: int | float | None = None


# ---- the model, as anybody writes it


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        qkv = nn.Dense(3 * width, name="qkv")(nn.LayerNorm()(x))
        qkv = qkv.reshape(*x.shape[:-1], 3, self.heads, width // self.heads)
        query, key, value = (qkv[..., i, :, :] for i in range(3))
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + nn.Dense(width, name="out")(y.reshape(x.shape))
        y = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(width, name="down")(y)


class Transformer(nn.Module):
    width: int
    layers: int
    heads: int

    @nn.compact
    def __call__(self, tokens):
        shape = tokens.shape[-1], self.width
        positions = self.param("positions", nn.initializers.normal(0.02), shape)
        x = nn.Embed(language_text.VOCABULARY, self.width, name="embedding")(tokens) + positions
        for i in range(self.layers):
            x = Block(self.heads, name=f"block_{i}")(x)
        return nn.Dense(language_text.VOCABULARY, name="head")(nn.LayerNorm()(x))


def loss(model, variables, windows, key=None):
    """The loss in the form that `aop.allocate` and `aop.Controller` take."""
    rngs = {} if key is None else {aop.linen.RNG: key}
    logits = model.apply(variables, windows[:, :-1], rngs=rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def training_loss(model, params, memory, windows, key):
    return loss(model, {"params": params, aop.linen.COLLECTION: memory}, windows, key)


@functools.partial(jax.jit, static_argnums=0)
def validation_loss(model, params, batches):
    def batch_loss(windows):
        return loss(model, {"params": params}, windows.astype(jnp.int32))

    return jax.lax.map(batch_loss, batches).mean()


# ---- training


def evaluated_steps(steps: int) -> list[int]:
    return [round(steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)]


class Trained(NamedTuple):
    """The results of one training.

    Attributes:
      losses: validation losses at the evaluated steps.
      flops: FLOPs spent until each of these steps.
      seconds: seconds spent until each of these steps, on training and on a controller's
        measurements; without compilation and evaluation.
      diagnostics: diagnostics by step.
      controller: the controller, or None.
      params: the parameters after the last step.
    """

    losses: list[float]
    flops: list[float]
    seconds: list[float]
    diagnostics: dict[int, aop.Diagnostics]
    controller: aop.Controller | None
    params: Any


STEP_FLOPS = {}  # by the sizes and rules of a step


class Trainer:
    """Training of a run for a number of steps, for any seed."""

    def __init__(
        self, run: Run, steps: int, options: argparse.Namespace, learning_rate: float | None = None
    ):
        learning_rate = learning_rate or options.learning_rate
        self.batch, self.every, self.steps = run.batch, run.every, steps
        self.allocated = WITH_INPUTS if run.inputs else ALLOCATED
        self.sequence = options.sequence
        self.exact = Transformer(options.width, options.layers, options.heads)
        self.example = jnp.zeros((run.batch, options.sequence), jnp.int32)
        self.layers_exact = ["head", *([options.layers_exact] if options.layers_exact else [])]
        self.rules = () if run.config is None else self.rules_with(run.config)
        self.model = self.wrapped(self.rules)
        warm_up = int(WARM_UP * steps)
        self.schedule = optax.warmup_cosine_decay_schedule(
            learning_rate / (warm_up + 1), learning_rate, warm_up, steps
        )
        self.init = jax.jit(self._init)
        self.advance = jax.jit(self._advance, static_argnums=0, donate_argnums=1)

    def rules_with(self, config):
        """Rules for `aop.linen.wrap`: the configuration for all but the exact layers."""
        return (*((pattern, None) for pattern in self.layers_exact), (r".*", config))

    def wrapped(self, rules):
        return aop.linen.wrap(self.exact, rules) if rules else self.exact

    def layers(self):
        """The layers that are approximate, or that a controller may approximate."""
        model = self.wrapped(self.rules_with(self.allocated)) if self.every else self.model
        return aop.linen.layers(model, jax.random.key(0), self.example)

    def optimizer(self, memory):
        return optax.chain(
            aop.carry_memory(memory, self.schedule),
            optax.clip_by_global_norm(1.0),
            optax.adam(self.schedule),
        )

    def _init(self, key):
        variables = self.model.init(key, self.example)
        params, memory = variables["params"], variables.get(aop.linen.COLLECTION, {})
        return params, self.optimizer(memory).init(params)

    def step(self, model, state, windows, key):
        params, opt_state = state
        memory = aop.get_memory(opt_state)
        gradient = jax.grad(training_loss, argnums=(1, 2))
        grads, new_memory = gradient(model, params, memory, windows, key)
        optimizer = self.optimizer(memory)
        updates, opt_state = optimizer.update(grads, opt_state, params, memory=new_memory)
        return optax.apply_updates(params, updates), opt_state

    def windows(self, tokens, key, i):
        """The windows of step i. The n-th window of a run is the same for every batch size."""

        def offset(n):
            return jax.random.randint(
                jax.random.fold_in(key, n), (), 0, len(tokens) - self.sequence
            )

        offsets = jax.vmap(offset)(i * self.batch + jnp.arange(self.batch))
        return tokens[offsets[:, None] + jnp.arange(self.sequence + 1)].astype(jnp.int32)

    def _advance(self, model, state, tokens, data_key, policy_key, start, stop):
        """The steps from `start` to `stop`."""

        def body(i, state):
            windows = self.windows(tokens, data_key, i)
            return self.step(model, state, windows, jax.random.fold_in(policy_key, i))

        return jax.lax.fori_loop(start, stop, body, state)

    def step_flops(self, rules) -> float:
        """FLOPs of a training step with these rules, which is exact if there are none.

        As XLA counts them, less the refreshes that most steps skip. They are counted once: runs
        that differ in the number of steps alone have the same.
        """
        sizes = self.exact, rules, self.batch, self.sequence
        if sizes not in STEP_FLOPS:
            STEP_FLOPS[sizes] = self._count_step_flops(rules)
        return STEP_FLOPS[sizes]

    def _count_step_flops(self, rules):
        model, key = self.wrapped(rules), jax.random.key(0)
        memory = jax.eval_shape(model.init, key, self.example).get(aop.linen.COLLECTION, {})
        params, opt_state = jax.eval_shape(self.init, key)
        state = params, aop.replace_memory(opt_state, memory)
        windows = jnp.zeros((self.batch, self.sequence + 1), jnp.int32)
        flops = compiled_flops(jax.jit(self.step, static_argnums=0), model, state, windows, key)
        return flops - skipped_refresh_flops(self.exact, rules, self.example) if rules else flops

    def diagnose(self, model, state, windows, key) -> aop.Diagnostics:
        """Diagnostics of the gradient estimates, on windows that were not trained on."""
        params, opt_state = state
        probes = aop.linen.probes(model, aop.get_memory(opt_state), key, self.example)
        loss_fn = functools.partial(training_loss, model)
        return aop.diagnostics(loss_fn, params, probes, windows, key, count_flops=False)

    def train(
        self,
        seed: int,
        tokens,
        validation,
        progress: tqdm,
        *,
        diagnosed: Sequence[int] = (),
        params=None,
    ) -> Trained:
        """Trains once.

        Args:
          seed: of everything random.
          tokens: the text to train on.
          validation: windows of the validation text.
          progress: updated after each evaluation.
          diagnosed: the evaluated steps at which the gradient estimates are diagnosed.
          params: the parameters to start from; None initialises them.
        """
        init_key, *keys = jax.random.split(jax.random.key(seed), 3)
        state, model, rules = self.init(init_key), self.model, self.rules
        if params is not None:
            keys = [jax.random.fold_in(key, 1) for key in keys]  # other windows
            state = jax.tree.map(jnp.copy, params), state[1]  # copies: the first step donates them
        controlled = Controlled(self) if self.every else None
        evaluated = evaluated_steps(self.steps)
        decided = decided_steps(self.steps, self.every) if self.every else []
        losses, spent, seconds, diagnostics = [], [], [], {}
        done, flops, stopwatch = 0, 0.0, Stopwatch()
        for step in sorted({*evaluated, *decided}):
            with stopwatch:
                state = jax.block_until_ready(self.advance(model, state, tokens, *keys, done, step))
            flops += (step - done) * self.step_flops(rules)
            done = step
            key = jax.random.fold_in(keys[1], self.steps + step)  # which no step has
            if step in evaluated:
                losses.append(float(validation_loss(self.exact, state[0], validation)))
                spent.append(flops)
                seconds.append(stopwatch.seconds)
                progress.update()
            if step in diagnosed and model is not self.exact:
                windows = self.windows(tokens, keys[0], step)
                diagnostics[step] = self.diagnose(model, state, windows, key)
            if step in decided:
                batches = [self.windows(tokens, keys[0], step + i) for i in range(2)]
                with stopwatch:
                    state, decision_flops = controlled.decide(step, state, batches, key)
                model, rules = controlled.controller.model, controlled.rules
                flops += decision_flops
        controller = controlled and controlled.controller
        return Trained(losses, spent, seconds, diagnostics, controller, state[0])


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


def decided_steps(steps: int, every: int) -> list[int]:
    return [max(1, every // 10), *range(every, steps, every)]


class Controlled:
    """A controller that decides between exact training and the rules that `aop.allocate` finds.

    `aop.allocate` is called at the first, second, fourth, ... decision; each time its rules join
    the choices.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.choices = trainer, {}
        self.controller = self._controller(())

    def _controller(self, log):
        trainer = self.trainer
        return aop.Controller(trainer.exact, self.choices, trainer.example, loss, log=log)

    @property
    def rules(self):
        """The rules of the last choice; there are none for exact training."""
        return self.choices.get(self.controller.log[-1].choice, ())

    def decide(self, step: int, state, batches, key):
        """The state with the memory of the model that was chosen, and FLOPs of all measurements."""
        params, opt_state = state
        second_moments = optax.tree_utils.tree_get(opt_state, "nu")
        metric = jax.tree.map(lambda nu: 1 / (jnp.sqrt(nu) + 1e-8), second_moments)  # Adam's
        flops, number = 0.0, len(self.controller.log) + 1
        if number & (number - 1) == 0:
            allocation = aop.allocate(
                self.trainer.exact,
                self.trainer.allocated,
                self.trainer.example,
                loss,
                params=params,
                batches=batches,
                key=key,
                layers="|".join(re.escape(layer.path) for layer in self.trainer.layers()),
                metric=metric,
            )
            flops += allocation.spent
            self.choices[f"allocated at {step}"] = allocation.rules
            self.controller = self._controller(self.controller.log)
        memory = aop.get_memory(opt_state)
        memory = self.controller.decide(step, params, memory, batches, key, metric=metric)
        state = params, aop.replace_memory(opt_state, memory)
        return state, flops + self.controller.log[-1].spent
