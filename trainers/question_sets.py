"""Question sets of `trainers.evaluate`: a directory of questions, or a benchmark's name, in; rows on disk and how they are asked out.

A benchmark (datasets_ray.benchmarks) goes the way it goes in a study: its data set is read from the official layout below the data root,
held to its release's count, and where its wrong options are mined a CLIP that isn't under test finds the look-alike classes. Rows are made
anew every time, so that a mended copy is noticed; embeddings are kept by the content of images and model (`trainers.mine`).
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_ray import benchmarks
from datasets_ray.choices import QUESTION, build_from_similarities
from datasets_ray.errors import UserError
from datasets_ray.prompts import SUFFIX
from datasets_ray.rows import read_manifest
from datasets_ray.sources import build

TEMPLATE = "a photo of a {}"
"""A class for the miner and for zero-shot classification, where a benchmark says no other."""
METRIC, RULE, TOKENS = "accuracy", "vlmevalkit", 8
"""Where neither command line nor benchmark says."""


@dataclass(frozen=True)
class QuestionSet:
    """Questions and how they are asked. file: the benchmark's, None for a directory of questions."""

    name: str
    rows: Path
    suffix: str
    rule: str
    metric: str
    max_new_tokens: int
    file: benchmarks.BenchmarkFile | None = None

    @property
    def judge(self) -> str | None:
        """What a judge model is asked about an answer, where there is one (trainers.judging)."""
        return None if self.file is None else self.file.judge


def named(options: argparse.Namespace) -> list[str]:
    """Names of everything that is asked for; UserError where two would lie in one place, or nothing is asked for."""
    given = [Path(questions).name for questions in options.questions] + [benchmarks.stem(name) for name in wanted(options)]
    if len(set(given)) < len(given):
        raise UserError("two question sets have the same directory name", why="their results would lie in one place")
    if not given:
        raise UserError("nothing to ask", hint=f"--questions DIR, or --benchmarks {','.join(benchmarks.names()[:3])} ...")
    return given


def wanted(options: argparse.Namespace) -> list[str]:
    """Names and files of --benchmarks, in order."""
    return [name.strip() for given in options.benchmarks for name in given.split(",") if name.strip()]


def asked_for(options: argparse.Namespace) -> list[benchmarks.BenchmarkFile]:
    """The benchmarks' files, all of their mistakes told before anything is built."""
    files = [benchmarks.load(name) for name in wanted(options)]
    if files and options.data_root is None:
        raise UserError("benchmarks and no data root", why="their files lie below it", hint="--data-root DIR, or FINEGRID_DATA=DIR")
    if files and not Path(options.data_root).is_dir():
        raise UserError(f"--data-root {options.data_root} is no folder", hint="the folder that your data sets lie in")
    return files


def how(name: str, rows: Path, options: argparse.Namespace, file: benchmarks.BenchmarkFile | None = None) -> QuestionSet:
    """What the command line says, else the benchmark's file, else the defaults."""

    def said(option: Any, own: Any, default: Any) -> Any:
        return option if option is not None else own if own is not None else default

    suffix, rule = said(options.suffix, file and file.suffix, SUFFIX), said(options.rule, file and file.rule, RULE)
    tokens = said(options.max_new_tokens, file and file.max_new_tokens, TOKENS)
    return QuestionSet(name, rows, suffix, rule, said(options.metric, file and file.metric, METRIC), tokens, file)


def data_of(name: str, file: benchmarks.BenchmarkFile, options: argparse.Namespace, folder: Path) -> Path:
    """The benchmark's rows, read from its files; labelled ones where its wrong options are mined."""
    out = fresh(folder / name / "data")

    def no_input(stage: str) -> Path:
        raise UserError(f"benchmark {name} is made of stage {stage}", why="only a study has stages", hint="name a source of files")

    build(file.spec(options.allow_subset, options.rows), out, no_input, options.data_root)
    return settled(out)


def questions_of(name: str, file: benchmarks.BenchmarkFile, options: argparse.Namespace, folder: Path) -> Path:
    """The benchmark's questions, mined where it says so. UserError without a miner."""
    if file.negatives == "mined" and options.miner is None:
        why = "it says `negatives: mined`: the classes that a CLIP takes for one another"
        hint = "--miner DIR of a CLIP that is no model under test, or ARCHITECTURE:WEIGHTS"
        raise UserError(f"benchmark {name} needs a miner", why=why, hint=hint)
    rows = data_of(name, file, options, folder)
    return mined(name, rows, options, folder) if file.negatives == "mined" else rows


def mined(name: str, rows: Path, options: argparse.Namespace, folder: Path) -> Path:
    """Questions about labelled rows, their wrong options found by the miner."""
    similarities = similar(options.miner, rows, folder, name, TEMPLATE, options, "mined")
    out = fresh(folder / name / "questions")
    build_from_similarities(similarities, rows, out, k=options.k, seed=0, question=QUESTION)
    return settled(out)


def similar(
    model: str, rows: Path, folder: Path, name: str, template: str | Sequence[str], options: argparse.Namespace, what: str
) -> Path:  # fmt: skip
    """Similarities of labelled rows with a CLIP: a directory, or ARCHITECTURE:WEIGHTS. Embeddings are kept under `folder`."""
    from trainers.mine import mine

    directory = Path(model).is_dir()
    architecture, _, weights = (model, "", "") if directory else model.partition(":")
    out = fresh(folder / name / what)
    under_test = options.under_test if what == "mined" else []
    mine(argparse.Namespace(
        model=architecture, weights=weights or None, revision=None, arm_encoder=under_test, rows=str(rows), images=None, labels=None,
        template=template, recipe=None, out=str(out), cache=str(folder / "embeddings"), precision=options.precision, batch=options.batch,
        actors=0, device=options.device,
    ))  # fmt: skip
    return out


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def settled(made: Path) -> Path:
    """The rows under a name of their content: whoever has opened a folder finds it unchanged. Older ones of that name go."""
    digest = hashlib.sha256((made / "manifest.json").read_bytes()).hexdigest()[:16]
    home = made.with_name(f"{made.name}-{digest}")
    for other in made.parent.glob(f"{made.name}-*"):
        if other != home:
            shutil.rmtree(other)
    if home.is_dir():
        shutil.rmtree(made)
    else:
        made.rename(home)
    return home


def facts(directory: Path) -> str:
    """What of a benchmark's rows a reader must know: how many, and what is left out."""
    manifest = read_manifest(directory)
    parts = [f"{manifest['rows']:,} questions"]
    if subset := manifest.get("subset"):
        parts.append(f"a subset: {subset['found']:,} of {subset['expected']:,}")
    parts += [f"{reason} {count:,}" for part in ("dropped", "filtered") for reason, count in (manifest.get(part) or {}).items() if count]
    return ", ".join(parts)
