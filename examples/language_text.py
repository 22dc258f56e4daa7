"""The text of language_model.py, as tokens: one for each printable character of ASCII."""

import argparse
import math
import os
import pathlib
import sysconfig
import zlib
from typing import NamedTuple

import numpy as np

CHARACTERS = "\t\n" + "".join(map(chr, range(32, 127)))
UNKNOWN = len(CHARACTERS)  # the token of all other characters
VOCABULARY = UNKNOWN + 1
TEXT_LIMIT = 20_000_000  # characters
VALIDATION_SHARE = 0.05  # of the text, at its end
VALIDATION_SHAPE = (8, 16)  # batches, windows of a batch


class Text(NamedTuple):
    """A text as tokens.

    Attributes:
      name: of its file, or "standard library".
      train: `(characters,)` uint8.
      validation: `(batches, windows, sequence + 1)` uint8.
      checksum: of all tokens.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    checksum: int


def standard_library(folder: pathlib.Path) -> str:
    """Python's own sources, without tests and installed packages."""
    paths = []
    for here, folders, files in os.walk(folder):
        folders[:] = set(folders) - {"test", "tests", "idle_test", "site-packages", "dist-packages"}
        paths += [pathlib.Path(here, name) for name in files if name.endswith(".py")]
    return "".join(path.read_text(encoding="utf-8", errors="ignore") for path in sorted(paths))


def encode(text: str) -> np.ndarray:
    """A token for each character, uint8."""
    table = np.full(129, UNKNOWN, np.uint8)
    table[[ord(character) for character in CHARACTERS]] = np.arange(len(CHARACTERS))
    codes = np.frombuffer(text.encode("utf-32-le", errors="replace"), "<u4")
    return table[np.minimum(codes, 128)]


def load(options: argparse.Namespace) -> Text:
    """The text of --text, or of the standard library, split for training and validation."""
    path = options.text or pathlib.Path(sysconfig.get_paths()["stdlib"])
    try:
        if options.text:
            text = path.read_text(encoding="utf-8", errors="ignore")
        else:
            text = standard_library(path)
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror})") from None
    tokens = encode(text[:TEXT_LIMIT])
    window = options.sequence + 1
    split = len(tokens) - int(VALIDATION_SHARE * len(tokens))
    train, validation = tokens[:split], tokens[split:]
    if len(validation) < window:
        raise SystemExit(
            f"{path}: has {len(tokens)} characters; with --sequence {options.sequence} at least "
            f"{math.ceil(window / VALIDATION_SHARE)} are wanted. Give a longer --text FILE"
        )
    batches, windows = VALIDATION_SHAPE
    starts = np.linspace(0, len(validation) - window, batches * windows).astype(int)
    return Text(
        options.text.name if options.text else "standard library",
        train,
        validation[starts[:, None] + np.arange(window)].reshape(batches, windows, window),
        zlib.crc32(tokens),
    )
