"""What makes a stage the same stage: canonical JSON of its kind and spec, hashed, under a version that rises with golden results.

`CLASSES` classes every configuration field: `identity` (can change a result), `runtime` (can't: how fast, where, how shown) or
`structure` (an object whose own fields are classed, or a name that a spec replaces by what it stands for). A test compares it
with the dataclasses, so that a new field is classed before it is used.
"""

from __future__ import annotations

import hashlib
from json.encoder import encode_basestring as _quoted  # type: ignore[attr-defined]
from typing import Any

IDENTITY_VERSION = 4
"""Rises whenever a change of code changes a golden result: finished stages of older versions are then not reused."""

IDENTITY, RUNTIME, STRUCTURE = "identity", "runtime", "structure"


def canonical(value: Any, known: dict[int, tuple[Any, str]] | None = None) -> str:
    """JSON with sorted keys and no blanks; 1.0 and 1 are the same number, so that `epochs: 1` and `epochs: 1.0` are one identity.

    known: identity of an object that many specs share → (the object, its text); it is not rendered again. ValueError for NaN and
    infinities, which have no place in a spec.
    """
    if isinstance(value, str):
        return _quoted(value)
    if value is None or value is True or value is False:
        return "null" if value is None else "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if value - value != 0.0:
            raise ValueError(f"{value} has no place in a spec")
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if known is not None and (text := known.get(id(value))) is not None:
        return text[1]
    if isinstance(value, dict):
        return "{" + ",".join([f"{_quoted(key)}:{canonical(value[key], known)}" for key in sorted(value)]) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join([canonical(item, known) for item in value]) + "]"
    raise TypeError(f"{type(value).__name__} has no place in a spec")


def stage_id(kind: str, spec: dict[str, Any]) -> str:
    """`train-3f2a9c01d4e5`: the kind and the first 12 hexadecimal digits of the content's SHA-256."""
    return identify(kind, canonical(spec))


def identify(kind: str, canonical_spec: str) -> str:
    """`stage_id` of a spec that is canonical JSON already."""
    content = f'{{"kind":{_quoted(kind)},"spec":{canonical_spec},"version":{IDENTITY_VERSION}}}'
    return f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _table(kind: str, **groups: str) -> dict[str, str]:
    return {f"{kind}.{name}": group for group, names in groups.items() for name in names.split()}


CLASSES: dict[str, str] = {
    **_table(
        "Study",
        identity="seed",
        structure="made_for compatibility recipe templates axes base arms references mining evaluation benchmarks controls limits",
        runtime="study question published paper_cost groups contrasts assumptions general_axis",
    ),
    **_table("Recipe", identity="encoder llm model init seed", structure="connector pretrain finetune"),
    **_table("Connector", identity="builder depth"),
    **_table(
        "Training",
        identity="data epochs steps batch objective schedule warmup clip max_tokens template fit order seed",
        structure="phases optimizer adapters",
    ),
    **_table("Adapter", identity="kind rank alpha dropout targets"),
    **_table("Phase", identity="until learning_rates"),
    **_table("Optimizer", identity="name betas eps weight_decay"),
    **_table("ArmEntry", structure="at product zip seeds set", runtime="name row"),
    **_table("Reference", structure="at", identity="released", runtime="name row"),
    **_table("Benchmark", identity="data negatives metric zeroshot templates ensemble suffix rule max_new_tokens judge", structure="use"),
    **_table("Mining", identity="miner k template question seed"),
    **_table("Evaluation", identity="suffix options rule max_new_tokens method fit", structure="judge"),
    **_table("Judge", identity="model", runtime="url key_env concurrency timeout attempts cache"),
    **_table("Contrast", runtime="name axis from to where"),
    **_table("Controls", structure="arms benchmarks", identity="seed"),
    **_table("Assumption", runtime="key value text"),
    **_table("Limits", identity="dropped"),
    **_table("PaperCost", runtime="devices device hours"),
    **_table("GeneralAxis", runtime="file name"),
    **_table(
        "Profile",
        identity="precision allow_subset batch_scale",
        structure="encoders llms models connectors data overrides",
        runtime="profile about miniature hollow device resources data_root store tracking",
    ),
    **_table("Image", identity="kind size patch merge min_pixels max_pixels mean std"),
    **_table("Encoder", identity="builder config checkpoint revision seed", structure="trained image", runtime="shape"),
    **_table("Llm", identity="config checkpoint revision seed tokenizer", structure="trained initial", runtime="shape"),
    **_table(
        "Model",
        identity="config checkpoint revision seed tokenizer template family prompts remote_code stand_in",
        structure="trained initial image",
        runtime="shape",
    ),
    **_table("Bridge", identity="checkpoint revision", structure="of"),
    **_table("Data", identity="source keys revision expect allow_subset", structure="concat", runtime="rows tokens images megabytes"),
    **_table("Device", runtime="name tflops mfu memory_gib host_gib"),
    **_table(
        "Resources",
        runtime="lanes workers gpus_per_worker cpus device threads object_store_mb cache_mb pixels_mb features_mb attempts trials "
        "collective_seconds grace_seconds budget_seconds dashboard micro_tokens checkpoint_steps eval_batch zero "
        "activation_checkpointing offload disable",
    ),
    **_table("Tracking", runtime="uri"),
}
