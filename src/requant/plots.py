"""The pictures of a card. The same records give the same bytes: fonts, size and resolution are fixed here.

Colours are of Okabe and Ito's set and of cividis, which colour-blind readers can tell apart; markers and line
styles differ too, so that a print in grey still reads.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from requant.records import BlockRecord, EvaluateRecord, KeepList, RoutingRecord
from requant.whole import written_whole

ROUNDED, TUNED, UNREACHED, DROPPED = "#D55E00", "#0072B2", "#E69F00", "#CC79A7"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}
ANNOTATED_CELLS = 128  # a heat map with more cells has no room for a number in each


def plot_loss(path: str | Path, releases: dict[str, Sequence[BlockRecord]]) -> None:
    """Writes a PNG: the loss of each block rounded plainly and as kept, one panel for each release."""
    series = {
        name: ([block.block for block in blocks], *map(list, zip(*(block.compared for block in blocks), strict=True)))
        for name, blocks in releases.items()
    }
    _plot_pairs(
        path,
        series,
        "Loss of a block: mean squared error",
        ("iteration 0 (plain rounding)", "as kept, after tuning"),
    )


def plot_hidden_states(path: str | Path, releases: dict[str, EvaluateRecord]) -> None:
    """Writes a PNG: mean squared error of the hidden states after each block, one panel for each release."""
    series = {
        name: (
            list(range(len(record.block_mse))),
            [errors["rounded"] for errors in record.block_mse],
            [errors["quantized"] for errors in record.block_mse],
        )
        for name, record in releases.items()
    }
    _plot_pairs(path, series, "Hidden states: mean squared error", ("plain rounding", "this release"))


def plot_experts(path: str | Path, models: dict[str, Sequence[RoutingRecord]]) -> None:
    """Writes a PNG: calibration tokens by MoE block and expert, one heat map for each name of `models`."""
    with plt.rc_context(STYLE):
        heights = [1.3 + 0.32 * min(len(_moe(records)), 30) for records in models.values()]
        shape = {"figsize": (9, sum(heights)), "height_ratios": heights}
        figure, axes = plt.subplots(len(models), 1, squeeze=False, **shape)
        for axis, (name, records) in zip(axes[:, 0], models.items(), strict=True):
            _draw_heat_map(figure, axis, name, _moe(records))
        _save(figure, path)


def _moe(records: Sequence[RoutingRecord]) -> list[RoutingRecord]:
    return [record for record in records if record.kind == "moe"]


def _draw_heat_map(figure: Figure, axis: Axes, name: str, records: list[RoutingRecord]) -> None:
    tokens = np.array([record.tokens_per_expert for record in records])
    rows, columns = tokens.shape
    image = axis.imshow(tokens, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, pad=0.015, fraction=0.03, aspect=30)
    bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    bar.set_label("calibration tokens")
    bar.outline.set_visible(False)
    if tokens.size <= ANNOTATED_CELLS:
        middle = tokens.max() / 2
        for row, column in np.ndindex(tokens.shape):
            colour = "black" if tokens[row, column] > middle else "white"
            text = _thousands(tokens[row, column])
            axis.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
    unreached = np.argwhere(tokens == 0)
    if len(unreached):
        rows_of, columns_of = unreached.T
        axis.scatter(columns_of, rows_of, marker="x", color=UNREACHED, s=30, label="never reached")
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
    axis.set_yticks(*_ticks(rows, [str(record.block) for record in records]))
    axis.set_xticks(*_ticks(columns, [str(column) for column in range(columns)]))
    axis.set_title(name, loc="left")
    axis.set_xlabel("Expert")
    axis.set_ylabel("Block")
    axis.grid(False)
    axis.spines[:].set_visible(False)


def plot_saliency(path: str | Path, keep: KeepList, tables: dict[int, pd.DataFrame]) -> None:
    """Writes a PNG: the saliency of each expert by MoE block, dropped experts marked.

    tables: see `requant.saliency`. A block's values are parts of its largest one, for they grow with depth.
    """
    values = np.array([table["saliency"] / (table["saliency"].max() or 1.0) for table in tables.values()])
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 1.9 + 0.32 * min(len(values), 30)))
        image = axis.imshow(values, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        bar = figure.colorbar(image, ax=axis, pad=0.015, fraction=0.03, aspect=30)
        bar.set_label("part of the block's\nlargest saliency")
        bar.outline.set_visible(False)
        for edge in range(1, keep.groups):
            axis.axvline(edge * keep.experts_before / keep.groups - 0.5, color="white", linewidth=2)
        _mark_dropped(axis, keep, list(tables))
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
        axis.set_yticks(*_ticks(len(values), [str(block) for block in tables]))
        axis.set_xticks(*_ticks(keep.experts_before, [str(expert) for expert in range(keep.experts_before)]))
        axis.set_title(f"{keep.model}: {keep.experts} of {keep.experts_before} experts kept", loc="left")
        axis.set_xlabel("Expert of the original" + (", by group of the router" if keep.groups > 1 else ""))
        axis.set_ylabel("Block")
        axis.grid(False)
        axis.spines[:].set_visible(False)
        _save(figure, path)


def _mark_dropped(axis: Axes, keep: KeepList, blocks: list[int]) -> None:
    """Crosses out the experts that a heat map's blocks lose; with bars where cells are too narrow for crosses."""
    everyone = set(range(keep.experts_before))
    dropped = [(row, expert) for row, block in enumerate(blocks) for expert in everyone - set(keep.blocks[block])]
    rows, columns = np.array(sorted(dropped)).T
    if len(blocks) * keep.experts_before > ANNOTATED_CELLS:
        axis.scatter(columns, rows, marker="|", color=DROPPED, s=20, linewidths=1, label="dropped")
        return
    for colour, width, label in (("white", 3.5, None), ("black", 1.5, "dropped")):  # seen on dark and on light
        axis.scatter(columns, rows, marker="x", color=colour, s=60, linewidths=width, label=label)


