"""The miniature world: rows are pure functions of their address, splits are disjoint, labels balanced, questions answerable."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from datasets_ray.errors import UserError
from datasets_ray.prompts import SUFFIX, question_prompt
from datasets_ray.rows import RowTable, row
from datasets_ray.sources import build
from datasets_ray.specimens import talk
from datasets_ray.specimens.draw import draw, sample_scene
from datasets_ray.specimens.species import FAMILIES, SETS, SPECIES, distance, siblings
from datasets_ray.specimens.text import STYLES, colour_of, corpus_sample
from datasets_ray.specimens.world import PARTS, complete, row_at

COUNT = 60


def spec_of(part: str, **more) -> dict:
    keys = {"questions": {"set": "count"}}.get(part, {})
    return {"source": "specimens", "part": part, "rows": COUNT, **keys, **more}


def rows_of(part: str, count: int = COUNT, **more) -> list[dict]:
    full = complete(spec_of(part, **more))
    return [row_at(full, i) for i in range(count)]


def none(_: str):
    raise AssertionError("specimens need no input")


@pytest.mark.parametrize("part", PARTS)
def test_rows_depend_on_their_address_alone(part, tmp_path):
    few, many = spec_of(part), spec_of(part, rows=2 * COUNT)
    build(few, tmp_path / "few", none, None)
    build(many, tmp_path / "many", none, None)
    assert list(RowTable(tmp_path / "few")) == list(RowTable(tmp_path / "many"))[:COUNT]
    assert list(RowTable(tmp_path / "few")) != rows_of(part, seed=1)


def test_train_and_test_share_no_image():
    seen = [{r["images"][0]["bytes"] for r in rows_of("labelled", split=split)} for split in ("train", "test")]
    assert all(len(s) == COUNT for s in seen) and not seen[0] & seen[1]


@pytest.mark.parametrize("name", SETS)
def test_labels_are_balanced_and_belong_to_the_set(name):
    labels = Counter(r["label"] for r in rows_of("labelled", set=name))
    assert set(labels) == {s.name for s in FAMILIES[name].species}
    assert set(labels.values()) == {COUNT // len(labels)}


def test_names_are_single_words_and_species_differ():
    assert len(SPECIES) == sum(len(f.species) for f in FAMILIES.values())
    for family in FAMILIES.values():
        assert len(family.species) == 10
        assert len({s.values for s in family.species}) == len(family.species)
        assert all(s.name.isalpha() and s.name.islower() for s in family.species)


def test_a_set_is_two_genera_of_five_with_likeness_graded_inside():
    """What keeps mined options from giving the answer away: the look-alikes of a species and those of each of them are the same five."""
    for family in FAMILIES.values():
        genera = {frozenset({species.name, *(s.name for s in siblings(species.name)[:4])}) for species in family.species}
        assert len(genera) == 2 and all(len(genus) == 5 for genus in genera)
        for species in family.species:
            away = [distance(species, s) for s in siblings(species.name)]
            assert away == sorted(away) and away[0] < away[3] <= 3 and set(away[4:]) == {len(family.slots)}


def test_captions_are_short_and_noisy_or_long_and_right():
    words = {style: np.mean([len(r["messages"][1]["text"].split()) for r in rows_of("captions", 200, style=style)]) for style in STYLES}
    assert words["short"] < 10 < 22 < words["long"]
    named = {s: np.mean([r["label"] in r["messages"][1]["text"] for r in rows_of("captions", 200, style=s)]) for s in ("short", "web")}
    assert named["short"] < 0.6 < 0.7 < named["web"]
    assert all(r["label"] in r["messages"][1]["text"] for r in rows_of("captions", 200, style="long"))


@pytest.mark.parametrize("kind", [*talk.GENERAL, *SETS])
def test_questions_have_one_right_answer_among_distinct_options(kind):
    answers = Counter()
    for r in rows_of("questions", set=kind, split="test"):
        assert len(set(r["options"])) == len(r["options"]) == (4 if kind in talk.GENERAL else 5)
        assert r["options"]["ABCDE".index(r["answer"])] == r["label"]
        answers[r["answer"]] += 1
    assert len(answers) >= 4, "the right letter moves about"


def test_a_question_is_worded_as_it_is_asked_at_evaluation():
    rng = np.random.default_rng(0)
    asked = talk.species_question(rng, SPECIES["lumora"])
    assert talk.LETTER_SUFFIX == SUFFIX
    assert asked.prompt() == question_prompt(row("x", question=asked.text, options=list(asked.options)), SUFFIX)


def test_quizzes_give_the_letter_of_what_the_words_describe():
    for r in rows_of("quizzes", 200, specific=1.0):
        prompt, letter = (m["text"] for m in r["messages"])
        told = prompt.split("\n")[0]
        chosen = next(line[3:] for line in prompt.split("\n") if line.startswith(f"{letter}. "))
        species = SPECIES[chosen]
        assert chosen == r["label"]
        assert chosen in told or FAMILIES[species.set].describe(species) in told


@pytest.mark.parametrize("part", ["quizzes", "chat_text", "instructions"])
def test_answers_can_be_the_options_words(part):
    for letter, text in zip(rows_of(part, answers="letter"), rows_of(part, answers="text")):
        for lettered, worded in zip(letter["messages"], text["messages"]):
            if lettered != worded:
                asked = letter["messages"][letter["messages"].index(lettered) - 1]["text"]
                assert f"\n{lettered['text']}. {worded['text']}\n" in asked


def test_instructions_mix_images_and_text():
    rows = rows_of("instructions", 300)
    assert 0.1 < np.mean([not r["images"] for r in rows]) < 0.3
    for r in rows:
        assert [m["role"] for m in r["messages"]] == ["user", "assistant"] * (len(r["messages"]) // 2)
        assert sum(m["text"].count("<image>") for m in r["messages"]) == len(r["images"])


@pytest.mark.parametrize("size", [32, 48, 96])
def test_the_same_scene_is_drawn_at_any_size(size):
    scene = sample_scene(np.random.default_rng(5), SPECIES["drilo"])
    image = draw(scene, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    small, large = (Image.fromarray(draw(scene, s)).resize((16, 16), Image.Resampling.BOX) for s in (32, size))
    assert np.abs(np.asarray(small, float) - np.asarray(large, float)).mean() < 12


def test_images_are_png_of_the_size_asked_for():
    image = Image.open(io.BytesIO(rows_of("labelled", 1, size=40)[0]["images"][0]["bytes"]))
    assert image.format == "PNG" and image.size == (40, 40)


def test_the_tokenizer_corpus_has_every_name():
    told = " ".join(corpus_sample(400, 0))
    assert all(name in told for name in SPECIES) and SUFFIX in told and len(corpus_sample(7, 0)) == 7


@pytest.mark.parametrize("wrong", [
    {"part": "labelled", "rows": 0}, {"part": "labels", "rows": 4}, {"part": "labelled", "rows": 4, "sett": "pets"},
    {"part": "captions", "rows": 4, "style": "shrt"}, {"part": "labelled", "rows": 4, "set": "flower"}, {"part": "questions", "rows": 4},
    {"part": "labelled", "rows": 4, "split": "dev"},
])
def test_mistakes_in_a_spec_are_named(wrong, tmp_path):
    with pytest.raises(UserError) as caught:
        build({"source": "specimens", **wrong}, tmp_path, none, None)
    assert "\n" not in caught.value.what and (caught.value.hint or caught.value.why)


@pytest.mark.parametrize("kind", ["count", "colour", "position"])
def test_the_options_alone_give_nothing_away(kind: str) -> None:
    """Every option is right as often as any other that is shown: a permuted image leaves chance."""
    rng = np.random.default_rng(0)
    shown: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for number in range(6000):
        asked = talk.general_question(rng, kind, talk.EVERYONE[number % len(talk.EVERYONE)])
        shown.update(asked.options)
        right[asked.answer] += 1
        if kind == "colour":
            assert colour_of(asked.species) == asked.answer and FAMILIES[asked.species.set].noun not in asked.text
    for option, times in shown.items():
        assert abs(right[option] / times - 0.25) < 4 * (0.25 * 0.75 / times) ** 0.5, option


@pytest.mark.parametrize("kind", list(talk.GENERAL))
def test_every_answer_of_a_general_set_is_right_equally_often(kind: str) -> None:
    values = talk.GENERAL[kind]
    answers = Counter(r["label"] for r in rows_of("questions", 4 * len(values), set=kind, split="test"))
    assert answers == dict.fromkeys(values, 4)
