import functools
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mem_aop_jax._core.policies import POLICIES, UNBIASED_POLICIES, row_scores, top_k_by_rank
from mem_aop_jax._numerics import row_norms

DATA = pathlib.Path(__file__).parents[1] / "data"
SCORES = np.array([0.5, 3.0, 0.02, 1.0, 0.3, 1.5], np.float32)


@jax.jit
def scores_of(inputs, cotangents):
    return row_scores(row_norms(inputs), row_norms(cotangents))


@functools.partial(jax.jit, static_argnums=(0, 3))
def select(policy, key, scores, k):
    return POLICIES[policy](key, scores, k)


def subset_probabilities(weights, k):
    """NumPy oracle: k draws one after the other, in proportion to the weights that are left."""
    weights = np.asarray(weights, np.float64)
    probabilities = dict.fromkeys(itertools.combinations(range(len(weights)), k), 0.0)
    for order in itertools.permutations(range(len(weights)), k):
        left = weights.sum() - np.concatenate([[0], np.cumsum(weights[list(order)])[:-1]])
        probabilities[tuple(sorted(order))] += np.prod(weights[list(order)] / left)
    assert math.isclose(sum(probabilities.values()), 1)
    return probabilities


def draw(policy, scores, k, draws):
    keys = jax.random.split(jax.random.key(2110), draws)
    indices = jax.vmap(lambda key: select(policy, key, jnp.asarray(scores), k).indices)
    return np.asarray(jax.jit(indices)(keys))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("policy", "weights"), [("weightedk", SCORES), ("randk", np.ones(6))])
def test_random_policies_draw_without_replacement_with_the_right_frequencies(policy, weights, k):
    draws = 20_000
    expected = subset_probabilities(weights, k)
    subsets = [tuple(sorted(row)) for row in draw(policy, SCORES, k, draws).tolist()]
    observed = np.array([subsets.count(subset) for subset in expected])
    assert observed.sum() == draws  # every draw is a set of k different rows
    expected = draws * np.array(list(expected.values()))
    rare = expected < 5
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("policy", POLICIES)
def test_all_rows_at_k_equal_rows(policy):
    assert sorted(draw(policy, SCORES, 6, 1)[0].tolist()) == list(range(6))


def test_topk_takes_the_largest_scores():
    assert set(draw("topk", SCORES, 3, 1)[0].tolist()) == {1, 5, 3}


@pytest.mark.parametrize("policy", ["topk", "weightedk"])
def test_rows_of_zero_score_come_last(policy):
    scores = np.array([0, 0, 1e-12, 0, 1, 0], np.float32)
    drawn = draw(policy, scores, 3, 200)
    assert {2, 4} <= set.intersection(*map(set, drawn.tolist()))


ROWS = {  # norms of 12 rows
    "uniform": np.ones(12),
    "heavy tails": np.arange(1, 13) ** -2.0,
    "one dominant": np.array([1000.0] + [1.0] * 11),
}


def scores_from(norms):
    return jnp.asarray((norms / norms.max()) ** 2, jnp.float32)


@functools.cache
def weights_of_rows(policy, k, draws=20_000):
    """Scores of 12 rows to their weights in many draws, `(draws, 12)`."""

    def draw(scores, key):
        indices, weights = select(policy, key, scores, k)
        return jnp.zeros(12).at[indices].add(weights.astype(jnp.float64))

    keys = jax.random.split(jax.random.key(k), draws)
    return jax.jit(lambda scores: jax.vmap(functools.partial(draw, scores))(keys))


@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("policy", UNBIASED_POLICIES)
@pytest.mark.parametrize("norms", ROWS.values(), ids=ROWS)
def test_unbiased(norms, policy, k):
    """The sum of 12 rows in random directions."""
    rows = np.random.default_rng(0).normal(size=(12, 5))
    rows *= (norms / np.linalg.norm(rows, axis=1))[:, None]
    sums = np.asarray(weights_of_rows(policy, k)(scores_from(norms))) @ rows
    exact = rows.sum(axis=0)
    standard_error = sums.std(axis=0) / len(sums) ** 0.5
    rounding = 1e-6 * norms.max()
    off = np.abs(sums.mean(axis=0) - exact)
    assert (off <= 4 * standard_error + rounding).all()
    assert np.linalg.norm(off) <= 4 * np.linalg.norm(standard_error) + rounding


@pytest.mark.parametrize("k", [1, 2, 4, 11])
@pytest.mark.parametrize("policy", UNBIASED_POLICIES)
def test_rows_of_infinite_score_come_once_and_the_others_unbiased(policy, k):
    scores = scores_from(ROWS["heavy tails"]).at[jnp.asarray([3, 8])].set(jnp.inf)
    weights = np.asarray(weights_of_rows(policy, k)(scores))
    if k == 1:
        assert (weights[:, [3, 8]].sum(axis=1) == 1).all()
    else:
        assert (weights[:, [3, 8]] == 1).all()
    others = np.delete(weights, [3, 8], axis=1)
    if k <= 2:
        assert not others.any()
    else:
        off = np.abs(others.mean(axis=0) - 1)
        assert (off <= 4 * others.std(axis=0) / len(others) ** 0.5 + 1e-5).all()


