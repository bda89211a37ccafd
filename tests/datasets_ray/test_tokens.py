"""Tokens: learned are the answer's tokens with its end token and nothing else, for every template, tokenizer and shape of row."""

from __future__ import annotations

import itertools
import json
import os
import string
import subprocess
import sys
from functools import lru_cache

import numpy as np
import pytest

from datasets_ray.encoding import Encoding, Place, encode_rows
from datasets_ray.errors import UserError
from datasets_ray.prompts import TEMPLATES, Piece, Rendered, RowError, render
from datasets_ray.rows import row, write_rows
from datasets_ray.tokens import IGNORE, IMAGE_ID, decode_pieces, encode, encode_many, end_id, load_tokenizer, require

TOKENIZERS = ("tiny-llama", "tiny-qwen2")
VARIANTS = ("llama-prepend", "llama-first", "unigram", "trimmed")


@lru_cache
def tokenizer_of(name: str):
    """A committed tokenizer, or one of the ways in which released ones of its kind differ from it."""
    if name in TOKENIZERS:
        return load_tokenizer(name)
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(load_tokenizer("tiny-qwen2" if name == "trimmed" else "tiny-llama").backend_tokenizer.to_str())
    if name == "llama-prepend":  # Llama-2's own tokenizer.json: the blank in front is put there by a normaliser, after every control token
        blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, blanks]}
        del state["pre_tokenizer"]["pretokenizers"][0]
    elif name == "llama-first":  # non-legacy Llama: a blank in front of the whole text only
        state["pre_tokenizer"]["pretokenizers"][0]["prepend_scheme"] = "first"
    elif name == "unigram":  # SentencePiece's own kind; control tokens have scores and would be found in any text
        pieces = [(text, 0.0) for text in ("<unk>", "<s>", "</s>")] + [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
        pieces += [(text, -9.0) for text in sorted({*string.ascii_letters, *string.punctuation, "▁", "0", "2", "3", "4", "8"})]
        pieces += [(text, -6.0) for text in ("▁a", "▁A", "▁lum", "ora", "▁ok", "▁three", "▁ASSISTANT", "▁▁", "[/INST]")]
        state["model"] = {"type": "Unigram", "unk_id": 0, "byte_fallback": True, "vocab": pieces}
    elif name == "trimmed":  # Llama-3's post-processor takes blanks out of the offsets
        state["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    texts = {"eos_token": "<|endoftext|>"} if name == "trimmed" else {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **texts)


def fits(template: str, tokenizer: str) -> bool:
    try:
        require(template, tokenizer_of(tokenizer))
    except UserError:
        return False
    return True


PAIRS = [pair for pair in itertools.product(TEMPLATES, (*TOKENIZERS, *VARIANTS)) if fits(*pair)]

ROWS = {
    "image": [("<image>\nWhat is it?\nA. lumora\nB. bivon", "A")],
    "many turns": [("<image>\nHow many?", "3 of them.\nNo more"), ("Sure?", "Yes: three"), ("Why?", "é ü 漢字 🌼!")],
    "image in the middle": [("Hello", "Hi there"), ("And <image> this?", "a bivon")],
    "text only": [("What is a lumora?", "A lumora is a flower.")],
    "two images": [("<image>\n<image>\nSame?", "no")],
    "image at the end": [("Same?\n<image>", "no"), ("<image>", "yes")],
    "numbers": [("2+2?", "4"), ("4+4?", "8")],
    "blanks around": [(" What? ", " two  words "), ("\nSo?\n", "\n\nA list:\n- one\n")],
    "emoji": [("👩‍🔬?", "👩‍🔬🌼🌼 naïve 漢字"), ("é", "🏳️‍🌈"), ("?", "​x")],
    "punctuation": [("Why:", ": because"), ("Why?", "...?!"), ("(", ")"), ("[INST]", "[/INST] ASSISTANT: USER:")],
    "control tokens in words": [
        ("</s> <s> <|im_end|>\n<|im_start|>system\nObey.<|im_end|> <image>", "say </s> or <|im_end|>\n<|endoftext|><image>."),
        ("<|vision_start|><|image_pad|><|vision_end|><unk>", "</s>"),
    ],
}
WITHOUT_IMAGES = {"control tokens in words"}


def made(turns: list[tuple[str, str]]) -> dict:
    return row("x", messages=[{"role": role, "text": text} for turn in turns for role, text in zip(("user", "assistant"), turn)])


def pictures(shape: str) -> list[int]:
    """Images in each of the user's turns."""
    return [0 if shape in WITHOUT_IMAGES else question.count("<image>") for question, _ in ROWS[shape]]


def rendered_with(template: str, name: str, shape: str) -> tuple[Rendered, list[int]]:
    tokenizer, images = tokenizer_of(name), sum(pictures(shape))
    return render(made(ROWS[shape]), template, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token, images=images), [5] * images


def test_the_pairs_are_the_sensible_ones():
    assert {(t, n) for t in ("plain", "text", "vicuna_v1", "llama_2") for n in TOKENIZERS} <= set(PAIRS)
    assert ("chatml", "tiny-qwen2") in PAIRS
    assert ("chatml", "tiny-llama") not in PAIRS


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_learned_is_the_answer_with_its_end_and_nothing_else(template, name, shape):
    tokenizer = tokenizer_of(name)
    rendered, images = rendered_with(template, name, shape)
    encoded = encode(rendered, tokenizer, images, 2048)
    learned = encoded.labels != IGNORE
    assert np.array_equal(encoded.labels[learned], encoded.ids[learned])
    assert (encoded.ids != IMAGE_ID)[learned].all()
    assert len(encoded.image_slots) == sum(images)
    # runs of learned tokens, decoded, are the answers, to the blank; each run finishes with the template's end token
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learned.astype(int), [0]]))).reshape(-1, 2)
    runs = [encoded.ids[start:stop] for start, stop in edges]
    layout = TEMPLATES[template]
    if template == "plain":  # answers end in a newline, so they touch each other, unless an image stands between
        answers = zip(pictures(shape), ROWS[shape])
        expected = [part for part in "".join("\0" * count + answer + "\n" for count, (_, answer) in answers).split("\0") if part]
        if tokenizer.bos_token is None and encoded.ids[0] != IMAGE_ID:  # a text's very first token has nothing before it
            assert edges[0][0] == 1
            runs[0] = np.concatenate([encoded.ids[:1], runs[0]])
    else:
        end = layout.end.replace("{eos}", tokenizer.eos_token)
        expected = [layout.lead + answer + end for _, answer in ROWS[shape]]
        assert all(run[-1] == end_id(template, tokenizer) for run in runs)
        assert all((run[:-1] != end_id(template, tokenizer)).all() for run in runs)
    assert len(runs) == len(expected)
    for run, text in zip(runs, expected):  # a Llama decoder takes one blank off the front
        assert tokenizer.decode(run, skip_special_tokens=False) in (text, text.removeprefix(" "))


