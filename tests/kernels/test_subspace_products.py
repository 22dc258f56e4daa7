"""The TPU kernels of all rows, interpreted, compute what the compiler's versions do.

That the compiler for TPUs takes them is shown in test_tpu.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mem_aop_jax as aop
from mem_aop_jax._core import subspace_memory
from mem_aop_jax._kernels import row_sums_tpu, subspace_products, subspace_products_tpu
from mem_aop_jax._numerics import row_norms

ROWS, IN, OUT = 512, 256, 384


pytestmark = pytest.mark.usefixtures("interpreted")


def arguments(ranks=(16, 24), dtype=jnp.float32, size=1.0, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (2, ROWS // 2, IN), (2, ROWS // 2, OUT)
    x, g = (
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys[:2], shapes, strict=True)
    )
    v, u = (
        jnp.linalg.qr(jax.random.normal(key, (features, rank)))[0].astype(dtype)
        for key, features, rank in zip(keys[2:], (IN, OUT), ranks, strict=True)
    )
    return x, g * jnp.asarray(size, dtype), v, u


def both(args, rank, block=row_sums_tpu.LANES):
    """What the compiler's version and the kernel find."""
    precision = lax.Precision.DEFAULT if args[0].dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    by_kernel = subspace_products._by_kernel(*args, rank=rank, block=block, precision=precision)
    return subspace_products._by_compiler(*args, rank=rank, precision=precision), by_kernel


def accumulation_dtype(array):
    return np.asarray(array, np.float32)


def assert_close(wanted, found, tolerance):
    """Entry by entry, of the largest entry of an array."""
    for name, *arrays in zip(wanted._fields, wanted, found, strict=True):
        assert len({(array.shape, array.dtype) for array in arrays}) == 1, name
        a, b = (np.asarray(array, np.float64) for array in arrays)
        largest = np.max(np.abs(a), initial=0, where=np.isfinite(a))
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * largest, err_msg=name)


