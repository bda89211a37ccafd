"""What a model's answer to a multiple-choice question says: answer text and options → a letter, `Z` (a refusal) or nothing.

A *rule* is a published way of reading answers, reproduced exactly and named with the version it was read from; what differs
on purpose is written in `Rule.deviations`. No rule ever guesses: what it can't read is `None`, and the score counts it as invalid.

    python -m datasets_ray.answers --rule vlmevalkit < cases.jsonl     {"answer": "B.", "options": {"A": "cat", "B": "dog"}} a line in,
                                                                       {"letter": "B"} (or null) a line out
    python -m datasets_ray.answers --list                              the rules, their sources and deviations
"""

from __future__ import annotations

import json
import re
import string
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TextIO

from datasets_ray import lmms_letters
from datasets_ray.errors import Parser, UserError, nearest, run_command

LETTERS = string.ascii_uppercase
REFUSED = "Z"
"""What VLMEvalKit calls a refusal. Never an option's letter unless 26 options are shown."""

Options = Mapping[str, str]
"""Letter → option text, in the order shown: {"A": "Beagle", "B": "Boxer"}."""


@dataclass(frozen=True)
class Rule:
    """One documented way to read an answer."""

    name: str
    source: str
    """Repository, file and commit that the rule was read from."""
    reads: str
    """The rule in a sentence."""
    deviations: tuple[str, ...]
    """Where we differ from the source on purpose, each in a sentence."""
    read: Callable[[str, Options], str | None]


def _strict(text: str, options: Options) -> str | None:
    letter = text.strip()
    return letter if letter in options else None


_PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_ANSWER_IS = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")


def _vlmevalkit_option(text: str, options: Options) -> str | None:
    if "Failed to obtain answer via API" in text:
        return None
    if any(refusal in text for refusal in _REFUSALS):
        return REFUSED
    words = text.translate(_PUNCTUATION).split()
    present = [letter for letter in options if letter in words]
    if len(present) == 1:
        if words.index(present[0]) > len(words) - 5:
            return present[0]
    elif not present and REFUSED in words:
        return REFUSED
    found = _ANSWER_IS.search(text)
    if found and found.group(1).upper() in options:
        return found.group(1).upper()
    return None


def _vlmevalkit_text(text: str, options: Options) -> str | None:
    lowered = text.lower()
    if len(lowered) > 2 * sum(len(option) for option in options.values()):
        return None
    named = [letter for letter, option in options.items() if option.lower() in lowered]
    return named[0] if len(named) == 1 else None


def _vlmevalkit(text: str, options: Options) -> str | None:
    return _vlmevalkit_option(text, options) or _vlmevalkit_text(text, options)


def _foci(text: str, options: Options) -> str | None:
    lowered = text.lower()
    return next((letter for letter in options if lowered.startswith(letter.lower())), None)


def _lmms(text: str, options: Options) -> str | None:
    answer, letters = text.strip(), {letter.lower(): letter for letter in options}
    if answer.lower() in letters:
        return letters[answer.lower()]
    if len(answer) >= 2 and answer[0].isupper() and answer[1] == ".":
        return letters.get(answer[0].lower())
    return None


_LLAVA_LETTERS = "ABCDE"
_THE_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


