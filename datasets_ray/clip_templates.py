"""CLIP's prompts for a data set: an ensemble of texts such as "a photo of a {c}, a type of pet.", as CLIP benchmark writes them down.

In: `classnames_clip_benchmark/en_zeroshot_classification_templates.json` below the user's data root, data set → list of texts (CLIP
benchmark 48de38c1; the texts are CLIP's, Radford et al. 2021, section 3.1.4). Out: the texts of one set, `{c}` for the class.
"""

from __future__ import annotations

import json
from pathlib import Path

from datasets_ray.errors import UserError, nearest

FILE = "classnames_clip_benchmark/en_zeroshot_classification_templates.json"


def ensemble(name: str, data_root: str | None) -> list[str]:
    """The texts of a data set (`imagenet1k`, `pets`, `flowers`, `food101` ...). Raises UserError where file or set is missing."""
    if data_root is None:
        raise UserError(f"CLIP's prompts for {name!r} and no data root", hint="FINEGRID_DATA=DIR, or write the texts into `templates`")
    path = Path(data_root) / FILE
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "CLIP benchmark's benchmark/datasets/en_zeroshot_classification_templates.json, put there; or `templates` in the study"
        raise UserError(f"CLIP's prompts can't be read from {path}", why=str(error).splitlines()[0], hint=hint) from None
    if not isinstance(known, dict) or name not in known:
        raise UserError(f"no prompts for {name!r} in {path}", hint=nearest(name, known if isinstance(known, dict) else []))
    return [str(text) for text in known[name]]
