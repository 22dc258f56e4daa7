"""Orbax checkpoints: a run goes on, also killed, on other devices and with another batch size.

`python tests/test_checkpoints.py DIRECTORY MEMORY` is the run that the slow tests kill.
"""

import functools
import os
import pathlib
import signal
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import mem_aop_jax as aop

pytestmark = pytest.mark.usefixtures("standard_promotion")

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

ROWS, STEPS = 8, 12
CONFIGS = {
    "rows": aop.MemAOP(ratio=0.25, policy="weightedk"),
    "bfloat16 rows": aop.MemAOP(ratio=0.25, policy="weightedk", memory_dtype="bfloat16"),
    "signed slots": aop.MemAOP(ratio=0.25, signed=True, memory_slots=4),
    "subspace": aop.MemAOP(ratio=0.25, policy="priority", memory="subspace", rank=2),
    "inputs": aop.MemAOP(
        ratio=0.25,
        policy="priority",
        memory="subspace",
        rank=1,
        input_grad=aop.InputGrad(ratio=0.5, rank=2),
    ),
}
LAYERS = {name: [config] for name, config in CONFIGS.items()} | {
    "a layer of each": list(CONFIGS.values())
}
SCHEDULE = optax.cosine_decay_schedule(0.05, 20)


FUNCTIONS = {"function, rows": CONFIGS["rows"], "function, subspace": CONFIGS["subspace"]}


def dense_layers(name, x):
    """The predictions of a model of this library's layers, its parameters and memories."""
    layers = [aop.linen.Dense(3, config=config) for config in LAYERS[name]]
    model = nn.Sequential((nn.Dense(4), *layers))

    def predict(params, memory, key, x):
        variables = {"params": params, aop.linen.COLLECTION: memory}
        return model.apply(variables, x, rngs={aop.linen.RNG: key})

    variables = jax.jit(model.init)(jax.random.key(0), x)
    return predict, variables["params"], variables[aop.linen.COLLECTION]


def scanned_and_experts(name, x):
    """The same of `aop.approximate`."""

    def predict(params, x):
        x, _ = jax.lax.scan(lambda h, kernel: (jnp.tanh(h @ kernel), None), x, params["layers"])
        return jnp.einsum("bi,eio->bo", x, params["experts"])

    keys, shapes = jax.random.split(jax.random.key(0)), {"layers": (3, 4, 4), "experts": (2, 4, 3)}
    params = {
        part: 0.5 * jax.random.normal(key, shape, jnp.float32)
        for key, (part, shape) in zip(keys, shapes.items(), strict=True)
    }
    approx = aop.approximate(predict, FUNCTIONS[name])
    return approx, params, approx.init(params, x)


@functools.cache  # compiled once
def make_run(devices=1, rows=ROWS, memory="rows"):
    """The first state, placed on the devices; the step; the gradients that it takes."""
    make_model = scanned_and_experts if memory in FUNCTIONS else dense_layers
    predict, params, memory = make_model(memory, jnp.zeros((rows, 4), jnp.float32))
    tx = optax.chain(aop.carry_memory(memory, SCHEDULE), optax.adam(SCHEDULE))

    def loss_fn(params, memory, number):
        key = jax.random.fold_in(jax.random.key(1), number)  # a restart draws the same
        x = jax.random.normal(key, (rows, 4), jnp.float32)
        y = predict(params, memory, key, x)
        return jnp.mean((y - jnp.abs(x[:, :3])) ** 2)

    grad_fn = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1)))

    @jax.jit
    def step(state, number):
        params, opt_state = state["params"], state["opt_state"]
        loss, (grads, memory) = grad_fn(params, aop.get_memory(opt_state), number)
        updates, opt_state = tx.update(grads, opt_state, params, memory=memory)
        return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}, loss

    return placed({"params": params, "opt_state": tx.init(params)}, devices), step, grad_fn


def train(step, state, first, last):
    for number in range(first, last + 1):
        state, loss = jax.block_until_ready(step(state, number))
    return state, loss