@pytest.mark.parametrize("k", [4, 8, 11])
@pytest.mark.parametrize("norms", ROWS.values(), ids=ROWS)
def test_priority_has_the_least_variance(norms, k):
    """For rows in random directions, of which the variances add up.

    Its threshold costs it a row, which matters for equal scores and few rows (Szegedy 2006): there
    it has the variance of `uniform` with k - 1 of rows - 1.
    """
    variance = {
        policy: weights_of_rows(policy, k)(scores_from(norms)).var(axis=0) @ norms**2
        for policy in UNBIASED_POLICIES
    }
    cost_of_a_row = (11 / (k - 1) - 1) / (12 / k - 1)
    assert variance["priority"] <= 1.05 * min(variance["crs"], cost_of_a_row * variance["uniform"])


@pytest.mark.parametrize("policy", UNBIASED_POLICIES)
def test_weights(policy):
    scores = np.array([4.0, 1.0, 0.0, 9.0, 0.0, 0.0], np.float32)
    for k in range(1, 7):
        indices, weights = select(policy, jax.random.key(k), scores, k)
        assert indices.shape == weights.shape == (k,)
        assert weights.dtype == jnp.float32
        assert np.isfinite(weights).all()
        if policy != "uniform":
            assert {0, 1, 3} <= set(indices.tolist()) or k < 3 or policy == "crs"
    indices, weights = select(policy, jax.random.key(0), scores, 6)
    assert sorted(indices.tolist()) == list(range(6))
    assert np.all(np.asarray(weights) == 1)  # k = rows is exact
    zeros = select(policy, jax.random.key(0), np.zeros_like(scores), 3)
    assert np.isfinite(zeros.weights).all()


def test_priority_keeps_a_dominant_row_as_it_is():
    scores = np.array([1e8, *[1.0] * 15], np.float32)
    for seed in range(20):
        indices, weights = map(np.asarray, select("priority", jax.random.key(seed), scores, 4))
        assert weights[indices.tolist().index(0)] == 1


def test_scores_are_those_of_the_trace_after_the_memory_is_added():
    trace = np.load(DATA / "a_topk_K3_mem_d0.9.npz")
    lr = np.sqrt(trace["lr"][0])
    for t in range(1, 25):
        scores, _ = scores_of(
            trace["memA"][t - 1] + lr * trace["X"][t], trace["memB"][t - 1] + lr * trace["G"][t]
        )
        assert scores.dtype == jnp.float32
        np.testing.assert_allclose(scores, trace["scores"][t] / trace["scores"][t].max(), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("policy", ["topk", "weightedk", "priority"])
def test_selection_ignores_constant_factors(policy, dtype):
    rng = np.random.default_rng(0)
    inputs, cotangents = 1e-6 * rng.normal(size=(64, 9)), 1e-9 * rng.normal(size=(64, 5))

    def selection(input_factor, cotangent_factor):
        scores, finite = scores_of(
            (inputs * input_factor).astype(dtype), (cotangents * cotangent_factor).astype(dtype)
        )
        assert np.all(finite)
        return set(select(policy, jax.random.key(3), scores, 16).indices.tolist())

    wanted = selection(1, 1)
    for factor in (1e-15, 1e-12, 1e-6, 1.0, 1e6, 1e15):
        power = 2.0 ** round(math.log2(factor))  # exact in every dtype: rounding turns no tie
        for factors in ((power, 1), (1, power), (power, power)):
            assert selection(*factors) == wanted, factors


def test_scores_of_rows_across_the_range_of_float32():
    rows = np.float32(np.logspace(-18, 18, 13)[:, None] * np.ones((13, 4)))
    scores, finite = scores_of(rows, np.ones((13, 1), np.float32))
    assert finite.all()
    np.testing.assert_allclose(np.sqrt(scores[6:]), np.logspace(-18, 0, 7), rtol=1e-5)


def test_the_largest_finite_rows_are_finite():
    rows = np.full((3, 64), 3.4e38, np.float32)
    rows[1] = 3.4e-30
    scores, finite = scores_of(rows, rows)
    assert finite.all()
    assert scores.tolist() == [1, 0, 1]


def test_rows_that_are_not_finite_score_infinity():
    rows = np.array([[1.0, 2.0], [np.nan, 0.0], [1.0, np.inf], [0.5, 0.5]], np.float32)
    scores, finite = scores_of(rows, np.array([[1], [1], [1], [-np.inf]], np.float32))
    assert finite.tolist() == [True, False, False, False]
    assert scores.tolist() == [1, np.inf, np.inf, np.inf]
    zeros, finite = scores_of(np.zeros((4, 2), np.float32), np.zeros((4, 1), np.float32))
    assert finite.all()
    assert not np.any(zeros)


@pytest.mark.parametrize("dtype", ["float32", "uint32"])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_the_top_k_of_gpus(k, dtype):
    scores = np.random.default_rng(0).integers(0, 12, 40).astype(dtype)  # many are equal
    if dtype == "float32":
        scores[[3, 5, 7]] = np.inf, np.inf, -np.inf
    by_rank = functools.partial(top_k_by_rank, k=k)
    both = np.stack([scores, scores[::-1]])
    for function, candidates in ((by_rank, scores), (jax.vmap(by_rank), both)):
        wanted = jax.jit(jax.lax.top_k, static_argnums=1)(candidates, k)[1]
        np.testing.assert_array_equal(jax.jit(function)(candidates), wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_without_x64(policy, without_x64):
    """No integer is larger than those of 32 bits."""
    scores = np.array([1, 1, 1, np.inf, 1], np.float32)
    chosen = select(policy, jax.random.key(0), scores, 2)
    assert chosen.indices.dtype == jnp.int32
    assert 3 in chosen.indices
