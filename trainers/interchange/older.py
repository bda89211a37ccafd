"""What readers of before transformers 5 look for in an exported directory, beside what transformers 5 writes.

In: a directory that transformers has written. Out: the same, with rotary settings and the tokenizer's class under their older names as
well. Transformers 5 reads both spellings; without the older one, transformers 4 and what builds on it would silently turn by another
angle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def add_older_names(directory: Path) -> None:
    """Edits config.json and tokenizer_config.json in place."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    _rotary(config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    path = directory / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # a class of transformers 5
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("is_local", "local_files_only"):  # how it was loaded here
        tokenizer.pop(key, None)
    tokenizer["padding_side"] = "left"  # batches of prompts are padded in front; transformers doesn't write it down
    path.write_text(json.dumps(tokenizer, indent=2, sort_keys=True) + "\n")


def _rotary(config: dict[str, Any]) -> None:
    """`rope_parameters` of the language model, as `rope_theta` and `rope_scaling`."""
    text = config.get("text_config", config)
    rope = text.get("rope_parameters")
    if not rope or "rope_theta" not in rope:
        return
    text["rope_theta"] = rope["rope_theta"]
    if "mrope_section" in rope:
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    elif rope.get("rope_type", "default") != "default":
        text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
