"""Train a character transformer exactly and with cheaper weight gradients, at counted FLOPs.

The model is stock Flax Linen; `aop.linen.wrap` makes the dense layers of its blocks approximate.
The text is Python's own standard library, or --text FILE. Each --run is one way to train:

  exact                                  the reference, with --batch and --steps
  exact:flops=0.75                       as many steps as 0.75 of the reference's FLOPs pay for
  exact:batch=8,steps=500                other sizes; a fraction (batch=1/2) is of --batch, --steps
  topk:ratio=1/8,memory=rows,decay=0.5   a policy, and keywords of aop.MemAOP
  topk:ratio=1/8,memory=none,flops=1     as many steps as all of the reference's FLOPs pay for

All runs of a seed start from the same parameters and read the same windows of text in the same
order; the learning rate follows the same curve over each run. FLOPs are XLA's count for one
compiled training step, exact and approximate alike: with the embedding, the attention scores, the
selection and the optimizer; XLA counts nothing for calls into libraries, such as top_k on CPU.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import sysconfig
import time
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mem_aop_jax as aop
from mem_aop_jax.cost import flops_left_out

try:
    import language_report
    import runs
    from reproduce_paper import Results
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(
        f"{error}. Install the examples' packages: pip install '.[examples]'"
    ) from None

DEFAULT_RUNS = (
    "exact",
    "exact:flops=0.85",
    "exact:batch=1/2,flops=1",
    "topk:ratio=1/4",
    "priority:ratio=1/4",
    "priority:ratio=1/4,memory=subspace",
    "priority:ratio=1/4,memory=subspace,flops=1",
)
PRESETS = {  # all default runs in less than five minutes on two cores
    "small": {"width": 128, "layers": 2, "heads": 4, "sequence": 64, "batch": 16, "steps": 250}
}
EVALUATIONS = 10  # of a run, evenly spaced; the last is after the last step
WARM_UP = 0.1  # of the steps
CHARACTERS = "\t\n" + "".join(map(chr, range(32, 127)))
UNKNOWN = len(CHARACTERS)  # the token of all other characters
TEXT_LIMIT = 20_000_000  # characters
VALIDATION_SHARE = 0.05  # of the text, at its end
VALIDATION_BATCHES = (8, 16)  # so many, of so many windows


# ---- what is compared


class Run(NamedTuple):
    """One way to train.

    Attributes:
      name: as it was spelled.
      config: of the layers; None is exact.
      keywords: the configuration's, as they were spelled.
      batch: windows of a step: a count, or (a float) a share of --batch.
      steps: a count, or (a float) a share of --steps; None where `flops` decides.
      flops: those of the whole run, as a share of the reference's; None where `steps` decides.
    """

    name: str
    config: aop.MemAOP | None
    keywords: dict[str, Any]
    batch: int | float | None = None
    steps: int | float | None = None
    flops: int | float | None = None


def parse_run(text: str) -> Run:
    run = runs.parse(text, others=("batch", "steps", "flops"))
    for name, value in run.others.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise argparse.ArgumentTypeError(f"{text}: {name} must be a number above 0")
    if "steps" in run.others and "flops" in run.others:
        raise argparse.ArgumentTypeError(f"{text}: give steps or flops, not both")
    return Run(text, run.config, run.keywords, **run.others)


def resolved(run: Run, options: argparse.Namespace) -> Run:
    """The run with counts for shares, and with what --equal-flops says."""
    if options.equal_flops and run.config and run.steps is None and run.flops is None:
        run = run._replace(flops=1)
    sizes = {"batch": run.batch} | ({"steps": run.steps} if run.flops is None else {})
    for name, value in sizes.items():
        whole = getattr(options, name)
        count = whole if value is None else value * whole if isinstance(value, float) else value
        if abs(count - round(count)) > 1e-6:
            raise ValueError(f"{name} is {count:g}, no whole number, where --{name} is {whole}")
        sizes[name] = round(count)
    return run._replace(**sizes)


# ---- the text


class Text(NamedTuple):
    """Tokens: `train` (characters,) and `validation` (batches, windows, sequence + 1), uint8."""

    name: str
    train: np.ndarray
    validation: np.ndarray
    checksum: int


def standard_library(folder: pathlib.Path) -> str:
    """Python's own sources, without tests and installed packages."""
    paths = []
    for here, folders, files in os.walk(folder):
        folders[:] = set(folders) - {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        paths += [pathlib.Path(here, name) for name in files if name.endswith(".py")]
    return "".join(path.read_text(encoding="utf-8", errors="ignore") for path in sorted(paths))


def encode(text: str) -> np.ndarray:
    table = np.full(129, UNKNOWN, np.uint8)
    table[[ord(character) for character in CHARACTERS]] = np.arange(len(CHARACTERS))
    codes = np.frombuffer(text.encode("utf-32-le", errors="replace"), "<u4")
    return table[np.minimum(codes, 128)]


def load(options: argparse.Namespace) -> Text:
    path = options.text or pathlib.Path(sysconfig.get_paths()["stdlib"])
    try:
        if options.text:
            text = path.read_text(encoding="utf-8", errors="ignore")
        else:
            text = standard_library(path)
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror})") from None
    tokens = encode(text[:TEXT_LIMIT])
    window = options.sequence + 1
    split = len(tokens) - int(VALIDATION_SHARE * len(tokens))
    train, validation = tokens[:split], tokens[split:]
    if len(validation) < window:
        raise SystemExit(
            f"{path}: has {len(tokens)} characters; with --sequence {options.sequence} at least "
            f"{math.ceil(window / VALIDATION_SHARE)} are wanted. Give a longer --text FILE"
        )
    batches, windows = VALIDATION_BATCHES
    starts = np.linspace(0, len(validation) - window, batches * windows).astype(int)
    return Text(
        options.text.name if options.text else "standard library",
        train,
        validation[starts[:, None] + np.arange(window)].reshape(batches, windows, window),
        zlib.crc32(tokens),
    )


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
        x = nn.Embed(len(CHARACTERS) + 1, self.width, name="embedding")(tokens) + positions
        for i in range(self.layers):
            x = Block(self.heads, name=f"block_{i}")(x)
        return nn.Dense(len(CHARACTERS) + 1, name="head")(nn.LayerNorm()(x))


