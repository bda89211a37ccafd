"""Metrics against definitions worked out by hand, and against simulation where the definition is a variance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from datasets_ray.errors import UserError
from datasets_ray.metrics import METRICS, Groups, accuracy, chance, mean_per_class, standard_error, validity, yes_no

CORRECT = [True, True, True, False, False, True]
LABELS = ["a", "a", "a", "a", "b", "b"]


def test_values_by_hand() -> None:
    assert accuracy(CORRECT) == 4 / 6
    assert mean_per_class(CORRECT, LABELS) == (3 / 4 + 1 / 2) / 2


def test_mean_per_class_is_the_peers_balanced_accuracy() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 7, 500), rng.integers(0, 7, 500)
    guess[:200] = truth[:200]
    assert mean_per_class(truth == guess, [str(t) for t in truth]) == pytest.approx(metrics.balanced_accuracy_score(truth, guess))


def test_equal_classes_make_micro_and_macro_equal() -> None:
    rng = np.random.default_rng(1)
    correct, labels = rng.random(120) < 0.6, [str(i % 6) for i in range(120)]
    assert accuracy(correct) == pytest.approx(mean_per_class(correct, labels))


def test_validity_counts_letters_of_the_options_shown() -> None:
    assert validity(["A", "E", None, "Z", "F"], [["x"] * 5] * 5) == 2 / 5
    assert validity(["C"], [["x", "y"]]) == 0.0


def test_standard_errors_by_hand() -> None:
    assert standard_error("accuracy", CORRECT, LABELS) == pytest.approx(np.std(CORRECT, ddof=1) / math.sqrt(6))
    by_class = np.var([1, 1, 1, 0], ddof=1) / 4 + np.var([0, 1], ddof=1) / 2
    assert standard_error("mean_per_class", CORRECT, LABELS) == pytest.approx(math.sqrt(by_class) / 2)
    assert standard_error("accuracy", [True], ["a"]) is None
    assert standard_error("mean_per_class", [True], ["a"]) is None


def test_a_class_of_one_does_not_look_certain() -> None:
    """One question of a class says nothing of its spread: the others' is taken."""
    with_single = standard_error("mean_per_class", [True, False, True, False, True], ["a", "a", "b", "b", "c"])
    assert with_single is not None
    assert with_single == pytest.approx(math.sqrt(0.5 / 2 + 0.5 / 2 + 0.5) / 3)
    all_single = standard_error("mean_per_class", [True, False, True], ["a", "b", "c"])
    assert all_single == pytest.approx(standard_error("accuracy", [True, False, True], ["a", "b", "c"]))


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_standard_error_is_the_spread_over_repetitions(metric: str) -> None:
    rng = np.random.default_rng(2)
    classes = np.repeat(np.arange(8), rng.integers(5, 40, 8))
    rate = rng.uniform(0.2, 0.9, 8)[classes]
    labels = [str(c) for c in classes]
    draws = rng.random((400, len(classes))) < rate
    values = [METRICS[metric].value(d, classes) for d in draws]
    errors = [standard_error(metric, d, labels) for d in draws]
    wide = METRICS[metric].error is METRICS["accuracy"].error  # pooled variance also holds the spread between classes
    ratio = float(np.mean(errors)) / float(np.std(values))
    assert 0.9 < ratio < (1.35 if wide else 1.15)


def test_chance_averages_as_the_metric_does() -> None:
    assert chance("accuracy", [2, 2, 4], ["a", "a", "b"]) == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert chance("mean_per_class", [2, 2, 4], ["a", "a", "b"]) == pytest.approx((0.5 + 0.25) / 2)
    with pytest.raises(UserError, match="no options"):
        chance("accuracy", [0, 2], ["a", "b"])


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_nothing_is_an_error_not_a_zero(metric: str) -> None:
    with pytest.raises(UserError, match="no questions"):
        standard_error(metric, [], [])
    with pytest.raises(UserError, match="no questions"):
        chance(metric, [], [])
    for call in (lambda: accuracy([]), lambda: mean_per_class([], []), lambda: validity([], [])):
        with pytest.raises(UserError, match="no questions"):
            call()


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UserError, match="mean_per_class"):
        standard_error("mean_class", CORRECT, LABELS)


def test_groups_keep_their_order_and_need_all_of_theirs() -> None:
    groups = Groups.of(["b", "a", "b", "c"])
    assert [members.tolist() for members in groups.members] == [[0, 2], [1], [3]]
    assert groups.all(np.array([True, False, True, True])).tolist() == [True, False, True]
    assert groups.product(np.array([0.5, 0.5, 0.25, 1.0])).tolist() == [0.125, 0.5, 1.0]


def test_yes_no_by_hand_and_against_scikit_learn() -> None:
    told = yes_no([True, True, False, False], [True, None, True, None])
    assert told == {"accuracy": 0.25, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_share": 0.5}
    never = yes_no([True, False], [False, False])
    assert (never["f1"], never["precision"], never["accuracy"]) == (0.0, 0.0, 0.5)
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(3)
    truth, said = rng.random(300) < 0.5, rng.random(300) < 0.4
    assert yes_no(truth, said.tolist())["f1"] == pytest.approx(metrics.f1_score(truth, said))
