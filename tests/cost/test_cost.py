"""What a layer costs, and which layers of a model would gain."""

import functools
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mem_aop_jax as aop
from mem_aop_jax._core import flops
from mem_aop_jax._cost import device_rates

ARITHMETIC = aop.Rates("nothing but arithmetic counts", 1e12, 1e12, 1e30)
BALANCED = aop.Rates("some", 1e12, 2e12, 1e11)
SIZES = 4096, 1024, 2048


@pytest.mark.parametrize("ratio", [1 / 2, 1 / 8])
def test_where_arithmetic_is_all_the_ceiling_is_reached(ratio):
    one = aop.MemAOP(ratio=ratio, memory=None)
    both = aop.MemAOP(ratio=ratio, policy="priority", input_grad=aop.InputGrad(ratio, 0))
    for config, ceiling in ((one, 3 / (2 + ratio)), (both, 3 / (1 + 2 * ratio))):
        found = aop.cost(config, *SIZES, rates=ARITHMETIC)
        assert found.speedup == pytest.approx(ceiling, rel=1e-6)
        assert found.exact_flops == 6 * np.prod(SIZES)
        assert found.flops / found.exact_flops == pytest.approx(1 / ceiling, rel=0.01)


def test_an_exact_layer():
    found = aop.cost(None, *SIZES, rates=BALANCED)
    assert found.speedup == 1
    assert found.flops == found.exact_flops
    assert found.memory == 0
    assert found.bytes == found.exact_bytes > 0


@pytest.mark.parametrize(
    "config",
    [
        aop.MemAOP(ratio=1 / 4),
        aop.MemAOP(ratio=1 / 4, memory_dtype="bfloat16"),
        aop.MemAOP(ratio=1 / 4, memory_slots=64),
        aop.MemAOP(ratio=1 / 4, memory=None),
        aop.MemAOP(ratio=1 / 4, policy="priority", memory="subspace", rank=(8, 4)),
    ],
    ids=lambda config: f"{config.memory_kind} {config.memory_dtype} {config.memory_slots}",
)
def test_memory_is_what_is_held_and_costs_time(config):
    found = aop.cost(config, *SIZES, jnp.bfloat16, rates=BALANCED)
    held = jax.eval_shape(lambda: aop.init_memory(config, *SIZES, jnp.bfloat16))
    held_bytes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held)]
    assert found.memory == sum(held_bytes)
    if config.memory_kind is not None:
        alone = aop.cost(aop.MemAOP(ratio=1 / 4, memory=None), *SIZES, jnp.bfloat16, rates=BALANCED)
        assert found.bytes > alone.bytes
        assert found.speedup < alone.speedup


def test_wider_layers_gain_more_and_slow_memory_takes_it_away():
    config = aop.MemAOP(ratio=1 / 8)
    wide, narrow = (aop.cost(config, 4096, n, n, rates=BALANCED).speedup for n in (2048, 64))
    slow = aop.cost(config, *SIZES, rates=BALANCED._replace(bytes=1e9)).speedup
    late = aop.cost(config, *SIZES, rates=BALANCED._replace(layer=1.0)).speedup
    assert wide > 1.2
    assert narrow < 1
    assert slow < 1
    assert late < 1


def test_small_sizes_have_rates_of_their_own_and_sizes_between_are_between():
    config = aop.MemAOP(ratio=1 / 8)
    some = BALANCED._replace(cached=1e13, small_kernel=0.1)
    small = BALANCED._replace(bytes=some.cached, kernel=some.small_kernel)
    for rows, features, wanted in ((512, 512, small), (32768, 1024, BALANCED)):
        sizes = rows, features, features
        found, same = (aop.cost(config, *sizes, rates=rates).speedup for rates in (some, wanted))
        assert found == pytest.approx(same, rel=1e-6)
    found, below, above = (
        aop.cost(config, 4096, 768, 768, rates=rates).speedup for rates in (some, BALANCED, small)
    )
    assert 1.05 * below < found < above / 1.05


