"""Models as they are, with their contractions with parameters made approximate.

A wrapped model is of a subclass of the model's class. Its methods are lifted, as by `nn.jit`: the
model's method becomes a function of variables, random numbers and arguments, and its program is run
in its place. Nothing in the model knows of it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax.core import lift
from flax.linen.transforms import lift_direct_transform
from jax.tree_util import SequenceKey

from mem_aop_jax._approximate.origins import CONSTANT, DATA
from mem_aop_jax._approximate.program import LayerParameter
from mem_aop_jax._approximate.settings import Settings
from mem_aop_jax._approximate.tracing import Traced, path_string, trace
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.memory import Memory
from mem_aop_jax._core.probe import Probe, is_memory
from mem_aop_jax._models import subclass
from mem_aop_jax.linen._layers import (
    COLLECTION,
    LAYERS_MEMORY,
    RNG,
    Sized,
    calls_in_pass,
    probing,
    record,
    recording,
)

Model = TypeVar("Model", bound=nn.Module)


def wrap(
    module: Model,
    config_or_rules: MemAOP | Sequence[tuple[str, MemAOP | None]],
    *,
    min_speedup: float | None = None,
) -> Model:
    """Any Linen model, unedited, with its contractions with parameters made approximate.

    What `aop.approximate` reaches: dense layers, attention, tied embeddings, recurrent cells,
    modules of anybody's own, inside `nn.scan`, `nn.remat`, `nn.vmap` and `nn.jit`. Parameters,
    their initial values, outputs and methods are those of the model; `init` adds the collection
    `COLLECTION`, as `Dense` does. Variables of other collections than "params" are constants.
    Layers of this library in the model stay as they are.

    Args:
      module: the model.
      config_or_rules: a configuration for all layers, or rules: pairs of a regular expression on
        the whole path of a layer ("encoder/mlp/Dense_0") or of its parameter
        ("encoder/mlp/Dense_0/kernel"), and a configuration or None for an exact layer. The first
        match wins; a layer without one is exact.
      min_speedup: a layer stays exact, too, unless `aop.cost` predicts for the batch of `init` (for
        each batch, where it has no memory) that a step is so many times faster on the default
        device. That is measured where the device is not known, and may differ from process to
        process: a run that shall go on elsewhere takes the rules of `aop.plan`.

    Returns:
      A module to use in place of the model. `layers` lists what it approximates.

    Raises:
      TypeError: no module, or no configuration or rules.
      ValueError: a bad regular expression, a wrapped model, a `min_speedup` that is no positive
        number; from `init`: a rule that decides about no layer, or a configuration that does not
        fit the number of a layer's rows.

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
    settings = Settings.of("wrap", config_or_rules, min_speedup)
    _check_not_wrapped(module)
    model_class: Any = type(module)
    wrapped = _new(model_class, settings)
    wrapped.__dict__.update((module.clone() if module.parent is None else module).__dict__)
    return wrapped


# ---- the class of a wrapped model

_WRAPPED = "_mem_aop_wrapped"  # an attribute of such a class
_INSIDE = "_mem_aop_inside"  # of an instance that is traced: its methods are the model's

_tracing = contextvars.ContextVar("whether a wrapped model is traced", default=False)


def _check_not_wrapped(module):
    if hasattr(type(module), _WRAPPED):
        raise ValueError(
            "wrap: got a wrapped model, or a model with one in it. Wrap once, with all rules."
        )


@functools.cache  # so that equal models are equal when they are wrapped, too
def _wrapped_class(model_class: type, settings: Settings) -> type:
    """A subclass of a model's class whose methods are approximate."""
    methods = {
        name: _lifted(getattr(model_class, name), settings)
        for name in dir(model_class)
        if _is_public_method(model_class, name)
    }
    entries = {name: _entry(model_class, name) for name in ("apply", "init_with_output")}
    members = methods | entries | {_WRAPPED: True}
    return subclass(model_class, members, _new, model_class, settings)


def _new(model_class: type, settings: Settings) -> Any:
    """A wrapped model without attributes."""
    return object.__new__(_wrapped_class(model_class, settings))


def _is_public_method(model_class, name):
    if name != "__call__" and (name.startswith("_") or hasattr(nn.Module, name)):
        return False
    if name in {field.name for field in dataclasses.fields(model_class)}:
        return False
    method = inspect.getattr_static(model_class, name)
    return inspect.isfunction(method) and not hasattr(method, "nowrap")


def _entry(model_class, name):
    """`apply` or `init_with_output`, for which a method of the model is that of its subclass."""
    enter = getattr(model_class, name)

    @nn.nowrap
    @functools.wraps(enter)
    def entry(self, *args, method=None, **kwargs):
        own_name = getattr(method, "__name__", "")
        if method is not None and getattr(model_class, own_name, None) is method:
            method = own_name
        return enter(self, *args, method=method, **kwargs)

    return entry


def _lifted(method, settings):
    """A method of a wrapped model."""

    @nn.nowrap
    @functools.wraps(method)
    def lifted(self, *args, **kwargs):
        if self.scope is None or _INSIDE in self.__dict__:
            return method(self, *args, **kwargs)
        if _tracing.get():
            _check_not_wrapped(self)

        def inside(clone, *args, **kwargs):
            clone.__dict__[_INSIDE] = True
            token = _tracing.set(True)
            try:
                return method(clone, *args, **kwargs)
            finally:
                _tracing.reset(token)

        run = functools.partial(_run_packed, settings, self)
        return lift_direct_transform(run, (inside,), self, *args, **kwargs)

    return lifted


