"""Which configuration goes on: what is measured, what is chosen, and how a run resumes."""

import functools
import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from small_models import (
    COLLECTION,
    EXAMPLE,
    KEY,
    MLP,
    SMALL,
    Scanned,
    batch_of,
    gradient_function,
    initial,
    loss,
    trained,
)

import mem_aop_jax as aop

SUBSPACE = aop.MemAOP(ratio=0.25, policy="priority", memory="subspace", rank=(12, 4))
CHOICES = {
    "subspace": SUBSPACE,
    "inputs": aop.MemAOP(
        ratio=0.25,
        policy="priority",
        memory="subspace",
        rank=8,
        refresh=4,
        input_grad=aop.InputGrad(0.5, 16),
    ),
    "some": [("Dense_0", aop.MemAOP(ratio=0.25, policy="priority"))],
}
BATCHES = [batch_of(400), batch_of(401)]
pytestmark = pytest.mark.usefixtures("standard_promotion")


def controller(choices=CHOICES, model=SMALL, example=EXAMPLE, **options):
    return aop.Controller(model, choices, example, loss, **options)


def costs(**cheap):
    return {"exact": 1.0, **dict.fromkeys(CHOICES, 2.0), **cheap}


def model_of(choice, model=SMALL):
    return model if choice == "exact" else aop.linen.wrap(model, CHOICES[choice])


def gradient(model, params, memory, batch, key):
    leaves = jax.tree.leaves(gradient_function(loss)(model, params, memory, batch, key)[0])
    return np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(np.float64)


def exact_gradient(batch, key, model=SMALL):
    return gradient(model, trained(model), {}, batch, key)


@functools.cache
def decided(choice, model=SMALL):
    """A controller that chose this, and the memory that it returned."""
    found = controller(model=model, costs=costs(**{choice: 0.01}))
    return found, found.decide(7, trained(model), {}, BATCHES, jax.random.key(3))


@pytest.mark.parametrize(
    "model", [SMALL, pytest.param(MLP(), marks=pytest.mark.slow)], ids=["small", "large"]
)
@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_measured(choice, model):
    found, memory = decided(choice, model)
    (decision,) = found.log
    assert (decision.step, decision.choice, found.choice) == (7, choice, choice)
    keys = [jax.random.fold_in(jax.random.key(3), i) for i in range(2)]
    first, second = (exact_gradient(*args, model) for args in zip(BATCHES, keys, strict=True))
    estimate = gradient(model_of(choice, model), trained(model), memory, BATCHES[1], keys[1])
    v = np.sum((estimate - second) ** 2) / np.sum(second**2)
    assert decision.v == pytest.approx(decision.v | {"exact": 0, choice: v}, rel=1e-3)
    noise = np.sum((first - second) ** 2) / (np.sum(first**2) + np.sum(second**2))
    assert decision.noise == pytest.approx(noise, rel=1e-3)
    assert decision.score(choice) == pytest.approx((1 + noise * v) * 0.01, rel=1e-3)


def test_costs_are_those_of_the_compiled_gradients():
    found = controller()
    found.decide(0, trained(SMALL), {}, BATCHES, KEY)
    (decision,) = found.log

    def flops(choice):
        memory = decided(choice)[1] if choice != "exact" else {}
        args = model_of(choice), trained(SMALL), memory, BATCHES[0], KEY
        return gradient_function(loss).lower(*args).compile().cost_analysis()["flops"]

    exact = flops("exact")
    assert decision.c["exact"] == 1
    for choice in ("subspace", "some"):
        assert decision.c[choice] == pytest.approx(flops(choice) / exact)
    assert decision.c["inputs"] < flops("inputs") / exact  # three of four refreshes are left out
    spent = sum(map(flops, ("exact", *CHOICES)))  # and a pass in which directions follow
    assert spent + exact < decision.spent < spent + 5 * exact


def test_batches_of_another_size_have_costs_of_their_own():
    """The same model and loss: what was compiled and counted before is not taken for it."""
    half = [batch_of(400, rows=128), batch_of(401, rows=128)]
    choices = {"some": CHOICES["some"]}
    decisions = []
    for batches in (BATCHES, half):
        found = controller(choices, example=batches[0][0])
        found.decide(0, trained(SMALL), {}, batches, KEY)
        decisions += found.log
    whole, of_half = decisions
    assert of_half.spent == pytest.approx(whole.spent / 2, rel=0.05)
    assert of_half.c["some"] == pytest.approx(whole.c["some"], rel=0.05)


