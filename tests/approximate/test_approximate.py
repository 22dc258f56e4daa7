"""aop.approximate: any function. At k = rows its gradients are the function's own."""

import functools
import zlib
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes

import mem_aop_jax as aop

ROWS, FEATURES, HIDDEN = 8, 6, 5
ALL_ROWS, CONFIG = aop.MemAOP(ratio=1.0), aop.MemAOP(k=2)
EVERYWHERE, DATA = PartitionSpec(), PartitionSpec("data")


def numbers(*shape, seed=0):
    rng = np.random.default_rng((seed, *shape))
    return jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)


X = numbers(ROWS, FEATURES)
PARAMS = {"hidden": numbers(FEATURES, HIDDEN), "out": numbers(HIDDEN, FEATURES)}
SQUARE = numbers(FEATURES, FEATURES)
EXPERTS = {"hidden": numbers(3, FEATURES, HIDDEN), "out": numbers(3, HIDDEN, FEATURES)}
IMAGES = numbers(2, 8, 8, 3)


def mlp(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def energy(params, x):
    return jnp.sum(mlp(params, x)[..., 0])


def tanh_layers(kernels, x):
    return jax.lax.scan(lambda h, kernel: (jnp.tanh(h @ kernel), None), x, kernels)[0]


def rnn(params, xs):
    def step(h, x):
        h = jnp.tanh(h @ params["recurrent"] + x @ params["hidden"])
        return h, h

    return jax.lax.scan(step, jnp.zeros((ROWS, HIDDEN), xs.dtype), xs)


@jax.custom_vjp
def own_rule(kernel, x):
    return x @ kernel


own_rule.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))


@jax.custom_jvp
def own_tangent(kernel, x):
    return x @ kernel


own_tangent.defjvps(lambda t, y, w, x: x @ t, lambda t, y, w, x: t @ w)


def mesh(**axes):
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


def on_devices(fun, check_vma, params=EVERYWHERE):
    def sharded(*args):
        return jax.shard_map(
            fun,
            mesh=mesh(data=4),
            in_specs=(params, DATA),
            out_specs=DATA,
            check_vma=check_vma,
        )(*args)

    return sharded


def tensor_parallel(params, x):
    def device(params, x):
        return jax.lax.psum(mlp(params, x), "model")

    specs = {"hidden": PartitionSpec(None, "model"), "out": PartitionSpec("model")}
    return jax.shard_map(
        device, mesh=mesh(data=2, model=2), in_specs=(specs, DATA), out_specs=DATA
    )(params, x)


def over_the_mesh(x):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh(data=4), DATA))


def with_callback(params, x):
    jax.debug.callback(lambda _: None, x.sum())
    return mlp(params, x)


def in_float64(kernel, x):
    has_it = jax.__version_info__ >= (0, 8)
    with jax.enable_x64(True) if has_it else jax.experimental.enable_x64():
        return (x.astype(jnp.float64) @ kernel.astype(jnp.float64)).astype(jnp.float32)


def with_ref(params, x):
    ref = jax.new_ref(params["w"])
    ref[...] += x.T @ x
    return mlp(params, x @ ref[...])


def convolution(stride, padding="VALID", layout=("NHWC", "HWIO", "NHWC"), **options):
    return functools.partial(
        _convolution, (stride, stride), padding, dimension_numbers=layout, **options
    )


def _convolution(strides, padding, kernel, x, **options):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


