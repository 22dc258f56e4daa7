"""examples/colab_tpu.ipynb, run from top to bottom, and the file itself."""

import importlib.metadata
import importlib.util
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
ROOT = pathlib.Path(__file__).parents[2]
PATH = ROOT / "examples" / "colab_tpu.ipynb"
DEVICES, ROWS, SIZES = 4, 128, ((64, 128), (128, 10))  # of the layers


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


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    outputs = (output for output in cell.outputs if output.output_type == "stream")
    return "".join(output.text for output in outputs if output.name == "stdout")


def table(text):
    """The figures of each row, by its name; None where one is not reported."""
    rows = {}
    for line in text.splitlines()[1:]:
        name, *cells = re.split(r" {2,}", line.removesuffix(" M"))
        rows[name] = [None if cell == "not reported" else float(cell) for cell in cells]
    return rows


def test_it_runs_from_top_to_bottom_and_shows_what_it_says(notebook, run):
    shown = run(notebook)
    version = importlib.metadata.version("jax")
    assert "mem_aop_jax is installed already" in shown["install"]
    assert f"jax was {version} and is now {version}" in shown["install"]
    assert shown["devices"].count("CpuDevice") == 2 * DEVICES

    for layer, (in_features, out_features) in enumerate(SIZES):
        sizes = f"rows={ROWS}, in_features={in_features}, out_features={out_features}, k=32"
        assert f"Layer(path='Dense_{layer}', {sizes})" in shown["wrap"]
        assert f"memory ['Dense_{layer}']['kernel'].inputs ({ROWS}, {in_features})" in shown["wrap"]

    runs = table(shown["compare"])
    assert list(runs) == ["exact", "memory", "no memory"]
    (exact, accuracy, flops), with_memory, without = runs.values()
    assert exact < 0.5
    assert accuracy > 0.85
    assert with_memory[:2] == [pytest.approx(exact, rel=0.1), pytest.approx(accuracy, abs=0.05)]
    assert without[0] > 2 * exact
    assert without[2] < with_memory[2] < 0.85 * flops

    (plot,) = (cell for cell in code_cells(notebook) if cell.id == "plot")
    assert ["image/png" in output.get("data", {}) for output in plot.outputs] == [True]

    runs = table(shown["agree"])
    assert list(runs) == [f"{DEVICES} devices", f"1 device, groups={DEVICES}", "1 device"]
    sharded, grouped, without_groups = runs.values()
    assert sharded[2] == 0
    assert grouped[:2] == [pytest.approx(sharded[0], rel=1e-3), pytest.approx(sharded[1], abs=0.01)]
    assert grouped[2] < 1e-4
    assert without_groups[:2] == with_memory[:2]
    assert without_groups[0] == pytest.approx(sharded[0], rel=0.1)
    assert without_groups[2] > 1e-3

    memory = sum(4 * ROWS // DEVICES * (a + b) + 4 for a, b in SIZES)  # bytes; 4 of them a flag's
    parameters = sum(4 * (a * b + b) for a, b in SIZES)
    device = [memory, parameters, 4, None]
    assert list(table(shown["memory"]).values()) == [device] * DEVICES


def test_the_file_has_no_outputs_and_its_code_compiles(notebook):
    import nbformat
    from IPython.core.inputtransformer2 import TransformerManager

    nbformat.validate(notebook)
    assert PATH.read_text() == nbformat.writes(notebook) + "\n"  # hence a diff is readable
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None
        code = TransformerManager().transform_cell(cell.source)  # %pip becomes a call
        compile(code, cell.id, "exec")


def test_the_badge_opens_the_repository_that_is_installed(notebook):
    text = "\n".join(cell.source for cell in notebook.cells)
    path = PATH.relative_to(ROOT).as_posix()
    (badge,) = re.findall(r"colab\.research\.google\.com/github/([\w./-]+?)/blob/([\w./-]+)", text)
    (install,) = re.findall(r'git\+https://github\.com/([\w./-]+)"', text)
    assert badge == (install, f"main/{path}")
    assert "/".join((install, "blob", f"main/{path}")) in (ROOT / "README.md").read_text()
