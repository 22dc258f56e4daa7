"""A deep MLP in stock Flax Linen, on images of 28 x 28 pixels."""

import argparse

import flax.linen as nn
from paper_data import CLASSES

from tasks import Task, images

OPTIONS = {
    "width": (512, "of the hidden layers"),
    "layers": (4, "hidden layers"),
    "batch": (512, "images of a step, of the reference"),
    "steps": (600, "of the reference"),
}
LEARNING_RATE = 5e-4
PRESETS = {"short": {}, "long": {"steps": 1200}}
add_arguments = images.add_arguments


class MLP(nn.Module):
    width: int
    layers: int

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(CLASSES, name="head")(x)


def load(options: argparse.Namespace) -> Task:
    """The task of these options."""
    model = MLP(options.width, options.layers)
    return images.task(
        options,
        lambda key, x: model.init(key, x)["params"],
        lambda params, x: model.apply({"params": params}, x),
        rows=1,
        exact=("head/kernel",),
        validation=(5, 1000),
        shift=2,  # without it, long runs learn the images by heart
    )
