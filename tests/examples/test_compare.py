"""examples/compare.py, as a user runs it, and its parts."""

import contextlib
import copy
import dataclasses
import io
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import compare
import compare_report
import compare_training
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tasks.text
import tasks.transformer
from compare_training import Run
from task_data import write_text

import mem_aop_jax as aop

SIZES = {"--width": 32, "--layers": 1, "--heads": 2, "--sequence": 16, "--batch": 4}
ARGUMENTS = ["transformer", *(str(word) for option in SIZES.items() for word in option)]
TRAINING = [*ARGUMENTS, "--steps", "80", "--learning-rate", "0.01", "--seeds", "2"]
EXACT, HALF_BATCH, APPROXIMATE = RUNS = "exact", "exact:batch=1/2", "topk:ratio=1/4"
AGAIN, HALF, ALL_ROWS = MORE = (
    "exact:flops=1", "exact:batch=1/2,flops=0.5", "topk:ratio=1,memory=none,steps=80",
)  # fmt: skip


def train(folder, *arguments):
    """Runs the command in a folder; returns its output, its progress bars, and its results."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        compare.main([*TRAINING, "--batches", "1", "1/2", *arguments])
    return out.getvalue(), err.getvalue(), read_results(folder)


def read_results(folder):
    return json.loads((folder / "out/results.json").read_text())["transformer, words.txt"]


@pytest.fixture(
    scope="module",
    params=[RUNS, pytest.param(RUNS + MORE, marks=pytest.mark.examples)],
    ids=["three runs", "six runs"],
)
def trained(request, tmp_path_factory):
    """The folder with the command's files, and what `train` returns."""
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder / "words.txt")
    runs = [word for run in request.param[2:] for word in ("--run", run)]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return folder, *train(folder, "--text", "words.txt", "--out", "out", *runs)


@pytest.fixture
def results(trained):
    return copy.deepcopy(trained[-1])


# ---- the command


@pytest.mark.examples
def test_it_runs_as_a_script(tmp_path):
    write_text(tmp_path / "words.txt")
    words = "--text words.txt --out out --batches 1 --run exact:flops=1/3 --steps 9"
    command = [sys.executable, compare.__file__, *TRAINING, *words.split()]
    fast = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=fast)
    assert run.returncode == 0, run.stderr
    assert read_results(tmp_path)[EXACT]["steps"] == [9, 9]


