"""How fast a device is: known ones from a table, others measured in a few seconds."""

import functools
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mem_aop_jax.config import MemAOP
from mem_aop_jax.dense import dense
from mem_aop_jax.memory import init_memory
from mem_aop_jax.policies import row_norms


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
      subspace: seconds that one with a subspace takes more than that.
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


# The vendors' peaks of products (of float32: as JAX computes them by default) and of memory.
_TPU, _GPU = (1.0, 1e-9, 0.0, 1e-5, 5e-5), (1.0, 4e-9, 0.0, 4e-5, 2.5e-4)
KNOWN = {
    rates.device: rates
    for rates in (
        Rates("TPU v4", 275e12, 275e12, 1.23e12, *_TPU),
        Rates("TPU v5 lite", 197e12, 197e12, 0.82e12, *_TPU),
        Rates("TPU v5", 459e12, 459e12, 2.77e12, *_TPU),
        Rates("TPU v6 lite", 918e12, 918e12, 1.64e12, *_TPU),
        Rates("NVIDIA A100-SXM4-40GB", 156e12, 312e12, 1.56e12, *_GPU),
        Rates("NVIDIA A100-SXM4-80GB", 156e12, 312e12, 2.04e12, *_GPU),
        Rates("NVIDIA H100 80GB HBM3", 495e12, 989e12, 3.35e12, *_GPU),
        Rates("NVIDIA H200", 495e12, 989e12, 4.8e12, *_GPU),
        Rates("NVIDIA L4", 60e12, 121e12, 0.3e12, *_GPU),
        Rates("Tesla T4", 8.1e12, 65e12, 0.32e12, *_GPU),
    )
}


def device_rates() -> Rates:
    """Of the default device. Measured once in a process where the device is not in the table."""
    kind = jax.devices()[0].device_kind
    return KNOWN.get(kind) or measured_rates(kind)


@functools.cache
def measured_rates(device: str) -> Rates:
    """Of the default device, whatever the table says."""
    rows, features = 2048, 1024
    full, _ = _products(rows, features, jnp.float32)
    half, _ = _products(rows, features, jnp.bfloat16)
    other, kernel = _products(rows, features // 2, jnp.float32)
    kernel = min(1.0, kernel / other)
    many = jnp.ones((8 * rows, features), jnp.float32)
    read = many.nbytes / _seconds(row_norms, many)
    scores = jnp.asarray(np.random.default_rng(0).random(4 * rows), jnp.float32)
    row = _seconds(lambda scores: jax.lax.top_k(scores, rows), scores) / scores.size

    size = 256  # of a layer whose arithmetic takes little time
    product, norms = 2 * size**3 / full, 8 * size**2 / read
    configs = (
        None,
        MemAOP(ratio=0.5, memory=None),
        MemAOP(ratio=0.5, policy="priority", memory="subspace", rank=16),
    )
    exact, alone, beside = (_layer_seconds(config, size) for config in configs)
    step = max(0.0, exact - (2 + 1 / kernel) * product)
    layer = max(0.0, alone - step - (2 + 0.5 / kernel) * product - norms)
    return Rates(device, full, half, read, kernel, row, step, layer, max(0.0, beside - alone))


def _products(rows, features, dtype):
    """FLOPs per second of a layer's products with a kernel, and of the kernel's gradient."""
    x, g = jnp.ones((rows, features), dtype), jnp.ones((rows, features), dtype)
    kernel = jnp.ones((features, features), dtype)
    flops = 2 * rows * features**2
    seconds = [
        _seconds(
            functools.partial(jax.lax.dot_general, dimension_numbers=((dims, dims), ((), ()))), *of
        )
        for dims, of in (((1,), (g, kernel)), ((0,), (x, g)))
    ]
    return tuple(flops / taken for taken in seconds)


def _layer_seconds(config, size):
    """Of a step of a layer with so many rows and features."""
    x, kernel = jnp.ones((size, size), jnp.float32), jnp.ones((size, size), jnp.float32)
    memory = config and init_memory(config, size, size, size)

    def step(x, kernel, memory, key):
        def loss(*args):
            return jnp.sum(dense(*args, config=config, key=key) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(x, kernel, memory)

    return _seconds(step, x, kernel, memory, jax.random.key(0))


def _seconds(function, *args, rounds=9, shortest=0.01):
    """The median of so many rounds, each of calls one after the other for so many seconds."""
    compiled = jax.jit(function).lower(*args).compile()

    def taken(calls):
        start = time.perf_counter()
        for _ in range(calls):
            results = compiled(*args)
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / calls

    taken(1)
    calls = max(1, math.ceil(shortest / taken(1)))
    return float(np.median([taken(calls) for _ in range(rounds)]))
