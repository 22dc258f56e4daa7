"""The language model of the examples, trained exactly, for the slow tests that measure on it."""

import functools
import tempfile

import compare
import jax
import optax
from tasks.transformer import Transformer
from tqdm import tqdm

import mem_aop_jax as aop


def linen_loss(model, variables, windows, key=None):
    """The loss in the form that `aop.allocate` and `aop.Controller` take with a Linen model."""
    rngs = {} if key is None else {aop.linen.RNG: key}
    logits = model.apply(variables, windows[:, :-1], rngs=rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


MODEL = Transformer(width=192, layers=3, heads=6)  # the task's default


@functools.cache
def after(steps):
    """At its default sizes: its trainer, the parameters, windows of a batch by their number."""
    with tempfile.TemporaryDirectory() as out:
        arguments = ["transformer", "--steps", str(steps), "--batches", "1", "--out", out]
        comparison = compare.parse_arguments(arguments)
    trainer = comparison.trainer(comparison.options.run[0])
    params = trainer.train(0, tqdm(disable=True)).params
    key, tokens = jax.random.key(5), comparison.task.train
    return trainer, params, lambda i: trainer.draw(tokens, key, i)
