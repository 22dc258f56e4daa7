"""Images as a task's data: Fashion-MNIST, MNIST or Kuzushiji-MNIST."""

import argparse
import pathlib
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paper_data

from tasks import Task

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")  # of its package dataset-fashion-mnist


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --dataset and --data."""
    parser.add_argument(
        "--dataset", choices=paper_data.SOURCES, default="fashion-mnist", help="(fashion-mnist)"
    )
    parser.add_argument(
        "--data", type=pathlib.Path, metavar="DIR",
        help="the folder with the four IDX files (.gz or not); default: download, or for "
        f"fashion-mnist {DEBIAN}, where there is one",
    )  # fmt: skip


def task(
    options: argparse.Namespace,
    init: Callable[[chex.PRNGKey, chex.Array], chex.ArrayTree],
    apply: Callable[[chex.ArrayTree, chex.Array], chex.Array],
    *,
    rows: int,
    exact: tuple[str, ...],
    validation: tuple[int, int],
    shift: int = 0,
) -> Task:
    """A classifier's task on the images of the options.

    Args:
      options: with `dataset` and `data`.
      init: `init(key, x)` returns the first parameters.
      apply: `apply(params, x)` returns logits, for x `(images, 28, 28, 1)` float32.
      rows: as in `Task`.
      exact: as in `Task`.
      validation: how many batches validate, and images of a batch.
      shift: pixels by which a training image is moved, at most, along each axis, at random.
    """
    folder = options.data
    if folder is None and options.dataset == "fashion-mnist" and DEBIAN.is_dir():
        folder = DEBIAN
    data = paper_data.load(options.dataset, folder, 1)
    if len(data.validation_y) < np.prod(validation):
        raise SystemExit(
            f"{folder or options.dataset}: has {len(data.validation_y)} images to validate; "
            f"{np.prod(validation)} are wanted"
        )
    some = np.random.default_rng(0).permutation(len(data.validation_y))[: np.prod(validation)]
    held_out = data.validation_x[some], data.validation_y[some]

    def logits(params, pixels):
        x = paper_data.pixels_to_inputs(pixels).reshape(len(pixels), 28, 28, 1)
        return apply(params, x)

    def loss(params, examples):
        pixels, labels = examples
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(params, pixels), labels
        ).mean()

    def draw(train, key):
        index = jax.random.randint(key, (), 0, len(train[1]))
        pixels, label = jax.tree.map(lambda a: a[index], train)
        if shift:
            padded = jnp.pad(pixels.reshape(28, 28), shift)
            corner = jax.random.randint(jax.random.fold_in(key, 1), (2,), 0, 2 * shift + 1)
            pixels = jax.lax.dynamic_slice(padded, corner, (28, 28)).reshape(pixels.shape)
        return pixels, label

    return Task(
        data=f"{options.dataset}, moved by up to {shift} pixels" if shift else options.dataset,
        checksum=data.checksum(),
        init=lambda key: init(key, jnp.zeros((1, 28, 28, 1))),
        loss=loss,
        train=(jnp.asarray(data.train_x), jnp.asarray(data.train_y)),
        draw=draw,
        validation=jax.tree.map(
            lambda a: jnp.asarray(a).reshape(*validation, *a.shape[1:]), held_out
        ),
        rows=rows,
        exact=exact,
    )
