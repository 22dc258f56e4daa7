"""The language model of the examples, trained exactly, for the slow tests that measure on it."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import language_model
import language_text
import language_training
from tqdm import tqdm


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
