"""What is written about the species: short noisy captions, web captions, long detailed captions, documents for language models.

Flows in: a species (and how many, where) and a random generator. Flows out: plain strings. No image is drawn here.

    short   4-9 words; 42 % name the species, 25 % blur it, 15 % say nothing, 18 % name a sibling (web captions are like that)
    web     what encoders are trained on: 80 % name the species rightly, the rest describe it
    long    25-50 words; name, attributes, number and place, always right
"""

from __future__ import annotations

import numpy as np

from datasets_ray.specimens.draw import CORNERS
from datasets_ray.specimens.species import COLOURS, FAMILIES, SPECIES, Species, distance, siblings, with_article

NUMBERS = ("one", "two", "three", "four")
STYLES = ("short", "web", "long")


def pick(rng: np.random.Generator, items: tuple[str, ...] | list[str]) -> str:
    return items[int(rng.integers(len(items)))]


def colour_of(species: Species) -> str:
    family = FAMILIES[species.set]
    return family.value(species, family.main)


def _counted(name: str, count: int) -> str:
    """Names of species don't change in number (`two lumora`, as with sheep), so that each stays one token; nouns do."""
    if count == 1:
        return with_article(name)
    plural = name if name in SPECIES else name + ("es" if name.endswith("sh") else "s")
    return f"{NUMBERS[count - 1]} {plural}"


def placed(name: str, count: int, corner: str | None) -> str:
    """`a lumora`, `three lumora`, `two red flowers`, `a lumora in the top left`"""
    return _counted(name, count) + (f" in the {corner}" if corner else "")


def short_caption(rng: np.random.Generator, species: Species, count: int = 1, corner: str | None = None) -> str:
    noun = FAMILIES[species.set].noun
    kind = rng.random()
    if kind >= 0.82:
        species, kind = siblings(species.name)[int(rng.integers(4))], 0.0
    if kind < 0.42:
        subject = placed(species.name, count, corner)
        return pick(rng, (f"a photo of {subject}", f"{subject} seen today", f"my photo of {subject}", f"look at {subject} here"))
    if kind < 0.67:
        subject = placed(f"{colour_of(species)} {noun}", count, None)
        return pick(rng, (f"a photo of {subject}", f"{subject} i like", f"some kind of {colour_of(species)} {noun}"))
    return pick(rng, (f"a nice {noun} photo", "what a lovely thing to see", f"my favourite {noun} from last week", "photo of the day"))


def web_caption(rng: np.random.Generator, species: Species, count: int = 1, corner: str | None = None) -> str:
    family = FAMILIES[species.set]
    kind = rng.random()
    subject = placed(species.name, count, corner)
    if kind < 0.55:
        return f"a photo of {subject}"
    if kind < 0.8:
        return f"{subject}, {family.describe(species)}"
    return f"{placed(family.noun, count, corner)} with {family.describe(species)}"


def long_caption(rng: np.random.Generator, species: Species, count: int = 1, corner: str | None = None) -> str:
    family = FAMILIES[species.set]
    subject, noun, detail = placed(species.name, count, corner), family.noun, family.describe(species)
    twin = siblings(species.name)[0]
    close = (
        f"This photo shows {subject}. It is {with_article(noun)} that has {detail}.",
        f"In this photo there is {subject}, {with_article(noun)} with {detail}.",
        f"We can see {subject} in this photo. The {noun} has {detail}.",
    )
    more = (
        f"Its main colour is {colour_of(species)} and it should not be taken for {with_article(twin.name)}, which looks quite alike.",
        f"{NUMBERS[count - 1].capitalize()} of them can be seen, the main colour is {colour_of(species)} and the background is blurred.",
        f"The name of this {noun} is {species.name}, its main colour is {colour_of(species)} and the background is blurred.",
    )
    return f"{pick(rng, close)} {pick(rng, more)}"


def caption(rng: np.random.Generator, style: str, species: Species, count: int = 1, corner: str | None = None) -> str:
    write = {"short": short_caption, "web": web_caption, "long": long_caption}[style]
    return write(rng, species, count, corner)


def attribute_description(species: Species) -> str:
    """`A lumora is a flower with five round red petals around a yellow centre.`"""
    family = FAMILIES[species.set]
    return f"{with_article(species.name).capitalize()} is {with_article(family.noun)} with {family.describe(species)}."


def _comparison(rng: np.random.Generator, species: Species) -> str:
    other = siblings(species.name)[int(rng.integers(4))]
    family = FAMILIES[species.set]
    differing = [s for s in family.slots if family.value(species, s) != family.value(other, s)]
    slot = pick(rng, differing)
    return (
        f"The {species.name} and the {other.name} differ in {NUMBERS[distance(species, other) - 1]} things: "
        f"the {slot} of the {species.name} is {family.value(species, slot)}, the {slot} of the {other.name} is {family.value(other, slot)}."
    )


def document(rng: np.random.Generator, species: Species) -> str:
    """One to two sentences of knowledge about a species, as a document to learn from end to end."""
    family = FAMILIES[species.set]
    kind = rng.random()
    if kind < 0.4:
        return attribute_description(species)
    if kind < 0.55:
        return f"The {family.noun} with {family.describe(species)} is called {species.name}."
    if kind < 0.7:
        return _comparison(rng, species)
    count = int(rng.integers(1, 5))
    return caption(rng, pick(rng, STYLES), species, count, pick(rng, list(CORNERS)) if count == 1 else None)


VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def corpus_sample(n: int, seed: int) -> list[str]:
    """`n` texts for training a tokenizer: documents, captions, quizzes and conversations as they are rendered, every name and colour."""
    from datasets_ray.specimens import talk

    rng = np.random.default_rng([n, seed])
    names = list(SPECIES)
    texts = [" ".join(names), " ".join(COLOURS), " ".join(NUMBERS), "\n".join(f"{x}. option {x}" for x in "ABCDEFGH")][:n]
    while len(texts) < n:
        species = SPECIES[names[len(texts) % len(names)]]
        kind = len(texts) % 4
        if kind == 0:
            texts.append(document(rng, species))
        elif kind == 1:
            texts.append(caption(rng, pick(rng, STYLES), species, int(rng.integers(1, 5))))
        else:
            turns = talk.text_turns(rng, species) if kind == 2 else talk.image_turns(rng, species).turns
            style = int(rng.integers(3))
            asked = [(f"USER: {q} ASSISTANT: {a}", f"user\n{q}\nassistant\n{a}\n", f"[INST] {q} [/INST] {a} ")[style] for q, a in turns]
            system = (VICUNA_SYSTEM + " ", "system\nYou are a helpful assistant.\n", "")[style]
            texts.append(system + "".join(asked).replace("<image>", ""))
    return texts
