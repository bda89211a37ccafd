"""Law 7: effects over the published table are the published effects; a changed table changes them by the arithmetic amount."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datasets_ray.errors import UserError
from grid import effects, stats
from grid.report.published import find_table, load_published
from grid.results import PER_CLASS, Answers, Arm, Results, Score

TABLE = find_table("fine_grained")
PRINTED = {row["effect"]: row for row in csv.DictReader(TABLE.with_name("fine_grained_effects.csv").open())}
AXES = ["encoder", "llm", "arch", "pretraining", "finetuning", "updating"]


def _computed(table: Path = TABLE) -> dict[str, effects.Effect]:
    return {effect.contrast.name: effect for effect in effects.compute(load_published(table, beside=TABLE))}


def _perturbed(folder: Path, row: int, column: str, by: float) -> Path:
    lines = list(csv.DictReader(TABLE.open()))
    for line in lines:
        if line["row"] == str(row):
            line[column] = f"{float(line[column]) + by:.1f}"
    path = folder / "perturbed.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return path


def test_published_effects_come_out_of_the_published_table() -> None:
    computed = _computed()
    assert list(computed) == list(PRINTED) and len(PRINTED) == 8
    for name, row in PRINTED.items():
        assert len(computed[name].pairs) == int(row["pairs"]), name
        for group in ("fine_grained", "general_vqa"):
            estimate = computed[name].groups[group]
            assert estimate.mean == pytest.approx(float(row[f"{group}_pp"]), abs=0.1), (name, group)
            assert estimate.low is None and estimate.high is None, "there is no row-level data"


def test_the_command_prints_them_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from grid.report import main; main(['--published', 'fine_grained', '--json']); "
        "print([m for m in ('torch', 'ray', 'matplotlib', 'pyarrow', 'pandas') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=TABLE.parents[2])
    assert done.stderr.strip() == "[]"
    document = json.loads(done.stdout)
    assert len(document["arms"]) == 24 and set(document["arms"][0]["axes"]) == set(AXES)
    for effect in document["effects"]:
        row = PRINTED[effect["name"]]
        assert (effect["axis"], effect["from"], effect["to"], effect["pairs"]) == (row["axis"], row["from"], row["to"], int(row["pairs"]))
        for group in ("fine_grained", "general_vqa"):
            assert effect[group]["mean"] == pytest.approx(float(row[f"{group}_pp"]), abs=0.1)
            assert effect[group]["low"] is None and effect[group]["high"] is None


def test_a_perturbed_row_moves_each_effect_by_its_share_of_the_pairs(tmp_path: Path) -> None:
    """Row 14 (Qwen2, CLIP, LLaVA captions) is the goal of one of 6 pairs, the start of one of 5 and of one of 4, and in no other."""
    before, after = _computed(), _computed(_perturbed(tmp_path, 14, "fine_grained", 6.0))
    moved = {name: after[name].groups["fine_grained"].mean - before[name].groups["fine_grained"].mean for name in before}
    expected = {"qwen2_vs_vicuna": 6 / 6, "dfn_vs_clip_with_pretraining": -6 / 5, "pixmo_vs_llava_captions": -6 / 4}
    assert moved == pytest.approx({name: expected.get(name, 0.0) for name in before}, abs=1e-9)
    assert all(after[name].groups["general_vqa"] == before[name].groups["general_vqa"] for name in before)


def test_a_perturbed_benchmark_moves_its_own_effect_and_is_noticed(tmp_path: Path) -> None:
    path = _perturbed(tmp_path, 23, "flowers", 10.0)
    assert _computed(path)["unfreeze_llm_in_pretraining"].benchmarks["flowers"].mean == pytest.approx(6.35 + 5.0)
    assert any("row-23" in notice and "fine_grained" in notice for notice in load_published(path, beside=TABLE).notices)
    assert not any("row-23" in notice for notice in load_published(TABLE).notices)


def _arm(name: str, encoder: str, source: str = "trained", init: str = "fresh", seed: int = 0, llm: str = "a") -> Arm:
    return Arm(name, {"encoder": encoder, "llm": llm}, source=source, init=init, seed=seed)


def _contrast(where: str = "", **more: str) -> effects.Contrast:
    return effects.parse_contrast(
        {"name": "c", "axis": "encoder", "from": "weak", "to": "strong", "where": where, **more}, ["encoder", "llm"]
    )


def test_pairs_differ_in_the_axis_only() -> None:
    arms = [_arm("w", "weak"), _arm("s", "strong"), _arm("other llm", "strong", llm="b")]
    arms += [_arm("other start", "strong", init="released connector"), _arm("other seed", "strong", seed=1)]
    assert [(a.name, b.name) for a, b in effects.matched_pairs(arms, _contrast())] == [("w", "s")]


def test_a_released_model_pairs_only_where_no_trained_arm_has_its_axes() -> None:
    arms = [_arm("w released", "weak", "released", init="unknown"), _arm("s", "strong")]
    assert [(a.name, b.name) for a, b in effects.matched_pairs(arms, _contrast())] == [("w released", "s")]
    assert [(a.name, b.name) for a, b in effects.matched_pairs([*arms, _arm("w", "weak")], _contrast())] == [("w", "s")]


def test_where_narrows_the_arms() -> None:
    arms = [_arm("w", "weak"), _arm("s", "strong"), _arm("wb", "weak", llm="b"), _arm("sb", "strong", llm="b")]
    arms[3].row = 7
    for where, expected in (
        ("llm=a", ["s"]),
        ("llm=a|b", ["s", "sb"]),
        ("llm!=a", ["sb"]),
        ("row!=7", ["s"]),
        ("llm=b;row=7|8", []),
        ("", ["s", "sb"]),
    ):
        assert [b.name for _, b in effects.matched_pairs(arms, _contrast(where))] == expected, where


@pytest.mark.parametrize(
    "where, says",
    [
        ("encodr=weak", "did you mean 'encoder'"),
        ("encoder", "key=value"),
        ("encoder=", "key=value"),
        ("=weak", "key=value"),
        ("encoder==weak", "key=value"),
    ],
)
def test_unreadable_clauses_say_what_to_write(where: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        effects.parse_where(where, ["encoder", "llm"])


def test_unknown_axis_and_empty_sides_are_errors() -> None:
    with pytest.raises(UserError, match="did you mean 'encoder'"):
        effects.parse_contrast({"name": "c", "axis": "encoders", "from": "a", "to": "b", "where": ""}, ["encoder", "llm"])
    for start, goal in (("", "strong"), ("weak", "weak"), ("weak|strong", "strong")):
        with pytest.raises(UserError, match="two different sides"):
            _contrast(**{"from": start, "to": goal})


def _answered(shares: dict[str, float], n: int = 240, metric: str = "accuracy", seed: int = 0) -> Results:
    """Arms `weak-k` and `strong-k` over two llms; all answer the same questions, which share their difficulty."""
    rng = np.random.default_rng(seed)
    labels = np.array([f"class {k}" for k in rng.integers(0, 12, n)])
    hard, ids = rng.random(n), np.array([f"q{k}" for k in range(n)])
    arms = []
    for encoder, share in shares.items():
        for llm in "ab":
            arm = _arm(f"{encoder} {llm}", encoder, llm=llm)
            correct = np.where(rng.random(n) < 0.5, hard, rng.random(n)) < share
            answers = Answers(ids, labels, correct, np.ones(n, bool), np.full(n, 5), np.full(n, "A"), np.full(n, 0.2))
            value = 100 * stats.sample(correct, labels if metric == PER_CLASS else None).mean
            arm.scores["pets"] = Score(value, metric, n=n, answers=answers)
            arms.append(arm)
    contrast = {"name": "c", "axis": "encoder", "from": "weak", "to": "strong", "where": ""}
    return Results("toy", {"fine_grained": ("pets",)}, arms, contrasts=[contrast])


@pytest.mark.parametrize("metric", ["accuracy", PER_CLASS])
def test_an_effects_mean_is_the_mean_of_its_pairs_and_lies_in_its_interval(metric: str) -> None:
    results = _answered({"weak": 0.5, "strong": 0.7}, metric=metric)
    (effect,) = effects.compute(results)
    value = {arm.name: arm.scores["pets"].value for arm in results.arms}
    expected = np.mean([value["strong a"] - value["weak a"], value["strong b"] - value["weak b"]])
    found = effect.groups["fine_grained"]
    assert found.mean == pytest.approx(expected) and found.pairs == 2 and found.questions == 240
    assert found.low is not None and found.low < expected < found.high
    assert found.p is not None and found.p < 0.01 and found.p_holm == found.p


def test_effect_intervals_cover_the_truth() -> None:
    truth, hits = 20.0, 0
    for k in range(120):
        found = effects.compute(_answered({"weak": 0.5, "strong": 0.7}, seed=k), resamples=300)[0].groups["fine_grained"]
        assert found.low is not None and found.high is not None
        hits += found.low <= truth <= found.high
    assert 0.88 <= hits / 120 <= 1.0


def test_questions_that_an_arm_lacks_are_left_out_aloud() -> None:
    results = _answered({"weak": 0.5, "strong": 0.7})
    last = results.arms[-1].scores["pets"].answers
    assert last is not None
    short = Answers(*(getattr(last, name)[5:][::-1] for name in ("ids", "labels", "correct", "valid", "options", "letters", "guess")))
    results.arms[-1].scores["pets"] = Score(100 * short.correct.mean(), n=235, answers=short)
    (effect,) = effects.compute(results)
    assert effect.groups["fine_grained"].questions == 235
    assert any("235 questions are shared" in note for note in effect.notes)


def test_a_missing_score_shrinks_the_pairs_aloud_and_no_pair_gives_no_number() -> None:
    results = _answered({"weak": 0.5, "strong": 0.7})
    del results.arms[0].scores["pets"]
    (effect,) = effects.compute(results)
    assert len(effect.pairs) == 2 and effect.groups["fine_grained"].pairs == 1
    assert any("1 of 2 pairs" in note for note in effect.notes)
    results.contrasts[0]["where"] = "llm=c"
    (effect,) = effects.compute(results)
    assert effect.groups["fine_grained"].mean is None and effect.notes == ("no matched pair of arms in this run",)
