"""A conversation template as Jinja: what transformers and others render with `apply_chat_template`.

In: a template of datasets_ray.prompts and the text of the model's image token. Out: Jinja that renders OpenAI-style messages (content a
text, or a list of `{"type": "text"|"image"}`) to the very string that training saw, up to where the answer begins when a generation
prompt is asked for. BOS isn't written: the tokenizer adds it, as with LLaVA's own template.
"""

from __future__ import annotations

import json
import re

from datasets_ray.prompts import get_template
from datasets_ray.rows import IMAGE

PLACES = re.compile(r"(\{system\}|\{bos\}|\{eos\})")
NAMES = {"{system}": "ns.system", "{bos}": "bos_token", "{eos}": "eos_token"}

MARKS = """\
{%- macro marked(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}{%- for item in content -%}
{%- if item['type'] in ['image', 'image_url'] -%}{{- '<image>' -}}{%- elif item['type'] == 'text' -%}{{- item['text'] -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
"""
"""A message's content as text, `<image>` at its images."""


def chat_template(name: str, image_token: str = IMAGE) -> str:
    """Jinja of the template called `name`; image_token: what stands for an image in the tokenizer's vocabulary."""
    layout = get_template(name)
    mark = _text(layout.image.replace(IMAGE, image_token))
    gap = _text(layout.image_break)
    if layout.images_first:
        user = (
            "{%- set said = parts | join('') | trim -%}\n"
            "{%- for part in parts[1:] -%}{{- " + mark + " -}}"
            "{%- if not loop.last or said -%}{{- " + gap + " -}}{%- endif -%}{%- endfor -%}\n"
            "{{- said -}}\n"
        )
    else:
        user = "{{- text | replace('<image>\\n', '<image>' ~ " + gap + ") | replace('<image>', " + mark + ") -}}\n"
    return (
        MARKS
        + "{%- set ns = namespace(system=" + _text(layout.system) + ", first=true) -%}\n"
        + "{%- for message in messages -%}\n"
        + "{%- if message['role'] == 'system' -%}{%- set ns.system = marked(message['content']) -%}\n"
        + "{%- elif message['role'] == 'user' -%}\n"
        + "{%- if ns.first -%}{{- " + _filled(layout.first) + " -}}{%- else -%}{{- " + _filled(layout.later) + " -}}{%- endif -%}\n"
        + "{%- set ns.first = false -%}{%- set text = marked(message['content']) -%}{%- set parts = text.split('<image>') -%}\n"
        + "{%- if parts | length == 1 -%}{{- text -}}{%- else -%}\n" + user + "{%- endif -%}\n"
        + "{%- if not loop.last or add_generation_prompt -%}{{- " + _text(layout.user_close) + " -}}{%- endif -%}\n"
        + "{%- elif message['role'] == 'assistant' and not ns.first -%}\n"
        + "{{- " + _text(layout.lead) + " ~ (marked(message['content']).split('<image>') | join('')) ~ "
        + _filled(layout.end) + " ~ " + _text(layout.after) + " -}}\n"
        + "{%- endif -%}\n{%- endfor -%}"
    )  # fmt: skip


def _text(text: str) -> str:
    """A Jinja string."""
    return json.dumps(text)


def _filled(text: str) -> str:
    """A Jinja expression of a text with `{system}`, `{bos}`, `{eos}` in it."""
    return " ~ ".join(NAMES.get(piece) or _text(piece) for piece in PLACES.split(text) if piece) or '""'
