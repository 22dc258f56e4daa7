"""examples/quickstart.py, as a user runs it."""

import pathlib
import re
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "quickstart.py"


def quickstart(*arguments, cwd):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_it_trains_every_configuration_and_draws_the_curves(tmp_path):
    arguments = "--epochs 12 --seeds 2 --ratio 0.25 0.125 --learning-rate 0.1 --out curves.png"
    run = quickstart(*arguments.split(), cwd=tmp_path)
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
    assert len(rows) == 1 + 3 * 2 * 2
    exact_loss, exact_accuracy, exact_flops = rows["exact", "", ""]
    assert (exact_loss < 1, exact_accuracy > 0.8, exact_flops == 1) == (True, True, True)
    for policy in ("topk", "weightedk", "randk"):
        for ratio in ("0.25", "0.125"):
            with_memory, without = rows[policy, "yes", ratio], rows[policy, "no", ratio]
            assert without[2] < with_memory[2] < 1
            if (policy, ratio) != ("randk", "0.125"):
                assert with_memory[0] < without[0]
    assert rows["topk", "yes", "0.25"][0] == pytest.approx(exact_loss, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ratio 0", "argument --ratio: 0 is not between"),
        ("--ratio 1.5", "argument --ratio: 1.5 is not between"),
        ("--seeds 0", "argument --seeds: 0 is not between"),
        ("--batch-size 5000", "--batch-size 5000 is more than the 1437 training images"),
        ("--out missing/curves.png", "the folder missing does not exist"),
        ("--out curves", "end the name with .png"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    run = quickstart(*arguments.split(), cwd=tmp_path)
    assert run.returncode != 0
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_help(tmp_path):
    run = quickstart("--help", cwd=tmp_path)
    assert run.returncode == 0
    for option in ("--ratio", "--seeds", "--epochs", "--out"):
        assert option in run.stdout
