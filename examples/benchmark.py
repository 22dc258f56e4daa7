"""Exact and approximate steps side by side: how fast they are, and what they cost.

  layer        a dense layer, at all sizes, dtypes and ratios that are given
  model        whole training steps: the transformer of tasks/transformer.py, the MLP of deep_mlp.py
  tpu-compile  the layer's FLOPs, bytes, memory and time as the compiler for TPUs estimates them. No
               TPU is needed: pip install "jax[tpu]"
  gpu-compile  kernels, bytes, memory and time of the layer, or with --model of the transformer's
               training step, on an H100 or A100 that is only described to XLA's compiler:
               examples/gpu_estimate.py. No GPU is needed
  peers        the layer in PyTorch beside it, exact and by hand: pip install torch

Each --run is a policy and keywords of aop.MemAOP: topk:memory=none. A run without k or ratio is
repeated at every --ratio, and "=ratio" in a run stands for it. "speed" is exact time / time, the
median over interleaved rounds. "ceiling" is the speed of a layer that computes its products with
the chosen rows alone, and the estimate's other FLOPs as fast as these. "predicted" is the speed
that aop.cost predicts for the device.
"""

import argparse
import csv
import functools
import importlib.util
import itertools
import math
import os
import platform
import re
import sys

import jax
import runs

import mem_aop_jax as aop

with runs.needs_packages():
    import benchmark_steps as steps
    import deep_mlp
    import gpu_estimate
    import timing
    from benchmark_steps import Sizes
    from matplotlib.figure import Figure
    from tasks import text
    from tasks.transformer import Transformer, logits
    from tqdm import tqdm

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
TPU = {  # the environment that describes a TPU to its compiler
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by several processes at a time
}
TOPOLOGIES = {"v5e": "v5e:2x2x1", "v6e": "v6e:2x2x1"}
CHIPS = {"tpu-compile": tuple(TOPOLOGIES), "gpu-compile": tuple(gpu_estimate.GPUS)}
# Width, blocks, heads of the transformer, and rows of its batch.
MODELS = {"model": (768, 3, 12, 16), "gpu-compile": (2048, 1, 32, 128)}
DTYPES = ("float32", "bfloat16", "float16")
# Tells glibc to keep a step's memory for the next step, which would else get it page by page.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",  # one pool for all threads
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
TOLERANCE = 0.15  # of a good prediction, relative to the measured speed


# ---- layers


def run_at(ratio: str, text: str) -> runs.Run:
    """The run that the text spells, at this ratio unless it has its own."""
    policy, _, rest = text.partition(":")
    options = [item for item in rest.split(",") if item]
    if not any(item.startswith(("ratio=", "k=")) for item in options):
        options = [f"ratio={ratio}", *options]
    options = [re.sub("=ratio$", f"={ratio}", item) for item in options]
    return runs.parse(f"{policy}:{','.join(options)}", without=())


def all_sizes(options) -> list[Sizes]:
    fields = options.rows, options.in_features, options.out_features, options.dtype
    return list(itertools.starmap(Sizes, itertools.product(*fields)))


def layer_configs(options) -> dict[str, aop.MemAOP]:
    """The configurations of all runs at all ratios, by the run's name."""
    pairs = itertools.product(options.ratio, options.run)
    return {run.name: run.config for run in itertools.starmap(run_at, pairs)}


def measure_layers(options, progress) -> list[dict]:
    rows = []
    for sizes in all_sizes(options):
        configs = layer_configs(options)
        chosen_rows = {  # of dW and of dX
            name: (config.selected_rows(sizes.rows), config.input_rows(sizes.rows))
            for name, config in configs.items()
        }
        inputs = steps.layer_inputs(sizes)
        built = {
            name: steps.layer_step(config, sizes, inputs, options.passes)
            for name, config in ({"exact": None} | configs).items()
        }
        for dw_and_dx_rows in set(chosen_rows.values()):
            built[dw_and_dx_rows] = steps.products_step(*dw_and_dx_rows, inputs, options.passes)
        functions, compiler = timing.compile_all(built)
        for ratio in options.ratio if options.peers else ():
            k = max(1, round(float(runs.parse_value(ratio)) * sizes.rows))
            for name, run in steps.torch_layers(sizes, inputs, k).items():
                functions[f"{name}:ratio={ratio}" if "topk" in name else name] = run
        seconds = timing.interleaved_seconds(functions, options.rounds, progress)
        exact = seconds["exact"]
        for name in [name for name in functions if isinstance(name, str)]:
            row = sizes._asdict() | {"run": name} | timing.time_columns(seconds[name], exact)
            if name in configs:
                overhead = steps.overhead(configs[name], sizes, options.passes)
                ceiling = 1 / (1 / timing.speed(exact, seconds[chosen_rows[name]]) + overhead)
                row |= {"ceiling": ceiling, "of it": row["speed"] / ceiling}
                if options.passes == "both":
                    row["predicted"] = aop.cost(configs[name], *sizes).speedup
            if name in built:
                held = sum(leaf.nbytes for leaf in jax.tree.leaves(built[name].state))
                row |= compiler[name] | {"MB of memory": held / 1e6}
            rows.append(row)
    return rows


