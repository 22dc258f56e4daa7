"""The data of arXiv 2110.09164: UCI energy efficiency, and MNIST or another set in its format.

Read from files that the user names, or downloaded once, checked and kept.
"""

import csv
import gzip
import hashlib
import math
import pathlib
import zlib
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pooch


class DataError(Exception):
    """Names a file and says why it cannot be used."""


class Data(NamedTuple):
    """A data set, split for training and validation.

    Attributes:
      train_x: `(rows, in_features)`; energy: float32, standardised; images: uint8 pixels.
      train_y: `(rows, 1)` float32 in kWh/m2, or `(rows,)` int32 labels.
      validation_x: inputs like `train_x`.
      validation_y: targets like `train_y`.
    """

    train_x: np.ndarray
    train_y: np.ndarray
    validation_x: np.ndarray
    validation_y: np.ndarray

    def checksum(self) -> str:
        """A short name for the contents."""
        return hashlib.sha256(b"".join(a.tobytes() for a in self)).hexdigest()[:16]


def load(dataset: str, path: pathlib.Path | None, rows: int) -> Data:
    """The data set "energy", or one of `SOURCES`, from this path; None downloads it.

    Raises:
      SystemExit: it cannot be read, or has fewer rows than a batch.
    """
    try:
        data = energy(path) if dataset == "energy" else images(dataset, path)
    except DataError as error:
        raise SystemExit(f"{error}") from None
    if len(data.train_x) < rows:
        raise SystemExit(f"{path or dataset}: has {len(data.train_x)} images; a batch has {rows}")
    return data


def pixels_to_inputs(pixels):
    """From 0 to 255 to inputs from -1 to 1."""
    return (pixels.astype(jnp.float32) / 255 - 0.5) / 0.5


# ---- energy

ENERGY_URL = "https://archive.ics.uci.edu/static/public/242/data.csv"
ENERGY_SHA256 = (
    "3563209cb65c108b72e6ee45f56f12e53c3f346f10b6b30a79ec5b7c0a0a1dd9"  # of its values, rounded
)
ENERGY_ROWS, ENERGY_TRAIN_ROWS = 768, 576
NUMBERS = (  # standardised
    "relative compactness",
    "surface area",
    "wall area",
    "roof area",
    "overall height",
    "glazing area",
)
CATEGORIES = {"orientation": range(2, 6), "glazing area distribution": range(6)}  # one-hot
TARGET = "heating load"
UCI_NAMES = (
    {  # in the order of the file
        name: f"x{i}"
        for i, name in enumerate((*NUMBERS[:5], "orientation", NUMBERS[5], [*CATEGORIES][1]), 1)
    }
    | {TARGET: "y1"}
)


def energy(path: pathlib.Path | None = None) -> Data:
    """UCI energy efficiency (Tsanas and Xifara, 2012): the first 576 rows train, 192 validate.

    Args:
      path: the csv file, with the columns in any order under their names or UCI's X1 to X8 and Y1;
        None downloads it.

    Raises:
      DataError: the file is missing, truncated or another data set, or there is no network.
    """
    columns = _energy_columns(_downloaded_energy() if path is None else path)
    numbers = np.stack([columns[name] for name in NUMBERS], axis=1)
    train = numbers[:ENERGY_TRAIN_ROWS]
    one_hot = [columns[name][:, None] == np.array(values) for name, values in CATEGORIES.items()]
    x = np.concatenate([(numbers - train.mean(0)) / train.std(0), *one_hot], axis=1)
    x, y = x.astype(np.float32), columns[TARGET][:, None].astype(np.float32)
    n = ENERGY_TRAIN_ROWS
    return Data(x[:n], y[:n], x[n:], y[n:])


