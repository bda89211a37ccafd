"""Weights by part: seeded, from a stage, from released checkpoints; what doesn't fit is named."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from datasets_ray.errors import UserError
from tests.trainers.test_models import llava_of
from tests.trainers.tiny_models import LLMS, OPEN_CLIP, QWEN2_VL, context, part, qwen2_vl_spec, vlm_spec
from trainers.models import build, save_part


def state(model, name):
    return {k: v.clone() for k, v in model.parts[name].state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def clip_spec(seed=1):
    return {"family": "clip", "parts": {"encoder": part("open_clip", OPEN_CLIP, seed)}}


def from_checkpoint(spec, directory, names):
    for name in names:
        spec["parts"][name]["weights"] = {"checkpoint": str(directory), "revision": None}
    return spec


def test_a_seed_decides_a_part_and_nothing_else_does(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = build(vlm_spec(), context(tmp_path))
    assert torch.equal(before, torch.get_rng_state()), "building leaves the global random state alone"
    spec = vlm_spec()
    spec["parts"]["llm"]["weights"] = {"fresh": 99}
    torch.manual_seed(6)
    other = build(spec, context(tmp_path))
    assert same(state(one, "encoder"), state(other, "encoder")) and same(state(one, "connector"), state(other, "connector"))
    assert not same(state(one, "llm"), state(other, "llm"))


@pytest.mark.parametrize("make", [lambda: vlm_spec("llama"), lambda: vlm_spec("qwen2", "transformers_vision"), qwen2_vl_spec])
def test_parts_round_trip_through_a_stages_artefact(make, tmp_path):
    model = build(make(), context(tmp_path))
    artefact = tmp_path / "train-1"
    artefact.mkdir()
    spec = make()
    for name in model.parts:
        assert save_part(model, name, artefact / f"{name}.safetensors").is_file()
        spec["parts"][name]["weights"] = {"stage": "train-1"}
    again = build(spec, context(tmp_path, {"train-1": artefact}))
    for name in model.parts:
        assert same(state(model, name), state(again, name))
    assert again.lm_head.weight.data_ptr() == again.llm.get_input_embeddings().weight.data_ptr() or "lm_head.weight" in load_file(
        artefact / "llm.safetensors"
    ), "tied tensors are kept once and stay tied"


def test_a_state_from_elsewhere_is_what_is_saved(tmp_path):
    model = build(vlm_spec(), context(tmp_path))
    masters = {k: v + 1 for k, v in state(model, "connector").items()}
    assert same(load_file(save_part(model, "connector", tmp_path / "c.safetensors", state=masters)), masters)


def test_one_weights_file_serves_clip_and_a_vlms_encoder(tmp_path):
    clip = build(clip_spec(), context(tmp_path))
    save_part(clip, "encoder", tmp_path / "encoder.safetensors")
    spec = vlm_spec()
    spec["parts"]["encoder"]["weights"] = {"stage": "clip"}
    model = build(spec, context(tmp_path, {"clip": tmp_path}))
    theirs = state(clip, "encoder")
    assert all(torch.equal(v, theirs[k]) for k, v in state(model, "encoder").items())
    assert len(model.encoder.visual.transformer.resblocks) == 2, "the block above the penultimate layer isn't built"
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    visual = clip.clip.visual
    every = visual.forward_intermediates(model.encoder.pixels(pixels), output_fmt="NLC")["image_intermediates"]
    torch.testing.assert_close(model.encoder(pixels), every[-2], atol=1e-6, rtol=0)


def test_clip_embeds_packs_as_open_clip_embeds_padded_texts(tmp_path):
    clip = build(clip_spec(), context(tmp_path))
    texts = [torch.tensor([1, 5, 9, 2]), torch.tensor([1, 7, 2]), torch.tensor([1, *range(10, 20), 2])]
    pack = type("Pack", (), {"ids": torch.cat(texts), "lengths": torch.tensor([len(t) for t in texts])})
    padded = torch.stack([torch.nn.functional.pad(t, (0, 12 - len(t))) for t in texts])
    with torch.no_grad():
        theirs = clip.clip.encode_text(padded, normalize=True)
        torch.testing.assert_close(clip.embed_texts(pack), theirs, atol=1e-5, rtol=0)
        torch.testing.assert_close(clip.embed_texts(padded), theirs, atol=1e-5, rtol=0)
        pixels = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
        embedded = clip.embed_images(pixels)
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(3))
    assert embedded.shape == (3, clip.width) and float(clip.logit_scale) == pytest.approx(1 / 0.07, rel=1e-4)
    with pytest.raises(UserError, match="13 tokens for a text tower of 12"):
        clip.embed_texts(torch.ones(1, 13, dtype=torch.long))


def test_a_released_language_model_brings_its_config(tmp_path):
    model = build(vlm_spec("qwen2"), context(tmp_path))
    model.llm.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    spec = {"family": "causal_lm", "parts": {"llm": part("causal_lm", {}, weights={"checkpoint": str(tmp_path / "hf")})}}
    again = build(spec, context(tmp_path))
    assert same(state(model, "llm"), state(again, "llm"))


@pytest.mark.parametrize("llm", LLMS)
def test_parts_load_from_a_llava_checkpoint(llm, tmp_path):
    model = build(vlm_spec(llm, "transformers_vision"), context(tmp_path))
    llava_of(model, llm, "transformers_vision").save_pretrained(tmp_path / "llava")
    again = build(from_checkpoint(vlm_spec(llm, "transformers_vision"), tmp_path / "llava", model.parts), context(tmp_path))
    for name in model.parts:
        assert same(state(model, name), state(again, name)), name


def test_parts_load_from_a_qwen2_vl_checkpoint(tmp_path):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    theirs = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**{k: v for k, v in QWEN2_VL.items() if k != "model_type"}))
    theirs.save_pretrained(tmp_path / "hub")  # the names of the hub
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "model.safetensors")  # the names in memory
    for directory in (tmp_path / "hub", tmp_path):
        model = build(from_checkpoint(qwen2_vl_spec(), directory, ("encoder", "connector", "llm")), context(tmp_path))
        assert same(state(model, "connector"), theirs.model.visual.merger.state_dict())
        assert same(model.llm.model.state_dict(), theirs.model.language_model.state_dict())
        blocks = theirs.model.visual.state_dict()
        assert all(torch.equal(v, blocks[k]) for k, v in state(model, "encoder").items())


def test_the_file_in_the_parts_own_format_is_found(tmp_path):
    clip = build(clip_spec(), context(tmp_path))
    save_file({"vision_model.embeddings.class_embedding": torch.zeros(32)}, tmp_path / "model.safetensors")  # transformers' format
    torch.save(state(clip, "encoder"), tmp_path / "open_clip_pytorch_model.bin")  # open_clip's
    again = build(from_checkpoint(clip_spec(9), tmp_path, ["encoder"]), context(tmp_path))
    assert same(state(clip, "encoder"), state(again, "encoder"))


def test_llavas_released_projector_loads_without_running_its_pickle(tmp_path):
    model = build(vlm_spec(), context(tmp_path))
    torch.save({f"model.mm_projector.{k}": v.half() for k, v in state(model, "connector").items()}, tmp_path / "mm_projector.bin")
    again = build(from_checkpoint(vlm_spec(), tmp_path, ["connector"]), context(tmp_path))
    torch.testing.assert_close(state(again, "connector")["0.weight"], state(model, "connector")["0.weight"].half().float(), atol=0, rtol=0)


def test_weights_that_do_not_fit_are_named(tmp_path):
    model = build(vlm_spec(), context(tmp_path))
    spec = vlm_spec()
    spec["parts"]["connector"]["weights"] = {"stage": "s"}
    ctx = context(tmp_path, {"s": tmp_path})
    with pytest.raises(UserError, match=r"stage s left no connector\.safetensors"):
        build(spec, ctx)
    good = state(model, "connector")
    file = tmp_path / "connector.safetensors"
    save_file({**good, "2.weight": torch.zeros(32, 7)}, file)
    with pytest.raises(UserError, match=r"2\.weight has shape \(32, 7\), the model's config asks for \(32, 32\)"):
        build(spec, ctx)
    save_file({k: v for k, v in good.items() if k != "0.bias"}, file)
    with pytest.raises(UserError, match=r"0\.bias is missing"):
        build(spec, ctx)
    save_file({**good, "4.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"4\.weight is not in this model"):
        build(spec, ctx)
    with pytest.raises(UserError, match="no weights in"):
        build(from_checkpoint(vlm_spec(), tmp_path / "out", ["llm"]), ctx)
    with pytest.raises(UserError, match="no directory 'nowhere'"):
        build(from_checkpoint(vlm_spec(), "nowhere", ["llm"]), ctx)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("family",), "vlmm", "did you mean 'vlm'"),
        (("parts", "encoder", "builder"), "openclip", "did you mean 'open_clip'"),
        (("parts", "connector", "builder"), "mpl", "did you mean 'mlp'"),
        (("parts", "connector", "config"), {"dept": 2}, "did you mean 'depth'"),
        (("parts", "encoder", "config"), {**OPEN_CLIP, "vison_cfg": {}}, "did you mean 'vision_cfg'"),
        (("parts", "encoder", "config"), {**OPEN_CLIP, "layer": -9}, "encoder layer -9 of 3"),
        (("parts", "llm", "config", "model_type"), "lama", "no language model of type 'lama'"),
        (("parts", "llm", "weights"), {"frsh": 1}, "fresh: seed"),
    ],
)
def test_mistakes_in_a_spec_are_said(path, value, message, tmp_path):
    spec = copy.deepcopy(vlm_spec())
    at = spec
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(UserError, match=message):
        build(spec, context(tmp_path))
