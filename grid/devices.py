"""Accelerators by name: what a data sheet says of one, so that `device: {name: H200}` needs no numbers. A name in; rates and memory out.

Rates are dense matrix products, as sold, without sparsity: NVIDIA's data sheets of the A100 (2021), H100 SXM and H200 SXM (2024). Memory is
GiB that a process can use: what is sold less what driver and error correction keep, rounded down. Hosts are what the common eight-device
(A100-40GB: also four-device) servers hold for each of their devices.
"""

from __future__ import annotations

from dataclasses import dataclass

from datasets_ray.errors import UserError, nearest


@dataclass(frozen=True)
class Specs:
    """One device. `bf16`, `fp32`: TFLOP/s; `memory_gib`, `host_gib`: GiB of its own and of its share of the server's."""

    name: str
    bf16: float
    fp32: float
    memory_gib: float
    host_gib: float

    def tflops(self, precision: str) -> float:
        """TFLOP/s at a profile's precision, `bf16` or `fp32` (TF32 is off: it would change results)."""
        return self.bf16 if precision == "bf16" else self.fp32


DEVICES: dict[str, Specs] = {
    specs.name: specs
    for specs in (
        Specs("A100-40GB", 312.0, 19.5, 39.0, 128.0),
        Specs("A100-80GB", 312.0, 19.5, 79.0, 128.0),
        Specs("H100-80GB", 989.0, 67.0, 79.0, 192.0),
        Specs("H200", 989.0, 67.0, 139.0, 192.0),
        Specs("one CPU core", 0.05, 0.05, 4.0, 0.0),
    )
}
"""By name; `A100-40G` is the same as `A100-40GB`."""


def specs(name: str) -> Specs | None:
    """The device of that name, whatever its case, with G or GB, or by a beginning that only one has (`H100`); None: nobody's."""
    table, plain = {_plain(known): found for known, found in DEVICES.items()}, _plain(name)
    begun = [found for known, found in table.items() if plain and known.startswith(plain)]
    return table.get(plain) or (begun[0] if len(begun) == 1 else None)


def _plain(name: str) -> str:
    plain = name.strip().lower().removeprefix("nvidia").strip(" -").replace(" ", "-").replace("_", "-")
    return plain.removesuffix("b") if plain.endswith("gb") else plain


def resolve(
    name: str, precision: str, tflops: float | None = None, memory_gib: float | None = None, host_gib: float | None = None
) -> tuple[float, float, float]:
    """(TFLOP/s, GiB of the device, GiB of its host's share): what is given, else what the name stands for.

    A host of which nothing is known has 0: nothing is planned to lie there. Raises UserError where neither says it.
    """
    known = specs(name)
    if known is None and (tflops is None or memory_gib is None):
        missing = " and ".join(key for key, value in (("tflops", tflops), ("memory_gib", memory_gib)) if value is None)
        raise UserError(
            f"device {name!r} without {missing}", why="it is none of those whose numbers are known",
            hint=f"{nearest(name, DEVICES)}; or give {missing}",
        )  # fmt: skip
    return (
        tflops if tflops is not None else known.tflops(precision),  # type: ignore[union-attr]
        memory_gib if memory_gib is not None else known.memory_gib,  # type: ignore[union-attr]
        host_gib if host_gib is not None else known.host_gib if known else 0.0,
    )
