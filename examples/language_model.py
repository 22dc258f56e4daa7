"""Train a character transformer exactly and with cheaper weight gradients, at counted FLOPs.

The model is stock Flax Linen; `aop.approximate` makes the gradients of its blocks' kernels
approximate. The text is Python's own standard library, or --text FILE. Each --run is one way to
train:

  exact                                  the reference, with --batch and --steps
  exact:flops=0.75                       as many steps as 0.75 of the reference's FLOPs pay for
  exact:batch=8,steps=500                other sizes; a fraction (batch=1/2) is of --batch, --steps
  topk:ratio=1/8,memory=rows,decay=0.5   a policy, and keywords of aop.MemAOP
  topk:ratio=1/8,memory=none,flops=1     as many steps as all of the reference's FLOPs pay for
  control:every=300,steps=1500           aop.Controller decides every 300 steps between exact
                                         training and the rules that aop.allocate finds; the FLOPs
                                         that both spend on measuring are counted, too
  control:inputs=true                    the controller may approximate gradients of inputs, too

All runs of a seed start from the same parameters and read the same windows of text in the same
order; the learning rate follows the same curve over each run. FLOPs are XLA's count for one
compiled training step, exact and approximate alike: with the embedding, the attention scores, the
selection and the optimizer; XLA counts nothing for calls into libraries, such as top_k on CPU.
"""

import argparse
import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import runs

with runs.needs_packages():
    import language_report
    import language_text
    from language_training import EVALUATIONS, Run, Trained, Trainer, evaluated_steps
    from tqdm import tqdm

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
EVERY = 300  # steps between two decisions of a controller; the first comes after a tenth of it


# ---- runs


def parse_run(text: str) -> Run:
    """The run that the text spells, for argparse."""
    controlled = text.partition(":")[0] == "control"
    sizes = ("every", "batch", "steps") if controlled else ("batch", "steps", "flops")
    others = (*sizes, "inputs") if controlled else sizes
    run = runs.parse(text, others, without=("exact", "control"))
    if not isinstance(run.others.get("inputs", False), bool):
        raise argparse.ArgumentTypeError(f"{text}: inputs must be true or false")
    for name in sizes:
        value = run.others.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise argparse.ArgumentTypeError(f"{text}: {name} must be a number above 0")
    if "steps" in run.others and "flops" in run.others:
        raise argparse.ArgumentTypeError(f"{text}: give steps or flops, not both")
    if isinstance(run.others.get("every"), float):
        raise argparse.ArgumentTypeError(f"{text}: every must be a whole number of steps")
    every = {"every": EVERY} if controlled else {}
    return Run(text, run.config, run.keywords, **(every | run.others))


def resolved(run: Run, options: argparse.Namespace) -> Run:
    """The run with counts in place of shares, and with flops=1 where --equal-flops asks for it."""
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


# ---- training


def settings(run: Run, options: argparse.Namespace, text: language_text.Text) -> dict:
    """Everything that a result depends on; a stopped run goes on only if it is the same."""
    names = ("width", "layers", "heads", "sequence", "learning_rate", "layers_exact")
    return {
        "policy": run.config.policy if run.config else "control" if run.every else "exact",
        "every": run.every,
        "inputs": run.inputs,
        "keywords": json.loads(json.dumps(run.keywords)),  # as JSON stores them
        "batch": run.batch,
        "wanted_steps": run.steps,
        "wanted_flops": run.flops,
        "reference": [options.batch, options.steps],
        "diagnosed": options.diagnose and bool(run.config or run.every),
        "start": [options.start, options.start_learning_rate] if options.start else None,
        "text": text.checksum,
        **{name: getattr(options, name) for name in names},
    }


def compare(options: argparse.Namespace, text: language_text.Text) -> dict[str, dict]:
    """Trains the seeds that `results.json` lacks; returns the entries of all runs by name."""
    results = runs.Results(options.out / "results.json", text.name)
    lists = "losses", "flops", "seconds", "decisions"
    entries = {
        run.name: results.entry(run.name, settings(run, options, text), lists)
        for run in options.run
    }

    def step_flops(config, batch):
        run = Run("", config, {}, batch=batch)
        trainer = Trainer(run, options.steps, options)
        return trainer.step_flops(trainer.rules)

    @functools.cache
    def start(seed):
        if not options.start:
            return None
        run = Run("exact", None, {}, batch=options.batch)
        trainer = Trainer(run, options.start, options, options.start_learning_rate)
        with tqdm(total=EVALUATIONS, unit="evaluation", desc=f"start of seed {seed}") as progress:
            return trainer.train(seed, tokens, validation, progress).params

    budget = options.steps * step_flops(None, options.batch)
    tokens, validation = jnp.asarray(text.train), jnp.asarray(text.validation)
    with tqdm(total=len(entries) * options.seeds * EVALUATIONS, unit="evaluation") as progress:
        for run in options.run:
            entry = entries[run.name]
            done = len(entry["losses"])
            progress.set_description(run.name)
            progress.update(min(done, options.seeds) * EVALUATIONS)
            if done >= options.seeds:
                continue
            steps = run.steps or max(
                1, int(run.flops * budget / step_flops(run.config, run.batch) + 1e-6)
            )
            entry["steps"] = steps
            trainer = Trainer(run, steps, options)
            for seed in range(done, options.seeds):
                diagnosed = evaluated_steps(steps)[:: EVALUATIONS - 1]
                if seed > 0 or not entry["diagnosed"]:
                    diagnosed = ()
                trained = trainer.train(
                    seed, tokens, validation, progress, diagnosed=diagnosed, params=start(seed)
                )
                record(entry, trained)
                entry["step_flops"] = np.mean(entry["flops"], axis=0)[-1] / steps
                entry["c"] = entry["step_flops"] / step_flops(None, run.batch)
                entry["of_reference"] = steps * entry["step_flops"] / budget
                results.add(run.name, entry)
    return entries


