"""Train a model in several ways, exactly and with cheaper gradients, at counted FLOPs.

The first word is the task: a model as its framework writes it, data and a loss, a file in
examples/tasks; `compare.py TASK --help` shows its sizes. `aop.approximate` makes the gradients of
its kernels approximate, but for the last layer's. Each --run is one way to train:

  exact:batch=1/2                        exact training with half of --batch, for as many FLOPs as
                                         the reference, --steps steps with --batch; --batches says
                                         which are always there
  priority:ratio=1/8,memory=subspace     a policy, and keywords of aop.MemAOP
  control:every=300                      aop.Controller decides every 300 steps between exact
                                         training and the rules that aop.allocate finds; the FLOPs
                                         that both spend on measuring are counted, too. Keywords of
                                         aop.MemAOP say what it may find (input_rank=32 also
                                         gradients of inputs, memory=none no subspace)
  winners:ratio=1/4                      an estimate of others, as rivals.py lists them

and each takes

  batch=1/2 (or 8)                       examples of a step; a fraction is of --batch
  flops=0.75                             as many steps as 0.75 of the reference's FLOPs pay for; 1
                                         where nothing is said
  bytes=1                                the same for bytes, as XLA counts what a step accesses
  steps=1/2 (or 500)                     so many steps; a fraction is of --steps

All runs of a seed start from the same parameters and read the same examples in the same order; the
learning rate follows the same curve over each run. FLOPs are XLA's count for one compiled training
step, exact and approximate alike: with the embedding, the attention scores, the selection and the
optimizer; XLA counts nothing for calls into libraries, such as top_k on CPU. A command that was
stopped goes on with the seed that it had reached.
"""

import argparse
import fractions
import functools
import importlib
import json
import pathlib
import sys
from types import ModuleType

import numpy as np
import runs

with runs.needs_packages():
    import compare_report
    import jax
    import rivals
    import tasks
    from compare_training import ALLOCATED, EVALUATIONS, Cost, Run, Trained, Trainer
    from tqdm import tqdm

import mem_aop_jax as aop

TASKS = "transformer", "vit", "experts", "gpt2", "mlp"
BATCHES = 1.0, 0.5, 0.25
DEFAULT_RUNS = (
    "priority:ratio=1/4",
    "priority:ratio=1/4,memory=subspace",
    "priority:ratio=1/4,memory=subspace,refresh=8,rank=24x8",
)
ESTIMATES = (  # this library's, and those of others
    "control:{batch},every={every}",
    "priority:ratio=1/4,memory=subspace,rank=24x8,refresh=8,{batch}",
    "priority:ratio=1/8,memory=subspace,refresh=8,{batch}",
    "control:{batch},every={every},memory=none",
    "winners:ratio=1/4,{batch}",
    "winners:ratio=1/4,memory=last_norms,{batch}",
    "nothing:k=1,memory=subspace,rank=32,refresh=8,{batch}",
    "nothing:k=1,memory=features,rank=32x32,{batch}",
)
EVERY = 300  # steps between two decisions of a controller; the first comes after a tenth of it
SIZES = "batch", "steps", "flops", "bytes"


# ---- runs


