"""Our runs beside the figures that the authors of arXiv 2110.09164 published: table and figures."""

import itertools
import pathlib
from typing import NamedTuple

import numpy as np
import runs
import scipy
from matplotlib.figure import Figure

PUBLISHED_RUNS = 10


class Metric(NamedTuple):
    """A column group of the table and a panel of the figures."""

    name: str
    title: str
    scale: str


METRICS = {
    "energy": (Metric("loss", "train loss", "log"), Metric("loss_val", "validation loss", "log")),
    "images": (
        Metric("loss", "train loss", "linear"),
        Metric("acc_val", "validation accuracy", "linear"),
    ),
}
# Mean and sample standard deviation of each metric in the final epoch of ten runs; for MNIST also
# minimum, median and maximum of the validation accuracy.
PUBLISHED = {
    "energy": {
        "baseline": (9.52876, 0.07068, 9.16931, 0.05493),
        "randk-nomem-K18": (14.14443, 0.20399, 14.6473, 0.37862),
        "randk-nomem-K3": (45.67452, 2.527, 61.97715, 3.87408),
        "randk-mem-K18": (9.58925, 0.13742, 9.65826, 0.65862),
        "randk-mem-K3": (24.32472, 12.33509, 32.3859, 16.95875),
        "topk-nomem-K18": (12.69769, 0.13508, 11.39789, 0.19074),
        "topk-nomem-K3": (20.51726, 0.37307, 26.61184, 0.48929),
        "topk-mem-K18": (9.47106, 0.07558, 9.5174, 0.29015),
        "topk-mem-K3": (9.81031, 0.21323, 10.38197, 1.4237),
        "weightedk-nomem-K18": (11.20942, 0.07792, 10.62459, 0.13329),
        "weightedk-nomem-K3": (25.77357, 1.17304, 33.1911, 1.63428),
        "weightedk-mem-K18": (9.5446, 0.08546, 9.30213, 0.27358),
        "weightedk-mem-K3": (9.85604, 0.35185, 10.79295, 1.73473),
    },
    "mnist": {
        "baseline": (1.60984, 0.04212, 0.86718, 0.04125, 0.8252, 0.84585, 0.9159),
        "randk-nomem-K32": (1.62148, 0.04529, 0.86796, 0.05251, 0.761, 0.9014, 0.9084),
        "randk-nomem-K8": (1.72509, 0.05168, 0.77827, 0.06521, 0.6661, 0.77835, 0.8873),
        "randk-mem-K32": (1.6225, 0.03364, 0.85877, 0.03802, 0.8286, 0.8328, 0.9131),
        "randk-mem-K8": (2.27556, 0.07925, 0.1789, 0.07482, 0.0956, 0.20165, 0.285),
        "topk-nomem-K32": (1.80583, 0.07051, 0.67506, 0.07838, 0.5605, 0.66285, 0.8314),
        "topk-nomem-K8": (2.1212, 0.06791, 0.33196, 0.06809, 0.1881, 0.34625, 0.3957),
        "topk-mem-K32": (1.59833, 0.03805, 0.88196, 0.04221, 0.8314, 0.91405, 0.9159),
        "topk-mem-K8": (1.63991, 0.04224, 0.838, 0.04659, 0.7468, 0.831, 0.9113),
        "weightedk-nomem-K32": (1.7961, 0.06733, 0.67643, 0.07272, 0.562, 0.6661, 0.7636),
        "weightedk-nomem-K8": (2.1396, 0.03789, 0.31123, 0.03837, 0.2857, 0.29345, 0.3835),
        "weightedk-mem-K32": (1.58474, 0.03352, 0.89738, 0.03495, 0.828, 0.914, 0.915),
        "weightedk-mem-K8": (1.64206, 0.04007, 0.83756, 0.04469, 0.7468, 0.8319, 0.9078),
    },
}


def write(dataset: str, results: dict[str, dict], folder: pathlib.Path) -> str:
    """Writes `DATASET.md` and a figure for each K; returns the table and the files' paths.

    Args:
      dataset: "energy", or a key of `paper_data.SOURCES`.
      results: the entries of results.json by the configuration's name; "baseline" is one.
      folder: where the files go.
    """
    metrics = METRICS.get(dataset, METRICS["images"])
    figures = {}
    for k in sorted({entry["k"] for entry in results.values()} - {None}, reverse=True):
        shown = {name: entry for name, entry in results.items() if entry["k"] in (None, k)}
        title = f"{dataset}, K = {k} of {shown['baseline']['rows']}"
        figures[folder / f"{dataset}-K{k}.png"] = draw(title, metrics, shown)
    text = table(metrics, results, PUBLISHED.get(dataset, {}))
    return runs.write_report(text, folder / f"{dataset}.md", figures)


# ---- the table


