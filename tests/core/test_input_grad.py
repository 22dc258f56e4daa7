"""The gradient of the inputs for some of the rows: unbiased, and as cheap as it says."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_subspace_memory import ROWS, M, N, P, exact_gradient, rows_near_a_subspace

import mem_aop_jax as aop
from mem_aop_jax._core.flops import flops_left_out, relative_cost
from mem_aop_jax._core.probe import Probe

SUBSPACE = aop.MemAOP(k=6, policy="priority", memory="subspace", rank=(3, 2))


def with_inputs(ratio, rank, config=SUBSPACE):
    return dataclasses.replace(config, input_grad=aop.InputGrad(ratio, rank))


def gradients(config, x, g, kernel, memory, key):
    """Of the inputs, the kernel and the memory, where the outputs have the cotangents g."""

    def loss_fn(x, kernel, memory):
        y = aop.dense(x, kernel, memory, config=config, key=key)
        return jnp.sum(y.astype(jnp.float32) * g.astype(jnp.float32))

    return jax.grad(loss_fn, argnums=(0, 1, 2))(x, kernel, memory)


@functools.cache
def step_of(config):
    return jax.jit(functools.partial(gradients, config))


@functools.cache
def draws_of(config, number):
    """`number` gradients of the inputs for one batch, with keys of their own."""

    def all_draws(x, g, kernel, memory, seed):
        keys = jax.random.split(jax.random.key(seed), number)
        return jax.vmap(lambda key: gradients(config, x, g, kernel, memory, key)[0])(keys)

    return jax.jit(all_draws)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def refreshed(config, x, g, kernel, steps=3):
    memory = aop.init_memory(config, *x.shape, g.shape[1], x.dtype)
    for key in jax.random.split(jax.random.key(9), steps):
        _, _, memory = step_of(config)(x, g, kernel, memory, key)
    return memory


def within_four_errors(sums, exact):
    """The mean of the draws is the exact gradient, and they are no exact gradients."""
    sums, exact = np.asarray(sums, np.float64), np.asarray(exact, np.float64)
    off, error = np.abs(sums.mean(axis=0) - exact), sums.std(axis=0) / len(sums) ** 0.5
    assert np.linalg.norm(off) <= 4 * np.linalg.norm(error)
    assert (off <= 5.5 * error + 1e-5 * np.abs(exact).max()).all()  # the worst of 576 entries
    assert error.max() > 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("norms", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("case", ["alone", "beside rows", "first directions", "followed"])
def test_unbiased(case, norms):
    config = {
        "alone": with_inputs(0.25, 0, aop.MemAOP(k=6, policy="priority")),
        "beside rows": with_inputs(0.1, 0, aop.MemAOP(k=6)),
    }.get(case, with_inputs(0.25, 4))
    x, kernel = normal(M, N), normal(N, P, seed=1)
    g = jnp.asarray(norms[:, None], jnp.float32) * normal(M, P, seed=2)
    memory = aop.init_memory(config, M, N, P)
    if case == "followed":
        memory = refreshed(config, x, g, kernel)
    draws = draws_of(config, 20_000)(x, g, kernel, memory, seed=3)
    within_four_errors(draws, g @ kernel.T)


def test_the_layers_below_get_an_unbiased_gradient():
    """The first kernel's, through three layers with approximate gradients of their inputs."""
    config = with_inputs(0.25, 2)
    kernels = [normal(6, 6, seed=seed) / 2 for seed in range(4)]
    x, wanted = normal(M, 6, seed=5), normal(M, 6, seed=6)

    def loss_fn(first, memories, config, key):
        y = x
        for i, (kernel, memory) in enumerate(zip([first, *kernels[1:]], memories, strict=True)):
            own = jax.random.fold_in(key, i)
            y = jnp.tanh(aop.dense(y, kernel, memory, config=config, key=own))
        return jnp.sum(jax.lax.stop_gradient(y - wanted) * y)  # linear: cotangents are exact

    exact = jax.grad(loss_fn)(kernels[0], [None] * 4, None, jax.random.key(0))
    memories = [aop.init_memory(config, M, 6, 6)] * 4
    draw = jax.vmap(lambda key: jax.grad(loss_fn)(kernels[0], memories, config, key))
    within_four_errors(jax.jit(draw)(jax.random.split(jax.random.key(1), 20_000)), exact)


@pytest.mark.parametrize(("ratio", "rank"), [(1.0, 0), (1.0, 4), (0.1, P), (0.5, 64)])
def test_all_rows_or_all_directions_are_exact(ratio, rank):
    config = with_inputs(ratio, rank)
    x, g, kernel = normal(M, N), normal(M, P, seed=1), normal(N, P, seed=2)
    memory = refreshed(config, x, g, kernel, steps=2)
    dx, _, _ = step_of(config)(x, g, kernel, memory, jax.random.key(0))
    np.testing.assert_allclose(dx, g @ kernel.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 2, 5])
