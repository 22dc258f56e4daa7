"""Small models, their data and their gradients, for the tests of `allocate` and `Controller`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mem_aop_jax as aop

ROWS, FEATURES, CLASSES = 256, 48, 8
KEY = jax.random.key(0)
COLLECTION, RNG = aop.linen.COLLECTION, aop.linen.RNG


class MLP(nn.Module):
    """The widths differ, and so do the layers' spectra."""

    widths: tuple[int, ...] = (96, 128, 64)
    outputs: int = CLASSES

    @nn.compact
    def __call__(self, x):
        for features in self.widths:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(self.outputs)(x)


SMALL = MLP((96,), 16)  # so many that a rank is left, the same for both gradients


class Scanned(nn.Module):
    """Two layers of a stack, which share a rule, and two calls of one layer."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.tanh(nn.Dense(FEATURES)(x)), None

        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scan(name="stack")(x, None)
        twice = nn.Dense(FEATURES, name="twice")
        return nn.Dense(CLASSES, name="head")(nn.tanh(twice(nn.tanh(twice(x)))))


def batch_of(i, rows=ROWS):
    """Features have a mean and a spectrum; labels are noisy, so that every row has a gradient."""
    rng = np.random.default_rng(i)
    inputs = 0.5 + rng.normal(size=(rows, FEATURES)) * np.linspace(2, 0.2, FEATURES)
    logits = inputs @ np.random.default_rng(99).normal(size=(FEATURES, CLASSES)) / 4
    labels = np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)
    return np.asarray(inputs, np.float32), labels


EXAMPLE = jax.ShapeDtypeStruct((ROWS, FEATURES), jnp.float32)


def loss(model, variables, batch, key):
    inputs, labels = batch
    logits = model.apply(variables, inputs, rngs={RNG: key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def initial(model, example=EXAMPLE):
    """Parameters, and a memory of random directions where the model is wrapped."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, KEY, example)

    def array(shape):
        values = rng.normal(size=shape.shape) if len(shape.shape) > 1 else np.zeros(shape.shape)
        return values.astype(shape.dtype)

    memory = jax.tree.map(array, shapes.get(COLLECTION, {}))
    directions = jax.tree.map(lambda a: np.linalg.qr(a)[0] if a.ndim > 1 else a, memory)
    params = jax.tree.map(array, shapes["params"])
    return jax.tree.map(lambda a: a / a.shape[-2] ** 0.5 if a.ndim > 1 else a, params), directions


@functools.cache
def gradient_function(loss):
    """Gradients of the parameters and of the memory.

    With the library's name and arguments, so that the compilation cache knows the programs.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(model, params, memory, batch, key):
        def variables_loss(params, memory):
            return loss(model, {"params": params, COLLECTION: memory}, batch, key)

        return jax.grad(variables_loss, argnums=(0, 1), allow_int=True)(params, memory)

    return gradients


@functools.cache
def trained(model):
    """Parameters after a few steps of Adam, while gradients still stand out of the noise."""
    steps = 10 if model == SMALL else 60
    tx = optax.adam(3e-3)
    params = jax.jit(model.init)(KEY, batch_of(0)[0])["params"]
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, batch):
        grad = jax.grad(lambda params: loss(model, {"params": params}, batch, KEY))(params)
        updates, state = tx.update(grad, state)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, batch_of(i))
    return params
