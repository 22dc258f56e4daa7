"""Rows and ranks for each layer: what is predicted is what is measured, and better than uniform."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trained_language_model
from compare_training import ALLOCATED
from small_models import (
    CLASSES,
    EXAMPLE,
    FEATURES,
    KEY,
    MLP,
    RNG,
    ROWS,
    SMALL,
    Scanned,
    batch_of,
    gradient_function,
    initial,
    loss,
    trained,
)
from trained_language_model import MODEL, linen_loss

import mem_aop_jax as aop
from mem_aop_jax._analysis.allocate import RATIOS
from mem_aop_jax._analysis.layer_variance import sampling_variance
from mem_aop_jax._core.flops import exact_flops, relative_cost
from mem_aop_jax._core.policies import priority

CONFIG = aop.MemAOP(ratio=0.5, policy="priority", memory="subspace")
WITH_INPUTS = aop.MemAOP(
    ratio=0.5, policy="priority", memory="subspace", input_grad=aop.InputGrad()
)
MEASURED = (300, 301, 302)  # numbers of batches
pytestmark = pytest.mark.usefixtures("standard_promotion")


def allocate(config, budget=None, model=SMALL, params=None, rows=ROWS, **options):
    """On three batches, of a trained model."""
    batches = [batch_of(100 + i, rows) for i in range(3)]
    options = {"batches": batches, "key": jax.random.key(1)} | options
    params = trained(model) if params is None else params
    example = jax.ShapeDtypeStruct((rows, FEATURES), jnp.float32)
    return aop.allocate(model, config, example, loss, budget, params=params, **options)


def measured(
    rules, model=SMALL, params=None, draws=200, metric=None, *, loss=loss, batches=batch_of,
    example=EXAMPLE, steps=20,
):  # fmt: skip
    """v of all parameters, on batches that the directions do not come from."""
    params = trained(model) if params is None else params
    wrapped, gradients = aop.linen.wrap(model, rules), gradient_function(loss)
    _, memory = initial(wrapped, example)
    for i in range(steps if memory else 0):
        _, memory = gradients(wrapped, params, memory, batches(200 + i), jax.random.key(i))
    weights = 1 if metric is None else flat(metric)
    found = []
    for i in MEASURED:
        exact = flat(gradients(model, params, {}, batches(i), KEY)[0])
        off = 0
        for key in map(jax.random.key, range(1000, 1000 + draws)):
            estimate = flat(gradients(wrapped, params, memory, batches(i), key)[0])
            off += np.sum(weights * (estimate - exact) ** 2) / draws
        found.append(off / np.sum(weights * exact**2))
    return float(np.mean(found))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


SIZES = [(ROWS, *sizes) for sizes in ((FEATURES, 96), (96, 128), (128, 64), (64, CLASSES))]


def cost_of(config, sizes=SIZES, unasked=1):
    """Of one configuration for all layers; nobody asks for the first ones' gradients of inputs."""
    exact = [exact_flops(*of_layer) for of_layer in sizes]
    costs = [relative_cost(config, *of_layer) for of_layer in sizes]
    unspent = sum(exact[:unasked]) / 3
    return (np.dot(costs, exact) - unspent) / (sum(exact) - unspent)


@functools.partial(jax.jit, static_argnums=1)
def drawn_weights(scores, k):
    """Of 20,000 draws of the policy."""

    def drawn(key):
        indices, weights = priority(key, scores**2, k)
        return jnp.zeros(len(scores), jnp.float32).at[indices].add(weights)

    return jax.vmap(drawn)(jax.random.split(jax.random.key(0), 20_000))


@pytest.mark.parametrize("k", [7, 20, 40])
def test_the_variance_of_a_sample(k):
    """With terms of other sizes than the scores."""
    for exponent in (0, 0.5, 2):
        rng = np.random.default_rng(0)
        scores = rng.permutation(np.arange(1.0, 65) ** -exponent)
        sizes = scores * rng.uniform(0.5, 2, 64)
        weights = drawn_weights(jnp.asarray(scores, jnp.float32), k)
        off = (np.asarray(weights) - 1) * sizes[None]
        wanted = (off**2).sum(axis=1).mean()
        assert sampling_variance(scores, sizes, k) == pytest.approx(wanted, rel=0.05 + 1.5 / k)


