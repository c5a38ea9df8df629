"""What the rows tell by themselves: repetitions, contradictions, leaks into the test set, balance, lengths, templates.

Whole columns are counted by Arrow; only near-duplicates and n-grams look at texts one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from luthier.advisor.findings import Finding, counted, estimated, unmeasured
from luthier.core import registry
from luthier.functional.statistics import proportion
from luthier.functional.text_overlap import Overlap

if TYPE_CHECKING:
    from datasets import Dataset

# Short texts of one template resemble each other whatever they ask, so only longer ones are compared.
LONG_TEXT = 200
NEAR_ROWS = 20_000
NEAR_THRESHOLD = 0.8
LEAK_SHARE = 0.7
BATCH = 1000
# What a prepared source counts -> how it is said.
TEMPLATE_PROBLEMS = {
    "nothing_to_learn": "have no supervised token",
    "unsupervised_stop": "end without a stop token",
    "doubled_bos": "begin with two BOS tokens",
}


def asked_and_answered(rows: Dataset) -> pa.Table:
    """Columns ``kind``, ``asked`` and ``answered`` (texts, null where a row has none) of canonical rows.

    The question of a conversation is the conversation itself: it is compared as a whole.
    """
    columns = ["kind", "text", "prompt", "completion", "messages", "label", "tokens", "tags"]
    table = rows.select_columns(columns).with_format("arrow")[:]

    def joined(name: str) -> Any:
        return pc.binary_join(table.column(name).combine_chunks(), " ")

    asked = pc.coalesce(table.column("prompt"), table.column("messages"), table.column("text"), joined("tokens"))
    answered = pc.coalesce(table.column("completion"), table.column("label"), joined("tags"))
    return pa.table({"kind": table.column("kind"), "asked": asked, "answered": answered})


def exact_duplicates(rows: Dataset) -> tuple[Finding, np.ndarray]:
    """The share of rows that repeat an earlier one, and the numbers of those that do not."""
    total = len(rows)
    stage = registry.get("data", "deduplicate").build({"mode": "exact"})
    kept = stage.keep(rows)
    repeated = stage.removed["exact"]
    sentence = f"{repeated:,} of {total:,} rows ({repeated / total:.1%}) repeat an earlier row word for word."
    follows = (
        "Repeated rows are learnt several times per epoch: leave them out, or count them as epochs."
        if repeated
        else "Nothing to leave out."
    )
    return counted("exact_duplicates", repeated / total, total, "share of rows", sentence, follows), kept


def duplicates(rows: Dataset) -> list[Finding]:
    """Shares of rows that repeat an earlier one: exactly over all rows, nearly among the long ones."""
    exact, kept = exact_duplicates(rows)
    fresh = rows.select(kept)
    length = pc.utf8_length(pc.fill_null(asked_and_answered(fresh).column("asked"), "")).to_numpy()
    long = np.flatnonzero(length >= LONG_TEXT)
    compared = long[:NEAR_ROWS]
    if compared.size < 2:
        why = f"fewer than two rows have a question or text of {LONG_TEXT} characters, and shorter ones all look alike."
        return [exact, unmeasured("near_duplicates", why)]
    stage = registry.get("data", "deduplicate").build({"mode": "near", "threshold": NEAR_THRESHOLD})
    stage.keep(fresh.select(compared))
    similar, n = stage.removed["near"], int(compared.size)
    which = "long rows" if n == long.size else f"rows, the first of {long.size:,} long ones,"
    sentence = (
        f"{similar:,} of {n:,} different {which} ({similar / n:.1%}) resemble an earlier one (estimated similarity "
        f"{NEAR_THRESHOLD} and more)."
    )
    follows = "Near copies add little but weight; try the rows without them." if similar else "Nothing to leave out."
    return [exact, counted("near_duplicates", similar / n, n, "share of rows", sentence, follows)]


def contradictions(rows: Dataset) -> Finding:
    """The share of rows whose question also stands in another row with another answer."""
    table = asked_and_answered(rows)
    table = table.filter(pc.and_(pc.is_valid(table.column("answered")), pc.not_equal(table.column("kind"), "chat")))
    if not len(table):
        return unmeasured("contradictions", "these rows have no answer apart from the question.")
    groups = table.group_by("asked").aggregate([("answered", "count_distinct"), ("answered", "count")])
    several = groups.filter(pc.greater(groups.column("answered_count_distinct"), 1))
    bad = int(pc.sum(several.column("answered_count")).as_py() or 0)
    sentence = (
        f"{bad:,} of {len(table):,} rows ({bad / len(table):.1%}) ask what another row asks and answer it differently."
    )
    follows = (
        "Unless several answers are right, some of these labels are wrong." if bad else "No row contradicts another."
    )
    return counted("contradictions", bad / len(table), len(table), "share of rows", sentence, follows)


def leaks(train: Dataset, test: Dataset | None) -> list[Finding]:
    """Shares of test rows that stand in the training rows: word for word, and in most of their n-grams."""
    names = ("test_in_train", "test_near_train")
    if test is None:
        return [unmeasured(name, "there are no test rows.") for name in names]
    asked, known = asked_and_answered(test).column("asked"), asked_and_answered(train).column("asked")
    asked, known = (pc.utf8_lower(pc.utf8_trim_whitespace(c)) for c in (asked, known))
    inside = int(pc.sum(pc.is_in(asked, value_set=pc.unique(known))).as_py() or 0)
    total = len(test)
    sentence = f"{inside:,} of {total:,} test rows ({inside / total:.1%}) ask word for word what a training row asks."
    exact = counted("test_in_train", inside / total, total, "share of test rows", sentence, _leaked(inside))
    overlap = Overlap(asked.to_pylist())
    for texts in _batches(known):
        overlap.add(texts)
    shares = overlap.shares()
    judged = int(np.isfinite(shares).sum())
    if not judged:
        why = f"no test row has a piece of {overlap.n} characters that is not boilerplate"
        return [exact, unmeasured("test_near_train", f"{why}.")]
    leaked = int((shares[np.isfinite(shares)] >= LEAK_SHARE).sum())
    sentence = (
        f"{leaked:,} of {judged:,} test rows ({leaked / judged:.1%}) share {LEAK_SHARE:.0%} or more of their pieces of "
        f"{overlap.n} characters with training rows, boilerplate left out."
    )
    return [exact, counted("test_near_train", leaked / judged, judged, "share of test rows", sentence, _leaked(leaked))]


def _leaked(rows: int) -> str:
    if rows:
        return "Scores on these rows measure memory: take them out of the test set."
    return "No leak of this kind."


def _batches(column: Any) -> Iterator[list[str]]:
    for start in range(0, len(column), BATCH):
        yield [text for text in column.slice(start, BATCH).to_pylist() if text]


def balance(rows: Dataset, task: str) -> list[Finding]:
    """How unevenly answers are spread: the share of the most frequent one, and how many rows the rarest class has."""
    table = asked_and_answered(rows)
    answers = table.column("answered").drop_null()
    what = "label" if task != "causal-lm" else "answer"
    if task == "token-classification":
        answers = pc.list_flatten(rows.select_columns(["tags"]).with_format("arrow")[:].column("tags"))
        what = "tag"
    if not len(answers):
        return [unmeasured("largest_class", "these rows have no answer apart from the question.")]
    counts = pc.value_counts(answers)
    count = counts.field("counts").to_numpy()
    share = float(count.max()) / len(answers)
    name = str(counts.field("values")[int(count.argmax())].as_py())[:40]
    largest = counted(
        "largest_class",
        share,
        len(answers),
        f"share of {what}s",
        f"The most frequent {what}, {name!r}, is that of {share:.1%} of {len(answers):,}; {len(counts):,} differ.",
        f"A model that always answers {name!r} scores {share:.1%}: read every score against that.",
    )
    if task == "causal-lm":
        return [largest]
    rarest = int(count.min())
    return [
        largest,
        counted(
            "rarest_class",
            rarest,
            len(counts),
            "rows",
            f"The rarest {what} has {rarest:,} of {len(answers):,}.",
            "Too few to learn from or to measure." if rarest < 10 else "Every class can be learnt and measured.",
        ),
    ]


def lengths(report: dict[str, Any], limit: int | None) -> list[Finding]:
    """How long rows are, and how many do not fit."""
    at = report["lengths"]
    rows = report["rows"]
    lost = report["dropped"] + report["truncated"]
    limited = f"the limit is {limit:,}" if limit else "there is no limit"
    return [
        counted(
            "row_tokens",
            at.get("p50", 0),
            report["kept"],
            "tokens",
            f"Half of the rows have {at.get('p50', 0):,} tokens or fewer, the longest {at.get('max', 0):,}; {limited}.",
            f"{report['supervised_tokens'] / max(report['kept'], 1):.1f} tokens per row are learnt.",
        ),
        counted(
            "too_long",
            lost / rows,
            rows,
            "share of rows",
            f"{lost:,} of {rows:,} rows ({lost / rows:.1%}) do not fit.",
            "They are left out (data.truncation): raise data.max_length if the model allows it."
            if lost
            else "All fit.",
        ),
    ]


def template_problems(report: dict[str, Any], rejected: int) -> Finding:
    """What ``luthier check`` counts about rendering, as a share of rows."""
    rows = report["rows"] + rejected
    found = [f"{report[key]:,} {words}" for key, words in TEMPLATE_PROBLEMS.items() if report[key]]
    found += [f"{rejected:,} cannot be read"] if rejected else []
    bad = sum(report[key] for key in TEMPLATE_PROBLEMS) + rejected
    return counted(
        "template_problems",
        bad / rows,
        rows,
        "share of rows",
        f"Of {rows:,} rows, {'; '.join(found)}." if found else f"All {rows:,} rows render as they should.",
        "Mend these before any method is judged: `luthier check` names the rows." if found else "Nothing to mend.",
    )


def size(report: dict[str, Any], parameters: int) -> Finding:
    """Supervised tokens for every thousand parameters."""
    supervised = report["supervised_tokens"]
    each = 1000 * supervised / max(parameters, 1)
    return counted(
        "tokens_per_1000_parameters",
        each,
        report["kept"],
        "tokens",
        f"{report['kept']:,} rows with {supervised:,} supervised tokens meet {parameters:,} parameters: {each:.3g} for "
        "every thousand.",
        "Few for so many weights: overfitting and forgetting are the risk."
        if each < 100
        else "Enough that underfitting is a risk as well.",
    )


def row_count(report: dict[str, Any]) -> Finding:
    """How many rows there are to learn from."""
    kept = report["kept"]
    return counted(
        "rows",
        kept,
        kept,
        "rows",
        f"There are {kept:,} rows to learn from.",
        "So few fit into a prompt as examples." if kept < 50 else "",
    )


def share(name: str, hits: int, n: int, sentence: str, follows: str) -> Finding:
    """A share estimated from a sample, with Wilson's interval."""
    return estimated(name, proportion(hits, n), "share of rows", sentence, follows)
