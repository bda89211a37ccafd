"""Laws of the statistics: intervals cover, swapped sides mirror, small classes don't shrink the spread, nothing is no number."""

from __future__ import annotations

import numpy as np
import pytest

from datasets_ray.errors import UserError
from grid import stats


def _covered(draw, truth: float, build, rounds: int = 300) -> float:
    hits = 0
    for k in range(rounds):
        interval = build(draw(np.random.default_rng(k)), k)
        hits += interval.low <= truth <= interval.high
    return hits / rounds


def test_bootstrap_covers_a_mean() -> None:
    share = _covered(lambda rng: rng.random(150) < 0.7, 0.7, lambda x, k: stats.bootstrap([stats.sample(x)], k, resamples=400))
    assert 0.91 <= share <= 0.985


def test_bootstrap_covers_a_mean_over_small_classes() -> None:
    """Six questions a class: a plain stratified bootstrap would be 9 % too narrow."""
    truths = np.linspace(0.2, 0.9, 25)
    labels = np.repeat([f"class {k:02d}" for k in range(25)], 6)

    def build(x: np.ndarray, k: int) -> stats.Interval:
        return stats.bootstrap([stats.sample(x, labels)], k, resamples=400)

    share = _covered(lambda rng: rng.random(150) < np.repeat(truths, 6), float(truths.mean()), build)
    assert 0.92 <= share <= 0.985


def test_classes_of_one_question_still_have_spread() -> None:
    rng = np.random.default_rng(3)
    values = rng.random(80) < 0.5
    lone = stats.bootstrap([stats.sample(values, [f"c{k}" for k in range(80)])], 1)
    plain = stats.bootstrap([stats.sample(values)], 1)
    assert lone.high - lone.low == pytest.approx(plain.high - plain.low, rel=0.1)
    labels = ["a"] * 40 + ["b"] * 39 + ["alone"]
    assert stats.standard_error(stats.sample(values, labels)) is not None


def test_paired_interval_covers_a_difference_of_correlated_arms() -> None:
    """Both arms share each question's difficulty: the paired interval is as narrow as the differences allow and covers."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        hard = rng.random(200)
        return (hard < 0.75).astype(float) - (hard < 0.6).astype(float)

    share = _covered(draw, 0.15, lambda x, k: stats.bootstrap([stats.sample(x)], k, resamples=400))
    assert 0.91 <= share <= 0.985


def test_average_over_benchmarks_weighs_them_equally() -> None:
    small, large = stats.sample([1.0, 0.0]), stats.sample(np.zeros(1000))
    assert stats.bootstrap([small, large], 0).mean == pytest.approx(0.25)


def test_mean_per_class_is_the_mean_of_class_means() -> None:
    drawn = stats.sample([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert drawn.mean == pytest.approx(0.5)
    assert stats.sample([1, 1, 1, 0]).mean == pytest.approx(0.75)


def test_swapping_the_sides_mirrors_interval_and_keeps_p() -> None:
    rng = np.random.default_rng(0)
    gap = rng.choice([-1.0, -0.5, 0.0, 0.5, 1.0], 173)
    for labels in (None, rng.choice(list("abcdef"), 173)):
        there, back = stats.sample(gap, labels), stats.sample(-gap, labels)
        one, other = stats.bootstrap([there], 5), stats.bootstrap([back], 5)
        assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low), abs=1e-12)
        assert stats.sign_flip_test([there], 5) == stats.sign_flip_test([back], 5)


def test_counting_distinct_values_is_the_bootstrap() -> None:
    """Multinomial counts over distinct values have the spread of drawing question by question."""
    rng = np.random.default_rng(1)
    values = rng.choice([-1.0, 0.0, 1.0], 120)
    fast = stats.replicates(stats.sample(values), 2, 4000)
    slow = np.array([rng.choice(values, 120).mean() for _ in range(4000)])
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.006)
    assert fast.std() == pytest.approx(slow.std() * np.sqrt(120 / 119), rel=0.05)


def test_sign_flip_p_is_uniform_under_no_effect_and_small_under_one() -> None:
    rng = np.random.default_rng(0)
    null = [stats.sign_flip_test([stats.sample(rng.choice([-1.0, 0.0, 1.0], 90))], k, 500) for k in range(200)]
    assert 0.01 <= np.mean(np.array(null) < 0.05) <= 0.10
    assert stats.sign_flip_test([stats.sample(rng.choice([0.0, 0.0, 1.0], 90))], 0) < 0.001


def test_sign_flip_p_by_hand() -> None:
    """Three questions, all better: 2 of 8 sign patterns are as extreme."""
    assert stats.sign_flip_test([stats.sample([1.0, 1.0, 1.0])], 0, 40_000) == pytest.approx(0.25, abs=0.01)


def test_same_seed_same_interval() -> None:
    drawn = [stats.sample(np.random.default_rng(0).random(50) < 0.3)]
    assert stats.bootstrap(drawn, 7) == stats.bootstrap(drawn, 7)
    assert stats.bootstrap(drawn, 7) != stats.bootstrap(drawn, 8)


def test_holm_by_hand() -> None:
    assert stats.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert stats.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert stats.holm({}) == {}


def test_wilson_by_hand_and_at_the_edges() -> None:
    known = stats.wilson(8, 10)
    assert (known.low, known.high) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    sure = stats.wilson(50, 50)
    assert sure.high == 1.0 and sure.low < 0.95


def test_standard_error_by_hand() -> None:
    assert stats.standard_error(stats.sample([1, 0, 1, 0])) == pytest.approx(np.sqrt(1 / 3 / 4))
    classes = stats.standard_error(stats.sample([1, 0, 1, 1], ["a", "a", "b", "b"]))
    assert classes == pytest.approx(np.sqrt(0.5 / 2) / 2)
    assert stats.standard_error(stats.sample([1.0])) is None


def test_seed_spread() -> None:
    spread = stats.seed_spread([60.0, 62.0, 64.0])
    assert (spread.mean, spread.deviation, spread.low, spread.high) == (62.0, 2.0, 60.0, 64.0)
    assert stats.seed_spread([60.0]).deviation is None


def test_z_against_chance_by_hand() -> None:
    correct = np.array([1.0] * 30 + [0.0] * 70)
    error, z = stats.z_against_chance(correct, np.full(100, 0.2))
    assert (error, z) == pytest.approx((0.04, 2.5))


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.sample([]),
        lambda: stats.wilson(0, 0),
        lambda: stats.bootstrap([], 0),
        lambda: stats.sign_flip_test([], 0),
        lambda: stats.seed_spread([]),
        lambda: stats.z_against_chance(np.zeros(0), np.zeros(0)),
    ],
)
def test_nothing_is_an_error_and_never_a_number(call) -> None:
    with pytest.raises(UserError):
        call()