A_BRANCH = {"a": numbers(FEATURES, 4), "b": numbers(FEATURES, 4, seed=1)}
TP = {"hidden": numbers(FEATURES, 8), "out": numbers(8, FEATURES)}
# name: function, parameters, further arguments; the first dimensions of its memories by site
REACHED = {
    "two layers": (mlp, PARAMS, X, {"hidden": (), "out": ()}),
    "jit, twice": (
        lambda p, x: jax.jit(mlp)(p, x) + jax.jit(mlp)(p, 2 * x),
        PARAMS,
        X,
        {"hidden": (), "out": (), "hidden#1": (), "out#1": ()},
    ),
    "remat": (lambda p, x: jax.checkpoint(mlp)(p, x), PARAMS, X, {"hidden": (), "out": ()}),
    "scan": (tanh_layers, numbers(3, FEATURES, FEATURES), X, {"params": (3,)}),
    "scan of remat of scan": (
        lambda p, x: jax.lax.scan(
            jax.checkpoint(lambda h, kernels: (tanh_layers(kernels, h), None)), x, p
        )[0],
        numbers(2, 3, FEATURES, FEATURES),
        X,
        {"params": (2, 3)},
    ),
    "recurrent": (
        rnn,
        {"recurrent": numbers(HIDDEN, HIDDEN), "hidden": PARAMS["hidden"]},
        numbers(7, ROWS, FEATURES),
        {"recurrent": (7,), "hidden": (7,)},
    ),
    "fori_loop": (
        lambda p, x: jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p), x),
        SQUARE,
        X,
        {"params": (3,)},
    ),
    "vmap": (lambda p, x: jax.vmap(lambda x: mlp(p, x))(x), PARAMS, X, {"hidden": (), "out": ()}),
    "ensemble": (
        jax.vmap(mlp, in_axes=(0, None)),
        EXPERTS,
        X,
        {"hidden": (), "out": (3,)},
    ),
    "experts": (jax.vmap(mlp), EXPERTS, numbers(3, ROWS, FEATURES), {"hidden": (3,), "out": (3,)}),
    "two batch dimensions": (
        lambda p, x: jnp.einsum("xeyo,byxe->xebo", p, x),
        numbers(2, 3, 4, HIDDEN),
        numbers(ROWS, 4, 2, 3),
        {"params": (2, 3)},
    ),
    "kernel on the left": (
        lambda p, x: jnp.einsum("eoi,ebi->eob", p, x),
        numbers(3, 4, FEATURES),
        numbers(3, ROWS, FEATURES),
        {"params": (3,)},
    ),
    "score": (lambda p, x: jax.grad(energy, 1)(p, x), PARAMS, X, {"hidden": (), "hidden#1": ()}),
    "gradient penalty": (
        lambda p, x: energy(p, x) + jnp.sum(jax.grad(energy, 1)(p, x) ** 2),
        PARAMS,
        X,
        None,
    ),
    "laplacian": (
        lambda p, x: jax.vmap(lambda x: jnp.trace(jax.hessian(energy, 1)(p, x)))(x),
        PARAMS,
        X,
        None,
    ),
    "tangent": (lambda p, x: jax.jvp(functools.partial(mlp, p), (x,), (x,))[1], PARAMS, X, None),
    "low rank": (
        lambda p, x: x @ (p["kernel"] + 2 * p["a"] @ p["b"]),
        {"kernel": SQUARE, "a": numbers(FEATURES, 2), "b": numbers(2, FEATURES)},
        X,
        {"kernel": ()},
    ),
    "weight norm": (
        lambda p, x: x @ (p["kernel"] / jnp.linalg.norm(p["kernel"], axis=0) * p["scale"][None]),
        {"kernel": SQUARE, "scale": numbers(FEATURES)},
        X,
        {"kernel": ()},
    ),
    "cast": (
        lambda p, x: x @ jax.jit(lambda p: p["k"].astype(jnp.bfloat16))(p).astype(jnp.float32),
        {"k": SQUARE},
        X,
        {"k": ()},
    ),
    "tied embedding": (
        lambda p, t: jnp.take(p, t, axis=0) @ p.T,
        numbers(11, FEATURES),
        jnp.arange(ROWS),
        {"params": ()},
    ),
    "frozen beside": (
        lambda p, x: (x @ jax.lax.stop_gradient(p["a"])) @ p["b"],
        {"a": SQUARE, "b": numbers(FEATURES, 4)},
        X,
        {"b": ()},
    ),
    "patches": (convolution(4), numbers(4, 4, 3, 5), IMAGES, {"params": ()}),
    "patches, padded": (convolution(3, "SAME"), numbers(3, 3, 3, 5), IMAGES, {"params": ()}),
    "patches, channels first": (
        convolution(2, [(-1, 1), (2, 0)], ("NCHW", "OIHW", "NCHW")),
        numbers(5, 3, 2, 2),
        numbers(2, 3, 8, 8),
        {"params": ()},
    ),
    "windows of one, strided": (convolution(2), numbers(1, 1, 3, 5), IMAGES, {"params": ()}),
    "gaps between windows": (convolution(3), numbers(2, 2, 3, 5), IMAGES, {"params": ()}),
    "one window": (convolution(1), numbers(8, 8, 3, 5), IMAGES, {"params": ()}),
    "callback": (with_callback, PARAMS, X, {"hidden": (), "out": ()}),
    "shard_map": (on_devices(mlp, True), PARAMS, X, {"hidden": (4,), "out": (4,)}),
    "shard_map, untyped": (on_devices(mlp, False), PARAMS, X, {"hidden": (4,), "out": (4,)}),
    "scan in shard_map": (
        on_devices(tanh_layers, True),
        numbers(3, FEATURES, FEATURES),
        X,
        {"params": (4, 3)},
    ),
    "no features": (
        lambda p, x: mlp(p, x) + x[:, :0] @ p["none"],
        PARAMS | {"none": jnp.zeros((0, FEATURES), jnp.float32)},
        X,
        None,
    ),
    "tensor parallel": (tensor_parallel, TP, X, {"hidden": (2, 2), "out": (2, 2)}),
    "sharding constraint": (
        lambda p, x: mlp(p, over_the_mesh(x)),
        PARAMS,
        X,
        {"hidden": (), "out": ()},
    ),
}
SLOW = "scan of remat of scan", "fori_loop", "vmap", "gaps between windows", "one window", "tangent"


