"""The memory in the optimizer state."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import mem_aop_jax as aop

pytestmark = pytest.mark.usefixtures("standard_promotion")

M, N, P = 8, 4, 3
CONFIG = aop.MemAOP(k=2)


def setup(dtype=jnp.float32, config=CONFIG):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((M, N), (N, P)))
    return x, kernel, aop.init_memory(config, M, N, P, dtype)


@functools.partial(jax.jit, static_argnums=0)
def gradients(config, kernel, memory, x):
    """dW and the next memory of a layer whose inputs have a gradient, too."""

    def loss_fn(kernel, memory):
        inputs = x + kernel[None, :, 0]
        y = aop.dense(inputs, kernel, memory, config=config, key=jax.random.key(1))
        return jnp.mean(y**2)

    return jax.grad(loss_fn, argnums=(0, 1))(kernel, memory)


def make_step(tx, config=CONFIG):
    def step(params, opt_state, x):
        grads, memory = gradients(config, params, aop.get_memory(opt_state), x)
        updates, opt_state = tx.update(grads, opt_state, params, memory=memory)
        return optax.apply_updates(params, updates), opt_state

    return step


MEMORIES = {
    "rows": {},
    "bfloat16 rows": {"memory_dtype": "bfloat16"},
    "float32 rows": {"memory_dtype": "float32"},
    "signed slots": {"signed": True, "memory_slots": 3},
    "subspace": {"policy": "priority", "memory": "subspace", "rank": 2},
    "inputs": {
        "policy": "priority",
        "memory": "subspace",
        "rank": 1,
        "input_grad": aop.InputGrad(ratio=0.5, rank=2),
    },
}


DECAYING = optax.linear_schedule(0.1, 0.01, 50)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("dtype", "schedule", "names"),
    [
        ("float32", None, ["rows"]),
        ("bfloat16", DECAYING, ["float32 rows", "signed slots", "inputs"]),
        slow("bfloat16", DECAYING, list(MEMORIES)),
        slow("float32", None, list(MEMORIES)),
        slow("float32", DECAYING, list(MEMORIES)),
        slow("float16", DECAYING, list(MEMORIES)),
    ],
    ids=lambda parameter: "-".join(parameter) if isinstance(parameter, list) else None,
)
def test_a_training_step_compiles_once(dtype, schedule, names):
    """A step updates a layer for each kind of memory; over 100 steps no dtype changes."""
    configs = {name: aop.MemAOP(k=2, **MEMORIES[name]) for name in names}
    x, kernel, _ = setup(dtype)
    kernels = dict.fromkeys(configs, kernel)
    memory = {name: aop.init_memory(config, M, N, P, dtype) for name, config in configs.items()}
    rate = 0.01 if schedule is None else schedule
    tx = optax.chain(aop.carry_memory(memory, rate), optax.sgd(rate, momentum=0.9))
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(kernels, opt_state, x):
        traces.append(1)
        memory = aop.get_memory(opt_state)
        pairs = {
            name: gradients(config, kernels[name], memory[name], x)
            for name, config in configs.items()
        }
        grads, memory = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
        updates, opt_state = tx.update(grads, opt_state, kernels, memory=memory)
        return optax.apply_updates(kernels, updates), opt_state

    state = tx.init(kernels)
    kernels = jax.tree.map(jnp.copy, kernels)
    for _ in range(100):
        kernels, state = step(kernels, state, x)
    assert len(traces) == 1
    assert all(kernel.dtype == dtype for kernel in kernels.values())
    chex.assert_trees_all_equal_shapes_and_dtypes(aop.get_memory(state), memory)


@pytest.mark.parametrize("memory_dtype", [None, "bfloat16"])
def test_a_donated_state_holds_the_memory_once(memory_dtype):
    m, n, p = 512, 256, 128
    config = aop.MemAOP(k=64, memory_dtype=memory_dtype)
    memory = aop.init_memory(config, m, n, p)
    tx = optax.chain(aop.carry_memory(memory), optax.adam(1e-3))
    step = make_step(tx, config)
    kernel = jax.ShapeDtypeStruct((n, p), jnp.float32)
    x = jax.ShapeDtypeStruct((m, n), jnp.float32)
    state = jax.eval_shape(tx.init, kernel)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(kernel, state, x).compile()
    donated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((kernel, state)))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory))
    assert donated > held
    assert compiled.memory_analysis().alias_size_in_bytes >= donated


def test_init_starts_from_the_given_memory_without_a_copy():
    _, kernel, memory = setup()
    state = aop.carry_memory(memory).init(kernel)
    pointer = memory.inputs.unsafe_buffer_pointer()
    assert aop.get_memory(state).inputs.unsafe_buffer_pointer() == pointer


def test_a_memory_that_was_donated_is_named():
    _, kernel, memory = setup()
    tx = aop.carry_memory(memory)
    jax.jit(lambda memory: jax.tree.map(jnp.negative, memory), donate_argnums=0)(memory)
    with pytest.raises(ValueError, match=r"was donated .* aop.init_memory"):
        tx.init(kernel)


@pytest.mark.parametrize("jit", [False, True])
def test_a_layer_out_of_use_for_a_step_keeps_its_memory(jit):
    x, kernel, _ = setup()
    kernels = {"a": kernel, "b": kernel}
    memory = {name: aop.init_memory(CONFIG, M, N, P) for name in kernels}
    tx = optax.chain(aop.carry_memory(memory), optax.sgd(0.1))
    update = jax.jit(tx.update) if jit else tx.update

    @functools.partial(jax.jit, static_argnums=2)
    def gradients(params, memory, names):
        def loss_fn(params, memory):
            outputs = [aop.dense(x, params[n], memory[n], config=CONFIG) for n in names]
            return sum(jnp.mean(y**2) for y in outputs)

        return jax.grad(loss_fn, argnums=(0, 1))(params, memory)

    def step(params, state, names):
        grads, memory = gradients(params, aop.get_memory(state), names)
        updates, state = update(grads, state, params, memory=memory)
        return optax.apply_updates(params, updates), state

    params, state = step(kernels, tx.init(kernels), ("a", "b"))
    before = aop.get_memory(state)
    params, state = step(params, state, ("a",))
    after = aop.get_memory(state)
    assert np.any(before["b"].inputs)
    chex.assert_trees_all_equal(after["b"][:2], before["b"][:2])
    assert np.any(after["a"].inputs != before["a"].inputs)
    assert (before["b"].uses, after["a"].uses, after["b"].uses) == (1, 1, 0)
    params, state = step(params, state, ("a", "b"))
    assert aop.get_memory(state)["b"].uses == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_memory_follows_the_learning_rate(dtype):
    _, kernel, memory = setup(dtype)
    rates = [0.1, 0.4, 0.0, 0.0, 0.9, 0.9]
    tx = aop.carry_memory(memory, lambda count: jnp.asarray(rates)[count])
    state = tx.init(kernel)
    new = aop.Memory(jnp.ones((M, N), dtype), jnp.ones((M, P), dtype), jnp.ones((), jnp.float32))
    for now, then in zip(rates, [*rates[1:], rates[-1]], strict=True):
        _, state = tx.update(kernel, state, memory=new)
        wanted = 1.0 if then == 0 else np.sqrt(now / then)
        for rows in aop.get_memory(state)[:2]:
            assert rows.dtype == dtype
            np.testing.assert_allclose(rows.astype(jnp.float32), wanted, rtol=0.01)


def test_a_constant_rate_leaves_the_memory_bit_for_bit():
    x, kernel, memory = setup()
    new = aop.Memory(x, x[:, :P], jnp.ones((), jnp.float32))
    for rate in (None, 0.1, jnp.asarray(0.1)):
        tx = aop.carry_memory(memory, rate)
        _, state = tx.update(kernel, tx.init(kernel), memory=new)
        chex.assert_trees_all_equal(aop.get_memory(state), new)


@pytest.mark.parametrize("schedule", [None, optax.cosine_decay_schedule(0.1, 20)])
def test_mem_aop_sgd_is_the_chain(schedule):
    x, kernel, memory = setup()
    rate = 0.1 if schedule is None else schedule
    chain = optax.chain(aop.carry_memory(memory, rate), optax.sgd(rate, momentum=0.5))
    results = []
    for tx in (aop.mem_aop_sgd(rate, memory, momentum=0.5), chain):
        step = jax.jit(make_step(tx))
        params, state = kernel, tx.init(kernel)
        for _ in range(10):
            params, state = step(params, state, x)
        results.append((params, aop.get_memory(state)))
    chex.assert_trees_all_equal(*results)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.adam(1e-3)),
        lambda tx: optax.chain(optax.chain(optax.identity(), tx), optax.scale(-0.1)),
        lambda tx: optax.apply_if_finite(optax.chain(tx, optax.sgd(0.1)), 3),
        lambda tx: {"my state": tx},
    ],
    ids=["chain", "nested", "wrapper", "none"],
)
def test_get_memory_finds_it_anywhere(wrap):
    x, kernel, memory = setup()
    memory = memory._replace(inputs=x)
    wrapped = wrap(aop.carry_memory(memory))
    if isinstance(wrapped, dict):
        state = {"my state": [wrapped["my state"].init(kernel)]}
    else:
        state = wrapped.init(kernel)
    chex.assert_trees_all_equal(aop.get_memory(state), memory)


@pytest.mark.parametrize("empty", [None, {}, {"layer": None}])
def test_a_model_without_memory(empty):
    _, kernel, _ = setup()
    tx = aop.carry_memory(empty)
    updates, state = tx.update(kernel, tx.init(kernel), memory=empty)
    assert updates is kernel
    assert aop.get_memory(state) == empty


def test_a_memory_restored_as_numpy_arrays_gives_the_same_steps():
    x, kernel, memory = setup()
    tx = aop.mem_aop_sgd(0.1, memory)
    step = jax.jit(make_step(tx))
    params, state = step(kernel, tx.init(kernel), x)
    restored_params, restored = jax.tree.map(np.array, (params, state))
    chex.assert_trees_all_equal(step(params, state, x), step(restored_params, restored, x))
    from_numpy = aop.carry_memory(jax.tree.map(np.array, aop.get_memory(state))).init(kernel)
    chex.assert_trees_all_equal(aop.get_memory(from_numpy), aop.get_memory(state))
    arguments = CONFIG, restored_params, aop.get_memory(restored), x
    eager = gradients.__wrapped__
    chex.assert_trees_all_close(eager(*arguments), gradients(*arguments), rtol=1e-5, atol=1e-6)
    updates = tx.update(kernel, restored, memory=aop.get_memory(restored))
    chex.assert_trees_all_close(
        updates, tx.update(kernel, state, memory=aop.get_memory(state)), rtol=1e-5, atol=1e-6
    )


def test_update_without_memory():
    _, kernel, memory = setup()
    tx = optax.chain(aop.carry_memory(memory), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"update got no memory.*tx.update\(.*memory=memory\)"):
        tx.update(kernel, tx.init(kernel), kernel)


def test_a_memory_of_another_kind():
    _, kernel, memory = setup()
    tx = aop.carry_memory(memory)
    state = tx.init(kernel)
    for other in (
        aop.init_memory(CONFIG, 2 * M, N, P),
        aop.init_memory(CONFIG, M, N, P, jnp.bfloat16),
        {"dense": memory},
        None,
    ):
        with pytest.raises(ValueError, match=r"memory given to update is .*but the state holds"):
            tx.update(kernel, state, memory=other)


def test_a_leaf_that_is_no_memory():
    _, _, memory = setup()
    for other in (memory._asdict(), {"a": memory, "kernel": jnp.ones(3)}, 3, aop.MemAOP(k=2)):
        with pytest.raises(
            TypeError, match=r"carry_memory: memory has a leaf of type \w+; .*COLLECTION"
        ):
            aop.carry_memory(other)


def test_integer_leaves():
    """They would have no gradient to be the next memory; a Memory has none."""
    x, kernel, memory = setup()
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in memory)
    for field in ("inputs", "uses"):
        integer = memory._replace(**{field: getattr(memory, field).astype(jnp.int32)})
        with pytest.raises((TypeError, ValueError), match=f"memory.{field} has .*dtype int32"):
            aop.dense(x, kernel, integer, config=CONFIG)


def test_stacked_memories_each_keep_their_own():
    """As nn.scan over layers stacks them; stacked as many as a row is wide."""
    _, kernel, memory = setup()
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * N), memory)
    old = stack._replace(inputs=stack.inputs + 1, cotangents=stack.cotangents + 1)
    new = stack._replace(inputs=stack.inputs + 2, cotangents=stack.cotangents + 2)
    new = new._replace(uses=jnp.asarray([1, 0, 1, 0], jnp.float32))
    tx = aop.carry_memory(old, optax.constant_schedule(0.1))
    for update in (tx.update, jax.jit(tx.update)):
        _, state = update(kernel, tx.init(kernel), memory=new)
        for rows in aop.get_memory(state)[:2]:
            assert rows[:, 0, 0].tolist() == [2, 1, 2, 1]
            assert (rows == rows[:, :1, :1]).all()


def test_a_memory_known_while_the_rest_is_traced():
    """Eager optax.apply_if_finite traces the inner update with a concrete memory in hand."""
    x, kernel, memory = setup()
    tx = optax.apply_if_finite(optax.chain(aop.carry_memory(memory), optax.sgd(0.1)), 3)
    step = make_step(tx)
    state = tx.init(kernel)
    for _ in range(3):
        kernel, state = step(kernel, state, x)
    assert aop.get_memory(state).inputs.any()
    state = aop.carry_memory(memory).init(kernel)
    closed_over = jax.jit(lambda g: aop.carry_memory(memory).update(g, state, memory=memory)[0])
    assert (closed_over(kernel) == kernel).all()


def test_rescaling_never_makes_a_memory_infinite():
    _, kernel, _ = setup("float16")
    full = aop.Memory(
        jnp.full((M, N), 6e4, "float16"), jnp.ones((M, P), "float16"), jnp.ones((), "float32")
    )
    tx = aop.carry_memory(full, lambda count: 0.1 / (1.0 + count) ** 4)
    _, state = tx.update(kernel, tx.init(kernel), memory=full)
    assert all(jnp.isfinite(leaf).all() for leaf in aop.get_memory(state))


@pytest.mark.parametrize("count", [0, 2])
def test_exactly_one_carry_memory(count):
    _, kernel, memory = setup()
    tx = optax.chain(optax.sgd(0.1), *[aop.carry_memory(memory)] * count)
    with pytest.raises(ValueError, match=f"found {count} carry_memory states.*exactly one"):
        aop.get_memory(tx.init(kernel))


@pytest.mark.parametrize("where", ["chain", "apply_if_finite"])
def test_replace_memory(where):
    """For another batch size; everything else in the state stays."""
    x, kernel, memory = setup()
    tx = optax.chain(aop.mem_aop_sgd(optax.linear_schedule(0.1, 0.05, 10), memory, momentum=0.9))
    tx = optax.apply_if_finite(tx, 3) if where == "apply_if_finite" else tx
    step = make_step(tx)
    params, state = step(kernel, tx.init(kernel), x)
    empty = aop.init_memory(CONFIG, 2 * M, N, P)
    new = aop.replace_memory(state, empty)
    chex.assert_trees_all_equal(aop.get_memory(new), empty)
    chex.assert_trees_all_equal(aop.replace_memory(new, aop.get_memory(state)), state)
    _, after = step(params, new, jnp.concatenate([x, x]))
    assert aop.get_memory(after).inputs.any()
    with pytest.raises(TypeError, match=r"leaf of type int"):
        aop.replace_memory(state, {"a": 3})


def test_carry_memory_inside_multi_steps():
    _, kernel, memory = setup()
    tx = optax.MultiSteps(aop.mem_aop_sgd(0.1, memory), 2)
    with pytest.raises(ValueError, match=r"inside optax.MultiSteps, which drops the memory of all"):
        aop.get_memory(tx.init(kernel))
    tx = optax.chain(aop.carry_memory(memory), optax.MultiSteps(optax.sgd(0.1), 2))
    chex.assert_trees_all_equal(aop.get_memory(tx.init(kernel)), memory)


def test_an_abstract_memory_stands_for_zeros():
    _, kernel, memory = setup()
    tx = aop.carry_memory(jax.eval_shape(lambda: memory))
    chex.assert_trees_all_equal(aop.get_memory(jax.jit(tx.init)(kernel)), memory)


@pytest.mark.parametrize("misuse", ["summed", "scaled"])
def test_a_memory_that_was_added_up_does_not_pass_unnoticed(misuse):
    x, kernel, memory = setup()
    tx = aop.mem_aop_sgd(0.1, memory)
    if misuse == "summed":  # an unbatched memory under vmap: one memory for two batches

        def loss_fn(kernel, memory, x):
            return jnp.mean(aop.dense(x, kernel, memory, config=CONFIG) ** 2)

        def total_loss(kernel, memory, batches):
            return jax.vmap(loss_fn, (None, None, 0))(kernel, memory, batches).sum()

        new = jax.jit(jax.grad(total_loss, argnums=1))(kernel, memory, jnp.stack([x, x]))
        assert new.uses == 2
    else:
        _, new = gradients(CONFIG, kernel, memory, x)
        new = jax.tree.map(lambda leaf: 0.25 * leaf, new)
    state = tx.init(kernel)
    with pytest.raises(ValueError, match=r"uses=.* where 1 is wanted.*added up"):
        tx.update(kernel, state, memory=new)
    _, state = jax.jit(functools.partial(tx.update))(kernel, state, memory=new)  # values unknown
    assert np.isnan(gradients(CONFIG, kernel, aop.get_memory(state), x)[0]).all()


def test_a_probe_is_no_memory_to_carry():
    with pytest.raises(TypeError, match=r"carry_memory: .* leaf of type Probe"):
        aop.carry_memory({"layer": aop.Probe.of(None, draws=2)})


def test_what_flax_keeps_for_fp8_layers_goes_along():
    """In one collection with the memories, and overwritten by its gradient, as Flax does."""
    model = aop.linen.wrap(
        nn.Sequential([nn.Dense(16), nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)]),
        aop.MemAOP(ratio=0.5),
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    collection = variables[aop.linen.COLLECTION]
    tx = optax.chain(aop.carry_memory(collection), optax.sgd(0.1))
    grad_fn = jax.jit(jax.grad(lambda variables: jnp.mean((model.apply(variables, x) - 1) ** 2)))
    params, state = variables["params"], tx.init(variables["params"])
    trained = TrainState.create(apply_fn=model.apply, params=variables, tx=optax.sgd(0.1))
    for _ in range(3):
        grads = grad_fn({"params": params, aop.linen.COLLECTION: aop.get_memory(state)})
        memory = grads[aop.linen.COLLECTION]
        updates, state = tx.update(grads["params"], state, params, memory=memory)
        params = optax.apply_updates(params, updates)
        trained = trained.apply_gradients(grads=grad_fn(trained.params))
    chex.assert_trees_all_close(params, trained.params["params"])
    chex.assert_trees_all_close(aop.get_memory(state), trained.params[aop.linen.COLLECTION])
    scales = [leaf for leaf in jax.tree.leaves(aop.get_memory(state)) if leaf.shape == (1024,)]
    assert len(scales) == 3
    assert all(leaf.any() for leaf in scales)


def test_optimizers_that_refuse_the_memory():
    """As the guide has them: SAM without further arguments, L-BFGS with a loss that ignores it."""
    x, kernel, memory = setup(config=aop.MemAOP(ratio=1))
    exact = lambda kernel: jnp.mean((x @ kernel) ** 2)  # noqa: E731
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    sam = optax.contrib.sam(optax.sgd(0.1), ascent)
    for optimizer, further in (
        (optax.GradientTransformation(*sam), {}),
        (optax.lbfgs(), {"value_fn": lambda kernel, memory: exact(kernel)}),
    ):
        tx = optax.chain(aop.carry_memory(memory), optimizer)
        params, state = kernel, tx.init(kernel)
        for _ in range(4):

            def loss_fn(params, memory):
                y = aop.dense(x, params, memory, config=aop.MemAOP(ratio=1))
                return jnp.mean(y**2)

            value, (grads, new) = jax.value_and_grad(loss_fn, argnums=(0, 1))(
                params, aop.get_memory(state)
            )
            if further:
                further |= {"value": value, "grad": grads}
            updates, state = tx.update(grads, state, params, memory=new, **further)
            params = optax.apply_updates(params, updates)
        assert exact(params) < exact(kernel)


@pytest.mark.parametrize("rate", ["0.1", b"0.1", [0.1]])
def test_a_learning_rate_that_is_none(rate):
    _, _, memory = setup()
    with pytest.raises(
        TypeError, match=r"carry_memory: learning_rate is .*a number, or a schedule"
    ):
        aop.carry_memory(memory, rate)


@pytest.mark.parametrize("value", [-0.1, np.nan, np.inf])
def test_a_schedule_below_zero_or_of_no_number(value):
    _, kernel, memory = setup()
    tx = aop.carry_memory(memory, lambda count: jnp.where(count < 1, 0.1, value))
    with pytest.raises(ValueError, match=r"learning_rate: the schedule's value after 0 updates"):
        tx.update(kernel, tx.init(kernel), memory=memory)
