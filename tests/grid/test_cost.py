"""Estimates: sizes are exactly the modules', FLOPs follow the stated rule, memory falls with ZeRO."""

from __future__ import annotations

import pytest

from grid import plantext, shapes
from grid.cost import Estimator
from grid.footprint import Adapter
from grid.graph import Graph
from grid.load import load
from grid.plan import make_plan
from grid.profile import Profile
from tests.grid.studies import write

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
QWEN2 = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
QWEN2_VL = {
    "text_config": QWEN2,
    "vision_config": {"embed_dim": 1280, "depth": 32, "mlp_ratio": 4, "patch_size": 14, "spatial_merge_size": 2},
}
CLIP_L = {
    "embed_dim": 768, "vision_cfg": {"image_size": 336, "patch_size": 14, "width": 1024, "layers": 24},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
}  # fmt: skip
DFN_H = {
    "embed_dim": 1024, "vision_cfg": {"image_size": 378, "patch_size": 14, "width": 1280, "layers": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}  # fmt: skip


def test_released_models_have_their_published_sizes():
    assert shapes.language_model(LLAMA).params == 6_738_415_616
    assert shapes.language_model(QWEN2).params == 7_615_616_512
    assert sum(shape.params for shape in shapes.qwen2_vl(QWEN2_VL).values()) == 8_291_375_616
    assert shapes.clip_params(CLIP_L) == 427_944_193
    assert round(shapes.clip_params(DFN_H) / 1e6) == 987


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_language_models_have_the_sizes_of_their_modules(kind, tied):
    torch = pytest.importorskip("torch")
    from trainers.models.language import causal_lm

    config = {
        "model_type": kind, "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied,
    }  # fmt: skip
    with torch.device("meta"):
        assert shapes.language_model(config).params == sum(p.numel() for p in causal_lm(config).parameters())


def test_encoders_and_connectors_have_the_sizes_of_their_modules():
    torch = pytest.importorskip("torch")
    from trainers.models.clip import open_clip_model
    from trainers.models.connectors import mlp
    from trainers.models.encoders import OpenClipEncoder

    config = {
        "embed_dim": 24, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 16, "heads": 2, "layers": 2},
    }  # fmt: skip

    def size(module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        assert shapes.clip_params(config) == size(open_clip_model(config))
        assert shapes.vision_tower(config["vision_cfg"], skip=1).params == size(OpenClipEncoder(config))
        assert shapes.connector(2, 32, 48).params == size(mlp({"depth": 2}, 32, 48))


def test_qwen2_vl_has_the_size_of_its_module():
    torch = pytest.importorskip("torch")
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "vocab_size": 100, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 4, "patch_size": 8, "spatial_merge_size": 2}
    with torch.device("meta"):
        module = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False))
    counted = shapes.qwen2_vl({"text_config": text, "vision_config": vision})
    assert sum(shape.params for shape in counted.values()) == sum(p.numel() for p in module.parameters())
    assert counted["connector"].params == sum(p.numel() for p in module.model.visual.merger.parameters())


def estimator() -> Estimator:
    return Estimator(Graph(), Profile(profile="p", about="a", precision="bf16"))


def vlm() -> dict:
    fresh = {"fresh": 0}
    return {
        "family": "vlm",
        "parts": {
            "encoder": {"builder": "open_clip", "config": CLIP_L, "weights": fresh},
            "connector": {"builder": "mlp", "config": {"depth": 2}, "weights": fresh},
            "llm": {"builder": "causal_lm", "config": LLAMA, "weights": fresh},
        },
    }


def test_flops_are_two_four_and_six_times_the_parameters_that_a_token_meets():
    estimate, model = estimator(), vlm()
    frozen = estimate.sample_flops(model, set(), 1, 576, 700)
    aligned = estimate.sample_flops(model, {"connector"}, 1, 576, 700)
    tuned = estimate.sample_flops(model, {"connector", "llm"}, 1, 576, 700)
    assert frozen["encoder"] == aligned["encoder"] == tuned["encoder"]  # nothing below it learns: no gradient passes
    assert aligned["connector"] == 3 * frozen["connector"] and aligned["llm"] == 2 * frozen["llm"]
    assert tuned["llm"] == 3 * frozen["llm"]
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    attention = 4 * 700 * 350 * 4096 * 32
    assert frozen["llm"] == pytest.approx(2 * blocks * 700 + attention + 2 * 32000 * 4096 * (700 - 576))


def test_adapters_cost_their_own_and_no_weight_gradients():
    estimate, model = estimator(), vlm()
    frozen, tuned = estimate.sample_flops(model, set(), 1, 576, 700), {"connector", "llm"}
    adapted = estimate.sample_flops(model, tuned, 1, 576, 700, {"llm": Adapter(128)})
    beside = 32 * 128 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert Adapter(128).params(shapes.language_model(LLAMA)) == beside
    assert adapted["llm"] == pytest.approx(2 * frozen["llm"] + 6 * beside * 700)
    assert adapted["llm"] < estimate.sample_flops(model, tuned, 1, 576, 700)["llm"]


def test_the_papers_hardware_is_priced_beside_the_papers_hours(tmp_path):
    study, profile = write(tmp_path)
    sets = ["paper_cost={devices: 16, device: A100-40GB, hours: 20}", "device.mfu=0.25"]
    plan = make_plan(study, profile=profile, sets=sets)
    paper, flops = plan["totals"]["paper"], sum(stage["cost"]["flops"] for stage in plan["stages"])
    assert paper["gpu_hours_at_most"] == 16 * 20 * len(plan["arms"])
    assert paper["planned"] == pytest.approx(flops / (312e12 * 0.25 * 3600))
    assert paper["planned_longest_arm"] <= paper["planned"] <= paper["planned_each"] + 1e-12
    text = plantext.render(plan, load(study, profile, sets))
    assert "the paper: 16 x A100-40GB, up to 20 h an arm" in text and "this plan on A100-40GB" in text
    unknown = make_plan(study, profile=profile, sets=["paper_cost={devices: 1, device: abacus, hours: 2}"])
    assert "planned" not in unknown["totals"]["paper"]


def test_sharing_saves_and_every_stage_is_costed(tmp_path):
    study, profile = write(tmp_path)
    plan = make_plan(study, profile=profile)
    totals = plan["totals"]
    assert totals["gpu_hours"] == pytest.approx(sum(stage["cost"]["gpu_hours"] for stage in plan["stages"]))
    assert totals["gpu_hours"] < totals["gpu_hours_without_sharing"]
    for stage in plan["stages"]:
        assert stage["cost"]["disk_gib"] > 0
        if stage["kind"] in ("train", "predict", "embeddings"):
            assert stage["cost"]["flops"] > 0 and stage["cost"]["memory_gib"] > 0
