"""Subspace memory: unbiased for any directions, and directions that follow the rows."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trained_language_model
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from one_layer import (
    M,
    N,
    P,
    exact_gradient,
    normal,
    rows_near_a_subspace,
    stepped,
    weight_gradient,
)

import mem_aop_jax as aop
from mem_aop_jax._core.projection import project
from mem_aop_jax._numerics import row_norms


def config_of(policy="priority", k=6, rank=3, **options):
    return aop.MemAOP(k=k, policy=policy, memory="subspace", rank=rank, **options)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_are_scored_by_what_lies_outside(dtype):
    """A large row inside the subspace counts less than a small one outside."""
    basis = jnp.eye(N, dtype=jnp.float32)[:, :3]
    rows = np.zeros((4, N))
    rows[0, 1], rows[1, 5], rows[2, [0, 7]], rows[3, :] = 50, 2, (30, 4), 1
    norms = jax.jit(lambda rows: project(rows, basis, None).residual_norms())
    outside = norms(jnp.asarray(rows, dtype)[None])
    wanted = np.linalg.norm(rows[:, 3:], axis=1)
    ratio = np.asarray(outside[0]) / float(row_norms(jnp.ones((1, 1)))[0])
    np.testing.assert_allclose(ratio[1:], wanted[1:], rtol=0.01)
    assert ratio[0] < ratio[1]


def test_directions_of_both_sides_find_noisy_rows_in_every_dtype():
    for dtype in map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)):
        x, g = (
            rows_near_a_subspace(M, n, 3, 0.1, seed).astype(dtype) for seed, n in enumerate((N, P))
        )
        memory = stepped(config_of(), x, g, steps=4)
        assert memory.inputs.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
        dw, _ = weight_gradient(config_of(), x, g, memory, jax.random.key(0))
        assert dw.dtype == dtype
        exact = exact_gradient(x, g)
        assert np.linalg.norm(np.asarray(dw, np.float64) - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("rank", [3, (3, 0)])
def test_mixed_dtypes(rank):
    """bfloat16 inputs and float32 cotangents: nothing in float32 is rounded."""
    x = rows_near_a_subspace(M, N, 3, 0.1, 0).astype(jnp.bfloat16)
    g = rows_near_a_subspace(M, P, 3, 0.1, 1)
    config = config_of(k=M, rank=rank)
    memory = aop.init_memory(config, M, N, P, jnp.bfloat16)

    def loss_fn(kernel):
        y = aop.dense(x, kernel, memory, config=config, key=jax.random.key(0))
        return jnp.sum(y * g)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dw = jax.jit(jax.grad(loss_fn))(jnp.zeros((N, P), jnp.float32))
    np.testing.assert_allclose(dw, exact_gradient(x, g), rtol=1e-4, atol=1e-3)


def test_the_refresh_is_a_subspace_iteration():
    """The spans of X^T X V and G^T G U, against NumPy's QR in float64."""
    x, g = rows_near_a_subspace(M, N, N, 1, 0), rows_near_a_subspace(M, P, P, 1, 1)
    memory = stepped(config_of(), x, g, steps=4)
    _, after = weight_gradient(config_of(), x, g, memory, jax.random.key(0))
    for rows, before, now in zip((x, g), memory[:2], after[:2], strict=True):
        rows, before = np.asarray(rows, np.float64), np.asarray(before, np.float64)
        wanted = np.linalg.qr(rows.T @ (rows @ before))[0]
        np.testing.assert_allclose(now @ now.T, wanted @ wanted.T, atol=5e-3)
    assert after.uses == 1


def test_a_rare_refresh_is_the_same_step_with_the_same_gradient():
    """In one of so many steps, at random, and in the first."""
    x, g = rows_near_a_subspace(M, N, 4, 0.1, 0), rows_near_a_subspace(M, P, 4, 0.1, 1)
    always, rarely = config_of(), config_of(refresh=4)
    first = aop.init_memory(rarely, M, N, P)
    key = jax.random.key(0)
    firsts = (weight_gradient(config, x, g, first, key)[1] for config in (always, rarely))
    chex.assert_trees_all_close(*firsts, rtol=1e-4, atol=1e-5)  # two programs round apart
    memory, refreshes = stepped(always, x, g, steps=2), 0
    for key in jax.random.split(jax.random.key(1), 200):
        (dw, after), (wanted, followed) = (
            weight_gradient(config, x, g, memory, key) for config in (rarely, always)
        )
        np.testing.assert_allclose(dw, wanted, rtol=1e-4, atol=1e-4)
        wanted, was_refreshed = memory, bool(jnp.any(after.inputs != memory.inputs))
        if was_refreshed:
            wanted, refreshes = followed, refreshes + 1
        chex.assert_trees_all_close(tuple(after[:2]), tuple(wanted[:2]), rtol=1e-4, atol=1e-5)
        assert after.uses == 1
    assert 30 <= refreshes <= 70  # of 50