def test_each_group_has_a_variance_of_its_own():
    scores, groups, k = np.ones(64), 4, 16
    scores[:4] = 100
    parts = [sampling_variance(part, part, k // groups) for part in scores.reshape(groups, -1)]
    assert sampling_variance(scores, scores, k, groups) == pytest.approx(sum(parts))
    assert sum(parts) > 5 * sampling_variance(scores, scores, k)


def test_no_variance_is_negative():
    """Of one term that is almost all, and of several numbers of rows at a time."""
    scores = np.append(1e6, np.random.default_rng(0).random(63) * 1e-6)
    ks = [1, 2, 7, 40, 63]
    found = sampling_variance(scores, scores, ks)
    assert (found >= 0).all()
    np.testing.assert_array_equal(found, [sampling_variance(scores, scores, k) for k in ks])


def test_all_rows_have_no_variance():
    assert sampling_variance(np.ones(8), np.ones(8), 8) == 0
    assert sampling_variance(np.zeros(8), np.zeros(8), 3) == 0
    assert sampling_variance(np.eye(8)[0], np.ones(8), 3) == 0


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.8, 0.85])
def test_predicted_is_measured_and_better_than_uniform(budget):
    found = allocate(CONFIG, budget, MLP())
    assert found.c <= budget
    v = measured(found.rules, MLP())
    assert found.v == pytest.approx(v, rel=0.25)
    memories = [{}, {"memory": "subspace", "rank": (4, 0)}, {"memory": "subspace", "rank": 4}]
    uniform = [
        aop.MemAOP(ratio=ratio, policy="priority", **memory)
        for ratio in (1 / 8, 1 / 4, 0.4, 1 / 2)
        for memory in memories
    ]
    costs = {config: cost_of(config) for config in uniform}
    affordable = [config for config in uniform if costs[config] <= found.c]
    dearest = sorted(affordable, key=costs.get)[-3:]
    assert len(dearest) == 3
    assert v < min(measured(config, MLP()) for config in dearest)


@pytest.mark.slow
def test_with_gradients_of_inputs_too():
    """What is wrong with them is predicted, with what the layers below make of it."""
    found = allocate(WITH_INPUTS, 0.75, MLP(), draws=100)
    chosen = {choice.path: choice.config for choice in found.layers}
    first = chosen["Dense_0"]
    assert first is None or first.input_grad is None  # nobody asks for it
    assert any(config is not None and config.input_grad for config in chosen.values())
    assert found.v == pytest.approx(measured(found.rules, MLP()), rel=0.25)
    assert found.v < allocate(CONFIG, 0.75, MLP()).v / 5  # it is the better buy here


@pytest.mark.slow
def test_of_few_rows():
    """Directions hold more of a batch that they have followed than of others."""
    rows = 64
    batches = [batch_of(100 + i, rows) for i in range(8)]
    found = allocate(WITH_INPUTS, 0.85, MLP(), draws=50, batches=batches, rows=rows)
    assert any(choice.config and choice.config.input_grad for choice in found.layers)
    few = {"batches": functools.partial(batch_of, rows=rows), "example": batches[0][0]}
    assert found.v == pytest.approx(measured(found.rules, MLP(), **few), rel=0.25)


@functools.cache
def adam():
    """1 / the root of the second moments that Adam has of the gradients where it trains."""
    model, tx = MLP(), optax.adam(0.0)
    params = trained(model)
    state = tx.init(params)
    for i in range(60):
        gradient, _ = gradient_function(loss)(model, params, {}, batch_of(500 + i), KEY)
        _, state = tx.update(gradient, state)
    second_moments = optax.tree_utils.tree_get(state, "nu")
    return jax.tree.map(lambda nu: 1 / (jnp.sqrt(nu) + 1e-8), second_moments)


@pytest.mark.slow
def test_predicted_in_the_metric_of_adam_is_measured():
    """On the mean over batches, which differ by more than in plain squares."""
    found = [
        allocate(
            CONFIG,
            0.85,
            MLP(),
            metric=adam(),
            key=jax.random.key(i),
            batches=[batch_of(100 + 10 * i + j) for j in range(3)],
        )
        for i in range(4)
    ]
    rules = {allocation.rules for allocation in found}
    v = np.mean([measured(chosen, MLP(), metric=adam()) for chosen in rules])
    assert np.mean([allocation.v for allocation in found]) == pytest.approx(v, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [100, 1200])  # early and late
