"""Broken checkpoints and models that packs can't run: one clear error each, that says what, where and the way out."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from datasets_ray.errors import UserError
from tests.trainers.test_model_weights import clip_spec, from_checkpoint
from tests.trainers.tiny_models import LLMS, OPEN_CLIP, context, part, vlm_spec
from trainers.models import build


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("this ran",))


def cut_shard(path):
    shard = sorted(path.glob("model-0*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def pickle_code(path):
    for shard in path.glob("*.safetensors*"):
        shard.unlink()
    torch.save({"model.embed_tokens.weight": torch.zeros(2), "trainer": Evil()}, path / "pytorch_model.bin")


def point_outside(path):
    listing = json.loads((path / "model.safetensors.index.json").read_text())
    listing["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(listing))


def lfs_pointer(path):
    shard = sorted(path.glob("model-0*.safetensors"))[1]
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n")


def other_config(**changes):
    def break_it(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **changes}))

    return break_it


def without_weights(path):
    for file in path.iterdir():
        if file.name != "config.json":
            file.unlink()


def cut_bin(path):
    without_weights(path)
    torch.save({"model.embed_tokens.weight": torch.zeros(96, 32)}, path / "pytorch_model.bin")
    whole = (path / "pytorch_model.bin").read_bytes()
    (path / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])


def bare(path):
    for file in path.iterdir():
        file.unlink()


def tensors_instead_of_names(path):
    without_weights(path)
    torch.save([torch.zeros(2)], path / "pytorch_model.bin")


BROKEN = {
    "a shard is missing": (lambda p: sorted(p.glob("model-0*"))[0].unlink(), r"model-00001-of-0000\d\.safetensors is missing .*index"),
    "a shard is cut off": (cut_shard, r"model-00001-of-0000\d\.safetensors is damaged or cut off \(\d+ bytes"),
    "a pickle holds code": (pickle_code, r"pytorch_model\.bin is refused \(it names code to run"),
    "a pickle is no state dict": (tensors_instead_of_names, r"pytorch_model\.bin holds no named tensors"),
    "a bin file is cut off": (cut_bin, r"pytorch_model\.bin is damaged or cut off"),
    "the index points outside": (point_outside, r"points outside its directory: \.\./elsewhere\.safetensors"),
    "the index is torn": (lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map"'), r"index\.json can't be read"),
    "the index names nothing": (lambda p: (p / "model.safetensors.index.json").write_text("{}"), "names no shards"),
    "a git-LFS pointer": (lfs_pointer, r"is a git-LFS pointer and holds no weights .*without its large files"),
    "the config is torn": (lambda p: (p / "config.json").write_text("{"), r"config\.json can't be read"),
    "a config of no language model": (other_config(model_type="t5"), "'t5' is no causal language model"),
    "a config of another family": (other_config(model_type="gpt2"), r"weights don't fit the model: transformer\.wte\.weight is missing"),
    "a config of an unknown family": (other_config(model_type="llamma"), "no language model of type 'llamma'"),
    "a vocabulary of another size": (other_config(vocab_size=80), r"embed_tokens\.weight has shape \(96, 32\), .* asks for \(80, 32\)"),
    "an empty directory": (bare, r"has no config\.json"),
    "no weights": (without_weights, "no weights in"),
}  # fmt: skip


@pytest.fixture(scope="module")
def hf_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    build(vlm_spec("llama"), context(folder)).llm.save_pretrained(folder / "llm", max_shard_size="20KB")
    return folder / "llm"


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_one_clear_error(kind, hf_directory, tmp_path, capsys):
    path = tmp_path / "llm"
    shutil.copytree(hf_directory, path)
    spec = {"family": "causal_lm", "parts": {"llm": part("causal_lm", {}, weights={"checkpoint": str(path)})}}
    build(spec, context(tmp_path))
    break_it, message = BROKEN[kind]
    break_it(path)
    with pytest.raises(UserError, match=message) as caught:
        build(spec, context(tmp_path))
    assert str(path) in str(caught.value) or kind.startswith("a config of"), "it says where"
    assert "this ran" not in capsys.readouterr().out


def test_a_projector_of_another_width_is_named(tmp_path):
    projector = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.GELU(), torch.nn.Linear(32, 32))
    wide = {f"model.mm_projector.{k}": v for k, v in projector.state_dict().items()}
    torch.save(wide, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match=r"mm_projector\.0\.weight has shape \(32, 48\), .* asks for \(32, 32\)") as caught:
        build(from_checkpoint(vlm_spec(), tmp_path, ["connector"]), context(tmp_path))
    assert "trained between" in str(caught.value)


def test_a_config_that_contradicts_its_checkpoint_is_refused(hf_directory, tmp_path):
    """Heads and rotary base leave every shape as it is."""
    spec = from_checkpoint(vlm_spec(), hf_directory, ["llm"])
    build(spec, context(tmp_path))
    spec["parts"]["llm"]["config"] = {**LLMS["llama"], "num_attention_heads": 2, "num_key_value_heads": 1}
    with pytest.raises(UserError, match=r"num_attention_heads is 4 there, 2 here; num_key_value_heads is 2 there, 1 here"):
        build(spec, context(tmp_path))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**clip_fields(), "quick_gelu": True}}))
    with pytest.raises(UserError, match="quick_gelu is True there, False here"):
        build(from_checkpoint(clip_spec(), tmp_path / "clip", ["encoder"]), context(tmp_path))


def clip_fields():
    return {key: value for key, value in OPEN_CLIP.items() if key != "tokenizer"}


def test_a_tokenizer_larger_than_the_embedding_stops_before_training(hf_directory, tmp_path):
    spec = {
        "family": "causal_lm",
        "tokenizer": "tiny-llama",
        "parts": {"llm": part("causal_lm", {}, weights={"checkpoint": str(hf_directory)})},
    }
    stage = {"spec": {"model": spec}}
    with pytest.raises(UserError, match="tokenizer 'tiny-llama' has 1536 tokens, the model's embedding 96 rows"):
        build(spec, context(tmp_path, **stage))
    padded = {**spec, "parts": {"llm": part("causal_lm", {**LLMS["llama"], "vocab_size": 1600}, 1)}}
    assert build(padded, context(tmp_path, **stage)).vocabulary == 1600, "a padded vocabulary is fine"
    clip = {**clip_spec()}
    with pytest.raises(UserError, match="embedding 96 rows"):
        build(clip, context(tmp_path, **stage))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2", "head_dim": 8}, "gemma2 sets final_logit_softcapping"),
        ({"model_type": "cohere"}, "cohere sets logit_scale"),
        ({"model_type": "llama4_text", "head_dim": 8, "num_local_experts": 2}, "llama4_text has layers of chunked_attention"),
        ({"model_type": "stablelm"}, "language models of type 'stablelm' don't run on packs"),
        ({"model_type": "bloom", "n_head": 4, "n_layer": 2}, "language models of type 'bloom' don't run on packs"),
    ],
)
def test_a_family_that_packs_would_compute_wrongly_is_refused_by_name(changes, message, tmp_path):
    spec = {"family": "causal_lm", "parts": {"llm": part("causal_lm", {**LLMS["llama"], **changes}, 1)}}
    with pytest.raises(UserError, match=message):
        build(spec, context(tmp_path))


def test_experts_that_checkpoints_keep_apart_are_refused_by_name(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    fields = {key: value for key, value in LLMS["llama"].items() if key != "model_type"}
    MixtralForCausalLM(MixtralConfig(**fields, num_local_experts=2)).save_pretrained(tmp_path / "mixtral")
    spec = {"family": "causal_lm", "parts": {"llm": part("causal_lm", {}, weights={"checkpoint": str(tmp_path / "mixtral")})}}
    with pytest.raises(UserError, match="checkpoints of mixtral can't be read part by part"):
        build(spec, context(tmp_path))


def test_an_encoder_without_a_text_tower_neither_mines_nor_classifies(tmp_path):
    spec = {"family": "clip", "parts": {"encoder": part("transformers_vision", {})}}
    with pytest.raises(UserError, match="a transformers_vision encoder neither mines nor classifies"):
        build(spec, context(tmp_path))


@pytest.mark.parametrize(
    ("parts", "config", "message"),
    [
        (("encoder",), {"model_type": "bert", "hidden_size": 32}, "transformers_vision of type 'bert'"),
        (("encoder",), {"model_type": "llava", "vision_config": {}, "vision_feature_layer": [-2, -5]}, r"reads layer \[-2, -5\] of"),
        (("encoder", "connector", "llm"), {"model_type": "llama"}, "a checkpoint of type 'llama' for a qwen2_vl"),
    ],
    ids=["encoder", "several layers", "qwen2_vl"],
)  # fmt: skip
def test_a_checkpoint_of_another_kind_is_refused(parts, config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = vlm_spec(encoder="transformers_vision")
    if len(parts) == 3:
        spec = {"family": "qwen2_vl", "parts": {name: part("qwen2_vl", {}) for name in parts}}
    for name in parts:
        spec["parts"][name]["config"] = {}
    with pytest.raises(UserError, match=message):
        build(from_checkpoint(spec, tmp_path, parts), context(tmp_path))


def test_an_open_clip_without_its_config_asks_for_it(tmp_path):
    torch.save({"visual.class_embedding": torch.zeros(32)}, tmp_path / "open_clip_pytorch_model.bin")
    spec = from_checkpoint(clip_spec(), tmp_path, ["encoder"])
    spec["parts"]["encoder"]["config"] = {}
    with pytest.raises(UserError, match=r"says nothing of its architecture .*\n.*name: ViT-L-14"):
        build(spec, context(tmp_path))
    (tmp_path / "open_clip_config.json").write_text('{"preprocess_cfg": {}}')
    with pytest.raises(UserError, match="open_clip_config.json has no model_cfg"):
        build(spec, context(tmp_path))
