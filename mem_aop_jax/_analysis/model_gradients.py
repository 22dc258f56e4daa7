"""Gradients of whole models, to measure them: what `allocate` and `Controller` share.

With `Norms` probes in place of the memories a backward pass gives exact gradients, turns the
directions of each layer towards the rows of the batch, and measures the norms of the rows outside
of these directions.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mem_aop_jax._approximate.tracing import is_array
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.memory import Subspace
from mem_aop_jax._core.probe import Norms, Probe, is_memory
from mem_aop_jax._models import eval_shape
from mem_aop_jax._numerics import accumulation_dtype, safe_divide
from mem_aop_jax.linen import COLLECTION, wrap
from mem_aop_jax.transform import carry_memory

ExampleInput = (  # of a model: arrays, shapes, other arguments, and trees of them
    ArrayLike | jax.ShapeDtypeStruct | Iterable["ExampleInput"] | Mapping[Any, "ExampleInput"]
)


class BackwardPass(NamedTuple):
    """The result of one backward pass through a model.

    Attributes:
      gradient: of the loss, with respect to the parameters.
      memory: the next memory, or what the probes in its place measured.
      flops: as the compiler counts them; 0 where it does not.
    """

    gradient: chex.ArrayTree
    memory: chex.ArrayTree
    flops: float


class _StaticModel:
    """A model as a static argument; one with a list in a field has no hash, and equals itself."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._identity: object = model
        try:
            self._hash = hash(model)
        except TypeError:
            self._identity = self._hash = id(model)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StaticModel) and self._identity == other._identity


@functools.lru_cache(maxsize=8)  # a second measurement compiles nothing again
def backward_function(loss: Callable) -> Callable[..., BackwardPass]:
    """`(model, params, memory, batch, key) -> BackwardPass`, for a loss as in `allocate`."""

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(static: _StaticModel, params: Any, memory: Any, batch: Any, key: Any) -> tuple:
        def variables_loss(params: Any, memory: Any) -> chex.Array:
            return loss(static.model, {"params": params, COLLECTION: memory}, batch, key)

        return jax.grad(variables_loss, argnums=(0, 1), allow_int=True)(params, memory)

    flops: dict[tuple, float] = {}

    def backward(model: nn.Module, *arrays: chex.ArrayTree) -> BackwardPass:
        args = _StaticModel(model), *arrays
        leaves, structure = jax.tree.flatten(arrays)
        signature = args[0], structure, tuple((jnp.shape(a), jnp.result_type(a)) for a in leaves)
        if signature not in flops:  # the call below uses what is compiled here
            flops[signature] = counted_flops(gradients, *args)
        gradient, memory = gradients(*args)
        return BackwardPass(gradient, memory, flops[signature])

    return backward


# ---- models


def as_args(example_input: ExampleInput) -> tuple:
    """The example input as a tuple of positional arguments."""
    return example_input if isinstance(example_input, tuple) else (example_input,)


def check_batches(caller: str, batches: Sequence[chex.ArrayTree]) -> None:
    """Raises a `ValueError` for fewer than two batches."""
    if len(batches) < 2:
        raise ValueError(
            f"{caller}: got {len(batches)} batches; at least 2 are needed, since directions come "
            "from other batches than the rows."
        )


def wrap_layers(model: nn.Module, configs: Mapping[str, MemAOP | None]) -> nn.Module:
    """The model, wrapped with one configuration for each of these paths of layers."""
    return wrap(model, [(re.escape(path), config) for path, config in configs.items()])


def memory_shapes(model: nn.Module, *args: Any) -> dict:
    """Shapes and dtypes of a wrapped model's memories, for inputs like these."""
    return eval_shape(model.init, jax.random.key(0), *args).get(COLLECTION, {})


def first_memory(model: nn.Module, *args: Any) -> dict:
    """The memories that a wrapped model starts with. The model itself is not computed."""
    return carry_memory(memory_shapes(model, *args)).init(None).memory


# ---- memories of a model


def layer_path(path: tuple) -> str:
    """The path of the layer whose memory has this path in a collection."""
    return jax.tree_util.keystr(path[:-1], simple=True, separator="/")


def map_memories(change: Callable[[str, Any], Any], collection: chex.ArrayTree) -> Any:
    """The collection, with `change(path of the layer, memory)` for each memory."""
    return jax.tree.map_with_path(
        lambda path, memory: change(layer_path(path), memory), collection, is_leaf=is_memory
    )


