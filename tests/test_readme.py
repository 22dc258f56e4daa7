"""The code in the README and in the docstrings runs as written."""

import pathlib
import re
import subprocess
import sys

import pytest

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


DOCTESTS = """
import doctest, importlib, pkgutil, mem_aop_jax
names = [module.name for module in pkgutil.walk_packages(mem_aop_jax.__path__, "mem_aop_jax.")]
results = [doctest.testmod(importlib.import_module(name)) for name in names]
assert sum(r.attempted for r in results) > 10 and not any(r.failed for r in results), results
"""


def run(code):
    """In a new process, as in a user's: without the flags of the tests."""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


def test_the_docstrings():
    run(DOCTESTS)


def test_the_first_example_has_ten_lines():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) == 10


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_code_runs(number):
    check = [
        "assert loss_fn(state.params) < 1e-3",
        "assert loss < 5 and prediction.shape == (1, 1)",
        "assert layer.k == 32 and y.shape == (1, 16, 32)\n"
        "assert loss_fn(state.params) < loss_fn(variables)",
        "",
        "assert losses[-1] < 0.1 * losses[0] and prediction.shape == (1, 1)",
        "assert abs(kernel).max() > 0 and memory.uses == 1",
        "assert aop.get_memory(opt_state)['memory'].inputs.sharding.is_equivalent_to(rows, 2)",
        "assert aop.get_memory(opt_state)['memory'].inputs.shape == (256, 16)",
        "assert set(found.layers) == {'layers_0', 'layers_2'} and 0 < log['v'] < 1",
        "assert found.c <= 0.7 and found.v < 1 and len(found.rules) == 3",
        "assert len(controller.log) == 2 and 0 < controller.log[-1].v['narrow'] < 1",
        "assert [p.layer.path for p in plan.layers] == ['layers_0', 'layers_2', 'layers_4']\n"
        "assert not plan.layers[2].gains",
    ][number]
    run(BLOCKS[number] + check)


def test_there_is_a_command_for_the_main_job_and_one_for_the_tests():
    (commands,) = re.findall(r"^```sh\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    main, tests = commands.splitlines()
    assert main.endswith("examples/quickstart.py")
    assert tests.endswith("-m pytest")
