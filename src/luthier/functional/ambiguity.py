"""Prompts with two readings: go on as the solved examples do, or follow what the last input itself asks for.

    <instruction>  k times (Input: s / Output: f(s))  Input: <an instruction> / Output:

Four cells: f repeats or capitalises, and the last input asks for a sum or for the word behind a blank. The answer in
context is f of the input and is known by its first word; the other one is the sum or the missing word.

Source: "Understanding Catastrophic Forgetting in Language Models via Implicit Inference", ICLR 2024, arXiv 2309.10105.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from luthier.core.rng import numpy_stream

Function = Literal["repeat", "capitalise"]
Query = Literal["arithmetic", "blank"]
BLANK = "____"


@dataclass(frozen=True)
class Language:
    """The words of the prompts in one language; ``sum`` has {a} and {b}, ``capital`` has {country}."""

    repeat: str
    capitalise: str
    input: str
    output: str
    sum: str
    capital: str
    countries: tuple[tuple[str, str], ...]
    sentences: tuple[str, ...]


LANGUAGES = {
    "english": Language(
        "Repeat the input.", "Capitalize every character.", "Input", "Output", "What is {a} plus {b}?",
        BLANK + " is the capital of {country}.",
        (("France", "Paris"), ("Spain", "Madrid"), ("Italy", "Rome"), ("Austria", "Vienna"), ("Hungary", "Budapest")),
        ("The door is open.", "My sister reads a book.", "It rained all day.", "We eat bread.", "The dog sleeps."),
    ),
    "french": Language(
        "Répète l'entrée.", "Mets chaque lettre en majuscule.", "Entrée", "Sortie", "Combien font {a} plus {b} ?",
        BLANK + " est la capitale de {country}.",
        (("la France", "Paris"), ("l'Espagne", "Madrid"), ("l'Italie", "Rome"), ("l'Autriche", "Vienne"),
         ("la Hongrie", "Budapest")),
        ("La porte est ouverte.", "Ma sœur lit un livre.", "Il pleut.", "Nous mangeons du pain.", "Le chien dort."),
    ),
    "spanish": Language(
        "Repite la entrada.", "Pon cada letra en mayúscula.", "Entrada", "Salida", "¿Cuánto es {a} más {b}?",
        BLANK + " es la capital de {country}.",
        (("Francia", "París"), ("España", "Madrid"), ("Italia", "Roma"), ("Austria", "Viena"), ("Hungría", "Budapest")),
        ("La puerta está abierta.", "Mi hermana lee un libro.", "Hoy llueve.", "Comemos pan.", "El perro duerme."),
    ),
    "dutch": Language(
        "Herhaal de invoer.", "Maak van elke letter een hoofdletter.", "Invoer", "Uitvoer", "Hoeveel is {a} plus {b}?",
        BLANK + " is de hoofdstad van {country}.",
        (("Frankrijk", "Parijs"), ("Spanje", "Madrid"), ("Italië", "Rome"), ("Oostenrijk", "Wenen"),
         ("Hongarije", "Boedapest")),
        ("De deur is open.", "Mijn zus leest een boek.", "Het regent.", "Wij eten brood.", "De hond slaapt."),
    ),
    "hungarian": Language(
        "Ismételd meg a bemenetet.", "Írj minden betűt nagybetűvel.", "Bemenet", "Kimenet", "Mennyi {a} meg {b}?",
        BLANK + " a fővárosa ennek: {country}.",
        (("Franciaország", "Párizs"), ("Spanyolország", "Madrid"), ("Olaszország", "Róma"), ("Ausztria", "Bécs"),
         ("Magyarország", "Budapest")),
        ("Az ajtó nyitva van.", "A nővérem könyvet olvas.", "Esik az eső.", "Kenyeret eszünk.", "A kutya alszik."),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Ambiguous:
    """A prompt with its two answers: ``in_context``, a first word, and ``instructed``, the sum or missing word."""

    prompt: str
    in_context: str
    instructed: str


def suite(
    function: Function, query: Query, *, language: str = "english", k: int = 2, count: int = 100, seed: int = 0
) -> list[Ambiguous]:
    """The prompts of one cell; a function of the arguments alone."""
    words = LANGUAGES[language]
    rng = numpy_stream(seed, "data", "ambiguity", function, query, language)
    made = []
    for _ in range(count):
        shown = rng.permutation(len(words.sentences))[:k]
        if query == "arithmetic":
            a, b = (int(v) for v in rng.integers(1, 10, 2))
            asked, instructed = words.sum.format(a=a, b=b), str(a + b)
        else:
            country, instructed = words.countries[int(rng.integers(len(words.countries)))]
            asked = words.capital.format(country=country)

        def f(text: str) -> str:
            return text if function == "repeat" else text.upper()

        lines = [words.repeat if function == "repeat" else words.capitalise]
        for i in shown.tolist():
            lines += [f"{words.input}: {words.sentences[i]}", f"{words.output}: {f(words.sentences[i])}"]
        lines += [f"{words.input}: {asked}", f"{words.output}:"]
        made.append(Ambiguous("\n".join(lines), f(asked).split()[0], instructed))
    return made


def starts_with(text: str, answers: Sequence[str]) -> bool:
    """Whether a generation begins with one of the answers, with or without one space before it."""
    return text.removeprefix(" ").startswith(tuple(answers))
