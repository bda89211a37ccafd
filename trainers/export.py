"""A finished arm as a Hugging Face directory that plain transformers loads.

    python -m trainers.export RUN_DIR/ARM DIR            an arm of a grid run
    python -m trainers.export STORE/train-... DIR --recipe '{"kind": "square", ...}'    a train stage's artefact

Out in DIR: `LlavaForConditionalGeneration` (or `Qwen2VLForConditionalGeneration`) as config.json and sharded safetensors, the tokenizer
with its image token, the processor that prepares images as in training, the chat template, generation settings and a model card. It
appears whole or not at all, after transformers alone has read it and tokenised a question as training did; a directory that holds
anything is refused.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets_ray.errors import Parser, UserError, run_command
from trainers.interchange.arm import Arm, open_arm

SHARD = "5GB"


def export(arm: Arm, directory: Path, shard: str = SHARD) -> str:
    """Writes the arm; returns the class that it loads as. Raises UserError where transformers has no counterpart, or DIR isn't empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} isn't empty", why="an export never overwrites", hint="name a new directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as aside:
        made = Path(aside) / "made"
        kind = _write(arm, made, Path(aside), shard)
        if directory.exists():
            directory.rmdir()
        os.replace(made, directory)
    return kind


def _write(arm: Arm, made: Path, aside: Path, shard: str) -> str:
    from trainers.context import Context
    from trainers.interchange import models, processors
    from trainers.interchange.card import card
    from trainers.interchange.older import add_older_names
    from trainers.models import build

    stage = {"id": "export", "spec": {"model": arm.model}}
    model = build(arm.model, Context.local(aside, stage, arm.inputs), image=arm.image, precision=arm.precision)
    if arm.model["family"] == "qwen2_vl":
        processor = processors.qwen2_vl_processor(arm, model.temporal)
        theirs, state = models.qwen2_vl(model, processor), None
    else:
        tower, prefix = models.vision_tower(model.encoder)
        processor = processors.llava_processor(arm, prefix)
        theirs, state = models.llava(model, tower, prefix, processor)
    theirs.generation_config = processors.generation(arm, processor.tokenizer)
    kind = type(theirs).__name__
    theirs.save_pretrained(made, max_shard_size=shard, state_dict=state, save_original_format=state is None)
    processor.save_pretrained(made)
    processor.image_processor.save_pretrained(made)  # preprocessor_config.json, where older readers look
    add_older_names(made)
    (made / "README.md").write_text(card(arm, kind))
    _check(arm, made)
    shutil.rmtree(aside / "work", ignore_errors=True)
    return kind


def _check(arm: Arm, made: Path) -> None:
    """UserError unless transformers reads a question's prompt from the directory as training did, image included."""
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor

    from datasets_ray.images import recipe_from_json
    from datasets_ray.prompts import generation_prompt
    from datasets_ray.tokens import IMAGE_ID, encode, load_tokenizer

    tokenizer = load_tokenizer(arm.model["tokenizer"])
    picture = Image.new("RGB", (50, 40), (90, 120, 30))
    row = {"images": [None], "hint": "", "question": "What is it, a cat or 2 dogs?", "options": ["a cat", "2 dogs\ttwo"]}
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    rendered = generation_prompt(row, arm.model["template"], arm.suffix, bos=bos, eos=eos)
    layout = recipe_from_json(arm.image).layout(*picture.size)
    ours = encode(rendered, tokenizer, [layout.tokens], 1 << 30).ids
    processor: Any = AutoProcessor.from_pretrained(made)
    theirs = processor(text=ask(processor, row, arm.suffix), images=[picture], return_tensors="np")["input_ids"][0]
    ours = np.where(ours == IMAGE_ID, processor.image_token_id, ours)
    if ours.tolist() != theirs.tolist():
        at = next((n for n, (a, b) in enumerate(zip(ours.tolist(), theirs.tolist())) if a != b), min(len(ours), len(theirs)))
        raise UserError(
            "the exported tokenizer reads a prompt otherwise than training did",
            why=f"{len(ours)} tokens here, {len(theirs)} there, first different at {at}", hint="report this tokenizer",
        )  # fmt: skip


def ask(processor: Any, row: dict[str, Any], suffix: str) -> str:
    """A question row as the exported chat template writes it."""
    from datasets_ray.prompts import question_prompt

    words = question_prompt({**row, "images": []}, suffix)
    content = [*({"type": "image"} for _ in row["images"]), {"type": "text", "text": words}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m trainers.export", description="A finished arm as a Hugging Face directory.")
    parser.add_argument("arm", help="RUN_DIR/ARM of a grid run, or the artefact directory of a train stage")
    parser.add_argument("directory", help="what to write: new or empty")
    parser.add_argument("--recipe", help="ImageRecipe as JSON or a file (default: the one the arm is asked with)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of the weights (default: the arm's)")
    parser.add_argument("--shard", default=SHARD, help="largest weights file")
    given = parser.parse_args(arguments)
    arm = open_arm(Path(given.arm), given.recipe, given.precision)
    kind = export(arm, Path(given.directory), given.shard)
    print(f"{arm.name}: {kind} in {given.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