def _llava(text: str, options: Options) -> str | None:
    answer, letters = text.strip(), set(_LLAVA_LETTERS) | set(options)
    if answer in letters:
        said = answer
    elif answer[:1] in letters and answer[1:3] == ". ":
        said = answer[0]
    else:
        found = _THE_ANSWER_IS.findall(answer)
        said = found[0] if len(found) == 1 else ""
    return said if said in options else None


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule(
            "strict",
            "finegrid",
            "the option's capital letter and nothing else but white space around it",
            (),
            _strict,
        ),
        Rule(
            "vlmevalkit",
            "open-compass/VLMEvalKit vlmeval/utils/matching_util.py can_infer, commit e8e78f05 (2026-08-18, with pull requests 1175, 1552)",
            "refusals are Z; one option letter as a word of its own, first seen among the last four words; "
            "'answer is X'; else the one option text that the answer contains",
            (
                "the environment variable VERBOSE, with which the source rejects an 'A' among four words and more, is not read",
                "the option texts passed in are not lower-cased in place (no later step of ours reads them)",
                "what can't be inferred is invalid: no judge model, no random letter",
            ),
            _vlmevalkit,
        ),
        Rule(
            "foci",
            "gregor-ge/FOCI-Benchmark benchmark/evaluate.py parse_generated_prediction, commit d639d4b4 (2024-06-21)",
            "the first option letter that the answer starts with, in either case (so 'Beagle' is read as B)",
            ("the letters tried are those of the options shown; the source tries A to D unless told otherwise",),
            _foci,
        ),
        Rule(
            "lmms",
            "EvolvingLMMs-Lab/lmms-eval lmms_eval/tasks/scienceqa/utils.py sqa_process_results, commit 75571cfe (2026-08-06)",
            "the letter alone in either case, or a capital letter and a full stop at the start",
            (
                "the source only says right or wrong; a letter that isn't an option's is no answer here",
                "lmms-eval has a reader for each task: this is ScienceQA's, `lmms_mcq` that of MMStar and others, `mmmu` MMMU's",
            ),
            _lmms,
        ),
        Rule(
            "lmms_mcq",
            "EvolvingLMMs-Lab/lmms-eval lmms_eval/tasks/_task_utils/mcq_extract.py extract_mcq_answer, commit 75571cfe (2026-08-06)",
            "the capital letter that the answer starts with, else ends with, else the first of each option's behind a phrase such as "
            "'answer is', else '(B)', 'B.', 'B:', 'B)', 'B ', else anywhere; the last of equals",
            ("the letters tried are those of the options shown; the source tries A to H, MMStar's task A to D",),
            lmms_letters.shared,
        ),
        Rule(
            "mmmu",
            "MMMU eval/eval_utils.py parse_multi_choice_response, as in lmms-eval lmms_eval/tasks/_task_utils/mmmu_mcq_utils.py, commit "
            "75571cfe (2026-08-06)",
            "'(B)', else 'B' before a blank, else 'B.', else, in more than five words, an option's text; the last of several",
            ("where the source draws a letter at random the answer is invalid",),
            lmms_letters.mmmu,
        ),
        Rule(
            "llava",
            "haotian-liu/LLaVA llava/eval/eval_science_qa.py (with get_pred_idx), commit c121f043 (2024-05-12)",
            "the capital letter alone; else a letter, a full stop and a blank at the start; else the letter after the only "
            "'The answer is ', if anything stands behind it (so 'The answer is B' is not read, and 'The answer is Boxer' is B)",
            (
                "blanks around the answer are taken off here; the source's model scripts take them off before they write the answer",
                "letters beyond E count where so many options are shown; the source knows A to E unless told otherwise",
                "the source is for ScienceQA; LLaVA's SEED-Bench tool is `strict`, its MMBench answers go to that set's server unread",
            ),
            _llava,
        ),
    )
}


def rule_named(name: str) -> Rule:
    """The rule of this name. Raises UserError with the nearest known name."""
    if name not in RULES:
        raise UserError(f"unknown answer rule {name!r}", hint=nearest(name, RULES))
    return RULES[name]


def extract(rule: str, text: str, options: Options) -> str | None:
    """The letter that `rule` reads in `text`: one of `options`' letters, `Z` for a refusal, None when it can't be read."""
    return rule_named(rule).read(text, options)


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Options in the order shown → {"A": first, "B": second, ...}. At most 26."""
    if len(options) > len(LETTERS):
        raise UserError(f"{len(options)} options", why=f"a question has at most {len(LETTERS)} letters")
    return dict(zip(LETTERS, options))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are there once: of two options A one would be lost."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is there twice")
    return made


def _case(line: str, number: int) -> tuple[str, dict[str, str]]:
    where = f"line {number}"
    shape = 'write {"answer": "B.", "options": {"A": "cat", "B": "dog"}}'
    try:
        case = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError("unreadable JSON", why=str(error), hint=shape, where=where) from None
    if not isinstance(case, dict) or not isinstance(case.get("answer"), str) or not isinstance(case.get("options"), dict):
        raise UserError("not a case", why="a string `answer` and an object `options` are needed", hint=shape, where=where)
    options = case["options"]
    for letter, text in options.items():
        if len(letter) != 1 or letter not in LETTERS:
            raise UserError(f"option {letter!r} has no capital letter A-Z for a name", hint=shape, where=where)
        if not isinstance(text, str):
            raise UserError(f"option {letter} is not a string", why=f"it is {json.dumps(text)}", hint=shape, where=where)
    return case["answer"], options


def read_cases(rule: str, lines: Iterable[str], out: TextIO) -> int:
    """One JSON case a line in, one `{"letter": ...}` a line out; a bad line is a UserError with its number, blank ones at the end are
    none. Returns the number of cases."""
    chosen, count, blank = rule_named(rule), 0, 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            blank = blank or number
            continue
        answer, options = _case("" if blank else line, blank or number)
        out.write(json.dumps({"letter": chosen.read(answer, options)}) + "\n")
        count += 1
    return count


def _utf8(stream: BinaryIO) -> Iterator[str]:
    """Lines of UTF-8 text, whatever the locale says; a byte order mark in front is left out."""
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            what = f"byte {error.start + 1} of the line is not UTF-8"
            raise UserError(what, hint="write the cases as UTF-8", where=f"line {number}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m datasets_ray.answers", description="What an answer rule makes of an answer.")
    parser.add_argument("--rule", default=None, help=f"one of {', '.join(RULES)}")
    parser.add_argument("--list", action="store_true", help="print the rules, their sources and deviations")
    options = parser.parse_args(arguments)
    if options.list:
        for rule in RULES.values():
            print(f"{rule.name}: {rule.reads}\n  source: {rule.source}")
            print("".join(f"  differs: {d}\n" for d in rule.deviations), end="")
        return 0
    if options.rule is None:
        raise UserError("no rule named", hint=f"--rule NAME with one of {', '.join(RULES)}")
    read_cases(options.rule, _utf8(sys.stdin.buffer), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
