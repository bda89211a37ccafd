"""Answers by the first token: shared prefixes change no logit; batches, order and workers change no letter; close calls are redone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

from datasets_ray.rows import RowTable, row, write_rows
from tests.trainers import evaluation_kit as kit
from tests.trainers import scoring_kit
from tests.trainers.tiny_models import IMAGE, IMAGE_TOKENS, context, native_sample, pack_of, qwen2_vl_spec, sample, vlm_spec
from trainers import first_token, predict, prefixes
from trainers.context import Cache, Context
from trainers.models import build


# ── trees ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────
def prompts_of(rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Prompts of few different tokens, so that they begin alike in all ways: openings, images (runs of one number), questions."""
    made = []
    for _ in range(count):
        parts = [np.arange(5, 5 + int(rng.integers(3, 9)))] if rng.random() < 0.8 else []
        for _ in range(int(rng.integers(0, 3))):
            parts += [np.full(4, prefixes.IMAGE_ID - 1 - int(rng.integers(0, 3))), rng.integers(1, 3, int(rng.integers(0, 3)))]
        made.append(np.concatenate([*parts, rng.integers(1, 4, int(rng.integers(1, 20)))]))
    return made


@pytest.mark.parametrize("seed", range(40))
def test_a_tree_reads_every_prompt_and_nothing_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys = prompts_of(rng, int(rng.integers(1, 14)))
    levels = prefixes.tree(keys)
    assert len(levels) <= 3 and [span.row for span in levels[-1]] == list(range(len(keys)))
    read: list[list[np.ndarray]] = []
    for level, spans in enumerate(levels):
        texts = []
        for span in spans:
            before = read[level - 1][span.parent] if level else np.zeros(0, dtype=np.int64)
            assert (span.parent == -1) == (level == 0) and span.start == len(before) < span.end
            key = keys[span.row]
            if span.start:
                assert key[span.start] >= prefixes.IMAGE_ID or key[span.start] != key[span.start - 1], "no image is cut"
            texts.append(np.concatenate([before, key[span.start : span.end]]))
        read.append(texts)
    for key, text in zip(keys, read[-1], strict=True):
        assert np.array_equal(key, text)
    assert sum(span.end - span.start for spans in levels for span in spans) <= sum(len(key) for key in keys)


def test_what_is_shared_is_read_once() -> None:
    opening, images = np.arange(60), [np.full(16, -300 - k) for k in range(4)]
    asked = [np.arange(100, 110), np.arange(200, 212), np.arange(300, 309)]
    keys = [np.concatenate([opening, image, question]) for image in images for question in asked]
    opened, shown, rest = prefixes.tree([keys[k] for k in np.random.default_rng(0).permutation(12)])
    assert [(span.start, span.end) for span in opened] == [(0, 60)]
    assert [(span.start, span.end, span.parent) for span in shown] == [(60, 76, 0)] * 4
    assert sorted(span.end - span.start for span in rest) == sorted([9, 10, 12] * 4)
    # nothing in common, or too little to be worth a pass: every prompt is read whole
    assert [len(level) for level in prefixes.tree([asked[0], asked[1]])] == [2]
    assert [len(level) for level in prefixes.tree([np.concatenate([[7], question]) for question in asked])] == [3]
    # an image is shared however little text stands beside it
    assert [len(level) for level in prefixes.tree([np.concatenate([images[0][:4], [k], np.arange(60) + 99 * k]) for k in (1, 2)])] == [1, 2]


def test_rows_that_show_the_same_images_stay_together(tmp_path: Path) -> None:
    red, blue = ({"bytes": kit.square(colour, 0)} for colour in ("red", "blue"))
    shown = [[red], [blue], [], [red], [{"path": "a.png"}], [red, blue], [{"path": "b.png"}], [{"path": "a.png"}], [], [blue]]
    write_rows([row(f"r{k}", images=images) for k, images in enumerate(shown)], tmp_path)
    numbers = prefixes.image_numbers(RowTable(tmp_path))
    assert [len(one) for one in numbers] == [len(images) for images in shown]
    same = {(a, b) for a in range(10) for b in range(a) if numbers[a] and numbers[a] == numbers[b]}
    assert same == {(3, 0), (9, 1), (7, 4)} and numbers[5] == numbers[0] + numbers[1]

    lengths = np.array([10, 50, 20, 30, 15, 40, 0, 25, 12, 5])
    order = prefixes.arrange(lengths, numbers)
    assert order.tolist() == [1, 9, 5, 3, 0, 7, 4, 2, 8], "the longest first, with those about the same image; row 6 can't be asked"
    assert [piece.tolist() for piece in prefixes.cut(order, 4, numbers)] == [[1, 9, 5], [3, 0, 7, 4], [2, 8]]
    assert [piece.tolist() for piece in prefixes.cut(order, 1, numbers)] == [[k] for k in order.tolist()], "a larger group is parted"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_vl"])
