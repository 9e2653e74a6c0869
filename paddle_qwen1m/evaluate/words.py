"""Words, names and sentences that documents are made of, all written for this project, and how they are drawn."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import numpy as np

FILLER: tuple[str, ...] = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
    "The river bends past the old mill and on toward the sea.",
    "A cart rolled slowly down the lane in the rain.",
    "Nobody had seen the lamp lit for many years.",
    "The council met twice and agreed on nothing at all.",
    "Bread was dear that winter, and wood was dearer still.",
    "She counted the steps to the gate and back.",
    "In the harbour the boats lay close together.",
    "The map was wrong about the second bridge.",
    "He kept bees, and sold the honey in the market.",
    "A letter came from the north in early spring.",
    "The clock in the square had stopped at noon.",
    "They argued about the price of salt until dark.",
    "A fox crossed the field without any hurry.",
    "The children learned the names of the winds.",
    "Every road out of the valley was flooded.",
    "The roof of the barn was mended with tin.",
    "Some of the books were written in a language no one could read.",
    "The orchard gave fewer apples each year.",
    "It was the kind of morning when sound carries far.",
    "The teacher drew a circle and then a line through it.",
)
"""Sentences of the documents that checkpoints/needle was trained on."""

NAMES: tuple[str, ...] = (
    *("violet", "amber", "cobalt", "maple", "cedar", "falcon", "heron", "otter", "badger", "comet"),
    *("quartz", "onyx", "ivory", "crimson", "saffron", "indigo", "willow", "aspen", "raven", "lynx"),
    *("marble", "granite", "juniper", "laurel", "pearl", "ruby", "topaz", "jade", "coral", "ember"),
)
"""What its access codes are for."""

ADJECTIVES: tuple[str, ...] = (
    *("amiable", "ancient", "austere", "bitter", "blunt", "brave", "brittle", "calm", "careful", "cheap"),
    *("clever", "crooked", "curious", "damp", "distant", "dusty", "eager", "early", "empty", "exact"),
    *("faint", "famous", "fierce", "foreign", "formal", "fragile", "frozen", "gentle", "giant", "golden"),
    *("graceful", "grim", "hasty", "hollow", "honest", "humble", "idle", "jolly", "keen", "lazy"),
    *("lively", "lonely", "loyal", "lucky", "mellow", "modest", "muddy", "narrow", "noble", "noisy"),
    *("obscure", "orange", "patient", "plain", "polite", "proud", "purple", "quick", "quiet", "rapid"),
    *("remote", "rough", "royal", "rustic", "scarlet", "severe", "shallow", "silent", "simple", "sleepy"),
    *("slender", "smooth", "solemn", "spare", "steep", "sturdy", "subtle", "tender", "useful", "vivid"),
)

NOUNS: tuple[str, ...] = (
    *("acrobat", "anchor", "antler", "archive", "arrow", "bakery", "balcony", "banner", "basket", "beacon"),
    *("blanket", "bottle", "branch", "bridge", "bucket", "button", "cabin", "camera", "candle", "canyon"),
    *("carpet", "castle", "cellar", "chapel", "cherry", "chimney", "circle", "cloud", "compass", "copper"),
    *("cottage", "cradle", "cricket", "curtain", "desert", "dragon", "drawer", "engine", "fabric", "feather"),
    *("fiddle", "forest", "fountain", "furnace", "garden", "glacier", "goblet", "guitar", "hammer", "harvest"),
    *("helmet", "hinge", "island", "jacket", "jungle", "kettle", "kitchen", "ladder", "lantern", "leather"),
    *("lemon", "library", "lizard", "magnet", "market", "meadow", "mirror", "monument", "mountain", "museum"),
    *("needle", "notebook", "oven", "paddle", "palace", "paper", "parrot", "pepper", "piano", "pillow"),
    *("pirate", "planet", "pocket", "puddle", "puzzle", "rabbit", "ribbon", "river", "rocket", "saddle"),
    *("sailor", "scissors", "shadow", "shelter", "shovel", "signal", "spider", "spoon", "stable", "statue"),
    *("summit", "table", "temple", "thistle", "thunder", "timber", "tractor", "trumpet", "tunnel", "turtle"),
    *("umbrella", "valley", "velvet", "village", "violin", "voyage", "wagon", "walnut", "window", "workshop"),
)

_PEOPLE = ("baker", "surveyor", "ferryman", "weaver", "clerk", "gardener", "miller", "pilot", "tailor", "nurse")
_DEEDS = ("found", "described", "mended", "sold", "carried", "painted", "hid", "measured", "borrowed", "forgot")
_PLACES = ("by the canal", "behind the school", "near the border", "under the arches", "on the hill", "at the fair")
_TIMES = ("in spring", "one evening", "after the storm", "before the war", "that year", "long ago", "every autumn")
_ENDS = (
    "and nobody asked why",
    "which pleased the neighbours",
    "although it was late",
    "as the custom was",
    "without a word",
    "and wrote home about it",
    "because the road was closed",
    "while the others slept",
)


def prose(rng: np.random.Generator) -> Iterator[str]:
    """Sentences without end, of some ten million different ones."""

    def one(words: tuple[str, ...]) -> str:
        return words[rng.integers(len(words))]

    while True:
        what = f"the {one(ADJECTIVES)} {one(NOUNS)}"
        deed = f"the {one(_PEOPLE)} {one(_DEEDS)} {what} {one(_PLACES)}"
        form = int(rng.integers(3))
        if form == 0:
            yield f"{deed[0].upper()}{deed[1:]} {one(_TIMES)}, {one(_ENDS)}."
        elif form == 1:
            when = one(_TIMES)
            yield f"{when[0].upper()}{when[1:]} {deed}, {one(_ENDS)}."
        else:
            yield f"{deed[0].upper()}{deed[1:]}, {one(_ENDS)}."


def filler(rng: np.random.Generator) -> Iterator[str]:
    """Sentences of FILLER without end, in random order."""
    while True:
        yield FILLER[rng.integers(len(FILLER))]


def names(rng: np.random.Generator, at_most: int) -> Iterator[str]:
    """Up to `at_most` different names such as "amiable-anchor", none of them part of another one."""
    pairs = len(ADJECTIVES) * len(NOUNS)
    tripled = at_most > pairs
    if at_most > pairs * len(NOUNS):
        raise ValueError(f"there are {pairs * len(NOUNS):,} names, not {at_most:,}")
    for number in rng.permutation(pairs * len(NOUNS) if tripled else pairs)[:at_most]:
        rest, adjective = divmod(int(number), len(ADJECTIVES))
        last, noun = divmod(rest, len(NOUNS))
        parts = (ADJECTIVES[adjective], NOUNS[noun], *((NOUNS[last],) if tripled else ()))
        yield "-".join(parts)


def number(rng: np.random.Generator, digits: int) -> str:
    """Random digits, the first of them not 0."""
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def identifier(rng: np.random.Generator) -> str:
    """A UUID of version 4."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def letters(rng: np.random.Generator, count: int, first: str = "a") -> str:
    """A word without meaning, of letters from `first`, a or A, on."""
    return "".join(chr(ord(first) + int(place)) for place in rng.integers(26, size=count))
