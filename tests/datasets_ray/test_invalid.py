"""Why answers are invalid: every kind is told from the others, and counts add up to the invalid answers."""

from __future__ import annotations

import pytest

from datasets_ray import invalid
from datasets_ray.invalid import explain, reason

OPTIONS = ["Birman", "Ragdoll", "Bengal"]
KNOWN = frozenset({"birman", "ragdoll", "bengal", "sphynx"})


@pytest.mark.parametrize(
    ("text", "letter", "finished", "why"),
    [
        ("", None, True, invalid.EMPTY),
        (" \n", None, False, invalid.EMPTY),
        ("Z", "Z", True, invalid.REFUSAL),
        ("Cannot determine the answer", "Z", True, invalid.REFUSAL),
        ("E", None, True, invalid.LETTER),
        ("(D).", "D", True, invalid.LETTER),
        ("Birman or Ragdoll", None, True, invalid.SEVERAL),
        ("sphynx", None, True, invalid.ELSEWHERE),
        ("Sphynx.", None, True, invalid.ELSEWHERE),
        ("a very old cat that", None, False, invalid.CUT),
        ("a cat", None, True, invalid.OTHER),
    ],
)
def test_each_kind(text: str, letter: str | None, finished: bool, why: str) -> None:
    assert reason(text, OPTIONS, letter, finished, KNOWN) == why
    assert why in invalid.REASONS


def test_only_invalid_answers_are_counted_with_an_example_of_each() -> None:
    found = explain(
        ["A", "sphynx", "Sphynx", "", "a cat"],
        [OPTIONS, OPTIONS, OPTIONS, OPTIONS, ["Sphynx", "Boxer"]],
        ["A", None, None, None, None],
        [True, False, False, False, False],
        [True] * 5,
    )
    assert found["counts"] == {invalid.ELSEWHERE: 2, invalid.EMPTY: 1, invalid.OTHER: 1}
    assert found["examples"][invalid.ELSEWHERE] == {"text": "sphynx", "options": OPTIONS}
