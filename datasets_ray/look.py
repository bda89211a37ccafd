"""A row's journey, to read: raw → images → prompt → tokens → loss mask → step and pack.

    python -m datasets_ray.look ROWS [ROWS ...] --tokenizer tiny-llama --template vicuna_v1
        [--image '{"kind": "square", "size": 32, "patch": 8}'] [--row 0] [--max-tokens 2048] [--batch 128 --micro-tokens 4096]

In: rows artefacts and an `Encoding`, the very ones of a stage. Out: text made by the functions that training uses, so that what is shown
is what happens. `grid.look` finds the artefacts and the encoding of an arm and calls `journey`. Learned text is shown between ⟦ and ⟧.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datasets_ray.encoding import KINDS, Encoding, Place, Record, StreamSpec, encode_rows, layouts
from datasets_ray.errors import UserError
from datasets_ray.images import ImageError, image_size
from datasets_ray.order import StepIndex
from datasets_ray.pipeline import Tables, TrainTask, index_of, read
from datasets_ray.prompts import Rendered, RowError
from datasets_ray.rows import open_rows
from datasets_ray.tokens import IGNORE, IMAGE_ID, decode_pieces, load_tokenizer


def journey(
    directories: Sequence[str | Path], encoding: Encoding, number: int, index: StepIndex | None = None, micro_tokens: int = 4096
) -> str:
    """The journey of row `number` (counted over the artefacts end to end) as text. index: the stage's steps, to show where it lands."""
    tables = Tables([str(directory) for directory in directories])
    if not 0 <= number < len(tables):
        return f"There are {len(tables)} rows; row {number} isn't one of them."
    (place,) = tables.places([number])
    row = read(place)
    (record,) = encode_rows([row], [place], encoding)
    parts = [_section(f"row {number} of {len(tables)}: {row['id']}", _raw(row)), _section("images", _images(row, place, encoding))]
    for name, spec in encoding.streams.items():
        parts += _stream(row, record, name, spec, encoding)
    if record.sample is None:
        parts.append(_section("dropped", record.reason))
    elif index is not None:
        parts.append(_section("step and pack", _places(directories, encoding, number, index, micro_tokens)))
    return "\n\n".join(parts)


def _images(row: dict, place: Place, encoding: Encoding) -> str:
    root = open_rows(place.directory).root
    lines = []
    for at, image in enumerate(row["images"]):
        try:
            (shape,) = layouts({**row, "images": [image]}, root, encoding.image)
            width, height = image_size(image, root)
            lines.append(f"{at + 1}. {width}x{height} pixels → {shape.grid_h} x {shape.grid_w} patches, {shape.tokens} tokens")
        except (ImageError, RowError) as error:
            lines.append(f"{at + 1}. {error}")
    return "\n".join(lines or ["none"])


def _stream(row: dict, record: Record, name: str, spec: StreamSpec, encoding: Encoding) -> list[str]:
    title, render = f"stream {name} ({spec.kind})", KINDS[spec.kind].render
    if render is None:
        return [_section(title, "images alone, no text")]
    tokenizer = load_tokenizer(encoding.tokenizer or "", encoding.revision)
    try:
        parts = [_section(f"{title}: prompt, template {encoding.template}", marked(render(row, encoding, spec, tokenizer)))]
    except RowError as error:
        return [_section(title, str(error))]
    if record.sample is not None:
        one = record.sample[name]
        told = f"{len(one.ids)} tokens, {one.valid} learned" + (f", cut at {encoding.max_tokens}" if record.truncated else "")
        parts.append(_section(f"tokens of {encoding.tokenizer}: {told}", _tokens(one.ids, one.labels, tokenizer)))
    return parts


def marked(rendered: Rendered) -> str:
    """The prompt with its learned pieces between ⟦ and ⟧ and its line ends visible."""
    return "".join(f"⟦{text}⟧" if learned else text for text, learned in rendered.runs()).replace("\n", "⏎\n")


def _section(title: str, body: str) -> str:
    return f"── {title}\n" + textwrap.indent(body, "   ")


def _raw(row: dict) -> str:
    lines = [f"{one['role']}: {one['text']}" for one in row["messages"]]
    lines += [f"{name}: {row[name]}" for name in ("question", "hint", "options", "answer", "label") if row[name]]
    return "\n".join([*lines, f"meta: {row['meta']}"])


def _tokens(ids: np.ndarray, labels: np.ndarray, tokenizer) -> str:
    """Vocabulary entries, runs of image positions as one word, learned ones marked, wrapped to the terminal."""
    words: list[str] = []
    for at, word in enumerate(decode_pieces(ids, tokenizer)):
        if ids[at] == IMAGE_ID:
            run = int(words.pop()[len("<image>×") :]) if words and words[-1].startswith("<image>×") else 0
            words.append(f"<image>×{run + 1}")
        else:
            words.append(f"⟦{word}⟧" if labels[at] != IGNORE else word)
    return textwrap.fill(" ".join(words), width=shutil.get_terminal_size((120, 0)).columns - 4, break_long_words=False)


def _places(directories: Sequence[str | Path], encoding: Encoding, number: int, index: StepIndex, micro_tokens: int) -> str:
    """Every step that holds the row, with its micro-batch and place there (the first three)."""
    task = TrainTask(tuple(str(d) for d in directories), encoding, 0, 1, micro_tokens)
    places = np.flatnonzero(index.rows == number)
    lines = []
    for place in places[:3]:
        step, within = divmod(int(place), index.batch)
        batches, _ = task(index[step])
        for count, batch in enumerate(batches):
            pack = next(iter(batch.streams.values()))
            at = np.flatnonzero(pack.sample == within)
            if len(at):
                start = int(pack.lengths[: at[0]].sum())
                lines.append(
                    f"step {step + 1} of {len(index)}, sample {within + 1} of {len(index[step])}: "
                    f"micro-batch {count + 1} of {len(batches)}, "
                    f"tokens {start}-{start + int(pack.lengths[at[0]])} of {pack.tokens} ({len(pack.lengths)} samples); "
                    f"{batch.valid_tokens} learned tokens in the step"
                )
    if len(places) > 3:
        lines.append(f"and {len(places) - 3} more steps")
    return "\n".join(lines) if lines else f"in none of the {len(index)} steps (the stage is shorter than an epoch)"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="datasets_ray.look", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", type=Path)
    parser.add_argument("--row", type=int, default=0)
    parser.add_argument("--tokenizer", default="tiny-llama")
    parser.add_argument("--template", default="vicuna_v1")
    parser.add_argument("--image", type=json.loads, default={"kind": "square", "size": 32, "patch": 8})
    parser.add_argument("--streams", type=json.loads, default={"text": "conversation"})
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--micro-tokens", type=int, default=4096)
    options = parser.parse_args(arguments)
    try:
        encoding = Encoding.of(
            tokenizer=options.tokenizer, template=options.template, image=options.image, max_tokens=options.max_tokens,
            streams=options.streams,
        )  # fmt: skip
        index = index_of(options.rows, options.batch, epochs=1.0)
        print(journey(options.rows, encoding, options.row, index, options.micro_tokens))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
