"""Parameters and FLOPs of a part by arithmetic on its configuration: nothing is built, nothing is downloaded.

Conventions: a multiply-add is two FLOPs; biases, norms and activations count as parameters, not as FLOPs (below 1 %). `matmul` parameters
are those that every token meets. Attention per layer: QK^T and AV, 4 * context * width FLOPs a token (half of it where causal).
Sizes agree exactly with the modules (tests/grid/test_cost.py) and with the published counts of the released models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A stack of transformer blocks with what stands before and after it."""

    params: int
    """All parameters."""
    matmul: int
    """Parameters that multiply every token of the stack, without `head`."""
    head: int
    """Parameters of the output map (language models: vocabulary; else 0), tied or not."""
    width: int
    layers: int
    attention_width: int
    """heads * head_dim."""
    out: int
    """Width of what comes out."""
    causal: bool = True
    extra_tokens: int = 0
    """Tokens beside the patches (class token)."""
    stem: int = 0
    """Parameters that meet every patch once before the blocks (patch embedding)."""
    inner: int = 0
    """Width between the MLP's maps."""
    heads: int = 0
    key_width: int = 0
    """key-value heads * head_dim."""
    gated: bool = False
    """The MLP has three maps (SwiGLU), not two (GELU)."""
    largest: int = 0
    """Elements of the largest single weight."""
    linears: tuple[tuple[str, int, int], ...] = ()
    """(name, inputs, outputs) of the linear maps of one block: where low-rank adapters can stand."""

    def forward(self, tokens: float, sequences: float = 1.0) -> float:
        """FLOPs of the blocks over sequences of this many tokens each (patches, for encoders)."""
        length = tokens + self.extra_tokens
        context = length / 2 if self.causal else length
        return sequences * (2 * self.matmul * length + 2 * self.stem * tokens + 4 * length * context * self.attention_width * self.layers)


def language_model(config: dict[str, Any]) -> Shape:
    """Llama, Qwen2 and their relatives from a Hugging Face config dict (`llama`, `mistral`, `qwen2`, `qwen2_vl_text`, `qwen3`)."""
    whole(config, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    kv = config.get("num_key_value_heads") or heads
    if heads % kv or (width % heads and not config.get("head_dim")):
        raise ValueError(f"hidden_size {width}, {heads} heads, {kv} key-value heads: each must divide the one before")
    head_dim = config.get("head_dim") or width // heads
    vocabulary = config["vocab_size"]
    kind = str(config.get("model_type", "llama"))
    qkv, out = width * head_dim * (heads + 2 * kv), heads * head_dim * width
    bias = head_dim * (heads + 2 * kv) if kind.startswith("qwen2") else 0
    if config.get("attention_bias"):
        bias = head_dim * (heads + 2 * kv) + width
    norms = 2 * width + (2 * head_dim if kind.startswith("qwen3") else 0)
    matmul = layers * (qkv + out + 3 * width * inner)
    embedding = vocabulary * width
    tied = bool(config.get("tie_word_embeddings", False))
    params = matmul + layers * (bias + norms) + width + embedding * (1 if tied else 2)
    linears = (
        ("q_proj", width, heads * head_dim), ("k_proj", width, kv * head_dim), ("v_proj", width, kv * head_dim),
        ("o_proj", heads * head_dim, width), ("gate_proj", width, inner), ("up_proj", width, inner), ("down_proj", inner, width),
    )  # fmt: skip
    return Shape(
        params, matmul, embedding, width, layers, heads * head_dim, width, inner=inner, heads=heads, key_width=kv * head_dim,
        gated=True, largest=max(embedding, width * inner), linears=linears,
    )  # fmt: skip


def whole(config: dict[str, Any], *names: str) -> None:
    """ValueError for one of these numbers that is no positive whole number; those that aren't there are another's to miss."""
    for name in names:
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} {value!r}: a whole number above 0 is expected")


def _blocks(width: int, mlp: int) -> tuple[int, int]:
    """(all, matmul) parameters of one CLIP block: attention with biases, two-layer MLP, two norms."""
    matmul = 4 * width * width + 2 * width * mlp
    return matmul + 4 * width + mlp + width + 4 * width, matmul


