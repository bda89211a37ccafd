"""Greedy generation for a batch of prompts: a pack in, each prompt's new tokens out.

A prompt leaves the batch with its end token, so that a multiple-choice answer costs the prefill and one step for nearly all of them.
The model offers `start(pack) -> state` with `state.logits` float[S, V] and `state.select(rows)`, and `step(state, ids int64[S])`
(`trainers.models.language`). A prompt's logits don't depend on its neighbours, so batches and order don't change a letter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Generated:
    """One prompt's answer: its tokens without the end token; finished: the end token came within the limit."""

    tokens: list[int]
    finished: bool


@torch.no_grad()
def greedy(model: Any, pack: Any, end: int, max_new_tokens: int) -> list[Generated]:
    """The most probable next token, max_new_tokens times or until `end`, for the S prompts of `pack` (a TensorPack)."""
    assert max_new_tokens >= 1
    state = model.start(pack)
    answers = [Generated([], False) for _ in range(len(pack.lengths))]
    alive = list(range(len(answers)))
    for made in range(1, max_new_tokens + 1):
        ids = state.logits.argmax(-1)
        tokens = ids.tolist()
        going = [at for at, token in enumerate(tokens) if token != end]
        for at, token in enumerate(tokens):
            if token == end:
                answers[alive[at]].finished = True
            else:
                answers[alive[at]].tokens.append(token)
        if not going or made == max_new_tokens:
            break
        if len(going) < len(alive):
            rows = torch.tensor(going, device=ids.device)
            state.select(rows)
            ids, alive = ids[rows], [alive[at] for at in going]
        model.step(state, ids)
    return answers
