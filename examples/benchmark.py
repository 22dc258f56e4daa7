"""Exact and approximate steps side by side: how fast they are, and what they cost.

  layer        a dense layer, at all sizes, dtypes and ratios that are given
  model        whole training steps: the transformer of language_model.py, the MLP of deep_mlp.py
  tpu-compile  what the compiler for TPUs says of the layer: FLOPs, bytes, memory, its estimate of
               the time. No TPU is needed: pip install "jax[tpu]"
  peers        the layer in PyTorch beside it, exact and by hand: pip install torch

Each --run is a policy and keywords of aop.MemAOP: topk:memory=none. Without k or ratio it runs at
every --ratio, which is also what "=ratio" stands for. "speed" is the median, over interleaved
rounds, of exact time / time; "ceiling" is that of the layer's products alone, of so many rows, less
the estimate's own FLOPs; "predicted" is what aop.cost says of the device.
"""

import argparse
import csv
import importlib.util
import itertools
import math
import os
import pathlib
import platform
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import mem_aop_jax as aop
from mem_aop_jax._analysis.tables import markdown

try:
    import benchmark_steps as steps
    import deep_mlp
    import language_training
    import runs
    from benchmark_steps import Sizes
    from matplotlib.figure import Figure
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(
        f"{error}. Install the examples' packages: pip install '.[examples]'"
    ) from None

LAYER_RUNS = (
    "topk:memory=none",
    "topk:memory=rows",
    "priority:memory=subspace",
    "priority:input_ratio=ratio,input_rank=0",
    "priority:memory=subspace,input_ratio=ratio,input_rank=32",
)
MODEL_RUNS = (
    "topk:memory=none",
    "topk",
    "priority:memory=subspace,refresh=8",
)
TPU = {  # describes one to its compiler
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # in several processes at a time
}
TOPOLOGIES = {"v5e": "v5e:2x2x1", "v6e": "v6e:2x2x1"}
DTYPES = ("float32", "bfloat16", "float16")
# glibc: keep the memory of a step for the next one, which else waits for it, page by page.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",  # whichever thread asks for it
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
WITHIN = 0.15  # of the measured speed: a good prediction
SHORTEST = 0.02  # seconds of a measurement: so many steps, one after the other


# ---- measuring


def compiled(step: steps.Step) -> tuple[jax.stages.Compiled, float]:
    """And the seconds that it took."""
    start = time.perf_counter()
    args = *step.args, jax.random.key(0), step.state
    function = jax.jit(step.function, donate_argnums=len(args) - 1).lower(*args).compile()
    return function, time.perf_counter() - start


class Timed:
    """A compiled step and its state; a call runs it once and does not wait for it."""

    def __init__(self, function, step: steps.Step):
        self.function, self.args, self.calls = function, step.args, step.calls
        self.state = jax.tree.map(jnp.copy, step.state)
        self.keys = itertools.cycle(list(jax.random.split(jax.random.key(1), 64)))

    def __call__(self):
        self.state, results = self.function(*self.args, next(self.keys), self.state)
        return self.state, results


def prepared(built: dict[str, steps.Step]) -> tuple[dict, dict]:
    """Of each step what can be timed, and what its compilation says."""
    functions, found = {}, {}
    for name, step in built.items():
        function, seconds = compiled(step)
        functions[name] = Timed(function, step)
        found[name] = counted(function) | {"compile s": seconds}
    return functions, found


def taken(case, times: int) -> float:
    """Seconds of a call, of so many one after the other."""
    start = time.perf_counter()
    for _ in range(times):
        results = case()
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / times


def interleaved(cases: dict, rounds: int, progress: tqdm) -> dict[str, np.ndarray]:
    """Seconds of a step, `(rounds,)` for each case: in each round, all of them once."""
    times = {}
    for name, case in cases.items():
        taken(case, 1)
        least = getattr(case, "calls", 1)  # those of PyTorch are all alike
        times[name] = max(least, math.ceil(SHORTEST / taken(case, 1)))
    seconds = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name].append(taken(case, times[name]))
        progress.update()
    return {name: np.array(of_case) for name, of_case in seconds.items()}


def speed(exact: np.ndarray, other: np.ndarray) -> float:
    return float(np.median(exact / other))


