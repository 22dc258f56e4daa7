"""From a function and arguments to its program."""

import collections
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
from flax import nnx
from flax.core.meta import AxisMetadata

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
      parameter_or_origin: what an array is, by its path in (args, kwargs); boxes are no steps of it
        (Flax's, an NNX variable).
      decide: as in `Builder`.
      uses: as in `Builder`.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = [number for number, leaf in enumerate(leaves) if is_array(leaf)]
    result: list = []  # the leaves of what the function returns that are static, and the structure

    def flat_fun(*traced):
        given = dict(zip(arrays, traced, strict=True))
        args, kwargs = structure.unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)])
        computed, computed_structure = jax.tree.flatten(fun(*args, **kwargs))
        static = [_ARRAY if is_array(leaf) else leaf for leaf in computed]
        result[:] = static, computed_structure
        return [leaf for leaf in computed if is_array(leaf)]

    def outputs(computed):
        (static, structure), computed = result, iter(computed)
        return structure.unflatten([next(computed) if x is _ARRAY else x for x in static])

    inputs = [leaves[number] for number in arrays]
    closed = jax.make_jaxpr(flat_fun)(*inputs)
    parameters: list[Parameter] = []
    origins: list[Origin] = []
    paths = list(_paths((args, kwargs)))
    for number in arrays:
        found = parameter_or_origin(paths[number], leaves[number])
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
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)


def path_string(keys: Sequence) -> str:
    """A path, joined by "/"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


_ARRAY = object()  # stands for an array among static leaves


def _paths(tree: Any) -> Iterator[tuple]:
    """The paths of a tree's leaves, in which a box (Flax's, an NNX variable) is no step."""
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=_is_box):
        if not _is_box(node):
            yield path
            continue
        for held in jax.tree.leaves(node, is_leaf=functools.partial(operator.is_not, node)):
            yield from (path + inside for inside in _paths(held))


def _is_box(node):
    return isinstance(node, AxisMetadata | nnx.Variable)
