"""Functions by kernels of TPUs or GPUs, interpreted on the CPU, and by XLA, side by side."""

import contextlib
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mem_aop_jax._kernels import row_access_tpu, row_sums_tpu, subspace_products_tpu

COMPILED = "grouped_row_norms", "gather_rows", "gather_residuals", "side_products", "orthonormal"


@contextlib.contextmanager
def interpreted_kernels(block_rows=None, choice="kernel_or_xla"):
    """Kernels run wherever there is one, and have blocks of so many rows; gives a list of them.

    `choice` is the function of `dispatch` that chooses: for TPUs, or "cuda_kernel_or_xla".
    What is compiled inside the library is traced anew: it may have been compiled without kernels.
    """
    called = []

    def kernel_alone(kernel, xla, *args):
        called.append(kernel)
        return kernel(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
        patch.setattr(pltpu, "with_memory_space_constraint", lambda array, _: array)
        patch.setattr(row_access_tpu, "TPU_COPIES_ROWS", True)
        modules = [sys.modules[name] for name in sys.modules if name.startswith("mem_aop_jax.")]
        for module in modules:
            if hasattr(module, choice):
                patch.setattr(module, choice, kernel_alone)
            for name in COMPILED:
                if hasattr(getattr(module, name, None), "__wrapped__"):
                    patch.setattr(module, name, getattr(module, name).__wrapped__)
        if block_rows:
            for module in (row_access_tpu, row_sums_tpu, subspace_products_tpu):
                choose = functools.partial(fixed_block_rows, module.choose_block_rows, block_rows)
                patch.setattr(module, "choose_block_rows", choose)
        yield called


def fixed_block_rows(choose, block_rows, *args, **options):
    return choose(*args, **options) and block_rows


def versions(function, block_rows=None, choice="kernel_or_xla"):
    """The function by kernels and by XLA, both compiled."""

    def by_kernels(*args):
        with interpreted_kernels(block_rows, choice) as called:
            results = function(*args)
        assert called
        return results

    return jax.jit(by_kernels), jax.jit(lambda *args: function(*args))


def interpreted(kernel):
    """A kernel, called without XLA's version, compiled."""

    def traced(*args, **options):
        with interpreted_kernels():
            return kernel(*args, **options)

    return functools.wraps(kernel)(traced)


def normal(seed, *shape, dtype=jnp.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def assert_equal(found, wanted):
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))


def assert_close(found, wanted, tolerance=1e-5):
    """Entry by entry, relative to the largest finite entry."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    found, wanted = (np.asarray(array, np.float64) for array in (found, wanted))
    largest = np.max(np.abs(wanted), initial=0, where=np.isfinite(wanted))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * largest)
