"""examples/reproduce_paper.py: the paper's protocol, its data, and the comparison."""

import functools
import gzip
import hashlib
import http.server
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import paper_data
import paper_report
import pooch
import pytest
import reproduce_paper
from task_data import idx

SCRIPT = pathlib.Path(reproduce_paper.__file__)
SHARED = pathlib.Path(__file__).parents[3] / "shared"


def reproduce(*arguments, cwd):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def write_energy(path, rows=768, header=None, **changes):
    """A csv in the format of the data set; `changes` are cells by (row, column)."""
    rng = np.random.default_rng(0)
    numbers = rng.uniform(1, 100, (rows, 10)).round(2)
    numbers[:, 5], numbers[:, 7] = rng.integers(2, 6, rows), rng.integers(0, 6, rows)
    cells = [[f"{cell:g}" for cell in row] for row in numbers]
    for (row, column), cell in changes.get("cells", {}).items():
        cells[row][column] = cell
    header = header or [
        *("Relative Compactness", "Surface Area", "Wall Area", "Roof Area", "Overall Height"),
        *("Orientation", "Glazing Area", "Glazing Area Distribution"),
        *("Heating Load", "Cooling Load"),
    ]
    path.write_text("\n".join(",".join(line) for line in [header, *cells]) + "\n")
    return numbers


def small_images(train=200, validation=100):
    """The contents of four IDX files, in which a class is where the bright pixels are."""
    rng, contents = np.random.default_rng(0), {}
    for prefix, rows in (("train", train), ("t10k", validation)):
        labels = rng.integers(0, 10, rows)
        pixels = rng.integers(0, 40, (rows, 10, 3))
        pixels[np.arange(rows), labels] += 200
        contents[f"{prefix}-images-idx3-ubyte"] = idx(pixels, paper_data.IMAGES)
        contents[f"{prefix}-labels-idx1-ubyte"] = idx(labels, paper_data.LABELS)
    return contents


