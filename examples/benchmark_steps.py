"""What benchmark.py times: steps of a dense layer, in JAX and PyTorch, and of whole models."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import mem_aop_jax as aop
from mem_aop_jax._core.flops import input_gradient_flops, weight_gradient_flops
from mem_aop_jax._core.row_memory import after_on_cpu

PASSES = ("both", "forward", "backward")


class Sizes(NamedTuple):
    """Of a dense layer and its batch."""

    rows: int
    in_features: int
    out_features: int
    dtype: str


class Step(NamedTuple):
    """Something to time.

    Attributes:
      function: `(*args, key, state) -> (state, anything)`, to be compiled; each call has a key of
        its own. The state is donated, and comes first, as donated arrays become the first results
        of their shapes.
      args: arrays.
      state: pytree of arrays.
      calls: so many differ, as subspaces are refreshed in one of them; at least so many are a
        measurement.
    """

    function: Callable
    args: tuple
    state: Any
    calls: int = 1


# ---- a dense layer


def layer_inputs(sizes: Sizes) -> tuple:
    """x, kernel, and cotangents of very different size."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (sizes[0], sizes[1]), sizes[1:3], (sizes[0], sizes[2])
    x, kernel, g = (
        jax.random.normal(key, shape) for key, shape in zip(keys[:3], shapes, strict=True)
    )
    g *= 1e-6 * jnp.exp(jax.random.normal(keys[3], (sizes.rows, 1)))
    arrays = x, kernel / sizes.in_features**0.5, g
    return tuple(a.astype(sizes.dtype) for a in arrays)


def layer(config: aop.MemAOP | None, sizes: Sizes, inputs: tuple, which: str = "both") -> Step:
    """Y, dX and dW of one layer with its `layer_inputs`; None is exact."""

    def product(x, kernel, memory, key):
        return aop.dense(x, kernel, memory, config=config, key=key)

    memory = config and aop.init_memory(config, *sizes)
    step = functools.partial(_passes, product, which)
    return Step(step, inputs, memory, config.refresh if config else 1)


def products(rows_of_dw: int, rows_of_dx: int, inputs: tuple, which: str = "both") -> Step:
    """The same with dW of the first rows and dX of the first rows alone: what no layer beats."""

    def step(x, kernel, g, key, state):
        del key
        y = x @ kernel
        if which == "forward":
            return state, (y,)
        if which == "both":
            kernel = after_on_cpu(y, kernel)
        dw = lax.dot_general(x[:rows_of_dw], g[:rows_of_dw], (((0,), (0,)), ((), ())))
        dx = lax.dot_general(g[:rows_of_dx], kernel, (((1,), (1,)), ((), ())))
        return state, (dx, dw) if which == "backward" else (y, dx, dw)

    return Step(step, inputs, None)


def _passes(product, which, x, kernel, g, key, memory):
    y = product(x, kernel, memory, key)
    if which == "forward":
        return memory, (y,)
    if which == "both":  # in a model the backward pass waits for the forward pass
        kernel = after_on_cpu(y, kernel)
    pull = jax.vjp(lambda *args: product(*args, key), x, kernel, memory)[1]
    dx, dw, memory = pull(g)
    return memory, (dx, dw) if which == "backward" else (y, dx, dw)


def own_share(config: aop.MemAOP, sizes: Sizes, which: str = "both") -> float:
    """FLOPs of an estimate beside its two products of chosen rows; the exact passes are 1."""
    rows, in_features, out_features, _ = sizes
    product = 2 * rows * in_features * out_features
    both = weight_gradient_flops(config, *sizes[:3]) + input_gradient_flops(config, *sizes[:3])
    chosen = (config.selected_rows(rows) + config.input_rows(rows)) / rows
    beside = max(0.0, both / product - chosen)
    return {"both": beside / 3, "backward": beside / 2, "forward": 0.0}[which]


# ---- whole models


def model_step(model: nn.Module, loss: Callable, batch, inputs: tuple, calls: int = 1) -> Step:
    """A training step with Adam.

    Args:
      model: wrapped or not.
      loss: `loss(model, variables, batch, key)`.
      batch: what the loss takes.
      inputs: what `model.init` takes.
      calls: as in `Step`.
    """
    variables = jax.jit(model.init)(jax.random.key(0), *inputs)
    params, memory = variables["params"], variables.get(aop.linen.COLLECTION, {})
    tx = optax.chain(aop.carry_memory(memory), optax.adam(1e-3))

    def step(batch, key, state):
        params, opt_state = state

        def of(params, memory):
            return loss(model, {"params": params, aop.linen.COLLECTION: memory}, batch, key)

        gradient = jax.value_and_grad(of, argnums=(0, 1))
        value, (grads, memory) = gradient(params, aop.get_memory(opt_state))
        updates, opt_state = tx.update(grads, opt_state, params, memory=memory)
        return (optax.apply_updates(params, updates), opt_state), value

    return Step(step, (batch,), (params, tx.init(params)), calls)


# ---- PyTorch


def torch_layers(sizes: Sizes, inputs: tuple, k: int) -> dict[str, Callable[[], None]]:
    """A step of the layer in PyTorch: exact, and with the k largest rows, by hand.

    The memory is updated in place.
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
                x, g = (kept.add_(a) for kept, a in zip(ctx.memory, (x, g), strict=True))
            scores = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(g, dim=1)
            chosen = torch.topk(scores, k, sorted=False).indices
            dw = x[chosen].T @ g[chosen]
            for kept in ctx.memory or ():
                kept[chosen] = 0
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
