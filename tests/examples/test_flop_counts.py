"""examples/flop_counts.py; and the examples use public names of the library alone."""

import functools
import pathlib
import re

import flop_counts
import jax
import jax.numpy as jnp
import pytest
from tasks import text, transformer

import mem_aop_jax as aop

SIZES = 64, 32, 16


def test_examples_use_public_names():
    for path in pathlib.Path(flop_counts.__file__).parent.iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert not re.findall(r"from mem_aop_jax|mem_aop_jax\.|aop\._", path.read_text()), path


def test_a_gpu_counts_what_a_cpu_does(monkeypatch):
    """Also with a static argument, and of shapes."""
    product = jax.jit(lambda name, a: a @ a.T, static_argnums=0)
    args = "name", jnp.ones((8, 4), jnp.float32)
    on_cpu = flop_counts.compiled_flops(product, *args)
    assert on_cpu == pytest.approx(2 * 8 * 8 * 4, rel=0.1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert flop_counts.compiled_flops(product, *args) == on_cpu
    shape = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    assert flop_counts.compiled_flops(product, "name", shape) == on_cpu


def test_flops_of_an_estimate():
    product = 2 * 64 * 32 * 16
    every_row = aop.MemAOP(ratio=1.0, memory=None)
    assert 2 * product < flop_counts.estimate_flops(every_row, *SIZES) < 2.5 * product
    quarter = aop.MemAOP(ratio=1 / 4, memory=None)
    saved = flop_counts.estimate_flops(every_row, *SIZES)
    saved -= flop_counts.estimate_flops(quarter, *SIZES)
    assert saved == pytest.approx(3 / 4 * product)


def test_refreshes_that_are_skipped(standard_promotion):
    """Half of them with `refresh=2`, seven of eight with `refresh=8`."""
    model = transformer.Transformer(width=8, layers=1, heads=2)
    logits = functools.partial(transformer.logits, model)
    loss = functools.partial(text.next_token_loss, logits)
    windows = jnp.zeros((4, 17), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), windows[:, :-1])["params"]

    def skipped(pattern, **options):
        config = aop.MemAOP(ratio=1 / 4, policy="priority", rank=4, memory="subspace", **options)
        rules = ((pattern, config), (".*", aop.MemAOP(ratio=1 / 4)))
        return flop_counts.skipped_refresh_flops(loss, rules, params, windows)

    assert skipped("head/kernel") == 0
    one = skipped("head/kernel", refresh=8)
    assert one > 0
    assert skipped("head/kernel", refresh=2) == pytest.approx(one * (1 / 2) / (7 / 8))
    assert skipped("(head|block_0/up)/kernel", refresh=8) > one
