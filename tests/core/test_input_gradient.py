"""The gradient of the inputs for some of the rows: unbiased, and as cheap as it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from one_layer import M, N, P, assert_unbiased, gradients, normal

import mem_aop_jax as aop
from mem_aop_jax._core.probe import Probe

SUBSPACE = aop.MemAOP(k=6, policy="priority", memory="subspace", rank=(3, 2))


def with_inputs(ratio, rank, config=SUBSPACE):
    return dataclasses.replace(config, input_grad=aop.InputGrad(ratio, rank))


def test_the_layers_below_get_an_unbiased_gradient():
    """The first kernel's, through three layers with approximate gradients of their inputs."""
    config = with_inputs(0.25, 2)
    kernels = [normal(6, 6, seed=seed) / 2 for seed in range(4)]
    x, wanted = normal(M, 6, seed=5), normal(M, 6, seed=6)

    def loss_fn(first, memories, config, key):
        y = x
        for i, (kernel, memory) in enumerate(zip([first, *kernels[1:]], memories, strict=True)):
            own = jax.random.fold_in(key, i)
            y = jnp.tanh(aop.dense(y, kernel, memory, config=config, key=own))
        return jnp.sum(jax.lax.stop_gradient(y - wanted) * y)  # linear: cotangents are exact

    grad_fn = functools.partial(jax.jit, static_argnums=2)(jax.grad(loss_fn))
    exact = grad_fn(kernels[0], [None] * 4, None, jax.random.key(0))
    memories = [aop.init_memory(config, M, 6, 6)] * 4
    draw = jax.vmap(lambda key: grad_fn(kernels[0], memories, config, key))
    assert_unbiased(jax.jit(draw)(jax.random.split(jax.random.key(1), 20_000)), exact)


def test_weights_do_not_overflow_in_float16():
    config = with_inputs(1 / M, 0, aop.MemAOP(k=6, policy="priority"))
    g = jnp.full((M, P), 6e3, jnp.float16)
    kernel = jnp.full((N, P), 1e-3, jnp.float16)
    dx, _, _ = gradients(config, jnp.ones((M, N), jnp.float16), kernel, None, g, jax.random.key(0))
    assert jnp.isfinite(dx).all()
    assert jnp.any(dx > 1e3)  # 48 and a little


@pytest.mark.parametrize("order", ["kernel", "transposed"])
def test_contractions(order):
    """Any dimensions as rows and features, in any order: with all directions, exact."""
    x, kernel = normal(3, 4, 5, 6), normal(5, 2, 6, 7, seed=1)
    numbers = ((2, 3), (0, 2)), ((), ())
    if order == "transposed":
        x, kernel = x.transpose(2, 0, 3, 1), kernel.transpose(2, 3, 0, 1)
        numbers = ((0, 2), (2, 0)), ((), ())
    config = with_inputs(0.5, 64, dataclasses.replace(SUBSPACE, k=12))
    memory = aop.init_memory(config, 12, 30, 14)

    def loss_fn(x, memory, config):
        key = jax.random.key(0)
        y = aop.dot_general(x, kernel, numbers, memory=memory, config=config, key=key)
        return jnp.sum(y**2)

    grad_fn = functools.partial(jax.jit, static_argnums=2)(jax.grad(loss_fn))
    dx, wanted = grad_fn(x, memory, config), grad_fn(x, None, None)
    np.testing.assert_allclose(dx, wanted, rtol=1e-3, atol=1e-3)


def test_to_evaluate_and_to_measure_it_is_exact():
    x, kernel = normal(M, N), normal(N, P, seed=1)
    config = with_inputs(0.25, 4)
    memory = aop.init_memory(config, M, N, P)

    @functools.partial(jax.jit, static_argnums=2)
    def dx(memory, key, config):
        return jax.grad(
            lambda x: jnp.sum(aop.dense(x, kernel, memory, config=config, key=key) ** 2)
        )(x)

    exact, key = dx(None, None, None), jax.random.key(0)
    for own in ((None, None), (None, key), (memory, None), (Probe.of(memory, 2), key)):
        np.testing.assert_array_equal(dx(*own, config), exact)
    assert jnp.any(dx(memory, key, config) != exact)


def test_a_batch_smaller_than_k_can_be_differentiated_by_its_inputs():
    config = with_inputs(0.5, 0, aop.MemAOP(k=6, policy="priority"))
    x, kernel, key = normal(4, N), normal(N, P, seed=1), jax.random.key(0)
    dx = jax.grad(lambda x: jnp.sum(aop.dense(x, kernel, config=config, key=key)))(x)
    np.testing.assert_allclose(dx, jnp.ones((4, P), jnp.float32) @ kernel.T, rtol=1e-4, atol=1e-5)


def test_all_rows_need_no_key():
    config = with_inputs(1.0, 0, aop.MemAOP(k=6))
    memory = aop.init_memory(config, M, N, P)
    x, g, kernel = normal(M, N), normal(M, P, seed=1), normal(N, P, seed=2)
    dx, _, _ = gradients(config, x, kernel, memory, g)
    np.testing.assert_allclose(dx, g @ kernel.T, rtol=1e-4, atol=1e-4)


def test_shard_map_with_one_batch_for_many_kernels():
    """Tensor parallel: the inputs are the same on all devices, and their gradient is summed."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    config = with_inputs(0.5, 64)
    x, kernel = normal(M, N), normal(N, 4 * P, seed=1)
    memory = aop.init_memory(config, M, N, P)
    columns, everywhere = PartitionSpec(None, "model"), PartitionSpec()

    def step(x, kernel, memory, key):
        def loss_fn(x):
            y = aop.dense(x, kernel, memory, config=config, key=key)
            return jax.lax.psum(jnp.sum(y**2), "model")

        return jax.grad(loss_fn)(x)

    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(everywhere, columns, everywhere, everywhere),
        out_specs=everywhere,
    )
    dx = jax.jit(sharded)(x, kernel, memory, jax.random.key(0))
    np.testing.assert_allclose(dx, 2 * (x @ kernel) @ kernel.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 0}, ValueError, r"InputGrad got ratio=0; it must lie in \(0, 1\]"),
        ({"ratio": "1/4"}, TypeError, r"InputGrad got ratio='1/4'"),
        ({"rank": -1}, ValueError, r"InputGrad got rank=-1; it must be at least 0"),
        ({"rank": 2.5}, TypeError, r"InputGrad got rank=2.5; it must be an integer, at least 0"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        aop.InputGrad(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_grad": 0.25}, TypeError, r"input_grad=0.25; it must be an aop.InputGrad"),
        ({"input_grad": aop.InputGrad()}, ValueError, r"memory='rows'.*rank=0, or memory='sub"),
    ],
)
def test_bad_configurations(options, error, message):
    with pytest.raises(error, match=message):
        aop.MemAOP(k=2, **options)


def test_a_missing_key_is_an_error_where_the_kernel_is_differentiated():
    config = with_inputs(0.25, 0, aop.MemAOP(k=2))
    memory = aop.init_memory(config, M, N, P)
    with pytest.raises(ValueError, match=r"input_grad=InputGrad\(ratio=0.25, rank=0\) draws at"):
        gradients(config, normal(M, N), normal(N, P), memory, normal(M, P))


def test_a_memory_of_another_rank_is_an_error_that_names_it():
    memory = aop.init_memory(SUBSPACE, M, N, P)
    with pytest.raises(ValueError, match=r"input_grad=InputGrad\(ratio=0.25, rank=4\).*\(8, 4\)"):
        aop.dense(normal(M, N), normal(N, P), memory, config=with_inputs(0.25, 4))
