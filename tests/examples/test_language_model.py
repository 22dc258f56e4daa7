"""examples/language_model.py, as a user runs it, and its parts."""

import contextlib
import copy
import io
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import language_model
import language_report
import language_text
import language_training
import numpy as np
import pytest
import runs
from language_training import Run, Trainer

SIZES = {"--width": 32, "--layers": 1, "--heads": 2, "--sequence": 16, "--batch": 4}
ARGUMENTS = [str(word) for option in SIZES.items() for word in option]
TRAINING = [*ARGUMENTS, "--steps", "80", "--learning-rate", "0.01", "--seeds", "2"]
EXACT, APPROXIMATE = RUNS = "exact", "topk:ratio=1/4,flops=1"
AGAIN, HALF_BATCH, ALL_ROWS = MORE = (
    "exact:flops=1", "exact:batch=1/2,flops=0.5", "topk:ratio=1,memory=none",
)  # fmt: skip


def train(folder, *arguments):
    """Runs the command in a folder; returns its output, its progress bars, and its results."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        language_model.main([*TRAINING, *arguments])
    return out.getvalue(), err.getvalue(), read_results(folder)


def read_results(folder):
    return json.loads((folder / "out/results.json").read_text())["words.txt"]


def write_text(path, characters=20_000):
    """A random sequence of a few words."""
    words = np.array(["def", "return", "self", "lambda", "yield", "import", "naïve", "class"])
    drawn = np.random.default_rng(0).choice(words, characters // 5)
    path.write_text(" ".join(drawn)[:characters], encoding="utf-8")
    return path


@pytest.fixture(
    scope="module",
    params=[RUNS, pytest.param(RUNS + MORE, marks=pytest.mark.examples)],
    ids=["two runs", "five runs"],
)
def trained(request, tmp_path_factory):
    """The folder with the command's files, and what `train` returns."""
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder / "words.txt")
    runs = [word for run in request.param for word in ("--run", run)]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return folder, *train(folder, "--text", "words.txt", "--out", "out", *runs)


@pytest.fixture
def results(trained):
    return copy.deepcopy(trained[-1])


# ---- the command


@pytest.mark.examples
def test_it_runs_as_a_script(tmp_path):
    write_text(tmp_path / "words.txt")
    arguments = ["--text", "words.txt", "--out", "out", "--run", EXACT, *TRAINING, "--steps", "9"]
    command = [sys.executable, language_model.__file__, *arguments]
    fast = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=fast)
    assert run.returncode == 0, run.stderr
    assert read_results(tmp_path)[EXACT]["steps"] == 9


