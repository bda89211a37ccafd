"""The paper's world in small: checkpoints and data sets in their published formats, and a profile that reads them as `cluster` does.

    python -m tests.small_world DIR    runs experiments/full_ablation.yaml, as it is, on it: all 24 rows in some minutes
    profile = overlay(folder)          writes folder/{checkpoints,data,profile.yaml}; the profile differs from `cluster` only in paths,
                                       resources, allow_subset and batch_scale

One function per format, each with real library classes and a real library's way of saving. Images are 336 and 378 pixels as the real
encoders', widths and depths are tiny, tokenizers are the committed ones.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from datasets_ray import examples
from datasets_ray.tokens import COMMITTED

WIDTH, LAYERS, HEADS = 32, 2, 2
"""Of language models."""
VOCABULARY = {"tiny-llama": 1536, "tiny-qwen2": 1536}
CLIP_L = {
    "embed_dim": 16, "quick_gelu": True,
    "vision_cfg": {"image_size": 336, "patch_size": 14, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}  # fmt: skip
DFN_H = {**CLIP_L, "vision_cfg": {"image_size": 378, "patch_size": 14, "width": 48, "layers": 2, "head_width": 16}}
LAION_L = {
    "embed_dim": 16, "vision_cfg": {"image_size": 224, "patch_size": 14, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": CLIP_L["text_cfg"],
}  # fmt: skip
DATA_SETS = ("llava-558k", "pixmo-cap", "llava-mix-665k", "imagenet", "flowers", "pets", "food", "mmbench", "mmmu", "mmstar")


def _tokenizer(name: str, folder: Path) -> None:
    for file in (COMMITTED / name).glob("*.json"):
        shutil.copy(file, folder / file.name)


def _saved(model: Any, folder: Path, tokenizer: str) -> Path:
    """A transformers model as `save_pretrained` leaves it, with a tokenizer beside it."""
    model.save_pretrained(folder)
    _tokenizer(tokenizer, folder)
    return folder


def llama(folder: Path, seed: int = 0) -> Path:
    """Llama-2, and Vicuna (the same architecture, tuned)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY["tiny-llama"], hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _saved(LlamaForCausalLM(config), folder, "tiny-llama")


def qwen2(folder: Path, seed: int = 0) -> Path:
    """Qwen2, base or instruct."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY["tiny-qwen2"], hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=1, max_position_embeddings=4096, rms_norm_eps=1e-6, rope_theta=1e6,
    )  # fmt: skip
    return _saved(Qwen2ForCausalLM(config), folder, "tiny-qwen2")


def qwen2_vl(folder: Path, seed: int = 0) -> Path:
    """Qwen2-VL, base or instruct."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(seed)
    ids = json.loads((COMMITTED / "tiny-qwen2" / "tokenizer.json").read_text())["added_tokens"]
    special = {token["content"]: token["id"] for token in ids}
    text = {
        "vocab_size": VOCABULARY["tiny-qwen2"], "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": 1, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=special["<|image_pad|>"], video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"], vision_end_token_id=special["<|vision_end|>"], tie_word_embeddings=False,
    )  # fmt: skip
    return _saved(Qwen2VLForConditionalGeneration(config), folder, "tiny-qwen2")


def open_clip(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A CLIP as open_clip's `push_to_hf_hub` lays it out."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in CLIP(**config).state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"interpolation": "bicubic"}}))
    return folder


def llava_projector(folder: Path, inputs: int = 32, outputs: int = WIDTH, seed: int = 0) -> Path:
    """LLaVA's released connector: `mm_projector.bin`, half precision, with the names of its training script."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"0.weight": (outputs, inputs), "0.bias": (outputs,), "2.weight": (outputs, outputs), "2.bias": (outputs,)}
    torch.save({f"model.mm_projector.{key}": torch.randn(shape).half() * 0.1 for key, shape in shapes.items()}, folder / "mm_projector.bin")
    (folder / "config.json").write_text(json.dumps({"mm_projector_type": "mlp2x_gelu", "mm_hidden_size": inputs, "hidden_size": outputs}))
    return folder


def llava_hf(folder: Path, seed: int = 0) -> Path:
    """LLaVA-1.5 as transformers saves it."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14, projection_dim=16
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY["tiny-llama"] + 64, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=4096, rms_norm_eps=1e-5,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY["tiny-llama"], vision_feature_layer=-2)
    return _saved(LlavaForConditionalGeneration(config), folder, "tiny-llama")


