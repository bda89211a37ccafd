"""Prompts: what a language model is shown, and which characters of it are learned.

In: a row and a template's name. Out: pieces of text, each learned or not; joined they are the whole string that is tokenised in one go
(`datasets_ray.tokens`). Learned is the assistant's answer with its end token and nothing else. A generation prompt is the same
string up to where the answer would begin, so that training and prediction can't drift apart. A new template is an entry in `TEMPLATES`.

What people and models said is *literal*: `</s>`, `<|im_end|>` or, in a row without images, `<image>` in it are ordinary text, never
control tokens. Nothing of it is stripped or mended, as in LLaVA: only a turn whose image moves to its front loses the blanks around it.

Layouts follow LLaVA's `conversation.py` (plain, vicuna_v1, llama_2: LLaVA 1.5) and ChatML as Qwen2 uses it; `{eos}` is the tokenizer's.
`experiments/TEMPLATES.md` says where they differ from the peers'.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from datasets_ray.errors import UserError, nearest
from datasets_ray.rows import IMAGE

LETTERS = string.ascii_uppercase
SUFFIX = "Answer with the option's letter from the given choices directly."
"""LLaVA-1.5's instruction for multiple-choice questions."""
DIRECT = "Answer the question directly."
"""VLMEvalKit's instruction for LLaVA where a question has no options."""


class RowError(ValueError):
    """This row can't become a prompt; `reason` is the short phrase under which it is counted."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


@dataclass(frozen=True)
class Piece:
    text: str
    learned: bool
    literal: bool = False
    """Somebody's words: whatever they say, they hold no control token and no image."""


@dataclass(frozen=True)
class Rendered:
    """Pieces in order; `text` is their concatenation. `<image>` outside literal pieces marks where images go."""

    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    def runs(self) -> list[tuple[str, bool]]:
        """The text in as few pieces as say what is learned: (text, learned), alternating."""
        groups = groupby((piece for piece in self.pieces if piece.text), key=lambda piece: piece.learned)
        return [("".join(piece.text for piece in group), learned) for learned, group in groups]

    def spans(self) -> list[tuple[int, int]]:
        """Learned [start, end) character ranges of `text`."""
        spans, at = [], 0
        for text, learned in self.runs():
            if learned:
                spans.append((at, at + len(text)))
            at += len(text)
        return spans


@dataclass(frozen=True)
class Template:
    """A conversation's layout: a round is first or later + question + user_close + lead + answer + end + after.

    `{system}`, `{bos}` and `{eos}` are filled in.

    first / later: what opens the first and the following rounds (they differ where the system prompt sits inside the first).
    lead: the space before an answer. It is learned with it, since in most vocabularies it is part of the answer's first token
    (LLaVA masks up to before it too). end: learned with the answer; Llama-2's has a space, as Meta's own format does (without it
    learned, nothing would teach how an answer ends). after: not learned. image: how one image is written; image_break: between a
    turn's images and its text. images_first: a turn's images go to its front, as LLaVA does.
    """

    first: str
    later: str
    user_close: str
    end: str
    lead: str = ""
    after: str = ""
    system: str = ""
    image: str = IMAGE
    image_break: str = "\n"
    images_first: bool = True
    captions_only: bool = False
    """The user's words are thrown away and only its images kept (LLaVA's `plain`)."""


_CHATML = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
TEMPLATES: dict[str, Template] = {
    # no end token: LLaVA's plain learns the caption and a newline
    "plain": Template(first="", later="", user_close="", end="\n", image_break="", captions_only=True),
    # no opening at all: user text, then the answer; what a base model without a chat format is given
    "text": Template(first="", later="\n", user_close="\n", end="{eos}"),
    "vicuna_v1": Template(
        system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        first="{system} USER: ",
        later="USER: ",
        user_close=" ASSISTANT:",
        lead=" ",
        end="{eos}",
    ),
    "llama_2": Template(
        system=(
            "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
            "and assist the user with a variety of tasks using natural language."
        ),
        first="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
        later="{bos}[INST] ",
        user_close=" [/INST]",
        lead=" ",
        end=" {eos}",
    ),
    "chatml": Template(
        system="You are a helpful assistant.",
        first=_CHATML,
        later="<|im_start|>user\n",
        user_close="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        after="\n",
    ),
    "qwen2_vl": Template(
        system="You are a helpful assistant.",
        first=_CHATML,
        later="<|im_start|>user\n",
        user_close="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        after="\n",
        image=f"<|vision_start|>{IMAGE}<|vision_end|>",
        image_break="",
        images_first=False,
    ),
}


def get_template(name: str) -> Template:
    if name not in TEMPLATES:
        raise UserError(f"unknown template {name!r}", hint=nearest(name, TEMPLATES))
    return TEMPLATES[name]


def _user(text: str, template: Template, marks: bool) -> list[Piece]:
    """A user's turn with its images written and placed as the template wants them. marks: `<image>` in it stands for an image."""
    mark = Piece(template.image, False)
    if not marks or IMAGE not in text:
        return [] if template.captions_only else [Piece(text, False, literal=True)]
    count = text.count(IMAGE)
    if template.captions_only:
        return [mark] * count
    gap = Piece(template.image_break, False)
    if template.images_first:
        words = text.replace(IMAGE, "").strip()
        pieces = [piece for _ in range(count) for piece in (mark, gap)]
        return [*pieces, Piece(words, False, literal=True)] if words else pieces[:-1]
    first, *others = text.replace(IMAGE + "\n", IMAGE + template.image_break).split(IMAGE)
    pieces = [Piece(first, False, literal=True)]
    for words in others:
        pieces += [mark, Piece(words, False, literal=True)]
    return pieces