def test_a_subspace_takes_longer_the_more_directions_it_has():
    nothing_else = BALANCED._replace(flops=1e30, bytes=1e30, step=1.0, subspace=1.0)
    speedups = [
        aop.cost(
            aop.MemAOP(ratio=1 / 8, policy="priority", memory="subspace", rank=rank),
            *SIZES,
            rates=nothing_else,
        ).speedup
        for rank in (16, 32, (16, 0))
    ]
    assert speedups == pytest.approx([1 / 2, 1 / 3, 2 / 3], rel=1e-6)


def test_products_with_few_columns_have_their_own_speed():
    config = aop.MemAOP(ratio=1 / 8, policy="priority", memory="subspace")
    slow = aop.cost(config, *SIZES, rates=ARITHMETIC._replace(narrow=0.1)).speedup
    assert slow < 0.9 * aop.cost(config, *SIZES, rates=ARITHMETIC).speedup


def test_one_pass_over_all_rows():
    """Of X and G: with a memory of rows two less, with subspaces four; and the memory's once."""
    once = BALANCED._replace(one_pass=True)
    rows, in_features, out_features = SIZES
    features = 4 * (in_features + out_features)
    both = 2 * rows * features
    for saved, options in [
        (0, {"memory": None}),
        (0, {"memory_slots": 64}),
        (both - 64 * features, {"k": 64, "memory": "rows"}),
        (both, {"memory": "subspace", "policy": "priority"}),
    ]:
        config = aop.MemAOP(**({"ratio": 1 / 8} if "k" not in options else {}) | options)
        costs = [aop.cost(config, *SIZES, rates=rates) for rates in (BALANCED, once)]
        assert costs[0].bytes - costs[1].bytes == saved
        assert (costs[1].speedup > costs[0].speedup) == (saved > 0)


def test_sums_with_a_memory_have_a_rate_of_their_own():
    rows, alone = aop.MemAOP(ratio=1 / 8), aop.MemAOP(ratio=1 / 8, memory=None)
    fast = BALANCED._replace(sums=10 * BALANCED.bytes)
    found = aop.cost(rows, *SIZES, rates=fast).speedup
    assert found > 1.02 * aop.cost(rows, *SIZES, rates=BALANCED).speedup
    assert found < aop.cost(alone, *SIZES, rates=fast).speedup
    assert found == aop.cost(rows, *SIZES, rates=fast._replace(subspace=1)).speedup
    for config in (alone, None):
        assert aop.cost(config, *SIZES, rates=fast) == aop.cost(config, *SIZES, rates=BALANCED)


def test_half_precision_has_its_own_rate():
    config = aop.MemAOP(ratio=1 / 8, memory=None)
    # in half precision only bytes count, and there are more
    rates = BALANCED._replace(bytes=1e13, half_flops=1e30)
    assert aop.cost(config, *SIZES, jnp.float32, rates=rates).speedup > 1.4
    assert aop.cost(config, *SIZES, jnp.bfloat16, rates=rates).speedup <= 1


def test_bad_input():
    with pytest.raises(TypeError, match="cost: config is of type str"):
        aop.cost("topk", *SIZES)
    with pytest.raises(ValueError, match=r"cost: got the sizes \(0, 1024, 2048\)"):
        aop.cost(None, 0, *SIZES[1:])
    with pytest.raises(TypeError, match="float"):
        aop.cost(None, 256.5, *SIZES[1:])
    assert aop.cost(None, *np.int32([32768, 16384, 16384])).flops == 6 * 32768 * 16384**2
    with pytest.raises(ValueError, match="k=5000"):
        aop.cost(aop.MemAOP(k=5000), *SIZES, rates=BALANCED)


# ---- devices


def test_known_devices_are_not_measured(monkeypatch):
    class Device:
        device_kind = "TPU v5 lite"

    monkeypatch.setattr(jax, "devices", lambda *_: [Device()])
    monkeypatch.setattr(device_rates, "measured_rates", None)
    assert aop.device_rates() is device_rates.KNOWN["TPU v5 lite"]


