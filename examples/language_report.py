"""The report of language_model.py: a table of its runs, and a figure of their losses over FLOPs."""

import pathlib

import numpy as np
import runs
from matplotlib.figure import Figure


def write(
    results: dict[str, dict], folder: pathlib.Path, description: str, loss: float | None = None
) -> str:
    """Writes `results.md` and `results.png`; returns the text and the files' paths.

    With diagnostics, it also writes those of each layer to `diagnostics.md`.

    Args:
      results: the entries of results.json by the run's name.
      folder: where the files go.
      description: the text below the table.
      loss: as in `table`.
    """
    decisions = [
        f"{name}, first seed\n\n{entry['controller']}"
        for name, entry in results.items()
        if "controller" in entry
    ]
    text = "\n\n".join([table(results, loss), description, *decisions])
    diagnosed = [
        (name, step, diagnostics)
        for name, entry in results.items()
        for step, diagnostics in entry.get("diagnostics", {}).items()
    ]
    if diagnosed:
        text = f"{text}\n\n{diagnostics_table(diagnosed)}"
    report = runs.write_report(text, folder / "results.md", {folder / "results.png": draw(results)})
    if diagnosed:
        path = folder / "diagnostics.md"
        tables = (f"{name}, after {step} steps\n\n{x['table']}\n" for name, step, x in diagnosed)
        path.write_text("\n".join(tables))
        report = f"{report}\n{path}"
    return report


def table(results: dict[str, dict], loss: float | None = None) -> str:
    """A table in Markdown, with a row for each run.

    c: FLOPs of a step, relative to those of an exact step of the same batch. "of the reference":
    FLOPs of the whole run, relative to those of the exact run with --batch and --steps. s: seconds
    of a seed, without compilation and evaluation. With a `loss`, two more columns have the seconds
    and FLOPs after which a run's validation loss was as low.
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
            runs.cell([losses[-1] for losses in entry["losses"]]),
            *([] if loss is None else [spent_until(entry, loss, x) for x in ("seconds", "flops")]),
        )
        for name, entry in results.items()
    ]
    return runs.markdown(header, rows)


def spent_until(entry: dict, loss: float, resource: str) -> str:
    """Seconds or FLOPs that a run had spent when its loss was so low: mean ± sd of the seeds.

    Between two evaluations the loss falls in a straight line.
    """

    def spent_by_seed(losses, spent):
        i = next((i for i, x in enumerate(losses) if x <= loss), None)
        if i is None:
            return None
        if i == 0:
            return spent[0]
        share = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
        return spent[i - 1] + share * (spent[i] - spent[i - 1])

    spent = [spent_by_seed(*seed) for seed in zip(entry["losses"], entry[resource], strict=True)]
    return "never" if None in spent else runs.cell(spent, ".4g")


def diagnostics_table(diagnosed: list[tuple[str, str, dict]]) -> str:
    """The diagnostics of the gradient estimates in Markdown, with a row for each run and step.

    The columns are those of `aop.Measured`; c is the cost of the approximate layers alone.
    """
    header = ("run", "step", "error", "cosine", "v", "v of dX", "noise", "c", "(1 + error²) c")
    keys = ("error", "cosine", "v", "input_v", "noise", "c", "rule")
    rows = [
        (f"`{name}`", step, *(f"{diagnostics[key]:.3g}" for key in keys))
        for name, step, diagnostics in diagnosed
    ]
    return runs.markdown(header, rows)


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
