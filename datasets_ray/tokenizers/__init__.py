"""Two small tokenizers: `tiny-llama` (byte-fallback BPE like Llama's) and `tiny-qwen2` (byte-level BPE like Qwen2's).

They are kept in the repository, read with `datasets_ray.tokens.load_tokenizer` and were made once by
`python -m datasets_ray.tokenizers.train`.
"""
