"""Every way into the library under every transform of JAX and Flax.

Each cell is compared with the primitive: one device, one batch, a Python loop. The table in
README.md is what `python tests/test_matrix.py` prints.
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
    memory = jax.tree.map(lambda a: jnp.broadcast_to(a, (*layers, *a.shape)), memory)

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
    variables = model.init(jax.random.key(0), jnp.zeros((rows, FEATURES), jnp.float32))

    rngs = {aop.linen.RNG: jax.random.key(0)} if config.needs_key else None

    def apply(params, memory, x):
        return model.apply({"params": params, COLLECTION: memory}, x, rngs=rngs)[0]

    return Model(variables["params"], variables[COLLECTION], apply)


def of_nnx(config, rows, remat=None):
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
    "`linen.Dense`": functools.partial(
        linen, lambda config: aop.linen.Dense(FEATURES, config=config), True, False
    ),
    "`linen.wrap`": functools.partial(linen, lambda config: nn.Dense(FEATURES), False, True),
    "`linen.DotGeneral`": functools.partial(linen, product, True, False),
    "`nnx.Linear`": of_nnx,
}
WAYS |= {
    f"{way}, {kind}": with_memory(kind, WAYS[way])
    for kind, ways in (
        ("subspace", ("`dense`", "`linen.wrap`", "`nnx.Linear`")),
        ("rare refresh", ("`dense`",)),
        ("inputs", ("`dense`", "`linen.wrap`", "`nnx.Linear`")),
        ("slots", ("`dense`", "`linen.wrap`")),
        ("signed", ("`dense`",)),
    )
    for way in ways
}


def kind_of(way):
    return way.partition(", ")[2]


def has_subspace(way):
    return kind_of(way) in ("subspace", "rare refresh", "inputs")


def reference_of(way):
    return with_memory(kind_of(way), primitive) if kind_of(way) else primitive


# ---- what a cell is compared with


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def initial(*shapes):
    return tuple(numbers(*shape, seed=i) for i, shape in enumerate(shapes))


def like(tree, leaves):
    """The leaves in the structure of a model's parameters or memory."""
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(leaves))


def gradients(model):
    def loss_fn(params, memory, x):
        x += jnp.mean(jax.tree.leaves(params)[0])  # so that the gradient of the inputs counts
        return jnp.sum(model.apply(params, memory, x) ** 2)

    return jax.grad(loss_fn, argnums=(0, 1))


def setup(way, config=CONFIG, rows=ROWS, remat=None, batches=None):
    """A model, the primitive, its parameters, a memory that is not empty, and the inputs.

    With `batches`, memory and inputs are stacked.
    """
    model, reference = (make(config, rows, remat) for make in (WAYS[way], reference_of(way)))
    before = () if batches is None else (batches,)
    layers = () if remat is None else (LAYERS,)
    if has_subspace(way):
        ranks = RANK, FEATURES if kind_of(way) == "inputs" else RANK
        sides = (
            jnp.linalg.qr(numbers(*before, *layers, FEATURES, rank, seed=seed))[0]
            for seed, rank in zip((5, 6), ranks, strict=True)
        )
        memory = aop.Subspace(*sides, jnp.ones((*before, *layers), jnp.float32))
    else:
        held = SLOTS * config.groups if kind_of(way) == "slots" else rows
        memory = aop.Memory(
            numbers(*before, *layers, held, FEATURES, seed=5),
            numbers(*before, *layers, held, FEATURES, seed=6),
            jnp.ones((*before, *layers), jnp.float32),
        )
    return model, reference, reference.params, memory, numbers(*before, rows, FEATURES, seed=7)


def same(ours, wanted):
    """Equal leaves, to the precision of float32 sums."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def one_by_one(function, *stacked):
    """The results for each of the batches, stacked."""
    results = [
        function(*(jax.tree.map(operator.itemgetter(i), s) for s in stacked))
        for i in range(BATCHES)
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def alone(transform):
    """A cell: the gradients under a transform, against the primitive's without."""

    def cell(way):
        model, reference, params, memory, x = setup(way)
        ours = transform(gradients(model))(
            like(model.params, params), like(model.memory, memory), x
        )
        same(ours, gradients(reference)(params, memory, x))

    return cell


