"""Flax NNX: layers that hold their memories, in models of their own or wrapped."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from mem_aop_jax._approximate.origins import CONSTANT, DATA
from mem_aop_jax._approximate.program import LayerParameter
from mem_aop_jax._approximate.settings import Settings
from mem_aop_jax._approximate.tracing import Traced, is_array, leaves_with_path, path_string, trace
from mem_aop_jax._compat import get_value, set_value
from mem_aop_jax._core import validation
from mem_aop_jax._core.config import MEMORIES, MemAOP
from mem_aop_jax._core.dense import dot_general
from mem_aop_jax._core.layout import warn_once
from mem_aop_jax._core.memory import carried, check_learning_rate, memory_name, rate_factor
from mem_aop_jax._core.memory_kinds import init_memory
from mem_aop_jax._core.probe import is_memory
from mem_aop_jax._models import Layer, Rules, subclass

__all__ = ["Linear", "Memory", "layers", "update_memory", "wrap"]

Model = TypeVar("Model", bound=nnx.Module)

MEMORIES_NAME = "mem_aop"  # of the submodule of a wrapped model
RNG = "mem_aop"  # nnx.Rngs(mem_aop=...), for the random policies; else the default stream


class Memory(nnx.Variable):
    """The variable that holds the `aop.Memory` or `aop.Subspace` of a layer.

    Its gradient is the next memory: differentiate with respect to `nnx.Param` and this type, and
    hand the gradients to `update_memory`.
    """


class _Owner(nnx.Module):
    """A module that holds memories, and a key for random policies or None."""

    def __init__(self, key: chex.PRNGKey | None):
        self.deterministic = False  # the name that eval(), train() and nnx.view set
        self.key = nnx.data(None if key is None else nnx.RngKey(key, tag=RNG))
        self.differentiated: _Differentiated | None = None  # since the last `update_memory`

    def set_view(self, deterministic: bool | None = None) -> None:
        """For `nnx.view(model, deterministic=True)`, which is as `model.eval()`."""
        if deterministic is not None:
            self.deterministic = deterministic

    def watched(self, kernels: dict[str, Any], memory: dict[str, Any]) -> dict[str, Any]:
        """The memories; training that forgets one of them is then noticed."""
        return _watched(self._check_derivative, kernels, memory)

    def _check_derivative(self, kernels, memories):
        """A derivative with respect to these kernels and the memories of these names."""
        trained = {name: _Seen(kernel) for name, kernel in kernels.items() if name in memories}
        alone = [name for name in kernels if name not in memories]
        if alone:
            warn_once(
                f"{_few(alone)}: differentiated with respect to the kernel, but not to its memory, "
                "which then never moves: rows that wait are lost, and directions stay the first "
                "ones. Differentiate with respect to both, nnx.grad(loss_fn, "
                "argnums=nnx.DiffState(0, (nnx.Param, aop.nnx.Memory))), and hand the gradients to "
                "aop.nnx.update_memory; or configure MemAOP(memory=None)."
            )
        if not trained:
            return
        before = self.differentiated or _Differentiated({}, 0)
        known = before.kernels
        moved = any(name in known and known[name] != seen for name, seen in trained.items())
        if before.moves + moved > MOST_MOVES:
            raise ValueError(
                f"{_few(list(trained))}: trained {before.moves + moved} times, but the memory "
                "stayed, since aop.nnx.update_memory was not called. optimizer.update(model, "
                "aop.nnx.update_memory(model, grads)) does both. For gradients that train nothing, "
                "differentiate nnx.clone(model)."
            )
        # Not by setattr, which NNX allows only outside of the derivative.
        vars(self)["differentiated"] = _Differentiated(known | trained, before.moves + moved)

    def new_key(self) -> chex.PRNGKey | None:
        """A key for this call, from the one that it holds; None if it holds none."""
        if self.key is None:
            return None
        key, used = jax.random.split(get_value(self.key))
        set_value(self.key, key)
        return used


def _few(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


MOST_MOVES = 2  # of a model's kernels without its memory: steps may be refused, gradients looked at


@dataclasses.dataclass(frozen=True)
class _Differentiated:
    """What a model was differentiated with respect to since the last `update_memory`.

    Attributes:
      kernels: by the names of their memories.
      moves: how often they were, or may have been, others at the next derivative.
    """

    kernels: dict[str, _Seen] = dataclasses.field(compare=False)
    moves: int


class _Seen:
    """Tells whether a kernel is still what it was: by some of its values, where they are known."""

    def __init__(self, kernel: chex.Array):
        traced = isinstance(kernel, jax.core.Tracer)
        self.tracer = weakref.ref(kernel) if traced else None  # one object for each tracer
        some = [] if traced else kernel.reshape(-1)[:: kernel.size // 256 + 1]
        self.values = np.asarray(some).tobytes()

    def __eq__(self, other):
        return self.tracer is other.tracer and self.values == other.values

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self):  # a tracer belongs to its process
        return _Seen, (np.zeros(0),)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _watched(check: Callable, kernels: dict[str, Any], memory: dict[str, Any]):
    """The memories; `check` sees which of them, and of the kernels, somebody differentiates."""
    return memory


def _see_derivative(check, primals, tangents):
    kernels, memory = primals
    kernels_seen, memory_seen = (
        {
            name
            for name, tree in side.items()
            if not all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(tree))
        }
        for side in tangents
    )
    check({name: k for name, k in kernels.items() if name in kernels_seen}, memory_seen)
    return memory, tangents[1]


_watched.defjvp(_see_derivative, symbolic_zeros=True)


class DotGeneral(_Owner):
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
    ):
        """For one entry of `layers` per call, a memory of `dtype`."""
        super().__init__(key)
        if config.memory_kind and "memory_dtype" in MEMORIES[config.memory_kind].options:
            config = dataclasses.replace(config, memory_dtype=config.stored_dtype(dtype))
        self.config = config
        self.layers = tuple(layers)
        self.call = 0  # the next one; after all calls of a forward pass it is 0 again
        for call, layer in enumerate(self.layers):
            new = init_memory(config, *layer.sizes, dtype)
            if new is not None:
                setattr(self, memory_name(call), Memory(new))

    def __call__(self, lhs: chex.Array, rhs: chex.Array, *args, **options) -> chex.Array:
        """`jax.lax.dot_general`, with the same arguments."""
        layer, name = self.layers[self.call], memory_name(self.call)
        memory = key = None
        if not self.deterministic:
            variable, key = getattr(self, name, None), self.new_key()
            if variable is not None:
                place = f"{layer.path}, call {self.call}" if self.layers[1:] else layer.path
                memory = self.watched({place: rhs}, {place: get_value(variable)})[place]
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((memory, rhs))):
            self.call = (self.call + 1) % len(self.layers)  # a derivative may be taken
        options |= {"memory": memory, "key": key, "config": self.config, "name": layer.path}
        return dot_general(lhs, rhs, *args, **options)


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
        calls = validation.whole_number("Linear", "calls", calls, smallest=1)
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
    wrt: nnx.filterlib.Filter = nnx.Param,
    **kwargs,
) -> Model:
    """Makes a model's contractions with parameters approximate, in place.

    What `aop.approximate` reaches in a call of the model: `nnx.Linear`, `nnx.Einsum`,
    `nnx.Embed.attend`, attention, recurrent cells, modules of anybody's own, inside `nnx.scan`,
    `nnx.vmap` and `nnx.remat`. Parameters and outputs stay as they are; the model gets a submodule
    `mem_aop` with the memories. Its other methods, and those of its submodules, stay exact, and so
    do layers of this library in it.

    Args:
      model: the model; it is changed only if nothing is wrong.
      config_or_rules: a configuration for all layers, or rules: pairs of a regular expression on
        the whole path of a layer ("encoder/mlp/linear") or of its parameter
        ("encoder/mlp/linear/kernel"), and a configuration or None for an exact layer. The first
        match wins; a layer without one is exact.
      *example_inputs: inputs of the model, a batch of the training size, or a
        `jax.ShapeDtypeStruct` for each array. Nothing is computed.
      rngs: where the random policies take their keys from, as in `Linear`. A model that has an
        argument `rngs` gets it as well.
      min_speedup: a layer stays exact, too, unless `aop.cost` predicts that a step of it is so many
        times faster on the default device; as in `aop.linen.wrap`.
      wrt: which variables are trained, a filter of NNX; contractions with others are exact.
      **kwargs: further arguments of the model.

    Returns:
      The model.

    Raises:
      TypeError: no NNX module, or no configuration or rules.
      ValueError: a bad regular expression, a wrapped model, a rule that decides about no layer, a
        configuration that does not fit a layer, or no `rngs` for a random policy.

    Example:
      >>> import jax.numpy as jnp, mem_aop_jax as aop
      >>> from flax import nnx
      >>> model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
      >>> rules = [("out", None), (".*", aop.MemAOP(ratio=0.25))]
      >>> model = aop.nnx.wrap(model, rules, jnp.ones((3, 4, 8)))
      >>> for layer in aop.nnx.layers(model):
      ...     print(layer)
      Layer(path='query', rows=12, in_features=8, out_features=8, k=3)
      Layer(path='key', rows=12, in_features=8, out_features=8, k=3)
      Layer(path='value', rows=12, in_features=8, out_features=8, k=3)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"wrap: model is of type {type(model).__name__}, not an NNX module.")
    if not isinstance(rngs, nnx.Rngs | None):
        raise TypeError(f"wrap: rngs is of type {type(rngs).__name__}; it must be an nnx.Rngs.")
    settings = Settings.of("wrap", config_or_rules, min_speedup)
    if any(isinstance(node, Memories) for _, node in nnx.iter_graph(model)):
        raise ValueError(
            "wrap: got a wrapped model, or a model with one in it. Wrap once, with all rules."
        )
    if rngs is not None and "rngs" in inspect.signature(type(model).__call__).parameters:
        kwargs |= {"rngs": rngs}
    sites = _checked_sites(settings, model, wrt, example_inputs, kwargs)
    keys = (_key(site.config, rngs, site.label) for site in sites if site.config is not None)
    key = next((key for key in keys if key is not None), None)
    setattr(model, MEMORIES_NAME, nnx.data(Memories(settings, wrt, sites, key)))
    object.__setattr__(model, "__class__", _wrapped_class(type(model)))
    return model


