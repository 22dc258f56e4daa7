"""How fast a device is: known ones from a table, others measured in a few seconds."""

import functools
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mem_aop_jax._compat import TPU_COPIES_ROWS
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.dense import dense
from mem_aop_jax._core.memory import init_memory
from mem_aop_jax._core.policies import topk
from mem_aop_jax._numerics import row_norms

SUBSPACE = 32  # directions, of both sides together
ARRAYS = 2**22, 2**25  # bytes of one that a cache holds, and of one that it does not
KERNELS = 2**30, 2**34  # FLOPs of a gradient of the kernel: small and large
NARROW = 32  # columns


class Rates(NamedTuple):
    """What a device does in a second, and what a layer's step takes on it beside that.

    Attributes:
      device: its kind.
      flops: FLOPs per second, in products of float32.
      half_flops: the same in products of bfloat16 and float16.
      bytes: bytes per second that are read or written.
      kernel: speed of the kernel's gradient, which sums over rows, relative to the other products.
      row: seconds to choose from among rows, for each of them.
      step: seconds that any step takes.
      layer: seconds that one of an approximate layer takes more.
      subspace: seconds that one with a subspace of `SUBSPACE` directions takes more than that.
      cached: as `bytes`, of arrays of no more than `ARRAYS[0]` bytes, where `bytes` is that of
        arrays of `ARRAYS[1]` and more; None is the same.
      small_kernel: as `kernel`, of `KERNELS[0]` FLOPs, where `kernel` is that of `KERNELS[1]`; None
        is the same.
      narrow: speed of a product of the rows with `NARROW` columns, relative to other products.
      one_pass: whether all that is needed of all rows is computed in one pass over them.
      sums: as `bytes`, of passes that only add up arrays; None is the same.
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


# The vendors' peaks of products (of float32: as JAX computes them by default) and of memory.
_TPU = {"row": 1e-9, "layer": 1e-5, "subspace": 5e-5, "one_pass": TPU_COPIES_ROWS}
_GPU = {"row": 3e-9, "layer": 4e-5, "subspace": 1.5e-4}
KNOWN = {
    rates.device: rates
    for rates in (
        Rates("TPU v4", 275e12, 275e12, 1.23e12, **_TPU),
        Rates("TPU v5 lite", 197e12, 197e12, 0.82e12, **_TPU),
        Rates("TPU v5", 459e12, 459e12, 2.77e12, **_TPU),
        Rates("TPU v6 lite", 918e12, 918e12, 1.64e12, **_TPU),
        Rates("NVIDIA A100-SXM4-40GB", 156e12, 312e12, 1.56e12, **_GPU),
        Rates("NVIDIA A100-SXM4-80GB", 156e12, 312e12, 2.04e12, **_GPU),
        Rates("NVIDIA H100 80GB HBM3", 495e12, 989e12, 3.35e12, **_GPU),
        Rates("NVIDIA H200", 495e12, 989e12, 4.8e12, **_GPU),
        Rates("NVIDIA L4", 60e12, 121e12, 0.3e12, **_GPU),
        Rates("Tesla T4", 8.1e12, 65e12, 0.32e12, **_GPU),
    )
}


def device_rates() -> Rates:
    """Of the default device. Measured once in a process where the device is not in the table."""
    default = jax.config.jax_default_device
    device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
    return KNOWN.get(device.device_kind) or measured_rates(device.device_kind)


@functools.cache
def measured_rates(device: str) -> Rates:
    """Of the default device, whatever the table says; also inside of `jit`."""
    with jax.ensure_compile_time_eval(), jax.disable_jit(False), jax.transfer_guard("allow"):
        return _measured(device)


def _measured(device):
    rows, features = 2048, 1024
    flops = 2 * rows * features**2
    full, half = (
        flops / min(_together(_products(rows, features, dtype))[0])
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    small, large = features // 2, 2 * features  # of `KERNELS` FLOPs

    def relative(one, other, share=1):
        return min(1.0, share * float(np.median(np.divide(one, other))))

    along, over_rows, few_columns = _together(
        [*_products(rows, small, jnp.float32), _product_of_few(rows, small)]
    )
    small_kernel = relative(along, over_rows)
    narrow = relative(along, few_columns, NARROW / small)
    kernel = relative(*_together(_products(rows, large, jnp.float32), rounds=7))
    many, some, few = (
        jnp.ones((number, features), jnp.float32) for number in (8 * rows, rows, 512)
    )
    scores = jnp.asarray(np.random.default_rng(0).random(4 * rows), jnp.float32)
    selection = functools.partial(topk, None, k=rows)
    calls = (row_norms, many), (jnp.negative, few), (jnp.add, some, some), (selection, scores)
    read, cached, added, chosen = map(min, _together(calls))
    read, row = many.nbytes / read, chosen / scores.size
    cached = max(read, 2 * few.nbytes / cached)
    sums = max(cached, 3 * some.nbytes / added)

    size = 256  # of a layer whose arithmetic takes little time
    product, norms = 2 * size**3 / full, 8 * size**2 / cached
    configs = (
        None,
        MemAOP(ratio=0.5, memory=None),
        MemAOP(ratio=0.5, policy="priority", memory="subspace", rank=SUBSPACE // 2),
    )
    steps = [_layer_step(config, size) for config in configs]
    exact, alone, beside = map(min, _together(steps))
    step = max(0.0, exact - (2 + 1 / small_kernel) * product)
    layer = max(0.0, alone - step - (2 + 0.5 / small_kernel) * product - norms)
    subspace = max(0.0, beside - alone)
    always = Rates(device, full, half, read, kernel, row, step, layer, subspace)
    return always._replace(cached=cached, small_kernel=small_kernel, narrow=narrow, sums=sums)


def _products(rows, features, dtype):
    """Functions with arguments: of a layer's product with the kernel, and its gradient."""
    x, g = (jnp.full((rows, features), number, dtype) for number in (1, 2))
    kernel = jnp.ones((features, features), dtype)

    def product(of, a, b):
        return jax.lax.dot_general(a, b, ((of, of), ((), ())))

    along = functools.partial(product, (1,)), x, kernel
    return [along, (functools.partial(product, (0,)), x, g)]


def _product_of_few(rows, features):
    """The same of the product with a few columns."""
    x, few = (jnp.ones(shape, jnp.float32) for shape in ((rows, features), (features, NARROW)))
    return jnp.matmul, x, few


def _layer_step(config, size):
    """The same of a step of a layer with so many rows and features."""
    x, kernel = jnp.ones((size, size), jnp.float32), jnp.ones((size, size), jnp.float32)
    memory = config and init_memory(config, size, size, size)

    def step(x, kernel, memory, key):
        def loss(*args):
            return jnp.sum(dense(*args, config=config, key=key) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(x, kernel, memory)

    return step, x, kernel, memory, jax.random.key(0)


def _together(calls, rounds=15, shortest=0.005):
    """Seconds of each of some functions with arguments, in each of so many rounds of all.

    A round calls each of them again and again for so many seconds.
    """
    compiled = [(jax.jit(function).lower(*args).compile(), args) for function, *args in calls]

    def taken(function, args, times):
        start = time.perf_counter()
        for _ in range(times):
            results = function(*args)
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / times

    for call in compiled:
        taken(*call, 1)
    times = [max(1, math.ceil(shortest / taken(*call, 1))) for call in compiled]
    seconds = [
        [taken(*call, number) for call, number in zip(compiled, times, strict=True)]
        for _ in range(rounds)
    ]
    return list(zip(*seconds, strict=True))
