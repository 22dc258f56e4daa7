"""What the tests of single layers share."""

import functools

import jax
import jax.numpy as jnp

import mem_aop_jax as aop


@functools.partial(jax.jit, static_argnums=0)
def weight_gradient(config, x, g, memory, key):
    """dW and the next memory of a layer whose output has the cotangents g."""

    def loss_fn(kernel, memory):
        y = aop.dense(x, kernel, memory, config=config, key=key)
        return jnp.sum(y.astype(jnp.float32) * g.astype(jnp.float32))

    kernel = jnp.zeros((x.shape[-1], g.shape[-1]), x.dtype)
    return jax.grad(loss_fn, argnums=(0, 1))(kernel, memory)
