"""Four CPU devices, and strict arrays: an implicit promotion of dtypes or ranks is an error."""

import functools

import chex
import jax
import pytest

from mem_aop_jax import kernels, row_kernels

chex.set_n_cpu_devices(4)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def standard_promotion():
    """For Optax and Flax, which mix dtypes under x64."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def without_x64():
    """As most users have it."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels for TPUs run on CPUs, which have one kind of memory."""
    call = functools.partial(kernels.pl.pallas_call, interpret=True)
    monkeypatch.setattr(kernels.pl, "pallas_call", call)
    monkeypatch.setattr(kernels.pltpu, "with_memory_space_constraint", lambda array, _: array)
    monkeypatch.setattr(row_kernels, "TPU_COPIES_ROWS", True)
