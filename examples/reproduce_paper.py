"""Reproduce the experiments of arXiv 2110.09164, and compare with the published figures.

One dense layer is trained by plain SGD with three policies, with and without memory, at three sizes
of K, and with the exact gradient: 19 configurations a data set, ten runs each. The results are
DIR/results.json, a table, and the paper's figures. A command that was stopped goes on with the
configuration that it had reached.
"""

import argparse
import functools
import itertools
import math
import os
import pathlib
import time
import zlib
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import runs
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from training import first_state, shuffled_batches, train_step

import mem_aop_jax as aop

with runs.needs_packages():
    import paper_data
    import paper_report
    from tqdm import tqdm

POLICIES = ("randk", "weightedk", "topk")
CONTROL = "uniform"  # not in the paper: randk without memory, but unbiased


class Experiment(NamedTuple):
    """One of the paper's two experiments, with the paper's figures.

    Attributes:
      epochs: passes over the training set.
      rows: rows of a training batch (M); a last, partial batch is dropped.
      validation_rows: rows of a validation batch; a last, partial batch is dropped, too.
      ks: sizes of K.
      policies: the policies that are run by default.
      out_features: of the layer.
      prepare: a function from the stored inputs to the layer's inputs.
      losses: a function of outputs and targets, the loss of each row.
    """

    epochs: int
    rows: int
    validation_rows: int
    ks: tuple[int, ...]
    policies: tuple[str, ...]
    out_features: int
    prepare: Callable[[jax.Array], jax.Array]
    losses: Callable[[jax.Array, jax.Array], jax.Array]

    @property
    def classifies(self) -> bool:
        return self.out_features > 1


def squared_errors(outputs, targets):
    return jnp.square(outputs - targets).mean(axis=-1)


def double_softmax_cross_entropy(outputs, labels):
    """The paper's loss: the cross-entropy takes the result of a softmax for logits."""
    return optax.softmax_cross_entropy_with_integer_labels(jax.nn.softmax(outputs), labels)


LEARNING_RATE = 0.01
EXPERIMENTS = {
    "energy": Experiment(
        epochs=100,
        rows=144,
        validation_rows=192,
        ks=(18, 9, 3),
        policies=(*POLICIES, CONTROL),
        out_features=1,
        prepare=lambda x: x,
        losses=squared_errors,
    ),
    "mnist": Experiment(
        epochs=30,
        rows=64,
        validation_rows=64,
        ks=(32, 16, 8),
        policies=POLICIES,
        out_features=paper_data.CLASSES,
        prepare=paper_data.pixels_to_inputs,
        losses=double_softmax_cross_entropy,
    ),
}


class Configuration(NamedTuple):
    """A policy with or without memory at one K; the baseline (exact) has none of the three."""

    policy: str | None = None
    memory: bool | None = None
    k: int | None = None

    @property
    def name(self) -> str:
        if self.policy is None:
            return "baseline"
        return f"{self.policy}-{'mem' if self.memory else 'nomem'}-K{self.k}"

    @property
    def config(self) -> aop.MemAOP | None:
        if self.policy is None:
            return None
        return aop.MemAOP(k=self.k, policy=self.policy, memory="rows" if self.memory else None)


class Trainer:
    """Training of one configuration. A method is for one run; `vmap` makes it one for several."""

    def __init__(self, experiment: Experiment, config: aop.MemAOP | None, data: paper_data.Data):
        bound = 1 / math.sqrt(data.train_x.shape[1])

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        self.experiment = experiment
        self.layer = nn.Dense(experiment.out_features, kernel_init=uniform, bias_init=uniform)
        self.approx = aop.approximate(self.loss, config or ())
        self.example = self.batch(data, slice(experiment.rows))
        self.optimizer = aop.mem_aop_sgd(LEARNING_RATE, {})

    def batch(self, data, indices):
        return self.experiment.prepare(data.train_x[indices]), data.train_y[indices]

    def loss(self, params, x, y):
        """The loss, and the layer's outputs."""
        outputs = self.layer.apply({"params": params}, x)
        return self.experiment.losses(outputs, y).mean(), outputs

    def init(self, key):
        params = self.layer.init(key, self.example[0])["params"]
        return first_state(self.approx, self.optimizer, params, *self.example)

    def step(self, data, state, batch):
        """One update, with the loss and the number of hits before it.

        `batch` has the indices of its rows in the training set and a key.
        """
        indices, key = batch
        x, y = self.batch(data, indices)
        state, (loss, outputs) = train_step(
            self.approx, self.optimizer, state, key, x, y, has_aux=True
        )
        return state, (loss, hits(outputs, y).sum())

    def epoch(self, state, key, data):
        """One pass over the reshuffled training set, then the validation set."""
        rows = len(data.train_x)
        batches = shuffled_batches(key, rows, self.experiment.rows)
        inputs = batches, jax.random.split(key, len(batches))
        state, (losses, correct) = jax.lax.scan(functools.partial(self.step, data), state, inputs)

        params, _ = state
        y = data.validation_y
        outputs = self.layer.apply({"params": params}, self.experiment.prepare(data.validation_x))
        whole = len(y) // self.experiment.validation_rows * self.experiment.validation_rows
        metrics = {
            "loss": losses.mean(),
            "loss_val": self.experiment.losses(outputs, y)[:whole].mean(),
        }
        if self.experiment.classifies:
            hit = hits(outputs, y)
            metrics["acc"] = correct.sum() / rows
            metrics["acc_val"] = hit[:whole].sum() / len(y)
            metrics["learned"] = learned_classes(hit, y)
        return state, metrics


