"""Pictures composed of things, and sentences, questions and statements about them, in the manner of CLEVR and NLVR2.

A picture has four places, in each a thing of some kind in one of six colours, or nothing. Things are tinted images of a
set (digits and clothes), or shapes that are drawn here. Sentences are made from kinds, colours and places.
"""

from typing import NamedTuple

import numpy as np

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 240),
    "yellow": (235, 220, 50),
    "purple": (170, 60, 200),
    "white": (245, 245, 245),
}
NUMBERS = ("zero", "one", "two", "three", "four")
PLACES = ("top left", "top right", "bottom left", "bottom right")
# Which place lies on which side of a place, as (side, of, is).
_SIDES = (
    *(("right of", 0, 1), ("right of", 2, 3), ("left of", 1, 0), ("left of", 3, 2)),
    *(("below", 0, 2), ("below", 1, 3), ("above", 2, 0), ("above", 3, 1)),
)
_NAMES = tuple(COLOURS)
_TINTS = np.array(list(COLOURS.values()), np.float32)
_GROUND = 40.0
_SIDE = 16


class Kinds(NamedTuple):
    """Things to compose pictures of: `masks (N, 16, 16)` uint8 of kinds `labels (N,)`, and the kinds' names."""

    masks: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]


class Pictures(NamedTuple):
    """Composed pictures `(N, 32, 32, 3)` uint8; `kinds (N, 4)`, -1 where a place is empty; `colours (N, 4)`."""

    images: np.ndarray
    kinds: np.ndarray
    colours: np.ndarray


class Seen(NamedTuple):
    """What is in one picture: `(place, kind, colour)` of each thing, in words."""

    things: list[tuple[int, str, str]]

    def of_kind(self, kind: str) -> list[str]:
        """The colours of the things of a kind."""
        return [colour for _, name, colour in self.things if name == kind]

    def of_colour(self, colour: str) -> int:
        """How many things have a colour."""
        return sum(shown == colour for *_, shown in self.things)


def compose(kinds: Kinds, count: int, rng: np.random.Generator) -> Pictures:
    """Draws pictures with two to four things each."""
    chosen = rng.integers(0, len(kinds.labels), (count, 4))
    colours = rng.integers(0, len(COLOURS), (count, 4)).astype(np.int8)
    empty = rng.random((count, 4)).argsort(1) >= rng.integers(2, 5, (count, 1))
    masks = np.where(empty[:, :, None, None], 0, kinds.masks[chosen]).astype(np.float32)[..., None] / 255
    cells = _GROUND + masks * (_TINTS[colours][:, :, None, None, :] - _GROUND)
    grid = cells.reshape(count, 2, 2, _SIDE, _SIDE, 3).transpose(0, 1, 3, 2, 4, 5)
    images = grid.reshape(count, 2 * _SIDE, 2 * _SIDE, 3).astype(np.uint8)
    return Pictures(images, np.where(empty, -1, kinds.labels[chosen]).astype(np.int8), colours)


def see(pictures: Pictures, names: tuple[str, ...]) -> list[Seen]:
    """What is in each picture."""
    return [
        Seen([(place, names[k], _NAMES[c]) for place, (k, c) in enumerate(zip(*row, strict=True)) if k >= 0])
        for row in zip(pictures.kinds.tolist(), pictures.colours.tolist(), strict=True)
    ]


def caption(seen: Seen, rng: np.random.Generator) -> str:
    """A true sentence about a picture: all that is there, what lies where, or how many things there are."""
    form = rng.integers(0, 3)
    if form == 0:
        return f"{NUMBERS[len(seen.things)]} things : {listed(seen)}"
    if form == 1 and (sides := _sides(seen)):
        side, of, what = sides[rng.integers(len(sides))]
        return f"a {what} {side} a {of}"
    place, kind, colour = seen.things[rng.integers(len(seen.things))]
    return f"a {colour} {kind} in the {PLACES[place]} and {NUMBERS[seen.of_colour(colour)]} {colour} things in all"


def listed(seen: Seen) -> str:
    """All that is in a picture, by place."""
    return " , ".join(f"a {colour} {kind}" for _, kind, colour in seen.things)


