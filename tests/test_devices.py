"""Four devices, however they share the batch, against one device that is given the four shards."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mem_aop_jax as aop

DEVICES, M, N, P = 4, 6, 5, 3  # M rows a device
ROWS, EVERYWHERE = PartitionSpec("data"), PartitionSpec()
SHARDED = aop.Memory(ROWS, ROWS, EVERYWHERE)
POLICIES = ["topk", "weightedk", "randk"]


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))


def loss_fn(kernel, memory, x, key, config):
    y = aop.dense(x, kernel, memory, config=config, key=key)
    return jnp.sum(jnp.tanh(y) ** 2)


gradients = jax.grad(loss_fn, argnums=(0, 1))
grad_fn = jax.jit(gradients, static_argnums=4)


def setup(policy, kind, groups=1):
    """For a device with 1 group; for all rows on one device with 4."""
    rng = np.random.default_rng(0)
    config = aop.MemAOP(k=2 * groups, policy=policy, memory=kind, groups=groups)
    x, kernel, kept_x, kept_g = (
        np.float32(rng.normal(size=shape))
        for shape in ((DEVICES * M, N), (N, P), (DEVICES * M, N), (DEVICES * M, P))
    )
    memory = aop.Memory(kept_x, kept_g, np.float32(1)) if kind else None
    return config, kernel, memory, x, jax.random.key(0)


@functools.cache
def shard_by_shard(policy, kind):
    """The sum of the shards' gradients, and the memories put together again."""
    config, kernel, memory, x, key = setup(policy, kind)
    grads, memories = 0, []
    for d, own_key in enumerate(jax.random.split(key, DEVICES)):
        rows = slice(d * M, (d + 1) * M)
        own = memory and aop.Memory(memory.inputs[rows], memory.cotangents[rows], memory.uses)
        grad, own = grad_fn(kernel, own, x[rows], own_key, config)
        grads += np.asarray(grad)
        memories.append(own)
    if memory is None:
        return grads, None
    inputs, cotangents, uses = zip(*memories, strict=True)
    return grads, aop.Memory(np.concatenate(inputs), np.concatenate(cotangents), uses[0])


def in_shard_map(body, memory, mesh=None):
    """`body(kernel, memory, rows of x, key)` on every device, jitted."""
    own = memory and SHARDED
    sharded = jax.shard_map(
        lambda kernel, memory, x, keys: body(kernel, memory, x, keys[0]),
        mesh=mesh or mesh_of(),
        in_specs=(EVERYWHERE, own, ROWS, ROWS),
        out_specs=(EVERYWHERE, own),
    )
    return jax.jit(lambda *args, key: sharded(*args, jax.random.split(key, DEVICES)))


ONCE = {("topk", "rows"), ("weightedk", "rows"), ("randk", None)}
for_each_policy = pytest.mark.parametrize(
    ("policy", "kind"),
    [
        pytest.param(policy, kind, marks=[] if (policy, kind) in ONCE else pytest.mark.slow)
        for policy in POLICIES
        for kind in ("rows", None)
    ],
)


@for_each_policy
def test_groups_select_as_devices_do(policy, kind):
    config, kernel, memory, x, key = setup(policy, kind, groups=DEVICES)
    ours = grad_fn(kernel, memory, x, key, config)
    chex.assert_trees_all_close(ours, shard_by_shard(policy, kind), rtol=1e-5, atol=1e-6)


