"""Model specs of real plans: every part builds as planned, and has exactly the parameters that the plan counts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from grid.plan import make_plan

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def fresh(model: dict) -> dict:
    """The model with fresh weights in every part: what it is, without what it has learned."""
    made = copy.deepcopy(model)
    for part in made["parts"].values():
        part["weights"] = {"fresh": 0}
    return made


@pytest.mark.parametrize("study", ["full_ablation", "photos"])
def test_every_planned_model_builds_with_the_parameters_that_the_plan_counts(study, tmp_path):
    pytest.importorskip("torch")
    from trainers.context import Context
    from trainers.models import build, freeze_table, train_parts

    seen: list[dict] = []
    for stage in make_plan(EXPERIMENTS / f"{study}.yaml", profile="tiny")["stages"]:
        if stage["kind"] != "train":
            continue
        model, cost = fresh(stage["spec"]["model"]), stage["cost"]
        if model in seen:
            continue
        seen.append(model)
        built = build(model, Context.local(tmp_path / stage["id"], stage))
        train_parts(built, set(cost["trainable"]))
        assert {row["part"]: row["parameters"] for row in freeze_table(built)} == cost["parameters"], stage["name"]
    assert len(seen) >= 4


def test_released_models_of_the_cluster_profile_have_their_published_sizes():
    plan = make_plan(EXPERIMENTS / "full_ablation.yaml", profile="cluster")
    tuned = {stage["name"]: stage["cost"] for stage in plan["stages"] if stage["kind"] == "train"}
    assert tuned["finetune row-12"]["parameters"]["llm"] == 6_738_415_616
    assert tuned["finetune row-14"]["parameters"]["llm"] == 7_615_616_512
    assert sum(tuned["finetune row-11"]["parameters"].values()) == 8_291_375_616
    assert tuned["pretrain row-12"]["parameters"]["connector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert tuned["pretrain row-12"]["steps"] == 2181 and tuned["finetune row-12"]["steps"] == 5198  # as LLaVA-1.5's logs say