@pytest.fixture(
    params=[(64, 32), pytest.param((2048, 1024), marks=pytest.mark.slow)], ids=["small", "as used"]
)
def measured_sizes(request, monkeypatch, tmp_path):
    monkeypatch.setenv("MEM_AOP_JAX_CACHE", str(tmp_path / "rates"))
    for name, size in zip(("ROWS", "FEATURES"), request.param, strict=True):
        monkeypatch.setattr(device_rates, name, size)
    device_rates.measured_rates.cache_clear()
    yield
    device_rates.measured_rates.cache_clear()


@pytest.mark.usefixtures("measured_sizes")
def test_other_devices_are_measured_once_and_inside_of_jit(capsys, tmp_path, monkeypatch):
    assert jax.jit(lambda x: x * aop.device_rates().flops)(1.0) > 1e8
    found = aop.device_rates()
    assert all(np.isfinite(rate) and rate >= 0 for rate in found[1:])
    assert min(found.flops, found.half_flops, found.bytes) > 1e8
    assert 0 < found.kernel <= 1
    assert aop.device_rates() is found
    assert device_rates.measured_rates.cache_info().misses == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in said] == [
        f" measuring cpu, {i} of 5" for i in range(1, 6)
    ]

    device_rates.measured_rates.cache_clear()  # as another process
    assert aop.device_rates() == found
    assert not capsys.readouterr().err
    (file,) = (tmp_path / "rates").iterdir()
    file.write_text('{"flops": 1}')  # of another version
    device_rates.measured_rates.cache_clear()
    assert aop.device_rates().device == "cpu"
    assert len(capsys.readouterr().err.splitlines()) == 5
    monkeypatch.setenv("MEM_AOP_JAX_CACHE", str(file))  # which is no folder
    assert aop.measure_rates().device == "cpu"
    assert "cannot be kept" in capsys.readouterr().err


# ---- models


MODEL = nn.Sequential([nn.Dense(1024), nn.relu, nn.Dense(4, name="head")])
X = jnp.ones((4096, 512), jnp.float32)
CONFIG = aop.MemAOP(ratio=1 / 4)


@pytest.fixture
def balanced(monkeypatch):
    for module in ("_cost.cost", "_analysis.plan", "_approximate.settings"):
        module = importlib.import_module(f"mem_aop_jax.{module}")
        monkeypatch.setattr(module, "device_rates", lambda: BALANCED)


@pytest.mark.usefixtures("balanced")
def test_a_plan_leaves_exact_what_would_not_gain():
    plan = aop.plan(MODEL, CONFIG, X)
    first, head = plan.layers
    assert first.layer == aop.linen.layers(aop.linen.wrap(MODEL, CONFIG), jax.random.key(0), X)[0]
    assert first.cost == aop.cost(CONFIG, 4096, 512, 1024, rates=BALANCED)
    assert (first.gains, head.gains) == (True, False)
    assert "| layers_0 | 4096 | 512 | 1024 | 1024 | 25% | 25.2 MB |" in str(plan)
    assert str(plan).splitlines()[-1].endswith("| exact |")

    planned = aop.linen.wrap(MODEL, plan.rules)
    gains = aop.linen.wrap(MODEL, CONFIG, min_speedup=1.05)
    for model in (planned, gains):
        layers = aop.linen.layers(model, jax.random.key(0), X)
        assert [layer.path for layer in layers] == ["layers_0"]
        variables = jax.eval_shape(model.init, jax.random.key(0), X)
        assert set(variables[aop.linen.COLLECTION]) == {"layers_0"}


@pytest.mark.usefixtures("balanced")
def test_where_nothing_gains_the_model_is_exact():
    plan = aop.plan(MODEL, CONFIG, X, min_speedup=3)
    assert not any(planned.gains for planned in plan.layers)
    loss = lambda model, variables: jnp.sum(model.apply(variables, X[:64]) ** 2)  # noqa: E731
    for model in (
        aop.linen.wrap(MODEL, plan.rules),
        aop.linen.wrap(MODEL, CONFIG, min_speedup=3),
    ):
        variables = jax.jit(model.init)(jax.random.key(0), X[:64])
        assert set(variables) == {"params"}
        grads = [jax.jit(jax.grad(functools.partial(loss, m)))(variables) for m in (model, MODEL)]
        jax.tree.map(np.testing.assert_array_equal, *grads)


