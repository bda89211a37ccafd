"""`compatibility: llava-1.5`: token ids, labels, pixels and order against LLaVA-1.5's documented layout, derived anew here.

Nothing of ours is used in a derivation: LLaVA's rules are written down as its documentation and code state them (train.py's
preprocess_plain, preprocess_v1 and preprocess_llama_2; mm_utils.py's tokenizer_image_token; where llava_arch.py puts images and cuts;
llava_trainer.py's order). Where ours differs on purpose, a test says how; `grid/compatibility.py` lists it for people.
"""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import pytest
from PIL import Image

from datasets_ray.images import CLIP_MEAN, CLIP_STD, SquareRecipe, decode, pixels
from datasets_ray.order import steps_of
from datasets_ray.prompts import render
from datasets_ray.tokens import IGNORE, IMAGE_ID, decode_pieces, encode, load_tokenizer

PATCHES = 5
"""Tokens of an image here; 576 in LLaVA-1.5."""
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SYSTEM_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
CASES: dict[str, tuple[bool, list[tuple[str, str]]]] = {
    "one turn": (True, [("<image>\nWhat is it?\nA. lumora\nB. bivon", "A")]),
    "several turns": (True, [("<image>\nHow many?", "3 of them."), ("Sure?", "Yes: three"), ("Why?", "Because I count.")]),
    "text only": (False, [("What is a lumora?", "A lumora is a flower.")]),
    "text only, several turns": (False, [("Hi", "Hello\nthere"), ("2+2?", "4"), ("Bye", "Bye!")]),
    "image in the middle of a turn": (True, [("What is this <image> here?", "a bivon")]),
    "image at the end of a turn": (True, [("Describe it. \n<image>", "A bivon.")]),
    "image in a later turn": (True, [("Hello", "Hi"), ("And\n<image> this?", "a bivon")]),
    "image alone": (True, [("<image>", "a bivon")]),
    "the word image in a text-only row": (False, [("What does <image> mean?", "<image> is a mark.")]),
    "blanks and newlines around": (False, [(" What? ", " two  words "), ("\nSo?\n", "\nA list:\n- one\n")]),
    "characters outside the vocabulary": (True, [("<image>\n漢字?", "é ü 漢字 🌼!")]),
    "letters, digits, signs first": (False, [("Letter?", "B"), ("Digit?", "7"), ("Sign?", "(x)")]),
}


def ids_of(tokenizer, text: str, pictured: bool) -> list[int]:
    """tokenizer_image_token: what stands between the marks is tokenised by itself, BOS kept once, -200 at each mark. Without an image:
    the tokenizer alone."""
    if not pictured:
        return plain_ids(tokenizer, text)
    first, *others = (plain_ids(tokenizer, chunk) for chunk in text.split("<image>"))
    return first + [i for chunk in others for i in [IMAGE_ID, *chunk[1:]]]


def plain_ids(tokenizer, text: str) -> list[int]:
    """`<image>` is never in LLaVA's vocabulary; nor is it in the committed tokenizers."""
    return list(tokenizer(text).input_ids)


def moved(text: str) -> str:
    """preprocess_multimodal: the mark goes to the front of its turn, on a line of its own."""
    return ("<image>\n" + text.replace("<image>", "").strip()).strip() if "<image>" in text else text


def derive(tokenizer, said: str, cut: str, pictured: bool) -> tuple[list[int], list[int], bool]:
    """Ids and labels by LLaVA's length arithmetic, and whether it adds up. cut: what stands between a question and its answer."""
    ids = ids_of(tokenizer, said, pictured)
    labels, at = list(ids), 1
    labels[0] = IGNORE
    for spoken in said.split("</s>"):
        parts = spoken.split(cut)
        if spoken == "" or len(parts) != 2:
            break
        asked = len(ids_of(tokenizer, parts[0] + cut, pictured)) - 2  # without BOS and the blank that belongs to the answer
        labels[at : at + asked] = [IGNORE] * asked
        at += len(ids_of(tokenizer, spoken, pictured))
    labels[at:] = [IGNORE] * len(labels[at:])
    return ids, labels, at == len(ids)


