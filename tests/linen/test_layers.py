"""aop.linen.Dense beside flax.linen.Dense."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import mem_aop_jax as aop

pytestmark = pytest.mark.usefixtures("standard_promotion")

CONFIG = aop.MemAOP(k=2)
COLLECTION = aop.linen.COLLECTION


def inputs(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


FIELDS = [
    {},
    {"use_bias": False},
    {"dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16},
    {"param_dtype": jnp.float64, "dtype": jnp.float32},
    {"precision": jax.lax.Precision.HIGHEST},
    {"kernel_init": nn.initializers.orthogonal(), "bias_init": nn.initializers.normal()},
    {"promote_dtype": lambda *arrays, dtype: [a.astype(jnp.float16) for a in arrays]},
    {"name": "head"},
]


@pytest.mark.parametrize(
    ("fields", "shape"),
    [(fields, (8, 3)) for fields in FIELDS] + [({}, (2, 4, 3)), ({}, (3,))],
    ids=lambda parameter: "-".join(map(str, parameter)) or "default",
)
def test_a_drop_in_for_nn_dense(fields, shape):
    """Parameters, initial values, outputs, dX and bias gradient; at k = rows the kernel's too."""

    class Model(nn.Module):
        dense: type
        options: dict

        @nn.compact
        def __call__(self, x):
            return nn.Sequential([self.dense(5, **self.options), nn.tanh])(x)

    theirs = Model(nn.Dense, fields)
    rows = int(np.prod(shape[:-1], dtype=int))
    ours = Model(aop.linen.Dense, fields | {"config": aop.MemAOP(k=rows)})

    x, key = inputs(*shape), jax.random.key(0)
    variables = ours.init(key, x)
    params, memory = variables["params"], {COLLECTION: variables[COLLECTION]}
    chex.assert_trees_all_equal(params, theirs.init(key, x)["params"])

    def loss(params, x, model, memory):
        return model.apply({"params": params} | memory, x).astype(jnp.float32).sum()

    loss_and_gradients = jax.value_and_grad(loss, argnums=(0, 1))
    approximate, exact = jax.jit(
        lambda *args: (
            loss_and_gradients(*args, ours, memory),
            loss_and_gradients(*args, theirs, {}),
        )
    )(params, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(approximate, exact)
    low = jnp.bfloat16 in fields.values() or "promote_dtype" in fields
    chex.assert_trees_all_close(approximate, exact, rtol=2e-2 if low else 1e-5, atol=1e-6)
    chex.assert_trees_all_equal(approximate[1][1], exact[1][1])  # dX


def test_it_is_an_nn_dense():
    layer = aop.linen.Dense(5, config=CONFIG)
    assert isinstance(layer, nn.Dense)
    exact = aop.linen.Dense(5)
    variables = exact.init(jax.random.key(0), inputs(8, 3))
    assert list(variables) == ["params"]
    assert jax.grad(lambda v: exact.apply(v, inputs(8, 3)).sum())(variables)


@pytest.mark.parametrize("policy", ["topk", "randk"])
def test_the_bias_gradient_is_exact(policy):
    layer, x = aop.linen.Dense(5, config=aop.MemAOP(k=1, policy=policy)), inputs(8, 3)

    @jax.jit
    def gradients(key):
        variables = layer.init(key, x)
        rngs = {aop.linen.RNG: key}
        ours = jax.grad(lambda v: jnp.sum(layer.apply(v, x, rngs=rngs) ** 2))(variables)
        theirs = jax.grad(lambda p: jnp.sum(nn.Dense(5).apply({"params": p}, x) ** 2))
        return ours["params"], theirs(variables["params"])

    ours, exact = gradients(jax.random.key(0))
    np.testing.assert_allclose(ours["bias"], exact["bias"], rtol=1e-5, atol=1e-6)
    assert not np.allclose(ours["kernel"], exact["kernel"])


class MLP(nn.Module):
    config: aop.MemAOP

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(aop.linen.Dense(6, config=self.config)(x))
        return aop.linen.Dense(2, config=self.config, name="head")(x)


@pytest.mark.parametrize("policy", ["topk", "weightedk", "randk"])
def test_carry_memory_and_train_state_give_the_same_run(policy):
    config = aop.MemAOP(ratio=0.25, policy=policy, memory_dtype=jnp.float32)
    model, x = MLP(config), inputs(8, 3)
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def loss(variables, x, key):
        return jnp.mean(model.apply(variables, x, rngs={aop.linen.RNG: key}) ** 2)

    tx = aop.mem_aop_sgd(0.1, variables[COLLECTION])
    params, opt_state = variables["params"], tx.init(variables["params"])
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=optax.sgd(0.1))

    @jax.jit
    def step(params, opt_state, state, x, key):
        carried = {"params": params, COLLECTION: aop.get_memory(opt_state)}
        grads = jax.grad(loss)(carried, x, key)
        updates, opt_state = tx.update(grads["params"], opt_state, memory=grads[COLLECTION])
        overwritten = state.apply_gradients(grads=jax.grad(loss)(state.params, x, key))
        return optax.apply_updates(params, updates), opt_state, overwritten

    for i in range(6):
        params, opt_state, state = step(
            params, opt_state, state, inputs(8, 3, seed=i), jax.random.key(i)
        )
    memory = aop.get_memory(opt_state)
    assert memory["Dense_0"]["memory"].inputs.any()
    chex.assert_trees_all_close(
        state.params, {"params": params, COLLECTION: memory}, rtol=1e-5, atol=1e-6
    )


