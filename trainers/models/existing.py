"""Family `existing`: a released vision-language model as transformers builds it, with its own processor.

In: `{"family": "existing", "prompts": rule of trainers.families, "remote_code": bool, "parts": {"model": {"builder": "transformers",
"config": {}, "weights": {"checkpoint", "revision"}}}}`. Out: an `Existing`, and `load_processor(spec)`. Weights are read as safetensors,
a tensor that a checkpoint lacks is an error; a checkpoint's own code runs only with `remote_code`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from datasets_ray.errors import UserError
from trainers import families

LOADED = "image_text_to_text", "causal_lm"
"""How transformers' auto classes are called in a family's `loads`."""
Spec = dict[str, Any]


def spec_of(checkpoint: str, prompts: str | None = None, revision: str | None = None, remote_code: bool = False) -> Spec:
    """ModelSpec of a checkpoint: a directory or a hub id. prompts: its family; None: by the architecture that its config.json names.

    Raises UserError for an architecture that no family has, and for a family that can't be asked.
    """
    if prompts is None:
        config = Path(checkpoint) / "config.json"
        kind = json.loads(config.read_text()).get("model_type") if config.is_file() else None
        prompts = families.of_model(str(kind))
        if prompts is None:
            why = f"no family of prompts is for {kind!r}" if kind else "its config.json isn't here to say so"
            raise UserError(f"how is {checkpoint} asked?", why=why, hint=f"--prompts {', '.join(families.names())}")
    refused = families.refusal(prompts, remote_code)
    if refused is not None:
        raise UserError(f"{checkpoint} can't be asked as {prompts!r}", why=refused[0], hint=refused[1])
    part = {"builder": "transformers", "config": {}, "weights": {"checkpoint": checkpoint, "revision": revision}}
    return {"family": "existing", "prompts": families.asked(prompts), "remote_code": remote_code, "parts": {"model": part}}


class Existing(nn.Module):
    """A model as transformers builds it. Parts: model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"model": model})

    @classmethod
    def build(cls, spec: Spec, source: Any) -> Existing:
        """Loads the checkpoint; UserError where it has no weights for a part of the model, which would be random."""
        import transformers

        loads = dict(zip(LOADED, (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM)))[spec["prompts"]["loads"]]
        model, told = _pretrained(spec, loads, dtype="auto", use_safetensors=True, output_loading_info=True)
        missing = sorted(told["missing_keys"])
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise UserError(
                f"{weights_of(spec)['checkpoint']} has no weights for {', '.join(missing[:3])}{more}", why="they would be random",
                hint="is it the whole checkpoint, of this architecture?",
            )  # fmt: skip
        return cls(model)

    def activation_checkpointing(self, on: bool) -> None:
        """Nothing is learned here, so nothing is recomputed."""


def weights_of(spec: Spec) -> dict[str, Any]:
    return spec["parts"]["model"]["weights"]


def _pretrained(spec: Spec, auto: Any, **more: Any) -> Any:
    """`auto.from_pretrained` of the spec's checkpoint, its mistakes as one UserError."""
    name, revision = weights_of(spec)["checkpoint"], weights_of(spec).get("revision")
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"no directory {name!r}", why="not a hub id either", hint="a local directory or owner/name")
    try:
        return auto.from_pretrained(name, revision=revision, trust_remote_code=bool(spec["remote_code"]), **more)
    except (OSError, ValueError, ImportError, KeyError, AttributeError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        hint = "a local directory that save_pretrained wrote, or fetch it first: huggingface-cli download"
        if "trust_remote_code" in str(error):
            lines, hint = ["it brings its own code"], "read that code, pin its `revision`, then say `remote_code: true`"
        raise UserError(f"{name} can't be loaded by transformers", why=lines[0], hint=hint) from None


def load_processor(spec: Spec) -> Any:
    """The checkpoint's processor, which pads on the left. UserError where it has none for images and text."""
    import transformers

    processor = _pretrained(spec, transformers.AutoProcessor)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise UserError(f"{weights_of(spec)['checkpoint']} has no processor for images and text", hint="is processor_config.json there?")
    if not spec["prompts"]["chat"] and not getattr(processor, "chat_template", None):
        chats = [name for name in families.names() if families.family(name)["chat"]]
        raise UserError(
            f"{weights_of(spec)['checkpoint']} has no chat template", why=f"the prompts {spec['prompts']['name']!r} take the model's own",
            hint=f"a family with one: {', '.join(chats)}",
        )  # fmt: skip
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor
