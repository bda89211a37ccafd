"""Model FLOPs of a step equal what torch counts in it, part by part of what is trained, and are the batch's, not its layout's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from datasets_ray.packing import Batch, Segment, pack
from datasets_ray.tokens import IGNORE, IMAGE_ID
from tests.trainers import tiny_models as tiny
from tests.trainers import training_kit as kit
from trainers import adapters, switches, train
from trainers.batch import Filler, to_device
from trainers.flops import Flops, amounts, matmul_rate, share
from trainers.models import build, train_parts
from trainers.objectives.contrastive import Contrastive
from trainers.objectives.next_token import NextToken

LORA = {"llm": {"kind": "lora", "rank": 4, "alpha": 8, "targets": "all-linear"}}


def segment(rng, words, sides=(), patch=tiny.PATCH, merge=1, learned=5):
    """A text of so many words with images of these sides before it."""
    grids = [[1, side // patch, side // patch] for side in sides]
    slots = sum(rows * columns // merge**2 for _, rows, columns in grids)
    ids = np.concatenate([[1], [IMAGE_ID] * slots, rng.integers(3, tiny.VOCABULARY - 2, words)]).astype(np.int64)
    labels = np.where(np.arange(len(ids)) >= len(ids) - learned, ids, IGNORE)
    images = tuple(rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in sides)
    return Segment(ids, labels, images, np.array(grids, dtype=np.int64).reshape(-1, 3), len(ids))


def batch_of(streams, shape=(tiny.SIZE, tiny.SIZE), filler=None):
    packs = {name: pack(segments, range(len(segments)), shape) for name, segments in streams.items()}
    valid = sum(s.valid for segments in streams.values() for s in segments)
    return to_device(Batch(packs, len(next(iter(streams.values()))), valid), filler=filler)


def counted(objective, model, batch, loss_of):
    """What torch counts in a forward and backward pass; attention as the matrix products it is made of."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_of(objective.forward(model, batch)).backward()
    return counter.get_total_flops()


def expected(flops, batch, causal="llm"):
    """Ours, with causal attention taken for the full square that torch computes."""
    return sum(flops.step([batch]).values()) + flops.parts[causal]["pairs"] * amounts(batch)["pairs"]


def text_batch(seed=0, images=1):
    """Four texts of one length: torch's attention pads different ones."""
    rng = np.random.default_rng(seed)
    return batch_of({"text": [segment(rng, 20, [tiny.SIZE] * images) for _ in range(4)]})


@pytest.fixture(autouse=True)
def modules():
    """Layers as the modules they are, as on a GPU: torch counts no product that adds to what is there (`test_written_out` does)."""
    with switches.without(["layers"]):
        yield


TRAINED = [{"connector"}, {"llm"}, {"connector", "llm"}, {"encoder", "connector", "llm"}]


@pytest.mark.parametrize("trained", TRAINED, ids=lambda names: "+".join(sorted(names)))
@pytest.mark.parametrize(("llm", "encoder"), [("llama", "open_clip"), ("qwen2", "transformers_vision")])
def test_a_step_of_a_vlm_costs_what_torch_counts(tmp_path, llm, encoder, trained):
    model = build(tiny.vlm_spec(llm, encoder), tiny.context(tmp_path))
    train_parts(model, trained)
    batch, flops = text_batch(), Flops(model)
    assert not flops.uncounted
    assert expected(flops, batch) == pytest.approx(counted(NextToken(), model, batch, lambda out: out.loss_sum), rel=1e-9)


def test_text_alone_costs_nothing_in_the_encoder(tmp_path):
    model = build(tiny.vlm_spec(), tiny.context(tmp_path))
    train_parts(model, {"connector", "llm"})
    batch, flops = text_batch(images=0), Flops(model)
    spent = flops.step([batch])
    assert spent["encoder"] == spent["connector"] == 0
    assert expected(flops, batch) == pytest.approx(counted(NextToken(), model, batch, lambda out: out.loss_sum), rel=1e-9)


def test_adapters_cost_their_own_products_and_the_gradient_that_passes(tmp_path):
    model = build(tiny.vlm_spec(), tiny.context(tmp_path))
    whole = {}
    for name, wanted in (("plain", None), ("adapted", LORA)):
        adapters.attach(model, wanted, 0)
        train_parts(model, {"connector", "llm"})
        adapters.freeze_rest(model)
        batch, flops = text_batch(), Flops(model)
        whole[name] = expected(flops, batch)
        assert whole[name] == pytest.approx(counted(NextToken(), model, batch, lambda out: out.loss_sum), rel=1e-9)
    assert whole["adapted"] < whole["plain"]