# ---- models


def models(options):
    """For each model its name, the loss, a function that returns parameters, and a batch."""
    key, *keys = jax.random.split(jax.random.key(0), 4)
    pixels = jax.random.normal(keys[0], (options.images, 784))
    labels = jax.random.randint(keys[1], (options.images,), 0, 10)
    # The small one first: after a large one a process runs all steps more slowly.
    yield "MLP", deep_mlp.loss_fn, lambda: deep_mlp.first_params(key, pixels), (pixels, labels)
    yield "transformer", *transformer(options, keys[2], "float32")


def transformer(options, key, dtype):
    """The loss, a function that returns parameters, and a batch, with activations of the dtype."""
    shape = options.batch, options.sequence + 1
    windows = jax.random.randint(key, shape, 0, text.VOCABULARY)
    sizes = options.width, options.layers, options.heads
    model = Transformer(*sizes, dtype)

    def first_params():
        return jax.jit(model.init)(key, windows[:, :-1])["params"]

    loss = functools.partial(text.next_token_loss, functools.partial(logits, model))
    return loss, first_params, (windows,)


def approximations(options, loss):
    """By the run's name the loss, exact and approximate, and the configuration's `refresh`."""
    found = {"exact": (aop.approximate(loss, ()), 1)}
    for run_name, config in layer_configs(options).items():
        for suffix, min_speedup in (("", None), (" where it gains", options.min_speedup)):
            approx = aop.approximate(loss, config, min_speedup=min_speedup)
            found[run_name + suffix] = approx, config.refresh
    return found


def measure_models(options, progress) -> list[dict]:
    rows = []
    for model, loss, first_params, batch in models(options):
        trained, params = approximations(options, loss), first_params()
        functions, compiler = timing.compile_all(
            {
                name: timing.training_step(approx, params, batch, calls)
                for name, (approx, calls) in trained.items()
            }
        )
        seconds = timing.interleaved_seconds(functions, options.rounds, progress)
        for name, (approx, _) in trained.items():
            layers = len(approx.layers(params, *batch))
            row = {"model": model, "run": name, "approximate layers": layers}
            times = timing.time_columns(seconds[name], seconds["exact"])
            rows.append(row | times | compiler[name])
    return rows


# ---- compilers for chips that are not there


def compile_layers(options, progress) -> list[dict]:
    """The layer's steps, compiled for chips that are not there."""
    rows = []
    for chip in options.chip:
        chip_device(chip)  # before JAX starts
        for sizes in all_sizes(options):
            inputs = jax.eval_shape(lambda sizes=sizes: steps.layer_inputs(sizes))
            exact = None
            for name, config in ({"exact": None} | layer_configs(options)).items():
                step = steps.layer_step(config, sizes, inputs, options.passes)
                found = compiled_columns(chip, step)
                exact = exact or found
                rows.append({"chip": chip, **sizes._asdict(), "run": name} | relative(found, exact))
                progress.update()
    return rows


def compile_models(options, progress) -> list[dict]:
    """The transformer's steps, compiled for GPUs that are not there."""
    rows = []
    for chip, dtype in itertools.product(options.chip, options.dtype):
        device = chip_device(chip)
        loss, first_params, batch = transformer(options, jax.random.key(0), dtype)
        params, exact = jax.eval_shape(first_params), None
        with jax.default_device(device):  # whose rates `min_speedup` asks for
            trained = approximations(options, loss)
        for name, (approx, _) in trained.items():
            found = compiled_columns(chip, timing.training_step(approx, params, batch))
            exact = exact or found
            layers = len(approx.layers(params, *batch))
            row = {"chip": chip, "dtype": dtype, "run": name, "approximate layers": layers}
            rows.append(row | relative(found, exact))
            progress.update()
    return rows


