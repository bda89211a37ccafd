"""Why an answer is invalid: the texts that an answer rule could read no shown letter in, counted by what they say instead.

Flows in: the answers of one benchmark with the options shown, the letters read and whether each text was finished. Flows out:
`{reason: count}` and one example a reason. A validity share alone doesn't tell a prompt that went wrong from a model that knows too little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets_ray.answers import LETTERS, REFUSED

EMPTY = "nothing"
CUT = "cut at the token limit"
REFUSAL = "a refusal"
SEVERAL = "several of the options"
ELSEWHERE = "an option of other questions"
LETTER = "a letter that no option has"
OTHER = "other words"
REASONS = (ELSEWHERE, SEVERAL, LETTER, REFUSAL, EMPTY, CUT, OTHER)
"""In the order that tables show them."""


def reason(text: str, options: Sequence[str], letter: str | None, finished: bool, known: frozenset[str]) -> str:
    """What an invalid answer says. known: every option of the benchmark, lower case. The first that fits, from sure to vague."""
    said = text.strip().lower()
    if not said:
        return EMPTY
    if letter == REFUSED:
        return REFUSAL
    bare = said.strip("().:* ")
    if len(bare) == 1 and bare.upper() in LETTERS:
        return LETTER if LETTERS.index(bare.upper()) >= len(options) else OTHER
    if sum(option.lower() in said for option in options) > 1:
        return SEVERAL
    if said.rstrip(" .!") in known:
        return ELSEWHERE
    return OTHER if finished else CUT


def explain(
    texts: Sequence[str], options: Sequence[Sequence[str]], letters: Sequence[str | None], valid: Sequence[bool], finished: Sequence[bool]
) -> dict[str, Any]:
    """`{"counts": {reason: n}, "examples": {reason: {"text", "options"}}}` of the answers that aren't valid; each sequence has length N."""
    known = frozenset(option.lower() for shown in options for option in shown)
    counts: dict[str, int] = {}
    examples: dict[str, dict[str, Any]] = {}
    for text, shown, letter, good, whole in zip(texts, options, letters, valid, finished, strict=True):
        if not good:
            why = reason(text, shown, letter, whole, known)
            counts[why] = counts.get(why, 0) + 1
            examples.setdefault(why, {"text": text[:200], "options": list(shown)})
    return {"counts": {why: counts[why] for why in REASONS if why in counts}, "examples": examples}