def placed(state, devices):
    """The rows of the memory over the devices, all else on each of them."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def place(node):
        sharding = everywhere
        if isinstance(node, aop.Memory):
            sharding = aop.Memory(inputs=rows, cotangents=rows, uses=everywhere)
        return jax.device_put(node, sharding)

    return jax.tree.map(place, state, is_leaf=lambda node: isinstance(node, aop.Memory))


def abstract(state):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)


def save_and_restore(path, state, target):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", target)


def bits(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]


def same_shardings(ours, wanted):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True)
    return all(leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim) for leaf, other in pairs)


@pytest.mark.parametrize(
    ("devices", "memory"),
    [
        (1, "rows"),
        (4, "a layer of each"),
        slow(4, "bfloat16 rows"),
        slow(4, "signed slots"),
        slow(1, "subspace"),
        slow(4, "subspace"),
        slow(4, "inputs"),
        (1, "function, rows"),
        slow(1, "function, subspace"),
    ],
)
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, devices, memory):
    first, step, _ = make_run(devices, memory=memory)
    state, _ = train(step, first, 1, 5)
    assert same_shardings(state, first)
    restored = save_and_restore(tmp_path, state, abstract(first))
    assert bits(restored) == bits(state)
    assert same_shardings(restored, first)
    assert bits(train(step, restored, 6, 9)) == bits(train(step, state, 6, 9))


@pytest.mark.parametrize(("before", "after"), [(4, 2), (4, 1), (2, 4), (1, 4)])
def test_a_run_moves_to_another_number_of_devices(tmp_path, before, after):
    first, step, _ = make_run(before)
    state, _ = train(step, first, 1, 5)
    wanted = train(step, state, 6, 9)
    first, step, _ = make_run(after)
    restored = save_and_restore(tmp_path, state, abstract(first))
    assert bits(restored) == bits(state)
    assert same_shardings(restored, first)
    chex.assert_trees_all_close(train(step, restored, 6, 9), wanted, rtol=1e-6, atol=1e-6)


def test_another_batch_size_starts_the_memory_anew(tmp_path):
    """The parameters, Adam's moments and the place in the schedule go on."""
    state, step, _ = make_run()
    state, _ = train(step, state, 1, 5)
    restored = save_and_restore(tmp_path, state, abstract(state))
    larger, step, grad_fn = make_run(rows=2 * ROWS)
    with pytest.raises(
        ValueError,
        match=r"layers_1: memory.inputs has shape \(8, 4\), but a batch of 16 rows .* needs "
        r"\(16, 4\)\. .*start anew with aop.init_memory\(config, 16, 4, 3, jnp.float32\)",
    ):
        step(restored, 6)

    empty = aop.get_memory(larger["opt_state"])
    opt_state = aop.replace_memory(restored["opt_state"], empty)
    after, _ = step(restored | {"opt_state": opt_state}, 6)

    @jax.jit
    def by_hand(params, adam):
        _, (grads, memory) = grad_fn(params, empty, 6)
        updates, adam = optax.adam(SCHEDULE).update(grads, adam)
        factor = jnp.sqrt(SCHEDULE(5) / SCHEDULE(6))
        memory = jax.tree.map(lambda leaf: leaf * factor if leaf.ndim else leaf, memory)
        return optax.apply_updates(params, updates), memory, adam

    ours = after["params"], aop.get_memory(after["opt_state"]), after["opt_state"][1]
    wanted = by_hand(state["params"], state["opt_state"][1])
    chex.assert_trees_all_close(ours, wanted, rtol=1e-6, atol=1e-6)


def test_a_memory_restored_without_a_target(tmp_path):
    """Orbax gives dicts for named tuples; the errors say how to make a memory of them."""
    state, step, grad_fn = make_run()
    state, _ = train(step, state, 1, 5)
    raw = save_and_restore(tmp_path, state, target=None)
    params, dicts = raw["params"], raw["opt_state"][0]["memory"]
    with pytest.raises(
        ValueError, match=r"found 0 .* restore checkpoints into the structure of tx.init\(params\)"
    ):
        aop.get_memory(raw["opt_state"])
    recipe = r"aop.Memory\(\*\*memory\)"
    with pytest.raises(TypeError, match=rf"carry_memory: .* leaf of type \w+; .*{recipe}"):
        aop.carry_memory(dicts)
    with pytest.raises(TypeError, match=rf"layers_1: memory is of type dict; .*{recipe}"):
        grad_fn(params, dicts, 6)

    memory = {"layers_1": {"memory": aop.Memory(**dicts["layers_1"]["memory"])}}
    kept = aop.get_memory(state["opt_state"])
    assert bits(aop.get_memory(aop.carry_memory(memory).init(params))) == bits(kept)


def run_in_a_process(directory, memory, kill_after=None):
    """The losses that the run reports; it takes a step for each line that it is sent."""
    losses = {}
    with subprocess.Popen(
        [sys.executable, __file__, directory, memory],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        while (kill_after or STEPS) not in losses:
            print(file=process.stdin, flush=True)
            number, loss = process.stdout.readline().split()
            losses[int(number)] = loss
        if kill_after:
            os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == (-signal.SIGKILL if kill_after else 0)
    return losses


def last_checkpoint(directory, memory):
    target = abstract(make_run(memory=memory)[0])
    with ocp.CheckpointManager(directory) as manager:
        assert manager.latest_step() == STEPS
        return manager.restore(STEPS, args=ocp.args.StandardRestore(target))


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["rows", "subspace", "inputs", *FUNCTIONS])
def test_a_run_that_is_killed_ends_as_if_it_were_not(tmp_path, memory):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    wanted = run_in_a_process(whole, memory)
    first = run_in_a_process(killed, memory, kill_after=8)
    second = run_in_a_process(killed, memory, kill_after=11)
    third = run_in_a_process(killed, memory)
    assert min(second) in (4, 7)  # the checkpoint of step 6 may have been half written
    assert min(third) in (7, 10)
    assert first.items() | second.items() | third.items() == wanted.items()
    assert bits(last_checkpoint(killed, memory)) == bits(last_checkpoint(whole, memory))


def main(directory, memory):
    state, step, _ = make_run(memory=memory)
    options = ocp.CheckpointManagerOptions(save_interval_steps=3)
    with ocp.CheckpointManager(directory, options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            state = manager.restore(done, args=ocp.args.StandardRestore(abstract(state)))
        for number in range(done + 1, STEPS + 1):
            input()
            state, loss = step(state, number)
            print(number, float(loss).hex(), flush=True)
            manager.save(number, args=ocp.args.StandardSave(state))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
