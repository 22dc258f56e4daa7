"""Train a small Flax classifier on real handwritten digits, exactly and with fewer products.

With plain SGD every policy of the paper, with and without memory, for each ratio K/M; with Adam the
configuration to begin with, and the paper's beside it; several seeds at once under vmap. Prints the
final train loss, the validation accuracy, the FLOPs of a training step, and the milliseconds of a
step with Adam of this network and of a wide one; says whether it pays on this machine; and draws
the loss curves. The digits (1,797 images of 8 x 8 pixels) come with scikit-learn; nothing is
downloaded.
"""

import argparse
import itertools
import os
import pathlib
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import runs

import mem_aop_jax as aop

with runs.needs_packages():
    import matplotlib
    import timing
    from flop_counts import compiled_flops, skipped_refresh_flops
    from matplotlib.backend_bases import FigureCanvasBase
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
    from training import first_state, shuffled_batches, train_step

matplotlib.use("Agg")
import matplotlib.pyplot as plt

POLICIES = ("topk", "weightedk", "randk")
COLORS = (*POLICIES, "priority")
CLASSES = 10


class Run(NamedTuple):
    """One way to train: an optimizer, and the configuration of all layers (None is exact)."""

    optimizer: str = "SGD"
    config: aop.MemAOP | None = None

    @property
    def rules(self) -> tuple[tuple[str, aop.MemAOP], ...]:
        return ((".*", self.config),) if self.config else ()

    @property
    def columns(self) -> tuple[str, str, str]:
        """The policy, whether there is a memory of rows, and K/M."""
        if self.config is None:
            return "exact", "", ""
        return self.config.policy, "yes" if self.config.memory else "no", f"{self.config.ratio:g}"


class Digits(NamedTuple):
    """Pixels in [0, 1], `(images, 64)` float32, and labels, `(images,)` int32."""

    train_x: jax.Array
    train_y: jax.Array
    validation_x: jax.Array
    validation_y: jax.Array


