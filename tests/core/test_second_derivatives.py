"""Derivatives of gradients: exact through dX, the estimate's own through dW, or an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import normal

import mem_aop_jax as aop

M, N, P = 16, 4, 3
ALL_ROWS = {
    "no memory": aop.MemAOP(ratio=1, memory=None),
    "groups": aop.MemAOP(ratio=1, policy="crs", groups=2),
    "subspace": aop.MemAOP(ratio=1, policy="priority", memory="subspace", rank=(2, 1)),
}
ROWS = aop.MemAOP(ratio=1)
INPUTS = aop.MemAOP(ratio=1, policy="priority", input_grad=aop.InputGrad(ratio=0.5, rank=0))


def layer(config, key=None):
    memory = aop.init_memory(config, M, N, P)
    key = jax.random.key(0) if key is None else key
    return lambda x, kernel: aop.dense(x, kernel, memory, config=config, key=key)


def objective(layer):
    return lambda x, kernel: jnp.sum(jnp.tanh(layer(x, kernel)))


def gradient_penalty(layer):
    """Of the kernel, through the gradient of the inputs."""
    of_inputs = jax.grad(objective(layer))
    return jax.grad(lambda x, kernel: jnp.sum(of_inputs(x, kernel) ** 2), argnums=1)


def hessian(layer):
    return jax.jacrev(jax.grad(objective(layer), argnums=1), argnums=1)


def of_inputs_through_the_kernels_gradient(layer):
    of_kernel = jax.grad(objective(layer), argnums=1)
    return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(of_kernel(x, kernel))))


def after_an_inner_step(layer):
    """As MAML differentiates."""
    of_kernel, loss = jax.grad(objective(layer), argnums=1), objective(layer)
    return jax.grad(lambda x, kernel: loss(x, kernel - 0.1 * of_kernel(x, kernel)), argnums=1)


def third(layer):
    return jax.jacrev(lambda x, kernel: jnp.sum(hessian(layer)(x, kernel) ** 2), argnums=1)


DERIVATIVES = [
    gradient_penalty,
    hessian,
    of_inputs_through_the_kernels_gradient,
    after_an_inner_step,
    third,
]
X, KERNEL = normal(M, N), normal(N, P, seed=1)


def exact(x, kernel):
    return x @ kernel


@pytest.mark.parametrize("derivative", DERIVATIVES, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "name",
    ["subspace", *(pytest.param(n, marks=pytest.mark.slow) for n in ("no memory", "groups"))],
)
def test_at_k_equal_to_rows_they_are_exact(name, derivative):
    ours = jax.jit(derivative(layer(ALL_ROWS[name])))(X, KERNEL)
    np.testing.assert_allclose(ours, derivative(exact)(X, KERNEL), rtol=1e-4, atol=1e-4)


def test_jit_remat_and_scan_between_the_derivatives():
    ours = layer(ALL_ROWS["subspace"])
    wanted = gradient_penalty(exact)(X, KERNEL), hessian(exact)(X, KERNEL)

    def in_scan(x, kernel):
        return jax.lax.scan(lambda _, x: (None, ours(x, kernel)), None, x[None])[1][0]

    for around in (jax.jit(ours), jax.checkpoint(ours), in_scan):
        for got, value in zip(
            (gradient_penalty(around)(X, KERNEL), hessian(around)(X, KERNEL)), wanted, strict=True
        ):
            np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        aop.MemAOP(ratio=0.25, policy="priority"),
        aop.MemAOP(ratio=0.25, policy="crs"),
        aop.MemAOP(ratio=0.25, policy="priority", memory="subspace", rank=1),
    ],
    ids=["priority", "crs", "subspace"],
)
def test_the_estimates_own_derivative_is_unbiased(config):
    draws = 2000

    @jax.jit
    @jax.vmap
    def draw(key):
        return hessian(layer(config, key))(X, KERNEL)

    drawn = draw(jax.random.split(jax.random.key(1), draws))
    wanted = hessian(exact)(X, KERNEL)
    error = drawn.std(axis=0) / draws**0.5
    assert error.max() > 0.01  # they are no exact ones
    assert (jnp.abs(drawn.mean(axis=0) - wanted) < 4.5 * error + 1e-4).all()


def test_a_laplacian_of_the_inputs_needs_neither_memory_nor_key():
    def laplacian(layer):
        energy = lambda x: jnp.sum(jnp.tanh(layer(x[None], KERNEL)))  # noqa: E731
        return jnp.trace(jax.hessian(energy)(X[0]))

    config = aop.MemAOP(ratio=0.25, policy="weightedk")
    ours = laplacian(lambda x, kernel: aop.dense(x, kernel, config=config))
    np.testing.assert_allclose(ours, laplacian(exact), rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "derivative"),
    [(ROWS, hessian), (ROWS, after_an_inner_step), (INPUTS, gradient_penalty)],
    ids=["rows-hessian", "rows-inner step", "input_grad-penalty"],
)
def test_what_has_no_second_derivative_says_so(config, derivative):
    with pytest.raises(ValueError, match=r"dense: its approximate gradient is differentiated once"):
        jax.jit(derivative(layer(config)))(X, KERNEL)


def test_with_rows_waiting_a_penalty_on_the_inputs_gradient_is_differentiable():
    """The kernel's gradient is taken once, with one memory."""
    ours = jax.jit(gradient_penalty(layer(ROWS)))(X, KERNEL)
    np.testing.assert_allclose(ours, gradient_penalty(exact)(X, KERNEL), rtol=1e-4, atol=1e-5)
