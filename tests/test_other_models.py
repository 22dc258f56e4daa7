"""Models that were not written for this library: trained unedited, at k = rows as without it."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mem_aop_jax as aop

pytestmark = pytest.mark.usefixtures("standard_promotion")

COLLECTION = aop.linen.COLLECTION
ALL_ROWS, A_QUARTER = aop.MemAOP(ratio=1.0), aop.MemAOP(ratio=0.25)


def numbers(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def train(model, loss_fn, params, memory, steps):
    """The losses and the last parameters. `loss_fn(model, variables)`."""
    tx = optax.chain(aop.carry_memory(memory), optax.sgd(0.1))

    @jax.jit
    def step(params, opt_state):
        def loss(params, memory):
            return loss_fn(model, {"params": params, COLLECTION: memory})

        grad_fn = jax.value_and_grad(loss, argnums=(0, 1))
        loss, (grads, memory) = grad_fn(params, aop.get_memory(opt_state))
        updates, opt_state = tx.update(grads, opt_state, params, memory=memory)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = tx.init(params), []
    for _ in range(steps):
        params, opt_state, loss = step(params, opt_state)
        losses.append(loss)
    return losses, params


def check_training(model, loss_fn, params, *inputs):
    """At k = rows it is the exact run; with a quarter of the rows the loss falls."""

    def train_wrapped(config):
        wrapped = aop.linen.wrap(model, config)
        memory = jax.eval_shape(wrapped.init, jax.random.key(0), *inputs)[COLLECTION]
        return train(wrapped, loss_fn, params, memory, steps=4)

    exact = train(model, loss_fn, params, {}, steps=4)
    chex.assert_trees_all_close(train_wrapped(ALL_ROWS), exact, rtol=1e-3, atol=1e-5)
    losses, _ = train_wrapped(A_QUARTER)
    assert losses[-1] < losses[0]


class Block(nn.Module):
    """A pre-norm transformer block of stock layers."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y)
        y = nn.Dense(32)(nn.LayerNorm()(x))
        return x + nn.Dense(x.shape[-1])(nn.gelu(y))


def test_a_transformer_block_of_stock_layers():
    x, target = numbers(4, 6, 16), numbers(4, 6, 1)

    def loss_fn(model, variables):
        return jnp.mean((model.apply(variables, x) - target) ** 2)

    params = jax.jit(Block().init)(jax.random.key(0), x)["params"]
    check_training(Block(), loss_fn, params, x)


def test_bert_of_transformers():
    transformers = pytest.importorskip(
        "transformers", "4.57", reason='pip install "transformers<5"'
    )
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.FlaxBertForSequenceClassification(config, _do_init=False)
    bert = model.module
    tokens = jax.random.randint(jax.random.key(0), (16, 12), 0, config.vocab_size)
    labels = (tokens[:, 1] < config.vocab_size // 2).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    inputs = tokens, jnp.ones_like(tokens), jnp.zeros_like(tokens), positions, None

    def loss_fn(model, variables):
        logits = model.apply(variables, *inputs).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    wrapped = aop.linen.wrap(bert, A_QUARTER)
    layers = aop.linen.layers(wrapped, jax.random.key(0), *inputs)
    assert len(layers) == 8  # 6 in the encoder, the pooler, the classifier
    assert ("bert/encoder/layer/0/output/dense", 192, 64, 32, 48) in layers
    params = jax.jit(model.init_weights, static_argnums=1)(jax.random.key(0), (1, 1))
    check_training(bert, loss_fn, params, *inputs)


LAYERS = {  # layers of Flax's own tests of Dense and DenseGeneral, with the shapes of their inputs
    "Dense": (nn.Dense(4, kernel_init=nn.initializers.ones), (1, 3)),
    "Dense, extra batch dims": (nn.Dense(4), (1, 2, 3)),
    "Dense, no bias": (nn.Dense(4, use_bias=False), (1, 3)),
    "Dense, float16": (nn.Dense(4, dtype=jnp.float16), (2, 3)),
    "DenseGeneral": (nn.DenseGeneral(4), (1, 3)),
    "DenseGeneral, two out": (nn.DenseGeneral((2, 2)), (1, 3)),
    "DenseGeneral, two in": (nn.DenseGeneral(3, axis=(-2, 2)), (1, 2, 2)),
    "DenseGeneral, axes swapped": (nn.DenseGeneral((3, 4), axis=(3, -2)), (2, 2, 4, 5)),
    "DenseGeneral, first axis": (nn.DenseGeneral(4, axis=0), (3, 2, 5)),
    "DenseGeneral, batch dim": (nn.DenseGeneral(4, batch_dims=(0,)), (2, 3, 5)),
    "DenseGeneral, two batch dims": (
        nn.DenseGeneral((2, 3), axis=(-2, 3), batch_dims=(0, 1)),
        (2, 3, 4, 5),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_flax_tests(name):
    layer, shape = LAYERS[name]
    x, wrapped = numbers(*shape), aop.linen.wrap(layer, ALL_ROWS)
    variables = wrapped.init(jax.random.key(0), x)
    params = layer.init(jax.random.key(0), x)["params"]
    chex.assert_trees_all_equal(variables["params"], params)
    memory = variables.get(COLLECTION, {})
    assert memory

    def loss(params, memory, model):
        y = model.apply({"params": params, COLLECTION: memory}, x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    @jax.jit
    def losses_and_gradients(params, memory):
        ours = jax.value_and_grad(loss, argnums=(0, 1))(params, memory, wrapped)
        return ours, jax.value_and_grad(loss)(params, {}, layer)

    (value, (grads, after)), exact = losses_and_gradients(params, memory)
    low = getattr(layer, "dtype", None) == jnp.float16
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if low else {"rtol": 1e-5, "atol": 1e-6}
    chex.assert_trees_all_close((value, grads), exact, **tolerance)
    for own in jax.tree.leaves(after, is_leaf=lambda node: isinstance(node, aop.Memory)):
        assert np.all(own.uses == 1)
        assert not np.any(own.inputs)
