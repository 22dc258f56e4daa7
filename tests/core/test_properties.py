"""What holds for every configuration: a list of configurations times a list of properties.

All properties have one shape, and share two compiled programs for each configuration: `gradients`,
and `draws`, which is many of them.
"""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import M, N, P, assert_unbiased, exact_gradient, gradients, rows_near_a_subspace

import mem_aop_jax as aop

K = 8
PAPER, UNBIASED = ("topk", "weightedk", "randk"), ("priority", "crs", "uniform")
SUBSPACE = aop.MemAOP(k=K, policy="priority", memory="subspace", rank=(3, 2))


def with_inputs(config, ratio, rank):
    return dataclasses.replace(config, input_grad=aop.InputGrad(ratio, rank))


CONFIGS = {
    **{policy: aop.MemAOP(k=K, policy=policy, memory=None) for policy in PAPER + UNBIASED},
    **{f"{policy}, rows": aop.MemAOP(k=K, policy=policy) for policy in PAPER},
    **{f"{policy}, subspace": dataclasses.replace(SUBSPACE, policy=policy) for policy in UNBIASED},
    "slots": aop.MemAOP(k=K, memory_slots=5),  # do not divide the rows
    "signed slots": aop.MemAOP(k=K, memory_slots=5, signed=True),
    "one-sided": dataclasses.replace(SUBSPACE, rank=(3, 0)),
    "all directions": dataclasses.replace(SUBSPACE, rank=64),
    "refresh": dataclasses.replace(SUBSPACE, refresh=2),
    "groups": aop.MemAOP(k=K, memory=None, groups=2),
    "groups, rows": aop.MemAOP(k=K, groups=2),
    "groups, subspace": dataclasses.replace(SUBSPACE, groups=2),
    "inputs": with_inputs(aop.MemAOP(k=K, policy="priority"), 0.25, 0),
    "inputs, rows": with_inputs(aop.MemAOP(k=K), 0.1, 0),
    "inputs, subspace": with_inputs(SUBSPACE, 0.25, 4),
    "inputs, all directions": with_inputs(SUBSPACE, 0.1, 32),
    "inputs, groups": with_inputs(dataclasses.replace(SUBSPACE, groups=2), 0.25, 4),
}
SLOW_CONFIGS = {  # their parts are in the others
    "inputs, subspace for the kernel": with_inputs(SUBSPACE, 0.25, 0),
    "groups, slots": aop.MemAOP(k=K, memory_slots=10, groups=2),
    "signed": aop.MemAOP(k=K, signed=True),
    "decay": aop.MemAOP(k=K, decay=0.25),
    **{
        f"{policy}, groups": aop.MemAOP(k=K, policy=policy, memory=None, groups=2)
        for policy in ("weightedk", "randk", *UNBIASED)
    },
    **{
        f"{policy}, groups, rows": aop.MemAOP(k=K, policy=policy, groups=2)
        for policy in ("weightedk", "randk")
    },
    "subspace, more for the cotangents": dataclasses.replace(SUBSPACE, rank=(2, 5)),
    "one-sided, more directions": dataclasses.replace(SUBSPACE, rank=(4, 0)),
    "inputs, groups, subspace for the kernel": with_inputs(
        dataclasses.replace(SUBSPACE, groups=2), 0.25, 0
    ),
}


def for_each(configs=CONFIGS, slow=SLOW_CONFIGS):
    """Parametrizes a test by configurations, those of `slow` with that marker."""
    params = [pytest.param(config, id=name) for name, config in configs.items()]
    params += [
        pytest.param(config, id=name, marks=pytest.mark.slow)
        for name, config in slow.items()
        if name not in configs
    ]
    return pytest.mark.parametrize("config", params)


def only(condition, configs=CONFIGS):
    return {name: config for name, config in configs.items() if condition(config)}


def batch(number=0, dtype="float32"):
    """X, W and G, as NumPy has them."""
    shapes = (M, N), (N, P), (M, P)
    return [
        np.random.default_rng(3 * number + i).normal(size=shape).astype(dtype)
        for i, shape in enumerate(shapes)
    ]


def first_memory(config, dtype="float32"):
    return aop.init_memory(config, M, N, P, dtype)


def has_memory(config):
    return first_memory(config) is not None


