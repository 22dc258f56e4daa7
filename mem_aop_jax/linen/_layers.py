"""Layers that keep their memories in a variable collection."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import re
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import Scope
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from mem_aop_jax._core import validation
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.dense import dot_general
from mem_aop_jax._core.layout import contraction_sizes, warn_once, why_exact
from mem_aop_jax._core.memory import memory_name
from mem_aop_jax._core.memory_kinds import init_memory
from mem_aop_jax._core.probe import Probe, is_memory
from mem_aop_jax._models import Layer, eval_shape

COLLECTION = OVERWRITE_WITH_GRADIENT  # TrainState replaces its variables by their gradients
LAYERS_MEMORY = re.compile(r"memory(_\d+)?")  # the name of a memory of a layer in this file
RNG = "mem_aop"  # apply(..., rngs={RNG: key}), for the random policies


class Dense(nn.Dense):
    """`flax.linen.Dense` whose kernel gradient is Mem-AOP-GD's (arXiv 2110.09164).

    A drop-in: every field of `nn.Dense` but `dot_general` and `dot_general_cls`, the same
    parameters with the same initial values, the same outputs. The gradient of the bias is exact,
    and the gradient of the inputs unless `config.input_grad` is set.

    `init` puts the first memory into the collection `COLLECTION`; a `Memory` of rows for as many as
    the example input has: initialise with a batch of the training size. The gradient with respect
    to that collection is the next memory. Hand it on with `carry_memory`; or keep all variables in
    the `params` of an unmodified `flax.training.train_state.TrainState`, which overwrites the
    collection with its gradient (there, a layer that takes no part in a step loses its memory, and
    a learning-rate schedule does not rescale it).

    A layer that is called several times in a forward pass has one memory per call. Inside
    `nn.remat` or `nn.jit` the calls share one, which is an error in the next step.

    Without the collection the layer is exact, at any batch size; differentiating it with respect
    to its parameters is then an error if the configuration has a memory.

    Attributes:
      config: what to compute of the kernel gradient; None is an exact layer.

    Example:
      >>> import jax, jax.numpy as jnp, mem_aop_jax as aop
      >>> layer = aop.linen.Dense(4, config=aop.MemAOP(ratio=0.25))
      >>> variables = layer.init(jax.random.key(0), jnp.ones((8, 3)))
      >>> variables[aop.linen.COLLECTION]["memory"].inputs.shape
      (8, 3)
    """

    config: MemAOP | None = None

    def __call__(self, inputs: chex.Array) -> chex.Array:
        """`inputs @ kernel + bias`: `(..., in_features)` to `(..., features)`."""
        if self.dot_general is not None or self.dot_general_cls is not None:
            raise ValueError(
                f"{_name(self)}: aop.linen.Dense has a dot_general of its own; leave dot_general "
                "and dot_general_cls unset, or use flax.linen.Dense."
            )
        product = functools.partial(product_of, self, self.config)
        object.__setattr__(self, "dot_general", product)  # the fields of a module are frozen
        try:
            return super().__call__(inputs)
        finally:
            object.__setattr__(self, "dot_general", None)


class DotGeneral(nn.Module):
    """The `dot_general_cls` of a Flax layer, with its memory in a submodule of that layer.

    For `nn.Dense` and `nn.DenseGeneral` (`dot_general_cls`) and the projections of
    `nn.MultiHeadDotProductAttention` (`qkv_dot_general_cls`, `out_dot_general_cls`). The parameters
    and their initial values stay as they are; everything else is as in `Dense`.

    Attributes:
      config: what to compute of the kernel gradient; None is an exact product.

    Example:
      >>> import functools, flax.linen as nn, jax, jax.numpy as jnp, mem_aop_jax as aop
      >>> product = functools.partial(aop.linen.DotGeneral, config=aop.MemAOP(ratio=0.25))
      >>> layer = nn.Dense(4, dot_general_cls=product)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((8, 3)))
      >>> variables[aop.linen.COLLECTION]["DotGeneral_0"]["memory"].inputs.shape
      (8, 3)
    """

    config: MemAOP | None = None

    @nn.compact
    def __call__(self, lhs: chex.Array, rhs: chex.Array, *args, **options) -> chex.Array:
        """`jax.lax.dot_general`, with the same arguments."""
        return product_of(self, self.config, lhs, rhs, *args, **options)


def layers(module: nn.Module, rngs: chex.ArrayTree, *args, **kwargs) -> list[Layer]:
    """The approximate layers of a model, in the order of their first call: this library's, then
    those that `wrap` makes approximate.

    Of layers that `nn.scan` or `nn.vmap` stacks, one stands for all.

    Args:
      module: a model with `Dense`, `DotGeneral` or `wrap` in it.
      rngs: as in `module.init`; nothing is computed.
      *args: as in `module.init`, for a batch of the training size; an array of it may be a
        `jax.ShapeDtypeStruct`.
      **kwargs: as in `module.init`.
    """
    return [sized.layer for sized in sized_layers(module, rngs, *args, **kwargs)]


class Sized(NamedTuple):
    """A layer, the dtype of its inputs, and whether it is approximate by a wrapper."""

    layer: Layer
    dtype: jnp.dtype
    wrapped: bool


def sized_layers(module: nn.Module, rngs: chex.ArrayTree, *args, **kwargs) -> list[Sized]:
    """As `layers`, with more of each layer."""
    with recording() as recorded:
        _traced_init(module, rngs, args, kwargs)
    return list(recorded.values())


def probes(
    module: nn.Module, memory: chex.ArrayTree, rngs: chex.ArrayTree, *args, **kwargs
) -> chex.ArrayTree:
    """The memory of a model, with a `Probe` for each approximate layer that has none.

    For `aop.diagnostics` of layers with `memory=None`.

    Args:
      module: as in `layers`.
      memory: the collection `COLLECTION` of the model, empty where no layer has a memory.
      rngs: as in `module.init`; nothing is computed.
      *args: as in `module.init`, for a batch of the training size; an array of it may be a
        `jax.ShapeDtypeStruct`.
      **kwargs: as in `module.init`.
    """
    token = _probing.set(True)
    try:
        shapes = _traced_init(module, rngs, args, kwargs).get(COLLECTION, {})
    finally:
        _probing.reset(token)

    def with_probes(shapes, memory):
        memory = dict(memory)
        for name, node in shapes.items():
            if isinstance(node, Probe):
                memory[name] = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), node)
            elif not is_memory(node):
                memory[name] = with_probes(node, memory.get(name, {}))
        return memory

    return with_probes(shapes, memory)


def _traced_init(module, rngs, args, kwargs):
    """The shapes of a model's variables."""
    return eval_shape(functools.partial(module.init, rngs), *args, **kwargs)


