"""How fast a device is: known ones from a table, others measured in some 20 seconds."""

import functools
import itertools
import json
import math
import os
import pathlib
import platform
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mem_aop_jax._compat import TPU_COPIES_ROWS, jax_option
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.dense import dense
from mem_aop_jax._core.memory_kinds import init_memory
from mem_aop_jax._core.policies import topk
from mem_aop_jax._numerics import row_norms
from mem_aop_jax._progress import say

SUBSPACE = 32  # directions, of both sides together
ARRAYS = 2**22, 2**25  # bytes of an array that a cache holds, and of one that it does not
KERNELS = 2**30, 2**34  # FLOPs of a small and of a large gradient of the kernel
NARROW = 32  # columns
ROWS, FEATURES = 2048, 1024  # of the arrays that are measured


class Rates(NamedTuple):
    """The speed of a device, and the constant times of a layer's step on it.

    Attributes:
      device: its kind.
      flops: FLOPs per second, in products of float32.
      half_flops: FLOPs per second, in products of bfloat16 and float16.
      bytes: bytes per second that it reads or writes, in arrays of 32 MiB (`ARRAYS[1]`) and more.
      kernel: speed of the kernel's gradient, which sums over rows, relative to the other products;
        for 2^34 FLOPs (`KERNELS[1]`).
      row: seconds per row to select rows.
      step: constant seconds of any step.
      layer: further seconds of an approximate layer's step.
      subspace: further seconds of a step with a subspace of 32 directions (`SUBSPACE`).
      cached: as `bytes`, in arrays of no more than 4 MiB (`ARRAYS[0]`); None is the same.
      small_kernel: as `kernel`, for 2^30 FLOPs (`KERNELS[0]`); None is the same.
      narrow: speed of a product of the rows with 32 columns (`NARROW`), relative to others.
      one_pass: whether one pass over all rows computes everything that is needed of them.
      sums: as `bytes`, in passes that only add up arrays; None is the same.
    """

    device: str
    flops: float
    half_flops: float
    bytes: float
    kernel: float = 1.0
    row: float = 0.0
    step: float = 0.0
    layer: float = 0.0
    subspace: float = 0.0
    cached: float | None = None
    small_kernel: float | None = None
    narrow: float = 1.0
    one_pass: bool = False
    sums: float | None = None


# The vendors' peaks of products (float32 as JAX computes it by default) and of memory.
_TPU: dict = {"row": 1e-9, "layer": 1e-5, "subspace": 5e-5, "one_pass": TPU_COPIES_ROWS}


def _gpu(device: str, flops: float, half_flops: float, bytes: float) -> Rates:
    """From peaks: the shares of them that an H100 reached, and the times of its small kernels."""
    return Rates(
        device, 0.69 * flops, 0.69 * half_flops, 0.866 * bytes,
        row=1e-9, step=6e-6, layer=2e-5, subspace=6e-5,
    )  # fmt: skip


KNOWN = {
    rates.device: rates
    for rates in (
        Rates("TPU v4", 275e12, 275e12, 1.23e12, **_TPU),
        Rates("TPU v5 lite", 197e12, 197e12, 0.82e12, **_TPU),
        Rates("TPU v5", 459e12, 459e12, 2.77e12, **_TPU),
        Rates("TPU v6 lite", 918e12, 918e12, 1.64e12, **_TPU),
        _gpu("NVIDIA A100-SXM4-40GB", 156e12, 312e12, 1.56e12),
        _gpu("NVIDIA A100-SXM4-80GB", 156e12, 312e12, 2.04e12),
        _gpu("NVIDIA H100 80GB HBM3", 495e12, 989e12, 3.35e12),
        _gpu("NVIDIA H200", 495e12, 989e12, 4.8e12),
        _gpu("NVIDIA L4", 60e12, 121e12, 0.3e12),
        _gpu("Tesla T4", 8.1e12, 65e12, 0.32e12),
    )
}


def device_rates() -> Rates:
    """The rates of the default device: from a table, a file, or measured as by `measure_rates`."""
    device = _default_device().device_kind
    return KNOWN.get(device) or measured_rates(device)


def measure_rates() -> Rates:
    """Measures the default device now, in some 20 seconds, whatever the table says.

    `aop.plan` and `min_speedup` do it where they need it: once for a device that is not in the
    table, on this machine and with this version of JAX. The rates are kept in a file in the folder
    ~/.cache/mem_aop_jax, or in the one that the environment variable MEM_AOP_JAX_CACHE names.
    """
    rates = _measured_and_kept(_default_device().device_kind)
    measured_rates.cache_clear()
    return rates


@functools.cache
def measured_rates(device: str) -> Rates:
    """The measured rates of the default device, from the file where they are kept."""
    try:
        return Rates(**json.loads(_rates_file(device).read_text()))
    except (OSError, ValueError, TypeError):  # none, or of another version of this library
        return _measured_and_kept(device)