def figures(seconds: np.ndarray, exact: np.ndarray) -> dict:
    low, high = np.quantile(seconds, (0.25, 0.75))
    return {
        "ms": np.median(seconds) * 1e3,
        "quartiles": f"{low * 1e3:.4g} to {high * 1e3:.4g}",
        "speed": speed(exact, seconds),
    }


def counted(function: jax.stages.Compiled) -> dict:
    """What the compiler says."""
    cost, memory = function.cost_analysis() or {}, function.memory_analysis()
    return {
        "GFLOPs": cost.get("flops", math.nan) / 1e9,
        "MB": cost.get("bytes accessed", math.nan) / 1e6,
        "MB held": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6
        if memory
        else math.nan,
    }


# ---- layers


def of_ratio(text: str, ratio: str) -> runs.Run:
    """The run at a ratio, unless it has its own."""
    policy, _, rest = text.partition(":")
    options = [item for item in rest.split(",") if item]
    if not any(item.startswith(("ratio=", "k=")) for item in options):
        options = [f"ratio={ratio}", *options]
    options = [re.sub("=ratio$", f"={ratio}", item) for item in options]
    return runs.parse(f"{policy}:{','.join(options)}", without=())


def all_sizes(options) -> list[Sizes]:
    fields = options.rows, options.in_features, options.out_features, options.dtype
    return list(itertools.starmap(Sizes, itertools.product(*fields)))


def layer_cases(options, sizes: Sizes) -> dict[str, tuple]:
    """Runs by name: configuration, rows of dW and of dX."""
    cases = {}
    for ratio, text in itertools.product(options.ratio, options.run):
        run = of_ratio(text, ratio)
        rows = run.config.selected_rows(sizes.rows), run.config.input_rows(sizes.rows)
        cases[run.name] = run.config, rows
    return cases


def layer(options, progress) -> list[dict]:
    rows = []
    for sizes in all_sizes(options):
        cases = layer_cases(options, sizes)
        inputs = steps.layer_inputs(sizes)
        configs = {"exact": None} | {name: config for name, (config, _) in cases.items()}
        built = {
            name: steps.layer(config, sizes, inputs, options.passes)
            for name, config in configs.items()
        }
        for of_rows in {case[1] for case in cases.values()}:
            built[of_rows] = steps.products(*of_rows, inputs, options.passes)
        functions, of_compiler = prepared(built)
        for ratio in options.ratio if options.peers else ():
            k = max(1, round(float(runs.parse_value(ratio)) * sizes.rows))
            for name, run in steps.torch_layers(sizes, inputs, k).items():
                functions[f"{name}:ratio={ratio}" if "topk" in name else name] = run
        seconds = interleaved(functions, options.rounds, progress)
        exact = seconds["exact"]
        for name in [name for name in functions if isinstance(name, str)]:
            row = sizes._asdict() | {"run": name} | figures(seconds[name], exact)
            if name in cases:
                config, of_rows = cases[name]
                own = steps.own_share(config, sizes, options.passes)
                ceiling = 1 / (1 / speed(exact, seconds[of_rows]) + own)
                row |= {"ceiling": ceiling, "of it": row["speed"] / ceiling}
                if options.passes == "both":
                    row["predicted"] = aop.cost(config, *sizes).speedup
            if name in built:
                held = sum(leaf.nbytes for leaf in jax.tree.leaves(built[name].state))
                row |= of_compiler[name] | {"MB of memory": held / 1e6}
            rows.append(row)
    return rows


# ---- models


def models(options):
    """By name: the model, its loss, a batch, and what it is initialised with."""
    transformer = language_training.Transformer(options.width, options.layers, options.heads)
    shape = options.batch, options.sequence + 1
    windows = jax.random.randint(jax.random.key(0), shape, 0, 96)
    pixels = jax.random.normal(jax.random.key(1), (options.images, 784))
    labels = jax.random.randint(jax.random.key(2), (options.images,), 0, 10)

    def loss(model, variables, batch, key):
        logits = model.apply(variables, batch[0], rngs={aop.linen.RNG: key})
        return deep_mlp.cross_entropy(logits, batch[1]).mean()

    # The small one first: after a large one a process runs all steps more slowly.
    yield "MLP", deep_mlp.MLP(), loss, (pixels, labels), (pixels,)
    yield "transformer", transformer, language_training.loss, windows, (windows[:, :-1],)