class Memories(_Owner):
    """The memories of a wrapped model, each an attribute with the name of its site.

    `model.eval()` or `nnx.view(model, deterministic=True)` turns them off, as in `DotGeneral`.
    """

    def __init__(self, settings, wrt, sites, key):
        super().__init__(key)
        self.settings, self.wrt = settings, wrt
        self.layers = tuple(site.layer for site in sites if site.config is not None)
        for site in sites:
            if site.config is not None and (new := site.first_memory()) is not None:
                setattr(self, site.name, Memory(new))

    def held(self) -> dict[str, Any]:
        """The memories by the names of their sites; none in evaluation."""
        if self.deterministic:
            return {}
        variables = {name: v for name, v in vars(self).items() if isinstance(v, Memory)}
        return {name: get_value(variable) for name, variable in variables.items()}


@functools.cache  # one class for each, so that graphs are equal again
def _wrapped_class(model_class):
    """A subclass of a model's class whose calls are approximate."""

    @functools.wraps(model_class.__call__)
    def call(self, *args, **kwargs):
        memories = getattr(self, MEMORIES_NAME)
        memory = memories.held()
        key = None if memories.deterministic else memories.new_key()
        object.__setattr__(self, "__class__", model_class)  # what is traced is not wrapped
        try:
            called = _Call.of(memories.settings, self, memories.wrt, args, kwargs, memory)
        finally:
            object.__setattr__(self, "__class__", _wrapped_class(model_class))
        y, changed = called.traced.run(memories.watched(called.kernels(memory), memory), key)
        called.update(changed)
        return y

    return subclass(model_class, {"__call__": call}, _new, model_class)


