"""Existing models: fine-grained average against a general average, and each model against its own encoder (the paper's figure 3).

In: `Results` of a study with `general_axis`, and the CSV of numbers that the user brings. Out: a table and a figure. A model without a
number on the general axis is left out of that half of the figure and named; nothing is averaged in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.errors import UserError
from grid import general_axis
from grid.report.plots import COLOURS, INK, QUIET, Sketch, Subplots
from grid.report.published import published_folder
from grid.report.table import Cell, Column, Table, arm_page, number, span
from grid.report.tables import average_interval, marks_of, title_of
from grid.results import PER_CLASS, Arm, Results

NEAR = 1.2
"""Labels of points closer than this, in percentage points, are set apart."""


def fine_group(results: Results) -> str | None:
    """The group whose average is the figure's: `fine_grained`, else the study's first."""
    return "fine_grained" if "fine_grained" in results.groups else next(iter(results.groups), None)


def axis_of(results: Results) -> tuple[str, dict[str, float], str] | None:
    """(the axis' name, model → number, what is wrong with the file) of a study that has one."""
    given = results.study.get("general_axis")
    if not given:
        return None
    beside = Path(results.study["file"]).parent if results.study.get("file") else Path()
    tried = (Path(given["file"]), beside / given["file"], published_folder() / Path(given["file"]).name)
    file = next((path for path in tried if path.is_file()), tried[0])
    try:
        return given["name"], general_axis.read(file), ""
    except UserError as error:
        return given["name"], {}, error.what


def encoder_average(arm: Arm, members: tuple[str, ...]) -> float | None:
    """The encoder's own zero-shot score among the same options, averaged as the model's are; None unless it has all of them."""
    values: list[float] = []
    for benchmark in members:
        score = arm.scores.get(benchmark)
        share = "among_choices_mean_per_class" if score is not None and score.metric == PER_CLASS else "among_choices"
        found = arm.zeroshot.get(benchmark, {}).get(share)
        if found is None:
            return None
        values.append(float(found))
    return 100 * float(np.mean(values)) if values else None


def existing_table(results: Results) -> Table | None:
    """A row a model; None in a study without a general axis."""
    axis, group = axis_of(results), fine_group(results)
    if axis is None or group is None:
        return None
    name, known, wrong = axis
    columns = [Column("model", numeric=False), Column("encoder", numeric=False), Column(title_of(group)), Column("encoder alone")]
    table = Table("existing", "Existing models beside their encoders", [*columns, Column("gap"), Column(name)], marks=marks_of(results))
    table.caption = (
        "percentage points; encoder alone: zero-shot among the same options, averaged over the same benchmarks; gap: model − encoder"
    )
    for arm in results.arms:
        value, alone = arm.value(group, results.groups), encoder_average(arm, results.groups[group])
        interval = average_interval(arm, results.groups[group]) if value is not None else None
        kind = "stand-in" if arm.stands_in else "" if arm.source == "released" else "trained here"
        table.rows.append([
            Cell(arm.name, kind, arm_page(arm.name)), Cell(arm.axes.get("encoder", "")),
            number(value, span(interval.low, interval.high) if interval else "", arm_page(arm.name), arm.reason(group, results.groups)),
            number(alone, href=arm_page(arm.name), reason="its encoder isn't asked by itself here"),
            number(None if value is None or alone is None else value - alone, "", arm_page(arm.name), "one of two is missing", signed=True),
            number(known.get(arm.name), reason=f"no number in the file of {name}"),
        ])  # fmt: skip
    strangers = sorted(set(known) - {arm.name for arm in results.arms})
    if wrong:
        table.notes.append(f"{name}: {wrong}")
    if strangers:
        table.notes.append(f"{name} has numbers for models that this study doesn't ask: {', '.join(strangers)}")
    return table if table.rows else None


def existing_plot(subplots: Subplots, results: Results) -> Sketch | None:
    """Left: fine-grained against general, the encoder's own score above each model. Right: each model against its encoder."""
    axis, group = axis_of(results), fine_group(results)
    if axis is None or group is None:
        return None
    name, known, _ = axis
    scored = [(arm, value) for arm in results.arms if (value := arm.value(group, results.groups)) is not None]
    alone = {arm.name: encoder_average(arm, results.groups[group]) for arm, _ in scored}
    left = [(known[arm.name], value, arm) for arm, value in scored if arm.name in known]
    right = [(own, value, arm) for arm, value in scored if (own := alone[arm.name]) is not None]
    halves = [half for half in (("general", left), ("encoder", right)) if half[1]]
    if not halves:
        return None
    encoders = list(dict.fromkeys(arm.axes.get("encoder", "") for arm, _ in scored))
    figure, axes = subplots(1, len(halves), (4.6 * len(halves) + 0.4, 4.2), sharey=True)
    for (kind, points), ax in zip(halves, axes[0], strict=True):
        if kind == "encoder":
            ends = [min(min(x, y) for x, y, _ in points), max(max(x, y) for x, y, _ in points)]
            ax.plot(ends, ends, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
        for x, y, arm in points:
            colour = COLOURS[encoders.index(arm.axes.get("encoder", "")) % len(COLOURS)]
            own = alone[arm.name]
            if kind == "general" and own is not None:
                ax.plot([x, x], [y, own], color=colour, linewidth=0.8, alpha=0.6)
                ax.plot(x, own, "D", markerfacecolor="none", markeredgecolor=colour, markersize=5)
            ax.plot(x, y, "o", color=colour, markersize=6)
        _labels(ax, points)
        ax.set_xlabel(f"{name}, %" if kind == "general" else "its encoder alone, zero-shot among the same options, %")
        ax.grid(color=QUIET, alpha=0.25, linewidth=0.6)
        ax.margins(0.16, 0.08)
    axes[0][0].set_ylabel(f"{title_of(group)}, %")
    from matplotlib.lines import Line2D

    shown = [encoder for encoder in encoders if encoder]
    keys = [Line2D([], [], marker="o", linestyle="", color=COLOURS[encoders.index(e) % len(COLOURS)], label=e) for e in shown]
    axes[0][0].legend(handles=keys, ncols=min(3, len(keys)), loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=7.5)
    return Sketch(figure, "figure-3", "Figure 3. What existing models know of fine-grained classes", _caption(name, halves, results, group))


def _labels(ax: Any, points: list[tuple[float, float, Arm]]) -> None:
    """Names beside their points; where points crowd, one below the other."""
    last: list[tuple[float, float]] = []
    for x, y, arm in sorted(points, key=lambda point: -point[1]):
        crowded = sum(1 for a, b in last if abs(b - y) < NEAR and abs(a - x) < 3 * NEAR)
        ax.annotate(arm.name, (x, y), xytext=(6, -3 - 8 * crowded), textcoords="offset points", fontsize=6.5, color=INK)
        last.append((x, y))


def _caption(name: str, halves: list[tuple[str, list[Any]]], results: Results, group: str) -> str:
    parts = []
    for kind, points in halves:
        there = {arm.name for _, _, arm in points}
        missing = [arm.name for arm in results.arms if arm.name not in there]
        lost = f" (left out: {', '.join(missing)})" if missing else ""
        if kind == "general":
            parts.append(f"{title_of(group)} average against the {name}; diamonds: the model's encoder alone{lost}")
        else:
            parts.append(f"each model against its encoder's zero-shot score, dashed where they are equal{lost}")
    if halves[0][0] != "general":
        parts.append(f"no model has a number for the {name} yet")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."
