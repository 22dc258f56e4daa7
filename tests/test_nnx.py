"""aop.nnx beside flax.nnx, and beside the same model in Linen."""

import copy

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mem_aop_jax as aop
from mem_aop_jax._compat import get_value, set_value
from mem_aop_jax._core.layout import warn_once

pytestmark = pytest.mark.usefixtures("standard_promotion")

TRAINED = nnx.DiffState(0, (nnx.Param, aop.nnx.Memory))


def inputs(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def loss_fn(model, x, *args):
    return jnp.mean(model(x, *args) ** 2)


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def memories_of(model):
    """The memories by their path; those of one layer are in the order of its calls."""
    flat = nnx.to_flat_state(nnx.state(model, aop.nnx.Memory))
    return {"/".join(map(str, path)): get_value(variable) for path, variable in flat}


@nnx.jit
def gradients(model, x):
    """The gradients of the parameters; update_memory puts the next memories into the model."""
    return aop.nnx.update_memory(model, nnx.grad(loss_fn, argnums=TRAINED)(model, x))


@nnx.jit
def train_step(model, optimizer, x):
    optimizer.update(model, gradients(model, x))


@nnx.jit
def both_steps(ours, optimizer, theirs, exact_optimizer, x):
    optimizer.update(ours, gradients(ours, x))
    exact_optimizer.update(theirs, nnx.grad(loss_fn)(theirs, x))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_bias": False}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}],
    ids=lambda options: "-".join(options) or "default",
)
@pytest.mark.parametrize("policy", ["topk", pytest.param("randk", marks=pytest.mark.slow)])
def test_a_drop_in_for_nnx_linear(policy, options):
    """Initial values, also of the layer after it; outputs; at k = rows the gradients."""
    x, ours_rngs, theirs_rngs = inputs(2, 4, 3), nnx.Rngs(0), nnx.Rngs(0)
    config = aop.MemAOP(ratio=1.0, policy=policy)
    ours = aop.nnx.Linear(3, 5, rows=8, config=config, rngs=ours_rngs, **options)
    theirs = nnx.Linear(3, 5, rngs=theirs_rngs, **options)
    chex.assert_trees_all_equal(params_of(ours), params_of(theirs))
    assert ours_rngs() == theirs_rngs()

    @nnx.jit
    def outputs_and_gradients(ours, theirs):
        outputs = ours(x), theirs(x)
        return outputs, gradients(ours, x), nnx.grad(loss_fn)(theirs, x)

    outputs, grads, exact = outputs_and_gradients(ours, theirs)
    np.testing.assert_array_equal(*outputs)
    grads, exact = nnx.to_pure_dict(grads), nnx.to_pure_dict(exact)
    low = jnp.bfloat16 in options.values()
    chex.assert_trees_all_close(grads, exact, rtol=2e-2 if low else 1e-5, atol=1e-6)
    chex.assert_trees_all_equal_dtypes(grads, exact)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(x))


class Scanned(nnx.Module):
    """A stack of blocks, each recomputed in the backward pass."""

    def __init__(self, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=0, out_axes=0))
        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, x):
            return nnx.remat(lambda block, x: block(x))(block, x)

        return forward(self.blocks, x)


class Ensemble(nnx.Module):
    def __init__(self, rngs):
        self.members = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=0, out_axes=0))(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None), out_axes=0)(self.members, x)