@pytest.fixture
def folder(tmp_path):
    """Four small IDX files, two of them compressed."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, (name, content) in enumerate(small_images().items()):
        if i % 2:
            (folder / name).write_bytes(content)
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder


# ---- the protocol


def test_energy_is_prepared_as_the_paper_does(tmp_path):
    d = write_energy(tmp_path / "energy.csv")
    ours = paper_data.energy(tmp_path / "energy.csv")

    numbers = d[:, [0, 1, 2, 3, 4, 6]]
    numbers = (numbers - numbers[:576].mean(0)) / numbers[:576].std(0)
    one_hot = [d[:, [5]] == np.arange(2, 6), d[:, [7]] == np.arange(6)]
    x = np.concatenate([numbers, *one_hot], axis=1)
    np.testing.assert_allclose(np.concatenate([ours.train_x, ours.validation_x]), x, rtol=1e-5)
    np.testing.assert_allclose(ours.train_y, d[:576, 8:9], rtol=1e-6)
    np.testing.assert_allclose(ours.validation_y, d[576:, 8:9], rtol=1e-6)


def test_energy_with_the_short_names_of_uci(tmp_path):
    write_energy(tmp_path / "long.csv")
    write_energy(tmp_path / "short.csv", header=[f"X{i}" for i in range(1, 9)] + ["Y1", "Y2"])
    long, short = (paper_data.energy(tmp_path / name) for name in ("long.csv", "short.csv"))
    assert long.checksum() == short.checksum()


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_an_epoch_of_mnist_against_a_loop_in_numpy(folder, standard_promotion):
    """Double softmax, partial batches dropped, their rows in the denominators all the same."""
    data = paper_data.images("mnist", folder)
    experiment = reproduce_paper.EXPERIMENTS["mnist"]
    trainer = reproduce_paper.Trainer(experiment, None, data)
    state, key = trainer.init(jax.random.key(1)), jax.random.key(2)
    order = np.asarray(jax.random.permutation(key, 200))
    w, b = (np.asarray(state[0][name], np.float64) for name in ("kernel", "bias"))
    assert max(abs(w).max(), abs(b).max()) < 1 / 30**0.5 < 1.1 * abs(w).max()
    (after, _), ours = jax.jit(trainer.epoch)(state, key, jax.tree.map(jnp.asarray, data))

    def forward(pixels, labels):
        x = (pixels / 255 - 0.5) / 0.5
        z = x @ w + b
        s = softmax(z)
        losses = -np.log(softmax(s)[np.arange(len(x)), labels])
        return x, s, losses, z.argmax(1) == labels

    losses, correct = [], 0
    for batch in order[:192].reshape(3, 64):
        labels = data.train_y[batch]
        x, s, loss, hit = forward(data.train_x[batch], labels)
        losses.append(loss.mean())
        correct += hit.sum()
        ds = (softmax(s) - np.eye(10)[labels]) / 64
        g = s * (ds - (ds * s).sum(1, keepdims=True))
        w, b = w - 0.01 * x.T @ g, b - 0.01 * g.sum(0)
    _, _, validation, hit = forward(data.validation_x, data.validation_y)
    recall = [hit[data.validation_y == c].mean() for c in range(10)]
    expected = {
        "loss": np.mean(losses),
        "loss_val": validation[:64].mean(),
        "acc": correct / 200,
        "acc_val": hit[:64].sum() / 100,
        "learned": np.sum(np.array(recall) >= 0.1),
    }
    assert ours.keys() == expected.keys()
    np.testing.assert_allclose(after["kernel"], w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([*ours.values()], [expected[name] for name in ours], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "published.json").exists(), reason="needs the published figures")
def test_energy_as_published(tmp_path):
    """The mean of ten runs is where 99.9% of such means are; randk with memory fails at K = 3."""
    data = SHARED / "data/energy/energy_efficiency.csv"
    run = reproduce("energy", "--data", data, "--out", ".", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    ours = json.loads((tmp_path / "results.json").read_text())["energy"]
    published = json.loads((SHARED / "published.json").read_text())["energy"]
    assert len(ours) == 19 + 3
    outside = {
        (name, metric): summary
        for name, entry in published.items()
        for metric, interval in entry["acceptance"].items()
        for summary in [getattr(np, interval["stat"])(ours[name][metric]["runs"])]
        if not interval["lo10"] <= summary <= interval["hi10"]
    }
    assert not outside
    baseline, failed = (ours[name]["loss"] for name in ("baseline", "randk-mem-K3"))
    assert failed["mean"] > 1.3 * baseline["mean"]
    assert max(failed["runs"]) > 1.5 * min(failed["runs"])
    for k in (18, 9, 3):  # unbiased and without memory it is nearly exact, which randk is not
        control = ours[f"uniform-nomem-K{k}"]["loss"]["mean"]
        assert control < 1.1 * baseline["mean"] < ours[f"randk-nomem-K{k}"]["loss"]["mean"]


# ---- the command

SMALL = ("--runs", 2, "--epochs", 4)
ENERGY = ("energy", "--data", "energy.csv", "--k", 3, *SMALL, "--out", "out", "--policies")


def check_energy(printed, progress, folder, kinds):
    """The command wrote results of these kinds, a table and a figure."""
    assert "100%" in progress
    results = json.loads((folder / "out/results.json").read_text())["energy"]
    assert list(results) == ["baseline", *(f"{kind}-K3" for kind in kinds)]
    for metric in ("loss", "loss_val"):
        entry = results["topk-mem-K3"][metric]
        assert len(entry["runs"]) == 2
        assert len(entry["epoch_mean"]) == 4
        assert entry["mean"] == pytest.approx(np.mean(entry["runs"]))
        assert entry["std"] == pytest.approx(np.std(entry["runs"], ddof=1))
        assert entry["mean"] == pytest.approx(entry["epoch_mean"][-1])
        assert entry["epoch_mean"][-1] < entry["epoch_mean"][0]
    assert results["baseline"]["loss"]["mean"] < results["topk-nomem-K3"]["loss"]["mean"]

    table = (folder / "out/energy.md").read_text()
    assert table in printed + "\n"
    assert len(table.splitlines()) == 2 + len(results)
    assert (folder / "out/energy-K3.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("standard_promotion", "without_x64")
def test_energy_writes_results_a_table_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_energy(tmp_path / "energy.csv")
    reproduce_paper.main([*map(str, ENERGY), "topk"])
    check_energy(*capsys.readouterr(), tmp_path, ("topk-mem", "topk-nomem"))


@pytest.mark.examples
def test_the_command_writes_them_too(tmp_path):
    write_energy(tmp_path / "energy.csv")
    run = reproduce(*ENERGY, "topk", "uniform", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    check_energy(run.stdout, run.stderr, tmp_path, ("topk-mem", "topk-nomem", "uniform-nomem"))


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(folder, tmp_path):
    arguments = ("mnist", "--data", folder, "--k", 8, "--policies", "weightedk", *SMALL)
    whole = reproduce(*arguments, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr

    command = [sys.executable, str(SCRIPT), *map(str, arguments), "--out", "killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    killed = tmp_path / "killed/results.json"
    while not killed.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = json.loads(killed.read_text())["mnist"]
    assert "weightedk-nomem-K8" not in before
    resumed = reproduce(*arguments, "--out", "killed", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr

    ours, expected = (
        json.loads((tmp_path / name / "results.json").read_text())["mnist"]
        for name in ("killed", "whole")
    )
    assert all(ours[name] == entry for name, entry in before.items())  # not run again
    for entry in (*ours.values(), *expected.values()):
        del entry["seconds"]
    assert ours == expected

    other = reproduce(*arguments, "--out", "killed", "--seed", 1, cwd=tmp_path)
    assert other.returncode != 0
    assert "baseline was run with {'seed': 0}, now asked for with {'seed': 1}" in other.stderr


@pytest.mark.examples
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("iris", "invalid choice: 'iris'"),
        ("energy --dataset kmnist", "--dataset goes with mnist"),
        ("energy --k 145", "--k 145: must be between 1 and the 144 rows"),
        ("mnist --k 0", "--k 0: must be between 1 and the 64 rows"),
        ("mnist --runs 0", "--runs 0: must be at least 1"),
        ("mnist --policies best", "invalid choice: 'best'"),
        ("mnist --out /dev/null/x", "cannot be made"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        reproduce_paper.parse_arguments(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.examples
def test_bad_data_is_one_line_without_a_traceback(tmp_path):
    run = reproduce("energy", "--data", "none.csv", cwd=tmp_path)
    assert run.returncode != 0
    assert run.stderr.startswith("none.csv: cannot be read")
    assert "Traceback" not in run.stderr


# ---- bad data


@pytest.mark.examples
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 700}, "energy.csv: has 700 rows of data; the data set has 768"),
        ({"rows": 0}, "energy.csv: has 0 rows"),
        ({"header": ["A", "B"]}, "no columns are named 'relative compactness' or 'X1'"),
        ({"cells": {(5, 8): "warm"}}, "row 7: 'warm' in column 9 is no number"),
        ({"cells": {(5, 8): "nan"}}, "row 7: 'nan' in column 9 is no number"),
        (
            {"cells": {(3, 5): "6"}},
            "row 5: orientation is 6; it must be .* from 2 to 5",
        ),
        ({"cells": {(3, 7): "1.5"}}, "row 5: glazing area distribution is 1.5"),
    ],
)
def test_a_bad_csv(options, message, tmp_path):
    write_energy(tmp_path / "energy.csv", **options)
    with pytest.raises(paper_data.DataError, match=message):
        paper_data.energy(tmp_path / "energy.csv")


CONTENTS = {"empty": b"", "no text": b"\xff\xfe\x00\x00\x80", "compressed": gzip.compress(b"a,b")}


@pytest.mark.examples
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_file_that_is_no_csv(content, tmp_path):
    path = tmp_path / "energy.csv"
    path.write_bytes(content)
    with pytest.raises(paper_data.DataError, match=r"energy\.csv: "):
        paper_data.energy(path)


def change(folder, name, edit):
    (path,) = folder.glob(f"{name}*")
    path.write_bytes(edit(path.read_bytes()))


def compressed(edit):
    return lambda content: gzip.compress(edit(gzip.decompress(content)))


@pytest.mark.examples
@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("train-images", lambda b: b[:-100], r"images-idx3-ubyte\.gz: cannot be read"),
        ("train-images", lambda b: b"no gzip", r"images-idx3-ubyte\.gz: cannot be read"),
        ("train-images", compressed(lambda b: b[:-1]), "has 5999 bytes of data.*200 x 10 x 3"),
        ("train-images", compressed(lambda b: b[:7]), "has 7 bytes, too few for the header"),
        ("train-images", compressed(lambda b: b"\x00\x00\x0d\x03" + b[4:]), "number is 3331"),
        ("train-images", compressed(lambda b: idx(np.zeros((0, 9, 9)), 2051)), "0 x 9 x 9"),
        ("train-labels", lambda b: b + b"\x00", "has 201 bytes of data.*200"),
        ("train-labels", lambda b: b[:8] + b"\x0a" + b[9:], "has the label 10; labels are 0 to 9"),
        ("t10k-labels", lambda b: idx(np.zeros(99), 2049), "99 labels for the 100 images"),
        ("t10k-labels", lambda b: idx(np.zeros((100, 1, 1)), 2051), "number is 2051.*labels has"),
        ("t10k-images", compressed(lambda b: idx(np.zeros((100, 5, 5)), 2051)), r"\(5, 5\) pixels"),
    ],
)
def test_a_bad_idx_file(name, edit, message, folder):
    change(folder, name, edit)
    with pytest.raises(paper_data.DataError, match=message) as error:
        paper_data.images("mnist", folder)
    assert name in str(error.value)


@pytest.mark.examples
def test_a_missing_idx_file_is_named(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(paper_data.DataError, match=r"no file t10k-labels-idx1-ubyte or .*\.gz"):
        paper_data.images("mnist", folder)


# ---- downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine in place of the data sets' own; yields its folder."""
    served = tmp_path / "served"
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}/"
        sums = []
        for name, content in small_images().items():
            content = gzip.compress(content)
            (served / f"{name}.gz").write_bytes(content)
            sums.append(hashlib.md5(content).hexdigest())
        write_energy(served / "data.csv")
        monkeypatch.setitem(paper_data.SOURCES, "mnist", (address, *sums))
        monkeypatch.setattr(paper_data, "ENERGY_URL", f"{address}data.csv")
        monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
        yield served
        running.shutdown()


