"""Every way into the library under every transform of JAX and Flax.

Each cell is compared with the primitive: one device, one batch, a Python loop. The table in
examples/guides/transforms.md is what `python tests/test_matrix.py` prints.
"""

import dataclasses
import functools
import operator
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export as jax_export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mem_aop_jax as aop

BATCHES, ROWS, FEATURES, LAYERS = 4, 8, 5, 3  # as many batches as devices
CONFIG = aop.MemAOP(k=2)
OF_FOUR = aop.MemAOP(k=2 * BATCHES, groups=BATCHES)
RANK = 3
SLOTS = 2  # of each group
COLLECTION = aop.linen.COLLECTION
ROWS_SPEC, EVERYWHERE = PartitionSpec("data"), PartitionSpec()


class Model(NamedTuple):
    """A way into the library: `apply(params, memory, x)`, one layer or a stack of them.

    The leaves of params are bias and kernel, those of memory the three of `aop.Memory` or
    `aop.Subspace`.
    """

    params: chex.ArrayTree
    memory: chex.ArrayTree
    apply: Callable


# ---- the ways in; remat is None for one layer, else whether each layer of a stack is recomputed


def primitive(config, rows, remat=None):
    layers = () if remat is None else (LAYERS,)
    params = initial((*layers, FEATURES), (*layers, FEATURES, FEATURES))
    memory = aop.init_memory(config, rows, FEATURES, FEATURES)
    memory = jax.tree.map(lambda a: np.broadcast_to(a, (*layers, *a.shape)), memory)

    def layer(params, memory, x):
        bias, kernel = params
        key = jax.random.key(0) if config.needs_key else None
        y = aop.dense(x, kernel, memory, config=config, key=key)
        return jnp.tanh(y + bias.reshape((1,) * (y.ndim - 1) + (-1,)))

    def apply(params, memory, x):
        if remat is None:
            return layer(params, memory, x)
        body = jax.checkpoint(layer) if remat else layer
        return jax.lax.scan(lambda x, own: (body(*own, x), None), x, (params, memory))[0]

    return Model(params, memory, apply)


def approximated(config, rows, remat=None):
    """The same layers as plain JAX."""
    layers = () if remat is None else (LAYERS,)
    params = initial((*layers, FEATURES), (*layers, FEATURES, FEATURES))

    def layer(params, x):
        bias, kernel = params
        y = x @ kernel
        return jnp.tanh(y + bias.reshape((1,) * (y.ndim - 1) + (-1,)))

    def stack(params, x):
        body = jax.checkpoint(layer) if remat else layer
        return jax.lax.scan(lambda x, own: (body(own, x), None), x, params)[0]

    approx = aop.approximate(layer if remat is None else stack, config)
    memory = approx.init(params, np.zeros((rows, FEATURES), np.float32))
    key = jax.random.key(0) if config.needs_key else None
    return Model(params, memory, lambda params, memory, x: approx(params, memory, key, x))