class Tied(nnx.Module):
    """One layer for two inputs of different lengths."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.linear(jnp.tanh(self.linear(x))[:, 1:])


MODELS = {
    "Linear": lambda rngs: nnx.Linear(8, 5, rngs=rngs),
    "LinearGeneral": lambda rngs: nnx.LinearGeneral((4, 8), (2, 3), axis=(-2, -1), rngs=rngs),
    "attention": lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
    "Sequential": lambda rngs: nnx.Sequential(
        nnx.Linear(8, 16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs), nnx.Linear(16, 2, rngs=rngs)
    ),
    "scan of remat": Scanned,
    "vmap": Ensemble,
    "tied": Tied,
}
PATHS = {
    "Linear": [""],
    "LinearGeneral": [""],
    "attention": ["query", "key", "value", "out"],
    "Sequential": ["layers/0", "layers/2"],
    "scan of remat": ["blocks/linear"],
    "vmap": ["members/linear"],
    "tied": ["linear", "linear"],
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n == "Linear" else ()) for n in MODELS],
)
def test_a_wrapped_model_is_the_model(name):
    """Three steps at k = rows, and evaluation of any batch size."""
    x = inputs(3, 4, 8)
    theirs = MODELS[name](nnx.Rngs(0))
    ours = aop.nnx.wrap(MODELS[name](nnx.Rngs(0)), aop.MemAOP(ratio=1.0), x)
    assert [layer.path for layer in aop.nnx.layers(ours)] == PATHS[name]
    chex.assert_trees_all_equal(params_of(ours), params_of(theirs))
    optimizers = [nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param) for model in (ours, theirs)]
    for seed in range(3):
        x = inputs(3, 4, 8, seed=seed)
        both_steps(ours, optimizers[0], theirs, optimizers[1], x)
        chex.assert_trees_all_close(params_of(ours), params_of(theirs), rtol=1e-3, atol=1e-5)
    assert all(np.all(memory.uses == 1) for memory in memories_of(ours).values())
    for model in (ours, theirs):
        model.eval()
    outputs = nnx.jit(lambda ours, theirs, x: (ours(x), theirs(x)))(ours, theirs, x[:1])
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-5)


def test_every_layer_and_every_step_draws_its_own_rows():
    config = aop.MemAOP(ratio=0.25, policy="randk")
    model = nnx.Sequential(*(MODELS[name](nnx.Rngs(0)) for name in ("scan of remat", "attention")))
    model, x = aop.nnx.wrap(model, config, inputs(3, 16, 8), rngs=nnx.Rngs(1)), inputs(3, 16, 8)

    @nnx.jit
    def step(model):
        nnx.update(model, nnx.grad(loss_fn, argnums=nnx.DiffState(0, aop.nnx.Memory))(model, x))

    seen = set()
    for _ in range(2):
        step(model)
        for memory in memories_of(model).values():
            waiting = np.any(memory.inputs, axis=-1).reshape(-1, 48)
            assert (waiting.sum(axis=1) == 36).all()
            seen |= set(map(tuple, waiting.tolist()))
    assert len(seen) > 7  # 7 layers, two steps; memory of the first step mixes with the second


def test_the_same_run_as_in_linen():
    """The same weights, a schedule and Adam; also a wrapped model and one of aop.nnx.Linear."""
    config = aop.MemAOP(ratio=0.25)
    schedule = optax.cosine_decay_schedule(0.05, 20)
    batches = [inputs(16, 6, seed=seed) for seed in range(12)]

    linen = nn.Sequential(
        [aop.linen.Dense(8, config=config), nn.tanh, aop.linen.Dense(2, config=config)]
    )
    variables = jax.jit(linen.init)(jax.random.key(0), batches[0])
    params, memory = variables["params"], variables[aop.linen.COLLECTION]
    tx = optax.chain(aop.carry_memory(memory, schedule), optax.adam(schedule))
    opt_state = tx.init(params)

    @jax.jit
    def linen_step(params, opt_state, x):
        def loss(params, memory):
            variables = {"params": params, aop.linen.COLLECTION: memory}
            return loss_fn(lambda x: linen.apply(variables, x), x)

        grads, memory = jax.grad(loss, argnums=(0, 1))(params, aop.get_memory(opt_state))
        updates, opt_state = tx.update(grads, opt_state, params, memory=memory)
        return optax.apply_updates(params, updates), opt_state

    def build(linear):
        model = nnx.Sequential(
            linear(6, 8, rngs=nnx.Rngs(0)), jnp.tanh, linear(8, 2, rngs=nnx.Rngs(0))
        )
        for i, layer in ((0, "layers_0"), (2, "layers_2")):
            nnx.update(model.layers[i], nnx.State(jax.tree.map(nnx.Param, dict(params[layer]))))
        return model

    ours = build(lambda *sizes, rngs: aop.nnx.Linear(*sizes, rows=16, config=config, rngs=rngs))
    wrapped = aop.nnx.wrap(build(nnx.Linear), config, batches[0])
    optimizers = [nnx.Optimizer(m, optax.adam(schedule), wrt=nnx.Param) for m in (ours, wrapped)]

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(loss_fn, argnums=TRAINED)(model, x)
        count = get_value(optimizer.step)
        optimizer.update(model, aop.nnx.update_memory(model, grads, schedule, count))

    for x in batches:
        params, opt_state = linen_step(params, opt_state, x)
        for model, optimizer in zip((ours, wrapped), optimizers, strict=True):
            step(model, optimizer, x)
    carried = aop.get_memory(opt_state)
    for model, name in (
        (ours, "layers/{}/dot_general/memory"),
        (wrapped, "mem_aop/layers/{}/kernel"),
    ):
        trained, memories = params_of(model)["layers"], memories_of(model)
        for i in (0, 2):
            chex.assert_trees_all_close(trained[i], params[f"layers_{i}"], rtol=1e-4, atol=1e-6)
            chex.assert_trees_all_close(
                memories[name.format(i)],
                carried[f"layers_{i}"]["memory"],
                rtol=1e-4,
                atol=1e-6,
            )


def test_rules_and_layers():
    config, other = aop.MemAOP(ratio=0.5), aop.MemAOP(k=2)
    model = nnx.Sequential(*(MODELS[name](nnx.Rngs(0)) for name in ("attention", "Linear")))
    rules = [("layers/0/(key|query)", None), ("layers/0/.*", other), ("layers/1", config)]
    aop.nnx.wrap(model, rules, inputs(3, 4, 8))
    assert aop.nnx.layers(model) == [
        ("layers/0/value", 12, 8, 8, 2),
        ("layers/0/out", 12, 8, 8, 2),
        ("layers/1", 12, 8, 5, 6),
    ]


def test_a_layer_of_this_library_stays():
    model = nnx.Sequential(
        nnx.Linear(8, 8, rngs=nnx.Rngs(0)),
        aop.nnx.Linear(8, 8, rows=12, config=aop.MemAOP(k=3), rngs=nnx.Rngs(0)),
        nnx.Linear(8, 8, rngs=nnx.Rngs(0)),
    )
    aop.nnx.wrap(model, aop.MemAOP(k=2), inputs(3, 4, 8))
    assert [(layer.path, layer.k) for layer in aop.nnx.layers(model)] == [
        ("layers/1", 3),
        ("layers/0", 2),
        ("layers/2", 2),
    ]


def test_a_layer_out_of_use_keeps_its_memory():
    class Two(nnx.Module):
        def __init__(self):
            config, rngs = aop.MemAOP(k=2), nnx.Rngs(0)
            self.a = aop.nnx.Linear(3, 3, rows=8, config=config, rngs=rngs)
            self.b = aop.nnx.Linear(3, 3, rows=8, config=config, rngs=rngs)

    model, x = Two(), inputs(8, 3)

    def memories_after_a_step(names):
        @nnx.jit
        def step(model):
            def loss(model):
                return sum(loss_fn(getattr(model, name), x) for name in names)

            aop.nnx.update_memory(model, nnx.grad(loss, argnums=TRAINED)(model))

        step(model)
        return memories_of(model)

    before, after = memories_after_a_step("ab"), memories_after_a_step("a")
    chex.assert_trees_all_equal(
        after["b/dot_general/memory"][:2], before["b/dot_general/memory"][:2]
    )
    assert after["b/dot_general/memory"].uses == 0
    assert (after["a/dot_general/memory"].inputs != before["a/dot_general/memory"].inputs).any()


def test_evaluation_mode():
    model, x = aop.nnx.Linear(3, 5, rows=8, config=aop.MemAOP(k=2), rngs=nnx.Rngs(0)), inputs(9, 3)
    gradient = nnx.jit(nnx.grad(loss_fn))
    with pytest.raises(ValueError, match=r"Linear: memory.inputs has shape \(8, 3\).*9 rows"):
        model(x)
    model.eval()
    assert model(x).shape == (9, 5)
    with pytest.raises(ValueError, match=r"without its memory.*model.train\(\) switches it on"):
        gradient(model, x)
    model.train()
    gradient(model, x[:8])


def test_a_view_without_memories():
    """As flax evaluates now, beside model.eval()."""
    if not hasattr(nnx, "view"):
        pytest.skip("this flax has no nnx.view")
    x = inputs(8, 3)
    config = aop.MemAOP(k=2)
    linear = aop.nnx.Linear(3, 5, rows=8, config=config, rngs=nnx.Rngs(0))
    wrapped = aop.nnx.wrap(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), config, x)
    for model in (linear, wrapped):
        view = nnx.view(model, deterministic=True)
        np.testing.assert_allclose(view(x[:3]), model(x)[:3], rtol=1e-6)
        with pytest.raises(ValueError, match="a batch of 3 rows"):
            model(x[:3])


class Changes(nnx.Module):
    """Changes an attribute, a variable of its own, and what it gets; and calls itself."""

    def __init__(self, rngs):
        self.linear, self.dropout = nnx.Linear(6, 6, rngs=rngs), nnx.Dropout(0.5)
        self.calls, self.count = 0, nnx.Variable(jnp.zeros(()))

    def __call__(self, x, seen, rngs=None, depth=1):
        self.calls += 1
        set_value(self.count, get_value(self.count) + 1)
        set_value(seen, get_value(seen) + x.sum())
        x = self.dropout(self.linear(x), rngs=rngs) * self.calls
        return x if depth == 0 else self(x, seen, rngs=rngs, depth=depth - 1)


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit])
def test_what_a_call_changes_is_changed(jit):
    x = inputs(8, 6)
    own, wrapped = Changes(nnx.Rngs(0)), Changes(nnx.Rngs(0))
    example = nnx.Variable(jnp.zeros(()))
    aop.nnx.wrap(wrapped, aop.MemAOP(ratio=1.0), x, example, rngs=nnx.Rngs(1))
    assert (wrapped.calls, get_value(example)) == (0, 0)
    found = []
    for model in (own, wrapped):
        seen, rngs = nnx.Variable(jnp.zeros(())), nnx.Rngs(2)
        call = jit(lambda model, x, seen, rngs: model(x, seen, rngs=rngs))
        ys = [call(model, x, seen, rngs) for _ in range(2)]
        values = [get_value(v) for v in (seen, model.count, rngs.default.count)]
        found.append((ys, values, model.calls))
    chex.assert_trees_all_close(*found, rtol=1e-5)
    grads = nnx.grad(
        lambda m: loss_fn(m, x, nnx.Variable(jnp.zeros(())), nnx.Rngs(3)), argnums=TRAINED
    )(wrapped)
    aop.nnx.update_memory(wrapped, grads)


def test_a_copy_is_wrapped_too():
    x = inputs(2, 4, 8)
    model = aop.nnx.wrap(Tied(nnx.Rngs(0)), aop.MemAOP(k=2), x)
    copied = copy.deepcopy(model)
    assert type(copied) is type(model)
    gradient = nnx.jit(nnx.grad(loss_fn))
    chex.assert_trees_all_close(*(nnx.to_pure_dict(gradient(m, x)) for m in (copied, model)))


def test_training_compiles_once():
    model = aop.nnx.wrap(
        Tied(nnx.Rngs(0)),
        aop.MemAOP(ratio=0.25, policy="weightedk"),
        inputs(3, 4, 8),
        rngs=nnx.Rngs(1),
    )
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(1)
        train_step(model, optimizer, x)

    for _ in range(10):
        step(model, optimizer, inputs(3, 4, 8))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"calls": 0}, ValueError, "Linear: calls is 0; it must be at least 1"),
        ({"calls": 1.5}, TypeError, "Linear: calls is 1.5; it must be a whole number"),
    ],
)
def test_bad_arguments_of_linear(call, error, message):
    with pytest.raises(error, match=message):
        aop.nnx.Linear(3, 5, rows=8, config=aop.MemAOP(k=2), rngs=nnx.Rngs(0), **call)


@pytest.mark.parametrize("rngs", [0, jax.random.key(0)])
def test_rngs_that_are_none(rngs):
    model = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"wrap: rngs is of type \w+; it must be an nnx.Rngs"):
        aop.nnx.wrap(model, aop.MemAOP(k=2, policy="priority"), inputs(8, 3), rngs=rngs)
    with pytest.raises(TypeError, match="plan: example_input is 'x'; it must be what the model"):
        aop.plan(model, aop.MemAOP(k=2), "x", rates=aop.Rates("some", 1, 1, 1))


def test_errors():
    rngs, x, config = nnx.Rngs(0), inputs(3, 4, 8), aop.MemAOP(k=2)
    model = MODELS["attention"](rngs)
    with pytest.raises(TypeError, match=r"model is of type Dense, not an NNX module"):
        aop.nnx.wrap(nn.Dense(3), config, x)
    with pytest.raises(TypeError, match=r"wrap: got 'out'; it must be an aop.MemAOP, or a list"):
        aop.nnx.wrap(model, "out", x)
    with pytest.raises(
        ValueError, match=r"'heads' matches no dense layer.*'query', 'key', 'value', 'out'"
    ):
        aop.nnx.wrap(model, [("out", config), ("heads", config)], x)
    with pytest.raises(ValueError, match=r"out: k=99 outer products asked of a batch of 12 rows"):
        aop.nnx.wrap(model, [("key", config), ("out", aop.MemAOP(k=99))], x)
    with pytest.raises(ValueError, match=r"query: policy 'randk' draws at random.*nnx.Rngs\(0\)"):
        aop.nnx.wrap(model, aop.MemAOP(k=2, policy="randk"), x)
    assert aop.nnx.layers(model) == []  # nothing was changed
    with pytest.raises(ValueError, match=r"aop.nnx.Linear has a dot_general of its own"):
        aop.nnx.Linear(3, 5, rows=8, config=config, rngs=rngs, dot_general=jax.lax.dot_general)
    with pytest.raises(TypeError, match="config is of type int"):
        aop.nnx.Linear(3, 5, rows=8, config=3, rngs=rngs)
    with pytest.raises(ValueError, match=r"k=2 outer products .* batch of 1 rows"):
        aop.nnx.Linear(3, 5, rows=1, config=config, rngs=rngs)
    with pytest.raises(ValueError, match=r"policy 'randk' .* stream 'mem_aop' or a default one"):
        aop.nnx.Linear(
            3, 5, rows=8, config=aop.MemAOP(k=2, policy="randk"), rngs=nnx.Rngs(params=0)
        )


def test_gradients_that_do_not_fit_the_memories():
    layer = aop.nnx.Linear(3, 3, rows=8, config=aop.MemAOP(k=2), rngs=nnx.Rngs(0))
    x = inputs(8, 3)
    with pytest.raises(ValueError, match=r"has 1 memories, the gradients have 0. Differentiate"):
        aop.nnx.update_memory(layer, nnx.jit(nnx.grad(loss_fn))(layer, x))
    twice = nnx.jit(nnx.grad(lambda layer: loss_fn(layer, layer(x)), argnums=TRAINED))(layer)
    with pytest.raises(ValueError, match=r"update_memory: the new memory has uses=2.0"):
        aop.nnx.update_memory(layer, twice)
    layer = aop.nnx.Linear(3, 3, rows=8, config=aop.MemAOP(k=2), rngs=nnx.Rngs(0), calls=2)
    once = nnx.jit(nnx.grad(loss_fn, argnums=TRAINED))(layer, x)
    with pytest.raises(ValueError, match=r"memories for 2 calls in a forward pass, and was called"):
        aop.nnx.update_memory(layer, once)


def two_layers(kind):
    rngs = nnx.Rngs(0)
    if kind == "wrap":
        model = nnx.Sequential(nnx.Linear(8, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs))
        return aop.nnx.wrap(model, aop.MemAOP(ratio=0.25), inputs(16, 8))
    options = {"rows": 16, "config": aop.MemAOP(ratio=0.25), "rngs": rngs}
    return nnx.Sequential(aop.nnx.Linear(8, 4, **options), aop.nnx.Linear(4, 2, **options))


@pytest.mark.parametrize("jit", [nnx.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("kind", ["wrap", "layer"])
def test_training_that_forgets_the_memory(kind, jit):
    """Whoever trains parameters alone is warned; whoever drops the next memories gets an error."""
    x = inputs(16, 8)

    def trained(step, steps=5):
        model = two_layers(kind)
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        for _ in range(steps):
            step(model, optimizer)
        return model

    def parameters_alone(model, optimizer):
        optimizer.update(model, nnx.grad(loss_fn)(model, x))

    def memories_dropped(model, optimizer):  # as nnx.Optimizer does, since flax 0.12
        grads = nnx.grad(loss_fn, argnums=TRAINED)(model, x)
        optimizer.update(model, nnx.split_state(grads, aop.nnx.Memory, ...)[1])

    def both(model, optimizer):
        nnx.grad(loss_fn, argnums=TRAINED)(model, x)  # twice before a step is fine
        optimizer.update(
            model, aop.nnx.update_memory(model, nnx.grad(loss_fn, argnums=TRAINED)(model, x))
        )

    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"not to its memory, .*never moves.*nnx.DiffState"):
        trained(jit(parameters_alone))
    with pytest.raises(ValueError, match=r"trained 3 times, but the memory stayed.*update_mem"):
        trained(jit(memories_dropped))
    assert all(memory.uses == 1 for memory in memories_of(trained(jit(both))).values())


def test_one_warning_names_all_layers_whose_memories_stay():
    model, x = two_layers("wrap"), inputs(16, 8)
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="kernel, .*kernel: differentiated") as warned:
        nnx.grad(loss_fn)(model, x)
    assert len(warned) == 1


@pytest.mark.parametrize(
    "streams",
    [
        {"default": 0},
        {"default": 0, "params": 1},
        {"default": 0, "mem_aop": 1},
        {"params": 0, "mem_aop": 1},
    ],
)
def test_every_layer_has_a_key_of_its_own(streams):
    """With the same key in two layers, approximate gradients of inputs are biased below."""
    rngs, config = nnx.Rngs(**streams), aop.MemAOP(k=2, policy="priority")
    layers = [aop.nnx.Linear(4, 4, rows=8, config=config, rngs=rngs) for _ in range(3)]
    keys = {tuple(jax.random.key_data(layer.dot_general.new_key()).tolist()) for layer in layers}
    assert len(keys) == 3


def test_wrap_without_example_inputs():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"no example inputs, .*'inputs'.*wrap\(model, rules, x\)"):
        aop.nnx.wrap(model, aop.MemAOP(ratio=0.25))


@pytest.mark.parametrize("kind", ["wrap", "layer"])
def test_gradients_that_train_nothing_are_no_error(kind):
    """Of a copy as many as one likes; of the model, a step that is refused now and then."""
    x = inputs(16, 8)
    model = two_layers(kind)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def look(model):
        traces.append(1)
        return nnx.grad(loss_fn, argnums=TRAINED)(model, x)

    for _ in range(4):
        for _ in range(4):
            look(nnx.clone(model))
        for _ in range(2):
            look(model)
        train_step(model, optimizer, x)
    assert len(traces) <= 2


def test_an_exception_between_two_calls_of_a_layer():
    class Twice(nnx.Module):
        def __init__(self):
            config = aop.MemAOP(k=2)
            self.layer = aop.nnx.Linear(4, 4, rows=8, config=config, calls=2, rngs=nnx.Rngs(0))

        def __call__(self, x, *, fails=False):
            y = self.layer(x)
            if fails:
                raise RuntimeError
            return self.layer(y)

    model, x = Twice(), inputs(8, 4)
    aop.nnx.update_memory(model, nnx.grad(loss_fn, argnums=TRAINED)(model, x))
    before = nnx.grad(loss_fn, argnums=TRAINED)(model, x)
    with pytest.raises(RuntimeError):
        model(x, fails=True)
    after = nnx.grad(loss_fn, argnums=TRAINED)(model, x)
    chex.assert_trees_all_equal(*(jax.tree.leaves(grads) for grads in (before, after)))
    aop.nnx.update_memory(model, after)
