"""VQA accuracy: an answer and its annotators' answers in, a share of agreement out, after the field's usual normalisation.

Source: VQA (Antol et al. 2015) and its public evaluation server: lower case; punctuation out or, between characters, replaced by a blank;
commas between digits and full stops before no digit out; number words to ten as digits; articles out; contractions with their apostrophes.

Ten annotators: each is left out once, the answer agrees with the other nine to min(1, matches / 3), and the mean of the ten counts.
Any other number of answers: 1 when the answer equals one of them, else 0 (the single-answer form).

Deviations: both sides are normalised wholly and always (the server leaves digits and articles of the annotators' side alone, and normalises
nothing where all annotators agree). As there, "im", "ive" and "lets" stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ANNOTATORS = 10
_FULL_STOP = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
FULL_STOPS = 32
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd "
    "how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't "
    "'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've "
    "someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've "
    "they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've "
    "who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd "
    "you'd've you'll you're you've"
)


def _spellings(word: str) -> set[str]:
    """The word with one of its apostrophes left out."""
    return {word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"}


_SPELLED = {spelling: word for word in _CONTRACTIONS.split() for spelling in _spellings(word)}


def unpunctuated(text: str, full_stop: re.Pattern[str]) -> str:
    """Without marks, as the server takes them out: one that stands beside a blank somewhere goes, one that is only inside words parts them,
    and in a text with a comma between digits all go. full_stop: which full stops go; the server means all and takes the first 32."""
    numbers, said = _THOUSANDS.search(text) is not None, text
    for mark in _PUNCTUATION:
        said = said.replace(mark, "" if numbers or f"{mark} " in text or f" {mark}" in text else " ")
    return full_stop.sub("", said, count=FULL_STOPS)


def normalised(text: str) -> str:
    """The form in which two answers are compared."""
    said = unpunctuated(" ".join(text.lower().split()), _FULL_STOP)
    words = (_NUMBERS.get(word, word) for word in said.split())
    return " ".join(_SPELLED.get(word, word) for word in words if word not in _ARTICLES)


def agreement(text: str, answers: Sequence[str]) -> float:
    """Share in [0, 1] by the annotators' answers; a repeated answer counts as often as it is given."""
    said, given = normalised(text), [normalised(answer) for answer in answers]
    if len(given) != ANNOTATORS:
        return float(said in given)
    matches = given.count(said)
    others = [matches - (one == said) for one in given]
    return sum(min(1.0, count / 3) for count in others) / ANNOTATORS
