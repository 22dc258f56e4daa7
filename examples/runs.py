"""The runs that the examples compare: how the command line spells them, and tables of them."""

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
      name: the text of --run.
      config: the layers' configuration; None is exact.
      keywords: the configuration's keywords with their values (input_ratio and input_rank are those
        of its input_grad).
      others: the other keywords, which aop.MemAOP does not have.
    """

    name: str
    config: aop.MemAOP | None
    keywords: dict[str, Any]
    others: dict[str, Any]


def parse_value(text: str) -> Any:
    """The value of "8", "0.5", "1/8" (a float), "24x8" (a pair), "none", "true" or "rows"."""
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
    """The run that `POLICY:NAME=VALUE,...` spells, for argparse.

    Args:
      text: a policy and keywords of aop.MemAOP.
      others: names of keywords that aop.MemAOP does not have.
      without: words that stand in a policy's place and have no configuration.

    Raises:
      argparse.ArgumentTypeError: a text that spells no run.
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
    other_keywords = {name: keywords.pop(name) for name in others if name in keywords}
    if policy in without:
        if keywords:
            takes = f"{', '.join(others[:-1])} and {others[-1]}" if others else "nothing"
            raise argparse.ArgumentTypeError(
                f"{text}: {policy} takes {takes}, not {', '.join(keywords)}"
            )
        return Run(text, None, keywords, other_keywords)
    options = dict(keywords)
    input_options = {
        name.removeprefix("input_"): options.pop(name)
        for name in ("input_ratio", "input_rank")
        if name in options
    }
    try:
        if input_options:
            options["input_grad"] = aop.InputGrad(**input_options)
        config = aop.MemAOP(policy=policy, **options)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None
    return Run(text, config, keywords, other_keywords)


# ---- options


def count(text: str) -> int:
    """A whole number from 1 to a million, for argparse."""
    return _number(int, 1, 10**6, text)


def rate(text: str) -> float:
    """A number from 0 to a thousand, for argparse."""
    return _number(float, 0.0, 1e3, text)


def _number(kind, low, high, text):
    value = kind(text)
    if not low <= value <= high:  # NaN fails too
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
    return value


def make_out_folder(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Makes the folder --out before the training, not after it."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: cannot be made ({error.strerror})")


# ---- tables


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation of the seeds' figures; None for that of a single seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def cell(values: Sequence[float], digits: str = ".4f") -> str:
    """The seeds' figures as mean ± standard deviation."""
    return " ± ".join(f"{figure:{digits}}" for figure in mean_and_sd(values) if figure is not None)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; its first column has names, the others figures."""
    lines = header, ("---", *["---:"] * (len(header) - 1)), *rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
