"""A vision transformer in stock Flax Linen, on images of 28 x 28 pixels."""

import argparse

import flax.linen as nn
from paper_data import CLASSES

from tasks import Task, images

OPTIONS = {
    "width": (512, "of the model"),
    "layers": (1, "blocks"),
    "heads": (8, "of the attention"),
    "batch": (32, "images of a step, of the reference"),
    "steps": (60, "of the reference"),
}
LEARNING_RATE = 5e-4
PRESETS = {"short": {}, "long": {"steps": 180}}
PATCH, PATCHES = 4, 7  # pixels and patches of a side
add_arguments = images.add_arguments


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(y)


class ViT(nn.Module):
    width: int
    layers: int
    heads: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (PATCH, PATCH), (PATCH, PATCH), "VALID", name="patches")(x)
        x = x.reshape(len(x), -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(self.layers):
            x = Block(self.heads)(x)
        return nn.Dense(CLASSES, name="head")(nn.LayerNorm()(x).mean(axis=1))


def load(options: argparse.Namespace) -> Task:
    """The task of these options."""
    model = ViT(options.width, options.layers, options.heads)
    return images.task(
        options,
        lambda key, x: model.init(key, x)["params"],
        lambda params, x: model.apply({"params": params}, x),
        rows=PATCHES**2,
        exact=("head/kernel",),
        validation=(6, 100),
    )
