"""examples/deep_mlp.py, and how examples/runs.py spells runs."""

import json
import shutil

import deep_mlp
import jax
import jax.numpy as jnp
import numpy as np
import paper_data
import pytest
import runs
from tqdm import tqdm

APPROXIMATE = "priority:ratio=1/4"
SIZES = {"--batch": 64, "--epochs": 20, "--seeds": 2}
SMALL = ["--dataset", "mnist", *(str(word) for option in SIZES.items() for word in option)]
BOTH = ("--run", "exact", "--run", APPROXIMATE, "--optimizer", "sgd", "--optimizer", "adam")
pytestmark = pytest.mark.usefixtures("standard_promotion")


def write_images(folder, train=200, test=100):
    """Four small IDX files, in which a class is where the bright pixels are."""
    rng = np.random.default_rng(0)
    for prefix, images in (("train", train), ("t10k", test)):
        labels = rng.integers(0, 10, images)
        pixels = rng.integers(0, 40, (images, 10, 3))
        pixels[np.arange(images), labels] += 200
        for name, magic, array in (
            ("images-idx3", paper_data.IMAGES, pixels),
            ("labels-idx1", paper_data.LABELS, labels),
        ):
            header = np.array([magic, *array.shape], ">u4").tobytes()
            content = header + array.astype(np.uint8).tobytes()
            (folder / f"{prefix}-{name}-ubyte").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def data(folder):
    return paper_data.images("mnist", folder)


@pytest.fixture(scope="module", autouse=True)
def narrow():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deep_mlp, "HIDDEN", (64,))
        yield


def train(folder, out, *arguments):
    deep_mlp.main([*SMALL, "--data", str(folder), "--out", str(out), *map(str, arguments)])
    return json.loads((out / "results.json").read_text())["mnist"]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """The folder that an uninterrupted command left, and its results."""
    out = tmp_path_factory.mktemp("trained")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return out, train(folder, out, *BOTH)


# ---- results and table


def test_every_run_with_every_optimizer(trained):
    out, results = trained
    cells = [[f"{run} {optimizer}" for optimizer in ("sgd", "adam")] for run in BOTH[1:4:2]]
    assert list(results) == [*cells[0], *cells[1]]
    for entry in results.values():
        assert len(entry["losses"]) == len(entry["accuracies"]) == len(entry["seconds"]) == 2
        assert entry["losses"][0] != entry["losses"][1]
        assert max(entry["losses"]) < 2 < np.log(10)  # it learns
    assert results["exact sgd"]["optimizer"] == {"learning_rate": 0.05}

    lines = (out / "results.md").read_text().splitlines()
    assert [line.strip("| ").split(" | ") for line in lines[:4]] == [
        ["run", "sgd", "adam"],
        ["---", "---:", "---:"],
        ["`exact`", *(shown(results[name]) for name in cells[0])],
        [f"`{APPROXIMATE}`", *(shown(results[name]) for name in cells[1])],
    ]
    assert "on mnist after 20 epoch(s) in batches of 64; 2 seed(s)" in lines[-1]


def shown(entry):
    return " / ".join(
        f"{np.mean(entry[key]):.4f} ± {np.std(entry[key], ddof=1):.4f}"
        for key in ("losses", "accuracies")
    )


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.5], "1.5000 / 0.5000"),
        ([2.0, 2.5], "2.2500 ± 0.3536 / 0.5000 ± 0.0000"),
        ([1.0, float("nan")], "diverges (1 of 2)"),
        ([1.0, 2.51, 2.0], "diverges (1 of 3)"),
        ([float("inf"), 3.0], "diverges"),
    ],
)
def test_cells(losses, expected):
    assert deep_mlp.cell(losses, [0.5] * len(losses)) == expected


# ---- going on


def test_a_stopped_run_goes_on_where_it_was(trained, folder, tmp_path, monkeypatch):
    _, whole = trained
    stopped, missing = "exact adam", f"{APPROXIMATE} sgd"
    left = json.loads(json.dumps(whole))
    del left[missing]
    for key in ("losses", "accuracies", "seconds"):
        del left[stopped][key][1:]  # after its first seed
    (tmp_path / "results.json").write_text(json.dumps({"mnist": left}))
    seeds, original = [], deep_mlp.Trainer.train

    def counted(self, seed, *args):
        seeds.append(seed)
        return original(self, seed, *args)

    monkeypatch.setattr(deep_mlp.Trainer, "train", counted)
    resumed = train(folder, tmp_path, *BOTH)
    assert seeds == [1, 0, 1]
    for results in (resumed, whole := json.loads(json.dumps(whole))):
        for name in (stopped, missing):
            assert len(results[name].pop("seconds")) == 2
    assert resumed == whole


def test_fewer_seeds_show_fewer(trained, folder, tmp_path, capsys):
    out, results = trained
    shutil.copy(out / "results.json", tmp_path)
    arguments = ("--run", "exact", "--optimizer", "adam", "--seeds", 1)
    assert train(folder, tmp_path, *arguments) == results
    entry, printed = results["exact adam"], capsys.readouterr()
    row = f"| `exact` | {entry['losses'][0]:.4f} / {entry['accuracies'][0]:.4f} |"
    assert row in printed.out.splitlines()
    assert (tmp_path / "results.md").read_text() in printed.out
    assert "100%" in printed.err  # the progress bar


def test_results_of_other_settings_are_refused(trained, folder):
    out, _ = trained
    with pytest.raises(SystemExit, match=r"exact sgd was run with {'epochs': 20}, now asked for"):
        train(folder, out, *BOTH, "--epochs", 3)


# ---- training


