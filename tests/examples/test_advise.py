"""The advice of six models, beside whole training steps."""

import advise
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mem_aop_jax as aop

pytestmark = [pytest.mark.usefixtures("standard_promotion"), pytest.mark.examples]

SMALL = {
    "wide-mlp": lambda: advise.mlp(32, 64),
    "wide-transformer": lambda: advise.transformer(32, 2, sequence=8),
    "wide-experts": lambda: advise.experts(16, 64),
    "convolutions": lambda: advise.convolutions(4, 2),
}


@pytest.mark.parametrize("name", ["wide-transformer", "convolutions"])
def test_the_models_learn_and_are_reached(name):
    task = SMALL[name]()
    approx = aop.approximate(task.loss, advise.CONFIG)
    reach = approx.reach(task.params, *task.batch(0))
    assert (reach.share == 1) == (name != "convolutions")
    before, after = (task.loss(p, *task.batch(0)) for p in (task.params, advise.trained(task)))
    assert after < before
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(task.batch(1)))


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(advise, "MODELS", SMALL)
    monkeypatch.setattr(advise, "STEPS", 1)
    found = aop.Advice(1.0, 1, 1, (1.0, 0.5), 0.1, 0.5, ((".*", advise.CONFIG),))
    monkeypatch.setattr(aop, "advise", lambda *_: found)
    advise.main(["wide-mlp", "--rounds", "1"])
    *advice, header, _, row = [line for line in capsys.readouterr().out.splitlines() if line]
    assert "\n".join(advice) == f"wide-mlp\n{found}"
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:7] == ["wide-mlp", "pays", "1", "0.5", "0.1", "0.5", "0.525"]
    assert float(cells[7]) > 0
    assert header.endswith("step's time |")
    with pytest.raises(SystemExit):
        advise.main(["none"])


def test_memories_are_handed_on():
    task = SMALL["wide-mlp"]()
    seconds = advise.step_seconds(task, task.params, advise.CONFIG, 2)
    assert seconds.shape == (2, 2)
    assert jnp.all(seconds > 0)