def test_a_step_of_a_qwen2_vl_costs_what_torch_counts(tmp_path):
    model = build(tiny.qwen2_vl_spec(), tiny.context(tmp_path))
    rng = np.random.default_rng(0)
    batch = batch_of({"text": [segment(rng, 20, [32], patch=4, merge=2) for _ in range(3)]}, shape=None)
    for trained in TRAINED:
        train_parts(model, trained)
        flops = Flops(model)
        assert expected(flops, batch) == pytest.approx(counted(NextToken(), model, batch, lambda out: out.loss_sum), rel=1e-9)


def test_a_contrastive_step_costs_both_towers(tmp_path):
    spec = {"family": "clip", "parts": {"encoder": tiny.part("open_clip", tiny.OPEN_CLIP)}}
    model = build(spec, tiny.context(tmp_path))
    train_parts(model, {"encoder"})
    rng = np.random.default_rng(0)
    words = [segment(rng, 9) for _ in range(6)]
    nothing = np.zeros(0, dtype=np.int64)
    images = [Segment(nothing, nothing, (picture := segment(rng, 1, [tiny.SIZE])).images, picture.grids, 4) for _ in range(6)]
    batch, flops = batch_of({"image": images, "text": words}), Flops(model)
    assert not flops.uncounted
    found = counted(Contrastive(), model, batch, lambda out: out.representations["image"].sum() + out.representations["text"].sum())
    assert expected(flops, batch, "encoder") == pytest.approx(found, rel=1e-9)


def test_amounts_are_the_batchs_own():
    rng = np.random.default_rng(0)
    batch = batch_of({"text": [segment(rng, 6, [16], learned=3), segment(rng, 9, learned=4), segment(rng, 2, [16, 16], learned=2)]})
    lengths = [1 + 4 + 6, 1 + 9, 1 + 8 + 2]
    assert amounts(batch, extra=1) == {
        "tokens": sum(lengths), "pairs": sum(n * n for n in lengths), "texts": 3, "learned": 9, "visual": 12, "images": 3, "patches": 12,
        "places": 15, "place_pairs": 75,
    }  # fmt: skip
    filler = Filler(np.zeros((16, 16, 3), np.uint8), True, (1, 2, 2))
    empty = batch_of({"text": []}, filler=filler)
    assert empty.streams["text"].filler_image and not any(amounts(empty, extra=1).values()), "fillers are no work of the model's"


def test_how_a_step_is_cut_into_micro_batches_changes_nothing(tmp_path):
    model = build(tiny.vlm_spec(), tiny.context(tmp_path))
    train_parts(model, {"connector", "llm"})
    flops, rng = Flops(model), np.random.default_rng(0)
    rows = [segment(rng, 4 + 3 * n, [tiny.SIZE] * (n % 3)) for n in range(8)]
    whole = flops.step([batch_of({"text": rows})])
    assert whole == flops.step([batch_of({"text": rows[:3]}), batch_of({"text": rows[3:]})]) and min(whole.values()) > 0


def test_matrices_that_nobody_counts_are_named(tmp_path):
    model = build(tiny.vlm_spec(), tiny.context(tmp_path))
    model.llm.base_model.layers[0].mlp.experts = nn.ParameterList([nn.Parameter(torch.zeros(4, 8, 8))])
    assert len(Flops(model).uncounted) == 1


def test_the_device_is_measured_once_and_without_dice():
    state = torch.get_rng_state()
    first = matmul_rate("cpu", torch.float32, 64, 96, seconds=0.005)
    assert first > 1e6 and matmul_rate("cpu", torch.float32, 64, 96, seconds=0.005) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert share(2e9, 2.0, 4e9) == 0.25 and share(1.0, 0.0, 1.0) is share(1.0, 1.0, None) is None


def test_every_step_reports_its_share_of_both_rates(tmp_path):
    rows, seen = kit.write_captions(tmp_path / "rows", 48), {}
    for micro in (64, 2048):
        ctx = kit.context(tmp_path / str(micro), rows, micro_tokens=micro, device_tflops=0.5)
        seen[micro] = train.run(kit.train_spec(steps=5), ctx)["compute"]
        records = [json.loads(line) for line in (tmp_path / str(micro) / "metrics.jsonl").read_text().splitlines()]
        steps = [record for record in records if "train/loss" in record]
        assert len(steps) == 5
        for record in steps:
            assert 0 < record["train/mfu_datasheet"] < 1 and record["train/mfu"] > 0
            rate = record["train/mfu_datasheet"] / record["train/mfu"] * 0.5
            assert rate == pytest.approx(seen[micro]["measured_tflops_per_second"])
        one = seen[micro]
        assert one["devices"] == 1 and one["datasheet_tflops_per_second"] == 0.5
        assert one["mfu"] == pytest.approx(sum(one["tflops"].values()) / one["seconds"] / one["measured_tflops_per_second"], rel=0.01)
    assert seen[64]["tflops"] == seen[2048]["tflops"] and min(seen[64]["tflops"].values()) > 0, "whatever the micro-batches"
