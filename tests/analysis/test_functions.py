"""plan, diagnostics, allocate, Controller and advise on functions: as on the same Linen model."""

import functools
import itertools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_models
from flax import nnx
from tasks import text, transformer
from trained_language_model import linen_loss

import mem_aop_jax as aop

pytestmark = pytest.mark.usefixtures("standard_promotion")

KEY = jax.random.key(0)
CONFIG = aop.MemAOP(ratio=0.25, policy="priority", memory="subspace", rank=4)
RATES = aop.Rates("some", 1e12, 1e12, 1e11)


# ---- a transformer in three forms, with equal weights

WIDTH, LAYERS, HEADS, SEQUENCE, BATCH = 32, 1, 2, 16, 8
LINEN = transformer.Transformer(WIDTH, LAYERS, HEADS)
logits = functools.partial(transformer.logits, LINEN)


def windows(i):
    rng = np.random.default_rng(i)
    return jnp.asarray(rng.integers(0, text.VOCABULARY, (BATCH, SEQUENCE + 1)))


WINDOWS = [windows(i) for i in range(3)]
EXAMPLE = WINDOWS[0][:, :-1]


def cross_entropy(logits, windows):
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def layer_norm(params, x):
    x = x - x.mean(-1, keepdims=True)
    return (
        x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]
    )


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def attention(qkv):
    qkv = qkv.reshape(*qkv.shape[:-1], 3, HEADS, WIDTH // HEADS)
    y = jax.nn.dot_product_attention(*(qkv[..., i, :, :] for i in range(3)), is_causal=True)
    return y.reshape(*y.shape[:-2], WIDTH)


def plain_loss(params, windows):
    x = params["embedding"]["embedding"][windows[:, :-1]] + params["positions"]
    for i in range(LAYERS):
        block = params[f"block_{i}"]
        x += dense(
            block["out"], attention(dense(block["qkv"], layer_norm(block["LayerNorm_0"], x)))
        )
        up = dense(block["up"], layer_norm(block["LayerNorm_1"], x))
        x += dense(block["down"], nn.gelu(up))
    return cross_entropy(dense(params["head"], layer_norm(params["LayerNorm_0"], x)), windows)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.LayerNorm_0, self.LayerNorm_1 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x += self.out(attention(self.qkv(self.LayerNorm_0(x))))
        return x + self.down(nnx.gelu(self.up(self.LayerNorm_1(x))))


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Embed(text.VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((SEQUENCE, WIDTH)))
        for i in range(LAYERS):
            setattr(self, f"block_{i}", Block(rngs))
        self.LayerNorm_0 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, text.VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens) + self.positions
        for i in range(LAYERS):
            x = getattr(self, f"block_{i}")(x)
        return self.head(self.LayerNorm_0(x))


GRAPH, STATE = nnx.split(Transformer(nnx.Rngs(0)))


def nnx_loss(params, windows):
    return cross_entropy(nnx.merge(GRAPH, params)(windows[:, :-1]), windows)


@functools.cache
def params_of(form):
    params = jax.jit(LINEN.init)(KEY, EXAMPLE)["params"]
    if form == "NNX":
        nnx.replace_by_pure_dict(STATE, params)
        return STATE
    return params


LOSSES = {"plain": plain_loss, "NNX": nnx_loss}
FORMS = ["plain", pytest.param("NNX", marks=pytest.mark.slow)]
RULES = [("head", None), (".*", CONFIG)]
RULES_OF_PARAMETERS = [("head/kernel", None), (".*", CONFIG)]


def approximated(form, rules=RULES_OF_PARAMETERS):
    return aop.approximate(LOSSES[form], rules)


def without_kernel(path):
    return path.removesuffix("/kernel")


def test_the_forms_are_the_same_function():
    wanted = text.next_token_loss(logits, params_of("Linen"), WINDOWS[0])
    for form, loss in LOSSES.items():
        np.testing.assert_allclose(loss(params_of(form), WINDOWS[0]), wanted, rtol=1e-5)


