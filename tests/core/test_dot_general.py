"""Contractions of any number of dimensions, alone and inside stock Flax layers."""

import functools
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_layer import gradients

import mem_aop_jax as aop

COLLECTION = aop.linen.COLLECTION


def arrays(*shapes, dtype="float32"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


CONTRACTIONS = {
    "dense": ((6, 5), (5, 3), ((1,), (0,))),
    "batch and time": ((2, 3, 5), (5, 3), ((2,), (0,))),
    "several features": ((6, 5), (5, 2, 4), ((1,), (0,))),
    "several contracted": ((2, 3, 4, 5), (4, 5, 3), ((2, 3), (0, 1))),
    "contracted in another order": ((2, 3, 4, 5), (5, 4, 3), ((2, 3), (1, 0))),
    "contracted in front": ((5, 2, 3), (3, 5), ((0,), (1,))),
    "kernel in the middle": ((4, 6, 5), (2, 5, 3, 4), ((0, 2), (3, 1))),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def dot_general_gradients(config, numbers, lhs, rhs, memory, g, key):
    """The product, and the gradients of both operands and of the memory."""

    def layer(lhs, rhs, memory):
        return aop.dot_general(lhs, rhs, numbers, memory=memory, config=config, key=key)

    y, pull_back = jax.vjp(layer, lhs, rhs, memory)
    return y, *pull_back(g)


@pytest.mark.parametrize(
    ("name", "policy"),
    [(name, "topk") for name in CONTRACTIONS] + [("kernel in the middle", "weightedk")],
)
def test_any_contraction_is_a_dense_layer(name, policy):
    """The same contraction after moving its axes."""
    lhs_shape, rhs_shape, contracting = CONTRACTIONS[name]
    numbers = (contracting, ((), ()))
    free = [d for d in range(len(lhs_shape)) if d not in contracting[0]]
    features = [d for d in range(len(rhs_shape)) if d not in contracting[1]]
    in_features = np.prod([lhs_shape[d] for d in contracting[0]])
    rows, out_features = np.prod(lhs_shape) // in_features, np.prod(rhs_shape) // in_features
    y_shape = [lhs_shape[d] for d in free] + [rhs_shape[d] for d in features]

    def as_matrix(kernel):
        return kernel.transpose(*contracting[1], *features).reshape(in_features, out_features)

    lhs, rhs, g, kept = map(
        np.asarray, arrays(lhs_shape, rhs_shape, y_shape, (rows, in_features + out_features))
    )
    x = lhs.transpose(*free, *contracting[0]).reshape(rows, in_features)
    kernel, key = as_matrix(rhs), jax.random.key(0)
    memory = aop.Memory(kept[:, :in_features], kept[:, in_features:], np.float32(0))

    all_rows, config = (aop.MemAOP(k=k, policy=policy) for k in (rows, 2))
    empty = jax.tree.map(np.zeros_like, memory)
    y, dx, dw, after = dot_general_gradients(all_rows, numbers, lhs, rhs, empty, g, key)
    exact_dx = np.tensordot(g, rhs, (range(len(free), g.ndim), features))
    axes = free + [contracting[0][i] for i in np.argsort(contracting[1])]
    exact_dx = exact_dx.transpose(np.argsort(axes))
    exact_dw = x.T @ g.reshape(rows, out_features)
    chex.assert_trees_all_close(
        (y, dx, as_matrix(dw)),
        (np.tensordot(lhs, rhs, contracting), exact_dx, exact_dw),
        rtol=1e-5,
        atol=1e-5,
    )
    assert not any(rows.any() for rows in after[:2])

    wanted = gradients(config, x, kernel, memory, g.reshape(rows, out_features), key)[1:]
    _, _, dw, after = dot_general_gradients(config, numbers, lhs, rhs, memory, g, key)
    chex.assert_trees_all_close((as_matrix(dw), after), wanted, rtol=1e-5, atol=1e-5)


def test_preferred_element_type():
    x, kernel = arrays((6, 5), (5, 3), dtype="bfloat16")
    numbers = (((1,), (0,)), ((), ()))
    config = aop.MemAOP(k=6, memory=None)

    def layer(x, kernel):
        return aop.dot_general(x, kernel, numbers, None, jnp.float32, config=config)

    @jax.jit
    def product_and_gradients(x, kernel):
        y, pull_back = jax.vjp(layer, x, kernel)
        return y, *pull_back(jnp.ones_like(y))

    y, dx, dw = product_and_gradients(x, kernel)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_array_equal(y, jax.lax.dot_general(x, kernel, numbers, None, jnp.float32))


def test_batch_dimensions_run_exact_and_say_so_once():
    lhs, rhs = arrays((2, 6, 5), (2, 5, 3))
    numbers = (((2,), (1,)), ((0,), (0,)))
    layer = functools.partial(aop.dot_general, dimension_numbers=numbers, name="scores of heads")

    def both_gradients(config):
        return jax.grad(lambda *a: layer(*a, config=config).sum(), argnums=(0, 1))(lhs, rhs)

    with pytest.warns(UserWarning, match="scores of heads: .* runs exact: it has batch dim"):
        approximate = both_gradients(aop.MemAOP(k=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both_gradients(aop.MemAOP(k=1))
        chex.assert_trees_all_equal(approximate, both_gradients(None))


KERNEL_ON_THE_LEFT = (((0,), (1,)), ((), ()))  # (5, 3), (6, 5) -> (3, 6)


def test_a_memory_for_swapped_operands_runs_exact_and_says_so_once():
    config = aop.MemAOP(k=1)
    x, kernel = arrays((6, 5), (5, 3))
    memory = aop.init_memory(config, 6, 5, 3)
    layer = functools.partial(aop.dot_general, dimension_numbers=KERNEL_ON_THE_LEFT, name="swapped")

    def both_gradients(**options):
        return jax.grad(lambda *a: layer(*a, **options).sum(), argnums=(0, 1))(kernel, x)

    with pytest.warns(UserWarning, match="swapped: .* exact: its kernel is the left operand"):
        approximate = both_gradients(config=config, memory=memory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both_gradients(config=config, memory=memory)
        chex.assert_trees_all_equal(approximate, both_gradients())


@pytest.mark.usefixtures("standard_promotion")
def test_a_module_with_its_kernel_on_the_left_runs_exact_and_says_so_once():
    class KernelFirst(nn.Module):
        dot_general_cls: type | None = None

        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (5, 3))
            product = self.dot_general_cls() if self.dot_general_cls else jax.lax.dot_general
            return product(kernel, x, KERNEL_ON_THE_LEFT)

    config = aop.MemAOP(k=1)
    model = KernelFirst(functools.partial(aop.linen.DotGeneral, config=config))
    (x,) = arrays((6, 5))
    with pytest.warns(UserWarning, match="DotGeneral_0: .* exact: its kernel is the left operand"):
        variables = model.init(jax.random.key(0), x)
    assert list(variables) == ["params"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grads, exact = (
            jax.grad(lambda v, m=m: jnp.sum(m.apply(v, x) ** 2))(variables)
            for m in (model, KernelFirst())
        )
        chex.assert_trees_all_equal(grads, exact)
        assert aop.linen.layers(model, jax.random.key(0), x) == []


PRODUCT = functools.partial(aop.linen.DotGeneral, config=aop.MemAOP(ratio=1.0))
LAYERS = {
    "Dense": lambda cls: nn.Dense(6, dot_general_cls=cls),
    "DenseGeneral": lambda cls: nn.DenseGeneral((2, 3), axis=(-2, -1), dot_general_cls=cls),
    "attention": lambda cls: nn.MultiHeadDotProductAttention(
        2, qkv_dot_general_cls=cls, out_dot_general_cls=cls
    ),
    "remat": lambda cls: nn.remat(nn.Dense)(6, dot_general_cls=cls),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.usefixtures("standard_promotion")
def test_dot_general_cls_of_stock_layers(name):
    """The same parameters and outputs, and at k = rows the same gradients, for three steps."""
    x = arrays((3, 4, 8))[0]
    theirs, ours = LAYERS[name](None), LAYERS[name](PRODUCT)
    variables = jax.jit(ours.init)(jax.random.key(0), x)
    params, memory = variables["params"], variables[COLLECTION]
    chex.assert_trees_all_equal(params, jax.jit(theirs.init)(jax.random.key(0), x)["params"])

    @jax.jit
    def step(params, memory):
        def loss_fn(params, memory):
            return jnp.mean(ours.apply({"params": params, COLLECTION: memory}, x) ** 2)

        return jax.grad(loss_fn, argnums=(0, 1))(params, memory)

    @jax.jit
    def exact(params):
        return jax.grad(lambda p: jnp.mean(theirs.apply({"params": p}, x) ** 2))(params)

    for _ in range(3):
        grads, memory = step(params, memory)
        chex.assert_trees_all_close(grads, exact(params), rtol=1e-4, atol=1e-5)
        params = jax.tree.map(lambda p, g: np.asarray(p - 0.1 * np.asarray(g)), params, grads)
    evaluated = (jax.jit(model.apply)({"params": params}, x) for model in (ours, theirs))
    np.testing.assert_allclose(*evaluated, rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_rows_wait_in_the_memories_of_an_attention_layer():
    config = aop.MemAOP(ratio=0.25, policy="randk")
    product = functools.partial(aop.linen.DotGeneral, config=config)
    model, x = LAYERS["attention"](product), arrays((3, 4, 8))[0]
    variables = jax.jit(model.init)(jax.random.key(0), x)
    rngs = {aop.linen.RNG: jax.random.key(1)}
    grads = jax.jit(jax.grad(lambda v: jnp.mean(model.apply(v, x, rngs=rngs) ** 2)))(variables)
    memories = [
        grads[COLLECTION][n]["DotGeneral_0"]["memory"] for n in ("query", "key", "value", "out")
    ]
    for memory in memories:
        assert (memory.inputs.any(axis=1).sum(), memory.uses) == (9, 1)
    assert len({tuple(memory.inputs.any(axis=1).tolist()) for memory in memories}) > 1


@pytest.mark.parametrize("slots", [None, 4])
def test_the_memory_of_another_layer_is_an_error_though_its_size_is_that_of_the_batch(slots):
    config = aop.MemAOP(k=2, memory_slots=slots)
    x, kernel = jnp.ones((8, 3), jnp.float32), jnp.ones((3, 4), jnp.float32)
    with pytest.raises(ValueError, match=r"dense: memory.cotangents has shape \(\d, 8\)"):
        aop.dense(x, kernel, aop.init_memory(config, 8, 3, 8), config=config)
    if slots is None:  # of slots, it might as well be the memory of a kernel on the left
        numbers, memory = (((1,), (0,)), ((), ())), aop.init_memory(config, 8, 3, 8)
        with pytest.raises(ValueError, match=r"dot_general: memory.cotangents has shape"):
            aop.dot_general(x, kernel, numbers, memory=memory, config=config)
