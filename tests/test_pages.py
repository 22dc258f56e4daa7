"""README, the guides and the pages of results: their blocks run as written, their links lead on.

A comment follows each block of Python: the assertion that holds once the block has run, after
"slow:" where the block takes long, after "needs haiku:" where it needs a package that may be
missing. `python tests/test_pages.py fast` runs the other blocks and the examples in docstrings
outside of `_analysis`, `python tests/test_pages.py slow` the rest. They share a process, which like
a user's has none of the tests' flags; each block has a namespace of its own. mypy accepts the
blocks.
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
import zlib

import pytest

import mem_aop_jax

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = sorted((ROOT / "examples" / "results").glob("*.md"))
PAGES = [README, *sorted((ROOT / "examples" / "guides").glob("*.md")), *RESULTS]
LINKED = [*PAGES, *sorted((ROOT / ".github").glob("*.md"))]
LINK = re.compile(r"\]\((?P<target>[^()\s]+)\)")
COMMAND = re.compile(
    r"^\.venv/bin/python examples/(?P<module>\w+)\.py(?P<arguments>[^#\n]*)", re.MULTILINE
)
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


def test_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 220
    assert len(text.split()) <= 2500


def test_there_is_a_command_for_the_main_job_and_one_for_the_tests():
    text = README.read_text()
    (commands,) = re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    main, tests = commands.splitlines()
    assert main.endswith("examples/quickstart.py")
    assert tests.endswith("-m pytest")


def anchors(page):
    """Of the page's headings, as GitHub and PyPI make them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_anchors_lead_somewhere():
    checked = 0
    for page in LINKED:
        for link in LINK.finditer(page.read_text()):
            file, _, anchor = link["target"].partition("#")
            if not file.startswith("https://"):
                target = (page.parent / file).resolve() if file else page
                assert target.is_relative_to(ROOT), (page, link["target"])
                assert target.exists(), (page, link["target"])
                assert not anchor or anchor in anchors(target), (page, link["target"])
                checked += 1
    assert checked > 50


def test_every_page_and_picture_is_linked():
    targets = {
        (page.parent / link["target"].partition("#")[0]).resolve()
        for page in LINKED
        for link in LINK.finditer(page.read_text())
    }
    pictures = (ROOT / "examples").rglob("*.png")
    assert {*PAGES[1:], *pictures} <= targets


def test_pages_of_results_begin_with_their_command():
    for page in RESULTS:
        title, empty, fence, command, *_ = page.read_text().splitlines()
        assert title.startswith("# ")
        assert (empty, fence) == ("", "```text")
        assert COMMAND.match(command), page


@pytest.mark.examples
@pytest.mark.usefixtures("standard_promotion", "without_x64")
def test_the_commands_on_the_pages_are_ones_that_the_examples_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the folders for results are made
    commands = [match for page in PAGES for match in COMMAND.finditer(page.read_text())]
    assert len(commands) >= len(RESULTS)
    for command in commands:
        module = importlib.import_module(command["module"])
        module.parse_arguments(command["arguments"].split())


def test_no_placeholder_stands_for_an_address():
    for page in LINKED:
        assert "OWNER" not in page.read_text()


@pytest.mark.examples
def test_the_reference_has_every_public_name(tmp_path):
    """And Sphinx builds it without a warning."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    sphinx = subprocess.run(
        [*command, ROOT / ".github" / "reference", tmp_path], capture_output=True, text=True
    )
    assert sphinx.returncode == 0, sphinx.stdout + sphinx.stderr
    entries = zlib.decompress((tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4])
    documented = {line.split()[0] for line in entries.decode().splitlines()}
    modules = mem_aop_jax, mem_aop_jax.linen, mem_aop_jax.nnx
    public = {f"{module.__name__}.{name}" for module in modules for name in module.__all__}
    assert public <= documented


if __name__ == "__main__":
    sys.exit(main(slow=sys.argv[1] == "slow"))
