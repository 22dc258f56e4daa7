"""The runs of language_model.py: a table, and the loss over the FLOPs spent."""

import pathlib

import numpy as np
import runs
from matplotlib.figure import Figure

from mem_aop_jax._analysis.tables import markdown


def write(
    results: dict[str, dict], folder: pathlib.Path, description: str, loss: float | None = None
) -> str:
    """Writes `results.md` and `results.png`; the table, the description, and where they are.

    Args:
      results: runs by name, as in results.json.
      folder: for the files.
      description: what stands below the table.
      loss: as `table` takes it.
    """
    paths = [folder / "results.md", folder / "results.png"]
    text = f"{table(results, loss)}\n\n{description}"
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


def table(results: dict[str, dict], loss: float | None = None) -> str:
    """Markdown.

    c: FLOPs of a step, relative to those of an exact step of the same batch. "of the reference":
    FLOPs of the whole run, relative to those of the exact run with --batch and --steps. Seconds:
    of a seed, without compilation and evaluation. With a loss, also what each run had spent when
    its validation loss was as low, straight between two evaluations.
    """
    header = ["run", "batch", "steps", "FLOPs of a step", "c", "of the reference", "s", "loss"]
    if loss is not None:
        header += [f"s to {loss:g}", f"FLOPs to {loss:g}"]
    rows = [
        (
            f"`{name}`",
            str(entry["batch"]),
            str(entry["steps"]),
            f"{entry['step_flops'] / 1e9:.3g} G",
            f"{entry['c']:.3f}",
            f"{entry['of_reference']:.3f}",
            f"{np.mean(entry['seconds'], axis=0)[-1]:.1f}",
            runs.shown([losses[-1] for losses in entry["losses"]]),
            *([] if loss is None else [reached(entry, of, loss) for of in ("seconds", "flops")]),
        )
        for name, entry in results.items()
    ]
    return markdown(header, rows)


def reached(entry: dict, of: str, loss: float) -> str:
    """Seconds or FLOPs that a run had spent when its loss was that low: mean ± sd of the seeds."""

    def spent_by(losses, spent):
        i = next((i for i, x in enumerate(losses) if x <= loss), None)
        if i is None:
            return None
        if i == 0:
            return spent[0]
        share = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
        return spent[i - 1] + share * (spent[i] - spent[i - 1])

    spent = [spent_by(*seed) for seed in zip(entry["losses"], entry[of], strict=True)]
    if None in spent:
        return "never"
    return " ± ".join(f"{x:.4g}" for x in runs.summary(spent) if x is not None)


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