def compiled_columns(chip: str, step: timing.Step) -> dict:
    """What the compiler says of a step."""
    one_device = jax.sharding.SingleDeviceSharding(chip_device(chip))
    args = *step.args, jax.random.key(0), step.state
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    function = jax.jit(step.function, in_shardings=one_device, donate_argnums=len(args) - 1)
    compiled = function.lower(*shapes).compile()
    return gpu_estimate.columns(compiled, chip) if on_gpu(chip) else tpu_columns(compiled)


def relative(found: dict, exact: dict) -> dict:
    """The columns, and beside them what is relative to the exact step's."""
    columns = found | {"bytes": found["MB"] / exact["MB"], "speed": exact["ms"] / found["ms"]}
    if "GFLOPs" in found:  # not of a GPU, whose products XLA does not count
        columns["FLOPs"] = found["GFLOPs"] / exact["GFLOPs"]
    return columns


def on_gpu(chip: str) -> bool:
    return chip in gpu_estimate.GPUS


@functools.cache
def chip_device(chip: str) -> jax.Device:
    """The chip to compile for; the first call comes before JAX starts."""
    return gpu_estimate.device(chip) if on_gpu(chip) else tpu(chip)


def tpu(chip: str) -> jax.Device:
    """A TPU to compile for."""
    from jax.experimental import topologies

    os.environ.update(TPU)
    jax.config.update("jax_platforms", "cpu")
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    except Exception as error:  # the plugin raises its own classes
        raise SystemExit(
            f'{chip}: there is no compiler for TPUs ({error}). pip install "jax[tpu]"'
        ) from None
    return topology.devices[0]


def tpu_columns(function: jax.stages.Compiled) -> dict:
    """What the compiler says, milliseconds of a call, and cycles without those of kernels.

    An operation that the compiler cannot estimate counts as -1 second and as the largest int64 of
    cycles.
    """
    seconds = function.cost_analysis()["optimal_seconds"] % 1
    cycles = map(int, re.findall(r'"estimated_cycles":"(\d+)"', function.as_text()))
    return timing.compiler_columns(function) | {
        "ms": seconds * 1e3,
        "M cycles": sum(c for c in cycles if c < 2**60) / 1e6,
    }


# ---- the table and the figure


def cell(value) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}" if value < 10 else f"{value:.4g}"
    return str(value)


def shown_columns(rows: list[dict]) -> list[str]:
    """All columns but those of sizes that are the same in all rows."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    sizes = {"chip", *Sizes._fields} - {"run"}
    return [n for n in names if n not in sizes or len({row.get(n) for row in rows}) > 1]


def write(rows: list[dict], options) -> str:
    """Writes a CSV and a PNG to --out; returns the table and the files' paths."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    csv_path, png_path = (options.out / f"{options.command}.{kind}" for kind in ("csv", "png"))
    with csv_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows).savefig(png_path, dpi=120)
    columns = shown_columns(rows)
    columns.sort(key=lambda name: name != "run")  # stable
    table = runs.markdown(columns, [[cell(row.get(name, "")) for name in columns] for row in rows])
    constant = [f"{name} {rows[0][name]}" for name in names if name not in columns]
    device = jax.devices()[0]
    machine = (
        f"{device.device_kind or device.platform}, {os.cpu_count()} cores, {platform.machine()}"
    )
    text = ", ".join([*constant, *predicted_well(rows), machine, f"jax {jax.__version__}"])
    return "\n".join([table, "", text, str(csv_path), str(png_path)])


def predicted_well(rows: list[dict]) -> list[str]:
    """How many predictions are near the measured speed; empty where nothing was predicted."""
    errors = [abs(row["predicted"] / row["speed"] - 1) for row in rows if "predicted" in row]
    if not errors:
        return []
    near = sum(error <= TOLERANCE for error in errors)
    return [f"predicted within {TOLERANCE:.0%}: {near} of {len(errors)}"]


