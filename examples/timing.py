"""Measures compiled steps: what the compiler says of them, and how long they take, in turn."""

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm
from training import first_state, train_step

import mem_aop_jax as aop

SHORTEST = 0.02  # seconds of a measurement: as many steps in a row as take so long


class Step(NamedTuple):
    """A function to time, with its arguments.

    Attributes:
      function: `(*args, key, state) -> (state, results)`, to be compiled. Each call gets a new key.
        The state is donated; it comes first in the result, since a donated array becomes the first
        result of its shape.
      args: arrays.
      state: a pytree of arrays.
      calls: the least number of calls to time together: of so many, one refreshes its subspaces.
    """

    function: Callable
    args: tuple
    state: Any
    calls: int = 1


def training_step(approx: aop.Approximated, params: Any, batch: tuple, calls: int = 1) -> Step:
    """A training step with Adam, of a loss and its arguments; `calls` as in `Step`.

    Where params are shapes in place of arrays, so is the state.
    """
    optimizer = optax.chain(aop.carry_memory({}), optax.adam(1e-3))

    def step(*args):
        *inputs, key, state = args
        return train_step(approx, optimizer, state, key, *inputs)

    first = functools.partial(first_state, approx, optimizer)
    if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
        first = functools.partial(jax.eval_shape, first)
    return Step(step, batch, first(params, *batch), calls)


# ---- the compiler


class Timed:
    """A compiled step and its state; a call runs it once and does not wait for it.

    Attributes:
      compiled: the step.
      seconds: that compiling it took.
    """

    def __init__(self, step: Step):
        args = *step.args, jax.random.key(0), step.state
        start = time.perf_counter()
        function = jax.jit(step.function, donate_argnums=len(args) - 1)
        self.compiled = function.lower(*args).compile()
        self.seconds = time.perf_counter() - start
        self.args, self.calls = step.args, step.calls
        self.state = jax.tree.map(jnp.copy, step.state)
        self.keys = itertools.cycle(list(jax.random.split(jax.random.key(1), 64)))

    def __call__(self):
        self.state, results = self.compiled(*self.args, next(self.keys), self.state)
        return self.state, results


def compile_all(built: dict[str, Step]) -> tuple[dict, dict]:
    """For each step a function to time, and columns of what the compiler says."""
    functions = {name: Timed(step) for name, step in built.items()}
    columns = {
        name: compiler_columns(timed.compiled) | {"compile s": timed.seconds}
        for name, timed in functions.items()
    }
    return functions, columns


def compiler_columns(function: jax.stages.Compiled) -> dict:
    """FLOPs and bytes of a call as the compiler counts them, and the memory that it takes."""
    cost, memory = function.cost_analysis() or {}, function.memory_analysis()
    return {
        "GFLOPs": cost.get("flops", math.nan) / 1e9,
        "MB": cost.get("bytes accessed", math.nan) / 1e6,
        "MB held": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6
        if memory
        else math.nan,
    }


# ---- the clock


def seconds_per_call(function, times: int) -> float:
    """The mean of so many calls, one after the other."""
    start = time.perf_counter()
    for _ in range(times):
        results = function()
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / times


def interleaved_seconds(functions: dict, rounds: int, progress: tqdm) -> dict[str, np.ndarray]:
    """Seconds of a step, `(rounds,)` for each function; each round measures all of them once."""
    times = {}
    for name, function in functions.items():
        seconds_per_call(function, 1)
        least = getattr(function, "calls", 1)  # calls of PyTorch are all alike
        times[name] = max(least, math.ceil(SHORTEST / seconds_per_call(function, 1)))
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(seconds_per_call(function, times[name]))
        progress.update()
    return {name: np.array(measured) for name, measured in seconds.items()}


def speed(exact: np.ndarray, other: np.ndarray) -> float:
    """How many times as fast as the exact one: the median of the rounds."""
    return float(np.median(exact / other))


def time_columns(seconds: np.ndarray, exact: np.ndarray) -> dict:
    low, high = np.quantile(seconds, (0.25, 0.75))
    return {
        "ms": np.median(seconds) * 1e3,
        "quartiles": f"{low * 1e3:.4g} to {high * 1e3:.4g}",
        "speed": speed(exact, seconds),
    }
