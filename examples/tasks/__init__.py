"""What compare.py trains, a module for each task: a model as anybody writes it, data and a loss.

A module has `OPTIONS`, counts with their defaults and meanings; `LEARNING_RATE`; `PRESETS`, for
instance short and long ones; `add_arguments(parser)` for what else it takes; `load(options)`, which
returns a `Task`.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex


class Task(NamedTuple):
    """A model, its data and its loss.

    Attributes:
      data: the name of the data.
      checksum: of the data.
      init: `init(key)` returns the first parameters.
      loss: `loss(params, examples)`, the mean over a batch of examples.
      train: arrays to draw from.
      draw: `draw(train, key)` returns a random example: a pytree of arrays.
      validation: examples like a batch, with a leading axis for the batches.
      rows: of an example in most layers.
      exact: regular expressions for parameters whose gradients are exact in every run.
    """

    data: str
    checksum: int | str
    init: Callable[[chex.PRNGKey], chex.ArrayTree]
    loss: Callable[[chex.ArrayTree, chex.ArrayTree], chex.Array]
    train: chex.ArrayTree
    draw: Callable[[chex.ArrayTree, chex.PRNGKey], chex.ArrayTree]
    validation: chex.ArrayTree
    rows: int
    exact: tuple[str, ...]
