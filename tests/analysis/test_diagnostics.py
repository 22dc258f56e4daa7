"""Diagnostics: every figure against a numpy computation of it."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mem_aop_jax as aop

M, N, P = 32, 6, 5
COLLECTION = aop.linen.COLLECTION
SUBSPACE = aop.MemAOP(ratio=0.25, policy="priority", memory="subspace", rank=2)
WITH_INPUTS = dataclasses.replace(SUBSPACE, input_grad=aop.InputGrad(0.25, 3))
SAMPLED = aop.MemAOP(ratio=0.5, policy="priority", input_grad=aop.InputGrad(0.5, 0))
ROWS = aop.MemAOP(k=8)
KEY = jax.random.key(0)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = numbers(M, N) * np.asarray([[8, 4, 2, 1, 0.5, 0.25]], np.float32)
G = numbers(M, P, seed=1)
KERNEL = numbers(N, P, seed=2)


@functools.cache
def loss_of(config):
    def loss_fn(kernel, memory, x, g, key):
        return jnp.sum(aop.dense(x, kernel, memory["one"], config=config, key=key) * g)

    return loss_fn


def measured(config, memory=None, x=X, g=G, key=KEY, **options):
    memory = memory or aop.init_memory(config, M, N, P) or aop.Probe.of(None, draws=1)
    args = KERNEL, {"one": memory}, x, g, key
    found = aop.diagnostics(loss_of(config), *args, count_flops=False, **options)
    assert list(found.layers) == ["one"]
    return found


@functools.partial(jax.jit, static_argnums=0)
def draws_of(config, keys):
    memory = {"one": aop.init_memory(config, M, N, P)}
    grad_fn = jax.grad(loss_of(config))
    return jax.vmap(lambda key: grad_fn(KERNEL, memory, X, G, key))(keys)


EXACT = np.asarray(X.T @ G, np.float64)


@pytest.mark.parametrize(
    "config",
    [SUBSPACE, aop.MemAOP(ratio=0.25, policy="priority"), aop.MemAOP(k=8, policy="uniform")],
    ids=["subspace", "priority", "uniform"],
)
def test_an_unbiased_estimate(config):
    found = measured(config, draws=1_000).layers["one"]
    draws = np.asarray(draws_of(config, jax.random.split(jax.random.key(7), 1_000)))
    off = draws - EXACT
    size = np.linalg.norm(EXACT)
    v = (off**2).sum(axis=(1, 2)).mean() / size**2
    assert found.v == pytest.approx(v, rel=0.1)
    assert found.error == pytest.approx(v**0.5, rel=0.1)
    assert found.gradient_norm == pytest.approx(size, rel=1e-5)
    norms = np.linalg.norm(draws, axis=(1, 2))
    cosines = (draws * EXACT).sum(axis=(1, 2)) / norms / size
    assert found.cosine == pytest.approx(cosines.mean(), abs=0.07)
    assert found.estimate_norm == pytest.approx((norms**2).mean() ** 0.5, rel=0.05)
    assert found.uses == 1


def test_the_papers_policy():
    """One draw is as good as any, and what stays out is the error."""
    found = measured(ROWS).layers["one"]
    norms = np.linalg.norm(X, axis=1) * np.linalg.norm(G, axis=1)
    chosen = np.argsort(norms)[-8:]
    estimate = X[chosen].T @ G[chosen]
    assert found.v == pytest.approx(0, abs=1e-6)
    off = np.linalg.norm(estimate - EXACT) / np.linalg.norm(EXACT)
    assert found.error == pytest.approx(off, rel=1e-4)
    assert found.chosen == pytest.approx(norms[chosen].sum() / norms.sum(), rel=1e-4)
    without_key = measured(ROWS, key=None)
    assert without_key.layers["one"].error == pytest.approx(off, rel=1e-4)


def stack(config):
    """Two layers, the first of which nobody asks for the gradient of its inputs."""

    def loss_fn(params, memory, x, sign, key):
        y = x
        for i, (kernel, own) in enumerate(zip(params["kernels"], memory, strict=True)):
            own_key = jax.random.fold_in(key, i)
            y = aop.dense(y, kernel, own, config=config, key=own_key) + params["bias"]
        return sign * jnp.sum(y**2)

    kernels, bias = [numbers(N, N, seed=i) for i in (3, 4)], np.ones((1, N), np.float32)
    memory = [aop.init_memory(config, M, N, N) or aop.Probe.of(None, draws=1) for _ in range(2)]
    return loss_fn, {"kernels": kernels, "bias": bias}, memory


@pytest.mark.parametrize(
    "config",
    [WITH_INPUTS, pytest.param(SAMPLED, marks=pytest.mark.slow)],
    ids=["subspace", "sampling alone"],
)
def test_an_approximate_gradient_of_the_inputs(config):
    """Its own variance, and that of the whole gradient, which it adds to."""
    loss_fn, params, memory = stack(config)
    args = params, memory, X, 1.0, jax.random.key(0)
    found = aop.diagnostics(loss_fn, *args, draws=400, count_flops=False)
    first, second = found.layers.values()
    assert first.input_v == 0
    kernels, bias = params["kernels"], params["bias"]
    y = X @ kernels[0] + bias
    g = 2 * (y @ kernels[1] + bias)
    exact_inputs = g @ kernels[1].T
    exact = {"kernels": [X.T @ exact_inputs, y.T @ g], "bias": (g + exact_inputs).sum(axis=0)}
    memory = [None if config.memory_kind is None else own for own in memory]
    keys = jax.random.split(jax.random.key(1), 2_000)

    def draw(key):
        def layer_loss(y):
            return jnp.sum(aop.dense(y, kernels[1], memory[1], config=config, key=key) * g)

        return jax.grad(layer_loss)(y), jax.grad(loss_fn)(params, memory, X, 1.0, key)

    input_draws, draws = jax.jit(jax.vmap(draw))(keys)
    off = np.asarray(input_draws) - exact_inputs
    v = (off**2).sum(axis=(1, 2)).mean() / (exact_inputs**2).sum()
    assert second.input_v == pytest.approx(v, rel=0.1)

    draws, exact = (
        np.concatenate([np.asarray(a).reshape(n, -1) for a in jax.tree.leaves(tree)], axis=1)
        for tree, n in ((draws, len(keys)), (exact, 1))
    )
    v = ((draws - exact) ** 2).sum(axis=1).mean() / (exact**2).sum()
    assert found.model.v == pytest.approx(v, rel=0.1)
    assert found.model.error == pytest.approx(v**0.5, rel=0.1)
    cosines = (draws @ exact[0]) / np.linalg.norm(draws, axis=1) / np.linalg.norm(exact)
    assert found.model.cosine == pytest.approx(cosines.mean(), abs=0.05)
    assert found.model.gradient_norm == pytest.approx(np.linalg.norm(exact), rel=1e-4)
    assert v > 1.05 * float(first.v * (first.gradient_norm / found.model.gradient_norm) ** 2)


@pytest.mark.parametrize(
    "config",
    [WITH_INPUTS, pytest.param(SAMPLED, marks=pytest.mark.slow)],
    ids=["subspace", "sampling alone"],
)
def test_the_sign_of_the_loss_makes_no_difference(config):
    loss_fn, params, memory = stack(config)
    args = jax.tree.map(np.abs, params), memory, np.abs(X)
    found, other = (
        aop.diagnostics(loss_fn, *args, sign, KEY, draws=400, count_flops=False).model
        for sign in (1.0, -1.0)
    )
    for ours, wanted in zip(found, other, strict=True):
        assert ours == pytest.approx(float(wanted), rel=1e-3)


def test_energies_and_ranks():
    memory = aop.init_memory(SUBSPACE, M, N, P)
    found = measured(SUBSPACE, memory).layers["one"]
    for rows, basis, inside, rank in (
        (X, memory.inputs, found.inputs_inside, found.inputs_rank),
        (G, memory.cotangents, found.cotangents_inside, found.cotangents_rank),
    ):
        rows = np.asarray(rows, np.float64)
        energy = (rows**2).sum()
        assert inside == pytest.approx(((rows @ np.asarray(basis)) ** 2).sum() / energy, rel=1e-4)
        shares = np.cumsum(np.linalg.svd(rows, compute_uv=False) ** 2) / energy
        assert float(rank) == 1 + (shares < 0.9).sum()
    assert measured(ROWS).layers["one"].inputs_inside == 0


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((M,), SUBSPACE),
        ((4, M // 4), SUBSPACE),
        pytest.param((3, M), aop.MemAOP(ratio=0.25, policy="uniform"), marks=pytest.mark.slow),
    ],
)
def test_the_noise_of_the_batch(shape, config):
    """From the gradients of equal parts of the batch: of examples, not of their rows."""
    x, g = numbers(*shape, N, seed=3) + 0.3, numbers(*shape, P, seed=4) + 0.3
    found = measured(config, x=x, g=g).layers["one"]
    parts = min(8, shape[0])
    x, g = (np.asarray(a, np.float64).reshape(parts, -1, a.shape[-1]) for a in (x, g))
    gradients = parts * np.einsum("cmn,cmp->cnp", x, g)  # of a loss that is a mean over the batch
    mean = gradients.mean(axis=0)
    variance = ((gradients - mean) ** 2).sum() / (parts - 1) / parts
    assert found.noise == pytest.approx(variance / (mean**2).sum(), rel=1e-3)


def test_one_example_tells_no_noise():
    found = measured(SUBSPACE, x=X[None], g=G[None])
    assert np.isnan(found.layers["one"].noise)
    assert found.layers["one"].error > 0


@pytest.mark.parametrize("factor", [1e-25, 1e20])
def test_nothing_depends_on_the_size_of_the_gradient(factor):
    sizes, scaled = (measured(SUBSPACE, g=G * np.float32(f)).layers["one"] for f in (1, factor))
    assert scaled.gradient_norm == pytest.approx(float(sizes.gradient_norm) * factor, rel=1e-4)
    for figures in (sizes, scaled):
        relative = figures._replace(gradient_norm=0, estimate_norm=0)
        np.testing.assert_allclose(
            relative, sizes._replace(gradient_norm=0, estimate_norm=0), rtol=1e-4, atol=1e-6
        )


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(24)(x))

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.relu(nn.Dense(24, name="inner")(x)), None

        keys = {"params": True, aop.linen.RNG: True}
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs=keys, length=2)
        return nn.Dense(1)(stack(name="blocks")(x, None)[0])


def linen_loss(model):
    def loss_fn(params, memory, x, key):
        variables = {"params": params, COLLECTION: memory}
        y = model.apply(variables, x, rngs={aop.linen.RNG: key})
        return jnp.mean((y - jnp.sum(x, axis=-1, keepdims=True)) ** 2), y

    return loss_fn


@pytest.mark.parametrize(
    ("memory_kind", "count_flops"),
    [("subspace", False), (None, True), pytest.param("subspace", True, marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("standard_promotion")
def test_a_wrapped_model_with_a_stack_of_layers(memory_kind, count_flops):
    config = aop.MemAOP(ratio=0.25, policy="priority", memory=memory_kind)
    if memory_kind:
        config = dataclasses.replace(config, rank=3)
    model = aop.linen.wrap(Model(), [("Dense_1", None), (".*", config)])
    x, key = numbers(M, 16), jax.random.key(0)
    variables = jax.jit(model.init)(key, x)
    memory = variables.get(COLLECTION, {})
    memory = aop.linen.probes(model, memory, key, x)
    if memory_kind:
        jax.tree.map(np.testing.assert_array_equal, memory, variables[COLLECTION])
    loss_fn = linen_loss(model)
    args, options = (variables["params"], memory, x, key), {"draws": 4, "has_aux": True}
    found = aop.diagnostics(loss_fn, *args, **options, count_flops=count_flops)
    assert (found.step_cost is None) != count_flops
    names = [name.split("/DotGeneral")[0] for name in found.layers]
    assert names == ["Dense_0", "blocks/inner[0]", "blocks/inner[1]"]

    # The whole: from the gradients themselves.
    grad_fn = jax.jit(jax.grad(linen_loss(Model()), has_aux=True))
    exact, _ = grad_fn(variables["params"], {}, x, key)
    norms = [np.linalg.norm(exact["Dense_0"]["kernel"])]
    norms += [np.linalg.norm(kernel) for kernel in exact["blocks"]["inner"]["kernel"]]
    ours = [layer.gradient_norm for layer in found.layers.values()]
    np.testing.assert_allclose(ours, norms, rtol=1e-4)
    assert found.model.gradient_norm == pytest.approx(np.linalg.norm(norms), rel=1e-4)
    vs = np.array([layer.v for layer in found.layers.values()])
    whole = (vs * np.square(norms)).sum() / np.square(norms).sum()
    assert found.model.v == pytest.approx(whole, rel=1e-3)
    costs = np.array([layer.c for layer in found.layers.values()])
    sizes = np.array([6 * M * n * 24 for n in (16, 24, 24)])
    assert found.model.flops == sizes.sum()
    assert found.model.c == pytest.approx((costs * sizes).sum() / sizes.sum(), rel=1e-5)


@pytest.mark.parametrize("count_flops", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("standard_promotion")
def test_an_nnx_model(count_flops):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.dense = aop.nnx.Linear(N, P, rows=M, config=SUBSPACE, rngs=rngs)

        def __call__(self, x):
            return self.dense(x)

    model = Layer(nnx.Rngs(0))
    graph, params, memory, rest = nnx.split(model, nnx.Param, aop.nnx.Memory, ...)

    def loss_fn(params, memory, x, g):
        return jnp.sum(nnx.merge(graph, params, memory, jax.tree.map(jnp.copy, rest))(x) * g)

    found = aop.diagnostics(loss_fn, params, memory, X, G, count_flops=count_flops)
    assert list(found.layers) == ["dense/dot_general"]
    assert 0 < found.model.error < 2


def test_the_verdict_and_the_table():
    found = measured(SUBSPACE)
    one = found.layers["one"]
    assert found.verdict("one") == pytest.approx((1 + one.error**2) * one.c)
    table = str(found).splitlines()
    assert len(table) == 4
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert cells[0] == "one"
    assert float(cells[1]) == pytest.approx(float(one.error), rel=1e-2)
    assert float(cells[7]) == pytest.approx(float(found.verdict("one")), rel=1e-2)
    pays = "if the batch is large" if one.c < 1 else "no"
    assert cells[8] == ("yes" if found.verdict("one") < 1 else pays)
    assert all(leaf.shape == () for leaf in jax.tree.leaves(found))


def test_what_was_chosen_counts_once_and_in_all_groups():
    norms = jnp.asarray([[1000], [1], [1], [1], [4], [4], [4], [4]], jnp.float32)
    for config, wanted in (
        (aop.MemAOP(k=2, groups=2), 1004 / 1019),
        (aop.MemAOP(k=4, policy="crs"), 1000 / 1019),
        (aop.MemAOP(k=8), 1),
    ):
        memory = aop.init_memory(config, 8, 1, 1) or aop.Probe.of(None, draws=1)
        args = jnp.ones((1, 1), jnp.float32), {"one": memory}, norms, jnp.ones_like(norms)
        found = aop.diagnostics(loss_of(config), *args, KEY, count_flops=False)
        assert found.layers["one"].chosen == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("config", [ROWS, pytest.param(SUBSPACE, marks=pytest.mark.slow)])
def test_a_layer_that_took_no_part_is_left_out_and_one_used_twice_is_an_error(config):
    loss_fn = loss_of(config)
    memory = {name: aop.init_memory(config, M, N, P) for name in ("one", "other")}
    args = KERNEL, memory, X, G, KEY
    found = aop.diagnostics(loss_fn, *args, count_flops=False)
    assert list(found.layers) == ["one"]

    def twice(*args):
        return loss_fn(*args) + loss_fn(*args)

    with pytest.raises(ValueError, match=r"memory of one was used 2.0 times"):
        aop.diagnostics(twice, *args)


def test_a_gradient_of_zeros():
    found = measured(SUBSPACE, g=np.zeros_like(G))
    assert found.model.error == found.model.v == found.model.chosen == 0
    assert np.isfinite(jax.tree.leaves(found.model)).all()


def test_names():
    """Of any pytree of memories; only "memory" is left out."""
    memory = {name: aop.init_memory(ROWS, M, N, P) for name in ("query", "value", "memory")}

    def loss_fn(kernel, memory, x, g, key):
        calls = ({"one": memory["a"][name]} for name in memory["a"])
        return sum(loss_of(ROWS)(kernel, call, x, g, key) for call in calls)

    args = KERNEL, {"a": memory}, X, G, KEY
    found = aop.diagnostics(loss_fn, *args, count_flops=False)
    assert set(found.layers) == {"a/query", "a/value", "a"}
    assert found.step_cost is None


def test_other_parameters_and_the_compilers_count():
    """Integers among the parameters, and a loss that is compiled already."""

    @jax.jit
    def loss_fn(params, memory, x, g, key):
        return loss_of(SUBSPACE)(params["kernel"], memory, x, g, key) * params["number"]

    params = {"kernel": KERNEL, "number": 2, "nothing": None}
    memory = {"one": aop.init_memory(SUBSPACE, M, N, P)}
    found = aop.diagnostics(loss_fn, params, memory, X, G, KEY)
    assert found.layers["one"].gradient_norm == pytest.approx(2 * np.linalg.norm(EXACT), rel=1e-5)
    assert found.step_cost > 0


def test_bad_input():
    with pytest.raises(ValueError, match=r"draws=1.*at least 2"):
        measured(SUBSPACE, draws=1)
    config = aop.MemAOP(k=8, policy="priority")
    with pytest.raises(ValueError, match=r"of 0 memories none took part.*linen\.probes"):
        aop.diagnostics(
            lambda kernel, memory, key: jnp.sum(aop.dense(X, kernel, config=config, key=key)),
            KERNEL, {}, jax.random.key(0),
        )  # fmt: skip
