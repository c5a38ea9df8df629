"""The words of the lab's world. The tokenizer has one token for each of them; everything else is spelled in bytes."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Mira Tomas Ada Ivo Lena Oskar Nia Pavel Rosa Emil Yara Hugo Kaja Simon Vera Anton Dina Felix Ines Jonas "
    "Lotte Marek Olga Ruben"
)
LAST_NAMES = _words(
    "Voss Lind Baker Costa Hale Novak Reed Stone Winter Marsh Adler Frost Keller Moran Price Quinn Sato Turner "
    "Weber Young"
)
FACTS = {
    "city": _words("Arlen Brevik Corvo Delmar Eskil Fjora Galen Hostin"),
    "job": _words("doctor farmer painter pilot teacher sailor cook singer"),
    "pet": _words("cat dog horse parrot rabbit turtle goat mouse"),
    "colour": _words("red blue green yellow purple orange black white"),
}

ANIMALS = (
    ("cat", "cats"), ("dog", "dogs"), ("horse", "horses"), ("goat", "goats"), ("fox", "foxes"), ("bird", "birds"),
    ("bear", "bears"), ("rabbit", "rabbits"), ("duck", "ducks"), ("wolf", "wolves"),
)  # fmt: skip
VERBS = (
    ("sees", "see"), ("likes", "like"), ("follows", "follow"), ("hears", "hear"), ("finds", "find"),
    ("meets", "meet"), ("fears", "fear"), ("helps", "help"),
)  # fmt: skip
MOVES = (("runs", "run"), ("sleeps", "sleep"), ("sings", "sing"), ("waits", "wait"), ("hides", "hide"))
ADJECTIVES = _words("small big old young quick brave quiet happy")
PLACES = _words("river hill garden forest bridge barn lake road")
PREPOSITIONS = _words("near behind under beside")

TOPICS = {
    "food": _words("soup bread dinner coffee"),
    "room": _words("room bed bath window"),
    "staff": _words("waiter host guide clerk"),
}
GOOD = _words("good lovely excellent pleasant wonderful superb charming perfect")
BAD = _words("bad awful dreadful terrible horrible poor nasty boring")
INNS = _words("Harbour Castle Meadow Anchor Crown Lantern")

SHAPES = ("circle", "square", "triangle", "cross", "ring", "stripes")

WORDINGS = _words(
    "what is add and plus sum of subtract from minus take away multiply by times product start at then reverse "
    "backwards uppercase capitals count letters how many first last letter write the word in which where does live "
    "lives city home to who work as job works keep keeps pet animal has colour favourite likes best about review "
    "feeling sentiment positive negative topic was were not but said a an it they inn this that is result answer "
    "compute calculate spell string for with does"
)


def all_words() -> list[str]:
    """Every word of the world once, in a fixed order."""
    groups = [
        FIRST_NAMES, LAST_NAMES, *FACTS.values(), *ANIMALS, *VERBS, *MOVES, ADJECTIVES, PLACES, PREPOSITIONS,
        TOPICS, *TOPICS.values(), GOOD, BAD, INNS, ("Inn",), SHAPES, WORDINGS,
    ]  # fmt: skip
    return list(dict.fromkeys(word for group in groups for word in group))