def map_memory_pairs(change: Callable[[Any, Any], Any], collection: Any, other: Any) -> Any:
    """The collection, with `change(memory, the other's at the same path or None)` for each."""
    others = dict(jax.tree.leaves_with_path(other, is_leaf=is_memory))
    return jax.tree.map_with_path(
        lambda path, memory: change(memory, others.get(path)), collection, is_leaf=is_memory
    )


def norms_probes(memory: chex.ArrayTree, rows: Mapping[str, int]) -> chex.ArrayTree:
    """A probe with `Norms` for each `Subspace`; `rows` has the number of rows by path."""

    def probe(path: str, subspace: Subspace) -> Probe:
        stack = jnp.shape(subspace.uses)
        inputs, cotangents, _ = subspace
        assert cotangents is not None, "a probed layer has a direction on each side"
        numbers = [1 + basis.shape[-1] for basis in (inputs, cotangents, cotangents)]
        shapes = [*((*stack, rows[path], number) for number in numbers), stack, stack]
        return Probe(subspace, Norms(*(np.zeros(shape, np.float32) for shape in shapes)), 1)

    return map_memories(probe, memory)


def next_memory(probes: chex.ArrayTree) -> chex.ArrayTree:
    """The memories some subspace iterations on, from the gradient of `Norms` probes."""
    return map_memories(lambda _, probe: probe.memory, probes)


def truncate_directions(shapes: chex.ArrayTree, memory: chex.ArrayTree) -> chex.ArrayTree:
    """A memory of these shapes: the leading directions of a memory that has as many or more."""

    def truncate(shape: Subspace, subspace: Subspace) -> Subspace:
        inputs, cotangents = (
            None if wanted is None else held[..., : wanted.shape[-1]].astype(wanted.dtype)
            for wanted, held in zip(shape[:2], subspace[:2], strict=True)
        )
        return Subspace(inputs, cotangents, jnp.zeros(shape.uses.shape, shape.uses.dtype))

    return map_memory_pairs(truncate, shapes, memory)


# ---- norms of gradients


def floating_leaves(tree: chex.ArrayTree) -> list:
    """The leaves of a gradient that belong to floating parameters."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def squared_norm(gradient: Any, other: Any = None, metric: Any = None) -> float:
    """The squared norm of a gradient, or of its difference from another one.

    With a metric, each squared entry is multiplied by that of the metric.
    """
    size, metric_size, scaled = _scaled_square(*map(floating_leaves, (gradient, other, metric)))
    return float(scaled) * float(size) ** 2 * float(metric_size)  # which float32 could not hold


@jax.jit
def _scaled_square(leaves: list, others: list, metric: list) -> tuple:
    """The largest entry, that of the metric, and the squared norm in units of both."""
    leaves = [leaf.astype(accumulation_dtype(leaf.dtype)) for leaf in leaves]
    if others:
        leaves = [a - b.astype(a.dtype) for a, b in zip(leaves, others, strict=True)]
    metric = metric or [jnp.ones((), leaf.dtype) for leaf in leaves]
    size, metric_size = (
        functools.reduce(jnp.maximum, (jnp.max(jnp.abs(a), initial=0) for a in tree))
        for tree in (leaves, metric)
    )
    scaled = sum(
        jnp.sum(safe_divide(a, size) ** 2 * safe_divide(factor, metric_size).astype(a.dtype))
        for a, factor in zip(leaves, metric, strict=True)
    )
    return size, metric_size, scaled


def finite_norm(caller: str, batch: int, gradient: Any, metric: Any) -> float:
    """The norm of the gradient of the batch with this number.

    Raises:
      ValueError: it is zero or not finite.
    """
    norm = squared_norm(gradient, None, metric) ** 0.5
    if not 0 < norm < np.inf:
        raise ValueError(
            f"{caller}: the gradient of batch {batch} has the norm {norm}; it must be finite and "
            "not 0. Look for NaNs in the batch and in the parameters."
        )
    return norm


# ---- FLOPs


def counted_flops(function: Any, *args: Any) -> float:
    """FLOPs of a jitted function for such arguments, as XLA counts them; 0 where it does not.

    Where the arguments are on a GPU, the function is compiled for CPUs to count: for a GPU products
    are calls into libraries, which count nothing.
    """
    if jax.default_backend() != "gpu":
        return _compiled_flops(function.lower(*args))
    try:
        device = jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return 0.0
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if is_array(a) else a, args
    )
    with jax.default_device(device):
        return _compiled_flops(function.lower(*shapes))


def _compiled_flops(lowered: jax.stages.Lowered) -> float:
    return (lowered.compile().cost_analysis() or {}).get("flops", 0.0)
