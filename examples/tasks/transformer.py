"""A character transformer in stock Flax Linen."""

import argparse
import functools
from typing import Any

import flax.linen as nn
import jax

from tasks import Task, text

OPTIONS = {
    "width": (192, "of the model"),
    "layers": (3, "blocks"),
    "heads": (6, "of the attention"),
    "sequence": (128, "characters of a window"),
    "batch": (16, "windows of a step, of the reference"),
    "steps": (250, "of the reference"),
}
LEARNING_RATE = 1e-3
PRESETS = {
    # All default runs in some five minutes on two cores.
    "small": {"width": 128, "layers": 2, "heads": 4, "sequence": 64, "batch": 16, "steps": 250},
    "short": {
        "width": 768, "heads": 12, "layers": 1, "batch": 16, "steps": 300, "learning_rate": 5e-4
    },
    "long": {
        "width": 768, "heads": 12, "layers": 1, "batch": 16, "steps": 1500, "learning_rate": 5e-4
    },
}  # fmt: skip
add_arguments = text.add_arguments


class Block(nn.Module):
    heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        width, dense = x.shape[-1], functools.partial(nn.Dense, dtype=self.dtype)
        norm = functools.partial(nn.LayerNorm, dtype=self.dtype)
        qkv = dense(3 * width, name="qkv")(norm()(x))
        qkv = qkv.reshape(*x.shape[:-1], 3, self.heads, width // self.heads)
        query, key, value = (qkv[..., i, :, :] for i in range(3))
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + dense(width, name="out")(y.reshape(x.shape))
        y = nn.gelu(dense(4 * width, name="up")(norm()(x)))
        return x + dense(width, name="down")(y)


class Transformer(nn.Module):
    width: int
    layers: int
    heads: int
    dtype: Any = None  # of the activations; None: float32

    @nn.compact
    def __call__(self, tokens):
        shape = tokens.shape[-1], self.width
        positions = self.param("positions", nn.initializers.normal(0.02), shape)
        x = nn.Embed(text.VOCABULARY, self.width, name="embedding")(tokens) + positions
        x = x.astype(self.dtype or x.dtype)
        for i in range(self.layers):
            x = Block(self.heads, self.dtype, name=f"block_{i}")(x)
        return nn.Dense(text.VOCABULARY, name="head")(nn.LayerNorm()(x))


def logits(model: nn.Module, params: Any, tokens: jax.Array) -> jax.Array:
    """Of the next character after each of `tokens`, `(windows, sequence)` int32."""
    return model.apply({"params": params}, tokens)


def load(options: argparse.Namespace) -> Task:
    """The task of these options."""
    model = Transformer(options.width, options.layers, options.heads)
    return text.task(
        options,
        lambda key, tokens: model.init(key, tokens)["params"],
        functools.partial(logits, model),
        exact=("head/kernel",),
    )
