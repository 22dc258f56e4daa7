"""The transformation: any JAX function, with approximate gradients of its parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
from jax.tree_util import SequenceKey

from mem_aop_jax._approximate.origins import DATA
from mem_aop_jax._approximate.program import LayerParameter, Parameter, Site
from mem_aop_jax._approximate.reach import Reach, ReachedSite
from mem_aop_jax._approximate.settings import Settings
from mem_aop_jax._approximate.tracing import Traced, parameter_path, trace
from mem_aop_jax._core import validation
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.memory import LayerMemory
from mem_aop_jax._models import Layer, Rules


@dataclasses.dataclass(frozen=True)
class Approximated:
    """A function whose parameters' gradients are approximate: what `approximate` returns.

    Attributes:
      fun: the function itself.
      settings: which contractions are approximate, and how.
      model: the name of a model whose parameters these are: then rules and paths are its layers'.
    """

    fun: Callable
    settings: Settings
    model: str | None = None

    def init(self, params: chex.ArrayTree, /, *args, **kwargs) -> dict[str, LayerMemory]:
        """The first memories, by the names of the sites: the parameters' paths.

        A parameter's second use has a site of its own, its path with the suffix "#1", and so on.
        Contractions in a scan have a memory for each iteration, those with batch dimensions
        (experts, ensembles) one for each index, and those in a `shard_map` one for each device:
        each in the memory's first dimensions.

        Args:
          params: as in the call.
          *args: as in the call, for a batch of the training size. The function itself is not
            computed: an array may be a `jax.ShapeDtypeStruct`, here and in `params`.
          **kwargs: as in the call.

        Raises:
          ValueError: a rule that decides about none of the contractions.
        """
        return first_memories(sites_of(self, params, *args, **kwargs))

    def __call__(
        self,
        params: chex.ArrayTree,
        memory: Mapping[str, LayerMemory] | None,
        key: chex.PRNGKey | None,
        /,
        *args,
        **kwargs,
    ) -> Any:
        """What the function returns for the same arguments.

        Args:
          params: the first argument of the function.
          memory: from `init` or the last step. Its gradient is the next memory. None evaluates,
            with any batch: differentiated then with respect to a parameter whose configuration has
            a memory, it is an error.
          key: a new PRNG key in each step; None where no configuration draws at random.
          *args: further arguments of the function. What is no array is static.
          **kwargs: as `args`.

        Raises:
          TypeError: a memory that is no mapping, or a key that is none.
          ValueError: a memory that does not fit the batch; a rule that decides about none of the
            contractions; while differentiating: no memory, or no key.
        """
        if memory is not None and not isinstance(memory, Mapping):
            raise TypeError(
                f"approximate: memory is of type {type(memory).__name__}; it must be what init "
                "returns, or its gradient. Call approx(params, memory, key, *args)."
            )
        validation.key("approximate: approx(params, memory, key, *args)", key)
        if memory is None:
            return self._traced((), params, args, kwargs).run({}, key)
        traced = self._traced(memory, params, args, kwargs)
        self.settings.check_all_used(traced.sites)
        return traced.run(dict(memory), key)

    def layers(self, params: chex.ArrayTree, /, *args, **kwargs) -> list[Layer]:
        """The approximate contractions, in the order in which the function computes them.

        Of the runs of a contraction (iterations, experts, devices), one stands for all. Arguments
        and errors are those of `init`.
        """
        return [site.layer for site in sites_of(self, params, *args, **kwargs)]

    def reach(self, params: chex.ArrayTree, /, *args, **kwargs) -> Reach:
        """All contractions with parameters, and why those are exact that are.

        Arguments and errors are those of `init`.
        """
        return Reach([ReachedSite.of(site) for site in self._checked(params, args, kwargs).sites])

    def _checked(self, params, args, kwargs) -> Traced:
        traced = self._traced((), params, args, kwargs)
        self.settings.check_all_used(traced.sites)
        return traced

    def _traced(self, memory, params, args, kwargs) -> Traced:
        decide = functools.partial(self.settings.decide, memory)
        return trace(self.fun, (params, *args), kwargs, self._parameter_or_data, decide)

    def _parameter_or_data(self, path, leaf):
        """The leaves of the function's first argument are parameters."""
        if path[:2] != (SequenceKey(0), SequenceKey(0)):  # of (args, kwargs)
            return DATA
        name = parameter_path(path[2:])
        if self.model is None:
            return Parameter(name, leaf.size)
        return LayerParameter(name, leaf.size, relative=name, model=self.model)