def linen(dense, memory_is_carried, wrap, config, rows, remat=None):
    """One `nn.Dense` or such, or `nn.scan` over a stack of them."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return jnp.tanh(dense(config)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0} | ({COLLECTION: 0} if memory_is_carried else {})
            layer = nn.remat(Layer) if remat else Layer
            scan = nn.scan(layer, variable_axes=axes, split_rngs={"params": True}, length=LAYERS)
            return scan()(x, None)

    model = Layer() if remat is None else Stack()
    model = aop.linen.wrap(model, config) if wrap else model
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((rows, FEATURES), np.float32))

    rngs = {aop.linen.RNG: jax.random.key(0)} if config.needs_key else None

    def apply(params, memory, x):
        return model.apply({"params": params, COLLECTION: memory}, x, rngs=rngs)[0]

    return Model(variables["params"], variables[COLLECTION], apply)


def nnx_linear(config, rows, remat=None):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.dense = aop.nnx.Linear(FEATURES, FEATURES, rows=rows, config=config, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.dense(x))

    def forward(layer, x):
        return layer(x)

    model = Layer(nnx.Rngs(0))
    if remat is not None:
        model = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Layer))(nnx.Rngs(0))
        body = nnx.remat(forward) if remat else forward
        forward = nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    graph, params, memory, keys = nnx.split(model, nnx.Param, aop.nnx.Memory, ...)

    def apply(params, memory, x):
        fresh = jax.tree.map(jnp.copy, keys)  # a key is drawn from: one of this trace
        return forward(nnx.merge(graph, params, memory, fresh), x)

    return Model(params, memory, apply)


def weighted(key, scores, k):
    """Unbiased policies draw at random; what a cell compares is the same for this one."""
    del key
    return aop.Selection(jax.lax.top_k(scores, k)[1], jnp.full((k,), scores.size / k, scores.dtype))


MEMORIES = {  # what a way in has after its comma
    "subspace": lambda config: {"policy": weighted, "memory": "subspace", "rank": RANK},
    "rare refresh": lambda config: {
        "policy": weighted,
        "memory": "subspace",
        "rank": RANK,
        "refresh": 2,
    },
    "inputs": lambda config: {  # with all directions, what is drawn makes no difference
        "policy": weighted,
        "memory": "subspace",
        "rank": RANK,
        "input_grad": aop.InputGrad(0.5, rank=FEATURES),
    },
    "slots": lambda config: {"memory_slots": SLOTS * config.groups},
    "signed": lambda config: {"signed": True},
}


def with_memory(kind, make):
    """The same way in, with another memory than the paper's."""

    def make_with_memory(config, rows, remat=None):
        return make(dataclasses.replace(config, **MEMORIES[kind](config)), rows, remat)

    return make_with_memory


def product(config):
    return nn.Dense(
        FEATURES, dot_general_cls=functools.partial(aop.linen.DotGeneral, config=config)
    )


WAYS = {
    "`dense`": primitive,
    "`approximate`": approximated,
    "`linen.Dense`": functools.partial(
        linen, lambda config: aop.linen.Dense(FEATURES, config=config), True, False
    ),
    "`linen.wrap`": functools.partial(linen, lambda config: nn.Dense(FEATURES), False, True),
    "`linen.DotGeneral`": functools.partial(linen, product, True, False),
    "`nnx.Linear`": nnx_linear,
}
WAYS |= {
    f"{way}, {kind}": with_memory(kind, WAYS[way])
    for kind, ways in (
        ("subspace", ("`dense`", "`approximate`", "`linen.wrap`", "`nnx.Linear`")),
        ("rare refresh", ("`dense`",)),
        ("inputs", ("`dense`", "`approximate`", "`linen.wrap`", "`nnx.Linear`")),
        ("slots", ("`dense`", "`approximate`", "`linen.wrap`")),
        ("signed", ("`dense`",)),
    )
    for way in ways
}


def kind_of(way):
    return way.partition(", ")[2]


def has_subspace(way):
    return kind_of(way) in ("subspace", "rare refresh", "inputs")


# ---- what a cell is compared with


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def initial(*shapes):
    return tuple(numbers(*shape, seed=i) for i, shape in enumerate(shapes))


def like(tree, leaves):
    """The leaves in the structure of a model's parameters or memory."""
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(leaves))


def gradients(model):
    """A function of params, memory and x: the gradients of params, and the next memory."""

    def loss_fn(params, memory, x):
        x += jnp.mean(jax.tree.leaves(params)[0])  # so that the gradient of the inputs counts
        return jnp.sum(model.apply(params, memory, x) ** 2)

    return jax.grad(loss_fn, argnums=(0, 1))


@functools.cache
def model_of(way, config=CONFIG, rows=ROWS, remat=None):
    return WAYS[way](config, rows, remat)


def reference_of(way, config=CONFIG, rows=ROWS):
    """The primitive with the memory of this way in."""
    kind = kind_of(way)
    return model_of(f"`dense`, {kind}" if kind else "`dense`", config, rows)


@functools.cache
def reference_gradients(way, config=CONFIG, rows=ROWS):
    """Compiled once for all cells that are compared with it."""
    return jax.jit(gradients(reference_of(way, config, rows)))


class Inputs(NamedTuple):
    """Parameters, a memory that is not empty, and the inputs; as the primitive takes them."""

    params: chex.ArrayTree
    memory: aop.Memory | aop.Subspace
    x: chex.Array

    def for_model(self, model):
        return Inputs(like(model.params, self.params), like(model.memory, self.memory), self.x)


