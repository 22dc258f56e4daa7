"""Train a deep MLP on images, exactly and with cheaper weight gradients, with three optimizers.

The model (784-512-512-10) is stock Flax Linen; `aop.approximate` makes the gradients of all its
kernels approximate. Each --run is one way to compute them:

  exact                                        the reference
  topk:ratio=1/8,memory=rows                   a policy, and keywords of aop.MemAOP
  priority:ratio=1/8,memory=subspace,rank=16

All runs of a seed start from the same parameters and read the same batches in the same order. The
table shows the loss of all training images after the last epoch and the test accuracy, both by the
exact model. A command that was stopped goes on with the seed that it had reached.
"""

import argparse
import functools
import itertools
import pathlib
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import runs
from training import first_state, shuffled_batches, train_step

import mem_aop_jax as aop

with runs.needs_packages():
    import paper_data
    from tqdm import tqdm

DEFAULT_RUNS = (
    "exact",
    "topk:ratio=1/8,memory=none",
    "topk:ratio=1/8,memory=rows",  # the paper's
    "topk:ratio=1/8,memory=rows,decay=0.5",
    "randk:ratio=1/8,memory=rows",
    "topk:ratio=1/8,memory=rows,signed=true",
    "uniform:ratio=1/8",
    "crs:ratio=1/8",
    "priority:ratio=1/8",
    "priority:ratio=1/8,memory=subspace,rank=8",
    "priority:ratio=1/8,memory=subspace,rank=16",
    "priority:ratio=1/32,memory=subspace,rank=16",
)
OPTIMIZERS = {
    "sgd": functools.partial(optax.sgd, learning_rate=0.05),
    "momentum": functools.partial(optax.sgd, learning_rate=0.01, momentum=0.9),
    "adam": functools.partial(optax.adam, learning_rate=1e-3),
}
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
HIDDEN = (512, 512)
DIVERGED = 2.5  # a larger train loss is worse than guessing, whose loss is log 10 = 2.3
EVALUATED_TOGETHER = 1000  # images


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in HIDDEN:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(paper_data.CLASSES)(x)


def loss_fn(params, x, labels):
    return cross_entropy(MLP().apply({"params": params}, x), labels).mean()


@jax.jit
def first_params(key, x):
    return MLP().init(key, x)["params"]


@jax.jit
def evaluate(params, data: paper_data.Data):
    """Loss of all training images, and accuracy on the test images."""

    def measure(image):
        pixels, label = image
        logits = MLP().apply({"params": params}, paper_data.pixels_to_inputs(pixels))
        return cross_entropy(logits, label), logits.argmax() == label

    losses, _ = jax.lax.map(measure, data[:2], batch_size=EVALUATED_TOGETHER)
    _, hits = jax.lax.map(measure, data[2:], batch_size=EVALUATED_TOGETHER)
    return losses.mean(), hits.mean()


# ---- training


class Trainer:
    """Training with one configuration and optimizer, for any seed."""

    def __init__(self, config: aop.MemAOP | None, optimizer: str, batch: int, pixels: int):
        self.approx, self.batch = aop.approximate(loss_fn, config or ()), batch
        self.example = jnp.zeros((batch, pixels), jnp.float32), jnp.zeros(batch, jnp.int32)
        self.optimizer = optax.chain(aop.carry_memory({}), OPTIMIZERS[optimizer]())
        self.epoch = jax.jit(self._epoch, donate_argnums=0)

    def step(self, data, state, batch):
        """One update; `batch` has the indices of its images and a key."""
        indices, key = batch
        x, labels = paper_data.pixels_to_inputs(data.train_x[indices]), data.train_y[indices]
        return train_step(self.approx, self.optimizer, state, key, x, labels)

    def _epoch(self, state, data, order_key, policy_key):
        """One pass over the reshuffled training images."""
        batches = shuffled_batches(order_key, len(data.train_x), self.batch)
        keys = jax.random.split(policy_key, len(batches))
        return jax.lax.scan(functools.partial(self.step, data), state, (batches, keys))[0]

    def train(self, seed: int, data, epochs: int, progress: tqdm) -> tuple[float, float]:
        """Train loss and test accuracy after the last epoch."""
        init_key, order_key, policy_key = jax.random.split(jax.random.key(seed), 3)
        params = first_params(init_key, self.example[0])
        state = first_state(self.approx, self.optimizer, params, *self.example)
        for i in range(epochs):
            keys = (jax.random.fold_in(key, i) for key in (order_key, policy_key))
            state = jax.block_until_ready(self.epoch(state, data, *keys))
            progress.update()
        return tuple(map(float, evaluate(state[0], data)))


