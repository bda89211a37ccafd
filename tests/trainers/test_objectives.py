"""Objectives: chunks and cached gradients are the plain thing, in value and gradient; names find classes; the step knows neither."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trainers.step
import trainers.train
from datasets_ray.errors import UserError
from datasets_ray.packing import Batch, pack
from datasets_ray.tokens import IGNORE
from tests.trainers import training_kit as kit
from trainers import models
from trainers.batch import learned_positions, to_device
from trainers.objectives import OBJECTIVES, load_objective
from trainers.objectives.contrastive import Contrastive, softmax_loss
from trainers.objectives.next_token import NextToken, token_loss_sum
from trainers.step import train_step


@pytest.mark.parametrize("chunks", [1, 2, 5, 23, 30])
def test_chunked_loss_is_the_plain_one(chunks):
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 50, bias=False), torch.randn(40, 16, requires_grad=True)
    learned, targets = torch.randperm(40)[:23], torch.randint(0, 50, (23,))
    plain = F.cross_entropy(head(hidden)[learned], targets, reduction="sum")
    wanted = torch.autograd.grad(plain, [hidden, head.weight])
    chunked = token_loss_sum(hidden, head, learned, targets, chunks)
    got = torch.autograd.grad(chunked, [hidden, head.weight])
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nothing_to_learn_still_gives_zero_gradients():
    head, hidden = nn.Linear(4, 8), torch.randn(5, 4, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = token_loss_sum(hidden, head, nothing, nothing)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.abs().sum() == 0 and head.weight.grad.abs().sum() == 0


def test_learned_positions_stay_within_segments():
    labels = np.array([IGNORE, 5, IGNORE, 7, 9, 3, IGNORE, 4])  # 9 opens the second segment: nobody predicts it
    at, targets = learned_positions(labels, np.array([4, 4]))
    assert at.tolist() == [0, 2, 4, 6] and targets.tolist() == [5, 7, 3, 4]


def test_vocabulary_meets_learned_positions_only(tmp_path):
    model, seen = kit.vlm(tmp_path), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    batch = to_device(kit.micro_batches(kit.steps_of_samples(1, 6)[0], ["text"], 10_000, 0, 1)[0])
    NextToken().forward(model, batch)
    assert sum(seen) == batch.learned_tokens == batch.valid_tokens < batch.tokens


def test_softmax_loss_is_clips():
    torch.manual_seed(1)
    image, text = (F.normalize(torch.randn(7, 5), dim=-1) for _ in range(2))
    logits = 12.5 * image @ text.T
    both = (-logits.log_softmax(1).diag().mean() - logits.log_softmax(0).diag().mean()) / 2
    torch.testing.assert_close(softmax_loss(image, text, torch.full((7,), 12.5)), both)


def clip_batches(samples: int, capacity: int):
    """Image and text streams of one step, in micro-batches of about `capacity` tokens."""
    from dataclasses import replace

    from datasets_ray.packing import assign

    rng = np.random.default_rng(3)
    rows = [row for row in kit.steps_of_samples(1, 3 * samples)[0] if row["text"].images][:samples]
    empty = np.zeros(0, dtype=np.int64)
    images = [replace(row["text"], ids=empty, labels=empty, cost=4) for row in rows]
    words = [np.append(row["caption"].ids, 2) for row in rows]
    texts = [replace(row["caption"], ids=ids, labels=np.full(len(ids), IGNORE)) for row, ids in zip(rows, words)]
    order = [sorted(rng.permutation(members).tolist()) for members in assign([4 + len(t.ids) for t in texts], capacity, 1)[0]]
    size = (kit.SIZE, kit.SIZE)
    return [
        Batch({"image": pack([images[i] for i in m], m, size), "text": pack([texts[i] for i in m], m, size)}, samples, 0) for m in order
    ]


def clip(tmp: Path):
    from trainers.context import Context

    part = {"builder": "open_clip", "config": kit.CLIP, "weights": {"fresh": 5}}
    spec = {"family": "clip", "tokenizer": "tiny-llama", "parts": {"encoder": part}}
    model = models.build(spec, Context.local(tmp, {"id": "train-clip", "spec": {}}))
    models.train_parts(model, {"encoder"})
    return model


class Recorder:
    """Stands in for the engine: accumulates plain gradients and takes no step."""

    device, world = "cpu", 1

    def __init__(self, model, objective):
        self.model, self.objective = model, objective

    def forward(self, batch):
        output = self.objective.forward(self.model, batch)
        return output.loss_sum, output.representations

    def backward(self, loss, last):
        loss.backward()

    def step(self, learning_rates):
        pass

    def sum_over_ranks(self, tensor):
        return tensor


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_cached_gradients_of_the_contrastive_loss_are_direct_ones(tmp_path):
    model, objective = clip(tmp_path), Contrastive()
    whole = to_device(clip_batches(12, 10_000)[0])
    output = objective.forward(model, whole)
    direct = objective.gathered(output.representations)
    direct.backward()
    wanted = gradients(model)
    assert any("logit_scale" in name for name in wanted)
    for capacity in (10_000, 40, 1):
        model.zero_grad()
        batches = [to_device(batch) for batch in clip_batches(12, capacity)]
        assert (len(batches) == 1) == (capacity == 10_000)
        share = train_step(Recorder(model, objective), objective, batches, {})
        torch.testing.assert_close(share.total, direct.detach(), rtol=1e-5, atol=1e-6)
        got = gradients(model)
        assert set(got) == set(wanted)
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", [{"name": "next_token"}, kit.TWO_STREAMS], ids=["one stream", "two streams"])
def test_micro_batches_dont_change_the_gradient(tmp_path, name):
    model, objective = kit.vlm(tmp_path), load_objective(name)
    models.train_parts(model, {"connector", "llm"})
    rows, found = kit.steps_of_samples(1, 10)[0], []
    for capacity in (10_000, 60, 1):
        model.zero_grad()
        batches = [to_device(batch) for batch in kit.micro_batches(rows, objective.streams, capacity, 0, 1)]
        share = train_step(Recorder(model, objective), objective, batches, {})
        found.append((len(batches), share.total, gradients(model)))
    assert [count for count, *_ in found][0] == 1 and found[1][0] > 1 and found[2][0] == 10
    for _, loss, got in found[1:]:
        torch.testing.assert_close(loss, found[0][1], rtol=1e-5, atol=1e-6)
        for key, wanted in found[0][2].items():
            torch.testing.assert_close(got[key], wanted, rtol=1e-4, atol=1e-6, msg=key)


def test_names_find_objectives():
    assert isinstance(load_objective({"name": "next_token"}), NextToken)
    assert isinstance(load_objective({"name": "tests.trainers.training_kit:TwoStreams", "weight": 0.1}), kit.TwoStreams)
    mistakes = {
        "next_token": {"name": "next_tokens"}, "can't be loaded": {"name": "trainers.step:Nothing"},
        "margin": {"name": "contrastive", "margin": 1}, "most_logits is 0": {"name": "next_token", "most_logits": 0},
    }  # fmt: skip
    for said, spec in mistakes.items():
        with pytest.raises(UserError, match=said):
            load_objective(spec)


def test_the_step_knows_no_objective():
    names = {*OBJECTIVES, "NextToken", "Contrastive", "TwoStreams"}
    for module in (trainers.step, trainers.train):
        tree = ast.parse(Path(module.__file__).read_text())
        words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        words |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not words & names
