"""Named sets of defaults: what another codebase does where its users say nothing. A study that states a key itself wins.

Facts and where they were read: LLaVA-1.5's released scripts (scripts/v1_5/pretrain.sh, finetune.sh, zero2.json, zero3.json).
"""

from __future__ import annotations

from typing import Any

from grid.yamlfile import Node

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
        "labels come from token offsets; LLaVA's length arithmetic drops samples whose tokenisation doesn't add up",
        "text-only rows never run the encoder; LLaVA sends a zero image through it",
        "modality-grouped steps keep their seeded order; LLaVA also sorts by length inside a megabatch",
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