def test_the_metric_of_adam_weighs_the_entries():
    params = trained(SMALL)
    metric = jax.tree.map(lambda a: 0.1 + np.square(a), params)
    found = controller({"some": CHOICES["some"]}, costs={"exact": 1.0, "some": 0.5})
    memory = found.decide(0, params, {}, BATCHES, jax.random.key(3), metric=metric)
    weights = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(metric)])
    keys = [jax.random.fold_in(jax.random.key(3), i) for i in range(2)]
    first, second = (exact_gradient(*args) for args in zip(BATCHES, keys, strict=True))
    estimate = gradient(model_of("some"), params, memory, BATCHES[1], keys[1])
    v = np.sum(weights * (estimate - second) ** 2) / np.sum(weights * second**2)
    assert found.log[0].v["some"] == pytest.approx(v, rel=1e-3)
    noise = np.sum(weights * (first - second) ** 2) / np.sum(weights * (first**2 + second**2))
    assert found.log[0].noise == pytest.approx(noise, rel=1e-3)


def test_the_directions_are_those_of_the_rows():
    """As good as those of a memory that followed other batches for twenty steps."""
    _, memory = decided("subspace")
    model = model_of("subspace")
    _, followed = initial(model)
    for i in range(20):
        args = trained(SMALL), followed, batch_of(200 + i), jax.random.key(i)
        _, followed = gradient_function(loss)(model, *args)
    for path in memory:
        for basis in memory[path]["kernel"][:2]:
            gram = np.asarray(basis).T @ np.asarray(basis)
            np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
    exact = exact_gradient(BATCHES[1], KEY)

    def v(memory):
        keys = map(jax.random.key, range(8))
        draws = [gradient(model, trained(SMALL), memory, BATCHES[1], key) for key in keys]
        return np.mean([np.sum((draw - exact) ** 2) for draw in draws])

    assert v(memory) < 1.5 * v(followed)


def test_directions_are_carried_over():
    """From one choice to another, as many as that has."""
    found, before = decided("inputs")
    narrow = {name: CHOICES[name] for name in ("subspace", "inputs")}
    second = controller(
        narrow, costs={"exact": 1, "subspace": 0.01, "inputs": 1}, log=found.log, margin=0
    )
    still = np.zeros_like(BATCHES[0][0])  # of such rows no directions are told
    batches = [(still, BATCHES[0][1]), BATCHES[1]]
    after = second.decide(8, trained(SMALL), before, batches, KEY)
    assert second.choice == "subspace"
    old, new = (np.asarray(memory["Dense_0"]["kernel"].inputs) for memory in (before, after))
    assert (old.shape[1], new.shape[1]) == (8, 12)
    np.testing.assert_allclose(np.linalg.norm(new[:, :8].T @ old), 8**0.5, rtol=1e-3)


def test_what_saves_less_than_the_margin_stays_exact():
    memory, params = {}, trained(SMALL)
    found = controller(costs=costs(some=0.52), margin=0.5)
    found.decide(0, params, memory, BATCHES, KEY)
    assert found.choice == "exact"
    assert 0.5 < found.log[0].score("some") < 1  # better, and not by half
    for cost, choice in ((0.1, "some"), (0.52, "exact"), (0.1, "some"), (3.0, "exact")):
        found = controller(costs=costs(some=cost), log=found.log, margin=0.5)
        memory = found.decide(len(found.log), params, memory, BATCHES, KEY)
        assert found.choice == found.log[-1].choice == choice
    assert memory == {}
    assert found.model == SMALL


def test_between_two_estimates_the_margin_is_of_no_account():
    found = controller(costs=costs(some=0.1, subspace=0.1))
    found.decide(0, trained(SMALL), {}, BATCHES, KEY)
    assert found.choice == "subspace"
    ratio = found.log[0].score("subspace") / found.log[0].score("some")
    found = controller(costs=costs(some=0.99 * 0.1 * ratio, subspace=0.1), log=found.log)
    found.decide(1, trained(SMALL), {}, BATCHES, KEY)
    assert found.choice == "some"


