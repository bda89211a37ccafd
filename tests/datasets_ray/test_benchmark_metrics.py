"""Benchmarks' own scores against values worked out by hand on written-down cases, and their errors against resampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from datasets_ray.benchmark_metrics import SETS, Marks, Points, f1, graded, hallusion, mme, ocrbench, vqa
from datasets_ray.errors import UserError
from datasets_ray.vqa_text import agreement, normalised

Case = tuple[bool | float | None, dict[str, Any]]
"""(right, None for an invalid answer; meta)"""


def marks(cases: list[Case], guess: float = 0.5, truth: list[str] | None = None, said: list[str | None] | None = None) -> Marks:
    credit = np.array([float(right or 0) for right, _ in cases])
    valid = np.array([right is not None for right, _ in cases])
    empty: list[str | None] = [None] * len(cases)
    return Marks(credit, valid, np.full(len(cases), guess), [m for _, m in cases], truth or ["x"] * len(cases), said or empty)


def pairs(task: str, *images: tuple[bool | None, bool | None]) -> list[Case]:
    return [(right, {"category": task, "pair": f"{task}/{n}"}) for n, image in enumerate(images) for right in image]


def test_mme_by_hand() -> None:
    """existence 75 + 50, OCR 50 + 50, code_reasoning 75 + 50 (an invalid answer is wrong): 350 of 600."""
    cases = [
        *pairs("existence", (True, True), (True, False)), *pairs("OCR", (False, False), (True, True)),
        *pairs("code_reasoning", (None, True), (True, True)),
    ]  # fmt: skip
    points = mme(marks(cases))
    told = points.told["mme"]
    assert told["subtasks"]["existence"] == {"n": 4, "accuracy": 0.75, "both": 0.5, "points": 125.0}
    assert (told["total"], told["of"]) == (350.0, 600) and points.value == pytest.approx(350 / 600)
    assert told["perception"] == {"points": 225.0, "of": 400} and told["cognition"] == {"points": 125.0, "of": 200}
    assert points.told["said"] == "350.0 of 600" and points.chance == pytest.approx((0.5 + 0.25) / 2)
    by_hand = np.sqrt(0.28125 / 2 + 0.5 / 2 + 0.28125 / 2) / 3  # variances of (1, .25), (0, 1), (.25, 1) within the three subtasks
    assert points.error == pytest.approx(by_hand)


def test_a_whole_mme_is_of_2800() -> None:
    from datasets_ray.benchmark_metrics import COGNITION, PERCEPTION

    cases = [case for task in (*PERCEPTION, *COGNITION) for case in pairs(task, (True, True), (True, True))]
    told = mme(marks(cases)).told["mme"]
    assert (told["total"], told["of"]) == (2800.0, 2800)
    assert told["perception"] == {"points": 2000.0, "of": 2000} and told["cognition"] == {"points": 800.0, "of": 800}


def test_mme_wants_two_questions_an_image() -> None:
    with pytest.raises(UserError, match="1 images of MME don't have two questions.*'count/1'"):
        mme(marks([*pairs("count", (True, True), (True, True))][:3]))
    with pytest.raises(UserError, match="no 'pair' in their meta") as error:
        mme(marks([(True, {"category": "count"})]))
    assert "pair: [category, image_path]" in error.value.hint


TRUTH = ["yes", "no", "no", "no", "yes", "yes"]
SAID: list[str | None] = ["yes", "no", "yes", "no", None, "no"]
POPE: list[Case] = [(True, {}), (True, {}), (False, {}), (True, {}), (None, {}), (False, {})]


def test_f1_by_hand() -> None:
    """One of two yes is right, of three to find: precision 1/2, recall 1/3, F1 2/5; three of six right, one invalid."""
    points = f1(marks(POPE, truth=TRUTH, said=SAID))
    told = points.told["f1"]
    assert points.value == pytest.approx(0.4) == told["f1"]
    assert (told["accuracy"], told["precision"], told["invalid"]) == (0.5, 0.5, 1)
    assert told["recall"] == pytest.approx(1 / 3) and told["yes_share"] == pytest.approx(1 / 3)
    assert points.chance == pytest.approx(3 / 6), "3 yes, of 6 half are said: 1.5 right of 3 said and 3 to find"
    # residuals (2 tp - 0.4 (truth + said)) / (5 / 6): 1.44, 0, -0.48, 0, -0.48, -0.48
    residuals = np.array([1.44, 0, -0.48, 0, -0.48, -0.48])
    assert points.error == pytest.approx(np.std(residuals, ddof=1) / np.sqrt(6))


def test_f1_counts_a_question_in_each_of_its_categories() -> None:
    """The first question is in two of POPE's parts: 2 of 3 yes are right, of 4 to find; by part 1/1 of 1 and 1/2 of 3."""
    cases = [(right, {"category": "popular,random" if at == 0 else "random"}) for at, (right, _) in enumerate(POPE)]
    points = f1(marks(cases, truth=TRUTH, said=SAID))
    assert points.value == pytest.approx(2 * 2 / (4 + 3))
    by = points.told["f1"]["by_category"]
    assert by["popular"]["n"] == 1 and by["popular"]["f1"] == 1.0 and by["random"]["f1"] == pytest.approx(0.4)
    assert points.told["f1"]["mean_of_categories"] == pytest.approx(0.7)
    with pytest.raises(UserError, match="answered by yes or no"):
        f1(marks(POPE, truth=["no"] * 6, said=SAID))


