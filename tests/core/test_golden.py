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
ROUNDED = "a_topk_K3_mem_d0.9", "b_weightedk_K3_nomem", "d_mlp2_xent_topk_mem_d0.9"


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


def replayed(key, scores, k):
    """The random policies replay the trace's rows, which stand in for keys."""
    return aop.Selection(key)


def configurations(meta, suffixes):
    """One configuration per layer."""
    ks = meta["K"] if isinstance(meta["K"], list) else [meta["K"]]
    policy = "topk" if meta["policy"] == "topk" else replayed
    memory = "rows" if meta["memory"] else None
    assert len(ks) == len(suffixes)
    return tuple(aop.MemAOP(k=k, policy=policy, memory=memory, decay=meta["decay"]) for k in ks)


def loss_of(name, y, target):
    if name == "xent":
        return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(y), axis=1))
    return jnp.mean((y - target) ** 2)


def check_step(trace, suffix, t, seen, tolerance):
    """Compares with step t of a layer's trace what `seen` holds under the trace's names."""
    for name, value in seen.items():
        wanted = trace[name + suffix]
        error = np.abs(np.asarray(value, np.float64) - wanted[t]).max()
        assert error <= tolerance * np.abs(wanted).max(), (name + suffix, t)


@pytest.mark.parametrize(
    ("path", "dtype"),
    [(path, "float64") for path in TRACES + ENERGY]
    + [
        pytest.param(path, "float32", marks=[] if path.stem in ROUNDED else pytest.mark.slow)
        for path in TRACES + ENERGY
    ],
    ids=lambda argument: getattr(argument, "stem", argument),
)
def test_functional(path, dtype):
    if not path.exists():
        pytest.skip("the energy traces come from a data set and are not part of this repository")
    follow(path, dtype, functional_step)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["a_topk_K3_mem_d0.9", "b_weightedk_K3_nomem", "d_mlp1_mse_topk_nomem"]
)
def test_functional_without_jit(name):
    follow(OURS / f"{name}.npz", "float64", functional_step.__wrapped__)


def optimizer(memory, rates):
    """Of constant rates a number, else a schedule."""
    rate = (lambda count: rates[count]) if rates.ndim else rates
    return optax.chain(aop.carry_memory(memory, rate), optax.sgd(rate))


@functools.partial(jax.jit, static_argnums=(0, 1))  # one program for all traces of the same kind
def functional_step(configs, loss, rates, params, opt_state, x, target, rows):
    """aop.dense, aop.carry_memory and optax.sgd."""

    def loss_fn(params, memory, x):
        for config, (kernel, bias), own, own_rows in zip(
            configs, params, memory, rows, strict=True
        ):
            y = aop.dense(x, kernel, own, config=config, key=own_rows) + bias[None, :]
            x = jnp.tanh(y)
        return loss_of(loss, y, target)

    memory = aop.get_memory(opt_state)
    loss, (grads, new_memory) = jax.value_and_grad(loss_fn, argnums=(0, 1))(params, memory, x)
    tx = optimizer(memory, rates)
    updates, opt_state = tx.update(grads, opt_state, params, memory=new_memory)
    return loss, grads, optax.apply_updates(params, updates), opt_state


def follow(path, dtype, step):
    trace, meta, suffixes = load(path)
    configs = configurations(meta, suffixes)
    params = [(trace["W0" + s].astype(dtype), trace["b0" + s].astype(dtype)) for s in suffixes]
    memory = [
        aop.init_memory(config, meta["M"], *kernel.shape, dtype)
        for config, (kernel, _) in zip(configs, params, strict=True)
    ]
    steps = len(trace["loss"])
    rates = np.broadcast_to(trace["lr"], steps).astype(dtype)
    given = rates if np.ptp(rates) else rates[0]
    opt_state = optimizer(memory, given).init(params)
    for t in range(steps):
        rows = [jnp.asarray(trace["ind" + s][t]) for s in suffixes]
        x, target = (trace[name][t].astype(dtype) for name in ("X", "Y"))
        loss, grads, params, opt_state = step(
            configs, meta.get("loss"), given, params, opt_state, x, target, rows
        )

        assert loss.dtype == dtype
        check_step(trace, "", t, {"loss": loss}, TOLERANCE[dtype])
        now, then = (float(trace["lr"].flat[min(i, trace["lr"].size - 1)]) for i in (t, t + 1))
        unit = np.sqrt(then)  # the memory is ready for step t + 1
        memory = jax.tree.map(np.asarray, aop.get_memory(opt_state))
        for i, suffix in enumerate(suffixes):
            (kernel, bias), (dw, db) = params[i], jax.tree.map(np.asarray, grads[i])
            seen = {"W": kernel, "b": bias, "dW": now * dw, "db": now * db}
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


LINEN = "a_topk_K3", "d_"


class MLP(nn.Module):
    configs: tuple[aop.MemAOP, ...]
    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for config, features in zip(self.configs, self.features, strict=True):
            y = aop.linen.Dense(features, config=config, param_dtype=x.dtype)(x)
            x = nn.tanh(y)
        return y


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def linen_step(loss, state, x, target):
    grads = jax.grad(lambda p: loss_of(loss, state.apply_fn(p, x), target))(state.params)
    return state.apply_gradients(grads=grads)


@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        pytest.param(
            path,
            dtype,
            marks=[] if path.stem.startswith(LINEN) and dtype == "float64" else pytest.mark.slow,
        )
        for kinds, dtype in ((("a_", "d_"), "float64"), (("d_",), "float32"))
        for path in TRACES
        if path.stem[:2] in kinds
    ],
    ids=lambda argument: getattr(argument, "stem", argument),
)
def test_linen_with_an_unmodified_train_state(path, dtype):
    """aop.linen.Dense, with parameters and memory together in Flax's own TrainState."""
    trace, meta, suffixes = load(path)
    kernels = [trace["W0" + s].astype(dtype) for s in suffixes]
    biases = [trace["b0" + s].astype(dtype) for s in suffixes]
    model = MLP(configurations(meta, suffixes), tuple(k.shape[1] for k in kernels))
    shapes = jax.eval_shape(model.init, jax.random.key(0), trace["X"][0].astype(dtype))
    variables = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    variables["params"] = {
        f"Dense_{i}": {"kernel": kernel, "bias": bias}
        for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True))
    }
    assert np.ptp(trace["lr"]) == 0
    rate = float(trace["lr"].flat[0])
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=optax.sgd(rate))

    for t in range(len(trace["loss"])):
        x, target = (trace[name][t].astype(dtype) for name in ("X", "Y"))
        state = linen_step(meta.get("loss"), state, x, target)
        for i, suffix in enumerate(suffixes):
            layer = state.params["params"][f"Dense_{i}"]
            seen = {"W": layer["kernel"], "b": layer["bias"]}
            if meta["memory"]:
                memory = state.params[aop.linen.COLLECTION][f"Dense_{i}"]["memory"]
                memory = jax.tree.map(np.asarray, memory)
                unit = np.sqrt(rate)
                seen |= {"memA": unit * memory.inputs, "memB": unit * memory.cotangents}
            check_step(trace, suffix, t, seen, TOLERANCE[dtype])
