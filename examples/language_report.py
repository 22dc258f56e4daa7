"""The runs of language_model.py: a table, and the loss over the FLOPs spent."""

import pathlib

import matplotlib
import numpy as np
import runs
from matplotlib.figure import Figure

from mem_aop_jax.diagnostics import markdown

matplotlib.use("Agg")


def write(results: dict[str, dict], folder: pathlib.Path, description: str) -> str:
    """Writes `results.md` and `results.png`; the table, the description, and where they are.

    Args:
      results: runs by name, as in results.json.
      folder: for the files.
      description: what stands below the table.
    """
    paths = [folder / "results.md", folder / "results.png"]
    text = f"{table(results)}\n\n{description}"
    layers = [
        f"{name}, after {step} steps\n\n{found['table']}\n"
        for name, entry in results.items()
        for step, found in entry.get("diagnostics", {}).items()
    ]
    decisions = [
        f"{name}, first seed\n\n{entry['controller']}"
        for name, entry in results.items()
        if "controller" in entry
    ]
    text = "\n\n".join([text, *decisions])
    if layers:
        text = f"{text}\n\n{diagnosed(results)}"
        paths.append(folder / "diagnostics.md")
        paths[-1].write_text("\n".join(layers))
    paths[0].write_text(text + "\n")
    draw(results).savefig(paths[1], dpi=120)
    return "\n".join([text, "", *map(str, paths)])


def table(results: dict[str, dict]) -> str:
    """Markdown.

    c: FLOPs of a step, relative to those of an exact step of the same batch. "of the reference":
    FLOPs of the whole run, relative to those of the exact run with --batch and --steps. Seconds:
    of all steps of a seed, without compilation and evaluation.
    """
    header = ("run", "batch", "steps", "FLOPs of a step", "c", "of the reference", "s", "loss")
    rows = [
        (
            f"`{name}`",
            str(entry["batch"]),
            str(entry["steps"]),
            f"{entry['step_flops'] / 1e9:.3g} G",
            f"{entry['c']:.3f}",
            f"{entry['of_reference']:.3f}",
            f"{np.mean(entry['seconds']):.1f}",
            runs.shown([losses[-1] for losses in entry["losses"]]),
        )
        for name, entry in results.items()
    ]
    return markdown(header, rows)


def diagnosed(results: dict[str, dict]) -> str:
    """Markdown: what was measured of the estimates, by run and step; as in `aop.Measured`.

    c: of the approximate layers alone.
    """
    head = ("error", "cosine", "v", "v of dX", "noise", "c")
    figures = ("error", "cosine", "v", "input_v", "noise", "c", "rule")
    rows = [
        (f"`{name}`", step, *(f"{found[figure]:.3g}" for figure in figures))
        for name, entry in results.items()
        for step, found in entry.get("diagnostics", {}).items()
    ]
    return markdown(("run", "step", *head, "(1 + error²) c"), rows)


def draw(results: dict[str, dict]) -> Figure:
    """Validation loss over the FLOPs spent; exact runs black, the bands are one sd of the seeds."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    exact = [name for name, entry in results.items() if entry["policy"] == "exact"]
    others = [name for name in results if name not in exact]
    for name, entry in results.items():
        style = (
            {"color": "black", "linestyle": ("-", "--", "-.", ":")[exact.index(name) % 4]}
            if name in exact
            else {"color": f"C{others.index(name) % 10}"}
        )
        losses, flops = np.array(entry["losses"]), np.mean(entry["flops"], axis=0)
        mean, sd = losses.mean(axis=0), losses.std(axis=0, ddof=min(1, len(losses) - 1))
        panel.plot(flops, mean, label=name, marker="o", markevery=[-1], **style)
        panel.fill_between(flops, mean - sd, mean + sd, color=style["color"], alpha=0.15, lw=0)
    panel.set(xlabel="FLOPs", ylabel="validation loss")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    return figure
