"""The report of compare.py: a table of its runs, and a figure of their losses."""

import pathlib

import numpy as np
import runs
from matplotlib.figure import Figure


def write(
    results: dict[str, dict], folder: pathlib.Path, description: str, advice: str | None = None
) -> str:
    """Writes `results.md` and `results.png`; returns the text and the files' paths.

    With diagnostics, it also writes those of each layer to `diagnostics.md`.

    Args:
      results: the entries of results.json by the run's name.
      folder: where the files go.
      description: the text below the table.
      advice: what `aop.advise` said.
    """
    decisions = [
        f"{name}, first seed\n\n{entry['controller']}"
        for name, entry in results.items()
        if "controller" in entry
    ]
    texts = [table(results), description, *([advice] if advice else []), *decisions]
    diagnosed = [
        (name, step, diagnostics)
        for name, entry in results.items()
        for step, diagnostics in entry.get("diagnostics", {}).items()
    ]
    if diagnosed:
        texts.append(diagnostics_table(diagnosed))
    report = runs.write_report(
        "\n\n".join(texts), folder / "results.md", {folder / "results.png": draw(results)}
    )
    if diagnosed:
        path = folder / "diagnostics.md"
        tables = (f"{name}, after {step} steps\n\n{x['table']}\n" for name, step, x in diagnosed)
        path.write_text("\n".join(tables))
        report = f"{report}\n{path}"
    return report


def last_losses(entry: dict) -> np.ndarray:
    return np.array(entry["losses"])[:, -1]


def best_exact(results: dict[str, dict]) -> str:
    """The name of the exact run, of all batch sizes with equal FLOPs, that ends lowest."""
    exact = [
        name
        for name, entry in results.items()
        if entry["policy"] == "exact" and entry["wanted"]["flops"] == 1
    ]
    return min(exact, key=lambda name: last_losses(results[name]).mean())


def table(results: dict[str, dict]) -> str:
    """A table in Markdown, with a row for each run.

    c: FLOPs of a step, relative to those of an exact step of the same batch; a controlled run's
    measurements are part of it. FLOPs, bytes: of the whole run, relative to those of the exact run
    with --batch and --steps; bytes with a refresh of a subspace in every step. s: seconds of a
    seed, without compilation and evaluation. "to the best exact": the share of its FLOPs and of its
    seconds, seed by seed, after which a run's validation loss was as low as its last one. The last
    column has the loss less that of the best exact run, seed by seed.
    """
    best = best_exact(results)
    header = "run", "batch", "steps", "c", "FLOPs", "bytes", "s", "loss"
    more = "FLOPs to the best exact", "s to the best exact", "less the best exact"
    rows = []
    for name, entry in results.items():
        differences = last_losses(entry) - last_losses(results[best])[: len(entry["losses"])]
        rows.append(
            (
                f"**`{name}`**" if name == best else f"`{name}`",
                str(entry["batch"]),
                f"{np.mean(entry['steps']):.0f}",
                f"{entry['c']:.3f}",
                f"{entry['of_reference']:.3f}",
                f"{entry['of_bytes']:.3f}" if "of_bytes" in entry else "",
                f"{np.mean(entry['seconds'], axis=0)[-1]:.1f}",
                runs.cell(last_losses(entry)),
                *(share_until(entry, results[best], x) for x in ("flops", "seconds")),
                "" if name == best else ", ".join(f"{x:+.4f}" for x in differences),
            )
        )
    return runs.markdown((*header, *more), rows)


def share_until(entry: dict, best: dict, resource: str) -> str:
    """What a run had spent when its loss was the best exact run's last one, by that run's total.

    The mean of the seeds. Between two evaluations the loss falls in a straight line.
    """

    def spent(losses, spent, loss):
        i = next((i for i, x in enumerate(losses) if x <= loss), None)
        if i is None:
            return None
        if i == 0:
            return spent[0]
        share = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
        return spent[i - 1] + share * (spent[i] - spent[i - 1])

    seeds = zip(*(entry["losses"], entry[resource], best["losses"], best[resource]), strict=False)
    shares = [(spent(*own, losses[-1]), total[-1]) for *own, losses, total in seeds]
    if any(own is None for own, _ in shares):
        return "never"
    return f"{np.mean([own / total for own, total in shares]):.2f}"


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
    """Validation loss over FLOPs and seconds; exact runs black, the bands are one sd of seeds."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    exact = [name for name, entry in results.items() if entry["policy"] == "exact"]
    others = [name for name in results if name not in exact]
    for name, entry in results.items():
        style = (
            {"color": "black", "linestyle": ("-", "--", "-.", ":")[exact.index(name) % 4]}
            if name in exact
            else {"color": f"C{others.index(name) % 10}"}
        )
        losses = np.array(entry["losses"])
        mean, sd = losses.mean(axis=0), losses.std(axis=0, ddof=min(1, len(losses) - 1))
        for panel, resource in zip(panels, ("flops", "seconds"), strict=True):
            spent = np.mean(entry[resource], axis=0)
            panel.plot(spent, mean, label=name, marker="o", markevery=[-1], **style)
            panel.fill_between(spent, mean - sd, mean + sd, color=style["color"], alpha=0.15, lw=0)
    for panel, label in zip(panels, ("FLOPs", "seconds"), strict=True):
        panel.set(xlabel=label, yscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss")
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=2, fontsize=8)
    return figure
