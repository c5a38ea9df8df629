"""The words of the lab's world. The tokenizer has one token for each of them; everything else is spelled in bytes."""

from __future__ import annotations

FIRST_NAMES = tuple(
    "Mira Tomas Ada Ivo Lena Oskar Nia Pavel Rosa Emil Yara Hugo Kaja Simon Vera Anton Dina Felix Ines Jonas "
    "Lotte Marek Olga Ruben".split()
)
LAST_NAMES = tuple(
    "Voss Lind Baker Costa Hale Novak Reed Stone Winter Marsh Adler Frost Keller Moran Price Quinn Sato Turner "
    "Weber Young".split()
)
FACTS = {
    "city": tuple("Arlen Brevik Corvo Delmar Eskil Fjora Galen Hostin".split()),
    "job": tuple("doctor farmer painter pilot teacher sailor cook singer".split()),
    "pet": tuple("cat dog horse parrot rabbit turtle goat mouse".split()),
    "colour": tuple("red blue green yellow purple orange black white".split()),
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
ADJECTIVES = tuple("small big old young quick brave quiet happy".split())
PLACES = tuple("river hill garden forest bridge barn lake road".split())
PREPOSITIONS = tuple("near behind under beside".split())

TOPICS = {
    "food": tuple("soup bread dinner coffee".split()),
    "room": tuple("room bed bath window".split()),
    "staff": tuple("waiter host guide clerk".split()),
}
GOOD = tuple("good lovely excellent pleasant wonderful superb charming perfect".split())
BAD = tuple("bad awful dreadful terrible horrible poor nasty boring".split())
INNS = tuple("Harbour Castle Meadow Anchor Crown Lantern".split())

SHAPES = ("circle", "square", "triangle", "cross", "ring", "stripes")

WORDINGS = tuple(
    "what is add and plus sum of subtract from minus take away multiply by times product start at then reverse "
    "backwards uppercase capitals count letters how many first last letter write the word in which where does live "
    "lives city home to who work as job works keep keeps pet animal has colour favourite likes best about review "
    "feeling sentiment positive negative topic was were not but said a an it they inn this that is result answer "
    "compute calculate spell string for with does".split()
)


def all_words() -> list[str]:
    """Every word of the world once, in a fixed order."""
    groups = [
        FIRST_NAMES, LAST_NAMES, *FACTS.values(), *ANIMALS, *VERBS, *MOVES, ADJECTIVES, PLACES, PREPOSITIONS,
        TOPICS, *TOPICS.values(), GOOD, BAD, INNS, ("Inn",), SHAPES, WORDINGS,
    ]  # fmt: skip
    return list(dict.fromkeys(word for group in groups for word in group))
