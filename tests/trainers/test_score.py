"""Scoring: letters, validity and numbers of written-down answers; zero-shot shares by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from datasets_ray.choices import build_from_similarities
from datasets_ray.errors import UserError
from datasets_ray.rows import row, write_rows
from trainers import choices, score, zeroshot
from trainers.context import Context

OPTIONS = ["Beagle", "Boxer", "Pug"]
ASKED = [  # text, right letter, label → letter by vlmevalkit
    ("A", "A", "Beagle", "A"),
    ("The answer is B.", "B", "Boxer", "B"),
    ("pug", "B", "Boxer", "C"),
    ("", "C", "Pug", None),
    ("Cannot determine the answer", "C", "Pug", "Z"),
    ("E", "A", "Beagle", None),
]


def predictions(rows: list[tuple[str, str, str, str | None]] = ASKED) -> pa.Table:
    return pa.table({
        "id": [f"q{i}" for i in range(len(rows))], "prompt": ["?"] * len(rows), "options": [OPTIONS] * len(rows),
        "answer": [r[1] for r in rows], "label": [r[2] for r in rows], "text": [r[0] for r in rows], "finished": [True] * len(rows),
    })  # fmt: skip


def test_every_answer_is_kept_with_its_letter(tmp_path: Path) -> None:
    made = tmp_path / "predictions"
    made.mkdir()
    parquet.write_table(predictions(), made / "predictions.parquet")
    (made / "manifest.json").write_text(json.dumps({"dropped": {"image unreadable": 1}}))
    spec = {"predictions": "p", "rule": "vlmevalkit", "metric": "mean_per_class"}
    ctx = Context.local(tmp_path / "stage", {"id": "s", "spec": spec}, {"p": made})
    summary = score.run(spec, ctx)
    scored = parquet.read_table(ctx.out / "scored.parquet")
    assert scored.column_names == ["id", "label", "options", "answer", "text", "letter", "valid", "correct", "guess"]
    assert scored.column("letter").to_pylist() == [letter for *_, letter in ASKED]
    assert scored.column("correct").to_pylist() == [True, True, False, False, False, False]
    assert scored.column("valid").to_pylist() == [True, True, True, False, False, False]
    scores = json.loads((ctx.out / "scores.json").read_text())
    assert scores == summary
    assert scores["accuracy"] == pytest.approx(2 / 6) and scores["mean_per_class"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert scores["value"] == pytest.approx(100 / 3) and scores["chance"] == pytest.approx(100 / 3)
    assert (scores["n"], scores["classes"], scores["valid"], scores["refused"], scores["unreadable"]) == (6, 3, 0.5, 1, 2)
    assert scores["dropped"] == {"image unreadable": 1} and "e8e78f05" in scores["rule_source"]
    assert scores["stderr"] == pytest.approx(100 * np.sqrt((0.5 / 2 + 0.5 / 2 + 0) / 9))


def test_another_rule_reads_the_same_predictions_otherwise() -> None:
    by_rule = {rule: score.score(predictions(), rule, "accuracy")[1] for rule in ("strict", "vlmevalkit", "foci", "lmms")}
    assert by_rule["strict"]["valid"] == pytest.approx(1 / 6)
    assert by_rule["foci"]["given_letters"] == {"A": 1, "C": 1}
    assert by_rule["vlmevalkit"]["value"] > by_rule["strict"]["value"]


def test_a_letter_not_shown_is_invalid_and_never_redrawn() -> None:
    several = predictions([("Z", "A", "Beagle", None)] * 50)
    for rule in ("vlmevalkit", "strict"):
        scores = score.score(several, rule, "accuracy")[1]
        assert (scores["value"], scores["valid"]) == (0.0, 0.0)


def test_nothing_to_score_and_a_bad_key_are_errors() -> None:
    with pytest.raises(UserError, match="no questions"):
        score.score(predictions([]), "strict", "accuracy")
    with pytest.raises(UserError, match="'q0'"):
        score.score(predictions([("A", "D", "Beagle", None)]), "strict", "accuracy")
    with pytest.raises(UserError, match="unknown metric"):
        score.score(predictions(), "strict", "accurate")


def rotations(texts: dict[str, list[str]], count: int = 2) -> pa.Table:
    """Groups of two-option questions: the right option is first in the original, second in its rotation. texts: group → its answers."""
    rows = [
        {
            "id": f"{group}/{turn}", "prompt": "?", "options": OPTIONS[:2] if turn % 2 == 0 else OPTIONS[1::-1], "answer": "AB"[turn % 2],
            "label": "", "text": text, "finished": True,
            "meta": json.dumps({"group": group, "rotation": turn, "rotations": count, "category": group[0]}),
        }
        for turn in range(count) for group, said in texts.items() if turn < len(said) for text in [said[turn]]
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def test_a_group_is_right_when_all_of_it_is() -> None:
    """VLMEvalKit's circular evaluation by hand: two of four groups, three of four originals, six of eight questions."""
    table = rotations({"a1": ["A", "B"], "a2": ["A", "A"], "b1": ["A", "B"], "b2": ["B", "B"]})
    for metric in ("accuracy", "circular"):
        scored, scores = score.score(table, "strict", metric)
        assert (scores["metric"], scores["value"], scores["n"], scores["questions"]) == ("circular", 50.0, 4, 8)
        assert (scores["vanilla"], scores["vanilla_all"]) == (0.75, 0.75) and scores["accuracy"] == 0.5
        assert scores["chance"] == pytest.approx(25.0) and scores["stderr"] == pytest.approx(100 * np.sqrt(0.25 / 3))
        assert scored.column("id").to_pylist() == ["a1/0", "a2/0", "b1/0", "b2/0"]
        assert scored.column("correct").to_pylist() == [True, False, True, False]
        assert [m["text"] for m in scored.column("members").to_pylist()[1]] == ["A", "A"]
        assert scored.column("letter").to_pylist() == ["A", "A", "A", "B"]
        assert scores["by_category"]["a"] == {"n": 4, "accuracy": 0.75, "valid": 1.0}


