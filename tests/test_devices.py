"""The primitive on four devices, against one device that is given the four shards in turn."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import mem_aop_jax as aop

DEVICES, M, N, P = 4, 6, 5, 3  # M rows a device
SHARDED = aop.Memory(PartitionSpec("data"), PartitionSpec("data"), PartitionSpec())


def loss_fn(kernel, memory, x, key, config):
    y = aop.dense(x, kernel, memory, config=config, key=key)
    return jnp.sum(jnp.tanh(y) ** 2)


grad_fn = jax.grad(loss_fn, argnums=(0, 1))


def setup(policy, kind):
    rng = np.random.default_rng(0)
    config = aop.MemAOP(k=2, policy=policy, memory=kind)
    x, kernel, kept_x, kept_g = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((DEVICES * M, N), (N, P), (DEVICES * M, N), (DEVICES * M, P))
    )
    memory = aop.Memory(kept_x, kept_g, jnp.ones((), jnp.float32)) if kind else None
    keys = jax.random.split(jax.random.key(0), DEVICES)
    return config, kernel, memory, x, keys


def one_device(config, kernel, memory, x, keys):
    """The sum of the shards' gradients, and the memories put together again."""
    grads, memories = 0, []
    for d in range(DEVICES):
        rows = slice(d * M, (d + 1) * M)
        own = memory and aop.Memory(memory.inputs[rows], memory.cotangents[rows], memory.uses)
        grad, own = grad_fn(kernel, own, x[rows], keys[d], config)
        grads += grad
        memories.append(own)
    if memory is None:
        return grads, None
    inputs, cotangents, uses = zip(*memories, strict=True)
    return grads, aop.Memory(jnp.concatenate(inputs), jnp.concatenate(cotangents), uses[0])


def on_mesh(body, memory):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    own = memory and SHARDED
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(
        body, mesh=mesh, in_specs=(everywhere, own, rows, rows), out_specs=(everywhere, own)
    )


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", ["rows", None])
@pytest.mark.parametrize("policy", ["topk", "weightedk", "randk"])
def test_shard_map(policy, kind, jit):
    """With check_vma: dW is summed over devices, the memory stays where it is."""
    config, kernel, memory, x, keys = setup(policy, kind)

    def body(kernel, memory, x, keys):
        return grad_fn(kernel, memory, x, keys[0], config)

    sharded = on_mesh(body, memory)
    sharded = jax.jit(sharded) if jit else sharded
    wanted = one_device(config, kernel, memory, x, keys)
    chex.assert_trees_all_close(sharded(kernel, memory, x, keys), wanted, rtol=1e-5, atol=1e-6)


def test_shard_map_with_rows_that_are_not_finite():
    config, kernel, memory, x, keys = setup("topk", "rows")
    x = x.at[jnp.arange(1, 4), 0].set(jnp.nan)  # three of one device, which chooses two

    def body(kernel, memory, x, keys):
        return grad_fn(kernel, memory, x, keys[0], config)

    grad, after = jax.jit(on_mesh(body, memory))(kernel, memory, x, keys)
    assert jnp.isnan(grad).all()  # tanh makes the rows' cotangents NaN
    assert all(jnp.isfinite(leaf).all() for leaf in after)


def test_a_replicated_memory_in_shard_map():
    config, kernel, memory, x, keys = setup("topk", "rows")
    memory = jax.tree.map(lambda leaf: leaf[:M] if leaf.ndim else leaf, memory)
    rows, everywhere = PartitionSpec("data"), PartitionSpec()

    def body(kernel, memory, x, keys):
        return grad_fn(kernel, memory, x, keys[0], config)

    sharded = jax.shard_map(
        body,
        mesh=jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(everywhere, everywhere, rows, rows),
        out_specs=(everywhere, everywhere),
    )
    with pytest.raises(ValueError, match=r"memory.inputs is the same on all devices .*\['data'\]"):
        sharded(kernel, memory, x, keys)


@pytest.mark.parametrize("kind", ["rows", None])
@pytest.mark.parametrize("policy", ["topk", "weightedk", "randk"])
def test_pmap(policy, kind):
    config, kernel, memory, x, keys = setup(policy, kind)
    split = functools.partial(jax.tree.map, lambda a: a.reshape(DEVICES, M, a.shape[-1]))
    own = memory and aop.Memory(*split(memory[:2]), jnp.ones(DEVICES, jnp.float32))

    @functools.partial(jax.pmap, axis_name="data", in_axes=(None, 0, 0, 0))
    def step(kernel, memory, x, key):
        grad, memory = grad_fn(kernel, memory, x, key, config)
        return jax.lax.psum(grad, "data"), memory

    grads, after = step(kernel, own, split(x), keys)
    wanted_grad, wanted = one_device(config, kernel, memory, x, keys)
    for d in range(DEVICES):
        np.testing.assert_allclose(grads[d], wanted_grad, rtol=1e-5, atol=1e-6)
    if memory is not None:
        assert (after.uses == 1).all()
        joined = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), after[:2])
        chex.assert_trees_all_close(joined, wanted[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["rows", None])
@pytest.mark.parametrize("policy", ["topk", "weightedk", "randk"])
def test_jit_over_a_mesh(policy, kind):
    """Automatic axes: the same figures as on one device, and the memory stays sharded."""
    config, kernel, memory, x, keys = setup(policy, kind)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = jax.jit(functools.partial(grad_fn, key=keys[0], config=config))
    wanted = step(kernel, memory, x)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    own = memory and jax.tree.map(lambda a: jax.device_put(a, rows) if a.ndim else a, memory)
    ours = step(kernel, own, jax.device_put(x, rows))
    chex.assert_trees_all_close(ours, wanted, rtol=1e-5, atol=1e-6)
    if memory is not None:
        assert ours[1].inputs.sharding.is_equivalent_to(rows, 2)