def table(metrics: tuple[Metric, ...], results: dict[str, dict], published: dict) -> str:
    """A table in Markdown: mean ± sd (ratio to the baseline), ours and published, and z-scores.

    For images, whole classes may not be learned: the last columns count the runs by the number of
    classes that they learned, with the p-value of a permutation test.
    """
    header = ["configuration"]
    for metric in metrics:
        header += [metric.title, "published", "z"]
    learned = "learned" in results["baseline"]
    if learned:
        header += ["runs by classes learned", "published", "p"]
    rows = []
    for name, entry in results.items():
        cells = [name]
        for i, metric in enumerate(metrics):
            ours, baseline = entry[metric.name], results["baseline"][metric.name]
            cells.append(_cell(ours["mean"], ours["std"], baseline["mean"]))
            if name in published:
                mean, sd = published[name][2 * i : 2 * i + 2]
                error = np.hypot(ours["std"] / len(ours["runs"]) ** 0.5, sd / PUBLISHED_RUNS**0.5)
                z = f"{(ours['mean'] - mean) / error:+.1f}"
                cells += [_cell(mean, sd, published["baseline"][2 * i]), z]
            else:
                cells += ["", ""]
        if learned:
            classes = entry["learned"]["runs"]
            cells.append(_counts(classes))
            if name in published:
                level = levels(entry, results["baseline"])
                theirs = published_levels(published[name][2:], *level)
                cells += [_counts(theirs), f"{same_levels(classes, theirs):.2g}"]
            else:
                cells += ["", ""]
        rows.append(cells)
    return runs.markdown(header, rows)


def _cell(mean, sd, baseline):
    return f"{mean:.3f} ± {sd:.3f} ({mean / baseline:.3f})"


def _counts(runs):
    """For instance "4 x 10, 6 x 9": four runs learned all ten classes, six missed one."""
    values, counts = np.unique(runs, return_counts=True)
    pairs = zip(counts[::-1], values[::-1], strict=True)
    return ", ".join(f"{count} x {int(value)}" for count, value in pairs)


# ---- MNIST: with the double softmax whole classes are not learned, so accuracies come in levels


def levels(entry: dict, baseline: dict) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of classes learned, 0 to 10, and the validation accuracy that goes with each.

    A line is fitted to our runs. If all of them learned the same number of classes, it has the
    slope of the baseline's line.
    """
    classes = np.arange(11)
    learned, accuracy = (np.array(entry[name]["runs"]) for name in ("learned", "acc_val"))
    if len(set(learned)) > 1:
        return classes, np.polyval(np.polyfit(learned, accuracy, 1), classes)
    if entry is baseline:
        return classes, classes * accuracy.mean() / max(learned[0], 1)
    _, baseline_accuracy = levels(baseline, baseline)
    return classes, baseline_accuracy + accuracy.mean() - baseline_accuracy[learned[0]]


def published_levels(summary: tuple[float, ...], classes: np.ndarray, accuracy: np.ndarray):
    """How many classes each of the ten published runs learned, by the summary that was published.

    Tries all ways to spread ten runs over the levels, and returns the one whose summary is nearest.

    Args:
      summary: mean, sample standard deviation, minimum, median and maximum of the accuracy.
      classes: the number of classes learned at each level.
      accuracy: the accuracy at each level.
    """
    low, high = (int(np.abs(accuracy - summary[i]).argmin()) for i in (2, 4))
    inner = range(min(low, high), max(low, high) + 1)
    ways = itertools.combinations_with_replacement(inner, PUBLISHED_RUNS - 2)
    runs = np.array([sorted((low, *way, high)) for way in ways])
    a = accuracy[runs]
    summaries = [a.mean(1), a.std(1, ddof=1), a.min(1), np.median(a, 1), a.max(1)]
    distance = sum((x - s) ** 2 for x, s in zip(summaries, summary, strict=True))
    return classes[runs[distance.argmin()]]


def same_levels(ours, theirs) -> float:
    """The p-value of the hypothesis that our runs and theirs come from one distribution."""
    return scipy.stats.permutation_test(
        (np.asarray(ours, float), np.asarray(theirs, float)),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        n_resamples=20_000,
        rng=0,
    ).pvalue


# ---- the figures


def draw(title: str, metrics: tuple[Metric, ...], results: dict[str, dict]) -> Figure:
    """A panel for each metric, over the epochs: exact black, with memory solid, without dashed."""
    figure = Figure(figsize=(5.5 * len(metrics), 4.2), layout="constrained")
    policies = sorted({entry["policy"] for entry in results.values()} - {None})
    for panel, metric in zip(figure.subplots(1, len(metrics)), metrics, strict=True):
        for name, entry in results.items():
            policy, memory = entry["policy"], entry["memory"]
            curve = entry[metric.name]["epoch_mean"]
            panel.plot(
                np.arange(1, len(curve) + 1),
                curve,
                linestyle="-" if memory or policy is None else "--",
                color="black" if policy is None else f"C{policies.index(policy)}",
                label="exact" if policy is None else name.rpartition("-K")[0],
            )
        panel.set(xlabel="epoch", ylabel=metric.title, yscale=metric.scale)
        panel.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=8)
    figure.suptitle(title)
    return figure