@for_each_policy
def test_shard_map(policy, kind):
    """With check_vma: dW is summed over devices, the memory stays where it is."""
    config, kernel, memory, x, key = setup(policy, kind)
    sharded = in_shard_map(functools.partial(gradients, config=config), memory)
    ours = sharded(kernel, memory, x, key=key)
    chex.assert_trees_all_close(ours, shard_by_shard(policy, kind), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_eager_shard_map():
    config, kernel, memory, x, key = setup("weightedk", "rows")
    sharded = in_shard_map(functools.partial(gradients, config=config), memory)
    with jax.disable_jit():
        ours = sharded(kernel, memory, x, key=key)
    chex.assert_trees_all_close(ours, sharded(kernel, memory, x, key=key), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_shard_map_with_rows_that_are_not_finite(groups):
    config, kernel, memory, x, key = setup("topk", "rows")
    config = aop.MemAOP(k=2, groups=groups)
    x[:3, 0] = np.nan  # three in one group of one device

    grad, after = in_shard_map(functools.partial(gradients, config=config), memory)(
        kernel, memory, x, key=key
    )
    assert np.isnan(grad).all()  # tanh makes the rows' cotangents NaN
    assert all(np.isfinite(leaf).all() for leaf in after)


def test_a_replicated_memory_in_shard_map():
    config, kernel, memory, x, key = setup("topk", "rows")
    memory = jax.tree.map(lambda leaf: leaf[:M] if leaf.ndim else leaf, memory)
    sharded = jax.shard_map(
        functools.partial(gradients, key=key, config=config),
        mesh=mesh_of(),
        in_specs=(EVERYWHERE, EVERYWHERE, ROWS),
        out_specs=(EVERYWHERE, EVERYWHERE),
    )
    with pytest.raises(ValueError, match=r"memory.inputs is the same on all devices .*\['data'\]"):
        sharded(kernel, memory, x)


@for_each_policy
def test_pmap(policy, kind):
    config, kernel, memory, x, key = setup(policy, kind)
    split = functools.partial(jax.tree.map, lambda a: a.reshape(DEVICES, M, a.shape[-1]))
    own = memory and aop.Memory(*split(memory[:2]), np.ones(DEVICES, np.float32))

    @functools.partial(jax.pmap, axis_name="data", in_axes=(None, 0, 0, 0))
    def step(kernel, memory, x, key):
        grad, memory = gradients(kernel, memory, x, key, config)
        return jax.lax.psum(grad, "data"), memory

    grads, after = step(kernel, own, split(x), jax.random.split(key, DEVICES))
    wanted_grad, wanted = shard_by_shard(policy, kind)
    for grad in np.asarray(grads):
        np.testing.assert_allclose(grad, wanted_grad, rtol=1e-5, atol=1e-6)
    if memory is not None:
        after = jax.tree.map(np.asarray, after)
        assert (after.uses == 1).all()
        joined = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), after[:2])
        chex.assert_trees_all_close(joined, wanted[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("axis_type", "groups"),
    [
        (AxisType.Auto, 1),
        (AxisType.Auto, DEVICES),
        (AxisType.Explicit, DEVICES),
        pytest.param(AxisType.Explicit, 1, marks=pytest.mark.slow),
    ],
    ids=lambda a: getattr(a, "name", a),
)
@for_each_policy
def test_jit_over_a_mesh(policy, kind, axis_type, groups):
    """The same figures as on one device, and the memory stays sharded."""
    config, kernel, memory, x, key = setup(policy, kind, groups)
    wanted = grad_fn(kernel, memory, x, key, config)
    rows, everywhere = (NamedSharding(mesh_of(axis_type), spec) for spec in (ROWS, EVERYWHERE))
    own = memory and jax.tree.map(
        lambda a: jax.device_put(a, rows if a.ndim else everywhere), memory
    )
    placed = jax.device_put(kernel, everywhere), own, jax.device_put(x, rows)
    ours = grad_fn(*placed, key, config)
    chex.assert_trees_all_close(ours, wanted, rtol=1e-5, atol=1e-6)
    if memory is not None:
        assert ours[1].inputs.sharding.is_equivalent_to(rows, 2)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("split", ["out_features", "in_features"])
def test_a_kernel_split_over_devices(split, axis_type):
    """Tensor parallelism on a second axis of the mesh; where explicit axes ask for the output's
    sharding, it is handed on."""
    config = aop.MemAOP(k=4, groups=2)
    rng = np.random.default_rng(0)
    x, kernel, kept = (np.float32(rng.normal(size=shape)) for shape in ((4, 6, 8), (8, 4), (24, 8)))
    memory = aop.init_memory(config, 24, 8, 4)._replace(inputs=kept)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    placed = functools.partial(NamedSharding, mesh)
    rows, axis = placed(ROWS), "model" if split == "in_features" else None
    x_sharding = placed(PartitionSpec("data", None, axis))
    kernel_sharding = placed(PartitionSpec(axis, None if axis else "model"))
    explicit = axis is not None and axis_type == AxisType.Explicit
    options = {"out_sharding": rows} if explicit else {}

    def loss(kernel, memory, x, **options):
        numbers = (((2,), (0,)), ((), ()))
        y = aop.dot_general(x, kernel, numbers, memory=memory, config=config, **options)
        return jnp.sum(jnp.tanh(y) ** 2)

    wanted = jax.jit(jax.grad(loss, argnums=(0, 1)))(kernel, memory, x)
    memory = jax.tree.map(
        lambda a: jax.device_put(a, rows if a.ndim else placed(EVERYWHERE)), memory
    )
    grad_fn = jax.jit(jax.grad(functools.partial(loss, **options), argnums=(0, 1)))
    ours = grad_fn(jax.device_put(kernel, kernel_sharding), memory, jax.device_put(x, x_sharding))
    chex.assert_trees_all_close(ours, wanted, rtol=1e-5, atol=1e-6)
    assert ours[0].sharding.is_equivalent_to(kernel_sharding, 2)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
@pytest.mark.parametrize("policy", POLICIES)
def test_with_a_group_per_device_no_row_leaves_its_device(policy, axis_type):
    """Beside the sum of dW and the loss, only scores and flags travel."""
    rows, in_features, out_features = 4096, 64, 32
    config = aop.MemAOP(ratio=0.25, policy=policy, groups=DEVICES)
    mesh = mesh_of(axis_type)

    def array(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    step = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1)), static_argnums=4)
    memory = aop.Memory(
        array((rows, in_features), ROWS),
        array((rows, out_features), ROWS),
        array((), EVERYWHERE),
    )
    kernel = array((in_features, out_features), EVERYWHERE)
    lowered = step.lower(
        kernel, memory, array((rows, in_features), ROWS), jax.random.key(0), config
    )
    large = []
    for line in lowered.compile().as_text().splitlines():
        match = re.search(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)(-start)?\(", line)
        shapes = re.findall(r"\[([\d,]*)\]", match[1]) if match else []
        sizes = [int(np.prod([int(d) for d in shape.split(",") if d])) for shape in shapes]
        if sum(sizes) > rows:
            large.append(sizes)
        elif sum(sizes) == rows:
            assert match[2] == "all-gather"  # of the scores
    dw_and_loss = in_features * out_features + 1
    assert sum(map(sum, large)) <= dw_and_loss
    assert len(large) <= 1


@pytest.mark.parametrize("reduce", [jax.lax.pmean, jax.lax.psum])
def test_a_memory_averaged_over_devices(reduce):
    """The pitfall of a pmean over everything that jax.grad returns."""
    config, kernel, memory, x, key = setup("topk", "rows")
    tx = aop.carry_memory(memory)

    def step(kernel, memory, x, key, reduce=reduce):
        state = tx.init(kernel)._replace(memory=memory)
        grads, new = reduce(gradients(kernel, memory, x, key, config), "data")
        updates, state = tx.update(grads, state, memory=new)
        return updates, state.memory

    with pytest.raises(ValueError, match=r"averaged or added up over the mesh axes \['data'\]"):
        in_shard_map(step, memory)(kernel, memory, x, key=key)
    parameters_alone = functools.partial(step, reduce=lambda grads, _: grads)
    in_shard_map(parameters_alone, memory)(kernel, memory, x, key=key)


def test_a_layer_out_of_use_in_shard_map():
    _, kernel, memory, x, key = setup("topk", "rows")
    tx = aop.carry_memory(memory)

    def step(kernel, memory, x, key):
        grads, new = jax.grad(lambda k, m: jnp.sum(x) * jnp.sum(k), argnums=(0, 1))(kernel, memory)
        updates, state = tx.update(grads, tx.init(kernel)._replace(memory=memory), memory=new)
        return updates, state.memory

    _, after = in_shard_map(step, memory)(kernel, memory, x, key=key)
    chex.assert_trees_all_equal(after[:2], memory[:2])
    assert after.uses == 0


def test_one_batch_for_an_ensemble_over_devices():
    """The batch is the same on all devices, kernels and memories are each device's own."""
    config, kernel, memory, x, _ = setup("topk", "rows")
    x = x[:M]
    x[0] = np.inf  # also a row that is lost
    kernels = np.stack([kernel + d for d in range(2 * DEVICES)])
    own = [
        jax.tree.map(lambda a, d=d: a[:M] + d if a.ndim else a, memory) for d in range(2 * DEVICES)
    ]
    memories = jax.tree.map(lambda *leaves: np.stack(leaves), *own)

    def member(kernel, memory):
        return gradients(kernel, memory, x, None, config)

    sharded = jax.shard_map(jax.vmap(member), mesh=mesh_of(), in_specs=ROWS, out_specs=ROWS)
    expected = jax.jit(jax.vmap(member))(kernels, memories)
    chex.assert_trees_all_close(jax.jit(sharded)(kernels, memories), expected, rtol=1e-5)
