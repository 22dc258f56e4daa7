"""Train a deep MLP on images, exactly and with cheaper weight gradients, with three optimizers.

The model (784-512-512-10) is stock Flax Linen; `aop.linen.wrap` makes all its dense layers
approximate. Each --run is one way to compute the weight gradients:

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

import mem_aop_jax as aop

try:
    import paper_data
    import runs
    from reproduce_paper import Results, hits, load, pixels_to_inputs
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(
        f"{error}. Install the examples' packages: pip install '.[examples]'"
    ) from None

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


def wrapped_mlp(config: aop.MemAOP | None) -> nn.Module:
    return aop.linen.wrap(MLP(), config) if config else MLP()


@functools.partial(jax.jit, static_argnums=1)
def first_params(key, pixels: int):
    return MLP().init(key, jnp.zeros((1, pixels), jnp.float32))["params"]


@jax.jit
def evaluate(params, data: paper_data.Data):
    """Loss of all training images, and accuracy on the test images."""

    def mean(metric, pixels, labels):
        def image_metric(image):
            pixels, label = image
            return metric(MLP().apply({"params": params}, pixels_to_inputs(pixels)), label)

        return jax.lax.map(image_metric, (pixels, labels), batch_size=EVALUATED_TOGETHER).mean()

    loss = mean(cross_entropy, data.train_x, data.train_y)
    return loss, mean(hits, data.validation_x, data.validation_y)


# ---- training


class Trainer:
    """Training with one configuration and optimizer, for any seed."""

    def __init__(self, config: aop.MemAOP | None, optimizer: str, batch: int, pixels: int):
        self.model, self.batch, self.pixels = wrapped_mlp(config), batch, pixels
        example = jnp.zeros((batch, pixels), jnp.float32)
        variables = jax.eval_shape(self.model.init, jax.random.key(0), example)
        memory = variables.get(aop.linen.COLLECTION, {})  # empty if the run has none
        self.optimizer = optax.chain(aop.carry_memory(memory), OPTIMIZERS[optimizer]())
        self.epoch = jax.jit(self._epoch, donate_argnums=0)

    def step(self, data, state, batch):
        """One update; `batch` has the indices of its images and a key."""
        params, opt_state = state
        indices, key = batch
        x, y = pixels_to_inputs(data.train_x[indices]), data.train_y[indices]

        def loss_fn(params, memory):
            variables = {"params": params, aop.linen.COLLECTION: memory}
            logits = self.model.apply(variables, x, rngs={aop.linen.RNG: key})
            return cross_entropy(logits, y).mean()

        grads, memory = jax.grad(loss_fn, argnums=(0, 1))(params, aop.get_memory(opt_state))
        updates, opt_state = self.optimizer.update(grads, opt_state, params, memory=memory)
        return (optax.apply_updates(params, updates), opt_state), None

    def _epoch(self, state, data, order_key, policy_key):
        """One pass over the reshuffled training images; the last, partial batch is dropped."""
        images = len(data.train_x)
        batches = images // self.batch
        order = jax.random.permutation(order_key, images)[: batches * self.batch]
        order = order.reshape(batches, self.batch)
        keys = jax.random.split(policy_key, batches)
        return jax.lax.scan(functools.partial(self.step, data), state, (order, keys))[0]

    def train(self, seed: int, data, epochs: int, progress: tqdm) -> tuple[float, float]:
        """Train loss and test accuracy after the last epoch."""
        init_key, order_key, policy_key = jax.random.split(jax.random.key(seed), 3)
        params = first_params(init_key, self.pixels)
        state = params, self.optimizer.init(params)
        for i in range(epochs):
            keys = (jax.random.fold_in(key, i) for key in (order_key, policy_key))
            state = jax.block_until_ready(self.epoch(state, data, *keys))
            progress.update()
        return tuple(map(float, evaluate(state[0], data)))


def train_all(options: argparse.Namespace, data: paper_data.Data) -> dict[str, dict]:
    """Trains the seeds that `results.json` lacks; returns an entry for each run and optimizer."""
    results = Results(options.out / "results.json", options.dataset)
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
        new = settings | {"losses": [], "accuracies": [], "seconds": []}
        entries[name] = results.configurations[name] if results.has(name, settings) else new
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
    path = options.out / "results.md"
    path.write_text(text + "\n")
    return f"{text}\n\n{path}"


# ---- the command


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    for name, default, meaning in (
        ("seeds", 3, "of each run"),
        ("epochs", 3, "passes over the training images"),
        ("batch", 256, "images of a step"),
    ):
        parser.add_argument(
            f"--{name}", type=runs.count, default=default, help=f"{meaning} ({default})"
        )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("deep_mlp"), metavar="DIR",
        help="folder for results.json and the table (deep_mlp)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    wanted = options.run or map(runs.parse, DEFAULT_RUNS)
    options.run = list({run.name: run for run in wanted}.values())
    options.optimizer = list(dict.fromkeys(options.optimizer or OPTIMIZERS))
    for run in options.run:
        example = jnp.zeros((options.batch, 1), jnp.float32)  # only its rows count
        try:
            aop.linen.layers(wrapped_mlp(run.config), jax.random.key(0), example)
        except (TypeError, ValueError) as error:
            parser.error(f"argument --run: {run.name}: {error}")
    runs.make_out_folder(parser, options)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    print("\n" + report(options, train_all(options, load(options, options.batch))))


if __name__ == "__main__":
    main()