@pytest.mark.parametrize("refresh", [1, 2])
def test_the_gradient_of_the_kernel_is_as_without(rank, refresh):
    """The directions are shared, and the draws are not."""
    without = dataclasses.replace(SUBSPACE, refresh=refresh)
    config = with_inputs(0.25, rank, without)
    x, g, kernel = normal(M, N), normal(M, P, seed=1), normal(N, P, seed=2)
    memories = [aop.init_memory(c, M, N, P) for c in (config, without)]
    memories[1] = memories[0]._replace(cotangents=memories[0].cotangents[:, :2])
    for key in jax.random.split(jax.random.key(0), 4):
        (_, dw, memories[0]), (_, wanted, memories[1]) = (
            step_of(c)(x, g, kernel, memory, key)
            for c, memory in zip((config, without), memories, strict=True)
        )
        np.testing.assert_allclose(dw, wanted, rtol=1e-4, atol=1e-4)
        followed = memories[0].cotangents
        assert followed.shape == (P, max(rank, 2))
        np.testing.assert_allclose(followed.T @ followed, np.eye(max(rank, 2)), atol=1e-5)
        np.testing.assert_allclose(followed[:, :2], memories[1].cotangents, atol=1e-4)


def test_the_variance_is_that_of_the_residuals():
    x, kernel = normal(M, N), normal(N, P, seed=1)
    g = rows_near_a_subspace(M, P, 3, 0.02, 2)

    def variance(config, memory):
        draws = np.asarray(draws_of(config, 1_000)(x, g, kernel, memory, seed=0))
        return ((draws - np.asarray(g @ kernel.T)) ** 2).sum((1, 2)).mean()

    alone, config = with_inputs(0.25, 0), with_inputs(0.25, 4)
    memories = [aop.init_memory(alone, M, N, P), refreshed(config, x, g, kernel)]
    assert variance(config, memories[1]) < variance(alone, memories[0]) / 100


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def test_nobody_pays_for_a_gradient_that_is_not_asked_for():
    """The first layer of a model: its directions for the inputs are not even followed.

    Only, all directions stay orthonormal.
    """
    x, kernel = normal(512, 64), normal(64, 48, seed=1)

    def step(config):
        def loss_fn(x, kernel, memory, key):
            return jnp.sum(aop.dense(x, kernel, memory, config=config, key=key) ** 2)

        memory = aop.init_memory(config, 512, 64, 48)
        grad_fn = jax.grad(loss_fn, argnums=(1, 2))
        args = x, kernel, memory, jax.random.key(0)
        return compiled(grad_fn, *args).cost_analysis()["flops"], grad_fn(*args), memory

    config = with_inputs(0.25, 16)
    (ours, (_, after), before), (wanted, *_) = map(step, (config, SUBSPACE))
    assert ours < wanted + 2 * 12 * 48 * 16**2
    new, old = after.cotangents, before.cotangents
    np.testing.assert_allclose(new.T @ new, np.eye(16), atol=1e-5)
    assert np.linalg.matrix_rank(np.concatenate([new, old], axis=1), tol=0.02) == 16 + 2


@pytest.mark.parametrize(
    "config",
    [
        with_inputs(0.25, 32, dataclasses.replace(SUBSPACE, k=256, rank=8)),
        with_inputs(0.25, 8, dataclasses.replace(SUBSPACE, k=256, rank=(4, 24), refresh=8)),
        with_inputs(0.5, 0, aop.MemAOP(k=512, policy="priority")),
    ],
)
def test_flops_and_memory_are_what_the_formula_says(config):
    rows, in_features, out_features = 2048, 384, 512
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((rows, in_features), (in_features, out_features))
    ]

    def step(config):
        def loss_fn(x, kernel, memory):
            y = aop.dense(x, kernel, memory, config=config, key=jax.random.key(0))
            return jnp.sum(y**2)

        memory = aop.init_memory(config, rows, in_features, out_features)
        return compiled(jax.grad(loss_fn, argnums=(0, 1, 2)), *args, memory)

    ours, exact = step(config), step(None)
    flops = ours.cost_analysis()["flops"]
    flops -= flops_left_out(config, rows, in_features, out_features)
    c = relative_cost(config, rows, in_features, out_features)
    assert flops / exact.cost_analysis()["flops"] == pytest.approx(c, rel=0.03)
    # beside what there is without: the gathered rows and their products, and dX in two parts
    without = step(dataclasses.replace(config, input_grad=None)).memory_analysis()
    extra = ours.memory_analysis().temp_size_in_bytes - without.temp_size_in_bytes
    drawn = config.input_rows(rows) * (in_features + 3 * out_features)
    assert extra < 4 * (drawn + rows * in_features + rows * 64)


