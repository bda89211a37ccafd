"""What one device holds while it trains: shapes of a model's parts, one micro-batch and the engine's settings in; bytes by kind out.

Weights, gradients (accumulated in fp32) and Adam's state follow Rajbhandari et al. 2020 (figure 1) as DeepSpeed lays them out. Activations
are counted tensor by tensor: what autograd keeps of each operation for its backward pass (Korthikanti et al. 2022, section 4, did so for a
GPT block: 34 bytes a token and width at 16 bits). For the blocks of Llama and Qwen2 over T tokens, with D width, F inner width, Q and K
widths of queries and keys, H heads and e bytes an element, autograd keeps

    RMS norm, twice     its input (e T D) and 1/rms (4 T): trainers.models.lean makes the rest again
    linear maps' inputs only where the map learns: the two norms' outputs (2 e T D), the attention's output, the MLP's product (e T F)
    rotary positions    nothing in a block: cosines and sines (2 e T D/H) are the stack's, and gradients of q and k need no more
    attention, fused    q, k, v, output (e T (2 Q + 2 K)) and the log-sum-exp of each row (4 T H); no T x T matrix
    attention, buckets  the same with keys and values repeated for every head: 4 e P Q + 4 P H, over P >= T padded tokens; where segments
                        had to be moved, the output put back in its place is another tensor (e T Q)
    SwiGLU              the gate before and after SiLU, the other factor: 3 e T F

A frozen block through which a gradient passes keeps all but its maps' inputs; one that no gradient reaches keeps nothing. A low-rank
adapter (Hu et al. 2021) keeps its map's input like a map that learns, and its inner product (e T r). With recomputation a block keeps its
input (e T D), and while its gradient is computed, once, all of the above. Under ZeRO 3 DeepSpeed's own linear map keeps its input
whether it learns or not. After the blocks: the last norm, the hidden states that meet
the vocabulary (e L D of L learned positions), and the log-probabilities (4 L V) if all are made at once; the objective makes
at most `CHUNK_LOGITS` at once and recomputes chunks. tests/trainers/test_memory_model.py compares every number with the modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grid.shapes import Shape

CHUNK_LOGITS = 1 << 26
"""Most logits that next-token prediction holds at once (trainers.objectives.next_token; a test compares)."""
BUCKET = 200_000_000
"""Most elements that DeepSpeed reduces at once (trainers.engine; a test compares)."""
GATHERED = 1_000_000_000
"""Most elements that ZeRO-3 keeps gathered: DeepSpeed's `stage3_max_live_parameters`."""


@dataclass(frozen=True)
class Load:
    """One micro-batch of one device."""

    tokens: int
    """T: positions of the language model (of a text tower), images' included."""
    learned: int
    """L: positions whose next token is learned."""
    patches: int = 0
    """Patches that the encoder reads, class tokens included."""
    visual: int = 0
    """Positions of the language model that images fill."""
    fused: bool = True
    """Attention is one kernel over the pack (GPU at 16 bits), else buckets."""
    padded: int = 0
    """P: tokens of the buckets where segments have to be moved into them; 0: they lie in place."""


@dataclass(frozen=True)
class Adapter:
    """Low-rank adapters in the blocks of a part."""

    rank: int
    targets: Sequence[str] | None = None
    """Names of linear maps; None: all of them."""

    def maps(self, shape: Shape) -> list[tuple[str, int, int]]:
        """(name, inputs, outputs) of the maps of one block that get one."""
        return [m for m in shape.linears if self.targets is None or m[0] in self.targets]

    def params(self, shape: Shape) -> int:
        """Parameters of all blocks' adapters: rank * (inputs + outputs) each."""
        return shape.layers * self.rank * sum(inputs + outputs for _, inputs, outputs in self.maps(shape))