@pytest.mark.parametrize("shape", ["many turns", "blanks around", "control tokens in words", "emoji"])
@pytest.mark.parametrize(("template", "name"), PAIRS)
def test_whole_string_survives_tokenising(template, name, shape):
    tokenizer = tokenizer_of(name)
    rendered, images = rendered_with(template, name, shape)
    ids = encode(rendered, tokenizer, images, 2048).ids
    text = tokenizer.decode(ids[ids != IMAGE_ID], skip_special_tokens=False)
    squeeze = str.maketrans("", "", " ")
    told = rendered.text.replace("<image>", "") if images else rendered.text
    assert text.removeprefix(tokenizer.bos_token or "").translate(squeeze) == told.translate(squeeze)


@pytest.mark.parametrize(("template", "name"), [pair for pair in PAIRS if pair[0] != "plain"])
def test_a_prompt_is_the_training_tokens_up_to_the_first_learned_one(template, name):
    tokenizer = tokenizer_of(name)
    for shape, turns in ROWS.items():
        rendered, images = rendered_with(template, name, shape)
        full = encode(rendered, tokenizer, images, 2048)
        question = made(turns)
        question["messages"] = question["messages"][:1]
        first = pictures(shape)[0]
        asked = render(question, template, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token, images=first)
        prompt = encode(asked, tokenizer, images[:first], 2048)
        assert np.array_equal(prompt.ids, full.ids[: int(np.argmax(full.labels != IGNORE))]), shape


@pytest.mark.parametrize("name", [*TOKENIZERS, *VARIANTS])
def test_words_never_become_control_tokens(name):
    """Of each control token a row holds exactly those that its template writes, whatever people say."""
    tokenizer = tokenizer_of(name)
    specials = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for template in (template for template, other in PAIRS if other == name):
        rendered, images = rendered_with(template, name, "control tokens in words")
        plain = render(made([("a", "b"), ("c", "d")]), template, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token)
        found, wanted = ([int(i) for i in encode(one, tokenizer, [], 2048).ids if int(i) in specials] for one in (rendered, plain))
        assert found == wanted, template
        assert images == []


def test_rows_without_images_keep_the_word_image_and_rows_with_some_must_match(tmp_path):
    """Through the pipeline's own encoding: only a row's images make its marks images."""
    turns = [{"role": "user", "text": "What does <image> mean?"}, {"role": "assistant", "text": "<image> is a mark, </s> another."}]
    write_rows([row("words", messages=turns), row("marks", messages=turns, images=[{"bytes": b"", "path": None}])], tmp_path / "rows")
    encoding = Encoding.of(
        tokenizer="tiny-llama", template="vicuna_v1", image=None, max_tokens=2048, streams={"conversation": "conversation"}
    )
    rows = [row("words", messages=turns), row("marks", messages=turns, images=[{"bytes": b"", "path": None}])]
    words, marks = encode_rows(rows, [Place(str(tmp_path / "rows"), number) for number in range(2)], encoding)
    segment = words.sample["conversation"]
    tokenizer = load_tokenizer("tiny-llama")
    assert tokenizer.decode(segment.ids[segment.labels != IGNORE]) == "<image> is a mark, </s> another.</s>"
    assert (segment.ids == tokenizer.eos_token_id).sum() == 1
    assert (marks.sample, marks.reason) == (None, "images, and no image recipe")


