"""The tasks of examples/compare.py: their data, their models, and that they learn."""

import argparse
import importlib

import compare
import compare_training
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tasks.experts
import tasks.images
import tasks.text
from flax import nnx
from task_data import write_images, write_text
from tasks.transformer import Transformer

SMALL = {
    "mlp": "--width 16 --layers 2 --batch 8",
    "vit": "--width 16 --heads 2 --batch 4",
    "experts": "--width 16 --heads 2 --sequence 16 --batch 4",
    "gpt2": "--width 16 --heads 2 --sequence 16 --batch 4",
}


@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(name, marks=pytest.mark.examples) for name in [*SMALL][1:])]
)
def test_a_task_trains_in_every_way(name, tmp_path, monkeypatch, standard_promotion):
    """With all rows its approximate gradient is the exact one; it learns, with a rival's, too."""
    if name == "gpt2":
        pytest.importorskip("transformers")
    task = importlib.import_module(f"tasks.{name}")
    monkeypatch.setattr(compare_training, "EVALUATIONS", 2)
    text = write_text(tmp_path / "words.txt", 3_000)
    if hasattr(task, "images"):
        write_images(tmp_path)
        data = f"--data {tmp_path} --dataset mnist"
    else:
        data = f"--text {text}"
    all_rows = "priority:ratio=1,memory=none,steps=12"
    words = f"{name} {data} {SMALL[name]} --steps 12 --learning-rate 0.01 --batches 1"
    words += f" --out {tmp_path / 'out'} --run {all_rows} --run winners:ratio=1/2"
    comparison = compare.parse_arguments(words.split())
    assert len(comparison.approximate()) > 1
    results = comparison.train()
    exact, same, rival = (entry["losses"][0] for entry in results.values())
    np.testing.assert_allclose(same, exact, rtol=2e-3)
    assert exact[-1] < exact[0]
    assert exact[-1] != rival[-1] < rival[0]


# ---- the text


def text_task(path):
    options = argparse.Namespace(text=path, sequence=16)
    return tasks.text.task(options, init=None, apply=None, exact=())


def test_tokens():
    characters = "~ \tdef naïve():\n€ 😀\x00\r"
    tokens = tasks.text.encode(characters)
    known = tasks.text.CHARACTERS
    decoded = "".join(known[t] if t < len(known) else "?" for t in tokens)
    assert decoded == "~ \tdef na?ve():\n? ???"
    assert tokens.max() == tasks.text.UNKNOWN == 97


def test_a_text_is_split(tmp_path, monkeypatch, standard_promotion):
    path = write_text(tmp_path / "words.txt", 5_000)
    text = text_task(path)
    tokens = tasks.text.encode(path.read_text(encoding="utf-8"))
    np.testing.assert_array_equal(text.train, tokens[:4_750])
    windows = text.validation.reshape(-1, 17)
    np.testing.assert_array_equal(windows[0], tokens[4_750:4_767])
    np.testing.assert_array_equal(windows[-1], tokens[-17:])
    example = text.draw(text.train, jax.random.key(0))
    assert any((tokens[i : i + 17] == example).all() for i in range(len(tokens) - 16))
    monkeypatch.setattr(tasks.text, "TEXT_LIMIT", 2_000)
    assert len(text_task(path).train) == 1_900


def test_the_standard_library(tmp_path):
    for name, content in (
        ("b.py", b"b\xff\r\n"),
        ("a/z.py", b"z"),
        ("a/test/no.py", b"no"),
        ("site-packages/no.py", b"no"),
        ("a/no.txt", b"no"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert tasks.text.standard_library(tmp_path) == "zb\n"


@pytest.mark.examples
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"words\.txt: cannot be read \(No such file"),
        ("x" * 339, r"words\.txt: has 339 characters; with --sequence 16 at least 340 are wanted"),
    ],
)
def test_a_bad_text_is_one_line(content, message, tmp_path, standard_promotion):
    path = tmp_path / "words.txt"
    if content:
        path.write_text(content)
    with pytest.raises(SystemExit, match=message) as error:
        text_task(path)
    assert "\n" not in str(error.value)


# ---- the images


def test_images_are_moved(tmp_path, standard_promotion):
    """By up to so many pixels along each axis; zeros come in from outside."""
    write_images(tmp_path)
    options = argparse.Namespace(dataset="mnist", data=tmp_path)
    moved, still = (
        tasks.images.task(
            options, init=None, apply=None, rows=1, exact=(), validation=(1, 9), shift=shift
        )
        for shift in (2, 0)
    )
    assert (moved.data, still.data) == ("mnist, moved by up to 2 pixels", "mnist")
    seen = set()
    for key in jax.random.split(jax.random.key(0), 99):
        (pixels, label), (wanted, same) = (task.draw(task.train, key) for task in (moved, still))
        assert label == same
        padded = np.pad(wanted.reshape(28, 28), 2)
        corners = [
            (i, j)
            for i, j in np.ndindex(5, 5)
            if (padded[i : i + 28, j : j + 28] == pixels.reshape(28, 28)).all()
        ]
        seen.update(corners)
        assert len(corners) == 1
    assert {i for i, _ in seen} == {j for _, j in seen} == set(range(5))
    assert len(seen) > 15  # not along both axes alike
    jax.tree.map(np.testing.assert_array_equal, moved.validation, still.validation)


# ---- the models


def test_the_model_looks_at_earlier_characters_alone(standard_promotion):
    model = Transformer(width=8, layers=2, heads=2)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), tokens), np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), shapes)
    apply = jax.jit(model.apply)
    logits, other = (apply(params, x) for x in (tokens, tokens.at[0, 7].set(50)))
    changed = (np.abs(logits - other) > 1e-6).any(axis=(0, 2))
    np.testing.assert_array_equal(changed, np.arange(12) >= 7)


@pytest.mark.usefixtures("standard_promotion")
def test_experts_are_those_of_the_largest_gates(monkeypatch):
    """Where each has room for all, they are added up with the gates as weights."""
    experts = tasks.experts
    model = experts.Experts(8, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 8), jnp.float32)
    monkeypatch.setattr(experts, "CAPACITY", 2.0)
    y = model(x)
    gates = np.array(jax.nn.softmax(model.router(x)))
    for i, j in np.ndindex(2, 3):
        wanted = sum(
            gates[i, j, e] * (nnx.gelu(x[i, j] @ model.up[...][e]) @ model.down[...][e])
            for e in np.argsort(-gates[i, j])[: experts.CHOSEN]
        )
        np.testing.assert_allclose(y[i, j], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_a_mixture_of_experts_looks_at_earlier_characters_alone():
    """Which characters an expert has no more room for, too, depends on earlier ones alone."""
    model = tasks.experts.Model(8, 2, 2, 4, 12, rngs=nnx.Rngs(0))
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)
    apply = nnx.jit(lambda model, tokens: model(tokens))
    logits, other = (apply(model, x) for x in (tokens, tokens.at[0, 7].set(50)))
    changed = (np.abs(logits - other) > 1e-6).any(axis=(0, 2))
    assert not changed[:7].any()
    assert changed[7]
