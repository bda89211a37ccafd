"""Released checkpoints in their real formats, in small: what loads computes what the library that wrote it computes, part by part."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainers.tiny_models import (
    CLIP_VISION,
    IMAGE,
    LLAMA,
    LLMS,
    OPEN_CLIP,
    QWEN2_VL,
    SIZE,
    VOCABULARY,
    context,
    native_sample,
    pack_of,
    part,
    sample,
)
from trainers.models import build
from trainers.models.encoders import normalise

ROWS = [sample(1, 9, 1), sample(2, 30, 2), sample(3, 5)]
PIXELS = torch.randint(0, 256, (2, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HF_CLIP = {
    "model_type": "clip", "projection_dim": 24, "vision_config": {**CLIP_VISION, "hidden_act": "quick_gelu"},
    "text_config": {
        "model_type": "clip_text_model", "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 12, "vocab_size": VOCABULARY, "hidden_act": "quick_gelu", "eos_token_id": 2,
    },
}  # fmt: skip


def checkpoint(path):
    return {"checkpoint": str(path), "revision": None}


def vlm_from(encoder, llm, builder="transformers_vision", connector=None):
    """A vlm whose parts name their checkpoints and nothing else."""
    parts = {
        "encoder": part(builder, {}, weights=checkpoint(encoder)), "llm": part("causal_lm", {}, weights=checkpoint(llm)),
        "connector": part("mlp", {}, 2, weights=connector and checkpoint(connector)),
    }  # fmt: skip
    return {"family": "vlm", "template": "plain", "tokenizer": "tiny-llama", "parts": parts}


def alone(builder, path, config=None, seed=0):
    """Just an encoder of a checkpoint, in a vlm with a fresh language model."""
    spec = vlm_from(path, path, builder)
    spec["parts"]["encoder"]["config"] = config or {}
    spec["parts"]["llm"] = part("causal_lm", LLAMA, seed)
    return spec


def saved(model, path, **how):
    model.eval().save_pretrained(path, **how)
    return path


def hf_llm(config, seed=0):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    fields = {k: v for k, v in config.items() if k != "model_type"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields)).eval()


def as_bin_shards(path):
    """A directory of safetensors shards as torch wrote them before."""
    listing = json.loads((path / "model.safetensors.index.json").read_text())
    names = {old: old.replace("model-", "pytorch_model-").replace(".safetensors", ".bin") for old in set(listing["weight_map"].values())}
    for old, new in names.items():
        torch.save(load_file(path / old), path / new)
        (path / old).unlink()
    listing["weight_map"] = {key: names[file] for key, file in listing["weight_map"].items()}
    (path / "model.safetensors.index.json").unlink()
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(listing))


# ── language models ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

FAMILIES = {
    **LLMS,
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 64},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 8},
    "phi3": {**LLAMA, "model_type": "phi3", "pad_token_id": 0, "sliding_window": 64},  # no test names it: it proves itself
    "gemma": {**LLAMA, "model_type": "gemma", "head_dim": 8},  # scales its embeddings
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": VOCABULARY,
        "n_positions": 128,
    },  # learned positions
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bins", [False, True], ids=["safetensors", "bin"])
def test_a_causal_lm_of_transformers_loads_from_shards_and_computes_the_same(family, bins, tmp_path):
    theirs = hf_llm(FAMILIES[family])
    path = saved(theirs, tmp_path / "hf", max_shard_size="20KB")
    assert (path / "model.safetensors.index.json").is_file()
    if bins:
        as_bin_shards(path)
    spec = {"family": "causal_lm", "tokenizer": "tiny-llama", "parts": {"llm": part("causal_lm", {}, weights=checkpoint(path))}}
    model = build(spec, context(tmp_path))
    rows = [sample(3, 12), sample(4, 30), sample(5, 7)]
    with torch.no_grad():
        packed = model.logits(model.hidden(pack_of(rows))).split([len(row.ids) for row in rows])
        for row, ours in zip(rows, packed):
            torch.testing.assert_close(ours, theirs(input_ids=row.ids[None]).logits[0], atol=1e-5, rtol=1e-4)


# ── encoders ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def towers():
    """(name, model that is saved, its vision tower, tokens in front of the patches, image size)."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        SiglipConfig,
        SiglipModel,
    )

    torch.manual_seed(0)
    fields = {k: v for k, v in CLIP_VISION.items() if k != "model_type"}
    small = {k: v for k, v in fields.items() if k != "hidden_act"}
    clip = CLIPModel(CLIPConfig(**{k: v for k, v in HF_CLIP.items() if k != "model_type"}))
    siglip = SiglipModel(SiglipConfig(vision_config=small, text_config={**small, "vocab_size": VOCABULARY, "pad_token_id": 1}))
    dino = Dinov2Model(Dinov2Config(**{**small, "mlp_ratio": 2}))
    more = {"mlp_ratio": 2, "num_register_tokens": 3, "use_swiglu_ffn": True}
    registers = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**{**small, **more}))
    vision = CLIPVisionModel(CLIPVisionConfig(**fields))
    return {
        "CLIPModel": (clip, clip.vision_model, 1), "CLIPVisionModel": (vision, vision, 1), "SiglipModel": (siglip, siglip.vision_model, 0),
        "Dinov2Model": (dino, dino, 1), "Dinov2WithRegistersModel": (registers, registers, 4),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["CLIPModel", "CLIPVisionModel", "SiglipModel", "Dinov2Model", "Dinov2WithRegistersModel"])