def sites_of(approx: Approximated, params: chex.ArrayTree, /, *args, **kwargs) -> list[Site]:
    """The sites that are approximate; arguments and errors are those of `Approximated.init`."""
    return approx._checked(params, args, kwargs).reached


def first_memories(sites: Sequence[Site]) -> dict[str, LayerMemory]:
    """The memories that sites start with, of those that have one."""
    memories = {site.name: site.first_memory() for site in sites}
    return {name: memory for name, memory in memories.items() if memory is not None}


def with_rules(approx: Approximated, caller: str, rules: Rules) -> Approximated:
    """The same function with other rules; `caller` has them, for error messages."""
    return dataclasses.replace(approx, settings=Settings(caller, rules, None, None))


def approximate(
    fun: Callable,
    config_or_rules: MemAOP | Sequence[tuple[str, MemAOP | None]],
    *,
    min_speedup: float | None = None,
) -> Approximated:
    """A function with approximate gradients of its parameters (Mem-AOP-GD, arXiv 2110.09164).

    Each contraction (`jax.lax.dot_general`) of something that is computed from parameters alone,
    its kernel, with something that is not, its rows, has the gradients of `aop.dense`, whatever
    library or layer it comes from. The function is traced, as by `jax.jit`: contractions are found
    inside of jit, remat, scan (each iteration has its memory), cond (a branch that is not taken
    keeps its memory), vmap, shard_map and inner derivatives. A convolution whose windows do not
    overlap is a contraction, too. Functions with derivatives of their own (`jax.custom_vjp`) and
    loops of unknown length stay as they are; `reach` lists what is exact, and why.

    What the function closes over counts as constant: pass the batch as an argument.

    Args:
      fun: `fun(params, *args, **kwargs)`, any JAX function. params is any pytree of arrays;
        what `fun` returns is any pytree.
      config_or_rules: a configuration for all contractions with parameters (one with fewer rows
        than k stays exact, and `reach` says so), or rules: pairs of a
        regular expression on the whole path of a parameter ("params/block_0/qkv/kernel", "0/w"),
        and a configuration or None for exact ones. The first match wins; what no rule matches is
        exact. A kernel that is computed from several parameters has the path of the largest.
      min_speedup: a contraction stays exact, too, unless `aop.cost` predicts that a step of it is
        so many times faster on the default device.

    Returns:
      The function to call as `approx(params, memory, key, *args, **kwargs)`, under the transforms
      of JAX. Forward-mode differentiation and `jax.linear_transpose` of it are errors. Derivatives
      of its derivatives are not those of `fun`: take the inner ones inside of `fun`.

    Raises:
      TypeError: `fun` is not callable; neither a configuration nor rules.
      ValueError: a bad regular expression, or a `min_speedup` that is no positive number.

    Example:
      >>> import jax, jax.numpy as jnp, mem_aop_jax as aop
      >>> def loss(params, x, y):
      ...     return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2)
      >>> params = {"hidden": jnp.ones((3, 16)), "out": jnp.ones((16, 1))}
      >>> x, y = jnp.ones((8, 3)), jnp.ones((8, 1))
      >>> approx = aop.approximate(loss, aop.MemAOP(ratio=0.25))
      >>> memory = approx.init(params, x, y)
      >>> grads, memory = jax.grad(approx, argnums=(0, 1))(params, memory, None, x, y)
      >>> {name: rows.inputs.shape for name, rows in memory.items()}
      {'hidden': (8, 3), 'out': (8, 16)}
      >>> print(f"{approx.reach(params, x, y).share:.0%}")
      100%
    """
    if not callable(fun):
        raise TypeError(f"approximate: fun is of type {type(fun).__name__}; it must be callable.")
    return Approximated(fun, Settings.of("approximate", config_or_rules, min_speedup))
