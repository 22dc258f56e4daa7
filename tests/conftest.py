"""Four CPU devices, and strict arrays: an implicit promotion of dtypes or ranks is an error."""

import chex
import jax
import pytest

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