@pytest.mark.parametrize("layer", [-2, -1])
def test_a_vision_tower_of_transformers_loads_and_sees_the_same(name, layer, tmp_path):
    whole, tower, prefix = towers()[name]
    model = build(alone("transformers_vision", saved(whole, tmp_path / "hf"), {} if layer == -2 else {"layer": layer}), context(tmp_path))
    with torch.no_grad():
        pixels = normalise(PIXELS, model.encoder.mean, model.encoder.std, torch.float32)
        theirs = tower.eval()(pixel_values=pixels, output_hidden_states=True).hidden_states[layer][:, prefix:]
        torch.testing.assert_close(model.encoder(PIXELS), theirs, atol=1e-5, rtol=0)
    assert theirs.shape[1] == model.encoder.tokens({"kind": "square", "size": SIZE, "patch": 8}) == 4


def test_dinov2_sees_images_of_another_size(tmp_path):
    path = saved(towers()["Dinov2Model"][0], tmp_path / "hf")
    recipe = {"kind": "square", "size": 32, "patch": 8, "fit": "pad", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    encoder = build(alone("transformers_vision", path), context(tmp_path), image=recipe).encoder
    assert encoder.mean == (0.485, 0.456, 0.406) and encoder.image_size == 32 and encoder.tokens(recipe) == 16
    assert encoder(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).shape == (1, 16, 32)


@pytest.mark.parametrize("family", ["clip", "vlm"])
def test_a_clip_of_transformers_serves_open_clips_builder(family, tmp_path):
    """Zero-shot classification and an arm's encoder from one CLIPModel directory, which holds no open_clip file."""
    whole, tower, _ = towers()["CLIPModel"]
    path = saved(whole, tmp_path / "hf", max_shard_size="30KB")
    with torch.no_grad():
        if family == "vlm":
            encoder = build(alone("open_clip", path), context(tmp_path)).encoder
            theirs = tower(pixel_values=encoder.pixels(PIXELS), output_hidden_states=True).hidden_states[-2][:, 1:]
            torch.testing.assert_close(encoder(PIXELS), theirs, atol=1e-5, rtol=0)
            return
        clip = build({"family": "clip", "parts": {"encoder": part("open_clip", {}, weights=checkpoint(path))}}, context(tmp_path))
        pixels = normalise(PIXELS, clip.mean, clip.std, torch.float32)
        images = torch.nn.functional.normalize(whole.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        torch.testing.assert_close(clip.embed_images(PIXELS), images, atol=1e-5, rtol=0)
        ids = torch.tensor([[1, 5, 9, 94, 0, 0], [1, 7, 94, 0, 0, 0]])  # the end token is the highest id, as in CLIP's vocabulary
        texts = torch.nn.functional.normalize(whole.get_text_features(input_ids=ids).pooler_output, dim=-1)
        torch.testing.assert_close(clip.embed_texts(ids), texts, atol=1e-5, rtol=0)
        assert float(clip.logit_scale) == pytest.approx(float(whole.logit_scale.exp()), rel=1e-5)


def save_open_clip(path, fields, safe=True, seed=0):
    """A directory as open_clip's `push_to_hf_hub.save_for_hf` leaves it; returns the model."""
    from open_clip.model import CLIP

    path.mkdir()
    torch.manual_seed(seed)
    model = CLIP(**fields).eval()
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if safe:
        save_file(state, path / "open_clip_model.safetensors")
    else:
        torch.save(state, path / "open_clip_pytorch_model.bin")
    preprocess = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711], "resize_mode": "squash"}
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": fields, "preprocess_cfg": preprocess}))
    return model


