"""Files of data for the examples: texts, and images in the format of MNIST."""

import numpy as np
import paper_data


def write_text(path, characters=20_000):
    """A random sequence of a few words."""
    words = np.array(["def", "return", "self", "lambda", "yield", "import", "naïve", "class"])
    drawn = np.random.default_rng(0).choice(words, characters // 5)
    path.write_text(" ".join(drawn)[:characters], encoding="utf-8")
    return path


def idx(array, magic):
    """The contents of an IDX file."""
    header = np.array([magic, *array.shape], ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def write_images(folder):
    """Images of 28 x 28 pixels whose class is where they are bright, in the format of MNIST."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 50), ("t10k", 5000)):
        labels = rng.integers(0, 10, count)
        pixels = rng.integers(0, 50, (count, 28, 28)) + 200 * (
            np.arange(28)[:, None] // 3 == labels[:, None, None]
        )
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx(pixels, paper_data.IMAGES))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx(labels, paper_data.LABELS))
