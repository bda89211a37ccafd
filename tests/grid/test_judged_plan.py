"""A judge in a study: what of it makes a score another score, what doesn't, and which stages know of it at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datasets_ray.errors import UserError
from grid.plan import make_plan
from trainers import judging

ABLATION = Path(__file__).parents[2] / "experiments" / "full_ablation.yaml"
JUDGE = {"url": "http://127.0.0.1:8000/v1", "model": "judge-7b"}
ARM = ["row-13*"]


def planned(judge: dict[str, str], *more: str) -> dict[str, dict[str, Any]]:
    """Stages by id."""
    sets = [f"evaluation.judge.{key}={value}" for key, value in judge.items()]
    plan = make_plan(ABLATION, profile="tiny", arms=ARM, sets=[*sets, *more])
    return {stage["id"]: stage for stage in plan["stages"]}


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Any]]:
    return planned({})


def test_only_scores_of_judged_benchmarks_know_of_it(plain: dict[str, dict[str, Any]]) -> None:
    assert set(planned(JUDGE)) == set(plain), "a judge that no benchmark asks for changes nothing"
    assert set(planned({}, "benchmarks.mmbench.judge=extract")) == set(plain), "nor does a benchmark that finds none"
    judged = planned({**JUDGE, "key_env": "JUDGE_KEY"}, "benchmarks.mmbench.judge=extract")
    new = [judged[id] for id in set(judged) - set(plain)]
    assert new and {stage["kind"] for stage in new} == {"score"} and all("mmbench" in stage["name"] for stage in new)
    for stage in new:
        spec = stage["spec"]
        assert spec["judge"] == judging.identity("judge-7b", "extract") and set(stage["needs"]) == {spec["predictions"], spec["questions"]}
        assert stage["runtime"]["judge"]["url"] == JUDGE["url"] and stage["runtime"]["judge"]["key_env"] == "JUDGE_KEY"
        assert "8000" not in json.dumps(spec) and "JUDGE_KEY" not in json.dumps(spec)
    assert not [stage for id, stage in judged.items() if "judge" in stage["runtime"] and id in plain]


def test_the_model_is_its_identity_the_address_and_the_key_are_not() -> None:
    asks = "benchmarks.mmbench.judge=grade"
    known = set(planned(JUDGE, asks))
    assert set(planned({"url": "https://elsewhere/v1", "model": "judge-7b", "key_env": "OTHER", "timeout": "9"}, asks)) == known
    assert set(planned({**JUDGE, "model": "judge-8b"}, asks)) != known
    assert set(planned(JUDGE, "benchmarks.mmbench.judge=verdict")) != known


@pytest.mark.parametrize(("judge", "says"), [
    ({"url": "http://me:secret@h/v1", "model": "m"}, "a key belongs into the environment variable"),
    ({"url": "h/v1", "model": "m"}, "no http"), ({"url": "http://h/v1"}, "evaluation.judge.model: missing"),
    ({**JUDGE, "key_env": "sk-123"}, "the key itself never stands in a study"),
    ({**JUDGE, "keyenv": "K"}, "unknown key"),
])  # fmt: skip
def test_a_judge_is_read_strictly(judge: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        planned(judge)


def test_an_unknown_prompt_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="'grades' is not a choice"):
        planned(JUDGE, "benchmarks.mmbench.judge=grades")
