"""Training on four devices, in one process or two, against one device with four groups of rows."""

import functools
import itertools
import os
import socket
import subprocess
import sys
import time

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mem_aop_jax as aop

pytestmark = pytest.mark.usefixtures("standard_promotion")

DEVICES, ROWS, STEPS = 4, 32, 20
FEATURES = 6
KERNELS = {"hidden": (FEATURES, 8), "out": (8, 3)}
SCHEDULE = optax.cosine_decay_schedule(0.1, 2 * STEPS)
ADAM = optax.adam(SCHEDULE)
OPTIMIZERS = {  # by policy
    "topk": lambda memory: optax.chain(aop.carry_memory(memory, SCHEDULE), ADAM),
    "weightedk": lambda memory: aop.mem_aop_sgd(SCHEDULE, memory, momentum=0.5),
}
WAYS = ["jit", "shard_map"]


def initial_params():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in KERNELS.items()}


def batch(step, rows=range(ROWS)):
    """The given rows of the batch of a step; to make a row, no other is needed."""
    return np.stack([np.random.default_rng((step, row)).normal(size=FEATURES) for row in rows])


def same(x):
    return x


def key_of_this_device(key):
    return jax.random.split(key, DEVICES)[jax.lax.axis_index("data")]


mean_over_devices = functools.partial(jax.lax.pmean, axis_name="data")


def setup(policy, groups, own_key=same, mean_loss=same, mean_grads=same):
    """Optimizer and step: for all rows with 4 groups, for a device's share of them with 1."""
    config = aop.MemAOP(k=2 * groups, policy=policy, groups=groups)
    rows = ROWS * groups // DEVICES
    memory = {n: aop.init_memory(config, rows, *s, jnp.float64) for n, s in KERNELS.items()}
    tx = OPTIMIZERS[policy](memory)

    def step(params, opt_state, x, i):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), i))

        def loss_fn(params, memory):
            y = x
            for name, key in zip(KERNELS, map(own_key, keys), strict=True):
                y = aop.dense(jnp.tanh(y), params[name], memory[name], config=config, key=key)
            return mean_loss(jnp.mean((y - jnp.abs(x[:, : y.shape[-1]])) ** 2))

        grads, memory = jax.grad(loss_fn, argnums=(0, 1))(params, aop.get_memory(opt_state))
        updates, opt_state = tx.update(mean_grads(grads), opt_state, params, memory=memory)
        return optax.apply_updates(params, updates), opt_state

    return tx, step


def train(step, params, opt_state, batch_of):
    for i in range(STEPS):  # one at a time: several in flight starve XLA's threads on few cores
        params, opt_state = jax.block_until_ready(step(params, opt_state, batch_of(i), i))
    return params, opt_state


@functools.cache
def trained_on_one_device(policy):
    tx, step = setup(policy, DEVICES)
    params, _ = train(jax.jit(step), initial_params(), tx.init(initial_params()), batch)
    return jax.tree.map(np.asarray, params)


def trained_over_a_mesh(policy, way, axis_type=AxisType.Auto):
    """The parameters, the optimizer state, and where that belongs; on one process of any number."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (["data"], []))
    tx, step = setup(policy, DEVICES)
    params = jax.jit(initial_params, out_shardings=everywhere)()
    shardings = aop.state_shardings(tx, params, everywhere, rows)
    opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
    if way == "shard_map":
        _, step = setup(policy, 1, own_key=key_of_this_device, mean_loss=mean_over_devices)
        state_specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
        step = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(everywhere.spec, state_specs, rows.spec, everywhere.spec),
            out_specs=(everywhere.spec, state_specs),
            check_vma=True,
        )
    own_rows = np.split(np.arange(ROWS), jax.process_count())[jax.process_index()]

    def sharded_batch(i):
        return jax.make_array_from_process_local_data(rows, batch(i, own_rows))

    return *train(jax.jit(step), params, opt_state, sharded_batch), shardings


def assert_placed(tree, shardings):
    def check(leaf, sharding):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.sharding, sharding)

    jax.tree.map(check, tree, shardings)


MESHES = {
    ("topk", "shard_map", AxisType.Explicit),
    ("weightedk", "jit", AxisType.Auto),
}


@pytest.mark.parametrize(
    ("policy", "way", "axis_type"),
    [
        pytest.param(*case, marks=[] if case in MESHES else pytest.mark.slow)
        for case in itertools.product(OPTIMIZERS, WAYS, (AxisType.Auto, AxisType.Explicit))
    ],
    ids=lambda argument: getattr(argument, "name", argument),
)
def test_a_mesh_trains_as_one_device(policy, way, axis_type):
    params, opt_state, shardings = trained_over_a_mesh(policy, way, axis_type)
    chex.assert_trees_all_close(params, trained_on_one_device(policy), rtol=1e-9)
    assert_placed(opt_state, shardings)


@pytest.mark.parametrize("policy", [pytest.param("topk", marks=pytest.mark.slow), "weightedk"])
def test_pmap_trains_as_one_device(policy):
    tx, step = setup(policy, 1, own_key=key_of_this_device, mean_grads=mean_over_devices)
    on_all = functools.partial(jax.tree.map, lambda leaf: np.stack([leaf] * DEVICES))
    params = on_all(initial_params())
    opt_state = jax.pmap(tx.init)(params)
    step = jax.pmap(step, axis_name="data", in_axes=(0, 0, 0, None))
    params, _ = train(step, params, opt_state, lambda i: np.stack(np.split(batch(i), DEVICES)))
    chex.assert_trees_all_close(params, on_all(trained_on_one_device(policy)), rtol=1e-9)


@pytest.mark.parametrize("policy", [pytest.param("topk", marks=pytest.mark.slow), "weightedk"])
def test_two_processes_train_as_one_device(policy, tmp_path):
    """As on a pod: a process makes its own rows of the batch alone, and holds those of memories."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    devices = "--xla_force_host_platform_device_count"
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if devices not in flag]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.path.dirname(os.path.dirname(aop.__file__)),
        "XLA_FLAGS": " ".join([*flags, f"{devices}=2"]),
    }
    processes = []
    try:
        for i in range(2):
            command = [sys.executable, __file__, policy, str(i), str(port), tmp_path / f"{i}.npz"]
            with open(tmp_path / f"{i}.log", "w") as log:
                processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        deadline = time.monotonic() + 180
        while (codes := [p.poll() for p in processes]) != [0, 0]:
            logs = "\n".join((tmp_path / f"{i}.log").read_text() for i in range(2))
            assert not any(codes), logs
            assert time.monotonic() < deadline, f"exit codes {codes} (None: still runs)\n{logs}"
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()

    for i, first_rows in enumerate(([0, 8], [16, 24])):
        with np.load(tmp_path / f"{i}.npz") as file:
            saved = dict(file)
        for way in WAYS:
            for name, wanted in trained_on_one_device(policy).items():
                run = f"{way} {name}"
                np.testing.assert_allclose(saved[run], wanted, rtol=1e-9, err_msg=run)
                shards = saved[f"{run} shards"].tolist()
                assert shards == [[row, row + 8] for row in first_rows], run


