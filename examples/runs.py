"""What the examples that compare runs share: how a run is spelled, their options, their figures."""

import argparse
import fractions
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import mem_aop_jax as aop

# ---- runs


class Run(NamedTuple):
    """One way to train.

    Attributes:
      name: as it was spelled.
      config: of the layers; None is exact.
      keywords: the configuration's, as they were spelled (input_ratio, input_rank: of its
        input_grad).
      others: keywords that are not the configuration's.
    """

    name: str
    config: aop.MemAOP | None
    keywords: dict[str, Any]
    others: dict[str, Any]


def parse_value(text: str) -> Any:
    """Of "8", "0.5", "1/8", "24x8", "none", "true" and "rows"; a share is a float, 24x8 a pair."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch(r"\d+x\d+", text):
        return tuple(map(int, text.split("x")))
    try:
        return int(text) if text.isdecimal() else float(fractions.Fraction(text))
    except (ValueError, ZeroDivisionError):
        return text


def parse(text: str, others: Sequence[str] = (), without: Sequence[str] = ("exact",)) -> Run:
    """Of `POLICY:NAME=VALUE,...`, for argparse.

    `others` are names that aop.MemAOP has not; what is in `without` has no configuration.
    """
    policy, _, rest = text.partition(":")
    keywords = {}
    for item in filter(None, rest.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{text}: {item!r} is not NAME=VALUE")
        if name in keywords:
            raise argparse.ArgumentTypeError(f"{text}: {name} is given twice")
        keywords[name] = parse_value(value)
    found = {name: keywords.pop(name) for name in others if name in keywords}
    if policy in without:
        if keywords:
            takes = f"{', '.join(others[:-1])} and {others[-1]}" if others else "nothing"
            raise argparse.ArgumentTypeError(
                f"{text}: {policy} takes {takes}, not {', '.join(keywords)}"
            )
        return Run(text, None, keywords, found)
    options = dict(keywords)
    of_inputs = {
        name.removeprefix("input_"): options.pop(name)
        for name in ("input_ratio", "input_rank")
        if name in options
    }
    try:
        if of_inputs:
            options["input_grad"] = aop.InputGrad(**of_inputs)
        return Run(text, aop.MemAOP(policy=policy, **options), keywords, found)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


# ---- options


def count(text: str) -> int:
    """For argparse."""
    return _number(int, 1, 10**6, text)


def rate(text: str) -> float:
    """For argparse."""
    return _number(float, 0.0, 1e3, text)


def _number(kind, low, high, text):
    value = kind(text)
    if not low <= value <= high:  # NaN fails too
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
    return value


def make_out(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Makes the folder --out, before the training and not after it."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: cannot be made ({error.strerror})")


# ---- figures


def summary(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation over the seeds; of a single one, None."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def shown(values: Sequence[float]) -> str:
    """Their mean ± standard deviation."""
    return " ± ".join(f"{figure:.4f}" for figure in summary(values) if figure is not None)
