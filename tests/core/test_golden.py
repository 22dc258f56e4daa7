"""The library follows the traces of the algorithm, step by step."""

import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import mem_aop_jax as aop

pytestmark = pytest.mark.usefixtures("standard_promotion")

OURS = pathlib.Path(__file__).parents[1] / "data"
SHARED = pathlib.Path(__file__).parents[3] / "shared" / "golden"  # other people's data: optional
TRACES = sorted(OURS.glob("*.npz"))
ENERGY = [SHARED / f"c_energy_topk_K{k}_{m}.npz" for k in (3, 9, 18) for m in ("mem_d1.0", "nomem")]
TOLERANCE = {"float64": 1e-9, "float32": 2e-5}  # of the array's maximum


def load(path):
    with np.load(path) as file:
        trace = dict(file)
    meta = json.loads(str(trace.pop("meta")))
    if meta["family"] == "energy":
        inputs = np.load(SHARED / "c_energy_inputs.npz")
        batches = trace["perm"].reshape(-1, meta["M"])
        trace |= {"X": inputs["Xtr"][batches], "Y": inputs["ytr"][batches]}
    if meta["family"] == "mlp":
        return trace, meta, [f"_{i}" for i in range(len(meta["dims"]) - 1)]
    return trace, meta, [""]


def configurations(meta, suffixes):
    """One configuration per layer; the random policies replay the rows, which stand in for keys."""
    ks = meta["K"] if isinstance(meta["K"], list) else [meta["K"]]
    policy = "topk" if meta["policy"] == "topk" else lambda key, scores, k: aop.Selection(key)
    memory = "rows" if meta["memory"] else None
    assert len(ks) == len(suffixes)
    return [aop.MemAOP(k=k, policy=policy, memory=memory, decay=meta["decay"]) for k in ks]


def loss_of(meta, y, target):
    if meta.get("loss") == "xent":
        return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(y), axis=1))
    return jnp.mean((y - target) ** 2)


def check_step(trace, suffix, t, seen, tolerance):
    """Compares with step t of a layer's trace what `seen` holds under the trace's names."""
    for name, value in seen.items():
        wanted = trace[name + suffix]
        error = np.abs(np.asarray(value, np.float64) - wanted[t]).max()
        assert error <= tolerance * np.abs(wanted).max(), (name + suffix, t)


def learning_rate(trace, dtype):
    rates = jnp.asarray(trace["lr"], dtype)
    if rates.ndim == 0 or np.all(trace["lr"] == trace["lr"][0]):
        return float(np.ravel(trace["lr"])[0])
    return lambda count: rates[count]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("path", TRACES + ENERGY, ids=lambda path: path.stem)
def test_functional(path, dtype):
    if not path.exists():
        pytest.skip("the energy traces come from a data set and are not part of this repository")
    follow(path, dtype, jax.jit)


@pytest.mark.parametrize(
    "name", ["a_topk_K3_mem_d0.9", "b_weightedk_K3_nomem", "d_mlp1_mse_topk_nomem"]
)
def test_functional_without_jit(name):
    follow(OURS / f"{name}.npz", "float64", lambda step: step)


