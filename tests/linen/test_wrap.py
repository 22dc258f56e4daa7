"""aop.linen.wrap and aop.linen.layers: models that know nothing of this library."""

import copy
import functools
import pickle
import threading
import warnings
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
close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-6)


def inputs(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = inputs(8, 4)


flatten = functools.partial(flax.traverse_util.flatten_dict, sep="/")


def memories(tree):
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, aop.Memory))


def gradient(model, variables, x=X, **rngs):
    """Of the mean square of the output, with respect to all variables."""
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
    model: nn.Module  # fields with names that the wrapper's might have
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
SLOW = "setup", "Dense", "scan", "remat_scan", "vmap of Dense", "remat and jit of layers"


def some_slow(names, slow):
    """The names as parameters of a test, those in `slow` with its marker."""
    return [pytest.param(n, marks=[pytest.mark.slow] * (n in slow)) for n in names]


@pytest.mark.parametrize("name", some_slow(MODELS, SLOW))
def test_the_model_itself(name):
    """Variables, outputs at two batch sizes, and at k = rows the gradients of three steps."""
    model, x = MODELS[name], inputs(*SHAPES.get(name, X.shape))
    wrapped = aop.linen.wrap(model, ALL_ROWS)
    rngs = {"params": KEY, "dropout": KEY}
    ours, theirs = jax.jit(lambda: (wrapped.init(rngs, x), model.init(rngs, x)))()
    memory = ours.pop(COLLECTION)
    chex.assert_trees_all_equal(ours, theirs)
    params = theirs.pop("params")

    @jax.jit
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


def last_rows(key, scores, k):
    """A policy that draws nothing."""
    del key
    indices = jnp.arange(scores.size - k, scores.size)
    return aop.Selection(indices, jnp.full((k,), scores.size / k, scores.dtype))


