"""A run directory without a run: artefacts for any plan, made from a seed, so that reports can be tested in seconds.

In: a plan (plan.json's dictionary). Out: the directory with plan.json, run files and a store as lanes leave it. Answers are drawn
per question: a question has a difficulty, an arm an ability; what an arm gets right is therefore shared between arms.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from datasets_ray.rows import RowTable, row, write_rows
from trainers.score import score, write
from trainers.zeroshot import answers

SPECIES = ("rose", "tulip", "iris", "lily", "poppy", "daisy", "aster", "lotus")
LETTERS = "ABCDE"
METRICS = {"imagenet": "mean_per_class", "pets": "accuracy", "mmbench": "accuracy"}
ROWS = (
    (1, "released", "weak", "llava"),
    (3, "trained", "weak", "none"),
    (6, "trained", "strong", "none"),
    (12, "trained", "weak", "llava"),
    (13, "trained", "strong", "llava"),
)
"""(row, source, encoder, pretraining)"""
Ability = Callable[[str, dict[str, str], str], float]
"""(arm, axes, benchmark) → log-odds of knowing a question of middling difficulty; far below zero is chance."""


def seed_of(*parts: Any) -> int:
    return zlib.crc32("/".join(map(str, parts)).encode())


class Stages(dict[str, dict[str, Any]]):
    """Planned stages by id; adding an equal one again changes nothing."""

    def add(self, kind: str, name: str, spec: dict[str, Any], needs: list[str]) -> str:
        id = f"{kind}-{seed_of(kind, name):012x}"
        entry = {"id": id, "kind": kind, "name": name, "spec": spec, "needs": needs, "arms": [], "runtime": {}, "cost": {"seconds": 2.0}}
        self.setdefault(id, entry)
        return id


def small_plan() -> dict[str, Any]:
    """Two encoders × two pretrainings and one released model on three benchmarks in two groups."""
    stages = Stages()
    arms = [_planned(stages, *row) for row in ROWS]
    assumption = {"key": "init", "value": "fresh", "text": "nobody says"}
    return {
        "study": {
            "name": "toy", "question": "Does it report?", "file": None, "profile": "tiny", "profile_reason": "default", "miniature": True,
            "seed": 0, "assumptions": [assumption], "notices": ["a notice of the plan"],
        },
        "groups": {"fine_grained": ["imagenet", "pets"], "general_vqa": ["mmbench"]},
        "contrasts": [
            {"name": "strong_vs_weak", "axis": "encoder", "from": "weak", "to": "strong", "where": "arch=llava"},
            {"name": "pretraining", "axis": "pretraining", "from": "none", "to": "llava", "where": ""},
        ],
        "published": "fine_grained_ablation.csv",
        "arms": [arm for arm in arms if arm["source"] == "trained"],
        "references": [arm for arm in arms if arm["source"] == "released"],
        "stages": list(stages.values()),
        "totals": {},
    }  # fmt: skip


def _planned(stages: Stages, number: int, source: str, encoder: str, pretraining: str) -> dict[str, Any]:
    name = f"row-{number:02d}"
    train = stages.add("train", f"finetune {name}", {"model": {}}, [])
    axes = {"encoder": encoder, "llm": "small", "arch": "llava", "pretraining": pretraining, "finetuning": "llava", "updating": "connector"}
    entry: dict[str, Any] = {"name": name, "row": number, "source": source, "init": "fresh", "seed": 0, "changes": {}, "axes": axes}
    entry |= {"scores": {}, "predictions": {}, "controls": {}, "zeroshot": {}}

    def asked(benchmark: str, questions: str, said: str) -> tuple[str, str]:
        predict = stages.add("predict", f"predict {name} {said}", {"questions": questions}, [questions, train])
        spec = {"predictions": predict, "rule": "vlmevalkit", "metric": METRICS[benchmark]}
        return predict, stages.add("score", f"score {name} {said}", spec, [predict])

    for benchmark in METRICS:
        data = stages.add("dataset", f"data {benchmark}", {"source": "specimens", "part": benchmark}, [])
        entry["predictions"][benchmark], entry["scores"][benchmark] = asked(benchmark, data, benchmark)
        if benchmark != "mmbench":
            entry["zeroshot"][benchmark] = stages.add("zeroshot", f"zero-shot {benchmark} {encoder}", {"rows": data}, [data])
        if number == 13:
            permuted = stages.add("dataset", f"permuted {benchmark}", {"source": "permuted", "input": data, "seed": 0}, [data])
            entry["controls"][benchmark] = asked(benchmark, permuted, f"permuted {benchmark}")[1]
    entry["stages"] = [train, *entry["predictions"].values(), *entry["scores"].values()]
    return entry


def default_ability(arm: str, axes: dict[str, str], benchmark: str) -> float:
    value = 0.2 + 0.9 * ("strong" in axes["encoder"] or "dfn" in axes["encoder"]) + 0.5 * (axes["pretraining"] != "none")
    value += 0.7 * ("qwen2" in axes["llm"]) + 0.4 * (axes["updating"] == "full")
    return value + 0.2 * np.random.default_rng(seed_of(arm, benchmark)).standard_normal()


@dataclass
class Maker:
    """Writes one artefact after another."""

    store: Path
    n: int
    ability: Ability
    who: dict[str, tuple[dict[str, Any], str, bool]]
    """predict stage → arm, benchmark, whether it is the control."""
    asked: set[str]

    def make(self, stage: dict[str, Any]) -> None:
        folder = self.store / stage["id"]
        folder.mkdir(parents=True, exist_ok=True)
        summary: dict[str, Any] = {}
        if stage["id"] in self.asked:
            write_rows(self.questions(stage), folder, classes=list(SPECIES))
            summary = {"rows": self.n, "dropped": {"unreadable image": 2}}
        elif stage["kind"] == "train":
            summary = {"samples": 640, "truncated": 3}
            lines = [json.dumps({"step": k, "train/loss": 3.0 / (1 + 0.1 * k)}) for k in range(40)]
            (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 40, "tra')
        elif stage["kind"] == "predict":
            self.predict(stage, folder)
        elif stage["kind"] == "score":
            predictions = pq.read_table(self.store / stage["spec"]["predictions"] / "predictions.parquet")
            scored, summary = score(predictions, stage["spec"]["rule"], stage["spec"]["metric"])
            write(scored, summary, folder)
        elif stage["kind"] == "zeroshot":
            summary = {"top1": 0.7, "top5": 0.95, "mean_per_class": 0.69, "among_choices": 0.8, "n": self.n, "value": 70.0, "stderr": 1.0}
            (folder / "scores.json").write_text(json.dumps(summary))
            table = RowTable(self.store / stage["spec"]["rows"])
            ids, labels, options, right = (table.column(name) for name in ("id", "label", "options", "answer"))
            similar = np.random.default_rng(seed_of(stage["name"])).random((len(table), len(SPECIES)))
            asked = {id: (list(shown), letter) for id, shown, letter in zip(ids, options, right)}
            pq.write_table(answers(similar, list(SPECIES), list(ids), list(labels), asked), folder / "scored.parquet")
        done = {"stage": stage["id"], "summary": summary, "files": {}, "seconds": 1.5, "token": 1, "run": "0"}
        (folder / "DONE.json").write_text(json.dumps(done))

    def questions(self, stage: dict[str, Any]) -> list[dict[str, Any]]:
        rng = np.random.default_rng(seed_of(stage["name"].split()[-1]))
        rows = []
        for k in range(self.n):
            options = [str(name) for name in rng.permutation(SPECIES)[:5]]
            answer = int(rng.integers(5))
            coarse = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            pixels = coarse[:24].repeat(8, 0).repeat(8, 1) if k % 2 else coarse
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            shown = {"images": [{"bytes": buffer.getvalue()}], "question": "What type of object is in this photo?", "options": options}
            family = {"family": f"genus-{SPECIES.index(options[answer]) // 4}"}
            rows.append(row(f"q{k:04d}", **shown, answer=LETTERS[answer], label=options[answer], meta=family))
        return rows

    def predict(self, stage: dict[str, Any], folder: Path) -> None:
        arm, benchmark, control = self.who[stage["id"]]
        table = RowTable(self.store / stage["spec"]["questions"])
        rng = np.random.default_rng(seed_of(stage["name"]))
        hard = np.random.default_rng(seed_of(benchmark)).standard_normal(len(table))
        level = -99.0 if control else self.ability(arm["name"], arm["axes"], benchmark)
        columns: dict[str, list[Any]] = {name: [] for name in ("id", "prompt", "options", "answer", "label", "text", "finished")}
        for k in range(len(table)):
            asked = table[k]
            knows = rng.random() < 1 / (1 + np.exp(hard[k] * 1.5 - level))
            letter = asked["answer"] if knows else LETTERS[int(rng.integers(5))]
            text = "no idea, sorry" if rng.random() < 0.02 else letter
            values = (asked["id"], "...", asked["options"], asked["answer"], asked["label"], text, True)
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
        pq.write_table(pa.table(columns), folder / "predictions.parquet")
        (folder / "manifest.json").write_text(json.dumps({"dropped": {}}))


def make_run(out: Path, plan: dict[str, Any], n: int = 60, ability: Ability = default_ability, skip: tuple[str, ...] = ()) -> Path:
    """Writes the run directory; stages whose name starts with one of `skip` are left undone, and so is what needs them."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(plan))
    run = {"id": "0", "study": plan["study"]["name"], "epoch": 1, "store": str(out / "store"), "state": "finished"}
    run["drivers"] = [{"epoch": 1, "host": "here", "python": "3.11", "command": ["grid.run", "toy.yaml"], "versions": {"ray": "2"}}]
    (out / "run.json").write_text(json.dumps(run))
    budget = [{"what": "finetune", "stages": 4, "budget": 80.0, "took": 50.0}]
    summary = {"wall_seconds": 61.0, "budget_seconds": 900.0, "budget": budget, "overhead_seconds_per_arm": 0.4}
    summary["memory"] = {"peak_gib": 2.5}
    (out / "summary.json").write_text(json.dumps(summary))
    stages = {stage["id"]: stage for stage in plan["stages"]}
    who: dict[str, tuple[dict[str, Any], str, bool]] = {}
    for arm in [*plan["arms"], *plan["references"]]:
        who |= {id: (arm, benchmark, False) for benchmark, id in arm["predictions"].items()}
        who |= {stages[id]["spec"]["predictions"]: (arm, benchmark, True) for benchmark, id in arm["controls"].items()}
    maker = Maker(out / "store", n, ability, who, {stages[id]["spec"]["questions"] for id in who})
    undone: set[str] = set()
    for id, stage in stages.items():
        if (skip and stage["name"].startswith(skip)) or undone & set(stage["needs"]):
            undone.add(id)
        else:
            maker.make(stage)
    return out