def test_it_trains_every_run_and_reports(trained, results):
    folder, printed, progress, _ = trained
    assert "100%" in progress
    assert tuple(results) in (RUNS, RUNS + MORE)
    for entry in results.values():
        assert np.shape(entry["losses"]) == (2, language_training.EVALUATIONS)
        final = [losses[-1] for losses in entry["losses"]]
        assert entry["mean"] == pytest.approx(np.mean(final))
        assert entry["sd"] == pytest.approx(np.std(final, ddof=1))
        assert final[0] != final[1]

    table = (folder / "out/results.md").read_text()
    assert table in printed + "\n"
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2 : 2 + len(results)]]
    for row, (name, entry) in zip(rows, results.items(), strict=True):
        assert row[:3] == [f"`{name}`", str(entry["batch"]), str(entry["steps"])]
        assert row[-1] == f"{entry['mean']:.4f} ± {entry['sd']:.4f}"
    assert "block_0/qkv/kernel (32 to 96), block_0/out/kernel (32 to 32)" in table
    assert (folder / "out/results.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_is_that_of_a_model_which_has_learned(trained, results):
    text = (trained[0] / "words.txt").read_text(encoding="utf-8")
    _, counts = np.unique(language_text.encode(text), return_counts=True)
    shares = counts / counts.sum()
    unigram = -(shares * np.log(shares)).sum()
    for losses in results[EXACT]["losses"]:
        assert losses[-1] < 0.7 * unigram < losses[0]
    for entry in results.values():
        assert all(losses[-1] < unigram for losses in entry["losses"])


def test_runs_of_a_seed_differ_by_their_gradients_alone(results):
    exact, approximate = (np.array(results[name]["losses"]) for name in RUNS)
    assert (np.abs(approximate - exact).max(axis=1) > 0.01).all()
    if len(results) > len(RUNS):
        np.testing.assert_array_equal(results[AGAIN]["losses"], exact)
        all_rows = results[ALL_ROWS]["losses"]  # the same, added up in another order
        np.testing.assert_allclose(all_rows, exact, rtol=1e-4)


def test_steps_are_what_the_flops_pay_for(results):
    exact, approximate = results[EXACT], results[APPROXIMATE]
    budget = exact["steps"] * exact["step_flops"]
    assert exact["steps"] == 80
    for name in results.keys() - {EXACT, ALL_ROWS}:
        entry, share = results[name], 0.5 if name == HALF_BATCH else 1
        (spent,) = {flops[-1] for flops in entry["flops"]}
        assert spent == entry["steps"] * entry["step_flops"]
        assert spent <= share * budget < spent + entry["step_flops"]
        assert entry["of_reference"] == pytest.approx(spent / budget)
    assert approximate["c"] == approximate["step_flops"] / exact["step_flops"] != exact["c"] == 1
    assert approximate["steps"] == int(80 / approximate["c"])
    if len(results) > len(RUNS):
        assert results[HALF_BATCH]["batch"] == 2
        assert results[HALF_BATCH]["c"] == 1
    assert len(set(exact["flops"][0])) == language_training.EVALUATIONS


def test_flops_of_an_exact_step_are_those_of_its_products(results):
    """Three products for each kernel, and those of the attention; the rest is small."""
    width, tokens, vocabulary = 32, 4 * 16, language_text.VOCABULARY
    kernels = width * (12 * width + vocabulary)
    products = 6 * tokens * (kernels + 2 * 16 * width)
    assert products < results[EXACT]["step_flops"] < 1.5 * products


def test_a_stopped_run_goes_on_where_it_was(trained, results, tmp_path, standard_promotion):
    shutil.copy(trained[0] / "words.txt", tmp_path)
    stopped = {name: copy.deepcopy(results[name]) for name in (EXACT, APPROXIMATE)}
    for key in ("losses", "flops", "seconds"):
        del stopped[APPROXIMATE][key][1:]  # after its first seed
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").write_text(json.dumps({"words.txt": stopped}))
    arguments = ("--text", "words.txt", "--out", "out", "--run", EXACT, "--run", APPROXIMATE)
    *_, resumed = train(tmp_path, *arguments)
    assert resumed[EXACT] == results[EXACT]  # not run again
    for entry in (resumed[APPROXIMATE], results[APPROXIMATE]):
        assert len(entry.pop("seconds")) == 2
    assert resumed[APPROXIMATE] == results[APPROXIMATE]


def test_results_of_other_settings_are_refused(trained, standard_promotion):
    folder = trained[0]
    arguments = f"--text {folder / 'words.txt'} --out {folder / 'out'} --run exact --width 64"
    with pytest.raises(SystemExit, match=r"exact was run with {'width': 32}, now asked for with"):
        language_model.main([*TRAINING, *arguments.split()])


@pytest.mark.examples
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "argument --steps: 0 is not between 1"),
        ("--learning-rate nan", "argument --learning-rate: nan is not between"),
        ("--width wide", "argument --width: invalid count value: 'wide'"),
        ("--heads 5", "--heads 5: do not divide --width 32"),
        ("--preset huge", "invalid choice: 'huge'"),
        ("--run best:ratio=1/4", "argument --run: best:ratio=1/4: MemAOP got policy='best'"),
        ("--run topk", "argument --run: topk: MemAOP got k=None and ratio=None"),
        ("--run topk:ratio=3/2", "MemAOP got ratio=1.5"),
        ("--run topk:ratio=1/0", "MemAOP got ratio='1/0'"),
        ("--run topk:ratio=1/4,memory=much", "MemAOP got memory='much'"),
        ("--run topk:ratio=1/4,power=2", "unexpected keyword argument 'power'"),
        ("--run topk:ratio", "'ratio' is not NAME=VALUE"),
        ("--run topk:ratio=1/4,ratio=1/2", "ratio is given twice"),
        ("--run exact:ratio=1/4", "exact takes batch, steps and flops, not ratio"),
        ("--run exact:steps=9,flops=1", "give steps or flops, not both"),
        ("--run exact:steps=0", "steps must be a number above 0"),
        ("--run control:flops=1", "control takes every, batch, steps and inputs, not flops"),
        ("--run control:every=1/2", "every must be a whole number of steps"),
        ("--run control:inputs=1/2", "inputs must be true or false"),
        ("--run exact:batch=half", "batch must be a number above 0"),
        ("--run exact:batch=1/3", "batch is 1.33333, no whole number, where --batch is 4"),
        ("--run topk:k=65", "topk:k=65: MemAOP: k=65 outer products asked of a batch of 64"),
        ("--run topk:k=8 --layers-exact none", "the rule for 'none' matches no dense layer"),
        ("--run control --layers-exact none", "the rule for 'none' matches no dense layer"),
        ("--run topk:k=8 --layers-exact (", "'(' is no regular expression"),
        ("--out /dev/null/x", "--out /dev/null/x: cannot be made"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        language_model.parse_arguments([*ARGUMENTS, "--run", "exact", *arguments.split()])
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert ": error: " in error


@pytest.mark.examples
def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        language_model.main(["--help"])
    assert "exact:flops=0.75" in capsys.readouterr().out


# ---- what is compared


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("1/8", 0.125),
        ("2/1", 2.0),
        ("0.5", 0.5),
        ("24x8", (24, 8)),
        ("none", None),
        ("True", True),
    ],
)
def test_values(text, value):
    parsed = runs.parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.fixture
