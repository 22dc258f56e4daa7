"""What is compiled: the FLOPs, the bytes and the memory of a layer's backward pass."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from one_layer import M, N, P, gradients, normal, weight_gradient

import mem_aop_jax as aop
from mem_aop_jax._core.flops import flops_left_out, relative_cost
from mem_aop_jax._core.policies import POLICIES, UNBIASED_POLICIES

SUBSPACE = aop.MemAOP(k=6, policy="priority", memory="subspace", rank=(3, 2))


def shapes(*arrays):
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in arrays]


def compiled_gradients(config, rows, in_features, out_features):
    """Of the inputs, the kernel and the memory."""
    x, kernel, g = shapes((rows, in_features), (in_features, out_features), (rows, out_features))
    memory = jax.eval_shape(lambda: aop.init_memory(config, rows, in_features, out_features))
    return gradients.lower(config, x, kernel, memory, g, jax.random.key(0)).compile()


def test_flops_of_the_compiled_backward_pass():
    m = n = p = 1024
    k = 128

    def flops(config):
        return compiled_gradients(config, m, n, p).cost_analysis()["flops"]

    exact = flops(None)
    for policy in ("topk", "weightedk", "randk"):
        for kind in ("rows", None):
            config = aop.MemAOP(k=k, policy=policy, memory=kind)
            assert flops(config) <= 1.03 * (1 + k / m) / 2 * exact, config


@pytest.mark.parametrize("config", [aop.MemAOP(k=6, memory=None), aop.MemAOP(k=6), SUBSPACE])
def test_the_gradient_of_a_kernel_in_bfloat16_is_never_in_float32(config):
    """The product rounds it, which a pass over it would do else; it accumulates in float32."""
    n, p = M + 8, 40  # no other array is so large
    x, kernel, g = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((M, n), (n, p), (M, p)))
    memory = jax.eval_shape(lambda: aop.init_memory(config, M, n, p, jnp.bfloat16))
    lowered = gradients.lower(config, x, kernel, memory, g, jax.random.key(0)).as_text()
    assert f"tensor<{n}x{p}xbf16>" in lowered
    assert f"tensor<{n}x{p}xf32>" not in lowered


@pytest.mark.parametrize("options", [{}, {"groups": 4, "decay": 0.5}])
def test_a_donated_memory_is_overwritten_in_place(options):
    m, n, p, k = 2048, 512, 256, 64
    config = aop.MemAOP(k=k, **options)
    memory = aop.init_memory(config, m, n, p)

    @functools.partial(jax.jit, donate_argnums=3)
    def backward(x, kernel, g, memory):
        return gradients(config, x, kernel, memory, g)[1:]

    lowered = backward.lower(*shapes((m, n), (n, p), (m, p)), memory)
    stats = lowered.compile().memory_analysis()
    size = 4 * m * (n + p)
    assert stats.alias_size_in_bytes >= size
    assert stats.temp_size_in_bytes < 0.2 * size


def test_there_is_no_pass_over_all_rows_but_for_the_norms():
    """Of the bytes of X and G, XLA counts three for the norms, and a little for the k rows."""
    m, n, p = 4096, 256, 512

    def gradient(x, kernel, g):
        config = aop.MemAOP(ratio=1 / 8, memory=None)
        return jax.vjp(lambda kernel: aop.dense(x, kernel, config=config), kernel)[1](g)

    lowered = jax.jit(gradient).lower(*shapes((m, n), (n, p), (m, p)))
    counted = lowered.compile().cost_analysis()["bytes accessed"]
    assert counted < 3.6 * 4 * m * (n + p)


def test_flops_and_memory_beside_a_subspace():
    """About 3 q (1/N + 1/P) of dW beside the rows; no temporary of the size of X beside X and G."""
    m, n, q = 4096, 512, 16

    def compiled(config):
        memory = jax.eval_shape(lambda: aop.init_memory(config, m, n, n))
        x, g = shapes((m, n), (m, n))
        return weight_gradient.lower(config, x, g, memory, jax.random.key(0)).compile()

    exact = 2 * m * n * n
    sampled = compiled(aop.MemAOP(ratio=0.125, policy="priority"))
    ours = compiled(aop.MemAOP(k=m // 8, policy="priority", memory="subspace", rank=q))
    extra = ours.cost_analysis()["flops"] - sampled.cost_analysis()["flops"]
    assert extra < 1.25 * 3 * q * (2 / n) * exact
    temporaries = [c.memory_analysis().temp_size_in_bytes for c in (ours, sampled)]
    assert temporaries[0] - temporaries[1] < m * n * 4 / 4


# ---- approximate gradients of the inputs


def with_inputs(config, ratio, rank):
    return dataclasses.replace(config, input_grad=aop.InputGrad(ratio, rank))


def compiled_square(config, rows, in_features, out_features, argnums):
    """The gradients of the sum of the squared outputs, compiled."""

    def loss_fn(x, kernel, memory, key):
        return jnp.sum(aop.dense(x, kernel, memory, config=config, key=key) ** 2)

    args = shapes((rows, in_features), (in_features, out_features))
    memory = aop.init_memory(config, rows, in_features, out_features)
    grad_fn = jax.jit(jax.grad(loss_fn, argnums=argnums))
    return grad_fn.lower(*args, memory, jax.random.key(0)).compile(), memory


def test_nobody_pays_for_a_gradient_that_is_not_asked_for():
    """The first layer of a model: its directions for the inputs are not even followed.

    Only, all directions stay orthonormal.
    """
    programs = {}
    for config in (with_inputs(SUBSPACE, 0.25, 16), SUBSPACE):
        programs[config], memory = compiled_square(config, 512, 64, 48, argnums=(1, 2))
        if config.input_grad:
            x, kernel = normal(512, 64), normal(64, 48, seed=1)
            _, after = programs[config](x, kernel, memory, jax.random.key(0))
            new, old = np.asarray(after.cotangents), memory.cotangents
            np.testing.assert_allclose(new.T @ new, np.eye(16), atol=1e-5)
            assert np.linalg.matrix_rank(np.concatenate([new, old], axis=1), tol=0.02) == 16 + 2
    ours, wanted = (program.cost_analysis()["flops"] for program in programs.values())
    assert ours < wanted + 2 * 12 * 48 * 16**2


@pytest.mark.parametrize(
    "config",
    [
        with_inputs(dataclasses.replace(SUBSPACE, k=256, rank=8), 0.25, 32),
        with_inputs(dataclasses.replace(SUBSPACE, k=256, rank=(4, 24), refresh=8), 0.25, 8),
        with_inputs(aop.MemAOP(k=512, policy="priority"), 0.5, 0),
    ],
)
def test_flops_and_memory_are_what_the_formula_says(config):
    sizes = rows, in_features, out_features = 2048, 384, 512
    configs = config, None, dataclasses.replace(config, input_grad=None)
    ours, exact, without = (compiled_square(c, *sizes, argnums=(0, 1, 2))[0] for c in configs)
    flops = ours.cost_analysis()["flops"] - flops_left_out(config, *sizes)
    c = relative_cost(config, *sizes)
    assert flops / exact.cost_analysis()["flops"] == pytest.approx(c, rel=0.03)
    # beside what there is without: the gathered rows and their products, and dX in two parts
    temporaries = [c.memory_analysis().temp_size_in_bytes for c in (ours, without)]
    drawn = config.input_rows(rows) * (in_features + 3 * out_features)
    assert temporaries[0] - temporaries[1] < 4 * (drawn + rows * in_features + rows * 64)


def test_groups_draw_in_each_and_need_no_rows_of_other_devices():
    config = with_inputs(aop.MemAOP(k=8, policy="priority", groups=4), 0.25, 0)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("data",), ()))
    x, g = (jax.device_put(normal(M, n, seed=n), rows) for n in (N, P))
    kernel = jax.device_put(normal(N, P), everywhere)
    step = jax.jit(
        lambda x, g, key: gradients(config, x, kernel, None, g, key)[0], out_shardings=rows
    )
    program = step.lower(x, g, jax.random.key(0)).compile()
    dx = program(x, g, jax.random.key(0))
    drawn = np.any(np.asarray(dx) != 0, axis=1).reshape(4, -1)
    np.testing.assert_array_equal(drawn.sum(axis=1), 3)
    gathered = re.findall(r"f32\[([\d,]*)\]\S* all-gather\(", program.as_text())
    assert set(gathered) <= {"4,12"}  # the scores of all rows at most


# ---- policies

SORTED = [  # policy, memory, groups
    *((policy, None, 1) for policy in ("topk", "crs", "uniform")),
    *((policy, None, 4) for policy in ("weightedk", "priority")),
    ("priority", "subspace", 1),
]
ALL_SORTED = {(policy, None, groups) for policy in POLICIES for groups in (1, 4)}
ALL_SORTED |= {(policy, "subspace", groups) for policy in UNBIASED_POLICIES for groups in (1, 4)}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of CPUs")
@pytest.mark.parametrize(
    ("policy", "memory", "groups"),
    SORTED
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in sorted(ALL_SORTED - set(SORTED), key=str)
    ],
)
def test_cpus_sort_no_rows(policy, memory, groups, without_x64):
    """They find the k largest, of both gradients, in a fraction of the time."""
    inputs = aop.InputGrad(ratio=0.25, rank=8 if memory else 0)
    config = aop.MemAOP(k=16, policy=policy, memory=memory, groups=groups, input_grad=inputs)
    argnums = (0, 1, 2) if memory else (0, 1)
    program = compiled_square(config, 256, 32, 32, argnums)[0].as_text()
    assert " sort(" not in program
    assert program.count('custom_call_target="TopK"') == (1 if policy == "crs" else 2)


def test_a_batch_that_jit_closes_over_is_computed_with_when_it_runs():
    """Not while XLA compiles, in seconds: no operation is folded away."""
    config = aop.MemAOP(ratio=0.1, memory=None)
    images = normal(512, 4, 8)

    def loss_fn(kernel, images):
        x = jnp.reshape(images, (512, 32))
        return jnp.sum(aop.dense(x, kernel, config=config) ** 2)

    def flops(function, *args):
        return jax.jit(jax.grad(function)).lower(*args).compile().cost_analysis()["flops"]

    kernel = jnp.ones((32, 4))
    closed_over = flops(lambda kernel: loss_fn(kernel, images), kernel)
    assert closed_over > 0.95 * flops(loss_fn, kernel, images)