def test_costs_are_in_any_unit():
    found = controller(costs=costs(some=0.5))
    of_seconds = controller(costs={name: 7e-3 * c for name, c in costs(some=0.5).items()})
    for each in (found, of_seconds):
        each.decide(0, trained(SMALL), {}, BATCHES, KEY)
    assert of_seconds.log[0].c == pytest.approx(costs(some=0.5))
    assert of_seconds.choice == found.choice == "some"


def not_a_number(key, scores, k):
    return aop.Selection(jnp.arange(k), jnp.full((k,), jnp.nan, jnp.float32))


def test_an_estimate_that_is_not_finite_is_not_chosen():
    bad = aop.MemAOP(ratio=0.5, policy=not_a_number, memory=None)
    cheap = {"bad": 0.1, "some": 0.2, "exact": 1.0}
    for choices, choice in ((("bad",), "exact"), (("bad", "some"), "some")):
        configs = {name: bad if name == "bad" else CHOICES[name] for name in choices}
        found = controller(configs, costs={name: cheap[name] for name in (*choices, "exact")})
        found.decide(0, trained(SMALL), {}, BATCHES, KEY)
        assert np.isnan(found.log[0].v["bad"])
        assert found.choice == choice


def test_the_best_of_equals_in_noise_is_the_cheapest():
    """Of batches that are alike there is no noise, and v is free."""
    found = controller(costs=costs(inputs=0.9, subspace=0.95))
    found.decide(0, trained(SMALL), {}, [BATCHES[0], BATCHES[0]], KEY)
    assert found.log[0].noise < 1e-9
    assert found.choice == "inputs"


def test_more_batches_are_averaged():
    batches = [batch_of(400 + i) for i in range(4)]
    found = controller(costs=costs())
    found.decide(0, trained(SMALL), {}, batches, KEY)
    gradients = [
        exact_gradient(batch, jax.random.fold_in(KEY, i)) for i, batch in enumerate(batches)
    ]
    between = np.mean([np.sum((a - b) ** 2) for a, b in itertools.pairwise(gradients)])
    whole = np.mean([np.sum(a**2) for a in gradients])
    assert found.log[0].noise == pytest.approx(between / 2 / whole, rel=1e-3)


# ---- in a training loop


TRACES = []
TX = optax.chain(aop.carry_memory({}), optax.adam(3e-3))


def traced_loss(model, *args):
    TRACES.append(model)
    return loss(model, *args)


@jax.jit
def update(params, opt_state, grads, memory):
    updates, opt_state = TX.update(grads, opt_state, params, memory=memory)
    return optax.apply_updates(params, updates), opt_state