def one_of_two_processes(policy, process, port, path):
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
    to_save = {}
    for way in WAYS:
        params, opt_state, _ = trained_over_a_mesh(policy, way)
        for name, memory in aop.get_memory(opt_state).items():
            to_save[f"{way} {name}"] = params[name]
            to_save[f"{way} {name} shards"] = sorted(
                shard.index[0].indices(ROWS)[:2] for shard in memory.inputs.addressable_shards
            )
    np.savez(path, **to_save)


CHAINS = {
    "adam": lambda carry: optax.chain(carry, ADAM),
    "sgd": lambda carry: optax.chain(carry, optax.sgd(0.1, momentum=0.9)),
    "MultiSteps": lambda carry: optax.chain(
        carry, optax.MultiSteps(ADAM, 2).gradient_transformation()
    ),
    "masked": lambda carry: optax.chain(carry, optax.masked(ADAM, {"kernel": True, "bias": False})),
    "partition": lambda carry: optax.chain(
        carry, optax.partition({"a": ADAM, "b": ADAM}, {"kernel": "a", "bias": "b"})
    ),
    "apply_if_finite": lambda carry: optax.apply_if_finite(optax.chain(carry, ADAM), 3),
    "adafactor": lambda carry: optax.chain(carry, optax.adafactor(1e-3)),
}


@pytest.mark.parametrize(
    ("optimizer", "sharded_params", "is_stacked"),
    [
        pytest.param(*case, marks=[] if case[0] == "adam" or all(case[1:]) else pytest.mark.slow)
        for case in itertools.product(CHAINS, (True, False), (False, True))
    ],
)
def test_state_shardings(optimizer, sharded_params, is_stacked):
    """Of a layer, or of stacked layers: the shape of an array tells where it belongs."""
    stack, batch_spec = ((3,), (("data", "model"), None)) if is_stacked else ((), ("data",))
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    layers, params_spec = [None] * len(stack), ["model"] if sharded_params else []
    kernel, bias, inputs, cotangents = ((*stack, *s) for s in ((8, 4), (4,), (32, 8), (32, 4)))
    specs = {
        kernel: (*layers, None, *params_spec),
        bias: (*layers, *params_spec),
        inputs: (*layers, batch_spec[0]),
        cotangents: (*layers, batch_spec[0]),
    }

    def sharding(shape):
        return NamedSharding(mesh, PartitionSpec(*specs.get(shape, ())))

    memory = aop.Memory(np.zeros(inputs), np.zeros(cotangents), np.zeros(stack, np.float32))
    tx = CHAINS[optimizer](aop.carry_memory({"layer": memory}))
    params = {"kernel": np.ones(kernel), "bias": np.ones(bias)}
    shardings = aop.state_shardings(
        tx,
        params,
        jax.tree.map(lambda leaf: sharding(leaf.shape), params) if sharded_params else sharding(()),
        NamedSharding(mesh, PartitionSpec(*batch_spec)),
    )
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    assert {kernel, inputs, cotangents} <= {leaf.shape for leaf in jax.tree.leaves(state)}
    assert_placed(state, jax.tree.map(lambda leaf: sharding(leaf.shape), state))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("one_for_all", [False, True])
def test_state_shardings_of_boxed_parameters(one_for_all):
    """As Flax's own shardings, for variables in boxes."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model = aop.linen.wrap(nn.Dense(4, kernel_init=init), aop.MemAOP(ratio=0.5))
    x = jnp.ones((8, 6), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    params, memory = variables["params"], variables[aop.linen.COLLECTION]
    rows = NamedSharding(mesh, PartitionSpec("data"))
    given = NamedSharding(mesh, PartitionSpec()) if one_for_all else nn.get_sharding(params, mesh)
    tx = optax.chain(aop.carry_memory(memory), optax.adam(1e-2))
    state = jax.jit(tx.init, out_shardings=aop.state_shardings(tx, params, given, rows))(params)
    spec = (None, "model") if not one_for_all else ()
    wanted = NamedSharding(mesh, PartitionSpec(*spec))
    kernel = nn.unbox(state[1][0].mu)["kernel"]
    assert kernel.sharding.is_equivalent_to(wanted, 2)
    inputs = aop.get_memory(state)["kernel"].inputs
    assert inputs.sharding.is_equivalent_to(rows, 2)


if __name__ == "__main__":
    one_of_two_processes(*sys.argv[1:])