def _new(model_class):
    """A wrapped model without attributes."""
    return object.__new__(_wrapped_class(model_class))


class _Call(NamedTuple):
    """The program of a model's call, which returns what the call changes, too.

    Attributes:
      traced: the program; with what it returns, the state of the variables that it changes.
      params: the state of the model's trained variables.
      nodes: the model, and the modules and variables among the arguments, by number.
      static: what the call changes of the modules' other attributes: path, name, value.
    """

    traced: Traced
    params: nnx.State
    nodes: tuple[nnx.Module, dict[int, Any]]
    static: list[tuple[tuple, str, Any]]

    @classmethod
    def of(cls, settings, model, wrt, args, kwargs, memory) -> _Call:
        """Of a model that is not wrapped."""
        leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
        numbered = dict(enumerate(leaves))
        nodes = model, {i: leaf for i, leaf in numbered.items() if _is_node(leaf)}
        others = {i: leaf for i, leaf in numbered.items() if not _is_node(leaf)}
        graph, *states = nnx.split(nodes, wrt, Memory, ...)
        static: list = []

        def call(params, memories, state, others):
            copies = nnx.merge(graph, params, memories, state)
            before, attributes = _arrays(nnx.state(copies)), _static_attributes(copies)
            copy, given = copies
            given = given | others
            args, kwargs = structure.unflatten([given[i] for i in range(len(given))])
            y = copy(*args, **kwargs)
            static[:] = [
                (*place, value)
                for place, value in _static_attributes(copies).items()
                if place not in attributes or attributes[place] != value
            ]
            after = nnx.state(copies)
            changed = {
                path
                for path, arrays in _arrays(after).items()
                if [*map(id, arrays)] != [*map(id, before.get(path, ()))]
            }
            flat = nnx.to_flat_state(after)
            return y, nnx.from_flat_state([(path, v) for path, v in flat if path in changed])

        def parameter_or_origin(path, leaf):
            """What a leaf of ((params, memories, state, others), {}) is."""
            _, argument, *inside = path
            if argument.idx in (1, 3) or inside[0].key != 0:  # not of the model itself
                return DATA
            if argument.idx == 2:
                return CONSTANT
            name = path_string(inside[1:])
            return LayerParameter(name, leaf.size, name, type(model).__name__)

        decide = functools.partial(settings.decide, memory)
        traced = trace(call, (*states, others), {}, parameter_or_origin, decide)
        return cls(traced, states[0], nodes, static)

    def kernels(self, names: Iterable[str]) -> dict[str, Any]:
        """The parameters of these sites."""
        params = {path_string(path[1:]): value for path, value in leaves_with_path(self.params)}
        sites = {site.name: site.parameter.path for site in self.traced.sites}
        return {name: params[sites[name]] for name in names}

    def update(self, changed: nnx.State) -> None:
        """Makes the changes in the model and in the arguments."""
        nnx.update(self.nodes, changed)
        modules = dict(nnx.iter_graph(self.nodes)) if self.static else {}
        for path, name, value in self.static:
            setattr(modules[path], name, value)