def draw(rows: list[dict]) -> Figure:
    """Speeds as bars, ceilings as marks."""
    figure = Figure(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    panel = figure.subplots()
    heights = range(len(rows))
    panel.barh(heights, [row["speed"] for row in rows], color="C0")
    ceilings = [row.get("ceiling", math.nan) for row in rows]
    panel.plot(ceilings, heights, "k|", markersize=14, label="ceiling")
    varying = [name for name in shown_columns(rows) if name in ("chip", "model", *Sizes._fields)]
    labels = [" ".join([row["run"], *(str(row[name]) for name in varying)]) for row in rows]
    panel.set_yticks(heights, labels, fontsize=8)
    panel.invert_yaxis()
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_xlabel("speed, exact = 1")
    panel.legend()
    return figure


# ---- the command


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = runs.argument_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("layer", "model", *CHIPS, "peers"):
        command = commands.add_parser(name, help=argparse.SUPPRESS)
        default = MODEL_RUNS if name == "model" else LAYER_RUNS  # with --model, too, the models'
        command.add_argument(
            "--run", action="append", metavar="RUN", help=f"may be repeated ({' '.join(default)})"
        )
        command.add_argument("--ratio", nargs="+", default=["1/8"], help="K / rows (1/8)")
        runs.add_out_folder(command, "benchmark", "a CSV and a figure")
        if name not in CHIPS:
            runs.add_counts(command, {"rounds": (15, "of timing")})
        if name == "model":
            runs.add_counts(command, {"images": (1024, "of the MLP")})
        if name in MODELS:
            counts = MODELS[name]
            runs.add_counts(command, {
                "width": (counts[0], "of the transformer"), "layers": (counts[1], "its blocks"),
                "heads": (counts[2], "of its attention"), "sequence": (128, "tokens of a row"),
                "batch": (counts[3], "its rows"),
            })  # fmt: skip
            command.add_argument("--min-speedup", type=runs.rate, default=1.05, help="(1.05)")
        if name == "gpu-compile":
            command.add_argument("--model", action="store_true", help="the transformer's step")
        if name != "model":
            sizes = (8192, 4096, 4096) if name in CHIPS else (4096, 2048, 2048)
            dtypes = "bfloat16" if name in CHIPS else "float32"
            for option, size in zip(("rows", "in-features", "out-features"), sizes, strict=True):
                command.add_argument(
                    f"--{option}", type=runs.count, nargs="+", default=[size], help=f"({size})"
                )
            command.add_argument(
                "--dtype", nargs="+", choices=DTYPES, default=[dtypes], help=f"({dtypes})"
            )
            command.set_defaults(passes="both")
        if name in ("layer", *CHIPS):
            command.add_argument("--passes", choices=steps.PASSES)
        if name in CHIPS:
            first, *_ = chips = CHIPS[name]
            command.add_argument("--chip", nargs="+", choices=chips, default=[first])
        command.set_defaults(peers=name == "peers", model=name == "model")
    options = parser.parse_args(arguments)
    options.run = options.run or list(MODEL_RUNS if options.model else LAYER_RUNS)
    try:
        layer_configs(options)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --run: {error}")
    if options.model and options.width % options.heads:
        parser.error(f"--heads {options.heads}: do not divide --width {options.width}")
    runs.make_out_folder(parser, options)
    return options


def main(arguments=None) -> None:
    options = parse_arguments(arguments)
    if options.peers and importlib.util.find_spec("torch") is None:
        raise SystemExit("peers: there is no PyTorch. pip install torch")
    configs = len(options.ratio) * len(options.run)
    if options.command == "model":
        command, total = measure_models, 2 * options.rounds
    elif options.model:
        command, total = compile_models, len(options.chip) * len(options.dtype) * (1 + 2 * configs)
    elif options.command in CHIPS:
        command = compile_layers
        total = len(options.chip) * len(all_sizes(options)) * (1 + configs)
    else:
        command, total = measure_layers, len(all_sizes(options)) * options.rounds
    with tqdm(total=total, desc=options.command, unit="round") as progress:
        try:
            rows = command(options, progress)
        except ValueError as error:  # a configuration that does not fit the sizes
            raise SystemExit(f"{options.command}: {error}") from None
    print("\n" + write(rows, options))


if __name__ == "__main__":
    is_set = os.environ.keys() >= MALLOC.keys() or CHIPS.keys() & set(sys.argv)
    # Not on a GPU, whose compiler's threads would wait for each other.
    if sys.platform == "linux" and not is_set and jax.default_backend() == "cpu":
        arguments = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, arguments, os.environ | MALLOC)  # read when a process starts
    main()
