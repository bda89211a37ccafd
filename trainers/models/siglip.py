"""Family `clip` for SigLIP (Zhai et al. 2023) and SigLIP 2 of fixed sizes (Tschannen et al. 2025): transformers' SiglipModel, both towers,
read by zero-shot classification and mining.

In: a part `{"builder": "transformers_vision", "config": {}, "weights": {"checkpoint", "revision"}}` whose checkpoint holds a whole SigLIP.
Out: a model with `embed_images`, `embed_texts` and `tokenize`. Texts are padded to the text tower's full length, as SigLIP was trained,
and read at their last position. Both were trained on small letters: SigLIP's tokenizer writes them by itself (and no punctuation), the
Gemma tokenizer that SigLIP 2's checkpoints name doesn't. A SigLIP 2 of any shape (NaFlex, model_type siglip2) is another architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from datasets_ray.errors import UserError
from datasets_ray.images import recipe_from_json
from trainers.models import released
from trainers.models.encoders import SIGLIP_MEAN, SIGLIP_STD, normalise
from trainers.models.weights import Source, make_part


class Siglip(nn.Module):
    """Parts: encoder (both towers, temperature and bias)."""

    streams = ("image", "text")

    def __init__(self, module: nn.Module, tokenizer: Any, image: dict[str, Any] | None) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"encoder": module})
        self.words = tokenizer
        self.tokenizer: str | None = None
        self.mean: tuple[float, ...] = SIGLIP_MEAN
        self.std: tuple[float, ...] = SIGLIP_STD
        if image is not None:
            recipe = recipe_from_json(image)
            self.mean, self.std = recipe.mean, recipe.std

    @classmethod
    def build(cls, spec: dict[str, Any], source: Source) -> Siglip:
        from transformers import AutoTokenizer, SiglipConfig, SiglipModel

        part = spec["parts"]["encoder"]
        path = source.released(part)
        whole = {} if path is None or set(part["config"]) - {"layer"} else released.config(path)  # a layer is an arm's choice
        if whole.get("model_type") != "siglip" or path is None:
            why = f"a {whole['model_type']} is no SigLIP" if whole else "only a whole released SigLIP has a text tower of its own"
            hint = "builder: open_clip (which reads transformers' CLIPModel checkpoints too), or a SigLIP checkpoint without `config`"
            raise UserError("a transformers_vision encoder neither mines nor classifies", why=why, hint=hint)
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"the tokenizer of {path} can't be loaded", why=str(error).strip().splitlines()[0]) from None
        config = SiglipConfig(**{key: value for key, value in whole.items() if key in ("text_config", "vision_config")})
        module = make_part("encoder", part, source, lambda: SiglipModel(config))
        vision: Any = config.vision_config
        size = vision.image_size
        if source.image is not None and source.image.get("size") != size:
            raise UserError(f"images of size {source.image.get('size')} for a SigLIP of size {size}", hint=f"kind: square, size: {size}")
        return cls(module, tokenizer, source.image)

    @property
    def siglip(self) -> Any:
        return self.parts["encoder"]

    @property
    def vocabulary(self) -> int:
        return self.siglip.config.text_config.vocab_size

    @property
    def context_length(self) -> int:
        """Tokens that the text tower reads, always."""
        return self.siglip.config.text_config.max_position_embeddings

    def embed_images(self, images: Tensor) -> Tensor:
        """uint8[N, H, W, 3] → float[N, E], unit length."""
        pixels = normalise(images, self.mean, self.std, self.siglip.logit_scale.dtype)
        return F.normalize(self.siglip.vision_model(pixel_values=pixels).pooler_output, dim=-1)

    def embed_texts(self, ids: Tensor) -> Tensor:
        """int64[S, L], padded to L = context_length → float[S, E], unit length."""
        return F.normalize(self.siglip.text_model(input_ids=ids).pooler_output, dim=-1)

    def tokenize(self, texts: Sequence[str], device: str) -> tuple[Tensor, int]:
        """(int64[S, L] of the texts in small letters, padded to the tower's length; how many were cut)."""
        texts = [text.lower() for text in texts]
        long = sum(len(ids) > self.context_length for ids in self.words(texts)["input_ids"])
        how = {"padding": "max_length", "max_length": self.context_length, "truncation": True, "return_tensors": "pt"}
        made = self.words(texts, **how)
        return made["input_ids"].to(device), long

    def activation_checkpointing(self, on: bool) -> None:
        """It is never trained here."""