def squares(result):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(result))


def check_exact(fun, params, *args, **kwargs):
    """At k = rows, for two steps; returns the next memory."""
    approx = aop.approximate(fun, ALL_ROWS)
    memory = approx.init(params, *args, **kwargs)

    def loss(params, memory):
        result = approx(params, memory, None, *args, **kwargs)
        return squares(result), result

    def own_loss(params):
        result = fun(params, *args, **kwargs)
        return squares(result), result

    step = jax.jit(lambda memory: jax.grad(loss, (0, 1), has_aux=True)(params, memory))
    exact = jax.jit(jax.grad(own_loss, has_aux=True))(params)
    for _ in range(2):
        before = memory
        (grads, memory), result = step(memory)
        chex.assert_trees_all_close((grads, result), exact, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_equal_shapes_and_dtypes(memory, before)
    for own in memory.values():
        assert not np.any(own.inputs)
    return memory


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in REACHED]
)
@pytest.mark.usefixtures("standard_promotion")
def test_it_is_reached_and_exact_with_all_rows(name):
    fun, params, x, stacks = REACHED[name]
    memory = check_exact(fun, params, x)
    assert all(np.all(own.uses == 1) for own in memory.values())
    if stacks is not None:
        assert {site: own.uses.shape for site, own in memory.items()} == stacks
    reach = aop.approximate(fun, ALL_ROWS).reach(params, x)
    assert reach.share == 1
    assert {site.path for site in reach.sites if site.flops} == set(memory)


@pytest.mark.usefixtures("standard_promotion", "without_x64")
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")  # of the derivative
def test_a_function_that_switches_to_doubles():
    assert check_exact(in_float64, SQUARE, X)["params"].inputs.shape == (ROWS, FEATURES)


@pytest.mark.usefixtures("standard_promotion")
def test_what_a_reference_holds_is_no_kernel():
    """Its first value may be one: the steps after it need not."""
    assert set(check_exact(with_ref, PARAMS | {"w": SQUARE}, X)) == {"hidden", "out"}