def test_rows_in_any_order_make_the_same_groups() -> None:
    table = rotations({"a": ["A", "B", "A"], "b": ["A", "B", "B"], "c": ["x", "B", "A"]}, count=3)
    expected = score.score(table, "strict", "circular")
    turned = score.score(table.take(pa.array(np.random.default_rng(0).permutation(9))), "strict", "circular")
    assert turned[1] == expected[1] and expected[1]["value"] == pytest.approx(100 / 3)
    rows = {row["id"]: row for row in turned[0].to_pylist()}
    assert rows == {row["id"]: row for row in expected[0].to_pylist()}
    assert [rows[f"{g}/0"]["valid"] for g in "abc"] == [True, True, False]


def test_a_group_that_lost_a_rotation_is_left_out_and_counted() -> None:
    scores = score.score(rotations({"a": ["A", "B"], "b": ["A"]}), "strict", "circular")[1]
    assert (scores["n"], scores["value"], scores["left_out"]) == (1, 100.0, {score.INCOMPLETE: 1})
    with pytest.raises(UserError, match="circular: true"):
        score.score(predictions(), "strict", "circular")


def opened(cases: list[tuple[str, str, dict]]) -> pa.Table:
    """(text, answer, meta) of questions without options, and one with."""
    told = [{"options": [], "answer": answer, "text": text, "meta": json.dumps(meta)} for text, answer, meta in cases]
    told.append({"options": OPTIONS, "answer": "C", "text": "C", "meta": "{}"})
    return pa.Table.from_pylist([{"id": f"q{n}", "label": "", **row} for n, row in enumerate(told)])