def _is_node(value):
    return isinstance(value, nnx.Module | nnx.Rngs | nnx.Variable)


def _arrays(state):
    """The arrays in a state, by the paths of their variables."""
    return {path: jax.tree.leaves(variable) for path, variable in nnx.to_flat_state(state)}


def _static_attributes(nodes):
    """The attributes of modules that hold neither arrays nor modules, by path and name."""
    return {
        (path, name): value
        for path, node in nnx.iter_graph(nodes)
        if isinstance(node, nnx.Module)
        for name, value in vars(node).items()
        if not name.startswith("_")
        and not any(_is_node(x) or is_array(x) for x in jax.tree.leaves(value, is_leaf=_is_node))
    }


def _checked_sites(settings, model, wrt, args, kwargs):
    """The sites of a call of a model that is not wrapped."""
    try:
        sites = _Call.of(settings, model, wrt, args, kwargs, ()).traced.sites
    except TypeError as error:
        if args or kwargs:
            raise
        raise TypeError(
            f"{settings.caller}: got no example inputs, and the model cannot be called without: "
            f"{error}. Give a batch of the training size, aop.nnx.wrap(model, rules, x)."
        ) from error
    settings.check_model(sites)
    return sites


def layers(model: nnx.Module) -> list[Layer]:
    """The approximate layers of a model. Of stacked layers, one stands for all."""
    found = []
    for path, node in nnx.iter_graph(model):
        owner = "/".join(map(str, path[:-1]))
        if isinstance(node, DotGeneral):
            found += [layer._replace(path=owner) for layer in node.layers]
        elif isinstance(node, Memories):
            found += [
                layer._replace(path="/".join(filter(None, (owner, layer.path))))
                for layer in node.layers
            ]
    return found


def sized_layers(
    caller: str, model: nnx.Module, rules: Rules, args: tuple
) -> list[tuple[Layer, jnp.dtype]]:
    """The layers of a model that rules make approximate, each with the dtype of its inputs."""
    sites = _checked_sites(Settings(caller, rules, None, None), model, nnx.Param, args, {})
    return [(s.layer, s.contraction.dtypes[0]) for s in sites if s.config is not None]


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
    check_learning_rate("update_memory", learning_rate)
    if not isinstance(grads, nnx.State):
        raise TypeError(
            f"update_memory: grads are of type {type(grads).__name__}; pass what nnx.grad returned."
        )
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
        if isinstance(node, _Owner):
            node.differentiated = None
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


def _key(config, rngs, name):
    """A key for a policy that may draw, from a stream that stays where it is.

    It differs from layer to layer, since the stream of the parameters moves on.
    """
    if not (config.needs_key or callable(config.policy)):
        return None

    def first_stream(*names):
        return next((rngs[name] for name in names if rngs is not None and name in rngs), None)

    stream, moving = first_stream(RNG, "default"), first_stream("params", "default")
    if stream is not None:
        key = jax.random.fold_in(get_value(stream.key), get_value(stream.count))
        if moving is not None and moving is not stream:
            key = jax.random.fold_in(key, get_value(moving.count))
        return jax.random.fold_in(key, zlib.crc32(f"{RNG}/{name}".encode()))
    if config.needs_key:
        raise ValueError(
            f"{name}: {config.why_key} and got no key. Pass rngs= with a "
            "stream 'mem_aop' or a default one, for instance nnx.Rngs(0)."
        )
    return None
