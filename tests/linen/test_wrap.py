"""aop.linen.wrap and aop.linen.layers: models that know nothing of this library."""

import functools
import threading
from typing import Any

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import mem_aop_jax as aop
from mem_aop_jax._models import Layer

pytestmark = pytest.mark.usefixtures("standard_promotion")

COLLECTION, RNG = aop.linen.COLLECTION, aop.linen.RNG
CONFIG, ALL_ROWS = aop.MemAOP(k=2), aop.MemAOP(ratio=1.0)
KEY = jax.random.key(0)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-6)


def inputs(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = inputs(8, 4)


def memories(tree):
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, aop.Memory))


def gradient(model, variables, x=X, **rngs):
    return jax.grad(lambda v: jnp.mean(model.apply(v, x, rngs=rngs) ** 2))(variables)


class Model(nn.Module):
    """`body(x)` in a compact method."""

    body: Any

    @nn.compact
    def __call__(self, x):
        return self.body(x)


class SetsUp(nn.Module):
    make: Any

    def setup(self):
        self.enc = self.make()

    def __call__(self, x):
        return self.enc(x)


class MLP(nn.Module):
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x):
        return self.dense(3, name="head")(nn.tanh(self.dense(6, name="hidden")(x)))


class Layer4(nn.Module):
    dense: Any = nn.Dense

    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(self.dense(4, name="dense")(x)), None


class Tanh4(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(4)(x))


class JitMethod(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(4)(x))


class CalledTwice(nn.Module):
    model: nn.Module  # as the wrapper might call it
    rules: Any = ()

    def __call__(self, x):
        return self.model(self.model(x))


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(6)(x))
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=False)(x))


class LowRank(nn.Module):
    def setup(self):
        self.child = nn.Dense(4)
        nn.share_scope(self, self.child)

    @nn.compact
    def __call__(self, x):
        return self.child(x) + x @ self.param("A", nn.initializers.normal(), (4, 4))


