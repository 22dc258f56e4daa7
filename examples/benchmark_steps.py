"""The steps of a dense layer that benchmark.py times, in JAX and PyTorch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flop_counts import estimate_flops
from jax import lax
from timing import Step

import mem_aop_jax as aop

PASSES = ("both", "forward", "backward")


class Sizes(NamedTuple):
    """Sizes of a dense layer and its batch, and the dtype of its arrays."""

    rows: int
    in_features: int
    out_features: int
    dtype: str


# ---- JAX


def layer_inputs(sizes: Sizes) -> tuple:
    """Inputs x, the kernel, and cotangents g whose rows differ in size by orders of magnitude."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (sizes[0], sizes[1]), sizes[1:3], (sizes[0], sizes[2])
    x, kernel, g = (
        jax.random.normal(key, shape) for key, shape in zip(keys[:3], shapes, strict=True)
    )
    g *= 1e-6 * jnp.exp(jax.random.normal(keys[3], (sizes.rows, 1)))
    arrays = x, kernel / sizes.in_features**0.5, g
    return tuple(a.astype(sizes.dtype) for a in arrays)


def layer_step(
    config: aop.MemAOP | None, sizes: Sizes, inputs: tuple, passes: str = "both"
) -> Step:
    """Y, dX and dW of one layer.

    Args:
      config: the layer's configuration; None is exact.
      sizes: the layer's sizes.
      inputs: the arrays that `layer_inputs` makes for these sizes.
      passes: which of `PASSES` to compute.
    """

    def product(x, kernel, memory, key):
        return aop.dense(x, kernel, memory, config=config, key=key)

    def step(x, kernel, g, key, memory):
        y = product(x, kernel, memory, key)
        if passes == "forward":
            return memory, (y,)
        if passes == "both":  # in a model the backward pass waits for the forward pass
            kernel = kernel_after(y, kernel)
        pullback = jax.vjp(lambda *args: product(*args, key), x, kernel, memory)[1]
        dx, dw, memory = pullback(g)
        return memory, (dx, dw) if passes == "backward" else (y, dx, dw)

    memory = config and aop.init_memory(config, *sizes)
    return Step(step, inputs, memory, config.refresh if config else 1)


def products_step(dw_rows: int, dx_rows: int, inputs: tuple, passes: str = "both") -> Step:
    """Y, and dW and dX of their first rows alone: no layer that chooses so many rows is faster."""

    def step(x, kernel, g, key, state):
        del key
        y = x @ kernel
        if passes == "forward":
            return state, (y,)
        if passes == "both":
            kernel = kernel_after(y, kernel)
        dw = lax.dot_general(x[:dw_rows], g[:dw_rows], (((0,), (0,)), ((), ())))
        dx = lax.dot_general(g[:dx_rows], kernel, (((1,), (1,)), ((), ())))
        return state, (dx, dw) if passes == "backward" else (y, dx, dw)

    return Step(step, inputs, None)


@jax.jit  # also where the caller is not: what depends on the platform is compiled in every call
def kernel_after(y: jax.Array, kernel: jax.Array) -> jax.Array:
    """The kernel, which a CPU cannot read before it has computed the outputs y.

    A CPU runs several operations at a time, and drops barriers before it decides on their order.
    """

    def on_cpu(kernel, y):
        element = jnp.max(y[:1, :1], initial=0)
        never = (element != element) & (element > 0)
        return jnp.where(never, jnp.zeros_like(kernel), kernel)

    return lax.platform_dependent(kernel, y, cpu=on_cpu, default=lambda kernel, y: kernel)


def overhead(config: aop.MemAOP, sizes: Sizes, passes: str = "both") -> float:
    """FLOPs of an estimate beside its two products of chosen rows, relative to the exact passes."""
    rows, in_features, out_features, _ = sizes
    product = 2 * rows * in_features * out_features
    estimate = estimate_flops(config, rows, in_features, out_features)
    chosen = (config.selected_rows(rows) + config.input_rows(rows)) / rows
    beside = max(0.0, estimate / product - chosen)
    return {"both": beside / 3, "backward": beside / 2, "forward": 0.0}[passes]


# ---- PyTorch


def torch_layers(sizes: Sizes, inputs: tuple, k: int) -> dict[str, Callable[[], None]]:
    """A step of the layer in PyTorch by name: exact, and with the k largest rows, by hand.

    Row memory is updated in place.
    """
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    dtype = getattr(torch, sizes.dtype)

    def tensor(a):
        a = torch.from_numpy(np.array(a.astype(jnp.float32)))
        return a.to(device=device, dtype=dtype)

    x, kernel, g = map(tensor, inputs[:3])
    x.requires_grad_()
    kernel.requires_grad_()

    class Largest(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, kernel, memory):
            ctx.save_for_backward(x, kernel)
            ctx.memory = memory
            return x @ kernel

        @staticmethod
        def backward(ctx, g):
            x, kernel = ctx.saved_tensors
            dx = g @ kernel.T
            if ctx.memory is not None:
                x, g = (waiting.add_(a) for waiting, a in zip(ctx.memory, (x, g), strict=True))
            scores = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(g, dim=1)
            chosen = torch.topk(scores, k, sorted=False).indices
            dw = x[chosen].T @ g[chosen]
            for waiting in ctx.memory or ():
                waiting[chosen] = 0
            return dx, dw, None

    def run(product):
        x.grad = kernel.grad = None
        product(x, kernel).backward(g)
        if device == "cuda":
            torch.cuda.synchronize()

    memory = torch.zeros_like(x), torch.zeros_like(g)
    return {
        "PyTorch exact": lambda: run(torch.matmul),
        "PyTorch topk": lambda: run(lambda x, kernel: Largest.apply(x, kernel, None)),
        "PyTorch topk, rows": lambda: run(lambda x, kernel: Largest.apply(x, kernel, memory)),
    }
