"""What the examples share: how a command line spells runs and options, results, and tables."""

import argparse
import contextlib
import fractions
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

import mem_aop_jax as aop


@contextlib.contextmanager
def needs_packages() -> Iterator[None]:
    """Says how to install the examples' packages where one cannot be imported."""
    try:
        yield
    except ImportError as error:
        raise SystemExit(
            f"{error}. Install the examples' packages: pip install '.[examples]'"
        ) from None


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


def parse(
    text: str,
    others: Sequence[str] = (),
    without: Sequence[str] = ("exact",),
    policies: Mapping[str, str | Callable] = MappingProxyType({}),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """The run that `POLICY:NAME=VALUE,...` spells, for argparse.

    Args:
      text: a policy and keywords of aop.MemAOP.
      others: names of keywords that aop.MemAOP does not have.
      without: words that stand in a policy's place and have no configuration.
      policies: by name, those that the library does not have.
      defaults: keywords of aop.MemAOP that the text may leave out.

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
    options = {**defaults, **keywords}
    input_options = {
        name.removeprefix("input_"): options.pop(name)
        for name in ("input_ratio", "input_rank")
        if name in options
    }
    try:
        if input_options:
            options["input_grad"] = aop.InputGrad(**input_options)
        config = aop.MemAOP(policy=policies.get(policy, policy), **options)
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


def share(text: str) -> float:
    """A number in (0, 1], or a fraction like 1/4, for argparse."""
    kind = fractions.Fraction if "/" in text else float
    return _number(lambda text: float(kind(text)), 1e-9, 1.0, text)


def _number(kind, low, high, text):
    value = kind(text)
    if not low <= value <= high:  # NaN fails too
        raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
    return value


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows the description as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_counts(parser: argparse.ArgumentParser, options: Mapping[str, tuple[int, str]]) -> None:
    """Adds options that are counts; each has a default and a meaning."""
    for name, (default, meaning) in options.items():
        help_text = f"{meaning} ({default})"
        parser.add_argument(f"--{name}", type=count, default=default, help=help_text)


def add_out_folder(parser: argparse.ArgumentParser, default: str, contents: str) -> None:
    """Adds --out, the folder for these contents."""
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path(default), metavar="DIR",
        help=f"folder for {contents} ({default})",
    )  # fmt: skip


def make_out_folder(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Makes the folder --out before the training, not after it."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: cannot be made ({error.strerror})")


# ---- results


class Results:
    """The entries of a data set in `results.json` by name; the file is written after each."""

    def __init__(self, path: pathlib.Path, dataset: str):
        self.path = path
        try:
            self.all = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise SystemExit(
                f"{path}: is no JSON ({error}). Name another folder with --out"
            ) from None
        self.configurations = self.all.setdefault(dataset, {})

    def has(self, name: str, wanted: dict) -> bool:
        """Whether there is an entry of this name.

        Raises:
          SystemExit: there is one, but with other settings than the wanted ones.
        """
        done = self.configurations.get(name)
        if done is None:
            return False
        different = {key: done.get(key) for key in wanted if done.get(key) != wanted[key]}
        if different:
            raise SystemExit(
                f"{self.path}: {name} was run with {different}, now asked for with "
                f"{ {key: wanted[key] for key in different} }. Name another folder with --out, or "
                "delete the file"
            )
        return True

    def entry(self, name: str, settings: dict, lists: Sequence[str]) -> dict:
        """The entry if it `has` one, or a new one with these lists for the figures of seeds."""
        new = settings | {figures: [] for figures in lists}
        return self.configurations[name] if self.has(name, settings) else new

    def add(self, name: str, entry: dict) -> None:
        self.configurations[name] = entry
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.all, indent=1))
        new.replace(self.path)  # whole or not at all


# ---- reports


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


def write_report(text: str, path: pathlib.Path, figures: Mapping[pathlib.Path, Any]) -> str:
    """Writes the text and figures of matplotlib to files; returns the text and their paths."""
    path.write_text(f"{text}\n")
    for figure_path, figure in figures.items():
        figure.savefig(figure_path, dpi=120)
    return "\n".join([text, "", *map(str, (path, *figures))])
