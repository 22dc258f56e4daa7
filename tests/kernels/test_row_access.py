"""The TPU kernels of chosen rows, interpreted, and layers with them, as the compiler computes them.

That the compiler for TPUs takes them is shown in test_tpu.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import one_layer
import pytest
from jax import lax

import mem_aop_jax as aop
from mem_aop_jax._core import backward, row_memory, subspace_memory
from mem_aop_jax._kernels import dispatch, row_access, row_access_tpu

pytestmark = pytest.mark.usefixtures("interpreted")

weight_gradient = one_layer.weight_gradient.__wrapped__  # with other kernels, traced anew
M, N, P, K = 256, 128, 384, 40  # of which the last blocks of 16 are not whole
BOTH = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def some(k, m=M, seed=0):
    """Some of m, none twice."""
    return jax.random.permutation(jax.random.key(seed), m)[:k].astype(jnp.int32)


def assert_equal(found, wanted):
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))


def assert_close(found, wanted, tolerance=1e-5):
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    found, wanted = (np.asarray(a, np.float64) for a in (found, wanted))
    largest = np.max(np.abs(wanted), initial=0, where=np.isfinite(wanted))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * largest)


# ---- the kernels


@BOTH
def test_take(dtype):
    """With neighbours, which share words, one row that comes twice, and one that is not finite."""
    x = normal(1, M, N, dtype=dtype).at[3, 5].set(jnp.nan).at[8, 0].set(-jnp.inf)
    chosen = jnp.concatenate([jnp.array([3, 2, 8, 3, 255, 254], jnp.int32), some(K)])
    assert_equal(row_access_tpu.gather_rows(x, chosen, 16), x[chosen])


@BOTH
@pytest.mark.parametrize("bad", [(), (0, 7, 8, 9, 255)])
def test_take_out(dtype, bad):
    """Others beside the chosen ones, which do not stay, are looked for."""
    x = normal(1, M, N, dtype=dtype)
    x = x.at[jnp.array(bad, jnp.int32)].set(jnp.nan)
    chosen = some(K, seed=2)
    chosen = jnp.concatenate([chosen, chosen[:3], chosen[:9] ^ 1])  # twice, and neighbours
    stay = jnp.ones(M, bool).at[chosen].set(False).at[jnp.array(bad, jnp.int32)].set(False)
    found, rest = row_access_tpu.extract_rows(x, chosen, stay, 16)
    assert_equal(found, x[chosen])
    assert_equal(rest, jnp.where(stay[:, None], x, 0).astype(dtype))


@BOTH
@pytest.mark.parametrize("add_projection", [False, True])
def test_take_outside(dtype, add_projection):
    x, basis = normal(1, M, N, dtype=dtype), normal(2, 24, N, dtype=dtype)
    chosen, weights, coordinates = some(K), normal(3, K), normal(4, K, 24, dtype=dtype)
    found = row_access_tpu.gather_residuals(
        x,
        chosen,
        weights,
        coordinates,
        basis,
        16,
        lax.Precision.HIGHEST,
        add_projection,
        jnp.float32,
    )
    held, taken = (a.astype(jnp.float32) for a in (coordinates, x[chosen]))
    held = held @ basis.astype(jnp.float32)
    assert_close(found, weights[:, None] * (taken - held) + (held if add_projection else 0))


@BOTH
def test_place(dtype):
    sampled, at = normal(1, K, N, dtype=dtype), jnp.full(M, -1, jnp.int32)
    at = at.at[some(K)].set(jnp.arange(K, dtype=jnp.int32))
    coordinates, directions = normal(2, M, 8, dtype=dtype), normal(3, 8, N, dtype=dtype)
    coordinates = coordinates.at[4].set(jnp.nan)
    found = row_access_tpu.replace_product_rows(
        sampled, at, coordinates, directions, 128, lax.Precision.HIGHEST
    )
    inside = coordinates.astype(jnp.float32) @ directions.astype(jnp.float32)
    wanted = jnp.where(at[:, None] < 0, inside, sampled[at].astype(jnp.float32)).astype(dtype)
    assert_close(found, wanted, 1e-5 if dtype == jnp.float32 else 1e-2)
    assert_equal(found[some(K)], sampled)


def test_which_sizes_they_take(monkeypatch):
    def block(rows, features, dtype=jnp.bfloat16, rank=0, chosen=1):
        return row_access_tpu.choose_block_rows(rows, chosen, features, dtype, rank)

    assert block(8192, 4096) == block(8192, 4096, rank=32) == block(8192, 4096, jnp.float32) == 128
    assert block(8192, 16384) == 32
    assert block(8192, 4096, rank=256) == 64
    assert block(2**16, 128, chosen=2**16) == 128
    assert block(2**17, 128) is None  # more numbers than the memory for scalars holds
    assert block(128, 128, chosen=2**17) is None
    for wrong in [(0, 128), (100, 128), (128, 100), (128, 65536), (128, 128, jnp.float16)]:
        assert block(*wrong) is None
    assert block(128, 128, jnp.float64) is None
    monkeypatch.setattr(row_access_tpu, "TPU_COPIES_ROWS", False)  # before jax 0.10.2
    assert block(8192, 4096) is None


# ---- in groups, and with rows that there are not


def both(function, *args, **options):
    """What a function finds with the kernel, and without."""
    found = []

    def by_kernel(kernel, compute, *args):
        found.append(kernel(*args))
        return compute(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_access, "kernel_or_xla", by_kernel)
        wanted = function.__wrapped__(*args, **options)
    return found[0], wanted


@BOTH
def test_rows_of_groups(dtype):
    x = normal(1, 2, M, N, dtype=dtype)
    chosen = jnp.stack([some(K), some(K, seed=5)]).at[0, 3].set(M).at[1, 7].set(5 * M)
    assert_equal(*both(row_access.gather_rows, x, chosen))
    assert_close(*both(row_access.grouped_row_norms, x))
    basis, coordinates = normal(2, N, 16, dtype=dtype), normal(3, 2, M, 16, dtype=dtype)
    for weights in (None, normal(4, 2, K)):
        options = {"dtype": dtype, "add_projection": weights is not None}
        found, wanted = both(
            row_access.gather_residuals, x, chosen, weights, coordinates, basis, None, **options
        )
        assert_close(found, wanted, 1e-5 if dtype == jnp.float32 else 1e-2)
        assert np.isnan(np.asarray(found[0, 3], np.float32)).all()


@BOTH
def test_place_in_groups(dtype):
    sampled, chosen = normal(1, 2, K, N, dtype=dtype), jnp.stack([some(K), some(K, seed=5)])
    coordinates, directions = normal(2, 2, M, 16, dtype=dtype), normal(3, 16, N, dtype=dtype)
    found, wanted = both(
        jax.jit(row_access.replace_product_rows), sampled, chosen, coordinates, directions, None
    )
    assert_close(found, wanted, 1e-5 if dtype == jnp.float32 else 1e-2)


def test_half_a_word_has_no_kernel(monkeypatch):
    """The last of an odd number of rows in bfloat16."""
    used = []
    monkeypatch.setattr(row_access, "kernel_or_xla", lambda *args: used.append(args))
    for dtype, k, kernels in [(jnp.bfloat16, 41, 0), (jnp.bfloat16, 42, 1), (jnp.float32, 41, 2)]:
        sampled, coordinates = normal(1, 1, k, N, dtype=dtype), normal(2, 1, M, 8, dtype=dtype)
        row_access.replace_product_rows(
            sampled, some(k)[None], coordinates, normal(3, 8, N, dtype=dtype), None
        )
        assert len(used) == kernels


# ---- whole layers


@pytest.fixture
def on_a_tpu(monkeypatch):
    """Kernels for all, uncompiled functions: what was compiled without them is not to be found."""

    def kernel_alone(kernel, compute, *args):
        used.append(compute)
        return kernel(*args)

    used = []
    for module in (backward, row_access):
        monkeypatch.setattr(module, "kernel_or_xla", kernel_alone)
    for module, name in [
        (row_memory, "gather_rows"),
        (row_memory, "grouped_row_norms"),
        (subspace_memory, "gather_residuals"),
    ]:
        monkeypatch.setattr(module, name, getattr(row_access, name).__wrapped__)
    monkeypatch.setattr(row_access, "gather_rows", row_access.gather_rows.__wrapped__)
    return used


def steps(config, x, g, number=2):
    memory, found = aop.init_memory(config, len(x), N, P, x.dtype), []
    backward = jax.jit(functools.partial(weight_gradient, config))
    for step in range(number):
        dw, memory = backward((1 + step) * x, g, memory, jax.random.key(step))
        found += [dw, *jax.tree.leaves(memory)]
    return found


ROWS = {
    "topk": aop.MemAOP(k=K),
    "weightedk": aop.MemAOP(k=K, policy="weightedk"),
    "randk": aop.MemAOP(k=K, policy="randk", groups=2),
    "no memory": aop.MemAOP(k=K, memory=None),
    "priority": aop.MemAOP(k=K, policy="priority", memory=None, groups=2),
    "slots": aop.MemAOP(k=K, memory_slots=128),
    "decay": aop.MemAOP(k=K, decay=0.5),
    "signed": aop.MemAOP(k=K, signed=True, policy="randk"),
}


@pytest.mark.parametrize("name", ROWS)
def test_layers_of_rows(name, request):
    args = ROWS[name], normal(1, M, N), normal(2, M, P)
    wanted = steps(*args)
    used = request.getfixturevalue("on_a_tpu")
    for a, b in zip(steps(*args), wanted, strict=True):
        assert_close(a, b)
    assert used


@pytest.mark.parametrize("name", ["topk", "randk"])
def test_a_memory_in_bfloat16(name, request):
    """Rounded once, when it is stored: the compiler's version adds up what is chosen in float32."""
    args = ROWS[name], normal(1, M, N, dtype=jnp.bfloat16), normal(2, M, P, dtype=jnp.bfloat16)
    wanted = steps(*args, number=1)
    request.getfixturevalue("on_a_tpu")
    for a, b in zip(steps(*args, number=1), wanted, strict=True):
        assert_close(a, b, 1e-2)


