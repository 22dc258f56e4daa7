"""Flax Linen: layers, and wrapped models, that keep their memories in a variable collection."""

import collections
import contextvars
import functools
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from mem_aop_jax import checks
from mem_aop_jax.config import MemAOP
from mem_aop_jax.contractions import contraction_sizes, warn_once, why_exact
from mem_aop_jax.dense import dot_general
from mem_aop_jax.memory import Memory, init_memory
from mem_aop_jax.rules import Layer, Rules, as_rules, check_all_used, config_for

COLLECTION = OVERWRITE_WITH_GRADIENT  # TrainState replaces its variables by their gradients
RNG = "mem_aop"  # apply(..., rngs={RNG: key}), for the random policies


class Dense(nn.Dense):
    """`flax.linen.Dense` whose kernel gradient is Mem-AOP-GD's (arXiv 2110.09164).

    A drop-in: every field of `nn.Dense` but `dot_general` and `dot_general_cls`, the same
    parameters with the same initial values, the same outputs. The gradients of the inputs and of
    the bias are exact.

    `init` puts an empty `Memory` into the collection `COLLECTION`, for as many rows as the example
    input has: initialise with a batch of the training size. The gradient with respect to that
    collection is the next memory. Hand it on with `carry_memory`; or keep all variables in the
    `params` of an unmodified `flax.training.train_state.TrainState`, which overwrites the
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

    @nn.compact
    def __call__(self, inputs: chex.Array) -> chex.Array:
        """`inputs @ kernel + bias`: `(..., in_features)` to `(..., features)`."""
        if self.dot_general is not None or self.dot_general_cls is not None:
            raise ValueError(
                f"{_name(self)}: aop.linen.Dense has a dot_general of its own; leave dot_general "
                "and dot_general_cls unset, or use flax.linen.Dense."
            )
        in_features = jnp.shape(inputs)[-1]
        kernel = self.param(
            "kernel", self.kernel_init, (in_features, self.features), self.param_dtype
        )
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        contraction = (((inputs.ndim - 1,), (0,)), ((), ()))
        y = _dot_general(self, self.config, inputs, kernel, contraction, self.precision)
        return y if bias is None else y + jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))


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
        return _dot_general(self, self.config, lhs, rhs, *args, **options)


def wrap(
    module: nn.Module, config_or_rules: MemAOP | Sequence[tuple[str, MemAOP | None]]
) -> nn.Module:
    """Any Linen model, unedited, with its `nn.Dense` and `nn.DenseGeneral` layers made approximate.

    Parameters, their initial values and outputs are those of the model; `init` adds the collection
    `COLLECTION`, as `Dense` does. The layers may stand anywhere: inside attention, `nn.scan` over
    layers, `nn.remat`, `nn.vmap`. The lifted transforms need not know of the collection: inside,
    memories travel as the parameters do. (Where parameters are shared, as in an `nn.scan` over
    time, memories cannot be: declare an axis of `COLLECTION` there, or leave those layers exact.)
    Layers with a `dot_general` or `dot_general_cls` of their own stay as they are.

    The wrapper's only method is `__call__`. To evaluate, or to call another method, use the model
    itself with the same parameters.

    Args:
      module: the model.
      config_or_rules: a configuration for all dense layers, or rules: pairs of a regular
        expression on the whole path of a layer ("encoder/mlp/Dense_0"), and a configuration or
        None for an exact layer. The first match wins; a layer without one is exact.

    Returns:
      A module to use in place of the model. `layers` lists what it approximates.

    Raises:
      TypeError: no module, or no configuration or rules.
      ValueError: a bad regular expression; from `init`: a rule that decides about no layer.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, mem_aop_jax as aop
      >>> config = aop.MemAOP(ratio=0.25)
      >>> attention = nn.MultiHeadDotProductAttention(num_heads=2)
      >>> model = aop.linen.wrap(attention, [("out", None), (".*", config)])
      >>> for layer in aop.linen.layers(model, jax.random.key(0), jnp.ones((3, 4, 8))):
      ...     print(layer)
      Layer(path='query', rows=12, in_features=8, out_features=8, k=3)
      Layer(path='key', rows=12, in_features=8, out_features=8, k=3)
      Layer(path='value', rows=12, in_features=8, out_features=8, k=3)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"wrap: module is of type {type(module).__name__}, not a Linen module.")
    return Wrapped(module, as_rules("wrap", config_or_rules))


def layers(module: nn.Module, rngs: chex.ArrayTree, *args, **kwargs) -> list[Layer]:
    """The approximate layers of a model, in the order of their first call.

    Of layers that `nn.scan` or `nn.vmap` stacks, one stands for all.

    Args:
      module: a model with `Dense`, `DotGeneral` or `wrap` in it.
      rngs: as in `module.init`; nothing is computed.
      *args: as in `module.init`, for a batch of the training size.
      **kwargs: as in `module.init`.
    """
    recorded = {}
    token = _recorded.set(recorded)
    try:
        jax.eval_shape(lambda: module.init(rngs, *args, **kwargs))
    finally:
        _recorded.reset(token)
    return list(recorded.values())


class Wrapped(nn.Module):
    """What `wrap` returns."""

    model: nn.Module
    rules: Rules

    def setup(self):
        nn.share_scope(self, self.model)

    def __call__(self, *args, **kwargs):
        """The model, with the same arguments."""
        key = self.make_rng(RNG) if self.has_rng(RNG) else None
        paths = {}  # ordered
        intercept = functools.partial(_intercept, self.rules, len(self.path), paths)

        def call(model, *args, **kwargs):
            with nn.intercept_methods(intercept):
                return model(*args, **kwargs)

        y = nn.map_variables(
            call,
            ("params", COLLECTION),
            trans_in_fn=functools.partial(_lend_memories, key),
            trans_out_fn=_take_memories_back,
            init=self.is_initializing(),
            mutable=True,
        )(self.model, *args, **kwargs)
        if self.is_initializing():
            check_all_used("wrap", self.rules, list(paths))
        return y


