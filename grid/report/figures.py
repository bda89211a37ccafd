"""The paper's figures redrawn from data: swaps of base models (5), pretraining (7), cumulative contributions (8), and all effects.

In: `Results` and its effects. Out: `Figure`s, each as SVG text for a page (ink follows the page's colour, so it reads on light
and dark) and PNG bytes for Markdown. Same data, same bytes. matplotlib is imported only here, without a display.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grid.effects import Effect
from grid.report import existing, plots
from grid.report.plots import INK, QUIET
from grid.report.tables import marks_of
from grid.results import Results


@dataclass(frozen=True)
class Figure:
    id: str
    title: str
    caption: str
    svg: str
    png: bytes
    marks: Sequence[str] = ()


def draw(results: Results, effects: Sequence[Effect]) -> list[Figure]:
    """Every figure that this study has data for."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        sketches = [
            plots.effects_plot(_subplots, results, effects),
            plots.swaps_plot(_subplots, results, effects),
            plots.pretraining_plot(_subplots, results),
            plots.steps_plot(_subplots, results),
            existing.existing_plot(_subplots, results),
        ]
        return [_finish(sketch, results) for sketch in sketches if sketch is not None]


STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "finegrid", "font.size": 8, "axes.titlesize": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": QUIET, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.axisbelow": True,
}  # fmt: skip


def _subplots(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Any, Any]:
    """(figure, its axes as an array); no pyplot, so no global state and no display."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _finish(sketch: plots.Sketch, results: Results) -> Figure:
    svg, png = io.StringIO(), io.BytesIO()
    sketch.figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    sketch.figure.set_layout_engine("none")  # laid out by the first save
    sketch.figure.savefig(png, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    text = _inline(svg.getvalue(), sketch.id, sketch.title)
    return Figure(sketch.id, sketch.title, sketch.caption, text, png.getvalue(), marks_of(results))


def _inline(svg: str, id: str, title: str) -> str:
    """For a page: no XML prologue, ids of its own, ink in the page's colour, the page's font, a name for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'id="([^"]+)"', rf'id="{id}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{id}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{id}-\1)", svg)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r"font-family:[^;\"]+;?", "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" stroke-linejoin="round" ', 1)