DFN = {
    "embed_dim": 24, "quick_gelu": True, "vision_cfg": {**OPEN_CLIP["vision_cfg"], "head_width": 8},
    "text_cfg": {k: v for k, v in OPEN_CLIP["text_cfg"].items() if k not in ("pool_type", "eos_id")},
}  # fmt: skip


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_an_open_clip_directory_says_what_it_is(safe, tmp_path):
    """DFN: quick-GELU and narrow heads, which no tensor's shape shows, come from open_clip_config.json."""
    theirs = save_open_clip(tmp_path / "dfn", DFN, safe)
    model = build(alone("open_clip", tmp_path / "dfn"), context(tmp_path))
    clip = build({"family": "clip", "parts": {"encoder": part("open_clip", {}, weights=checkpoint(tmp_path / "dfn"))}}, context(tmp_path))
    with torch.no_grad():
        pixels = model.encoder.pixels(PIXELS)
        every = theirs.visual.forward_intermediates(pixels, output_fmt="NLC")["image_intermediates"]
        torch.testing.assert_close(model.encoder(PIXELS), every[-2], atol=1e-6, rtol=0)
        torch.testing.assert_close(clip.embed_images(PIXELS), theirs.encode_image(pixels, normalize=True), atol=1e-6, rtol=0)


# ── whole models ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def llava(llm, seed=0):
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(**{k: v for k, v in CLIP_VISION.items() if k != "model_type"} | {"hidden_act": "quick_gelu"})
    config = LlavaConfig(vision_config=vision, text_config=LLMS[llm], image_token_index=VOCABULARY - 1)
    return LlavaForConditionalGeneration(config).eval()


