"""Makes the committed tokenizers; run once, the result is kept beside this file.

    python -m datasets_ray.tokenizers.train [--vocabulary 1536] [--english FILE ...] [--out DIR]

In: texts of the miniature world (`datasets_ray.specimens.text.corpus_sample`) and, with --english, files of ordinary sentences (a line
each; only merges are learned from them, no text is kept). Out: `tiny-llama/` and `tiny-qwen2/`, each a tokenizer.json and a
tokenizer_config.json that transformers loads. Species' names and option letters come out as one token, since they are seen often.
A new tokenizer is a new identity for every stage that names it: change the name (`tiny-llama-2`) when you change the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import string
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from datasets_ray.prompts import LETTERS, SUFFIX, TEMPLATES

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenisation (transformers, tokenization_qwen2.py)."""
QWEN2_SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]
LLAMA_SPECIALS = ["<unk>", "<s>", "</s>"]


def corpus(english: list[str]) -> list[str]:
    """Texts of the miniature world, the templates' own words and letters in the places where answers stand, and the English lines."""
    from datasets_ray.specimens.species import SPECIES
    from datasets_ray.specimens.text import corpus_sample

    templates = ["\n".join((t.system, t.first, t.later, t.user_close)) for t in TEMPLATES.values()]
    # without angle brackets: control tokens are added, not learned
    templates = [text.replace("<|", " ").replace("|>", " ").replace("{system}", "") for text in templates]
    letters = [f"\n{a}. \nASSISTANT: {a}\nassistant\n{a}\n[/INST] {a}" for a in LETTERS[:8]] * 50
    names = [f"{word} {word}\n{word}\n" for name in SPECIES for word in (name, name.capitalize())] * 10
    prompts = [*templates, SUFFIX, "Answer the question using a single word or phrase."] * 100
    return corpus_sample(4000, 0) + prompts + letters + names + english


Bpe = tuple[list[str], list[tuple[str, str]]]
"""Vocabulary, alphabet first, and merges."""


def _merges(texts: list[str], splitter: Any, alphabet: list[str], size: int, marker: str, kept: tuple[str, ...]) -> Bpe:
    """A BPE of at most `size` tokens over pre-tokenised texts, in which every `kept` word is one token."""
    learned = size
    while len((found := _learn(texts, splitter, alphabet, learned, marker, kept))[0]) > size:
        learned -= len(found[0]) - size
    return found


def _learn(texts: list[str], splitter: Any, alphabet: list[str], size: int, marker: str, kept: tuple[str, ...]) -> Bpe:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False)
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [tuple(pair) for pair in model["merges"]]
    for word in kept:
        for text in (word, marker + word):
            parts = [token.value for token in _cut(vocabulary, merges, text)]
            while len(parts) > 1:
                merges.append((parts[0], parts[1]))
                parts = [parts[0] + parts[1], *parts[2:]]
                vocabulary.append(parts[0])
    return vocabulary, merges


def _cut(vocabulary: list[str], merges: list[tuple[str, str]], text: str) -> list[Any]:
    """How this BPE cuts a single word."""
    return models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges).tokenize(text)


def train_llama(texts: list[str], size: int, kept: tuple[str, ...]) -> Tokenizer:
    """Metaspace words, no merges across words; characters outside the alphabet fall back to `<0x..>` bytes."""
    split: list[Any] = [pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"), pre_tokenizers.Split(Regex(r"\n"), "isolated")]
    split += [pre_tokenizers.Split(Regex(r"[^\w\s▁]"), "isolated"), pre_tokenizers.Digits(individual_digits=True)]
    alphabet = sorted(set(string.ascii_letters + string.digits + string.punctuation) | {"▁"})
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    # a newline isn't in the alphabet: it is a byte, as in Llama
    learned, merges = _merges(texts, pre_tokenizers.Sequence(split), alphabet, size - 259, "▁", kept)
    vocabulary = {token: i for i, token in enumerate([*LLAMA_SPECIALS, *byte_tokens, *learned])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(LLAMA_SPECIALS)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


def train_qwen2(texts: list[str], size: int, kept: tuple[str, ...]) -> Tokenizer:
    """Byte-level BPE with Qwen2's split and control tokens."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    learned, merges = _merges(texts, split, sorted(pre_tokenizers.ByteLevel.alphabet()), size - len(QWEN2_SPECIALS), "Ġ", kept)
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(learned)}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(QWEN2_SPECIALS)
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, **config: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "model_max_length": 1 << 20, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=1536)
    parser.add_argument("--english", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args(arguments)
    from datasets_ray.specimens.species import SPECIES

    texts = corpus([line for path in options.english for line in path.read_text().splitlines()])
    kept = (*SPECIES, *LETTERS[:8])
    llama, qwen2 = train_llama(texts, options.vocabulary, kept), train_qwen2(texts, options.vocabulary, kept)
    save(llama, options.out / "tiny-llama", bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")
    save(qwen2, options.out / "tiny-qwen2", eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    for name, tokenizer in (("tiny-llama", llama), ("tiny-qwen2", qwen2)):
        pieces = {name: len(tokenizer.encode(f"a {name}", add_special_tokens=False).ids) - 1 for name in kept}
        print(f"{name}: {tokenizer.get_vocab_size()} tokens; species of more than one: {[n for n, count in pieces.items() if count > 1]}")


if __name__ == "__main__":
    main()
