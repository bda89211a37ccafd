"""Multiple-choice questions a second: our `predict` stage against plain transformers, one question at a time.

One trained model, exported for the peers: the tiny profile's Qwen2 (96 wide, 2 layers) behind a small CLIP, taught for some seconds to
answer with letters. The same questions, each about an image of its own; the same answers, compared. One thread; models are loaded before.
As many questions as the smallest real sets have: a stage's fixed costs (four rows answered alone for the threshold, files) weigh as there.

    generate     greedy `LlavaForConditionalGeneration.generate`, one question at a time (VLMEvalKit's way)   against our first_token
    options      one full forward pass an option, log-probability of its letter (lmms-eval's way)             against our likelihood

Timed is everything from rows to answers: reading images, prompts, tokenising, the model, and for ours writing the artefact. The peers use
our renderer and image fitting instead of transformers' processor, which is slower; a forward pass makes logits only where they are
needed. Our likelihood stage scores letters and words of all options, the peer letters only.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.figure import Figure, in_turn, ratios
from tests.bench.side import Side

QUESTIONS = 1024
STEPS = 150
LIMIT = 8
LLM = {
    "model_type": "qwen2", "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1536, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


class Setting:
    """Makes what both sides read below `folder`: model, its export, questions."""

    def __init__(self, folder: str) -> None:
        import torch

        torch.set_num_threads(1)
        self.folder = Path(folder)

    def make(self) -> None:
        from tests.trainers import evaluation_kit as kit
        from tests.trainers import scoring_kit
        from trainers.export import export
        from trainers.interchange.arm import open_arm

        scoring_kit.LLMS["bench"] = (LLM, "tiny-qwen2", "chatml")
        scoring_kit.lettered(self.folder / "lettered", "bench", STEPS)
        export(open_arm(self.folder / "lettered", json.dumps(kit.IMAGE)), self.folder / "exported")
        kit.questions(self.folder / "questions", QUESTIONS)


class Ours:
    """The stage `predict`."""

    def __init__(self, folder: str) -> None:
        import torch

        from trainers.context import Cache

        torch.set_num_threads(1)
        self.folder, self.cache, self.runs = Path(folder), Cache(), 0

    def predict(self, method: str) -> dict[str, Any]:
        """Seconds, and by question the text or the letter. Keeps the model, and nothing else."""
        from pyarrow import parquet

        from tests.trainers import evaluation_kit as kit
        from trainers import predict
        from trainers.context import Context

        for kept in ("prompts:", "pixels:", "images:"):
            self.cache.drop(kept)
        self.runs += 1
        inputs = {"lettered": self.folder / "lettered", "questions": self.folder / "questions"}
        spec = {
            "model": json.loads((self.folder / "lettered" / "model.json").read_text()), "questions": "questions", "image": kit.IMAGE,
            "suffix": kit.SUFFIX, "method": method, "max_new_tokens": LIMIT, "precision": "fp32",
        }  # fmt: skip
        ctx = Context.local(self.folder / f"run-{self.runs}", {"id": "p", "spec": spec}, inputs, cache=self.cache)
        begin = time.perf_counter()
        summary = predict.run(spec, ctx)
        seconds = time.perf_counter() - begin
        table = parquet.read_table(ctx.out / "predictions.parquet").to_pydict()
        return {
            "seconds": seconds, "answers": table["likelihood_letter_raw_letter" if method == "likelihood" else "text"],
            "values": table.get("likelihood_letter_raw"), "shortcut": summary.get("shortcut"), "alone": summary["alone"],
        }  # fmt: skip


class Peer:
    """Plain transformers over the export, a question at a time."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import LlavaForConditionalGeneration

        from datasets_ray.images import recipe_from_json
        from datasets_ray.tokens import end_id, load_tokenizer
        from tests.trainers import evaluation_kit as kit

        torch.set_num_threads(1)
        self.folder, self.kit = Path(folder), kit
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(self.folder / "exported", dtype=torch.float32).eval()
        self.tokenizer, self.recipe = load_tokenizer("tiny-qwen2"), recipe_from_json(kit.IMAGE)
        self.end = end_id("chatml", self.tokenizer)

    def asked(self, row: dict[str, Any]) -> tuple[Any, Any]:
        """(ids int64[1, T], pixels float[1, 3, H, W]) of a question."""
        import numpy as np
        import torch

        from datasets_ray.images import pixels
        from datasets_ray.prompts import generation_prompt
        from datasets_ray.tokens import IMAGE_ID, encode
        from trainers.models.encoders import normalise

        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        prompt = generation_prompt(row, "chatml", self.kit.SUFFIX, bos=bos, eos=eos)
        ids = encode(prompt, self.tokenizer, [self.recipe.layout(1, 1).tokens], 4096).ids
        ids = np.where(ids == IMAGE_ID, self.model.config.image_token_id, ids)
        shown = torch.from_numpy(pixels(row["images"][0], self.recipe).copy())[None]
        return torch.from_numpy(ids)[None], normalise(shown, self.recipe.mean, self.recipe.std, torch.float32)

    def generate(self) -> dict[str, Any]:
        import torch

        from datasets_ray.rows import RowTable

        begin, answers = time.perf_counter(), []
        for row in RowTable(self.folder / "questions"):
            ids, pixels = self.asked(row)
            with torch.inference_mode():
                made = self.model.generate(
                    input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=LIMIT, do_sample=False,
                    eos_token_id=self.end, pad_token_id=self.end,
                )  # fmt: skip
            answers.append(str(self.tokenizer.decode(made[0, ids.shape[1] :].tolist(), skip_special_tokens=True)).strip())
        return {"seconds": time.perf_counter() - begin, "answers": answers}

    def options(self) -> dict[str, Any]:
        import torch

        from datasets_ray.answers import LETTERS
        from datasets_ray.rows import RowTable

        begin, values = time.perf_counter(), []
        for row in RowTable(self.folder / "questions"):
            ids, pixels = self.asked(row)
            sums = []
            for letter in LETTERS[: len(row["options"])]:
                said = torch.tensor([[*self.tokenizer(letter, add_special_tokens=False)["input_ids"], self.end]])
                whole = torch.cat([ids, said], 1)
                with torch.inference_mode():
                    logits = self.model(input_ids=whole, pixel_values=pixels, use_cache=False, logits_to_keep=said.shape[1] + 1).logits[0]
                # the export's vocabulary is rounded up: rows of nothing, that would take their share of the probability
                chosen = torch.log_softmax(logits[:-1, : LLM["vocab_size"]], -1).gather(1, said[0, :, None])
                sums.append(float(chosen.sum()))
            values.append(sums)
        letters = [LETTERS[max(range(len(sums)), key=sums.__getitem__)] for sums in values]
        return {"seconds": time.perf_counter() - begin, "answers": letters, "values": values}


