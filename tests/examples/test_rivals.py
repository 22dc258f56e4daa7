"""The estimates of others: unbiased where they are said to be, and what their state holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rivals

import mem_aop_jax as aop

ROWS, FEATURES, OUTPUTS = 32, 12, 6
SIZES = np.linspace(0.1, 2, ROWS, dtype=np.float32)[:, None]  # of the rows
X = SIZES * jax.random.normal(jax.random.key(0), (ROWS, FEATURES), jnp.float32)
G = jax.random.normal(jax.random.key(1), (ROWS, OUTPUTS), jnp.float32) / (1 + SIZES)
KERNEL = jnp.zeros((FEATURES, OUTPUTS), "float32")

pytestmark = pytest.mark.usefixtures("standard_promotion")


def loss(kernel, x, g):
    return jnp.sum((x @ kernel) * g)


@pytest.fixture(autouse=True)
def registered():
    with rivals.registered():
        yield


def gradients(config, draws=2000, memory=None):
    """dW of many keys, and the memory before."""
    approx = aop.approximate(loss, config)
    memory = approx.init(KERNEL, X, G) if memory is None else memory
    one = functools.partial(jax.grad(approx, argnums=(0, 1)), KERNEL, memory)
    return jax.jit(jax.vmap(lambda key: one(key, X, G)))(jax.random.split(jax.random.key(2), draws))


def winners(memory):
    return aop.MemAOP(k=8, policy=rivals.winners, memory=memory)


def features(*rank):
    return aop.MemAOP(k=1, policy=rivals.nothing, memory="features", rank=rank)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (winners, [None]),
        (winners, ["last_norms"]),
        (features, [3, 4]),
        (features, [1, 4]),
    ],
    ids=["winners", "last norms", "features", "one feature"],
)
def test_the_mean_is_the_exact_gradient(make, options):
    config = make(*options)
    draws, _ = gradients(config)
    error = (draws.mean(0) - X.T @ G) / (draws.std(0) / len(draws) ** 0.5)
    assert np.abs(error).max() < 4.5
    assert draws.std() > 0.1


def test_all_rows_and_all_features_are_exact():
    every = aop.MemAOP(k=ROWS, policy=rivals.winners, memory=None)
    for config in (every, features(5, 7)):
        draws, _ = gradients(config, draws=2)
        np.testing.assert_allclose(draws[0], X.T @ G, rtol=1e-3, atol=1e-3)


def test_winners_are_the_likeliest_rows_and_the_rest_is_drawn():
    """One row has nearly all: it is taken with weight 1; equal rows are all drawn."""
    one = jnp.full(16, 1e-6).at[3].set(1.0)
    indices, weights = rivals.winners(jax.random.key(0), one, 4)
    assert (indices[0], weights[0]) == (3, 1)
    assert 3 not in indices[1:]
    np.testing.assert_allclose(weights[1:], 15 / 3, rtol=1e-3)
    _, equal = rivals.winners(jax.random.key(0), jnp.ones(16), 4)
    np.testing.assert_allclose(equal, 16 / 4, rtol=1e-5)


def test_winners_among_fewer_rows_than_k():
    """Rows of zeros, as empty places of experts are, count for nothing."""
    scores = jnp.zeros(8).at[jnp.array([1, 2])].set(jnp.array([1.0, 0.25]))
    indices, weights = rivals.winners(jax.random.key(0), scores, 4)
    sums = jnp.zeros(8).at[indices].add(weights)
    np.testing.assert_allclose(sums, [0, 1, 1, 0, 0, 0, 0, 0])
    _, none = rivals.winners(jax.random.key(0), jnp.zeros(8), 4)
    assert not none.any()


def test_last_norms_are_those_of_the_step_before():
    _, memory = gradients(winners("last_norms"), draws=2)
    (layer,) = memory.values()
    norms = jnp.linalg.norm(G, axis=1)
    units = np.asarray(layer.cotangents[0, :, 0] / norms)
    np.testing.assert_allclose(units, units[0], rtol=1e-5)
    carried = jax.tree.map(lambda a: a[0], memory)
    with_norms, _ = gradients(winners("last_norms"), memory=carried)
    of_this_step, _ = gradients(winners(None))
    by_inputs, _ = gradients(winners("last_norms"))
    v = [float(draws.var(0).sum()) for draws in (with_norms, of_this_step, by_inputs)]
    assert v[0] == pytest.approx(v[1], rel=0.15)  # the cotangents are the same
    assert v[2] > 1.1 * v[1]


def test_the_subspace_alone_is_the_part_in_it():
    config = aop.MemAOP(k=1, policy=rivals.nothing, memory="subspace", rank=3)
    draws, _ = gradients(config, draws=2)
    (memory,) = aop.approximate(loss, config).init(KERNEL, X, G).values()
    v, u = memory.inputs, memory.cotangents
    exact = X.T @ G
    wanted = v @ v.T @ exact + (exact - v @ v.T @ exact) @ u @ u.T
    np.testing.assert_allclose(draws[0], wanted, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(draws[0], draws[1])


def test_the_library_knows_these_names_meanwhile_alone():
    assert aop.MemAOP(k=1, memory="features", policy=rivals.nothing).memory == "features"
    with pytest.raises(ValueError, match="memory='rivals'"):
        aop.MemAOP(k=1, memory="rivals")
