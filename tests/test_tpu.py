"""The training step compiles for four TPU v5e chips, and the chips save what they should.

The compiler needs no TPU. It runs in a process of its own, whose environment describes one.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from benchmark import TPU
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mem_aop_jax as aop

DEVICES, ROWS, WIDTH, SHARE = 4, 4096, 512, 1 / 8


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='the TPU compiler is not installed: pip install "jax[tpu]"',
)
@pytest.mark.parametrize("partitioning", ["shard_map", "automatic"])
def test_a_sharded_training_step_for_tpu(partitioning):
    """Every device chooses K/4 of its own M/4 rows, automatically by a group for each."""
    root = pathlib.Path(__file__).parents[1]
    path = [str(root), str(root / "examples"), os.environ.get("PYTHONPATH")]
    environment = TPU | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    process = subprocess.run(
        [sys.executable, __file__, partitioning],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    exact, ours, subspace = json.loads(process.stdout.splitlines()[-1])

    product = 2 * ROWS / DEVICES * WIDTH**2
    assert exact["flops"] == pytest.approx(5 * product, rel=0.03)  # 2 forward, 1 dX, 2 dW
    assert ours["flops"] < 1.05 * (3 + 2 * SHARE) * product

    # A kernel for each layer, where no compiler has to partition it.
    assert [step["kernels"] for step in (exact, ours)] == [0, 0]
    assert subspace["kernels"] == (2 if partitioning == "shard_map" else 0)
    assert subspace["flops"] < 1.4 * (3 + 2 * SHARE) * product

    assert ours["memory"] == 2 * 2 * ROWS / DEVICES * WIDTH * jnp.dtype(jnp.bfloat16).itemsize
    for step in (exact, ours):
        assert step["aliased"] >= step["replicated"] + step["memory"]


def compile_step(partitioning, config):
    """What the compiler says of one device: FLOPs, and bytes of the donated state."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2x1").devices
    assert len(devices) == DEVICES
    mesh = Mesh(np.array(devices), ("data",))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (["data"], []))

    layers = [aop.linen.Dense(WIDTH, dtype=jnp.bfloat16, config=config) for _ in range(2)]
    model = nn.Sequential([layers[0], nn.relu, layers[1]])
    x = jnp.ones((ROWS, WIDTH), jnp.bfloat16)
    variables = model.init(jax.random.key(0), x)
    params, memory = variables["params"], variables.get(aop.linen.COLLECTION)
    tx = optax.chain(aop.carry_memory(memory), optax.adam(1e-3))

    def step(params, opt_state, x):
        def loss_fn(params, memory):
            variables = {"params": params, aop.linen.COLLECTION: memory or {}}
            y = model.apply(variables, x, rngs={aop.linen.RNG: jax.random.key(0)})
            return jnp.sum(jnp.square(y.astype(jnp.float32)))

        grads, memory = jax.grad(loss_fn, argnums=(0, 1))(params, aop.get_memory(opt_state))
        updates, opt_state = tx.update(grads, opt_state, params, memory=memory)
        return optax.apply_updates(params, updates), opt_state

    state = params, tx.init(params)
    shardings = everywhere, aop.state_shardings(tx, params, everywhere, rows)
    if partitioning == "shard_map":
        specs = jax.tree.map(lambda sharding: sharding.spec, (*shardings, rows))
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs[:2])
    step = jax.jit(step, in_shardings=(*shardings, rows), donate_argnums=(0, 1))
    compiled = step.lower(*jax.eval_shape(lambda: (*state, x))).compile()

    held = sum(leaf.nbytes for leaf in jax.tree.leaves(memory) if leaf.ndim)
    return {
        "kernels": compiled.as_text().count("tpu_custom_call"),
        "flops": compiled.cost_analysis()["flops"],
        "aliased": compiled.memory_analysis().alias_size_in_bytes,
        "memory": held // DEVICES,
        "replicated": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) - held,
    }


if __name__ == "__main__":
    groups = DEVICES if sys.argv[1] == "automatic" else 1
    ours = aop.MemAOP(ratio=SHARE, groups=groups)
    subspace = aop.MemAOP(ratio=SHARE, groups=groups, policy="priority", memory="subspace", rank=16)
    configs = (None, ours, subspace)
    print(json.dumps([compile_step(sys.argv[1], config) for config in configs]))
