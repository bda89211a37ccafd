"""Greedy generation for a batch of prompts that a model has read: its state in, each prompt's new tokens out.

A prompt leaves the batch with its end token, so that a multiple-choice answer costs the prefill and one step for nearly all of them.
The model offers `start(pack) -> state` with `state.logits` float[S, V] and `state.select(rows)`, and `step(state, ids int64[S])`
(`trainers.models.language`). Each answer says how close its closest decision was, so that rounding can't change one unnoticed
(`trainers.first_token`).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Generated:
    """One prompt's answer: its tokens without the end token; finished: the end token came within the limit."""

    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    gap: float = math.inf
    """The smallest difference between the two largest logits where a token was chosen."""
    logits: list[Tensor] = field(default_factory=list)
    """float[V] at each choice, for prompts that are watched."""


@torch.no_grad()
def greedy(model: Any, state: Any, end: int, max_new_tokens: int, watch: Collection[int] = ()) -> list[Generated]:
    """The most probable next token, max_new_tokens times or until `end`, for each prompt of `state`, which is used up."""
    assert max_new_tokens >= 1
    answers = [Generated() for _ in range(len(state))]
    alive = list(range(len(answers)))
    for made in range(1, max_new_tokens + 1):
        two, places = state.logits.topk(2, -1)
        two, ids = two.float(), places[:, 0]
        apart = two[:, 0] - two[:, 1]
        if not bool((apart > 0).all()):  # of equal ones the first, which topk doesn't promise
            ids = state.logits.argmax(-1)
        tokens, gaps = ids.tolist(), apart.tolist()
        for at, (prompt, token) in enumerate(zip(alive, tokens)):
            one = answers[prompt]
            one.gap = min(one.gap, gaps[at])
            if prompt in watch:
                one.logits.append(state.logits[at].float())
            if token == end:
                one.finished = True
            else:
                one.tokens.append(token)
        going = [at for at, token in enumerate(tokens) if token != end]
        if not going or made == max_new_tokens:
            break
        if len(going) < len(alive):
            rows = torch.tensor(going, device=ids.device)
            state.select(rows)
            ids, alive = ids[rows], [alive[at] for at in going]
        model.step(state, ids)
    return answers