_probing = contextvars.ContextVar("whether layers without a memory get a probe", default=False)
_recorded: contextvars.ContextVar[dict | None] = contextvars.ContextVar(
    "the layers of a call, by path and memory", default=None
)


def probing() -> bool:
    """Whether layers without a memory get a probe."""
    return _probing.get()


@contextlib.contextmanager
def recording() -> Iterator[dict[str, Sized]]:
    """The layers that are called inside, by the names of their memories."""
    recorded: dict[str, Sized] = {}
    token = _recorded.set(recorded)
    try:
        yield recorded
    finally:
        _recorded.reset(token)


def record(name: str, sized: Sized) -> None:
    """Notes a layer that is called, for `recording`."""
    if (recorded := _recorded.get()) is not None:
        recorded[name] = sized


def product_of(module, config, lhs, rhs, dimension_numbers, *args, **options):
    """`dot_general` with the memory, the key and the name of a module."""
    validation.config(_name(module), config)
    memory = key = None
    owner = module.parent if isinstance(module, DotGeneral) else module
    kernel = owner.get_variable("params", "kernel") if isinstance(owner, nn.Module) else None
    kernel_shape = getattr(nn.unbox(kernel), "shape", None)  # it may be an nn.Partitioned
    reason = config and why_exact(lhs, rhs, dimension_numbers, kernel_shape=kernel_shape)
    if reason:
        warn_once(f"{_name(module)}: the contraction {dimension_numbers} runs exact: {reason}")
        config = None
    if config is not None:
        validation.floating(_name(module), lhs, rhs)
        sizes = contraction_sizes(lhs, rhs, dimension_numbers)
        memory, key = _memory_of_this_call(module, config, sizes, lhs.dtype)
    return dot_general(
        lhs,
        rhs,
        dimension_numbers,
        *args,
        memory=memory,
        config=config,
        key=key,
        name=_name(module),
        **options,
    )


_calls: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def calls_in_pass(scope: Scope) -> collections.Counter:
    """Counts, of the calls in this forward pass: by the scope's root, and any keys."""
    return _calls.setdefault(scope.root, collections.Counter())


def _memory_of_this_call(module, config, sizes, dtype):
    """The memory and the key for this call of a module in this forward pass."""
    calls = calls_in_pass(module.scope)
    name = memory_name(calls[module.path])
    calls[module.path] += 1
    memory = module.get_variable(COLLECTION, name, None)
    key = module.make_rng(RNG) if module.has_rng(RNG) else None
    if module.is_initializing():
        layer = Layer("/".join(module.path), *sizes, config.selected_rows(sizes[0], _name(module)))
        record("/".join((*module.path, name)), Sized(layer, dtype, wrapped=False))
        if memory is None and module.is_mutable_collection(COLLECTION):
            new = init_memory(config, *sizes, dtype)
            if new is None and probing():
                new = Probe.of(None, draws=1)
            if new is not None:
                module.put_variable(COLLECTION, name, new)
    return memory, key


def _name(module: nn.Module) -> str:
    return "/".join(module.path) or type(module).__name__
