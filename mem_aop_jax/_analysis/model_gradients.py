"""Backward passes through a model, to measure: what `allocate` and `Controller` share.

With `Norms` probes a pass is exact, the directions of each layer follow the batch's rows, and what
is left of the rows outside of them is measured.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.flops import flops_left_out
from mem_aop_jax._core.memory import Subspace
from mem_aop_jax._core.probe import Norms, Probe, is_memory
from mem_aop_jax._models import Layer, Rules, config_for, eval_shape
from mem_aop_jax._numerics import accumulation_dtype, safe_divide
from mem_aop_jax.linen import COLLECTION, wrap
from mem_aop_jax.transform import carry_memory


class Pass(NamedTuple):
    """A backward pass through a model.

    Attributes:
      gradient: of the parameters.
      memory: of the memory, or of the probes in its place.
      flops: as the compiler counts them; 0 where it does not.
    """

    gradient: chex.ArrayTree
    memory: chex.ArrayTree
    flops: float


class _Static:
    """A model as a static argument: one with a list in it has no hash, and equals itself alone."""

    def __init__(self, model):
        self.model = model
        try:
            self._hash, self._key = hash(model), model
        except TypeError:
            self._hash, self._key = id(model), id(model)

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        return self._key == other._key


@functools.lru_cache(maxsize=8)  # measuring once more compiles nothing anew
def backward(loss: Callable) -> Callable[..., Pass]:
    """The function `(model, params, memory, batch, key) -> Pass`, of a loss as in `allocate`."""

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(static, params, memory, batch, key):
        def loss_of(params, memory):
            return loss(static.model, {"params": params, COLLECTION: memory}, batch, key)

        return jax.grad(loss_of, argnums=(0, 1), allow_int=True)(params, memory)

    flops = {}

    def call(model, params, memory, batch, key):
        args = _Static(model), params, memory, batch, key
        leaves, structure = jax.tree.flatten(args[1:])
        kind = args[0], structure, tuple((jnp.shape(a), jnp.result_type(a)) for a in leaves)
        if kind not in flops:  # the call below uses what is compiled here
            flops[kind] = counted_flops(gradients, *args)
        return Pass(*gradients(*args), flops[kind])

    return call


def arguments(example_input: chex.ArrayTree) -> tuple:
    """What `model.init` takes, of what may be a tuple of it."""
    return example_input if isinstance(example_input, tuple) else (example_input,)


def check_batches(caller: str, batches: Sequence[chex.ArrayTree]) -> None:
    """There are two at least.

    Raises:
      ValueError: fewer.
    """
    if len(batches) < 2:
        raise ValueError(
            f"{caller}: got {len(batches)} batches; at least 2 are needed, since directions come "
            "from other batches than the rows."
        )


def wrapped(model: nn.Module, configs: Mapping[str, MemAOP | None]) -> nn.Module:
    """The model with a configuration for each of these layers, by path."""
    return wrap(model, [(re.escape(path), config) for path, config in configs.items()])


def first_memory(model: nn.Module, *args: chex.ArrayTree) -> dict:
    """The memories that a wrapped model starts with, for inputs like these; nothing is computed."""
    return carry_memory(memory_shapes(model, *args)).init(None).memory


def memory_shapes(model: nn.Module, *args: chex.ArrayTree) -> dict:
    """Those of the memories of a wrapped model."""
    return eval_shape(model.init, jax.random.key(0), *args).get(COLLECTION, {})


def each_memory(tree: chex.ArrayTree, change: Callable, path: tuple[str, ...] = ()) -> dict:
    """The tree of a collection with `change(path of the layer, memory)` for each memory."""
    return {
        name: change("/".join(path), node)
        if is_memory(node)
        else each_memory(node, change, (*path, name))
        for name, node in tree.items()
    }


def with_norms(sizes: Mapping[str, tuple[int, ...]], path: str, memory: Subspace) -> Probe:
    """A probe of a memory; `sizes` are by path, of which the first is that of rows."""
    rows, stack = sizes[path][0], jnp.shape(memory.uses)
    ranks = [1 + basis.shape[-1] for basis in (*memory[:2], memory[1])]
    shapes = [*((*stack, rows, number) for number in ranks), stack, stack]
    return Probe(memory, Norms(*(jnp.zeros(shape, jnp.float32) for shape in shapes)), 1)


def next_memory(probes: chex.ArrayTree) -> chex.ArrayTree:
    """The memories, some subspace iterations on; of what is returned as the probes' gradient."""
    return jax.tree.map(lambda probe: probe.memory, probes, is_leaf=is_memory)


