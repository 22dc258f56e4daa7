"""Row memory with random signs, and in slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_layer import normal, weight_gradient

import mem_aop_jax as aop

M, N, P, STEPS = 12, 5, 4, 200
SLOTS = 5  # does not divide the rows


@functools.cache
def sums_of(config, runs):
    """Of `runs` trainings on the same rows: the sum of all dW, and what still waits."""

    def run(x, g, key):
        def step(memory, batch):
            dw, memory = weight_gradient(config, *batch[:2], memory, batch[2])
            return memory, dw

        memory = aop.init_memory(config, M, N, P)
        memory, dws = jax.lax.scan(step, memory, (x, g, jax.random.split(key, len(x))))
        return dws.sum(axis=0), memory.inputs.T @ memory.cotangents

    return jax.jit(jax.vmap(run, in_axes=(None, None, 0)))


@pytest.mark.parametrize(
    ("policy", "slots"),
    [
        ("topk", None),
        ("randk", SLOTS),
        pytest.param("topk", SLOTS, marks=pytest.mark.slow),
        pytest.param("randk", None, marks=pytest.mark.slow),
    ],
)
def test_with_signs_the_sum_over_many_steps_is_unbiased(policy, slots):
    """Rows with a mean, so that cross terms would add up."""
    x, g = normal(STEPS, M, N, seed=0, mean=0.5), normal(STEPS, M, P, seed=1, mean=0.5)
    exact = np.einsum("tmn,tmp->np", x, g)

    def off(signed, runs):
        """In standard errors, entry by entry in aggregate."""
        config = aop.MemAOP(k=3, policy=policy, memory="rows", memory_slots=slots, signed=signed)
        computed, waiting = sums_of(config, runs)(x, g, jax.random.split(jax.random.key(0), runs))
        sums = np.asarray(computed + waiting, np.float64)
        return np.linalg.norm(sums.mean(axis=0) - exact), np.linalg.norm(
            sums.std(axis=0, ddof=1) / runs**0.5
        )

    distance, error = off(True, 200)
    assert distance <= 4 * error
    assert error < 0.05 * np.linalg.norm(exact)  # so that a bias would show
    distance, error = off(False, 20)
    assert distance > max(4 * error, 0.2 * np.linalg.norm(exact))


@pytest.mark.parametrize(
    ("groups", "rows", "signed"),
    [
        *((*sizes, True) for sizes in ((1, M - 3), (1, 2), (2, M))),
        (1, M, False),
        *(pytest.param(*sizes, True, marks=pytest.mark.slow) for sizes in ((1, M), (2, 2))),
        *(
            pytest.param(*sizes, False, marks=pytest.mark.slow)
            for sizes in ((1, M - 3), (1, 2), (2, M), (2, 2))
        ),
    ],
)
def test_slots_follow_a_numpy_loop_at_any_batch_size(signed, groups, rows):
    """Candidates are the rows, then the slots; row m waits in slot m mod slots of its group."""
    group_rows, slots = rows // groups, 3
    config = aop.MemAOP(
        k=groups, groups=groups, memory_slots=slots * groups, signed=signed, decay=0.25
    )
    memory = aop.init_memory(config, rows, N, P)
    kept = [np.zeros((groups, slots, n)) for n in (N, P)]
    for step in range(4):
        key = jax.random.key(step)
        x, g = normal(rows, N, seed=2 * step), normal(rows, P, seed=2 * step + 1)
        dw, memory = weight_gradient(config, x, g, memory, key)
        signs = np.ones((groups, group_rows))
        if signed:
            key = jax.random.fold_in(key, 2**31)
            signs = np.asarray(jax.random.rademacher(key, signs.shape, jnp.float32))
        wanted = 0
        for group in range(groups):
            candidates = [
                np.concatenate([fresh.reshape(groups, group_rows, -1)[group], slot[group]])
                for fresh, slot in zip((x, g), kept, strict=True)
            ]
            scores = np.prod([np.linalg.norm(side, axis=1) for side in candidates], axis=0)
            best = scores.argmax()
            wanted += np.outer(*(side[best] for side in candidates))
            for side, slot in zip(candidates, kept, strict=True):
                side[best] = 0
                slot[group] = 0.5 * side[group_rows:]
                for m in range(group_rows):
                    slot[group, m % slots] += 0.5 * signs[group, m] * side[m]
        np.testing.assert_allclose(dw, wanted, rtol=1e-4, atol=1e-5)
        for ours, side in zip(memory[:2], kept, strict=True):
            np.testing.assert_allclose(ours, side.reshape(ours.shape), rtol=1e-4, atol=1e-5)


def test_signs_change_nothing_but_the_sign_of_what_waits():
    x, g, key = normal(M, N), normal(M, P, seed=1), jax.random.key(0)
    plain, signed = aop.MemAOP(k=3), aop.MemAOP(k=3, signed=True)
    memory = aop.init_memory(plain, M, N, P)
    dw, after = weight_gradient(plain, x, g, memory, None)
    signed_dw, signed_after = weight_gradient(signed, x, g, memory, key)
    np.testing.assert_array_equal(dw, signed_dw)
    products = [np.einsum("mn,mp->mnp", *sides[:2]) for sides in (after, signed_after)]
    np.testing.assert_array_equal(*products)
    waits = np.asarray(after.inputs[:, 0]) != 0
    signs = np.asarray(signed_after.inputs[:, 0])[waits] / np.asarray(after.inputs[:, 0])[waits]
    assert set(signs) == {1, -1}


def test_a_slot_that_outgrows_float16_shows_in_the_next_gradient_and_is_emptied():
    config = aop.MemAOP(k=1, memory_slots=1)
    x, g = jnp.full((M, N), 3e4, jnp.float16), jnp.full((M, P), 1e-4, jnp.float16)
    _, memory = weight_gradient(config, x, g, aop.init_memory(config, M, N, P, jnp.float16), None)
    assert np.isinf(memory.inputs).all()
    small = jnp.ones((M, N), jnp.float16)
    dw, memory = weight_gradient(config, small, g, memory, None)
    assert np.isinf(dw).all()
    assert np.isfinite(memory.inputs).all()


def test_slots_of_a_device_are_a_share_of_all():
    """And each device selects from its rows and its slots."""
    devices, config = 4, aop.MemAOP(ratio=0.25, memory_slots=8)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    specs = aop.Memory(rows, rows, everywhere)
    x, g = normal(4 * M, N), normal(4 * M, P, seed=1)
    memory = aop.Memory(normal(8, N, seed=2), normal(8, P, seed=3), jnp.ones((), jnp.float32))
    step = functools.partial(weight_gradient, config, key=None)
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(rows, rows, specs), out_specs=(everywhere, specs)
    )
    dw, after = jax.jit(sharded)(x, g, memory)
    shares = [
        jax.tree.map(lambda a, i=i: a.reshape(devices, -1, a.shape[-1])[i], (x, g, *memory[:2]))
        for i in range(devices)
    ]
    wanted = [
        step(x, g, aop.Memory(inputs, cotangents, memory.uses))
        for x, g, inputs, cotangents in shares
    ]
    np.testing.assert_allclose(dw, sum(own for own, _ in wanted), rtol=1e-4, atol=1e-4)
    for i, side in enumerate(after[:2]):
        together = np.concatenate([own[i] for _, own in wanted])
        np.testing.assert_allclose(side, together, rtol=1e-4, atol=1e-5)


def test_the_memory_of_slots_has_no_size_of_the_batch():
    config = aop.MemAOP(ratio=0.25, memory_slots=SLOTS)
    shapes = {rows: aop.init_memory(config, rows, N, P).inputs.shape for rows in (8, 400)}
    assert set(shapes.values()) == {(SLOTS, N)}


@pytest.mark.parametrize("given", [SLOTS + 1, 2 * SLOTS, M])
def test_another_number_of_slots(given):
    config = aop.MemAOP(k=3, memory_slots=SLOTS)
    memory = aop.init_memory(aop.MemAOP(k=3, memory_slots=given), M, N, P)
    with pytest.raises(ValueError, match=rf"\({given}, 5\).*needs \(5, 5\).*number of slots"):
        weight_gradient(config, normal(M, N), normal(M, P), memory, None)


@pytest.mark.parametrize("slots", [None, SLOTS])
def test_signs_need_a_key(slots):
    config = aop.MemAOP(k=3, signed=True, memory_slots=slots)
    with pytest.raises(ValueError, match=r"dense: a memory with signed=True draws.*no key"):
        weight_gradient(config, normal(M, N), normal(M, P), aop.init_memory(config, M, N, P), None)


def test_a_policy_may_count_from_the_end():
    """The last candidate is the last slot, in the product as in the memory."""
    x, g = normal(M, N), normal(M, P, seed=1)
    memory = aop.Memory(normal(SLOTS, N, seed=2), normal(SLOTS, P, seed=3), jnp.ones((), "f4"))
    results = []
    for last in (-1, M + SLOTS - 1):
        config = aop.MemAOP(
            k=1, memory_slots=SLOTS, policy=lambda key, s, k, i=last: aop.Selection(jnp.array([i]))
        )
        results.append(weight_gradient(config, x, g, memory, None))
    dw, after = results[0]
    jax.tree.map(np.testing.assert_array_equal, results[0], results[1])
    np.testing.assert_allclose(dw, np.outer(memory.inputs[-1], memory.cotangents[-1]), rtol=1e-6)
    np.testing.assert_allclose(after.inputs[-1], x[SLOTS - 1] + x[2 * SLOTS - 1], rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_a_schedule_hides_no_slot_that_outgrew_float16():
    config, kernel = aop.MemAOP(k=1, memory_slots=1), jnp.zeros((N, P), jnp.float16)
    x, g = jnp.full((M, N), 3e4, jnp.float16), jnp.full((M, P), 1e-4, jnp.float16)
    memory = aop.init_memory(config, M, N, P, jnp.float16)
    tx = aop.mem_aop_sgd(optax.linear_schedule(0.1, 0.01, 10), memory)
    state = tx.init(kernel)
    dw, memory = weight_gradient(config, x, g, memory, None)
    _, state = tx.update(dw, state, kernel, memory=memory)
    dw, _ = weight_gradient(config, jnp.ones_like(x), g, aop.get_memory(state), None)
    assert np.isinf(dw).all()
