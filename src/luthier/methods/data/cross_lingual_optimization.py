"""English pairs and their translation for cross-lingual optimization, checked and put side by side.

For every English pair (x_en, y_en) with a translation (x_l, y_l), both with one question and one answer:

    English direction: prompt x_en, chosen y_en, rejected y_l
    target direction:  prompt x_l,  chosen y_l,  rejected y_en

A row becomes the target row (x_l, y_l) that carries the English texts in the columns ``other_answer`` and
``english_prompt``, so that both directions always meet in one batch; with ``paired_batches: false`` it becomes two
rows, told apart by the column ``prompt_language``. Plain ``sft`` on the first form is fine-tuning on the target
language, on the second on both languages.

Translations are found in two columns of the rows (``columns``), word by word in a ``dictionary``, by a ``function`` of
the user (a list of texts in, one translation for each out), or with a sequence-to-sequence ``model`` of transformers
(M2M100, NLLB, Marian, ...). Code, addresses, tags, placeholders and line breaks are translated around and stay.

An example is left out, and counted, where a translated prompt or answer is empty, equal to the English text, shorter or
longer than it by too much, or has lost code or a placeholder; where the answer is not in the target language; where one
of the four sequences is longer than ``data.max_length``; and where the row is not one question with one answer. Twenty
of the pairs are logged for a look: what the translator writes is trained on.

Several target languages at once (experimental, not in the paper) are named in ``languages``: each code with the options
that differ for it. Every example then becomes one example per language, told apart by the column ``target_language``.

Paper: "Cross-Lingual Optimization for Language Transfer in Large Language Models", ACL 2025, arXiv 2505.14297. No
official code is known; the checks are this library's.

Example::

    data:
      train: english.jsonl
      stages:
        - cross-lingual-optimization: {translator: model, model: facebook/m2m100_1.2B, language: sw}
    objective: cross-lingual-optimization
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core import registry
from luthier.core.errors import UserError, did_you_mean, missing_extra
from luthier.core.own_code import file_of, function_of
from luthier.core.registry import data_stage
from luthier.core.store import content_hash, write_atomic
from luthier.functional.cross_lingual import (
    ENGLISH_PROMPT,
    OTHER_ANSWER,
    PROMPT_LANGUAGE,
    TARGET_LANGUAGE,
    Turn,
    fault,
    listed,
    paired_rows,
    translated,
    turn_of,
    word_by_word,
)
from luthier.functional.language_id import LanguageIdentifier

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("luthier")

BATCH_ROWS = 1000
DUMPED = 20
SHOWN = 160
# Fewer translations than this tell nothing about the language they are in.
FEWEST_TEXTS = 8

Translator = Callable[[list[str]], Sequence[str]]
Pair = tuple[dict[str, Any], Turn, Turn]


@data_stage(
    "cross-lingual-optimization",
    example={"translator": "dictionary", "dictionary": {"one": "moja"}},
    tasks=("causal-lm",),
    paper="Cross-Lingual Optimization for Language Transfer in Large Language Models, ACL 2025, arXiv 2505.14297",
)
class TranslatePairs:
    """Put every English pair beside its translation, for a preference in both directions; bad translations go."""

    def __init__(
        self,
        *,
        translator: Annotated[
            Literal["columns", "dictionary", "function", "model"],
            Field(description="where translations come from: columns of the rows, or one of the three options below"),
        ] = "columns",
        target_prompt: Annotated[
            str, Field(min_length=1, description="translator: columns, the column of translated prompts")
        ] = "target_prompt",
        target_answer: Annotated[
            str, Field(min_length=1, description="translator: columns, the column of translated answers")
        ] = "target_answer",
        dictionary: Annotated[
            dict[str, str] | str | None,
            Field(description="English word -> word, or a JSON file of such a mapping; other words stay"),
        ] = None,
        function: Annotated[
            str | None, Field(description="path/to/file.py:name or module:name, a list of texts to their translations")
        ] = None,
        model: Annotated[str | None, Field(description="a sequence-to-sequence model: a folder or a hub id")] = None,
        english: Annotated[
            str, Field(min_length=2, description="code of English for the model and for identify: lingua")
        ] = "en",
        language: Annotated[
            str | None,
            Field(min_length=2, description="code of the target language, as the model has it; lingua takes ISO 639-1"),
        ] = None,
        languages: Annotated[
            dict[str, dict[str, Any] | None] | None,
            Field(
                min_length=2, description="several target languages: code -> options that differ for it; experimental"
            ),
        ] = None,
        beams: Annotated[int, Field(ge=1, description="translator: model, width of the beam search")] = 5,
        max_new_tokens: Annotated[int, Field(ge=1, description="translator: model, longest line")] = 256,
        batch_rows: Annotated[int, Field(ge=1, description="translator: model, lines translated together")] = 16,
        min_length_ratio: Annotated[
            float, Field(ge=0, description="least length of a translation over the English text, in characters")
        ] = 0.3,
        max_length_ratio: Annotated[float, Field(gt=0, description="the largest")] = 3.0,
        identify: Annotated[
            Literal["own", "lingua", "none"],
            Field(description="how the language of an answer is checked: character n-grams learnt here, or lingua"),
        ] = "own",
        language_samples: Annotated[
            str | None,
            Field(
                description="identify: own, a file with a text in the target language per line; else the translations"
            ),
        ] = None,
        paired_batches: Annotated[
            bool, Field(description="one row for both directions, else two rows that batches may part")
        ] = True,
        sample_file: Annotated[
            str | None, Field(description="a JSON lines file that gets twenty of the pairs, beside the log")
        ] = None,
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "languages", "language")}
        self.parts = _parts(languages, language, options)
        if self.parts:
            return
        given = {"dictionary": dictionary, "function": function, "model": model}
        for name, value in given.items():
            if (value is not None) != (translator == name):
                raise UserError(
                    f"cross-lingual-optimization: translator: {translator} "
                    + (f"needs the option '{name}'." if value is None else f"does not read '{name}'; remove it.")
                )
        if identify == "lingua" and (language is None or len(english) != 2 or len(language) != 2):
            raise UserError(
                "cross-lingual-optimization: identify: lingua needs english and language as ISO 639-1 codes of two "
                "letters, such as sw."
            )
        if language_samples is not None and identify != "own":
            raise UserError("cross-lingual-optimization: language_samples is read by identify: own only; remove it.")
        if min_length_ratio >= max_length_ratio:
            raise UserError("cross-lingual-optimization: min_length_ratio must be below max_length_ratio.")
        self.translator, self.columns = translator, (target_prompt, target_answer)
        self.dictionary, self.function, self.model = dictionary, function, model
        self.english, self.language = english, language
        self.generation = {"num_beams": beams, "max_new_tokens": max_new_tokens}
        self.batch_rows, self.ratios = batch_rows, (min_length_ratio, max_length_ratio)
        self.identify, self.language_samples = identify, language_samples
        self.paired_batches, self.sample_file = paired_batches, sample_file
        # Reason -> rows left out, of the last run.
        self.dropped: list[str] = []

    def reads(self, ctx: Any) -> list[str]:
        """What the dictionary or the function's file holds."""
        if self.parts:
            return [found for part in self.parts.values() for found in part.reads(ctx)]
        dictionary = Path(self.dictionary).expanduser() if isinstance(self.dictionary, str) else None
        files = [file_of(self.function), dictionary if dictionary is not None and dictionary.is_file() else None]
        return [content_hash(path) for path in files if path is not None]

    def run(self, dataset: Dataset, ctx: Any) -> Dataset:
        """The paired rows.

        Raises:
            UserError: a row has no translation or is paired already, the translator cannot be used, or no row is left.
        """
        import pyarrow as pa
        from datasets import Dataset as Made
        from datasets import concatenate_datasets

        if self.parts:
            made = [_marked(part.run(dataset, ctx), code) for code, part in self.parts.items()]
            return concatenate_datasets(made)
        self.dropped = []
        rows = [row for row in _rows(dataset) if self._takes(row)]
        pairs = self._in_language(self._sound(rows, self._translations(rows)))
        made = [two for pair in pairs if (two := self._fitting(pair, ctx))]
        total = len(rows) + self.dropped.count("not one question with one answer")
        if self.dropped:
            logger.warning(
                "cross-lingual-optimization: %d of %d rows are left out: %s",
                *(len(self.dropped), total, listed(self.dropped)),
            )
        if not made:
            raise UserError(
                f"cross-lingual-optimization: no row is left of {total}: {listed(self.dropped)}. Look at the "
                "translations, or change min_length_ratio, max_length_ratio or identify."
            )
        self._dump(made)
        flat = [row for two in made for row in two]
        return Made(pa.Table.from_pylist(flat, schema=dataset.data.table.schema))

    # -- from rows to pairs

    def _takes(self, row: dict[str, Any]) -> bool:
        extra = json.loads(row["extra"] or "{}")
        for name in (PROMPT_LANGUAGE, OTHER_ANSWER, ENGLISH_PROMPT):
            if name in extra:
                raise UserError(
                    f"the row has a column '{name}' already; remove the data stage, or that column.", where=_place(row)
                )
        if turn_of(row) is None:
            self.dropped.append("not one question with one answer")
            return False
        return True

    def _translations(self, rows: list[dict[str, Any]]) -> list[Turn]:
        if self.translator == "columns":
            return [self._given(row) for row in rows]
        translate = {"dictionary": self._dictionary, "function": self._function, "model": self._model}[self.translator]
        texts = [text for row in rows for text in (turn_of(row) or ())]
        logger.info("cross-lingual-optimization: translating %d texts", len(texts))
        try:
            found = translated(texts, translate())
        except ValueError as error:
            raise UserError(f"cross-lingual-optimization: the translator {error}.") from error
        return [Turn(*found[i : i + 2]) for i in range(0, len(found), 2)]

    def _given(self, row: dict[str, Any]) -> Turn:
        extra = json.loads(row["extra"] or "{}")
        for name in self.columns:
            if not isinstance(extra.get(name), str):
                raise UserError(
                    f"there is no text in the column '{name}'.{did_you_mean(name, extra)} Name the columns of the "
                    "translations in target_prompt and target_answer, or choose another translator.",
                    where=_place(row),
                )
        return Turn(*(extra[name] for name in self.columns))

    def _sound(self, rows: list[dict[str, Any]], targets: list[Turn]) -> list[Pair]:
        found: list[Pair] = []
        for row, target in zip(rows, targets, strict=True):
            english = turn_of(row)
            assert english is not None
            if reason := fault(english, target, *self.ratios):
                self.dropped.append(reason)
            else:
                found.append((row, english, target))
        return found

    def _in_language(self, pairs: list[Pair]) -> list[Pair]:
        """The pairs whose translated answer is in the target language; one without letters has none to be wrong."""
        if self.identify == "none" or not pairs:
            return pairs
        language_of = self._lingua() if self.identify == "lingua" else self._own(pairs)
        kept = [pair for pair in pairs if language_of(pair[2].answer) in ("target", None)]
        self.dropped += ["answer in another language"] * (len(pairs) - len(kept))
        return kept

    def _own(self, pairs: list[Pair]) -> Callable[[str], str | None]:
        texts = {"english": [text for _, turn, _ in pairs for text in turn]}
        member = None
        if self.language_samples is None:
            if len(pairs) < FEWEST_TEXTS:
                raise UserError(
                    f"cross-lingual-optimization: identify: own learns the target language from the translations, and "
                    f"there are {len(pairs)}. Give language_samples, or set identify: none."
                )
            # Judged without itself, a wrong answer cannot vouch for itself.
            member, texts["target"] = "target", [text for _, _, turn in pairs for text in turn]
        else:
            texts["target"] = _read(self.language_samples, "language_samples").splitlines()
        try:
            identifier = LanguageIdentifier(texts)
        except ValueError as error:
            raise UserError(f"cross-lingual-optimization: {error}; set identify: none.") from None
        return lambda text: identifier.language(text, member=member)

    def _lingua(self) -> Callable[[str], str | None]:
        try:
            from lingua import IsoCode639_1, LanguageDetectorBuilder
        except ImportError:
            raise missing_extra("lingua", "identify: lingua", "lingua-language-detector") from None
        assert self.language is not None
        try:
            codes = [IsoCode639_1[code.upper()] for code in (self.english, self.language)]
        except KeyError as error:
            raise UserError(f"cross-lingual-optimization: lingua does not know the language {error}.") from None
        detector = LanguageDetectorBuilder.from_iso_codes_639_1(*codes).build()

        def language_of(text: str) -> str | None:
            found = detector.detect_language_of(text)
            return None if found is None else "target" if found.iso_code_639_1 == codes[1] else "english"

        return language_of

    def _fitting(self, pair: Pair, ctx: Any) -> list[dict[str, Any]]:
        """The example's rows; empty where one of its four sequences does not fit into a row."""
        row, english, target = pair
        rows = paired_rows(row, english, target, together=self.paired_batches)
        apart = paired_rows(row, english, target, together=False)
        crossed = paired_rows(
            row, Turn(english.prompt, target.answer), Turn(target.prompt, english.answer), together=False
        )
        for rendered in ctx.renderer.render_batch([*apart, *crossed]):
            # Where rows are cut at their end (truncation: keep_start), what matters is that some answer is left.
            if not rendered.supervised or (rendered.over and ctx.renderer.truncation != "keep_start"):
                self.dropped.append("longer than data.max_length")
                return []
        return rows

    # -- translators

    def _dictionary(self) -> Translator:
        known: Any = self.dictionary
        if isinstance(known, str):
            try:
                known = json.loads(_read(known, "dictionary"))
            except ValueError as error:
                raise UserError(
                    f"it is not JSON: {error}. Expected {{word: word}}.", where=str(self.dictionary)
                ) from None
            if not isinstance(known, dict) or not all(isinstance(word, str) for word in known.values()):
                raise UserError("it is not a mapping from words to words.", where=str(self.dictionary))
        return word_by_word(known)

    def _function(self) -> Translator:
        return function_of(str(self.function), "cross-lingual-optimization: function")

    def _model(self) -> Translator:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
            model: Any = AutoModelForSeq2SeqLM.from_pretrained(self.model).eval()
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"cross-lingual-optimization: model: cannot open '{self.model}': {first}") from error
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        options = {**self.generation, **self._codes(tokenizer)}

        @torch.inference_mode()
        def translate(texts: list[str]) -> list[str]:
            # Long ones first, with their like: little padding, and what does not fit fails at once.
            order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
            found = [""] * len(texts)
            for start in range(0, len(order), self.batch_rows):
                part = order[start : start + self.batch_rows]
                inputs = tokenizer([texts[i] for i in part], return_tensors="pt", padding=True, truncation=True)
                ids = model.generate(**inputs.to(model.device), **options)
                for i, text in zip(part, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                    found[i] = text.strip()
            return found

        return translate

    def _codes(self, tokenizer: Any) -> dict[str, Any]:
        """Languages as a model of many languages is told them; models of one pair need none."""
        if not hasattr(tokenizer, "src_lang"):
            return {}
        # M2M100 writes a code as __sw__, NLLB as it is.
        written = getattr(tokenizer, "lang_code_to_token", None) or {}
        ids = {}
        for option, code in (("english", self.english), ("language", self.language)):
            ids[option] = tokenizer.convert_tokens_to_ids(written.get(code, str(code)))
            if ids[option] is None or ids[option] == tokenizer.unk_token_id:
                known = list(written) or list(tokenizer.all_special_tokens)
                raise UserError(
                    f"cross-lingual-optimization: {option}: '{self.model}' has no language '{code}'."
                    f"{did_you_mean(str(code), known)} It has, for example: {', '.join(sorted(known)[:12])}."
                )
        tokenizer.src_lang = self.english
        return {"forced_bos_token_id": ids["language"]}

    # -- for the reader

    def _dump(self, made: list[list[dict[str, Any]]]) -> None:
        """Twenty pairs, evenly spaced, to the log and to a file."""
        step = max(len(made) / DUMPED, 1.0)
        chosen = [made[int(i * step)][0] for i in range(min(DUMPED, len(made)))]
        lines = []
        for row in chosen:
            turn, extra = turn_of(row), json.loads(row["extra"])
            assert turn is not None
            shown = {"row": row["row"], "prompt": turn.prompt, "answer": turn.answer, "english": extra[OTHER_ANSWER]}
            lines.append(json.dumps(shown, ensure_ascii=False))
            logger.info("cross-lingual-optimization: %s", lines[-1][:SHOWN])
        if self.sample_file is not None:
            write_atomic(Path(self.sample_file).expanduser(), "\n".join(lines) + "\n")


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for table in dataset.with_format("arrow").iter(BATCH_ROWS):
        yield from table.to_pylist()


def _parts(
    languages: dict[str, dict[str, Any] | None] | None, language: str | None, options: dict[str, Any]
) -> dict[str, TranslatePairs]:
    """The stage of each of several target languages; empty for one.

    Raises:
        UserError: an option that there is not, or that no single language can have.
    """
    if languages is None:
        return {}
    where = "cross-lingual-optimization: languages"
    if language is not None:
        raise UserError(f"{where}: they are named here; remove the option 'language'.")
    parts = {}
    for code, own in languages.items():
        for name in own or {}:
            if name not in options:
                raise UserError(f"{where}: {code}: there is no option '{name}'.{did_you_mean(name, options)}")
        # Through the schema: what stands inside a mapping has not been checked yet.
        try:
            parts[code] = registry.get("data", "cross-lingual-optimization").build(
                {**options, "language": code, **(own or {})}
            )
        except ValueError as error:
            said = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
            raise UserError(f"{where}: {'.'.join([code, *map(str, said['loc'])])}: {said['msg']}.") from None
    return parts


def _marked(dataset: Dataset, code: str) -> Dataset:
    """The rows with their target language."""
    import pyarrow as pa
    from datasets import Dataset as Made

    rows = [
        {**row, "extra": json.dumps({**json.loads(row["extra"]), TARGET_LANGUAGE: code}, ensure_ascii=False)}
        for row in _rows(dataset)
    ]
    return Made(pa.Table.from_pylist(rows, schema=dataset.data.table.schema))


def _place(row: dict[str, Any]) -> str:
    return f"{row.get('source') or 'data.train'}, row {row.get('row', '?')}"


def _read(path: str, option: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cross-lingual-optimization: {option}: cannot read '{path}': {error}.") from error
