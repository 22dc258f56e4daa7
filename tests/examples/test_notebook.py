"""examples/colab_tpu.ipynb, run from top to bottom, and the file itself."""

import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys

import pytest

pytestmark = [
    pytest.mark.examples,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("nbclient", "ipykernel"))),
        reason="nbclient and ipykernel are not installed",
    ),
]
PATH = pathlib.Path(__file__).parents[2] / "examples" / "colab_tpu.ipynb"
DEVICES, ROWS, RANK = 4, 128, 8
SIZES = (64, 128), (128, 128), (128, 10)  # of the layers; the last stays exact


@pytest.fixture
def notebook():
    import nbformat  # here: the other tests need not wait for it

    return nbformat.read(PATH, as_version=4)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a notebook with this interpreter on the CPU; returns the output of each code cell."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # no settings of the user's
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # the notebook asks for four devices itself
    monkeypatch.delenv("MPLBACKEND", raising=False)

    def run(notebook):
        specs = KernelSpecManager(kernel_dirs=[])  # only the one of this interpreter is left
        kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
        assert kernel.kernel_spec.argv[0] == sys.executable
        where = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(notebook, km=kernel, timeout=300, resources=where).execute()
        return {cell.id: printed(cell) for cell in code_cells(notebook)}

    return run


@pytest.fixture
def install(notebook, tmp_path, monkeypatch):
    """Runs the first cell in a folder, without the library; returns what it asks pip for."""
    from IPython.core.inputtransformer2 import TransformerManager
    from IPython.utils.text import DollarFormatter

    (cell,) = (cell for cell in code_cells(notebook) if cell.id == "install")
    code = TransformerManager().transform_cell(cell.source)  # %pip becomes a call

    def install(folder, works=True, jax_after=None):
        asked = []

        class Shell:
            def run_line_magic(self, magic, line):
                assert magic == "pip"
                asked.append(DollarFormatter().vformat(line, [], variables))

        def find_spec(name):
            assert name == "mem_aop_jax"
            return "found" if asked and works else None

        def version(name):
            assert name == "jax"
            return jax_after if asked and jax_after else "0.7.2"

        variables = {"get_ipython": Shell}
        folder.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(importlib.util, "find_spec", find_spec)
            patch.setattr(importlib.metadata, "version", version)
            exec(code, variables)
        (line,) = asked
        return line

    return install


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    outputs = (output for output in cell.outputs if output.output_type == "stream")
    return "".join(output.text for output in outputs if output.name == "stdout")


def table(text):
    """The figures of each row, by its name; None where one is not reported."""
    rows = {}
    for line in text.splitlines()[1:]:
        name, *cells = re.split(r" {2,}", line.strip())
        rows[name] = [None if cell == "not reported" else float(cell) for cell in cells]
    return rows


def a_clone(folder):
    (folder / "mem_aop_jax").mkdir()
    (folder / "pyproject.toml").touch()
    return folder


