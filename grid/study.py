"""What a study file may say: typed, strict, every key with its meaning. `schema.Reader` fills these from YAML.

A study is a base recipe (grid/recipe.py), axes whose values change parts of it, arms (points of the grid), benchmarks and contrasts.
It names models, encoders and data sets; a profile (grid/profile.py) says what those names are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from datasets_ray.schema import option
from datasets_ray.yamlfile import Node
from grid.recipe import SEEDS, Recipe, _name


@dataclass
class ArmEntry:
    """One arm, or a family of arms by `product` and `zip`; always the diff from `base`."""

    name: str | None = option("name, or a template such as '{encoder}-{llm}' over axes; null: made from what varies", None)
    row: int | None = option("row of the published table", None, low=0)
    at: dict[str, str] = option("axis → value where it differs from `base`", {})
    product: dict[str, list[str]] = option("axis → values; all combinations", {})
    zip: dict[str, list[str]] = option("axis → values; taken side by side, equally long", {})
    seeds: list[int] = option("one arm per seed", [])
    set: dict[str, Node] = option("dotted recipe key → value, beyond the axes", {})


@dataclass
class Reference:
    """A released model that is evaluated but not trained."""

    name: str = option("name in tables", check=_name)
    row: int | None = option("row of the published table", None, low=0)
    at: dict[str, str] = option("axis → value where it differs from `base`", {})
    released: str = option("model of the profile")


@dataclass
class Benchmark:
    """Questions with one right answer each."""

    use: str | None = option(
        "file of experiments/benchmarks, by name or path, beneath these keys; its name is then the default of `data`", None
    )
    data: str = option("data set of the profile, or where it has none, of experiments/benchmarks")
    negatives: Literal["mined", "annotated", "given"] = option(
        "where wrong options come from: mined by a CLIP model, people's annotations of model errors, or the set itself", "given"
    )
    metric: str = option(
        "what its score is, of datasets_ray.metrics; circular: only questions right in every rotation count, as MMBench has it", "accuracy"
    )
    zeroshot: bool = option("whether CLIP encoders classify it too", False)
    templates: list[str] = option("texts of a class for that classification, averaged; `{}` is its name; empty: `mining.template`", [])
    ensemble: str | None = option(
        "instead of `templates`: a data set (imagenet1k, pets ...) whose CLIP prompts are read from CLIP benchmark's file below data_root",
        None,
    )
    suffix: str | None = option("last line of a prompt that lists options; null: as `evaluation` says", None)
    rule: str | None = option("answer rule; null: as `evaluation` says", None)
    max_new_tokens: int | None = option("longest answer; null: as `evaluation` says", None, unit="tokens", low=1, high=4096)
    judge: Literal["grade", "extract", "verdict"] | None = option(
        "what `evaluation.judge` is asked about an answer: its grade (MM-Vet), the short answer in it (MathVista), whether it is right "
        "(HallusionBench); without an endpoint a rule reads what it can, and a set that needs grades is not run",
        None,
    )

    def asked(self, how: Evaluation) -> Evaluation:
        """How this benchmark is asked: its own words, rule and length before the study's."""
        own = {"suffix": self.suffix, "rule": self.rule, "max_new_tokens": self.max_new_tokens}
        return replace(how, **{key: value for key, value in own.items() if value is not None})  # type: ignore[arg-type]


@dataclass
class Mining:
    """How labelled images become k-way questions."""

    miner: str = option("CLIP encoder of the profile that finds look-alike classes; never one of the arms' encoders")
    k: int = option("options of a question", 5, unit="options", low=2, high=26)
    template: str = option("text of a class for the miner and zero-shot classification; `{}` is its name", "a photo of a {}")
    question: str = option("asked about each image", "What type of object is in this photo?")
    seed: int = option("of the order of options", 0, low=0, high=SEEDS)


def _methods(given: str | list[str]) -> str | None:
    if not given:
        return "no method at all"
    return None if isinstance(given, str) or len(set(given)) == len(given) else "a method twice"


def _endpoint(url: str) -> str | None:
    from trainers.judge import wrong_url

    return wrong_url(url)


def _variable(name: str) -> str | None:
    known = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None
    return None if known else "not the name of an environment variable; the key itself never stands in a study"


@dataclass
class Judge:
    """A language model that reads answers to benchmarks with a `judge`."""

    url: str = option("OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1", check=_endpoint)
    model: str = option("its name there; with the prompt's version part of a judged score's identity")
    key_env: str | None = option("environment variable that holds the key where stages run; null: none is sent", None, check=_variable)
    concurrency: int = option("questions that are open at a time", 8, unit="questions", low=1, high=1024)
    timeout: float = option("longest wait for a reply", 120.0, unit="seconds", above=0.0, high=3600)
    attempts: int = option("times a question is asked at most, where asking again may help", 6, low=1, high=100)
    cache: str | None = option("folder for replies that runs share; null: the stage's own", None)