def decoder_block(shape: Shape, load: Load, width: int, learns: bool, adapter: Adapter | None = None, inputs: bool = False) -> float:
    """Bytes that autograd keeps of one block of a language model through which a gradient passes. width: bytes an element; inputs:
    linear maps keep theirs even where they don't learn."""
    tokens, hidden = load.tokens, load.tokens * shape.width
    kept = 2.0 * (width * hidden + 4 * tokens)
    adapted = {name for name, _, _ in adapter.maps(shape)} if adapter and learns else set()
    reads = {name for name, _, _ in shape.linears} if inputs or (learns and adapter is None) else adapted
    kept += width * hidden * (bool(reads & {"q_proj", "k_proj", "v_proj"}) + bool(reads & {"gate_proj", "up_proj"}))
    if load.fused:
        kept += 2.0 * width * tokens * (shape.attention_width + shape.key_width) + 4 * tokens * shape.heads
    else:
        places = load.padded or tokens
        kept += 4.0 * width * places * shape.attention_width + 4 * places * shape.heads
        kept += width * tokens * shape.attention_width if load.padded and "o_proj" in reads else 0
    kept += width * tokens * shape.inner * (3 + ("down_proj" in reads))
    return kept + (width * tokens * adapter.rank * len(adapted) if adapter else 0)


def vision_block(shape: Shape, tokens: int, width: int) -> float:
    """The same of one block of a trained CLIP tower: layer norms with their statistics, q, k, v in one tensor, the attention's output and
    its copy in the order of tokens, the maps' inputs, GELU's input and output."""
    return width * tokens * (9.0 * shape.width + 2 * shape.inner) + 4 * tokens * (4 + shape.heads)


def stack(blocks: int, block: float, entry: float, shared: float, again: bool) -> tuple[float, float]:
    """(bytes at the end of the forward pass, bytes more while one block's gradient is computed).

    block: what one block keeps; entry: its input; shared: what of a recomputed block is that same input.
    """
    return (blocks * entry, max(0.0, block - shared)) if again and blocks else (blocks * block, 0.0)


def activations(
    family: str, found: Mapping[str, Shape], learned: set[str], load: Load, width: int, again: bool, adapters: Mapping[str, Adapter],
    inputs: bool = False,
) -> float:  # fmt: skip
    """Most bytes of activations that a micro-batch keeps at any one time. learned: names of the parts that learn."""
    kept, peaks, below = 0.0, [0.0], False
    if (encoder := found.get("encoder")) is not None and "encoder" in learned:
        entry = float(width * load.patches * encoder.width)
        more, once = stack(encoder.layers, vision_block(encoder, load.patches, width), entry, entry, again)
        kept, below = kept + more + entry, True
        peaks.append(once)
        if family == "clip" and (text := found.get("text")) is not None:
            entry = float(width * load.tokens * text.width)
            more, once = stack(text.layers, vision_block(text, load.tokens, width), entry, entry, again)
            kept += more + entry
            peaks.append(once)
    if (join := found.get("connector")) is not None and ("connector" in learned or below):
        kept += connector(family, join, encoder, load, width, "connector" in learned)
        below = True
    llm = found.get("llm")
    if llm is None or not (below or "llm" in learned):
        return kept + max(peaks)
    learns, adapter = "llm" in learned, adapters.get("llm")
    whole = learns and adapter is None
    hidden = load.tokens * llm.width
    block = decoder_block(llm, load, width, learns, adapter, inputs)
    more, once = stack(llm.layers, block, float(width * hidden), float(width * hidden), again)
    kept += more + 2.0 * width * load.tokens * llm.attention_width / max(1, llm.heads)
    if whole:
        kept += 8.0 * load.tokens  # the embedding's ids
    if not load.fused and load.padded:
        kept += 8.0 * load.tokens  # where tokens come back from
    vocabulary = llm.head // max(1, llm.width)
    logits = load.learned * vocabulary
    tail = float(width * hidden + 4 * load.tokens)
    tail += width * load.learned * llm.width if whole or inputs or logits > CHUNK_LOGITS else 0
    tail += 4.0 * logits if logits <= CHUNK_LOGITS else 0
    return kept + max(tail, once, *peaks)


