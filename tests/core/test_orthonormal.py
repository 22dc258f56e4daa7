"""Directions that stay orthonormal, whatever rows they follow."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import weight_gradient

import mem_aop_jax as aop
from mem_aop_jax._core.orthonormal import (
    inverse_by_elimination,
    inverse_factor,
    inverse_in_blocks,
    orthonormal,
)

SUBSPACE = aop.MemAOP(k=6, policy="priority", memory="subspace", rank=3)


def hard_cases(features=40, rank=16):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(60, features))
    yield "zero", np.zeros_like(normal)
    yield "one row", np.where(np.arange(60)[:, None] == 7, normal, 0)
    yield "equal columns", np.repeat(normal[:, :1], features, axis=1)
    yield "rank 3", normal[:, :3] @ normal[:3]
    yield "a large mean", 300 + normal
    yield "columns of all sizes", normal * 10 ** np.linspace(-9, 9, features)
    for size in (1e-30, 1e-15, 1e-6, 1e6, 1e15):
        yield f"times {size:g}", normal * size
    yield "a steep spectrum", (normal * 0.3 ** np.arange(features)) @ normal[:features].T


@pytest.mark.parametrize("rows", [pytest.param(r, id=name) for name, r in hard_cases()])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_directions_stay_orthonormal(rows, dtype):
    config = dataclasses.replace(SUBSPACE, k=4, rank=16)
    rows = jnp.asarray(rows, dtype)
    memory = aop.init_memory(config, *rows.shape, rows.shape[1], dtype)
    for t in range(12):
        dw, memory = weight_gradient(config, rows, rows[:, ::-1], memory, jax.random.key(t))
        for basis in memory[:2]:
            np.testing.assert_allclose(basis.T @ basis, np.eye(16), atol=1e-5)
    if np.abs(np.asarray(rows, np.float64)).max() < 1e10:
        assert jnp.isfinite(dw).all()


@pytest.mark.parametrize("rank", [31, 64])
def test_as_many_equal_columns_as_features(rank):
    """The worst for a Gram matrix: all but one direction come from the old columns."""
    old = np.linalg.qr(np.random.default_rng(0).normal(size=(64, rank)))[0].astype(np.float32)
    column = np.abs(np.random.default_rng(1).normal(size=(64, 1))).astype(np.float32)
    new = jax.jit(orthonormal)(np.repeat(column, rank, axis=1), old)
    np.testing.assert_allclose(new.T @ new, np.eye(rank), atol=1e-5)
    assert np.linalg.norm(new.T @ column) > 0.999 * np.linalg.norm(column)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_directions_are_orthonormal_after_ten_thousand_steps(dtype):
    config, features = dataclasses.replace(SUBSPACE, k=2, rank=4), 10
    memory = aop.init_memory(config, 16, features, features, dtype)

    def step(memory, key):
        x = jax.random.normal(key, (16, features), dtype)
        _, memory = weight_gradient(config, x, x * jnp.asarray(1e-6, dtype), memory, key)
        return memory, None

    memory, _ = jax.lax.scan(step, memory, jax.random.split(jax.random.key(0), 10_000))
    for basis in memory[:2]:
        np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)


@pytest.mark.parametrize("invert", [inverse_factor, inverse_in_blocks, inverse_by_elimination])
@pytest.mark.parametrize("rank", [1, 16, 37, 70])
def test_the_inverse_of_a_cholesky_factor_on_each_platform(invert, rank):
    columns = np.random.default_rng(0).normal(size=(200, rank)) * np.logspace(0, 2, rank)
    gram = columns.T @ columns
    invert = jax.jit(invert)
    inverse = np.asarray(invert(gram))
    np.testing.assert_allclose(inverse @ gram @ inverse.T, np.eye(rank), atol=1e-9)
    np.testing.assert_array_equal(inverse, np.tril(inverse))
    singular = np.ones((rank, rank))
    singular[0, 0] = 0
    assert not np.isfinite(invert(singular)).all()


def test_columns_that_are_not_finite_change_no_direction():
    old = np.asarray(aop.init_memory(SUBSPACE, 8, 12, 5).inputs)
    for bad in (np.nan, np.inf):
        columns = np.ones_like(old)
        columns[2, 1] = bad
        chex.assert_trees_all_equal(jax.jit(orthonormal)(columns, old), old)
    damaged = old.copy()
    damaged[0, 0] = np.nan
    new = jax.jit(orthonormal)(np.full_like(old, np.nan), damaged)
    chex.assert_trees_all_equal(new, np.eye(*old.shape, dtype=old.dtype))
