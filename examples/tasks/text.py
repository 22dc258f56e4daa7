"""A text as a task's data: windows of characters, whose next characters a model predicts."""

import argparse
import math
import os
import pathlib
import sysconfig
import zlib
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tasks import Task

CHARACTERS = "\t\n" + "".join(map(chr, range(32, 127)))
UNKNOWN = len(CHARACTERS)  # the token of all other characters
VOCABULARY = UNKNOWN + 1
TEXT_LIMIT = 20_000_000  # characters
VALIDATION_SHARE = 0.05  # of the text, at its end
VALIDATION_SHAPE = (8, 16)  # batches, windows of a batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --text."""
    parser.add_argument(
        "--text", type=pathlib.Path, metavar="FILE",
        help=f"instead of Python's standard library; its first {TEXT_LIMIT:,} characters",
    )  # fmt: skip


def task(
    options: argparse.Namespace,
    init: Callable[[chex.PRNGKey, chex.Array], chex.ArrayTree],
    apply: Callable[[chex.ArrayTree, chex.Array], chex.Array],
    *,
    exact: tuple[str, ...],
) -> Task:
    """A character model's task on the text of the options.

    Args:
      options: with `text` and `sequence`, the characters of a window.
      init: `init(key, tokens)` returns the first parameters.
      apply: `apply(params, tokens)` returns logits, for tokens `(windows, sequence)` int32.
      exact: as in `Task`.
    """
    name, tokens = load(options.text)
    window = options.sequence + 1
    split = len(tokens) - int(VALIDATION_SHARE * len(tokens))
    train, validation = tokens[:split], tokens[split:]
    if len(validation) < window:
        raise SystemExit(
            f"{name}: has {len(tokens)} characters; with --sequence {options.sequence} at least "
            f"{math.ceil(window / VALIDATION_SHARE)} are wanted. Give a longer --text FILE"
        )
    batches, windows = VALIDATION_SHAPE
    starts = np.linspace(0, len(validation) - window, batches * windows).astype(int)
    validation = validation[starts[:, None] + np.arange(window)].reshape(batches, windows, window)
    example = jnp.zeros((1, options.sequence), jnp.int32)

    def draw(tokens, key):
        start = jax.random.randint(key, (), 0, len(tokens) - options.sequence)
        return jax.lax.dynamic_slice_in_dim(tokens, start, window).astype(jnp.int32)

    return Task(
        data=name,
        checksum=zlib.crc32(tokens),
        init=lambda key: init(key, example),
        loss=lambda params, windows: next_token_loss(apply, params, windows),
        train=jnp.asarray(train),
        draw=draw,
        validation=jnp.asarray(validation, jnp.int32),
        rows=options.sequence,
        exact=exact,
    )


def next_token_loss(apply: Callable, params: chex.ArrayTree, windows: chex.Array) -> chex.Array:
    """The mean cross-entropy of the characters of windows `(windows, sequence + 1)` int32."""
    logits = apply(params, windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def load(path: pathlib.Path | None) -> tuple[str, np.ndarray]:
    """Name and tokens of this text; None is Python's own standard library."""
    try:
        text = path.read_text(encoding="utf-8", errors="ignore") if path else standard_library()
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror})") from None
    return path.name if path else "standard library", encode(text[:TEXT_LIMIT])


def standard_library(folder: str | None = None) -> str:
    """Python's own sources, without tests and installed packages."""
    folder = folder or sysconfig.get_paths()["stdlib"]
    paths = []
    for here, folders, files in os.walk(folder):
        folders[:] = set(folders) - {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        paths += [pathlib.Path(here, name) for name in files if name.endswith(".py")]
    return "".join(path.read_text(encoding="utf-8", errors="ignore") for path in sorted(paths))


def encode(text: str) -> np.ndarray:
    """A token for each character, uint8: one for each printable character of ASCII."""
    table = np.full(129, UNKNOWN, np.uint8)
    table[[ord(character) for character in CHARACTERS]] = np.arange(len(CHARACTERS))
    codes = np.frombuffer(text.encode("utf-32-le", errors="replace"), "<u4")
    return table[np.minimum(codes, 128)]
