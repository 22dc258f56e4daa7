"""Equations with jaxprs in which there are contractions with parameters.

Each kind has a class, which `of` makes of an equation, of the origins of its inputs and of the
place where it stands.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax import lax
from jax.extend import core as jex
from jax.sharding import PartitionSpec, Sharding

from mem_aop_jax._approximate.origins import Origin
from mem_aop_jax._approximate.program import Program, resharded
from mem_aop_jax._compat import (
    primitive_of,
    scan_counts,
    scan_options,
    shard_map_options,
    varying_axes_of_type,
)

if TYPE_CHECKING:
    from mem_aop_jax._approximate.builder import Builder


class Devices(NamedTuple):
    """The devices of a `shard_map`.

    Attributes:
      mesh_axes: sizes of the mesh axes over which it maps.
      typed: whether the types of the values in it tell over which of them they vary.
      axes: by the names of the sites in it, the mesh axes over which their memories vary.
    """

    mesh_axes: dict[str, int]
    typed: bool
    axes: dict[str, tuple[str, ...]]

    def axes_of(self, name: str, operands: Sequence) -> tuple[str, ...]:
        """Over which the memories of the site with this name and these operands' types vary."""
        axes = tuple(self.mesh_axes)
        if self.typed:
            varying = frozenset().union(*map(varying_axes_of_type, operands))
            axes = tuple(axis for axis in axes if axis in varying)
        self.axes[name] = axes
        return axes


class Place(NamedTuple):
    """Where a jaxpr stands in the function.

    Attributes:
      around: what is around it and runs it more than once: scans' lengths, devices.
      unreachable: why nothing in it is approximate, or None.
    """

    around: tuple[int | Devices, ...] = ()
    unreachable: str | None = None

    def inside(self, repeats: int | Devices) -> "Place":
        """The place of the body of a scan of this length, or of a `shard_map`."""
        return self._replace(around=(*self.around, repeats))


class Called(NamedTuple):
    """`jit` and other calls of a jaxpr, inlined; with the shardings that a `jit` asks for."""

    programs: tuple[Program]
    in_shardings: Sequence
    out_shardings: Sequence

    @classmethod
    def of(cls, builder: "Builder", equation: jex.JaxprEqn, inputs: list[Origin], place: Place):
        closed = next(v for v in equation.params.values() if isinstance(v, jex.ClosedJaxpr))
        shardings = (
            equation.params.get(name) or (None,) * len(variables)
            for name, variables in (
                ("in_shardings", equation.invars),
                ("out_shardings", equation.outvars),
            )
        )
        program = builder.program(closed.jaxpr, closed.consts, inputs, place)
        return cls((program,), *shardings)

    def run(self, memory, key, *inputs):
        (program,) = self.programs
        results = program.run(memory, key, *map(_constrained, inputs, self.in_shardings))
        return list(map(_constrained, results, self.out_shardings))


class Rematerialized(NamedTuple):
    """`jax.checkpoint`, with its policy; names in it go on being names."""

    programs: tuple[Program]
    options: dict[str, Any]

    @classmethod
    def of(cls, builder: "Builder", equation: jex.JaxprEqn, inputs: list[Origin], place: Place):
        _, params = primitive_of(equation)
        program = builder.program(params["jaxpr"], (), inputs, place)
        options = {name: params[name] for name in ("policy", "prevent_cse")}
        if isinstance(options["prevent_cse"], tuple):  # of each input; also of memory and key
            options["prevent_cse"] = True, True, *options["prevent_cse"]
        return cls((program,), options)

    def run(self, memory, key, *inputs):
        (program,) = self.programs
        return jax.checkpoint(program.run, **self.options)(program.own(memory), key, *inputs)


