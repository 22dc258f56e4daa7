"""From a jaxpr to a program: which of its contractions are approximate, and their names."""

import collections
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex
from jax.sharding import AxisType

from mem_aop_jax._approximate.contractions import CONTRACTIONS, Contraction
from mem_aop_jax._approximate.nested import NESTED, Devices, Place
from mem_aop_jax._approximate.origins import (
    DATA,
    Origin,
    Origins,
    inner_jaxprs,
    is_kernel,
    reads,
)
from mem_aop_jax._approximate.program import (
    Approximate,
    Exact,
    Operation,
    Parameter,
    Program,
    Site,
    Step,
)
from mem_aop_jax._compat import jaxpr_of, primitive_of, settings_of
from mem_aop_jax._core.config import MemAOP

# (parameter, the site's name, contraction) -> the configuration, or None and why it is exact
Decide = Callable[[Parameter, str, Contraction], tuple[MemAOP | None, str | None]]


class Builder:
    """Builds programs, and collects all sites in the order in which they are found.

    Args:
      parameters: of the function, by the numbers that origins hold.
      decide: which contractions are approximate.
      uses: how often each path was used before; it goes on counting.
    """

    def __init__(
        self, parameters: Sequence[Parameter], decide: Decide, uses: collections.Counter[str]
    ):
        self.sites: list[Site] = []
        self.origins = Origins()
        self._parameters, self._decide, self._uses = parameters, decide, uses
        self._paths = {parameter.path for parameter in parameters}
        self._mesh = jax.sharding.get_abstract_mesh()

    def program(
        self, jaxpr: jex.Jaxpr, consts: Sequence, inputs: Sequence[Origin], place: Place
    ) -> Program:
        """The program of a jaxpr whose inputs have these origins."""
        origins = self.origins.of_values(jaxpr, inputs)
        steps: list[Step | jex.JaxprEqn] = []
        found = len(self.sites)
        for equation in _needed_equations(jaxpr):
            operation = self._operation(equation, reads(origins, equation.invars), place)
            steps.append(
                equation
                if operation is None
                else Step(operation, equation.invars, equation.outvars, settings_of(equation))
            )
        names = {site.name for site in self.sites[found:] if site.config is not None}
        return Program(jaxpr, consts, _joined_equations(jaxpr, steps), frozenset(names))

    def _operation(self, equation, inputs, place) -> Operation | None:
        """What stands in for an equation, or None where it stays as it is."""
        name, _ = primitive_of(equation)
        if not (DATA in inputs and any(map(is_kernel, inputs))):
            return None
        if name in CONTRACTIONS:
            site = self._site(equation, inputs, place)
            return None if site is None or site.config is None else Approximate(site)
        jaxprs = inner_jaxprs(equation)
        if not any(map(_has_contraction, jaxprs)):
            return None
        if name in NESTED:
            operation = NESTED[name].of(self, equation, inputs, place)
            return operation if any(program.names for program in operation.programs) else None
        place = place._replace(unreachable=place.unreachable or f"inside {name}")
        if name == "while":
            jaxprs, inputs = jaxprs[1:], self.origins.of_body(equation, inputs)
        for jaxpr in jaxprs:  # for the sites in it alone
            if len(jaxpr.invars) == len(inputs):
                self.program(jaxpr, (), inputs, place)
        return None

    def _site(self, equation, inputs, place) -> Site | None:
        """The site of a contraction of rows with a kernel; None where it is none."""
        first, second = inputs[:2]
        if DATA not in (first, second) or not (first or second):
            return None
        kernel = 0 if first else 1
        parameter = max(
            (self._parameters[number] for number in sorted(inputs[kernel])),
            key=lambda parameter: parameter.size,
        )
        uses = self._uses[parameter.path]
        while uses and parameter.site_name(uses) in self._paths:  # another parameter's
            uses += 1
        self._uses[parameter.path] = uses + 1
        name = parameter.site_name(uses)
        operation = equation.primitive.name
        contraction = CONTRACTIONS[operation](equation, kernel)
        operands: list[Any] = [variable.aval for variable in equation.invars]
        stack: tuple[int, ...] = ()
        mesh_axes: tuple[str, ...] = ()
        for repeats in place.around:
            if isinstance(repeats, Devices):
                axes = repeats.axes_of(name, operands)
                mesh_axes += axes
                stack += tuple(repeats.mesh_axes[axis] for axis in axes)
            else:
                stack += (repeats,)
        why_exact, config = place.unreachable or contraction.why_not, None
        kinds = zip(self._mesh.axis_types, operands[0].sharding.mesh.axis_types, strict=False)
        if (AxisType.Explicit, AxisType.Auto) in kinds:
            why_exact = "inside auto_axes"
        if why_exact is None:
            config, why_exact = self._decide(parameter, name, contraction)
        site = Site(name, parameter, operation, contraction, stack, mesh_axes, config, why_exact)
        self.sites.append(site)
        return site


def _needed_equations(jaxpr: jex.Jaxpr) -> list[jex.JaxprEqn]:
    """Those that the results depend on, and those with effects."""
    needed, equations = set(_variables(jaxpr.outvars)), []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            equations.append(equation)
            needed.update(_variables(equation.invars))
    return equations[::-1]


def _has_contraction(jaxpr: jex.Jaxpr) -> bool:
    return any(
        equation.primitive.name in CONTRACTIONS
        or any(map(_has_contraction, inner_jaxprs(equation)))
        for equation in jaxpr.eqns
    )


def _joined_equations(jaxpr: jex.Jaxpr, steps: list[Step | jex.JaxprEqn]) -> list[Step]:
    """The steps of a jaxpr, with each run of equations as one of them."""
    last_read = {
        variable: number
        for number, step in enumerate(steps)
        for variable in _variables(step.reads if isinstance(step, Step) else step.invars)
    }
    last_read |= dict.fromkeys(_variables(jaxpr.outvars), len(steps))
    joined: list[Step] = []
    for is_step, numbered in itertools.groupby(enumerate(steps), _is_step):
        numbers, run = zip(*numbered, strict=True)
        if is_step:
            joined += run
            continue
        written = dict.fromkeys(variable for equation in run for variable in equation.outvars)
        read = dict.fromkeys(v for equation in run for v in _variables(equation.invars))
        inputs = [variable for variable in read if variable not in written]
        outputs = [v for v in written if last_read.get(v, 0) > numbers[-1]]
        joined.append(Step(Exact(jaxpr_of(jaxpr, inputs, outputs, run)), inputs, outputs))
    return joined


def _is_step(numbered) -> bool:
    return isinstance(numbered[1], Step)


def _variables(atoms) -> list[jex.Var]:
    return [atom for atom in atoms if not isinstance(atom, jex.Literal)]