def _intercept(rules, depth, paths, call, args, kwargs, context):
    """Calls a method of a module; a stock dense layer gets the product that its rule asks for."""
    module = context.module
    stock = isinstance(module, nn.Dense | nn.DenseGeneral) and not isinstance(module, Dense)
    if not stock or context.method_name != "__call__":
        return call(*args, **kwargs)
    if module.dot_general is not None or module.dot_general_cls is not None:
        return call(*args, **kwargs)
    path = "/".join(module.path[depth:])
    paths[path] = None
    config = config_for(rules, path)
    if config is None:
        return call(*args, **kwargs)
    product = functools.partial(_dot_general, module, config, in_wrapped_model=True)
    # The fields of a module are frozen; the layer reads this one during this call alone.
    object.__setattr__(module, "dot_general", product)
    try:
        return call(*args, **kwargs)
    finally:
        object.__setattr__(module, "dot_general", None)


# ---- memories inside a wrapped model
#
# A lifted transform hands on the collections that the model declares. All declare "params", with
# the axes that the layers' memories need, too: there a memory waits beside its layer's parameters.


class _Lent(NamedTuple):
    memory: Memory
    key: chex.PRNGKey | None


_LENT = "mem_aop_"  # + the memory's name in COLLECTION


def _lend_memories(key, variables):
    """Puts the memories of COLLECTION, each with a key, beside the parameters of their layers."""
    memories, structure = jax.tree.flatten(
        variables.get(COLLECTION, {}), is_leaf=lambda node: isinstance(node, Memory)
    )

    def lend(i, memory):
        if key is None or not isinstance(memory, Memory):
            return _Lent(memory, None)
        return _Lent(memory, jax.random.split(jax.random.fold_in(key, i), jnp.shape(memory.uses)))

    lent = structure.unflatten([lend(i, memory) for i, memory in enumerate(memories)])
    return variables | {"params": _with_lent(variables.get("params", {}), lent)}


def _with_lent(params, lent):
    beside = {_LENT + name: node for name, node in lent.items() if isinstance(node, _Lent)}
    below = {
        name: _with_lent(params.get(name, {}), node)
        for name, node in lent.items()
        if not isinstance(node, _Lent)
    }
    return {**params, **below, **beside}


def _take_memories_back(variables):
    """Moves the memories that `init` left beside the parameters into COLLECTION."""
    if "params" not in variables:
        return variables
    params, memories = _apart(variables["params"], variables.get(COLLECTION, {}))
    return variables | {"params": params} | ({COLLECTION: memories} if memories else {})


def _apart(params, memories):
    kept, memories = {}, dict(memories)
    for name, node in params.items():
        if isinstance(node, _Lent):
            memories[name.removeprefix(_LENT)] = node.memory
        elif isinstance(node, dict):
            kept[name], below = _apart(node, memories.get(name, {}))
            if below:
                memories[name] = below
        else:
            kept[name] = node
    return kept, memories


# ---- one product


_recorded = contextvars.ContextVar("the layers of a call, by path and memory", default=None)


def _dot_general(
    module, config, lhs, rhs, dimension_numbers, *args, in_wrapped_model=False, **options
):
    """`dot_general` with the memory, the key and the name of a module."""
    memory = key = None
    owner = module.parent if isinstance(module, DotGeneral) else module
    kernel = owner.get_variable("params", "kernel") if isinstance(owner, nn.Module) else None
    reason = config and why_exact(
        lhs, rhs, dimension_numbers, kernel_shape=getattr(kernel, "shape", None)
    )
    if reason:
        warn_once(f"{_name(module)}: the contraction {dimension_numbers} runs exact: {reason}")
        config = None
    if config is not None:
        checks.floating(_name(module), lhs, rhs)
        sizes = contraction_sizes(lhs, rhs, dimension_numbers)
        memory, key = _memory_of_this_call(module, config, sizes, lhs.dtype, in_wrapped_model)
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


_calls: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # root scope -> calls by path


def _memory_of_this_call(module, config, sizes, dtype, in_wrapped_model):
    """The memory for the n-th call of a module in this forward pass, and a key; None without."""
    calls = _calls.setdefault(module.scope.root, collections.Counter())
    name = f"memory_{calls[module.path]}" if calls[module.path] else "memory"
    calls[module.path] += 1
    recorded = _recorded.get()
    if recorded is not None:
        k = config.selected_rows(sizes[0], _name(module))
        recorded[(*module.path, name)] = Layer("/".join(module.path), *sizes, k)

    lent = module.get_variable("params", _LENT + name, _Lent(None, None))
    key = module.make_rng(RNG) if module.has_rng(RNG) else lent.key
    memory = module.get_variable(COLLECTION, name, lent.memory)
    if module.is_initializing() and memory is None and config.keeps_rows:
        config.selected_rows(sizes[0], _name(module))
        new = init_memory(config, *sizes, dtype)
        if module.is_mutable_collection(COLLECTION):
            module.put_variable(COLLECTION, name, new)
        elif in_wrapped_model:
            module.put_variable("params", _LENT + name, _Lent(new, None))
    return memory, key


def _name(module: nn.Module) -> str:
    return "/".join(module.path) or type(module).__name__