def record(entry: dict, trained: Trained) -> None:
    """Adds the results of one seed to the run's entry."""
    for step, diagnostics in trained.diagnostics.items():
        entry.setdefault("diagnostics", {})[str(step)] = {
            "rule": float(diagnostics.verdict()),
            "table": str(diagnostics),
            **{name: float(x) for name, x in diagnostics.model._asdict().items()},
        }
    if trained.controller:
        entry["decisions"].append([decision._asdict() for decision in trained.controller.log])
        entry.setdefault("controller", str(trained.controller))  # of the first seed
    entry["losses"].append(trained.losses)
    entry["flops"].append(trained.flops)
    entry["seconds"].append([round(seconds, 2) for seconds in trained.seconds])
    entry["mean"], entry["sd"] = runs.mean_and_sd([losses[-1] for losses in entry["losses"]])


# ---- the command


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = runs.argument_parser(__doc__)
    parser.add_argument(
        "--run", type=parse_run, action="append", metavar="RUN",
        help=f"one way to train; may be repeated ({' '.join(DEFAULT_RUNS)})",
    )  # fmt: skip
    parser.add_argument(
        "--equal-flops", action="store_true",
        help="approximate runs without steps or flops of their own get flops=1",
    )  # fmt: skip
    parser.add_argument("--preset", choices=PRESETS, help="sizes for the options not given")
    counts = {
        "width": (192, "of the model"),
        "layers": (3, "blocks"),
        "heads": (6, "of the attention"),
        "sequence": (128, "characters of a window"),
        "batch": (16, "windows of a step, of the reference"),
        "steps": (250, "of the reference"),
        "seeds": (1, "of each run"),
    }
    runs.add_counts(parser, counts)
    parser.add_argument(
        "--learning-rate", type=runs.rate, default=1e-3, help="of Adam, at its highest (0.001)"
    )
    parser.add_argument(
        "--start", type=runs.count, metavar="STEPS",
        help="so many exact steps with --batch come first and are not counted: the runs fine-tune",
    )  # fmt: skip
    parser.add_argument(
        "--start-learning-rate", type=runs.rate, default=1e-3, help="of these steps (0.001)"
    )
    parser.add_argument(
        "--layers-exact", metavar="REGEX",
        help="exact kernels besides the head's, by their whole path: for instance block_0/.*",
    )  # fmt: skip
    parser.add_argument(
        "--diagnose", action="store_true",
        help="measure v, c and noise of approximate runs, early and late in their first seed",
    )  # fmt: skip
    parser.add_argument(
        "--loss", type=runs.rate,
        help="show the seconds and FLOPs after which each run's validation loss was so low",
    )  # fmt: skip
    parser.add_argument(
        "--text", type=pathlib.Path, metavar="FILE",
        help=f"instead of the standard library; its first {language_text.TEXT_LIMIT:,} characters",
    )  # fmt: skip
    runs.add_out_folder(parser, "language_model", "results.json, the table and the figure")
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
            if run.config:
                run.config.selected_rows(run.batch * options.sequence)
            layers = Trainer(run, options.steps, options).layers()
        except (TypeError, ValueError) as error:
            parser.error(f"argument --run: {run.name}: {error}")
        names = [f"{x.path} ({x.in_features} to {x.out_features})" for x in layers]
        options.approximate = options.approximate or names
    runs.make_out_folder(parser, options)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    text = language_text.load(options)
    results = {
        name: entry | {key: entry[key][: options.seeds] for key in ("losses", "flops", "seconds")}
        for name, entry in compare(options, text).items()
    }
    description = (
        f"{options.layers} blocks of width {options.width}, {options.heads} heads, sequences of "
        f"{options.sequence} characters; Adam {options.learning_rate:g}; {options.seeds} seed(s); "
        f"text: {text.name}, {len(text.train):,} characters to train on. Approximate: "
        f"{', '.join(options.approximate) or 'nothing'}."
    )
    print("\n" + language_report.write(results, options.out, description, options.loss))


if __name__ == "__main__":
    main()
