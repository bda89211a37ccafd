"""Arms against the best one: exact tests by hand, corrected over the arms, silent where answers are missing."""

from __future__ import annotations

from math import comb
from pathlib import Path

import numpy as np
import pytest

from datasets_ray.errors import UserError
from grid import stats
from grid.report import compared
from grid.report.load import load_run
from grid.results import Answers, Arm, Results, Score
from tests.grid.synthetic_run import make_run, small_plan


def answers(right: str) -> Score:
    """A score whose questions are right (1) or wrong (0)."""
    correct = np.array([mark == "1" for mark in right])
    n = len(correct)
    ids = np.array([f"q{k}" for k in range(n)])
    known = Answers(ids, np.full(n, "x"), correct, np.full(n, True), np.full(n, 4), np.full(n, "A"))
    return Score(100 * float(correct.mean()), n=n, answers=known)


def test_mcnemar_by_hand() -> None:
    """Six questions are one model's alone, one the other's: p = 2 (C(7,0) + C(7,1)) / 2^7."""
    first, second = np.array([1] * 6 + [0] + [1] * 3 + [0] * 2), np.array([0] * 6 + [1] + [1] * 3 + [0] * 2)
    assert stats.mcnemar(first, second) == (6, 1, pytest.approx(2 * (1 + 7) / 128))
    assert stats.mcnemar(second, first)[2] == stats.mcnemar(first, second)[2]
    assert stats.mcnemar(first, first) == (0, 0, 1.0)
    assert stats.mcnemar(np.array([1, 0]), np.array([0, 1])) == (1, 1, 1.0)
    tail = sum(comb(40, k) for k in range(13)) / 2**40
    assert stats.mcnemar(np.repeat([1, 0], [28, 12]), np.repeat([0, 1], [28, 12]))[2] == pytest.approx(2 * tail)
    with pytest.raises(UserError, match="over no questions"):
        stats.mcnemar(np.zeros(0), np.zeros(0))


def test_mcnemar_stays_exact_on_many_questions_and_agrees_with_sign_flips() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random(25_000) < 0.52, rng.random(25_000) < 0.5
    exact = stats.mcnemar(first, second)[2]
    z = (first.sum() - second.sum()) / np.sqrt((first != second).sum())
    assert 0 < exact < 0.01 and exact == pytest.approx(2 * (1 - _normal(abs(z))), rel=0.1)
    few = stats.mcnemar(first[:60], second[:60])[2]
    flips = stats.sign_flip_test([stats.sample(first[:60].astype(float) - second[:60])], 0, 40_000)
    assert few == pytest.approx(flips, abs=0.01)


def _normal(z: float) -> float:
    from statistics import NormalDist

    return NormalDist().cdf(z)


def test_benchmarks_are_compared_with_their_best_arm() -> None:
    arms = [Arm("worst", {}, scores={"a": answers("0000000011")}), Arm("best", {}, scores={"a": answers("1111111100")})]
    arms.append(Arm("even", {}, scores={"a": answers("1111111000")}))
    arms.append(Arm("silent", {}, missing={"a": "failed"}))
    table = compared.benchmarks_compared(Results("toy", {"all": ("a",)}, arms))
    assert table is not None
    told = {cells[1].text: [cell.text for cell in cells[2:]] for cells in table.rows}
    assert set(told) == {"worst", "even"}
    assert told["even"] == ["best", "−10.0", "0", "1", "1.000", "1.000"]
    p = 2 * (comb(10, 0) + comb(10, 1) + comb(10, 2)) / 2**10
    assert told["worst"] == ["best", "−60.0", "2", "8", f"{p:.3f}", f"{2 * p:.3f}"], "Holm doubles the smaller of two"


def test_groups_are_compared_with_intervals(tmp_path: Path) -> None:
    results = load_run(make_run(tmp_path / "run", small_plan(), skip=("predict row-12 pets",)))
    table = compared.compared_table(results)
    assert table is not None and len(table.rows) == 5
    fine = {cells[0].text: [cell.text for cell in cells[1:4]] for cells in table.rows}
    best = max((arm for arm in results.arms if arm.name != "row-12"), key=lambda arm: arm.value("fine_grained", results.groups) or 0)
    assert fine[best.name] == ["best", "", ""] and fine["row-12"][0] == "–"
    for arm in results.arms:
        if arm.name in (best.name, "row-12"):
            continue
        gap = (arm.value("fine_grained", results.groups) or 0) - (best.value("fine_grained", results.groups) or 0)
        low, high = (float(x.replace("−", "-")) for x in fine[arm.name][1].strip("[]").split(", "))
        assert float(fine[arm.name][0].replace("−", "-")) == pytest.approx(gap, abs=0.06) and low <= gap <= high
    assert compared.compared_table(Results("toy", {"all": ("a",)}, [Arm("one", {}, scores={"a": answers("01")})])) is None