def model(options, progress) -> list[dict]:
    rows = []
    for kind, exact, loss, batch, inputs in models(options):
        wrapped = {"exact": (exact, 1)}
        for ratio, text in itertools.product(options.ratio, options.run):
            run = of_ratio(text, ratio)
            for suffix, least in (("", None), (" where it gains", options.min_speedup)):
                of_run = aop.linen.wrap(exact, run.config, min_speedup=least)
                wrapped[run.name + suffix] = of_run, run.config.refresh
        functions, of_compiler = prepared(
            {
                name: steps.model_step(of_run, loss, batch, inputs, calls)
                for name, (of_run, calls) in wrapped.items()
            }
        )
        seconds = interleaved(functions, options.rounds, progress)
        for name, (of_run, _) in wrapped.items():
            layers = [] if name == "exact" else aop.linen.layers(of_run, jax.random.key(0), *inputs)
            row = {"model": kind, "run": name, "approximate layers": len(layers)}
            rows.append(row | figures(seconds[name], seconds["exact"]) | of_compiler[name])
    return rows


# ---- the compiler for TPUs


def tpu_compile(options, progress) -> list[dict]:
    from jax.experimental import topologies

    os.environ.update(TPU)
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for chip in options.chip:
        try:
            topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
        except Exception as error:  # of the plugin, in words of its own
            raise SystemExit(
                f'{chip}: there is no compiler for TPUs ({error}). pip install "jax[tpu]"'
            ) from None
        one = jax.sharding.SingleDeviceSharding(topology.devices[0])
        for sizes in all_sizes(options):
            inputs = jax.eval_shape(lambda sizes=sizes: steps.layer_inputs(sizes))
            cases = {"exact": None} | {
                name: case[0] for name, case in layer_cases(options, sizes).items()
            }
            exact = None
            for name, config in cases.items():
                step = steps.layer(config, sizes, inputs, options.passes)
                state = jax.eval_shape(lambda step=step: step.state)
                args = *inputs, jax.eval_shape(jax.random.key, 0), state
                function = jax.jit(step.function, in_shardings=one, donate_argnums=len(args) - 1)
                function = function.lower(*args).compile()
                cost, found = function.cost_analysis(), counted(function)
                seconds = cost["optimal_seconds"] % 1  # each op without an estimate counts as -1
                cycles = map(int, re.findall(r'"estimated_cycles":"(\d+)"', function.as_text()))
                exact = exact or (found, seconds)
                rows.append(
                    {"chip": chip, **sizes._asdict(), "run": name}
                    | found
                    | {
                        "FLOPs": found["GFLOPs"] / exact[0]["GFLOPs"],
                        "bytes": found["MB"] / exact[0]["MB"],
                        "ms": seconds * 1e3,
                        "speed": exact[1] / seconds,
                        # Without those of kernels; an op without an estimate has the largest int64.
                        "M cycles": sum(c for c in cycles if c < 2**60) / 1e6,
                    }
                )
                progress.update()
    return rows


# ---- what comes out


def shown(value) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}" if value < 10 else f"{value:.4g}"
    return str(value)


def header(rows: list[dict]) -> list[str]:
    """All columns, but those of sizes that are the same in all rows."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    sizes = {"chip", *Sizes._fields} - {"run"}
    return [n for n in names if n not in sizes or len({row.get(n) for row in rows}) > 1]


def write(rows: list[dict], options) -> str:
    """The table; the same as CSV and the speeds as PNG in --out."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    paths = [options.out / f"{options.command}.{kind}" for kind in ("csv", "png")]
    with paths[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows).savefig(paths[1], dpi=120)
    columns = header(rows)
    columns.sort(key=lambda name: name != "run")  # stable
    table = markdown(columns, [[shown(row.get(name, "")) for name in columns] for row in rows])
    constant = {name: rows[0][name] for name in names if name not in columns}
    device = jax.devices()[0]
    machine = (
        f"{device.device_kind or device.platform}, {os.cpu_count()} cores, {platform.machine()}"
    )
    said = [f"{name} {value}" for name, value in constant.items()]
    off = [abs(row["predicted"] / row["speed"] - 1) for row in rows if "predicted" in row]
    if off:
        said.append(
            f"predicted within {WITHIN:.0%}: {sum(of <= WITHIN for of in off)} of {len(off)}"
        )
    text = ", ".join([*said, machine, f"jax {jax.__version__}"])
    return "\n".join([table, "", text, *map(str, paths)])


