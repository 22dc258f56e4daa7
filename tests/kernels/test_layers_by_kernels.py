"""Whole layers with all TPU kernels, interpreted, as XLA computes them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest
from kernel_versions import assert_close, normal, versions

import mem_aop_jax as aop

M, N, P, K = 256, 128, 256, 40
ROWS = {
    "topk": aop.MemAOP(k=K),
    "weightedk": aop.MemAOP(k=K, policy="weightedk"),
    "randk": aop.MemAOP(k=K, policy="randk", groups=2),
    "no memory": aop.MemAOP(k=K, memory=None),
    "priority": aop.MemAOP(k=K, policy="priority", memory=None, groups=2),
    "slots": aop.MemAOP(k=K, memory_slots=128),
    "decay": aop.MemAOP(k=K, decay=0.5),
    "signed": aop.MemAOP(k=K, signed=True, policy="randk"),
}


def slow_except(cases, *default):
    """The cases as parameters; all but the default ones are for the slow run."""
    params = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        params.append(pytest.param(*values, marks=[pytest.mark.slow] * (case not in default)))
    return params


@functools.cache
def weight_gradient(name):
    return versions(functools.partial(one_layer.weight_gradient.__wrapped__, ROWS[name]))


def steps(step, memory, x, g, number=2):
    found = []
    for i in range(number):
        dw, memory = step(x.dtype.type(1 + i) * x, g, memory, jax.random.key(i))
        found += [dw, *jax.tree.leaves(memory)]
    return found


def batch(dtype=jnp.float32):
    return normal(1, M, N, dtype=dtype), normal(2, M, P, dtype=dtype)


def assert_same_steps(name, x, g, number, tolerance=1e-5):
    memory = aop.init_memory(ROWS[name], M, N, P, x.dtype)
    found, wanted = (steps(step, memory, x, g, number) for step in weight_gradient(name))
    for array, wanted_array in zip(found, wanted, strict=True):
        assert_close(array, wanted_array, tolerance)
    return found


@pytest.mark.parametrize("name", slow_except(ROWS, "topk", "randk", "priority", "slots"))
def test_layers_of_rows(name):
    assert_same_steps(name, *batch(), number=2)


@pytest.mark.parametrize("name", slow_except(["topk", "randk"], "topk"))
def test_a_memory_in_bfloat16(name):
    """Rounded once, when it is stored; XLA's version adds up the chosen rows in float32."""
    assert_same_steps(name, *batch(jnp.bfloat16), number=1, tolerance=1e-2)


def test_bad_rows_never_enter_the_memory():
    """Up to k of them are chosen and show where they are; more make dW NaN."""
    for bad in (1, K, K + 1, M):
        x, g = batch()
        x[:bad, 5] = np.nan
        dw, inputs, cotangents, _ = assert_same_steps("topk", x, g, number=1)
        assert np.isnan(dw).all() == (bad > K)
        assert np.isnan(dw[5]).all()
        for memory in (inputs, cotangents):
            assert np.isfinite(memory).all()
            assert not memory[:bad].any()


def test_a_row_that_outgrows_the_memory_is_chosen():
    x, g = batch()
    x[0] = 2e38
    memory = aop.Memory(jnp.asarray(x), jnp.asarray(normal(3, M, P)), jnp.float32(1))
    by_kernels, _ = weight_gradient("randk")
    _, memory = by_kernels(x, g, memory, jax.random.key(0))
    assert not memory.inputs[0].any()
    assert np.isfinite(memory.inputs).all()


SUBSPACES = {
    "both": {"input_grad": aop.InputGrad(0.5, 24)},
    "rank 0": {"input_grad": aop.InputGrad(0.5, 0)},
    "kernel": {},
    "groups": {"groups": 2, "input_grad": aop.InputGrad(0.5, 16), "refresh": 2},
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    slow_except(itertools.product(SUBSPACES, (jnp.float32, jnp.bfloat16)), ("both", jnp.float32)),
)
def test_layers_with_subspaces(name, dtype):
    """Three steps in float32, also with directions that the gradient of the inputs alone has."""
    config = aop.MemAOP(k=K, policy="priority", memory="subspace", rank=16, **SUBSPACES[name])

    def step(x, kernel, memory, g, key):
        call = functools.partial(aop.dense, config=config, key=key)
        return jax.vjp(call, x, kernel, memory)[1](g)

    (x, g), kernel = batch(dtype), normal(3, N, P, dtype=dtype)
    results = []
    for version in versions(step, 128):
        memory = aop.init_memory(config, M, N, P, dtype)
        for i in range(3 if dtype == jnp.float32 else 1):
            *gradients, memory = version(x, kernel, memory, g, jax.random.key(i))
        results.append(jax.tree.leaves((gradients, memory)))
    for array, wanted in zip(*results, strict=True):
        assert_close(array, wanted, 1e-4 if dtype == jnp.float32 else 2e-2)