def test_it_trains_every_run_and_reports(trained, results):
    folder, printed, progress, _ = trained
    assert "100%" in progress
    assert tuple(results) in (RUNS, RUNS + MORE)
    for entry in results.values():
        assert np.shape(entry["losses"]) == (2, compare_training.EVALUATIONS)
        assert entry["losses"][0][-1] != entry["losses"][1][-1]

    table = (folder / "out/results.md").read_text()
    assert table in printed + "\n"
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2 : 2 + len(results)]]
    best = min(RUNS[:2], key=lambda name: np.array(results[name]["losses"])[:, -1].mean())
    for row, (name, entry) in zip(rows, results.items(), strict=True):
        last = np.array(entry["losses"])[:, -1]
        bold = "**" if name == best else ""
        assert row[:3] == [f"{bold}`{name}`{bold}", str(entry["batch"]), str(entry["steps"][0])]
        assert row[7] == f"{last.mean():.4f} ± {last.std(ddof=1):.4f}"
        less = last - np.array(results[best]["losses"])[:, -1]
        assert row[10:] == ([] if bold else [", ".join(f"{x:+.4f}" for x in less)])
    assert "block_0/qkv/kernel (32 to 96), block_0/out/kernel (32 to 32)" in table
    assert (folder / "out/results.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_is_that_of_a_model_which_has_learned(trained, results):
    text = (trained[0] / "words.txt").read_text(encoding="utf-8")
    _, counts = np.unique(tasks.text.encode(text), return_counts=True)
    shares = counts / counts.sum()
    unigram = -(shares * np.log(shares)).sum()
    for losses in results[EXACT]["losses"]:
        assert losses[-1] < 0.7 * unigram
    for entry in results.values():
        assert all(losses[-1] < unigram for losses in entry["losses"])


def test_runs_of_a_seed_differ_by_their_gradients_alone(results):
    exact, approximate = (np.array(results[name]["losses"]) for name in (EXACT, APPROXIMATE))
    assert (np.abs(approximate - exact).max(axis=1) > 0.01).all()
    if len(results) > len(RUNS):
        np.testing.assert_array_equal(results[AGAIN]["losses"], exact)
        all_rows = results[ALL_ROWS]["losses"]  # the same, added up in another order
        np.testing.assert_allclose(all_rows, exact, rtol=1e-4)


def test_steps_are_what_the_flops_pay_for(results):
    exact, approximate = results[EXACT], results[APPROXIMATE]
    budget = exact["flops"][0][-1]
    assert exact["steps"] == [80, 80]
    for name in results.keys() - {ALL_ROWS}:
        entry, share = results[name], 0.5 if name == HALF else 1
        (spent,), (steps,) = ({flops[-1] for flops in entry["flops"]}, set(entry["steps"]))
        assert spent == pytest.approx(steps * entry["step_flops"])
        assert spent <= share * budget < spent + entry["step_flops"]
        assert entry["of_reference"] == pytest.approx(spent / budget)
    assert approximate["c"] == approximate["step_flops"] / exact["step_flops"] != exact["c"] == 1
    assert approximate["steps"][0] == int(80 / approximate["c"])
    assert results[HALF_BATCH]["batch"] == 2
    assert results[HALF_BATCH]["c"] == 1
    assert len(set(exact["flops"][0])) == compare_training.EVALUATIONS


def test_flops_of_an_exact_step_are_those_of_its_products(results):
    """Three products for each kernel, and those of the attention; the rest is small."""
    width, tokens, vocabulary = 32, 4 * 16, tasks.text.VOCABULARY
    kernels = width * (12 * width + vocabulary)
    products = 6 * tokens * (kernels + 2 * 16 * width)
    assert products < results[EXACT]["step_flops"] < 1.5 * products


def test_a_stopped_run_goes_on_where_it_was(trained, results, tmp_path, standard_promotion):
    shutil.copy(trained[0] / "words.txt", tmp_path)
    stopped = {name: copy.deepcopy(results[name]) for name in RUNS}
    for key in ("losses", "flops", "seconds", "steps"):
        del stopped[APPROXIMATE][key][1:]  # after its first seed
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").write_text(json.dumps({"transformer, words.txt": stopped}))
    arguments = ("--text", "words.txt", "--out", "out", "--run", APPROXIMATE)
    *_, resumed = train(tmp_path, *arguments)
    assert resumed[EXACT] == results[EXACT]  # not run again
    for entry in (resumed[APPROXIMATE], results[APPROXIMATE]):
        assert len(entry.pop("seconds")) == 2
    assert resumed[APPROXIMATE] == results[APPROXIMATE]


def test_results_of_other_settings_are_refused(trained, standard_promotion):
    folder = trained[0]
    arguments = f"--text {folder / 'words.txt'} --out {folder / 'out'} --batches 1 --width 64"
    with pytest.raises(SystemExit, match=r"exact was run with {'width': 32}, now asked for with"):
        compare.main([*TRAINING, *arguments.split()])


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
        ("--run exact:ratio=1/4", "exact takes batch, steps, flops and bytes, not ratio"),
        ("--run exact:steps=9,flops=1", "give steps or flops, not both"),
        ("--run topk:k=3,bytes=1,flops=1", "give flops or bytes, not both"),
        ("--batches 2", "argument --batches: 2 is not between"),
        ("--batches 1/3", "batch is 1.33333, no whole number, where --batch is 4"),
        ("--run winners:ratio=1/4,memory=last", "got memory='last'"),
        ("--estimates half", "argument --estimates: invalid share value: 'half'"),
        ("--run exact:steps=0", "steps must be a number above 0"),
        ("--run control:bytes=1", "control takes flops, not bytes"),
        ("--run control:power=2", "unexpected keyword argument 'power'"),
        ("--run control:every=1/2", "every must be a whole number of steps"),
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
        compare.parse_arguments([*ARGUMENTS, "--run", "exact", *arguments.split()])
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert ": error: " in error


@pytest.mark.examples
def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        compare.main(["--help"])
    assert "exact:batch=1/2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        compare.main(["vit", "--help"])
    assert "images of a step, of the reference (32)" in capsys.readouterr().out


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
    return lambda arguments: compare.parse_arguments(
        [*ARGUMENTS, "--out", str(tmp_path), *arguments.split()]
    )


def test_sizes_of_runs(parse):
    options = parse(
        "--steps 10 --batches 1 --run exact:batch=8,steps=1/2 --run randk:k=3,batch=2/1,flops=0.5 "
        "--run topk:ratio=1/8,decay=0.5,memory_dtype=bfloat16,steps=7 --run topk:k=1,bytes=0.3 "
        "--run exact"
    ).options
    assert [run[-4:] for run in options.run] == [
        (4, None, 1, None), (8, 5, None, None), (8, None, 0.5, None), (4, 7, None, None),
        (4, None, None, 0.3),
    ]  # fmt: skip
    config = options.run[3].config
    assert (config.ratio, config.decay, config.memory_dtype) == (1 / 8, 0.5, jnp.bfloat16)


def test_what_a_controller_may_find(parse):
    *_, ours, inputs, plain = parse(
        "--run control --run control:every=9,input_rank=8,batch=1/2 --run control:memory=none"
    ).options.run
    assert ours.config == compare_training.ALLOCATED
    assert (ours.every, ours.flops, inputs.every, inputs.batch) == (compare.EVERY, 1, 9, 2)
    assert inputs.config == dataclasses.replace(ours.config, input_grad=aop.InputGrad(rank=8))
    assert plain.config == aop.MemAOP(ratio=0.5, policy="priority", memory=None)


def test_estimates_of_all(parse):
    runs = parse("--batches 1 --estimates 1/2 --every 9 --run exact:flops=2").options.run
    first_words = [run.name.partition(":")[0] for run in runs]
    others = ["winners", "winners", "nothing", "nothing"]
    assert first_words == ["exact", "control", "priority", "priority", "control", *others, "exact"]
    assert {run.batch for run in runs[1:-1]} == {2}
    assert [run.every for run in runs if run.every] == [9, 9]


def test_a_preset_gives_way_to_options(parse, monkeypatch):
    monkeypatch.setattr(compare, "DEFAULT_RUNS", ("exact",))
    options = parse("--preset small --steps 7").options
    assert options.layers == SIZES["--layers"]
    assert options.steps == 7
    words = ["transformer", "--out", str(options.out), "--preset", "small"]
    defaults = compare.parse_arguments(words).options
    small = tasks.transformer.PRESETS["small"]
    assert {name: getattr(defaults, name) for name in small} == small


def test_the_default_runs_are_valid(parse):
    comparison = parse("--heads 4")
    exact = ["exact", "exact:batch=1/2", "exact:batch=1/4"]
    assert [run.name for run in comparison.options.run] == [*exact, *compare.DEFAULT_RUNS]
    assert [layer.split()[0] for layer in comparison.approximate()] == [
        f"block_0/{name}/kernel" for name in ("qkv", "out", "up", "down")
    ]
    fewer = parse("--run topk:k=3 --layers-exact block_0/(up|down)/kernel")
    assert fewer.approximate() == comparison.approximate()[:2]


# ---- batches, rates, seconds


def test_examples_come_in_the_same_order_for_every_batch_size(parse):
    comparison, key = parse("--batches 1/2"), jax.random.key(3)
    tokens = jnp.arange(97, dtype=jnp.uint8)
    one, two = (
        comparison.trainer(Run("exact", None, {}, batch=batch, steps=10)) for batch in (6, 3)
    )
    windows = np.array(one.draw(tokens, key, 1))
    halves = [two.draw(tokens, key, i) for i in (2, 3)]
    np.testing.assert_array_equal(windows, np.concatenate(halves))
    np.testing.assert_array_equal(np.diff(windows, axis=1), 1)
    assert len(set(windows[:, 0].tolist())) > 1


def test_the_learning_rate():
    rates = [compare_training.learning_rate(share) for share in (0.001, 0.05, 0.1, 0.55, 0.999)]
    np.testing.assert_allclose(rates, [0.01, 0.5, 1, 0.5, 0], atol=1e-5)


def test_when_a_loss_was_reached():
    """Straight between two evaluations; at the first where it was that low already."""
    best = {"losses": [[3.0, 2.5], [3.0, 2.6]], "flops": [[2e9, 10e9]] * 2}
    entry = {"losses": [[3.0, 2.6, 2.4], [2.6, 2.4, 2.4]], "flops": [[2e9, 4e9, 6e9]] * 2}
    assert compare_report.share_until(entry, best, "flops") == "0.35"  # 5 and 2 of 10
    best["losses"][1][-1] = 2.3
    assert compare_report.share_until(entry, best, "flops") == "never"


def test_seconds_are_those_without_compilation(monkeypatch):
    monkeypatch.setattr(compare_training, "COMPILING", [])
    clock = iter((10.0, 12.0, 13.0, 16.0, 20.0, 30.0, 31.0))
    monkeypatch.setattr(compare_training.time, "perf_counter", lambda: next(clock))
    stopwatch = compare_training.Stopwatch()
    with stopwatch:  # from 10
        compare_training.note_compilation("/jax/core/compile/inner", 1.0)  # until 12
        compare_training.note_compilation("/jax/core/compile/outer", 2.5)  # until 13, and the same
        compare_training.note_compilation("/jax/core/compile/next", 1.0)  # until 16
        compare_training.note_compilation("/jax/another", 4.0)
    assert stopwatch.seconds == 10 - 3.5
    with stopwatch:  # another second
        pass
    assert stopwatch.seconds == 7.5


def test_jax_says_when_it_compiles(monkeypatch):
    monkeypatch.setattr(compare_training, "COMPILING", [])
    jax.jit(lambda x: jnp.sin(jnp.cos(x)))(jnp.ones(3))
    spans = compare_training.COMPILING
    assert spans
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))  # none twice


