"""examples/quickstart.py, as a user runs it."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_it_trains_every_configuration_and_draws_the_curves(tmp_path):
    arguments = "--epochs 12 --seeds 2 --ratio 0.25 --learning-rate 0.1 --out curves.png"
    command = [sys.executable, str(SCRIPT), *arguments.split()]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "100%" in run.stderr  # the progress bar

    figure = r"([\d.]+)"
    row = re.compile(
        rf"^(\w+) +(yes|no|) +([\d.]*) +{figure} ± {figure} +{figure} ± {figure}"
        rf" +{figure} M \({figure}\)$",
        flags=re.MULTILINE,
    )
    rows = {
        (policy, memory, ratio): (float(loss), float(accuracy), float(flops))
        for policy, memory, ratio, loss, _, accuracy, _, _, flops in row.findall(run.stdout)
    }
    assert len(rows) == 1 + 3 * 2
    exact_loss, exact_accuracy, exact_flops = rows["exact", "", ""]
    assert exact_loss < 1
    assert exact_accuracy > 0.8
    assert exact_flops == 1
    for policy in ("topk", "weightedk", "randk"):
        with_memory, without = rows[policy, "yes", "0.25"], rows[policy, "no", "0.25"]
        assert without[2] < with_memory[2] < 1  # FLOPs
        assert with_memory[0] < without[0]  # train loss
    assert rows["topk", "yes", "0.25"][0] == pytest.approx(exact_loss, rel=0.1)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
def test_bad_arguments(arguments, message, script, capsys):
    with pytest.raises(SystemExit) as error:
        script.main(arguments.split())
    assert error.value.code != 0
    assert message in capsys.readouterr().err + str(error.value)


def test_help(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--ratio", "--seeds", "--epochs", "--out"))
