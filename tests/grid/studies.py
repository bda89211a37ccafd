"""A small study and profile as text, for tests that change a line of them."""

from __future__ import annotations

from pathlib import Path

STUDY = """\
study: small
question: What moves what?
seed: 3
compatibility: llava-1.5
recipe:
  encoder: weak
  llm: talker
  pretrain:
    data: captions
    epochs: 1
    batch: 8
    phases: [{until: 1.0, learning_rates: {connector: 1e-3}}]
  finetune:
    data: chats
    epochs: 1
    batch: 4
    phases: [{until: 1.0, learning_rates: {connector: 1e-3, llm: 1e-3}}]
templates: {talker: vicuna_v1, thinker: chatml}
axes:
  encoder: [weak, strong]
  llm: [talker, thinker]
  pretraining:
    none: {pretrain.data: none}
    short: {pretrain.data: captions}
  updating:
    connector: {pretrain.phases: [{until: 1.0, learning_rates: {connector: 1e-3}}]}
    full:
      pretrain.phases:
        - {until: 0.2, learning_rates: {connector: 1e-3}}
        - {until: 1.0, learning_rates: {connector: 1e-3, llm: 1e-3}}
base: {encoder: weak, llm: talker, pretraining: short, updating: connector}
arms:
  - {name: first}
  - {name: second, row: 2, at: {encoder: strong}}
  - {name: third, at: {updating: full}, set: {finetune.batch: 2}}
references:
  - {name: released, released: rival}
mining: {miner: miner, k: 4}
benchmarks:
  birds: {data: birds, negatives: mined, metric: mean_per_class, zeroshot: true}
  counts: {data: counts}
groups: {fine: [birds], general: [counts]}
contrasts:
  - {name: stronger, axis: encoder, from: weak, to: strong, where: pretraining=short;row!=9}
controls: {arms: [first]}
assumptions:
  - {key: recipe.pretrain.batch, value: 8, text: nobody said}
"""

ENCODER = """\
    image: {size: 32, patch: 8}
    config:
      embed_dim: 16
      vision_cfg: {image_size: 32, patch_size: 8, width: 32, layers: 2, head_width: 16}
      text_cfg: {context_length: 16, vocab_size: 100, width: 16, heads: 2, layers: 1}
      tokenizer: tiny-llama
    trained:
      - {data: captions, objective: {name: contrastive}, phases: [{until: 1, learning_rates: {encoder: 1e-3}}], steps: 5, batch: 8}
"""

PROFILE = f"""\
profile: small
about: for tests
miniature: true
resources: {{zero: 1, activation_checkpointing: false}}
encoders:
  weak:
    seed: 1
{ENCODER}  strong:
    seed: 2
{ENCODER}  miner:
    seed: 3
{ENCODER}llms:
  talker:
    tokenizer: tiny-llama
    config: {{model_type: llama, vocab_size: 100, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}}
    trained:
      - {{data: words, phases: [{{until: 1, learning_rates: {{llm: 1e-3}}}}], steps: 4, batch: 8}}
  thinker:
    initial: talker
    trained:
      - {{data: words, phases: [{{until: 1, learning_rates: {{llm: 1e-3}}}}], steps: 2, batch: 8}}
models:
  rival: {{stand_in: {{seed: 9}}}}
  elder:
    family: qwen2_vl
    checkpoint: nowhere/elder
    revision: abc
    template: chatml
    image: {{kind: native, patch: 8, merge: 2, min_pixels: 64, max_pixels: 4096}}
connectors:
  rivals-connector: {{of: rival}}
data:
  captions: {{source: specimens, keys: {{part: captions, rows: 100}}, tokens: 10}}
  chats: {{source: specimens, keys: {{part: instructions, rows: 30}}, tokens: 40, images: 0.5}}
  words: {{source: specimens, keys: {{part: corpus, rows: 50}}, images: 0}}
  birds: {{source: specimens, keys: {{part: labelled, set: flowers, split: test, rows: 20}}}}
  counts: {{source: specimens, keys: {{part: questions, set: count, split: test, rows: 10}}}}
"""


def write(directory: Path, study: str = STUDY, profile: str = PROFILE) -> tuple[str, str]:
    """(study file, profile file) below the directory."""
    (directory / "study.yaml").write_text(study)
    (directory / "profile.yaml").write_text(profile)
    return str(directory / "study.yaml"), str(directory / "profile.yaml")


def changed(text: str, old: str, new: str) -> str:
    """The text with its only `old` replaced; a test that changes nothing would prove nothing."""
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
    return text.replace(old, new)


def write_big(directory: Path) -> tuple[str, str]:
    """A study of 10,000 arms (8 cells, 1,250 seeds each) and its profile."""
    entries = "  - {product: {encoder: [weak, strong], llm: [talker, thinker], updating: [connector, full]}, seeds: [%s]}\n"
    start, end = STUDY.index("  - {name: first}"), STUDY.index("references:")
    study = STUDY[:start] + entries % ", ".join(map(str, range(100, 1350))) + STUDY[end:].replace("controls: {arms: [first]}\n", "")
    return write(directory, study, PROFILE)
