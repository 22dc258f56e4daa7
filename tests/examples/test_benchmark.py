"""The benchmark measures what it says, in a table, a CSV and a figure."""

import csv
import functools
import importlib.util
import itertools
import os
import pathlib
import subprocess
import sys

import benchmark
import benchmark_steps as steps
import gpu_estimate
import jax
import numpy as np
import pytest
import timing

import mem_aop_jax as aop

EXAMPLES = pathlib.Path(benchmark.__file__).parent


pytestmark = pytest.mark.usefixtures("standard_promotion")


def read_rows(folder, command):
    assert (folder / f"{command}.png").stat().st_size > 1000
    with (folder / f"{command}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("sizes", "ratios"),
    [
        ([64], ["1/8"]),  # on a device whose rates are given
        pytest.param([64, 128], ["1/4", "1/8"], marks=pytest.mark.examples),
    ],
)
def test_layers(sizes, ratios, tmp_path, monkeypatch, capsys):
    if len(sizes) == 1:
        rates = aop.Rates("some", 1e11, 1e11, 1e10)
        monkeypatch.setattr(aop, "cost", functools.partial(aop.cost, rates=rates))
    arguments = f"--rows {' '.join(map(str, sizes))} --ratio {' '.join(ratios)} --rounds 2"
    runs = [word for run in benchmark.LAYER_RUNS[1::3] for word in ("--run", run)]
    features = ["--in-features", "32", "--out-features", "16"]
    benchmark.main(["layer", *arguments.split(), *features, *runs, "--out", str(tmp_path)])
    rows = read_rows(tmp_path, "layer")
    assert len(rows) == len(sizes) * (1 + 2 * len(ratios))
    assert sum("memory=rows" in row["run"] for row in rows) == len(sizes) * len(ratios)
    assert sum("memory=subspace,input_ratio=1/8" in row["run"] for row in rows) == len(sizes)
    exact, *others = rows[: len(rows) // len(sizes)]
    assert exact["run"] == "exact"
    assert float(exact["speed"]) == 1
    assert exact["ceiling"] == ""
    for row in others:
        ratio = float(row["speed"]) / float(row["ceiling"])
        assert ratio == pytest.approx(float(row["of it"]))
        assert float(row["ms"]) > 0
        assert float(row["predicted"]) > 0
        has_memory = "memory=rows" in row["run"] or "subspace" in row["run"]
        assert (float(row["MB of memory"]) > 0) == has_memory
    printed = capsys.readouterr().out
    assert ("| run | rows | ms |" if len(sizes) > 1 else "| run | ms |") in printed
    assert "in_features 32, out_features 16" in printed
    near = [
        0.85 <= float(r["predicted"]) / float(r["speed"]) <= 1.15 for r in rows if r["predicted"]
    ]
    assert f"predicted within 15%: {sum(near)} of {len(near)}" in printed


@pytest.mark.parametrize(("passes", "number"), [("both", 3), ("forward", 1), ("backward", 2)])
def test_the_exact_step_computes_the_products(passes, number):
    sizes = steps.Sizes(64, 32, 16, "float32")
    inputs = steps.layer_inputs(sizes)
    exact, products = (
        step.function(*step.args, jax.random.key(0), step.state)[1]
        for step in (
            steps.layer_step(None, sizes, inputs, passes),
            steps.products_step(64, 64, inputs, passes),
        )
    )
    for a, b in zip(exact, products, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-10)
    assert len(exact) == number


def test_overhead_is_beside_the_products_of_chosen_rows():
    sizes = steps.Sizes(4096, 2048, 2048, "float32")
    none = steps.overhead(aop.MemAOP(ratio=1 / 8, memory=None), sizes)
    beside = steps.overhead(
        aop.MemAOP(ratio=1 / 8, policy="priority", memory="subspace", rank=16), sizes
    )
    assert 0 <= none < 0.002 < beside < 0.05


@pytest.mark.examples
def test_models(tmp_path):
    sizes = "--width 16 --layers 1 --heads 2 --sequence 8 --batch 2 --images 16 --rounds 2"
    run = ["--run", "topk:ratio=1/4", "--min-speedup", "100"]
    benchmark.main(["model", *sizes.split(), *run, "--out", str(tmp_path)])
    rows = read_rows(tmp_path, "model")
    assert [row["approximate layers"] for row in rows] == ["0", "3", "0", "0", "5", "0"]
    assert all(float(row["speed"]) > 0 for row in rows)


@pytest.mark.examples
def test_torch_peers_compute_what_jax_does():
    torch = pytest.importorskip("torch")
    sizes = steps.Sizes(64, 32, 16, "float32")
    for run in steps.torch_layers(sizes, steps.layer_inputs(sizes), 8).values():
        run()
    assert torch.get_num_threads() > 0


@pytest.mark.examples
def test_bad_options(tmp_path, capsys):
    for arguments, message in (
        (["layer", "--run", "topk:speed=2"], "'speed'"),
        (["layer", "--ratio", "much"], "ratio"),
        (["model", "--min-speedup", "-1"], "not between"),
        (["model", "--width", "10", "--heads", "3"], "do not divide"),
        (["layer", "--dtype", "float64"], "invalid choice"),
        ([], "required"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main([*arguments, "--out", str(tmp_path)] if arguments else [])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="k=64"):
        benchmark.main(["layer", "--run", "topk:k=64", "--rows", "32", "--out", str(tmp_path)])
    if importlib.util.find_spec("torch") is None:
        with pytest.raises(SystemExit, match="pip install torch"):
            benchmark.main(["peers", "--out", str(tmp_path)])


SMALL_LAYER = "--rows", "4096", "--in-features", "2048", "--out-features", "2048"
TWO_RUNS = "topk:memory=none", "priority:memory=subspace"


def compiled(command, folder, *arguments, runs=TWO_RUNS):
    """The rows of some configurations, compiled for a chip that is not there."""
    root = str(EXAMPLES.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    runs = [word for run in runs for word in ("--run", run)]
    process = subprocess.run(
        [sys.executable, EXAMPLES / "benchmark.py", command, *runs, *arguments, "--out", folder],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    return read_rows(folder, command)


@pytest.mark.examples
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='the TPU compiler is not installed: pip install "jax[tpu]"',
)
def test_the_estimates_of_the_compiler_for_tpus(tmp_path):
    """On a layer large enough for the products to decide."""
    exact, alone, beside = compiled("tpu-compile", tmp_path, *SMALL_LAYER)
    assert exact["chip"] == "v5e"
    assert float(exact["FLOPs"]) == 1
    for row in (alone, beside):
        assert 0.7 < float(row["FLOPs"]) < 0.76
        assert 0.5 < float(row["speed"]) < 1.5


needs_gpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason=f"the GPU compiler is not installed: {gpu_estimate.PACKAGES}",
)


@pytest.mark.examples
@needs_gpu_compiler
def test_the_estimates_of_the_compiler_for_gpus(tmp_path):
    """The exact layer is its three products; others have smaller ones, and kernels beside them."""
    rows = compiled(
        "gpu-compile", tmp_path, *SMALL_LAYER, "--chip", "h100", "a100",
        runs=(*TWO_RUNS, "topk", "priority:memory=subspace,input_ratio=1/4,input_rank=32"),
    )  # fmt: skip
    for chip in ("h100", "a100"):
        exact, *others = (row for row in rows if row["chip"] == chip)
        assert int(exact["kernels"]) == 3
        assert float(exact["ms"]) == pytest.approx(float(exact["ms of products"]))
        alone, beside, joined, inputs = others
        assert float(alone["ms of products"]) < 0.85 * float(exact["ms"])
        assert float(inputs["ms of products"]) < 0.85 * float(exact["ms"])
        for row, kernels in ((alone, 17), (joined, 27), (beside, 54), (inputs, 73)):
            assert 3 < int(row["kernels"]) <= kernels
            assert 0.4 < float(row["speed"]) < 1.41
        assert float(joined["MB"]) < float(exact["MB"]) + 7 * 4096 * 2048 * 2e-6  # seven passes


@pytest.mark.examples
@needs_gpu_compiler
def test_the_estimate_of_a_model_for_gpus(tmp_path):
    """Where no layer gains the step is the exact one."""
    sizes = ["--width", "128", "--heads", "2", "--sequence", "64", "--batch", "8"]
    exact, alone, gains = compiled("gpu-compile", tmp_path, "--model", *sizes, runs=TWO_RUNS[:1])
    assert [row["approximate layers"] for row in (exact, alone, gains)] == ["0", "5", "0"]
    assert float(alone["speed"]) < 1 == float(gains["speed"])
    assert gains["kernels"] == exact["kernels"]


PROGRAM = """HloModule step

%replaced (o: bf16[8192,4096], j: s32[1024], u: bf16[1024,4096]) -> bf16[8192,4096] {
  %o = bf16[8192,4096]{1,0} parameter(0)
  %j = s32[1024]{0} parameter(1)
  %u = bf16[1024,4096]{1,0} parameter(2)
  %v = bf16[8192,4096]{1,0} bitcast(%o)
  ROOT %s = bf16[8192,4096]{1,0} scatter(%v, %j, %u), to_apply=%last
}

%fused (p.0: bf16[8192,4096], p.1: s32[1024]) -> bf16[1024,4096] {
  %p.0 = bf16[8192,4096]{1,0} parameter(0)
  %p.1 = s32[1024]{0} parameter(1)
  ROOT %g = bf16[1024,4096]{1,0} gather(%p.0, %p.1), slice_sizes={1,4096}
}

%seldom (q: f32[1048576]) -> f32[1048576] {
  %q = f32[1048576]{0} parameter(0)
  ROOT %n = f32[1048576]{0} negate(%q)
}

%mostly (r: f32[1048576]) -> f32[1048576] {
  ROOT %r = f32[1048576]{0} parameter(0)
}

ENTRY %main (x: bf16[8192,4096], i: s32[1024], f: f32[1048576], b: pred[]) -> bf16[4096,4096] {
  %x = bf16[8192,4096]{1,0} parameter(0)
  %i = s32[1024]{0} parameter(1)
  %f = f32[1048576]{0} parameter(2)
  %b = pred[] parameter(3)
  %rows = bf16[1024,4096]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
  %c = f32[1048576]{0} conditional(%b, %f, %f), true_computation=%seldom, false_computation=%mostly
  %dw = (bf16[4096,4096]{1,0}, s8[33554432]{0}) custom-call(%rows, %rows), target="__cublas$gemm"
  %next = bf16[8192,4096]{1,0} fusion(%x, %i, %rows), kind=kInput, calls=%replaced
  %kept = bf16[8192,4096]{1,0} custom-call(%next, %i), output_to_operand_aliasing={{}: (0, {})}
  ROOT %y = bf16[4096,4096]{1,0} get-tuple-element(%dw), index=0
}
"""


def test_what_a_gpus_kernels_move():
    gpu = gpu_estimate.Gpu({}, bytes=1e12, flops=1e14)
    kernels = gpu_estimate.kernels(PROGRAM, gpu)
    gather, decision, negate, product, scatter, in_place = kernels
    rows = 1024 * 4096 * 2  # bytes
    assert gather.bytes == 2 * rows + 4 * 1024  # of x only the rows that are gathered
    assert gather.seconds == pytest.approx(gather.bytes / 1e12 + gpu_estimate.LAUNCH)
    assert decision.seconds == gpu_estimate.DECISION
    assert negate.bytes == pytest.approx(gpu_estimate.REFRESHES * 2 * 4 * 2**20)
    assert [k for k in kernels if k.is_product] == [product]
    assert scatter.bytes == 2 * rows + 4 * 1024  # of the rows around them nothing
    assert in_place.bytes == gpu_estimate.REWRITTEN * 8 * rows + 4 * 1024
    assert product.bytes == 2 * rows + 4096 * 4096 * 2  # without its workspace
    flops = 2 * 1024 * 4096 * 4096
    assert product.seconds == pytest.approx(flops / 1e14 + gpu_estimate.LAUNCH)


def test_gpus_without_their_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    gpu_estimate.find_compiler.cache_clear()
    with pytest.raises(SystemExit, match=r"h100: there is no compiler for GPUs\. pip install"):
        gpu_estimate.device("h100")


def test_a_measurement_has_steps_that_refresh_and_others():
    config = aop.MemAOP(ratio=1 / 4, policy="priority", memory="subspace", rank=4, refresh=4)
    sizes = steps.Sizes(64, 32, 16, "float32")
    step = steps.layer_step(config, sizes, steps.layer_inputs(sizes))
    timed = timing.Timed(step)
    assert timed.calls == 4
    directions = [np.array(step.state.inputs)]
    for _ in range(65):
        timed()
        directions.append(np.array(timed.state.inputs))
    refreshed = [(a != b).any() for a, b in itertools.pairwise(directions)]
    assert refreshed[0]  # always
    assert 8 <= sum(refreshed) <= 26


def test_state_is_handed_on_and_donated():
    sizes = steps.Sizes(64, 32, 16, "float32")
    step = steps.layer_step(aop.MemAOP(ratio=1 / 4), sizes, steps.layer_inputs(sizes))
    timed = timing.Timed(step)
    assert timing.seconds_per_call(timed, 3) > 0
    assert float(timed.state.uses) == 1
    assert float(step.state.uses) == 0
    assert jax.tree.all(jax.tree.map(lambda a: not a.is_deleted(), step.state))