def question(seen: Seen, names: tuple[str, ...], rng: np.random.Generator) -> tuple[str, str]:
    """A question about a picture and its answer: a colour, a kind, a number, or yes or no."""
    form = rng.integers(0, 5)
    place, kind, colour = seen.things[rng.integers(len(seen.things))]
    if form == 0 and len(set(seen.of_kind(kind))) == 1:
        return f"what colour is the {kind} ?", colour
    if form == 1 and (sides := _sides(seen)):
        side, of, what = sides[rng.integers(len(sides))]
        return f"what is {side} the {of} ?", what.partition(" ")[2]
    if form == 2:
        asked = colour if rng.random() < 0.7 else _NAMES[rng.integers(len(_NAMES))]
        return f"how many {asked} things are there ?", NUMBERS[seen.of_colour(asked)]
    if form == 3:
        if rng.random() < 0.5:
            return f"is there a {colour} {kind} ?", "yes"
        return f"is there a {_absent(seen, kind, names, rng)} ?", "no"
    return f"what is in the {PLACES[place]} ?", kind


def answers(names: tuple[str, ...]) -> tuple[str, ...]:
    """All answers to questions, in a fixed order."""
    return tuple(dict.fromkeys((*_NAMES, *NUMBERS, "yes", "no", *names)))


def statement(first: Seen, second: Seen, wanted: bool, rng: np.random.Generator) -> str:
    """A statement about two pictures that is true or, as wanted, false; its form tells little of which."""
    while True:
        form = int(rng.integers(0, 4))
        for _ in range(10):  # forms are as frequent among true ones as among false ones, where that can be
            text, holds = _statement(form, first, second, rng)
            if holds == wanted:
                return text


def choices(seen: Seen, others: list[Seen], names: tuple[str, ...], rng: np.random.Generator) -> list[str]:
    """Ten descriptions, the first one right: five are of other pictures, four have one thing changed."""
    wrong = [listed(others[i]) for i in rng.permutation(len(others))[:5]]
    for _ in range(4):
        at = int(rng.integers(len(seen.things)))
        place, kind, colour = seen.things[at]
        if rng.random() < 0.5:
            colour = _other(_NAMES, colour, rng)
        else:
            kind = _other(names, kind, rng)
        wrong.append(listed(Seen([*seen.things[:at], (place, kind, colour), *seen.things[at + 1 :]])))
    return [listed(seen), *wrong]


def shapes(count: int, rng: np.random.Generator) -> Kinds:
    """Draws discs, squares, triangles and crosses of different sizes, a little off the middle."""
    names = ("disc", "square", "triangle", "cross")
    labels = np.arange(count) % len(names)
    y, x = np.mgrid[:_SIDE, :_SIDE][:, None] - rng.uniform(6.5, 8.5, (2, count, 1, 1))
    r = rng.uniform(4, 6.5, (count, 1, 1))
    inside = (abs(x) <= r) & (abs(y) <= r)
    drawn = (
        x**2 + y**2 <= r**2,
        inside,
        inside & (abs(x) <= (y + r) / 2),
        inside & (np.minimum(abs(x), abs(y)) <= r / 3),
    )
    return Kinds(np.uint8(255) * np.choose(labels[:, None, None], drawn), labels.astype(np.int32), names)


def _statement(form: int, first: Seen, second: Seen, rng: np.random.Generator) -> tuple[str, bool]:
    both = (first, second)
    _, kind, colour = both[rng.integers(2)].things[0]
    if form == 0:
        side = int(rng.integers(2))
        return f"the {('left', 'right')[side]} picture has a {colour} {kind}", colour in both[side].of_kind(kind)
    colour = _NAMES[rng.integers(len(_NAMES))]
    counts = [one.of_colour(colour) for one in both]
    if form == 1:
        return f"both pictures have a {colour} thing", min(counts) > 0
    if form == 2:
        return f"the left picture has more {colour} things than the right one", counts[0] > counts[1]
    count = sum(len(one.things) for one in both)
    said = count + int(rng.integers(-1, 2))
    return f"there are {said} things in all", said == count


def _sides(seen: Seen) -> list[tuple[str, str, str]]:
    """`(side, of, what)` of all neighbours in a picture: what lies at that side of the other; of is there once."""
    at = {place: f"{colour} {kind}" for place, kind, colour in seen.things}
    alone = [what for what in at.values() if list(at.values()).count(what) == 1]
    return [(side, at[of], at[what]) for side, of, what in _SIDES if at.get(of) in alone and what in at]


def _absent(seen: Seen, kind: str, names: tuple[str, ...], rng: np.random.Generator) -> str:
    """A thing that is not there: of that kind in another colour, or of another kind."""
    there = {f"{colour} {name}" for _, name, colour in seen.things}
    while True:
        colour = _NAMES[rng.integers(len(_NAMES))]
        what = f"{colour} {kind if rng.random() < 0.5 else names[rng.integers(len(names))]}"
        if what not in there:
            return what


def _other(names: tuple[str, ...], name: str, rng: np.random.Generator) -> str:
    rest = [other for other in names if other != name]
    return rest[rng.integers(len(rest))]
