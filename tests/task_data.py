"""Files of data for the tasks of examples/compare.py."""

import numpy as np


def write_text(path, characters=20_000):
    """A random sequence of a few words."""
    words = np.array(["def", "return", "self", "lambda", "yield", "import", "naïve", "class"])
    drawn = np.random.default_rng(0).choice(words, characters // 5)
    path.write_text(" ".join(drawn)[:characters], encoding="utf-8")
    return path


def write_images(folder):
    """Images of 28 x 28 pixels whose class is where they are bright, in the format of MNIST."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 50), ("t10k", 5000)):
        labels = rng.integers(0, 10, count)
        pixels = rng.integers(0, 50, (count, 28, 28)) + 200 * (
            np.arange(28)[:, None] // 3 == labels[:, None, None]
        )
        for kind, magic, array in (("images-idx3", 2051, pixels), ("labels-idx1", 2049, labels)):
            header = np.array([magic, *array.shape], ">u4").tobytes()
            path = folder / f"{name}-{kind}-ubyte"
            path.write_bytes(header + array.astype(np.uint8).tobytes())
