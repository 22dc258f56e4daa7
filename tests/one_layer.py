"""What the tests of single layers share: one shape, batches, oracles and compiled gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import mem_aop_jax as aop

M, N, P = 48, 12, 8


def normal(*shape, seed=0, mean=0.0, dtype="float32"):
    return jnp.asarray(mean + np.random.default_rng(seed).normal(size=shape), dtype)


def rows_near_a_subspace(rows, features, rank, noise, seed):
    rng = np.random.default_rng(seed)
    exact = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, features))
    return jnp.asarray(exact + noise * rng.normal(size=(rows, features)), jnp.float32)


def exact_gradient(x, g):
    """X^T G in float64."""
    return np.asarray(x, np.float64).T @ np.asarray(g, np.float64)


@functools.partial(jax.jit, static_argnums=0)
def gradients(config, x, kernel, memory, g, key=None):
    """dX, dW and the next memory of a layer whose output has the cotangents g."""
    layer = functools.partial(aop.dense, config=config, key=key)
    return jax.vjp(layer, x, kernel, memory)[1](g)


@functools.partial(jax.jit, static_argnums=0)
def weight_gradient(config, x, g, memory, key):
    """dW and the next memory of a layer whose output has the cotangents g."""

    def loss_fn(kernel, memory):
        y = aop.dense(x, kernel, memory, config=config, key=key)
        return jnp.sum(y.astype(jnp.float32) * g.astype(jnp.float32))

    kernel = jnp.zeros((x.shape[-1], g.shape[-1]), x.dtype)
    return jax.grad(loss_fn, argnums=(0, 1))(kernel, memory)


def stepped(config, x, g, steps=3, memory=None):
    """The memory after some steps with one batch, from the first memory unless one is given."""
    if memory is None:
        memory = aop.init_memory(config, len(x), x.shape[1], g.shape[1], x.dtype)
    for key in jax.random.split(jax.random.key(9), steps):
        _, memory = weight_gradient(config, x, g, memory, key)
    return memory


def assert_unbiased(sums, exact):
    """The mean of the draws is the exact gradient, and they are no exact gradients."""
    sums, exact = np.asarray(sums), np.asarray(exact, np.float64)
    mean = sums.mean(axis=0, dtype=np.float64)
    variance = np.square(sums - mean.astype(sums.dtype)).mean(axis=0, dtype=np.float64)
    off, error = np.abs(mean - exact), (variance / len(sums)) ** 0.5
    assert np.linalg.norm(off) <= 4 * np.linalg.norm(error)
    worst = 5 if exact.size < 100 else 5.5  # of so many entries
    assert (off <= worst * error + 1e-5 * np.abs(exact).max()).all()
    assert error.max() > 1e-6 * np.abs(exact).max()