def train_all(options: argparse.Namespace, data: paper_data.Data) -> dict[str, dict]:
    """Trains the seeds that `results.json` lacks; returns an entry for each run and optimizer."""
    results = runs.Results(options.out / "results.json", options.dataset)
    wanted = {
        entry_name(run, optimizer): (run, optimizer)
        for run, optimizer in itertools.product(options.run, options.optimizer)
    }
    entries = {}
    for name, (_, optimizer) in wanted.items():
        settings = {
            "optimizer": OPTIMIZERS[optimizer].keywords,
            "batch": options.batch,
            "epochs": options.epochs,
            "data": data.checksum(),
        }
        entries[name] = results.entry(name, settings, ("losses", "accuracies", "seconds"))
    on_device = jax.tree.map(jnp.asarray, data)
    with tqdm(total=len(wanted) * options.seeds * options.epochs, unit="epoch") as progress:
        for name, (run, optimizer) in wanted.items():
            entry = entries[name]
            done = len(entry["losses"])
            progress.set_description(name)
            progress.update(min(done, options.seeds) * options.epochs)
            trainer = Trainer(run.config, optimizer, options.batch, data.train_x.shape[1])
            for seed in range(done, options.seeds):
                start = time.perf_counter()
                loss, accuracy = trainer.train(seed, on_device, options.epochs, progress)
                entry["losses"].append(loss)
                entry["accuracies"].append(accuracy)
                entry["seconds"].append(round(time.perf_counter() - start, 2))
                results.add(name, entry)
    return entries


# ---- the table


def entry_name(run: runs.Run, optimizer: str) -> str:
    return f"{run.name} {optimizer}"


def cell(losses: list[float], accuracies: list[float]) -> str:
    """Train loss / test accuracy of the seeds, or how many of them diverged."""
    diverged = sum(not loss <= DIVERGED for loss in losses)  # a NaN, too
    if diverged:
        some = f" ({diverged} of {len(losses)})" if diverged < len(losses) else ""
        return f"diverges{some}"
    return f"{runs.cell(losses)} / {runs.cell(accuracies)}"


def report(options: argparse.Namespace, entries: dict[str, dict]) -> str:
    """Writes `results.md`; returns its text and its path."""
    rows = []
    for run in options.run:
        cells = []
        for optimizer in options.optimizer:
            entry = entries[entry_name(run, optimizer)]
            cells.append(cell(*(entry[key][: options.seeds] for key in ("losses", "accuracies"))))
        rows.append((f"`{run.name}`", *cells))
    rates = ", ".join(
        f"{name} {OPTIMIZERS[name].keywords['learning_rate']:g}" for name in options.optimizer
    )
    table = runs.markdown(("run", *options.optimizer), rows)
    text = (
        f"{table}\n\nTrain loss / test accuracy on {options.dataset} after "
        f"{options.epochs} epoch(s) in batches of {options.batch}; {options.seeds} seed(s). "
        f"Learning rates: {rates}."
    )
    return runs.write_report(text, options.out / "results.md", {})


# ---- the command


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = runs.argument_parser(__doc__)
    parser.add_argument(
        "--run", type=runs.parse, action="append", metavar="RUN",
        help=f"one way to train; may be repeated ({' '.join(DEFAULT_RUNS)})",
    )  # fmt: skip
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, action="append", help="may be repeated (all)"
    )
    parser.add_argument(
        "--dataset", choices=paper_data.SOURCES, default="fashion-mnist", help="(fashion-mnist)"
    )
    parser.add_argument(
        "--data", type=pathlib.Path, metavar="DIR",
        help="the folder with the four IDX files (.gz or not); default: download",
    )  # fmt: skip
    counts = {
        "seeds": (3, "of each run"),
        "epochs": (3, "passes over the training images"),
        "batch": (256, "images of a step"),
    }
    runs.add_counts(parser, counts)
    runs.add_out_folder(parser, "deep_mlp", "results.json and the table")
    options = parser.parse_args(arguments)
    wanted = options.run or map(runs.parse, DEFAULT_RUNS)
    options.run = list({run.name: run for run in wanted}.values())
    options.optimizer = list(dict.fromkeys(options.optimizer or OPTIMIZERS))
    for run in options.run:
        try:
            if run.config:
                run.config.selected_rows(options.batch)
        except ValueError as error:
            parser.error(f"argument --run: {run.name}: {error}")
    runs.make_out_folder(parser, options)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    data = paper_data.load(options.dataset, options.data, options.batch)
    print("\n" + report(options, train_all(options, data)))


if __name__ == "__main__":
    main()
