"""A CLIP in `trainers.evaluate`: labelled benchmarks and a contrastive model in, its zero-shot accuracies out (`trainers.zeroshot`).

Texts are the benchmark's (`templates`, `ensemble`), else "a photo of a {}". Embeddings are kept by the content of images and model, so that
an evaluation that was stopped embeds only what it hasn't. Among the choices it is scored where the benchmark has its questions, annotated
or mined by --miner.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets_ray import metrics
from datasets_ray.benchmarks import BenchmarkFile, stem
from datasets_ray.clip_templates import ensemble
from datasets_ray.errors import UserError
from trainers import question_sets, zeroshot
from trainers.context import Context


def evaluate(options: argparse.Namespace, files: Sequence[BenchmarkFile], kept: Path) -> dict[str, dict[str, Any]]:
    """Benchmark's name → its zero-shot scores. kept: where rows and embeddings stay. Raises UserError."""
    options.under_test = [options.model] if Path(options.model).is_dir() else []
    named = dict(zip(map(stem, question_sets.wanted(options)), files))
    unfit = [name for name, file in named.items() if file.negatives == "given"]
    if unfit:
        why = "a CLIP classifies labelled images"
        raise UserError(f"benchmark {unfit[0]} has no classes", why=why, hint="one whose wrong options are mined or annotated")
    results = {}
    for name, file in named.items():
        metric = options.metric or file.metric
        metrics.metric_named(metric)
        rows = question_sets.data_of(name, file, options, kept)
        print(f"{name}: {question_sets.facts(rows)}", file=sys.stderr)
        choices = rows if file.negatives == "annotated" else None
        if file.negatives == "mined" and options.miner:
            choices = question_sets.mined(name, rows, options, kept)
        texts = ensemble(file.ensemble, options.data_root) if file.ensemble else file.templates or question_sets.TEMPLATE
        similarities = question_sets.similar(options.model, rows, kept, name, texts, options, "similarities")
        spec = {"similarities": "similarities", "rows": "rows", "choices": "choices" if choices else None, "metric": metric}
        inputs = {"similarities": similarities, "rows": rows, **({"choices": choices} if choices else {})}
        results[name] = zeroshot.run(spec, Context.local(Path(options.out) / name, {"id": f"zeroshot-{name}", "spec": spec}, inputs))
    return results