def test_questions_without_options_have_their_own_rule() -> None:
    table = opened([
        ("the answer is 24", "24", {"open": "mmmu"}), ("24 or so", "25", {"open": "mmmu"}), ("", "x", {"open": "exact"}),
        ("b", "a", {"open": "exact", "answers": ["a", "b"]}),
    ])  # fmt: skip
    scored, scores = score.score(table, "vlmevalkit", "accuracy")
    assert scored.column("correct").to_pylist() == [True, False, False, True, True]
    assert scored.column("letter").to_pylist() == [None, None, None, None, "C"]
    assert (scores["value"], scores["n"], scores["valid"], scores["unreadable"]) == (60.0, 5, 0.8, 1)
    assert "left_out" not in scores and scores["chance"] == pytest.approx(100 / 15)
    assert scores["open"] == {"exact": {"n": 2, "accuracy": 0.5, "valid": 0.5}, "mmmu": {"n": 2, "accuracy": 0.5, "valid": 1.0}}
    assert scores["right_letters"] == {"C": 1}
    with pytest.raises(UserError, match="names no rule"):
        score.score(opened([("a", "a", {})]), "strict", "accuracy")


def test_yes_no_questions_pairs_and_f1() -> None:
    """By hand: 3 of 6 right; yes said twice, once rightly, of 3 to find: precision 1/2, recall 1/3, F1 0.4; one pair of three is right."""
    cases = [
        ("Yes.", "Yes", "x"), ("no", "No", "x"), ("yes", "No", "y"), ("No, it isn't", "No", "y"),
        ("I can't say", "Yes", "z"), ("No", "Yes", "z"),
    ]  # fmt: skip
    table = opened([(text, answer, {"open": "yes_no", "pair": pair, "category": "count"}) for text, answer, pair in cases]).slice(0, 6)
    scores = score.score(table, "vlmevalkit", "accuracy")[1]
    assert scores["yes_no"] == pytest.approx({"accuracy": 0.5, "precision": 0.5, "recall": 1 / 3, "f1": 0.4, "yes_share": 1 / 3})
    assert scores["pairs"] == {"n": 3, "accuracy": pytest.approx(1 / 3)} == scores["by_category"]["count"]["pairs"]
    assert scores["chance"] == 50.0 and scores["valid"] == pytest.approx(5 / 6) and scores["value"] == 50.0


CLASSES = ["cat", "dog", "fox", "wolf", "bear", "lynx"]
SIMILAR = np.array([
    [0.9, 0.1, 0.2, 0.0, 0.3, 0.4],  # cat: right
    [0.9, 0.8, 0.1, 0.2, 0.3, 0.4],  # dog: second
    [0.5, 0.4, 0.3, 0.2, 0.1, 0.6],  # bear: sixth
    [0.7, 0.7, 0.1, 0.1, 0.1, 0.1],  # dog: tied with cat, the earlier one is ranked first
], dtype=np.float32)  # fmt: skip
LABELS = ["cat", "dog", "bear", "dog"]


def mined(folder: Path) -> dict[str, Path]:
    write_rows([row(f"r{i}", label=label) for i, label in enumerate(LABELS)], folder / "rows", classes=CLASSES)
    (folder / "similar").mkdir()
    np.save(folder / "similar" / "similarities.npy", SIMILAR)
    facts = {"ids": [f"r{i}" for i in range(4)], "classes": CLASSES, "model": "m", "template": "a photo of a {}"}
    (folder / "similar" / "manifest.json").write_text(json.dumps(facts))
    return {"rows": folder / "rows", "similar": folder / "similar"}


def test_zero_shot_over_all_classes_and_among_the_choices(tmp_path: Path) -> None:
    inputs = mined(tmp_path)
    build_from_similarities(inputs["similar"], inputs["rows"], tmp_path / "asked", k=3, seed=0)
    spec = {"similarities": "similar", "rows": "rows", "choices": "asked", "metric": "mean_per_class"}
    ctx = Context.local(tmp_path / "stage", {"id": "z", "spec": spec}, {**inputs, "asked": tmp_path / "asked"})
    scores = zeroshot.run(spec, ctx)
    assert scores == json.loads((ctx.out / "scores.json").read_text())
    assert (scores["top1"], scores["top5"], scores["n"], scores["ties"]) == (0.25, 0.75, 4, 1)
    assert scores["mean_per_class"] == pytest.approx(1 / 3) and scores["value"] == pytest.approx(100 / 3)
    # with the hardest negatives at hand, being wrong among all is being wrong among the few; the tie goes to the option shown first
    assert scores["among_choices"] in (0.25, 0.5) and scores["among_choices_ties"] == 1
    assert scores["chance"] == pytest.approx(100 / 6)


