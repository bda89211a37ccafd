"""Next-token prediction: −Σ log p(next token) over the learned positions of the step, over their global count.

In: a stream of packed tokens. Logits exist only at learned positions, a chunk of them at a time: neither images, prompts nor
padding ever meet the vocabulary. LLaVA-1.5 averages within a micro-batch instead, which weighs short answers more the smaller
the micro-batch is; the global count makes the loss a property of the step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from datasets_ray.errors import UserError
from trainers import switches
from trainers.batch import NOT_LEARNED, TensorBatch, TensorPack
from trainers.objectives.base import Output

CHUNK_LOGITS = 1 << 26
"""Most logits held at once (0.25 GiB in fp32; a chunk's gradient takes as much again)."""


def token_loss_sum(hidden: Tensor, head: nn.Module, learned: Tensor, targets: Tensor, chunks: int = 1) -> Tensor:
    """−Σ log p(targets) in fp32, float[].

    hidden: float[T, D] last hidden states; head: D → vocabulary; learned: int64[L] positions in T; targets: int64[L].
    Several chunks are recomputed in the backward pass instead of kept (one more product with the head).
    """

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(states).float(), wanted, reduction="sum")

    states = hidden.index_select(0, learned)
    if chunks == 1:
        return part(states, targets)
    # ZeRO-3 frees weights between the passes, so the shapes kept by the first pass can't be compared with the second's
    again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
    pairs = zip(states.tensor_split(chunks), targets.tensor_split(chunks))
    return torch.stack([checkpoint(part, s, t, **again) for s, t in pairs]).sum()


class NextToken:
    """`{"name": "next_token"}`"""

    gathers: tuple[str, ...] = ()

    def __init__(self, stream: str = "text", most_logits: int = CHUNK_LOGITS) -> None:
        if most_logits < 1:
            raise UserError(f"most_logits is {most_logits}", why="it is the largest number of logits held at once", hint="leave it out")
        self.stream, self.most = stream, most_logits
        self.streams: dict[str, str | dict[str, str]] = {stream: "conversation"}

    def forward(self, model: Any, batch: TensorBatch) -> Output:
        pack = batch.streams[self.stream]
        assert pack.learned is not None, f"stream {self.stream!r} holds no tokens"
        if not switches.on("logits"):
            return Output(self._plain_loss_sum(model, pack, model.hidden(pack)))
        states = model.hidden(pack, pack.learned)
        return Output(self._loss_sum(model, pack, states, torch.arange(len(states), device=states.device)))

    def loss_sum(self, model: Any, pack: TensorPack, hidden: Tensor) -> Tensor:
        """The same over the hidden states float[T, D] of all positions, which another objective has at hand."""
        assert pack.learned is not None, f"stream {self.stream!r} holds no tokens"
        if not switches.on("logits"):
            return self._plain_loss_sum(model, pack, hidden)
        return self._loss_sum(model, pack, hidden, pack.learned)

    def _plain_loss_sum(self, model: Any, pack: TensorPack, hidden: Tensor) -> Tensor:
        """The same from logits at all positions."""
        assert pack.ids is not None and pack.targets is not None and pack.learned is not None
        wanted = torch.full_like(pack.ids, NOT_LEARNED).index_copy_(0, pack.learned, pack.targets)
        return F.cross_entropy(model.lm_head(hidden).float(), wanted, ignore_index=NOT_LEARNED, reduction="sum")

    def _loss_sum(self, model: Any, pack: TensorPack, hidden: Tensor, learned: Tensor) -> Tensor:
        """learned: where in `hidden` the learned positions are."""
        vocabulary = getattr(model.lm_head, "out_features", None) or int(model.lm_head.weight.shape[0])
        assert pack.targets is not None
        # as many chunks on every rank: under ZeRO-3 each one gathers the head from all of them
        chunks = max(1, -(-pack.most_learned * vocabulary // self.most))
        return token_loss_sum(hidden, model.lm_head, learned, pack.targets, chunks)

    def normaliser(self, batch: TensorBatch) -> float:
        return float(max(1, batch.valid_tokens))

    def gathered(self, representations: dict[str, Tensor]) -> Tensor:
        raise AssertionError("next_token gathers nothing")