def inputs_of(way, config=CONFIG, rows=ROWS, layers=(), batches=()):
    """With `layers` parameters and memory are stacked; with `batches` memory and inputs."""
    params = initial((*layers, FEATURES), (*layers, FEATURES, FEATURES))
    if has_subspace(way):
        ranks = RANK, FEATURES if kind_of(way) == "inputs" else RANK
        sides = (
            np.linalg.qr(numbers(*batches, *layers, FEATURES, rank, seed=seed))[0]
            for seed, rank in zip((5, 6), ranks, strict=True)
        )
        memory = aop.Subspace(*sides, np.ones((*batches, *layers), np.float32))
    else:
        held = SLOTS * config.groups if kind_of(way) == "slots" else rows
        memory = aop.Memory(
            numbers(*batches, *layers, held, FEATURES, seed=5),
            numbers(*batches, *layers, held, FEATURES, seed=6),
            np.ones((*batches, *layers), np.float32),
        )
    return Inputs(params, memory, numbers(*batches, rows, FEATURES, seed=7))


def same(ours, wanted):
    """Equal leaves, to the precision of float32 sums."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def one_by_one(way, inputs):
    """The primitive's results for each of the batches, stacked."""
    results = []
    for i in range(BATCHES):
        memory, x = jax.tree.map(operator.itemgetter(i), (inputs.memory, inputs.x))
        results.append(reference_gradients(way)(inputs.params, memory, x))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *results)


def summed(grads):
    return jax.tree.map(lambda a: a.sum(axis=0), grads)


# ---- the cells of a column: a transform of the gradients, against the primitive's without


def jit(way):
    model, inputs = model_of(way), inputs_of(way)
    ours = jax.jit(gradients(model))(*inputs.for_model(model))
    same(ours, gradients(reference_of(way))(*inputs))  # which is not compiled


def grad(way):
    model, inputs = model_of(way), inputs_of(way)
    ours = gradients(model)(*inputs.for_model(model))
    same(ours, reference_gradients(way)(*inputs))


def vmap(way):
    model, inputs = model_of(way), inputs_of(way, batches=(BATCHES,))
    grad_fn = jax.jit(jax.vmap(gradients(model), in_axes=(None, 0, 0)))
    same(grad_fn(*inputs.for_model(model)), one_by_one(way, inputs))


def vmap_per_example(way):
    """Inside the loss: the examples' gradients are summed, and each has its own rows."""
    model, inputs = model_of(way), inputs_of(way, batches=(BATCHES,))
    per_example = model._replace(apply=jax.vmap(model.apply, in_axes=(None, 0, 0)))
    ours = jax.jit(gradients(per_example))(*inputs.for_model(model))
    grads, after = one_by_one(way, inputs)
    same(ours, (summed(grads), after))


def pmap(way):
    model, inputs = model_of(way), inputs_of(way, batches=(BATCHES,))

    @functools.partial(jax.pmap, axis_name="data", in_axes=(None, 0, 0))
    def step(params, memory, x):
        grads, memory = gradients(model)(params, memory, x)
        return jax.lax.psum(grads, "data"), memory

    grads, after = jax.tree.map(np.asarray, step(*inputs.for_model(model)))
    wanted, wanted_after = one_by_one(way, inputs)
    for device in range(BATCHES):
        same(jax.tree.map(operator.itemgetter(device), grads), summed(wanted))
    same(after, wanted_after)


def for_all_rows(way):
    """What one device computes with a group for each of four devices."""
    sizes = OF_FOUR, BATCHES * ROWS
    inputs = inputs_of(way, *sizes)
    return inputs, reference_gradients(way, *sizes)(*inputs)


def mesh_of(axis_type):
    return jax.make_mesh((BATCHES,), ("data",), axis_types=(axis_type,))


def specs_of(way):
    """Rows are each device's own, directions the same everywhere."""
    side = EVERYWHERE if has_subspace(way) else ROWS_SPEC
    return side, side, EVERYWHERE