@pytest.mark.parametrize("bad", [1, K, K + 1, M])
def test_bad_rows_never_enter_the_memory(bad, request):
    """Up to k of them are chosen and show where they are; more make dW NaN."""
    x = normal(1, M, N).at[:bad, 5].set(jnp.nan)
    args = aop.MemAOP(k=K), x, normal(2, M, P)
    wanted = steps(*args, number=1)
    request.getfixturevalue("on_a_tpu")
    found = steps(*args, number=1)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    assert np.isnan(found[0]).all() == (bad > K)
    assert np.isnan(found[0][5]).all()
    for of_memory in found[1:3]:
        assert np.isfinite(of_memory).all()
        assert not of_memory[:bad].any()


def test_a_row_that_outgrows_the_memory_is_chosen(request):
    x = normal(1, M, N).at[0].set(2e38)
    args = aop.MemAOP(k=K, policy="randk"), x, normal(2, M, P)
    request.getfixturevalue("on_a_tpu")
    memory = aop.Memory(x, normal(3, M, P), jnp.float32(1))
    backward = jax.jit(functools.partial(weight_gradient, args[0]))
    _, memory = backward(*args[1:], memory, jax.random.key(0))
    assert not memory.inputs[0].any()
    assert np.isfinite(memory.inputs).all()


