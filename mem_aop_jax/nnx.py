"""Flax NNX: layers that hold their memories, in models of their own or wrapped."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mem_aop_jax._compat import get_value, set_value
from mem_aop_jax._core import validation
from mem_aop_jax._core.config import MEMORIES, MemAOP
from mem_aop_jax._core.dense import dot_general
from mem_aop_jax._core.layout import contraction_sizes, why_exact
from mem_aop_jax._core.memory import carried, memory_name, rate_factor
from mem_aop_jax._core.memory_kinds import init_memory
from mem_aop_jax._core.probe import is_memory
from mem_aop_jax._cost.cost import cost
from mem_aop_jax._models import Layer, Rules, as_rules, check_all_used, config_for, eval_shape

Model = TypeVar("Model", bound=nnx.Module)

RNG = "mem_aop"  # nnx.Rngs(mem_aop=...), for the random policies; else the default stream


class Memory(nnx.Variable):
    """The variable that holds the `aop.Memory` or `aop.Subspace` of a layer.

    Its gradient is the next memory: differentiate with respect to `nnx.Param` and this type, and
    hand the gradients to `update_memory`.
    """


class DotGeneral(nnx.Module):
    """The `dot_general` of an NNX layer, with a memory for each of its calls in a forward pass.

    `model.eval()` turns it off: the layer then is exact, at any batch size, and differentiating it
    is an error if the configuration has a memory. `model.train()` turns it on.
    """

    def __init__(
        self,
        config: MemAOP,
        layers: Sequence[Layer],
        dtype: chex.ArrayDType,
        key: chex.PRNGKey | None = None,
        stack: tuple[int, ...] = (),
    ):
        """For one entry of `layers` per call, a memory of `dtype`, and a stack of such layers."""
        if config.memory_kind and "memory_dtype" in MEMORIES[config.memory_kind].options:
            config = dataclasses.replace(config, memory_dtype=config.stored_dtype(dtype))
        self.config = config
        self.layers = tuple(layers)
        self.call = 0  # the next one; after all calls of a forward pass it is 0 again
        self.deterministic = False  # the name that eval() and train() set
        for call, layer in enumerate(self.layers):
            new = init_memory(config, *layer.sizes, dtype)
            if new is not None:
                stacked = jax.tree.map(lambda a: jnp.broadcast_to(a, (*stack, *a.shape)), new)
                setattr(self, memory_name(call), Memory(stacked))
        if key is not None and stack:
            key = jax.random.split(key, stack)
        self.key = nnx.data(None if key is None else nnx.RngKey(key, tag=RNG))

    def __call__(self, lhs: chex.Array, rhs: chex.Array, *args, **options) -> chex.Array:
        """`jax.lax.dot_general`, with the same arguments."""
        layer, variable = self.layers[self.call], getattr(self, memory_name(self.call), None)
        self.call = (self.call + 1) % len(self.layers)
        memory = key = None
        if not self.deterministic:
            memory = None if variable is None else get_value(variable)
            key = self._new_key()
        options |= {"memory": memory, "key": key, "config": self.config, "name": layer.path}
        return dot_general(lhs, rhs, *args, **options)

    def _new_key(self):
        if self.key is None:
            return None
        key, used = jax.random.split(get_value(self.key))
        set_value(self.key, key)
        return used


class Linear(nnx.Linear):
    """`flax.nnx.Linear` whose kernel gradient is Mem-AOP-GD's (arXiv 2110.09164).

    The same parameters with the same initial values, the same outputs; the gradient of the bias is
    exact, and the gradient of the inputs unless `config.input_grad` is set.

    Args:
      in_features: the inputs' last dimension.
      out_features: the outputs' last dimension.
      rows: the product of all dimensions of the layer's inputs but the last, in training.
      config: what to compute of the kernel gradient; None is an exact layer.
      rngs: as in `nnx.Linear`. The random policies take their key from the stream "mem_aop", or
        the default one, which does not move on for it.
      calls: how often the layer is called in a forward pass; each call has its memory.
      **kwargs: as in `nnx.Linear`, all but `dot_general`. Unless `config.memory_dtype` says
        otherwise, the memory has the dtype `dtype`, or else `param_dtype`.

    Raises:
      TypeError: `config` is neither a configuration nor None.
      ValueError: `dot_general`, a configuration that does not fit `rows`, or no stream for a random
        policy.

    Example:
      >>> import jax.numpy as jnp, optax, mem_aop_jax as aop
      >>> from flax import nnx
      >>> config = aop.MemAOP(ratio=0.25)
      >>> model = aop.nnx.Linear(3, 1, rows=8, config=config, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
      >>> @nnx.jit
      ... def step(model, optimizer, x):
      ...     loss_fn = lambda model: jnp.mean((model(x) - x.sum(1, keepdims=True)) ** 2)
      ...     trained = nnx.DiffState(0, (nnx.Param, aop.nnx.Memory))
      ...     loss, grads = nnx.value_and_grad(loss_fn, argnums=trained)(model)
      ...     optimizer.update(model, aop.nnx.update_memory(model, grads))
      ...     return loss
      >>> losses = [step(model, optimizer, jnp.ones((8, 3))) for _ in range(3)]
      >>> bool(losses[2] < losses[0])
      True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rows: int,
        config: MemAOP | None,
        rngs: nnx.Rngs,
        calls: int = 1,
        **kwargs,
    ):
        validation.config("Linear", config)
        if "dot_general" in kwargs:
            raise ValueError(
                "Linear: aop.nnx.Linear has a dot_general of its own; leave it unset, or use "
                "flax.nnx.Linear."
            )
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        if config is None:
            return
        k = config.selected_rows(rows, "Linear")
        layers = [Layer("Linear", rows, in_features, out_features, k)] * calls
        dtype = self.param_dtype if self.dtype is None else self.dtype
        self.dot_general = nnx.data(DotGeneral(config, layers, dtype, _key(config, rngs, "Linear")))