def vmap(way):
    model, reference, params, memory, x = setup(way, batches=BATCHES)
    grad_fn = jax.vmap(gradients(model), in_axes=(None, 0, 0))
    ours = grad_fn(like(model.params, params), like(model.memory, memory), x)
    same(ours, one_by_one(functools.partial(gradients(reference), params), memory, x))


def vmap_per_example(way):
    """Inside the loss: the examples' gradients are summed, and each has its own rows."""
    model, reference, params, memory, x = setup(way, batches=BATCHES)

    def loss_fn(params, memory, x):
        x += jnp.mean(jax.tree.leaves(params)[0])
        return jnp.sum(jax.vmap(model.apply, in_axes=(None, 0, 0))(params, memory, x) ** 2)

    grad_fn = jax.jit(jax.grad(loss_fn, argnums=(0, 1)))
    ours = grad_fn(like(model.params, params), like(model.memory, memory), x)
    grads, after = one_by_one(functools.partial(gradients(reference), params), memory, x)
    same(ours, (jax.tree.map(lambda a: a.sum(axis=0), grads), after))


def pmap(way):
    model, reference, params, memory, x = setup(way, batches=BATCHES)

    @functools.partial(jax.pmap, axis_name="data", in_axes=(None, 0, 0))
    def step(params, memory, x):
        grads, memory = gradients(model)(params, memory, x)
        return jax.lax.psum(grads, "data"), memory

    grads, after = step(like(model.params, params), like(model.memory, memory), x)
    wanted, wanted_after = one_by_one(functools.partial(gradients(reference), params), memory, x)
    for device in range(BATCHES):
        own = jax.tree.map(operator.itemgetter(device), grads)
        same(own, jax.tree.map(lambda a: a.sum(axis=0), wanted))
    same(after, wanted_after)


def for_all_rows(way):
    """On one device with a group for each of four devices; and the model for one device."""
    model, reference, params, memory, x = setup(way, OF_FOUR, BATCHES * ROWS)
    wanted = gradients(reference)(params, memory, x)
    return model, like(model.params, params), like(model.memory, memory), x, wanted


def mesh_of(axis_type):
    return jax.make_mesh((BATCHES,), ("data",), axis_types=(axis_type,))


def specs_of(way):
    """Rows are each device's own, directions the same everywhere."""
    side = EVERYWHERE if has_subspace(way) else ROWS_SPEC
    return side, side, EVERYWHERE


def shard_map(way):
    _, params, memory, x, wanted = for_all_rows(way)
    specs = like(memory, specs_of(way))
    sharded = jax.shard_map(
        gradients(WAYS[way](CONFIG, ROWS)),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(EVERYWHERE, specs, ROWS_SPEC),
        out_specs=(EVERYWHERE, specs),
    )
    ours = jax.jit(sharded)(params, memory, x)
    if kind_of(way) == "signed":  # with one key, all devices draw the same signs
        ours, wanted = jax.tree.map(jnp.abs, (ours, wanted))
    same(ours, wanted)


def jit_over_a_mesh(axis_type, way):
    model, params, memory, x, wanted = for_all_rows(way)
    rows, everywhere = (NamedSharding(mesh_of(axis_type), s) for s in (ROWS_SPEC, EVERYWHERE))
    shardings = [NamedSharding(rows.mesh, spec) for spec in specs_of(way)]
    memory = jax.device_put(memory, like(memory, shardings))
    params, x = jax.device_put(params, everywhere), jax.device_put(x, rows)
    ours = jax.jit(gradients(model))(params, memory, x)
    same(ours, wanted)
    for after, sharding in zip(jax.tree.leaves(ours[1]), shardings, strict=True):
        assert after.sharding.is_equivalent_to(sharding, after.ndim)


def scan_over_steps(way):
    model, reference, params, memory, _ = setup(way)
    batches = numbers(BATCHES, ROWS, FEATURES, seed=8)

    def step(state, x, model):
        grads, memory = gradients(model)(*state, x)
        return (jax.tree.map(lambda p, g: p - 0.01 * g, state[0], grads), memory), None

    state = like(model.params, params), like(model.memory, memory)
    ours, _ = jax.lax.scan(functools.partial(step, model=model), state, batches)
    wanted = params, memory
    for x in batches:
        wanted, _ = step(wanted, x, reference)
    same(ours, wanted)