def test_a_class_named_twice_is_right_in_either_column() -> None:
    twice = [*CLASSES[:5], "Cat"]
    assert zeroshot.over_all_classes(SIMILAR[:3], twice, ["cat", "dog", "Cat"])["top1"] == pytest.approx(2 / 3)


def test_choices_stage_writes_questions(tmp_path: Path) -> None:
    inputs = mined(tmp_path)
    spec = {"similarities": "similar", "rows": "rows", "k": 4, "seed": 1, "question": "Which one?"}
    ctx = Context.local(tmp_path / "stage", {"id": "c", "spec": spec}, inputs)
    summary = choices.run(spec, ctx)
    assert summary["rows"] == 4 and summary["k"] == 4
    direct = build_from_similarities(inputs["similar"], inputs["rows"], tmp_path / "direct", k=4, seed=1, question="Which one?")
    assert (ctx.out / "rows-00000.arrow").read_bytes() == (tmp_path / "direct" / direct["shards"][0]["file"]).read_bytes()


def test_likelihoods_leave_questions_without_options_out_and_say_so() -> None:
    table = pa.table({
        "id": ["a", "b"], "options": pa.array([OPTIONS, []], pa.list_(pa.string())), "answer": ["A", "yes"], "label": ["Beagle", None],
        "meta": [None, json.dumps({"open": "yes_no"})], f"{score.PICK}_letter": ["A", None],
    })  # fmt: skip
    scored, scores = score.score_method(table, "vlmevalkit", "accuracy", "likelihood")
    assert scored is not None and scored.column("id").to_pylist() == ["a"]
    assert scores["value"] == 100 and scores["left_out"] == {score.NO_OPTIONS: 1}
    scored, scores = score.score_method(table.slice(1), "vlmevalkit", "accuracy", "likelihood")
    assert scored is None and scores["not_run"] == score.NO_OPTIONS and "value" not in scores


def test_half_a_pair_of_mme_is_left_out_and_counted() -> None:
    pairs = ["existence/1", "existence/1", "existence/2"]
    table = pa.table({
        "id": ["a", "b", "c"], "options": pa.array([[], [], []], pa.list_(pa.string())), "answer": ["yes", "no", "yes"],
        "label": pa.array([None] * 3, pa.string()), "text": ["Yes", "No.", "No"],
        "meta": [json.dumps({"open": "yes_no", "pair": pair, "category": "existence"}) for pair in pairs],
    })  # fmt: skip
    scores = score.score(table, "vlmevalkit", "mme")[1]
    assert scores["mme"]["total"] == 200 and scores["value"] == 100 and scores["left_out"] == {score.LONE: 1}


def test_a_figure_of_hallusionbench_that_lost_a_question_is_told_among_what_is_left_out() -> None:
    places = [("0", "0", 1), ("1", "0", 2), ("1", "1", 2)]
    meta = {"open": "yes_no", "category": "VD", "l2_category": "chart", "set_id": "0"}
    metas = [{**meta, "figure_id": figure, "question_id": asked, "figure_questions": n} for figure, asked, n in places]
    table = pa.table({
        "id": ["a", "b", "c"], "options": pa.array([[], [], []], pa.list_(pa.string())), "answer": ["yes", "no", "yes"],
        "label": pa.array([None] * 3, pa.string()), "text": ["Yes", "No.", "No"], "meta": [json.dumps(one) for one in metas],
    })  # fmt: skip
    whole, torn = score.score(table, "vlmevalkit", "hallusion")[1], score.score(table.slice(0, 2), "vlmevalkit", "hallusion")[1]
    assert whole["hallusion"]["fAcc"]["n"] == 2 and "left_out" not in whole
    assert torn["hallusion"]["fAcc"] == {"n": 1, "right": 1, "accuracy": 1.0}
    assert torn["left_out"] == {"fAcc: a question of the figure was dropped": 1}