@pytest.mark.usefixtures("balanced")
def test_a_memory_is_kept_in_a_batch_too_small_to_gain(standard_promotion):
    config = aop.MemAOP(ratio=1 / 8, policy="priority", memory="subspace", rank=4)
    model = aop.linen.wrap(nn.Dense(1024), config, min_speedup=1.05)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    assert aop.cost(config, 8, 512, 1024, rates=BALANCED).speedup < 1.05

    def loss(variables, x):
        return jnp.sum(model.apply(variables, x, rngs={aop.linen.RNG: jax.random.key(1)}) ** 2)

    memory = jax.jit(jax.grad(loss))(variables, X[:8])[aop.linen.COLLECTION]["kernel"]
    assert memory.uses == 1
    np.testing.assert_allclose(np.linalg.norm(memory.inputs, axis=0), 1, rtol=1e-5)


@pytest.mark.usefixtures("balanced")
@pytest.mark.parametrize(
    "config", [aop.MemAOP(k=64, memory=None), aop.MemAOP(k=64), aop.MemAOP(ratio=1 / 8, groups=8)]
)
def test_it_is_evaluated_at_any_batch_size(config):
    model = aop.linen.wrap(nn.Dense(1024), config, min_speedup=1.05)
    params = nn.Dense(1024).init(jax.random.key(0), X[:1])["params"]
    assert "params" in jax.eval_shape(model.init, jax.random.key(0), X)
    for rows in (0, 7):
        y = model.apply({"params": params}, X[:rows])
        np.testing.assert_array_equal(y, nn.Dense(1024).apply({"params": params}, X[:rows]))


def test_layers_that_are_approximate_by_themselves_are_not_planned():
    own = aop.linen.Dense(1024, config=aop.MemAOP(k=64), name="own")
    model = nn.Sequential([nn.Dense(1024, name="stock"), own])
    plan = aop.plan(model, CONFIG, X, rates=BALANCED)
    assert [planned.layer.path for planned in plan.layers] == ["layers_0"]
    layers = aop.linen.layers(aop.linen.wrap(model, plan.rules), jax.random.key(0), X)
    assert {(layer.path, layer.k) for layer in layers} == {("layers_0", 1024), ("layers_1", 64)}


def test_a_plan_of_a_model_that_is_one_layer_is_for_that_model():
    plan = aop.plan(nn.Dense(1024), CONFIG, X, rates=BALANCED)
    assert [planned.layer.path for planned in plan.layers] == [""]
    (layer,) = aop.linen.layers(aop.linen.wrap(nn.Dense(1024), plan.rules), jax.random.key(0), X)
    assert layer == plan.layers[0].layer


def test_rules_and_stacked_layers_and_several_arguments():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            stack = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = stack(nn.Dense(1024, name="stack"), x, None)
            return x + nn.Dense(1024, name="beside")(y)

    args = tuple(jax.ShapeDtypeStruct((4096, features), jnp.float32) for features in (1024, 8))
    rules = [("beside", aop.MemAOP(k=8)), (".*", CONFIG)]
    plan = aop.plan(Two(), rules, args, rates=BALANCED)
    assert [planned.layer.path for planned in plan.layers] == ["stack", "beside"]
    assert plan.rules == (("stack", CONFIG),)
    assert len(aop.linen.layers(aop.linen.wrap(Two(), plan.rules), jax.random.key(0), *args)) == 1


@pytest.mark.usefixtures("balanced")
def test_nnx():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(512, 1024, rngs=rngs), nnx.Linear(1024, 4, rngs=rngs))
    plan = aop.plan(model, CONFIG, X)
    assert plan.rules == (("layers/0", CONFIG),)
    assert len(plan.layers) == 2
    assert aop.nnx.layers(model) == []  # not wrapped by that
    wrapped = aop.nnx.wrap(nnx.clone(model), CONFIG, X, min_speedup=1.05)
    planned = aop.nnx.wrap(model, plan.rules, X)
    assert aop.nnx.layers(wrapped) == aop.nnx.layers(planned) == [plan.layers[0].layer]


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x, wide):
        return nn.Dense(512 if wide else 4)(x)