def test_a_table_of_one_seed_has_no_standard_deviation():
    entry = {
        "wanted": {"flops": 1},
        "batch": 4,
        "steps": [9],
        "policy": "exact",
        "c": 0.5,
        "of_reference": 0.25,
    }
    entry |= {"losses": [[3.0, 2.5]], "seconds": [[0.5, 1.25]], "flops": [[1, 2]], "of_bytes": 2}
    assert runs.mean_and_sd([2.5]) == (2.5, None)
    row = compare_report.table({"exact": entry}).splitlines()[-1]
    figures = "| 4 | 9 | 0.500 | 0.250 | 2.000 | 1.2 | 2.5000 | 1.00 | 1.00 |  |"
    assert row == f"| **`exact`** {figures}"


@pytest.fixture
def in_folder(tmp_path, monkeypatch, standard_promotion):
    """Its working directory has a text; the argument is the rest of a command."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("words.txt").write_text("a cat sat on a mat, and that was that. " * 400)

    def main(arguments):
        options = "transformer --text words.txt --layers 1 --heads 2 --sequence 16 --batches 1"
        compare.main([*options.split(), *arguments.split()])
        return read_results(tmp_path)

    return main


@pytest.mark.slow
def test_estimates_are_diagnosed_early_and_late(in_folder, capsys):
    subspace = "priority:ratio=1/4,memory=subspace,rank=4x4,refresh=4,steps=20"
    priority = "priority:ratio=1/4,steps=20"
    command = "--width 16 --batch 4 --steps 20 --diagnose --out out "
    command += f"--run {subspace} --run {priority}"
    results = in_folder(command)
    printed = capsys.readouterr().out
    assert "diagnostics" not in results["exact"]
    for step in ("2", "20"):
        better, worse = (results[run]["diagnostics"][step] for run in (subspace, priority))
        assert 0 < better["v"] < worse["v"]
        assert better["rule"] == pytest.approx((1 + better["error"] ** 2) * better["c"])
        assert f"| `{subspace}` | {step} | {better['error']:.3g} |" in printed
    layers = pathlib.Path("out/diagnostics.md").read_text()
    assert layers.count("| block_0/qkv/kernel |") == 4
    assert f"{subspace}, after 20 steps" in layers
    in_folder(command)  # with nothing left to train
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    "spelled",
    [
        pytest.param("control:every=100", marks=pytest.mark.examples),
        pytest.param("control:every=100,input_rank=32", marks=pytest.mark.slow),
    ],
)
def test_a_controlled_run(spelled, in_folder, capsys):
    """Exact until the first decision, then as it decided; all that it measured is counted."""
    results = in_folder(f"--width 32 --batch 16 --steps 100 --out out --run {spelled}")
    printed = capsys.readouterr().out
    entry, exact = results[spelled], results["exact"]
    first, *_ = entry["decisions"][0]
    assert first["step"] == 10
    assert set(first["v"]) == {"exact", "allocated at 10"}
    assert 0 < first["v"]["allocated at 10"] < 1
    one = exact["flops"][0][-1] / 100
    assert 98 * one < entry["flops"][0][-1] <= 100 * one
    measured = first["spent"] / one + 3  # in steps, with a part of what aop.allocate takes
    assert entry["steps"][0] < 10 + (90 - measured) / min(first["c"].values())
    assert f"| 10 | {first['choice']} | {first['noise']:.2f} |" in printed
    assert "Approximate: block_0/qkv/kernel (32 to 96)" in printed


@pytest.mark.slow
def test_fine_tuning_starts_where_training_ended(in_folder):
    command = "--width 16 --batch 4 --steps 60 --start-learning-rate 0.01 --run exact:steps=60"
    before = in_folder(f"{command} --learning-rate 0.01 --out out")
    shutil.rmtree("out")
    after = in_folder(f"{command} --learning-rate 1e-9 --out out --start 60")
    before, after = (results["exact"]["losses"][0] for results in (before, after))
    assert before[-1] < 0.9 * before[0]
    np.testing.assert_allclose(after, before[-1], rtol=1e-5)


@pytest.mark.slow
def test_flops_of_a_step_with_approximate_gradients_of_inputs(tmp_path, standard_promotion):
    """At width 1,024 with 2,048 rows, as XLA counts them."""
    spelled = "priority:ratio=1/8,memory=subspace,rank=8,input_ratio=1/4,input_rank=32"
    sizes = "transformer --width 1024 --heads 16 --layers 1 --batches 1"
    comparison = compare.parse_arguments([*sizes.split(), "--out", str(tmp_path), "--run", spelled])
    trainers = map(comparison.trainer, comparison.options.run)
    exact, ours = (trainer.step_cost(trainer.rules).flops for trainer in trainers)
    assert ours < 0.56 * exact


# ---- the page

PAGE = pathlib.Path(compare.__file__).parent / "results/compare.md"


def test_the_page_has_the_figures_of_its_results():
    """Each table is of the folder that its heading names, and has the best exact run in bold."""
    _, *sections = PAGE.read_text().split("\n### ")
    assert len(sections) >= 4
    for section in sections:
        folder, _, text = section.partition(":")
        (results,) = json.loads(
            (PAGE.parent / "compare" / folder / "results.json").read_text()
        ).values()
        rows = [
            [cell.strip() for cell in line[1:].split(" |")]
            for line in text.splitlines()
            if line.startswith(("| `", "| **`"))
        ]
        assert {row[0].strip("*`") for row in rows} == set(results)
        best = results[compare_report.best_exact(results)]
        for name, c, loss, less, flops, accessed, seconds, _ in rows:
            entry = results[name.strip("*`")]
            last = compare_report.last_losses(entry)
            digits = len(loss.split(" ")[0].partition(".")[2])
            assert loss == runs.cell(last, f".{digits}f")
            assert name.startswith("**") == (entry is best)
            differences = last - compare_report.last_losses(best)
            spelled = ", ".join(f"{x:+.{digits}f}" for x in differences)
            assert less == ("" if entry is best else spelled)
            assert flops == compare_report.share_until(entry, best, "flops")
            bytes_ = f"{entry['of_bytes'] / best['of_bytes']:.2f}" if "of_bytes" in entry else ""
            assert (accessed, c) == (bytes_, f"{entry['c']:.2f}")
            assert seconds == f"{np.mean(entry['seconds'], axis=0)[-1]:.0f}"
            assert 0.99 < entry["of_reference"] <= 1.001 or entry["wanted"]["bytes"]