def wrap(
    model: Model,
    config_or_rules: MemAOP | Sequence[tuple[str, MemAOP | None]],
    *example_inputs,
    rngs: nnx.Rngs | None = None,
    min_speedup: float | None = None,
    **kwargs,
) -> Model:
    """Makes the `nnx.Linear` and `nnx.LinearGeneral` layers of a model approximate, in place.

    Also those inside attention, and those that `nnx.vmap` stacked for an `nnx.scan`. Parameters and
    outputs stay as they are. Layers with a `dot_general` of their own, and those that the call does
    not reach, stay exact.

    Args:
      model: the model; it is changed only if nothing is wrong.
      config_or_rules: a configuration for all dense layers, or rules: pairs of a regular
        expression on the whole path of a layer ("encoder/mlp/linear"), and a configuration or None
        for an exact layer. The first match wins; a layer without one is exact.
      *example_inputs: inputs of the model, a batch of the training size, or its
        `jax.ShapeDtypeStruct`s. Nothing is computed.
      rngs: where the random policies take their keys from, as in `Linear`.
      min_speedup: a layer stays exact, too, unless `aop.cost` predicts that a step of one of its
        calls is so many times faster on the default device; as in `aop.linen.wrap`.
      **kwargs: further arguments of the model.

    Returns:
      The model.

    Raises:
      TypeError: no NNX module, or no configuration or rules.
      ValueError: a bad regular expression, a rule that decides about no layer, a configuration that
        does not fit a layer, or no `rngs` for a random policy.

    Example:
      >>> import jax.numpy as jnp, mem_aop_jax as aop
      >>> from flax import nnx
      >>> model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
      >>> rules = [("out", None), (".*", aop.MemAOP(ratio=0.25))]
      >>> model = aop.nnx.wrap(model, rules, jnp.ones((3, 4, 8)))
      >>> for layer in aop.nnx.layers(model):
      ...     print(layer)
      Layer(path='key', rows=12, in_features=8, out_features=8, k=3)
      Layer(path='query', rows=12, in_features=8, out_features=8, k=3)
      Layer(path='value', rows=12, in_features=8, out_features=8, k=3)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"wrap: model is of type {type(model).__name__}, not an NNX module.")
    rules = as_rules("wrap", config_or_rules)
    validation.min_speedup("wrap", min_speedup)
    products = []
    for node, config, layers, dtype, kernel_ndim in _planned(
        "wrap", model, rules, example_inputs, kwargs
    ):
        speedups = (cost(config, *layer.sizes, dtype=dtype).speedup for layer in layers)
        if min_speedup is not None and max(speedups) < min_speedup:
            continue
        stack = node.kernel.shape[: len(node.kernel.shape) - kernel_ndim]
        key = _key(config, rngs, layers[0].path)
        products.append((node, DotGeneral(config, layers, dtype, key, stack)))
    for layer, product in products:  # now that nothing is wrong
        layer.dot_general = nnx.data(product)
    return model


def layers(model: nnx.Module) -> list[Layer]:
    """The approximate layers of a model. Of stacked layers, one stands for all."""
    return [
        layer._replace(path="/".join(map(str, path[:-1])))
        for path, node in nnx.iter_graph(model)
        if isinstance(node, DotGeneral)
        for layer in node.layers
    ]


def sized_layers(
    caller: str, model: nnx.Module, rules: Rules, args: tuple
) -> list[tuple[Layer, jnp.dtype]]:
    """The layers of a model that rules make approximate, each with the dtype of its inputs."""
    planned = _planned(caller, model, rules, args, {})
    return [(layer, dtype) for _, _, layers, dtype, _ in planned for layer in layers]


def update_memory(
    model: nnx.Module,
    grads: nnx.State,
    learning_rate: optax.ScalarOrSchedule | None = None,
    count: chex.Array | int = 0,
) -> nnx.State:
    """Puts the next memories into the model; returns the gradients for `nnx.Optimizer.update`.

    What `aop.carry_memory` does for a functional training step: a layer that took no part in the
    loss keeps its memory, and a learning-rate schedule rescales it.

    Args:
      model: the model, with the memories that the gradients were taken with.
      grads: the gradients with respect to `nnx.DiffState(0, (nnx.Param, aop.nnx.Memory))`.
      learning_rate: the optimizer's schedule, if it has one.
      count: the number of updates before this one, `optimizer.step[...]`, for the schedule.

    Returns:
      The gradients without those of the memories.

    Raises:
      ValueError: no gradient for a memory of the model; a layer with several memories that was not
        called as often; a memory that was added up, scaled or averaged, as in `aop.carry_memory`.
    """
    new, param_grads = nnx.split_state(grads, Memory, ...)
    old = nnx.state(model, Memory)
    if len({jax.tree.structure(memories) for memories in (old, new)}) > 1:
        raise ValueError(
            f"update_memory: the model has {len(nnx.to_flat_state(old))} memories, the gradients "
            f"have {len(nnx.to_flat_state(new))}. Differentiate with respect to both, nnx.grad("
            "loss_fn, argnums=nnx.DiffState(0, (nnx.Param, aop.nnx.Memory)))(model), and pass the "
            "gradients on unchanged."
        )
    for path, node in nnx.iter_graph(model):
        if isinstance(node, DotGeneral) and node.call != 0:
            name, node.call = "/".join(map(str, path[:-1])), 0
            raise ValueError(
                f"update_memory: {name} has memories for {len(node.layers)} calls in a forward "
                "pass, and was called less or more often. Say calls= to aop.nnx.Linear, or wrap "
                "the model with an example input that takes the same way through it."
            )
    factor = rate_factor(learning_rate, jnp.asarray(count))
    carry = functools.partial(carried, "update_memory", factor=factor)
    nnx.update(model, jax.tree.map(carry, old, new, is_leaf=is_memory))
    return param_grads


class _Planned(NamedTuple):
    """A layer that the rules make approximate."""

    node: nnx.Linear | nnx.LinearGeneral
    config: MemAOP
    layers: list[Layer]  # one for each call
    dtype: jnp.dtype  # of the inputs
    kernel_ndim: int  # of one layer, where several are stacked


class _Recorder(nnx.Module):
    """Stands in for a layer's `dot_general`, and hands on what it is called with."""

    def __init__(self, record):
        self.record = record
        self.call = 0

    def __call__(self, lhs, rhs, dimension_numbers, *args, **options):
        self.record(self.call, lhs, rhs, dimension_numbers)
        self.call += 1
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, *args, **options)