def test_never_saying_yes_is_an_f1_of_zero() -> None:
    points = f1(marks(POPE, truth=TRUTH, said=["no"] * 6))
    assert points.value == pytest.approx(0.0) and points.told["f1"]["precision"] == 0.0


def hallusion_cases() -> list[Case]:
    def one(right: bool | None, number: int, figure: int, question: int, category: str = "VD") -> Case:
        named = {"category": category, "l2_category": "illusion", "set_id": str(number)}
        return right, {**named, "figure_id": str(figure), "question_id": str(question)}

    first = [one(True, 0, 0, 0), one(True, 0, 0, 1), one(True, 0, 1, 0), one(False, 0, 1, 1)]
    return [*first, one(None, 1, 0, 0), one(True, 1, 0, 1)]


def test_hallusion_by_hand() -> None:
    """4 of 6 questions; 1 of 3 figures; 2 of 4 question pairs: 50 in the mean. The two sets lie 1/9 either side of it."""
    points = hallusion(marks(hallusion_cases()))
    told = points.told["hallusion"]
    assert {name: (part["right"], part["n"]) for name, part in told.items()} == {"aAcc": (4, 6), "fAcc": (1, 3), "qAcc": (2, 4)}
    assert points.value == pytest.approx(0.5) and points.error == pytest.approx(1 / 9)
    assert points.chance == pytest.approx((0.5 + 0.25 + (0.25 + 0.25 + 0.5 + 0.5) / 4) / 3)
    assert points.told["said"] == "mean of aAcc 66.7, fAcc 33.3, qAcc 50.0"


def test_hallusion_tells_categories_apart_and_leaves_questions_without_a_figure_out_of_figures() -> None:
    extra = (True, {**hallusion_cases()[0][1], "category": "VS"})
    told = hallusion(marks([*hallusion_cases(), extra])).told["hallusion"]
    assert {name: (part["right"], part["n"]) for name, part in told.items()} == {"aAcc": (5, 7), "fAcc": (1, 3), "qAcc": (3, 5)}
    with pytest.raises(UserError, match="no 'set_id'"):
        hallusion(marks([(True, {"category": "VD"})]))


def test_a_figure_or_pair_that_lost_a_question_is_left_out_and_counted() -> None:
    """The wrong question of set 0's second figure was dropped: that figure and its pair would be right, were they taken as whole."""
    metas = [{**meta, "figure_questions": 2, "pair_questions": 2 if meta["set_id"] == "0" else 1} for _, meta in hallusion_cases()]
    cases = [(right, meta) for (right, _), meta in zip(hallusion_cases(), metas)]
    points = hallusion(marks([*cases[:3], *cases[4:]]))
    told = points.told["hallusion"]
    assert {name: (part["right"], part["n"]) for name, part in told.items()} == {"aAcc": (4, 5), "fAcc": (1, 2), "qAcc": (2, 3)}
    assert points.left_out == {"fAcc: a question of the figure was dropped": 1, "qAcc: a question of the pair was dropped": 1}
    whole = hallusion(marks(cases))
    assert whole.left_out == {} and whole.told == hallusion(marks(hallusion_cases())).told
    with pytest.raises(UserError, match="each figure lacks a question"):
        hallusion(marks([cases[0], cases[4]]))


def test_ocrbench_by_hand() -> None:
    cases = [(True, {"category": "a"}), (False, {"category": "a"}), (None, {"category": "b"}), (True, {"category": "b"})]
    points = ocrbench(marks(cases, guess=0.0))
    assert points.told["ocrbench"] == {"total": 2, "of": 4, "categories": {"a": {"right": 1, "of": 2}, "b": {"right": 1, "of": 2}}}
    assert (points.value, points.chance) == (0.5, None) and "nothing to guess" in points.no_chance
    assert points.error == pytest.approx(np.sqrt(0.25 / 3)) and points.told["said"] == "2 of 4"


