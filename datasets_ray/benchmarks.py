"""Benchmarks as data: a file of experiments/benchmarks in; its data set, prompt, answer rule and metric out, typed and checked.

    python -m datasets_ray.benchmarks                  the table of them, as it stands in experiments/benchmarks/README.md
    python -m datasets_ray.benchmarks NAME|FILE ...    what a file says, siblings filled in

A file may `include` a sibling (a name, looked for beside the file, or another file's path): its own keys are laid over the sibling's,
mappings key by key. Every mistake is told with its file and line. Studies (`benchmarks: {NAME: {use: pope}}`) and `trainers.evaluate`
(`--benchmarks pope`) read the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets_ray import yamlfile
from datasets_ray.errors import UserError, UserErrors, nearest, run_command
from datasets_ray.policy import MOST_DROPPED
from datasets_ray.schema import Reader, option, registered
from datasets_ray.sources import SOURCES
from datasets_ray.yamlfile import Node

DERIVED = ("concat", "permuted")
"""Sources that a plan makes by itself."""
HERE = Path(__file__).resolve().parent.parent / "experiments" / "benchmarks"


@dataclass
class BenchmarkFile:
    """One YAML file under experiments/benchmarks, over the one that its `include` names, if it names one."""

    include: str | None = option("a sibling whose keys these are laid over: its name, or a file", None)
    about: str = option("what it asks, in a sentence")
    origin: str = option("who made it, and where it is to be had")
    version: str = option("which release is meant")
    source: str = option("reader in datasets_ray.sources")
    keys: dict[str, Any] = option("the source's own keys: file, set, part, split ...", {})
    expect: int | None = option("records of the release; another number is an error without `allow_subset`", None, unit="records", low=1)
    rows: int | None = option("questions, where there is nothing to `expect`: for batch arithmetic only", None, unit="rows", low=1)
    tokens: float = option("mean text tokens of a row, for the cost estimate only", 60.0, unit="tokens", above=0.0)
    images: float = option("mean images of a row, for the cost estimate only", 1.0, unit="images", low=0.0)
    megabytes: float = option("size of a thousand rows, for the disk estimate only", 50.0, unit="MB", low=0.0)
    negatives: Literal["mined", "annotated", "given"] = option("where wrong options come from", "given")
    metric: str = option("what its score is, of datasets_ray.metrics", "accuracy")
    zeroshot: bool = option("whether CLIP encoders classify it too", False)
    templates: list[str] = option("texts of a class for that classification, averaged; `{}` is its name", [])
    ensemble: str | None = option("instead of `templates`: the data set whose CLIP prompts are read below data_root", None)
    suffix: str | None = option("last line of a prompt that lists options; null: the study's", None)
    rule: str | None = option("answer rule, of datasets_ray.answers; null: the study's", None)
    max_new_tokens: int | None = option("longest answer; null: the study's", None, unit="tokens", low=1, high=4096)
    judge: Literal["grade", "extract", "verdict"] | None = option("what a judge model is asked about an answer, where there is one", None)
    differs: list[str] = option("how it differs from the peers, a sentence each", [])

    def spec(self, allow_subset: bool = False, rows: int | None = None) -> dict[str, Any]:
        """The spec of its `dataset` stage (datasets_ray.sources), held to the release's count. rows: the first so many only."""
        held: dict[str, Any] = {} if self.expect is None else {"expect": self.expect, "most_dropped": MOST_DROPPED}
        held |= {"allow_subset": True} if allow_subset else {}
        return {"source": self.source, **self.keys, **held, **({"rows": rows} if rows is not None else {})}


def names() -> list[str]:
    """The files that come with us, without `.yaml`."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def metrics() -> tuple[str, ...]:
    """Names of what a benchmark's score may be."""
    tables = (("metrics", "METRICS"), ("metrics", "GROUPED"), ("benchmark_metrics", "SETS"))
    return tuple(name for file, table in tables for name in registered(f"datasets_ray/{file}.py", table))


def is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def stem(name: str) -> str:
    """What a benchmark that is named by its file is called."""
    return Path(name).stem if is_file(name) else name


