"""Which version of a computation runs: the kernel for one TPU, or XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest

import mem_aop_jax as aop
from mem_aop_jax._kernels import dispatch, row_access, row_access_tpu

X = np.ones((2, 256, 128), np.float32)


def tpu_program(function, *args):
    anew = jax.jit(lambda *args: function(*args))  # nothing that was lowered before
    return anew.trace(*args).lower(lowering_platforms=("tpu",)).as_text()


def kernels_in(function, *args):
    return tpu_program(function, *args).count("tpu_custom_call")


@pytest.mark.usefixtures("without_x64")
def test_a_kernel_for_one_device(monkeypatch):
    assert kernels_in(row_access.grouped_row_norms, X) == 1
    assert kernels_in(jax.vmap(lambda x: row_access.grouped_row_norms(x[None])), X) == 0

    with monkeypatch.context() as patch:
        patch.setenv("MEM_AOP_JAX_KERNELS", "0")
        assert kernels_in(row_access.grouped_row_norms, X) == 0
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "OLD_CHIPS", {jax.devices()[0].device_kind})
        assert kernels_in(row_access.grouped_row_norms, X) == 0
    jax.config.update("jax_enable_x64", True)
    assert kernels_in(row_access.grouped_row_norms, X) == 0


@pytest.mark.usefixtures("without_x64")
@pytest.mark.parametrize("policy", ["topk", "weightedk"])
def test_kernels_are_traced_as_the_layer_was(policy, monkeypatch):
    """With its precision, and its kind of PRNG keys, although that is where it is lowered."""
    monkeypatch.setattr(row_access_tpu, "TPU_COPIES_ROWS", True)
    config = aop.MemAOP(k=40, policy=policy)

    def step(x, g, memory):
        with jax.default_matmul_precision("highest"), jax.default_prng_impl("rbg"):
            return one_layer.weight_gradient.__wrapped__(
                config, x, g, memory, jax.random.PRNGKey(0)
            )

    x, g = (jax.ShapeDtypeStruct((256, n), jnp.float32) for n in (128, 384))
    with jax.default_matmul_precision("default"):
        text = tpu_program(step, x, g, aop.init_memory(config, 256, 128, 384))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("[HIGHEST, HIGHEST]" in line for line in products)
    assert "tpu_custom_call" in text


def test_differentiated_and_batched():
    """As if there were no kernel."""

    def doubled(x, number):
        return {"twice": 2 * x, "number": number}

    def function(x, number):
        return dispatch.kernel_or_xla(lambda *_: None, doubled, x, number)

    def twice(x):
        return function(x, np.int32(7))["twice"]

    @jax.jit
    def results(x):
        return (
            twice(x),
            jax.jvp(twice, (x,), (x,))[1],
            jax.grad(lambda x: twice(x).sum())(x),
            jax.vmap(function, (0, None))(x, np.int32(7))["number"],
        )

    x = np.float32([1, 3, 5])
    for found, wanted in zip(results(x), (2 * x, 2 * x, [2, 2, 2], [7, 7, 7]), strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(twice(x), 2 * x)  # not compiled