def test_it_runs_from_top_to_bottom_and_shows_what_it_says(notebook, run):
    shown = run(notebook)
    version = importlib.metadata.version("jax")
    assert "mem_aop_jax is installed already" in shown["install"]
    assert f"jax was {version} and is now {version}" in shown["install"]
    assert shown["devices"].count("CpuDevice") == 2 * DEVICES

    for layer, (inputs, outputs) in enumerate(SIZES):
        name, is_last = f"params/Dense_{layer}/kernel", layer == len(SIZES) - 1
        (line,) = (line for line in shown["approximate"].splitlines() if f"| {name} |" in line)
        assert f"| {ROWS} | {inputs} | {outputs} |" in line
        assert line.endswith("| no: a rule |" if is_last else "| yes |")
        directions = f"directions of {name} ({inputs}, {RANK}) ({outputs}, {RANK})\n"
        assert (directions in shown["approximate"]) == (not is_last)

    runs = table(shown["compare"])
    gradients = "exact", "subspace", "rows"
    assert list(runs) == [f"{o}, {gradient}" for o in ("SGD", "Adam") for gradient in gradients]
    for optimizer, rows_do_harm in (("SGD", False), ("Adam", True)):
        exact, subspace, rows = (runs[f"{optimizer}, {gradient}"] for gradient in gradients)
        assert exact[0] < 0.3
        assert exact[1] > 0.9
        close = [pytest.approx(exact[0], rel=0.15), pytest.approx(exact[1], abs=0.02)]
        assert subspace == close
        assert rows[0] > 2 * exact[0] if rows_do_harm else rows == close

    (plot,) = (cell for cell in code_cells(notebook) if cell.id == "plot")
    assert ["image/png" in output.get("data", {}) for output in plot.outputs] == [True]

    device, _, *timed = shown["time"].splitlines()
    assert device == "milliseconds of a step on cpu"
    for line, layers in zip(timed, ("64-128-128-10", "1024-2048-2048-10"), strict=True):
        _, name, exact, subspace, relative = line.split()
        assert name == layers
        assert float(relative) == pytest.approx(float(subspace) / float(exact), rel=0.1)

    runs = table(shown["agree"])
    for name, unsharded in (("subspace, Adam", "Adam, subspace"), ("rows, SGD", "SGD, rows")):
        sharded, alone = (runs.pop(f"{name}, {on}") for on in (f"{DEVICES} devices", "1 device"))
        assert sharded[2] == 0
        assert alone == [
            pytest.approx(sharded[0], rel=0.01),
            pytest.approx(sharded[1], abs=0.01),
            pytest.approx(0, abs=2e-2),  # other keys: some 1e-1
        ]
        assert sharded[0] == pytest.approx(table(shown["compare"])[unsharded][0], rel=0.15)
    assert not runs

    approximate = SIZES[:-1]
    subspace, rows = (  # bytes; 4 of them a flag's
        sum(4 * count * (a + b) + 4 for a, b in approximate) for count in (RANK, ROWS // DEVICES)
    )
    parameters = sum(4 * (a * b + b) for a, b in SIZES)
    device = [subspace, rows, parameters, None]
    assert list(table(shown["memory"]).values()) == [device] * DEVICES


def test_it_installs_from_the_clone_or_a_wheel_and_says_what_to_do_without(install, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pip wheel --no-deps \.") as error:
        install(tmp_path / "empty")
    assert f"to {tmp_path / 'empty'}" in str(error.value)

    folder = tmp_path / "with wheels"
    folder.mkdir()
    wheels = [folder / f"mem_aop_jax-0.{minor}.0-py3-none-any.whl" for minor in (9, 10)]
    for seconds, wheel in enumerate(wheels):
        wheel.touch()
        os.utime(wheel, (seconds, seconds))  # the second is newer
    assert install(folder) == f'install -q "{wheels[1]}[examples]"'

    assert install(a_clone(tmp_path) / "examples") == f'install -q "{tmp_path}[examples]"'


def test_it_says_when_pip_fails_or_changes_jax(install, tmp_path):
    folder = a_clone(tmp_path) / "examples"
    with pytest.raises(AssertionError, match="pip could not install it"):
        install(folder, works=False)
    with pytest.raises(AssertionError, match=r"jax was 0\.7\.2 and is now 0\.8\.0"):
        install(folder, jax_after="0.8.0")


def test_the_file_has_no_outputs_and_its_code_compiles(notebook):
    import nbformat
    from IPython.core.inputtransformer2 import TransformerManager

    nbformat.validate(notebook)
    assert PATH.read_text() == nbformat.writes(notebook) + "\n"  # hence a diff is readable
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None
        code = TransformerManager().transform_cell(cell.source)
        compile(code, cell.id, "exec")


@pytest.mark.parametrize("word", ["owner", "github", "badge", "git+"])
def test_it_points_at_no_address_of_the_repository(word):
    assert word not in PATH.read_text().lower()
