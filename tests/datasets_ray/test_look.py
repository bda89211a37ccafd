"""Looking at a row shows what training does with it."""

from __future__ import annotations

import io

from PIL import Image

from datasets_ray import look
from datasets_ray.encoding import Encoding
from datasets_ray.look import journey
from datasets_ray.pipeline import index_of, train_batches
from datasets_ray.rows import row, write_rows


def rows() -> list[dict]:
    file = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(file, "PNG")
    turns = [{"role": "user", "text": "<image>\nWhat is it?"}, {"role": "assistant", "text": "a lumora"}]
    torn = row("torn", images=[{"bytes": b"x"}], messages=turns)
    return [*(row(f"r{i}", images=[{"bytes": file.getvalue()}], messages=turns, label="lumora") for i in range(5)), torn]


def encoding() -> Encoding:
    image = {"kind": "square", "size": 16, "patch": 8}
    return Encoding.of(tokenizer="tiny-llama", template="vicuna_v1", image=image, max_tokens=99, streams={"text": "conversation"})


def test_a_journey_from_the_row_to_its_pack(tmp_path):
    write_rows(rows(), tmp_path)
    index = index_of([tmp_path], 6, epochs=1, seed=0)
    told = journey([tmp_path], encoding(), 2, index)
    assert "row 2 of 6: r2" in told
    assert "30x20 pixels → 2 x 2 patches, 4 tokens" in told
    assert "ASSISTANT:⟦ a lumora</s>⟧" in told
    assert "⟦▁a⟧ ⟦▁lumora⟧ ⟦</s>⟧" in told
    assert "<image>×4" in told
    with train_batches([tmp_path], encoding(), index) as stream:
        (batch,) = next(stream)
    within = index[0].tolist().index(2)
    text = batch.streams["text"]
    at = text.sample.tolist().index(within)
    start = int(text.lengths[:at].sum())
    assert f"tokens {start}-{start + text.lengths[at]} of {text.tokens}" in told
    assert "3 learned" in told


def test_a_dropped_row_says_why_and_a_wrong_number_how_many_there_are(tmp_path):
    write_rows(rows(), tmp_path)
    assert "image unreadable" in journey([tmp_path], encoding(), 5)
    assert "6 rows" in journey([tmp_path], encoding(), 6)


def test_the_command(tmp_path, capsys):
    write_rows(rows(), tmp_path)
    image = '{"kind":"square","size":8,"patch":8}'
    look.main([str(tmp_path), "--row", "1", "--tokenizer", "tiny-qwen2", "--template", "chatml", "--image", image])
    assert "⟦a lumora<|im_end|>⟧" in capsys.readouterr().out
