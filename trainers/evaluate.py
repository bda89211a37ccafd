"""One finished model on question sets or benchmarks, without a grid: predictions, letters and scores of each.

    python -m trainers.evaluate MODEL --questions DIR [--questions DIR ...] --out DIR [--rule vlmevalkit] [--metric accuracy]
                                [--method generate] [--method likelihood]
    python -m trainers.evaluate MODEL --benchmarks pope,mmstar --data-root DIR --out DIR        each with its own prompt, rule and metric
    python -m trainers.evaluate MODEL --benchmarks flowers,pets --data-root DIR --miner CLIP --out DIR      wrong options mined by CLIP
    python -m trainers.evaluate HF_DIR --questions DIR --out DIR [--prompts llava-1.5]          a released model, as its authors ask it
    python -m trainers.evaluate CLIP --benchmarks flowers,pets --data-root DIR --out DIR        zero-shot: top-1, top-5, mean per class

MODEL is the artefact directory of a train stage (model.json and `<part>.safetensors`); what its model.json takes from other stages is
looked for beside it, as a run's store lays them out. A questions directory is a rows artefact with options, such as
`datasets_ray.choices build` writes; a benchmark is a file of experiments/benchmarks. Runs the stages `predict` and `score` as the grid
does; their files go to OUT/<name>/out/. An evaluation that was stopped or killed goes on: what is asked is known by the content of model,
questions and options, answers on disk are taken up where all of it is the same, and asked anew where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets_ray.benchmarks import stem
from datasets_ray.choices import DEFAULT_K
from datasets_ray.errors import Parser, UserError, run_command
from datasets_ray.files import given_object, json_object
from datasets_ray.images import CLIP_MEAN, CLIP_STD
from trainers import question_sets
from trainers.context import Cache, Context
from trainers.question_sets import QuestionSet

FAMILIES = ("vlm", "qwen2_vl", "causal_lm")
Spec = dict[str, Any]
METHODS = ("generate", "first_token", "likelihood")
WEIGHTS = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".py")
"""Files that make a model and its prompts what they are."""
ASKED = "asked.json"
"""Beside finished predictions: the key of what was asked."""


def read_model(directory: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """(ModelSpec, where each stage that it names lies) of a train stage's artefact."""
    if not (directory / "model.json").is_file():
        raise UserError(f"{directory} is no trained model", why="model.json is missing", hint="the artefact directory of a train stage")
    spec = json_object(directory / "model.json")
    if spec.get("family") not in FAMILIES:
        hint = "--benchmarks of labelled images classify with a CLIP; python -m trainers.mine compares"
        raise UserError(f"a model of family {spec.get('family')!r} answers no questions", hint=hint)
    if not isinstance(spec.get("parts"), dict) or not all("weights" in part for part in spec["parts"].values()):
        raise UserError("model.json names no parts", why="it is not as a train stage writes it", where=str(directory / "model.json"))
    inputs: dict[str, Path] = {}
    for name, part in spec["parts"].items():
        stage = part["weights"].get("stage")
        if stage is None:
            continue
        here = directory if (directory / f"{name}.safetensors").is_file() and "part" not in part["weights"] else directory.parent / stage
        if not here.is_dir():
            raise UserError(f"the {name} comes from {stage}, which isn't beside {directory}", hint="keep a run's artefacts in one store")
        # a stage may have trained one part of this model and only passed another on
        part["weights"]["stage"] = f"{name}:{stage}"
        inputs[part["weights"]["stage"]] = here
    return spec, inputs


def model_of(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Path]]:
    """`read_model` of a train stage's artefact, or a released model: a Hugging Face directory, or a hub id with --prompts."""
    directory = Path(options.model)
    if (directory / "model.json").is_file() or not (options.prompts or (directory / "config.json").is_file()):
        return read_model(directory)
    from trainers.models.existing import spec_of

    return spec_of(options.model, options.prompts, options.revision, options.remote_code), {}


def recipe_of(spec: dict[str, Any], given: str | None) -> dict[str, Any] | None:
    """The ImageRecipe: as given (JSON or a file), else LLaVA's finetuning one (padded) in the size of an open_clip encoder."""
    if given is not None:
        return given_object(given, "--recipe")
    if "encoder" not in spec["parts"]:
        return None
    vision = spec["parts"]["encoder"]["config"].get("vision_cfg")
    if vision is None:
        raise UserError("the encoder's config doesn't say its image size", hint='give --recipe {"kind": ...}')
    sizes = {"kind": "square", "size": vision["image_size"], "patch": vision["patch_size"], "fit": "pad"}
    return {**sizes, "mean": list(CLIP_MEAN), "std": list(CLIP_STD)}


def contrastive(model: str) -> bool:
    """Whether MODEL is a CLIP: a trained one, an open_clip export, one that transformers saved, or ARCHITECTURE:WEIGHTS."""
    folder = Path(model)
    if (folder / "model.json").is_file():
        return json_object(folder / "model.json").get("family") == "clip"
    if (folder / "open_clip_config.json").is_file() or (not folder.is_dir() and ":" in model):
        return True
    config = folder / "config.json"
    return config.is_file() and json_object(config).get("model_type") in ("clip", "siglip")