@pytest.mark.parametrize("form", LOSSES)
def test_the_same_plan(form):
    ours = aop.plan(approximated(form), params_of(form), WINDOWS[0], rates=RATES)
    wanted = aop.plan(LINEN, RULES, EXAMPLE, rates=RATES)
    named = [layer._replace(path=without_kernel(layer.path)) for layer, _, _ in ours.layers]
    assert named == [layer for layer, _, _ in wanted.layers]
    assert [rest for _, *rest in ours.layers] == [rest for _, *rest in wanted.layers]
    assert [(without_kernel(p.replace("\\", "")), c) for p, c in ours.rules] == [
        (p.replace("\\", ""), c) for p, c in wanted.rules
    ]


@functools.cache
def linen_diagnostics():
    model, params = aop.linen.wrap(LINEN, RULES), params_of("Linen")
    memory = jax.jit(model.init)(KEY, EXAMPLE)[aop.linen.COLLECTION]

    def loss(params, memory, windows, key):
        return linen_loss(model, {"params": params, aop.linen.COLLECTION: memory}, windows, key)

    return aop.diagnostics(loss, params, memory, WINDOWS[0], KEY, count_flops=False)


@pytest.mark.slow
@pytest.mark.parametrize("form", LOSSES)
def test_the_same_diagnostics(form):
    approx, params = approximated(form), params_of(form)
    memory = approx.init(params, WINDOWS[0])
    ours = aop.diagnostics(approx, params, memory, KEY, WINDOWS[0], count_flops=False)
    wanted = linen_diagnostics()
    assert {without_kernel(name) for name in ours.layers} == set(wanted.layers)
    for name, layer in ours.layers.items():
        same = wanted.layers[without_kernel(name)]
        np.testing.assert_allclose(layer.noise, same.noise, rtol=1e-2)
        np.testing.assert_allclose(layer.gradient_norm, same.gradient_norm, rtol=1e-3)
    np.testing.assert_allclose(ours.model.v, wanted.model.v, rtol=0.15)


def linen_form(loss=linen_loss):
    return {"example_input": EXAMPLE, "loss": loss}


@functools.cache
def linen_allocation():
    options = {"params": params_of("Linen"), "batches": WINDOWS, "key": KEY, "layers": "block_.*"}
    return aop.allocate(LINEN, CONFIG, **linen_form(), budget=0.9, **options)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_allocation(form):
    batches = [(batch,) for batch in WINDOWS]
    ours = aop.allocate(approximated(form), params_of(form), batches, KEY, budget=0.9)
    wanted = linen_allocation()
    for choice, same in zip(ours.layers, wanted.layers, strict=True):
        assert (without_kernel(choice.path), choice.config) == (same.path, same.config)
    assert ours.v == pytest.approx(wanted.v, rel=1e-3)
    assert ours.c == pytest.approx(wanted.c)


@functools.cache
def linen_decision():
    choices = {"all": RULES, "allocated": linen_allocation().rules}
    controller = aop.Controller(LINEN, choices, EXAMPLE, linen_loss)
    memory = controller.decide(3, params_of("Linen"), {}, WINDOWS, KEY)
    return controller.log[0], memory


@pytest.mark.slow
@pytest.mark.parametrize("form", LOSSES)
def test_the_same_decision(form):
    allocated = [(f"{path}/kernel", config) for path, config in linen_allocation().rules]
    choices = {"all": RULES_OF_PARAMETERS, "allocated": allocated}
    approx, params = approximated(form), params_of(form)
    costs = {"exact": 1.0, "all": 0.1, "allocated": 0.2}
    controller = aop.Controller(approx, choices, params, WINDOWS[0], costs=costs)
    memory = controller.decide(3, params, {}, [(batch,) for batch in WINDOWS], KEY)
    ours, (wanted, _) = controller.log[0], linen_decision()
    assert ours.noise == pytest.approx(wanted.noise, rel=1e-3)
    assert ours.v == pytest.approx(wanted.v, rel=1e-2)  # the sites draw with the same keys
    assert controller.choice == "all"
    jax.jit(jax.grad(controller.approx, argnums=(0, 1)))(params, memory, KEY, WINDOWS[0])
    kinds = (jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (
        memory, approx.init(params, WINDOWS[0])
    ))  # fmt: skip
    assert len(set(map(str, kinds))) == 1
    memory = controller.decide(4, params, memory, [(batch,) for batch in WINDOWS], KEY)
    assert controller.log[1].v["all"] < 1.5 * ours.v["all"]


