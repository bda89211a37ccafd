"""Tokens: learned are the answer's tokens with its end token and nothing else, for every template, tokenizer and shape of row."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from datasets_ray.errors import UserError
from datasets_ray.prompts import TEMPLATES, Piece, Rendered, RowError, render
from datasets_ray.rows import row
from datasets_ray.tokens import IGNORE, IMAGE_ID, encode, encode_many, end_id, load_tokenizer, require

TOKENIZERS = ("tiny-llama", "tiny-qwen2")


def fits(template: str, tokenizer: str) -> bool:
    try:
        require(template, load_tokenizer(tokenizer))
    except UserError:
        return False
    return True


PAIRS = [pair for pair in itertools.product(TEMPLATES, TOKENIZERS) if fits(*pair)]

ROWS = {
    "image": [("<image>\nWhat is it?\nA. lumora\nB. bivon", "A")],
    "many turns": [("<image>\nHow many?", "3 of them.\nNo more"), ("Sure?", "Yes: three"), ("Why?", "é ü 漢字 🌼!")],
    "image in the middle": [("Hello", "Hi there"), ("And <image> this?", "a bivon")],
    "text only": [("What is a lumora?", "A lumora is a flower.")],
    "two images": [("<image>\n<image>\nSame?", "no")],
    "numbers": [("2+2?", "4"), ("4+4?", "8")],
}


def made(turns: list[tuple[str, str]]) -> dict:
    return row("x", messages=[{"role": role, "text": text} for turn in turns for role, text in zip(("user", "assistant"), turn)])


def rendered_with(template: str, name: str, turns: list[tuple[str, str]]) -> tuple[Rendered, list[int]]:
    tokenizer = load_tokenizer(name)
    rendered = render(made(turns), template, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token)
    return rendered, [5] * rendered.text.count("<image>")


def test_the_pairs_are_the_sensible_ones():
    assert {(t, n) for t in ("plain", "text", "vicuna_v1", "llama_2") for n in TOKENIZERS} <= set(PAIRS)
    assert ("chatml", "tiny-qwen2") in PAIRS
    assert ("chatml", "tiny-llama") not in PAIRS


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_learned_is_the_answer_with_its_end_and_nothing_else(template, name, shape):
    tokenizer = load_tokenizer(name)
    rendered, images = rendered_with(template, name, ROWS[shape])
    encoded = encode(rendered, tokenizer, images, 2048)
    learned = encoded.labels != IGNORE
    assert np.array_equal(encoded.labels[learned], encoded.ids[learned])
    assert (encoded.ids != IMAGE_ID)[learned].all()
    # runs of learned tokens, decoded, are the answers; each run finishes with the template's end token
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learned.astype(int), [0]]))).reshape(-1, 2)
    runs = [encoded.ids[start:stop] for start, stop in edges]
    if template == "plain":  # answers end in a newline, so they touch each other, unless an image stands between
        parts = "".join("|" * question.count("<image>") + answer + "\n" for question, answer in ROWS[shape]).split("|")
        expected = [part for part in parts if part]
        if tokenizer.bos_token is None and parts[0]:  # the very first token of a text has nothing before it
            expected[0] = expected[0].removeprefix(tokenizer.decode(encoded.ids[:1]))
        assert [tokenizer.decode(run) for run in runs] == expected
        return
    assert [tokenizer.decode(run, skip_special_tokens=True).strip() for run in runs] == [answer for _, answer in ROWS[shape]]
    assert all(run[-1] == end_id(template, tokenizer) for run in runs)
    assert all((run[:-1] != end_id(template, tokenizer)).all() for run in runs)


@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_whole_string_survives_tokenising(template, name):
    tokenizer = load_tokenizer(name)
    rendered, images = rendered_with(template, name, ROWS["many turns"])
    ids = encode(rendered, tokenizer, images, 2048).ids
    text = tokenizer.decode(ids[ids != IMAGE_ID], skip_special_tokens=False)
    squeeze = str.maketrans("", "", " ")
    assert text.removeprefix("<s>").translate(squeeze) == rendered.text.replace("<image>", "").translate(squeeze)


@pytest.mark.parametrize(("template", "name"), [pair for pair in PAIRS if pair[0] != "plain"])
def test_a_prompt_is_the_training_tokens_up_to_the_first_learned_one(template, name):
    tokenizer = load_tokenizer(name)
    for turns in ROWS.values():
        rendered, images = rendered_with(template, name, turns)
        full = encode(rendered, tokenizer, images, 2048)
        question = made(turns)
        question["messages"] = question["messages"][:1]
        asked = render(question, template, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token)
        prompt = encode(asked, tokenizer, images[: turns[0][0].count("<image>")], 2048)
        first = int(np.argmax(full.labels != IGNORE))
        assert np.array_equal(prompt.ids, full.ids[:first])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_images_take_their_layouts_tokens_in_order(name):
    tokenizer = load_tokenizer(name)
    rendered = render(made([("<image>\n<image>\nSame?", "no")]), "vicuna_v1", eos=tokenizer.eos_token)
    encoded = encode(rendered, tokenizer, [4, 7], 2048)
    assert len(encoded.image_slots) == 11
    assert np.array_equal(encoded.image_slots, np.flatnonzero(encoded.ids == IMAGE_ID))
    assert isinstance(encode_many([rendered], tokenizer, [[4]], 2048)[0], RowError)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bos_comes_once_and_only_where_the_tokenizer_adds_it(name):
    tokenizer = load_tokenizer(name)
    ids = encode(render(made([("hi", "ho")]), "vicuna_v1", eos=tokenizer.eos_token), tokenizer, [], 99).ids
    assert (ids == tokenizer.bos_token_id).sum() == (name == "tiny-llama")
    assert (ids[0] == tokenizer.bos_token_id) == (name == "tiny-llama")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_document_is_learned_except_its_first_token_which_nothing_precedes(name):
    tokenizer = load_tokenizer(name)
    document = render(row("d", messages=[{"role": "text", "text": "A lumora is a flower."}]), "plain", eos=tokenizer.eos_token)
    encoded = encode(document, tokenizer, [], 99)
    assert (encoded.labels[1:] == encoded.ids[1:]).all()
    assert encoded.labels[0] == IGNORE
    assert encoded.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", TOKENIZERS)
def test_too_long_is_cut_and_said_but_never_inside_an_image(name):
    tokenizer = load_tokenizer(name)
    rendered = render(made([("<image>\nDescribe.", "word " * 50)]), "vicuna_v1", eos=tokenizer.eos_token)
    whole = encode(rendered, tokenizer, [6], 2048)
    assert not whole.truncated
    cut = encode(rendered, tokenizer, [6], len(whole.ids) - 10)
    assert cut.truncated
    assert np.array_equal(cut.ids, whole.ids[:-10])
    assert np.array_equal(cut.labels, whole.labels[:-10])
    last = int(whole.image_slots[-1])
    assert len(encode(rendered, tokenizer, [6], last + 1).ids) == last + 1
    for limit in (last, last - 3, int(whole.image_slots[0])):
        with pytest.raises(RowError, match="max_tokens"):
            encode(rendered, tokenizer, [6], limit)
    kept = encode_many([Rendered((Piece("lumora " * 9, False), Piece(tokenizer.eos_token, False)))], tokenizer, [[]], 5, keep_end=True)[0]
    assert len(kept.ids) == 5
    assert kept.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", TOKENIZERS)
def test_letters_and_species_are_single_tokens(name):
    from datasets_ray.specimens.species import SPECIES

    tokenizer = load_tokenizer(name)
    ids = [tokenizer(f"A {word}", add_special_tokens=False).input_ids[1:] for word in (*"ABCDE", *SPECIES)]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(ids)
    assert len(tokenizer("A\nB\nC", add_special_tokens=False).input_ids) == 5
    assert len(tokenizer) <= 1536


def test_an_unknown_tokenizer_says_what_there_is():
    with pytest.raises(UserError, match="tiny-llama"):
        load_tokenizer("./no-such-tokenizer")
