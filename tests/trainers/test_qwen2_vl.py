"""Our Qwen2-VL on packs = transformers' Qwen2VLForConditionalGeneration one by one, M-RoPE and images of their own sizes included."""

from __future__ import annotations

import pytest
import torch

from datasets_ray.errors import UserError
from tests.trainers.test_models import greedy_without_cache
from tests.trainers.tiny_models import (
    IMAGE,
    NATIVE,
    QWEN2_VL,
    VOCABULARY,
    assert_same_gradients,
    context,
    gradients,
    loss_of,
    native_sample,
    pack_of,
    qwen2_vl_spec,
)
from trainers.models import build, train_parts
from trainers.models.qwen2_vl import mrope_positions, patchify

ROWS = [
    native_sample(1, 9, [(16, 24)]),
    native_sample(2, 70, [(8, 8), (40, 16), (16, 24)]),
    native_sample(3, 6),
    native_sample(4, 100, [(24, 40)]),
    native_sample(5, 12, [(16, 24), (24, 16)]),
]


@pytest.fixture
def model(tmp_path):
    return build(qwen2_vl_spec(), context(tmp_path)).train()


@pytest.fixture
def reference(model):
    """transformers' model with our weights."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(**{k: v for k, v in QWEN2_VL.items() if k != "model_type"})
    theirs = Qwen2VLForConditionalGeneration(config).eval()
    visual = {**model.parts["encoder"].state_dict(), **{f"merger.{k}": v for k, v in model.parts["connector"].state_dict().items()}}
    theirs.model.visual.load_state_dict(visual)
    theirs.model.language_model.load_state_dict(model.llm.model.state_dict())
    theirs.lm_head.load_state_dict(model.lm_head.state_dict())
    return theirs


def inputs_of(row, processor):
    """What a Qwen2-VL processor would hand to transformers' model."""
    ids = torch.where(row.ids == IMAGE, VOCABULARY - 1, row.ids)[None]
    made = {"input_ids": ids, "use_cache": False}
    if row.images:
        pixels = processor(images=[i.permute(2, 0, 1) for i in row.images], return_tensors="pt")
        made |= {"pixel_values": pixels["pixel_values"], "image_grid_thw": pixels["image_grid_thw"]}
        made["mm_token_type_ids"] = (ids == VOCABULARY - 1).int()
    return made


@pytest.fixture(scope="module")
def processor():
    from transformers import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor(patch_size=4, merge_size=2, do_resize=False)


def test_patches_are_the_processors(processor, model):
    for image in ROWS[1].images:
        theirs = processor(images=[image.permute(2, 0, 1)], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(patchify(image, 4, 2, 2, model.mean, model.std), theirs, atol=1e-6, rtol=0)


def test_positions_are_transformers_positions_and_restart_per_row(reference):
    pack = pack_of(ROWS, native=True)
    ours = mrope_positions(pack.lengths.tolist(), pack.image_slots.tolist(), pack.grids.tolist(), 2).split(pack.lengths.tolist(), dim=1)
    for row, positions in zip(ROWS, ours):
        if not row.images:
            assert torch.equal(positions, torch.arange(len(row.ids)).expand(3, -1))
            continue
        kinds = (row.ids == IMAGE).int()[None]
        theirs, delta = reference.model.get_rope_index(row.ids[None], kinds, image_grid_thw=torch.tensor(row.grids))
        assert torch.equal(positions, theirs[:, 0])
        assert int(delta) == int(positions.max()) + 1 - len(row.ids)


def test_packed_is_transformers_one_by_one(model, reference, processor):
    model.eval()
    with torch.no_grad():
        packed = model.logits(model.hidden(pack_of(ROWS, native=True))).split([len(s.ids) for s in ROWS])
        for row, ours in zip(ROWS, packed):
            theirs = reference(**inputs_of(row, processor)).logits[0]
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def padded_logits(model, samples):
    """A right-padded batch through transformers' own masks, 3-D positions padded alike; pads cut out, float[T, V]."""
    pieces = [(model.embed(p), model.positions(p)[:, 0].T) for p in (pack_of([s], native=True) for s in samples)]
    batch, positions = (torch.nn.utils.rnn.pad_sequence([p[i] for p in pieces], batch_first=True) for i in (0, 1))
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(p[0]), dtype=torch.long) for p in pieces], batch_first=True)
    model.llm.model.set_attn_implementation("sdpa")
    try:
        out = model.llm.model(inputs_embeds=batch, attention_mask=mask, position_ids=positions.permute(2, 0, 1), use_cache=False)
    finally:
        model.llm.model.set_attn_implementation("packed")
    return model.logits(out.last_hidden_state[mask.bool()])


def test_packed_equals_padded_equals_one_by_one(model):
    results = {}
    for how in ("packed", "padded", "alone"):
        if how == "packed":
            logits = model.logits(model.hidden(pack_of(ROWS, native=True)))
        elif how == "padded":
            logits = padded_logits(model, ROWS)
        else:
            logits = torch.cat([model.logits(model.hidden(pack_of([s], native=True))) for s in ROWS])
        loss = loss_of(logits, ROWS) / 100
        loss.backward()
        results[how] = logits.detach(), loss.detach(), gradients(model)
    for how in ("padded", "alone"):
        torch.testing.assert_close(results["packed"][0], results[how][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(results["packed"][1], results[how][1], atol=1e-5, rtol=1e-5)
        assert_same_gradients(results["packed"][2], results[how][2])


def test_batched_decoding_equals_one_by_one(model):
    model.eval()
    alone = [greedy_without_cache(model, row, 6, native=True) for row in ROWS]
    state = model.start(pack_of(ROWS, native=True))
    assert state.positions.tolist() == [int(model.positions(pack_of([r], native=True)).max()) + 1 for r in ROWS]
    for step in range(6):
        torch.testing.assert_close(state.logits, torch.stack([a[step] for a in alone]), atol=1e-5, rtol=0)
        model.step(state, torch.stack([a[step].argmax() for a in alone]))


@pytest.mark.parametrize("trained", [{"connector"}, {"llm"}, {"encoder", "connector", "llm"}], ids=len)
@pytest.mark.parametrize("rows", [[], [ROWS[2]]], ids=["empty pack", "text only"])
def test_every_trained_parameter_has_a_gradient_on_every_rank(model, rows, trained):
    train_parts(model, trained)
    hidden = model.hidden(pack_of(rows, native=True))
    model.logits(hidden).sum().backward()
    for name, module in model.parts.items():
        assert all((p.grad is not None) == (name in trained) for p in module.parameters())


def test_activation_checkpointing_changes_nothing(model):
    found = []
    for on in (False, True):
        model.activation_checkpointing(on)
        loss_of(model.logits(model.hidden(pack_of(ROWS[:2], native=True))), ROWS[:2]).backward()
        found.append(gradients(model))
    assert_same_gradients(*found, tolerance=1e-6)


def test_parts_of_different_models_and_images_of_another_grid_are_refused(tmp_path):
    spec = qwen2_vl_spec()
    assert build(spec, context(tmp_path), image={**NATIVE, "mean": [0.5] * 3}).mean == (0.5,) * 3
    with pytest.raises(UserError, match="patch 4, merge 2"):
        build(spec, context(tmp_path), image={**NATIVE, "patch": 8})
    spec["parts"]["connector"]["config"] = {**QWEN2_VL, "image_token_id": 5}
    with pytest.raises(UserError, match="connector and llm have different configs"):
        build(spec, context(tmp_path))