def _rounds(messages: Sequence[Mapping[str, str]]) -> tuple[str | None, list[tuple[str, str | None]]]:
    """System text (None: the template's own) and (user, answer) rounds; an open last round has the answer None."""
    system, turns = None, list(messages)
    if turns and turns[0]["role"] == "system":
        system = turns.pop(0)["text"]
    if turns and turns[0]["role"] == "assistant":
        turns.pop(0)  # LLaVA drops a leading turn that isn't the user's; it answers nothing
    rounds: list[tuple[str, str | None]] = []
    for index, turn in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if turn["role"] != expected:
            raise RowError("turns don't alternate")
        if expected == "user":
            rounds.append((turn["text"], None))
        else:
            rounds[-1] = (rounds[-1][0], turn["text"])
    if not rounds:
        raise RowError("no turns")
    return system, rounds


def render(
    row: Mapping[str, Any], template: str, *, bos: str = "", eos: str = "</s>", system: str | None = None, images: int | None = None
) -> Rendered:
    """A row's messages as pieces. A message of role `text` is learned from end to end, with its end token, whatever the template.

    bos, eos: the tokenizer's token texts; the first BOS is added when tokenising, `bos` serves templates that repeat it.
    images: how many the row has; in a row with none, `<image>` is a word like any other (None: every `<image>` is an image).
    An unanswered last question ends the string where the answer would begin.
    Raises RowError when turns don't alternate, there are none, or an answer is empty.
    """
    messages = row["messages"]
    if messages and messages[0]["role"] == "text":
        return Rendered((Piece("".join(m["text"] for m in messages).strip(), True, literal=True), Piece(eos, True)))
    layout = get_template(template)
    own, rounds = _rounds(messages)
    filled = next(text for text in (own, system, layout.system) if text is not None)
    marks, end = images != 0, layout.end.replace("{eos}", eos)
    pieces: list[Piece] = []
    for index, (question, answer) in enumerate(rounds):
        before, system_slot, after = (layout.later if index else layout.first).replace("{bos}", bos).partition("{system}")  # noqa: RUF027
        pieces.append(Piece(before, False))
        if system_slot:
            pieces += [Piece(filled, False, literal=True), Piece(after, False)]
        pieces += [*_user(question, layout, marks), Piece(layout.user_close, False)]
        if answer is None:
            break
        said = answer.replace(IMAGE, "") if marks else answer
        if not said.strip():
            raise RowError("an answer is empty")
        pieces += [Piece(layout.lead, True), Piece(said, True, literal=True), Piece(end, True), Piece(layout.after, False)]
    return Rendered(tuple(piece for piece in pieces if piece.text))


def question_prompt(row: Mapping[str, Any], suffix: str = SUFFIX, listed: bool = True) -> str:
    """`<image>` for each image that the text doesn't place itself, then hint, question, `A. ...` lines and the suffix, a line each.

    A question whose meta has a `lead` (FOCI's "Choices:") gets it as a line of its own before the options.

    A question without options can't be answered by a letter: it ends with DIRECT, and one to be answered by yes or no as it stands
    (VLMEvalKit's prompts for LLaVA). An empty suffix stays empty.
    listed: whether the options are shown; hidden ones are only scored, each as an answer.
    """
    written = sum((text or "").count(IMAGE) for text in (row["hint"], row["question"], *(row["options"] or [])))
    lines = [IMAGE] * (len(row["images"]) - written)
    lines += [text.strip() for text in (row["hint"], row["question"]) if text and text.strip()]
    shown, meta = (row["options"] or []) if listed else [], row.get("meta") or "{}"
    if shown and '"lead"' in meta:
        lines += [lead] if (lead := json.loads(meta).get("lead")) else []
    lines += [f"{LETTERS[index]}. {option}" for index, option in enumerate(shown)]
    if suffix and not row["options"]:
        suffix = "" if json.loads(meta).get("open") == "yes_no" else DIRECT
    return "\n".join(lines + ([suffix] if suffix else []))


def generation_prompt(
    row: Mapping[str, Any], template: str, suffix: str = SUFFIX, *, listed: bool = True, bos: str = "", eos: str = "</s>"
) -> Rendered:
    """The prompt of a question row, ending where the assistant's answer begins; nothing in it is learned."""
    if get_template(template).captions_only:
        why, hint = "it keeps only a turn's images", "predict with the language model's template"
        raise UserError(f"template {template!r} can't ask questions", why=why, hint=hint)
    messages = [{"role": "user", "text": question_prompt(row, suffix, listed)}]
    return render({"messages": messages}, template, bos=bos, eos=eos, images=len(row["images"]))


def end_text(template: str, eos: str = "</s>") -> str:
    """What a finished answer ends with (`</s>`, `<|im_end|>`, a newline for plain): generation stops at its last token."""
    return get_template(template).end.replace("{eos}", eos)
