"""`evaluation.method` in a study: one or several, what a model is asked and what is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from datasets_ray.errors import UserError
from grid.plan import make_plan

STUDY = Path(__file__).resolve().parents[2] / "experiments" / "full_ablation.yaml"


def stages(method: str) -> dict[str, list[dict[str, Any]]]:
    made = make_plan(STUDY, profile="tiny", arms=["row-03"], sets=[f"evaluation.method={method}"])["stages"]
    return {kind: [stage for stage in made if stage["kind"] == kind] for kind in ("predict", "score")}


def test_one_pass_makes_the_answers_and_the_first_method_is_scored() -> None:
    one, several, turned = stages("generate"), stages("[likelihood, generate]"), stages("[generate, likelihood]")
    assert {s["spec"]["method"] for s in one["predict"]} == {s["spec"]["method"] for s in one["score"]} == {"generate"}
    assert all(s["spec"]["method"] == ["generate", "likelihood"] for s in several["predict"])
    assert {s["spec"]["method"] for s in several["score"]} == {"likelihood"}
    assert [s["id"] for s in stages("[first_token]")["predict"]] == [s["id"] for s in stages("first_token")["predict"]]
    # which of them is scored is no question to a model
    assert [s["id"] for s in several["predict"]] == [s["id"] for s in turned["predict"]] != [s["id"] for s in one["predict"]]
    assert not {s["id"] for s in several["score"]} & {s["id"] for s in turned["score"]}


def test_mistakes_are_named() -> None:
    for given, said in (
        ("first", r"evaluation.method: 'first' is not a choice(.|\n)*did you mean 'first_token'"),
        ("[generate, liklihood]", r"'liklihood' is not a choice(.|\n)*did you mean 'likelihood'"),
        ("[]", "evaluation.method: no method at all"),
        ("[generate, generate]", "evaluation.method: a method twice"),
    ):
        with pytest.raises(UserError, match=said):
            stages(given)