def is_kept(config):
    """Whether each row has its own place in the memory."""
    return isinstance(first_memory(config), aop.Memory) and config.memory_slots is None


def shows_all_rows(config):
    """Whether the gradient has a part that is computed for all rows, from both sides."""
    memory = first_memory(config)
    return isinstance(memory, aop.Subspace) and config.rank not in ((3, 0), (4, 0))


def is_finite(memory):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(memory))


def waiting_rows(memory):
    return np.any(np.asarray(memory.inputs) != 0, axis=1)


def finite_entries(x, kernel, g):
    """Where the exact gradients of the inputs and of the kernel are finite."""
    with np.errstate(invalid="ignore"):
        return np.isfinite(g @ kernel.T), np.isfinite(exact_gradient(x, g))


@for_each()
def test_rows_that_are_not_finite_show_as_in_the_exact_layer_and_enter_no_memory(config):
    """And no other entry does: they are chosen before all others."""
    x, kernel, g = batch()
    step = functools.partial(gradients, config)
    _, _, memory = step(x, kernel, first_memory(config), g, jax.random.key(0))
    bad_values, sides = (np.nan, np.inf, -np.inf), ("inputs", "cotangents", "both")
    for number, (bad, side) in enumerate(itertools.product(bad_values, sides), 1):
        before = memory
        bad_x, _, bad_g = batch(number)
        bad_x[0], bad_g[0] = 1e3 * bad_x[0], 1e3 * bad_g[0]  # would be chosen by its score
        bad_x[1, 2] = bad if side != "cotangents" else 0
        bad_g[M - 2, 0] = bad if side != "inputs" else 0
        dx, dw, memory = step(bad_x, kernel, memory, bad_g, jax.random.key(number))
        for ours, finite in zip((dx, dw), finite_entries(bad_x, kernel, bad_g), strict=True):
            np.testing.assert_array_equal(np.isfinite(ours), finite, f"{bad} {side}")
        assert is_finite(memory)
        if is_kept(config):
            waiting = waiting_rows(memory)
            assert waiting.sum() == M - K
            assert side == "cotangents" or not waiting[1]
            assert side == "inputs" or not waiting[M - 2]
        if isinstance(memory, aop.Subspace):  # rows that are not finite change no direction
            unchanged = {"inputs": (0,), "cotangents": (1,), "both": (0, 1)}[side]
            for i in unchanged:
                chex.assert_trees_all_equal(memory[i], before[i])
        *clean, memory = step(x, kernel, memory, g, jax.random.key(100 + number))
        assert is_finite((clean, memory))