def test_random_layers_draw_each_its_own_rows_each_step():
    config = aop.MemAOP(k=4, policy="randk")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return aop.linen.Dense(3, config=config)(x) + aop.linen.Dense(3, config=config)(x)

    x = inputs(16, 3)
    variables = jax.jit(Model().init)(jax.random.key(0), x)

    @jax.jit
    @jax.grad
    def gradient(variables, key):
        return Model().apply(variables, x, rngs={aop.linen.RNG: key}).sum()

    def waiting_rows(seed):
        layers = gradient(variables, jax.random.key(seed))[COLLECTION].values()
        return [np.any(layer["memory"].inputs, axis=1).tolist() for layer in layers]

    first, second = waiting_rows(1), waiting_rows(2)
    assert first[0] != first[1]
    assert first[0] != second[0]
    assert first == waiting_rows(1)


def test_a_layer_called_twice_has_two_memories():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = aop.linen.Dense(3, config=CONFIG, use_bias=False)
            return layer(nn.tanh(layer(x)))

    class InSetup(nn.Module):
        def setup(self):
            self.layer = aop.linen.Dense(3, config=CONFIG, use_bias=False)

        def __call__(self, x):
            return self.layer(nn.tanh(self.layer(x)))

    def loss_by_hand(kernel, memories, x):
        y = nn.tanh(aop.dense(x, kernel, memories[0], config=CONFIG))
        return jnp.sum(aop.dense(y, kernel, memories[1], config=CONFIG) ** 2)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(model, variables, kernel, memories, x):
        ours = jax.grad(lambda v: jnp.sum(model.apply(v, x) ** 2))(variables)
        return ours, jax.grad(loss_by_hand, argnums=(0, 1))(kernel, memories, x)

    x = inputs(8, 3)
    for model, name in ((Twice(), "Dense_0"), (InSetup(), "layer")):
        variables = jax.jit(model.init)(jax.random.key(0), x)
        memory = variables[COLLECTION][name]
        assert list(memory) == ["memory", "memory_1"]
        memories = list(memory.values())
        kernel = variables["params"][name]["kernel"]
        for _ in range(3):
            ours, (dw, memories) = gradients(model, variables, kernel, memories, x)
            chex.assert_trees_all_close(ours["params"][name]["kernel"], dw, rtol=1e-5, atol=1e-6)
            chex.assert_trees_all_close(
                list(ours[COLLECTION][name].values()), memories, rtol=1e-5, atol=1e-6
            )
            assert all(memory.uses == 1 for memory in memories)
            variables = {"params": variables["params"], COLLECTION: ours[COLLECTION]}


def test_evaluation_without_the_collection_is_exact_at_any_batch_size():
    model = MLP(aop.MemAOP(k=4, policy="randk"))
    variables = jax.jit(model.init)(jax.random.key(0), inputs(8, 3))
    params = {"params": variables["params"]}
    x = inputs(3, 3)
    hidden = np.tanh(x @ np.asarray(params["params"]["Dense_0"]["kernel"]))
    wanted = hidden @ np.asarray(params["params"]["head"]["kernel"])
    np.testing.assert_allclose(model.apply(params, x), wanted, rtol=1e-5, atol=1e-6)
    saliency = jax.jit(jax.grad(lambda x: model.apply(params, x).sum()))(x)  # needs no memory
    assert np.isfinite(saliency).all()
    with pytest.raises(ValueError, match=r"(Dense_0|head): differentiated .* without its memory"):
        jax.grad(lambda p: model.apply(p, x).sum())(params)
    with pytest.raises(ValueError, match=r"Dense_0: memory.inputs has shape \(8, 3\), .* 3 rows"):
        model.apply(variables, x)