@pytest.mark.parametrize(
    ("policy", "memory"),
    [("topk", "rows"), pytest.param(last_rows, None, marks=pytest.mark.slow)],
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
    """The parameters, and the gradients and memories of three steps."""
    ours, theirs = jax.jit(lambda: (wrapped.init(KEY, X), by_hand.init(KEY, X)))()
    chex.assert_trees_all_equal(ours["params"], theirs["params"])
    step = jax.jit(
        lambda ours, theirs, x: (gradient(wrapped, ours, x), gradient(by_hand, theirs, x))
    )
    for i in range(3):
        grads, expected = step(ours, theirs, inputs(8, 4, seed=i))
        close(grads["params"], expected["params"])
        ours, theirs = (
            variables | {COLLECTION: gradients.get(COLLECTION, {})}
            for variables, gradients in ((ours, grads), (theirs, expected))
        )
        close(*(jax.tree.leaves(variables.get(COLLECTION, {})) for variables in (ours, theirs)))


@pytest.mark.parametrize(
    ("name", "make_key"),
    [
        pytest.param("scan of remat", jax.random.key, marks=pytest.mark.slow),
        ("scan", jax.random.PRNGKey),
        pytest.param("remat_scan", jax.random.key, marks=pytest.mark.slow),
    ],
)
def test_random_policies_draw_for_each_layer_of_a_stack(name, make_key):
    wrapped = aop.linen.wrap(MODELS[name], aop.MemAOP(k=4, policy="randk"))
    variables = jax.jit(wrapped.init)(KEY, X)
    step = jax.jit(lambda key: memories(gradient(wrapped, variables, mem_aop=key)[COLLECTION]))

    def waiting_rows(seed):
        """Of each layer: which of its rows are in the memory."""
        (memory,) = step(make_key(seed))
        return np.any(memory.inputs, axis=-1).reshape(-1, 8).tolist()

    first = waiting_rows(1)
    assert all(sum(rows) == 4 for rows in first)
    assert len(set(map(tuple, first))) > 1
    assert first != waiting_rows(2)


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


@pytest.mark.parametrize("place", PLACES)
def test_rules_are_on_the_path_from_the_wrapper_on(place):
    """The layers that they find are those whose kernels have another gradient."""
    put, prefix = PLACES[place]
    model = put(MLP)
    params = model.init(KEY, X)
    cases = {}
    for name in RULES if place == "alone" else ["first match"]:
        rules, layers = RULES[name]
        wrapped = put(lambda rules=rules: aop.linen.wrap(MLP(), rules))
        layers = [layer._replace(path=prefix + layer.path) for layer in layers]
        assert aop.linen.layers(wrapped, KEY, X) == layers, name
        variables = wrapped.init(KEY, X)
        chex.assert_trees_all_equal(variables["params"], params["params"])
        assert len(memories(variables.get(COLLECTION, {}))) == len(layers), name
        cases[name] = wrapped, variables, layers

    @jax.jit
    def gradients():
        ours = {name: gradient(wrapped, v) for name, (wrapped, v, _) in cases.items()}
        return gradient(model, params), ours

    exact, ours = gradients()
    exact = flatten(exact["params"])
    for name, (_, _, layers) in cases.items():
        approximate = flatten(ours[name]["params"])
        differing = {path for path in exact if not np.allclose(approximate[path], exact[path])}
        assert differing == {f"{layer.path}/kernel" for layer in layers}, name


def test_a_wrapped_submodule_called_twice_has_two_memories():
    model = CalledTwice(aop.linen.wrap(nn.Dense(4), CONFIG))
    assert list(model.init(KEY, X)[COLLECTION]["model"]) == ["kernel", "kernel#1"]
    check_equal(model, aop.linen.wrap(CalledTwice(nn.Dense(4)), CONFIG))


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
        jax.eval_shape(aop.linen.wrap(MLP(), rules).init, KEY, X)


@pytest.mark.parametrize("outer", [lambda m: m, lambda m: nn.Sequential([m])])
def test_what_cannot_be_wrapped(outer):
    with pytest.raises(ValueError, match="got a wrapped model, or a model with one in it"):
        jax.eval_shape(aop.linen.wrap(outer(aop.linen.wrap(MLP(), CONFIG)), CONFIG).init, KEY, X)
    with pytest.raises(TypeError, match="module is of type type, not"):
        aop.linen.wrap(MLP, CONFIG)


def test_this_librarys_layers_in_a_model_keep_their_configurations():
    product = functools.partial(aop.linen.DotGeneral, config=aop.MemAOP(k=3))
    model = nn.Sequential(
        [
            nn.Dense(4),
            aop.linen.Dense(4, config=aop.MemAOP(k=4)),
            nn.Dense(4, dot_general_cls=product),
            nn.Dense(4, dot_general=jax.lax.dot_general),
        ]
    )
    layers = aop.linen.layers(aop.linen.wrap(model, CONFIG), KEY, X)
    assert [(layer.path, layer.k) for layer in layers] == [  # this library's first
        ("layers_1", 4),
        ("layers_2/DotGeneral_0", 3),
        ("layers_0", 2),
        ("layers_3", 2),
    ]


@pytest.mark.parametrize("method", [None, "__call__", nn.Sequential.__call__])
def test_layers_computes_nothing(method):
    model = nn.Sequential([aop.linen.Dense(10**12, config=aop.MemAOP(ratio=0.25))])
    layers = aop.linen.layers(model, KEY, jnp.ones((4, 8, 10)), method=method)
    assert layers == [Layer("layers_0", 32, 10, 10**12, 8)]


def test_a_model_of_which_little_is_reached_says_so_once():
    class Convolutional(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.Conv(4, (3, 3), name="conv")(x).mean((1, 2)))

    x = inputs(2, 6, 6, 4)
    with pytest.warns(
        UserWarning, match=r"wrap: .* of the FLOPs .* are reached. Exact are: a conv"
    ):
        aop.linen.wrap(Convolutional(), aop.MemAOP(ratio=0.5)).init(KEY, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was asked for
        aop.linen.wrap(Convolutional(), [("head", aop.MemAOP(ratio=0.5))]).init(KEY, x)
        aop.linen.wrap(MLP(), CONFIG).init(KEY, X)


# ---- errors


@pytest.mark.parametrize(
    ("name", "path"), [("scan", "Scan.*0/dense"), ("compact", "(hidden|head)"), ("Dense", "Dense")]
)
def test_errors_name_the_layer(name, path):
    wrapped = aop.linen.wrap(MODELS[name], aop.MemAOP(k=4, policy="randk"))
    variables = jax.jit(wrapped.init)(KEY, X)
    with pytest.raises(ValueError, match=f"{path}: differentiated .* without its memory"):
        gradient(wrapped, {"params": variables["params"]})
    with pytest.raises(ValueError, match=f"{path}: memory.inputs has .* 3 rows"):
        wrapped.apply(variables, X[:3])
    with pytest.raises(ValueError, match=f"{path}: policy 'randk' .* got no key"):
        gradient(wrapped, variables)
    with pytest.raises(ValueError, match=f"{path}: k=4 outer products asked .* 3 rows"):
        wrapped.init(KEY, X[:3])


SHARED = {
    "recurrent": nn.RNN(nn.SimpleCell(4)),
    "LSTM": nn.RNN(nn.LSTMCell(4)),
    "scan": Model(lambda x: stack(params=None)()(x, None)[0]),
    "vmap": Model(lambda x: copies(MLP, None)()(x)),
}


@pytest.mark.parametrize("name", some_slow(SHARED, ["LSTM"]))
def test_parameters_shared_by_a_transform_have_a_memory_for_each_run(name):
    """At k = rows the gradients of two steps are the model's; no memory is used twice."""
    model, x = SHARED[name], inputs(2, 8, 4)
    wrapped = aop.linen.wrap(model, ALL_ROWS)
    variables = jax.jit(wrapped.init)(KEY, x)
    step = jax.jit(lambda v: (gradient(wrapped, v, x), gradient(model, {"params": v["params"]}, x)))
    for _ in range(2):
        ours, exact = step(variables)
        close(ours["params"], exact["params"])
        assert all((memory.uses == 1).all() for memory in memories(ours[COLLECTION]))
        variables[COLLECTION] = ours[COLLECTION]
    if name != "vmap":  # whose copies see the same inputs: one contraction
        assert memories(variables)[0].uses.shape == (8 if name != "scan" else 3,)


def test_after_an_error_the_layer_is_exact_again():
    wrapped = aop.linen.wrap(SetsUp(lambda: nn.Dense(4)), CONFIG)
    bound = wrapped.bind(wrapped.init(KEY, X))
    with pytest.raises(ValueError, match="enc: memory"):
        bound(X[:3])
    close(bound(X), SetsUp(lambda: nn.Dense(4)).apply(bound.variables, X))


# ---- training


@pytest.mark.parametrize(
    "name", some_slow(["compact", "scan of remat", "jit of a method"], ["compact"])
)
def test_the_same_run_in_a_train_state_by_carry_memory_and_in_one_scan(name):
    wrapped = aop.linen.wrap(MODELS[name], CONFIG)
    variables = jax.jit(wrapped.init)(KEY, X)
    batches, traces = inputs(10, 8, 4), []
    tx = aop.mem_aop_sgd(0.1, variables[COLLECTION])

    def carried(state, x):
        traces.append("carried")
        params, opt_state = state
        grads = gradient(wrapped, {"params": params, COLLECTION: aop.get_memory(opt_state)}, x)
        updates, opt_state = tx.update(grads["params"], opt_state, memory=grads[COLLECTION])
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def overwritten(state, x):
        traces.append("overwritten")
        return state.apply_gradients(grads=gradient(wrapped, state.params, x))

    @jax.jit
    def scan(state, batches):
        return jax.lax.scan(lambda state, x: (carried(state, x), None), state, batches)[0]

    first = variables["params"], tx.init(variables["params"])
    scanned = scan(first, batches)
    traces.clear()
    train_state = TrainState.create(apply_fn=wrapped.apply, params=variables, tx=optax.sgd(0.1))
    state, step = jax.tree.map(jnp.copy, first), jax.jit(carried, donate_argnums=0)
    for x in batches:
        state, train_state = step(state, x), overwritten(train_state, x)
    assert sorted(traces) == ["carried", "overwritten"]
    params, memory = state[0], aop.get_memory(state[1])
    assert all(memory.inputs.any() for memory in memories(memory))
    close(state, scanned)
    close(train_state.params, {"params": params, COLLECTION: memory})


def test_transforms_of_the_whole():
    wrapped = aop.linen.wrap(MODELS["scan"], CONFIG)
    variables = jax.jit(wrapped.init)(KEY, X)

    @jax.jit
    def gradients(variables):
        applies = wrapped.apply, jax.checkpoint(wrapped.apply), jax.jit(wrapped.apply)
        return [jax.grad(lambda v, f=f: jnp.mean(f(v, X) ** 2))(variables) for f in applies]

    plain, *transformed = gradients(variables)
    close(transformed, [plain, plain])


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
    for copied in (pickle.loads(pickle.dumps(wrapped)), copy.deepcopy(wrapped)):
        assert copied == wrapped
    ours, frozen = jax.jit(
        lambda v: (gradient(wrapped, v), gradient(wrapped, flax.core.freeze(v)))
    )(variables)
    close(frozen, flax.core.freeze(ours))


def test_rules_of_a_function_of_all_variables_fit():
    model = nn.Dense(3)
    params = model.init(KEY, X)
    approx = aop.approximate(lambda params, x: jnp.mean(model.apply(params, x) ** 2), CONFIG)
    rules = aop.plan(approx, params, X, min_speedup=None, rates=aop.Rates("a", 1, 1, 1)).rules
    assert rules[0][0] == "params/kernel"
    assert len(aop.linen.layers(aop.linen.wrap(model, rules), KEY, X)) == 1


def test_a_memory_restored_without_a_target_is_told_how_to_become_one():
    wrapped = aop.linen.wrap(nn.Dense(3), CONFIG)
    variables = wrapped.init(KEY, X)
    restored = {"kernel": variables[COLLECTION]["kernel"]._asdict()}
    with pytest.raises(
        TypeError, match=r"Dense: memory is of type dict; .*aop.Memory\(\*\*memory\)"
    ):
        wrapped.apply({**variables, COLLECTION: restored}, X)


def test_a_decoder_whose_next_calls_take_one_token():
    model = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    wrapped, x = aop.linen.wrap(model, CONFIG), inputs(2, 5, 4)
    variables, own = wrapped.init(KEY, x), model.init(KEY, x)
    close({name: variables[name] for name in own}, own)
    assert len(variables[COLLECTION]) == 4
    y, cache = wrapped.apply(own, x[:, :1], mutable=["cache"])
    close((y, cache), model.apply(own, x[:, :1], mutable=["cache"]))


def test_one_model_wrapped_in_several_ways_in_several_threads():
    model = SetsUp(lambda: nn.Dense(3))
    models = [aop.linen.wrap(model, config) for config in (CONFIG, aop.MemAOP(k=6))] + [model]
    variables = jax.jit(lambda: [m.init(KEY, X) for m in models])()

    def traced_gradient(i):
        return jax.jit(lambda v: gradient(models[i], v))(variables[i])

    expected = [traced_gradient(i) for i in range(3)]
    gradients = [[] for _ in models]
    threads = [
        threading.Thread(
            target=lambda i=i: gradients[i].extend(traced_gradient(i) for _ in range(3))
        )
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, wanted in zip(gradients, expected, strict=True):
        close(ours, [wanted] * 3)


# ---- nn.jit, which reuses the traces of modules with equal fields


FEW, MANY = aop.MemAOP(k=2, memory=None), aop.MemAOP(k=6, memory=None)


def test_traces_of_nn_jit_are_not_taken_for_one_another():
    model = MODELS["jit of a method"]
    params = model.init(KEY, X)

    def loss_by_hand(params, configs):
        x = X
        for i, config in enumerate(configs):
            dense = params["params"][f"layers_{i}"]["Dense_0"]
            x = jnp.tanh(aop.dense(x, dense["kernel"], config=config) + dense["bias"])
        return jnp.mean(x**2)

    def gradients(params, wrapped, configs):
        return gradient(wrapped, params), jax.grad(loss_by_hand)(params, configs)

    for configs in [(FEW, MANY), (MANY, FEW), (None, FEW), (None, None)]:
        rules = [(f"layers_{i}/.*", config) for i, config in enumerate(configs)]
        wrapped = aop.linen.wrap(model, rules) if any(configs) else model
        assert len(aop.linen.layers(wrapped, KEY, X)) == sum(map(bool, configs))
        chex.assert_trees_all_equal(wrapped.init(KEY, X), params)
        close(*jax.jit(functools.partial(gradients, wrapped=wrapped, configs=configs))(params))