@pytest.mark.parametrize(
    ("config", "budget"),
    [(ALLOCATED, 0.84), (dataclasses.replace(ALLOCATED, input_grad=aop.InputGrad()), 0.77)],
)
def test_of_a_language_model(config, budget, steps, standard_promotion):
    """At width 192 with 2,048 rows: as predicted, and better than the best of all layers alike.

    Early, gradients of batches differ by more than a factor of 2, and v with them: it is measured
    on those of which it was predicted, but with directions of other batches.
    """
    _, params, windows = trained_language_model.after(steps)
    model, task = MODEL, {"loss": linen_loss, "example": windows(0)[:, :-1]}
    batches = [windows(i) for i in (299, *MEASURED)]  # the first is for directions alone
    options = {"batches": batches, "key": jax.random.key(1), "layers": "block.*"}
    found = aop.allocate(
        model, config, task["example"], task["loss"], budget, params=params, **options
    )
    assert found.c <= budget
    measure = functools.partial(
        measured, model=model, params=params, draws=20, batches=windows, steps=60, **task
    )
    v = measure(found.rules)

    layers = aop.linen.layers(aop.linen.wrap(model, config), jax.random.key(0), task["example"])
    cost = functools.partial(cost_of, sizes=[layer[1:4] for layer in layers], unasked=0)
    uniform = [
        dataclasses.replace(
            config, ratio=ratio, rank=rank,
            input_grad=input_ratio and aop.InputGrad(input_ratio, 32),
        )
        for ratio in (1 / 16, 1 / 8, 1 / 4)
        for rank in ((8, 8), (24, 8), (16, 16), (32, 32))
        for input_ratio in ((1 / 4, 1 / 2, 3 / 4) if config.input_grad else (None,))
    ]  # fmt: skip
    affordable = sorted((c for c in uniform if cost(c) <= found.c), key=cost)[-3:]
    assert affordable
    best = min(measure([("head", None), (".*", config)]) for config in affordable)
    print(f"after {steps} steps, {budget}: c {found.c:.3f}, v {found.v:.4f}, {v:.4f}, {best:.4f}")
    assert found.v == pytest.approx(v, rel=0.25)
    assert v <= best


def test_a_metric_says_what_counts():
    ones = jax.tree.map(np.ones_like, trained(SMALL))
    found, plain = allocate(CONFIG, 0.85, metric=ones), allocate(CONFIG, 0.85)
    assert found.rules == plain.rules
    assert found.v == pytest.approx(plain.v)
    one_layer = jax.tree.map(np.zeros_like, ones) | {"Dense_1": ones["Dense_1"]}
    first, last = allocate(CONFIG, 0.85, metric=one_layer).layers
    assert last.v >= first.v == 0
    assert first.config.ratio == min(RATIOS)


def test_the_budget_of_the_least_product():
    found = allocate(CONFIG)
    assert found.verdict() == pytest.approx((1 + found.v) * found.c)
    for budget in (0.8, 0.9):
        assert found.verdict() <= allocate(CONFIG, budget).verdict() + 1e-6


def test_all_of_it_is_exact():
    found = allocate(CONFIG, 1.0)
    assert found.v == 0
    assert found.c == 1
    assert all(config is None for _, config in found.rules)


def test_the_rules_and_the_table():
    found = allocate(CONFIG, 0.8)
    assert [choice.path for choice in found.layers] == ["Dense_0", "Dense_1"]
    listed = aop.linen.layers(aop.linen.wrap(SMALL, found.rules), jax.random.key(0), EXAMPLE)
    approximate = [path.replace("\\", "") for path, config in found.rules if config]
    assert [layer.path for layer in listed] == approximate
    lines = str(found).splitlines()
    assert len(lines) == 2 + 2 + 1
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells[0] == "**model**"
    assert float(cells[-1]) == pytest.approx(found.c, abs=1e-3)
    assert float(cells[-2]) == pytest.approx(found.v, rel=1e-2)


@pytest.mark.parametrize(
    ("model", "some"),
    [
        (SMALL, {"Dense_1"}),
        pytest.param(MLP(), {"Dense_1", "Dense_2"}, marks=pytest.mark.slow),
    ],
    ids=["small", "large"],
)
def test_only_some_layers(model, some):
    found = allocate(WITH_INPUTS, 0.9, model, layers="|".join(sorted(some)))
    assert {choice.path for choice in found.layers} == some
    listed = aop.linen.layers(aop.linen.wrap(model, found.rules), jax.random.key(0), EXAMPLE)
    assert {layer.path for layer in listed} <= some