def test_errors_name_the_layer():
    x = inputs(8, 3)
    with pytest.raises(ValueError, match=r"Dense_0: k=9 outer products asked of a batch of 8 rows"):
        MLP(aop.MemAOP(k=9)).init(jax.random.key(0), x)
    model = MLP(aop.MemAOP(k=2, policy="randk"))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"Dense_0: policy 'randk' .*rngs=\{aop.linen.RNG: key\}"):
        jax.grad(lambda v: model.apply(v, x).sum())(variables)
    with pytest.raises(ValueError, match="leave dot_general and dot_general_cls unset"):
        aop.linen.Dense(3, config=CONFIG, dot_general=jax.lax.dot_general).init(
            jax.random.key(0), x
        )
    with pytest.raises(TypeError, match="Dense: x has dtype int32"):
        aop.linen.Dense(3, config=CONFIG, promote_dtype=lambda *arrays, dtype: list(arrays)).init(
            jax.random.key(0), jnp.ones((8, 3), jnp.int32)
        )


def test_lifted_transforms_give_the_same_gradients_and_memory():
    x = inputs(8, 3)
    models = [MLP(CONFIG), nn.remat(MLP)(CONFIG), nn.jit(MLP)(CONFIG)]
    plain, *lifted = jax.jit(lambda key: [model.init(key, x) for model in models])(
        jax.random.key(0)
    )
    for variables in lifted:
        chex.assert_trees_all_equal_shapes_and_dtypes(variables, plain)
    plain_gradients, *lifted_gradients = jax.jit(
        lambda v: [jax.grad(lambda v, m=m: jnp.sum(m.apply(v, x) ** 2))(v) for m in models]
    )(plain)
    for gradients in lifted_gradients:
        chex.assert_trees_all_close(gradients, plain_gradients, rtol=1e-5, atol=1e-6)


def test_layers_stacked_by_scan_with_carry_memory():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(aop.linen.Dense(4, config=CONFIG)(x)), None

    axes = {"params": 0, COLLECTION: 0}
    model = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)()
    x = inputs(8, 4)
    variables = jax.jit(model.init)(jax.random.key(0), x, None)
    params, memory = variables["params"], variables[COLLECTION]
    tx = aop.mem_aop_sgd(optax.linear_schedule(0.1, 0.05, 10), memory)
    opt_state = tx.init(params)

    def unstacked(tree):
        return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(3)]

    def loss(params, memory):
        return jnp.mean(model.apply({"params": params, COLLECTION: memory}, x, None)[0] ** 2)

    def loss_by_hand(layers, memories):
        y = x
        for layer, memory in zip(layers, memories, strict=True):
            y = nn.tanh(aop.dense(y, layer["kernel"], memory, config=CONFIG) + layer["bias"])
        return jnp.mean(y**2)

    @jax.jit
    def step(params, opt_state):
        memory = aop.get_memory(opt_state)
        layers, memories = unstacked(params["Dense_0"]), unstacked(memory["Dense_0"]["memory"])
        wanted = jax.grad(loss_by_hand, argnums=(0, 1))(layers, memories)
        grads, memory = jax.grad(loss, argnums=(0, 1))(params, memory)
        ours = unstacked(grads["Dense_0"]), unstacked(memory["Dense_0"]["memory"])
        updates, opt_state = tx.update(grads, opt_state, memory=memory)
        return optax.apply_updates(params, updates), opt_state, ours, wanted

    for _ in range(3):
        params, opt_state, ours, wanted = step(params, opt_state)
        chex.assert_trees_all_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_init_of_the_parameters_alone():
    """Without a mutable collection there is no memory, and the layer evaluates as nn.Dense does."""
    layer, x = aop.linen.Dense(3, config=CONFIG), inputs(8, 3)
    variables = layer.init(jax.random.key(0), x, mutable=["params"])
    assert list(variables) == ["params"]
    assert layer.apply(variables, x).shape == (8, 3)


def test_train_state_compiles_once():
    model, x = MLP(CONFIG), inputs(8, 3)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=optax.adam(1e-3))
    traces = []

    @jax.jit
    def step(state, x):
        traces.append(1)
        return state.apply_gradients(
            grads=jax.grad(lambda v: jnp.mean(state.apply_fn(v, x) ** 2))(state.params)
        )

    for _ in range(100):
        state = step(state, x)
    assert len(traces) == 1
