"""From a function and arguments to its program."""

import collections
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
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
      result: the rest of what the function returns.
    """

    program: Program
    sites: list[Site]
    inputs: list[chex.Array]
    result: "Rest"

    def run(self, memory: Memories, key: chex.PRNGKey | None) -> Any:
        """The function's result; the gradient of the memory is the next memory.

        Raises:
          ValueError: a memory of another number of iterations, experts or devices.
        """
        for site in self.reached:
            if site.name in memory:
                site.check_runs(memory[site.name])
        return self.result.with_arrays(self.program.run(memory, key, *self.inputs))

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
    inputs, rest = split_arrays((args, kwargs))
    rest_of_result: list[Rest] = []

    def flat_fun(*traced):
        args, kwargs = rest.with_arrays(traced)
        computed, result = split_arrays(fun(*args, **kwargs))
        rest_of_result.append(result)
        return computed

    closed = jax.make_jaxpr(flat_fun)(*inputs)
    (result,) = rest_of_result
    parameters: list[Parameter] = []
    origins: list[Origin] = []
    paths = (path for path, leaf in leaves_with_path((args, kwargs)) if is_array(leaf))
    for found in map(parameter_or_origin, paths, inputs):
        if isinstance(found, Parameter):
            origins.append(frozenset({len(parameters)}))
            parameters.append(found)
        else:
            origins.append(found)
    builder = Builder(parameters, decide, collections.Counter() if uses is None else uses)
    program = builder.program(closed.jaxpr, closed.consts, origins, Place())
    return Traced(program, builder.sites, inputs, result)


# ---- trees with arrays and other things in them

_ARRAY = object()  # stands for an array


class Rest(NamedTuple):
    """A tree without its arrays."""

    structure: jax.tree_util.PyTreeDef
    leaves: tuple

    def with_arrays(self, arrays: Iterable[chex.Array]) -> Any:
        """The tree."""
        arrays = iter(arrays)
        return self.structure.unflatten([next(arrays) if x is _ARRAY else x for x in self.leaves])


def split_arrays(tree: Any) -> tuple[list[chex.Array], Rest]:
    """The arrays of a tree, and the rest."""
    leaves, structure = jax.tree.flatten(tree)
    others = tuple(_ARRAY if is_array(leaf) else leaf for leaf in leaves)
    return [leaf for leaf in leaves if is_array(leaf)], Rest(structure, others)


def is_array(leaf: object) -> bool:
    """Whether a leaf is an array of numbers or keys, or the shape of one."""
    if isinstance(leaf, type) or not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return False
    return getattr(leaf.dtype, "kind", "") not in tuple("OSUMm")  # objects, texts, dates


def path_string(keys: Sequence) -> str:
    """A path, joined by "/"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def leaves_by_path(tree: chex.ArrayTree) -> dict[str, Any]:
    """The leaves of parameters, or of what is like them, by the paths that rules match."""
    return {parameter_path(path): leaf for path, leaf in leaves_with_path(tree)}


def parameter_path(keys: Sequence) -> str:
    """The path of a parameter, also of one that is all of them."""
    return path_string(keys) or "params"


def leaves_with_path(tree: Any) -> Iterator[tuple[tuple, Any]]:
    """A tree's leaves with paths in which boxes (Flax's, an NNX variable) are no steps."""
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=_is_box):
        if not _is_box(node):
            yield path, node
            continue
        for held in jax.tree.leaves(node, is_leaf=functools.partial(operator.is_not, node)):
            yield from ((path + inside, leaf) for inside, leaf in leaves_with_path(held))


def _is_box(node):
    return isinstance(node, AxisMetadata | nnx.Variable)