def shard_map(way):
    model = model_of(way)
    inputs, wanted = for_all_rows(way)
    inputs = inputs.for_model(model)
    specs = like(inputs.memory, specs_of(way))
    sharded = jax.shard_map(
        gradients(model),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(EVERYWHERE, specs, ROWS_SPEC),
        out_specs=(EVERYWHERE, specs),
    )
    ours = jax.jit(sharded)(*inputs)
    if kind_of(way) == "signed":  # with one key, all devices draw the same signs
        ours, wanted = jax.tree.map(np.abs, (ours, wanted))
    same(ours, wanted)


def jit_over_a_mesh(axis_type, way):
    model = model_of(way, OF_FOUR, BATCHES * ROWS)
    inputs, wanted = for_all_rows(way)
    params, memory, x = inputs.for_model(model)
    rows, everywhere = (NamedSharding(mesh_of(axis_type), s) for s in (ROWS_SPEC, EVERYWHERE))
    shardings = [NamedSharding(rows.mesh, spec) for spec in specs_of(way)]
    memory = jax.device_put(memory, like(memory, shardings))
    params, x = jax.device_put(params, everywhere), jax.device_put(x, rows)
    ours = jax.jit(gradients(model))(params, memory, x)
    same(ours, wanted)
    for after, sharding in zip(jax.tree.leaves(ours[1]), shardings, strict=True):
        assert after.sharding.is_equivalent_to(sharding, after.ndim)


def descend(grad_fn, state, x):
    """A step of a scan over batches; the state is parameters and memory."""
    grads, memory = grad_fn(*state, x)
    return (jax.tree.map(lambda p, g: p - 0.01 * g, state[0], grads), memory), None


def scan_over_steps(way):
    model = model_of(way)
    params, memory, _ = inputs_of(way)
    batches = numbers(BATCHES, ROWS, FEATURES, seed=8)
    step = functools.partial(descend, gradients(model))
    state = like(model.params, params), like(model.memory, memory)
    ours, _ = jax.jit(functools.partial(jax.lax.scan, step))(state, batches)
    wanted = params, memory
    for x in batches:
        wanted, _ = jax.tree.map(np.asarray, descend(reference_gradients(way), wanted, x))
    same(ours, wanted)


@functools.cache
def unrolled_gradients(way):
    """Of a stack of the primitive's layers, one after the other."""
    layer = reference_of(way).apply

    def apply(params, memory, x):
        for i in range(LAYERS):
            x = layer(*jax.tree.map(operator.itemgetter(i), (params, memory)), x)
        return x

    return jax.jit(gradients(reference_of(way)._replace(apply=apply)))


def scan_over_layers(remat, way):
    model, inputs = model_of(way, remat=remat), inputs_of(way, layers=(LAYERS,))
    ours = jax.jit(gradients(model))(*inputs.for_model(model))
    same(ours, unrolled_gradients(way)(*inputs))


@functools.cache
def reference_cotangents(way):
    """The primitive's pulled back from one cotangent of its outputs."""
    apply = reference_of(way).apply

    @jax.jit
    def pull_back(params, memory, x, unit):
        return jax.vjp(lambda *args: apply(*args, x), params, memory)[1](unit)

    return pull_back


def jacrev(way):
    """For each entry of the output an approximate gradient, and a memory, of its own."""
    model, inputs = model_of(way), inputs_of(way)
    ours = jax.jit(jax.jacrev(model.apply, argnums=(0, 1)))(*inputs.for_model(model))
    shape = ROWS, FEATURES
    units = np.eye(ROWS * FEATURES, dtype=np.float32).reshape(-1, *shape)
    pulled = [jax.tree.leaves(reference_cotangents(way)(*inputs, unit)) for unit in units]
    stacked = [np.stack(leaves) for leaves in zip(*pulled, strict=True)]
    same(ours, [leaf.reshape(*shape, *leaf.shape[1:]) for leaf in stacked])


def remat(way):
    model, inputs = model_of(way), inputs_of(way)
    recomputed = model._replace(apply=jax.checkpoint(model.apply))
    ours = jax.jit(gradients(recomputed))(*inputs.for_model(model))
    same(ours, reference_gradients(way)(*inputs))