def _ticks(count: int, labels: list[str]) -> tuple[list[int], list[str]]:
    """Tick positions and labels, at most 16 of them."""
    step = math.ceil(count / 16)
    return list(range(0, count, step)), labels[::step]


def _thousands(value: int) -> str:
    if value < 1000:
        return str(value)
    return f"{value / 1000:.1f}k" if value < 99_950 else f"{value / 1000:.0f}k"


def _plot_pairs(
    path: str | Path,
    series: dict[str, tuple[list[int], list[float], list[float]]],
    quantity: str,
    labels: tuple[str, str],
) -> None:
    """Two lines over the blocks in a panel for each name of `series`: (blocks, before, after)."""
    with plt.rc_context(STYLE):
        columns = min(2, len(series))
        rows = math.ceil(len(series) / columns)
        width = 7.5 if columns == 1 else 10
        figure, axes = plt.subplots(rows, columns, figsize=(width, 3.4 * rows + 0.5), sharey=True, squeeze=False)
        for axis, (name, (blocks, before, after)) in zip(axes.flat, series.items(), strict=False):
            marker = 6 if len(blocks) <= 30 else 3.5
            shape = {"linewidth": 1.4, "markersize": marker}
            axis.plot(blocks, before, "--o", color=ROUNDED, markerfacecolor="white", label=labels[0], **shape)
            axis.plot(blocks, after, "-s", color=TUNED, label=labels[1], **shape)
            axis.set_title(name, loc="left")
            axis.set_xlabel("Block")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in list(axes.flat)[len(series) :]:
            axis.set_visible(False)
        if any(value > 0 for _, before, after in series.values() for value in (*before, *after)):
            axes[0, 0].set_yscale("log")
        for axis in axes[:, 0]:
            axis.set_ylabel(f"{quantity}\n(log scale)" if axis.get_yscale() == "log" else quantity)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    """Writes the PNG whole, without the date and version that matplotlib would put into it."""
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})
    plt.close(figure)
