"""What MLflow's pages show of a study at first sight: its arms by axis, as a view that needs no set-up.

In: the plan and the ids of an experiment's parent runs. Out: the state of MLflow's runs page as it keeps it for shared views (the
experiment's tag `mlflow.sharedViewState.<key>`, read from MLflow 3.17's page), and the address that opens it. A version that doesn't know
the tag shows its usual page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

KEY = "finegrid"
TAG = f"mlflow.sharedViewState.{KEY}"
EXPANDED = {"mlflow.runType": "evaluation"}
"""Runs that carry it are listed under their parent from the start; others hide behind a plus sign."""
BASE = "weights"
"""First word of base models' series: their charts come after the arms' own."""


def path(experiment: str) -> str:
    """What follows a server's address to open the view."""
    return f"/#/experiments/{experiment}/runs?viewStateShareKey={KEY}&compareRunsMode=CHART"


def view(plan: dict[str, Any], parents: Sequence[str]) -> dict[str, Any]:
    """Parallel coordinates over the axes that vary, then a bar chart of every group of benchmarks; parents open and not drawn."""
    values: dict[str, set[str]] = {}
    for arm in [*plan["arms"], *plan.get("references", [])]:
        for axis, value in arm.get("axes", {}).items():
            values.setdefault(axis, set()).add(str(value))
    axes = [f"axis.{axis}" for axis, found in values.items() if len(found) > 1]
    scores = [f"final/{group}" for group in plan.get("groups", {})]
    card = {"deleted": False, "isGenerated": False, "runsCountToCompare": 100, "metricSectionId": KEY}
    charts: list[dict[str, Any]] = [
        {"type": "PARALLEL", "uuid": f"{KEY}-axes", "selectedParams": axes, "selectedMetrics": scores, "showAllRuns": False, **card}
    ]
    charts += [{"type": "BAR", "uuid": f"{KEY}-{score}", "metricKey": score, **card} for score in scores]
    section = {"uuid": KEY, "name": "Arms by axis", "display": True, "isReordered": False, "deleted": False, "isGenerated": False}
    return {
        "compareRunCharts": charts,
        "compareRunSections": [{**section, "columns": 1, "cardHeight": 420}],
        "runsExpanded": dict.fromkeys(parents, True), "runsVisibilityMap": dict.fromkeys(parents, False), "runsHiddenMode": "SHOW_ALL",
        "runsPinned": [], "runsHidden": [], "groupBy": None, "groupsExpanded": {}, "useGroupedValuesInCharts": True,
        "selectedColumns": [f"params.`{axis}`" for axis in axes] + [f"metrics.`{score}`" for score in scores],
        "columnOrder": [], "columnWidths": {}, "viewMaximized": False, "runListHidden": False, "isAccordionReordered": False,
        "hideEmptyCharts": True, "autoRefreshEnabled": True,
        "orderByKey": "attributes.start_time", "orderByAsc": False, "searchFilter": "", "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs", "startTime": "ALL", "datasetsFilter": [],
    }  # fmt: skip
