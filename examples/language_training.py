"""The model of language_model.py, a character transformer in stock Flax, and its training."""

import argparse
import dataclasses
import functools
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
from training import first_state, train_step

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
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        width, dense = x.shape[-1], functools.partial(nn.Dense, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        qkv = dense(3 * width, name="qkv")(norm()(x))
        qkv = qkv.reshape(*x.shape[:-1], 3, self.heads, width // self.heads)
        query, key, value = (qkv[..., i, :, :] for i in range(3))
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + dense(width, name="out")(y.reshape(x.shape))
        y = nn.gelu(dense(4 * width, name="up")(norm()(x)))
        return x + dense(width, name="down")(y)


class Transformer(nn.Module):
    width: int
    layers: int
    heads: int
    dtype: Any = None  # of the activations; None: float32

    @nn.compact
    def __call__(self, tokens):
        shape = tokens.shape[-1], self.width
        positions = self.param("positions", nn.initializers.normal(0.02), shape)
        x = nn.Embed(language_text.VOCABULARY, self.width, name="embedding")(tokens) + positions
        x = x.astype(self.dtype or x.dtype)
        for i in range(self.layers):
            x = Block(self.heads, self.dtype, name=f"block_{i}")(x)
        return nn.Dense(language_text.VOCABULARY, name="head")(nn.LayerNorm()(x))


def loss_fn(model, params, windows):
    logits = model.apply({"params": params}, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


@functools.partial(jax.jit, static_argnums=0)
def validation_loss(model, params, batches):
    def batch_loss(windows):
        return loss_fn(model, params, windows.astype(jnp.int32))

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
        self.sequence = options.sequence
        self.model = Transformer(options.width, options.layers, options.heads)
        self.loss = functools.partial(loss_fn, self.model)
        self.example = jnp.zeros((run.batch, options.sequence + 1), jnp.int32)
        exact = "head/kernel", *([options.layers_exact] if options.layers_exact else [])

        def rules(config):
            return (*((pattern, None) for pattern in exact), (".*", config))

        self.rules = rules(run.config) if run.config else ()
        self.allocated = rules(WITH_INPUTS if run.inputs else ALLOCATED)
        warm_up = int(WARM_UP * steps)
        self.schedule = optax.warmup_cosine_decay_schedule(
            learning_rate / (warm_up + 1), learning_rate, warm_up, steps
        )
        self.optimizer = optax.chain(
            aop.carry_memory({}, self.schedule),
            optax.clip_by_global_norm(1.0),
            optax.adam(self.schedule),
        )
        self.init = jax.jit(self._init)
        self.advance = jax.jit(self._advance, static_argnums=0, donate_argnums=1)

    def approximate(self, rules) -> aop.Approximated:
        return aop.approximate(self.loss, rules)

    def _init(self, key):
        params = self.model.init(key, self.example[:, :-1])["params"]
        return first_state(self.approximate(self.rules), self.optimizer, params, self.example)

    @functools.cached_property
    def shapes(self):
        """Of the parameters."""
        return jax.eval_shape(self.init, jax.random.key(0))[0]

    def layers(self):
        """The contractions that are approximate, or that a controller may approximate."""
        rules = self.allocated if self.every else self.rules
        return self.approximate(rules).layers(self.shapes, self.example)

    def windows(self, tokens, key, i):
        """The windows of step i. The n-th window of a run is the same for every batch size."""

        def offset(n):
            return jax.random.randint(
                jax.random.fold_in(key, n), (), 0, len(tokens) - self.sequence
            )

        offsets = jax.vmap(offset)(i * self.batch + jnp.arange(self.batch))
        return tokens[offsets[:, None] + jnp.arange(self.sequence + 1)].astype(jnp.int32)

    def step(self, approx, state, key, windows):
        return train_step(approx, self.optimizer, state, key, windows)[0]

    def _advance(self, approx, state, tokens, data_key, policy_key, start, stop):
        """The steps from `start` to `stop`."""

        def body(i, state):
            key, windows = jax.random.fold_in(policy_key, i), self.windows(tokens, data_key, i)
            return self.step(approx, state, key, windows)

        return jax.lax.fori_loop(start, stop, body, state)

    def step_flops(self, rules) -> float:
        """FLOPs of a training step with these rules, which is exact if there are none.

        As XLA counts them, less the refreshes that most steps skip. They are counted once: runs
        that differ in the number of steps alone have the same.
        """
        sizes = self.model, rules, self.batch, self.sequence
        if sizes not in STEP_FLOPS:
            approx, args = self.approximate(rules), (self.shapes, self.example)
            state = jax.eval_shape(functools.partial(first_state, approx, self.optimizer), *args)
            step = jax.jit(self.step, static_argnums=0)
            flops = compiled_flops(step, approx, state, jax.random.key(0), self.example)
            STEP_FLOPS[sizes] = flops - skipped_refresh_flops(self.loss, rules, *args)
        return STEP_FLOPS[sizes]

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
        state, rules = self.init(init_key), self.rules
        if params is not None:
            keys = [jax.random.fold_in(key, 1) for key in keys]  # other windows
            state = jax.tree.map(jnp.copy, params), state[1]  # copies: the first step donates them
        every, evaluated = self.every, evaluated_steps(self.steps)
        decided = [max(1, every // 10), *range(every, self.steps, every)] if every else []
        controlled = Controlled(self) if every else None
        losses, spent, seconds, diagnostics = [], [], [], {}
        done, flops, stopwatch = 0, 0.0, Stopwatch()
        for step in sorted({*evaluated, *decided}):
            approx = self.approximate(rules)
            with stopwatch:
                state = self.advance(approx, state, tokens, *keys, done, step)
                params, opt_state = jax.block_until_ready(state)
            flops += (step - done) * self.step_flops(rules)
            done = step
            key = jax.random.fold_in(keys[1], self.steps + step)  # which no step has
            if step in evaluated:
                losses.append(float(validation_loss(self.model, params, validation)))
                spent.append(flops)
                seconds.append(stopwatch.seconds)
                progress.update()
            if step in diagnosed and rules:
                args = aop.get_memory(opt_state), key, self.windows(tokens, keys[0], step)
                diagnostics[step] = aop.diagnostics(approx, params, *args, count_flops=False)
            if step in decided:
                batches = [(self.windows(tokens, keys[0], step + i),) for i in range(2)]
                with stopwatch:
                    state, decision_flops = controlled.decide(step, state, batches, key)
                rules = controlled.rules
                flops += decision_flops
        controller = controlled and controlled.controller
        return Trained(losses, spent, seconds, diagnostics, controller, params)


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
        self.controller = None  # until the first decision

    @property
    def rules(self):
        """The rules of the last choice; there are none for exact training."""
        return self.choices.get(self.controller.choice, ())

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