TEN = ["dog"] * 4 + ["a dog", "Dog.", "the dog"] + ["cat", "cat"] + ["puppy"]


@pytest.mark.parametrize(("text", "answers", "share"), [
    ("Dog", TEN, 1.0),  # 7 agree, 6 without one of them
    ("cat", TEN, (2 * 1 / 3 + 8 * 2 / 3) / 10), ("puppy", TEN, 9 * (1 / 3) / 10), ("bird", TEN, 0.0),
    ("x", ["x"] * 3 + ["y"] * 7, (3 * 2 / 3 + 7) / 10),
    ("Two dogs.", ["2 dogs"], 1.0), ("three", ["2"], 0.0), ("b", ["a b", "c"], 1.0),
])  # fmt: skip
def test_vqa_agreement_by_hand(text: str, answers: list[str], share: float) -> None:
    assert agreement(text, answers) == pytest.approx(share)


@pytest.mark.parametrize(("text", "form"), [
    ("The Red Car!", "red car"), ("1,000", "1000"), ("3.5", "3.5"), ("yes.", "yes"), (".5", ".5"), ("ten", "10"), ("None", "0"),
    ("dont know", "don't know"), ("couldnt've", "couldn't've"), ("mother-in-law", "mother in law"), ("red, blue", "red blue"),
    ("a  b\tan\nc", "b c"), ("it's", "it's"),
])  # fmt: skip
def test_vqa_normal_forms(text: str, form: str) -> None:
    assert normalised(text) == form


def test_vqa_and_grades_are_means() -> None:
    cases = [(0.6, {"category": "ocr,math"}), (1.0, {"category": "ocr"}), (None, {"category": "rec"}), (0.0, {"category": "ocr"})]
    points = vqa(marks(cases, guess=0.0))
    assert points.value == pytest.approx(0.4) and points.told["wholly_right"] == 0.25 and points.chance is None
    assert points.error == pytest.approx(np.std([0.6, 1, 0, 0], ddof=1) / 2)
    told = graded(marks(cases, guess=0.0)).told
    assert told["by_ability"]["ocr"] == {"n": 3, "mean": pytest.approx(1.6 / 3)} and told["by_ability"]["math"]["n"] == 1
    assert told["by_combination"]["ocr,math"] == {"n": 1, "mean": 0.6} and told["by_combination"]["ocr"]["mean"] == 0.5


def test_errors_are_the_spread_over_resampled_units() -> None:
    """F1 and HallusionBench's mean, recomputed over 600 resamples of questions and of sets."""
    rng = np.random.default_rng(0)
    truth, right = rng.random(300) < 0.5, rng.random(300) < 0.8

    def f1_of(at: np.ndarray) -> Points:
        said: list[str | None] = ["yes" if truth[k] == right[k] else "no" for k in at]
        return f1(marks([(bool(right[k]), {}) for k in at], truth=["yes" if truth[k] else "no" for k in at], said=said))

    values = [f1_of(rng.integers(0, 300, 300)).value for _ in range(300)]
    error = f1_of(np.arange(300)).error
    assert error is not None and 0.88 < error / np.std(values) < 1.12
    cases = [
        (bool(rng.random() < 0.4 + 0.5 * (number % 3)), {"set_id": f"{number}", "figure_id": f"{figure}", "question_id": f"{question}"})
        for number in range(60) for figure in range(2) for question in range(1 + number % 4)
    ]  # fmt: skip
    by_set = [[case for case in cases if case[1]["set_id"] == str(number)] for number in range(60)]

    def drawn(sets: np.ndarray) -> Points:
        return hallusion(marks([(right, {**m, "set_id": f"{at}"}) for at, number in enumerate(sets) for right, m in by_set[number]]))

    values = [drawn(rng.integers(0, 60, 60)).value for _ in range(300)]
    error = drawn(np.arange(60)).error
    assert error is not None and 0.85 < error / np.std(values) < 1.15


def test_one_unit_has_no_error_and_names_are_sets() -> None:
    assert Points(np.array([1.0])).error is None and Points(np.array([1.0, 1.0]), unit=["a", "a"]).error is None
    assert set(SETS) == {"mme", "f1", "hallusion", "ocrbench", "vqa", "graded"}
