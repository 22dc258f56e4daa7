"""Kernels of GPUs, interpreted, compute what XLA does; on a GPU, without an interpreter, too.

That the compiler for GPUs takes them is shown in tests/examples/test_benchmark.py.
"""

import functools
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest
from kernel_versions import assert_close, normal, versions

import mem_aop_jax as aop
from mem_aop_jax._core import orthonormal, primitive
from mem_aop_jax._kernels import dispatch, rows_gpu, subspace_products

pytestmark = pytest.mark.usefixtures("without_x64")

ON_GPU = jax.default_backend() == "gpu"
M, N, P, K = 128, 256, 128, 24
CONFIGS = {
    "topk": aop.MemAOP(k=K),
    "subspace": aop.MemAOP(k=K, policy="priority", memory="subspace", rank=5),
    "one side": aop.MemAOP(k=K, policy="priority", memory="subspace", rank=(5, 0)),
    "inputs": aop.MemAOP(
        k=K, policy="priority", memory="subspace", rank=4, input_grad=aop.InputGrad(0.25, 20)
    ),
}


def by_kernels_and_xla(function):
    """Both versions; on a GPU the kernels as they are."""
    if ON_GPU:
        return jax.jit(function), lambda *args: without_kernels(function, *args)
    return versions(function, choice="cuda_kernel_or_xla")


def without_kernels(function, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEM_AOP_JAX_KERNELS", "0")
        return jax.jit(lambda *args: function(*args))(*args)


@pytest.mark.parametrize("rank", [1, 16, 20])
def test_rows_are_read_once_for_norms_and_products(rank):
    """Of any size; a row with a NaN has no finite norm, and 0 for coordinates."""
    rows = normal(0, 2, M, N)
    rows[0, 3] *= 1e-30
    rows[0, 4] *= 1e30
    rows[1, 5, 7] = np.nan
    rows = jnp.asarray(rows, jnp.bfloat16)
    basis = jnp.asarray(np.linalg.qr(normal(1, N, rank))[0], jnp.bfloat16)
    function = functools.partial(subspace_products.coordinates_and_norms, precision=None)
    found, wanted = (version(rows, basis) for version in by_kernels_and_xla(function))
    assert found[0].shape == (2, M, rank)
    for row in ((0, 3), (0, 4), (1, 5), (1, 6)):
        assert_close(found[0][row], wanted[0][row], 1e-2)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5)
    assert np.isnan(found[1][1, 5])


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [((100, N, 4), jnp.bfloat16), ((M, 100, 4), jnp.bfloat16), ((M, N, 0), jnp.bfloat16),
     ((M, N, 65), jnp.bfloat16), ((0, N, 4), jnp.bfloat16), ((M, N, 4), jnp.float32)],
)  # fmt: skip
def test_rows_that_xla_multiplies(sizes, dtype):
    assert rows_gpu.multiplies(M, N, 4, jnp.bfloat16)
    assert not rows_gpu.multiplies(*sizes, dtype)


def hard_columns(old):
    """One subspace iteration on, from rows of all kinds."""
    any_rows = normal(0, 60, len(old))
    for name, rows in {
        "normal": any_rows,
        "a large mean": 300 + any_rows,
        "small": 1e-25 * any_rows,
        "zero": 0 * any_rows,
        "one row": any_rows * (np.arange(60)[:, None] == 7),
        "equal columns": np.repeat(any_rows[:, :1], len(old), axis=1),
        "columns of all sizes": any_rows * 10 ** np.linspace(-9, 9, len(old), dtype=np.float32),
    }.items():
        coordinates = rows @ old
        unit = max(np.abs(coordinates).max(), 1e-30)
        yield name, rows.T @ (coordinates / unit) / unit


@pytest.mark.parametrize("rank", [3, 16])
def test_orthonormal_columns(rank):
    """As XLA has them, up to rounding, where columns say what they span."""
    by_kernels, by_xla = by_kernels_and_xla(orthonormal.orthonormal.__wrapped__)
    old = np.linalg.qr(normal(3, 40, rank))[0].astype(np.float32)
    for name, columns in hard_columns(old):
        found, wanted = by_kernels(columns, old), by_xla(columns, old)
        for basis in (found, wanted):
            np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-5, err_msg=name)
        if name in ("normal", "a large mean", "small", "zero"):
            np.testing.assert_allclose(found, wanted, atol=1e-3, err_msg=name)


