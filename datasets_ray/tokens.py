"""Tokens: from a rendered prompt to ids and labels, by one masking rule for every tokenizer and template.

In: `Rendered` pieces (datasets_ray.prompts) and how many tokens each image takes. Out: ids int64[T] with IMAGE_ID at image positions,
labels int64[T]. The whole string is tokenised in one go and a token is learned when its last character lies in a learned piece, by the
tokenizer's own offsets: no length arithmetic (LLaVA's silently unlearns a row where its arithmetic fails).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasets_ray.errors import UserError
from datasets_ray.prompts import Piece, Rendered, RowError, end_text, get_template
from datasets_ray.rows import IMAGE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_ID = -200
"""Stands in `ids` where an image's features go (LLaVA's number); never in a vocabulary."""
IGNORE = -100
"""The label of a position that is not learned (PyTorch's cross entropy skips it)."""
COMMITTED = Path(__file__).parent / "tokenizers"

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are many already, and a forked thread pool deadlocks


@dataclass(frozen=True)
class Encoded:
    """ids int64[T]; labels int64[T], IGNORE where not learned, aligned with ids (the model shifts); image_slots int64[K].

    image_slots are the positions with ids == IMAGE_ID, in image order. The first label is always IGNORE: nothing precedes it, so in a
    pack no token is predicted from another sample.
    """

    ids: np.ndarray
    labels: np.ndarray
    image_slots: np.ndarray
    truncated: bool


@lru_cache(maxsize=16)
def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerFast:
    """A fast transformers tokenizer, once per process: a committed name (`tiny-llama`), a directory or a hub id. Runs no remote code."""
    committed = COMMITTED / name
    if (committed / "tokenizer.json").is_file() and "/" not in name:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(committed)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        known = sorted(p.name for p in COMMITTED.iterdir() if (p / "tokenizer.json").is_file())
        hint = f"a directory, a hub id, or one of {', '.join(known)}"
        raise UserError(f"tokenizer {name!r} can't be loaded", why=str(error).splitlines()[0], hint=hint) from error
    if not tokenizer.is_fast:
        hint = "use a checkpoint with a tokenizer.json"
        raise UserError(f"tokenizer {name!r} has no offsets", why="masking needs a fast tokenizer", hint=hint)
    return tokenizer  # type: ignore[return-value]


@dataclass(frozen=True)
class _Kit:
    """A tokenizer ready for rendered strings: its backend with `<image>` as one token, and the ids that go in front."""

    backend: Any
    image: int
    begin: tuple[int, ...]


_KITS: dict[int, tuple[Any, _Kit]] = {}


def _kit(tokenizer: PreTrainedTokenizerFast) -> _Kit:
    known = _KITS.get(id(tokenizer))
    if known is not None:
        return known[1]
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    begin = tuple(i for i in backend.encode("").ids if i == tokenizer.bos_token_id)[:1]
    backend.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    kit = _Kit(backend, backend.token_to_id(IMAGE), begin)  # type: ignore[arg-type]
    _KITS[id(tokenizer)] = (tokenizer, kit)  # holding the tokenizer keeps its id() its own
    return kit


def encode_many(
    rendered: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerFast,
    image_tokens: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    keep_end: bool = False,
) -> list[Encoded | RowError]:
    """Encodes prompts in one batch. image_tokens: for each prompt the tokens of its images, in order.

    BOS goes in front where the tokenizer adds one by itself (Llama does, Qwen2 doesn't). A row that is too long is cut at max_tokens
    (`truncated`); keep_end puts its last token back at the cut, as CLIP's text tower needs its end token. RowError instead of a result: the
    images and their placeholders don't match, or the cut would fall inside or before an image.
    """
    kit = _kit(tokenizer)
    texts = [one.text for one in rendered]
    encodings = kit.backend.encode_batch(texts, add_special_tokens=False)
    results: list[Encoded | RowError] = []
    for one, text, encoding, counts in zip(rendered, texts, encodings, image_tokens, strict=True):
        ids = np.array(encoding.ids, dtype=np.int64)
        labels = np.where(_learned(one, len(text), encoding.offsets), ids, IGNORE)
        slots = np.flatnonzero(ids == kit.image)
        if len(slots) != len(counts):
            results.append(RowError(f"{len(counts)} images for {len(slots)} placeholders"))
            continue
        if len(slots):
            repeats = np.ones(len(ids), dtype=np.int64)
            repeats[slots] = counts
            ids[slots], labels[slots] = IMAGE_ID, IGNORE
            ids, labels = np.repeat(ids, repeats), np.repeat(labels, repeats)
        if kit.begin:
            ids, labels = np.concatenate([np.array(kit.begin), ids]), np.concatenate([np.array([IGNORE]), labels])
        slots = np.flatnonzero(ids == IMAGE_ID)
        truncated = len(ids) > max_tokens
        if truncated:
            if len(slots) and slots[-1] >= max_tokens:
                results.append(RowError("an image lies beyond max_tokens"))
                continue
            last = ids[-1]
            ids, labels = ids[:max_tokens].copy(), labels[:max_tokens].copy()
            if keep_end:
                ids[-1] = last
        labels[:1] = IGNORE
        results.append(Encoded(ids, labels, slots, truncated))
    return results


def encode(rendered: Rendered, tokenizer: PreTrainedTokenizerFast, image_tokens: Sequence[int], max_tokens: int) -> Encoded:
    """One prompt; raises RowError where `encode_many` returns it."""
    result = encode_many([rendered], tokenizer, [image_tokens], max_tokens)[0]
    if isinstance(result, RowError):
        raise result
    return result


def _learned(rendered: Rendered, characters: int, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """bool[T]: the token's last character (its place, for a token without width) lies in a learned piece."""
    spans = rendered.spans()
    if not spans or not offsets:
        return np.zeros(len(offsets), dtype=bool)
    inside = np.zeros(characters + 1, dtype=bool)
    for start, end in spans:
        inside[start:end] = True
    bounds = np.array(offsets, dtype=np.int64)
    return inside[np.maximum(bounds[:, 1] - 1, bounds[:, 0])]


def require(template: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """UserError unless every control token of the template (`<|im_end|>`, ...) is one token of the tokenizer, and it has an end token."""
    layout = get_template(template)
    written = "".join((layout.first, layout.later, layout.user_close, layout.end, layout.image))
    missing = sorted({token for token in re.findall(r"<\|\w+\|>", written) if tokenizer.backend_tokenizer.token_to_id(token) is None})
    if missing:
        raise UserError(
            f"template {template!r} needs {', '.join(missing)}",
            why=f"tokenizer {tokenizer.name_or_path!r} doesn't have them as tokens",
            hint="use the template that the language model was trained with",
        )
    if "{eos}" in layout.end and tokenizer.eos_token is None:
        raise UserError(f"template {template!r} needs an end token", why=f"tokenizer {tokenizer.name_or_path!r} has none")


def end_id(template: str, tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that finishes an answer: generation stops at it."""
    return int(_kit(tokenizer).backend.encode(end_text(template, tokenizer.eos_token or ""), add_special_tokens=False).ids[-1])


def decode_pieces(ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Each id's text as it appears in the vocabulary, `<image>` for image positions: for looking at a row, not for scoring."""
    return [IMAGE if i == IMAGE_ID else str(tokenizer.convert_ids_to_tokens(int(i))) for i in ids]


__all__ = [
    "IGNORE", "IMAGE_ID", "Encoded", "Piece", "RowError", "decode_pieces", "encode", "encode_many", "end_id", "load_tokenizer", "require",
]