def loss_of(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


@functools.partial(jax.jit, static_argnums=0)
def validation_loss(model, params, batches):
    def loss(windows):
        windows = windows.astype(jnp.int32)
        return loss_of(model.apply({"params": params}, windows[:, :-1]), windows[:, 1:])

    return jax.lax.map(loss, batches).mean()


# ---- training


def evaluated_steps(steps: int) -> list[int]:
    return [round(steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)]


class Trainer:
    """Training with one configuration, batch size and number of steps, for any seed."""

    def __init__(self, config, batch: int, steps: int, options: argparse.Namespace):
        self.config, self.batch, self.steps = config, batch, steps
        self.sequence = options.sequence
        self.exact = Transformer(options.width, options.layers, options.heads)
        self.example = jnp.zeros((batch, options.sequence), jnp.int32)
        self.model = self.exact
        if config is not None:
            exact = ["head", *([options.layers_exact] if options.layers_exact else [])]
            rules = [*((pattern, None) for pattern in exact), (r".*", config)]
            self.model = aop.linen.wrap(self.exact, rules)
        warm_up = int(WARM_UP * steps)
        self.schedule = optax.warmup_cosine_decay_schedule(
            options.learning_rate / (warm_up + 1), options.learning_rate, warm_up, steps
        )
        self.init = jax.jit(self._init)
        self.advance = jax.jit(self._advance, donate_argnums=0)

    def layers(self):
        return aop.linen.layers(self.model, jax.random.key(0), self.example)

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

    def loss_fn(self, params, memory, windows, key):
        variables = {"params": params, aop.linen.COLLECTION: memory}
        logits = self.model.apply(variables, windows[:, :-1], rngs={aop.linen.RNG: key})
        return loss_of(logits, windows[:, 1:])

    def step(self, state, windows, key):
        params, opt_state = state
        memory = aop.get_memory(opt_state)
        grads, new_memory = jax.grad(self.loss_fn, argnums=(0, 1))(params, memory, windows, key)
        optimizer = self.optimizer(memory)
        updates, opt_state = optimizer.update(grads, opt_state, params, memory=new_memory)
        return optax.apply_updates(params, updates), opt_state

    def windows(self, tokens, key, i):
        """Those of step i. The n-th of a run is the same for every batch size."""

        def offset(n):
            return jax.random.randint(
                jax.random.fold_in(key, n), (), 0, len(tokens) - self.sequence
            )

        offsets = jax.vmap(offset)(i * self.batch + jnp.arange(self.batch))
        return tokens[offsets[:, None] + jnp.arange(self.sequence + 1)].astype(jnp.int32)

    def _advance(self, state, tokens, data_key, policy_key, start, stop):
        """The steps from `start` to `stop`."""

        def body(i, state):
            windows = self.windows(tokens, data_key, i)
            return self.step(state, windows, jax.random.fold_in(policy_key, i))

        return jax.lax.fori_loop(start, stop, body, state)

    def step_flops(self) -> float:
        """FLOPs of one training step, as XLA counts them; without the refreshes it leaves out."""
        key = jax.random.key(0)
        state = jax.eval_shape(self.init, key)
        windows = jnp.zeros((self.batch, self.sequence + 1), jnp.int32)
        counted = jax.jit(self.step).lower(state, windows, key).compile().cost_analysis()["flops"]
        if self.config is None:
            return counted
        return counted - sum(flops_left_out(self.config, *layer[1:4]) for layer in self.layers())

    def diagnose(self, state, windows, key) -> aop.Diagnostics:
        """Of the gradient estimates, on windows that were not trained on."""
        params, opt_state = state
        probes = aop.linen.probes(self.model, aop.get_memory(opt_state), key, self.example)
        return aop.diagnostics(self.loss_fn, params, probes, windows, key, count_flops=False)

    def train(
        self, seed: int, tokens, validation, progress: tqdm, diagnosed: Sequence[int] = ()
    ) -> tuple[list[float], float, dict[int, aop.Diagnostics]]:
        """Trains once.

        Returns:
          Validation losses at the evaluated steps; seconds of all steps, without compilation; and
          diagnostics at those of the evaluated steps that are in `diagnosed`.
        """
        init_key, *keys = jax.random.split(jax.random.key(seed), 3)
        state = self.init(init_key)
        state = jax.block_until_ready(self.advance(state, tokens, *keys, 0, 0))  # compiles
        losses, seconds, done, found = [], 0.0, 0, {}
        for step in evaluated_steps(self.steps):
            start = time.perf_counter()
            state = jax.block_until_ready(self.advance(state, tokens, *keys, done, step))
            seconds += time.perf_counter() - start
            losses.append(float(validation_loss(self.exact, state[0], validation)))
            if step in diagnosed:
                windows = self.windows(tokens, keys[0], step)
                found[step] = self.diagnose(state, windows, jax.random.fold_in(keys[1], step))
            done = step
            progress.update()
        return losses, seconds, found


def settings(run: Run, options: argparse.Namespace, text: Text) -> dict:
    """What a result depends on; a stopped run goes on only with results of the same."""
    names = ("width", "layers", "heads", "sequence", "learning_rate", "layers_exact")
    return {
        "policy": run.config.policy if run.config else "exact",
        "keywords": json.loads(json.dumps(run.keywords)),  # as results.json has them
        "batch": run.batch,
        "wanted_steps": run.steps,
        "wanted_flops": run.flops,
        "reference": [options.batch, options.steps],
        "diagnosed": options.diagnose and run.config is not None,
        "text": text.checksum,
        **{name: getattr(options, name) for name in names},
    }


def cost(run: Run, options: argparse.Namespace, step_flops) -> dict:
    """Steps and FLOPs of a run; `c` is the cost of its step in exact steps of the same batch."""
    own, reference = step_flops(run.config, run.batch), step_flops(None, options.batch)
    budget = options.steps * reference
    steps = run.steps or max(1, int(run.flops * budget / own + 1e-6))
    return {
        "steps": steps,
        "step_flops": own,
        "c": own / step_flops(None, run.batch),
        "of_reference": steps * own / budget,
        "flops": [step * own for step in evaluated_steps(steps)],
    }


def compare(options: argparse.Namespace, text: Text) -> dict[str, dict]:
    """Trains what `results.json` lacks; all runs that were asked for, by name."""
    results = Results(options.out / "results.json", text.name)
    wanted = {run.name: settings(run, options, text) for run in options.run}
    done = {
        name: len(results.configurations[name]["losses"]) if results.has(name, new) else 0
        for name, new in wanted.items()
    }
    step_flops = functools.cache(
        lambda config, batch: Trainer(config, batch, options.steps, options).step_flops()
    )
    tokens, validation = jnp.asarray(text.train), jnp.asarray(text.validation)
    with tqdm(total=len(wanted) * options.seeds * EVALUATIONS, unit="evaluation") as progress:
        for run in options.run:
            progress.set_description(run.name)
            progress.update(min(done[run.name], options.seeds) * EVALUATIONS)
            if done[run.name] >= options.seeds:
                continue
            entry = results.configurations.get(run.name) or {
                **wanted[run.name],
                **cost(run, options, step_flops),
                "losses": [],
                "seconds": [],
            }
            trainer = Trainer(run.config, run.batch, entry["steps"], options)
            for seed in range(done[run.name], options.seeds):
                diagnosed = evaluated_steps(entry["steps"])[:: EVALUATIONS - 1]
                if seed > 0 or not entry["diagnosed"]:
                    diagnosed = ()
                losses, seconds, found = trainer.train(
                    seed, tokens, validation, progress, diagnosed
                )
                for step, diagnostics in found.items():
                    of_model = {name: float(x) for name, x in diagnostics.model._asdict().items()}
                    entry.setdefault("diagnostics", {})[str(step)] = {
                        "rule": float(diagnostics.verdict()),
                        "table": str(diagnostics),
                        **of_model,
                    }
                entry["losses"].append(losses)
                entry["seconds"].append(round(seconds, 2))
                entry["mean"], entry["sd"] = runs.summary([x[-1] for x in entry["losses"]])
                results.add(run.name, entry)
    return {name: results.configurations[name] for name in wanted}


# ---- the command


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=parse_run, action="append", metavar="RUN",
        help=f"one way to train; may be repeated ({' '.join(DEFAULT_RUNS)})",
    )  # fmt: skip
    parser.add_argument(
        "--equal-flops", action="store_true",
        help="approximate runs without steps or flops of their own get flops=1",
    )  # fmt: skip
    parser.add_argument("--preset", choices=PRESETS, help="sizes for the options not given")
    for name, default, meaning in (
        ("width", 192, "of the model"),
        ("layers", 3, "blocks"),
        ("heads", 6, "of the attention"),
        ("sequence", 128, "characters of a window"),
        ("batch", 16, "windows of a step, of the reference"),
        ("steps", 250, "of the reference"),
        ("seeds", 1, "of each run"),
    ):
        parser.add_argument(
            f"--{name}", type=runs.count, default=default, help=f"{meaning} ({default})"
        )
    parser.add_argument(
        "--learning-rate", type=runs.rate, default=1e-3, help="of Adam, at its highest (0.001)"
    )
    parser.add_argument(
        "--layers-exact", metavar="REGEX",
        help="exact layers besides the head: their whole path, for instance block_0/.*",
    )  # fmt: skip
    parser.add_argument(
        "--diagnose", action="store_true",
        help="of the first seed of each approximate run, early and late: v, c, the batch's noise",
    )  # fmt: skip
    parser.add_argument(
        "--text", type=pathlib.Path, metavar="FILE",
        help=f"instead of the standard library; its first {TEXT_LIMIT:,} characters",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("language_model"), metavar="DIR",
        help="folder for results.json, the table and the figure (language_model)",
    )  # fmt: skip
    parser.set_defaults(**PRESETS.get(parser.parse_args(arguments).preset, {}))
    options = parser.parse_args(arguments)
    if options.width % options.heads:
        parser.error(f"--heads {options.heads}: do not divide --width {options.width}")
    wanted = options.run or map(parse_run, DEFAULT_RUNS)
    options.run = list({run.name: run for run in wanted}.values())
    options.approximate = []
    for i, run in enumerate(options.run):
        try:
            options.run[i] = run = resolved(run, options)
            layers = Trainer(run.config, run.batch, options.steps, options).layers()
        except (TypeError, ValueError) as error:
            parser.error(f"argument --run: {run.name}: {error}")
        names = [f"{x.path} ({x.in_features} to {x.out_features})" for x in layers]
        options.approximate = options.approximate or names
    runs.make_out(parser, options)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    text = load(options)
    results = {
        name: entry | {key: entry[key][: options.seeds] for key in ("losses", "seconds")}
        for name, entry in compare(options, text).items()
    }
    description = (
        f"{options.layers} blocks of width {options.width}, {options.heads} heads, sequences of "
        f"{options.sequence} characters; Adam {options.learning_rate:g}; {options.seeds} seed(s); "
        f"text: {text.name}, {len(text.train):,} characters to train on. Approximate: "
        f"{', '.join(options.approximate) or 'nothing'}."
    )
    print("\n" + language_report.write(results, options.out, description))


if __name__ == "__main__":
    main()