@dataclass
class Evaluation:
    """How models are asked and answers read."""

    suffix: str = option("last line of a prompt", "Answer with the option's letter from the given choices directly.")
    options: Literal["listed", "hidden"] = option(
        "whether a prompt shows the options; hidden ones are only scored (`method: likelihood`), as CLIP's zero-shot classifies", "listed"
    )
    rule: str = option("answer rule, of `datasets_ray.answers`", "vlmevalkit")
    max_new_tokens: int = option("longest answer", 8, unit="tokens", low=1, high=4096)
    method: Literal["generate", "first_token", "likelihood"] | list[Literal["generate", "first_token", "likelihood"]] = option(
        "how answers are made: `generate` (greedy text, read by the rule), `first_token` (the same, settled where its first token is a "
        "letter), `likelihood` (log-probabilities of the options); of several in one pass the first is the score's value",
        "generate",
        check=_methods,
    )
    fit: Literal["crop", "pad", "squash"] | None = option("how an image becomes a square; null: as in finetuning", None)
    judge: Judge | None = option("a model that reads answers where a benchmark asks for one; null: none", None)


@dataclass
class Contrast:
    """An effect: the mean over matched pairs of arms that differ in one axis only."""

    name: str = option("name in tables", check=_name)
    axis: str = option("the axis that differs")
    from_: str = option("value(s) before, `a|b` for any of two")
    to: str = option("value(s) after")
    where: str = option("which arms: `axis=a|b;axis!=c;row!=2`", "")


@dataclass
class Controls:
    """Arms asked once more with images permuted among questions: they must fall to chance."""

    arms: list[str] = option("names of arms", [])
    benchmarks: list[str] = option("names of benchmarks; empty: all", [])
    seed: int = option("of the permutation", 0, low=0, high=SEEDS)


@dataclass
class Assumption:
    """What the source leaves open, beside the value chosen."""

    key: str = option("dotted key of this file")
    value: Any = option("the value chosen; must be the file's")
    text: str = option("why, and what else it could be")


@dataclass
class Limits:
    """Where a loss ends a stage instead of being counted."""

    dropped: float | None = option(
        "share of a data set's records that may be dropped; null: 0.01 where the profile says what to `expect`", None, low=0.0, high=1.0
    )


@dataclass
class GeneralAxis:
    """The general axis of a figure of fine-grained against general ability: numbers that the user brings, never an average made here."""

    file: str = option("CSV of `model,average` in percentage points, beside this file; a model without a number is left out, and named")
    name: str = option("what the numbers are, as the figure says it", "OpenVLM average")


@dataclass
class PaperCost:
    """What the source says it spent."""

    devices: int = option("accelerators of one run", unit="devices", low=1)
    device: str = option("their name")
    hours: float = option("of one run, at most", unit="hours", above=0.0)


@dataclass
class Study:
    """One YAML file."""

    study: str = option("name of the study", check=_name)
    question: str = option("what it answers, in a sentence")
    seed: int = option("of every arm that doesn't set its own", 0, low=0, high=SEEDS)
    made_for: str | None = option("profile whose scale this file's values already are: its overrides don't apply", None)
    compatibility: str | None = option("a named set of defaults, such as llava-1.5", None)
    published: str | None = option("CSV of published rows, relative to this file", None)
    paper_cost: PaperCost | None = option("what the source says it spent", None)
    general_axis: GeneralAxis | None = option("numbers from elsewhere to hold fine-grained averages against", None)
    recipe: Recipe = option("the base recipe")
    templates: dict[str, str] = option("language model → conversation template", {})
    axes: dict[str, list[str] | dict[str, dict[str, Node]]] = option(
        "axis → value → the recipe keys that it sets; a list of values: each sets the recipe key of the axis' name"
    )
    base: dict[str, str] = option("the base arm: axis → value")
    arms: list[ArmEntry] = option("points of the grid, as diffs from `base`")
    references: list[Reference] = option("released models, evaluated but not trained", [])
    mining: Mining | None = option("how labelled images become questions", None)
    evaluation: Evaluation = option("how models are asked", Evaluation)
    benchmarks: dict[str, Benchmark] = option("name → benchmark", {})
    groups: dict[str, list[str]] = option("name → benchmarks whose mean is reported", {})
    contrasts: list[Contrast] = option("the effects that answer the question", [])
    controls: Controls = option("sanity checks", Controls)
    limits: Limits = option("where a loss ends a stage", Limits)
    assumptions: list[Assumption] = option("what the source leaves open", [])