def _run_packed(settings, module, scope_function, scopes, *args, **kwargs):
    """Runs a function of a module's scopes as a function of the variables in them."""
    paths = [scope.path for scope in _roots(scopes)]

    def run(scope_fn, repack_fn, variables, rngs, *args, **kwargs):
        def function(variables, rngs, args, kwargs):
            scopes = scope_fn(variables, rngs)
            return scope_function(scopes, *args, **kwargs), repack_fn(scopes)

        def traced(variables, memory) -> Traced:
            return trace(
                function,
                (variables, rngs, args, kwargs),
                {},
                functools.partial(_parameter_or_origin, module, paths),
                functools.partial(settings.decide, memory),
                calls_in_pass(module.scope),
            )

        if module.is_initializing():
            y, (results,) = function(variables, rngs, args, kwargs)
            created = [{**old, **new} for old, new in zip(variables[0], results, strict=True)]

            def sites_of(variables, *, initializing):
                with recording(), _scopes(scopes, initializing=initializing):
                    return traced((variables,), ()).sites

            try:
                sites = sites_of(created, initializing=False)
            except Exception:  # its next calls take other arguments (a decoder's: one token)
                params = [{name: c[name] for name in c if name == "params"} for c in created]
                sites = sites_of(params, initializing=True)
            settings.check_model(sites)
            for site in sites:
                if site.config is not None:
                    _put_first_memory(module, site, results)
            return y, (results,)
        memory: dict[str, Any] = {}
        inside = []
        for path, collections in zip(paths, variables[0], strict=True):
            own, others = _split(path, collections.get(COLLECTION, {}))
            memory |= own
            hidden = {name: v for name, v in collections.items() if name != COLLECTION}
            inside.append(hidden | ({COLLECTION: others} if others else {}))
        key = next((rng[RNG].as_jax_rng() for rng in rngs[0] if RNG in rng), None)
        return traced((tuple(inside),), memory).run(memory, key)

    pack = lift.pack(run, (True,), (True,), (True,), name="approximate", enable_kwargs=True)
    return pack(scopes, *args, **kwargs)


def _put_first_memory(module, site, results):
    """Records a site, and puts its first memory into the collection of its scope."""
    parameter = site.parameter
    record(site.name, Sized(site.layer, site.contraction.dtypes[0], wrapped=True))
    new = site.first_memory()
    if new is None and probing():
        new = Probe.of(None, draws=1, stack=site.all_runs)
    if new is not None and module.is_mutable_collection(COLLECTION):
        *modules, _ = parameter.inside
        node = results[parameter.scope].setdefault(COLLECTION, {})
        for name in modules:
            node = node.setdefault(name, {})
        node[site.name.rpartition("/")[2]] = new


@dataclasses.dataclass(frozen=True)
class _LinenParameter(LayerParameter):
    """A parameter of a Linen model.

    Attributes:
      scope: the number of the scope that holds it, of those of the model.
      inside: its path in that scope.
    """

    scope: int
    inside: tuple[str, ...]

    @property
    def names(self):
        """Also its path among all variables: rules of a function of them fit."""
        return *super().names, f"params/{self.relative}"


def _parameter_or_origin(module, paths, path, leaf):
    """What a leaf of (variables, rngs, args, kwargs) is, by its path in ((these), {})."""
    if path[1] != SequenceKey(0):
        return DATA
    _, _, _, scope, collection, *inside = path
    collection = _name(collection)
    if collection != "params":
        return DATA if collection == COLLECTION else CONSTANT
    inside = tuple(path_string(tuple(inside)).split("/"))
    full = (*paths[scope.idx], *inside)
    own = module.scope.path
    relative = full[len(own) :] if full[: len(own)] == own else full
    return _LinenParameter(
        path="/".join(full),
        size=leaf.size,
        relative="/".join(relative),
        model=type(module).__name__,
        scope=scope.idx,
        inside=inside,
    )


def _name(key):
    """What a key of a dictionary's path is a key for."""
    return jax.tree_util.keystr((key,), simple=True)


def _split(path, collection):
    """The memories of sites in a collection, by the sites' names; and what else is in it.

    `path` is that of the collection's scope.
    """
    memory, others = {}, {}
    for name, node in collection.items():
        restored = isinstance(node, Mapping) and set(node) == set(Memory._fields)
        if not LAYERS_MEMORY.fullmatch(name) and (restored or is_memory(node)):
            memory["/".join((*path, name))] = node
        elif isinstance(node, Mapping) and not restored:
            own, below = _split((*path, name), node)
            memory |= own
            others |= {name: below} if below else {}
        else:
            others[name] = node
    return memory, others


@contextlib.contextmanager
def _scopes(scopes, *, initializing):
    """The scopes as they are in `init` or after it; later as before, with counters of that time."""
    before = [(scope, scope.flags, dict(scope.rng_counters)) for scope in scopes]
    for scope in scopes:
        scope.flags = scope.flags.copy({"initializing": initializing})
    try:
        yield
    finally:
        for scope, flags, counters in before:
            scope.flags = flags
            scope.rng_counters.update(counters)


def _roots(scopes):
    """The scopes that are inside of no other one, each once."""

    def ancestors(scope):
        while (scope := scope.parent) is not None:
            yield scope

    return [s for s in dict.fromkeys(scopes) if not any(a in scopes for a in ancestors(s))]
