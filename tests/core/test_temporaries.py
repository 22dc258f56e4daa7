"""What a training step holds beside its state, relative to the exact step."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import mem_aop_jax as aop

SUBSPACE = {"policy": "priority", "memory": "subspace"}


class Model(nn.Module):
    """Blocks whose inputs XLA can compute anew: a GELU, a LayerNorm, a transposition."""

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            y = nn.Dense(3 * 64)(nn.LayerNorm()(x)).reshape(8, 64, 3, 4, 16)
            y = jax.nn.dot_product_attention(*(y[:, :, i] for i in range(3)))
            x = x + nn.Dense(64)(y.reshape(x.shape))
            x = x + nn.Dense(64)(nn.gelu(nn.Dense(4 * 64)(nn.LayerNorm()(x))))
        return x


def temporaries(config):
    """Bytes of the compiled step, beside its donated state."""
    model, x = Model(), jnp.zeros((8, 64, 64))
    model = model if config is None else aop.linen.wrap(model, ((r".*", config),))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    params, memory = variables["params"], variables.get(aop.linen.COLLECTION, {})
    tx = optax.chain(aop.carry_memory(memory), optax.sgd(1e-3, momentum=0.9))

    def step(state, x, key):
        params, opt_state = state

        def loss(params, memory):
            variables = {"params": params, aop.linen.COLLECTION: memory}
            return jnp.mean(model.apply(variables, x, rngs={aop.linen.RNG: key}) ** 2)

        grads, memory = jax.grad(loss, argnums=(0, 1))(params, aop.get_memory(opt_state))
        updates, opt_state = tx.update(grads, opt_state, params, memory=memory)
        return optax.apply_updates(params, updates), opt_state

    state = jax.eval_shape(lambda params: (params, tx.init(params)), params)
    program = jax.jit(step, donate_argnums=0).lower(state, x, jax.random.key(0)).compile()
    return program.memory_analysis().temp_size_in_bytes


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
REFRESH = SUBSPACE | {"rank": 4, "refresh": 8}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs")
@pytest.mark.parametrize(
    ("options", "limit"),
    [
        slow({"policy": "topk", "memory": None}, 0.97),
        slow(SUBSPACE | {"rank": 4}, 1.08),
        (REFRESH, 1.08),
        slow(REFRESH | {"rank": (4, 0)}, 0.97),
        slow(REFRESH | {"input_grad": aop.InputGrad(1 / 4, 4)}, 1.1),
    ],
)
def test_a_step_holds_no_rows_twice(options, limit, without_x64):
    """And none longer than the exact step: neither for a refresh nor to gather the chosen ones."""
    assert temporaries(aop.MemAOP(ratio=1 / 4, **options)) < limit * temporaries(None)
