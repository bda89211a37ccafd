"""Tokens: from a rendered prompt to ids and labels, by one masking rule for every tokenizer and template.

In: `Rendered` pieces (datasets_ray.prompts) and how many tokens each image takes. Out: ids int64[T] with IMAGE_ID at image positions,
labels int64[T]. The whole string is tokenised in one go and a token is learned when its last character lies in a learned piece, by the
tokenizer's own offsets: no length arithmetic (LLaVA's silently unlearns a row where its arithmetic fails). Control tokens (`</s>`,
`<|im_end|>`, `<image>`) are found where the template put them and nowhere else: in literal pieces their names are ordinary text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
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
    """A fast transformers tokenizer, once per process: a committed name (`tiny-llama`), a directory, or a hub id (`owner/name`, or
    `owner/name@revision` as plans write a checkpoint that is pinned). Runs no remote code."""
    committed = COMMITTED / name
    if (committed / "tokenizer.json").is_file() and "/" not in name:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(committed)
    from transformers import AutoTokenizer

    place = name
    if revision is None and "@" in name and not Path(name).exists():
        place, _, revision = name.rpartition("@")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        known = sorted(p.name for p in COMMITTED.iterdir() if (p / "tokenizer.json").is_file())
        hint = f"a directory, a hub id, or one of {', '.join(known)}"
        raise UserError(f"tokenizer {name!r} can't be loaded", why=str(error).splitlines()[0], hint=hint) from error
    if not tokenizer.is_fast:
        hint = "use a checkpoint with a tokenizer.json"
        raise UserError(f"tokenizer {name!r} has no offsets", why="masking needs a fast tokenizer", hint=hint)
    return tokenizer  # type: ignore[return-value]


CONTROL = re.compile(r"<\|\w+\|>")
"""How control tokens are spelled that a tokenizer may not have marked as special."""
_FIRST, _LAST = 0x100000, 0x10FFFD
"""Unicode's private plane 16: control tokens go through the tokenizer under names from it, so that no text can spell them."""
MOST_NAMED = 1024
_RESERVED = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")


@dataclass(frozen=True)
class _Kit:
    """A tokenizer ready for rendered strings: same ids, but control tokens listen to private names only.

    begin: the ids that go in front. cut: the private name and id of a token that separates and is then taken out.
    """

    backend: Any
    names: Mapping[str, str]
    pattern: re.Pattern[str]
    image: int
    begin: tuple[int, ...]
    cut: tuple[str, int]

    named: dict[str, str] = field(default_factory=dict)
    """Pieces that templates write, under those names: the same few."""

    def _name(self, piece: Piece) -> str:
        if piece.literal:
            return piece.text
        known = self.named.get(piece.text)
        if known is None:
            if len(self.named) >= MOST_NAMED:
                self.named.clear()
            known = self.named[piece.text] = self.pattern.sub(lambda found: self.names[found[0]], piece.text)
        return known

    def written(self, rendered: Rendered) -> str:
        """What the backend is given."""
        return "".join([self._name(piece) for piece in rendered.pieces])

    def spelled(self, rendered: Rendered) -> tuple[str, np.ndarray]:
        """What the backend is given, and bool[characters + 1]: learned (the last entry is for tokens without width at the end)."""
        texts = [self._name(piece) for piece in rendered.pieces]
        learned = [np.full(len(text), piece.learned) for text, piece in zip(texts, rendered.pieces)]
        return "".join(texts), np.concatenate([*learned, [False]])


_KITS: dict[int, tuple[Any, _Kit]] = {}


def _kit(tokenizer: PreTrainedTokenizerFast) -> _Kit:
    known = _KITS.get(id(tokenizer))
    if known is not None:
        return known[1]
    from tokenizers import AddedToken, Tokenizer

    plain = tokenizer.backend_tokenizer
    state = json.loads(plain.to_str())
    controls = [one["content"] for one in state["added_tokens"] if one["special"] or CONTROL.fullmatch(one["content"])]
    names = {text: chr(_FIRST + at) for at, text in enumerate(dict.fromkeys([*controls, IMAGE]))}
    cut = chr(_FIRST + len(names))
    # without a post-processor: BOS is added here, and byte-level ones may trim offsets, on which the masks rest
    backend = Tokenizer.from_str(json.dumps(_renamed(state, names) | {"truncation": None, "padding": None, "post_processor": None}))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (names[IMAGE], cut)])
    begin = tuple(i for i in plain.encode("").ids if i == tokenizer.bos_token_id)[:1]
    pattern = re.compile("|".join(re.escape(text) for text in sorted(names, key=len, reverse=True)))
    made = _Kit(backend, names, pattern, backend.token_to_id(names[IMAGE]), begin, (cut, backend.token_to_id(cut)))  # type: ignore[arg-type]
    _KITS[id(tokenizer)] = (tokenizer, made)  # holding the tokenizer keeps its id() its own
    return made


