"""Laws of the models: packed = padded = one by one; ours = LlavaForConditionalGeneration; batched decoding = one by one."""

from __future__ import annotations

import pytest
import torch

from datasets_ray.errors import UserError
from tests.trainers.tiny_models import (
    CLIP_VISION,
    IMAGE,
    LLMS,
    PATCH,
    SIZE,
    VOCABULARY,
    assert_same_gradients,
    context,
    gradients,
    loss_of,
    pack_of,
    part,
    sample,
    vlm_spec,
)
from trainers.models import build, freeze_table, train_parts
from trainers.models.connectors import connector
from trainers.models.encoders import normalise

ROWS = [sample(1, 9, 1), sample(2, 70, 2), sample(3, 5), sample(4, 110, 1), sample(5, 12, 3)]


@pytest.fixture(params=["llama", "qwen2"])
def vlm(request, tmp_path):
    return build(vlm_spec(request.param), context(tmp_path)).train()


def padded_logits(model, samples):
    """The plain way: a right-padded batch, transformers' own masks. Returns float[T, V] with the pads cut out."""
    embeddings = [model.embed(pack_of([s])) for s in samples]
    batch = torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(e), dtype=torch.long) for e in embeddings], batch_first=True)
    positions = torch.arange(batch.shape[1])[None].expand(len(batch), -1)
    model.llm.set_attn_implementation("sdpa")
    try:
        hidden = model.llm.base_model(inputs_embeds=batch, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    finally:
        model.llm.set_attn_implementation("packed")
    return model.logits(hidden[mask.bool()])


def test_packed_equals_padded_equals_one_by_one(vlm):
    results = {}
    for how in ("packed", "padded", "alone"):
        if how == "packed":
            logits = vlm.logits(vlm.hidden(pack_of(ROWS)))
        elif how == "padded":
            logits = padded_logits(vlm, ROWS)
        else:
            logits = torch.cat([vlm.logits(vlm.hidden(pack_of([s]))) for s in ROWS])
        loss = loss_of(logits, ROWS) / 100
        loss.backward()
        results[how] = logits.detach(), loss.detach(), gradients(vlm)
    for how in ("padded", "alone"):
        torch.testing.assert_close(results["packed"][0], results[how][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(results["packed"][1], results[how][1], atol=1e-5, rtol=1e-5)
        assert_same_gradients(results["packed"][2], results[how][2])


def test_neighbours_in_a_pack_are_invisible(vlm):
    others = [ROWS[0], sample(77, 70, 2), ROWS[2]]
    start, end = len(ROWS[0].ids), len(ROWS[0].ids) + len(ROWS[1].ids)
    with torch.no_grad():
        one, other = vlm.hidden(pack_of(ROWS[:3])), vlm.hidden(pack_of(others))
    assert torch.equal(one[:start], other[:start]) and torch.equal(one[end:], other[end:])
    assert not torch.allclose(one[start:end], other[start:end])


def test_activation_checkpointing_changes_nothing(tmp_path):
    found = []
    for on in (False, True):
        model = build(vlm_spec(), context(tmp_path / str(on), runtime={"activation_checkpointing": on})).train()
        assert model.llm.base_model.layers[0].gradient_checkpointing is on
        loss_of(model.logits(model.hidden(pack_of(ROWS[:2]))), ROWS[:2]).backward()
        found.append(gradients(model))
    assert_same_gradients(*found, tolerance=1e-6)


@pytest.mark.parametrize("rows", [[], [sample(3, 5), sample(6, 8)]], ids=["empty pack", "text only"])
@pytest.mark.parametrize("trained", [{"connector"}, {"connector", "llm"}, {"encoder", "connector", "llm"}], ids=len)
def test_every_trained_parameter_has_a_gradient_on_every_rank(rows, trained, tmp_path):
    model = build(vlm_spec(), context(tmp_path)).train()
    train_parts(model, trained)
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    hidden = model.hidden(pack_of(rows))
    assert hidden.shape == (sum(len(s.ids) for s in rows), 32)
    model.logits(hidden).sum().backward()
    for name, module in model.parts.items():
        for parameter in module.parameters():
            assert (parameter.grad is not None) == (name in trained)
    assert all(not p.grad.any() for p in model.parts["connector"].parameters())
    assert len(calls) == (1 if "encoder" in trained else 0), "a frozen encoder never sees text"


# ── the same computation as transformers' Llava ──────────────────────────────────────────────────────────────────────────────────


def clip_vision_from_open_clip(visual, tower):
    """open_clip's visual tower (one block short) in transformers' names; what it lacks stays as initialised."""
    state = tower.state_dict()
    take = {
        "embeddings.class_embedding": visual.class_embedding, "embeddings.patch_embedding.weight": visual.conv1.weight,
        "embeddings.position_embedding.weight": visual.positional_embedding,
        "pre_layrnorm.weight": visual.ln_pre.weight, "pre_layrnorm.bias": visual.ln_pre.bias,
    }  # fmt: skip
    for i, block in enumerate(visual.transformer.resblocks):
        at = f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            for name, piece in zip("qkv", getattr(block.attn, f"in_proj_{kind}").chunk(3)):
                take[f"{at}self_attn.{name}_proj.{kind}"] = piece
            for ours, theirs in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                                 ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):  # fmt: skip
                take[f"{at}{theirs}.{kind}"] = getattr(block.get_submodule(ours), kind)
    assert set(take) <= set(state)
    tower.load_state_dict({**state, **take})


def llava_of(model, llm: str, encoder: str):
    """A LlavaForConditionalGeneration with our model's weights."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**{k: v for k, v in CLIP_VISION.items() if k != "model_type"})
    config = LlavaConfig(
        vision_config=vision, text_config=LLMS[llm], image_token_index=VOCABULARY - 1, vision_feature_layer=-2, projector_hidden_act="gelu",
        vision_feature_select_strategy="default", tie_word_embeddings=LLMS[llm].get("tie_word_embeddings", False),
    )  # fmt: skip
    llava = LlavaForConditionalGeneration(config).eval()
    tower = llava.model.vision_tower
    if encoder == "open_clip":
        clip_vision_from_open_clip(model.encoder.visual, tower)
    else:
        missing, extra = tower.load_state_dict(model.encoder.vision_model.state_dict(), strict=False)
        assert not extra and all("layers.2." in m or "post_layernorm" in m for m in missing)
    mlp = model.parts["connector"].state_dict()
    llava.model.multi_modal_projector.load_state_dict({k.replace("0.", "linear_1.").replace("2.", "linear_2."): v for k, v in mlp.items()})
    llava.model.language_model.load_state_dict(model.llm.base_model.state_dict())
    llava.lm_head.load_state_dict(model.lm_head.state_dict())
    return llava


@pytest.mark.parametrize("encoder", ["open_clip", "transformers_vision"])
@pytest.mark.parametrize("llm", ["llama", "qwen2"])
def test_our_vlm_is_llava(llm, encoder, tmp_path):
    model = build(vlm_spec(llm, encoder), context(tmp_path))
    llava = llava_of(model, llm, encoder)
    with torch.no_grad():
        packed = model.logits(model.hidden(pack_of(ROWS))).split([len(s.ids) for s in ROWS])
        for row, ours in zip(ROWS, packed):
            ids = torch.where(row.ids == IMAGE, VOCABULARY - 1, row.ids)[None]
            pixels = normalise(torch.stack(row.images), model.encoder.mean, model.encoder.std, torch.float32) if row.images else None
            theirs = llava(input_ids=ids, pixel_values=pixels, use_cache=False).logits[0]
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
            torch.testing.assert_close(model.logits(model.hidden(pack_of([row]))), theirs, atol=1e-4, rtol=0)


# ── decoding ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def greedy_without_cache(model, row, steps, native=False):
    """Token by token from the whole text each time: float[steps, V]."""
    from dataclasses import replace

    found = []
    for _ in range(steps):
        with torch.no_grad():
            found.append(model.logits(model.hidden(pack_of([row], native))[-1]))
        row = replace(row, ids=torch.cat([row.ids, found[-1].argmax()[None]]))
    return torch.stack(found)


def test_batched_decoding_equals_one_by_one(vlm):
    vlm.eval()
    steps = 20
    alone = [greedy_without_cache(vlm, row, steps) for row in ROWS]
    state = vlm.start(pack_of(ROWS))
    for step in range(steps):
        for logits, expected in zip(state.logits, alone):
            torch.testing.assert_close(logits, expected[step], atol=1e-5, rtol=0)
        if step == 7:  # two rows are finished: the others go on as if nothing had happened
            keep = torch.tensor([True, False, True, True, False])
            state.select(keep)
            alone = [a for a, k in zip(alone, keep) if k]
        following = torch.stack([a[step].argmax() for a in alone])
        assert torch.equal(state.logits.argmax(-1), following)
        vlm.step(state, following)


# ── parts ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_freeze_table_counts_what_trains(tmp_path):
    model = build(vlm_spec("qwen2"), context(tmp_path))
    train_parts(model, {"connector"})
    table = {row["part"]: row for row in freeze_table(model)}
    assert list(table) == ["encoder", "connector", "llm"]
    assert table["connector"] == {"part": "connector", "parameters": 32 * 32 + 32 + 32 * 32 + 32, "trainable": 2112}
    assert table["encoder"]["trainable"] == table["llm"]["trainable"] == 0
    embedding, layer = VOCABULARY * 32, 32 * 32 + 32 + 2 * (32 * 16 + 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert table["llm"]["parameters"] == embedding + 2 * layer + 32, "the tied output embedding counts once"
    with pytest.raises(UserError, match=r"did you mean 'connector'\?"):
        train_parts(model, {"conector"})


@pytest.mark.parametrize(
    ("encoder", "llm", "parameters"),
    [("CLIP-L", "Llama", 20_979_712), ("CLIP-L", "Qwen2", 16_522_240), ("DFN-H", "Llama", 22_028_288), ("DFN-H", "Qwen2", 17_439_744)],
)
def test_connectors_of_real_models_have_the_papers_sizes(encoder, llm, parameters):
    widths = {"CLIP-L": 1024, "DFN-H": 1280, "Llama": 4096, "Qwen2": 3584}
    with torch.device("meta"):
        module = connector(part("mlp", {"depth": 2}), widths[encoder], widths[llm])
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_an_encoder_refuses_images_of_another_size(tmp_path):
    recipe = {"kind": "square", "size": SIZE, "patch": PATCH, "fit": "pad", "mean": [0.5] * 3, "std": [0.25] * 3}
    model = build(vlm_spec(), context(tmp_path, spec={"data": {"image": recipe}}))
    assert model.encoder.tokens(recipe) == 4 and model.encoder.mean == (0.5,) * 3
    with pytest.raises(UserError, match="size 16, patch 8"):
        build(vlm_spec(), context(tmp_path), image={**recipe, "size": 32})
    with pytest.raises(UserError, match="4 image places in the text, 8 image tokens"):
        pack = pack_of([ROWS[0]])
        pack.images = pack.images.repeat(2, 1, 1, 1)
        model.hidden(pack)


def test_half_precision_keeps_rotary_frequencies(tmp_path):
    model = build(vlm_spec(), context(tmp_path), precision="bf16")
    assert model.llm.lm_head.weight.dtype == torch.bfloat16
    assert model.llm.base_model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.hidden(pack_of(ROWS[:2])).dtype == torch.bfloat16