def checkpoints(folder: Path) -> dict[str, dict[str, Path]]:
    """Every asset of `cluster` in small: kind → name → directory."""
    return {
        "encoders": {
            "clip-vit-l-14-336": open_clip(folder / "clip-l", CLIP_L, 1), "dfn-clip-vit-h-14-378": open_clip(folder / "dfn-h", DFN_H, 2),
            "openclip-vit-l-14-laion": open_clip(folder / "laion-l", LAION_L, 3),
        },
        "llms": {
            "llama-2-7b": llama(folder / "llama", 4), "vicuna-7b-v1.5": llama(folder / "vicuna", 5),
            "qwen2-7b": qwen2(folder / "qwen2", 6), "qwen2-7b-instruct": qwen2(folder / "qwen2-instruct", 7),
        },
        "models": {
            "qwen2-vl-7b": qwen2_vl(folder / "qwen2-vl", 8), "qwen2-vl-7b-instruct": qwen2_vl(folder / "qwen2-vl-instruct", 9),
            "llava-1.5-7b": llava_hf(folder / "llava", 10),
        },
        "connectors": {"llava-1.5-connector": llava_projector(folder / "projector", seed=11)},
    }  # fmt: skip


def data(folder: Path, profile: str = "cluster", count: int = examples.COUNT) -> Path:
    """Every data set of a profile in its published layout, `count` records each."""
    from grid.profile import HERE

    declared = yaml.safe_load((HERE / f"{profile}.yaml").read_text())["data"]
    for name in DATA_SETS:
        asset = declared[name]
        assert examples.write({"source": asset["source"], **asset.get("keys", {})}, folder, count), f"no example of {name}"
    return folder


def overlay(folder: Path, count: int = examples.COUNT) -> Path:
    """Writes everything and the profile over it; returns the profile's file."""
    held = checkpoints(folder / "checkpoints")
    assets = {kind: {name: {"checkpoint": str(path)} for name, path in named.items()} for kind, named in held.items()}
    resources = {
        "lanes": 1, "workers": 1, "gpus_per_worker": 0, "device": "cpu", "object_store_mb": 100, "cache_mb": 256, "micro_tokens": 2048,
        "eval_batch": 8, "checkpoint_steps": 50, "dashboard": False,
    }  # fmt: skip
    profile = {
        "profile": "small-world", "about": "the cluster profile over small checkpoints and data, for tests", "base": "cluster",
        "data_root": str(data(folder / "data", count=count)), "store": str(folder / "store"), "resources": resources,
        "allow_subset": True, "batch_scale": 1 / 64, **assets,
    }  # fmt: skip
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump(profile, sort_keys=False))
    return path


def main(argv: list[str] | None = None) -> int:
    """Runs `full_ablation.yaml` as it is under the overlay; what follows DIR goes to grid.run. Returns its exit code."""
    given = sys.argv[1:] if argv is None else argv
    folder = Path(given[0]).absolute()
    study = Path(__file__).resolve().parents[1] / "experiments" / "full_ablation.yaml"
    profile = overlay(folder)
    command = [sys.executable, "-m", "grid.run", str(study), "--profile", str(profile), "--out", str(folder / "run"), *given[1:]]
    return subprocess.run(command, cwd=study.parents[1]).returncode


if __name__ == "__main__":
    sys.exit(main())