class Scanned(NamedTuple):
    """`lax.scan`: each iteration has its memories and its key."""

    programs: tuple[Program]
    consts: int
    carry: int
    options: dict[str, Any]

    @classmethod
    def of(cls, builder: "Builder", equation: jex.JaxprEqn, inputs: list[Origin], place: Place):
        closed, options = equation.params["jaxpr"], scan_options(equation)
        place = place.inside(options["length"])
        inputs = builder.origins.of_body(equation, inputs)
        program = builder.program(closed.jaxpr, closed.consts, inputs, place)
        return cls((program,), *scan_counts(equation), options)

    def run(self, memory, key, *inputs):
        (program,) = self.programs
        first, last = self.consts, self.consts + self.carry
        consts, carry, xs = inputs[:first], inputs[first:last], inputs[last:]
        keys = None if key is None else jax.random.split(key, self.options["length"])

        def body(carry, iteration):
            memory, key, xs = iteration
            results = program.run(memory, key, *consts, *carry, *xs)
            return results[: self.carry], results[self.carry :]

        iterations = program.own(memory), keys, xs
        carry, ys = lax.scan(body, list(carry), iterations, **self.options)
        return [*carry, *ys]


class Switched(NamedTuple):
    """`lax.cond` and `lax.switch`: a branch that is not taken keeps its memories."""

    programs: tuple[Program, ...]

    @classmethod
    def of(cls, builder: "Builder", equation: jex.JaxprEqn, inputs: list[Origin], place: Place):
        branches = equation.params["branches"]
        return cls(tuple(builder.program(b.jaxpr, b.consts, inputs[1:], place) for b in branches))

    def run(self, memory, key, index, *inputs):
        owned = [branch.own(memory) for branch in self.programs]
        memory = functools.reduce(dict.__or__, owned)
        return lax.switch(index, [branch.run for branch in self.programs], memory, key, *inputs)


class Sharded(NamedTuple):
    """`jax.shard_map`: each device has its memories, which begin with dimensions of mesh axes.

    Attributes:
      axes: of each site, by its name.
    """

    programs: tuple[Program]
    axes: dict[str, tuple[str, ...]]
    options: dict[str, Any]

    @classmethod
    def of(cls, builder: "Builder", equation: jex.JaxprEqn, inputs: list[Origin], place: Place):
        options = shard_map_options(equation)
        sizes = options["mesh"].shape
        sizes = {axis: sizes[axis] for axis in sizes if axis in options["axis_names"]}
        devices = Devices(sizes, options["check_vma"], {})
        program = builder.program(equation.params["jaxpr"], (), inputs, place.inside(devices))
        return cls((program,), devices.axes, options)

    def run(self, memory, key, *inputs):
        (program,) = self.programs
        mesh = getattr(self.options["mesh"], "abstract_mesh", self.options["mesh"])
        memory = {
            name: resharded(own, mesh, self.axes[name]) for name, own in program.own(memory).items()
        }
        specs = {
            name: jax.tree.map(lambda _, axes=self.axes[name]: PartitionSpec(*axes), own)
            for name, own in memory.items()
        }

        def run_on_device(memory, key, *inputs):
            own = {
                name: jax.tree.map(functools.partial(_without_first, len(self.axes[name])), stacked)
                for name, stacked in memory.items()
            }
            return tuple(program.run(own, key, *inputs))

        in_specs = specs, PartitionSpec(), *self.options["in_specs"]
        options = self.options | {"in_specs": in_specs}
        return jax.shard_map(run_on_device, **options)(memory, key, *inputs)


NESTED: dict[str, Any] = {  # classes, by primitives' names
    "jit": Called,
    "pjit": Called,
    "closed_call": Called,
    "core_call": Called,
    "checkpoint": Rematerialized,
    "remat2": Rematerialized,
    "scan": Scanned,
    "cond": Switched,
    "shard_map": Sharded,
}


def _without_first(number, array):
    """Without so many dimensions, each of size 1."""
    return array.reshape(array.shape[number:])


def _constrained(x, sharding):
    return lax.with_sharding_constraint(x, sharding) if isinstance(sharding, Sharding) else x
