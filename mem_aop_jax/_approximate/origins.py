"""Where the values of a jaxpr come from: from parameters alone, or from data, too."""

from collections.abc import Sequence

from jax.extend import core as jex

from mem_aop_jax._compat import primitive_of, scan_counts

Origin = frozenset[int] | None  # the numbers of the parameters that a value depends on; DATA
CONSTANT: Origin = frozenset()  # of no parameter, or of one that nobody differentiates here
DATA: Origin = None  # of an argument that holds no parameters


def joined(origins: Sequence[Origin]) -> Origin:
    """The origin of a value that is computed from values of these origins."""
    if any(origin is DATA for origin in origins):
        return DATA
    return frozenset[int]().union(*(origin for origin in origins if origin is not None))


def is_kernel(origin: Origin) -> bool:
    """Whether a value is computed from parameters alone."""
    return bool(origin)


def reads(origins: dict[jex.Var, Origin], atoms: Sequence[jex.Var | jex.Literal]) -> list[Origin]:
    """The origins of an equation's inputs, or of a jaxpr's outputs."""
    return [CONSTANT if isinstance(a, jex.Literal) else origins[a] for a in atoms]


def inner_jaxprs(equation: jex.JaxprEqn) -> list[jex.Jaxpr]:
    """The jaxprs among the parameters of an equation's primitive."""
    values = [
        value
        for parameter in primitive_of(equation)[1].values()
        for value in (parameter if isinstance(parameter, tuple | list) else (parameter,))
    ]
    closed = [value.jaxpr if isinstance(value, jex.ClosedJaxpr) else value for value in values]
    return [value for value in closed if isinstance(value, jex.Jaxpr)]


class Origins:
    """The origins of all values of a jaxpr, computed once for each jaxpr and its inputs' origins.

    A primitive that calls one jaxpr (jit, remat, custom derivatives, shard_map) is followed into
    it, and so are loops and branches; any other makes of data data. What is read from a mutable
    reference is data.
    """

    def __init__(self):
        self._known: dict[tuple[jex.Jaxpr, tuple[Origin, ...]], dict[jex.Var, Origin]] = {}

    def of_values(self, jaxpr: jex.Jaxpr, inputs: Sequence[Origin]) -> dict[jex.Var, Origin]:
        """The origin of each variable of a jaxpr whose inputs have these."""
        key = jaxpr, tuple(inputs)
        if key not in self._known:
            origins: dict[jex.Var, Origin] = dict.fromkeys(jaxpr.constvars, CONSTANT)
            origins.update(zip(jaxpr.invars, inputs, strict=True))
            for equation in jaxpr.eqns:
                results = self.of_results(equation, reads(origins, equation.invars))
                origins.update(zip(equation.outvars, results, strict=True))
            self._known[key] = origins
        return self._known[key]

    def of_outputs(self, jaxpr: jex.Jaxpr, inputs: Sequence[Origin]) -> list[Origin]:
        """The origins of the results of a jaxpr whose inputs have these."""
        return reads(self.of_values(jaxpr, inputs), jaxpr.outvars)

    def of_results(self, equation: jex.JaxprEqn, inputs: Sequence[Origin]) -> list[Origin]:
        """The origins of the results of an equation whose inputs have these."""
        name, number = equation.primitive.name, len(equation.outvars)
        every_input = joined(inputs)
        if name == "stop_gradient":
            return [DATA if every_input is DATA else CONSTANT]
        if equation.effects and not inner_jaxprs(equation):
            return [DATA] * number
        if not any(map(is_kernel, inputs)):
            return [every_input] * number
        if name == "scan":
            consts, carry = scan_counts(equation)
            (body,) = inner_jaxprs(equation)
            inputs = self.of_body(equation, inputs)
            return inputs[consts : consts + carry] + self.of_outputs(body, inputs)[carry:]
        if name == "cond":
            index, *operands = inputs
            branches = [self.of_outputs(jaxpr, operands) for jaxpr in inner_jaxprs(equation)]
            return [joined([index, *results]) for results in zip(*branches, strict=True)]
        match inner_jaxprs(equation):
            case [jaxpr] if len(jaxpr.invars) == len(inputs) and len(jaxpr.outvars) == number:
                return self.of_outputs(jaxpr, inputs)
        return [every_input] * number

    def of_body(self, loop: jex.JaxprEqn, inputs: Sequence[Origin]) -> list[Origin]:
        """The origins of the inputs of a loop's body, in all iterations together."""
        *_, body = inner_jaxprs(loop)
        if loop.primitive.name == "scan":
            first, carry = scan_counts(loop)
        else:  # while, whose condition comes first
            inputs, first = inputs[loop.params["cond_nconsts"] :], loop.params["body_nconsts"]
            carry = len(inputs) - first
        inputs, carried = list(inputs), slice(first, first + carry)
        while True:
            results = self.of_outputs(body, inputs)[:carry]
            after = [joined(pair) for pair in zip(inputs[carried], results, strict=True)]
            if after == inputs[carried]:
                return inputs
            inputs[carried] = after
