"""The primitive against exact layers and a NumPy loop."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import gradients, weight_gradient

import mem_aop_jax as aop

M, N, P, K = 12, 5, 3, 4
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def arrays(*shapes, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def numpy_loop(steps, k, decay, dtype):
    """The algorithm for top-k, one row at a time, in float64 with the memory rounded to dtype."""
    mem_x, mem_g = np.zeros((M, N)), np.zeros((M, P))
    for x, g in steps:
        xh, gh = mem_x + np.asarray(x, np.float64), mem_g + np.asarray(g, np.float64)
        scores = [(np.linalg.norm(xh[m]) * np.linalg.norm(gh[m])) ** 2 for m in range(M)]
        chosen = np.argsort(scores)[::-1][:k]
        dw = np.zeros((N, P))
        for m in chosen:
            dw += np.outer(xh[m], gh[m])
            xh[m], gh[m] = 0, 0
        mem_x, mem_g = (
            (np.sqrt(decay) * rows).astype(dtype).astype(np.float64) for rows in (xh, gh)
        )
        yield dw, mem_x, mem_g


EVERY_DTYPE = {
    (dtype, memory_dtype, decay)
    for dtype in EPS
    for memory_dtype in (None, "float32", "bfloat16", "float64")
    for decay in (0.9, 1.0, 0.0)
}
DTYPES = [
    *(("float32", None, decay) for decay in (0.9, 1.0, 0.0)),
    *(("float32", memory_dtype, 0.9) for memory_dtype in ("bfloat16", "float64")),
    *((dtype, None, 0.9) for dtype in ("bfloat16", "float16", "float64")),
    *((dtype, "float32", 0.9) for dtype in ("bfloat16", "float16")),
    ("float64", "bfloat16", 0.9),
]


@pytest.mark.parametrize(
    ("dtype", "memory_dtype", "decay"),
    DTYPES
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in sorted(EVERY_DTYPE - set(DTYPES), key=str)
    ],
)
def test_follows_a_numpy_loop_in_every_dtype_of_inputs_and_memory(dtype, memory_dtype, decay):
    config = aop.MemAOP(k=K, decay=decay, memory_dtype=memory_dtype)
    stored = memory_dtype or dtype
    steps = [arrays((M, N), (M, P), dtype=dtype, seed=seed) for seed in range(5)]
    (kernel,) = arrays((N, P), dtype=dtype)
    memory = aop.init_memory(config, M, N, P, dtype)
    tolerance = 50 * max(EPS[dtype], EPS[stored])
    for (x, g), (dw, mem_x, mem_g) in zip(steps, numpy_loop(steps, K, decay, stored), strict=True):
        before = memory
        dx, our_dw, memory = gradients(config, x, kernel, memory, g)
        assert dx.dtype == our_dw.dtype == dtype
        chex.assert_trees_all_equal_shapes_and_dtypes(memory, before)
        assert memory.uses == 1
        for ours, wanted in ((our_dw, dw), (memory.inputs, mem_x), (memory.cotangents, mem_g)):
            np.testing.assert_allclose(
                np.asarray(ours, np.float64), wanted, atol=tolerance * np.abs(wanted).max(), rtol=0
            )


shapes = st.tuples(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 6), st.integers(1, 6))


@pytest.mark.slow
@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    shapes,
    st.sampled_from(list(EPS)),
    st.sampled_from(["topk", "weightedk", "randk"]),
    st.sampled_from(["rows", None]),
    st.integers(0, 2**31),
)
def test_k_equal_rows_is_the_exact_gradient_and_leaves_no_memory(shape, dtype, policy, kind, seed):
    lead, n, p = shape
    rows = int(np.prod(lead, dtype=int))
    x, kernel, g = arrays((*lead, n), (n, p), (*lead, p), dtype=dtype, seed=seed)
    config = aop.MemAOP(k=rows, policy=policy, memory=kind)
    memory = aop.init_memory(config, rows, n, p, dtype)
    dx, dw, memory = gradients(config, x, kernel, memory, g, jax.random.key(seed))
    exact_dx, exact_dw = jax.vjp(lambda x, kernel: x @ kernel, x, kernel)[1](g)
    assert (dx.shape, dw.shape, dx.dtype, dw.dtype) == (x.shape, kernel.shape, dtype, dtype)
    np.testing.assert_array_equal(dx, exact_dx)
    bound = jnp.abs(x.reshape(rows, n)).T @ jnp.abs(g.reshape(rows, p))  # of the rounding errors
    error = jnp.abs(dw - exact_dw).astype(jnp.float64)
    assert (error <= 4 * EPS[dtype] * bound.astype(jnp.float64)).all()
    if kind:
        assert not any(np.any(rows) for rows in memory[:2])


def test_without_config_it_is_lax_dot_general():
    x, kernel = arrays((2, M, N), (N, P))
    plain = jax.make_jaxpr(lambda x, w: jax.lax.dot_general(x, w, (((2,), (0,)), ((), ()))))
    assert str(jax.make_jaxpr(aop.dense)(x, kernel)) == str(plain(x, kernel))


def test_a_frozen_kernel_costs_no_outer_product_and_needs_no_memory():
    x, kernel = arrays((M, N), (N, P))
    config = aop.MemAOP(k=K, policy="randk")
    input_gradient = jax.grad(lambda x: aop.dense(x, kernel, config=config).sum())
    np.testing.assert_array_equal(input_gradient(x), jax.grad(lambda x: (x @ kernel).sum())(x))
    assert "top_k" not in str(jax.make_jaxpr(input_gradient)(x))


def test_products_accumulate_in_float32():
    rows, config = 4096, aop.MemAOP(k=4096, memory=None)
    x = jnp.ones((rows, 1), jnp.bfloat16)
    for dtype in (jnp.bfloat16, jnp.float32):  # of the kernel, hence of the cotangents
        _, dw, _ = gradients(config, x, jnp.ones((1, 1), dtype), None, jnp.ones((rows, 1), dtype))
        assert dw.dtype == dtype
        assert dw[0, 0] == rows  # a bfloat16 sum of ones stops at 256


def test_weights_of_a_custom_policy():
    def every_third(key, scores, k):
        return aop.Selection(3 * jnp.arange(k), 1.0 + jnp.arange(k, dtype=jnp.float32))

    for n, p in ((N, P), (P, N)):
        config = aop.MemAOP(k=K, policy=every_third, memory=None)
        x, kernel, g = arrays((M, n), (n, p), (M, p))
        _, dw, _ = gradients(config, x, kernel, None, g)
        x, g = np.asarray(x), np.asarray(g)
        wanted = sum((i + 1) * np.outer(x[3 * i], g[3 * i]) for i in range(K))
        np.testing.assert_allclose(dw, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["inputs", "cotangents"])
def test_a_row_that_outgrows_float16_is_chosen(side):
    config = aop.MemAOP(k=1)
    x = jnp.asarray([[6e4, 1], [1, 1], [1, 1]], "float16")  # its first row outgrows it in a step
    g = jnp.asarray([[1e-4, 1e-4], [10, 10], [1, 1]], "float16")
    if side == "cotangents":
        x, g = g, x
    memory = aop.init_memory(config, 3, 2, 2, "float16")
    kernel = jnp.ones((2, 2), "float16")
    _, dw, memory = gradients(config, x, kernel, memory, g)
    np.testing.assert_allclose(dw, jnp.outer(x[1], g[1]), rtol=1e-2)
    np.testing.assert_array_equal(memory.inputs, x.at[1].set(0))
    _, dw, memory = gradients(config, x, kernel, memory, g)
    wanted = 4 * jnp.outer(x[0].astype("float32"), g[0].astype("float32"))
    np.testing.assert_allclose(dw, wanted, rtol=1e-2)
    np.testing.assert_array_equal(memory.inputs, (2 * x).at[0].set(0).at[1].set(x[1]))


def test_a_large_sum_of_float16_rows_is_multiplied_in_float32():
    config = aop.MemAOP(k=1, memory_dtype="float32")
    x, g = jnp.full((1, 1), 6e4, "float16"), jnp.full((1, 1), 1e-3, "float16")
    memory = aop.init_memory(config, 1, 1, 1, "float16")._replace(
        inputs=x.astype("float32"), cotangents=g.astype("float32")
    )
    _, dw, _ = gradients(config, x, jnp.ones((1, 1), "float16"), memory, g)
    np.testing.assert_allclose(dw, 1.2e5 * 2e-3, rtol=1e-2)


def test_a_row_of_the_largest_numbers_is_not_lost():
    x = jnp.ones((3, 2), jnp.float32).at[1].set(3e38)
    g = jnp.full((3, 2), 1e-30, jnp.float32)
    config = aop.MemAOP(k=1, memory=None)
    _, dw, _ = gradients(config, x, jnp.ones((2, 2), jnp.float32), None, g)
    np.testing.assert_allclose(dw, 3e8, rtol=1e-5)


def test_an_unused_layer_has_zero_uses_and_a_doubly_used_memory_two():
    x, kernel = arrays((M, N), (N, N))
    memory = aop.init_memory(aop.MemAOP(k=K), M, N, N)
    layer = functools.partial(aop.dense, config=aop.MemAOP(k=K))

    def unused(kernel, memory):
        return jnp.sum(kernel) + 0 * jax.lax.stop_gradient(layer(x, kernel, memory).sum())

    def twice(kernel, memory):
        return layer(layer(x, kernel, memory), kernel, memory).sum()

    for loss_fn, uses in ((unused, 0), (twice, 2)):
        assert jax.jit(jax.grad(loss_fn, argnums=1))(kernel, memory).uses == uses


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        pytest.param(
            policy, kind, marks=[] if (policy, kind) == ("weightedk", "rows") else pytest.mark.slow
        )
        for policy in ("topk", "weightedk", "randk")
        for kind in ("rows", None)
    ],
)
def test_the_same_under_transforms(policy, kind):
    """jit, vmap, scan, remat and all of them give what one eager call after the other gives."""
    config = aop.MemAOP(k=K, policy=policy, memory=kind)
    x, kernel, g = arrays((2, M, N), (2, N, P), (2, M, P))
    memory = aop.init_memory(config, M, N, P)
    memory = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), memory)
    if memory is not None:
        memory = memory._replace(inputs=0.5 * x, cotangents=0.5 * g)
    keys = jax.random.split(jax.random.key(1), 2)

    def one(x, kernel, memory, g, key, wrapper=lambda layer: layer):
        layer = wrapper(functools.partial(aop.dense, config=config, key=key))
        return jax.vjp(layer, x, kernel, memory)[1](g)

    remat = functools.partial(one, wrapper=jax.checkpoint)

    def scan(*args):
        return jax.lax.scan(lambda carry, slices: (carry, one(*slices)), 0, args)[1]

    args = (x, kernel, memory, g, keys)
    wanted = [one(*jax.tree.map(lambda leaf, i=i: leaf[i], args)) for i in range(2)]
    wanted = jax.tree.map(lambda *leaves: jnp.stack(leaves), *wanted)
    for transformed in (
        jax.vmap(one), jax.jit(jax.vmap(one)), jax.vmap(jax.jit(one)), jax.jit(scan),
        jax.jit(jax.vmap(remat)),
    ):  # fmt: skip
        chex.assert_trees_all_close(transformed(*args), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("batched", "jit"),
    [
        *((batched, True) for batched in ("key", "memory", "x", "all")),
        pytest.param("all", False, marks=pytest.mark.slow),
    ],
)
def test_the_gradient_of_a_sum_over_vmap_is_the_sum_of_the_gradients(batched, jit):
    """Whatever is batched: inputs, memory (each example has its own) or keys alone."""
    config = aop.MemAOP(k=K, policy="randk")
    x, kept_x, kept_g, kernel = arrays((3, M, N), (3, M, N), (3, M, P), (N, P))
    args = {
        "x": x,
        "memory": aop.Memory(kept_x, kept_g, jnp.ones(3, jnp.float32)),
        "key": jax.random.split(jax.random.key(0), 3),
    }
    axes = {name: 0 if batched in (name, "all") else None for name in args}
    first = {name: jax.tree.map(lambda leaf: leaf[0], args[name]) for name in args}
    given = {name: args[name] if axes[name] == 0 else first[name] for name in args}

    def loss(kernel, x, memory, key):
        return jnp.sum(aop.dense(x, kernel, memory, config=config, key=key) ** 2)

    def summed(kernel, x, memory, key):
        per_example = jax.vmap(loss, (None, axes["x"], axes["memory"], axes["key"]))
        return per_example(kernel, x, memory, key).sum()

    grad = jax.grad(summed, argnums=(0, 2))
    dw, memory = (jax.jit(grad) if jit else grad)(kernel, *given.values())
    one = [
        {
            n: jax.tree.map(lambda leaf, i=i: leaf[i], given[n]) if axes[n] == 0 else given[n]
            for n in args
        }
        for i in range(3)
    ]
    alone = jax.jit(jax.grad(loss, argnums=(0, 2)))
    wanted = [alone(kernel, *example.values()) for example in one]
    np.testing.assert_allclose(dw, sum(w[0] for w in wanted), rtol=1e-4, atol=1e-4)
    if axes["memory"] == 0:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[w[1] for w in wanted])
        chex.assert_trees_all_close(memory, stacked, rtol=1e-5, atol=1e-5)
    else:
        assert memory.uses == 3  # added up, and it shows


def test_forward_mode_is_an_error_of_jax():
    x, kernel = arrays((M, N), (N, P))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(
            lambda w: aop.dense(x, w, config=aop.MemAOP(k=K, memory=None)), (kernel,), (kernel,)
        )


# ---- bad input


TOP_K = aop.MemAOP(k=K)


def raises(error, message, x, kernel, memory, g, config=TOP_K):
    with pytest.raises(error, match=message):
        gradients(config, x, kernel, memory, g)


def memory_of(rows=M, n=N, p=P, dtype="float32"):
    return aop.init_memory(aop.MemAOP(k=1), rows, n, p, dtype)


@pytest.mark.parametrize("shape", [(0, P), (N, 0)])
@pytest.mark.parametrize(
    "config",
    [TOP_K, aop.MemAOP(ratio=0.5, policy="priority", memory="subspace", rank=2)],
    ids=["rows", "subspace"],
)
def test_no_features_at_all(shape, config):
    x, memory = jnp.ones((M, shape[0])), aop.init_memory(config, M, *shape, jnp.float64)

    def loss(kernel, memory):
        y = aop.dense(x, kernel, memory, config=config, key=jax.random.key(0))
        return y.sum()

    grads, memory_grads = jax.grad(loss, argnums=(0, 1))(jnp.ones(shape), memory)
    assert grads.shape == shape
    assert memory_grads.uses == 0  # it stays


@pytest.mark.parametrize(("key", "given"), [(0, "int"), (np.ones((M, N)), r"float64\[12, 5\]")])
def test_what_is_no_key(key, given):
    x, kernel, _ = arrays((M, N), (N, P), (M, P))
    with pytest.raises(TypeError, match=rf"dense: key is {given}; it must be a key of jax.random"):
        aop.dense(x, kernel, config=aop.MemAOP(k=K, policy="priority"), key=key)


def test_bad_arrays():
    x, kernel, g = arrays((M, N), (N, P), (M, P))
    ints = jnp.ones((M, N), jnp.int32)
    with pytest.raises(TypeError, match=r"dense: x has dtype int32; .*x\.astype\(jnp\.float32\)"):
        aop.dense(ints, kernel, config=aop.MemAOP(k=K))
    with pytest.raises(TypeError, match=r"kernel has dtype int32; Mem-AOP needs a floating dtype"):
        aop.dense(x, kernel.astype(jnp.int32), config=aop.MemAOP(k=K))
    with pytest.raises(TypeError, match=r"x has dtype complex64"):
        aop.dense(x.astype(jnp.complex64), kernel, config=aop.MemAOP(k=K))
    for config in (None, aop.MemAOP(k=K)):
        with pytest.raises(ValueError, match=r"kernel has shape \(5, 3, 1\); .*two dimensions"):
            aop.dense(x, kernel[:, :, None], config=config)
        with pytest.raises(ValueError, match=r"x has shape \(12, 5\) and kernel \(3, 5\)"):
            aop.dense(x, kernel.T, config=config)
        with pytest.raises(ValueError, match=r"x has shape \(\) and kernel"):
            aop.dense(x[0, 0], kernel, config=config)
    raises(ValueError, r"k=13 outer products asked of a batch of 12 rows",
           x, kernel, None, g, config=aop.MemAOP(k=13, memory=None))  # fmt: skip


@pytest.mark.parametrize(
    ("memory", "error", "message"),
    [
        (memory_of(rows=8), ValueError,
         r"memory.inputs has shape \(8, 5\), but a batch of 12 rows .* needs \(12, 5\).*"
         r"aop.init_memory\(config, 12, 5, 3, jnp.float32\)"),
        (memory_of(n=4), ValueError, r"memory.inputs has shape \(12, 4\).* needs \(12, 5\)"),
        (memory_of(p=4), ValueError, r"memory.cotangents has shape \(12, 4\).* needs \(12, 3\)"),
        (memory_of(dtype="bfloat16"), TypeError,
         r"memory.inputs has dtype bfloat16, but inputs of float32 .* need float32.*"
         r"or set memory_dtype=jnp.bfloat16"),
        (memory_of()._replace(uses=jnp.zeros(2, "float32")), ValueError,
         r"memory.uses has shape \(2,\)"),
        (memory_of()._asdict(), TypeError, r"memory is of type dict; .*aop.Memory\(\*\*memory\)"),
    ],
)  # fmt: skip
def test_a_memory_that_does_not_fit(memory, error, message):
    x, kernel, g = arrays((M, N), (N, P), (M, P))
    raises(error, message, x, kernel, memory, g)
    with pytest.raises(error, match=message):  # in evaluation too
        aop.dense(x, kernel, memory, config=aop.MemAOP(k=K))


def test_a_memory_nobody_asked_for():
    x, kernel, g = arrays((M, N), (N, P), (M, P))
    raises(ValueError, "a memory but no config", x, kernel, memory_of(), g, config=None)
    raises(ValueError, "the configuration has memory=None", x, kernel, memory_of(), g,
           config=aop.MemAOP(k=K, memory=None))  # fmt: skip


def test_differentiating_without_the_memory():
    x, kernel, g = arrays((M, N), (N, P), (M, P))
    np.testing.assert_array_equal(aop.dense(x[:1], kernel, config=aop.MemAOP(k=K)), x[:1] @ kernel)
    raises(ValueError, "differentiated with respect to its kernel without its memory",
           x, kernel, None, g)  # fmt: skip
    with pytest.raises(ValueError, match="without its memory"):
        jax.grad(jax.jit(lambda w: aop.dense(x[:1], w, config=aop.MemAOP(k=K)).sum()))(kernel)


@pytest.mark.parametrize("policy", ["weightedk", "randk"])
def test_a_random_policy_without_a_key(policy):
    x, kernel, g = arrays((M, N), (N, P), (M, P))
    config = aop.MemAOP(k=K, policy=policy)

    def loss_fn(kernel, memory):
        return jnp.sum(aop.dense(x, kernel, memory, config=config, name="layer/0") * g)

    message = f"layer/0: policy '{policy}' draws at random and got no key. Pass key="
    with pytest.raises(ValueError, match=message):
        jax.grad(loss_fn, argnums=(0, 1))(kernel, memory_of())


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (jnp.arange(K), TypeError, r"returned \w+; it must return aop.Selection"),
        (aop.Selection(jnp.arange(3)), ValueError,
         r"indices of shape \(3,\) and dtype int\d+; .* 4 integer indices, of shape \(4,\)"),
        (aop.Selection(jnp.ones(K)), ValueError, r"indices of shape \(4,\) and dtype float64"),
        (aop.Selection(jnp.arange(K), jnp.ones((K, 1))), ValueError, r"weights of shape \(4, 1\)"),
        (aop.Selection(jnp.arange(K), jnp.arange(K)), ValueError, r"dtype int\d+; .* be floating"),
    ],
)  # fmt: skip
def test_a_policy_that_returns_something_else(returned, error, message):
    x, kernel, g = arrays((M, N), (N, P), (M, P))
    config = aop.MemAOP(k=K, policy=lambda key, scores, k: returned, memory=None)
    raises(error, message, x, kernel, None, g, config=config)


def test_a_policy_that_chooses_a_row_that_does_not_exist():
    x, kernel, g = arrays((M, N), (N, P), (M, P))
    config = aop.MemAOP(k=1, policy=lambda key, scores, k: aop.Selection(key), memory=None)
    for outside in (M, M + 100, -M - 1, -3 * M):
        assert np.isnan(gradients(config, x, kernel, None, g, jnp.asarray([outside]))[1]).all()


def test_a_config_of_another_type():
    x, kernel, _ = arrays((M, N), (N, P), (M, P))
    with pytest.raises(TypeError, match=r"config is of type dict; it must be an aop\.MemAOP"):
        aop.dense(x, kernel, config={"k": 3})


def test_an_empty_batch():
    _, kernel, _ = arrays((M, N), (N, P), (M, P))
    raises(ValueError, "the batch has no rows", jnp.zeros((0, N), "float32"), kernel, None,
           jnp.zeros((0, P), "float32"), config=aop.MemAOP(ratio=0.5, memory=None))  # fmt: skip


def test_numpy_arrays_and_restored_memories_work():
    x, kernel, g = (np.asarray(a) for a in arrays((M, N), (N, P), (M, P)))
    restored = jax.tree.map(np.asarray, memory_of())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = gradients(TOP_K, x, kernel, restored, g)
    wanted = gradients(TOP_K, jnp.asarray(x), jnp.asarray(kernel), memory_of(), jnp.asarray(g))
    chex.assert_trees_all_equal(ours, wanted)


@pytest.mark.parametrize(
    ("groups", "jit"),
    [(1, False), (1, True), (2, True), pytest.param(2, False, marks=pytest.mark.slow)],
)
def test_as_many_rows_as_are_chosen_show_each_in_its_own_entry(groups, jit):
    rows, features = 200, 90
    config = aop.MemAOP(k=rows // 2, memory=None, groups=groups)
    x, kernel, g = map(np.array, arrays((rows, features), (features, P), (rows, P)))
    bad = np.arange(80)
    x[2 * bad, bad] = np.nan
    backward = gradients if jit else gradients.__wrapped__
    _, dw, _ = backward(config, jnp.asarray(x), jnp.asarray(kernel), None, jnp.asarray(g))
    np.testing.assert_array_equal(np.isnan(dw).all(axis=1), np.arange(features) < len(bad))
    np.testing.assert_array_equal(np.isnan(dw).any(axis=1), np.arange(features) < len(bad))


@pytest.mark.parametrize(
    ("dtype", "size"), [("float16", 2e4), ("float16", 8e3), ("float8_e4m3fn", 100.0)]
)
def test_more_rows_outgrow_a_narrow_memory_than_are_chosen(dtype, size):
    """What fits is kept; the gradient is as finite as the rows."""
    config = aop.MemAOP(ratio=0.125, memory_dtype=dtype)
    rng = np.random.default_rng(0)
    computed = "float16" if dtype == "float16" else "float32"
    x = jnp.asarray(size * rng.choice([0.9, 1, 1.1], size=(64, 8)), computed)
    memory = aop.init_memory(config, 64, 8, 4, computed)
    for _ in range(16):
        g = jnp.asarray(1e-4 * rng.normal(size=(64, 4)), computed)
        dw, memory = weight_gradient(config, x, g, memory, None)
        assert np.isfinite(dw).all()
    largest = float(jnp.finfo(dtype).max)
    kept = np.abs(np.asarray(memory.inputs, np.float32))
    assert 0.9 * largest < kept.max() <= largest
    assert memory.uses == 1
