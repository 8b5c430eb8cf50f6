"""Pictures of what a merge did. matplotlib is imported where it is used."""

from pathlib import Path

import numpy as np

from tadrop_jax.errors import check_installed


def draw_inspection(rows: dict[str, dict], tasks: tuple[str, ...], file: Path) -> None:
    """Draws quantile ratio and sparsity of every tensor as two heat maps: tensors downwards, tasks across.

    Args:
        rows: by name, what `tadrop inspect` found (`quantile_ratio` and `sparsity`, one number a task).
        tasks: names of the tasks.
        file: picture to write; its suffix says in which format.
    """
    check_installed("matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(rows)
    height = min(1.6 + 0.17 * len(names), 60)
    longest = max(len(name) for name in names)
    figure = Figure(figsize=(2.0 + 0.075 * longest + 2 * max(1.4, 0.28 * len(tasks)), height), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"quantile_ratio": "quantile ratio", "sparsity": "sparsity"}
    for position, (field, title) in enumerate(titles.items()):
        axes = figure.add_subplot(1, 2, position + 1)
        image = axes.imshow(np.stack([rows[n][field] for n in names]), cmap="viridis", aspect="auto")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(tasks)), tasks, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(range(len(names)), names if position == 0 else [], fontsize=6)
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, shrink=min(1.0, 4 / height), aspect=15)
    figure.savefig(file, dpi=150)


def draw_coefficients(
    table: dict[str, np.ndarray], tasks: tuple[str, ...], file: Path, losses: np.ndarray | None = None
) -> None:
    """Draws learned coefficients: a heat map of tensors and tasks, or bars where all tensors share them.

    Args:
        table: by tensor one number a task, as `AdaMerged.table` gives it.
        tasks: names of the tasks.
        file: picture to write; its suffix says in which format.
        losses: `(steps, T)`, drawn beside them.
    """
    check_installed("matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(table)
    values = np.stack([np.asarray(table[n]) for n in names])
    height = max(3.2, min(1.6 + 0.17 * len(names), 60))
    labels = 0.075 * max(len(name) for name in names) if len(names) > 1 else 0.0
    figure = Figure(figsize=(2.0 + labels + max(1.8, 0.3 * len(tasks)) + 4 * (losses is not None), height))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + (losses is not None), squeeze=False)[0]
    axes, positions = panels[0], range(len(tasks))
    if len(names) == 1:
        axes.bar(positions, values[0], color="tab:blue")
        axes.set_ylabel("coefficient")
    else:
        image = axes.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, shrink=min(1.0, 4 / height), aspect=15)
    axes.set_xticks(positions, tasks, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_title("coefficients", fontsize=10)
    if losses is not None:
        for name, column in zip(tasks, np.asarray(losses).T, strict=True):
            panels[1].plot(column, label=name, linewidth=1)
        panels[1].set_xlabel("step")
        panels[1].set_title("mean entropy", fontsize=10)
        panels[1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=150)


def draw_sparsity(sparsity: dict[str, np.ndarray], tasks: tuple[str, ...], file: Path) -> None:
    """Draws one heat map a layer: kinds of tensor downwards, tasks across, sparsity as colour.

    Args:
        sparsity: by PyTorch name, one number a task.
        tasks: names of the tasks.
        file: PNG to write.
    """
    check_installed("matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, values in sparsity.items():
        group, kind = _place(name)
        groups.setdefault(group, {})[kind] = values
    names = sorted(groups, key=lambda group: (group == "outside layers", group))
    low = min(values.min() for values in sparsity.values())
    high = max(values.max() for values in sparsity.values())

    figure = Figure(figsize=(1.6 + 2.3 * len(names), 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    image = None
    for position, group in enumerate(names):
        axes = figure.add_subplot(1, len(names), position + 1)
        kinds = sorted(groups[group], key=_reading_order)
        cells = np.stack([groups[group][kind] for kind in kinds])
        image = axes.imshow(cells, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        axes.set_title(group, fontsize=10)
        for row in range(1, len(kinds)):  # a line between matrices, norms and biases
            if _reading_order(kinds[row])[0] != _reading_order(kinds[row - 1])[0]:
                axes.axhline(row - 0.5, color="white", linewidth=2)
        axes.set_xticks(range(len(tasks)), tasks, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        own_labels = position == 0 or group == "outside layers"
        axes.set_yticks(range(len(kinds)), kinds if own_labels else [], fontsize=8)
        axes.tick_params(length=0)
    if image is not None:
        figure.colorbar(image, ax=figure.axes, label="share of entries set to zero", shrink=0.8)
    figure.suptitle("Sparsity that TADrop chose, by tensor and task", fontsize=11)
    figure.savefig(file, dpi=150)


_KINDS = {
    "layernorm_before": "norm 1",
    "attention.attention.query": "query",
    "attention.attention.key": "key",
    "attention.attention.value": "value",
    "attention.output.dense": "attention out",
    "layernorm_after": "norm 2",
    "intermediate.dense": "mlp in",
    "output.dense": "mlp out",
    "embeddings.cls_token": "class token",
    "embeddings.position_embeddings": "positions",
    "embeddings.patch_embeddings.projection": "patches",
    "layernorm": "last norm",
}
_ORDER = list(_KINDS.values())


def _place(name: str) -> tuple[str, str]:
    """Where in the picture a tensor goes: the panel, and the kind within it."""
    parts = name.removeprefix("vit.").split(".")
    group = "outside layers"
    if parts[:2] == ["encoder", "layer"]:
        group, parts = f"layer {parts[2]}", parts[3:]
    if parts[-1] in ("weight", "bias"):
        return group, f"{_KINDS['.'.join(parts[:-1])]} {parts[-1]}"
    return group, _KINDS[".".join(parts)]


def _reading_order(kind: str) -> tuple[int, int]:
    """Matrices first, then scales of norms, then biases; each in the order of the forward pass."""
    stem = kind.removesuffix(" weight").removesuffix(" bias")
    group = 2 if kind.endswith(" bias") else 1 if "norm" in stem else 0
    return group, _ORDER.index(stem)
