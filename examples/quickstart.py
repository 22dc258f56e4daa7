"""Train a small Flax classifier on real handwritten digits, exactly and with Mem-AOP.

Every policy, with and without memory, for each ratio K/M; several seeds at once under vmap. Prints
the final train loss, the validation accuracy and the FLOPs of a training step, and draws the loss
curves. The digits (1,797 images of 8 x 8 pixels) come with scikit-learn; nothing is downloaded.
"""

import argparse
import functools
import itertools
import pathlib
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mem_aop_jax as aop

try:
    import matplotlib
    from flop_counts import compiled_flops
    from matplotlib.backend_bases import FigureCanvasBase
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(
        f"{error}. Install the examples' packages: pip install '.[examples]'"
    ) from None

matplotlib.use("Agg")
import matplotlib.pyplot as plt

POLICIES = ("topk", "weightedk", "randk")


class Run(NamedTuple):
    """One way to train: a policy (or "exact"), with or without memory, at a ratio K/M."""

    policy: str = "exact"
    memory: str | None = None
    ratio: float | None = None

    @property
    def config(self) -> aop.MemAOP | None:
        if self.policy == "exact":
            return None
        return aop.MemAOP(ratio=self.ratio, policy=self.policy, memory=self.memory)

    @property
    def columns(self) -> tuple[str, str, str]:
        if self.policy == "exact":
            return "exact", "", ""
        return self.policy, "yes" if self.memory else "no", f"{self.ratio:g}"


class Digits(NamedTuple):
    """Pixels in [0, 1], `(images, 64)` float32, and labels, `(images,)` int32."""

    train_x: jax.Array
    train_y: jax.Array
    validation_x: jax.Array
    validation_y: jax.Array


class Classifier(nn.Module):
    config: aop.MemAOP | None
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for features in self.hidden:
            x = nn.relu(aop.linen.Dense(features, config=self.config)(x))
        return aop.linen.Dense(10, config=self.config)(x)


