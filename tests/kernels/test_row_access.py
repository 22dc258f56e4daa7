"""Norms, gathers and replacements of rows by TPU kernels, interpreted, as XLA computes them.

That the compiler for TPUs takes the kernels is shown in test_tpu.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_versions import assert_close, assert_equal, interpreted_kernels, normal, versions

from mem_aop_jax._kernels import row_access, row_access_tpu, row_sums_tpu
from mem_aop_jax._numerics import row_norms

GROUPS, M, N, K, Q = 2, 256, 128, 43, 24
BLOCK = 16  # rows in a block, of which the last one is not whole
BOTH = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def distinct(k, seed=0):
    """k of M rows, none twice."""
    return np.random.default_rng(seed).permutation(M)[:k].astype(np.int32)


def float32(array):
    return np.asarray(array, np.float32)


@BOTH
def test_gathers(dtype):
    """With neighbours, which share words, a row that comes twice, and some bad or missing."""
    x = normal(1, GROUPS, M, N, dtype=dtype)
    x[0, 3, 5], x[0, 8, 0] = np.nan, -np.inf
    basis, coordinates = normal(2, N, Q, dtype=dtype), normal(3, GROUPS, M, Q, dtype=dtype)
    chosen, weights = np.stack([distinct(K), distinct(K, seed=5)]), normal(4, GROUPS, K)
    chosen[0, :6] = [3, 2, 8, 3, 255, 254]
    chosen[0, 7], chosen[1, 7] = M, 5 * M

    def gathers(x, chosen, weights, coordinates, basis):
        def residuals(weights, add_projection, dtype):
            return row_access.gather_residuals(
                *(x, chosen, weights, coordinates, basis, None),
                add_projection=add_projection,
                dtype=dtype,
            )

        return row_access.gather_rows(x, chosen), [
            residuals(weights, False, jnp.float32),
            residuals(weights, True, jnp.float32),
            residuals(weights, True, dtype),
            residuals(None, False, dtype),
        ]

    args = x, chosen, weights, coordinates, basis
    (rows, residuals), xla = (version(*args) for version in versions(gathers, BLOCK))
    assert_equal(rows, xla[0])

    missing = chosen >= M
    wanted = [group[indices % M] for group, indices in zip(float32(x), chosen, strict=True)]
    wanted = np.where(missing[..., None], np.nan, wanted)
    assert_equal(rows, wanted.astype(dtype))
    held = [group[indices % M] for group, indices in zip(float32(coordinates), chosen, strict=True)]
    held = held @ float32(basis).T
    weighted = float32(weights)[..., None] * (wanted - held)
    wanted = weighted, held + weighted, held + weighted, wanted - held
    for found, by_xla, array in zip(residuals, xla[1], wanted, strict=True):
        tolerance = 1e-5 if found.dtype == jnp.float32 else 1e-2
        assert_close(found, by_xla, tolerance)
        assert_close(found, array.astype(found.dtype), tolerance)


@BOTH
def test_replace_product_rows(dtype):
    """Also where a coordinate is not finite, of a row that is replaced and of one that is not."""
    sampled, chosen = normal(1, GROUPS, 40, N, dtype=dtype), np.stack([distinct(40), distinct(40)])
    coordinates, directions = normal(2, GROUPS, M, 8, dtype=dtype), normal(3, 8, N, dtype=dtype)
    others = np.setdiff1d(np.arange(M), chosen[0])
    coordinates[0, [chosen[0, 3], others[3]]] = np.nan

    def replace(*args):
        return row_access.replace_product_rows(*args, "highest")

    args = sampled, chosen, coordinates, directions
    found, by_xla = (version(*args) for version in versions(replace, 128))
    wanted = float32(coordinates) @ float32(directions)
    wanted[np.arange(GROUPS)[:, None], chosen] = float32(sampled)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    assert_close(found, wanted.astype(dtype), tolerance)
    assert_close(found, by_xla, tolerance)
    assert_equal(found[np.arange(GROUPS)[:, None], chosen], sampled)


def test_half_a_word_has_no_kernel():
    """The last of an odd number of rows in bfloat16."""
    for dtype, k, kernels in [(jnp.bfloat16, 41, 0), (jnp.bfloat16, 42, 1), (jnp.float32, 41, 1)]:
        arrays = (1, k, N), (1, k), (1, M, 8), (8, N)
        dtypes = dtype, jnp.int32, dtype, dtype
        shapes = map(jax.ShapeDtypeStruct, arrays, dtypes)
        with interpreted_kernels() as called:
            jax.eval_shape(lambda *args: row_access.replace_product_rows(*args, None), *shapes)
        assert len(called) == kernels


@BOTH
def test_extract_rows(dtype):
    """Rows that are neither chosen nor stay are looked for; some come twice, with neighbours."""
    chosen = distinct(40, seed=2)
    chosen = np.concatenate([chosen, chosen[:3], chosen[:9] ^ 1])

    @jax.jit
    def extract(x, chosen, stay):
        with interpreted_kernels():
            return row_access_tpu.extract_rows(x, chosen, stay, BLOCK)

    for bad in ([], [0, 7, 8, 9, 255]):
        x, stay = normal(1, M, N, dtype=dtype), np.ones(M, bool)
        x[bad], stay[chosen], stay[bad] = np.nan, False, False
        found, rest = extract(x, chosen, stay)
        assert_equal(found, x[chosen])
        assert_equal(rest, np.where(stay[:, None], x, np.zeros((), dtype)))


@BOTH
def test_norms_and_sums(dtype):
    """Of rows of any size, one with a NaN, one of zeros; and of sums out of the range."""

    @jax.jit
    def norms_and_sums(rows, memory):
        with interpreted_kernels(128) as called:
            norms = row_access.grouped_row_norms(rows.reshape(GROUPS, M, -1))
            assert called
            return norms.reshape(-1), *row_sums_tpu.norms_and_sums(rows, memory, 256)

    wanted = jax.jit(lambda rows: row_norms(rows.astype(jnp.float32)))
    shape = GROUPS * M, 2 * N
    for size in (1e-30, 1.0, 1e30):
        rows, memory = (
            np.asarray(size, dtype) * normal(seed, *shape, dtype=dtype) for seed in (1, 2)
        )
        rows[3, 5], rows[7] = np.nan, 0
        norms, sum_norms, sums = norms_and_sums(rows, memory)
        np.testing.assert_allclose(norms, wanted(rows), rtol=1e-5)
        assert_equal(sums, rows + memory)
        np.testing.assert_allclose(sum_norms, wanted(sums), rtol=1e-5)

    rows = np.full(shape, 3e38, dtype)
    rows[0] = 1
    _, norms, sums = norms_and_sums(rows, rows)
    assert np.isfinite(norms[0])
    assert np.all(np.isinf(norms[1:]))
    assert np.all(np.isinf(float32(sums[1:])))


def test_sizes_that_row_access_takes(monkeypatch):
    def block(rows, features, dtype=jnp.bfloat16, rank=0, chosen=1):
        return row_access_tpu.choose_block_rows(rows, chosen, features, dtype, rank)

    monkeypatch.setattr(row_access_tpu, "TPU_COPIES_ROWS", True)
    assert block(8192, 4096) == block(8192, 4096, rank=32) == block(8192, 4096, jnp.float32) == 128
    assert block(8192, 16384) == 32
    assert block(8192, 4096, rank=256) == 64
    assert block(2**16, 128, chosen=2**16) == 128
    assert block(2**17, 128) is None  # more indices than scalar memory holds
    assert block(128, 128, chosen=2**17) is None
    for wrong in [(0, 128), (100, 128), (128, 100), (128, 65536), (128, 128, jnp.float16)]:
        assert block(*wrong) is None
    assert block(128, 128, jnp.float64) is None
    monkeypatch.setattr(row_access_tpu, "TPU_COPIES_ROWS", False)  # before jax 0.10.2
    assert block(8192, 4096) is None


def test_sizes_that_norms_and_sums_take():
    def block(rows, features, dtype=jnp.bfloat16, with_memory=True):
        return row_sums_tpu.choose_block_rows(rows, features, dtype, with_memory)

    assert block(8192, 4096) == 256
    assert block(8192 + 128, 4096) == block(8192, 8192) == 128
    assert block(8192, 8192, with_memory=False) == 256
    for wrong in [(0, 128), (100, 128), (128, 100), (128, 32768), (128, 128, jnp.float16)]:
        assert block(*wrong) is None
