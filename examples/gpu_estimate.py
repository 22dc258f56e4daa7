"""What a GPU would run, and how long it would take, by XLA's compiler for GPUs without a GPU.

XLA compiles for a GPU that is only described. The text of the compiled program lists its kernels
with what each reads and writes; a kernel takes as long as the memory needs for its bytes or the
units for its FLOPs, whichever is longer, and a constant. The rates are those that an H100 reached;
the sums over a layer's kernels were within 5% of what it measured. It is no measurement.
"""

import functools
import importlib.util
import math
import os
import pathlib
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

LAUNCH = 2e-6  # seconds of a kernel beside its bytes and FLOPs
DECISION = 10e-6  # seconds for which a GPU waits for the host at a branch
REFRESHES = 1 / 8  # share of the steps that take a branch's longer side
REWRITTEN = 1 / 8  # share that a kernel of Pallas writes of an array that it overwrites in place
PACKAGES = "pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12"

DESCRIPTION = """\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {block_memory}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


class Gpu(NamedTuple):
    """A GPU as its compiler sees it, and the rates that it reaches.

    Attributes:
      description: the facts of `DESCRIPTION`.
      bytes: per second, to and from its memory.
      flops: per second, in products of bfloat16.
    """

    description: dict[str, int | float | str]
    bytes: float
    flops: float


GPUS = {
    "h100": Gpu(
        {
            "name": "NVIDIA H100 80GB HBM3", "major": 9, "cores": 132, "fpus": 128, "clock": 1.98,
            "memory": 84942979072, "bandwidth": 3352320000000, "cache": 52428800,
            "shared_memory": 233472, "block_memory": 232448,
        },
        bytes=2.9e12,
        flops=680e12,
    ),
    "a100": Gpu(  # rates in the same shares of its peaks; held against no A100
        {
            "name": "NVIDIA A100-SXM4-80GB", "major": 8, "cores": 108, "fpus": 64, "clock": 1.41,
            "memory": 84987740160, "bandwidth": 2039000000000, "cache": 41943040,
            "shared_memory": 167936, "block_memory": 166912,
        },
        bytes=1.76e12,
        flops=215e12,
    ),
}  # fmt: skip


@functools.cache  # once, for all chips
def find_compiler() -> bool:
    """Whether the CUDA compiler is installed; XLA is told where."""
    spec = importlib.util.find_spec("nvidia")
    folders = (spec and spec.submodule_search_locations) or []
    nvcc = next((path for f in folders if (path := pathlib.Path(f, "cuda_nvcc")).is_dir()), None)
    if nvcc is None:
        return False
    os.environ["PATH"] += f"{os.pathsep}{nvcc / 'bin'}"
    os.environ["XLA_FLAGS"] = (  # no autotuning, which would need the GPU
        f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0 "
        f"--xla_gpu_enable_triton_gemm=false --xla_gpu_cuda_data_dir={nvcc}"
    )
    jax.config.update("jax_platforms", "cpu")
    return True


def device(chip: str) -> jax.Device:
    """The GPU that `GPUS` describes, to compile for.

    Raises:
      SystemExit: the packages with the compiler are not installed.
    """
    if not find_compiler():
        raise SystemExit(f"{chip}: there is no compiler for GPUs. {PACKAGES}")
    description = DESCRIPTION.format(**GPUS[chip].description)
    try:
        topology = topologies.get_topology_desc(
            "", "cuda", topology="1x1x1", target_config=description
        )
    except Exception as error:  # the plugin raises its own classes
        raise SystemExit(f"{chip}: there is no compiler for GPUs ({error}). {PACKAGES}") from None
    return topology.devices[0]


class Kernel(NamedTuple):
    """What one kernel of a step does.

    Attributes:
      name: the operation and its name in the program.
      seconds: its estimated time, times the share of the steps that run it.
      bytes: that it reads and writes, likewise.
      is_product: whether it is a matrix product.
    """

    name: str
    seconds: float
    bytes: float
    is_product: bool


# ---- the program's text

ITEM_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
ITEM_SIZES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
ARRAY = re.compile(rf"\b({'|'.join(ITEM_SIZES)})\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<result>.*?) (?P<op>[\w\-]+)\((?P<operands>.*?)\)"
    r"(?P<rest>,.*)?$"
)
NO_KERNEL = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "iota",
    "opt-barrier",
}  # fmt: skip
SLICES = {"slice", "dynamic-slice", "gather"}


class Instruction(NamedTuple):
    """One line of a computation; `result` is a shape, `rest` the attributes."""

    name: str
    result: str
    op: str
    operands: list[str]
    rest: str


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program's text by name, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if start := COMPUTATION.match(line):
            current = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif found := INSTRUCTION.match(line):
            name, result, op, operands, rest = found.groups()
            names = [operand.strip().lstrip("%") for operand in operands.split(",")]
            current.append(Instruction(name, result, op, names, rest or ""))
    return computations, entry


def elements(dims: str) -> int:
    return math.prod(int(d) for d in dims.split(",") if d)


def size(shape: str) -> int:
    """Bytes of all arrays in the text of a shape."""
    return sum(ITEM_SIZES[dtype] * elements(dims) for dtype, dims in ARRAY.findall(shape))


def bytes_read(fused: list[Instruction], number: int, shape: str) -> int:
    """Of an operand of a fusion.

    Of one that it only slices or gathers from, the slices; none of one whose place it overwrites
    in part.
    """
    names = {i.name for i in fused if i.op == "parameter" and i.operands == [str(number)]}
    for i in fused:
        if i.op == "bitcast" and i.operands[0] in names:
            names.add(i.name)
    users = [i for i in fused if i.op != "bitcast" and names & set(i.operands)]
    if users and all(i.operands[0] in names for i in users):
        if all(i.op == "scatter" for i in users):
            return 0
        if all(i.op in SLICES for i in users):
            return min(size(shape), sum(size(i.result) for i in users))
    return size(shape)


def bytes_written(fused: list[Instruction], result: str) -> int:
    """Of the result of a fusion; where it overwrites a part of an operand, of that part."""
    shapes = {i.name: i.result for i in fused}
    if fused and fused[-1].op == "scatter":
        _, _, updates = fused[-1].operands
        return min(size(result), size(shapes[updates]))
    return size(result)


def kernels(text: str, gpu: Gpu) -> list[Kernel]:
    """The kernels of a compiled program, in the order in which it starts them."""
    computations, entry = parse(text)
    shapes = {i.name: i.result for listed in computations.values() for i in listed}

    def of_computation(name: str) -> list[Kernel]:
        found: list[Kernel] = []
        for i in computations[name]:
            if i.op in NO_KERNEL:
                continue
            called = re.findall(r"(?:body|to_apply|calls)=%?([\w.\-]+)", i.rest)
            if i.op == "conditional":
                names = re.findall(r"%([\w.\-]+)", i.rest.partition("metadata")[0])
                sides = [of_computation(side) for side in names if side in computations]
                sides.sort(key=lambda side: sum(kernel.seconds for kernel in side))
                found.append(Kernel("the host decides", DECISION, 0, False))
                for side, part in ((sides[0], 1 - REFRESHES), (sides[-1], REFRESHES)):
                    found += [
                        k._replace(seconds=part * k.seconds, bytes=part * k.bytes) for k in side
                    ]
            elif i.op in ("while", "call"):
                found += of_computation(called[0])
            else:
                found.append(of_instruction(i, computations[called[0]] if called else []))
        return found

    def of_instruction(i: Instruction, fused: list[Instruction]) -> Kernel:
        operands = [shapes.get(name, "") for name in i.operands]
        is_product, result = "gemm" in i.rest, i.result
        if is_product:
            result = re.sub(r"s8\[\d+\]", "", result)  # a workspace
        read = (bytes_read(fused, n, s) if fused else size(s) for n, s in enumerate(operands))
        moved, flops = bytes_written(fused, result) + sum(read), 0.0
        if "output_to_operand_aliasing" in i.rest and not is_product:
            moved -= (2 - REWRITTEN) * size(result)
        if is_product:
            left, right = (elements(ARRAY.findall(shape)[0][1]) for shape in operands[:2])
            out = max(elements(dims) for dtype, dims in ARRAY.findall(result) if "f" in dtype)
            flops = 2 * math.sqrt(out * left * right)  # (m k) (k n) (m n) is a square
        seconds = max(moved / gpu.bytes, flops / gpu.flops) + LAUNCH
        return Kernel(f"{i.op} {i.name}", seconds, moved, is_product)

    return of_computation(entry)


def columns(function: jax.stages.Compiled, chip: str) -> dict:
    """What the table shows of a compiled step."""
    listed = kernels(function.as_text(), GPUS[chip])
    memory = function.memory_analysis()
    return {
        "kernels": len(listed),
        "MB": sum(kernel.bytes for kernel in listed) / 1e6,
        "MB held": memory.temp_size_in_bytes / 1e6 if memory else math.nan,
        "ms of products": sum(k.seconds for k in listed if k.is_product) * 1e3,
        "ms": sum(kernel.seconds for kernel in listed) * 1e3,
    }