SUBSPACES = {
    "both": {"input_grad": aop.InputGrad(0.5, 24)},
    "rank 0": {"input_grad": aop.InputGrad(0.5, 0)},
    "kernel": {},
    "groups": {"groups": 2, "input_grad": aop.InputGrad(0.5, 16), "refresh": 2},
}


@pytest.mark.parametrize("name", SUBSPACES)
@BOTH
def test_layers_with_subspaces(name, dtype, request):
    config = aop.MemAOP(k=K, policy="priority", memory="subspace", rank=16, **SUBSPACES[name])
    x, g, kernel = (normal(*of, dtype=dtype) for of in ((1, M, N), (2, M, P), (3, N, P)))
    memory = aop.init_memory(config, M, N, P, dtype)

    def step(x, kernel, memory, g):
        call = functools.partial(aop.dense, config=config, key=jax.random.key(7))
        return jax.vjp(call, x, kernel, memory)[1](g)

    args = x, kernel, memory, g
    wanted = jax.jit(step)(*args)
    used = request.getfixturevalue("on_a_tpu")
    found = jax.jit(lambda *args: step(*args))(*args)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert_close(a, b, 1e-4 if dtype == jnp.float32 else 2e-2)
    assert used


# ---- which version runs


def kernels_in(function, *args):
    """How many there are in a program for a TPU."""
    anew = jax.jit(lambda *args: function(*args))  # nothing that was lowered before
    lowered = anew.trace(*args).lower(lowering_platforms=("tpu",))
    return lowered.as_text().count("tpu_custom_call")


