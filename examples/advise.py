"""Does it help me? What `aop.advise` says of six models, and what whole training steps measure.

The wide ones are those that it is made for; a narrow network, a small batch and convolutions are
not. Beside each advice stand the times of a training step with Adam: with the advised rules where
it pays, else with the configuration in all contractions, which the advice is against.

  python examples/advise.py              all six, some minutes on two cores
  python examples/advise.py wide-mlp ... some of them, with the whole advice
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import runs
from training import first_state, train_step

import mem_aop_jax as aop

with runs.needs_packages():
    import timing
    from tqdm import tqdm

CONFIG = aop.MemAOP(ratio=0.25, policy="priority", memory="subspace", rank=8, refresh=8)
STEPS = 15  # of exact training, before the measurement
BATCHES = 3


class Task(NamedTuple):
    """A loss of (params, x, y), its first parameters, and batches by number."""

    loss: Callable
    params: Any
    batch: Callable[[int], tuple]


# ---- six models, as anybody writes them


def kernels(*shapes: tuple[int, ...]) -> list[jax.Array]:
    """Kernels with variances of one over the fan-in."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(key, shape) / np.prod(shape[:-1][-3:]) ** 0.5
        for key, shape in zip(keys, shapes, strict=True)
    ]


def regression(rows: int, features: int, outputs: int, number: int) -> tuple:
    """Rows with a spectrum, and noisy values of a function of them."""
    x_key, noise_key = jax.random.split(jax.random.key(number))
    x = jax.random.normal(x_key, (rows, features)) / jnp.arange(1, features + 1) ** 0.25
    (teacher,) = kernels((features, outputs))
    return x, jnp.tanh(x @ teacher) + 0.3 * jax.random.normal(noise_key, (rows, outputs))


def mlp(width: int, rows: int, depth: int = 1) -> Task:
    """A residual network."""

    def loss(params, x, y):
        for up, down in params["blocks"]:
            x = x + jax.nn.relu(x @ up) @ down
        return jnp.mean((x @ params["out"] - y) ** 2)

    shapes = [(width, 2 * width), (2 * width, width)] * depth
    *blocks, out = kernels(*shapes, (width, 16))
    params = {"blocks": list(zip(blocks[::2], blocks[1::2], strict=True)), "out": out}
    return Task(loss, params, functools.partial(regression, rows, width, 16))