# ---- scans, experts, parameters used twice

FEATURES, ROWS = 24, 128


def numbers(*shape, seed=0):
    values = np.random.default_rng((seed, *shape)).normal(size=shape)
    return jnp.asarray(values / shape[-2] ** 0.5, jnp.float32)


PARAMS = {
    "in": numbers(16, FEATURES),
    "stack": numbers(3, FEATURES, FEATURES),
    "twice": numbers(FEATURES, FEATURES),
    "experts": numbers(4, FEATURES, FEATURES),
    "out": numbers(FEATURES, 5),
}


def loss(params, x, y, act="tanh"):
    """Also with something else that it returns, and an argument that is no array."""
    act = getattr(jnp, act)
    x = x @ params["in"]
    x, _ = jax.lax.scan(lambda h, kernel: (h + act(h @ kernel), None), x, params["stack"])
    x = x + act(act(x @ params["twice"]) @ params["twice"])
    x = act(jnp.einsum("ebi,eio->ebo", x.reshape(4, -1, FEATURES), params["experts"]))
    return jnp.mean((x.reshape(-1, FEATURES) @ params["out"] - y) ** 2), {"mean": x.mean()}


def batch(i):
    return numbers(ROWS, 16, seed=i) * ROWS**0.5, numbers(ROWS, 5, seed=i) * ROWS**0.5, "tanh"


BATCHES = [batch(i) for i in range(3)]
SITES = ["in", "stack", "twice", "twice#1", "experts", "out"]


class Network(nnx.Module):
    """Layers of different widths and spectra."""

    def __init__(self, rngs):
        widths = [small_models.FEATURES, 96, 128, small_models.CLASSES]
        self.layers = nnx.List(nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(widths))

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x)) if layer is not self.layers[-1] else layer(x)
        return x


NETWORK, NETWORK_PARAMS = nnx.split(Network(nnx.Rngs(0)))


def network_loss(params, x, labels):
    logits = nnx.merge(NETWORK, params)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), None


MODELS = {  # name: loss, parameters, batches by number, how often each site runs
    "experts": (loss, PARAMS, batch, {"stack": 3, "experts": 4}),
    "NNX": (network_loss, NETWORK_PARAMS, small_models.batch_of, {}),
}


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def measured(model, rules, draws=100):
    """v of the gradient of all parameters, with directions from other batches."""
    loss, params, batch, _ = MODELS[model]
    approx = aop.approximate(lambda *args: loss(*args)[0], rules)
    memory = approx.init(params, *batch(0))
    gradient = jax.jit(
        lambda memory, key, x, y: jax.grad(approx, (0, 1))(params, memory, key, x, y)
    )
    for i in range(5 if memory else 0):
        _, memory = gradient(memory, jax.random.key(i), *batch(10 + i)[:2])
    found = []
    for i in (1, 2):
        x, y, *_ = batch(i)
        exact = flat(jax.grad(lambda p, x=x, y=y: loss(p, x, y)[0])(params))
        keys = [jax.random.key(100 + i) for i in range(draws)]
        off = [np.sum((flat(gradient(memory, key, x, y)[0]) - exact) ** 2) for key in keys]
        found.append(np.mean(off) / np.sum(exact**2))
    return np.mean(found)


@pytest.mark.parametrize(
    ("model", "memory"),
    [
        ("experts", None),
        pytest.param("experts", "subspace", marks=pytest.mark.slow),
        pytest.param("NNX", None, marks=pytest.mark.slow),
    ],
)
def test_what_is_predicted_is_measured_and_better_than_uniform(model, memory):
    loss, params, batch, _ = MODELS[model]
    config = CONFIG if memory else aop.MemAOP(ratio=0.25, policy="priority")
    approx, batches = aop.approximate(loss, config), [batch(i) for i in range(3)]
    found = aop.allocate(approx, params, batches, KEY, budget=0.85)
    assert len(found.layers) == len(approx.layers(params, *batch(0)))
    assert found.c <= 0.85
    v = measured(model, found.rules)
    assert v == pytest.approx(found.v, rel=0.25)
    if memory is None:
        ratios = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # the best that is alike everywhere
        uniform = max(ratio for ratio in ratios if cost_of(model, ratio) <= found.c)
        assert v < measured(model, aop.MemAOP(ratio=uniform, policy="priority"))


