"""The model card of an exported arm: what it is, how it was made, of which data, what it scored, how it is asked.

In: an `Arm`. Out: README.md's text. Everything is read from the run's files; what isn't there isn't said.
"""

from __future__ import annotations

import json
from typing import Any

from datasets_ray.prompts import SUFFIX
from trainers.interchange.arm import Arm
from trainers.interchange.processors import MAX_NEW_TOKENS

HEAD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [finegrid]
---
"""


def card(arm: Arm, kind: str) -> str:
    """kind: the class it loads as."""
    study = arm.study
    of = f" of the study `{study['name']}`" if study.get("name") else ""
    lines = [HEAD, f"# {arm.name}{of}", ""]
    if study.get("question"):
        lines += [study["question"], ""]
    if study.get("miniature"):
        lines += ["**A miniature**: it shows that the machinery works, not what a model of this design can do.", ""]
    lines += [f"A `{kind}` exported by finegrid. It computes what the arm computed; weights are {arm.precision}.", ""]
    if arm.planned.get("axes"):
        lines += ["| axis | value |", "|---|---|", *(f"| {axis} | {value} |" for axis, value in arm.planned["axes"].items()), ""]
    lines += ["## How it was made", "", *_parts(arm), "", *_trainings(arm), *_data(arm), *_scores(arm), *_use(arm, kind)]
    if arm.versions:
        lines += ["## Versions", "", ", ".join(f"{name} {version}" for name, version in arm.versions.items()), ""]
    return "\n".join(lines)


def _parts(arm: Arm) -> list[str]:
    lines = ["| part | built by | weights |", "|---|---|---|"]
    for name, part in arm.model["parts"].items():
        weights = part["weights"]
        if "stage" in weights:
            origin = f"trained: {arm.stages.get(weights['stage'], {}).get('name', weights['stage'])}"
        elif "checkpoint" in weights:
            origin = weights["checkpoint"] + (f" @ {weights['revision']}" if weights.get("revision") else " (revision not pinned)")
        else:
            origin = f"fresh, seed {weights['fresh']}"
        lines.append(f"| {name} | {part['builder']} | {origin} |")
    return lines


def _trainings(arm: Arm) -> list[str]:
    """One line per training stage that the arm's weights went through."""
    lines = []
    for stage in _trained(arm):
        spec = stage["spec"]
        phases = "; then ".join(
            f"to {phase['until']:.0%} of the steps: " + ", ".join(f"{part} at {rate:g}" for part, rate in phase["learning_rates"].items())
            for phase in spec["phases"]
        )
        length = f"{spec['steps']} steps" if "steps" in spec else f"{spec['epochs']} epochs"
        loss = arm.read(stage["id"], "DONE.json").get("summary", {}).get("loss", {})
        ended = f"; loss {loss['first']:.3f} → {loss['last_tenth']:.3f}" if loss else ""
        names = ", ".join(arm.stages.get(id, {}).get("name", id).removeprefix("data ") for id in spec["data"]["rows"])
        how = f"{spec['schedule']}, warm-up {spec['warmup']:g}, clip {spec['clip']}, {spec['precision']}, seed {spec['seed']}"
        lines.append(f"- **{stage['name']}** on {names}: {length}, batch {spec['batch']}, {phases}; {how}{ended}")
    return [*lines, ""] if lines else []


def _trained(arm: Arm) -> list[dict[str, Any]]:
    """The training stages behind the arm's weights, first ones first."""
    behind: list[str] = []
    waiting = [part["weights"]["stage"] for part in arm.model["parts"].values() if "stage" in part["weights"]]
    while waiting:
        id = waiting.pop()
        if id in behind or id not in arm.stages or arm.stages[id]["kind"] != "train":
            continue
        behind.append(id)
        waiting += arm.stages[id].get("needs", [])
    return [arm.stages[id] for id in arm.stages if id in behind]


def _data(arm: Arm) -> list[str]:
    ids = list(dict.fromkeys(id for stage in _trained(arm) for id in stage["spec"]["data"]["rows"]))
    if not ids:
        return []
    lines = ["## Data", "", "| data | rows | dropped | source | stage |", "|---|---|---|---|---|"]
    for id in ids:
        stage, manifest = arm.stages.get(id, {}), arm.read(id, "manifest.json")
        spec = stage.get("spec", {})
        dropped = ", ".join(f"{reason}: {count}" for reason, count in manifest.get("dropped", {}).items()) or "none"
        facts = ", ".join(f"{key} {value}" for key, value in spec.items() if key != "source" and isinstance(value, (str, int, float)))
        source = " ".join(filter(None, [str(spec.get("source", "")), f"({facts})" if facts else ""]))
        lines.append(f"| {stage.get('name', id).removeprefix('data ')} | {manifest.get('rows', '')} | {dropped} | {source} | {id} |")
    return [*lines, ""]


def _scores(arm: Arm) -> list[str]:
    found = {name: arm.read(id, "scores.json") for name, id in arm.planned.get("scores", {}).items()}
    if not any(found.values()):
        return []
    lines = ["## Scores", "", "By finegrid's own predictions of this arm, percent.", ""]
    lines += ["| benchmark | score | n | metric |", "|---|---|---|---|"]
    for name, scores in found.items():
        if "value" in scores:  # a benchmark without its judge is not run, and has none
            error = f" ± {scores['stderr']:.1f}" if scores.get("stderr") is not None else ""
            lines.append(f"| {name} | {scores['value']:.1f}{error} | {scores.get('n', '')} | {scores.get('metric', '')} |")
    return [*lines, ""]


def _use(arm: Arm, kind: str) -> list[str]:
    limit = f", at most {arm.max_new_tokens} new tokens" if arm.max_new_tokens else ""
    suffix = arm.suffix or SUFFIX
    image = arm.image
    fit = "native size" if image["kind"] == "native" else f"{image.get('fit', 'crop')}, {image['size']} pixels"
    lines = [
        "## How to ask it", "",
        "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        'model = AutoModelForImageTextToText.from_pretrained(DIR, dtype="auto")',
        "processor = AutoProcessor.from_pretrained(DIR)",
        f'question = "What type of object is in this photo?\\nA. ...\\nB. ...\\n{suffix}"',
        'content = [{"type": "image"}, {"type": "text", "text": question}]',
        'prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)',
        'inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device, model.dtype)',
        "made = model.generate(**inputs)",
        'print(processor.decode(made[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())',
        "```", "",
        f"- Conversation template `{arm.model['template']}`; benchmarks were asked greedily{limit} "
        f"(the generation config allows {MAX_NEW_TOKENS}).",
        f"- Images: {fit}, mean {json.dumps(image.get('mean'))}, std {json.dumps(image.get('std'))}. Training read them with Pillow; "
        "transformers' torchvision backend, its default, rounds a little otherwise; for the same pixels set "
        '`processor.image_processor = AutoImageProcessor.from_pretrained(DIR, backend="pil")`.',
        "- vLLM: the format is what its loader for this class reads (configs, safetensors, processor, template). **Unverified**: it was "
        "never run there. The chat template writes no BOS, as LLaVA's own doesn't: where the tokenizer adds one, send "
        '`"add_special_tokens": true` with chat requests.',
    ]  # fmt: skip
    if kind.startswith("Qwen2VL") and arm.model["template"] != "qwen2_vl":
        lines.append("- The template has no `<|vision_start|>`, by which transformers 4 and vLLM find images: load it with transformers 5.")
    return [*lines, ""]
