"""What each figure shows, drawn on matplotlib axes: effects, swaps of base models, pretraining, cumulative contributions.

In: `Results`, effects and a function that makes axes (so that nothing here imports matplotlib at once). Out: `Sketch`es, or
None where a study has no data for the figure. Published values appear beside the run's own wherever there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grid.effects import Effect
from grid.report.tables import average_interval, printed_effects, title_of, titled
from grid.results import Arm, Results

INK = "#0b0c0d"
QUIET = "#8a8f98"
COLOURS = ("#3b82c4", "#d9822b", "#3a9e78", "#a06ab4", "#c4565b", "#8c7a3d")
"""Told apart with every common colour vision, on light and on dark."""
UNEXPLAINED = "not explained here"


Subplots = Callable[..., tuple[Any, Any]]
"""(rows, columns, size in inches, sharex=, sharey=) → figure, axes[rows, columns]."""


@dataclass(frozen=True)
class Sketch:
    figure: Any
    id: str
    title: str
    caption: str


def effects_plot(subplots: Subplots, results: Results, effects: Sequence[Effect]) -> Sketch | None:
    """All contrasts as points with intervals, the published effect as a hollow diamond."""
    shown = [e for e in effects if any(g.mean is not None for g in e.groups.values())]
    if not shown:
        return None
    groups, printed = list(results.groups), printed_effects(results)
    figure, axes = subplots(1, len(groups), (4.0 * len(groups) + 1.8, 0.34 * len(shown) + 0.9), sharey=True)
    for colour, group, ax in zip(COLOURS, groups, axes[0], strict=False):
        ax.axvline(0, color=QUIET, linewidth=0.8)
        for y, effect in enumerate(shown):
            estimate, known = effect.groups[group], printed.get(effect.contrast.name, {}).get(group)
            if estimate.low is not None and estimate.high is not None:
                ax.plot([estimate.low, estimate.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
            if estimate.mean is not None:
                ax.plot(estimate.mean, y, "o", color=colour, markersize=6)
            if known is not None and results.directory is not None:
                ax.plot(known, y + 0.22, "D", markerfacecolor="none", markeredgecolor=INK, markersize=4.5, markeredgewidth=0.9)
        ax.set_title(title_of(group))
        ax.set_xlabel("percentage points")
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", color=QUIET, alpha=0.25, linewidth=0.6)
    axes[0][0].set_yticks(range(len(shown)), [e.contrast.name.replace("_", " ") for e in shown])
    axes[0][0].set_ylim(len(shown) - 0.4, -0.6)
    beside = "; diamonds: published" if printed and results.directory is not None else ""
    return Sketch(figure, "effects", "Effects", f"Mean over matched pairs, 95 % interval over questions{beside}.")


def swaps_plot(subplots: Subplots, results: Results, effects: Sequence[Effect]) -> Sketch | None:
    """Figure 5: every matched pair of the contrasts over language model and encoder, as an arrow from start to goal."""
    rows: list[tuple[Effect, Arm, Arm]] = [(e, a, b) for e in effects if e.contrast.axis in ("llm", "encoder") for a, b in e.pairs]
    rows = [r for r in rows if any(arm.value(g, results.groups) is not None for g in results.groups for arm in r[1:])]
    if not rows:
        return None
    groups, twin = list(results.groups), results.published
    figure, axes = subplots(1, len(groups), (4.4 * len(groups) + 2.6, 0.26 * len(rows) + 1.2), sharey=True)
    names = list(dict.fromkeys(e.contrast.name for e, _, _ in rows))
    offsets = {name: 0.7 * k for k, name in enumerate(names)}
    heights = [k + offsets[e.contrast.name] for k, (e, _, _) in enumerate(rows)]
    for group, ax in zip(groups, axes[0], strict=True):
        for y, (effect, start, goal) in zip(heights, rows, strict=True):
            colour = COLOURS[names.index(effect.contrast.name) % len(COLOURS)]
            if twin is not None:
                before, after = (
                    None if arm is None else arm.value(group, twin.groups) for arm in (twin.by_row(start.row), twin.by_row(goal.row))
                )
                _arrow(ax, before, after, y + 0.28, QUIET, 0.8)
            _arrow(ax, start.value(group, results.groups), goal.value(group, results.groups), y, colour, 1.8)
        ax.set_title(title_of(group))
        ax.set_xlabel("score, %")
        ax.grid(axis="x", color=QUIET, alpha=0.25, linewidth=0.6)
        ax.tick_params(axis="y", length=0)
    labels = []
    for effect, start, _ in rows:
        rest = [v for axis, v in start.axes.items() if axis in ("encoder", "llm", "pretraining") and axis != effect.contrast.axis]
        labels.append(f"{' · '.join(rest)}")
    axes[0][0].set_yticks(heights, labels)
    axes[0][0].set_ylim(heights[-1] + 0.8, -1.1)
    for name in names:
        y = heights[next(k for k, r in enumerate(rows) if r[0].contrast.name == name)]
        colour = COLOURS[names.index(name) % len(COLOURS)]
        across = axes[0][0].get_yaxis_transform()
        axes[0][0].text(0.01, y - 0.42, name.replace("_", " "), transform=across, fontsize=7, color=colour, va="bottom")
    beside = "; thin grey: the published pair" if twin is not None else ""
    return Sketch(figure, "figure-5", titled(results, "Figure 5", "Swapping language model and encoder"),
                  f"One arrow per matched pair, from the arm before the swap to the arm after it{beside}.")  # fmt: skip


def _arrow(ax: Any, start: float | None, goal: float | None, y: float, colour: str, width: float) -> None:
    if start is None or goal is None:
        return
    ax.plot([start, goal], [y, y], color=colour, linewidth=0.01)
    style = {"arrowstyle": "-|>,head_width=0.22,head_length=0.4", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=(goal, y), xytext=(start, y), arrowprops=style)
    ax.plot(start, y, "o", color=colour, markersize=width * 1.7)


def pretraining_plot(subplots: Subplots, results: Results) -> Sketch | None:
    """Figure 7: pretraining data × what it updates, for each encoder and language model."""
    trained = [arm for arm in results.arms if {"pretraining", "updating"} <= set(arm.axes) and arm.source != "released"]
    trained = [arm for arm in trained if any(arm.value(group, results.groups) is not None for group in results.groups)]
    arms = [arm for k, arm in enumerate(trained) if all(arm.axes != later.axes for later in trained[k + 1 :])]  # row 12, not row 2
    families: dict[tuple[str, ...], list[Arm]] = {}
    for arm in arms:
        families.setdefault(tuple(arm.axes.get(axis, "") for axis in ("encoder", "llm", "arch")), []).append(arm)
    families = {key: members for key, members in families.items() if len(members) > 1}
    if not families:
        return None
    kinds = list(dict.fromkeys(_kind(arm) for members in families.values() for arm in members))
    kinds.sort(key=lambda kind: (kind[1] != "connector", kind[0] != "none"))
    groups, twin = list(results.groups), results.published
    size = (max(6.0, 1.6 * len(families) + 1.2), 2.2 * len(groups) + 0.6)
    figure, axes = subplots(len(groups), 1, size, sharex=True)
    width = 0.8 / len(kinds)
    for group, ax in zip(groups, axes[:, 0], strict=True):
        for x, members in enumerate(families.values()):
            for place, arm in enumerate(sorted(members, key=lambda arm: kinds.index(_kind(arm)))):
                k, at = kinds.index(_kind(arm)), x + (place - (len(members) - 1) / 2) * width
                value = arm.value(group, results.groups)
                if value is None:
                    continue
                interval = average_interval(arm, results.groups[group])
                error = [[value - interval.low], [interval.high - value]] if interval else None
                style = {"ecolor": INK, "error_kw": {"linewidth": 0.9}}
                ax.bar(at, value, width * 0.92, color=COLOURS[k % len(COLOURS)], yerr=error, **(style if error else {}))
                known = twin.by_row(arm.row) if twin is not None else None
                if known is not None and twin is not None and known.value(group, twin.groups) is not None:
                    ax.plot(at, known.value(group, twin.groups), "D", markerfacecolor="none", markeredgecolor=INK, markersize=4)
        ax.set_ylabel(f"{title_of(group)}, %")
        ax.grid(axis="y", color=QUIET, alpha=0.25, linewidth=0.6)
    bare = len({key[2] for key in families}) == 1
    axes[-1][0].set_xticks(range(len(families)), ["\n".join(key[:2] if bare else key) for key in families], fontsize=7)
    from matplotlib.patches import Rectangle

    named = [data if data == "none" else f"{data}, {what}" for data, what in kinds]
    keys = [Rectangle((0, 0), 1, 1, color=COLOURS[k % len(COLOURS)], label=name) for k, name in enumerate(named)]
    axes[0][0].legend(handles=keys, ncols=len(keys), loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=7.5)
    beside = "; diamonds: published" if twin is not None else ""
    ranges = "; bars carry 95 % intervals" if results.directory is not None else ""
    return Sketch(figure, "figure-7", titled(results, "Figure 7", "Pretraining data and what it updates"),
                  f"Captions used in pretraining and the parts updated by it, by encoder and language model{ranges}{beside}.")  # fmt: skip


def _kind(arm: Arm) -> tuple[str, str]:
    return arm.axes["pretraining"], arm.axes["updating"]


def steps_plot(subplots: Subplots, results: Results) -> Sketch | None:
    """Figure 8: what each change contributes between the weakest and the strongest model."""
    sources = [("this run", results), ("published", results.published)] if results.directory is not None else [("", results)]
    groups = list(results.groups)
    drawn = [(name, source) for name, source in sources if source is not None and _complete(_ladder(source, results.steps), source, groups)]
    if not drawn or drawn[0][1] is not results:
        return None
    size = (4.6 * len(groups) + 1.0, 2.7 * len(drawn) + 0.4)
    figure, axes = subplots(len(drawn), len(groups), size, sharex="row", sharey="row")
    for (name, source), line in zip(drawn, axes, strict=True):
        ladder = _ladder(source, results.steps)
        for colour, group, ax in zip(COLOURS, groups, line, strict=False):
            level = 0.0
            for x, (label, arm) in enumerate(ladder):
                value = arm.value(group, source.groups)
                if value is None:
                    ax.text(x, level, "–", ha="center", color=INK)
                    continue
                anchor = x == 0 or x == len(ladder) - 1
                gap = label == UNEXPLAINED
                height, bottom = (value, 0.0) if anchor else (value - level, level)
                ax.bar(x, height, 0.72, bottom, color=QUIET if anchor or gap else colour, alpha=0.55 if gap else 1.0)
                text = f"{value:.1f}" if anchor else f"{value - level:+.1f}".replace("-", "−")
                ax.text(x, max(value, level) + 0.8, text, ha="center", va="bottom", fontsize=7, color=INK)
                level = value
            ax.set_xticks(range(len(ladder)), [label for label, _ in ladder], rotation=28, ha="right", fontsize=6.5)
            ax.set_title(f"{title_of(group)}{', ' + name if name else ''}")
            ax.grid(axis="y", color=QUIET, alpha=0.25, linewidth=0.6)
        line[0].set_ylabel("score, %")
        line[0].set_ylim(0, 1.14 * max(arm.value(g, source.groups) or 0.0 for g in groups for _, arm in ladder))
    return Sketch(figure, "figure-8", "Figure 8. What each component contributes",
                   "From the weakest arm to the strongest model; the gap that no single change here explains is paler.")  # fmt: skip


def _complete(ladder: list[tuple[str, Arm]], source: Results, groups: Sequence[str]) -> bool:
    """Whether there is a chain to draw: three steps or more, and something measured on its ends."""
    return len(ladder) > 2 and bool(groups) and all(ladder[k][1].value(g, source.groups) is not None for k in (0, -1) for g in groups)


def _ladder(source: Results, steps: Sequence[dict[str, Any]]) -> list[tuple[str, Arm]]:
    """The chain of steps that starts where nothing is taken from and ends at the last row: (label, arm) in order."""
    chain, seen = [], {step["row"]: step for step in steps if step["row"] is not None}
    starts = [step["from_row"] for step in steps if step["from_row"] is not None and seen.get(step["from_row"], {}).get("from_row") is None]
    row = starts[0] if starts else None
    while row is not None and source.by_row(row) is not None:
        step = seen[row]
        chain.append((step["label"], source.by_row(row)))
        row = next((s["row"] for s in steps if s["from_row"] == row), None)
    for start in starts[1:]:
        end = next((s for s in steps if s["from_row"] == start), None)
        if end is not None and source.by_row(start) is not None and source.by_row(end["row"]) is not None:
            chain.append((UNEXPLAINED, source.by_row(start)))
            chain.append(("finetuning data", source.by_row(end["row"])))
            chain.append((end["label"], source.by_row(end["row"])))
    return [(label, arm) for label, arm in chain if arm is not None]