def cost_of(model, ratio):
    """FLOPs of the steps of all contractions with a ratio, relative to exact ones."""
    loss, params, batch, runs = MODELS[model]
    approx = aop.approximate(loss, aop.MemAOP(ratio=ratio, policy="priority"))
    plan = aop.plan(approx, params, *batch(0), rates=RATES)
    costs = [(runs.get(layer.path, 1), cost) for layer, cost, _ in plan.layers]
    exact = sum(n * cost.exact_flops for n, cost in costs)
    return sum(n * cost.flops for n, cost in costs) / exact


@pytest.mark.slow
def test_diagnostics_of_each_run_and_expert():
    approx = aop.approximate(loss, CONFIG)
    found = aop.diagnostics(approx, PARAMS, approx.init(PARAMS, *BATCHES[0]), KEY, *BATCHES[0])
    stacked = {"stack": 3, "experts": 4}
    names = [
        name
        for site in SITES
        for name in ([f"{site}[{i}]" for i in range(stacked[site])] if site in stacked else [site])
    ]
    assert set(found.layers) == set(names)
    exact = jax.grad(lambda p: loss(p, *BATCHES[0])[0])(PARAMS)
    for i in range(3):
        norm = jnp.linalg.norm(exact["stack"][i])
        np.testing.assert_allclose(found.layers[f"stack[{i}]"].gradient_norm, norm, rtol=1e-4)
    np.testing.assert_allclose(
        found.layers["experts[2]"].gradient_norm, jnp.linalg.norm(exact["experts"][2]), rtol=1e-4
    )
    assert found.step_cost > 0
    plain = aop.approximate(loss, aop.MemAOP(ratio=0.25, policy="priority"))
    found = aop.diagnostics(plain, PARAMS, {}, KEY, *BATCHES[0], count_flops=False)
    assert set(found.layers) == set(names)


def test_a_plan_of_two_uses_of_a_parameter():
    """Of which one has too few rows to gain."""

    def fun(params, x):
        return jnp.tanh(x @ params["w"])[:8] @ params["w"]

    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1024, 1024), (4096, 1024)))
    kernel, x = shapes
    config = aop.MemAOP(ratio=0.25, memory=None)
    slow_steps = RATES._replace(layer=1e-3)
    plan = aop.plan(aop.approximate(fun, config), {"w": kernel}, x, rates=slow_steps)
    assert [planned.gains for planned in plan.layers] == [True, False]
    layers = aop.approximate(fun, plan.rules).layers({"w": kernel}, x)
    assert [layer.path for layer in layers] == ["w"]


# ---- advise


def test_advice_of_what_never_gains(capsys):
    slow = RATES._replace(layer=10.0)
    new = aop.approximate(lambda *args: loss(*args), CONFIG)  # which is not compiled yet
    found = aop.advise(new, PARAMS, BATCHES, KEY, rates=slow)
    assert (found.share, found.gaining, found.contractions) == (1, 0, len(SITES))
    assert not found.pays
    assert found.rules == ()
    assert 0 < found.noise <= 1
    assert len(str(found).splitlines()) == 5
    assert str(found).splitlines()[-1].startswith("type:    train exactly: no contraction")
    assert "advise: compiling a backward pass" in capsys.readouterr().err


def test_advice_measures_the_error_and_the_time():
    fast = RATES._replace(flops=1e6, half_flops=1e6)  # where arithmetic is all
    config = aop.MemAOP(ratio=0.125, policy="priority")
    found = aop.advise(aop.approximate(loss, config), PARAMS, BATCHES, KEY, rates=fast)
    assert found.gaining == len(SITES)
    assert found.v == pytest.approx(measured("experts", config), rel=0.4)
    assert min(found.seconds) > 0
    assert found.c == found.seconds[1] / found.seconds[0]