def test_columns_that_are_not_finite():
    by_kernels, _ = by_kernels_and_xla(orthonormal.orthonormal.__wrapped__)
    old = np.linalg.qr(normal(3, 12, 3))[0].astype(np.float32)
    for bad in (np.nan, np.inf):
        columns = np.ones_like(old)
        columns[2, 1] = bad
        np.testing.assert_array_equal(by_kernels(columns, old), old)
    damaged = old.copy()
    damaged[0, 0] = np.nan
    found = by_kernels(np.full_like(old, np.nan), damaged)
    np.testing.assert_array_equal(found, np.eye(*old.shape, dtype=old.dtype))


def clear_rows(rows, stays):
    def xla(rows, stays):
        return jnp.where(stays[:, None], rows, 0)

    return primitive.cuda_kernel_or_xla(rows_gpu.clear_rows, xla, rows, stays)


@pytest.mark.parametrize("features", [128, 384, 2048])
def test_rows_are_cleared_in_their_place(features):
    rows, stays = normal(0, 32, features), np.arange(32) % 5 > 0
    rows[5] = np.nan
    found, wanted = (version(rows, stays) for version in by_kernels_and_xla(clear_rows))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers(name):
    """Two steps; with a memory of rows also with one that must not enter it."""
    step = functools.partial(one_layer.weight_gradient.__wrapped__, CONFIGS[name])
    both = by_kernels_and_xla(step)
    x, g = (normal(seed, M, features) for seed, features in enumerate((N, P)))
    if name == "topk":
        x[:2, 5] = np.nan
    x, g = (jnp.asarray(a, jnp.bfloat16) for a in (x, g))
    memory = aop.init_memory(CONFIGS[name], M, N, P, jnp.bfloat16)
    results = []
    for version in both:
        found, held = [], memory
        for t in range(2):
            dw, held = version(x, g, held, jax.random.key(t))
            found += [dw, *jax.tree.leaves(held)[:-1]]
        results.append(found)
    for found, wanted in zip(*results, strict=True):
        assert_close(found, wanted, 2e-2)
    if name == "topk":
        assert all(jnp.isfinite(rows).all() for rows in results[0][1:3])


def test_more_bad_rows_than_are_chosen():
    step = functools.partial(one_layer.weight_gradient.__wrapped__, CONFIGS["topk"])
    x, g = normal(0, M, N), normal(1, M, P)
    x[: K + 1, 5] = np.nan
    for version in by_kernels_and_xla(step):
        dw, held = version(x, g, aop.init_memory(CONFIGS["topk"], M, N, P), jax.random.key(0))
        assert np.isnan(dw).all()
        assert np.isfinite(held.inputs).all()
        np.testing.assert_array_equal(held.inputs[: K + 1], 0)


@jax.jit
def gradients(kernel, memory, x):
    def loss(kernel, memory):
        return jnp.sum(aop.dense(x, kernel, memory, config=CONFIGS["topk"]) ** 2)

    return jax.grad(loss, argnums=(0, 1))(kernel, memory)


def kernels_in(text):
    return text.count("triton")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_kernels_in_programs_for_gpus(dtype, monkeypatch):
    """Not where sums could outgrow a memory in float16, nor in exported programs or on old GPUs."""
    kernel, x = (jnp.ones(shape, dtype) for shape in ((N, P), (M, N)))
    args = kernel, aop.init_memory(CONFIGS["topk"], M, N, P, dtype), x

    def program():
        anew = jax.jit(lambda *args: gradients.__wrapped__(*args))
        return anew.trace(*args).lower(lowering_platforms=("cuda",)).as_text()

    assert (kernels_in(program()) > 0) == (dtype != jnp.float16)
    exported = jax.export.export(gradients, platforms=("cuda",))(*args)
    assert kernels_in(exported.mlir_module()) == 0
    capabilities = {"Tesla T4": "7.5", "NVIDIA A100-SXM4-80GB": "8.0"}
    t4, a100 = (
        types.SimpleNamespace(device_kind=kind, compute_capability=capability)
        for kind, capability in capabilities.items()
    )
    assert dispatch._is_old(t4)
    assert not dispatch._is_old(a100)
    monkeypatch.setattr(dispatch, "OLD_CHIPS", {jax.devices()[0].device_kind})
    assert kernels_in(program()) == 0