def parse(standard_promotion, tmp_path):
    return lambda arguments: language_model.parse_arguments(
        ["--out", str(tmp_path), *ARGUMENTS, *arguments.split()]
    )


def test_sizes_of_runs(parse):
    options = parse(
        "--steps 10 --run exact --run exact:batch=8,steps=1/2 --run randk:k=3,batch=2/1,flops=0.5 "
        "--run topk:ratio=1/8,decay=0.5,memory_dtype=bfloat16,steps=7 --run exact"
    )
    assert [run[-3:] for run in options.run] == [
        (4, 10, None), (8, 5, None), (8, None, 0.5), (4, 7, None)
    ]  # fmt: skip
    config = options.run[3].config
    assert (config.ratio, config.decay, config.memory_dtype) == (1 / 8, 0.5, jnp.bfloat16)


def test_equal_flops_is_for_approximate_runs_without_sizes(parse):
    options = parse("--equal-flops --run exact --run topk:k=3 --run topk:k=3,steps=9")
    assert [(run.steps, run.flops) for run in options.run] == [(250, None), (None, 1), (9, None)]


def test_a_preset_gives_way_to_options(parse, monkeypatch):
    monkeypatch.setattr(language_model, "DEFAULT_RUNS", ("exact",))
    options = parse("--preset small --steps 7")
    assert options.layers == SIZES["--layers"]
    assert options.steps == 7
    defaults = language_model.parse_arguments(["--out", str(options.out), "--preset", "small"])
    small = language_model.PRESETS["small"]
    assert {name: getattr(defaults, name) for name in small} == small


def test_the_default_runs_are_valid(parse):
    options = parse("--heads 4")
    assert [run.name for run in options.run] == list(language_model.DEFAULT_RUNS)
    assert [layer.split()[0] for layer in options.approximate] == [
        f"block_0/{name}/kernel" for name in ("qkv", "out", "up", "down")
    ]
    fewer = parse("--run topk:k=3 --layers-exact block_0/(up|down)/kernel")
    assert fewer.approximate == options.approximate[:2]


# ---- the text


def load(*arguments):
    return language_text.load(language_model.parse_arguments([*ARGUMENTS, *map(str, arguments)]))


def test_tokens():
    characters = "~ \tdef naïve():\n€ 😀\x00\r"
    tokens = language_text.encode(characters)
    known = language_text.CHARACTERS
    decoded = "".join(known[t] if t < len(known) else "?" for t in tokens)
    assert decoded == "~ \tdef na?ve():\n? ???"
    assert tokens.max() == language_text.UNKNOWN == 97


def test_a_text_is_split(tmp_path, monkeypatch, standard_promotion):
    path = write_text(tmp_path / "words.txt", 5_000)
    arguments = ("--run", "exact", "--out", tmp_path, "--text", path)
    text = load(*arguments)
    tokens = language_text.encode(path.read_text(encoding="utf-8"))
    np.testing.assert_array_equal(text.train, tokens[:4_750])
    windows = text.validation.reshape(-1, 17)
    np.testing.assert_array_equal(windows[0], tokens[4_750:4_767])
    np.testing.assert_array_equal(windows[-1], tokens[-17:])
    monkeypatch.setattr(language_text, "TEXT_LIMIT", 2_000)
    assert len(load(*arguments).train) == 1_900


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
    assert language_text.standard_library(tmp_path) == "zb\n"


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
        load("--run", "exact", "--out", tmp_path, "--text", path)
    assert "\n" not in str(error.value)


# ---- the model and its batches