def test_prompts_read_from_a_shared_prefix_are_the_prompts_read_whole(family: str, tmp_path: Path) -> None:
    """An opening, then an image under three questions and a question alone; then steps of each."""
    native = family == "qwen2_vl"
    model = build(qwen2_vl_spec() if native else vlm_spec(family), context(tmp_path), image=None)
    opening = sample(1, 9)
    shown = [native_sample(2, 6, [(16, 24)]) if native else sample(2, 6, 1), sample(3, 5)]
    asked = [sample(10 + k, length) for k, length in enumerate((3, 11, 1, 7))]
    parents = [0, 0, 0, 1]
    whole = [type(opening)(torch.cat([opening.ids, shown[p].ids, a.ids]), shown[p].images, shown[p].grids) for p, a in zip(parents, asked)]
    wanted = model.start(pack_of(whole, native=native))

    first = model.start(pack_of([opening], native=native))
    second = model.extend(first, torch.tensor([0, 0]), pack_of(shown, native=native))
    state = model.extend(second, torch.tensor(parents), pack_of(asked, native=native))
    again = model.extend(second, torch.tensor(parents[::-1]), pack_of(asked[::-1], native=native))
    torch.testing.assert_close(again.logits.flip(0), state.logits, atol=1e-5, rtol=1e-5)
    for _ in range(3):
        torch.testing.assert_close(state.logits, wanted.logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(state.positions, wanted.positions)
        ids = wanted.logits.argmax(-1)
        model.step(state, ids)
        model.step(wanted, ids)
    keep = torch.tensor([3, 1])
    state.select(keep)
    model.step(state, ids[keep])
    model.step(wanted, ids)
    torch.testing.assert_close(state.logits, wanted.logits[keep], atol=1e-5, rtol=1e-5)
    assert native or int((whole[0].ids == IMAGE).sum()) == IMAGE_TOKENS


# ── the rule ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_what_counts_as_a_letter() -> None:
    options = ["cat", "dog"]
    assert first_token.letter_of("B", 1, True, options) == "B"
    assert first_token.letter_of("B", 1, False, options) is None and first_token.letter_of("B", 2, True, options) is None
    for text in ("C", "b", "AB", "B.", ""):
        assert first_token.letter_of(text, len(text), True, options) is None


def test_the_threshold_is_measured() -> None:
    batched, alone = torch.tensor([1.0, 2.0]), torch.tensor([1.25, 2.0])
    made = first_token.measured([(batched, alone)], torch.float32)
    assert made.difference == 0.25 and made.value == first_token.SAFETY * 0.25
    same = first_token.measured([(alone, alone)], torch.bfloat16)
    assert same.difference == 0 and same.value == first_token.ULPS * torch.finfo(torch.bfloat16).eps * 2.0
    assert first_token.measured([], torch.float32).value == 0
    # behind a different token the texts differ, and so may everything
    rows = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([5.0, 0.0])]
    others = [torch.tensor([1.0, 0.0]), torch.tensor([1.1, 1.0]), torch.tensor([0.0, 0.0])]
    assert len(first_token.compared(rows, others)) == 2
    assert first_token.spread(1) == [0] and first_token.spread(100) == [0, 33, 66, 99]


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def lettered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model that has learned to answer with letters, 320 questions (16 without an image) and what it answers one by one."""
    return world_of(tmp_path_factory.mktemp("lettered"), "llama", 320)


def world_of(folder: Path, llm: str, count: int, steps: int = 100) -> dict[str, Any]:
    model = scoring_kit.lettered(folder / "lettered", llm, steps)
    inputs = {"asked": kit.questions(folder / "asked", count, text_only=count // 20), "lettered": folder / "lettered"}
    reference = scoring_kit.Reference(model, inputs, folder / "one", inputs["asked"])
    return {"model": model, "inputs": inputs, "alone": [reference.answer(index) for index in range(count)]}


def spec_of(world: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "model": world["model"], "questions": "asked", "image": kit.IMAGE, "suffix": kit.SUFFIX, "method": "first_token",
        "max_new_tokens": 8, "precision": "fp32", **changes,
    }  # fmt: skip


def predicted(world: dict[str, Any], folder: Path, batch: int = 64, **changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    spec = spec_of(world, **changes)
    ctx = Context.local(folder, {"id": "p", "spec": spec, "runtime": {"eval_batch": batch}}, world["inputs"])
    summary = predict.run(spec, ctx)
    return summary, parquet.read_table(ctx.out / "predictions.parquet").to_pylist()


def check_against_one_by_one(world: dict[str, Any], folder: Path) -> None:
    summary, rows = predicted(world, folder)
    count = len(world["alone"])
    assert [(r["text"], r["finished"]) for r in rows] == world["alone"]
    assert summary["shortcut"] + summary["generated_on"] + summary["alone"] == summary["n"] == count
    assert 0.9 * count <= summary["shortcut"] < count, "most are settled by the shortcut, some go on"
    assert 0 < summary["threshold"] < 1e-2
    letters = [r["first_token_letter"] for r in rows]
    assert letters == [text if len(text) == 1 else None for text, _ in world["alone"]]
    assert len(set(letters)) > 2 and scoring_kit.NO_IMAGE in {text for text, _ in world["alone"]}
    assert summary["read_tokens"] < 0.9 * summary["prompt_tokens"], "the system prompt is read once a batch"


def test_first_tokens_are_greedy_generation_one_by_one(lettered: dict[str, Any], tmp_path: Path) -> None:
    check_against_one_by_one(lettered, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("llm", "steps"), [("llama", 100), ("qwen2", 250)])
def test_a_thousand_rows_of_each_language_model(llm: str, steps: int, tmp_path: Path) -> None:
    check_against_one_by_one(world_of(tmp_path, llm, 1020, steps), tmp_path / "p")


def test_batches_and_order_change_no_answer(lettered: dict[str, Any], tmp_path: Path) -> None:
    def answers(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {r["id"]: (r["text"], r["finished"], r["first_token_letter"]) for r in rows}

    wanted = answers(predicted(lettered, tmp_path / "64")[1])
    table = list(RowTable(lettered["inputs"]["asked"]))
    for seed, batch in enumerate((5, 150)):
        order = np.random.default_rng(seed).permutation(len(table))
        shuffled = tmp_path / f"shuffled{seed}"
        write_rows([table[k] for k in order], shuffled)
        other = {**lettered, "inputs": {**lettered["inputs"], "asked": shuffled}}
        assert answers(predicted(other, tmp_path / f"p{seed}", batch)[1]) == wanted


@pytest.fixture(scope="module")
def hasty(lettered: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same after half of the lessons, whose letters are close calls, and a quarter of the questions."""
    folder = tmp_path_factory.mktemp("hasty")
    model = scoring_kit.lettered(folder / "lettered", steps=50)
    write_rows(list(RowTable(lettered["inputs"]["asked"]))[::4], folder / "asked")
    return {"model": model, "inputs": {"asked": folder / "asked", "lettered": folder / "lettered"}}