def _measured_and_kept(device: str) -> Rates:
    # also inside of `jit`
    with jax.ensure_compile_time_eval(), jax.disable_jit(False), jax.transfer_guard("allow"):
        rates = _measured(device)
    path = _rates_file(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(rates._asdict(), file)
        os.replace(file.name, path)
    except OSError as error:
        say(f"the rates cannot be kept for the next process: {error}")
    return rates


def _default_device() -> jax.Device:
    default = jax_option("jax_default_device")
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def _rates_file(device: str) -> pathlib.Path:
    """Of a device on this machine: CPUs of all kinds have the same name."""
    folder = os.environ.get("MEM_AOP_JAX_CACHE") or pathlib.Path.home() / ".cache" / "mem_aop_jax"
    names = device, platform.node(), platform.machine(), str(os.cpu_count()), jax.__version__
    name = re.sub(r"[^\w.]+", "-", "-".join(names))
    return pathlib.Path(folder) / f"rates-{name}.json"


_Call = tuple[Callable, tuple]  # a function and its arguments


def _measured(device: str) -> Rates:
    steps_of_it = itertools.count(1)

    def say_next(what: str) -> None:
        say(f"measuring {device}, {next(steps_of_it)} of 5: {what}")

    say_next("products of both precisions")
    flops = 2 * ROWS * FEATURES**2
    full, half = (
        flops / min(_round_seconds(_product_calls(FEATURES, dtype))[0])
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    small, large = FEATURES // 2, 2 * FEATURES  # with `KERNELS` FLOPs

    def relative(reference: Sequence[float], other: Sequence[float], share: float = 1) -> float:
        return min(1.0, share * float(np.median(np.divide(reference, other))))

    say_next("small products")
    forward, kernel_gradient, few_columns = _round_seconds(
        [*_product_calls(small, jnp.float32), _narrow_product_call(small)]
    )
    small_kernel = relative(forward, kernel_gradient)
    narrow = relative(forward, few_columns, NARROW / small)
    say_next("large products")
    forward, kernel_gradient = _round_seconds(_product_calls(large, jnp.float32), rounds=7)
    kernel = relative(forward, kernel_gradient)
    many, some, few = (
        jnp.ones((number, FEATURES), jnp.float32) for number in (8 * ROWS, ROWS, ROWS // 4)
    )
    scores = jnp.asarray(np.random.default_rng(0).random(4 * ROWS), jnp.float32)
    selection = functools.partial(topk, None, k=ROWS)
    calls: list[_Call] = [
        (row_norms, (many,)), (jnp.negative, (few,)), (jnp.add, (some, some)),
        (selection, (scores,)),
    ]  # fmt: skip
    say_next("passes over arrays")
    read, cached, added, chosen = map(min, _round_seconds(calls))
    read, row = many.nbytes / read, chosen / scores.size
    cached = max(read, 2 * few.nbytes / cached)
    sums = max(cached, 3 * some.nbytes / added)

    size = 256  # a layer whose arithmetic takes little time
    product, norms = 2 * size**3 / full, 8 * size**2 / cached
    configs = (
        None,
        MemAOP(ratio=0.5, memory=None),
        MemAOP(ratio=0.5, policy="priority", memory="subspace", rank=SUBSPACE // 2),
    )
    steps = [_layer_step_call(config, size) for config in configs]
    say_next("steps of a layer")
    exact, without_memory, with_subspace = map(min, _round_seconds(steps))
    step = max(0.0, exact - (2 + 1 / small_kernel) * product)
    layer = max(0.0, without_memory - step - (2 + 0.5 / small_kernel) * product - norms)
    subspace = max(0.0, with_subspace - without_memory)
    rates = Rates(device, full, half, read, kernel, row, step, layer, subspace)
    return rates._replace(cached=cached, small_kernel=small_kernel, narrow=narrow, sums=sums)


def _product_calls(features: int, dtype: chex.ArrayDType) -> list[_Call]:
    """A layer's product with the kernel, and the gradient of the kernel."""
    x, g = (jnp.full((ROWS, features), number, dtype) for number in (1, 2))
    kernel = jnp.ones((features, features), dtype)

    def product(contracted: tuple[int], a: chex.Array, b: chex.Array) -> chex.Array:
        return jax.lax.dot_general(a, b, ((contracted, contracted), ((), ())))

    forward = functools.partial(product, (1,)), (x, kernel)
    return [forward, (functools.partial(product, (0,)), (x, g))]


def _narrow_product_call(features: int) -> _Call:
    """The product of the rows with a few columns."""
    shapes = (ROWS, features), (features, NARROW)
    return jnp.matmul, tuple(jnp.ones(shape, jnp.float32) for shape in shapes)


def _layer_step_call(config: MemAOP | None, size: int) -> _Call:
    """A step of a layer with so many rows and features."""
    x, kernel = jnp.ones((size, size), jnp.float32), jnp.ones((size, size), jnp.float32)

    def step(x: chex.Array, kernel: chex.Array, memory: Any, key: chex.PRNGKey) -> chex.ArrayTree:
        def loss(*args: Any) -> chex.Array:
            return jnp.sum(dense(*args, config=config, key=key) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(x, kernel, memory)

    return step, (x, kernel, init_memory(config, size, size, size), jax.random.key(0))


def _round_seconds(
    calls: Sequence[_Call], rounds: int = 15, shortest: float = 0.005
) -> list[tuple[float, ...]]:
    """For each call the seconds that it takes, in each of so many rounds of all calls.

    A round repeats each call for at least the shortest time.
    """
    compiled = [(jax.jit(function).lower(*args).compile(), args) for function, args in calls]

    def seconds(call: _Call, times: int) -> float:
        function, args = call
        start = time.perf_counter()
        for _ in range(times):
            results = function(*args)
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / times

    for call in compiled:
        seconds(call, 1)
    times = [max(1, math.ceil(shortest / seconds(call, 1))) for call in compiled]
    measured = [
        [seconds(call, number) for call, number in zip(compiled, times, strict=True)]
        for _ in range(rounds)
    ]
    return list(zip(*measured, strict=True))