EXPLICIT = {  # name: function, kernel and input with axes of their dimensions, why it is exact
    "experts": (
        lambda p, x: jnp.einsum("ebi,eio->ebo", x, p),
        (numbers(4, FEATURES, HIDDEN), ("data",)),
        (numbers(4, ROWS, FEATURES), ("data",)),
        None,
    ),
    "shard_map": (
        lambda p, x: jax.shard_map(jnp.matmul, in_specs=(DATA, EVERYWHERE), out_specs=DATA)(x, p),
        (SQUARE, ()),
        (X, ("data",)),
        None,
    ),
    "auto_axes": (
        lambda p, x: auto_axes(jnp.matmul, out_sharding=DATA)(x, p),
        (SQUARE, ()),
        (X, ("data",)),
        "inside auto_axes",
    ),
}


@pytest.mark.parametrize("name", EXPLICIT)
@pytest.mark.usefixtures("standard_promotion")
def test_on_a_mesh_whose_axes_the_types_tell(name):
    fun, *arrays, why_exact = EXPLICIT[name]
    explicit = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        kernel, x = (jax.device_put(a, PartitionSpec(*axes)) for a, axes in arrays)
        check_exact(fun, kernel, x)
        (site,) = aop.approximate(fun, ALL_ROWS).reach(kernel, x).sites
        assert site.why_exact == why_exact


NOT_REACHED = {
    "while": (
        lambda p, x: (
            mlp(p, x)
            + jax.lax.stop_gradient(
                jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ p["w"]), (0, x))
            )[1]
        ),
        "inside while",
    ),
    "custom_vjp": (lambda p, x: mlp(p, own_rule(p["w"], x)), "inside custom_vjp_call"),
    "custom_jvp": (lambda p, x: mlp(p, own_tangent(p["w"], x)), "inside custom_jvp_call"),
    "ragged_dot": (
        lambda p, x: mlp(p, jax.lax.ragged_dot(x, p["w"][None], jnp.array([ROWS], jnp.int32))),
        "groups of rows of unknown sizes",
    ),
}


@pytest.mark.parametrize("name", NOT_REACHED)
@pytest.mark.usefixtures("standard_promotion")
def test_what_is_not_reached_is_exact_and_says_why(name):
    fun, reason = NOT_REACHED[name]
    params = PARAMS | {"w": SQUARE}
    assert set(check_exact(fun, params, X)) == {"hidden", "out"}
    reach = aop.approximate(fun, ALL_ROWS).reach(params, X)
    reasons = {site.path: site.why_exact for site in reach.sites}
    assert reasons == {"w": reason, "hidden": None, "out": None}
    both = 2 * ROWS * FEATURES * HIDDEN * 2
    assert reach.share == pytest.approx(both / (both + 2 * ROWS * FEATURES**2))
    assert f"no: {reason}" in str(reach)


