"""examples/quickstart.py, as a user runs it."""

import pathlib
import re
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "quickstart.py"
ARGUMENTS = "--epochs 12 --seeds 2 --ratio 0.25 --learning-rate 0.1 --out curves.png"


@pytest.fixture
def quickstart():
    import quickstart  # here: the other tests need not wait for scikit-learn

    return quickstart


def check(printed, progress, folder, policies):
    """It trained all configurations, said what they cost, and drew their curves."""
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "100%" in progress

    figure = r"([\d.]+)"
    row = re.compile(
        rf"^(\w+) +(yes|no|) +([\d.]*) +{figure} ± {figure} +{figure} ± {figure}"
        rf" +{figure} M \({figure}\)$",
        flags=re.MULTILINE,
    )
    rows = {
        (policy, memory, ratio): (float(loss), float(accuracy), float(flops))
        for policy, memory, ratio, loss, _, accuracy, _, _, flops in row.findall(printed)
    }
    assert len(rows) == 1 + len(policies) * 2
    exact_loss, exact_accuracy, exact_flops = rows["exact", "", ""]
    assert exact_loss < 1
    assert exact_accuracy > 0.8
    assert exact_flops == 1
    for policy in policies:
        with_memory, without = rows[policy, "yes", "0.25"], rows[policy, "no", "0.25"]
        assert without[2] < with_memory[2] < 1  # FLOPs
        assert with_memory[0] < without[0]  # train loss
    assert rows["topk", "yes", "0.25"][0] == pytest.approx(exact_loss, rel=0.1)

    row = re.compile(
        rf"^(exact|topk, rows|priority, subspace) +{figure} ± {figure} +{figure} ± {figure}"
        rf" +{figure} M \({figure}\) +(\S+) +(\S+)$",
        flags=re.MULTILINE,
    )
    adam = {name: list(map(float, figures)) for name, *figures in row.findall(printed)}
    assert list(adam) == ["exact", "topk, rows", "priority, subspace"]
    exact, memory_of_rows, subspace = (figures[0] for figures in adam.values())  # train losses
    assert subspace == pytest.approx(exact, rel=0.1)
    assert memory_of_rows > 1.5 * exact  # why it is not the one to begin with
    assert all(ms > 0 for figures in adam.values() for ms in figures[-2:])


def test_the_verdict_follows_the_milliseconds(quickstart):
    small, wide = quickstart.Sizes(64, (128,), 128), quickstart.WIDE
    both = quickstart.verdict({small: [1.0, 9.0, 0.9], wide: [100.0, 9.0, 80.0]})
    assert "0.90 times as long as an exact one in the small network, 0.80 times" in both
    assert "In the small one it pays.\nIn the wide one it pays." in both
    usual = quickstart.verdict({small: [1.0, 0.1, 2.0], wide: [100.0, 1.0, 80.0]})
    assert "In the small one it does not pay" in usual
    assert "In the wide one it pays." in usual
    neither = quickstart.verdict({small: [1.0, 0.1, 2.0], wide: [100.0, 1.0, 99.0]})
    assert "Nor in the wide one" in neither


@pytest.mark.usefixtures("standard_promotion", "without_x64")
def test_it_trains_exactly_with_and_without_memory(quickstart, tmp_path, monkeypatch, capsys):
    """With one of the policies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "POLICIES", ("topk",))
    monkeypatch.setattr(quickstart, "WIDE", quickstart.Sizes(32, (64,), 128))
    quickstart.main(ARGUMENTS.split())
    check(*capsys.readouterr(), tmp_path, quickstart.POLICIES)


@pytest.mark.examples
def test_the_command_trains_every_configuration(tmp_path):
    command = [sys.executable, SCRIPT, *ARGUMENTS.split()]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    check(run.stdout, run.stderr, tmp_path, ("topk", "weightedk", "randk"))


@pytest.mark.examples
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ratio 0", "argument --ratio: 0 is not between"),
        ("--ratio 1.5", "argument --ratio: 1.5 is not between"),
        ("--ratio nan", "argument --ratio: nan is not between"),
        ("--seeds 0", "argument --seeds: 0 is not between"),
        ("--epochs many", "argument --epochs: invalid count value: 'many'"),
        ("--batch-size 5000", "--batch-size 5000 is more than the 1437 training images"),
        ("--out missing/curves.png", "the folder missing does not exist"),
        ("--out curves", "end the name with .png"),
    ],
)
def test_bad_arguments(arguments, message, quickstart, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        quickstart.main(arguments.split())
    assert error.value.code != 0
    assert message in capsys.readouterr().err + str(error.value)


@pytest.mark.examples
def test_help(quickstart, capsys):
    with pytest.raises(SystemExit, match="0"):
        quickstart.main(["--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--ratio", "--seeds", "--epochs", "--out"))
