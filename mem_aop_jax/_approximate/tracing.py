"""From a function and arguments to its program."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax

from mem_aop_jax._approximate.builder import Builder, Decide
from mem_aop_jax._approximate.nested import Place
from mem_aop_jax._approximate.origins import Origin
from mem_aop_jax._approximate.program import Memories, Parameter, Program, Site


class Traced(NamedTuple):
    """A function's program for some arguments.

    Attributes:
      program: the function's, with arrays in and arrays out.
      sites: all contractions with parameters, in the order in which the function computes them.
      inputs: the arrays among the arguments.
      outputs: the function's result, from the program's.
    """

    program: Program
    sites: list[Site]
    inputs: list[chex.Array]
    outputs: Callable[[list[chex.Array]], Any]

    def run(self, memory: Memories, key: chex.PRNGKey | None) -> Any:
        """The function's result; the gradient of the memory is the next memory."""
        return self.outputs(self.program.run(memory, key, *self.inputs))

    @property
    def reached(self) -> list[Site]:
        """The approximate ones."""
        return [site for site in self.sites if site.config is not None]


def trace(
    fun: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    parameter_or_origin: Callable[[tuple, chex.Array], Parameter | Origin],
    decide: Decide,
    uses: collections.Counter[str] | None = None,
) -> Traced:
    """Traces a function: arrays among its arguments are traced, all else is static.

    Args:
      fun: any function.
      args: its arguments; arrays of them may be `jax.ShapeDtypeStruct`s.
      kwargs: its keyword arguments, as args.
      parameter_or_origin: what an array is, by its path in (args, kwargs).
      decide: as in `Builder`.
      uses: as in `Builder`.
    """
    leaves_with_path, structure = jax.tree.flatten_with_path((args, kwargs))
    leaves = [leaf for _, leaf in leaves_with_path]
    arrays = [number for number, leaf in enumerate(leaves) if is_array(leaf)]
    results: list = []  # the leaves of what the function returns, and their structure

    def flat_fun(*traced):
        given = dict(zip(arrays, traced, strict=True))
        args, kwargs = structure.unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)])
        results[:] = jax.tree.flatten(fun(*args, **kwargs))
        return [leaf for leaf in results[0] if is_array(leaf)]

    def outputs(computed):
        (leaves, structure), computed = results, iter(computed)
        return structure.unflatten([next(computed) if is_array(x) else x for x in leaves])

    inputs = [leaves[number] for number in arrays]
    closed = jax.make_jaxpr(flat_fun)(*inputs)
    parameters: list[Parameter] = []
    origins: list[Origin] = []
    for number in arrays:
        found = parameter_or_origin(*leaves_with_path[number])
        if isinstance(found, Parameter):
            origins.append(frozenset({len(parameters)}))
            parameters.append(found)
        else:
            origins.append(found)
    builder = Builder(parameters, decide, collections.Counter() if uses is None else uses)
    program = builder.program(closed.jaxpr, closed.consts, origins, Place())
    return Traced(program, builder.sites, inputs, outputs)


def is_array(leaf: object) -> bool:
    """Whether a leaf is an array, or the shape of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def path_string(keys: tuple) -> str:
    """The path of a leaf, joined by "/"; a box is not part of it (Flax's, an NNX variable's)."""
    while keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")