def tree(name: str, where: str = "", beside: Path | None = None, opened: tuple[Path, ...] = ()) -> Node:
    """The keys of a benchmark, those of what it includes beneath. where: who names it; beside: the folder where names are looked for
    first. Raises UserError where there is no such file, or it includes itself."""
    places = [(beside or Path()) / name] if is_file(name) else [folder / f"{name}.yaml" for folder in (beside, HERE) if folder is not None]
    path = next((place for place in places if yamlfile.is_file(place)), None)
    if path is None:
        known = names() if beside is None else [*names(), *(other.stem for other in beside.glob("*.yaml"))]
        raise UserError(f"no benchmark {name!r}", why=f"looked for {yamlfile.shown(places[-1])}", hint=nearest(name, known), where=where)
    if path.resolve() in opened:
        raise UserError(f"include: {name!r} leads back to itself", why="a file changes another one", where=where)
    found = yamlfile.read(path)
    included = found.value.get("include")
    if included is None or included.value is None:
        return found
    if not isinstance(included.value, str):
        raise UserError("include is no text", why="it names another file of the folder", hint="include: mmbench", where=included.where)
    return yamlfile.merged(tree(included.value, included.where, path.parent, (*opened, path.resolve())), found)


def load(name: str, where: str = "") -> BenchmarkFile:
    """A benchmark by its name or file. Raises UserErrors with all mistakes of the file."""
    found, reader = tree(name, where), Reader()
    made = reader.read(BenchmarkFile, found)
    if made is not None:
        check(made, reader)
    if reader.errors:
        raise UserErrors(reader.errors)
    return made


def check(made: BenchmarkFile, reader: Reader) -> None:
    """Names that must be known, values that exclude each other; mistakes go to the reader."""
    from datasets_ray.answers import RULES

    chosen: list[tuple[str, str, Sequence[str]]] = [("source", made.source, list(SOURCES)), ("metric", made.metric, metrics())]
    chosen += [("rule", made.rule, list(RULES))] if made.rule is not None else []
    for key, value, known in chosen:
        if value not in known:
            reader.error(f"{key}: unknown {key} {value!r}", hint=nearest(value, known), at=key)
    if made.expect is None and made.rows is None and not isinstance(made.keys.get("rows"), int):
        reader.error(
            "expect: missing", why="a short copy would go unnoticed", hint="expect: RECORDS, or `rows:` where nobody knows", at="source"
        )
    if made.metric == "circular" and (made.negatives != "given" or made.zeroshot):
        reader.error("metric: circular", why="it counts rotations of questions that come with their options", at="metric")
    if made.source in DERIVED:
        reader.error(f"source: {made.source} is made of other rows", why="a benchmark's are read from its release", at="source")
    for text in made.templates:
        if "{}" not in text and "{c}" not in text:
            reader.error(f"templates: {text!r} has no '{{}}'", why="it stands for the class name", at="templates")
    if made.templates and made.ensemble:
        reader.error("`templates` and `ensemble`", why="one of the two says how classes are written", at="ensemble")
    for key in ("expect", "allow_subset", "most_dropped", "source"):
        if key in made.keys:
            reader.error(
                f"keys.{key}: it is no key of a source",
                hint=f"{key}: beside `keys`" if key in ("expect", "source") else "",
                at=f"keys.{key}",
            )


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────────────
def prompt_of(made: BenchmarkFile) -> str:
    """What a question ends with, in a few words."""
    return "the study's" if made.suffix is None else f"“{made.suffix}”" if made.suffix else "the question alone"


def rule_of(made: BenchmarkFile) -> str:
    """The answer rule, and that of questions without options where the file names one."""
    own, bare = made.rule or "the study's", made.keys.get("open")
    return own if bare is None else str(bare) if made.suffix == "" else f"{own}; without options {bare}"


def table(files: dict[str, BenchmarkFile]) -> str:
    """Markdown: a row a benchmark, then what each is and how it differs from its peers."""
    lines = ["| file | questions | a prompt ends with | rule | metric | wrong options |", "|---|---|---|---|---|---|"]
    for name, made in files.items():
        count = f"{made.expect:,}" if made.expect is not None else f"about {made.rows:,}" if made.rows else "as its keys say"
        cells = [f"[{name}]({name}.yaml)", count, prompt_of(made), rule_of(made), made.metric, made.negatives]
        lines.append(f"| {' | '.join(cells)} |")
    for name, made in files.items():
        lines += ["", f"**{name}** {made.about} *{made.origin}; {made.version}.*", "", *(f"- {text}" for text in made.differs)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m datasets_ray.benchmarks", description="Benchmarks as data: what their files say.")
    parser.add_argument("names", nargs="*", metavar="NAME|FILE", help="benchmarks to show whole; default: the table of all")
    given = parser.parse_args(arguments).names
    if not given:
        print(table({name: load(name) for name in names()}))
    for name in given:
        print(json.dumps({name: vars(load(name))}, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