@pytest.fixture
def x(monkeypatch, without_x64):
    del without_x64
    monkeypatch.undo()  # not interpreted
    return normal(1, 2, M, N)


def test_a_kernel_for_one_device(x):
    assert kernels_in(row_access.grouped_row_norms, x) == 1
    assert kernels_in(jax.vmap(lambda x: row_access.grouped_row_norms(x[None])), x) == 0


def test_no_kernel_where_nobody_wants_it(x, monkeypatch):
    monkeypatch.setenv("MEM_AOP_JAX_KERNELS", "0")
    assert kernels_in(row_access.grouped_row_norms, x) == 0


def test_no_kernel_with_x64(x):
    jax.config.update("jax_enable_x64", True)
    assert kernels_in(row_access.grouped_row_norms, x) == 0


def test_no_kernel_for_old_chips(x, monkeypatch):
    monkeypatch.setattr(dispatch, "OLD", {jax.devices()[0].device_kind})
    assert kernels_in(row_access.grouped_row_norms, x) == 0


@pytest.mark.usefixtures("without_x64")
@pytest.mark.parametrize("config", [aop.MemAOP(k=K), aop.MemAOP(k=K, policy="weightedk")])
def test_kernels_are_traced_as_the_layer_was(config, monkeypatch):
    """With its precision, and its kind of PRNG keys, although that is where it is lowered."""
    monkeypatch.undo()
    monkeypatch.setattr(row_access_tpu, "TPU_COPIES_ROWS", True)
    memory = aop.init_memory(config, M, N, P)

    def step(x, g, memory):
        with jax.default_matmul_precision("highest"), jax.default_prng_impl("rbg"):
            return weight_gradient(config, x, g, memory, jax.random.PRNGKey(0))

    with jax.default_matmul_precision("default"):
        traced = jax.jit(step).trace(normal(1, M, N), normal(2, M, P), memory)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
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

    x, number = normal(1, 3), jnp.int32(7)
    assert_equal(function(x, number)["twice"], 2 * x)
    assert_equal(jax.jvp(lambda x: function(x, number)["twice"], (x,), (x,))[1], 2 * x)
    assert_equal(
        jax.grad(lambda x: function(x, number)["twice"].sum())(x), jnp.full(3, 2.0, x.dtype)
    )
    found = jax.vmap(function, (0, None))(x, number)
    assert_equal(found["number"], jnp.full(3, 7, jnp.int32))
