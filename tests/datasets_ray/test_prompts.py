"""Prompts: the layouts are the peers', letter by letter; what is learned is the answer with its end."""

from __future__ import annotations

import pytest

from datasets_ray.errors import UserError
from datasets_ray.prompts import DIRECT, SUFFIX, TEMPLATES, RowError, generation_prompt, question_prompt, render
from datasets_ray.rows import row

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def chat(*turns: str, system: str | None = None, images: int = 0) -> dict:
    messages = [{"role": role, "text": text} for text, role in zip(turns, ("user", "assistant") * len(turns))]
    head = [] if system is None else [{"role": "system", "text": system}]
    return row("x", messages=head + messages, images=[{}] * images)


TWO = chat("<image>\nWhat is it?", "a cat", "Sure?", "yes")
EXPECTED = {
    "plain": "<image>a cat\nyes\n",
    "vicuna_v1": f"{VICUNA} USER: <image>\nWhat is it? ASSISTANT: a cat</s>USER: Sure? ASSISTANT: yes</s>",
    "llama_2": f"[INST] <<SYS>>\n{TEMPLATES['llama_2'].system}\n<</SYS>>\n\n"
    "<image>\nWhat is it? [/INST] a cat </s><s>[INST] Sure? [/INST] yes </s>",
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
    "<|im_start|>assistant\na cat<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n",
    "qwen2_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><image><|vision_end|>What is it?<|im_end|>\n"
    "<|im_start|>assistant\na cat<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n",
    "text": "<image>\nWhat is it?\na cat</s>\nSure?\nyes</s>",
}


def test_every_template_is_checked_here():
    assert set(EXPECTED) == set(TEMPLATES)


@pytest.mark.parametrize("template", EXPECTED)
def test_layout_and_learned_characters(template):
    rendered = render(TWO, template, bos="<s>")
    assert rendered.text == EXPECTED[template]
    end = TEMPLATES[template].end.replace("{eos}", "</s>")
    learned = [rendered.text[start:stop] for start, stop in rendered.spans()]
    answers = [TEMPLATES[template].lead + answer + end for answer in ("a cat", "yes")]
    assert learned == (["".join(answers)] if template == "plain" else answers)  # plain's answers touch each other


def test_an_image_goes_to_the_front_of_its_turn_as_in_llava():
    rendered = render(chat("What is this <image> here?", "a cat"), "vicuna_v1")
    assert "USER: <image>\nWhat is this  here? ASSISTANT:" in rendered.text
    assert "is this <|vision_start|><image><|vision_end|> here?" in render(chat("What is this <image> here?", "a"), "qwen2_vl").text


def test_a_row_without_images_keeps_the_word_image():
    rendered = render(chat("What is <image> ?", "It is <image>."), "vicuna_v1", images=0)
    assert rendered.text.endswith("USER: What is <image> ? ASSISTANT: It is <image>.</s>")
    asked = row("q", question="Is <image> a tag?", options=["yes", "<image>"], answer="A")
    prompt = generation_prompt(asked, "chatml")
    assert "<|im_start|>user\nIs <image> a tag?\nA. yes\nB. <image>\n" in prompt.text
    assert all(piece.literal for piece in prompt.pieces if "<image>" in piece.text)
    pictured = generation_prompt({**asked, "images": [{}, {}]}, "chatml")
    assert [piece.text for piece in pictured.pieces if "<image>" in piece.text] == ["<image>", "<image>"]


def test_words_are_literal_and_control_tokens_are_not():
    rendered = render(chat("<image>\nhi </s>", "ho", system="Be </s> terse."), "vicuna_v1", images=1)
    assert [piece.text for piece in rendered.pieces if piece.literal] == ["Be </s> terse.", "hi </s>", "ho"]
    assert rendered.runs() == [("Be </s> terse. USER: <image>\nhi </s> ASSISTANT:", False), (" ho</s>", True)]


def test_nothing_that_was_said_is_stripped_but_around_a_moved_image():
    assert render(chat(" hi ", " ho\n"), "vicuna_v1").text.endswith("USER:  hi  ASSISTANT:  ho\n</s>")
    assert render(chat("<image>", " ho "), "plain", images=1).text == "<image> ho \n"
    assert "USER: <image>\nhi ASSISTANT:  ho </s>" in render(chat(" hi <image> ", " ho "), "vicuna_v1", images=1).text
    assert "user\n hi <|vision_start|><image><|vision_end|> <|im_end|>" in render(chat(" hi <image> ", "a"), "qwen2_vl", images=1).text


def test_a_rows_own_system_text_wins():
    assert render(chat("hi", "ho", system="Be terse."), "vicuna_v1").text.startswith("Be terse. USER: hi")


def test_a_document_is_learned_from_end_to_end():
    rendered = render(row("d", messages=[{"role": "text", "text": " Cats purr. "}]), "chatml", eos="<|endoftext|>")
    assert rendered.text == "Cats purr.<|endoftext|>"
    assert all(piece.learned for piece in rendered.pieces)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "user", "text": "a"}, {"role": "user", "text": "b"}],
        [{"role": "user", "text": "a"}, {"role": "assistant", "text": " <image> "}],
        [{"role": "user", "text": "a"}, {"role": "assistant", "text": ""}],
        [
            {"role": "user", "text": "a"},
            {"role": "assistant", "text": "b"},
            {"role": "user", "text": "c"},
            {"role": "assistant", "text": " \n"},
        ],
        [{"role": "assistant", "text": "a"}],
    ],
)
def test_rows_that_make_no_conversation(messages):
    with pytest.raises(RowError):
        render({"messages": messages}, "vicuna_v1")


def test_question_prompt_lines():
    question = row("q", images=[{}], hint="Look.", question="What is it?", options=["cat", "dog"], answer="A")
    assert question_prompt(question) == f"<image>\nLook.\nWhat is it?\nA. cat\nB. dog\n{SUFFIX}"
    assert question_prompt(row("q", question="Why?"), suffix="") == "Why?"
    placed = row("q", images=[{}, {}], question="Is <image> like <image>?", options=[])
    assert question_prompt(placed, "") == "Is <image> like <image>?"


@pytest.mark.parametrize("template", [name for name in TEMPLATES if not TEMPLATES[name].captions_only])
def test_a_generation_prompt_is_the_training_string_up_to_the_answer(template):
    question = row("q", images=[{}], question="What is it?", options=["cat", "dog"], answer="A")
    prompt = generation_prompt(question, template)
    trained = render(chat(question_prompt(question), "A"), template)
    assert trained.text == prompt.text + "".join(text for text, _ in trained.runs()[1:])
    assert prompt.spans() == []


def test_plain_asks_no_questions_and_unknown_templates_are_named():
    with pytest.raises(UserError, match="plain"):
        generation_prompt(row("q", question="?"), "plain")
    with pytest.raises(UserError, match="vicuna_v1"):
        render(TWO, "vicuna_v2")


def test_the_last_line_of_a_question_fits_its_answer() -> None:
    asked = {"question": "What is it?", "hint": "", "options": ["cat", "dog"], "images": [None], "meta": "{}"}
    assert question_prompt(asked, "Say it.") == "<image>\nWhat is it?\nA. cat\nB. dog\nSay it."
    assert question_prompt(asked, "Say it.", listed=False) == "<image>\nWhat is it?\nSay it.", "scored, not shown"
    without = {**asked, "options": []}
    assert question_prompt(without) == f"<image>\nWhat is it?\n{DIRECT}"
    assert question_prompt({**without, "meta": '{"open": "yes_no"}'}) == question_prompt(without, "") == "<image>\nWhat is it?"
