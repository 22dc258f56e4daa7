"""The training step compiles for TPU v5e chips, one and four, and these save what they should.

The compiler needs no TPU. It runs in a process of its own, whose environment describes one.
"""

import csv
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
from mem_aop_jax._compat import TPU_COPIES_ROWS

BENCHMARK = pathlib.Path(__file__).parents[1] / "examples" / "benchmark.py"
DEVICES = {"one device": 1, "shard_map": 4, "automatic": 4}
ROWS, WIDTH, SHARE = 4096, 512, 1 / 8


needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='the TPU compiler is not installed: pip install "jax[tpu]"',
)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("partitioning", DEVICES)
def test_a_training_step_for_tpu(partitioning):
    """Each of four devices chooses K/4 of its own M/4 rows, automatically by a group for each."""
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
    steps = json.loads(process.stdout.splitlines()[-1])

    rows = ROWS / DEVICES[partitioning]
    product = 2 * rows * WIDTH**2
    exact, paper = steps["exact"], steps["rows"]
    assert exact["flops"] == pytest.approx(5 * product, rel=0.03)  # 2 forward, 1 dX, 2 dW
    flops_limits = {
        "no memory": 1.05 * (3 + 2 * SHARE) * product,
        "rows": 1.05 * (3 + 2 * SHARE) * product,
        "subspace": 1.4 * (3 + 2 * SHARE) * product,
        "inputs": 1.4 * (2 + 1 / 4 + 2 * SHARE) * product,
    }
    for name, limit in flops_limits.items():
        assert steps[name]["flops"] < limit, name

    # For each of the two layers there are kernels that read the whole array and kernels that read
    # or write the chosen rows, the latter from jax 0.10.2 on. There are none where the compiler
    # would have to partition them. The first layer's inputs have no gradient.
    whole, chosen = (0, 0) if partitioning == "automatic" else (1, int(TPU_COPIES_ROWS))
    kernels = {
        "exact": 0,
        "no memory": 2 * (2 * whole + 2 * chosen),
        "rows": 2 * 4 * chosen,
        "subspace": 2 * (whole + 2 * chosen),
        "inputs": 2 * (whole + 2 * chosen) + 2 * chosen,
    }
    assert {name: step["kernels"] for name, step in steps.items()} == kernels

    assert paper["memory"] == 2 * 2 * rows * WIDTH * jnp.dtype(jnp.bfloat16).itemsize
    for step in (exact, paper):
        assert step["aliased"] >= step["replicated"] + step["memory"]


@needs_compiler
@pytest.mark.slow
def test_a_large_layer_for_tpu(tmp_path):
    """In whose gradient of the kernel the compiler cannot place what it can in a small one."""
    command = [sys.executable, BENCHMARK, "tpu-compile", "--run", "topk", "--out", tmp_path]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    with (tmp_path / "tpu-compile.csv").open() as file:
        exact, paper = csv.DictReader(file)
    assert float(exact["speed"]) == 1
    assert float(paper["speed"]) > (1.2 if TPU_COPIES_ROWS else 1)


def compile_step(partitioning, config):
    """The step's kernels and FLOPs on one device, and the bytes of its donated state."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2x1").devices
    number = DEVICES[partitioning]
    mesh = Mesh(np.array(devices[:number]), ("data",))
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
        "memory": held // number,
        "replicated": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) - held,
    }


def main(partitioning):
    groups = 4 if partitioning == "automatic" else 1
    unbiased = {"policy": "priority", "ratio": SHARE, "groups": groups}
    subspace = unbiased | {"memory": "subspace", "rank": 16}
    configs = {
        "exact": None,
        "no memory": aop.MemAOP(**unbiased, memory=None),
        "rows": aop.MemAOP(ratio=SHARE, groups=groups),
        "subspace": aop.MemAOP(**subspace),
        "inputs": aop.MemAOP(**subspace, input_grad=aop.InputGrad(1 / 4, 32)),
    }
    print(json.dumps({name: compile_step(partitioning, configs[name]) for name in configs}))


if __name__ == "__main__":
    main(sys.argv[1])