def hits(outputs, targets):
    """Which rows are classified right; none if the targets are no classes."""
    if targets.ndim > 1:
        return jnp.zeros(len(targets), bool)
    return outputs.argmax(axis=-1) == targets


def learned_classes(hit, labels):
    """How many classes have at least a tenth of their rows right."""
    members = labels == jnp.arange(paper_data.CLASSES)[:, None]
    return ((hit & members).sum(axis=1) >= 0.1 * members.sum(axis=1)).sum()


def train(trainer, data, key, options, progress):
    """Trains all runs together, spread over the devices; each metric is `(epochs, runs)`."""
    devices = math.gcd(options.runs, jax.local_device_count())
    mesh = jax.make_mesh(
        (devices,), ("runs",), axis_types=(AxisType.Auto,), devices=jax.local_devices()[:devices]
    )
    by_run, everywhere = PartitionSpec("runs"), PartitionSpec()
    epoch = jax.jit(
        jax.shard_map(
            jax.vmap(trainer.epoch, in_axes=(0, 0, None)),
            mesh=mesh,
            in_specs=(by_run, by_run, everywhere),
            out_specs=by_run,
        ),
        donate_argnums=0,
    )
    keys = jax.random.split(key, (options.epochs + 1, options.runs))
    state = jax.device_put(jax.vmap(trainer.init)(keys[0]), NamedSharding(mesh, by_run))
    history = []
    for epoch_keys in keys[1:]:
        state, metrics = epoch(state, epoch_keys, data)
        history.append(jax.device_get(metrics))
        progress.update()
    return jax.tree.map(lambda *epochs: np.stack(epochs), *history)


def settings(configuration, options, data):
    """Everything that a result depends on; a stopped run goes on only if it is the same."""
    experiment = EXPERIMENTS[options.experiment]
    return configuration._asdict() | {
        "rows": experiment.rows,
        "epochs": options.epochs,
        "learning_rate": LEARNING_RATE,
        "runs": options.runs,
        "seed": options.seed,
        "data": data.checksum(),
    }


def result(history):
    """For each metric its final epoch in all runs, and its mean in every epoch."""
    return {
        name: {
            "mean": float(values[-1].mean(dtype=float)),
            "std": float(values[-1].std(dtype=float, ddof=min(1, values.shape[1] - 1))),
            "runs": values[-1].tolist(),
            "epoch_mean": values.mean(axis=1, dtype=float).tolist(),
        }
        for name, values in history.items()
    }


def run(options: argparse.Namespace, data: paper_data.Data) -> dict[str, dict]:
    """Trains the configurations that `results.json` lacks; returns all entries by name."""
    experiment = EXPERIMENTS[options.experiment]
    variants = [
        Configuration(policy, memory, k)
        for k, policy in itertools.product(options.k, options.policies)
        for memory in ((False,) if policy == CONTROL else (True, False))
    ]
    wanted = {c: settings(c, options, data) for c in (Configuration(), *variants)}
    results = runs.Results(options.out / "results.json", options.dataset)
    missing = [c for c in wanted if not results.has(c.name, wanted[c])]
    on_device = jax.tree.map(jnp.asarray, data)
    with tqdm(total=len(wanted) * options.epochs, unit="epoch") as progress:
        progress.update((len(wanted) - len(missing)) * options.epochs)
        for configuration in missing:
            progress.set_description(configuration.name)
            start = time.perf_counter()
            trainer = Trainer(experiment, configuration.config, data)
            key = jax.random.fold_in(
                jax.random.key(options.seed), zlib.crc32(configuration.name.encode())
            )
            history = train(trainer, on_device, key, options, progress)
            seconds = round(time.perf_counter() - start, 2)
            entry = wanted[configuration] | {"seconds": seconds} | result(history)
            results.add(configuration.name, entry)
    return {c.name: results.configurations[c.name] for c in wanted}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = runs.argument_parser(__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument(
        "--dataset", choices=paper_data.SOURCES, help="images for the MNIST experiment"
    )
    parser.add_argument(
        "--data", type=pathlib.Path, metavar="PATH",
        help="the energy csv, or a folder with four IDX files (.gz or not); default: download",
    )  # fmt: skip
    parser.add_argument("--k", type=int, nargs="+", help="outer products of a batch (the paper's)")
    parser.add_argument(
        "--policies", nargs="+", choices=(*POLICIES, CONTROL),
        help=f"the paper's; {CONTROL} is randk without memory, rescaled by rows/K",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=10, help="of each configuration (10)")
    parser.add_argument("--epochs", type=int, help="passes over the training set (the paper's)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    runs.add_out_folder(parser, "reproduction", "results.json, tables and figures")
    options = parser.parse_args(arguments)
    experiment = EXPERIMENTS[options.experiment]
    if options.dataset and options.experiment != "mnist":
        parser.error("--dataset goes with mnist; energy is one data set")
    options.dataset = options.dataset or options.experiment
    options.k = list(dict.fromkeys(options.k or experiment.ks))
    options.policies = list(dict.fromkeys(options.policies or experiment.policies))
    options.epochs = experiment.epochs if options.epochs is None else options.epochs
    for k in options.k:
        if not 1 <= k <= experiment.rows:
            parser.error(f"--k {k}: must be between 1 and the {experiment.rows} rows of a batch")
    for name in ("runs", "epochs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: must be at least 1")
    runs.make_out_folder(parser, options)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    data = paper_data.load(options.dataset, options.data, EXPERIMENTS[options.experiment].rows)
    print("\n" + paper_report.write(options.dataset, run(options, data), options.out))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", os.cpu_count())  # a few runs a core
    main()
