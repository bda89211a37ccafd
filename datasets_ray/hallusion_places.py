"""HallusionBench's places: a row of its table in; the numbers of its set, figure and question out, and how many are asked of each group.

A figure's questions count together (fAcc), and so do those that ask the same of a set's figures, a question pair (qAcc). How many there are
is counted over all that is asked, before any is dropped, and kept in each question's meta: a group that lost one is not whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

PLACES = ("set_id", "figure_id", "question_id")
TOGETHER = ("figure_questions", "pair_questions")
"""What a question's meta calls the number of questions of its figure and of its pair."""


def places(cells: Mapping[str, str]) -> dict[str, str]:
    """The three numbers: columns of that name, or the end of an index such as `0_VD_illusion_1_0_2` (VLMEvalKit's `Hallusion_rating`
    splits it in six). Empty for other benchmarks."""
    given = [cells.get(name, "") for name in PLACES]
    if not all(given):
        parts = cells["index"].split("_")
        given = parts[-3:] if len(parts) >= 6 and all(part.isdecimal() for part in parts[-3:]) else []
    return dict(zip(PLACES, given))


def together(metas: Sequence[Mapping[str, Any]]) -> list[dict[str, int]]:
    """For the meta of each question that is asked, those of its figure and of its pair; empty for one without places."""
    groups = [_groups(meta) for meta in metas]
    asked = Counter(group for names in groups for group in names)
    return [{said: asked[group] for said, group in zip(TOGETHER, names)} for names in groups]


def _groups(meta: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    if "set_id" not in meta:
        return []
    kind = meta["category"], meta["l2_category"], meta["set_id"]
    return [("figure", *kind, meta["figure_id"]), ("pair", *kind, meta["question_id"])]