def write_llava(model, path, names):
    """A llava-hf directory under transformers 4's names (as on the hub) or transformers 5's (as in memory)."""
    path.mkdir()
    model.config.save_pretrained(path)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    if names == 4:
        ways = (
            (r"^model\.language_model\.", "language_model.model."), (r"^lm_head\.", "language_model.lm_head."),
            (r"^model\.vision_tower\.", "vision_tower.vision_model."), (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
        )  # fmt: skip
        for pattern, name in ways:
            state = {re.sub(pattern, name, key): value for key, value in state.items()}
        assert any(key.startswith("language_model.model.layers.0.") for key in state)
    save_file(state, path / "model.safetensors")
    return path


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("names", [4, 5])
def test_a_llava_directory_is_a_model_by_itself(llm, names, tmp_path):
    theirs = llava(llm)
    path = write_llava(theirs, tmp_path / "llava", names)
    model = build(vlm_from(path, path, connector=path), context(tmp_path))
    with torch.no_grad():
        packed = model.logits(model.hidden(pack_of(ROWS))).split([len(s.ids) for s in ROWS])
        for row, ours in zip(ROWS, packed):
            ids = torch.where(row.ids == IMAGE, VOCABULARY - 1, row.ids)[None]
            pixels = model.encoder.pixels(torch.stack(row.images)) if row.images else None
            other = theirs(input_ids=ids, pixel_values=pixels, use_cache=False).logits[0]
            torch.testing.assert_close(ours, other, atol=1e-4, rtol=0)
            torch.testing.assert_close(model.logits(model.hidden(pack_of([row]))), other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("names", [4, 5])
def test_a_llava_directory_lends_one_part(names, tmp_path):
    """Row 2 of the ablation: LLaVA's released connector between another encoder and language model."""
    theirs = llava("llama")
    path = write_llava(theirs, tmp_path / "llava", names)
    spec = alone("open_clip", None, OPEN_CLIP)
    spec["parts"] |= {"encoder": part("open_clip", OPEN_CLIP, 1), "connector": part("mlp", {"depth": 2}, weights=checkpoint(path))}
    connector = build(spec, context(tmp_path)).parts["connector"]
    projector = theirs.model.multi_modal_projector
    assert torch.equal(connector[0].weight, projector.linear_1.weight) and torch.equal(connector[2].bias, projector.linear_2.bias)


@pytest.mark.parametrize("flat", [True, False], ids=["transformers 4", "transformers 5"])
def test_a_qwen2_vl_directory_is_a_model_by_itself(flat, tmp_path):
    """transformers 4 wrote the language model's config flat, its rotary sections as `rope_scaling`, and other names."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    torch.manual_seed(0)
    theirs = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**{k: v for k, v in QWEN2_VL.items() if k != "model_type"})).eval()
    path = tmp_path / "qwen"
    path.mkdir()
    config, state = theirs.config.to_dict(), {k: v.contiguous() for k, v in theirs.state_dict().items()}
    if flat:
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        config |= {k: v for k, v in text.items() if k not in ("model_type", "layer_types", "dtype")}
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
        config["vision_config"] = {**config["vision_config"], "model_type": "qwen2_vl", "in_chans": 3}
        state = {re.sub(r"^model\.(visual\.)", r"\1", k).replace("model.language_model.", "model."): v for k, v in state.items()}
        assert "visual.blocks.0.norm1.weight" in state and "model.layers.0.mlp.up_proj.weight" in state
    (path / "config.json").write_text(json.dumps(config))
    save_file(state, path / "model.safetensors")
    parts = {name: part("qwen2_vl", {}, weights=checkpoint(path)) for name in ("encoder", "connector", "llm")}
    model = build({"family": "qwen2_vl", "template": "qwen2_vl", "tokenizer": "tiny-qwen2", "parts": parts}, context(tmp_path))
    rows = [native_sample(1, 9, [(16, 24)]), native_sample(2, 20, [(8, 8), (40, 16)]), native_sample(3, 6)]
    processor = Qwen2VLImageProcessor(patch_size=4, merge_size=2, do_resize=False)
    with torch.no_grad():
        packed = model.logits(model.hidden(pack_of(rows, native=True))).split([len(s.ids) for s in rows])
        for row, ours in zip(rows, packed):
            ids = torch.where(row.ids == IMAGE, VOCABULARY - 1, row.ids)[None]
            shown = dict(processor(images=[i.permute(2, 0, 1) for i in row.images], return_tensors="pt")) if row.images else {}
            kinds = {"mm_token_type_ids": (ids == VOCABULARY - 1).int()} if row.images else {}
            torch.testing.assert_close(ours, theirs(input_ids=ids, **shown, **kinds).logits[0], atol=1e-4, rtol=0)