def test_the_model_looks_at_earlier_characters_alone(standard_promotion):
    model = language_training.Transformer(width=8, layers=2, heads=2)
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), tokens), np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), shapes)
    apply = jax.jit(model.apply)
    logits, other = (apply(params, x) for x in (tokens, tokens.at[0, 7].set(50)))
    changed = (np.abs(logits - other) > 1e-6).any(axis=(0, 2))
    np.testing.assert_array_equal(changed, np.arange(12) >= 7)


def test_windows_come_in_the_same_order_for_every_batch_size(parse):
    options = parse("--run exact")
    tokens, key = jnp.arange(97, dtype=jnp.uint8), jax.random.key(3)
    one, two = (Trainer(Run("exact", None, {}, batch=batch), 10, options) for batch in (6, 3))
    windows = np.array(jax.jit(one.windows)(tokens, key, 1))
    draw_half = jax.jit(two.windows)
    halves = [draw_half(tokens, key, i) for i in (2, 3)]
    np.testing.assert_array_equal(windows, np.concatenate(halves))
    np.testing.assert_array_equal(np.diff(windows, axis=1), 1)
    assert len(set(windows[:, 0].tolist())) > 1


def test_the_learning_rate_has_the_same_shape_for_every_length(parse):
    options = parse("--run exact --learning-rate 0.5")
    short, long = (Trainer(options.run[0], steps, options).schedule for steps in (100, 1000))
    for share in (0.1, 0.5, 0.9, 1):
        assert float(short(100 * share)) == pytest.approx(float(long(1000 * share)), abs=1e-6)
    assert float(short(10)) == pytest.approx(0.5)
    assert 0 < float(short(0)) < 0.1
    assert 0 < float(short(99)) < 0.01


def test_when_a_loss_was_reached():
    """Straight between two evaluations; at the first where it was that low already."""
    entry = {"batch": 4, "steps": 9, "step_flops": 2e9, "c": 0.5, "of_reference": 0.25}
    entry |= {"losses": [[3.0, 2.5, 2.4], [2.6, 2.4, 2.4]], "flops": [[2e9, 4e9, 6e9]] * 2}
    entry |= {"seconds": [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]}

    def last_cells(loss):
        return language_report.table({"exact": entry}, loss).splitlines()[-1].split(" | ")[-2:]

    assert last_cells(2.5) == ["3 ± 0", "3.5e+09 ± 7.071e+08 |"]
    assert last_cells(2.6) == ["2.3 ± 0.4243", "2.8e+09 ± 1.131e+09 |"]
    assert last_cells(2.3) == ["never", "never |"]
    head = language_report.table({"exact": entry}, 2.5).splitlines()[0]
    assert head.endswith("| loss | s to 2.5 | FLOPs to 2.5 |")


def test_seconds_are_those_without_compilation(monkeypatch):
    monkeypatch.setattr(language_training, "COMPILING", [])
    clock = iter((10.0, 12.0, 13.0, 16.0, 20.0, 30.0, 31.0))
    monkeypatch.setattr(language_training.time, "perf_counter", lambda: next(clock))
    stopwatch = language_training.Stopwatch()
    with stopwatch:  # from 10
        language_training.note_compilation("/jax/core/compile/inner", 1.0)  # until 12
        language_training.note_compilation("/jax/core/compile/outer", 2.5)  # until 13, and the same
        language_training.note_compilation("/jax/core/compile/next", 1.0)  # until 16
        language_training.note_compilation("/jax/another", 4.0)
    assert stopwatch.seconds == 10 - 3.5
    with stopwatch:  # another second
        pass
    assert stopwatch.seconds == 7.5


def test_jax_says_when_it_compiles(monkeypatch):
    monkeypatch.setattr(language_training, "COMPILING", [])
    jax.jit(lambda x: jnp.sin(jnp.cos(x)))(jnp.ones(3))
    spans = language_training.COMPILING
    assert spans
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))  # none twice


def test_a_table_of_one_seed_has_no_standard_deviation():
    entry = {"batch": 4, "steps": 9, "step_flops": 2e9, "c": 0.5, "of_reference": 0.25}
    entry |= {"losses": [[3.0, 2.5]], "seconds": [[0.5, 1.25]]}
    assert runs.mean_and_sd([2.5]) == (2.5, None)
    row = language_report.table({"topk:k=3": entry}).splitlines()[-1]
    assert row == "| `topk:k=3` | 4 | 9 | 2 G | 0.500 | 0.250 | 1.2 | 2.5000 |"