class Trainer:
    """Training of one configuration. A method is for one seed; `vmap` makes it one for several."""

    def __init__(self, config: aop.MemAOP | None, digits: Digits, options: argparse.Namespace):
        self.model = Classifier(config, tuple(options.hidden))
        self.digits = digits
        self.batch_size = options.batch_size
        self.example = digits.train_x[: options.batch_size]
        variables = jax.eval_shape(self.model.init, jax.random.key(0), self.example)
        memory = variables.get(aop.linen.COLLECTION, {})  # empty if the run has none
        self.optimizer = aop.mem_aop_sgd(options.learning_rate, memory)

    def init(self, key):
        params = self.model.init(key, self.example)["params"]
        return params, self.optimizer.init(params)

    def step(self, state, batch, key):
        params, opt_state = state
        x, y = batch

        def loss_fn(params, memory):
            variables = {"params": params, aop.linen.COLLECTION: memory}
            logits = self.model.apply(variables, x, rngs={aop.linen.RNG: key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        memory = aop.get_memory(opt_state)
        loss, (grads, memory) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params, memory)
        updates, opt_state = self.optimizer.update(grads, opt_state, memory=memory)
        return (optax.apply_updates(params, updates), opt_state), loss

    def epoch(self, state, key):
        """One pass over the reshuffled training set; the last, partial batch is dropped."""
        rows = len(self.digits.train_x)
        batches = rows // self.batch_size
        order = jax.random.permutation(key, rows)[: batches * self.batch_size]

        def body(state, inputs):
            indices, key = inputs
            batch = self.digits.train_x[indices], self.digits.train_y[indices]
            return self.step(state, batch, key)

        inputs = order.reshape(batches, self.batch_size), jax.random.split(key, batches)
        state, losses = jax.lax.scan(body, state, inputs)
        return state, losses.mean()

    def accuracy(self, state):
        params, _ = state
        logits = self.model.apply({"params": params}, self.digits.validation_x)
        return jnp.mean(logits.argmax(axis=1) == self.digits.validation_y)

    def step_flops(self):
        """FLOPs of one training step of one seed, as XLA counts them."""
        state = jax.eval_shape(self.init, jax.random.key(0))
        batch = self.example, self.digits.train_y[: self.batch_size]
        return compiled_flops(jax.jit(self.step), state, batch, jax.random.key(0))


class Result(NamedTuple):
    """Train loss of each epoch `(epochs, seeds)`, final accuracy `(seeds,)`, FLOPs of a step."""

    losses: np.ndarray
    accuracy: np.ndarray
    flops: float


def train(trainer: Trainer, options: argparse.Namespace, progress: tqdm) -> Result:
    keys = jax.random.split(jax.random.key(0), (options.epochs + 1, options.seeds))
    state = jax.vmap(trainer.init)(keys[0])
    epoch = jax.jit(jax.vmap(trainer.epoch), donate_argnums=0)
    losses = []
    for epoch_keys in keys[1:]:
        state, loss = epoch(state, epoch_keys)
        losses.append(np.asarray(loss))
        progress.update()
    accuracy = jax.jit(jax.vmap(trainer.accuracy))(state)
    return Result(np.stack(losses), np.asarray(accuracy), trainer.step_flops())


def load(options: argparse.Namespace) -> Digits:
    pixels, labels = load_digits(return_X_y=True)
    train_x, validation_x, train_y, validation_y = train_test_split(
        pixels / 16, labels, test_size=360, random_state=0, stratify=labels
    )
    if options.batch_size > len(train_x):
        raise SystemExit(
            f"--batch-size {options.batch_size} is more than the {len(train_x)} training images"
        )
    return Digits(
        jnp.asarray(train_x, jnp.float32),
        jnp.asarray(train_y, jnp.int32),
        jnp.asarray(validation_x, jnp.float32),
        jnp.asarray(validation_y, jnp.int32),
    )


def table(results: dict[Run, Result]) -> str:
    row = "{:10s} {:7s} {:7s} {:>16s} {:>18s} {:>17s}"
    header = ("policy", "memory", "K/M", "train loss", "validation acc.", "FLOPs per step")
    lines = [row.format(*header)]
    exact = results[Run()].flops
    for run, (losses, accuracy, flops) in results.items():
        cells = (
            f"{losses[-1].mean():.4f} ± {losses[-1].std():.4f}",
            f"{accuracy.mean():.4f} ± {accuracy.std():.4f}",
            f"{flops / 1e6:.2f} M ({flops / exact:.2f})",
        )
        lines.append(row.format(*run.columns, *cells))
    return "\n".join(lines)


def plot(results: dict[Run, Result], ratios: list[float], path: pathlib.Path) -> None:
    """A panel for each ratio; solid with memory, dashed without; bands of one sd of the seeds."""
    size = (5.5 * len(ratios), 4.2)
    figure, panels = plt.subplots(1, len(ratios), figsize=size, sharey=True, squeeze=False)
    for panel, ratio in zip(panels[0], ratios, strict=True):
        for run, result in results.items():
            if run.ratio not in (None, ratio):
                continue
            exact = run.policy == "exact"
            color = "black" if exact else f"C{POLICIES.index(run.policy)}"
            style = "-" if exact or run.memory else "--"
            name = run.policy if exact or run.memory else f"{run.policy}, no memory"
            epochs = np.arange(1, len(result.losses) + 1)
            mean, sd = result.losses.mean(axis=1), result.losses.std(axis=1)
            panel.plot(epochs, mean, style, color=color, label=name)
            panel.fill_between(epochs, mean - sd, mean + sd, color=color, alpha=0.15, lw=0)
        panel.set(title=f"K/M = {ratio:g}", xlabel="epoch", yscale="log")
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("train loss")
    panels[0, -1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    def number(kind, low, high, text):
        value = kind(text)
        if not low <= value <= high or value != value:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    ratio = functools.partial(number, float, 1e-9, 1.0)
    count = functools.partial(number, int, 1, 10**6)
    rate = functools.partial(number, float, 0.0, 1e3)
    for kind, name in ((ratio, "ratio"), (count, "count"), (rate, "rate")):
        kind.__name__ = name  # argparse names it in its errors
    parser.add_argument(
        "--ratio", type=ratio, nargs="+", default=[0.25, 0.125], metavar="R",
        help="share K/M of the outer products to compute, in (0, 1]; several give several runs",
    )  # fmt: skip
    parser.add_argument("--seeds", type=count, default=5, help="runs of each configuration")
    parser.add_argument("--epochs", type=count, default=30, help="passes over the training set")
    parser.add_argument("--batch-size", type=count, default=128, help="rows of a batch (M)")
    parser.add_argument("--learning-rate", type=rate, default=0.05, help="of plain SGD")
    parser.add_argument(
        "--hidden", type=count, nargs="*", default=[128], metavar="N", help="hidden layers' widths"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("quickstart.png"), help="the figure"
    )
    options = parser.parse_args(arguments)
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: the folder {options.out.parent} does not exist")
    formats = FigureCanvasBase.get_supported_filetypes()
    if options.out.suffix.lower().removeprefix(".") not in formats:
        parser.error(f"--out {options.out}: end the name with .png or one of {', '.join(formats)}")
    try:
        options.out.open("ab").close()  # before the training, not after it
    except OSError as error:
        parser.error(f"--out {options.out}: cannot be written ({error.strerror})")
    options.ratio = list(dict.fromkeys(options.ratio))
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    digits = load(options)
    variants = itertools.product(options.ratio, POLICIES, ("rows", None))
    runs = [Run(), *(Run(policy, memory, ratio) for ratio, policy, memory in variants)]
    results = {}
    with tqdm(total=len(runs) * options.epochs, unit="epoch") as progress:
        for run in runs:
            progress.set_description(" ".join(filter(None, run.columns)))
            results[run] = train(Trainer(run.config, digits, options), options, progress)
    print(
        f"\n{len(digits.train_x)} digits, batch {options.batch_size}, {options.epochs} epochs of "
        f"SGD {options.learning_rate:g}, {options.seeds} seeds (mean ± standard deviation)\n"
    )
    print(table(results))
    plot(results, options.ratio, options.out)
    print(f"\nLoss curves: {options.out}")


if __name__ == "__main__":
    main()
