"""Likelihoods of options: branches on a prompt read once are full forwards of whole conversations, whatever shares their batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from datasets_ray.answers import LETTERS
from datasets_ray.errors import UserError
from datasets_ray.prompts import TEMPLATES, generation_prompt, render
from datasets_ray.rows import RowTable, row, write_rows
from datasets_ray.tokens import encode, load_tokenizer
from tests.trainers import evaluation_kit as kit
from tests.trainers import scoring_kit
from trainers import first_token, likelihood, predict, score
from trainers.context import Context
from trainers.likelihood import Sayings, Scored

COUNT = 30


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """30 questions, three without an image, some with options of several tokens, and a VLM with large random weights."""
    folder = tmp_path_factory.mktemp("world")
    rows = list(RowTable(kit.questions(folder / "plain", COUNT, text_only=3)))
    for number, one in enumerate(rows):
        one["options"] = [f"{option} {'and white ' * (number % 3)}square" if number % 2 else option for option in one["options"]]
    write_rows(rows, folder / "asked")
    model = kit.talkative(folder / "talkative")
    return {"inputs": {"asked": folder / "asked", "talkative": folder / "talkative"}, "model": model}


def predicted(
    world: dict[str, Any], folder: Path, batch: int = 64, method: Any = "likelihood", **changes: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], Context]:
    spec = {
        "model": world["model"], "questions": "asked", "image": kit.IMAGE, "suffix": kit.SUFFIX, "method": method, "max_new_tokens": 8,
        "precision": "fp32", **changes,
    }  # fmt: skip
    ctx = Context.local(folder, {"id": "p", "spec": spec, "runtime": {"eval_batch": batch}}, world["inputs"])
    summary = predict.run(spec, ctx)
    return summary, parquet.read_table(ctx.out / "predictions.parquet").to_pylist(), ctx


def test_branches_are_full_forwards_of_whole_conversations(world: dict[str, Any], tmp_path: Path) -> None:
    summary, rows, ctx = predicted(world, tmp_path)
    reference = scoring_kit.Reference(world["model"], world["inputs"], tmp_path / "one", world["inputs"]["asked"])
    assert summary["n"] == COUNT and summary["without_options"] == 0 and "threshold" not in summary and "text" not in rows[0]
    for index, one in enumerate(rows):
        options = one["options"]
        for form, said in (("letter", list(LETTERS[: len(options)])), ("text", options)):
            found = [reference.likelihood(index, text) for text in said]
            for norm, divided in (
                ("raw", [1] * len(said)), ("per_token", [n for _, n in found]), ("per_byte", [len(text.encode()) for text in said]),
            ):  # fmt: skip
                wanted = [value / by for (value, _), by in zip(found, divided)]
                name = f"likelihood_{form}_{norm}"
                assert one[name] == pytest.approx(wanted, rel=1e-5, abs=1e-5)
                assert one[f"{name}_letter"] == LETTERS[max(range(len(wanted)), key=lambda k, w=wanted: w[k])]
        assert one["likelihood_valid"]
    picks = {name: [one[f"likelihood_{name}_letter"] for one in rows] for name in likelihood.PICKS}
    assert picks["text_raw"] != picks["text_per_byte"] and picks["text_raw"] != picks["letter_raw"]
    manifest = json.loads((ctx.out / "manifest.json").read_text())
    assert manifest["method"] == "likelihood" and 0 < manifest["sum_threshold"] < 1e-2


def test_batches_and_passes_change_no_pick(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = predicted(world, tmp_path / "64")[1]
    for batch, most in ((1, 256), (7, 256), (64, 4)):
        monkeypatch.setattr(likelihood, "MOST_TOKENS", most)
        monkeypatch.setattr(likelihood, "MOST_LOGITS", 5 * kit.VOCABULARY if most == 4 else 1 << 26)
        rows = predicted(world, tmp_path / f"{batch}-{most}", batch)[1]
        for one, other in zip(rows, wanted, strict=True):
            for name, value in one.items():
                numbers = isinstance(value, list) and name != "options"
                assert value == (pytest.approx(other[name], rel=1e-5, abs=1e-5) if numbers else other[name])


def test_all_methods_in_one_pass_are_each_by_itself(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {method: predicted(world, tmp_path / method, method=method) for method in ("generate", "first_token", "likelihood")}
    together = ["generate", "first_token", "likelihood"]
    reads: list[int] = []
    from trainers.answering import Answerer

    read = Answerer._read
    monkeypatch.setattr(Answerer, "_read", lambda self, rows, images: reads.append(len(rows)) or read(self, rows, images))
    summary, rows, ctx = predicted(world, tmp_path / "all", method=together)
    assert reads == [COUNT], "the prompts are read once"
    for method, (_, wanted, _) in alone.items():
        assert [{name: one[name] for name in wanted[0]} for one in rows] == wanted, method
    assert set(rows[0]) == {name for _, wanted, _ in alone.values() for name in wanted[0]}
    assert summary["read_tokens"] == alone["generate"][0]["read_tokens"]
    assert json.loads((ctx.out / "manifest.json").read_text())["method"] == together


def test_close_options_are_scored_alone(world: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = predicted(world, tmp_path / "plain")
    monkeypatch.setattr(first_token, "SAFETY", 1e12)
    summary, rows, _ = predicted(world, tmp_path / "alone")
    assert plain[0]["alone"] < COUNT / 2 and summary["alone"] == COUNT
    for one, other in zip(rows, plain[1], strict=True):
        assert {k: v for k, v in one.items() if k.endswith("_letter")} == {k: v for k, v in other.items() if k.endswith("_letter")}


def test_a_question_without_options_has_no_pick(world: dict[str, Any], tmp_path: Path) -> None:
    rows = [row("open", question="What is this?", answer="a square"), row("two", question="Which?", options=["one", "two"], answer="A")]
    write_rows(rows, tmp_path / "open")
    summary, made, _ = predicted({**world, "inputs": {**world["inputs"], "asked": tmp_path / "open"}}, tmp_path / "p")
    assert summary["without_options"] == 1
    assert made[0]["likelihood_text_raw"] == [] and made[0]["likelihood_text_raw_letter"] is None and not made[0]["likelihood_valid"]
    assert made[1]["likelihood_text_raw_letter"] in ("A", "B") and made[1]["likelihood_valid"]


TOKENIZED = [("tiny-llama", name) for name in ("vicuna_v1", "llama_2", "text")]
TOKENIZED += [("tiny-qwen2", name) for name in ("chatml", "qwen2_vl", "text", "llama_2")]


@pytest.mark.parametrize(("tokenizer", "template"), TOKENIZED)
def test_options_are_tokenised_as_training_would(tokenizer: str, template: str) -> None:
    """What follows a prompt is what follows it in the whole conversation: Σ of the same tokens."""
    tok = load_tokenizer(tokenizer)
    said = ["A", "E", "Abyssinian cat", "a red one, or: </s> <|im_end|>?", "12 × 3", "naïve", "  "[1:] + "x"]
    ids = Sayings(tok, template).of(said)
    assert template in TEMPLATES
    names = {"bos": tok.bos_token or "", "eos": tok.eos_token or ""}
    for question in ("Which one?", "Is this\nit? 5"):
        asked = {"question": question, "hint": "", "options": ["a", "b"], "images": []}
        prompt = generation_prompt(asked, template, kit.SUFFIX, **names)
        start = encode(prompt, tok, [], 4096).ids.tolist()
        for text, found in zip(said, ids):
            user = "\n".join([question, "A. a", "B. b", kit.SUFFIX])
            messages = [{"role": "user", "text": user}, {"role": "assistant", "text": text}]
            whole = encode(render({"messages": messages}, template, images=0, **names), tok, [], 4096)
            after = whole.ids.tolist()
            assert after[: len(start)] == start and after[len(start) : len(start) + len(found)] == list(found)
            assert (whole.labels[len(start) : len(start) + len(found)] >= 0).all() and (whole.labels[len(start) + len(found) :] < 0).all()


def test_norms_picks_and_ties() -> None:
    made = Scored([-2.0, -3.0, -3.0], [1, 4, 2], ["é", "long", "xy"])
    assert made.values("raw") == [-2.0, -3.0, -3.0] and made.values("per_token") == [-2.0, -0.75, -1.5]
    assert made.values("per_byte") == [-1.0, -0.75, -1.5]
    assert [made.pick(norm) for norm in likelihood.NORMS] == ["A", "B", "B"]
    assert Scored([-1.0, -1.0], [1, 1], ["a", "b"]).pick("raw") == "A", "the first of equals"
    assert Scored([-1.0, math.nan], [1, 1], ["a", "b"]).pick("raw") is None and Scored([], [], []).pick("raw") is None
    assert not made.close(0.2) and made.close(1.0) and Scored([-1.0, -1.0], [1, 1], ["a", "b"]).close(0.0)
    # a threshold on sums weighs less where sums are divided
    near = Scored([-10.0, -10.4], [10, 10], ["a" * 10, "b" * 10])
    assert not near.close(0.39) and near.close(0.41)
    assert not Scored([-1.0], [1], ["a"]).close(9.0)


def test_scores_name_their_method(world: dict[str, Any], tmp_path: Path) -> None:
    ctx = predicted(world, tmp_path / "p", method=["first_token", "generate", "likelihood"])[2]
    table = parquet.read_table(ctx.out / "predictions.parquet")

    def scored(method: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        spec = {"predictions": "p", "rule": "vlmevalkit", "metric": "accuracy", "method": method}
        here = Context.local(tmp_path / method, {"id": "s", "spec": spec}, {"p": ctx.out})
        scores = score.run(spec, here)
        assert json.loads((here.out / "scores.json").read_text()) == scores and scores["method"] == method
        return parquet.read_table(here.out / "scored.parquet").to_pylist(), scores

    rows, scores = scored("likelihood")
    picks = table.column("likelihood_text_raw_letter").to_pylist()
    assert [r["letter"] for r in rows] == picks and scores["rule"] == "text_raw" and scores["valid"] == 1
    assert scores["value"] == pytest.approx(100 * sum(a == b for a, b in zip(picks, table.column("answer").to_pylist())) / COUNT)
    assert list(scores["methods"]) == ["generate", *(f"likelihood_{pick}" for pick in likelihood.PICKS)]
    assert scores["methods"]["likelihood_text_raw"]["value"] == scores["value"]
    for pick in likelihood.PICKS:
        right = sum(a == b for a, b in zip(table.column(f"likelihood_{pick}_letter").to_pylist(), table.column("answer").to_pylist()))
        assert scores["methods"][f"likelihood_{pick}"]["value"] == pytest.approx(100 * right / COUNT)

    rows, scores = scored("generate")
    plain = score.score(table, "vlmevalkit", "accuracy")[1]
    assert {key: scores[key] for key in plain} == plain and scores["rule"] == "vlmevalkit" and scores["valid"] < 1
    assert [r["text"] for r in rows] == table.column("text").to_pylist()
    assert scored("first_token")[1]["value"] == scores["value"]
    settled = table.column("first_token_letter").to_pylist()
    assert all(letter in (None, row["letter"]) for letter, row in zip(settled, rows))

    only = Context.local(tmp_path / "only", {"id": "s", "spec": {}}, {"p": predicted(world, tmp_path / "g", method="generate")[2].out})
    with pytest.raises(UserError, match=r"no answers by 'likelihood'\n.*made by generate"):
        score.run({"predictions": "p", "rule": "strict", "metric": "accuracy", "method": "likelihood"}, only)
    assert "methods" not in score.run({"predictions": "p", "rule": "strict", "metric": "accuracy"}, only)


def test_an_option_that_has_no_likelihood_is_invalid() -> None:
    table = pa.table({
        "id": ["a", "b"], "options": [["x", "y"]] * 2, "answer": ["A", "A"], "label": ["", ""],
        **{f"likelihood_{pick}_letter": ["A", None] for pick in likelihood.PICKS},
    })  # fmt: skip
    scores = score.score_method(table, "vlmevalkit", "accuracy", "likelihood")[1]
    assert (scores["value"], scores["valid"], scores["unreadable"]) == (50.0, 0.5, 1)
