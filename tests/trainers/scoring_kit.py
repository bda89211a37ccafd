"""What the tests of scoring share: models trained for a second to answer with letters, questions about few images, plain references."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from datasets_ray.answers import LETTERS
from datasets_ray.images import recipe_from_json
from datasets_ray.prompts import generation_prompt, question_prompt, render
from datasets_ray.questions import Pixels
from datasets_ray.rows import RowTable, row, write_rows
from datasets_ray.tokens import Encoded, encode, encode_many, end_id, load_tokenizer
from tests.trainers import evaluation_kit as kit
from trainers.batch import TensorPack, learned_positions
from trainers.context import Context
from trainers.models import build, save_part

QWEN2 = {**kit.LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}
LLMS = {"llama": (kit.LLAMA, "tiny-llama", "vicuna_v1"), "qwen2": (QWEN2, "tiny-qwen2", "chatml")}
NO_IMAGE = "no photo here"
IMAGE_TOKENS = 4


def spec_of(llm: str) -> dict[str, Any]:
    """ModelSpec of a VLM with fresh weights around this kind of language model."""
    config, tokenizer, template = LLMS[llm]
    spec = kit.vlm_spec()
    spec["parts"]["llm"] = kit.fresh(config, "causal_lm", 3)
    return {**spec, "tokenizer": tokenizer, "template": template}


def lettered(folder: Path, llm: str = "llama", steps: int = 100) -> dict[str, Any]:
    """ModelSpec of a VLM that has learned to answer with the last option's letter, and NO_IMAGE where it is shown nothing. Its weights lie
    in `folder`, the artefact of stage "lettered"."""
    spec = spec_of(llm)
    model = build(spec, Context.local(folder / "building", {"id": "t", "spec": {}}), image=kit.IMAGE).train()
    asked = RowTable(kit.questions(folder / "lessons", 256, text_only=48))
    pixels = Pixels(asked, recipe_from_json(kit.IMAGE))
    tokenizer = load_tokenizer(spec["tokenizer"])
    rendered = []
    for question in asked:
        answer = LETTERS[len(question["options"]) - 1] if question["images"] else NO_IMAGE
        messages = [{"role": "user", "text": question_prompt(question, kit.SUFFIX)}, {"role": "assistant", "text": answer}]
        rendered.append(render({"messages": messages}, spec["template"], bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or ""))
    counts = [[IMAGE_TOKENS] * len(question["images"]) for question in asked]
    lessons = encode_many(rendered, tokenizer, counts, 1 << 20)
    taught = [*model.parts["llm"].parameters(), *model.parts["connector"].parameters()]
    optimizer = torch.optim.AdamW(taught, lr=4e-3)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.permutation(len(asked))[:24].tolist()
        pack = pack_of([lessons[r] for r in rows], [image for r in rows for image in pixels.of(r)])
        labels = np.concatenate([lessons[r].labels for r in rows])
        at, targets = learned_positions(labels, pack.lengths.numpy())
        loss = F.cross_entropy(model.logits(model.hidden(pack)[torch.from_numpy(at)]), torch.from_numpy(targets))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name in spec["parts"]:
        save_part(model, name, folder / f"{name}.safetensors")
        spec["parts"][name]["weights"] = {"stage": "lettered"}
    (folder / "model.json").write_text(json.dumps(spec))
    return spec


def rolled(folder: Path, images: int, turns: int = 3) -> Path:
    """For each image its question with the options rolled `turns` times, and another question about it. Rows are shuffled."""
    rng = np.random.default_rng(1)
    names, rows = sorted(kit.COLOURS), []
    for i in range(images):
        label = names[i % 5]
        shown = [str(name) for name in rng.permutation(names)[: 2 + i % 4]]
        shown = shown if label in shown else [label, *shown[1:]]
        image = [{"bytes": kit.square(label, i)}]
        for turn in range(turns):
            options = shown[turn % len(shown) :] + shown[: turn % len(shown)]
            answer = LETTERS[options.index(label)]
            rows.append(row(f"q{i}-{turn}", images=image, question="Which colour is this?", options=options, answer=answer, label=label))
        rows.append(row(f"q{i}-size", images=image, question="How big is the square?", options=["small", "large"], answer="A", label=label))
    write_rows([rows[k] for k in rng.permutation(len(rows))], folder, classes=names)
    return folder


def pack_of(encoded: Sequence[Encoded], images: Sequence[np.ndarray]) -> TensorPack:
    """Prompts end to end, as a model reads them."""
    ids = torch.from_numpy(np.concatenate([one.ids for one in encoded]))
    starts = np.cumsum([0, *(len(one.ids) for one in encoded)])
    slots = np.concatenate([one.image_slots + start for one, start in zip(encoded, starts)])
    return TensorPack(
        segments=len(encoded), sample=torch.arange(len(encoded)), lengths=torch.tensor([len(one.ids) for one in encoded]), ids=ids,
        positions=torch.cat([torch.arange(len(one.ids)) for one in encoded]), image_slots=torch.from_numpy(slots),
        images=torch.from_numpy(np.stack(images)) if len(images) else None,
    )  # fmt: skip


class Reference:
    """A model asked the plain way: one question at a time, the whole sequence read again for every token, no keys and values kept."""

    def __init__(self, spec: dict[str, Any], inputs: dict[str, Path], folder: Path, questions: Path) -> None:
        self.model = build(spec, Context.local(folder, {"id": "p", "spec": {}}, inputs), image=kit.IMAGE)
        self.template, self.tokenizer = spec["template"], load_tokenizer(spec["tokenizer"])
        self.rows = RowTable(questions)
        self.pixels = Pixels(self.rows, recipe_from_json(kit.IMAGE))

    def prompt(self, index: int) -> Encoded:
        row, tokenizer = self.rows[index], self.tokenizer
        one = generation_prompt(row, self.template, kit.SUFFIX, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or "")
        return encode(one, tokenizer, [IMAGE_TOKENS] * len(row["images"]), 4096)

    @torch.no_grad()
    def logits(self, encoded: Encoded, ids: torch.Tensor, index: int) -> torch.Tensor:
        """float[T, V] of a prompt with more tokens behind it."""
        whole = Encoded(ids.numpy(), ids.numpy(), encoded.image_slots, False)
        return self.model.logits(self.model.hidden(pack_of([whole], self.pixels.of(index))))

    def answer(self, index: int, limit: int = 8) -> tuple[str, bool]:
        """(text, whether the end token came) of greedy decoding."""
        encoded, end = self.prompt(index), end_id(self.template, self.tokenizer)
        ids, finished = torch.from_numpy(encoded.ids), False
        for _ in range(limit):
            following = int(self.logits(encoded, ids, index)[-1].argmax())
            if following == end:
                finished = True
                break
            ids = torch.cat([ids, torch.tensor([following])])
        return str(self.tokenizer.decode(ids[len(encoded.ids) :].tolist(), skip_special_tokens=True)).strip(), finished

    def likelihood(self, index: int, said: str) -> tuple[float, int]:
        """(Σ log p, tokens) of an answer with its end, from the whole conversation as training would encode it."""
        row, tokenizer = self.rows[index], self.tokenizer
        messages = [{"role": "user", "text": question_prompt(row, kit.SUFFIX)}, {"role": "assistant", "text": said}]
        one = render({"messages": messages}, self.template, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or "")
        whole = encode(one, tokenizer, [IMAGE_TOKENS] * len(row["images"]), 4096)
        at, targets = learned_positions(whole.labels, np.array([len(whole.ids)]))
        logits = self.logits(whole, torch.from_numpy(whole.ids), index)
        values = torch.log_softmax(logits.double(), -1)[torch.from_numpy(at), torch.from_numpy(targets)]
        return float(values.sum()), len(targets)