@pytest.mark.slow
def test_estimates_are_diagnosed_early_and_late(tmp_path, monkeypatch, standard_promotion, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("words.txt").write_text("a cat sat on a mat, and that was that. " * 400)
    subspace = "priority:ratio=1/4,memory=subspace,rank=4x4,refresh=4"
    priority = "priority:ratio=1/4"
    options = "--text words.txt --width 16 --layers 1 --heads 2 --sequence 16 --batch 4 --steps 20"
    named = [word for run in ("exact", subspace, priority) for word in ("--run", run)]
    command = [*options.split(), "--diagnose", "--out", "out", *named]
    language_model.main(command)
    printed = capsys.readouterr().out
    results = json.loads(pathlib.Path("out/results.json").read_text())["words.txt"]
    assert "diagnostics" not in results["exact"]
    for step in ("2", "20"):
        better, worse = (results[run]["diagnostics"][step] for run in (subspace, priority))
        assert 0 < better["v"] < worse["v"]
        assert better["rule"] == pytest.approx((1 + better["error"] ** 2) * better["c"])
        assert f"| `{subspace}` | {step} | {better['error']:.3g} |" in printed
    layers = pathlib.Path("out/diagnostics.md").read_text()
    assert layers.count("| block_0/qkv/kernel |") == 4
    assert f"{subspace}, after 20 steps" in layers
    language_model.main(command)  # with nothing left to train
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    "spelled",
    [
        pytest.param("control:every=100", marks=pytest.mark.examples),
        pytest.param("control:every=100,inputs=true", marks=pytest.mark.slow),
    ],
)
def test_a_controlled_run(spelled, tmp_path, monkeypatch, standard_promotion, capsys):
    """Exact until the first decision, then as it decided; all that it measured is counted."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("words.txt").write_text("a cat sat on a mat, and that was that. " * 400)
    options = "--text words.txt --width 32 --layers 1 --heads 2 --sequence 16 --batch 16"
    command = f"{options} --steps 30 --out out --run {spelled} --run exact".split()
    language_model.main(command)
    printed = capsys.readouterr().out
    results = read_results(tmp_path)
    entry, exact = results[spelled], results["exact"]
    assert entry["inputs"] == ("inputs" in spelled)
    ((decision,),) = entry["decisions"]
    assert decision["step"] == 10
    assert set(decision["v"]) == {"exact", "allocated at 10"}
    assert 0 < decision["v"]["allocated at 10"] < 1
    np.testing.assert_array_equal(entry["losses"][0][:3], exact["losses"][0][:3])
    flops, exact_flops = np.diff(entry["flops"][0]), np.diff(exact["flops"][0])
    np.testing.assert_array_equal(flops[:2], exact_flops[:2])
    allocating = (flops[2] - flops[3] - decision["spent"]) / exact["step_flops"]  # in steps
    assert 25 < allocating < 50 if entry["inputs"] else 5 < allocating < 20  # it measures dX, too
    assert (flops[3:] == flops[3]).all()
    assert entry["c"] == pytest.approx(entry["flops"][0][-1] / exact["flops"][0][-1])
    assert f"| 10 | {decision['choice']} | {decision['noise']:.2f} |" in printed
    assert "Approximate: block_0/qkv/kernel (32 to 96)" in printed


@pytest.mark.slow
def test_fine_tuning_starts_where_training_ended(tmp_path, monkeypatch, standard_promotion):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("words.txt").write_text("a cat sat on a mat, and that was that. " * 400)
    options = "--text words.txt --width 16 --layers 1 --heads 2 --sequence 16 --batch 4 --steps 60"
    command = [*options.split(), "--start-learning-rate", "0.01", "--run", "exact"]
    language_model.main([*command, "--learning-rate", "0.01", "--out", "before"])
    language_model.main([*command, "--learning-rate", "1e-9", "--out", "after", "--start", "60"])
    before, after = (
        json.loads(pathlib.Path(out, "results.json").read_text())["words.txt"]["exact"]["losses"][0]
        for out in ("before", "after")
    )
    assert before[-1] < 0.9 * before[0]
    np.testing.assert_allclose(after, before[-1], rtol=1e-5)


@pytest.mark.slow
def test_flops_of_a_step_with_approximate_gradients_of_inputs(tmp_path, standard_promotion):
    """At width 1,024 with 2,048 rows, as XLA counts them."""
    spelled = "priority:ratio=1/8,memory=subspace,rank=8,input_ratio=1/4,input_rank=32"
    sizes = ["--width", "1024", "--heads", "16", "--layers", "1", "--out", str(tmp_path)]
    options = language_model.parse_arguments([*sizes, "--run", spelled, "--run", "exact"])
    trainers = [Trainer(run, 1, options) for run in options.run]
    ours, exact = (trainer.step_flops(trainer.rules) for trainer in trainers)
    assert ours < 0.56 * exact