def _renamed(state: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer.json in which the tokens of `names` are spelled otherwise, with the ids that they had."""
    for token in state["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    model = state["model"]
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): id for text, id in vocabulary.items()}
    elif vocabulary is not None:  # Unigram: pairs of piece and score
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return state


def encode_many(
    rendered: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerFast,
    image_tokens: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    keep_end: bool = False,
    masks: bool = True,
) -> list[Encoded | RowError]:
    """Encodes prompts in one batch. image_tokens: for each prompt the tokens of its images, in order.
    masks: False where nothing is learned (questions): the same ids without the offsets that masks rest on, in less time.

    BOS goes in front where the tokenizer adds one by itself (Llama does, Qwen2 doesn't). A row that is too long is cut at max_tokens
    (`truncated`); keep_end puts its last token back at the cut, as CLIP's text tower needs its end token. RowError instead of a result: the
    images and their placeholders don't match, the cut would fall inside or before an image, or a text has characters of the private plane.
    """
    kit = _kit(tokenizer)
    results: list[Encoded | RowError] = []
    tokenised = _tokenised(kit, rendered) if masks else _unmasked(kit, rendered)
    for one, (ids, learned), counts in zip(rendered, tokenised, image_tokens, strict=True):
        if _RESERVED.search(one.text):
            results.append(RowError("characters of Unicode's private plane 16"))
            continue
        labels = np.where(learned, ids, IGNORE) if masks else learned  # nothing: filled below
        slots = np.flatnonzero(ids == kit.image)
        if len(slots) != len(counts):
            results.append(RowError(f"{len(counts)} images for {len(slots)} placeholders"))
            continue
        if len(slots):
            repeats = np.ones(len(ids), dtype=np.int64)
            repeats[slots] = counts
            ids[slots], labels[slots] = IMAGE_ID, IGNORE
            ids, labels = np.repeat(ids, repeats), np.repeat(labels, repeats) if masks else labels
        if kit.begin:
            ids, labels = np.concatenate([np.array(kit.begin), ids]), np.concatenate([np.array([IGNORE]), labels])
        labels = labels if masks else np.full(len(ids), IGNORE)
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


def _tokenised(kit: _Kit, rendered: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids int64[T], learned bool[T]) of each prompt, images one token each.

    Where a token would begin before an answer and end in it (a byte-level `\\n\\n` from the template's line end and the answer's), the
    string is cut there: a model that answers has the template's tokens behind it, whatever it is about to say.
    """
    spelled = [kit.spelled(one) for one in rendered]
    encodings = kit.backend.encode_batch([text for text, _ in spelled], add_special_tokens=False)
    made = []
    for (text, inside), encoding in zip(spelled, encodings):
        starts = np.flatnonzero(inside[1:] & ~inside[:-1]) + 1
        bounds = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        if ((bounds[:, :1] < starts) & (starts < bounds[:, 1:])).any():
            parted = kit.cut[0].join(text[start:end] for start, end in pairwise([0, *starts, len(text)]))
            inside = np.insert(inside, starts, False)
            encoding = kit.backend.encode(parted, add_special_tokens=False)
            bounds = np.array(encoding.offsets, dtype=np.int64)
        ids = np.array(encoding.ids, dtype=np.int64)
        # a token's last character decides; its place, for a token without width
        learned = inside[np.maximum(bounds[:, 1] - 1, bounds[:, 0])]
        kept = ids != kit.cut[1]
        made.append((ids[kept], learned[kept]))
    return made


def _unmasked(kit: _Kit, rendered: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
    """`_tokenised` of prompts in which nothing is learned. Tokenizers part a text at control tokens before anything else, so what stands
    in front of the first image (the system prompt, mostly) is tokenised once, as often as it occurs."""
    mark = kit.names[IMAGE]
    opened: dict[str, list[int]] = {"": []}
    heads, tails = [], []
    for one in rendered:
        assert not any(piece.learned for piece in one.pieces), "a mask is needed where something is learned"
        head, shown, tail = kit.written(one).partition(mark)
        heads.append(head if shown else "")
        tails.append(mark + tail if shown else head)
    encodings = kit.backend.encode_batch_fast(tails, add_special_tokens=False)
    for head in set(heads) - {""}:
        opened[head] = kit.backend.encode(head + mark, add_special_tokens=False).ids[:-1]
    made = []
    for head, encoding in zip(heads, encodings):
        ids = np.array(opened[head] + encoding.ids, dtype=np.int64)
        made.append((ids, np.zeros(len(ids), dtype=bool)))
    return made


def require(template: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """UserError unless every control token of the template (`<|im_end|>`, ...) is one token of the tokenizer, and it has an end token."""
    layout = get_template(template)
    written = "".join((layout.first, layout.later, layout.user_close, layout.end, layout.image))
    missing = sorted({token for token in CONTROL.findall(written) if tokenizer.backend_tokenizer.token_to_id(token) is None})
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
    ((ids, _),) = _tokenised(_kit(tokenizer), [Rendered((Piece(end_text(template, tokenizer.eos_token or ""), False),))])
    return int(ids[-1])


def decode_pieces(ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Each id's text as it appears in the vocabulary, `<image>` for image positions: for looking at a row, not for scoring."""
    return [IMAGE if i == IMAGE_ID else str(tokenizer.convert_ids_to_tokens(int(i))) for i in ids]


__all__ = [
    "IGNORE",
    "IMAGE_ID",
    "Encoded",
    "Piece",
    "RowError",
    "decode_pieces",
    "encode",
    "encode_many",
    "end_id",
    "load_tokenizer",
    "require",
]
