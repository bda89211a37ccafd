"""Likelihood: how probable a model finds each option of a question it has read, without generating anything.

Every option is a continuation of the prompt as the assistant would say it in the model's template: its letter (`letter`) or its own words
(`text`). All continuations of a batch run in one pass over the keys and values of their prompts, each seeing its prompt and itself.

    raw         Σ log p(token), over the answer's tokens and the template's end of an answer (`</s>`, `<|im_end|>`)
    per_token   raw / number of those tokens
    per_byte    raw / UTF-8 bytes of what is said, without the template's space before and end after it

The end token is in all three: without it an option that begins another one could never lose to it. Peers differ (lm-evaluation-harness
leaves it out and divides by characters; lmms-eval compares mean losses over template and end tokens). A score's value is `text_raw`,
the others stand beside it (`trainers.score`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets_ray.answers import LETTERS
from datasets_ray.prompts import Piece, Rendered, get_template
from datasets_ray.tokens import IGNORE, RowError, encode_many
from trainers.batch import TensorPack

FORMS = ("letter", "text")
"""What an option is taken to say."""
NORMS = ("raw", "per_token", "per_byte")
PICKS = tuple(f"{form}_{norm}" for form in FORMS for norm in NORMS)
MOST_LOGITS = 1 << 26
"""Logits held at once."""
MOST_TOKENS = 256
"""Tokens of one prompt's continuations in one pass; more take more passes, so that the mask stays small."""


@dataclass(frozen=True)
class Scored:
    """One form of a question's options: sums float[K] of log-probabilities, tokens int[K] in each sum, said: the K options' words."""

    sums: list[float]
    tokens: list[int]
    said: list[str]

    def lengths(self, norm: str) -> list[int]:
        """What each sum is divided by."""
        if norm == "raw":
            return [1] * len(self.sums)
        return self.tokens if norm == "per_token" else [max(1, len(said.encode())) for said in self.said]

    def values(self, norm: str) -> list[float]:
        return [value / length for value, length in zip(self.sums, self.lengths(norm))]

    def pick(self, norm: str) -> str | None:
        """The letter of the most probable option, the first of equal ones; None without options or where a sum is no number."""
        values = np.array(self.values(norm))
        return LETTERS[int(values.argmax())] if len(values) and np.isfinite(values).all() else None

    def close(self, threshold: float) -> bool:
        """Whether rounding could change a pick, if no two sums move by more than `threshold` against each other."""
        for norm in NORMS:
            values, share = np.array(self.values(norm)), 1 / np.array(self.lengths(norm))
            if len(values) > 1 and np.isfinite(values).all():
                best = int(values.argmax())
                near = values[best] - values <= threshold / 2 * (share[best] + share)
                if near.sum() > 1:
                    return True
        return False


class Sayings:
    """What the assistant would say, as the tokens that follow a prompt: `of(["A", "Beagle"])` → a tuple of ids each, with the end.

    Prompts end where an answer begins, and the tokenizer is cut there (`datasets_ray.tokens`), so a continuation's tokens are the same
    after every prompt: each text is tokenised once.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer, self.template = tokenizer, get_template(template)
        self._known: dict[str, tuple[int, ...]] = {}

    def of(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Raises RowError where a text can't be tokenised."""
        fresh = list(dict.fromkeys(text for text in texts if text not in self._known))
        rendered = [self._rendered(text) for text in fresh]
        for text, one in zip(fresh, encode_many(rendered, self.tokenizer, [()] * len(fresh), 1 << 30)):
            if isinstance(one, RowError):
                raise one
            self._known[text] = tuple(one.ids[one.labels != IGNORE].tolist())
        return [self._known[text] for text in texts]

    def _rendered(self, text: str) -> Rendered:
        layout = self.template
        # a letter in front, so that the prompt's end isn't the beginning of a string, which some tokenizers treat otherwise
        before = Piece(f"x{layout.user_close}", False)
        end = Piece(layout.end.replace("{eos}", self.tokenizer.eos_token or ""), True)
        pieces = (before, Piece(layout.lead, True), Piece(text, True, literal=True), end)
        return Rendered(tuple(piece for piece in pieces if piece.text))


@torch.no_grad()
def continued(model: Any, state: Any, said: Sequence[Sequence[tuple[int, ...]]]) -> list[list[float]]:
    """Σ log p of each continuation said[s][k] (at least one id) after prompt s of `state`, which stays as it is."""
    device = state.logits.device
    sums = [[0.0] * len(row) for row in said]
    pairs = [(s, k) for s, row in enumerate(said) for k in range(len(row))]
    if not pairs:
        return sums
    first = torch.log_softmax(state.logits.float(), -1)
    rows, tokens = ([s for s, _ in pairs], [said[s][k][0] for s, k in pairs])
    for (s, k), value in zip(pairs, first[torch.tensor(rows, device=device), torch.tensor(tokens, device=device)].tolist()):
        sums[s][k] = value
    for batch in _passes(said):
        pack, targets = _pack([said[s][k] for s, k in batch], device)
        hidden = model.branches(state, [s for s, _ in batch], pack)
        segment = torch.arange(len(batch)).repeat_interleave(pack.lengths).to(device)
        total = torch.zeros(len(batch), dtype=torch.float64, device=device)
        total.index_add_(0, segment, _log_probabilities(model, hidden, targets))
        for (s, k), value in zip(batch, total.tolist()):
            sums[s][k] += value
    return sums


def _passes(said: Sequence[Sequence[tuple[int, ...]]]) -> list[list[tuple[int, int]]]:
    """Continuations of several tokens as (prompt, which), at most MOST_TOKENS a prompt in each pass."""
    passes: list[list[tuple[int, int]]] = []
    for s, row in enumerate(said):
        number, used = 0, 0
        for k, ids in enumerate(row):
            if len(ids) < 2:
                continue
            if used and used + len(ids) > MOST_TOKENS:
                number, used = number + 1, 0
            used += len(ids)
            while len(passes) <= number:
                passes.append([])
            passes[number].append((s, k))
    return passes


def _pack(continuations: Sequence[tuple[int, ...]], device: torch.device) -> tuple[TensorPack, Tensor]:
    """(all tokens but each one's last, the tokens that follow them int64[T])."""
    lengths = torch.tensor([len(ids) - 1 for ids in continuations])
    positions = torch.cat([torch.arange(len(ids) - 1) for ids in continuations])
    pack = TensorPack(
        segments=len(lengths), sample=torch.arange(len(lengths)), lengths=lengths,
        ids=torch.tensor([token for ids in continuations for token in ids[:-1]], device=device),
        positions=positions.to(device), image_slots=torch.zeros(0, dtype=torch.long, device=device),
    )  # fmt: skip
    return pack, torch.tensor([token for ids in continuations for token in ids[1:]], device=device)


def _log_probabilities(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden float[T, D], targets int64[T] → float64[T], a part of the vocabulary's logits at a time."""
    size = max(1, MOST_LOGITS // model.lm_head.weight.shape[0])
    parts = [
        torch.log_softmax(model.logits(states).float(), -1).gather(1, wanted[:, None])[:, 0].double()
        for states, wanted in zip(hidden.split(size), targets.split(size))
    ]
    return torch.cat(parts)