@pytest.mark.parametrize("rank", [3, (3, 0)])
def test_devices_with_keys_of_their_own_refresh_together(rank):
    devices, config = 4, config_of(refresh=2, k=4, rank=rank)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    x, g = rows_near_a_subspace(M, N, 4, 0.1, 0), rows_near_a_subspace(M, P, 4, 0.1, 1)

    def step(x, g, memory, keys):
        return weight_gradient(config, x, g, memory, keys[0])

    sharded = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(rows, rows, everywhere, rows), out_specs=everywhere
        )
    )
    memory, refreshes = stepped(config_of(rank=rank), x, g, steps=2), 0
    wanted = stepped(config_of(rank=rank), x, g, steps=1, memory=memory)
    for key in jax.random.split(jax.random.key(0), 24):
        _, after = sharded(x, g, memory, jax.random.split(key, devices))
        unchanged = bool(jnp.all(after.inputs == memory.inputs))
        refreshes += not unchanged
        expected = memory if unchanged else wanted
        chex.assert_trees_all_close(after[:2], expected[:2], rtol=1e-3, atol=1e-4)
    assert 4 <= refreshes <= 20


def test_a_rare_refresh_needs_a_key():
    config = config_of(policy=lambda key, scores, k: None, refresh=2)
    x, g = jnp.ones((M, N), jnp.float32), jnp.ones((M, P), jnp.float32)
    with pytest.raises(ValueError, match=r"a memory with refresh=2 draws at random.*no key"):
        weight_gradient(config, x, g, aop.init_memory(config, M, N, P), None)


def test_the_directions_converge_to_the_leading_ones():
    x, g = rows_near_a_subspace(M, N, 3, 0.1, 0), rows_near_a_subspace(M, P, 3, 0.1, 1)
    memory = stepped(config_of(), x, g, steps=20)
    for rows, basis in zip((x, g), memory[:2], strict=True):
        leading = np.linalg.svd(np.asarray(rows, np.float64))[2][:3]
        np.testing.assert_allclose(basis @ basis.T, leading.T @ leading, atol=1e-3)


@pytest.mark.slow
def test_directions_of_a_trained_language_model(standard_promotion):
    """Those that followed other batches, one iteration each, are nearly as good as the batch's own.

    After 1,200 steps, with q = 16 and K = M/4: v of a layer, its mean over the layers.
    """
    trainer, params, windows = trained_language_model.after(1200)
    config = aop.MemAOP(ratio=1 / 4, policy="priority", memory="subspace")
    approx = trainer.approximate(config)
    refresh = jax.jit(jax.grad(approx, argnums=1))

    def follow(memory, batches):
        for i in batches:
            memory = refresh(params, memory, jax.random.key(i), windows(i))
        return memory

    followed = follow(approx.init(params, trainer.example), range(20))
    measured = []
    for memory in (followed, follow(followed, [300] * 20)):
        args = params, memory, jax.random.key(1), windows(300)
        layers = aop.diagnostics(approx, *args, count_flops=False).layers
        measured.append(np.mean([layer.v for layer in layers.values()]))
    print(f"v {measured[0]:.3f}, with the best directions for the batch {measured[1]:.3f}")
    assert measured[0] < 1.3 * measured[1]


def test_any_batch_size():
    config = aop.MemAOP(ratio=0.25, policy="priority", memory="subspace", rank=3)
    memory = None
    for rows in (16, 7, 33):
        x, g = rows_near_a_subspace(rows, N, 3, 0.1, 0), rows_near_a_subspace(rows, P, 3, 0.1, 1)
        memory = stepped(config, x, g, 2, memory)
    assert memory.inputs.shape == (N, 3)


# ---- a layer in training