def transformer(width: int, batch: int, sequence: int = 64, depth: int = 1) -> Task:
    """Blocks of attention and a layer of width 4, in a scan, over tokens in an order to learn."""
    tokens = 64

    def norm(x):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    def block(x, params):
        qkv = (norm(x) @ params["qkv"]).reshape(*x.shape[:2], 3, width // 32, 32)
        y = jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3)), is_causal=True)
        x = x + y.reshape(x.shape) @ params["out"]
        return x + jax.nn.gelu(norm(x) @ params["up"]) @ params["down"], None

    def loss(params, x, y):
        h, _ = jax.lax.scan(block, params["embedding"][x], params["blocks"])
        logits = norm(h) @ params["embedding"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    shapes = {
        "qkv": (depth, width, 3 * width), "out": (depth, width, width),
        "up": (depth, width, 4 * width), "down": (depth, 4 * width, width),
    }  # fmt: skip
    blocks = {
        name: kernel * depth**0.5
        for name, kernel in zip(shapes, kernels(*shapes.values()), strict=True)
    }
    params = {"embedding": kernels((tokens, width))[0], "blocks": blocks}

    def numbered(number):
        key = jax.random.key(number)
        steps = jax.random.choice(key, jnp.array([1, 1, 1, 7]), (batch, sequence + 1))
        windows = jnp.cumsum(steps, 1) % tokens
        return windows[:, :-1], windows[:, 1:]

    return Task(loss, params, numbered)


def experts(width: int, rows: int, count: int = 4) -> Task:
    """Experts, each with its share of the rows."""

    def loss(params, x, y):
        h = x.reshape(count, -1, width)
        h = jax.nn.relu(jnp.einsum("ebi,eio->ebo", h, params["up"]))
        x = x + jnp.einsum("ebi,eio->ebo", h, params["down"]).reshape(x.shape)
        return jnp.mean((x @ params["out"] - y) ** 2)

    names = "up", "down", "out"
    shapes = (count, width, 4 * width), (count, 4 * width, width), (width, 16)
    params = dict(zip(names, kernels(*shapes), strict=True))
    return Task(loss, params, functools.partial(regression, rows, width, 16))


def convolutions(channels: int, images: int) -> Task:
    """Three convolutions with windows that overlap, and a layer."""

    def loss(params, x, y):
        for kernel in params["convolutions"]:
            x = jax.lax.conv_general_dilated(
                x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x)
        return jnp.mean((x.mean((1, 2)) @ params["out"] - y) ** 2)

    *convolved, out = kernels(
        (3, 3, 3, channels), *[(3, 3, channels, channels)] * 2, (channels, 16)
    )

    def numbered(number):
        x, y = regression(images, 32 * 32 * 3, 16, number)
        return x.reshape(-1, 32, 32, 3), y

    return Task(loss, {"convolutions": convolved, "out": out}, numbered)


MODELS = {
    "wide-mlp": lambda: mlp(1024, 2048),
    "wide-transformer": lambda: transformer(512, 32),
    "wide-experts": lambda: experts(512, 2048),
    "narrow": lambda: transformer(64, 32),
    "small-batch": lambda: mlp(1024, 64),
    "convolutions": lambda: convolutions(64, 64),
}


# ---- training steps


def trained(task: Task) -> Any:
    """Parameters after some exact steps."""
    exact = aop.approximate(task.loss, ())
    optimizer = optax.chain(aop.carry_memory({}), optax.adam(1e-3))
    step = jax.jit(functools.partial(train_step, exact, optimizer))
    state = first_state(exact, optimizer, task.params, *task.batch(0))
    for i in range(STEPS):
        state, _ = step(state, None, *task.batch(i))
    return state[0]


def step_seconds(task: Task, params: Any, rules: Any, rounds: int) -> np.ndarray:
    """Seconds of training steps, exact and with the rules, in turn: `(rounds, 2)`."""
    built = {
        name: timing.training_step(
            aop.approximate(task.loss, ours), params, task.batch(0), CONFIG.refresh
        )
        for name, ours in (("exact", ()), ("approximate", rules))
    }
    functions, _ = timing.compile_all(built)
    seconds = timing.interleaved_seconds(functions, rounds, tqdm(disable=True))
    return np.stack(list(seconds.values()), axis=1)


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = runs.argument_parser(__doc__)
    parser.add_argument("model", nargs="*", help=f"some of {', '.join(MODELS)} (all)")
    runs.add_counts(parser, {"rounds": (3, "of timing, of 8 steps each")})
    options = parser.parse_args(arguments)
    unknown = [name for name in options.model if name not in MODELS]
    if unknown:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    return options


def main(arguments=None) -> None:
    options = parse_arguments(arguments)
    rows, texts = [], []
    for name in tqdm(options.model or MODELS):
        task = MODELS[name]()
        params, batches = trained(task), [task.batch(STEPS + i) for i in range(BATCHES)]
        approx = aop.approximate(task.loss, [(".*", CONFIG)])
        advice = aop.advise(approx, params, batches, jax.random.key(1))
        rules = advice.rules if advice.pays else CONFIG
        seconds = step_seconds(task, params, rules, options.rounds)
        measured = 1 / timing.speed(*seconds.T)
        texts.append(f"{name}\n{advice}\n")
        figures = (advice.share, advice.c, advice.v, advice.noise, advice.verdict(), measured)
        verdict = "pays" if advice.pays else "exact"
        rows.append((name, verdict, *(f"{figure:.3g}" for figure in figures)))
    header = ("model", "advice", "reached", "c", "v", "noise", "(1 + noise v) c", "step's time")
    print("\n" + "\n".join(texts if options.model else []) + runs.markdown(header, rows))


if __name__ == "__main__":
    main()
