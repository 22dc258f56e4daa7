"""The blocks of Python in README and in the guides, and the examples in docstrings, run as written.

A comment follows each block: the assertion that holds once the block has run, after "slow:" where
the block takes long, after "needs haiku:" where it needs a package that may be missing.
`python tests/test_readme.py fast` runs the other blocks and the docstrings outside of `_analysis`,
`python tests/test_readme.py slow` the rest. They share a process, which like a user's has none of
the tests' flags; each block has a namespace of its own. mypy accepts the blocks.
"""

import doctest
import importlib.util
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import traceback

import pytest

import mem_aop_jax

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "examples").rglob("*.md"))]
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n"
    r"<!-- (?P<slow>slow: )?(?:needs (?P<needs>\w+): )?(?P<check>assert [^\n]*) -->\n",
    flags=re.DOTALL | re.MULTILINE,
)
BLOCKS = [(page, block) for page in PAGES for block in BLOCK.finditer(page.read_text())]


def first_line(block, part="code"):
    """Of a part of the block in its page, counted from 1."""
    return block.string.count("\n", 0, block.start(part)) + 1


def run_block(page, block):
    """Raises what the block raises, with a traceback that shows the page's lines."""
    namespace = {"__name__": "__main__"}
    for part in ("code", "check"):
        lines_above = "\n" * (first_line(block, part) - 1)
        exec(compile(lines_above + block[part], page, "exec"), namespace)


def main(slow):
    """The number of failures; doctest and the tracebacks print what they are."""
    failures = 0
    for page, block in BLOCKS:
        missing = block["needs"] and not importlib.util.find_spec(block["needs"])
        if bool(block["slow"]) == slow and not missing:
            print(f"{page.name}, line {first_line(block)}", flush=True)
            try:
                run_block(page, block)
            except Exception:
                traceback.print_exc(file=sys.stdout)
                failures += 1
    examples = 0
    for module in pkgutil.walk_packages(mem_aop_jax.__path__, "mem_aop_jax."):
        if ("._analysis" in module.name) == slow:
            result = doctest.testmod(importlib.import_module(module.name))
            failures += result.failed
            examples += result.attempted
    assert examples > 10
    return failures


@pytest.mark.parametrize("speed", ["fast", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_blocks_and_the_docstrings_run(speed):
    process = subprocess.run(
        [sys.executable, __file__, speed],
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr


def test_every_block_has_an_assertion():
    assert len(BLOCKS) == sum(page.read_text().count("\n```python\n") for page in PAGES)


@pytest.mark.examples
def test_mypy_accepts_the_blocks(tmp_path):
    """Its messages count lines as the pages do."""
    for page, block in BLOCKS:
        line = first_line(block)
        module = tmp_path / f"{page.stem}_line_{line}.py"
        module.write_text("\n" * (line - 1) + block["code"])
    mypy = subprocess.run(
        [sys.executable, "-m", "mypy", *tmp_path.iterdir()],
        cwd=ROOT,  # where pyproject.toml configures mypy
        capture_output=True,
        text=True,
    )
    assert mypy.returncode == 0, mypy.stdout + mypy.stderr


def test_the_first_example_has_ten_lines():
    assert len([line for line in BLOCKS[0][1]["code"].splitlines() if line.strip()]) == 10


def test_there_is_a_command_for_the_main_job_and_one_for_the_tests():
    text = README.read_text()
    (commands,) = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    main, tests = commands.splitlines()
    assert main.endswith("examples/quickstart.py")
    assert tests.endswith("-m pytest")


if __name__ == "__main__":
    sys.exit(main(slow=sys.argv[1] == "slow"))