@pytest.mark.parametrize(
    "model", [SMALL, pytest.param(MLP(), marks=pytest.mark.slow)], ids=["small", "large"]
)
def test_without_a_memory(model):
    plain = aop.MemAOP(ratio=0.5, policy="priority", input_grad=aop.InputGrad(rank=0))
    found = allocate(plain, 0.65, model)
    assert all(config.memory_kind is None for _, config in found.rules if config)
    assert found.v == pytest.approx(measured(found.rules, model, draws=50), rel=0.25)


class Dropped(nn.Module):
    """Draws at random, too; and most of the rows have no cotangents."""

    widths: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(96)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        for features in self.widths:
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(CLASSES)(x)


@pytest.mark.parametrize(
    ("widths", "budget"), [((), 0.6), pytest.param((64,), 0.55, marks=pytest.mark.slow)]
)
def test_other_randomness_and_rows_without_cotangents(widths, budget):
    model, x = Dropped(widths), batch_of(0)[0]
    params, _ = initial(model)

    def loss_fn(model, variables, batch, key):
        rngs = {RNG: key, "dropout": jax.random.fold_in(key, 1)}
        return jnp.sum(model.apply(variables, batch[0], True, rngs=rngs)[: ROWS // 3] ** 2)

    options = {"batches": [batch_of(1), batch_of(2)], "key": KEY, "params": params}
    found = aop.allocate(model, WITH_INPUTS, (x, False), loss_fn, budget, draws=20, **options)
    chosen = [choice for choice in found.layers if choice.config and choice.config.input_grad]
    assert chosen
    assert all(choice.v > 0 for choice in chosen if choice.config.input_grad.ratio < 1 / 3)
    # with another dropout in each draw, they would look more harmful
    assert 0 < max(choice.v for choice in chosen) < 0.1


def test_stacked_layers_and_repeated_calls():
    model = Scanned()
    params, _ = initial(model)
    found = allocate(CONFIG, 0.8, model, params, layers="(?!head).*")
    assert [choice.path for choice in found.layers] == ["stack/Dense_0", "twice"]
    assert found.v == pytest.approx(measured(found.rules, model, params, draws=50), rel=0.25)


class Called(nn.Module):
    @nn.compact
    def __call__(self, x):
        twice = nn.Dense(FEATURES)
        return twice(jnp.tanh(twice(x))[: ROWS // 2])


def test_calls_of_different_sizes():
    with pytest.raises(ValueError, match=r"Dense_0 is called with \(256, 48, 48\) and \(128, 48"):
        allocate(CONFIG, 0.8, Called(), {})


def test_a_last_layer_of_zeros():
    """Nobody's gradient of inputs is zero because nobody asks for it."""
    params = trained(SMALL)
    params = params | {"Dense_1": jax.tree.map(np.zeros_like, params["Dense_1"])}
    found = allocate(WITH_INPUTS, 0.9, params=params, layers="Dense_1")
    last = aop.MemAOP(ratio=1 / 32, policy="priority")
    assert allocate(WITH_INPUTS, 1.0, params=params, layers="Dense_1").c == 1
    assert found.c <= 0.9 < relative_cost(last, ROWS, *SMALL.widths, SMALL.outputs) + 1 / 3


def with_nan(i):
    inputs, labels = batch_of(i)
    inputs[3, 4] = np.nan
    return inputs, labels


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"config": None}, TypeError, r"config is of type NoneType, not aop.MemAOP"),
        ({"config": aop.MemAOP(k=2)}, ValueError, r"policy='topk'.*policy='priority'"),
        ({"budget": 1.5}, ValueError, r"budget=1.5.*in \(0, 1\]"),
        ({"budget": 0.2}, ValueError, r"budget=0.2; the cheapest choice .* costs 0\.\d+ of exact"),
        ({"batches": []}, ValueError, r"got 0 batches; at least 2"),
        ({"batches": [batch_of(1), with_nan(2)]}, ValueError, r"batch 1 has the norm nan"),
        (
            {"batches": [batch_of(i, rows=64) for i in (1, 2)]},
            ValueError,
            r"Dense_1: a batch with 64 rows, where the example input has 256",
        ),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        allocate(**{"config": CONFIG, "budget": 0.8} | change)