@pytest.mark.parametrize("number", [1, 12, 13])
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_rows_that_are_not_finite_show_as_without(rank, bad, number):
    """As many as are drawn; if there are more, so that none of the others is, in all rows."""
    config = with_inputs(0.25, rank)
    x, g, kernel = normal(M, N), normal(M, P, seed=1), normal(N, P, seed=2)
    g = g.at[np.arange(0, 3 * number, 3), 3].set(bad)
    memory = aop.init_memory(config, M, N, P)
    dx, _, after = step_of(config)(x, g, kernel, memory, jax.random.key(0))
    wanted = np.isfinite(g @ kernel.T) & (number <= config.input_rows(M))
    np.testing.assert_array_equal(np.isfinite(dx), wanted)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("rank", [0, 4])
def test_too_many_rows_that_are_not_finite_show_in_their_group(rank):
    config = with_inputs(0.25, rank, dataclasses.replace(SUBSPACE, groups=2))
    x, g, kernel = normal(M, N), normal(M, P, seed=1).at[:7].set(jnp.nan), normal(N, P, seed=2)
    memory = aop.init_memory(config, M, N, P)
    dx, _, _ = gradients(config, x, g, kernel, memory, jax.random.key(0))
    finite = np.repeat([False, True], M // 2)  # 6 of each are drawn
    np.testing.assert_array_equal(np.isfinite(dx), finite[:, None] & np.ones(N, bool))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_dtypes(dtype):
    config = with_inputs(0.25, 4)
    x, kernel = (normal(*shape).astype(dtype) for shape in ((M, N), (N, P)))
    g = rows_near_a_subspace(M, P, 3, 0.05, 1).astype(dtype)
    memory = refreshed(config, x, g, kernel, steps=3)
    dx, dw, after = step_of(config)(x, g, kernel, memory, jax.random.key(0))
    assert dx.dtype == dw.dtype == dtype
    chex.assert_trees_all_equal_shapes_and_dtypes(memory, after)
    exact = exact_gradient(g.T, kernel.T)
    assert np.linalg.norm(np.asarray(dx, np.float64) - exact) < 0.1 * np.linalg.norm(exact)


def test_weights_do_not_overflow_in_float16():
    config = with_inputs(1 / M, 0, aop.MemAOP(k=6, policy="priority"))
    g = jnp.full((M, P), 6e3, jnp.float16)
    kernel = jnp.full((N, P), 1e-3, jnp.float16)
    dx, _, _ = gradients(config, jnp.ones((M, N), jnp.float16), g, kernel, None, jax.random.key(0))
    assert jnp.isfinite(dx).all()
    assert jnp.any(dx > 1e3)  # 48 and a little


@pytest.mark.parametrize("order", ["kernel", "transposed"])
def test_contractions(order):
    """Any dimensions as rows and features, in any order: with all directions, exact."""
    x, kernel = normal(3, 4, 5, 6), normal(5, 2, 6, 7, seed=1)
    numbers = ((2, 3), (0, 2)), ((), ())
    if order == "transposed":
        x, kernel = x.transpose(2, 0, 3, 1), kernel.transpose(2, 3, 0, 1)
        numbers = ((0, 2), (2, 0)), ((), ())
    config = with_inputs(0.5, 64, dataclasses.replace(SUBSPACE, k=12))
    memory = aop.init_memory(config, 12, 30, 14)

    def loss_fn(x, memory, config):
        key = jax.random.key(0)
        y = aop.dot_general(x, kernel, numbers, memory=memory, config=config, key=key)
        return jnp.sum(y**2)

    dx, wanted = jax.grad(loss_fn)(x, memory, config), jax.grad(loss_fn)(x, None, None)
    np.testing.assert_allclose(dx, wanted, rtol=1e-3, atol=1e-3)


def test_to_evaluate_and_to_measure_it_is_exact():
    x, kernel = normal(M, N), normal(N, P, seed=1)
    config = with_inputs(0.25, 4)
    memory = aop.init_memory(config, M, N, P)

    def dx(memory, key, config):
        return jax.grad(
            lambda x: jnp.sum(aop.dense(x, kernel, memory, config=config, key=key) ** 2)
        )(x)

    exact, key = dx(None, None, None), jax.random.key(0)
    for own in ((None, None), (None, key), (memory, None), (Probe.of(memory, 2), key)):
        np.testing.assert_array_equal(dx(*own, config), exact)
    assert jnp.any(dx(memory, key, config) != exact)


def test_a_batch_smaller_than_k_can_be_differentiated_by_its_inputs():
    config = with_inputs(0.5, 0, aop.MemAOP(k=6, policy="priority"))
    x, kernel, key = normal(4, N), normal(N, P, seed=1), jax.random.key(0)
    dx = jax.grad(lambda x: jnp.sum(aop.dense(x, kernel, config=config, key=key)))(x)
    np.testing.assert_allclose(dx, jnp.ones((4, P), jnp.float32) @ kernel.T, rtol=1e-4, atol=1e-5)


def test_all_rows_need_no_key():
    config = with_inputs(1.0, 0, aop.MemAOP(k=6))
    memory = aop.init_memory(config, M, N, P)
    x, g, kernel = normal(M, N), normal(M, P, seed=1), normal(N, P, seed=2)
    dx, _, _ = gradients(config, x, g, kernel, memory, None)
    np.testing.assert_allclose(dx, g @ kernel.T, rtol=1e-4, atol=1e-4)


def test_groups_draw_in_each_and_need_no_rows_of_other_devices():
    config = with_inputs(0.25, 0, aop.MemAOP(k=8, policy="priority", groups=4))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("data",), ()))
    x, g = (jax.device_put(normal(M, n, seed=n), rows) for n in (N, P))
    kernel = jax.device_put(normal(N, P), everywhere)
    step = jax.jit(
        lambda x, g, key: gradients(config, x, g, kernel, None, key)[0], out_shardings=rows
    )
    dx = step(x, g, jax.random.key(0))
    drawn = np.any(np.asarray(dx) != 0, axis=1).reshape(4, -1)
    np.testing.assert_array_equal(drawn.sum(axis=1), 3)
    text = step.lower(x, g, jax.random.key(0)).compile().as_text()
    gathered = re.findall(r"f32\[([\d,]*)\]\S* all-gather\(", text)
    assert set(gathered) <= {"4,12"}  # the scores of all rows at most


