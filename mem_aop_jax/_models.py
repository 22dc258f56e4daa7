"""Which layers of a model a configuration is for: ordered rules on their paths."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax

from mem_aop_jax._core.config import MemAOP

Rules = tuple[tuple[str, MemAOP | None], ...]


class Layer(NamedTuple):
    """An approximate layer of a model.

    Attributes:
      path: the path of its module, joined by "/".
      rows: number of rows of a batch (the paper's M).
      in_features: contracted dimensions, multiplied.
      out_features: the kernel's other dimensions, multiplied.
      k: number of outer products computed (the paper's K).
    """

    path: str
    rows: int
    in_features: int
    out_features: int
    k: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(rows, in_features, out_features)."""
        return self.rows, self.in_features, self.out_features


def as_rules(caller: str, config_or_rules: MemAOP | Sequence[tuple[str, MemAOP | None]]) -> Rules:
    """The rules as a hashable tuple; one configuration is a rule for all paths.

    Raises:
      TypeError: neither a configuration nor pairs of a pattern and a configuration (or None).
      ValueError: a pattern that is no regular expression.
    """
    if isinstance(config_or_rules, MemAOP):
        return ((r".*", config_or_rules),)
    wanted = (
        "an aop.MemAOP, or a list of rules (regular expression on the path, aop.MemAOP or None), "
        'for instance [(r"mlp/.*", config), (r".*", None)]'
    )
    if hasattr(config_or_rules, "rules"):  # what `plan`, `allocate` or `advise` returned
        name = type(config_or_rules).__name__
        raise TypeError(f"{caller}: got an aop.{name}; pass its rules, .rules.")
    if isinstance(config_or_rules, str) or not isinstance(config_or_rules, Sequence):
        raise TypeError(f"{caller}: got {config_or_rules!r}; it must be {wanted}.")
    for rule in config_or_rules:
        match rule:
            case (str(pattern), MemAOP() | None):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"{caller}: the pattern {pattern!r} is no regular expression: {error}."
                    ) from None
            case _:
                raise TypeError(f"{caller}: got the rule {rule!r}; the rules must be {wanted}.")
    return tuple((pattern, config) for pattern, config in config_or_rules)


def rules_for(configs: Mapping[str, MemAOP | None]) -> Rules:
    """Rules that give the layers with these paths these configurations.

    A later use of a parameter ("w#1") comes first: the rule for "w" is for all of its uses.
    """
    ordered = sorted(configs, key=lambda path: "#" not in path)
    return tuple((re.escape(path), configs[path]) for path in ordered)


def config_for(rules: Rules, *names: str) -> MemAOP | None:
    """The configuration of the first rule whose pattern matches a whole name, or None.

    `names` are those of one layer: its path, and others that a pattern may match.
    """
    i = _decider(rules, names)
    return None if i is None else rules[i][1]


def check_all_used(caller: str, rules: Rules, layers: Sequence[tuple[str, ...]]) -> None:
    """Every rule decides about a layer, except one for all layers that finds none left.

    `layers` has the names of each layer.

    Raises:
      ValueError: a rule that decides about none of them.
    """
    deciders = {_decider(rules, names) for names in layers}
    paths = list(dict.fromkeys(path for path, *_ in layers))
    for i, (pattern, _) in enumerate(rules):
        matching = [names[0] for names in layers if _matches(pattern, names)]
        if i in deciders or (matching and len(matching) == len(layers)):
            continue
        found = (
            f"matches only layers that an earlier rule decides about ({', '.join(matching)})"
            if matching
            else "matches no dense layer"
        )
        raise ValueError(
            f"{caller}: the rule for {pattern!r} {found}. The pattern must match the whole path, "
            f"and the first match wins. The layers are: {', '.join(map(repr, paths)) or 'none'}."
        )


def _decider(rules, names):
    """The index of the first rule that matches, or None."""
    return next((i for i, (pattern, _) in enumerate(rules) if _matches(pattern, names)), None)


def _matches(pattern, names):
    return any(re.fullmatch(pattern, name) for name in names)


def eval_shape(function: Callable, *args: chex.ArrayTree, **kwargs: chex.ArrayTree):
    """`jax.eval_shape` that keeps concrete arguments concrete: a model may branch on them."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    shapes = {i: a for i, a in enumerate(leaves) if isinstance(a, jax.ShapeDtypeStruct)}

    def call(traced):
        args, kwargs = structure.unflatten([traced.get(i, a) for i, a in enumerate(leaves)])
        return function(*args, **kwargs)

    return jax.eval_shape(call, shapes)


def subclass(
    model_class: type, members: dict[str, Any], remake: Callable[..., Any], *arguments: Any
) -> type:
    """A subclass of a model's class that goes by its name, with these members.

    Pickle, which finds classes by their names alone, makes its instances by `remake(*arguments)`.
    """

    def reduce_ex(self, protocol):
        _, _, *state = model_class.__reduce_ex__(self, protocol)
        return remake, arguments, *state

    names = ("__doc__", "__module__", "__qualname__")
    as_the_model = {name: getattr(model_class, name) for name in names}
    members = as_the_model | members | {"__reduce_ex__": reduce_ex}
    return type(model_class)(model_class.__name__, (model_class,), members)