@pytest.mark.examples
def test_images_are_downloaded_once(server, folder):
    downloaded = paper_data.images("mnist")
    assert downloaded.checksum() == paper_data.images("mnist", folder).checksum()
    for path in server.iterdir():
        path.unlink()
    assert paper_data.images("mnist").checksum() == downloaded.checksum()  # from the cache


@pytest.mark.examples
def test_a_download_with_a_wrong_checksum_is_refused(server):
    change(server, "train-labels", lambda b: b + b"\x00")
    with pytest.raises(paper_data.DataError, match=r"train-labels-idx1-ubyte\.gz: .*hash"):
        paper_data.images("mnist")


@pytest.mark.examples
def test_energy_with_other_values_is_refused_and_not_kept(server, tmp_path, monkeypatch):
    with pytest.raises(paper_data.DataError, match="its values are not those of the data set"):
        paper_data.energy()
    assert not list((tmp_path / "cache").rglob("*.csv"))

    path = tmp_path / "energy.csv"
    values = write_energy(path)[:, :9]
    monkeypatch.setattr(paper_data, "ENERGY_SHA256", hashlib.sha256(values.tobytes()).hexdigest())
    assert paper_data.energy().checksum() == paper_data.energy(path).checksum()


@pytest.mark.examples
@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        (paper_data.energy, "--data energy.csv"),
        (functools.partial(paper_data.images, "mnist"), r"--data FOLDER, with train-images-idx3"),
    ],
)
def test_without_a_network_the_files_that_are_wanted_are_named(load, wanted, server):
    for path in server.iterdir():
        path.unlink()
    with pytest.raises(paper_data.DataError, match=f"cannot be downloaded .*{wanted}"):
        load()