def train(model, steps=60):
    x = rows_near_a_subspace(M, N, 3, 0.3, 0)
    y = jnp.tanh(x[:, :P])
    variables = model.init(jax.random.key(1), x)
    tx = optax.sgd(0.05)

    def loss_fn(variables, key):
        rngs = {aop.linen.RNG: key}
        return jnp.mean((model.apply(variables, x, rngs=rngs) - y) ** 2)

    state = TrainState.create(apply_fn=model.apply, params=variables, tx=tx)

    @jax.jit
    def step(state, key):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, key)
        return state.apply_gradients(grads=grads), loss

    for key in jax.random.split(jax.random.key(2), steps):
        state, loss = step(state, key)
    return state, loss


@pytest.mark.usefixtures("standard_promotion")
def test_an_unmodified_train_state():
    config = config_of()
    state, loss = train(aop.linen.Dense(P, config=config))
    _, exact = train(aop.linen.Dense(P))
    assert loss < 1.1 * exact
    memory = state.params[aop.linen.COLLECTION]["memory"]
    assert isinstance(memory, aop.Subspace)
    assert memory.uses == 1


def test_carry_memory_keeps_the_directions_of_a_layer_without_use_and_rescales_none():
    x, g = rows_near_a_subspace(M, N, 3, 1, 0), rows_near_a_subspace(M, P, 3, 1, 1)
    config = config_of()
    memory = {"a": aop.init_memory(config, M, N, P), "b": aop.init_memory(config, M, N, P)}
    tx = optax.chain(aop.carry_memory(memory, lambda count: 0.5**count), optax.sgd(0.1))
    state = tx.init(jnp.zeros(()))
    old = aop.get_memory(state)
    _, used = weight_gradient(config, x, g, old["a"], jax.random.key(0))
    unused = jax.tree.map(jnp.zeros_like, old["b"])
    _, state = tx.update(jnp.zeros(()), state, memory={"a": used, "b": unused})
    after = aop.get_memory(state)
    chex.assert_trees_all_equal(after["a"], used)
    chex.assert_trees_all_equal(after["b"], old["b"]._replace(uses=after["b"].uses))

    doubled = jax.tree.map(lambda a: 2 * a, used)
    with pytest.raises(ValueError, match=r"uses=2.0 where 1 is wanted"):
        tx.update(jnp.zeros(()), state, memory={"a": doubled, "b": unused})
    dw, _ = weight_gradient(config, x, g, doubled, jax.random.key(0))
    assert jnp.isnan(dw).all()


def test_state_shardings_and_a_first_memory_from_shapes():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*s)) for s in (["data"], []))
    kernel = jnp.zeros((N, P), jnp.float32)
    memory = aop.init_memory(config_of(), M, N, P)
    shapes = jax.eval_shape(lambda: memory)
    tx = optax.chain(aop.carry_memory({"a": shapes}), optax.adam(1e-2))
    shardings = aop.state_shardings(tx, kernel, everywhere, rows)
    assert shardings[0].memory["a"] == aop.Subspace(everywhere, everywhere, everywhere)
    state = jax.jit(tx.init, out_shardings=shardings)(kernel)
    chex.assert_trees_all_close(aop.get_memory(state)["a"], memory, atol=1e-6)