@pytest.mark.parametrize(
    ("dtype", "ranks", "block"),
    [
        (jnp.float32, (16, 16), 256),
        (jnp.float32, (8, 0), 128),
        (jnp.bfloat16, (3, 24), 128),
        (jnp.bfloat16, (0, 8), 128),
    ],
)
def test_as_the_compiler_computes_it(dtype, ranks, block):
    wanted, found = both(arguments(ranks, dtype), min(ranks[1], 16), block)
    for pair in zip(wanted, found, strict=True):
        assert_close(*pair, 1e-5 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_rows_of_any_size(size):
    """Squares, and products with own coordinates, would be out of the range of float32."""
    wanted, found = both(arguments(size=size), 16)
    for pair in zip(wanted, found, strict=True):
        assert_close(*pair, 1e-5)
    norms = np.asarray(found[1].norms)
    assert np.all((norms > 0) & (norms < np.inf))
    assert np.max(np.abs(found[1].own)) > size


def test_rows_that_grow():
    """The unit of the coordinates is that of the largest of all blocks."""
    x, g, v, u = arguments()
    growing = 10.0 ** jnp.linspace(-15, 15, ROWS, dtype=jnp.float32).reshape(2, -1, 1)
    wanted, found = both((x, g * growing, v, u), 16)
    for pair in zip(wanted, found, strict=True):
        assert_close(*pair, 1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_rows_and_rows_of_zeros(bad):
    x, g, v, u = arguments()
    x, g = x.at[0, 3, 5].set(bad), g.at[1, 7].set(bad).at[0, :9].set(0)
    wanted, found = both((x, g, v, u), 16)
    for pair in zip(wanted, found, strict=True):
        assert_close(*pair, 1e-5)
    zeros = both((x, jnp.zeros_like(g), v, u), 16)
    assert_close(zeros[0][1], zeros[1][1], 0)


def test_a_layer_with_it(monkeypatch):
    """The whole step, with directions that the gradient of the inputs alone takes out."""
    config = aop.MemAOP(
        ratio=1 / 4,
        policy="priority",
        memory="subspace",
        rank=16,
        input_grad=aop.InputGrad(0.5, 24),
    )
    x, g = (a.reshape(ROWS, -1) for a in arguments()[:2])
    kernel = jax.random.normal(jax.random.key(1), (IN, OUT), jnp.float32) / 16
    memory = aop.init_memory(config, ROWS, IN, OUT)

    def steps():
        @jax.jit
        def step(x, kernel, state, key):
            call = functools.partial(aop.dense, config=config, key=key, precision="highest")
            return jax.vjp(call, x, kernel, state)[1](g)

        state = memory
        for i in range(3):
            dx, dw, state = step(x, kernel, state, jax.random.key(i))
        return dx, dw, state.inputs, state.cotangents

    def by_kernel(*args):
        *args, due, rank, _ = args
        assert due is None
        return subspace_products._by_kernel(
            *args, rank=rank, block=128, precision=lax.Precision.HIGHEST
        )

    wanted = steps()
    monkeypatch.setattr(subspace_memory, "side_products", by_kernel)
    for a, b in zip(wanted, steps(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.max(np.abs(a)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_norms_and_sums(dtype, size):
    rows, kept = (a.reshape(ROWS, -1)[:, :IN] for a in arguments(dtype=dtype, size=size)[:2])
    rows = rows.at[3, 5].set(jnp.nan).at[7].set(0)
    norms, nothing = row_sums_tpu.norms_and_sums(rows, None, 128)
    assert nothing is None
    np.testing.assert_allclose(norms, row_norms(rows.astype(jnp.float32)), rtol=1e-5)
    norms, sums = row_sums_tpu.norms_and_sums(rows, kept, 256)
    np.testing.assert_array_equal(accumulation_dtype(sums), accumulation_dtype(rows + kept))
    np.testing.assert_allclose(norms, row_norms(sums.astype(jnp.float32)), rtol=1e-5)


def test_a_sum_that_outgrows_its_dtype():
    rows = jnp.full((128, 128), 3e38, jnp.float32).at[0].set(1)
    norms, sums = row_sums_tpu.norms_and_sums(rows, rows, 128)
    assert np.isfinite(norms[0])
    assert np.all(np.isinf(norms[1:]))
    assert np.all(np.isinf(sums[1:]))


def test_which_sizes_they_take():
    def block(rows, in_features, out_features, rank=16, dtype=jnp.bfloat16):
        return subspace_products_tpu.choose_block_rows(
            rows, in_features, out_features, (rank, rank), dtype
        )

    assert block(8192, 2048, 2048) == 256
    assert block(8192, 4096, 4096) == 256
    assert block(8192 + 128, 4096, 4096) == 128
    assert block(8192, 4096, 4096, rank=32) == 128
    assert block(128, 128, 128) == 128
    for sizes in [(0, 128, 128), (100, 128, 128), (128, 100, 128), (128, 128, 100)]:
        assert block(*sizes) is None
    assert block(8192, 16384, 16384) is None  # more than every TPU has on the chip
    assert block(8192, 8192, 4096, dtype=jnp.float32) is None
    assert block(128, 128, 128, dtype=jnp.float16) is None

    def block(rows, features, dtype=jnp.bfloat16, with_memory=True):
        return row_sums_tpu.choose_block_rows(rows, features, dtype, with_memory)

    assert block(8192, 4096) == 256
    assert block(8192 + 128, 4096) == block(8192, 8192) == 128
    assert block(8192, 8192, with_memory=False) == 256
    for wrong in [(0, 128), (100, 128), (128, 100), (128, 32768), (128, 128, jnp.float16)]:
        assert block(*wrong) is None


@pytest.mark.parametrize(
    ("dtype", "precision", "wanted"),
    [
        (jnp.bfloat16, "highest", lax.Precision.DEFAULT),
        (jnp.float32, None, lax.Precision.DEFAULT),
        (jnp.float32, "highest", lax.Precision.HIGHEST),
        (jnp.float32, (lax.Precision.HIGHEST,) * 2, lax.Precision.HIGHEST),
        (jnp.float32, (None, "highest"), None),
        (jnp.float32, lax.Precision.HIGH, None),
        (jnp.float32, lax.DotAlgorithmPreset.BF16_BF16_F32, None),
        (jnp.float16, None, None),
    ],
)
def test_which_products_they_have(dtype, precision, wanted):
    rows = jnp.ones((1, 128, 128), dtype)
    with jax.default_matmul_precision(None):
        assert subspace_products_tpu.precision_of_products(rows, rows, precision) == wanted


def test_no_products_of_two_dtypes():
    x, g = (jnp.ones((1, 128, 128), dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert subspace_products_tpu.precision_of_products(x, g, None) is None


def test_precision_that_jax_is_set_to():
    rows = jnp.ones((1, 128, 128), jnp.float32)
    with jax.default_matmul_precision("highest"):
        assert (
            subspace_products_tpu.precision_of_products(rows, rows, None) == lax.Precision.HIGHEST
        )
    with jax.default_matmul_precision("BF16_BF16_F32_X3"):
        assert subspace_products_tpu.precision_of_products(rows, rows, None) is None