def follow(path, dtype, jit):
    """aop.dense, aop.carry_memory and optax.sgd."""
    trace, meta, suffixes = load(path)
    configs = configurations(meta, suffixes)
    params = [
        (jnp.asarray(trace["W0" + s], dtype), jnp.asarray(trace["b0" + s], dtype)) for s in suffixes
    ]
    memory = [
        aop.init_memory(config, meta["M"], *kernel.shape, dtype)
        for config, (kernel, _) in zip(configs, params, strict=True)
    ]
    rate = learning_rate(trace, dtype)
    tx = optax.chain(aop.carry_memory(memory, rate), optax.sgd(rate))

    def loss_fn(params, memory, x, target, rows):
        for i, (kernel, bias) in enumerate(params):
            y = aop.dense(x, kernel, memory[i], config=configs[i], key=rows[i])
            y = y + bias[None, :]
            x = jnp.tanh(y)
        return loss_of(meta, y, target)

    @jit
    def step(params, opt_state, x, target, rows):
        loss, (grads, memory) = jax.value_and_grad(loss_fn, argnums=(0, 1))(
            params, aop.get_memory(opt_state), x, target, rows
        )
        updates, opt_state = tx.update(grads, opt_state, params, memory=memory)
        return loss, grads, optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    rates = np.broadcast_to(trace["lr"], len(trace["loss"]))
    for t in range(len(trace["loss"])):
        rows = [jnp.asarray(trace["ind" + s][t]) for s in suffixes]
        x, target = jnp.asarray(trace["X"][t], dtype), jnp.asarray(trace["Y"][t], dtype)
        loss, grads, params, opt_state = step(params, opt_state, x, target, rows)

        assert loss.dtype == dtype
        check_step(trace, "", t, {"loss": loss}, TOLERANCE[dtype])
        unit = np.sqrt(rates[min(t + 1, len(rates) - 1)])  # the memory is ready for step t + 1
        memory = aop.get_memory(opt_state)
        for i, suffix in enumerate(suffixes):
            (kernel, bias), (dw, db) = params[i], grads[i]
            seen = {"W": kernel, "b": bias, "dW": rates[t] * dw, "db": rates[t] * db}
            if meta["memory"]:
                seen |= {"memA": unit * memory[i].inputs, "memB": unit * memory[i].cotangents}
            if meta["family"] == "energy":
                mem_a = seen.pop("memA", None)
                seen |= energy_summaries(trace, mem_a, t, TOLERANCE[dtype])
            check_step(trace, suffix, t, seen, TOLERANCE[dtype])


def energy_summaries(trace, mem_a, t, tolerance):
    """The energy traces keep the memory of the inputs whole at the end of an epoch, else sums."""
    if mem_a is None:
        return {}
    mem_a = np.asarray(mem_a, np.float64)
    if t % 4 == 3:
        whole = trace["memA_epoch_end"]
        assert np.abs(mem_a - whole[t // 4]).max() <= tolerance * np.abs(whole).max()
    return {"memA_rowsum": mem_a.sum(1), "memA_fro": np.sqrt((mem_a**2).sum())}


class MLP(nn.Module):
    configs: tuple[aop.MemAOP, ...]
    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for config, features in zip(self.configs, self.features, strict=True):
            y = aop.linen.Dense(features, config=config, param_dtype=x.dtype)(x)
            x = nn.tanh(y)
        return y


@pytest.mark.parametrize(
    ("path", "dtype"),
    [(p, "float64") for p in TRACES if p.stem[:2] in ("a_", "d_")]
    + [(p, "float32") for p in TRACES if p.stem[:2] == "d_"],
    ids=lambda a: getattr(a, "stem", a),
)
def test_linen_with_an_unmodified_train_state(path, dtype):
    """aop.linen.Dense, with parameters and memory together in Flax's own TrainState."""
    trace, meta, suffixes = load(path)
    kernels = [jnp.asarray(trace["W0" + s], dtype) for s in suffixes]
    biases = [jnp.asarray(trace["b0" + s], dtype) for s in suffixes]
    model = MLP(tuple(configurations(meta, suffixes)), tuple(k.shape[1] for k in kernels))
    variables = model.init(jax.random.key(0), jnp.asarray(trace["X"][0], dtype))
    variables["params"] = {
        f"Dense_{i}": {"kernel": kernel, "bias": bias}
        for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True))
    }
    rate = learning_rate(trace, dtype)
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=optax.sgd(rate))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x, target):
        grads = jax.grad(lambda p: loss_of(meta, state.apply_fn(p, x), target))(state.params)
        return state.apply_gradients(grads=grads)

    for t in range(len(trace["loss"])):
        x, target = jnp.asarray(trace["X"][t], dtype), jnp.asarray(trace["Y"][t], dtype)
        state = step(state, x, target)
        for i, suffix in enumerate(suffixes):
            layer = state.params["params"][f"Dense_{i}"]
            seen = {"W": layer["kernel"], "b": layer["bias"]}
            if meta["memory"]:
                memory = state.params[aop.linen.COLLECTION][f"Dense_{i}"]["memory"]
                unit = np.sqrt(rate)
                seen |= {"memA": unit * memory.inputs, "memB": unit * memory.cotangents}
            check_step(trace, suffix, t, seen, TOLERANCE[dtype])