def export(way):
    """One program for three platforms, run on this one."""
    model, (params, memory, x) = model_of(way), inputs_of(way)

    def leaves_of_gradients(params, memory, x):
        inputs = Inputs(params, memory, x).for_model(model)
        return jax.tree.leaves(gradients(model)(*inputs))

    args = params, tuple(memory), x
    function = jax.jit(leaves_of_gradients)
    exported = jax_export.export(function, platforms=["cpu", "cuda", "tpu"])(*args)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    same(exported.call(*args), reference_gradients(way)(params, memory, x))


COLUMNS = {
    "`jit`": jit,
    "`grad`": grad,
    "`vmap`": vmap,
    "`vmap` per example": vmap_per_example,
    "`pmap`": pmap,
    "`shard_map`": shard_map,
    "`jit`, auto mesh": functools.partial(jit_over_a_mesh, AxisType.Auto),
    "`jit`, explicit mesh": functools.partial(jit_over_a_mesh, AxisType.Explicit),
    "`scan` over steps": scan_over_steps,
    "`nn.scan` over layers": functools.partial(scan_over_layers, False),
    "`remat`": remat,
    "`remat` in `scan`": functools.partial(scan_over_layers, True),
    "`jacrev`": jacrev,
    "export": export,
}


# Where a way in differs from the primitive; all other cells are slow tests.
SHARED = {  # several examples or devices: what a memory shares among them
    "`vmap`",
    "`vmap` per example",
    "`pmap`",
    "`shard_map`",
    "`jit`, auto mesh",
    "`jit`, explicit mesh",
    "`jacrev`",
    "export",
}
FLAX = {  # how Flax carries a memory through its own transforms and JAX's
    "`jit`",
    "`vmap` per example",
    "`jit`, explicit mesh",
    "`nn.scan` over layers",
    "`remat` in `scan`",
}
BY_DEFAULT = {
    "`dense`": set(COLUMNS),
    "`approximate`": set(COLUMNS),
    "`approximate`, subspace": {"`shard_map`", "`jit`, explicit mesh"},
    "`dense`, subspace": SHARED,
    "`dense`, inputs": {"`vmap`", "`shard_map`", "export"},
    "`dense`, slots": {"`vmap`", "`shard_map`", "export"},
    **dict.fromkeys(("`linen.Dense`", "`linen.wrap`", "`linen.DotGeneral`", "`nnx.Linear`"), FLAX),
    "`nnx.Linear`, subspace": {"`jit`", "`nn.scan` over layers"},
}


def cells():
    for way in WAYS:
        for column in COLUMNS:
            yield pytest.param(
                way,
                column,
                marks=[] if column in BY_DEFAULT.get(way, ()) else pytest.mark.slow,
                id=f"{way}-{column}".replace("`", ""),
            )


@pytest.mark.parametrize(("way", "column"), list(cells()))
@pytest.mark.usefixtures("standard_promotion")
def test_a_cell(way, column):
    COLUMNS[column](way)


@pytest.mark.parametrize("way", WAYS, ids=lambda name: name.replace("`", ""))
@pytest.mark.usefixtures("standard_promotion")
def test_forward_mode_is_an_error_that_says_so(way):
    model = model_of(way)
    params, memory, x = inputs_of(way).for_model(model)

    def output(params):
        return model.apply(params, memory, x)

    with pytest.raises(TypeError, match=r"can't apply forward-mode"):
        jax.jacfwd(output)(params)
    with pytest.raises(TypeError, match=r"can't apply forward-mode"):
        jax.jvp(output, (params,), (params,))


def table(mark):
    """Markdown."""
    lines = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    lines += [[way, *(mark(way, column) for column in COLUMNS)] for way in WAYS]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_guide_shows_the_table():
    """With a ✓ in every cell: one that fails is a failing test."""
    page = pathlib.Path(__file__).parents[1] / "examples" / "guides" / "transforms.md"
    assert table(lambda way, column: "✓") in page.read_text()


def run(way, column):
    try:
        COLUMNS[column](way)
    except Exception as error:
        return type(error).__name__
    return "✓"


if __name__ == "__main__":
    chex.set_n_cpu_devices(BATCHES)
    print(table(run))
