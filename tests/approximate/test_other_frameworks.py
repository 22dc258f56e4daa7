"""aop.approximate on models that nobody here wrote: share reached, exact at k = rows, training."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mem_aop_jax as aop

pytestmark = pytest.mark.usefixtures("standard_promotion", "without_x64")

ROWS = aop.MemAOP(ratio=0.25)
SUBSPACE = aop.MemAOP(ratio=0.25, policy="priority", memory="subspace", rank=4)
KEY = jax.random.key(0)


def numbers(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def check(loss, params, *args, share=0.99):
    """The share that is reached, the gradients at k = rows, and 20 steps of training."""
    exact = aop.approximate(loss, aop.MemAOP(ratio=1.0))
    assert exact.reach(params, *args).share >= share
    memory = exact.init(params, *args)
    gradients, wanted = jax.jit(
        lambda p, m: (jax.grad(exact)(p, m, None, *args), jax.grad(loss)(p, *args))
    )(params, memory)
    chex.assert_trees_all_close(gradients, wanted, rtol=1e-3, atol=1e-5)
    for config in (ROWS, SUBSPACE):
        losses = train(aop.approximate(loss, config), params, *args)
        assert losses[-1] < 0.9 * losses[0]


def train(approx, params, *args):
    tx = optax.chain(aop.carry_memory(approx.init(params, *args)), optax.adam(1e-2))

    @jax.jit
    def step(params, state, key):
        loss, (grads, memory) = jax.value_and_grad(approx, argnums=(0, 1))(
            params, aop.get_memory(state), key, *args
        )
        updates, state = tx.update(grads, state, params, memory=memory)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for i in range(20):
        params, state, loss = step(params, state, jax.random.key(i))
        losses.append(float(loss))
    return losses


@pytest.mark.slow
def test_haiku():
    hk = pytest.importorskip("haiku")

    def forward(x):
        x = hk.dynamic_unroll(hk.LSTM(8), x, hk.LSTM(8, name="state").initial_state(x.shape[1]))[0]
        x = x + hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling())(x, x, x)
        return hk.nets.MLP([16, 3])(x)

    model = hk.without_apply_rng(hk.transform(forward))
    x = numbers(6, 4, 5)
    params = model.init(KEY, x)
    check(lambda params, x: jnp.mean((model.apply(params, x) - 1) ** 2), params, x)
    rules = [(r"mlp/.*/w", ROWS)]  # the whole paths are "mlp/~/linear_0/w" and so on
    layers = aop.approximate(model.apply, rules).layers(params, x)
    assert [layer.path for layer in layers] == ["mlp/~/linear_0/w", "mlp/~/linear_1/w"]


def test_equinox():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Sequential(
        [
            eqx.nn.MLP(5, 8, 16, 2, key=KEY),
            eqx.nn.LayerNorm(8),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.Linear(8, 3, key=KEY),
        ]
    )
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    x = numbers(24, 5)

    def loss(arrays, x):
        return jnp.mean((jax.vmap(eqx.combine(arrays, static))(x) - 1) ** 2)

    check(loss, arrays, x)
    paths = [layer.path for layer in aop.approximate(loss, ROWS).layers(arrays, x)]
    assert paths[-1] == "layers/3/weight"
    assert len(paths) == 4


# ---- Hugging Face


def language_model(kind, **config):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(vocab_size=48, **config)
    return transformers, config


TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 48, (4, 12)))


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS).mean()


def check_transformer(model, share=0.99, **inputs):
    params = jax.jit(model.init_weights, static_argnums=1)(KEY, model.input_shape)

    def loss(params, inputs):
        return cross_entropy(model(**inputs, params=params).logits)

    check(loss, params, inputs, share=share)


@pytest.mark.slow
def test_gpt2_with_its_tied_head():
    transformers, config = language_model("GPT2", n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.FlaxGPT2LMHeadModel(config, _do_init=False)
    check_transformer(model, input_ids=TOKENS)


@pytest.mark.slow
def test_llama():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    transformers, config = language_model("Llama", **sizes, **heads)
    model = transformers.FlaxLlamaForCausalLM(config, _do_init=False)
    check_transformer(model, input_ids=TOKENS)


@pytest.mark.slow
def test_t5(monkeypatch):
    clip = jnp.clip  # whose keywords T5 calls by their names of old
    monkeypatch.setattr(jnp, "clip", lambda x, a_min=None, a_max=None: clip(x, a_min, a_max))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    transformers, config = language_model("T5", **sizes, decoder_start_token_id=0)
    model = transformers.FlaxT5ForConditionalGeneration(config, _do_init=False)
    check_transformer(model, input_ids=TOKENS, decoder_input_ids=TOKENS)


@pytest.mark.slow
def test_bert_for_masked_tokens():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 32, "max_position_embeddings": 16}
    transformers, config = language_model("Bert", **sizes, **more)
    model = transformers.FlaxBertForMaskedLM(config, _do_init=False)
    check_transformer(model, input_ids=TOKENS)


@pytest.mark.slow
def test_whisper_but_for_its_convolutions():
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "num_mel_bins": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 10}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    transformers, config = language_model(
        "Whisper", **layers, **heads, **sizes, **tokens, max_target_positions=16
    )
    model = transformers.FlaxWhisperForConditionalGeneration(
        config, _do_init=False, input_shape=(1, 8, 20)
    )
    check_transformer(model, 0.7, input_features=numbers(4, 8, 20), decoder_input_ids=TOKENS)


@pytest.mark.slow
def test_a_vision_transformer_with_its_patches():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=32, image_size=16, patch_size=4)
    model = transformers.FlaxViTForImageClassification(config, _do_init=False)
    params = jax.jit(model.init_weights, static_argnums=1)(KEY, model.input_shape)

    def loss(params, images):
        return jnp.mean((model(images, params=params).logits - 1) ** 2)

    check(loss, params, numbers(4, 3, 16, 16))