def test_in_half_precision_close_calls_are_answered_alone(hasty: dict[str, Any], tmp_path: Path) -> None:
    """A batch of one is the reference: it reads what a row alone reads. Rounding is coarse in bf16, so that batches do differ."""
    alone = predicted(hasty, tmp_path / "1", batch=1, precision="bf16")[1]
    summary, rows = predicted(hasty, tmp_path / "48", batch=48, precision="bf16")
    assert rows == alone
    assert summary["threshold"] > 1e-2 and summary["alone"] > 0


def test_below_the_threshold_every_row_is_answered_alone(hasty: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = predicted(hasty, tmp_path / "plain")
    assert plain[0]["alone"] < 10
    monkeypatch.setattr(first_token, "ULPS", 1e12)
    summary, rows = predicted(hasty, tmp_path / "alone")
    assert summary["alone"] == summary["n"] == 80 and summary["shortcut"] == summary["generated_on"] == 0
    assert rows == plain[1]


def test_rolled_options_and_further_questions_share_their_image(lettered: dict[str, Any], tmp_path: Path) -> None:
    asked = scoring_kit.rolled(tmp_path / "rolled", images=20)
    world = {**lettered, "inputs": {**lettered["inputs"], "asked": asked}}
    summary, rows = predicted(world, tmp_path / "p", batch=16)
    assert (summary["images"], summary["read_images"]) == (80, 20)
    assert summary["read_tokens"] < 0.6 * summary["prompt_tokens"]
    reference = scoring_kit.Reference(world["model"], world["inputs"], tmp_path / "one", asked)
    assert [(r["text"], r["finished"]) for r in rows] == [reference.answer(index) for index in range(80)]
    assert [r["id"] for r in rows] == [question["id"] for question in RowTable(asked)], "in the questions' order"
    assert predicted(world, tmp_path / "3", batch=3)[1] == rows, "groups larger than a batch are parted"


def test_two_workers_answer_as_one(lettered: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, cache = spec_of(lettered), Cache()  # building models is nothing for two threads at once
    stage = {"id": "p", "spec": spec, "runtime": {"eval_batch": 32}}
    alone = Context.local(tmp_path / "whole", stage, lettered["inputs"], cache=cache)
    predict.run(spec, alone)
    whole = parquet.read_table(alone.out / "predictions.parquet").to_pylist()
    barrier = threading.Barrier(2, timeout=60)
    monkeypatch.setattr(predict, "_meet", lambda ctx: barrier.wait())
    ranks = [Context.local(tmp_path / "shared", stage, lettered["inputs"], rank=rank, world=2, cache=cache) for rank in (0, 1)]
    summaries: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda ctx=ctx: summaries.update({ctx.rank: predict.run(spec, ctx)})) for ctx in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert summaries[0]["n"] == 320 and summaries[1] == {}
    assert parquet.read_table(ranks[0].out / "predictions.parquet").to_pylist() == whole
    written = {path.name.split("-")[0] for path in (ranks[0].work / "answers").glob("*.parquet")}
    assert written == {"0", "1"}, "both answered some"
