"""A jaxpr as a program in which some contractions are approximate.

A program is a list of steps. Most are runs of equations that stay as they are; the others are
contractions with parameters, and equations with jaxprs in which there are such contractions
(`nested.py`).
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from mem_aop_jax._approximate.contractions import Contraction, Shape
from mem_aop_jax._core.config import MemAOP
from mem_aop_jax._core.dense import dot_general
from mem_aop_jax._core.memory_kinds import init_memory
from mem_aop_jax._core.probe import is_memory
from mem_aop_jax._models import Layer

Memories = dict[str, Any]  # by the sites' names


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A leaf of the parameters.

    Attributes:
      path: joined by "/".
      size: how many numbers it holds.
    """

    path: str
    size: int

    @property
    def names(self) -> tuple[str, ...]:
        """What the patterns of rules may match; the first is listed in messages."""
        return (self.path,)

    def site_name(self, uses: int) -> str:
        """The name of the site where it is used after so many uses before."""
        return f"{self.path}#{uses}" if uses else self.path

    def layer_path(self, site_name: str) -> str:
        """The path of the layer that a site of it is."""
        return site_name

    def label(self, site_name: str) -> str:
        """How messages call a site of it."""
        return self.layer_path(site_name)


@dataclasses.dataclass(frozen=True)
class LayerParameter(Parameter):
    """A parameter of a model whose layers have paths.

    Attributes:
      relative: its path from the wrapped model on, which the patterns of rules match.
      model: how messages call the model itself, where it is the layer.
    """

    relative: str
    model: str

    @property
    def names(self):
        """The path of its layer, and its own."""
        return self.relative.rpartition("/")[0], self.relative

    def layer_path(self, site_name):
        """The path of its layer, which all of its uses share."""
        del site_name
        return self.path.rpartition("/")[0]

    def label(self, site_name):
        """The path of its layer, or the model."""
        return self.layer_path(site_name) or self.model


class Site(NamedTuple):
    """A contraction with parameters, at one place of a function.

    Attributes:
      name: of its memory: the path of the parameter, with a suffix from its second use on.
      parameter: the largest of those that its kernel is computed from.
      operation: the primitive's name.
      contraction: what is multiplied.
      stack: how often the place is run: iterations of scans around it, devices of a `shard_map`.
      mesh_axes: of the `shard_map`s around it, those over which its runs differ.
      config: how to approximate it; None where it is exact.
      why_exact: the reason then.
    """

    name: str
    parameter: Parameter
    operation: str
    contraction: Contraction
    stack: Shape
    mesh_axes: tuple[str, ...]
    config: MemAOP | None
    why_exact: str | None

    @property
    def label(self) -> str:
        """The name in messages."""
        return self.parameter.label(self.name)

    @property
    def flops(self) -> float:
        """Of the forward product, all runs together."""
        return math.prod(self.stack) * self.contraction.flops

    @property
    def all_runs(self) -> Shape:
        """The first dimensions of its memory: runs, and indices of batch dimensions."""
        return (*self.stack, *self.contraction.batch)

    @property
    def layer(self) -> Layer:
        """It as a layer, where it is approximate."""
        assert self.config is not None, "an exact site selects no rows"
        sizes = self.contraction.sizes
        k = self.config.selected_rows(sizes[0], self.label)
        return Layer(self.parameter.layer_path(self.name), *sizes, k)

    def check_runs(self, memory: Any) -> None:
        """Raises a `ValueError` for a memory of another number of runs."""
        held = jnp.shape(memory.uses) if is_memory(memory) else self.all_runs
        if held != self.all_runs:
            raise ValueError(
                f"{self.label}: its memory is for {held} as the numbers of runs (iterations of "
                f"scans, experts, devices); here they are {self.all_runs}. A memory belongs to one "
                "length of a sequence and one batch size: pad to it, or start anew with init."
            )

    def first_memory(self) -> Any:
        """One for each run and each index of the batch dimensions; None without."""
        new = init_memory(self.config, *self.contraction.sizes, self.contraction.dtypes[0])
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (*self.all_runs, *a.shape)), new)


class Operation(Protocol):
    """What a step of a program does."""

    def run(self, memory: Memories, key: chex.PRNGKey | None, *inputs: chex.Array) -> Sequence:
        """The equation's results, from its inputs."""


class Step(NamedTuple):
    """An operation of a program.

    Attributes:
      operation: what it does.
      reads: the variables of the jaxpr that it reads.
      writes: those that it writes.
      settings: of JAX, under which the function asked for it.
    """

    operation: Operation
    reads: Sequence[jex.Var | jex.Literal]
    writes: Sequence[jex.Var]
    settings: Callable[[], AbstractContextManager] = nullcontext


class Program(NamedTuple):
    """The steps of a jaxpr, and the names of the sites in them."""

    jaxpr: jex.Jaxpr
    consts: Sequence
    steps: Sequence[Step]
    names: frozenset[str]

    def run(self, memory: Memories, key: chex.PRNGKey | None, *inputs: chex.Array) -> list:
        """The jaxpr's results; the gradient of the memory is the next memory."""
        values = dict(zip(self.jaxpr.constvars, self.consts, strict=True))
        values |= zip(self.jaxpr.invars, inputs, strict=True)

        def read(atoms):
            return [a.val if isinstance(a, jex.Literal) else values[a] for a in atoms]

        for operation, reads, writes, settings in self.steps:
            with settings():
                results = operation.run(memory, key, *read(reads))
            values |= zip(writes, results, strict=True)
        return read(self.jaxpr.outvars)

    def own(self, memory: Memories) -> Memories:
        """The memories of the sites in it."""
        return {name: memory[name] for name in sorted(self.names & memory.keys())}


# ---- operations


class Exact(NamedTuple):
    """Equations as they are."""

    jaxpr: jex.Jaxpr

    def run(self, memory, key, *inputs):
        del memory, key
        return jex.jaxpr_as_fun(jex.ClosedJaxpr(self.jaxpr, ()))(*inputs)


class Approximate(NamedTuple):
    """A contraction whose kernel gradient is approximate."""

    site: Site

    def run(self, memory, key, lhs, rhs):
        contraction = self.site.contraction
        rows, kernel = contraction.arrange(lhs, rhs)

        def product(rows, kernel, memory, key):
            return dot_general(
                rows,
                kernel,
                contraction.dimension_numbers,
                memory=memory,
                config=self.site.config,
                key=key,
                name=self.site.label,
                **contraction.options,
            )

        if key is not None:
            key = jax.random.fold_in(key, zlib.crc32(self.site.name.encode()))
            for axis in self.site.mesh_axes:
                key = jax.random.fold_in(key, lax.axis_index(axis))
            key = jax.random.split(key, contraction.batch) if contraction.batch else key
        for _ in contraction.batch:
            product = jax.vmap(product)
        sharding = jax.typeof(rows).sharding
        first = sharding.spec[: len(contraction.batch)]
        own, key = resharded((memory.get(self.site.name), key), sharding.mesh, first)
        return [contraction.restore(product(rows, kernel, own, key))]


def resharded(
    tree: chex.ArrayTree, mesh: AbstractMesh, first_axes: Sequence[Any]
) -> chex.ArrayTree:
    """Arrays, their first dimensions over these axes of a mesh where types know of its axes."""

    def reshard(array):
        old = jax.typeof(array).sharding
        if AxisType.Explicit not in old.mesh.axis_types:
            return array
        new = NamedSharding(mesh, PartitionSpec(*first_axes, *old.spec[len(first_axes) :]))
        return array if old == new else jax.sharding.reshard(array, new)

    return jax.tree.map(reshard, tree)