def _energy_columns(path):
    """The columns of the inputs and the target, `(768,)` float64, by name."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a csv file ({error})") from None
    header = [" ".join(name.lower().replace("_", " ").split()) for name in header]
    columns = {}
    for name, short in UCI_NAMES.items():
        indices = [i for i, column in enumerate(header) if column in (name, short)]
        if len(indices) != 1:
            raise DataError(
                f"{path}: {len(indices) or 'no'} columns are named {name!r} or {short.upper()!r}; "
                f"its header is: {', '.join(header)}"
            )
        columns[name] = np.array(
            [_number(path, row, indices[0], line) for line, row in enumerate(rows, 2)]
        )
    if len(rows) != ENERGY_ROWS:
        raise DataError(
            f"{path}: has {len(rows)} rows of data; the data set has {ENERGY_ROWS}. It is "
            "truncated, or not this data set"
        )
    for name, allowed in CATEGORIES.items():
        wrong = np.flatnonzero(~np.isin(columns[name], allowed))
        if wrong.size:
            raise DataError(
                f"{path}, row {wrong[0] + 2}: {name} is {columns[name][wrong[0]]:g}; it must be a "
                f"whole number from {allowed[0]} to {allowed[-1]}"
            )
    return columns


def _number(path, row, column, line):
    cell = row[column] if column < len(row) else ""
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{path}, row {line}: {cell!r} in column {column + 1} is no number")
    return value


def _downloaded_energy():
    path = _download(ENERGY_URL, None, "energy.csv", "--data energy.csv (the csv file of UCI 242)")
    try:
        columns = _energy_columns(path)
        values = np.stack([columns[name] for name in UCI_NAMES], axis=1)
        if hashlib.sha256(np.round(values, 4).tobytes()).hexdigest() != ENERGY_SHA256:
            raise DataError(f"{path}: its values are not those of the data set (checksum)")
    except DataError:
        path.unlink()  # the next call downloads it anew
        raise
    return path


# ---- images

IMAGES, LABELS = 2051, 2049  # magic numbers: unsigned bytes in three dimensions, and in one
FILES = {
    "train-images-idx3-ubyte": IMAGES,
    "train-labels-idx1-ubyte": LABELS,
    "t10k-images-idx3-ubyte": IMAGES,
    "t10k-labels-idx1-ubyte": LABELS,
}
CLASSES = 10
SOURCES = {  # the address of the files, and their md5 sums (compressed) in the order of FILES
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    "kmnist": (
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        "bdb82020997e1d708af4cf47b453dcf7",
        "e144d726b3acfaa3e44228e80efcd344",
        "5c965bf0a639b31b8f53240b1b52f4d7",
        "7320c461ea6c1c855c0b718fb2a4b134",
    ),
}


def images(dataset: str, folder: pathlib.Path | None = None) -> Data:
    """MNIST, Fashion-MNIST or Kuzushiji-MNIST: 60,000 images to train on, 10,000 to validate.

    Args:
      dataset: a key of `SOURCES`; ignored if a folder is given.
      folder: the folder of the four IDX files, compressed (.gz) or not; None downloads them.

    Raises:
      DataError: a file is missing, truncated or in another format, or there is no network.
    """
    paths = _downloaded_images(dataset) if folder is None else _images_in(folder)
    contents = {path: _idx(path, magic) for path, magic in zip(paths, FILES.values(), strict=True)}
    for pixels, labels in (paths[:2], paths[2:]):
        if len(contents[pixels]) != len(contents[labels]):
            raise DataError(
                f"{labels}: has {len(contents[labels])} labels for the {len(contents[pixels])} "
                f"images in {pixels.name}"
            )
        if contents[labels].max() >= CLASSES:
            raise DataError(
                f"{labels}: has the label {contents[labels].max()}; labels are 0 to {CLASSES - 1}"
            )
    train_x, train_y, validation_x, validation_y = contents.values()
    if train_x.shape[1:] != validation_x.shape[1:]:
        raise DataError(
            f"{paths[2]}: images of {validation_x.shape[1:]} pixels; those of {paths[0].name} have "
            f"{train_x.shape[1:]}"
        )
    return Data(
        train_x.reshape(len(train_x), -1),
        train_y.astype(np.int32),
        validation_x.reshape(len(validation_x), -1),
        validation_y.astype(np.int32),
    )


def _idx(path, magic):
    """The array in an IDX file with this magic number."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}); is it truncated?") from None
    words = 1 + magic % 256  # the header: the magic number, whose last byte counts the dimensions
    if len(content) < 4 * words:
        raise DataError(f"{path}: has {len(content)} bytes, too few for the header of an IDX file")
    first, *shape = map(int, np.frombuffer(content, ">u4", count=words))
    if first != magic:
        kind = "images" if magic == IMAGES else "labels"
        raise DataError(f"{path}: its magic number is {first}; an IDX file of {kind} has {magic}")
    if len(content) != 4 * words + math.prod(shape) or not math.prod(shape):
        raise DataError(
            f"{path}: has {len(content) - 4 * words} bytes of data, but its header says "
            f"{' x '.join(map(str, shape))}; it is truncated or damaged"
        )
    return np.frombuffer(content, np.uint8, offset=4 * words).reshape(shape)


def _images_in(folder):
    paths = []
    for name in FILES:
        candidates = [p for p in (folder / name, folder / f"{name}.gz") if p.is_file()]
        if not candidates:
            raise DataError(
                f"{folder}: has no file {name} or {name}.gz; --data takes a folder with the four "
                f"IDX files {', '.join(FILES)} (or the same with .gz)"
            )
        paths.append(candidates[0])
    return paths


def _downloaded_images(dataset):
    address, *sums = SOURCES[dataset]
    offline = f"--data FOLDER, with {', '.join(f'{name}.gz' for name in FILES)} in it"
    return [
        _download(f"{address}{name}.gz", f"md5:{md5}", f"{dataset}-{name}.gz", offline)
        for name, md5 in zip(FILES, sums, strict=True)
    ]


def _download(url, checksum, name, offline):
    """Downloads the file unless the cache has it; returns its path there."""
    try:
        return pathlib.Path(
            pooch.retrieve(
                url,
                checksum,
                fname=name,
                path=pooch.os_cache("mem_aop_jax"),
                progressbar=True,
            )
        )
    except (OSError, ValueError) as error:  # no network; a wrong checksum
        raise DataError(
            f"{url}: cannot be downloaded ({error}). Without it, give {offline}"
        ) from None