def draw(rows: list[dict]) -> Figure:
    """Speeds as bars, ceilings as marks."""
    figure = Figure(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    panel = figure.subplots()
    where = range(len(rows))
    panel.barh(where, [row["speed"] for row in rows], color="C0")
    ceilings = [row.get("ceiling", math.nan) for row in rows]
    panel.plot(ceilings, where, "k|", markersize=14, label="ceiling")
    varying = [name for name in header(rows) if name in ("chip", "model", *Sizes._fields)]
    labels = [" ".join([row["run"], *(str(row[name]) for name in varying)]) for row in rows]
    panel.set_yticks(where, labels, fontsize=8)
    panel.invert_yaxis()
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_xlabel("speed, exact = 1")
    panel.legend()
    return figure


# ---- the command


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("layer", "model", "tpu-compile", "peers"):
        command = commands.add_parser(name, help=argparse.SUPPRESS)
        of_tpu, of_model = name == "tpu-compile", name == "model"
        default = MODEL_RUNS if of_model else LAYER_RUNS
        command.add_argument(
            "--run", action="append", metavar="RUN", help=f"may be repeated ({' '.join(default)})"
        )
        command.add_argument("--ratio", nargs="+", default=["1/8"], help="K / rows (1/8)")
        command.add_argument("--out", type=pathlib.Path, default=pathlib.Path("benchmark"))
        if not of_tpu:
            command.add_argument("--rounds", type=runs.count, default=15, help="of timing (15)")
        if of_model:
            for option, size in (
                ("width", 768), ("layers", 3), ("heads", 12), ("sequence", 128), ("batch", 16),
                ("images", 1024),
            ):  # fmt: skip
                command.add_argument(f"--{option}", type=runs.count, default=size, help=f"({size})")
            command.add_argument("--min-speedup", type=runs.rate, default=1.05, help="(1.05)")
        else:
            sizes = (8192, 4096, 4096) if of_tpu else (4096, 2048, 2048)
            dtypes = "bfloat16" if of_tpu else "float32"
            for option, size in zip(("rows", "in-features", "out-features"), sizes, strict=True):
                command.add_argument(
                    f"--{option}", type=runs.count, nargs="+", default=[size], help=f"({size})"
                )
            command.add_argument(
                "--dtype", nargs="+", choices=DTYPES, default=[dtypes], help=f"({dtypes})"
            )
            command.set_defaults(passes="both")
        if name in ("layer", "tpu-compile"):
            command.add_argument("--passes", choices=steps.PASSES)
        if of_tpu:
            command.add_argument("--chip", nargs="+", choices=TOPOLOGIES, default=["v5e"])
        command.set_defaults(peers=name == "peers", default_run=default)
    options = parser.parse_args(arguments)
    options.run = options.run or list(options.default_run)
    try:
        for ratio, text in itertools.product(options.ratio, options.run):
            of_ratio(text, ratio)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --run: {error}")
    if options.command == "model" and options.width % options.heads:
        parser.error(f"--heads {options.heads}: do not divide --width {options.width}")
    runs.make_out(parser, options)
    return options


def main(arguments=None) -> None:
    options = parse_arguments(arguments)
    if options.peers and importlib.util.find_spec("torch") is None:
        raise SystemExit("peers: there is no PyTorch. pip install torch")
    command = {"model": model, "tpu-compile": tpu_compile}.get(options.command, layer)
    if options.command == "model":
        total = 2 * options.rounds
    elif options.command == "tpu-compile":
        runs_of_sizes = 1 + len(options.ratio) * len(options.run)
        total = len(options.chip) * len(all_sizes(options)) * runs_of_sizes
    else:
        total = len(all_sizes(options)) * options.rounds
    with tqdm(total=total, desc=options.command, unit="round") as progress:
        try:
            rows = command(options, progress)
        except ValueError as error:  # a configuration that does not fit the sizes
            raise SystemExit(f"{options.command}: {error}") from None
    print("\n" + write(rows, options))


if __name__ == "__main__":
    kept = os.environ.keys() >= MALLOC.keys() or "tpu-compile" in sys.argv
    # Not on a GPU, whose compiler's threads would wait for each other.
    if sys.platform == "linux" and not kept and jax.default_backend() == "cpu":
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, os.environ | MALLOC)  # read when a process starts
    main()