def vision_tower(vision: dict[str, Any], embed_dim: int | None = None, skip: int = 0) -> Shape:
    """A CLIP ViT. embed_dim: of the projection, None without it and its norm; skip: blocks left out at the end (1: penultimate)."""
    whole(vision, "width", "layers", "patch_size", "heads", "head_width")
    width, patch = vision["width"], vision["patch_size"]
    side = vision["image_size"] if isinstance(vision["image_size"], int) else vision["image_size"][0]
    layers = vision["layers"] - skip
    block, matmul = _blocks(width, int(width * vision.get("mlp_ratio", 4.0)))
    stem, tokens = 3 * patch * patch * width, (side // patch) ** 2
    params = layers * block + stem + width + (tokens + 1) * width + 2 * width
    if embed_dim is not None:
        params += 2 * width + width * embed_dim
    inner, heads = int(width * vision.get("mlp_ratio", 4.0)), vision.get("heads") or max(1, width // vision.get("head_width", 64))
    return Shape(
        params, layers * matmul, 0, width, layers, width, width if embed_dim is None else embed_dim, False, 1, stem,
        inner=inner, heads=heads, key_width=width, largest=max(stem, width * inner),
    )  # fmt: skip


def transformers_tower(config: dict[str, Any], skip: int = 1) -> Shape:
    """A CLIP, SigLIP or DINOv2 vision tower from its Hugging Face config, without what stands above its last `skip` blocks."""
    if isinstance(config.get("vision_config"), dict):  # a composite's
        config = config["vision_config"]
    whole(config, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    ratio = config["intermediate_size"] / config["hidden_size"] if "intermediate_size" in config else config["mlp_ratio"]
    vision = {"width": config["hidden_size"], "layers": config["num_hidden_layers"], "mlp_ratio": ratio}
    vision["heads"] = config.get("num_attention_heads")
    return vision_tower({**vision, "image_size": config["image_size"], "patch_size": config["patch_size"]}, skip=skip)


def text_tower(text: dict[str, Any], embed_dim: int) -> Shape:
    """A CLIP text transformer."""
    whole(text, "width", "layers", "vocab_size", "context_length", "heads")
    width, layers = text["width"], text["layers"]
    block, matmul = _blocks(width, int(width * text.get("mlp_ratio", 4.0)))
    params = layers * block + (text["vocab_size"] + text["context_length"]) * width + 2 * width + width * embed_dim
    inner = int(width * text.get("mlp_ratio", 4.0))
    return Shape(
        params, layers * matmul, 0, width, layers, width, embed_dim, inner=inner, heads=text.get("heads", 8), key_width=width,
        largest=max(text["vocab_size"] * width, width * inner),
    )  # fmt: skip


def clip_params(config: dict[str, Any]) -> int:
    """Both towers and the temperature."""
    return vision_tower(config["vision_cfg"], config["embed_dim"]).params + text_tower(config["text_cfg"], config["embed_dim"]).params + 1


def connector(depth: int, inputs: int, outputs: int) -> Shape:
    """`depth` affine maps with GELU between them."""
    matmul = inputs * outputs + (depth - 1) * outputs * outputs
    largest = max(inputs * outputs, outputs * outputs if depth > 1 else 0)
    return Shape(matmul + depth * outputs, matmul, 0, outputs, 0, 0, outputs, inner=outputs, largest=largest)


def qwen2_vl(config: dict[str, Any]) -> dict[str, Shape]:
    """encoder (visual blocks), connector (visual.merger) and llm of a Qwen2VLConfig dict."""
    vision = config["vision_config"]
    text = config.get("text_config") or config
    width, depth = vision.get("embed_dim", 1280), vision.get("depth", 32)
    patch, merge, time = vision.get("patch_size", 14), vision.get("spatial_merge_size", 2), vision.get("temporal_patch_size", 2)
    block, matmul = _blocks(width, int(width * vision.get("mlp_ratio", 4)))
    stem = vision.get("in_channels", 3) * time * patch * patch * width
    mlp = int(width * vision.get("mlp_ratio", 4))
    encoder = Shape(
        depth * block + stem, depth * matmul, 0, width, depth, width, width, False, 0, stem,
        inner=mlp, heads=vision.get("num_heads", 16), key_width=width, largest=max(stem, width * mlp),
    )  # fmt: skip
    inner, out = width * merge * merge, text["hidden_size"]
    join = Shape(
        2 * width + inner * inner + inner + inner * out + out, inner * inner + inner * out, 0, out, 0, 0, out,
        inner=inner, largest=max(inner * inner, inner * out),
    )  # fmt: skip
    return {"encoder": encoder, "connector": join, "llm": language_model({"model_type": "qwen2_vl_text", **text})}


def image_tokens(recipe: dict[str, Any]) -> tuple[float, float]:
    """(patches that the encoder sees, tokens that the language model sees) of a typical image under an ImageRecipe.

    A native recipe depends on the image: a 640 x 480 photograph is assumed, within the recipe's limits.
    """
    if recipe["kind"] == "square":
        patches = (recipe["size"] // recipe["patch"]) ** 2
        return float(patches), float(patches)
    area = min(max(640 * 480, recipe.get("min_pixels") or 0), recipe.get("max_pixels") or 640 * 480)
    patches = area / recipe["patch"] ** 2
    return patches, patches / (recipe.get("merge") or 1) ** 2


KNOWN_LLMS = ("llama", "mistral", "qwen2", "qwen3")
"""Language models whose configs `language_model` reads; others may call the same numbers otherwise."""


def of(family: str, name: str, builder: str, config: dict[str, Any]) -> Shape | None:
    """The shape of a model's part from its architecture numbers; None where they are of a kind whose names aren't known here. Raises
    KeyError, TypeError, ValueError or ZeroDivisionError for numbers that are missing or can't be."""
    if builder == "qwen2_vl" or ("vision_config" in config and name != "encoder"):
        return qwen2_vl(config)[name]
    if name == "llm":
        if str(config.get("model_type", "llama")).startswith(KNOWN_LLMS):
            return language_model(config)
        try:
            return language_model(config)
        except KeyError:
            return None
    if name == "encoder":
        if "vision_cfg" not in config:
            return transformers_tower(config, skip=0 if family == "clip" else 1)
        if family == "clip":
            return vision_tower(config["vision_cfg"], config["embed_dim"])
        return vision_tower(config["vision_cfg"], skip=1)
    return None
