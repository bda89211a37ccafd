"""Named sets of defaults: what another codebase does where its users say nothing. A study that states a key itself wins.

Facts and where they were read: LLaVA-1.5's released scripts (scripts/v1_5/pretrain.sh, finetune.sh, zero2.json, zero3.json) and code
(llava/train/train.py, llava_trainer.py, conversation.py, model/llava_arch.py; commit c121f04). `experiments/TEMPLATES.md` tells each
point of `DIFFERS` at length; tests/datasets_ray/test_llava_compatibility.py holds what is equal and what differs.
"""

from __future__ import annotations

from typing import Any

from datasets_ray.yamlfile import Node

SETS: dict[str, dict[str, Any]] = {
    "llava-1.5": {
        "recipe": {
            "connector": {"builder": "mlp", "depth": 2},
            "pretrain": {
                "template": "plain", "fit": "crop", "order": "shuffle", "clip": None,
                "schedule": "cosine", "warmup": 0.03, "max_tokens": 2048,
                "optimizer": {"name": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
            },
            "finetune": {
                "fit": "pad", "order": "modality_grouped", "clip": None,
                "schedule": "cosine", "warmup": 0.03, "max_tokens": 2048,
                "optimizer": {"name": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
            },
        },
    }
}  # fmt: skip
DIFFERS = {
    "llava-1.5": [
        "the loss is a sum over valid tokens divided by their number in the whole step; LLaVA averages per micro-batch means",
        "labels come from token offsets; LLaVA's length arithmetic unlearns samples where it doesn't add up (`tokenization mismatch`)",
        "an empty answer drops its row, counted; LLaVA unlearns the whole row, with a printed warning only",
        "`</s>` in somebody's words is ordinary text; LLaVA's tokenizer ends the answer there, and its mask no longer adds up",
        "several images in a turn keep their places at its front; LLaVA keeps one mark for them all",
        "a row whose image lies beyond max_tokens is dropped and counted; LLaVA cuts through the image's features",
        "text-only rows never run the encoder; LLaVA sends a zero image through it",
        "16-bit images are scaled to 8 bits, LLaVA clamps them; images of aspect above 200 are dropped and counted",
        "modality-grouped steps are drawn as LLaVA's from another permutation; its order inside a step, by length, has no effect here",
        "an epoch's last step holds the rows that are left; LLaVA's launcher fills it up with the first rows again",
        "samples are packed inside a step with block-diagonal attention; LLaVA pads",
    ]
}
"""What still differs from the named code; printed with the plan."""


def tree(name: str) -> Node:
    """The defaults as a tree that a study's own keys are laid over."""
    return _node(SETS[name], f"compatibility {name}")


def _node(value: Any, file: str) -> Node:
    if isinstance(value, dict):
        return Node({key: _node(item, file) for key, item in value.items()}, file, None)
    if isinstance(value, list):
        return Node([_node(item, file) for item in value], file, None)
    return Node(value, file, None)