def scan_over_layers(remat, way):
    model, _, params, memory, x = setup(way, remat=remat)

    def unrolled(params, memory, x):
        layer = reference_of(way)(CONFIG, ROWS).apply
        for i in range(LAYERS):
            x = layer(*jax.tree.map(operator.itemgetter(i), (params, memory)), x)
        return x

    grad_fn = jax.jit(gradients(model))
    ours = grad_fn(like(model.params, params), like(model.memory, memory), x)
    same(ours, gradients(model._replace(apply=unrolled))(params, memory, x))


def jacrev(way):
    """For each entry of the output an approximate gradient, and a memory, of its own."""
    model, reference, params, memory, x = setup(way)
    jacobian = jax.jit(jax.jacrev(model.apply, argnums=(0, 1)))
    ours = jacobian(like(model.params, params), like(model.memory, memory), x)
    y, pull_back = jax.vjp(lambda *args: reference.apply(*args, x), params, memory)
    units = jnp.eye(y.size, dtype=y.dtype).reshape(y.size, *y.shape)
    wanted = [jax.tree.leaves(pull_back(unit)) for unit in units]
    wanted = [
        jnp.stack(leaves).reshape(*y.shape, *leaves[0].shape)
        for leaves in zip(*wanted, strict=True)
    ]
    same(ours, wanted)


def remat(way):
    model, reference, params, memory, x = setup(way)
    grad_fn = jax.jit(gradients(model._replace(apply=jax.checkpoint(model.apply))))
    ours = grad_fn(like(model.params, params), like(model.memory, memory), x)
    same(ours, gradients(reference)(params, memory, x))


def export(way):
    """One program for three platforms, run on this one."""
    model, reference, params, memory, x = setup(way)

    def of_leaves(params, memory, x):
        grads = gradients(model)(like(model.params, params), like(model.memory, memory), x)
        return jax.tree.leaves(grads)

    args = params, tuple(memory), x
    exported = jax_export.export(jax.jit(of_leaves), platforms=["cpu", "cuda", "tpu"])(*args)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    same(exported.call(*args), gradients(reference)(params, memory, x))


COLUMNS = {
    "`jit`": alone(jax.jit),
    "`grad`": alone(lambda function: function),
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


def slow_if_its_parts_are_in_others(way):
    """Minutes in all: a rare refresh is a subspace with a branch, signs are rows times signs.

    Slots and gradients of inputs are in `dense`, and how Flax carries a memory in its other layers;
    subspaces in `dense` and NNX.
    """
    in_others = "rare refresh", "signed"
    if "wrap" in way:
        in_others += ("subspace",)
    if "`dense`" not in way:
        in_others += "slots", "inputs"
    return pytest.param(way, marks=[pytest.mark.slow] if kind_of(way) in in_others else [])


@pytest.mark.parametrize("column", COLUMNS, ids=lambda name: name.replace("`", ""))
@pytest.mark.parametrize(
    "way", list(map(slow_if_its_parts_are_in_others, WAYS)), ids=lambda name: name.replace("`", "")
)
@pytest.mark.usefixtures("standard_promotion")
def test_a_cell(way, column):
    COLUMNS[column](way)


@pytest.mark.parametrize("forward", [jax.jacfwd, lambda f: lambda x: jax.jvp(f, (x,), (x,))])
@pytest.mark.parametrize("way", WAYS, ids=lambda name: name.replace("`", ""))
@pytest.mark.usefixtures("standard_promotion")
def test_forward_mode_is_an_error_that_says_so(way, forward):
    model, _, params, memory, x = setup(way)
    params, memory = like(model.params, params), like(model.memory, memory)
    with pytest.raises(TypeError, match=r"can't apply forward-mode"):
        forward(lambda params: model.apply(params, memory, x))(params)


def table(mark):
    """Markdown."""
    lines = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    lines += [[way, *(mark(way, column) for column in COLUMNS)] for way in WAYS]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_readme_shows_the_table():
    """With a ✓ in every cell: one that fails is a failing test."""
    text = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    assert table(lambda way, column: "✓") in text


def run(way, column):
    try:
        COLUMNS[column](way)
    except Exception as error:
        return type(error).__name__
    return "✓"


if __name__ == "__main__":
    chex.set_n_cpu_devices(BATCHES)
    print(table(run))