@pytest.mark.parametrize(
    ("seconds", "v", "line"),
    [
        ((1.0, 0.7), 0.2, "aop.approximate(loss, advice.rules)"),
        ((1.0, 0.7), 0.9, "a smaller batch is the better saving"),
        ((1.0, 1.2), 0.0, "what surrounds the contractions takes the time"),
    ],
)
def test_the_verdict(seconds, v, line):
    advice = aop.Advice(0.9, 3, 4, seconds, v, 0.8, (("w", CONFIG),))
    assert advice.verdict() == pytest.approx((1 + 0.8 * v) * seconds[1])
    assert advice.pays == (line in ("aop.approximate(loss, advice.rules)",))
    assert line in str(advice).splitlines()[-1]
    assert re.search(r"reached: 90% .*; 3 of 4 get faster", str(advice))


# ---- errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: aop.plan(loss, PARAMS, *BATCHES[0]), TypeError, "plan: model is of type function"),
        (lambda: aop.allocate(loss, PARAMS, BATCHES, KEY), TypeError, "must be what aop.approxim"),
        (lambda: aop.advise(loss, PARAMS, BATCHES, KEY), TypeError, "must be what aop.approximate"),
        (
            lambda: aop.Controller(loss, {"a": CONFIG}, PARAMS, *BATCHES[0]),
            TypeError,
            "Controller: got an object of type function",
        ),
        (
            lambda: aop.Controller(aop.approximate(loss, CONFIG), CONFIG, PARAMS, *BATCHES[0]),
            TypeError,
            "Controller: choices are of type MemAOP; they must be a dict",
        ),
        (
            lambda: aop.advise(LINEN, PARAMS, BATCHES, KEY),
            TypeError,
            "of type Transformer; it must",
        ),
        (
            lambda: aop.advise(aop.approximate(loss, CONFIG), PARAMS, KEY, BATCHES),
            TypeError,
            "advise: batches are of type PRNGKeyArray; they must be a list",
        ),
        (
            lambda: aop.approximate(loss, linen_allocation()),
            TypeError,
            r"approximate: got an aop.Allocation; pass its rules, .rules",
        ),
        (
            lambda: aop.allocate(aop.approximate(loss, CONFIG), PARAMS, jnp.ones((2, 3)), KEY),
            TypeError,
            r"allocate: a batch is of type .*; it must be a tuple",
        ),
        (
            lambda: aop.allocate(aop.approximate(loss, CONFIG), PARAMS, BATCHES[:1], KEY),
            ValueError,
            "allocate: got 1 batches",
        ),
        (
            lambda: aop.allocate(
                aop.approximate(loss, aop.MemAOP(ratio=0.5)), PARAMS, BATCHES, KEY
            ),
            ValueError,
            "allocate: got policy='topk'",
        ),
        (
            lambda: aop.Controller(
                aop.approximate(loss, CONFIG), {"a": [("none", CONFIG)]}, PARAMS, *BATCHES[0]
            ),
            ValueError,
            "Controller: the rule for 'none' matches no",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
def test_a_controlled_training_of_a_function():
    approx = aop.approximate(loss, CONFIG)
    costs = {"exact": 1.0, "quarter": 0.5}
    controller = aop.Controller(approx, {"quarter": CONFIG}, PARAMS, *BATCHES[0], costs=costs)

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=2)
    def step(approx, params, memory, key, x, y):
        (value, _), (grads, memory) = jax.value_and_grad(approx, (0, 1), has_aux=True)(
            params, memory, key, x, y, "tanh"
        )
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), memory, value

    params, memory, values = PARAMS, {}, []
    for i in range(24):
        if i % 8 == 4:
            memory = controller.decide(i, params, memory, BATCHES, jax.random.key(i))
        x, y, _ = batch(i)
        params, memory, value = step(controller.approx, params, memory, jax.random.key(i), x, y)
        values.append(float(value))
    assert len(controller.log) == 3
    assert np.mean(values[-4:]) < np.mean(values[:4])