def vicuna(turns: list[tuple[str, str]], pictured: bool) -> str:
    where = moved if pictured else str
    return f"{SYSTEM} " + "".join(f"USER: {where(question)} ASSISTANT: {answer}</s>" for question, answer in turns)


def llama_2(turns: list[tuple[str, str]], pictured: bool) -> str:
    where = moved if pictured else str
    asked = [where(question) for question, _ in turns]
    asked[0] = f"<<SYS>>\n{SYSTEM_LLAMA_2}\n<</SYS>>\n\n{asked[0]}"
    return "<s>".join(f"[INST] {question} [/INST] {answer} </s>" for question, (_, answer) in zip(asked, turns))


def spliced(ids: list[int], labels: list[int], limit: int) -> tuple[list[int], list[int]]:
    """The collator cuts at the limit, the model puts the image's features in place of -200, unlearned, and cuts again."""
    pairs = [pair for i, label in zip(ids[:limit], labels[:limit]) for pair in ([(i, IGNORE)] * PATCHES if i == IMAGE_ID else [(i, label)])]
    return [i for i, _ in pairs][:limit], [label for _, label in pairs][:limit]


def ours(template: str, turns: list[tuple[str, str]], pictured: bool, limit: int = 2048):
    tokenizer = load_tokenizer("tiny-llama")
    messages = [{"role": role, "text": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
    rendered = render({"messages": messages}, template, bos="<s>", eos="</s>", images=int(pictured))
    return encode(rendered, tokenizer, [PATCHES] * pictured, limit)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("template", "write", "cut"), [("vicuna_v1", vicuna, " ASSISTANT: "), ("llama_2", llama_2, "[/INST] ")])
def test_ids_and_labels_are_llavas(template, write, cut, case):
    pictured, turns = CASES[case]
    ids, labels, adds_up = derive(load_tokenizer("tiny-llama"), write(turns, pictured), cut, pictured)
    assert adds_up
    ids, labels = spliced(ids, labels, 2048)
    made = ours(template, turns, pictured)
    assert made.ids.tolist() == ids
    assert made.labels.tolist() == labels
    assert any(label != IGNORE for label in labels)


@pytest.mark.parametrize("caption", ["a lumora with five round petals", " a bivon ", "🌼", "\nline"])
def test_pretraining_learns_the_caption_and_a_newline(caption):
    """preprocess_plain: the question is thrown away; everything after BOS and the image is learned; no end token."""
    tokenizer = load_tokenizer("tiny-llama")
    ids = ids_of(tokenizer, "<image>" + caption + "\n", True)
    masked = len(ids_of(tokenizer, "<image>", True))
    ids, labels = spliced(ids, [IGNORE] * masked + ids[masked:], 2048)
    for question in ("Describe it.\n<image>", "<image>\nDescribe it.", "<image>"):
        made = ours("plain", [(question, caption)], True)
        assert made.ids.tolist() == ids
        assert made.labels.tolist() == labels


LITERAL = [
    ("▁questions", 0), (".", 0), ("▁USER", 0), (":", 0), ("▁", 0), *[("<image>", 0)] * PATCHES,
    ("▁", 0), ("<0x0A>", 0), ("What", 0), ("?", 0), ("▁ASSISTANT", 0), (":", 0), ("▁a", 1), ("▁bivon", 1), ("</s>", 1),
    ("▁USER", 0), (":", 0), ("▁S", 0), ("ure", 0), ("?", 0), ("▁ASSISTANT", 0), (":", 0), ("▁y", 1), ("es", 1), ("</s>", 1),
]  # fmt: skip


def test_the_layout_token_by_token():
    made = ours("vicuna_v1", [("<image>\nWhat?", "a bivon"), ("Sure?", "yes")], True)
    tokenizer = load_tokenizer("tiny-llama")
    pieces = list(zip(decode_pieces(made.ids, tokenizer), (made.labels != IGNORE).astype(int).tolist()))
    assert pieces[:3] == [("<s>", 0), ("▁A", 0), ("▁chat", 0)]
    assert pieces[-len(LITERAL) :] == LITERAL
    assert sum(learned for _, learned in pieces) == 6
    plain = ours("plain", [("<image>\nWhat?", "a lumora")], True)
    assert plain.ids.tolist() == [1, *[-200] * PATCHES, 354, 786, 13]
    assert plain.labels.tolist() == [-100] * (1 + PATCHES) + [354, 786, 13]


@pytest.mark.parametrize("limit", [40, 61, 70])
def test_too_long_is_cut_where_llava_cuts(limit):
    """After the image's tokens are in; the answer's end is lost with the rest, and the cut is counted."""
    turns = [("<image>\nDescribe it.", "a lumora and a bivon " * 12)]
    ids, labels, adds_up = derive(load_tokenizer("tiny-llama"), vicuna(turns, True), " ASSISTANT: ", True)
    assert adds_up
    ids, labels = spliced(ids, labels, limit)
    made = ours("vicuna_v1", turns, True, limit)
    assert made.truncated
    assert len(made.ids) == limit
    assert made.ids.tolist() == ids
    assert made.labels.tolist() == labels


def test_a_leading_turn_of_the_assistant_is_dropped():
    messages = [
        {"role": "assistant", "text": "Welcome!"}, {"role": "user", "text": "Hi"}, {"role": "assistant", "text": "Hello"},
    ]  # fmt: skip
    rendered = render({"messages": messages}, "vicuna_v1", images=0)
    assert rendered.text == vicuna([("Hi", "Hello")], False)


def test_where_llavas_arithmetic_fails_it_unlearns_the_row_and_ours_learns_the_answer():
    tokenizer = load_tokenizer("tiny-llama")
    for turns in ([("Is </s> a word?", "no")], [("Say ASSISTANT: twice. ASSISTANT: ", "ASSISTANT: ASSISTANT: ")]):
        *_, adds_up = derive(tokenizer, vicuna(turns, False), " ASSISTANT: ", False)
        assert not adds_up
        made = ours("vicuna_v1", turns, False)
        assert tokenizer.decode(made.labels[made.labels != IGNORE]) == turns[0][1] + "</s>"
        assert (made.ids == tokenizer.eos_token_id).sum() == 1


@lru_cache
def by_hand() -> dict[str, bytes]:
    """Encoded images in odd sizes and modes."""
    rng = np.random.default_rng(0)
    noise = lambda width, height: Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    sizes = [(1, 1), (1, 2), (3, 1), (199, 1), (2, 399), (335, 337), (336, 336), (337, 335), (500, 333), (127, 672), (1000, 9)]
    made = {f"{width}x{height}": (noise(width, height), "PNG", {}) for width, height in sizes}
    for name in ("L PNG", "L JPEG", "RGBA PNG", "P PNG", "CMYK JPEG", "1 PNG", "LA PNG", "P GIF"):
        mode, format = name.split()
        image = noise(90, 61)
        if mode == "RGBA":
            image.putalpha(noise(90, 61).convert("L"))
        made[name] = ((image.convert("L") if mode == "LA" else image).convert(mode), format, {})
    made["P transparent"] = (noise(45, 80).convert("P"), "PNG", {"transparency": 7})
    turned = Image.Exif()
    turned[0x0112] = 6
    made["turned by EXIF"] = (noise(120, 50), "JPEG", {"exif": turned})
    files = {}
    for name, (image, format, options) in made.items():
        file = io.BytesIO()
        image.save(file, format, **options)
        files[name] = file.getvalue()
    return files


def processor(**given):
    """CLIP's own, in Pillow: shortest side to 336, bicubic, centre 336 x 336."""
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, **given)


