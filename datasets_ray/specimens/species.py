"""The species of the miniature world: four fine-grained sets, each a family whose members share most attributes.

Flows in: nothing. Flows out: `FAMILIES` (set name → Family), `siblings` (who looks most like whom), phrases that describe a species.
The sets stand in for ImageNet, Flowers-102, Pets and Food-101; names are invented, one word each, so that a small tokenizer makes
them one token. Graded similarity: every species has a neighbour that differs in one attribute, others differ in two, three or all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40), "orange": (247, 140, 30), "yellow": (250, 220, 60), "green": (60, 165, 70), "blue": (50, 90, 215),
    "purple": (135, 60, 175), "pink": (245, 140, 185), "white": (240, 240, 240), "black": (30, 30, 34), "brown": (130, 80, 40),
    "grey": (135, 140, 145),
}


@dataclass(frozen=True)
class Species:
    """One class: its name, its set and a value for every attribute of its family."""

    name: str
    set: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A set of species. `noun`: what a caption calls them; `slots`: attribute names; `main`: the slot of the dominant colour."""

    set: str
    noun: str
    slots: tuple[str, ...]
    phrase: str
    """Template over the slots: the attribute description."""
    main: str
    species: tuple[Species, ...]

    def value(self, species: Species, slot: str) -> str:
        return species.values[self.slots.index(slot)]

    def describe(self, species: Species) -> str:
        """`five round red petals around a yellow centre`"""
        return self.phrase.format(**dict(zip(self.slots, species.values)))


def _family(set: str, noun: str, slots: str, phrase: str, main: str, table: str) -> Family:
    members = [line.split() for line in table.strip().splitlines()]
    return Family(set, noun, tuple(slots.split()), phrase, main, tuple(Species(m[0], set, tuple(m[1:])) for m in members))


FAMILIES: dict[str, Family] = {
    "imagenet": _family("imagenet", "object", "shape pattern colour trim", "a {pattern} {colour} {shape} with {trim} trim", "colour", """
        arkel   star      plain    red     white
        bivon   star      striped  red     white
        cendra  star      dotted   blue    white
        drilo   cross     plain    blue    yellow
        eskut   cross     halved   blue    yellow
        folmar  cross     halved   green   yellow
        gyrand  moon      plain    yellow  black
        hexil   moon      striped  orange  black
        istrom  square    dotted   purple  white
        juxel   square    striped  purple  white
        krendo  triangle  plain    green   red
        lozan   triangle  dotted   green   red
    """),
    "flowers": _family(
        "flowers", "flower", "petals tips colour centre", "{petals} {tips} {colour} petals around a {centre} centre", "colour", """
        lumora   five   round    red     yellow
        tavine   five   round    red     black
        brisel   five   pointed  red     yellow
        corvane  six    round    pink    yellow
        pelloa   six    round    purple  yellow
        quillet  six    pointed  purple  white
        serane   four   round    blue    white
        ombrel   four   round    blue    yellow
        fennick  four   pointed  white   yellow
        yarvel   eight  pointed  yellow  brown
        halune   eight  pointed  orange  brown
        dorsil   eight  round    orange  black
    """),
    "pets": _family("pets", "pet", "ears coat marking eyes", "{ears} ears, a {marking} {coat} coat and {eyes} eyes", "coat", """
        mokko    pointed  grey    striped  green
        tarrin   pointed  grey    plain    green
        pibble   pointed  orange  striped  yellow
        grennet  round    brown   plain    black
        snorrel  round    brown   masked   black
        wuffin   round    white   spotted  black
        kasko    long     brown   spotted  black
        loppet   long     white   plain    red
        bramor   long     white   spotted  blue
        zephin   pointed  black   plain    yellow
        dunlo    pointed  white   masked   blue
        ratchen  round    orange  spotted  yellow
    """),
    "food": _family("food", "dish", "base colour topping sauce", "a {base} {colour} base under {sauce} {topping}", "colour", """
        bappa    round   brown   dots     red
        crunell  round   brown   dots     green
        doshi    round   yellow  stripes  red
        farlo    round   yellow  lattice  brown
        gavone   square  brown   stripes  white
        jumbal   square  brown   lattice  white
        kesto    square  green   stripes  white
        molash   ring    brown   dots     pink
        nuppe    ring    pink    dots     white
        plovin   ring    yellow  swirls   brown
        rissa    half    green   swirls   red
        tombo    half    yellow  stripes  red
    """),
}

SETS: tuple[str, ...] = tuple(FAMILIES)
SPECIES: dict[str, Species] = {s.name: s for family in FAMILIES.values() for s in family.species}


def distance(a: Species, b: Species) -> int:
    """In how many attributes two species of one set differ."""
    return sum(x != y for x, y in zip(a.values, b.values))


@cache
def siblings(name: str) -> tuple[Species, ...]:
    """The other species of the same set, most alike first (ties in the family's order)."""
    me = SPECIES[name]
    return tuple(sorted((s for s in FAMILIES[me.set].species if s.name != name), key=lambda s: distance(me, s)))


def with_article(noun_phrase: str) -> str:
    """`a lumora`, `an arkel`"""
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"