@pytest.mark.examples
@pytest.mark.skipif(not SHARED.exists(), reason="needs the data set")
def test_the_checksum_of_energy_is_that_of_the_data_set(server, tmp_path):
    data = SHARED / "data/energy/energy_efficiency.csv"
    (server / "data.csv").write_bytes(data.read_bytes())
    assert paper_data.energy().checksum() == paper_data.energy(data).checksum()


# ---- the comparison


def entry(k=None, **runs):
    summaries = {
        name: {"mean": np.mean(r), "std": np.std(r, ddof=1), "runs": r, "epoch_mean": [2.0, 1.0]}
        for name, r in runs.items()
    }
    policy, memory = (None, None) if k is None else ("topk", True)
    return {"policy": policy, "memory": memory, "k": k, "rows": 144} | summaries


def test_the_table_compares_with_the_published_figures(tmp_path):
    results = {
        "baseline": entry(loss=[9.0, 10.0], loss_val=[8.0, 8.5]),
        "topk-mem-K18": entry(18, loss=[10.0, 12.0], loss_val=[9.0, 9.5]),
        "topk-mem-K9": entry(9, loss=[20.0, 21.0], loss_val=[9.0, 9.5]),
    }
    shown = paper_report.write("energy", results, tmp_path)
    rows = [line.strip("| ").split(" | ") for line in shown.splitlines()[2:5]]
    mean, sd = 9.47106, 0.07558  # published
    z = (11 - mean) / np.sqrt(2 / 2 + sd**2 / 10)
    ours, theirs = f"11.000 ± 1.414 ({11 / 9.5:.3f})", f"9.471 ± 0.076 ({mean / 9.52876:.3f})"
    assert rows[1][:4] == ["topk-mem-K18", ours, theirs, f"{z:+.1f}"]
    assert rows[2][1] == f"20.500 ± 0.707 ({20.5 / 9.5:.3f})"
    assert "9.471" not in "".join(rows[2])
    assert {path.name for path in tmp_path.iterdir()} == {
        "energy.md", "energy-K18.png", "energy-K9.png",
    }  # fmt: skip