def connector(family: str, join: Shape, encoder: Shape | None, load: Load, width: int, learns: bool) -> float:
    """Of the connector: its input, and input and output of each GELU. Qwen2-VL's merger has a layer norm before, over patches."""
    inputs = encoder.width if encoder else 0
    if family == "qwen2_vl":
        kept = width * load.patches * inputs + 8.0 * load.patches + width * load.visual * join.inner
        return kept + (width * (load.patches * inputs + load.visual * join.inner) if learns else 0)
    gelus = max(0, (join.matmul - inputs * join.out) // max(1, join.out * join.out))
    return float(width * load.visual * (gelus * join.out * (2 if learns else 1) + (inputs if learns else 0)))


def workspace(found: Mapping[str, Shape], learned: set[str], load: Load, width: int, largest: int) -> float:
    """Bytes that come and go in the backward pass while all activations are there: gradients of the logits or of one MLP, and the
    gradient of the largest learned weight before it is added up (at 16 bits also its fp32 copy). largest: elements of that weight."""
    llm = found.get("llm")
    passing = [0.0]
    if llm is not None:
        logits = load.learned * (llm.head // max(1, llm.width))
        again = 4.0 if logits > CHUNK_LOGITS else 0.0
        passing.append(min(logits, CHUNK_LOGITS) * (again + 8.0 + (width if width < 4 else 0)))
        passing.append(float(width * load.tokens * (3 * llm.inner + 2 * llm.width)))
    if "encoder" in learned and (encoder := found.get("encoder")) is not None:
        passing.append(float(width * load.patches * (2 * encoder.inner + 2 * encoder.width)))
    return max(passing) + largest * (width + (4.0 if width < 4 else 0.0))


def state(total: int, learned: int, width: int, world: int, zero: int, offload: bool) -> dict[str, float]:
    """Bytes of one device that stay from micro-batch to micro-batch, and of its host's memory.

    total, learned: parameters of the model and those that learn. At 16 bits, and from ZeRO 1 on, an fp32 master copy is kept beside both
    moments. Offloaded, masters, moments and the step's gradient lie in the host's memory. `buffers`: what reductions (in fp32) and, under
    ZeRO 3, gathered weights take.
    """
    zero = max(zero, 2 if offload else 1 if width < 4 else 0)
    share = learned / world
    weights = width * total / (world if zero == 3 else 1)
    gradients = 0.0 if offload and zero == 3 else 4.0 * (share if zero >= 2 else learned)
    optimizer = 8.0 * learned if zero == 0 else 12 * share
    bucket = min(learned, BUCKET) * (2.0 * width + (4 if width < 4 else 0) if zero >= 2 else 4.0)
    buffers = bucket if zero >= 2 or world > 1 else 0.0
    buffers += width * min(total, GATHERED) if zero == 3 else 0
    host = share * (12 + 4 + (4 if zero == 3 else 0) + width) if offload else 0.0
    return {
        "weights": weights, "gradients": gradients, "optimizer": 0.0 if offload else optimizer, "buffers": buffers, "host": host,
    }  # fmt: skip


def footprint(
    model: Mapping[str, Any], learned: set[str], sizes: Mapping[str, int], load: Load, *, width: int, world: int = 1, zero: int = 0,
    again: bool = False, offload: bool = False, adapters: Mapping[str, Adapter] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Bytes by kind of one device, `total` their sum; `host` is apart.

    model: {"family", "shapes": part → Shape}; sizes: part → parameters; learned: parts that learn; adapters: part → Adapter, whose part
    then learns nothing else; width: bytes an element.
    """
    found, adapters = model["shapes"], adapters or {}
    beside = {part: adapters[part].params(found[part]) for part in learned & adapters.keys() if part in found}
    trained = sum(beside.get(part, sizes[part]) for part in learned)
    total = sum(sizes.values()) + sum(beside.values())
    whole = [found[part] for part in learned - adapters.keys() if part in found]
    largest = max([shape.largest for shape in whole], default=0)
    made = state(total, trained, width, world, zero, offload)
    made["activations"] = activations(model["family"], found, learned, load, width, again, adapters, inputs=zero == 3)
    made["workspace"] = workspace(found, learned, load, width, largest) + made.pop("buffers")
    made["total"] = sum(value for kind, value in made.items() if kind != "host")
    return made
