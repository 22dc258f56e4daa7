"""Habits of training with Flax and Optax, against loops by hand and the exact model."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState

import mem_aop_jax as aop

pytestmark = pytest.mark.usefixtures("standard_promotion")

COLLECTION = aop.linen.COLLECTION
M, STEPS = 8, 12
SCHEDULE = optax.exponential_decay(0.3, 1, 0.7)
CLIP, EMA, SGD = optax.clip_by_global_norm(1e-2), optax.ema(0.9), optax.sgd(0.1, 0.9)
ADAM = optax.adam(1e-2)
close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-6)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
either_k = pytest.mark.parametrize("k", [2, M])


def dense_of(config):
    return functools.partial(aop.linen.Dense, config=config) if config else nn.Dense


class Net(nn.Module):
    config: aop.MemAOP | None = None
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(dense_of(self.config), dtype=self.dtype)
        return dense(2, name="head")(nn.tanh(dense(6, name="hidden")(x)))


def loss_fn(params, memory, batch, model):
    x, y = batch
    output = model.apply({"params": params, COLLECTION: memory}, x)
    return jnp.mean((output.astype(jnp.float32) - y) ** 2)


@functools.cache
def gradients_of(model):
    return jax.jit(jax.grad(functools.partial(loss_fn, model=model), argnums=(0, 1)))


@functools.cache
def setup(k=2, dtype=None, **options):
    """A model, its variables, and a batch for each step."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(STEPS, M, n)).astype(np.float32) for n in (4, 2))
    model = Net(aop.MemAOP(k=k, **options), dtype)
    variables = jax.jit(model.init)(jax.random.key(0), x[0])
    return model, variables["params"], variables[COLLECTION], (x, y)


def reference(k, dtype=None):
    """The library's gradients; of nn.Dense, where k is all rows."""
    return gradients_of(Net(aop.MemAOP(k=k) if k < M else None, dtype))


def make_step(tx, gradients, jit=jax.jit):
    @jit
    def descend(params, opt_state, grads, memory):
        updates, opt_state = tx.update(grads, opt_state, params, memory=memory)
        return optax.apply_updates(params, updates), opt_state

    def step(params, opt_state, batch):
        return descend(params, opt_state, *gradients(params, aop.get_memory(opt_state), batch))

    return step


def run(step, state, batches):
    for batch in zip(*batches, strict=True):
        state = step(*state, batch)
    return state


def train(tx, params, batches, gradients):
    return run(make_step(tx, gradients), (params, tx.init(params)), batches)


