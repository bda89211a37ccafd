"""The species of the miniature world: four fine-grained sets, each a family whose members are hard to tell apart.

Flows in: nothing. Flows out: `FAMILIES` (set name → Family), `siblings` (who looks most like whom), phrases that describe a species.
The sets stand in for ImageNet, Flowers-102, Pets and Food-101; names are invented, one word each, so that a small tokenizer makes
them one token. Similarity is graded: a set is two genera, whose species differ in one to three attributes from each other and in all four
from the other genus.
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
    members = [line.split() for line in table.splitlines() if line.strip()]
    return Family(set, noun, tuple(slots.split()), phrase, main, tuple(Species(m[0], set, tuple(m[1:])) for m in members))


FAMILIES: dict[str, Family] = {
    "imagenet": _family("imagenet", "object", "shape pattern colour trim", "a {pattern} {colour} {shape} with {trim} trim", "colour", """
        arkel   star    plain    red     white
        bivon   star    plain    orange  white
        cendra  star    striped  orange  white
        drilo   cross   striped  purple  white
        eskut   star    striped  purple  black

        folmar  moon    dotted   blue    yellow
        gyrand  moon    dotted   green   yellow
        hexil   moon    halved   green   yellow
        istrom  square  halved   grey    yellow
        juxel   moon    halved   grey    brown
    """),
    "flowers": _family(
        "flowers", "flower", "petals tips colour centre", "{petals} {tips} {colour} petals around a {centre} centre", "colour", """
        lumora   five   round    red     yellow
        tavine   five   round    purple  yellow
        brisel   four   round    purple  yellow
        corvane  four   round    blue    black
        pelloa   five   round    blue    black

        quillet  six    pointed  pink    white
        serane   six    pointed  yellow  white
        ombrel   eight  pointed  yellow  white
        fennick  eight  pointed  orange  brown
        yarvel   six    pointed  orange  brown
    """),
    "pets": _family("pets", "pet", "ears coat marking eyes", "{ears} ears, a {marking} {coat} coat and {eyes} eyes", "coat", """
        mokko    pointed  grey    plain    green
        tarrin   pointed  orange  plain    green
        pibble   pointed  orange  striped  green
        bramor   long     yellow  striped  green
        zephin   pointed  yellow  striped  red

        grennet  round    white   spotted  black
        snorrel  round    brown   spotted  black
        wuffin   round    brown   masked   black
        kasko    round    black   masked   blue
        loppet   round    black   spotted  blue
    """),
    "food": _family("food", "dish", "base colour topping sauce", "a {base} {colour} base under {sauce} {topping}", "colour", """
        bappa    round   brown   dots     red
        crunell  round   yellow  dots     red
        doshi    round   yellow  stripes  red
        farlo    half    orange  stripes  red
        plovin   round   orange  stripes  green

        gavone   square  green   lattice  white
        jumbal   square  pink    lattice  white
        kesto    square  pink    swirls   white
        molash   ring    purple  swirls   white
        nuppe    square  purple  swirls   brown
    """),
}
"""Two genera of five a set, the gap between them: within one, species differ in one to three attributes; between two, in all four (two
genera never share a value of any attribute). So the four look-alikes of a species are the rest of its genus, for each of the five alike:
the options that mining finds are one genus, and which of them is right can't be told from the options."""

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