def test_one_basis_for_all_devices_under_shard_map():
    """The refresh is summed over devices: nothing larger than directions and dW travels."""
    x, g = rows_near_a_subspace(M, N, 3, 1, 0), rows_near_a_subspace(M, P, 3, 1, 1)
    one = config_of(k=M)  # all rows: no draw, so that devices and one device agree
    memory = stepped(one, x, g, steps=2)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        lambda x, g, memory, kernel, key: jax.grad(
            lambda kernel, memory: jnp.sum(
                aop.dense(x, kernel, memory, config=config_of(k=M // 4), key=key) * g
            ),
            argnums=(0, 1),
        )(kernel, memory),
        mesh=mesh,
        in_specs=(rows, rows, everywhere, everywhere, everywhere),
        out_specs=(everywhere, everywhere),
    )
    kernel, key = jnp.zeros((N, P), jnp.float32), jax.random.key(0)
    ours = jax.jit(sharded)(x, g, memory, kernel, key)
    chex.assert_trees_all_close(ours, weight_gradient(one, x, g, memory, key), rtol=1e-4, atol=1e-4)


def test_a_kernel_that_is_split_over_devices_by_its_rows():
    """Directions of the inputs are each device's own, those of the cotangents are shared."""
    x, g = rows_near_a_subspace(M, N, 3, 1, 0), rows_near_a_subspace(M, P, 3, 1, 1)
    config, key = config_of(k=M, rank=2), jax.random.key(0)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    columns, rows = PartitionSpec("data", "model"), PartitionSpec("data")
    model, everywhere = PartitionSpec("model"), PartitionSpec()
    own = aop.init_memory(config, M, N // 2, P)
    memory = own._replace(inputs=jnp.concatenate([own.inputs] * 2))
    specs = aop.Subspace(model, everywhere, everywhere)

    def gradients(x, g, memory, kernel):
        def loss_fn(kernel, memory):
            own = aop.dense(x, kernel, memory, config=config_of(k=M // 2, rank=2), key=key)
            return jnp.sum(own * g)

        return jax.grad(loss_fn, argnums=(0, 1))(kernel, memory)

    sharded = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(columns, rows, specs, model),
        out_specs=(model, specs),
    )
    dw, after = jax.jit(sharded)(x, g, memory, jnp.zeros((N, P), jnp.float32))
    np.testing.assert_allclose(dw, exact_gradient(x, g), rtol=1e-4, atol=1e-3)
    for features in (slice(N // 2), slice(N // 2, N)):
        wanted = weight_gradient(config, x[:, features], g, own, key)[1]
        ours = after._replace(inputs=after.inputs[features])
        chex.assert_trees_all_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: aop.Memory(*m), TypeError, "memory is of type Memory; with memory='subspace'"),
        (
            lambda m: m._replace(inputs=m.inputs[:, :2]),
            ValueError,
            r"32 \(12, 2\), but rank=3",
        ),
        (lambda m: m._replace(cotangents=None), ValueError, r"cotangents is None, .* \(8, 3\)"),
        (lambda m: m._replace(inputs=m.inputs.astype(jnp.bfloat16)), ValueError, "is bfloat16"),
        (lambda m: m._replace(uses=jnp.zeros(2)), ValueError, r"memory.uses has shape \(2,\)"),
    ],
)
def test_a_memory_that_does_not_fit(change, error, message):
    x, kernel = jnp.ones((M, N), jnp.float32), jnp.ones((N, P), jnp.float32)
    memory = change(aop.init_memory(config_of(), M, N, P))
    with pytest.raises(error, match=message):
        aop.dense(x, kernel, memory, config=config_of())


def test_policies_that_do_not_go_with_a_memory():
    x, g = rows_near_a_subspace(M, N, 3, 1, 0), rows_near_a_subspace(M, P, 3, 1, 1)

    def first(key, scores, k):
        return aop.Selection(jnp.arange(k))

    def weighted(key, scores, k):
        return aop.Selection(jnp.arange(k), jnp.ones(k, jnp.float32))

    for policy, kind, message in (
        (first, "subspace", "returned no weights"),
        (weighted, "rows", "returned weights"),
    ):
        config = aop.MemAOP(k=4, policy=policy, memory=kind)
        memory = aop.init_memory(config, M, N, P)
        with pytest.raises(ValueError, match=message):
            weight_gradient(config, x, g, memory, None)
    memory = aop.init_memory(config_of(), M, N, P)
    with pytest.raises(ValueError, match="policy 'priority' draws at random and got no key"):
        weight_gradient(config_of(), x, g, memory, None)


def test_a_kernel_on_the_left_runs_exact_and_says_so():
    config = config_of()
    memory = aop.init_memory(config, M, N, P)
    with pytest.warns(UserWarning, match="its kernel is the left operand"):
        aop.dot_general(
            jnp.ones((P, N), jnp.float32),
            jnp.ones((M, N), jnp.float32),
            (((1,), (1,)), ((), ())),
            memory=memory,
            config=config,
            name="on the left",
        )


@pytest.mark.parametrize("rank", [(2, 0), (2, 2)])
def test_few_features_under_an_eager_vmap(rank):
    """XLA for CPUs aborted."""
    config = aop.MemAOP(ratio=1.0, policy="priority", memory="subspace", rank=rank)
    memory, key = aop.init_memory(config, 6, 4, 2), jax.random.key(0)
    kernels, x = normal(3, 4, 2), normal(3, 6, 4, seed=1)

    def loss_fn(kernel, x):
        return jnp.sum(aop.dense(x, kernel, memory, config=config, key=key) ** 2)

    ours = jax.vmap(jax.grad(loss_fn))(kernels, x)
    wanted = [2 * x[i].T @ (x[i] @ kernels[i]) for i in range(3)]
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)