def test_published_runs_by_classes_learned():
    """Known: of the published exact runs four learned all classes, six missed one."""
    results = {
        "baseline": entry(
            loss=[1.6] * 10,
            acc_val=[0.914] * 3 + [0.834] * 7,
            learned=[10] * 3 + [9] * 7,
        ),
        "topk-mem-K32": entry(32, loss=[1.6] * 10, acc_val=[0.914] * 10, learned=[10] * 10),
    }
    metrics = paper_report.METRICS["images"]
    rows = paper_report.table(metrics, results, paper_report.PUBLISHED["mnist"]).splitlines()[2:]
    for row, ours, theirs, p in (
        (rows[0], "3 x 10, 7 x 9", "4 x 10, 6 x 9", 1),
        (rows[1], "10 x 10", "6 x 10, 4 x 9", 0.087),  # Fisher's exact test
    ):
        cells = row.strip("| ").split(" | ")
        assert cells[-3:-1] == [ours, theirs]
        assert float(cells[-1]) == pytest.approx(p, abs=0.02)


def test_runs_at_other_levels_are_told_apart():
    assert paper_report.same_levels([10] * 10, [9] * 10) < 1e-4
    assert paper_report.same_levels([10] * 5 + [9] * 5, [10] * 4 + [9] * 6) == pytest.approx(1)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the published figures")
def test_the_published_figures_are_copied_right():
    everything = json.loads((SHARED / "published.json").read_text())
    two, five = ("mean", "std"), ("mean", "std", "min", "median", "max")
    for dataset, metrics in (
        ("energy", {"loss": two, "loss_val": two}),
        ("mnist", {"loss": two, "acc_val": five}),
    ):
        for name, copied in paper_report.PUBLISHED[dataset].items():
            entry = everything[dataset][name]
            assert list(copied) == [entry[m][s] for m, names in metrics.items() for s in names]


def test_the_double_softmax():
    outputs = np.array([[1.0, -2.0, 0.5]])
    ours = jax.jit(reproduce_paper.double_softmax_cross_entropy)(outputs, np.array([2]))
    np.testing.assert_allclose(ours, -np.log(softmax(softmax(outputs))[:, 2]), rtol=1e-6)
