"""The products of all rows by a TPU kernel, interpreted, as XLA computes them.

That the compiler for TPUs takes the kernel is shown in test_tpu.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from kernel_versions import assert_close, normal, versions

from mem_aop_jax._kernels import subspace_products, subspace_products_tpu

GROUPS, ROWS, IN, OUT = 2, 256, 128, 256


def arguments(ranks=(16, 24), dtype=jnp.float32):
    x, g = normal(0, GROUPS, ROWS, IN, dtype=dtype), normal(1, GROUPS, ROWS, OUT, dtype=dtype)
    bases = (np.linalg.qr(normal(2, *shape))[0] for shape in zip((IN, OUT), ranks, strict=True))
    return x, g, *(basis.astype(dtype) for basis in bases)


@functools.cache
def side_products(rank, block_rows, precision="highest"):
    def function(x, g, v, u):
        return subspace_products.side_products(x, g, v, u, None, rank, precision)

    return versions(function, block_rows)


def both(args, rank=16, block_rows=256):
    """The products of both sides by the kernel, as close to XLA's as their dtype is."""
    found, wanted = (version(*args) for version in side_products(rank, block_rows))
    for side, wanted_side in zip(found, wanted, strict=True):
        for array, wanted_array in zip(side, wanted_side, strict=True):
            assert_close(array, wanted_array, 1e-5 if args[0].dtype == jnp.float32 else 1e-2)
    return found


@pytest.mark.parametrize(
    ("dtype", "ranks", "block_rows"),
    [
        pytest.param(jnp.float32, (16, 16), 256, marks=pytest.mark.slow),
        (jnp.float32, (8, 0), 128),
        (jnp.bfloat16, (3, 24), 128),
        (jnp.bfloat16, (0, 8), 128),
    ],
)
def test_the_kernel_computes_what_xla_does(dtype, ranks, block_rows):
    both(arguments(ranks, dtype), min(ranks[1], 16), block_rows)


def test_rows_of_any_size():
    """Squares, and products with own coordinates, would be out of the range of float32."""
    x, g, v, u = arguments()
    for size in (1e-30, 1e30):
        _, of_g = both((x, np.float32(size) * g, v, u))
        assert np.all((np.asarray(of_g.norms) > 0) & (np.asarray(of_g.norms) < np.inf))
        assert np.max(np.abs(of_g.own)) > size
    growing = 10 ** np.linspace(-15, 15, GROUPS * ROWS, dtype=np.float32)
    both((x, g * growing.reshape(GROUPS, -1, 1), v, u))  # the unit is that of all blocks


def test_bad_rows_and_rows_of_zeros():
    for bad in (np.nan, np.inf):
        x, g, v, u = arguments()
        x[0, 3, 5], g[1, 7], g[0, :9] = bad, bad, 0
        both((x, g, v, u))
    args = x, np.zeros_like(g), v, u
    (_, of_zeros), (_, wanted) = (version(*args) for version in side_products(16, 256))
    for array, wanted_array in zip(of_zeros, wanted, strict=True):
        assert_close(array, wanted_array, 0)


def test_sizes_that_the_kernel_takes():
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


def test_precision_of_products_in_a_kernel():
    def choose(precision, *dtypes):
        a, b = (jax.ShapeDtypeStruct((1, 128, 128), dtype) for dtype in dtypes)
        return subspace_products_tpu.choose_precision(a, b, precision)

    single, half = (jnp.float32,) * 2, (jnp.bfloat16,) * 2
    with jax.default_matmul_precision(None):
        assert choose("highest", *half) == lax.Precision.DEFAULT
        assert choose(None, *single) == lax.Precision.DEFAULT
        assert choose("highest", *single) == lax.Precision.HIGHEST
        assert choose((lax.Precision.HIGHEST,) * 2, *single) == lax.Precision.HIGHEST
        assert choose((None, "highest"), *single) is None
        assert choose(lax.Precision.HIGH, *single) is None
        assert choose(lax.DotAlgorithmPreset.BF16_BF16_F32, *single) is None
        assert choose(None, jnp.float16, jnp.float16) is None
    assert choose(None, jnp.float32, jnp.bfloat16) is None
    with jax.default_matmul_precision("highest"):
        assert choose(None, *single) == lax.Precision.HIGHEST
    with jax.default_matmul_precision("BF16_BF16_F32_X3"):
        assert choose(None, *single) is None
