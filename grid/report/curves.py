"""Training curves of an arm as small inline SVG, drawn straight from the stages' metrics files.

In: `metrics.jsonl` beside a finished train stage. Out: HTML; stages without a recorded loss are left out.
"""

from __future__ import annotations

import json
from pathlib import Path

from grid.report.markup import escape
from grid.report.table import plain
from grid.results import Arm, Results

WIDTH, HEIGHT, POINTS = 300, 84, 160


def curves_html(results: Results, arm: Arm) -> str:
    """One small panel per train stage of the arm, in the order of training."""
    panels = []
    for id in arm.stages:
        stage = results.stages.get(id, {})
        if stage.get("kind") != "train" or results.store is None:
            continue
        points = losses(results.store / id / "metrics.jsonl")
        if len(points) > 1:
            panels.append(_panel(stage.get("name", id), points))
    return f'<section><h2>Training loss</h2><div class="curves">{"".join(panels)}</div></section>' if panels else ""


def losses(path: Path) -> list[tuple[float, float]]:
    """(step, loss) by step; of a step recorded twice (a resumed attempt) the last counts."""
    found: dict[float, float] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a torn last line of a killed attempt
        loss = record.get("train/loss") if isinstance(record, dict) else None
        if isinstance(loss, (int, float)) and loss == loss and isinstance(record.get("step"), (int, float)):
            found[float(record["step"])] = float(loss)
    return sorted(found.items())


def _panel(name: str, points: list[tuple[float, float]]) -> str:
    first, last = points[0][1], points[-1][1]
    if len(points) > POINTS:
        size = len(points) / POINTS
        chunks = [points[int(k * size) : int((k + 1) * size)] for k in range(POINTS)]
        points = [(chunk[-1][0], sum(loss for _, loss in chunk) / len(chunk)) for chunk in chunks if chunk]
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    begin, span = points[0][0], (points[-1][0] - points[0][0]) or 1.0
    scale = (high - low) or 1.0
    line = " ".join(f"{WIDTH * (step - begin) / span:.1f},{4 + (HEIGHT - 8) * (high - loss) / scale:.1f}" for step, loss in points)
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss of {escape(name)}"><polyline points="{line}"/></svg>'
        f"<figcaption>{escape(name)}<br><small>{plain(first, digits=2)} → {plain(last, digits=2)} in {int(points[-1][0])} steps</small>"
        "</figcaption></figure>"
    )
