"""Memories that a loop averaged, over micro-batches or devices, do not pass unnoticed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import mem_aop_jax as aop
from mem_aop_jax._core.memory import MARKS

pytestmark = pytest.mark.usefixtures("standard_promotion")

COLLECTION = aop.linen.COLLECTION
DEVICES, ROWS, FEATURES = 4, 8, 6
MODEL = aop.linen.wrap(
    nn.Sequential([nn.Dense(12), nn.tanh, nn.Dense(12), nn.tanh, nn.Dense(6)]),
    aop.MemAOP(ratio=0.5),
)


def batches(number, seed=0):
    """Of one shape: the micro-batches of one step."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(number, ROWS, FEATURES)), jnp.float32)


def initial():
    return MODEL.init(jax.random.key(0), batches(1)[0])


def loss_fn(variables, x):
    return jnp.mean((MODEL.apply(variables, x) - 1) ** 2)


def mean(tree):
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *tree)


def is_nan(params):
    return all(bool(jnp.isnan(leaf).any()) for leaf in jax.tree.leaves(params) if leaf.ndim == 2)


@pytest.mark.parametrize("number", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_accumulation_by_hand_in_a_train_state(number):
    variables = initial()
    state = TrainState.create(apply_fn=MODEL.apply, params=variables, tx=optax.sgd(0.1))

    @jax.jit
    def step(state, xs):
        grads = [jax.grad(loss_fn)(state.params, x) for x in xs]
        return state.apply_gradients(grads=mean(grads))

    for seed in range(4):
        state = step(state, batches(number, seed))
    assert is_nan(state.params["params"])


def test_a_pmean_of_all_gradients_under_pmap():
    variables = jax.tree.map(lambda leaf: jnp.stack([leaf] * DEVICES), initial())

    @functools.partial(jax.pmap, axis_name="data")
    def step(variables, x):
        grads = jax.lax.pmean(jax.grad(loss_fn)(variables, x), "data")
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads["params"])
        return {"params": params, COLLECTION: grads[COLLECTION]}

    for seed in range(4):
        variables = step(variables, batches(DEVICES, seed))
    assert is_nan(variables["params"])


def test_an_error_where_the_values_are_known():
    variables = initial()
    tx = optax.chain(aop.carry_memory(variables[COLLECTION]), optax.sgd(0.1))
    state = tx.init(variables["params"])
    grads = mean([jax.jit(jax.grad(loss_fn))(variables, x) for x in batches(2)])
    with pytest.raises(ValueError, match=r"carry_memory: .*or 1 that is an average"):
        tx.update(grads["params"], state, variables["params"], memory=grads[COLLECTION])


def test_the_memory_that_goes_from_micro_batch_to_micro_batch_trains():
    variables = initial()
    carry = aop.carry_memory(variables[COLLECTION])
    tx = optax.chain(carry, optax.MultiSteps(optax.sgd(0.1), 2))
    params, state = variables["params"], tx.init(variables["params"])

    @jax.jit
    def step(params, state, x):
        variables = {"params": params, COLLECTION: aop.get_memory(state)}
        grads = jax.grad(loss_fn)(variables, x)
        updates, state = tx.update(grads["params"], state, params, memory=grads[COLLECTION])
        return optax.apply_updates(params, updates), state

    for seed in range(4):
        for x in batches(2, seed):
            params, state = step(params, state, x)
    assert not is_nan(params)


@pytest.mark.parametrize("number", [2, 3, 4, 8, 16])
def test_most_averages_of_marks_are_no_marks(number):
    """Sums in float32, in the order in which loops add up, then divided."""
    marks = (1 - np.array(MARKS) * 2.0**-24).astype(np.float32)
    drawn = np.random.default_rng(0).choice(marks, size=(number, 20000))
    average = np.cumsum(drawn, axis=0, dtype=np.float32)[-1] / np.float32(number)
    assert np.isin(average, marks).mean() < 0.2
    if number == 2:
        different = drawn[0] != drawn[1]
        assert not np.isin(average[different], marks).any()


def test_a_mark_reads_as_one_use():
    config = aop.MemAOP(k=2)
    x, kernel = batches(1)[0], jnp.ones((FEATURES, 3))

    def step(x):
        memory = aop.init_memory(config, ROWS, FEATURES, 3)
        grad_fn = jax.grad(lambda m: jnp.sum(aop.dense(x, kernel, m, config=config) ** 2))
        return grad_fn(memory)

    memories = [step(x) for x in batches(20)]
    assert {float(memory.uses) for memory in memories} == {1}
    marks = {float(memory[-1]) for memory in memories}
    assert len(marks) > 3
    assert min(marks) > 1 - 2e-6
    assert float(step(x)[-1]) == float(step(x)[-1])
