"""Which causal language models run on packs, and how that is known.

In: a transformers config, later the model. Out: nothing, or one UserError that names what the family does that packed attention doesn't.

Families in `PROVEN` are compared with transformers in the tests (packed = its own forward pass). Any other one is compared when it is
built: two short texts in one pack against each text alone through the model's own attention. So an unusual architecture runs right or
not at all. Softcaps and other kinds of layers are read from the config, and a sliding window has to reach the attention, which refuses
longer texts: short ones would show neither.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from datasets_ray.errors import UserError
from trainers.models import attention

PROVEN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
SCALES = ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling")
"""Config keys that change logits or attention weights beyond matrix products and softmax."""
TOLERANCE = 1e-3
"""Largest difference of logits, over the largest of them."""


def refuse(config: Any, released: bool) -> None:
    """UserError for a family that packs would compute wrongly. released: its weights come from a hub checkpoint."""
    kind = config.model_type
    for field in SCALES:
        if getattr(config, field, None) not in (None, 1, 1.0):
            why = "packs run plain softmax attention and plain logits only"
            raise UserError(f"{kind} sets {field}", why=why, hint=f"{', '.join(sorted(PROVEN))} and their like")
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others:
        raise UserError(f"{kind} has layers of {', '.join(others)}", why="only softmax attention over whole texts runs on packs")
    if released and _merged(kind):
        why = "its checkpoints keep experts apart that the model keeps in one tensor"
        raise UserError(f"checkpoints of {kind} can't be read part by part", why=why)


def _merged(kind: str) -> bool:
    """Whether transformers merges or splits tensors of this family's checkpoints, not only renames them."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(step, WeightConverter) for step in get_checkpoint_conversion_mapping(kind) or ())


@torch.no_grad()
def verify(llm: Any, kind: str) -> None:
    """UserError unless two texts in one pack, read or decoded, get the logits that transformers gives each alone."""
    from trainers.models.language import CausalLM

    rows = llm.get_input_embeddings().num_embeddings
    texts = [torch.arange(3, 3 + length) * 7 % rows for length in (9, 5)]
    lengths = torch.tensor([len(text) for text in texts])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    pack = SimpleNamespace(ids=torch.cat(texts), lengths=lengths, positions=positions)
    was = llm.training
    llm.eval()
    try:
        model = CausalLM({"llm": llm}).eval()
        packed = model.logits(model.hidden(pack))
        stepped = _decoded(model, texts)
        unseen = _window(llm.config) is not None and not _refuses_long_texts(model, pack)
        llm.set_attn_implementation("eager")
        alone = torch.cat([llm(input_ids=text[None], use_cache=False).logits[0] for text in texts])
    except Exception as error:
        raise _unfit(kind, f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}") from error
    finally:
        llm.set_attn_implementation(attention.NAME)
        llm.train(was)
    if unseen:
        raise _unfit(kind, f"its window of {_window(llm.config)} tokens doesn't reach the attention")
    ends = alone[lengths.cumsum(0) - 1]
    apart = float(torch.cat([packed - alone, stepped - ends]).abs().max() / alone.abs().max())
    if not apart <= TOLERANCE:
        raise _unfit(kind, f"logits are {apart:.2g} of the largest away from transformers' own")


def _decoded(model: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    """float[S, V]: the logits after each text, all but its last token read as a pack, the last one as a decoding step."""
    begun = [text[:-1] for text in texts]
    lengths = torch.tensor([len(text) for text in begun])
    positions = torch.cat([torch.arange(len(text)) for text in begun])
    state = model.start(SimpleNamespace(ids=torch.cat(begun), lengths=lengths, positions=positions))
    return model.step(state, torch.stack([text[-1] for text in texts]))


def _unfit(kind: str, why: str) -> UserError:
    return UserError(f"language models of type {kind!r} don't run on packs", why=why, hint=f"{', '.join(sorted(PROVEN))} are proven")


def _window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if not kinds or "sliding_attention" in kinds else None


def _refuses_long_texts(model: Any, pack: Any) -> bool:
    """Whether a text longer than the window is an error: a layer has told the attention of its window."""
    packing = attention.Segments(pack.lengths.tolist())
    packing.longest = 1 << 40
    try:
        model._run(model.embed(pack)[None], model.positions(pack), packing)
    except UserError:
        return True
    return False


def check(llm: Any) -> None:
    """`verify` for a family that no test covers."""
    if llm.config.model_type not in PROVEN:
        verify(llm, llm.config.model_type)