def _planned(caller, model, rules, args, kwargs) -> list[_Planned]:
    """The layers that the rules make approximate, from the calls in a forward pass."""
    calls: dict[str, dict[int, tuple[tuple[int, int, int], jnp.dtype, int]]] = {}

    def record(path, call, lhs, rhs, dimension_numbers):
        if why_exact(lhs, rhs, dimension_numbers) is None:
            validation.floating(path, lhs, rhs)
            sizes = contraction_sizes(lhs, rhs, dimension_numbers)
            calls.setdefault(path, {})[call] = sizes, lhs.dtype, rhs.ndim

    graph, state = nnx.split(model)

    def run(state, *args, **kwargs):
        copy = nnx.merge(graph, state)
        for path, layer in _stock_layers(copy):
            layer.dot_general = nnx.data(_Recorder(functools.partial(record, path)))
        copy(*args, **kwargs)

    eval_shape(run, jax.eval_shape(lambda state: state, state), *args, **kwargs)
    check_all_used(caller, rules, [(path,) for path in calls])
    planned = []
    for path, node in _stock_layers(model):
        config = config_for(rules, path)
        if path in calls and config is not None:
            (_, dtype, kernel_ndim), *_ = calls[path].values()
            layers = [
                Layer(path, *sizes, config.selected_rows(sizes[0], path))
                for sizes, *_ in calls[path].values()
            ]
            planned.append(_Planned(node, config, layers, dtype, kernel_ndim))
    return planned


def _stock_layers(model):
    """The dense layers without a `dot_general` of their own, with their paths."""
    return [
        ("/".join(map(str, path)), node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Linear | nnx.LinearGeneral)
        and (node.dot_general is None or node.dot_general is jax.lax.dot_general)
        and getattr(node, "dot_general_cls", None) is None
    ]


def _key(config, rngs, name):
    """A key for a policy that may draw, from a stream that stays where it is."""
    if not (config.needs_key or callable(config.policy)):
        return None
    streams = [] if rngs is None else [s for s in (RNG, "default") if s in rngs]
    if streams:
        stream = rngs[streams[0]]
        key = jax.random.fold_in(get_value(stream.key), get_value(stream.count))
        return jax.random.fold_in(key, zlib.crc32(f"{RNG}/{name}".encode()))
    if config.needs_key:
        raise ValueError(
            f"{name}: {config.why_key} and got no key. Pass rngs= with a "
            "stream 'mem_aop' or a default one, for instance nnx.Rngs(0)."
        )
    return None
