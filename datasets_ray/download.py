"""Fetches the images of a release that only names their addresses (PixMo), with Ray Data, and records what is dead.

    python -m datasets_ray.download PARQUET ... --images DIR [--column image_url] [--workers 64] [--timeout 20] [--retries 3]

Flows in: Parquet files with a column of addresses. Flows out, in DIR: an image under the hash of its address (`ab/<sha256>`), and
`downloads.jsonl`: a line per address with url, status (ok | dead | corrupt | too_large), reason, sha256 and bytes of the content. Only what
decodes is kept; a file gets its name last. The same command again goes on: what is there or known to be lost is skipped (--again tries the
lost once more). http and https only, redirects included.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from datasets_ray.columns import Columns
from datasets_ray.errors import Parser, UserError, run_command
from datasets_ray.fetch import Fetch, Limits, image_path
from datasets_ray.images import MAX_BYTES

STATE = "downloads.jsonl"
CHUNK = 256
"""Addresses of one task: what is recorded at a time."""
THREADS = 16
"""Downloads at a time in one task."""
TASK_CPUS = 0.5
TELL_SECONDS = 10.0

__all__ = ["download", "image_path", "read_state"]


def read_state(images: Path) -> dict[str, dict[str, Any]]:
    """The last record of each address; a line that a killed downloader left torn is skipped."""
    path, state = images / STATE, dict[str, dict[str, Any]]()
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    state[record["url"]] = record
                except (ValueError, KeyError, TypeError):
                    continue
    return state


class _Chunk:
    """A task's addresses as Ray Data sees them; an exception comes back as its text, since Ray would wrap it and try again."""

    def __init__(self, fetch: Fetch, threads: int = THREADS) -> None:
        self.fetch, self.threads = fetch, threads

    def __call__(self, item: dict[str, Any]) -> dict[str, bytes]:
        try:
            return {"made": pickle.dumps(self.run(pickle.loads(item["urls"])))}
        except OSError as error:
            return {"made": pickle.dumps(str(error))}

    def run(self, urls: Sequence[str]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self.fetch, urls))


def _plain(chunk: _Chunk, chunks: Iterable[Sequence[str]]) -> Iterator[list[dict[str, Any]] | str]:
    for urls in chunks:
        try:
            yield chunk.run(urls)
        except OSError as error:
            yield str(error)


def _by_ray(chunk: _Chunk, chunks: Sequence[Sequence[str]], tasks: int) -> Iterator[list[dict[str, Any]] | str]:
    import ray.data
    from ray.data import TaskPoolStrategy

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    items = [{"urls": pickle.dumps(list(urls))} for urls in chunks]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(chunk, num_cpus=TASK_CPUS, compute=TaskPoolStrategy(tasks))
    dataset.context.enable_progress_bars = False
    for item in dataset.iter_rows():
        yield pickle.loads(item["made"])


def _ray_is_up() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def download(
    urls: Iterable[str], images: Path, limits: Limits | None = None, *, workers: int = 64, again: bool = False, tell: bool = False
) -> dict[str, dict[str, Any]]:
    """Fetches every address once; returns the record of each. Through Ray Data where Ray runs, in threads of this process elsewhere.

    again: try also what an earlier run recorded as lost. tell: progress on stderr. UserError when the folder can't be written.
    """
    wanted = list(dict.fromkeys(url for url in urls if url))
    try:
        images.mkdir(parents=True, exist_ok=True)
        state = read_state(images)
        done = {url for url in wanted if url in state and _settled(state[url], images, again)}
        left = [url for url in wanted if url not in done]
        chunks = [left[at : at + CHUNK] for at in range(0, len(left), CHUNK)]
        fetch = Fetch(images, limits or Limits())
        if _ray_is_up() and chunks:
            made = _by_ray(_Chunk(fetch, min(workers, THREADS)), chunks, -(-workers // THREADS))
        else:
            made = _plain(_Chunk(fetch, workers), chunks)
        _record(made, images, state, len(wanted), len(done), tell)
    except OSError as error:
        raise UserError(f"{images} can't be written", why=str(error), hint="another --images, or make room") from None
    return {url: state[url] for url in wanted}


def _settled(record: dict[str, Any], images: Path, again: bool) -> bool:
    """There is nothing to do for this address: its image is there, or known to be lost."""
    return (images / image_path(record["url"])).exists() if record["status"] == "ok" else not again


def _ends_torn(path: Path) -> bool:
    """A killed writer left half a line."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _record(
    made: Iterator[list[dict[str, Any]] | str], images: Path, state: dict[str, dict[str, Any]], of: int, have: int, tell: bool
) -> None:  # fmt: skip
    """Appends what comes back to the state file, task by task."""
    path, told = images / STATE, time.monotonic()
    torn = _ends_torn(path)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * torn)
        for records in made:
            if isinstance(records, str):
                raise OSError(records)
            file.write("".join(json.dumps(record, sort_keys=True) + "\n" for record in records))
            file.flush()
            state.update((record["url"], record) for record in records)
            have += len(records)
            if tell and time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                print(f"{have:,} of {of:,} addresses", file=sys.stderr, flush=True)


def summary(records: dict[str, dict[str, Any]]) -> str:
    """Counts by status, and by reason for what is lost."""
    by_status = Counter(record["status"] for record in records.values())
    lines = [f"{len(records):,} addresses: " + ", ".join(f"{count:,} {status}" for status, count in by_status.most_common())]
    lost = Counter((r["status"], r["reason"]) for r in records.values() if r["status"] != "ok")
    return "\n".join(lines + [f"  {count:>9,} {status}: {reason}" for (status, reason), count in lost.most_common()])


def _files(names: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for name in names:
        found = sorted(Path(name).glob("*.parquet")) if Path(name).is_dir() else [Path(name)]
        if not found or not found[0].is_file():
            raise UserError(f"no Parquet file {name}", hint="the release's files, or the folder that holds them")
        files += found
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m datasets_ray.download", description="Fetches the images that a Parquet column names.")
    parser.add_argument("parquet", nargs="+", help="Parquet files, or folders of them")
    parser.add_argument("--images", required=True, help="folder to fill")
    parser.add_argument("--column", default="image_url", help="column of the addresses (image_url)")
    parser.add_argument("--rows", type=int, default=None, help="only the first n rows")
    parser.add_argument("--workers", type=int, default=64, help="downloads at a time, over all machines (64)")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds that one image may take (20)")
    parser.add_argument("--retries", type=int, default=3, help="further attempts after a timeout or a busy server (3)")
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES, help=f"largest image ({MAX_BYTES})")
    parser.add_argument("--again", action="store_true", help="try once more what was lost before")
    parser.add_argument("--plain", action="store_true", help="without Ray, in this process")
    options = parser.parse_args(arguments)
    if min(options.workers, options.timeout, options.max_bytes) <= 0 or options.retries < 0:
        raise UserError("--workers, --timeout and --max-bytes are positive, --retries isn't negative")
    columns = Columns(_files(options.parquet))
    urls = columns.column(columns.need("--column", options.column, ("string", "large_string")), options.rows)
    limits = Limits(options.timeout, options.retries, options.max_bytes)
    started = not options.plain and not _ray_is_up()
    if started:
        import ray

        # a cluster is joined as it is; a Ray of our own has no dashboard, since the command ends when it is done
        own: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **own)
    try:
        print(summary(download(urls, Path(options.images).absolute(), limits, workers=options.workers, again=options.again, tell=True)))
    finally:
        if started:
            ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