def test_shapes_in_place_of_arrays():
    """Nothing of the size of a batch is needed; what is no array still decides."""
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    for wide in (True, False):
        from_shape, from_array = (
            aop.plan(Branches(), CONFIG, (x, wide), rates=BALANCED) for x in (shape, X)
        )
        assert from_shape == from_array
        assert from_shape.layers[0].layer.out_features == (512 if wide else 4)
    model = aop.linen.wrap(Branches(), CONFIG)
    (layer,) = aop.linen.layers(model, jax.random.key(0), shape, wide=True)
    assert layer == from_shape.layers[0].layer._replace(out_features=512)

    linear = nnx.Linear(512, 4, rngs=nnx.Rngs(0))
    from_shape, from_array = (aop.plan(linear, CONFIG, x, rates=BALANCED) for x in (shape, X))
    assert from_shape == from_array
    wrapped = aop.nnx.wrap(linear, aop.MemAOP(ratio=0.25), shape)
    grads = nnx.jit(nnx.grad(lambda linear, x: jnp.sum(linear(x))))(wrapped, X)
    assert grads.kernel[...].shape == (512, 4)


def test_bad_plans():
    with pytest.raises(TypeError, match="plan: model is of type int"):
        aop.plan(3, CONFIG, X, rates=BALANCED)
    with pytest.raises(TypeError, match="plan: got 'topk'"):
        aop.plan(MODEL, "topk", X, rates=BALANCED)
    with pytest.raises(ValueError, match="matches no dense layer"):
        aop.plan(MODEL, [("tail", CONFIG)], X, rates=BALANCED)
    assert all(p.gains for p in aop.plan(MODEL, CONFIG, X, min_speedup=None, rates=BALANCED).layers)
    aop.plan(MODEL, CONFIG, X, min_speedup=np.float32(1.2), rates=BALANCED)
    for bad in (0, -1.0, float("nan"), "fast", True):
        with pytest.raises(ValueError, match="got min_speedup="):
            aop.plan(MODEL, CONFIG, X, min_speedup=bad, rates=BALANCED)
        with pytest.raises(ValueError, match="wrap: got min_speedup="):
            aop.linen.wrap(MODEL, CONFIG, min_speedup=bad)


# ---- formulas


@pytest.mark.parametrize(
    ("rank", "refresh"),
    [((8, 2), 4)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in ((None, 1), ((4, 0), 1), (32, 1), (4, 1), ((8, 2), 1), (4, 4))
    ],
)
def test_flops_are_the_compilers(rank, refresh):
    """Of the gradient of the kernel, from the FLOPs of the step with and without it."""
    rows, features, k = 1024, 256, 128
    options = {} if rank is None else {"memory": "subspace", "rank": rank, "refresh": refresh}
    config = aop.MemAOP(k=k, policy="priority", **options)
    x = jax.ShapeDtypeStruct((rows, features), jnp.float32)
    kernel = jax.ShapeDtypeStruct((features, features), jnp.float32)
    memory = jax.eval_shape(lambda: aop.init_memory(config, rows, features, features))

    def step(argnums):
        def loss_fn(kernel, x, memory, key):
            return jnp.sum(aop.dense(x, kernel, memory, config=config, key=key))

        grad_fn = jax.jit(jax.value_and_grad(loss_fn, argnums=argnums))
        lowered = grad_fn.lower(kernel, x, memory, jax.eval_shape(jax.random.key, 0))
        return lowered.compile().cost_analysis()["flops"]

    with_memory = (0, 1, 2) if rank else (0, 1)
    whole = step(with_memory) - flops.flops_left_out(config, rows, features, features)
    ours = flops.weight_gradient_flops(config, rows, features, features)
    assert ours == pytest.approx(whole - step(1), rel=0.1)
    relative = flops.relative_cost(config, rows, features, features)
    assert relative == pytest.approx(whole / (6 * rows * features**2), rel=0.03)