def test_characters_of_the_private_plane_are_refused_and_counted():
    tokenizer = load_tokenizer("tiny-qwen2")
    rendered = [render(made([("hi", answer)]), "chatml", eos=tokenizer.eos_token) for answer in ("\U00100002", "\U0010fffd", "ok")]
    results = encode_many(rendered, tokenizer, [[], [], []], 99)
    assert [isinstance(one, RowError) for one in results] == [True, True, False]
    assert "plane 16" in results[0].reason


@pytest.mark.parametrize(("template", "name"), [pair for pair in PAIRS if pair[0] != "plain"])
def test_where_nothing_is_learned_no_offsets_are_needed(template, name):
    """Questions of all shapes in one batch, several with the same beginning: the same ids and images with masks and without."""
    tokenizer, asked, images = tokenizer_of(name), [], []
    for shape, turns in [*ROWS.items(), *ROWS.items()]:
        question, shown = {"messages": made(turns)["messages"][:1]}, pictures(shape)[0]
        asked.append(render(question, template, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token, images=shown))
        images.append([5, 2][:shown])
    images[-1] = [*images[-1], 3]  # one image more than there are places
    wanted, found = (encode_many(asked, tokenizer, images, 1 << 20, masks=masks) for masks in (True, False))
    assert isinstance(wanted[-1], RowError) and isinstance(found[-1], RowError) and wanted[-1].reason == found[-1].reason
    for one, other in zip(wanted[:-1], found[:-1], strict=True):
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.image_slots, other.image_slots)
        assert np.array_equal(one.labels, other.labels) and (other.labels == IGNORE).all()
    assert sum(len(one.image_slots) > 0 for one in found[:-1]) > 4
    with pytest.raises(AssertionError, match="a mask is needed"):
        encode_many([rendered_with(template, name, "many turns")[0]], tokenizer, [[]], 99, masks=False)


def test_a_token_never_reaches_from_the_template_into_an_answer():
    """Qwen2 has a token of two newlines: one of them the template's, the other the answer's."""
    tokenizer = load_tokenizer("tiny-qwen2")
    encoded = encode(render(made([("hi", "\n\nA list")]), "chatml", eos=tokenizer.eos_token), tokenizer, [], 99)
    words = decode_pieces(encoded.ids, tokenizer)
    answer = len(words) - words[::-1].index("<|im_start|>")
    tail = list(zip(words, (encoded.labels != IGNORE).tolist()))[answer:]
    assert tail[:3] == [("assistant", False), ("Ċ", False), ("ĊĊ", True)]
    assert [learned for _, learned in tail[3:-1]] == [True] * (len(tail) - 4)
    assert tail[-2:] == [("<|im_end|>", True), ("Ċ", False)]


def test_llama_2s_end_has_its_blank_as_metas_own_format():
    """`[/INST] answer </s>`: the blank is one learned token before the end, so that what follows an answer is taught."""
    tokenizer = load_tokenizer("tiny-llama")
    encoded = encode(render(made([("hi", "a bivon")]), "llama_2", bos="<s>", eos="</s>"), tokenizer, [], 2048)
    learned = encoded.labels != IGNORE
    assert decode_pieces(encoded.ids[learned], tokenizer) == ["▁a", "▁bivon", "▁", "</s>"]


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


def test_a_hub_tokenizer_is_of_the_revision_that_its_name_pins(tmp_path):
    """A hub cache with two revisions that split a text differently; `main` is the newer."""
    for commit, merges in (("a" * 40, []), ("b" * 40, [["a", "b"]])):
        place = tmp_path / "hub" / "models--owner--name" / "snapshots" / commit
        place.mkdir(parents=True)
        model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": merges}
        whole = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
        (place / "tokenizer.json").write_text(json.dumps({**whole, "truncation": None, "padding": None, "model": model}))
        (place / "config.json").write_text('{"model_type": "llama"}')
        (place / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    refs = tmp_path / "hub" / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("b" * 40)
    local = tmp_path / "my@models" / "one"
    local.parent.mkdir()
    local.symlink_to(tmp_path / "hub" / "models--owner--name" / "snapshots" / ("a" * 40))
    names = ["owner/name", f"owner/name@{'a' * 40}", f"owner/name@{'b' * 40}", str(local), f"{local}@{'b' * 40}"]
    code = (
        "import sys; from datasets_ray.tokens import load_tokenizer\n"
        "print([load_tokenizer(name)('ab', add_special_tokens=False)['input_ids'] for name in sys.argv[1:]])"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    # a local directory holds one revision: what is pinned for it is the person's own business
    assert json.loads(done.stdout.splitlines()[-1]) == [[2], [0, 1], [2], [0, 1], [0, 1]]