@pytest.mark.parametrize(
    ("fun", "kernel"),
    [
        (convolution(1, "SAME"), numbers(3, 3, 3, 5)),
        (convolution(2, feature_group_count=3), numbers(2, 2, 1, 6)),
        (convolution(2, [(0, 0), (0, 0)], lhs_dilation=(2, 2)), numbers(2, 2, 3, 5)),
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_other_convolutions_are_not_reached(fun, kernel):
    reach = aop.approximate(fun, ALL_ROWS).reach(kernel, IMAGES)
    assert [site.why_exact for site in reach.sites] == ["a convolution whose windows overlap"]
    assert reach.share == 0
    check_exact(fun, kernel, IMAGES)


@pytest.mark.usefixtures("standard_promotion")
def test_a_branch_that_is_not_taken_keeps_its_memory():
    def fun(params, x):
        branches = lambda x: x @ params["a"], lambda x: 2 * x @ params["b"], lambda x: x[:, :4]
        return jax.lax.switch(jnp.argmax(x[0, :3]), branches, x)

    approx = aop.approximate(fun, CONFIG)
    memory = approx.init(A_BRANCH, X)
    tx = aop.mem_aop_sgd(0.1, memory)
    state = tx.init(A_BRANCH)
    step = jax.jit(jax.grad(lambda p, m, x: squares(approx(p, m, None, x)), argnums=(0, 1)))
    for branch, others in (("a", "b"), ("b", "a"), ("a", "b")):
        x = X.at[0, :3].set(0).at[0, "ab".index(branch)].set(1)
        before = aop.get_memory(state)
        grads, after = step(A_BRANCH, before, x)
        assert not np.any(grads[others])
        _, state = tx.update(grads, state, A_BRANCH, memory=after)
        kept = aop.get_memory(state)
        chex.assert_trees_all_equal(kept[others][:2], before[others][:2])
        assert np.any(kept[branch].inputs != before[branch].inputs)


@pytest.mark.parametrize("policy", ["topk", "randk", "priority"])
@pytest.mark.usefixtures("standard_promotion")
def test_steps_are_those_of_dense(policy):
    """With the keys that the sites get."""
    config = aop.MemAOP(k=2, policy=policy)
    names = "hidden", "out"
    approx = aop.approximate(mlp, config)
    memory = approx.init(PARAMS, X)

    def by_hand(params, memory, keys, x):
        dense = functools.partial(aop.dense, config=config)
        h = jnp.tanh(dense(x, params["hidden"], memory.get("hidden"), key=keys["hidden"]))
        return dense(h, params["out"], memory.get("out"), key=keys["out"])

    @jax.jit
    def both(ours, theirs, key, x):
        keys = {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in names}
        return (
            jax.grad(lambda p, m: squares(approx(p, m, key, x)), (0, 1))(PARAMS, ours),
            jax.grad(lambda p, m: squares(by_hand(p, m, keys, x)), (0, 1))(PARAMS, theirs),
        )

    ours = theirs = memory
    for i in range(3):
        (grads, ours), (expected, theirs) = both(
            ours, theirs, jax.random.key(i), numbers(ROWS, FEATURES, seed=i)
        )
        chex.assert_trees_all_close((grads, ours), (expected, theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_devices_iterations_and_experts_draw_rows_of_their_own():
    """Each for the same kernel and the same rows: their gradients would be equal."""
    config = aop.MemAOP(k=2, policy="uniform")
    stacked = jnp.stack([SQUARE] * 4)

    def scanned(kernels, x):
        return jax.lax.scan(lambda total, kernel: (total + x @ kernel, None), x, kernels)[0]

    def experts(kernels, x):
        return jnp.einsum("ebi,eio->ebo", jnp.stack([x] * 4), kernels)

    def devices(kernels, x):
        def device(kernel, x):
            return (x @ kernel[0])[None]

        return jax.shard_map(
            device, mesh=mesh(data=4), in_specs=(DATA, EVERYWHERE), out_specs=DATA
        )(kernels, x)

    for fun in (scanned, experts, devices):
        approx = aop.approximate(lambda p, x, fun=fun: jnp.sum(fun(p, x)), config)
        gradient = jax.jit(jax.grad(approx))(stacked, {}, jax.random.key(0), X)
        norms = {float(jnp.linalg.norm(g)) for g in gradient}
        assert len(norms) > 1, fun.__name__


# ---- arguments and results


@pytest.mark.usefixtures("standard_promotion")
def test_static_arguments_and_any_results():
    def fun(params, x, times=1, act="tanh", *, scale=None):
        for _ in range(times):
            x = getattr(jnp, act)(x @ params)
        x = x if scale is None else x * scale
        return {"x": x, "act": act, "aux": (jnp.arange(3), None, 4)}

    approx = aop.approximate(fun, ALL_ROWS)
    memory = approx.init(SQUARE, X, 2, act="sin", scale=X)
    assert list(memory) == ["params", "params#1"]
    ours = approx(SQUARE, memory, None, X, 2, act="sin", scale=X)
    expected = fun(SQUARE, X, 2, act="sin", scale=X)
    assert ours["act"] == "sin"
    assert ours["aux"][1:] == (None, 4)
    np.testing.assert_allclose(ours["x"], expected["x"], rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_arguments_with_any_name_and_types_among_them():
    def fun(weights, x, dtype, memory, *, params, key):
        return (x.astype(dtype) @ weights) * memory * params * key

    approx = aop.approximate(fun, ALL_ROWS)
    args, kwargs = (X, np.str_("float32")), {"memory": 2, "params": 3.0, "key": jnp.ones(())}
    memory = approx.init(SQUARE, *args, **kwargs)
    assert len(approx.layers(SQUARE, *args, **kwargs)) == 1
    assert approx.reach(SQUARE, *args, **kwargs).share == 1
    with jax.checking_leaks():
        y = jax.jit(lambda m: approx(SQUARE, m, None, *args, **kwargs))(memory)
    np.testing.assert_allclose(y, fun(SQUARE, *args, **kwargs), rtol=1e-4)


def test_evaluation_is_exported_for_any_number_of_rows():
    approx = aop.approximate(mlp, aop.MemAOP(k=4))
    (rows,) = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, FEATURES), jnp.float32)
    exported = jax.export.export(jax.jit(lambda p, x: approx(p, None, None, x)))(PARAMS, x)
    np.testing.assert_allclose(exported.call(PARAMS, X[:3]), mlp(PARAMS, X[:3]), rtol=1e-5)


def test_nothing_is_computed_by_init():
    features = 10**6
    shapes = jax.ShapeDtypeStruct((features, features), jnp.float32), X[:, :1]
    approx = aop.approximate(lambda w, x: jnp.broadcast_to(x, (ROWS, features)) @ w, CONFIG)
    (layer,) = approx.layers(*shapes)
    assert layer == ("params", ROWS, features, features, 2)
    memory = jax.eval_shape(lambda: approx.init(*shapes))
    assert memory["params"].inputs.shape == (ROWS, features)


@pytest.mark.usefixtures("standard_promotion")
def test_evaluation_is_exact_at_any_batch_size_and_training_needs_the_memory():
    approx = aop.approximate(mlp, aop.MemAOP(k=4))
    memory = approx.init(PARAMS, X)
    for rows in (ROWS, 3):
        y = approx(PARAMS, None, None, X[:rows])
        np.testing.assert_allclose(y, mlp(PARAMS, X[:rows]), rtol=1e-5)
    with pytest.raises(ValueError, match=r"(hidden|out): differentiated .* without its memory"):
        jax.grad(lambda p: squares(approx(p, None, None, X)))(PARAMS)
    with pytest.raises(ValueError, match=r"hidden: memory.inputs has .* 3 rows"):
        approx(PARAMS, memory, None, X[:3])
    for no_memory in (memory["out"], [memory["out"]], X, jax.random.key(0)):
        with pytest.raises(TypeError, match=r"memory is of type \w+; it must be what init returns"):
            approx(PARAMS, no_memory, None, X)
    for no_key in (X, 0):  # as if there were no key
        with pytest.raises(
            TypeError, match=r"key is (float32\[8, 6\]|int); it must be a key of jax"
        ):
            approx(PARAMS, memory, no_key, X)
    xs, params = numbers(7, ROWS, FEATURES), {"recurrent": numbers(HIDDEN, HIDDEN), **PARAMS}
    recurrent = aop.approximate(rnn, CONFIG)
    with pytest.raises(ValueError, match=r"recurrent: its memory is for \(7,\) .* they are \(5,\)"):
        recurrent(params, recurrent.init(params, xs), None, xs[:5])
    random = aop.approximate(mlp, aop.MemAOP(k=4, policy="randk"))
    with pytest.raises(ValueError, match=r"(hidden|out): policy 'randk' .* got no key"):
        jax.grad(lambda p: squares(random(p, memory, None, X)))(PARAMS)


# ---- rules and names


def test_rules_are_on_the_whole_path_of_a_parameter():
    params = {"layers": [{"w": SQUARE}, {"w": SQUARE}], "head": SQUARE}

    def fun(params, x):
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer["w"])
        return x @ params["head"]

    paths = {
        (r"layers/.*", CONFIG): ["layers/0/w", "layers/1/w"],
        (r".*/1/w", CONFIG): ["layers/1/w"],
        (r"head", CONFIG): ["head"],
    }
    for rule, reached in paths.items():
        approx = aop.approximate(fun, [rule, (".*", None)])
        assert [layer.path for layer in approx.layers(params, X)] == reached
        assert list(approx.init(params, X)) == reached
    reach = aop.approximate(fun, [("head", None), (".*", CONFIG)]).reach(params, X)
    assert [site.why_exact for site in reach.sites] == [None, None, "a rule"]
    assert reach.share == pytest.approx(2 / 3)
    few = aop.approximate(fun, [("head", aop.MemAOP(k=ROWS + 1)), (".*", aop.MemAOP(ratio=0.5))])
    assert few.reach(params, X).sites[-1].why_exact == "k=9 is more than its rows"


class Quantity(NamedTuple):
    value: jax.Array
    unit: str = "m"


def test_boxes_of_flax_are_no_part_of_a_path_and_fields_of_others_are():
    tree = {
        "a": nn.Partitioned(SQUARE, ("x", None)),
        "b": nnx.Param({"w": SQUARE}),
        "c": Quantity(SQUARE),
    }

    def fun(params, x):
        kernels = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
        return sum(x @ kernel for kernel in kernels)

    assert list(aop.approximate(fun, CONFIG).init(tree, X)) == ["a", "b/w", "c/value"]


def test_a_second_use_of_a_parameter_has_a_name_of_its_own():
    def fun(params, x):
        return jnp.tanh(x @ params["w"]) @ params["w"]

    both = {"w": SQUARE, "w#1": SQUARE}  # a name that is another parameter's is left out
    sites = aop.approximate(lambda p, x: fun(p, x) @ p["w#1"], CONFIG).init(both, X)
    assert list(sites) == ["w", "w#2", "w#1"]
    rules = [("w#1", None), ("w", CONFIG)]
    assert [layer.path for layer in aop.approximate(fun, rules).layers({"w": SQUARE}, X)] == ["w"]


def test_names_stay_when_other_parts_of_a_model_are_edited():
    def edited(params, x):
        x = jnp.tanh(x @ params["new"]) @ params["new"].T
        return mlp(params, x) @ params["another"]

    more = PARAMS | {"another": SQUARE, "new": SQUARE}
    before, after = (
        aop.approximate(fun, CONFIG).init(params, X)
        for fun, params in ((mlp, PARAMS), (edited, more))
    )
    assert before.keys() == after.keys() - {"new", "new#1", "another"}


@pytest.mark.parametrize(
    ("fun", "rules", "error", "message"),
    [
        ("mlp", CONFIG, TypeError, "approximate: fun is of type str"),
        (mlp, "topk", TypeError, "approximate: got 'topk'"),
        (mlp, [("(", CONFIG)], ValueError, r"the pattern '\(' is no regular expression"),
        (mlp, [("hid", CONFIG)], ValueError, "'hid' matches no .*: 'hidden', 'out'"),
        (lambda p, x: mlp(p, X), CONFIG, ValueError, "pass the batch as an argument"),
    ],
)
def test_what_cannot_be_meant(fun, rules, error, message):
    with pytest.raises(error, match=message):
        aop.approximate(fun, rules).init(PARAMS, X)


# ---- under transforms, beside Optax


@pytest.mark.usefixtures("standard_promotion")
def test_one_compilation_in_many_steps_with_a_memory_in_the_optimizer():
    config = aop.MemAOP(k=2, policy="priority", memory="subspace", rank=2)
    approx = aop.approximate(lambda p, x, y: jnp.mean((mlp(p, x) - y) ** 2), config)
    memory = approx.init(PARAMS, X, X)
    tx = optax.chain(aop.carry_memory(memory), optax.adam(3e-2))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(params, state, key):
        loss, (grads, memory) = jax.value_and_grad(approx, argnums=(0, 1))(
            params, aop.get_memory(state), key, X, X
        )
        updates, state = tx.update(grads, state, params, memory=memory)
        return optax.apply_updates(params, updates), state, loss

    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    losses = []
    for i in range(50):
        params, state, loss = step(params, state, jax.random.key(i))
        losses.append(loss)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.usefixtures("standard_promotion")
def test_a_train_state_of_flax_overwrites_the_memory():
    approx = aop.approximate(mlp, CONFIG)
    collection = aop.linen.COLLECTION
    variables = {"params": PARAMS, collection: approx.init(PARAMS, X)}
    state = TrainState.create(apply_fn=approx, params=variables, tx=optax.sgd(0.1))

    @jax.jit
    def both(params, memory):
        def loss(variables):
            return squares(state.apply_fn(variables["params"], variables[collection], None, X))

        given = state.replace(params={"params": params, collection: memory})
        ours = given.apply_gradients(grads=jax.grad(loss)(given.params)).params
        by_hand = jax.grad(lambda p, m: squares(approx(p, m, None, X)), (0, 1))(params, memory)
        return ours, jax.tree.map(lambda p, g: p - 0.1 * g, params, by_hand[0]), by_hand[1]

    for _ in range(2):
        variables, params, memory = both(variables["params"], variables[collection])
        chex.assert_trees_all_close(variables, {"params": params, collection: memory}, rtol=1e-5)


@pytest.mark.parametrize("memory", ["rows", "subspace"])
@pytest.mark.usefixtures("standard_promotion")
def test_a_donated_state_of_a_scan_holds_its_memories_once(memory):
    options = {} if memory == "rows" else {"policy": "priority", "rank": 16}
    approx = aop.approximate(
        lambda p, x: squares(tanh_layers(p, x)), aop.MemAOP(ratio=0.25, memory=memory, **options)
    )
    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 128, 128), (256, 128)))
    params, x = shapes
    memories = jax.eval_shape(lambda: approx.init(params, x))
    tx = optax.chain(aop.carry_memory(memories), optax.adam(1e-3))

    def step(params, state, key, x):
        grads, memory = jax.grad(approx, argnums=(0, 1))(params, aop.get_memory(state), key, x)
        updates, state = tx.update(grads, state, params, memory=memory)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    step = jax.jit(step, donate_argnums=(0, 1))
    compiled = step.lower(params, state, jax.random.key(0), x).compile()
    donated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state)))
    assert compiled.memory_analysis().alias_size_in_bytes >= donated


