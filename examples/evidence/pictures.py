"""Pictures of what the CSV files in docs/results say: `python -m examples.evidence.pictures`."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from examples.evidence.intervals import half_width, paired
from examples.evidence.tables import DOCS, by_count, described, read

STYLES = {"uniform": "o-", "TADrop": "s--", "dominance": "d-", "magnitude": "^:", "DARE": "v:"}
GROWING = {"uniform": "o-", "TADrop 0.75/0.95": "s--", "reversed": "v:", "dominance 0.5": "d-"}
_LAYER = re.compile(r"(?:layers?|h)/(\d+)/")


def ratios(file: str, out: Path, quantiles: str = "0.75/0.95") -> bool:
    """Quantile ratios of the matrices of a model, by layer and kind; the two lines say what tails would give.

    Returns:
        Whether there was anything to draw: large matrices in numbered layers.
    """
    found: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for line in described(file, quantiles):
        layer = _LAYER.search(line["tensor"])
        if layer and int(line["entries"]) > 2000:
            kind = line["tensor"][layer.end() :].removesuffix("/kernel")
            found[kind].append((int(layer[1]), float(line["ratio"]), float(line["sd_over_tasks"])))
    if not found:
        return False
    low, high = map(float, quantiles.split("/"))
    normal = NormalDist().inv_cdf((1 + low) / 2) / NormalDist().inv_cdf((1 + high) / 2)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.margins(x=0.12)  # room for the lines' names, left of all points
    for name, value in (("normal", normal), ("Laplace", math.log(1 - low) / math.log(1 - high))):
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
    ticks = sorted({p[0] for k in found.values() for p in k})
    axes.set(xlabel="layer", ylabel=f"quantile ratio ({quantiles.replace('0.', '.')})", xticks=ticks)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return True


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


def drawn(table: Path, quantiles: str = "0.75/0.95") -> list[Path]:
    """Draws the ratios of a table that is there, and accuracies against sparsity where enough arms were tried.

    Args:
        table: TABLE-ratios.csv, which lies beside TABLE.csv.
        quantiles: of the ratios.

    Returns:
        The pictures, which lie beside both.
    """
    out, runs = table.with_suffix(".svg"), table.with_name(table.name.replace("-ratios", ""))
    found = [out] if ratios(str(table), out, quantiles) else []
    counts = sorted({line["tasks"] for line in read(str(runs))}, key=int)
    lines = [line for line in read(str(runs)) if line["tasks"] == counts[0]]
    tried = {rule: {line["sparsifier"] for line in lines if line["rule"] == rule} for rule in ("EMR", "TIES")}
    rules = [rule for rule, arms in tried.items() if len(arms) > 20]  # fewer make no curves
    if rules:
        found.append(runs.with_suffix(".svg"))
        by_sparsity(str(runs), counts[0], rules, found[-1])
    return found


def main() -> None:
    """Draws growth, ratios and accuracies against sparsity of the tables of docs/results."""
    for table in sorted((DOCS / "results").glob("*-growth.csv")):
        growth(table.name, "EMR", table.with_suffix(".svg"))
    for table in sorted((DOCS / "results").glob("*-ratios.csv")):
        drawn(table)


if __name__ == "__main__":
    main()