def test_all_runs_of_a_seed_start_alike_and_read_the_same_batches(data, monkeypatch):
    """Seen by the steps that a whole training makes."""
    starts, batches = {}, {}

    def record(self, data, state, batch):
        def see(params, indices):
            starts.setdefault(name, params)
            batches.setdefault(name, []).append(np.array(indices))

        jax.debug.callback(see, state[0], batch[0])
        return state, None

    monkeypatch.setattr(deep_mlp.Trainer, "step", record)
    on_device = jax.tree.map(jnp.asarray, data)
    for name in ((0, "exact", "sgd"), (0, APPROXIMATE, "adam"), (1, "exact", "sgd")):
        seed, run, optimizer = name
        trainer = deep_mlp.Trainer(runs.parse(run).config, optimizer, 64, 30)
        trainer.train(seed, on_device, 2, tqdm(disable=True))
        jax.effects_barrier()
    exact, approximate, other = (np.stack(seen).reshape(2, 3 * 64) for seen in batches.values())
    np.testing.assert_array_equal(exact, approximate)
    for epoch in exact:
        assert len(set(epoch)) == 192  # no image twice
    assert (exact[0] != exact[1]).any()
    assert (exact != other).any()
    same, alike, differs = (jax.tree.leaves(params) for params in starts.values())
    for a, b in zip(same, alike, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(same, differs, strict=True))


def test_runs_differ_by_their_gradients_alone(trained, folder, tmp_path):
    _, results = trained
    every_row = "topk:ratio=1,memory=none"
    new = train(folder, tmp_path, "--run", every_row, "--optimizer", "adam", "--seeds", 1)
    exact, other = (results[f"{run} adam"]["losses"][0] for run in ("exact", APPROXIMATE))
    assert new[f"{every_row} adam"]["losses"] == pytest.approx([exact], rel=1e-4)
    assert other != pytest.approx(exact, rel=1e-3)


def test_training_against_a_loop_in_numpy(data):
    """And the table's figures: of all training images, partial batches too, and of the test."""
    trainer = deep_mlp.Trainer(None, "momentum", 64, 30)
    ours = trainer.train(3, jax.tree.map(jnp.asarray, data), 2, tqdm(disable=True))

    init_key, order_key, _ = jax.random.split(jax.random.key(3), 3)
    layers = deep_mlp.first_params(init_key, jnp.zeros((1, 30), jnp.float32))
    names = [("Dense_0", "kernel"), ("Dense_0", "bias"), ("Dense_1", "kernel"), ("Dense_1", "bias")]
    params = [np.asarray(layers[layer][name], np.float64) for layer, name in names]
    velocities = [0.0] * 4

    def forward(pixels):
        x = pixels / 127.5 - 1
        hidden = np.maximum(x @ params[0] + params[1], 0)
        z = hidden @ params[2] + params[3]
        z -= z.max(axis=1, keepdims=True)
        return x, hidden, z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    for epoch in range(2):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(order_key, epoch), 200))
        for batch in order[:192].reshape(3, 64):
            x, hidden, log_p = forward(data.train_x[batch])
            g = (np.exp(log_p) - np.eye(10)[data.train_y[batch]]) / 64
            g_hidden = g @ params[2].T * (hidden > 0)
            grads = [x.T @ g_hidden, g_hidden.sum(0), hidden.T @ g, g.sum(0)]
            velocities = [0.9 * v + grad for v, grad in zip(velocities, grads, strict=True)]
            params = [p - 0.01 * v for p, v in zip(params, velocities, strict=True)]
    loss = -forward(data.train_x)[2][np.arange(200), data.train_y].mean()
    right = forward(data.validation_x)[2].argmax(axis=1) == data.validation_y
    np.testing.assert_allclose(ours, (loss, right.mean()), rtol=1e-5)


# ---- the command


@pytest.mark.examples
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "argument --epochs: 0 is not between 1"),
        ("--seeds many", "argument --seeds: invalid count value: 'many'"),
        ("--optimizer lion", "invalid choice: 'lion'"),
        ("--dataset iris", "invalid choice: 'iris'"),
        ("--run best:ratio=1/4", "argument --run: best:ratio=1/4: MemAOP got policy='best'"),
        ("--run topk", "argument --run: topk: MemAOP got k=None and ratio=None"),
        ("--run topk:ratio", "'ratio' is not NAME=VALUE"),
        ("--run topk:k=1,k=2", "k is given twice"),
        ("--run exact:ratio=1/4", "exact:ratio=1/4: exact takes nothing, not ratio"),
        ("--run exact:batch=8", "exact takes nothing, not batch"),
        ("--run topk:k=65,memory=none", "k=65 outer products asked of a batch of 64"),
        ("--out /dev/null/x", "--out /dev/null/x: cannot be made"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        deep_mlp.parse_arguments([*SMALL, "--out", str(tmp_path), *arguments.split()])
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert ": error: " in error


@pytest.mark.examples
@pytest.mark.parametrize(
    ("images", "message"), [(63, ": has 63 images; a batch has 64"), (0, "has no file train-")]
)
def test_bad_data_is_one_line(images, message, tmp_path):
    if images:
        write_images(tmp_path, images)
    with pytest.raises(SystemExit, match=message) as error:
        train(tmp_path, tmp_path / "out", "--run", "exact")
    assert "\n" not in str(error.value)


def test_the_defaults(tmp_path):
    options = deep_mlp.parse_arguments(["--out", str(tmp_path)])
    assert [run.name for run in options.run] == list(deep_mlp.DEFAULT_RUNS)
    assert options.optimizer == ["sgd", "momentum", "adam"]
    assert (options.dataset, options.batch, options.epochs) == ("fashion-mnist", 256, 3)
    rows = {run.config.selected_rows(256, "") for run in options.run if run.config}
    assert rows == {32, 8}