class Classifier(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for features in self.hidden:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(CLASSES)(x)


def loss_of(model: nn.Module):
    """The loss as a function of variables, inputs and labels."""

    def loss_fn(variables, x, labels):
        logits = model.apply(variables, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss_fn


class Trainer:
    """Training of one run. A method is for one seed; `vmap` makes it one for several."""

    def __init__(self, run: Run, digits: Digits, options: argparse.Namespace):
        self.model, self.digits = Classifier(tuple(options.hidden)), digits
        self.batch_size = options.batch_size
        self.batch = digits.train_x[: self.batch_size], digits.train_y[: self.batch_size]
        self.loss_fn, self.rules = loss_of(self.model), run.rules
        self.approx = aop.approximate(self.loss_fn, self.rules)
        optimizers = {
            "SGD": optax.sgd(options.learning_rate), "Adam": optax.adam(options.adam_rate)
        }  # fmt: skip
        self.optimizer = optax.chain(aop.carry_memory({}), optimizers[run.optimizer])

    def init(self, key):
        variables = self.model.init(key, self.batch[0])
        return first_state(self.approx, self.optimizer, variables, *self.batch)

    def step(self, state, batch, key):
        return train_step(self.approx, self.optimizer, state, key, *batch)

    def epoch(self, state, key):
        """One pass over the reshuffled training set."""
        batches = shuffled_batches(key, len(self.digits.train_x), self.batch_size)

        def body(state, inputs):
            indices, key = inputs
            batch = self.digits.train_x[indices], self.digits.train_y[indices]
            return self.step(state, batch, key)

        keys = jax.random.split(key, len(batches))
        state, losses = jax.lax.scan(body, state, (batches, keys))
        return state, losses.mean()

    def accuracy(self, state):
        variables, _ = state
        logits = self.model.apply(variables, self.digits.validation_x)
        return jnp.mean(logits.argmax(axis=1) == self.digits.validation_y)

    def step_flops(self):
        """FLOPs of one training step of one seed, as XLA counts them; the mean over the steps."""
        state = jax.eval_shape(self.init, jax.random.key(0))
        flops = compiled_flops(jax.jit(self.step), state, self.batch, jax.random.key(0))
        return flops - skipped_refresh_flops(self.loss_fn, self.rules, state[0], *self.batch)


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


# ---- the time of a step


class Sizes(NamedTuple):
    """A network, `features-hidden-...-10`, and the rows of its batch."""

    features: int
    hidden: tuple[int, ...]
    rows: int

    def __str__(self) -> str:
        return f"{'-'.join(map(str, (self.features, *self.hidden, CLASSES)))}, {self.rows} rows"


WIDE = Sizes(1024, (1024, 1024), 4096)
ROUNDS = 3  # of timing
PAYS = 0.97  # of an exact step's time, or less


def step_milliseconds(sizes: Sizes, runs_of_adam: list[Run]) -> list[float]:
    """Milliseconds of a step of each run, in turn: medians."""
    model = Classifier(sizes.hidden)
    x = jax.random.normal(jax.random.key(0), (sizes.rows, sizes.features))
    batch = x, jnp.arange(sizes.rows) % CLASSES
    variables = jax.jit(model.init)(jax.random.key(1), x)
    steps = {}
    for run in runs_of_adam:
        approx = aop.approximate(loss_of(model), run.rules)
        calls = run.config.refresh if run.config else 1
        steps[run] = timing.training_step(approx, variables, batch, calls)
    functions, _ = timing.compile_all(steps)
    seconds = timing.interleaved_seconds(functions, ROUNDS, tqdm(disable=True))
    return [float(np.median(seconds[run])) * 1e3 for run in runs_of_adam]


def verdict(milliseconds: dict[Sizes, list[float]]) -> str:
    """Whether the last configuration pays in the small network and in the wide one."""
    small, wide = (ms[-1] / ms[0] for ms in milliseconds.values())
    lines = [
        f"On this {jax.default_backend()} ({os.cpu_count()} cores) a step with the subspace takes",
        f"{small:.2f} times as long as an exact one in the small network, {wide:.2f} times in the "
        "wide one.",
    ]
    if small > PAYS:
        lines += ["In the small one it does not pay: choosing rows costs more than it saves."]
    else:
        lines += ["In the small one it pays."]
    lines += [
        "In the wide one it pays." if wide <= PAYS else "Nor in the wide one, on this device."
    ]
    return "\n".join([*lines, "For your own model and batch, ask aop.advise."])


# ---- the report


def figures(result: Result, exact: Result) -> tuple[str, str, str]:
    """Final loss, accuracy and FLOPs, the latter also relative to those of the exact run."""
    losses, accuracy, flops = result
    return (
        f"{losses[-1].mean():.4f} ± {losses[-1].std():.4f}",
        f"{accuracy.mean():.4f} ± {accuracy.std():.4f}",
        f"{flops / 1e6:.2f} M ({flops / exact.flops:.2f})",
    )


def sgd_table(results: dict[Run, Result]) -> str:
    row = "{:10s} {:7s} {:7s} {:>16s} {:>18s} {:>17s}"
    header = ("policy", "memory", "K/M", "train loss", "validation acc.", "FLOPs per step")
    lines = [row.format(*header)]
    for run, result in results.items():
        if run.optimizer == "SGD":
            lines.append(row.format(*run.columns, *figures(result, results[Run()])))
    return "\n".join(lines)


def adam_table(results: dict[Run, Result], milliseconds: dict[Sizes, list[float]]) -> str:
    """With milliseconds of a step of the small network and of the wide one, in the runs' order."""
    row = "{:18s} {:>16s} {:>18s} {:>17s} {:>9s} {:>9s}"
    header = ("", "train loss", "validation acc.", "FLOPs per step", "ms small", "ms wide")
    lines = [row.format(*header)]
    runs_of_adam = [run for run in results if run.optimizer == "Adam"]
    for run, *ms in zip(runs_of_adam, *milliseconds.values(), strict=True):
        name = f"{run.config.policy}, {run.config.memory}" if run.config else "exact"
        cells = figures(results[run], results[runs_of_adam[0]])
        lines.append(row.format(name, *cells, *(f"{figure:.3g}" for figure in ms)))
    small, wide = milliseconds
    return "\n".join([*lines, "", f"Small: {small}. Wide: {wide}."])


def plot(results: dict[Run, Result], ratios: list[float], path: pathlib.Path) -> None:
    """With SGD a panel for each ratio, dashed without memory; then Adam; bands are one sd."""
    size = (4.6 * (len(ratios) + 1), 4.2)
    figure, panels = plt.subplots(1, len(ratios) + 1, figsize=size, sharey=True)
    shown = [*(("SGD", ratio) for ratio in ratios), ("Adam", ratios[0])]
    for panel, (optimizer, ratio) in zip(panels, shown, strict=True):
        for run, result in results.items():
            config = run.config
            if run.optimizer != optimizer or (config and config.ratio != ratio):
                continue
            color = "black" if config is None else f"C{COLORS.index(config.policy)}"
            style = "-" if config is None or config.memory else "--"
            name = f"{config.policy}, {config.memory or 'no memory'}" if config else "exact"
            epochs = np.arange(1, len(result.losses) + 1)
            mean, sd = result.losses.mean(axis=1), result.losses.std(axis=1)
            panel.plot(epochs, mean, style, color=color, label=name)
            panel.fill_between(epochs, mean - sd, mean + sd, color=color, alpha=0.15, lw=0)
        panel.set(title=f"{optimizer}, K/M = {ratio:g}", xlabel="epoch", yscale="log")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("train loss")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ---- the command


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--ratio", type=runs.share, nargs="+", default=[0.25, 0.125], metavar="R",
        help="share K/M of the outer products, in (0, 1]; Adam has the first",
    )  # fmt: skip
    parser.add_argument("--seeds", type=runs.count, default=5, help="of each run")
    parser.add_argument(
        "--epochs", type=runs.count, default=30, help="passes over the training set"
    )
    parser.add_argument("--batch-size", type=runs.count, default=128, help="rows of a batch (M)")
    parser.add_argument("--learning-rate", type=runs.rate, default=0.05, help="of plain SGD")
    parser.add_argument("--adam-rate", type=runs.rate, default=0.001, help="of Adam")
    parser.add_argument(
        "--hidden", type=runs.count, nargs="*", default=[128], metavar="N", help="layers' widths"
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
    paper = [
        Run("SGD", aop.MemAOP(ratio=ratio, policy=policy, memory=memory))
        for ratio, policy, memory in itertools.product(options.ratio, POLICIES, ("rows", None))
    ]
    ratio = options.ratio[0]
    rows = aop.MemAOP(ratio=ratio, policy="topk", memory="rows")
    subspace = aop.MemAOP(ratio=ratio, policy="priority", memory="subspace", rank=8, refresh=8)
    adam = [Run("Adam", config) for config in (None, rows, subspace)]
    wanted = [Run(), *paper, *adam]
    results = {}
    with tqdm(total=len(wanted) * options.epochs, unit="epoch") as progress:
        for run in wanted:
            progress.set_description(" ".join(filter(None, (run.optimizer, *run.columns))))
            results[run] = train(Trainer(run, digits, options), options, progress)
        progress.set_description("timing steps")
        small = Sizes(digits.train_x.shape[1], tuple(options.hidden), options.batch_size)
        milliseconds = {sizes: step_milliseconds(sizes, adam) for sizes in (small, WIDE)}
    print(
        f"\n{len(digits.train_x)} digits, batch {options.batch_size}, {options.epochs} epochs, "
        f"{options.seeds} seeds (mean ± standard deviation)\n\n"
        f"SGD {options.learning_rate:g}: the paper's policies, with and without a memory of rows\n"
    )
    print(sgd_table(results))
    print(
        f"\nAdam {options.adam_rate:g}, K/M = {ratio:g}: the paper's memory of rows, and the "
        "subspace, the configuration to begin with\n"
    )
    print(adam_table(results, milliseconds))
    print(f"\n{verdict(milliseconds)}")
    plot(results, options.ratio, options.out)
    print(f"\nLoss curves: {options.out}")


if __name__ == "__main__":
    main()
