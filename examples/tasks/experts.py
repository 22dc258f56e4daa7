"""A character transformer with a mixture of experts in each block, in stock Flax NNX.

A router sends each character to two of the experts, each of which takes at most so many characters
of a window (after Shazeer et al. 2017 and Riquelme et al. 2021).
"""

import argparse

import jax
import jax.numpy as jnp
from flax import nnx

from tasks import Task, text

OPTIONS = {
    "width": (512, "of the model"),
    "layers": (1, "blocks"),
    "heads": (8, "of the attention"),
    "experts": (4, "of each block"),
    "sequence": (128, "characters of a window"),
    "batch": (8, "windows of a step, of the reference"),
    "steps": (40, "of the reference"),
}
LEARNING_RATE = 5e-4
PRESETS = {"short": {}, "long": {"steps": 120}}
add_arguments = text.add_arguments
CHOSEN, CAPACITY = 2, 1.25  # experts of a character; how many times an equal share each can take


class Experts(nnx.Module):
    def __init__(self, width, experts, *, rngs):
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.router = nnx.Linear(width, experts, use_bias=False, rngs=rngs)
        self.up = nnx.Param(init(rngs.params(), (experts, width, 4 * width)))
        self.down = nnx.Param(init(rngs.params(), (experts, 4 * width, width)))

    def __call__(self, x):
        *_, length, experts = (gates := jax.nn.softmax(self.router(x))).shape
        capacity = int(CAPACITY * CHOSEN * length / experts)
        weights, chosen = jax.lax.top_k(gates, CHOSEN)
        chosen = jax.nn.one_hot(chosen, experts, dtype=jnp.int32)
        queue = chosen.reshape(len(x), length * CHOSEN, experts)  # earlier characters come first
        place = ((jnp.cumsum(queue, axis=1) - 1) * queue).sum(-1).reshape(len(x), length, CHOSEN)
        place = jax.nn.one_hot(place, capacity, dtype=x.dtype)
        sent = chosen[..., None] * place[..., None, :]  # (windows, length, CHOSEN, experts, places)
        y = jnp.einsum("bskec,bsd->ebcd", sent, x)
        y = nnx.gelu(jnp.einsum("ebcd,edf->ebcf", y, self.up[...]))
        y = jnp.einsum("ebcf,efd->ebcd", y, self.down[...])
        return jnp.einsum("bskec,bsk,ebcd->bsd", sent, weights, y)


class Block(nnx.Module):
    def __init__(self, width, heads, experts, *, rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.experts = Experts(width, experts, rngs=rngs)

    def __call__(self, x):
        causal = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attention(self.norms[0](x), mask=causal)
        return x + self.experts(self.norms[1](x))


class Model(nnx.Module):
    def __init__(self, width, layers, heads, experts, sequence, *, rngs):
        self.embedding = nnx.Embed(text.VOCABULARY, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * rngs.params.normal((sequence, width)))
        self.blocks = nnx.List([Block(width, heads, experts, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, text.VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def load(options: argparse.Namespace) -> Task:
    """The task of these options."""
    names = "width", "layers", "heads", "experts", "sequence"
    sizes = [getattr(options, name) for name in names]
    structure = nnx.split(nnx.eval_shape(lambda: Model(*sizes, rngs=nnx.Rngs(0))))[0]
    return text.task(
        options,
        lambda key, _: nnx.state(Model(*sizes, rngs=nnx.Rngs(key))),
        lambda params, tokens: nnx.merge(structure, params)(tokens),
        exact=("head/kernel", "blocks/.*/router/kernel"),
    )
