"""Models as they are, with their dense layers made approximate."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mem_aop_jax._core import validation
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.probe import is_memory
from mem_aop_jax._cost.cost import cost
from mem_aop_jax._cost.device_rates import Rates, device_rates
from mem_aop_jax._models import Rules, as_rules, check_all_used, config_for
from mem_aop_jax.linen._layers import (
    COLLECTION,
    LENT,
    RNG,
    Dense,
    Lent,
    call_with_product,
    count_calls_together,
    product_of,
    scopes_of,
    trace_anew,
)


def wrap(
    module: nn.Module,
    config_or_rules: MemAOP | Sequence[tuple[str, MemAOP | None]],
    *,
    min_speedup: float | None = None,
) -> nn.Module:
    """Any Linen model, unedited, with its `nn.Dense` and `nn.DenseGeneral` layers made approximate.

    Parameters, their initial values and outputs are those of the model; `init` adds the collection
    `COLLECTION`, as `Dense` does. The layers may stand anywhere: inside attention, `nn.scan` over
    layers, `nn.remat`, `nn.vmap`. The lifted transforms need not know of the collection: inside,
    memories travel as the parameters do. (Where parameters are shared, as in an `nn.scan` over
    time, memories cannot be: declare an axis of `COLLECTION` there, or leave those layers exact.)
    `nn.jit` inside traces anew in every pass: put the training step under `jax.jit`. Layers with a
    `dot_general` or `dot_general_cls` of their own stay as they are.

    The wrapper's only method is `__call__`. To evaluate, or to call another method, use the model
    itself with the same parameters.

    Args:
      module: the model.
      config_or_rules: a configuration for all dense layers, or rules: pairs of a regular
        expression on the whole path of a layer ("encoder/mlp/Dense_0"), and a configuration or
        None for an exact layer. The first match wins; a layer without one is exact.
      min_speedup: a layer stays exact, too, unless `aop.cost` predicts for the batch of `init` (for
        each batch, where it has no memory) that a step is so many times faster on the default
        device. That is measured where the device is not
        known, and may differ from process to process: a run that shall go on elsewhere takes the
        rules of `aop.plan`.

    Returns:
      A module to use in place of the model. `layers` lists what it approximates.

    Raises:
      TypeError: no module, or no configuration or rules.
      ValueError: a bad regular expression, a wrapped model, a `min_speedup` that is no positive
        number; from `init`: a rule that decides about
        no layer, or a layer whose parameters are shared by the calls of a lifted transform.

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
    _not_wrapped(module)
    validation.min_speedup("wrap", min_speedup)
    rates = None if min_speedup is None else device_rates()
    return Wrapped(module, as_rules("wrap", config_or_rules), min_speedup, rates)


class Wrapped(nn.Module):
    """What `wrap` returns."""

    mem_aop_model: nn.Module  # the model has this scope, too, and may call a submodule "model"
    rules: Rules
    min_speedup: float | None = None
    rates: Rates | None = None

    def setup(self):
        nn.share_scope(self, self.mem_aop_model)

    def __call__(self, *args, **kwargs):
        """The model, with the same arguments."""
        key = self.make_rng(RNG) if self.has_rng(RNG) else None
        paths = {}  # ordered
        lend = self.is_mutable_collection(COLLECTION)
        gains = functools.partial(_gains, self.min_speedup, self.rates)
        with_product = functools.partial(_intercept, self.rules, len(self.path), lend, gains, paths)

        def intercept(call, args, kwargs, context):
            _not_wrapped(context.module)
            if context.module.scope is not None:
                trace_anew(context.module.scope)
            return with_product(call, args, kwargs, context)

        def call(model, /, *args, **kwargs):
            trace_anew(*scopes_of(model))
            count_calls_together(self.scope, model.scope)
            with nn.intercept_methods(intercept):
                return model(*args, **kwargs)

        y = nn.map_variables(
            call,
            ("params", COLLECTION),
            trans_in_fn=functools.partial(_lend_memories, key),
            trans_out_fn=_take_memories_back,
            mutable=True,
        )(self.mem_aop_model, *args, **kwargs)
        if self.is_initializing():
            check_all_used("wrap", self.rules, list(paths))
        return y


def _gains(min_speedup, rates, config, sizes, dtype):
    rows = sizes[0]
    evaluated = rows == 0 or rows % config.groups or (config.k is not None and config.k > rows)
    if min_speedup is None or evaluated:  # there it is exact anyway
        return True
    return cost(config, *sizes, dtype, rates=rates).speedup >= min_speedup


def _not_wrapped(module):
    if isinstance(module, Wrapped):
        raise ValueError(
            "wrap: got a wrapped model, or a model with one in it. Wrap once, with all rules."
        )


def _intercept(rules, depth, lend, gains, paths, call, args, kwargs, context):
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
    product = functools.partial(product_of, module, config, lend=lend, gains=gains)
    return call_with_product(module, product, call, *args, **kwargs)


# ---- memories inside a wrapped model
#
# A lifted transform hands on the collections that the model declares. All declare "params", with
# the axes that the layers' memories need, too: there a memory waits beside its layer's parameters.


def _lend_memories(key, variables):
    """Puts the memories of COLLECTION, each with a key, beside the parameters of their layers."""
    memories, structure = jax.tree.flatten(variables.get(COLLECTION, {}), is_leaf=is_memory)

    def lend(i, memory):
        if not is_memory(memory) or jnp.ndim(memory.uses) == 0:
            return None  # of no lifted transform: it is found in COLLECTION
        if key is None:
            return Lent(memory, None)
        return Lent(memory, jax.random.split(jax.random.fold_in(key, i), jnp.shape(memory.uses)))

    lent = structure.unflatten([lend(i, memory) for i, memory in enumerate(memories)])
    return variables | {"params": _with_lent(variables.get("params", {}), lent)}


def _with_lent(params, lent):
    beside = {LENT + name: node for name, node in lent.items() if isinstance(node, Lent)}
    below = {
        name: _with_lent(params.get(name, {}), node)
        for name, node in lent.items()
        if isinstance(node, dict)
    }
    return {**params, **below, **beside}


def _take_memories_back(variables):
    """Moves the memories that `init` left beside the parameters into COLLECTION."""
    if "params" not in variables:
        return variables
    params, memories = _apart(variables["params"], variables.get(COLLECTION, {}), ())
    return variables | {"params": params} | ({COLLECTION: memories} if memories else {})


def _apart(params, memories, path):
    kept, memories = {}, dict(memories)
    for name, node in params.items():
        if isinstance(node, Lent):
            if jnp.ndim(node.memory.uses) == 0:
                raise ValueError(
                    f"wrap: {'/'.join(path)}: a lifted transform calls this layer with the same "
                    "parameters each time, and each call needs a memory. Declare an axis for them "
                    "there (variable_axes={aop.linen.COLLECTION: 0}), or make the layer exact with "
                    f"a rule ({'/'.join(path)!r}, None)."
                )
            memories[name.removeprefix(LENT)] = node.memory
        elif isinstance(node, dict):
            kept[name], below = _apart(node, memories.get(name, {}), (*path, name))
            if below:
                memories[name] = below
        else:
            kept[name] = node
    return kept, memories