def files_of(directory: Path) -> list[Any]:
    """Name, size and time of change of the files that make a model."""
    found = sorted(path for path in directory.iterdir() if path.suffix in WEIGHTS and path.is_file())
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in found]


def weights_of(spec: Mapping[str, Any], inputs: Mapping[str, Path]) -> list[Any]:
    """What the model's weights are: the files of its stages, and of checkpoints that are directories; a hub id stands in its spec."""
    checkpoints = {part["weights"].get("checkpoint") for part in spec["parts"].values()}
    checkpoints.add(spec.get("tokenizer"))
    local = sorted(Path(name) for name in checkpoints if name and Path(name).is_dir())
    return [[name, files_of(folder)] for name, folder in sorted(inputs.items())] + [files_of(folder) for folder in local]


def evaluate(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Question set's name → its scores."""
    question_sets.named(options)
    files = question_sets.asked_for(options)
    kept = Path(options.cache or Path(options.out) / "sets")
    if contrastive(options.model) and not options.questions:
        from trainers import evaluate_clip

        return evaluate_clip.evaluate(options, files, kept)
    spec, inputs = model_of(options)
    own = spec["family"] == "existing"
    image = None if own else recipe_of(spec, options.recipe)
    told_images = "" if options.recipe else " (from the encoder; --recipe says otherwise)"
    print("images: as its own processor has them" if own else f"images: {json.dumps(image)}{told_images}", file=sys.stderr)
    folders = [*inputs.values(), *(Path(name) for part in spec["parts"].values() if (name := part["weights"].get("checkpoint")))]
    options.under_test = [str(folder) for folder in folders if folder.is_dir() and contrastive(str(folder))]
    sets = [question_sets.how(Path(questions).name, Path(questions), options) for questions in options.questions]
    for name, file in zip(map(stem, question_sets.wanted(options)), files):
        rows = question_sets.questions_of(name, file, options, kept)
        print(f"{name}: {question_sets.facts(rows)}", file=sys.stderr)
        sets.append(question_sets.how(name, rows, options, file))
    cache = Cache()
    return {one.name: scored(one, predicted(one, spec, inputs, image, options, cache), options) for one in sets}


def predicted(
    asked: QuestionSet, model: Spec, inputs: dict[str, Path], image: Spec | None, options: argparse.Namespace, cache: Cache
) -> Path:  # fmt: skip
    """OUT/<name> with finished predictions in `out`: those that are there if the same was asked, else made, from the answers on."""
    from datasets_ray.rows import open_rows
    from trainers import predict
    from trainers.loaded import identity
    from trainers.mine import content

    name, questions = asked.name, str(asked.rows)
    suffix = "" if model["family"] == "existing" else asked.suffix
    spec = {
        "model": model, "questions": questions, "image": image, "suffix": suffix, "method": methods_of(options),
        "max_new_tokens": asked.max_new_tokens, "precision": options.precision,
    }  # fmt: skip
    kind = options.device.partition(":")[0]  # across kinds of devices answers may differ
    key = identity([{**spec, "questions": content(open_rows(questions))}, weights_of(model, inputs), kind])
    folder = Path(options.out) / name
    if (folder / "out" / ASKED).is_file() and json.loads((folder / "out" / ASKED).read_text()) == key:
        print(f"{name}: answered before, nothing to ask", file=sys.stderr)
        return folder
    stage = {"id": f"predict-{name}", "name": name, "spec": spec, "runtime": {"eval_batch": options.batch}}
    shutil.rmtree(folder / "out", ignore_errors=True)
    here = Context.local(folder, stage, {**inputs, questions: asked.rows}, device=options.device, cache=cache)
    here = replace(here, work=folder / "work" / key)
    before = predict.Parts(here)
    before.load()
    if before.answers:
        print(f"{name}: {len(before.answers)} answers were there, the rest is asked", file=sys.stderr)
    made = predict.run(spec, here)
    (folder / "out" / ASKED).write_text(json.dumps(key))
    shutil.rmtree(here.work, ignore_errors=True)
    print(f"{name}: {told(made)}", file=sys.stderr)
    return folder


def methods_of(options: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(options.method or ["generate"]))


def scored(asked: QuestionSet, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The scores of OUT/<name>; judged where the set wants a judge and the command line names one."""
    from trainers import judging, score

    spec: dict[str, Any] = {"predictions": "predictions", "rule": asked.rule, "metric": asked.metric, "method": methods_of(options)[0]}
    runtime: dict[str, Any] = {}
    if asked.judge is not None and options.judge_model:
        spec |= {"judge": judging.identity(options.judge_model, asked.judge), "questions": str(asked.rows)}
        runtime["judge"] = {"url": options.judge_url, "key_env": options.judge_key_env}
    stage = {"id": f"score-{asked.name}", "spec": spec, "runtime": runtime}
    return score.run(spec, Context.local(folder, stage, {"predictions": folder / "out", str(asked.rows): asked.rows}))


def told(made: dict[str, Any]) -> str:
    """How a predict stage came to its answers."""
    parts = [f"{made['n']} answers, {made['alone']} of them made alone after a close call"]
    if "shortcut" in made:
        parts += [f"{made['shortcut']} settled by their first token", f"threshold {made['threshold']:.2g}"]
    if "sum_threshold" in made:
        parts.append(f"threshold of likelihoods {made['sum_threshold']:.2g}")
    of = "" if made["read_tokens"] > made["prompt_tokens"] else f" of {made['prompt_tokens']}"  # a processor's images take theirs besides
    parts.append(f"{made['read_tokens']}{of} tokens and {made['read_images']} of {made['images']} images read")
    return "; ".join(parts)


def lines_of(name: str, scores: dict[str, Any]) -> list[str]:
    """What is printed of a set's scores."""
    if "not_run" in scores:
        return [f"{name}: not run ({scores['not_run']})"]
    error = "" if scores["stderr"] is None else f" ± {scores['stderr']:.1f}"
    if "top1" in scores:
        parts = [f"top-5 {100 * scores['top5']:.1f}"] if scores["top5"] is not None else []
        parts += [f"mean per class {100 * scores['mean_per_class']:.1f}"]
        parts += [f"among the choices {100 * scores['among_choices']:.1f}"] if "among_choices" in scores else []
        return [f"{name}: top-1 {100 * scores['top1']:.1f}, {', '.join(parts)} (n {scores['n']}, {scores['classes']} classes)"]
    chance = "" if scores["chance"] is None else f"chance {scores['chance']:.1f}, "
    rest = f"n {scores['n']}, {chance}valid {scores['valid']:.1%}"
    lines = [f"{name}: {scores['value']:.1f}{error} ({scores['metric']}, {scores['method']}, {scores['rule']}, {rest})"]
    return lines + [f"  {method}: {other['value']:.1f} (valid {other['valid']:.1%})" for method, other in scores.get("methods", {}).items()]


def parser() -> Parser:
    made = Parser(prog="python -m trainers.evaluate", description="One finished model on question sets or benchmarks.")
    made.add_argument("model", help="artefact directory of a train stage, a Hugging Face directory or hub id, or a CLIP")
    made.add_argument("--prompts", help="a released model's prompts (trainers/families; default: by its architecture)")
    made.add_argument("--revision", help="a hub id's commit")
    made.add_argument("--remote-code", action="store_true", help="run a checkpoint's own code (read it first)")
    made.add_argument("--questions", action="append", default=[], help="a rows artefact of questions; repeatable")
    made.add_argument("--benchmarks", action="append", default=[], metavar="A,B", help="of experiments/benchmarks: names or files")
    made.add_argument("--data-root", default=os.environ.get("FINEGRID_DATA"), help="folder of the benchmarks' files (FINEGRID_DATA)")
    made.add_argument("--allow-subset", action="store_true", help="fewer records than a benchmark's release will do, and are told")
    made.add_argument("--rows", type=int, help="only the first so many records of each benchmark, a look rather than a score")
    made.add_argument("--miner", help="CLIP that finds wrong options where a benchmark wants them mined; never one under test")
    made.add_argument("--k", type=int, default=DEFAULT_K, help="options of a mined question")
    made.add_argument("--cache", help="where benchmarks' rows and embeddings are kept, for several models (default: OUT/sets)")
    made.add_argument("--out", required=True, help="directory to write")
    made.add_argument("--rule", help="answer rule (python -m datasets_ray.answers --list; default: the benchmark's, else vlmevalkit)")
    made.add_argument("--metric", help="of datasets_ray.metrics (default: the benchmark's, else accuracy)")
    made.add_argument(
        "--method", action="append", choices=METHODS, help="how answers are made (default generate); repeatable: the first one is scored"
    )
    made.add_argument("--recipe", help="ImageRecipe as JSON or a file (default: padded, in the encoder's size)")
    made.add_argument("--suffix", help="last line of a prompt (default: the benchmark's, else LLaVA's)")
    made.add_argument("--max-new-tokens", type=int, help="longest answer (default: the benchmark's, else 8)")
    made.add_argument("--judge-url", help="OpenAI-compatible endpoint, for benchmarks with a `judge`")
    made.add_argument("--judge-model", help="its model's name")
    made.add_argument("--judge-key-env", help="environment variable with its key")
    made.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--device", default="cpu")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if bool(options.judge_url) != bool(options.judge_model):
        raise UserError("a judge is an address and a model", hint="--judge-url http://127.0.0.1:8000/v1 --judge-model NAME")
    for name, scores in evaluate(options).items():
        print("\n".join(lines_of(name, scores)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
