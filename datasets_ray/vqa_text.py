"""VQA accuracy: an answer and its annotators' answers in, a share of agreement out, after the field's usual normalisation.

Source: VQA (Antol et al. 2015) and its public evaluation server: lower case; punctuation out or, between characters, replaced by a blank;
commas between digits and full stops before no digit out; number words to ten as digits; articles out; contractions with their apostrophes.

Ten annotators: each is left out once, the answer agrees with the other nine to min(1, matches / 3), and the mean of the ten counts.
Any other number of answers: 1 when the answer equals one of them, else 0 (the single-answer form).

Deviations: both sides are normalised wholly and always (the server leaves digits and articles of the annotators' side alone, normalises
nothing where all annotators agree, and drops every mark of an answer that has a comma between digits); a contraction is known by its
spelling with any of its apostrophes left out, made from a list of words instead of the server's table of misspellings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations

ANNOTATORS = 10
_FULL_STOP = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he'd've he's how'd how'll how's i'd've i'm i've "
    "isn't it'd it'd've it'll let's ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't she'd've should've "
    "shouldn't somebody's someone's something's that'd that's there'd there're there's they'd they'd've they'll they're they've 'twas "
    "wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're "
    "why's won't would've wouldn't y'all you'd you'd've you'll you're you've couldn't've hadn't've mightn't've shouldn't've wouldn't've"
)


def _spellings(word: str) -> set[str]:
    """The word with one or more of its apostrophes left out."""
    at = [place for place, letter in enumerate(word) if letter == "'"]
    chosen = [set(some) for size in range(1, len(at) + 1) for some in combinations(at, size)]
    return {"".join(letter for place, letter in enumerate(word) if place not in some) for some in chosen}


_SPELLED = {spelling: word for word in _CONTRACTIONS.split() for spelling in _spellings(word)}


def normalised(text: str) -> str:
    """The form in which two answers are compared."""
    said = given = _THOUSANDS.sub("", " ".join(text.lower().split()))
    for mark in _PUNCTUATION:
        # a mark that stands beside a blank somewhere goes, one that is only inside words parts them
        said = said.replace(mark, "" if f"{mark} " in given or f" {mark}" in given else " ")
    words = (_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", said).split())
    return " ".join(_SPELLED.get(word, word) for word in words if word not in _ARTICLES)


def agreement(text: str, answers: Sequence[str]) -> float:
    """Share in [0, 1] by the annotators' answers; a repeated answer counts as often as it is given."""
    said, given = normalised(text), [normalised(answer) for answer in answers]
    if len(given) != ANNOTATORS:
        return float(said in given)
    matches = given.count(said)
    others = [matches - (one == said) for one in given]
    return sum(min(1.0, count / 3) for count in others) / ANNOTATORS