@pytest.mark.usefixtures("standard_promotion")
def test_inside_of_other_transforms():
    """vmap over memories and batches, a scan over steps, remat: as one after the other."""
    approx = aop.approximate(mlp, CONFIG)
    batches = numbers(3, ROWS, FEATURES)
    memory = approx.init(PARAMS, X)
    grad = jax.grad(lambda p, m, x: squares(approx(p, m, None, x)), argnums=(0, 1))

    @jax.jit
    def transformed(batches):
        stacked = jax.tree.map(lambda a: jnp.stack([a] * 3), memory)
        mapped = jax.vmap(grad, in_axes=(None, 0, 0))(PARAMS, stacked, batches)
        scanned = jax.lax.scan(lambda m, x: grad(PARAMS, m, x)[::-1], memory, batches)
        remat = jax.grad(
            lambda p, m, x: squares(jax.checkpoint(approx)(p, m, None, x)), argnums=(0, 1)
        )
        return mapped, scanned, remat(PARAMS, memory, batches[0])

    mapped, (after, grads), remat = transformed(batches)
    step, carried = jax.jit(grad), memory
    for i, x in enumerate(batches):
        alone = step(PARAMS, memory, x)
        chex.assert_trees_all_close(
            jax.tree.map(lambda a, i=i: a[i], mapped), alone, rtol=1e-5, atol=1e-6
        )
        own_grads, carried = step(PARAMS, carried, x)
        chex.assert_trees_all_close(
            jax.tree.map(lambda a, i=i: a[i], grads), own_grads, rtol=1e-5, atol=1e-6
        )
        if i == 0:
            chex.assert_trees_all_close(remat, alone, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(after, carried, rtol=1e-5, atol=1e-6)