@for_each()
def test_more_rows_that_are_not_finite_than_are_chosen_show_everywhere(config):
    """In the kernel's gradient, unless all rows show anyway; of the inputs', in their group."""
    x, kernel, g = batch()
    step = functools.partial(gradients, config)
    chosen = K // config.groups
    drawn = config.input_grad and config.input_rows(M) // config.groups
    for bad in (np.nan, np.inf):
        _, _, memory = step(x, kernel, first_memory(config), g, jax.random.key(0))
        for number in (chosen, chosen + 1):
            bad_x = x.copy()
            bad_x[:number, 2] = bad
            dx, dw, after = step(bad_x, kernel, memory, g, jax.random.key(1))
            finite = finite_entries(bad_x, kernel, g)[1]
            finite &= number <= chosen or shows_all_rows(config)
            np.testing.assert_array_equal(np.isfinite(dw), finite)
            assert np.isfinite(dx).all()
            assert is_finite(after)
            assert not is_kept(config) or not waiting_rows(after)[:number].any()
            *clean, after = step(x, kernel, after, g, jax.random.key(2))
            assert is_finite((clean, after))
        for number in (1, drawn, drawn + 1) if drawn else ():
            bad_g = g.copy()
            bad_g[:number, 3] = bad
            dx, _, after = step(x, kernel, memory, bad_g, jax.random.key(1))
            finite = finite_entries(x, kernel, bad_g)[0]
            finite[: M // config.groups] &= number <= drawn
            np.testing.assert_array_equal(np.isfinite(dx), finite)
            assert is_finite(after)


def first_rows(key, scores, k):
    return aop.Selection(jnp.arange(k))


@for_each(
    {
        f"{memory}, groups={groups}": aop.MemAOP(
            k=K, policy=first_rows, memory=memory, groups=groups
        )
        for memory in ("rows", None)
        for groups in (1, 2)
    },
    slow={},
)
def test_a_row_that_is_not_finite_and_left_out_shows_everywhere(config):
    """By a policy of one's own."""
    x, kernel, g = batch()
    bad_x = x.copy()
    bad_x[M - 1, 2] = np.nan
    _, dw, memory = gradients(config, bad_x, kernel, first_memory(config), g)
    assert np.isnan(dw).all()
    if memory is not None:
        assert is_finite(memory)
        assert not waiting_rows(memory)[M - 1]
        assert np.isfinite(gradients(config, x, kernel, memory, g)[1]).all()


@for_each(only(has_memory), slow=only(has_memory, SLOW_CONFIGS))
def test_a_memory_that_was_added_up_poisons_the_gradient(config):
    x, kernel, g = batch()
    memory = first_memory(config)
    for uses in (2.0, 0.5, np.nan):
        used = memory._replace(uses=np.float32(uses))
        assert np.isnan(gradients(config, x, kernel, used, g, jax.random.key(0))[1]).all()


EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def check_all_rows(config, dtype="float32", lead=(4, M // 4)):
    """At k = rows the gradient is exact and no row is left for the memory."""
    x, kernel, g = batch(dtype=dtype)
    x, g = x.reshape(*lead, N), g.reshape(*lead, P)
    memory = first_memory(config, dtype)
    for key in jax.random.split(jax.random.key(0), 2):
        before = memory
        dx, dw, memory = gradients(config, x, kernel, memory, g, key)
        assert (dx.shape, dw.shape, dx.dtype, dw.dtype) == (x.shape, kernel.shape, dtype, dtype)
        exact_dx, *_ = gradients(None, x, kernel, None, g)
        if config.input_grad is None:
            np.testing.assert_array_equal(dx, exact_dx)
        else:
            np.testing.assert_allclose(dx, exact_dx, rtol=1e-4, atol=1e-4)
        flat_x, flat_g = x.reshape(M, N), g.reshape(M, P)
        error = np.abs(np.asarray(dw, np.float64) - exact_gradient(flat_x, flat_g))
        rounding_bound = exact_gradient(np.abs(flat_x), np.abs(flat_g))
        if isinstance(memory, aop.Subspace):
            np.testing.assert_allclose(dw, exact_gradient(flat_x, flat_g), rtol=1e-4, atol=1e-3)
        else:
            assert (error <= 4 * EPS[dtype] * rounding_bound).all()
        if isinstance(memory, aop.Memory):
            assert not np.any(memory.inputs)
            assert not np.any(memory.cotangents)
        chex.assert_trees_all_equal_shapes_and_dtypes(memory, before)
        assert memory is None or memory.uses == 1


def all_rows(config):
    inputs = config.input_grad and dataclasses.replace(config.input_grad, ratio=1.0)
    return dataclasses.replace(config, k=M, input_grad=inputs)


ALL_ROWS = {
    name: config
    for name, config in CONFIGS.items()
    if name.partition(", ")[0] in PAPER
    or name.endswith(", subspace")
    or name in ("signed slots", "one-sided", "all directions", "inputs")
}


@for_each(ALL_ROWS, slow=CONFIGS | SLOW_CONFIGS)
def test_all_rows_are_the_exact_gradient(config):
    check_all_rows(all_rows(config))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
@for_each({"topk, rows": CONFIGS["topk, rows"]}, slow=only(lambda c: c.memory_kind != "subspace"))
def test_all_rows_are_the_exact_gradient_in_every_dtype(config, dtype):
    check_all_rows(all_rows(config), dtype)


@pytest.mark.slow
@for_each()
def test_all_rows_of_a_batch_with_two_dimensions(config):
    check_all_rows(all_rows(config), lead=(M,))


@for_each(
    {
        "for the kernel": CONFIGS["all directions"],
        "for the inputs": CONFIGS["inputs, all directions"],
    },
    slow={"for the inputs, as many": with_inputs(SUBSPACE, 0.1, P)},
)
def test_all_directions_are_exact_whatever_rows_are_chosen(config):
    x, kernel, g = batch()
    memory = first_memory(config)
    for key in jax.random.split(jax.random.key(0), 3):
        dx, dw, memory = gradients(config, x, kernel, memory, g, key)
        np.testing.assert_allclose(dx, g @ kernel.T, rtol=1e-4, atol=1e-4)
        if config.input_grad is None:
            np.testing.assert_allclose(dw, exact_gradient(x, g), rtol=1e-4, atol=1e-3)


@for_each()
def test_the_next_memory_is_like_the_last_and_exact_input_gradients_stay_exact(config):
    x, kernel, g = batch()
    memory = first_memory(config)
    exact_dx, *_ = gradients(None, x, kernel, None, g)
    for key in jax.random.split(jax.random.key(0), 3):
        before = memory
        dx, dw, memory = gradients(config, x, kernel, memory, g, key)
        chex.assert_trees_all_equal_shapes_and_dtypes((dx, dw, memory), (x, kernel, before))
        assert memory is None or memory.uses == 1
        if config.input_grad is None:
            np.testing.assert_array_equal(dx, exact_dx)
        elif config.input_grad.rank < P:
            assert np.any(dx != exact_dx)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@for_each(
    {"inputs, subspace": CONFIGS["inputs, subspace"]},
    slow=only(shows_all_rows),
)
def test_directions_serve_in_every_dtype(config, dtype):
    """After some steps the gradients are near the exact ones, in the dtype of the arrays."""
    _, kernel, _ = batch(dtype=dtype)
    x = rows_near_a_subspace(M, N, 3, 0.1, 0).astype(dtype)
    g = rows_near_a_subspace(M, P, 2, 0.05, 1).astype(dtype)
    memory = first_memory(config, dtype)
    for key in jax.random.split(jax.random.key(0), 5):
        before = memory
        dx, dw, memory = gradients(config, x, kernel, memory, g, key)
        chex.assert_trees_all_equal_shapes_and_dtypes((dx, dw, memory), (x, kernel, before))
    assert memory.inputs.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    exact = exact_gradient(x, g)
    assert np.linalg.norm(np.asarray(dw, np.float64) - exact) < 0.05 * np.linalg.norm(exact)
    exact = exact_gradient(g.T, kernel.T)
    assert np.linalg.norm(np.asarray(dx, np.float64) - exact) < 0.1 * np.linalg.norm(exact)


@for_each(
    {name: CONFIGS[name] for policy in UNBIASED for name in (policy, f"{policy}, subspace")},
    slow=only(lambda config: config.policy in UNBIASED),
)
def test_weights_do_not_overflow_in_float16(config):
    """They are 6 and more; nor does it where they are applied to a sum of rows."""
    x, kernel, g = np.full((M, N), 0.01), np.full((N, P), 0.01), np.full((M, P), 2.4e4)
    key, dws = jax.random.key(0), {}
    for dtype in ("float16", "float32"):  # the same rows are drawn
        arrays = [np.asarray(a, np.float16).astype(dtype) for a in (x, kernel, g)]
        memory = first_memory(config, dtype)
        _, dws[dtype], _ = gradients(config, *arrays[:2], memory, arrays[2], key)
    assert np.isfinite(dws["float16"]).all()
    np.testing.assert_allclose(dws["float16"], dws["float32"], rtol=0.02)


# ---- many draws

ROWS = {"uniform": np.ones(M), "heavy tails": np.arange(1, M + 1) ** -1.5}
ROWS["one dominant"] = np.array([300.0] + [1.0] * (M - 1))
DRAWS = 20_000


@functools.partial(jax.jit, static_argnums=0)
def draws(config, x, kernel, memory, g, seed):
    """Many gradients for one batch, with keys of their own: of the inputs or None; the kernel."""

    def draw(key):
        dx, dw, _ = gradients(config, x, kernel, memory, g, key)
        return (dx if config.input_grad else None), dw

    return jax.vmap(draw)(jax.random.split(jax.random.key(seed), DRAWS))


def followed(config, x, kernel, g, steps=3):
    """The memory after some steps with this batch."""
    memory = first_memory(config)
    for key in jax.random.split(jax.random.key(9), steps):
        _, _, memory = gradients(config, x, kernel, memory, g, key)
    return memory


UNBIASED_CONFIGS = {
    name: CONFIGS[name]
    for name in [f"{policy}, subspace" for policy in UNBIASED]
    + ["one-sided", "inputs", "inputs, rows", "inputs, subspace"]
}


@for_each(
    UNBIASED_CONFIGS,
    slow={
        **{
            name: config
            for name, config in (CONFIGS | SLOW_CONFIGS).items()
            if (config.input_grad or config.policy in UNBIASED) and "all directions" not in name
        },
        **{
            f"{policy}, {name}": dataclasses.replace(SUBSPACE, policy=policy, **options)
            for policy in UNBIASED
            for name, options in {
                "one-sided": {"rank": (3, 0)},
                "k=2": {"k": 2},
                "k=M-1": {"k": M - 1},
            }.items()
        },
    },
)
@pytest.mark.parametrize(
    "steps", [3, pytest.param(0, marks=pytest.mark.slow)], ids=["followed", "first directions"]
)
def test_unbiased(config, steps):
    """Whatever the rows and the directions are, whether these followed the rows or not."""
    _, kernel, _ = batch()
    for norms in ROWS.values():
        rng = np.random.default_rng(0)
        x, g = np.float32(rng.normal(size=(M, N))), np.float32(1 + rng.normal(size=(M, P)))
        scaled = g if config.input_grad else x  # what the rows are drawn by
        scaled *= np.float32(norms[:, None])
        memory = followed(config, x, kernel, g, steps)
        dx, dw = draws(config, x, kernel, memory, g, 1)
        if config.input_grad:
            assert_unbiased(dx, np.float64(g) @ kernel.T)
        if config.policy in UNBIASED:
            assert_unbiased(dw, exact_gradient(x, g))


def test_unbiased_for_the_first_directions():
    """Which follow no rows yet."""
    test_unbiased(CONFIGS["inputs, subspace"], steps=0)


def variances(config, x, kernel, g, steps=0):
    """Of the gradients of the inputs, unless they are exact, and of the kernel."""
    memory = followed(config, x, kernel, g, steps)
    estimates = draws(config, x, kernel, memory, g, 0)
    exact_gradients = np.float64(g) @ kernel.T, exact_gradient(x, g)
    return [
        None if estimate is None else ((np.asarray(estimate) - exact) ** 2).sum((1, 2)).mean()
        for estimate, exact in zip(estimates, exact_gradients, strict=True)
    ]


def test_the_variance_is_that_of_the_residuals():
    _, kernel, _ = batch()
    x, g = (rows_near_a_subspace(M, n, 2, 0.02, n) for n in (N, P))
    sampled_dx, sampled_dw = variances(CONFIGS["inputs"], x, kernel, g)
    for name in ("priority, subspace", "one-sided", "inputs, subspace"):
        dx, dw = variances(CONFIGS[name], x, kernel, g, steps=3)
        assert dw < sampled_dw / 100, name
        assert dx is None or dx < sampled_dx / 100


# ---- approximate gradients of the inputs beside the kernel's


@for_each(
    only(lambda config: config.input_grad),
    slow={
        f"rank={rank}, refresh={refresh}": with_inputs(
            dataclasses.replace(SUBSPACE, refresh=refresh), 0.25, rank
        )
        for rank in (0, 2, 5)
        for refresh in (1, 2)
    },
)
def test_the_gradient_of_the_kernel_is_as_without_that_of_the_inputs(config):
    """The directions are shared, and the draws are not."""
    x, kernel, g = batch()
    without = dataclasses.replace(config, input_grad=None)
    memory = first_memory(config)
    memory_without = first_memory(without)
    subspace = isinstance(memory, aop.Subspace)
    if subspace:
        memory_without = memory._replace(cotangents=memory.cotangents[:, :2])
    for key in jax.random.split(jax.random.key(0), 4):
        _, dw, memory = gradients(config, x, kernel, memory, g, key)
        _, wanted, memory_without = gradients(without, x, kernel, memory_without, g, key)
        np.testing.assert_allclose(dw, wanted, rtol=1e-4, atol=1e-4)
        if subspace:
            basis, rank = np.asarray(memory.cotangents), max(2, min(P, config.input_grad.rank))
            assert basis.shape == (P, rank)
            np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-5)
            np.testing.assert_allclose(basis[:, :2], memory_without.cotangents, atol=1e-4)
        else:
            chex.assert_trees_all_equal(memory, memory_without)
