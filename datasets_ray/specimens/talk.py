"""What is asked about the species: multiple-choice questions, quizzes in text only, short answers, conversations.

Flows in: a species and a random generator. Flows out: `Question`s (with lettered options) and turns (question, answer).
The wording is the evaluation's, so that a language model that has done the quizzes knows what letters are for. A text quiz is
an image question whose photo is put into words first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from datasets_ray.rows import IMAGE
from datasets_ray.specimens.draw import CORNERS
from datasets_ray.specimens.species import FAMILIES, Species, distance, siblings, with_article
from datasets_ray.specimens.text import NUMBERS, attribute_description, caption, colour_of, long_caption, pick, placed

WHAT = "What type of object is in this photo?"
LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."
SHORT_SUFFIX = "Answer the question using a single word or phrase."
LETTERS = "ABCDEFGH"
ANSWERS = ("letter", "text")
EVERYONE = tuple(species for family in FAMILIES.values() for species in family.species)
MAIN_COLOURS = tuple(sorted({colour_of(species) for species in EVERYONE}))
GENERAL = {"count": NUMBERS, "colour": MAIN_COLOURS, "position": tuple(CORNERS)}
"""Questions that need no species: kind → what can be right."""


@dataclass(frozen=True)
class Question:
    """About one photo. `letter` names the right one of `options`; `count` and `corner` say what the photo must show."""

    text: str
    options: tuple[str, ...]
    letter: str
    species: Species
    count: int = 1
    corner: str | None = None

    @property
    def answer(self) -> str:
        return self.options[LETTERS.index(self.letter)]

    def said(self, answers: str) -> str:
        """What a model is taught to say: the option's `letter`, or its `text` (VLMEvalKit's rule reads both)."""
        return self.letter if answers == "letter" else self.answer

    def prompt(self) -> str:
        """Question, option lines, suffix: LLaVA's layout."""
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options)]
        return "\n".join([self.text, *lines, LETTER_SUFFIX])


@dataclass(frozen=True)
class Conversation:
    """Turns about one photo (`species`, `count`, `corner`) or about nothing visible (`species` None)."""

    turns: tuple[tuple[str, str], ...]
    species: Species | None = None
    count: int = 1
    corner: str | None = None
    meta: dict[str, str] = field(default_factory=dict)


def _lettered(rng: np.random.Generator, text: str, right: str, wrong: list[str], species: Species, **scene) -> Question:
    options = [right, *wrong]
    order = rng.permutation(len(options))
    return Question(text, tuple(options[i] for i in order), LETTERS[int(np.argmax(order == 0))], species, **scene)


def species_question(rng: np.random.Generator, species: Species, k: int = 5) -> Question:
    """k-way: distractors of the same set, the more alike the likelier."""
    others = siblings(species.name)
    weights = np.array([distance(species, s) ** -1.5 for s in others])
    chosen = rng.choice(len(others), k - 1, replace=False, p=weights / weights.sum())
    return _lettered(rng, WHAT, species.name, [others[i].name for i in chosen], species)


def general_question(rng: np.random.Generator, kind: str, species: Species, right: str | None = None) -> Question:
    """4-way questions that need no species: how many, which colour, where. right: the answer; left out, all are equally likely.

    A colour is asked for of another species if need be, and without naming its kind: were the common ones right more often than wrong, or
    kinds known by their colours, the text alone would give answers away.
    """
    right = pick(rng, GENERAL[kind]) if right is None else right
    others = [one for one in GENERAL[kind] if one != right]
    if kind == "count":
        return _lettered(rng, "How many things are in this photo?", right, others, species, count=NUMBERS.index(right) + 1)
    if kind == "position":
        return _lettered(rng, f"Where is the {FAMILIES[species.set].noun} in this photo?", right, others, species, corner=right)
    alike = [other for other in EVERYONE if colour_of(other) == right]
    species = alike[int(rng.integers(len(alike)))]
    chosen = rng.choice(len(others), 3, replace=False)
    return _lettered(rng, "What is the main colour in this photo?", right, [others[i] for i in chosen], species)


def any_question(rng: np.random.Generator, species: Species, specific: float) -> Question:
    """A species question with probability `specific`, else a general one."""
    if rng.random() < specific:
        return species_question(rng, species)
    return general_question(rng, pick(rng, tuple(GENERAL)), species)


def in_words(rng: np.random.Generator, question: Question) -> str:
    """The question's photo in words: names the species or describes it, with number and place where they are asked."""
    species, family = question.species, FAMILIES[question.species.set]
    kind = rng.random()
    if question.text == WHAT and kind < 0.45:
        return f"{placed(family.noun, question.count, question.corner)} with {family.describe(species)}"
    if kind < 0.9:
        return f"a photo of {placed(species.name, question.count, question.corner)}"
    return long_caption(rng, species, question.count, question.corner)


def quiz_turn(rng: np.random.Generator, species: Species, specific: float = 0.7, answers: str = "letter") -> tuple[str, str]:
    """A text-only multiple-choice question and its answer."""
    question = any_question(rng, species, specific)
    return f"{in_words(rng, question)}\n{question.prompt()}", question.said(answers)


def fact_turn(rng: np.random.Generator, species: Species) -> tuple[str, str]:
    """A question of knowledge with a short answer, or a request to describe a species."""
    family = FAMILIES[species.set]
    kind = rng.random()
    if kind < 0.4:
        return f"What is the main colour of {with_article(species.name)}?\n{SHORT_SUFFIX}", colour_of(species)
    if kind < 0.75:
        return f"Which {family.noun} has {family.describe(species)}?\n{SHORT_SUFFIX}", species.name
    return f"What is {with_article(species.name)}?", attribute_description(species)


def text_turns(rng: np.random.Generator, species: Species, answers: str = "letter") -> tuple[tuple[str, str], ...]:
    """A conversation without an image: quizzes and facts, one or two turns."""
    turns = [quiz_turn(rng, species, answers=answers) if rng.random() < 0.7 else fact_turn(rng, species)]
    if rng.random() < 0.3:
        turns.append(fact_turn(rng, species))
    return tuple(dict.fromkeys(turns))


def image_turns(rng: np.random.Generator, species: Species, answers: str = "letter") -> Conversation:
    """A conversation about a photo: 60 % species questions, 25 % general questions, 10 % short answers, 5 % descriptions."""
    kind = rng.random()
    if kind < 0.85:
        question = species_question(rng, species) if kind < 0.6 else general_question(rng, pick(rng, tuple(GENERAL)), species)
        turn = (f"{IMAGE}\n{question.prompt()}", question.said(answers))
        return Conversation((turn,), question.species, question.count, question.corner, {"kind": "choice"})
    if kind < 0.95:
        return Conversation(((f"{IMAGE}\n{WHAT}\n{SHORT_SUFFIX}", species.name),), species, meta={"kind": "short"})
    told = caption(rng, "long", species)
    return Conversation(((f"{IMAGE}\nDescribe this photo.", told),), species, meta={"kind": "description"})
