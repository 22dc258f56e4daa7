"""The language model of the examples, trained exactly, for the slow tests that measure on it."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import language_model
import language_text
import language_training
import optax
from tqdm import tqdm

import mem_aop_jax as aop


def linen_loss(model, variables, windows, key=None):
    """The loss in the form that `aop.allocate` and `aop.Controller` take with a Linen model."""
    rngs = {} if key is None else {aop.linen.RNG: key}
    logits = model.apply(variables, windows[:, :-1], rngs=rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


@functools.cache
def after(steps):
    """At its default sizes: its trainer, the parameters, windows of a batch by their number."""
    with tempfile.TemporaryDirectory() as out:
        arguments = ["--run", "exact", "--steps", str(steps), "--out", out]
        options = language_model.parse_arguments(arguments)
    trainer = language_training.Trainer(options.run[0], steps, options)
    text = language_text.load(options)
    tokens = jnp.asarray(text.train)
    params = trainer.train(0, tokens, jnp.asarray(text.validation), tqdm(disable=True)).params
    key = jax.random.key(5)
    return trainer, params, jax.jit(lambda i: trainer.windows(tokens, key, i))
