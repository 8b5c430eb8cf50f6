"""Pictures of what the CSV files in docs/results say: `python -m examples.evidence.pictures`."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from examples.evidence.tables import DOCS, by_count, half_width, paired, read

STYLES = {"uniform": "o-", "TADrop": "s--", "dominance": "d-", "magnitude": "^:", "DARE": "v:"}
GROWING = {"uniform": "o-", "TADrop 0.75/0.95": "s--", "reversed": "v:", "dominance 0.5": "d-"}
_LAYER = re.compile(r"(?:layers?|h)/(\d+)/")


def ratios(file: str, out: Path) -> None:
    """Quantile ratios of the matrices of a model, by layer and kind; the two lines say what tails would give."""
    found: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for line in read(file):
        layer = _LAYER.search(line["tensor"])
        if layer and int(line["entries"]) > 2000:
            kind = line["tensor"][layer.end() :].removesuffix("/kernel")
            found[kind].append((int(layer[1]), float(line["ratio"]), float(line["sd_over_tasks"])))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.margins(x=0.12)  # room for the lines' names, left of all points
    for name, value in (("normal", 0.587), ("Laplace", 0.463)):
        axes.axhline(value, color="0.7", linewidth=1)
        where = axes.get_yaxis_transform()
        axes.annotate(
            name, (0, value), xycoords=where, xytext=(3, 2), textcoords="offset points", color="0.5", fontsize=8
        )
    if len(found) > 10:  # more than the usual colours
        axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)  # pyright: ignore[reportAttributeAccessIssue]
    for kind, points in found.items():
        layers, means, spread = np.array(sorted(points)).T
        axes.errorbar(layers, means, spread, marker="o", capsize=2, linewidth=1, label=kind)
    axes.set(
        xlabel="layer", ylabel="quantile ratio (.75/.95)", xticks=sorted({p[0] for k in found.values() for p in k})
    )
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out, dpi=120)
    plt.close(figure)


def by_sparsity(file: str, tasks: str, rules: Sequence[str], out: Path) -> None:
    """Test accuracy against the share that is pruned: TADrop at several quantiles, uniform sparsity at several."""
    lines = [line for line in read(file) if line["tasks"] == tasks]
    figure, axes = plt.subplots(1, len(rules), figsize=(4 * len(rules), 3.4), layout="constrained", squeeze=False)
    for place, rule in zip(axes[0], rules, strict=True):
        for kind, style in STYLES.items():
            points = defaultdict(list)
            for line in lines:
                if line["rule"] == rule and re.fullmatch(rf"none|{kind} [\d./]+", line["sparsifier"]):
                    points[line["sparsifier"]].append((float(line["sparsity"]), 100 * float(line["test"])))
            means = np.array(sorted(np.mean(found, 0).tolist() for found in points.values()))
            place.plot(*means.T, style, label=kind, markersize=4)
        place.set(title=rule, xlabel="share pruned", ylabel="test accuracy, %")
        place.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def growth(file: str, rule: str, out: Path) -> None:
    """What arms gain over no pruning, by the number of tasks: of all tasks, and of those of the smallest merge."""
    merges = {int(count): lines for count, lines in by_count(read(file)).items()}
    counts = sorted(merges)
    figure, places = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    for place, most in zip(places, (None, counts[0]), strict=True):
        for shift, (arm, style) in enumerate(GROWING.items()):
            judged = most and range(most)
            gains = {count: 100 * paired(merges[count], rule, arm, "none", judged) for count in counts}
            found = [(count, gain.mean(), half_width(gain)) for count, gain in gains.items() if gain.size]
            if found:
                x, means, halves = np.array(found).T
                place.errorbar(x + 0.4 * shift, means, halves, fmt=style, capsize=2, markersize=4, label=arm)
        title = "all tasks" if most is None else f"the first {most} of them"
        place.set(title=title, xlabel="tasks merged", xticks=counts)
        place.grid(alpha=0.3)
    places[0].set(ylabel=f"gain over {rule} alone, points")
    places[0].legend(fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main() -> None:
    """Draws the ratios of each table that is there, and accuracies against sparsity where enough arms were tried."""
    for table in sorted((DOCS / "results").glob("*-growth.csv")):
        growth(table.name, "EMR", table.with_suffix(".svg"))
    for table in sorted((DOCS / "results").glob("*-ratios.csv")):
        ratios(table.name, table.with_suffix(".svg"))
        runs = table.name.replace("-ratios", "")
        counts = sorted({line["tasks"] for line in read(runs)}, key=int)
        lines = [line for line in read(runs) if line["tasks"] == counts[0]]
        tried = {rule: {line["sparsifier"] for line in lines if line["rule"] == rule} for rule in ("EMR", "TIES")}
        rules = [rule for rule, arms in tried.items() if len(arms) > 20]  # fewer make no curves
        if rules:
            by_sparsity(runs, counts[0], rules, table.with_name(runs).with_suffix(".svg"))


if __name__ == "__main__":
    main()
