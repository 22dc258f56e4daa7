"""Four CPU devices, and strict arrays: an implicit promotion of dtypes or ranks is an error.

Nearly all the time goes into compiling. So programs are compiled without most of XLA's
optimisations, which on CPUs make LLVM do less, and leave the HLO, its FLOPs, its bytes and its
memory as they are; by XLA's older emitters for CPUs, where it still has them, which take a quarter
of the time; and what was compiled stays in a cache from run to run.
"""

import os

import chex
import jax
import pytest

if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = " ".join(
        (
            os.environ.get("XLA_FLAGS", ""),
            "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
        )
    )
chex.set_n_cpu_devices(4)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)


def pytest_configure(config):
    cache = os.environ.setdefault(  # in the environment for the processes that tests start, too
        "JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("compiled"))
    )
    os.environ["MEM_AOP_JAX_CACHE"] = str(config.cache.mkdir("rates"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


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
