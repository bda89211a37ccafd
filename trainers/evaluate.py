"""One finished model on question sets, without a grid: predictions, letters and scores of each.

    python -m trainers.evaluate MODEL --questions DIR [--questions DIR ...] --out DIR [--rule vlmevalkit] [--metric accuracy]
                                [--method generate] [--method likelihood]
    python -m trainers.evaluate HF_DIR --questions DIR --out DIR [--prompts llava-1.5]          a released model, as its authors ask it

MODEL is the artefact directory of a train stage (model.json and `<part>.safetensors`); what its model.json takes from other stages is
looked for beside it, as a run's store lays them out. A questions directory is a rows artefact with options, such as
`datasets_ray.choices build` writes. Runs the stages `predict` and `score` as the grid does; their files go to OUT/<questions>/out/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError, run_command
from datasets_ray.images import CLIP_MEAN, CLIP_STD
from datasets_ray.prompts import SUFFIX
from trainers.context import Cache, Context

FAMILIES = ("vlm", "qwen2_vl", "causal_lm")
METHODS = ("generate", "first_token", "likelihood")


def read_model(directory: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """(ModelSpec, where each stage that it names lies) of a train stage's artefact."""
    if not (directory / "model.json").is_file():
        raise UserError(f"{directory} is no trained model", why="model.json is missing", hint="the artefact directory of a train stage")
    spec = json.loads((directory / "model.json").read_text())
    if spec["family"] not in FAMILIES:
        raise UserError(f"a model of family {spec['family']!r} answers no questions", hint="python -m trainers.mine compares")
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
        text = Path(given).read_text() if not given.lstrip().startswith("{") else given
        return json.loads(text)
    if "encoder" not in spec["parts"]:
        return None
    vision = spec["parts"]["encoder"]["config"].get("vision_cfg")
    if vision is None:
        raise UserError("the encoder's config doesn't say its image size", hint='give --recipe {"kind": ...}')
    sizes = {"kind": "square", "size": vision["image_size"], "patch": vision["patch_size"], "fit": "pad"}
    return {**sizes, "mean": list(CLIP_MEAN), "std": list(CLIP_STD)}


def evaluate(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Questions directory's name → its scores."""
    from trainers import predict, score

    spec, inputs = model_of(options)
    own = spec["family"] == "existing"
    image = None if own else recipe_of(spec, options.recipe)
    told_images = "" if options.recipe else " (from the encoder; --recipe says otherwise)"
    print("images: as its own processor has them" if own else f"images: {json.dumps(image)}{told_images}", file=sys.stderr)
    names = [Path(questions).name for questions in options.questions]
    if len(set(names)) < len(names):
        raise UserError("two question sets have the same directory name", why="their results would lie in one place")
    methods = list(dict.fromkeys(options.method or ["generate"]))
    cache, results = Cache(), {}
    for name, questions in zip(names, options.questions):
        folder = Path(options.out) / name
        shutil.rmtree(folder, ignore_errors=True)
        asked = {
            "model": spec, "questions": questions, "image": image, "suffix": options.suffix, "method": methods,
            "max_new_tokens": options.max_new_tokens, "precision": options.precision,
        }  # fmt: skip
        stage = {"id": f"predict-{name}", "name": name, "spec": asked, "runtime": {"eval_batch": options.batch}}
        here = Context.local(folder, stage, {**inputs, questions: Path(questions)}, device=options.device, cache=cache)
        made = predict.run(asked, here)
        print(f"{name}: {told(made)}", file=sys.stderr)
        wanted = {"predictions": "predictions", "rule": options.rule, "metric": options.metric, "method": methods[0]}
        results[name] = score.run(wanted, Context.local(folder, {"id": f"score-{name}", "spec": wanted}, {"predictions": here.out}))
    return results


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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainers.evaluate", description="One finished model on question sets.")
    parser.add_argument("model", help="artefact directory of a train stage, or a Hugging Face directory or hub id")
    parser.add_argument("--prompts", help="a released model's prompts (trainers/families; default: by its architecture)")
    parser.add_argument("--revision", help="a hub id's commit")
    parser.add_argument("--remote-code", action="store_true", help="run a checkpoint's own code (read it first)")
    parser.add_argument("--questions", action="append", required=True, help="a rows artefact of questions; repeatable")
    parser.add_argument("--out", required=True, help="directory to write")
    parser.add_argument("--rule", default="vlmevalkit", help="answer rule (python -m datasets_ray.answers --list)")
    parser.add_argument("--metric", default="accuracy", help="accuracy or mean_per_class")
    parser.add_argument(
        "--method", action="append", choices=METHODS, help="how answers are made (default generate); repeatable: the first one is scored"
    )
    parser.add_argument("--recipe", help="ImageRecipe as JSON or a file (default: padded, in the encoder's size)")
    parser.add_argument("--suffix", default=SUFFIX)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    for name, scores in evaluate(parser.parse_args(arguments)).items():
        error = "" if scores["stderr"] is None else f" ± {scores['stderr']:.1f}"
        rest = f"n {scores['n']}, chance {scores['chance']:.1f}, valid {scores['valid']:.1%}"
        print(f"{name}: {scores['value']:.1f}{error} ({scores['metric']}, {scores['method']}, {scores['rule']}, {rest})")
        for method, other in scores.get("methods", {}).items():
            print(f"  {method}: {other['value']:.1f} (valid {other['valid']:.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