def train(folder=None, stop=None, every=4, steps=16):
    """A plain loop, from a checkpoint in a folder if there is one; its state and log."""
    params, _ = initial(SMALL)
    log, first = [], 0
    checkpointer = ocp.StandardCheckpointer()
    if folder and (folder / "log.json").exists():
        log = json.loads((folder / "log.json").read_text())
        first = log[-1]["step"]
    # early on the estimate is cheap, later it is not worth its price
    prices = [costs(subspace=0.1), costs(subspace=0.1), costs(subspace=9.0), costs(inputs=0.2)]
    found = controller(log=log, costs=prices[0])
    opt_state = TX.init(params)
    if first:
        _, memory = initial(found.model)
        target = {"params": params, "opt_state": aop.replace_memory(opt_state, memory)}
        saved = checkpointer.restore(folder / "state", target)
        saved = jax.tree.map(np.asarray, saved)  # on no device, as before; else all compiles anew
        params, opt_state = saved["params"], saved["opt_state"]
    for i in range(first, steps):
        if i % every == 0:
            if i > first or not first:
                found = controller(log=found.log, costs=prices[i // every])
                batches = [batch_of(i), batch_of(i + 1)]
                memory = aop.get_memory(opt_state)
                memory = found.decide(i, params, memory, batches, jax.random.key(i))
                opt_state = aop.replace_memory(opt_state, memory)
            if i == stop:
                state = {"params": params, "opt_state": opt_state}
                checkpointer.save(folder / "state", state)
                checkpointer.wait_until_finished()
                saved = [decision._asdict() for decision in found.log]
                (folder / "log.json").write_text(json.dumps(saved))
                return None
        args = params, aop.get_memory(opt_state), batch_of(i), jax.random.key(i)
        params, opt_state = update(
            params, opt_state, *gradient_function(traced_loss)(found.model, *args)
        )
    return params, opt_state, found.log


@functools.cache
def uninterrupted():
    return train()


def test_it_changes_its_mind():
    _, opt_state, log = uninterrupted()
    assert [decision.choice for decision in log] == ["subspace", "subspace", "exact", "inputs"]
    ranks = aop.get_memory(opt_state)["Dense_0"]["kernel"]
    assert (ranks.inputs.shape[1], ranks.cotangents.shape[1]) == (8, 16)


@pytest.mark.parametrize("stop", [4, 12])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, stop):
    wanted = uninterrupted()
    assert train(tmp_path, stop) is None
    found = train(tmp_path)
    assert found[2] == wanted[2]
    for a, b in zip(jax.tree.leaves(found[:2]), jax.tree.leaves(wanted[:2]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(TRACES) == len(set(TRACES)) == 3  # one compilation for each choice


def test_the_table():
    found, _ = decided("some")
    lines = str(found).splitlines()
    assert lines[0].startswith("| step | choice | noise | exact: v, c, (1 + noise v) c | subspace")
    decision = found.log[0]
    assert lines[2].startswith(f"| 7 | some | {decision.noise:.2f} | 0, 1.000, 1.000 | ")
    assert lines[2].endswith(f"{decision.v['some']:.3g}, 0.010, {decision.score('some'):.3f} |")
    more = controller(CHOICES | {"new": SUBSPACE}, log=found.log)
    assert str(more).splitlines()[2].endswith(" |  |")  # measured before it was a choice


def test_stacked_layers_and_repeated_calls():
    model = Scanned()
    params, _ = initial(model)
    config = aop.MemAOP(ratio=0.25, policy="priority", memory="subspace", rank=4)
    choices = {"all": [("head", None), (".*", config)]}
    found = controller(choices, model, costs={"exact": 1.0, "all": 0.1})
    memory = {}
    for i in range(2):
        memory = found.decide(i, params, memory, BATCHES, KEY)
    assert 0 < found.log[-1].v["all"] < 1
    wanted = jax.eval_shape(aop.linen.wrap(model, choices["all"]).init, KEY, EXAMPLE)[COLLECTION]
    kinds = [
        jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (memory, nn.unbox(wanted))
    ]
    assert kinds[0] == kinds[1]


def test_no_choice_at_all_is_exact_training():
    found = controller({}, example=batch_of(0)[0])
    assert found.decide(0, trained(SMALL), {}, BATCHES, KEY) == {}
    assert found.choice == "exact"
    assert found.log[0].noise > 0


ERRORS = {
    "exact": (lambda: controller({"exact": SUBSPACE}), "which is always among the choices"),
    "rows": (lambda: controller({"a": aop.MemAOP(ratio=0.5)}), "'a' has a memory of rows"),
    "margin": (lambda: controller(margin=1.5), r"margin=1.5; it must lie in \[0, 1\)"),
    "costs": (lambda: controller(costs={"exact": 1}), "costs must name the choices 'exact', 'sub"),
    "log": (
        lambda: controller(log=[decided("some")[0].log[0]._replace(choice="other")]),
        "the log must name the choices .* got 'other'",
    ),
    "rules": (lambda: controller({"a": [("none", SUBSPACE)]}), "'none' matches no dense layer"),
    "one batch": (
        lambda: controller().decide(0, trained(SMALL), {}, BATCHES[:1], KEY),
        "got 1 batches; at least 2 are needed",
    ),
    "NaN": (
        lambda: controller().decide(
            0, trained(SMALL), {}, [BATCHES[0], (BATCHES[1][0] * np.nan, BATCHES[1][1])], KEY
        ),
        "the gradient of batch 1 has the norm nan",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_choice_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"Controller: got 0\.25; it must be an aop\.MemAOP"):
        controller({"a": 0.25})


@pytest.mark.parametrize("entry", [3, {"step": 1}, {"step": 1, "chosen": "exact"}])
def test_a_log_that_is_none(entry):
    with pytest.raises(TypeError, match=r"Controller: the log has an entry .*with the keys step, "):
        controller(log=[entry])