def by_hand(tx, params, memories, batches, gradients, every=1, schedule=lambda count: 1.0):
    """Parameters and optimizer state after a loop that keeps the memories beside the optimizer.

    The optimizer gets the mean of `every` gradients. The memories take turns, and after each
    update they are rescaled as the learning rate changes.
    """

    @jax.jit
    def descend(params, state, grads):
        mean = jax.tree.map(lambda *leaves: sum(leaves) / every, *grads)
        updates, state = tx.update(mean, state, params)
        return optax.apply_updates(params, updates), state

    state, grads, memories = tx.init(params), [], list(memories)
    for i, batch in enumerate(zip(*batches, strict=True)):
        turn = i % len(memories)
        grad, memories[turn] = gradients(params, memories[turn], batch)
        grads.append(grad)
        if len(grads) == every:
            params, state = descend(params, state, grads)
            grads, now, then = [], schedule(i // every), schedule(i // every + 1)
            factor = float(np.sqrt(now / then))
            memories = jax.tree.map(lambda a, f=factor: a * f if a.ndim else a, memories)
    return params, state


def always_clipped(grads, params):
    del params
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
    return jax.tree.map(lambda leaf: leaf * 1e-2 / norm, grads)


def apart(transforms):
    """Each top-level entry of the parameters with an optimizer of its own."""

    def init(params):
        return {name: tx.init(params[name]) for name, tx in transforms.items()}

    def update(grads, state, params):
        pairs = {n: tx.update(grads[n], state[n], params[n]) for n, tx in transforms.items()}
        return [{name: pair[i] for name, pair in pairs.items()} for i in (0, 1)]

    return optax.GradientTransformation(init, update)


OWN, HEAD = {"hidden": "hidden", "head": "head"}, {"hidden": False, "head": True}
CLIPPED = optax.chain(optax.stateless(always_clipped), SGD)
CHAINS = {  # with carry_memory, and what they are without
    "clip after": (lambda carry: optax.chain(carry, CLIP, SGD), CLIPPED),
    "clip before": (lambda carry: optax.chain(CLIP, carry, SGD), CLIPPED),
    "ema": (lambda carry: optax.chain(carry, EMA, SGD), optax.chain(EMA, SGD)),
    "partition": (
        lambda carry: optax.chain(carry, optax.partition({"hidden": ADAM, "head": SGD}, OWN)),
        apart({"hidden": ADAM, "head": SGD}),
    ),
    "chain inside partition": (
        lambda carry: optax.partition({"hidden": optax.chain(carry, ADAM), "head": SGD}, OWN),
        apart({"hidden": ADAM, "head": SGD}),
    ),
    "frozen by masked": (
        lambda carry: optax.chain(carry, SGD, optax.masked(optax.set_to_zero(), HEAD)),
        apart({"hidden": SGD, "head": optax.set_to_zero()}),
    ),
}


@either_k
@pytest.mark.parametrize("name", CHAINS)
def test_an_optimizer_sees_the_gradients_only(name, k):
    chain, without = CHAINS[name]
    model, params, memory, batches = setup(k)
    ours, _ = train(chain(aop.carry_memory(memory)), params, batches, gradients_of(model))
    close(ours, by_hand(without, params, [memory], batches, reference(k))[0])


@either_k
@pytest.mark.parametrize("name", ["schedule_free_sgd", "schedule_free_adamw"])
def test_schedule_free(name, k):
    """Its state, without the memory, gives the parameters for evaluation."""
    model, params, memory, batches = setup(k)
    optimizer = getattr(optax.contrib, name)(0.05)
    eval_params = optax.contrib.schedule_free_eval_params
    tx = optax.chain(aop.carry_memory(memory), optimizer)
    ours, (_, state) = train(tx, params, batches, gradients_of(model))
    wanted, plain = by_hand(optimizer, params, [memory], batches, reference(k))
    close((ours, eval_params(state, ours)), (wanted, eval_params(plain, wanted)))


INJECTIONS = {
    "around the optimizer": lambda memory: optax.chain(
        aop.carry_memory(memory, SCHEDULE), optax.inject_hyperparams(optax.sgd)(SCHEDULE)
    ),
    "around the chain": lambda memory: optax.inject_hyperparams(
        lambda rate: optax.chain(aop.carry_memory(memory, SCHEDULE), optax.sgd(rate))
    )(SCHEDULE),
}


@pytest.mark.parametrize("name", INJECTIONS)
def test_inject_hyperparams(name):
    """carry_memory takes the schedule itself, since an injected rate does not tell the next one."""
    model, params, memory, batches = setup()
    ours, state = train(INJECTIONS[name](memory), params, batches, gradients_of(model))
    plain = optax.sgd(SCHEDULE)
    close(ours, by_hand(plain, params, [memory], batches, reference(2), schedule=SCHEDULE)[0])
    (rate,) = optax.tree.get(state, "hyperparams").values()
    np.testing.assert_allclose(rate, SCHEDULE(STEPS - 1), rtol=1e-6)


@pytest.mark.parametrize("memory_dtype", [None, slow("float32")])
def test_mixed_precision_compiles_once(memory_dtype):
    """With bfloat16 products of float32 parameters no dtype changes over 60 steps."""
    model, params, memory, batches = setup(dtype=jnp.bfloat16, memory_dtype=memory_dtype)
    tx, traces = optax.chain(aop.carry_memory(memory), ADAM), []
    step = make_step(tx, gradients_of(model))
    counting = jax.jit(lambda *args: (traces.append(1), step(*args))[1])
    batches = [np.tile(leaf, (5, 1, 1)) for leaf in batches]
    ours, state = run(counting, (params, tx.init(params)), batches)
    assert len(traces) == 1
    chex.assert_trees_all_equal_dtypes(ours, params)
    rows = [leaf for leaf in jax.tree.leaves(aop.get_memory(state)) if leaf.ndim]
    assert {leaf.dtype.name for leaf in rows} == {memory_dtype or "bfloat16"}


@either_k
def test_the_gradients_of_mixed_precision(k):
    """They are near those in float32; at k = rows, near those of the exact bfloat16 model."""
    model, params, memory, batches = setup(k, dtype=jnp.bfloat16)
    _, _, wanted_memory, _ = setup(k)
    compared = reference(k, jnp.bfloat16 if k == M else None)
    for batch in zip(*batches, strict=True):
        grads, memory = gradients_of(model)(params, memory, batch)
        wanted, wanted_memory = compared(params, wanted_memory, batch)
        chex.assert_trees_all_equal_dtypes(grads, params)
        chex.assert_trees_all_close(grads, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("kept_by", "k"),
    [("carry_memory", 2), ("carry_memory", M), ("TrainState", 2), slow("TrainState", M)],
)
def test_accumulation_by_multi_steps(kept_by, k):
    """The memory goes from micro-batch to micro-batch, and the gradients are averaged.

    carry_memory counts micro-batches where the optimizer inside counts updates.
    """
    model, params, memory, batches = setup(k)
    every = 3
    if kept_by == "TrainState":
        variables = {"params": params, COLLECTION: memory}
        tx, schedule = optax.MultiSteps(ADAM, every), lambda count: 1e-2
        state = TrainState.create(apply_fn=model.apply, params=variables, tx=tx)

        @jax.jit
        def step(state, batch):
            variables = state.params
            grads = gradients_of(model)(variables["params"], variables[COLLECTION], batch)
            return [state.apply_gradients(grads={"params": grads[0], COLLECTION: grads[1]})]

        ours = run(step, [state], batches)[0].params["params"]
    else:
        schedule = SCHEDULE
        carry = aop.carry_memory(memory, lambda count: schedule(count // every))
        tx = optax.chain(carry, optax.MultiSteps(optax.adam(schedule), every))
        ours, _ = train(tx, params, batches, gradients_of(model))
    wanted, _ = by_hand(
        optax.adam(schedule), params, [memory], batches, reference(k), every, schedule
    )
    close(ours, wanted)


def passed_on(params, memory, group):
    def body(carry, batch):
        grads, memory = reference(2)(params, carry[1], batch)
        return (optax.tree.add(carry[0], grads), memory), None

    return jax.lax.scan(body, (optax.tree.zeros_like(params), memory), group)[0]


def one_each(params, memories, group):
    def body(total, own):
        grads, memory = reference(2)(params, *own)
        return optax.tree.add(total, grads), memory

    return jax.lax.scan(body, optax.tree.zeros_like(params), (memories, group))


def one_each_inside_the_loss(params, memories, group):
    def total_loss(params, memories):
        one = functools.partial(loss_fn, params, model=Net(aop.MemAOP(k=2)))
        return jax.lax.map(lambda own: one(*own), (memories, group)).sum()

    return jax.grad(total_loss, argnums=(0, 1))(params, memories)


@pytest.mark.parametrize("gradients", [passed_on, slow(one_each), one_each_inside_the_loss])
def test_accumulation_by_scan(gradients):
    _, params, memory, batches = setup()
    every, memories = 4, [memory]
    if gradients is not passed_on:
        memories = [memory] * every
        memory = jax.tree.map(lambda *leaves: jnp.stack(leaves), *memories)
    tx = optax.chain(aop.carry_memory(memory), optax.scale(1 / every), ADAM)
    groups = [leaf.reshape(-1, every, *leaf.shape[1:]) for leaf in batches]
    ours, _ = train(tx, params, groups, jax.jit(gradients))
    close(ours, by_hand(ADAM, params, memories, batches, reference(2), every)[0])


def one_memory_for_two_batches(params, memory, batch):
    def total_loss(params, memory):
        one = functools.partial(loss_fn, params, memory, model=Net(aop.MemAOP(k=2)))
        return jax.lax.map(one, [jnp.stack([leaf, leaf]) for leaf in batch]).sum()

    return jax.grad(total_loss, argnums=(0, 1))(params, memory)


def unscaled_by_a_loss_scaler(params, memory, batch):
    loss = functools.partial(loss_fn, batch=batch, model=Net(aop.MemAOP(k=2)))
    return DynamicScale().value_and_grad(loss, argnums=(0, 1))(params, memory).grad


@pytest.mark.parametrize("gradients", [one_memory_for_two_batches, unscaled_by_a_loss_scaler])
def test_a_memory_that_was_added_up_or_scaled_does_not_pass_unnoticed(gradients):
    _, params, memory, batches = setup()
    tx = optax.chain(aop.carry_memory(memory), SGD)
    eager, jitted = (make_step(tx, jax.jit(gradients), jit) for jit in (lambda f: f, jax.jit))
    state, two_batches = (params, tx.init(params)), [leaf[:2] for leaf in batches]
    with pytest.raises(ValueError, match=r"uses=.* where 1 is wanted.*added up.*or scaled"):
        run(eager, state, two_batches)
    ours, _ = run(jitted, state, two_batches)
    assert all(jnp.isnan(layer["kernel"]).all() for layer in ours.values())


def test_steps_inside_a_scan_and_with_donated_buffers():
    model, params, memory, batches = setup()
    tx = aop.mem_aop_sgd(SCHEDULE, memory)
    step, state = make_step(tx, gradients_of(model)), (params, tx.init(params))
    state = jax.tree.map(jnp.copy, state)
    wanted = run(jax.jit(step), state, batches)
    scanned = jax.lax.scan(lambda state, batch: (step(*state, batch), None), state, batches)[0]
    close(scanned, wanted)
    chex.assert_trees_all_equal(run(jax.jit(step, donate_argnums=(0, 1)), state, batches), wanted)


@pytest.mark.parametrize("bad", [np.arange(M) < 1, np.full(M, True)], ids=["a row", "all rows"])
@pytest.mark.parametrize("around", ["chain", "optimizer"])
def test_apply_if_finite(around, bad):
    """Around the chain, a batch with a NaN is as good as never seen. Around the optimizer alone,
    the parameters stay and the memory goes on, finite."""
    model, params, memory, (x, y) = setup()
    carry = aop.carry_memory(memory)
    if around == "chain":
        tx = optax.apply_if_finite(optax.chain(carry, SGD), 3)
    else:
        tx = optax.chain(carry, optax.apply_if_finite(SGD, 3))
    step = make_step(tx, gradients_of(model))
    before = run(step, (params, tx.init(params)), (x[:5], y[:5]))
    refused = step(*before, (np.where(bad[:, None], np.float32(np.nan), x[5]), y[5]))
    chex.assert_trees_all_equal(refused[0], before[0])
    assert optax.tree.get(refused[1], "total_notfinite") == 1
    after = run(step, refused, (x[6:], y[6:]))
    chex.assert_tree_all_finite((refused, after))
    assert (after[0]["head"]["kernel"] != before[0]["head"]["kernel"]).any()
    if around == "chain":
        chex.assert_trees_all_equal(after[0], run(step, before, (x[6:], y[6:]))[0])


def map_memories(function, tree):
    return jax.tree.map(function, tree, is_leaf=lambda node: isinstance(node, aop.Memory))


def with_cotangents_scaled(memory, scale):
    return map_memories(lambda m: m._replace(cotangents=m.cotangents * scale), memory)


def test_a_constant_loss_scale():
    """The memory stays in the units of the scaled loss; only the parameters' gradients leave."""
    model, params, memory, batches = setup()
    scaled = jax.jit(jax.grad(lambda *args: 1024 * loss_fn(*args, model), argnums=(0, 1)))
    tx = optax.chain(aop.carry_memory(memory), optax.scale(1 / 1024), SGD)
    ours, state = train(tx, params, batches, scaled)
    plain = optax.chain(aop.carry_memory(memory), SGD)
    wanted, plain_state = train(plain, params, batches, gradients_of(model))
    kept = with_cotangents_scaled(aop.get_memory(state), 1 / 1024)
    close((ours, kept), (wanted, aop.get_memory(plain_state)))


def test_a_dynamic_loss_scale():
    """The memory, in the units of the loss itself, takes on the scale for each backward pass."""
    model, params, memory, (x, y) = setup()
    tx = optax.chain(aop.carry_memory(memory), SGD)

    @jax.jit
    def step(scaler, params, opt_state, batch):
        scale = scaler.scale
        memory = with_cotangents_scaled(aop.get_memory(opt_state), scale)
        loss = functools.partial(loss_fn, batch=batch, model=model)
        grad_fn = scaler.value_and_grad(loss, argnums=(0, 1))  # divides every leaf by the scale
        scaler, finite, _, (grads, memory) = grad_fn(params, memory)
        memory = map_memories(
            lambda m: aop.Memory(m.inputs * scale, m.cotangents, m.uses * scale), memory
        )
        updates, new_state = tx.update(grads, opt_state, params, memory=memory)
        new = optax.apply_updates(params, updates), new_state
        return scaler, *jax.tree.map(functools.partial(jnp.where, finite), new, (params, opt_state))

    spoilt = np.where(np.arange(STEPS)[:, None, None] == 5, np.float32(np.nan), x)
    scaler = DynamicScale(scale=jnp.float32(1024), growth_interval=3)
    scaler, ours, state = run(step, (scaler, params, tx.init(params)), (spoilt, y))
    assert scaler.scale == 2048  # up at the 4th and the 10th batch, down at the 6th
    rest = [np.delete(leaf, 5, axis=0) for leaf in (x, y)]
    wanted, wanted_state = train(tx, params, rest, gradients_of(model))
    close((ours, aop.get_memory(state)), (wanted, aop.get_memory(wanted_state)))


class LoRA(nn.Module):
    config: aop.MemAOP | None = None

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            base = dense_of(self.config)(32, name=f"base_{i}")(x)
            x = nn.tanh(base + nn.Dense(32, name=f"up_{i}")(nn.Dense(2, name=f"down_{i}")(x)))
        return x


def test_frozen_kernels_under_lora_need_no_memory_and_cost_no_gradient():
    x = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    params = jax.jit(LoRA().init)(jax.random.key(0), x)["params"]
    base = {name: params.pop(name) for name in ("base_0", "base_1")}

    def gradient(config):
        def loss(adapters):
            return jnp.sum(LoRA(config).apply({"params": base | adapters}, x) ** 2)

        return jax.jit(jax.grad(loss)).lower(params).compile()

    ours, exact = gradient(aop.MemAOP(ratio=0.25, policy="randk")), gradient(None)
    close(ours(params), exact(params))
    flops = [compiled.cost_analysis()["flops"] for compiled in (ours, exact)]
    np.testing.assert_allclose(*flops, rtol=0.01)


class Regularised(nn.Module):
    config: aop.MemAOP | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(dense_of(self.config)(6, name="hidden")(x))
        x = nn.Dropout(0.5, deterministic=False)(nn.relu(x))
        return dense_of(self.config)(2, name="head")(x)


def test_batch_statistics_dropout_and_an_average_of_the_parameters():
    """Beside the other collections and random streams of a model: at k = rows the exact run."""
    _, _, _, batches = setup()
    config = aop.MemAOP(k=M, policy="randk")
    streams = "params", "dropout", aop.linen.RNG
    keys = dict(zip(streams, jax.random.split(jax.random.key(0), 3), strict=True))
    variables = jax.jit(Regularised(config).init)(keys, batches[0][0])
    params, stats = variables["params"], variables["batch_stats"]

    def train(model, memory):
        tx = optax.chain(aop.carry_memory(memory), SGD)

        @jax.jit
        def step(params, opt_state, stats, average, batch):
            def loss_fn(params, memory):
                variables = {"params": params, COLLECTION: memory, "batch_stats": stats}
                y, new = model.apply(variables, batch[0], rngs=keys, mutable="batch_stats")
                return jnp.mean((y - batch[1]) ** 2), new["batch_stats"]

            gradients = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)
            (grads, memory), new = gradients(params, aop.get_memory(opt_state))
            updates, opt_state = tx.update(grads, opt_state, params, memory=memory)
            params = optax.apply_updates(params, updates)
            return params, opt_state, new, optax.incremental_update(params, average, 0.1)

        params_now, _, *rest = run(step, (params, tx.init(params), stats, params), batches)
        return params_now, *rest

    close(train(Regularised(config), variables[COLLECTION]), train(Regularised(), {}))
