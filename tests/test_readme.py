"""The README's code runs as written."""

import pathlib
import re
import subprocess
import sys

import pytest

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_the_first_example_has_ten_lines():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) == 10


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_code_runs(number):
    check = {
        0: "assert loss_fn(state.params) < 1e-3",
        1: "assert loss < 5 and prediction.shape == (1, 1)",
        2: "assert flops < 0.72 * exact_flops",
    }[number]
    run = subprocess.run([sys.executable, "-c", BLOCKS[number] + check], capture_output=True)
    assert run.returncode == 0, run.stderr.decode()


def test_there_is_a_command_for_the_main_job_and_one_for_the_tests():
    (commands,) = re.findall(r"^```sh\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    main, tests = commands.splitlines()
    assert main.endswith("examples/quickstart.py")
    assert tests.endswith("-m pytest")