def parse_run(text: str) -> Run:
    """The run that the text spells, for argparse."""
    others, without, policies, defaults = SIZES, ("exact",), dict(rivals.POLICIES), {}
    if text.partition(":")[0] == "control":
        others, policies = ("every", *SIZES), {"control": ALLOCATED.policy}
        names = ("ratio",) if "memory=none" in text.lower() else ("ratio", "memory", "refresh")
        defaults = {name: getattr(ALLOCATED, name) for name in names}
    elif text.partition(":")[0] in policies:
        defaults = {"memory": None}
    run = runs.parse(text, others, without, policies, defaults)
    for name in run.others:
        value = run.others[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise argparse.ArgumentTypeError(f"{text}: {name} must be a number above 0")
    if isinstance(run.others.get("every"), float):
        raise argparse.ArgumentTypeError(f"{text}: every must be a whole number of steps")
    lengths = [name for name in SIZES[1:] if name in run.others]
    if len(lengths) > 1:
        raise argparse.ArgumentTypeError(f"{text}: give {' or '.join(lengths)}, not both")
    if "every" in others:
        if lengths not in ([], ["flops"]):
            raise argparse.ArgumentTypeError(f"{text}: control takes flops, not {lengths[0]}")
        run.others.setdefault("every", EVERY)
    length = {} if lengths else {"flops": 1}
    return Run(text, run.config, run.keywords, **(length | run.others))


def estimates(options: argparse.Namespace) -> list[Run]:
    """The runs of --estimates."""
    if options.estimates is None:
        return []
    spelled = {"batch": f"batch={fraction(options.estimates)}", "every": options.every}
    return [parse_run(run.format(**spelled)) for run in ESTIMATES]


def fraction(share: float) -> str:
    """As in 1/4, or 1."""
    return str(fractions.Fraction(share).limit_denominator(1000))


def resolved(run: Run, options: argparse.Namespace) -> Run:
    """The run with counts of examples and steps in place of shares."""
    sizes = {"batch": run.batch} | ({} if run.steps is None else {"steps": run.steps})
    for name, value in sizes.items():
        whole = getattr(options, name)
        count = whole if value is None else value * whole if isinstance(value, float) else value
        if abs(count - round(count)) > 1e-6:
            raise ValueError(f"{name} is {count:g}, no whole number, where --{name} is {whole}")
        sizes[name] = round(count)
    return run._replace(**sizes)


# ---- training


class Comparison:
    """A task and its runs, and the results that were there already."""

    def __init__(self, options: argparse.Namespace, task: tasks.Task):
        self.options, self.task, self.starts = options, task, {}
        path, name = options.out / "results.json", f"{options.task}, {task.data}"
        self.results = runs.Results(path, name)

    @functools.cached_property
    def reference(self) -> Cost:
        """FLOPs and bytes of the exact run with --batch and --steps."""
        run = Run("exact", None, {}, batch=self.options.batch, steps=self.options.steps)
        one = Trainer(self.task, run, self.options.learning_rate, Cost(0, 0)).step_cost(())
        return Cost(*(run.steps * count for count in one))

    def trainer(self, run: Run, rate: float | None = None) -> Trainer:
        options = self.options
        rate = options.learning_rate if rate is None else rate
        return Trainer(self.task, run, rate, self.reference, options.layers_exact)

    def approximate(self) -> list[str]:
        """The layers that any run approximates, with their sizes."""
        layers = (layer for run in self.options.run for layer in self.trainer(run).layers())
        names = (f"{x.path} ({x.in_features} to {x.out_features})" for x in layers)
        return list(dict.fromkeys(names))

    def settings(self, run: Run) -> dict:
        """Everything that a result depends on; a stopped run goes on only if it is the same."""
        options = self.options
        names = *options.sizes, "learning_rate", "layers_exact"
        return {
            "policy": run.name.partition(":")[0],
            "keywords": json.loads(json.dumps(run.keywords)),  # as JSON stores them
            "every": run.every,
            "batch": run.batch,
            "wanted": {name: getattr(run, name) for name in SIZES[1:]},
            "reference": [options.batch, options.steps],
            "diagnosed": options.diagnose and run.config is not None,
            "start": [options.start, options.start_learning_rate] if options.start else None,
            "data": self.task.checksum,
            **{name: getattr(options, name) for name in names},
        }

    def start(self, seed: int):
        """The parameters that the runs of a seed start from; None initialises them."""
        options = self.options
        if not options.start or seed in self.starts:
            return self.starts.get(seed)
        run = Run("exact", None, {}, batch=options.batch, steps=options.start)
        trainer = self.trainer(run, options.start_learning_rate)
        with tqdm(total=EVALUATIONS, unit="evaluation", desc=f"start of seed {seed}") as progress:
            self.starts[seed] = trainer.train(seed, progress).params
        return self.starts[seed]

    def train(self) -> dict[str, dict]:
        """Trains the seeds that `results.json` lacks; returns the entries of all runs by name."""
        wanted, seeds = self.options.run, self.options.seeds
        lists = "losses", "flops", "seconds", "steps", "decisions"
        entries = {
            run.name: self.results.entry(run.name, self.settings(run), lists) for run in wanted
        }
        with tqdm(total=len(entries) * seeds * EVALUATIONS, unit="evaluation") as progress:
            for run in wanted:
                entry = entries[run.name]
                done = len(entry["losses"])
                progress.set_description(run.name)
                progress.update(min(done, seeds) * EVALUATIONS)
                trainer = self.trainer(run)
                for seed in range(done, seeds):
                    diagnose = entry["diagnosed"] and seed == 0
                    trained = trainer.train(
                        seed, progress, diagnose=diagnose, params=self.start(seed)
                    )
                    record(entry, trained)
                    self.add_costs(entry, trainer)
                    self.results.add(run.name, entry)
        return entries

    def add_costs(self, entry: dict, trainer: Trainer) -> None:
        """Adds what a step costs to the run's entry, and what the run does."""
        flops, steps = np.mean(entry["flops"], axis=0)[-1], np.mean(entry["steps"])
        entry["step_flops"] = flops / steps
        entry["c"] = entry["step_flops"] / trainer.step_cost(()).flops
        entry["of_reference"] = flops / self.reference.flops
        if not trainer.run.every:  # a controller's measurements are counted in FLOPs alone
            step_bytes = trainer.step_cost(trainer.rules).bytes
            entry["of_bytes"] = steps * step_bytes / self.reference.bytes


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
    entry["steps"].append(trained.steps)


def advise(comparison: Comparison) -> str:
    """What `aop.advise` says of the first default run with each of --batches, before training."""
    found = []
    config = runs.parse(DEFAULT_RUNS[-1]).config
    for run in comparison.options.run:
        if run.config is not None:
            continue
        trainer = comparison.trainer(run._replace(config=config))
        params = jax.jit(comparison.task.init)(jax.random.key(0))
        keys = jax.random.split(jax.random.key(1))
        batches = [(trainer.draw(comparison.task.train, keys[0], i),) for i in range(3)]
        approx = trainer.approximate(trainer.allocated)
        found.append(f"batch {run.batch}:\n{aop.advise(approx, params, batches, keys[1])}")
    return "\n\n".join(found)


# ---- the command


def add_options(parser: argparse.ArgumentParser, task: ModuleType) -> None:
    """Adds the options of all tasks, and those of this one."""
    parser.add_argument(
        "--run", type=parse_run, action="append", metavar="RUN",
        help=f"one way to train; may be repeated ({' '.join(DEFAULT_RUNS)})",
    )  # fmt: skip
    parser.add_argument(
        "--batches", type=runs.share, nargs="+", default=BATCHES, metavar="SHARE",
        help="of --batch: exact training is compared with so large batches "
        f"({' '.join(f'{share:g}' for share in BATCHES)})",
    )  # fmt: skip
    parser.add_argument(
        "--estimates", type=runs.share, metavar="SHARE",
        help="a controller, two settings of this library and the estimates of others (rivals.py) "
        "run, too, with this share of --batch",
    )  # fmt: skip
    parser.add_argument(
        "--every", type=runs.count, default=EVERY,
        help=f"steps between two decisions of the controllers of --estimates ({EVERY})",
    )  # fmt: skip
    parser.add_argument("--preset", choices=task.PRESETS, help="sizes for the options not given")
    runs.add_counts(parser, task.OPTIONS | {"seeds": (1, "of each run")})
    rate = task.LEARNING_RATE
    parser.add_argument(
        "--learning-rate", type=runs.rate, default=rate, help=f"of Adam, at its highest ({rate:g})"
    )
    parser.add_argument(
        "--start", type=runs.count, metavar="STEPS",
        help="so many exact steps with --batch come first and are not counted: the runs fine-tune",
    )  # fmt: skip
    parser.add_argument(
        "--start-learning-rate", type=runs.rate, default=rate, help=f"of these steps ({rate:g})"
    )
    parser.add_argument(
        "--layers-exact", metavar="REGEX",
        help="exact parameters besides the last layer's, by their whole path: block_0/.*",
    )  # fmt: skip
    parser.add_argument(
        "--advise", action="store_true", help="ask aop.advise first, for each of --batches"
    )
    parser.add_argument(
        "--diagnose", action="store_true",
        help="measure v, c and noise of approximate runs, early and late in their first seed",
    )  # fmt: skip
    task.add_arguments(parser)
    parser.add_argument(
        "--out", type=pathlib.Path, metavar="DIR",
        help="folder for results.json, the table and the figure (compare/TASK-PRESET)",
    )  # fmt: skip


@rivals.registered()
def parse_arguments(arguments: list[str] | None = None) -> Comparison:
    """The comparison that the command line asks for."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = runs.argument_parser(__doc__)
    parser.add_argument("task", choices=TASKS, help="what is trained")
    name = parser.parse_args(words[:1]).task
    with runs.needs_packages():
        task = importlib.import_module(f"tasks.{name}")
    add_options(parser, task)
    preset = parser.parse_args(words).preset
    parser.set_defaults(**task.PRESETS.get(preset, {}))
    options = parser.parse_args(words)
    if "heads" in task.OPTIONS and options.width % options.heads:
        parser.error(f"--heads {options.heads}: do not divide --width {options.width}")
    options.out = options.out or pathlib.Path("compare", f"{name}-{preset}" if preset else name)
    options.sizes = [size for size in task.OPTIONS if size not in ("batch", "steps")]
    exact = (f"exact:batch={fraction(x)}" if x < 1 else "exact" for x in options.batches)
    wanted = [*map(parse_run, exact), *estimates(options)]
    wanted += options.run or ([] if options.estimates else map(parse_run, DEFAULT_RUNS))
    options.run = list({run.name: run for run in wanted}.values())
    comparison = Comparison(options, task.load(options))
    for i, run in enumerate(options.run):
        try:
            options.run[i] = run = resolved(run, options)
            if run.config:
                run.config.selected_rows(run.batch * comparison.task.rows)
            comparison.trainer(run).layers()
        except (TypeError, ValueError) as error:
            parser.error(f"argument --run: {run.name}: {error}")
    runs.make_out_folder(parser, options)
    return comparison


@rivals.registered()
def main(arguments: list[str] | None = None) -> None:
    comparison = parse_arguments(arguments)
    options = comparison.options
    advice = advise(comparison) if options.advise else None
    keys = "losses", "flops", "seconds", "steps"
    results = {
        name: entry | {key: entry[key][: options.seeds] for key in keys}
        for name, entry in comparison.train().items()
    }
    sizes = ", ".join(f"{name} {getattr(options, name)}" for name in options.sizes)
    description = (
        f"{options.task}: {sizes}; {comparison.task.data}; {comparison.task.rows} rows of an "
        f"example; Adam {options.learning_rate:g}; {options.seeds} seed(s). Approximate: "
        f"{', '.join(comparison.approximate()) or 'nothing'}."
    )
    print("\n" + compare_report.write(results, options.out, description, advice))


if __name__ == "__main__":
    main()