class OddParameters(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = x * self.param("scales", lambda _: {"a": jnp.ones(4), "b": [(jnp.ones(4),)]})["a"]
        transpose = functools.partial(jax.tree.map, jnp.transpose)
        initializing = self.is_initializing()
        transposed = nn.map_variables(
            nn.Dense, "params", transpose, transpose, init=initializing, mutable=True
        )
        return nn.Dense(4, kernel_init=init)(transposed(6)(LowRank()(x)))


def stack(layer=Layer4, params=0, **axes):
    return nn.scan(
        layer,
        variable_axes={"params": 0} | axes if params == 0 else axes,
        variable_broadcast=False if params == 0 else "params",
        split_rngs={"params": params == 0},
        length=3,
    )


def copies(target, params=0, **axes):
    return nn.vmap(
        target,
        variable_axes={"params": params} | axes,
        split_rngs={"params": params == 0},
        in_axes=None,
        axis_size=2,
    )


MODELS = {
    "compact": MLP(),
    "setup": SetsUp(lambda: nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(3)])),
    "Dense": nn.Dense(3, name="head"),
    "DenseGeneral": nn.DenseGeneral((2, 3), axis=(-2, -1)),
    "attention": nn.MultiHeadDotProductAttention(2),
    "called twice": CalledTwice(Tanh4()),
    "scan": Model(lambda x: stack()()(x, None)[0]),
    "scan, shared parameters": Model(lambda x: stack(params=None, **{COLLECTION: 0})()(x, None)[0]),
    "scan of remat": Model(lambda x: stack(nn.remat(Layer4))()(x, None)[0]),
    "remat_scan": Model(lambda x: nn.remat_scan(Tanh4, lengths=(2, 2))()(x)),
    "vmap": Model(lambda x: copies(MLP)()(x)),
    "vmap of Dense": Model(lambda x: copies(nn.Dense)(4)(x)),
    "vmap, shared parameters": Model(lambda x: copies(MLP, None, **{COLLECTION: 0})()(x)),
    "remat and jit of layers": Model(lambda x: nn.jit(nn.Dense)(4)(nn.remat(nn.Dense)(4)(x))),
    "jit of a method": nn.Sequential([JitMethod(), JitMethod()]),
    "dropout and batch norm": Normalised(),
    "odd parameters": OddParameters(),
}
SHAPES = {"DenseGeneral": (6, 4, 3), "attention": (2, 4, 4)}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_itself(name):
    """Variables, outputs at two batch sizes, and at k = rows the gradients of three steps."""
    model, x = MODELS[name], inputs(*SHAPES.get(name, X.shape))
    wrapped = aop.linen.wrap(model, ALL_ROWS)
    rngs = {"params": KEY, "dropout": KEY}
    ours, theirs = jit(lambda: (wrapped.init(rngs, x), model.init(rngs, x)))()
    memory = ours.pop(COLLECTION)
    chex.assert_trees_all_equal(ours, theirs)
    params = theirs.pop("params")

    @jit
    def step(params, memory, state, key):
        def apply(model, x, params, memory):
            variables = {"params": params} | memory | state
            return model.apply(variables, x, rngs={"dropout": key}, mutable=list(state))

        def loss(params, memory, model):
            y, updates = apply(model, x, params, memory)
            return jnp.mean(jnp.sin(y)), (y, updates)

        def run(model, memory):
            (grads, after), got = jax.grad(loss, (0, 1), has_aux=True)(params, memory, model)
            return (grads, *got, apply(model, x[: len(x) // 2], params, {})), after

        ours, after = run(wrapped, {COLLECTION: memory})
        return ours, run(model, {})[0], after[COLLECTION]

    state = theirs
    for i in range(3):
        got, expected, memory = step(params, memory, state, jax.random.key(i))
        close(got, expected)
        assert all((m.uses == 1).all() and not m.inputs.any() for m in memories(memory))
        grads, _, state, _ = expected
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


@pytest.mark.parametrize(
    ("policy", "memory"), [("topk", "rows"), ("weightedk", "rows"), ("randk", None)]
)
def test_as_a_model_of_its_layers(policy, memory):
    config = aop.MemAOP(ratio=0.25, policy=policy, memory=memory)
    by_hand = MLP(functools.partial(aop.linen.Dense, config=config))
    check_equal(aop.linen.wrap(MLP(), config), by_hand)


def test_as_a_scan_that_declares_the_collection():
    dense = functools.partial(aop.linen.Dense, config=CONFIG)
    declared = Model(lambda x: stack(**{COLLECTION: 0})(dense, name="layers")(x, None)[0])
    undeclared = Model(lambda x: stack()(name="layers")(x, None)[0])
    check_equal(aop.linen.wrap(undeclared, CONFIG), declared)


def check_equal(wrapped, by_hand):
    variables = jit(by_hand.init)(KEY, X)
    chex.assert_trees_all_equal(jit(wrapped.init)(KEY, X), variables)
    step = jit(lambda v, x, key: [gradient(m, v, x, mem_aop=key) for m in (wrapped, by_hand)])
    for i in range(3):
        grads, expected = step(variables, inputs(8, 4, seed=i), jax.random.key(i))
        close(grads, expected)
        variables = variables | {COLLECTION: grads.get(COLLECTION, {})}


@pytest.mark.parametrize(
    ("name", "make_key"),
    [
        ("scan of remat", jax.random.key),
        ("scan", jax.random.PRNGKey),
        ("vmap of Dense", jax.random.key),
        ("remat_scan", jax.random.key),
    ],
)
def test_random_policies_draw_for_each_layer_of_a_stack(name, make_key):
    wrapped = aop.linen.wrap(MODELS[name], aop.MemAOP(k=4, policy="randk"))
    variables = jit(wrapped.init)(KEY, X)
    step = jit(lambda key: memories(gradient(wrapped, variables, mem_aop=key)[COLLECTION]))

    def waiting(seed):
        (memory,) = step(make_key(seed))
        return memory.inputs.any(axis=-1).reshape(-1, 8).tolist()

    first = waiting(1)
    assert all(sum(rows) == 4 for rows in first)
    assert len(set(map(tuple, first))) > 1
    assert first != waiting(2)


# ---- rules


HIDDEN, HEAD = Layer("hidden", 8, 4, 6, 2), Layer("head", 8, 6, 3, 2)
RULES = {
    "one for all": (CONFIG, [HIDDEN, HEAD]),
    "none": ([], []),
    "unmatched is exact": ([("head", CONFIG)], [HEAD]),
    "None is exact": ([("head", None), (".*", CONFIG)], [HIDDEN]),
    "first match": ([("hid.*", aop.MemAOP(k=5)), (".*", CONFIG)], [HIDDEN._replace(k=5), HEAD]),
    "nothing left for the last": ([("h.*", CONFIG), (".*", None)], [HIDDEN, HEAD]),
}
PLACES = {  # of a submodule in a model, and its path
    "alone": (lambda make: make(), ""),
    "in compact": (lambda make: Model(lambda x: make()(x)), "MLP_0/"),
    "in setup": (SetsUp, "enc/"),
    "in a field": (lambda make: nn.Sequential([make()]), "layers_0/"),
}


@pytest.mark.parametrize(
    ("place", "name"), [("alone", name) for name in RULES] + [(p, "first match") for p in PLACES]
)
def test_rules_are_on_the_path_from_the_wrapper_on(place, name):
    rules, expected = RULES[name]
    put, prefix = PLACES[place]
    model, wrapped = put(MLP), put(lambda: aop.linen.wrap(MLP(), rules))
    found = aop.linen.layers(wrapped, KEY, X)
    assert found == [layer._replace(path=prefix + layer.path) for layer in expected]

    variables, params = jit(lambda: (wrapped.init(KEY, X), model.init(KEY, X)))()
    chex.assert_trees_all_equal(variables["params"], params["params"])
    assert len(memories(variables.get(COLLECTION, {}))) == len(expected)
    ours, exact = jit(lambda: (gradient(wrapped, variables), gradient(model, params)))()
    ours, exact = (flax.traverse_util.flatten_dict(g["params"], sep="/") for g in (ours, exact))
    differing = {name for name in exact if not np.allclose(ours[name], exact[name])}
    assert differing == {f"{layer.path}/kernel" for layer in found}


def test_a_wrapped_submodule_called_twice_has_two_memories():
    model = CalledTwice(aop.linen.wrap(nn.Dense(4), CONFIG))
    expected = aop.linen.wrap(CalledTwice(nn.Dense(4)), CONFIG)
    check_equal(model, expected)


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ([("hid", CONFIG)], ValueError, r"'hid' matches no dense layer.*: 'hidden', 'head'"),
        ([("h.*", CONFIG), ("head", None)], ValueError, "'head' matches only layers that an earl"),
        ([("(", CONFIG)], ValueError, r"pattern '\(' is no regular expression"),
        ([(".*", 0.25)], TypeError, "got the rule"),
        ([("a", None, None)], TypeError, "got the rule"),
        ([(b"a", None)], TypeError, "got the rule"),
        ("head", TypeError, "got 'head'; it must be an aop.MemAOP, or a list of rules"),
        ({"head": CONFIG}, TypeError, "it must be an aop.MemAOP, or a list of rules"),
    ],
)
def test_rules_that_cannot_be_meant(rules, error, message):
    with pytest.raises(error, match=message):
        aop.linen.wrap(MLP(), rules).init(KEY, X)


@pytest.mark.parametrize("outer", [lambda m: m, lambda m: nn.Sequential([m])])
def test_what_cannot_be_wrapped(outer):
    with pytest.raises(ValueError, match="got a wrapped model, or a model with one in it"):
        aop.linen.wrap(outer(aop.linen.wrap(MLP(), CONFIG)), CONFIG).init(KEY, X)
    with pytest.raises(TypeError, match="module is of type type, not"):
        aop.linen.wrap(MLP, CONFIG)


def test_layers_with_a_product_of_their_own_keep_it():
    product = functools.partial(aop.linen.DotGeneral, config=aop.MemAOP(k=3))
    model = nn.Sequential(
        [
            nn.Dense(4),
            aop.linen.Dense(4, config=aop.MemAOP(k=4)),
            nn.Dense(4, dot_general_cls=product),
            nn.Dense(4, dot_general=jax.lax.dot_general),
        ]
    )
    found = aop.linen.layers(aop.linen.wrap(model, CONFIG), KEY, X)
    assert [(layer.path, layer.k) for layer in found] == [
        ("layers_0", 2),
        ("layers_1", 4),
        ("layers_2/DotGeneral_0", 3),
    ]


@pytest.mark.parametrize("method", [None, "__call__", nn.Sequential.__call__])
def test_layers_computes_nothing(method):
    model = nn.Sequential([aop.linen.Dense(10**12, config=aop.MemAOP(ratio=0.25))])
    found = aop.linen.layers(model, KEY, jnp.ones((4, 8, 10)), method=method)
    assert found == [Layer("layers_0", 32, 10, 10**12, 8)]


# ---- errors


@pytest.mark.parametrize(
    ("name", "path"), [("scan", "Scan.*0/dense"), ("compact", "(hidden|head)"), ("Dense", "Dense")]
)
def test_errors_name_the_layer(name, path):
    wrapped = aop.linen.wrap(MODELS[name], aop.MemAOP(k=4, policy="randk"))
    variables = jit(wrapped.init)(KEY, X)
    with pytest.raises(ValueError, match=f"{path}: differentiated .* without its memory"):
        gradient(wrapped, {"params": variables["params"]})
    with pytest.raises(ValueError, match=f"{path}: memory.inputs has .* 3 rows"):
        wrapped.apply(variables, X[:3])
    with pytest.raises(ValueError, match=f"{path}: policy 'randk' .* got no key"):
        gradient(wrapped, variables)
    with pytest.raises(ValueError, match=f"{path}: k=4 outer products asked .* 3 rows"):
        wrapped.init(KEY, X[:3])


SHARED = {
    "LSTM": nn.RNN(nn.LSTMCell(4)),
    "scan": Model(lambda x: stack(params=None)()(x, None)[0]),
    "vmap": Model(lambda x: copies(MLP, None)()(x)),
}


@pytest.mark.parametrize("name", SHARED)
def test_parameters_shared_by_a_transform_need_an_axis_for_the_memories(name):
    model, x = SHARED[name], inputs(2, 8, 4)
    with pytest.raises(ValueError, match="calls this layer with the same parameters each time"):
        aop.linen.wrap(model, CONFIG).init(KEY, x)
    without = aop.linen.wrap(model, aop.MemAOP(ratio=1.0, memory=None))
    variables = jit(without.init)(KEY, x)
    close(*jit(lambda v: [gradient(m, v, x) for m in (without, model)])(variables))


def test_after_an_error_the_layer_is_exact_again():
    wrapped = aop.linen.wrap(SetsUp(lambda: nn.Dense(4)), CONFIG)
    bound = wrapped.bind(wrapped.init(KEY, X))
    with pytest.raises(ValueError, match="enc: memory"):
        bound(X[:3])
    assert bound.mem_aop_model.enc.dot_general is None


# ---- training


@pytest.mark.parametrize("name", ["compact", "scan of remat", "jit of a method"])
def test_the_same_run_in_a_train_state_by_carry_memory_and_in_one_scan(name):
    wrapped = aop.linen.wrap(MODELS[name], CONFIG)
    variables = jit(wrapped.init)(KEY, X)
    batches, traces = inputs(10, 8, 4), []
    tx = aop.mem_aop_sgd(0.1, variables[COLLECTION])

    def carried(state, x):
        traces.append("carried")
        params, opt_state = state
        grads = gradient(wrapped, {"params": params, COLLECTION: aop.get_memory(opt_state)}, x)
        updates, opt_state = tx.update(grads["params"], opt_state, memory=grads[COLLECTION])
        return optax.apply_updates(params, updates), opt_state

    @jit
    def overwritten(state, x):
        traces.append("overwritten")
        return state.apply_gradients(grads=gradient(wrapped, state.params, x))

    run = variables["params"], tx.init(variables["params"])
    scanned, _ = jit(lambda s: jax.lax.scan(lambda s, x: (carried(s, x), None), s, batches))(run)
    traces.clear()
    state = TrainState.create(apply_fn=wrapped.apply, params=variables, tx=optax.sgd(0.1))
    run, step = jax.tree.map(jnp.copy, run), jit(carried, donate_argnums=0)
    for x in batches:
        run, state = step(run, x), overwritten(state, x)
    assert sorted(traces) == ["carried", "overwritten"]
    memory = aop.get_memory(run[1])
    assert all(memory.inputs.any() for memory in memories(memory))
    close(run, scanned)
    close(state.params, {"params": run[0], COLLECTION: memory})


@pytest.mark.parametrize("transform", [jax.checkpoint, jax.jit])
def test_transforms_of_the_whole(transform):
    wrapped = aop.linen.wrap(MODELS["scan"], CONFIG)
    variables = jit(wrapped.init)(KEY, X)
    ours = jax.grad(lambda v: jnp.mean(transform(wrapped.apply)(v, X) ** 2))(variables)
    close(ours, gradient(wrapped, variables))


# ---- what else Flax does with modules


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(4)(x)
        self.sow("intermediates", "parameters", len(jax.tree.leaves(self.variables["params"])))
        return y


def test_what_else_flax_does_with_a_module():
    wrapped, model = aop.linen.wrap(Sows(), CONFIG), Sows()
    variables = wrapped.init(KEY, X)
    params = wrapped.init(KEY, X, mutable=["params"])
    chex.assert_trees_all_equal(params, {"params": variables["params"]})
    for options in ({}, {"capture_intermediates": True}):
        (y, sown), (expected, _) = (
            m.apply(v, X, mutable=["intermediates"], **options)
            for m, v in ((wrapped, variables), (model, params))
        )
        close(y, expected)
        assert list(sown) == ["intermediates"]
        assert sown["intermediates"]["parameters"] == (2,)
    close(wrapped.bind(variables)(X), model.apply(params, X))
    close(wrapped.clone().apply(variables, X), model.apply(params, X))
    assert "Dense_0" in wrapped.tabulate(KEY, X, compute_vjp_flops=True)
    frozen = flax.core.freeze(variables)
    close(gradient(wrapped, frozen), flax.core.freeze(gradient(wrapped, variables)))


def test_one_model_wrapped_in_several_ways_in_several_threads():
    model = SetsUp(lambda: nn.Dense(3))
    models = [aop.linen.wrap(model, config) for config in (CONFIG, aop.MemAOP(k=6))] + [model]
    runs = [(m, jit(m.init)(KEY, X)) for m in models]
    expected = [gradient(*run) for run in runs]
    found = [[] for _ in runs]
    threads = [
        threading.Thread(target=lambda i=i: found[i].extend(gradient(*runs[i]) for _ in range(3)))
        for i in range(len(runs))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, wanted in zip(found, expected, strict=True):
        close(own, [wanted] * 3)


# ---- nn.jit, which reuses the traces of modules with equal fields


FEW, MANY = aop.MemAOP(k=2, memory=None), aop.MemAOP(k=6, memory=None)


def test_traces_of_nn_jit_are_not_taken_for_one_another():
    model = MODELS["jit of a method"]
    params = model.init(KEY, X)

    def loss(params, configs):
        x = X
        for i, config in enumerate(configs):
            dense = params["params"][f"layers_{i}"]["Dense_0"]
            x = jnp.tanh(aop.dense(x, dense["kernel"], config=config) + dense["bias"])
        return jnp.mean(x**2)

    for configs in [(FEW, MANY), (MANY, FEW), (None, FEW), (None, None)]:
        rules = [(f"layers_{i}/.*", config) for i, config in enumerate(configs)]
        wrapped = aop.linen.wrap(model, rules) if any(configs) else model
        assert len(aop.linen.layers(wrapped, KEY, X)) == sum(map(bool, configs))
        chex.assert_trees_all_equal(wrapped.init(KEY, X), params)
        close(gradient(wrapped, params), jax.grad(loss)(params, configs))