def each_pair(tree: chex.ArrayTree, other: chex.ArrayTree, change: Callable) -> dict:
    """A collection with `change(memory, the other's at the same place or None)` for each memory."""
    return {
        name: change(node, other.get(name))
        if is_memory(node)
        else each_pair(node, other.get(name, {}), change)
        for name, node in tree.items()
    }


def first_of(shapes: chex.ArrayTree, directions: chex.ArrayTree) -> dict:
    """The memory of these shapes, of the first of the directions in a memory that has more."""

    def of_layer(shape, found):
        sides = [
            None if want is None else have[..., : want.shape[-1]].astype(want.dtype)
            for want, have in zip(shape[:2], found[:2], strict=True)
        ]
        return Subspace(*sides, jnp.zeros(shape.uses.shape, shape.uses.dtype))

    return each_pair(shapes, directions, of_layer)


def square(
    gradient: chex.ArrayTree,
    other: chex.ArrayTree | None = None,
    metric: chex.ArrayTree | None = None,
) -> float:
    """The sum of squares of all floating entries, or of the differences from another gradient.

    Each times its entry of the metric, if there is one.
    """
    largest, of_metric, in_units = _square(*map(_floating, (gradient, other, metric)))
    return float(in_units) * float(largest) ** 2 * float(of_metric)  # which float32 could not hold


def _floating(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@jax.jit
def _square(leaves, others, metric):
    leaves = [leaf.astype(accumulation_dtype(leaf.dtype)) for leaf in leaves]
    if others:
        leaves = [a - b.astype(a.dtype) for a, b in zip(leaves, others, strict=True)]
    metric = metric or [jnp.ones((), a.dtype) for a in leaves]
    largest, of_metric = (
        functools.reduce(jnp.maximum, (jnp.max(jnp.abs(a), initial=0) for a in tree))
        for tree in (leaves, metric)
    )
    in_units = sum(
        jnp.sum(safe_divide(a, largest) ** 2 * safe_divide(by, of_metric).astype(a.dtype))
        for a, by in zip(leaves, metric, strict=True)
    )
    return largest, of_metric, in_units


def finite_norm(
    caller: str, batch: int, gradient: chex.ArrayTree, metric: chex.ArrayTree | None
) -> float:
    """That of the gradient of a batch, of which this is the number.

    Raises:
      ValueError: it is zero or not finite.
    """
    norm = square(gradient, None, metric) ** 0.5
    if not 0 < norm < np.inf:
        raise ValueError(
            f"{caller}: the gradient of batch {batch} has the norm {norm}; it must be finite and "
            "not 0. Look for NaNs in the batch and in the parameters."
        )
    return norm


def counted_flops(function: jax.stages.Wrapped, *args) -> float:
    """FLOPs of a jitted function of such arguments, as XLA counts them; 0 where it does not.

    Of what it compiles for CPUs where the arguments are on a GPU: products are calls into
    libraries there, which count nothing.
    """
    if jax.default_backend() != "gpu":
        return _flops(function.lower(*args))
    try:
        device = jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return 0.0
    args = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if _is_array(a) else a, args
    )
    with jax.default_device(device):
        return _flops(function.lower(*args))


def _flops(lowered):
    return (lowered.compile().cost_analysis() or {}).get("flops", 0.0)


def _is_array(a):
    return hasattr(a, "shape") and hasattr(a, "dtype")


def model_flops_left_out(rules: Rules, layers: Sequence[Layer]) -> float:
    """The same of the layers of a model that was wrapped with these rules."""
    return sum(flops_left_out(config_for(rules, layer.path), *layer[1:4]) for layer in layers)
