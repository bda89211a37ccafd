"""Order: the rows of every step are a pure function of the recipe; every row comes once an epoch; counting agrees with doing."""

from __future__ import annotations

import numpy as np
import pytest

from datasets_ray.errors import UserError
from datasets_ray.order import count_steps, modality_lengths, steps_of
from datasets_ray.rows import RowTable, row, write_rows

SIGNS = np.where(np.random.default_rng(3).random(103) < 0.3, -5, 7)


@pytest.mark.parametrize("order", ["shuffle", "modality_grouped"])
@pytest.mark.parametrize("epochs", [0.3, 1, 1.5, 2, 3])
def test_every_row_once_an_epoch_and_the_counted_steps(order, epochs):
    index = steps_of(103, 8, epochs=epochs, seed=1, order=order, lengths=SIGNS)
    assert len(index) == count_steps(103, 8, epochs=epochs) == int(np.ceil(round(epochs * 103, 6) / 8))
    seen = np.concatenate(list(index))
    assert len(seen) == int(np.ceil(round(epochs * 103, 6)))
    assert [len(step) for step in index][:-1] == [8] * (len(index) - 1)
    for start in range(0, len(seen), 103):
        part = seen[start : start + 103]
        assert len(np.unique(part)) == len(part)
    if epochs >= 1:
        assert set(seen[:103]) == set(range(103))


def test_steps_may_replace_epochs():
    index = steps_of(10, 4, steps=6, seed=0)
    assert len(index) == count_steps(10, 4, steps=6) == 6
    assert all(len(step) == 4 for step in index)
    assert sorted(np.concatenate(list(index))[:20]) == sorted([*range(10)] * 2)


@pytest.mark.parametrize("order", ["shuffle", "modality_grouped"])
def test_seeded_and_reshuffled(order):
    make = lambda seed: steps_of(103, 8, epochs=2, seed=seed, order=order, lengths=SIGNS).rows
    assert np.array_equal(make(5), make(5))
    assert not np.array_equal(make(5), make(6))
    assert not np.array_equal(make(5)[:103], make(5)[103:])


@pytest.mark.parametrize("epochs", [1, 3])
def test_modality_grouped_steps_are_of_one_kind_but_for_the_leftovers(epochs):
    index = steps_of(103, 8, epochs=epochs, seed=2, order="modality_grouped", lengths=SIGNS)
    mixed = [step for step in range(len(index)) if len(set(SIGNS[index[step]] > 0)) == 2]
    # an epoch leaves less than a batch of each modality, which fills at most two steps and the start of the next epoch's
    assert len(mixed) <= 3 * epochs
    kinds = [bool(SIGNS[index[step][0]] > 0) for step in range(len(index) - 2)]
    assert kinds != sorted(kinds)
    assert kinds != sorted(kinds, reverse=True)


def test_fractions_mean_what_they_say():
    assert count_steps(30, 1, epochs=0.1) == 3  # 0.1 * 30 is 3.0000000000000004
    assert count_steps(558_128, 256, epochs=1) == 2181  # LLaVA's pretraining and finetuning
    assert count_steps(665_298, 128, epochs=1) == 5198


@pytest.mark.parametrize(
    "wrong", [{}, {"epochs": 1, "steps": 2}, {"epochs": 1, "order": "sorted"}, {"epochs": 1, "order": "modality_grouped"}]
)
def test_mistakes_are_user_errors(wrong):
    with pytest.raises(UserError):
        steps_of(10, 4, **wrong)
    with pytest.raises(UserError):
        count_steps(0, 4, epochs=1)


def test_modality_lengths_count_words_and_sign_images(tmp_path):
    rows = [
        row("a", images=[{"bytes": b"x"}], messages=[{"role": "user", "text": "two words"}, {"role": "assistant", "text": " one "}]),
        row("b", messages=[{"role": "text", "text": "now\nfour words  here"}]),
        row("c", images=[{"bytes": b"x"}, {"bytes": b"y"}]),
        row("d"),
    ]
    write_rows(rows[:2], tmp_path / "1")
    write_rows(rows[2:], tmp_path / "2")
    assert modality_lengths([RowTable(tmp_path / "1"), RowTable(tmp_path / "2")]).tolist() == [3, -4, 1, -1]
