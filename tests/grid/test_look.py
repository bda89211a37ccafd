"""A row's journey through an arm."""

from __future__ import annotations

import pytest

from datasets_ray.errors import UserError
from grid import look
from tests.grid.studies import PROFILE, STUDY, write


@pytest.fixture
def shown(tmp_path, capsys):
    def go(*words: str) -> str:
        study, profile = write(tmp_path, STUDY, PROFILE.replace("vocab_size: 100", "vocab_size: 1536"))
        assert look.main([study, "--profile", profile, *words]) == 0
        return capsys.readouterr().out

    return go


def test_both_trainings_of_an_arm_from_raw_row_to_pack(shown):
    said = shown("--arm", "first", "--row", "2")
    assert "pretrain first" in said and "finetune first" in said and "finetune third" not in said
    assert said.count("── row 2 of") == 2 and said.count("step and pack") == 2
    assert "template plain" in said and "template vicuna_v1" in said and "⟦" in said and "<image>×16" in said
    assert "captions (100 of 100)" in said


def test_a_question_as_the_model_reads_it(shown):
    said = shown("--arm", "second", "--stage", "counts", "--row", "1")
    assert "Answer with the option's letter from the given choices directly." in said and "right answer" in said and "A. " in said


def test_what_can_not_be_shown_is_said(shown, tmp_path):
    for words, says in (
        (["--arm", "frist"], "did you mean 'first'?"),
        (["--arm", "first", "--stage", "pretraining"], "did you mean 'pretrain'?"),
        (["--arm", "first", "--stage", "birds"], "has not run yet"),
        (["--arm", "first", "--out", str(tmp_path / "nowhere")], "no run in"),
    ):
        with pytest.raises(UserError, match=says.replace("?", r"\?")):
            shown(*words)