def apart(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """The largest difference of two lists of lists."""
    return max(abs(a - b) for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True))


def measure(repeats: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        with Side("tests.bench.scoring:Setting", folder=folder) as setting:
            setting.ask("make")
        with Side("tests.bench.scoring:Ours", folder=folder) as ours, Side("tests.bench.scoring:Peer", folder=folder) as peer:
            made, theirs = ours.ask("predict", "first_token"), peer.ask("generate")  # the warm-up
            assert made["answers"] == theirs["answers"], "other answers than generate"
            scored, options = ours.ask("predict", "likelihood"), peer.ask("options")
            assert scored["answers"] == options["answers"] and apart(scored["values"], options["values"]) < 1e-4, "other likelihoods"
            first, likelihood, generate, forwards = in_turn(
                repeats, lambda: QUESTIONS / ours.ask("predict", "first_token")["seconds"],
                lambda: QUESTIONS / ours.ask("predict", "likelihood")["seconds"], lambda: QUESTIONS / peer.ask("generate")["seconds"],
                lambda: QUESTIONS / peer.ask("options")["seconds"],
            )  # fmt: skip
    unit, equal = "questions/s", f"{QUESTIONS} questions, equal answers"
    settled = f"{made['shortcut']} of {QUESTIONS} by the shortcut, {made['alone']} answered again alone"
    return [
        Figure("scoring: ours, first_token", unit, first, note=settled),
        Figure("scoring: ours, likelihood", unit, likelihood, note="letters and words of all options"),
        Figure("scoring: generate, one by one", unit, generate),
        Figure("scoring: one forward an option", unit, forwards),
        Figure("scoring: first_token / generate one by one", "x", ratios(first, generate), 10.0, "higher", equal),
        Figure("scoring: likelihood / one forward an option", "x", ratios(likelihood, forwards), 4.0, "higher", f"{equal} and likelihoods"),
        Figure(
            "scoring: first_token / one forward an option", "x", ratios(first, forwards), note="answers of greedy text, not likelihoods"
        ),
    ]