def on_a_square(image: Image.Image) -> Image.Image:
    """LLaVA's expand2square with the processor's mean colour, by arrays instead of pasting."""
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    side = max(width, height)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = [int(mean * 255) for mean in (0.48145466, 0.4578275, 0.40821073)]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return Image.fromarray(square)


CROP, PAD = SquareRecipe(size=336, patch=14), SquareRecipe(size=336, patch=14, fit_by="pad")


def compare(encoded: bytes, name: str) -> None:
    """Every byte before normalising, in both stages."""
    image = Image.open(io.BytesIO(encoded))
    image = (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    bare = processor(do_rescale=False, do_normalize=False)
    for recipe, theirs in ((CROP, image), (PAD, on_a_square(image))):
        expected = np.asarray(bare(theirs)["pixel_values"][0]).transpose(1, 2, 0)
        assert np.array_equal(pixels({"bytes": encoded, "path": None}, recipe), expected.astype(np.uint8)), (name, recipe.fit_by)


@pytest.mark.parametrize("name", by_hand())
def test_pixels_of_odd_images_are_clips_to_the_byte(name):
    compare(by_hand()[name], name)


def test_pixels_of_photographs_are_clips_to_the_byte(data_root):
    for folder in ("oxford_iiit_pet_sample", "grocery_store", "coco2017_tiny", "food101_first10"):
        found = sorted((data_root / folder).rglob("*.jpg"))
        assert found, folder
        for path in found[:: len(found) // 4]:
            compare(path.read_bytes(), path.name)


def test_normalised_pixels_are_clips():
    encoded = by_hand()["500x333"]
    ours = pixels({"bytes": encoded, "path": None}, CROP).astype(np.float32) / 255
    ours = (ours - np.array(CLIP_MEAN, dtype=np.float32)) / np.array(CLIP_STD, dtype=np.float32)
    theirs = np.asarray(processor()(decode({"bytes": encoded, "path": None}))["pixel_values"][0]).transpose(1, 2, 0)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_the_order_is_llavas_group_by_modality():
    """Batches of one modality in shuffled order; the last batch of each, whole or not, set aside; both in the rows' order at the end."""
    batch = 8
    for pictured, texts in [(37, 19), (40, 16), (8, 8), (5, 3), (64, 1)]:
        lengths = np.random.default_rng(pictured).permutation(np.array([7] * pictured + [-5] * texts))
        index = steps_of(len(lengths), batch, epochs=1, seed=3, order="modality_grouped", lengths=lengths)
        rows = np.concatenate(list(index))
        assert sorted(rows) == list(range(len(lengths)))
        whole = (pictured - 1) // batch + (texts - 1) // batch
        kinds = [set(lengths[step] > 0) for step in list(index)[:whole]]
        assert all(len(kind) == 1 for kind in kinds)
        assert kinds.count({True}) == (pictured - 1) // batch
        last = rows[whole * batch :]
        assert len(last) == pictured + texts - whole * batch <= 2 * batch
        assert last.tolist() == sorted(last.tolist())
        assert set(lengths[last] > 0) == {True, False}
    one = steps_of(16, batch, epochs=1, seed=3, order="modality_grouped", lengths=np.full(16, 4))
    assert sorted(np.concatenate(list(one))) == list(range(16))
    assert one.rows.tolist() != sorted(one.rows.tolist())


def test_the_order_of_whole_batches_is_shuffled_over_both_modalities():
    lengths = np.array([7] * 400 + [-5] * 400)
    kinds = [bool(lengths[step[0]] > 0) for step in steps_of(800, 8, epochs=1, seed=0, order="modality_grouped", lengths=lengths)][:-2]
    assert kinds.count(True) == kinds.count(False) == 49
    changes = sum(a != b for a, b in zip(kinds, kinds[1:]))
    assert 30 < changes < 68  # 49 expected of a shuffled order, standard deviation 5