def test_shard_map_with_one_batch_for_many_kernels():
    """Tensor parallel: the inputs are the same on all devices, and their gradient is summed."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    config = with_inputs(0.5, 64)
    x, kernel = normal(M, N), normal(N, 4 * P, seed=1)
    memory = aop.init_memory(config, M, N, P)
    columns, everywhere = PartitionSpec(None, "model"), PartitionSpec()

    def step(x, kernel, memory, key):
        def loss_fn(x):
            y = aop.dense(x, kernel, memory, config=config, key=key)
            return jax.lax.psum(jnp.sum(y**2), "model")

        return jax.grad(loss_fn)(x)

    sharded = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(everywhere, columns, everywhere, everywhere),
        out_specs=everywhere,
    )
    dx = jax.jit(sharded)(x, kernel, memory, jax.random.key(0))
    np.testing.assert_allclose(dx, 2 * (x @ kernel) @ kernel.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ratio": 0}, ValueError, r"InputGrad got ratio=0; it must lie in \(0, 1\]"),
        ({"ratio": "1/4"}, TypeError, r"InputGrad got ratio='1/4'"),
        ({"rank": -1}, ValueError, r"InputGrad got rank=-1; it must be at least 0"),
        ({"rank": 2.5}, TypeError, r"InputGrad got rank=2.5; it must be an integer, at least 0"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        aop.InputGrad(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_grad": 0.25}, TypeError, r"input_grad=0.25; it must be an aop.InputGrad"),
        ({"input_grad": aop.InputGrad()}, ValueError, r"memory='rows'.*rank=0, or memory='sub"),
    ],
)
def test_bad_configurations(options, error, message):
    with pytest.raises(error, match=message):
        aop.MemAOP(k=2, **options)


def test_a_missing_key_is_an_error_where_the_kernel_is_differentiated():
    config = with_inputs(0.25, 0, aop.MemAOP(k=2))
    memory = aop.init_memory(config, M, N, P)
    with pytest.raises(ValueError, match=r"input_grad=InputGrad\(ratio=0.25, rank=0\) draws at"):
        gradients(config, normal(M, N), normal(M, P), normal(N, P), memory, None)


def test_a_memory_of_another_rank_is_an_error_that_names_it():
    memory = aop.init_memory(SUBSPACE, M, N, P)
    with pytest.raises(ValueError, match=r"input_grad=InputGrad\(ratio=0.25, rank=4\).*\(8, 4\)"):
        aop.dense(normal(M, N), normal(N, P), memory, config=with_inputs(0.25, 4))
