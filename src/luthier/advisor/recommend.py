"""``recommended.yaml``: a recipe that runs as it is, with the reason beside every line the advice decided."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.recipe.load import load
from luthier.recipe.schema import Recipe

WIDTH = 116


def written(recipe: Recipe, reasons: Mapping[str, str], head: Sequence[str]) -> str:
    """The recipe as YAML, without what is at its default.

    Args:
        recipe: a recipe.
        reasons: sentence by top-level key, put above it.
        head: sentences for the top of the file.

    Raises:
        UserError: what was written is no recipe (it is loaded again before it is given out).
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap

    values = CommentedMap({"luthier": recipe.luthier, **_chosen(recipe)})
    for key, why in reasons.items():
        if key in values:
            values.yaml_set_comment_before_after_key(key, before="\n".join(_wrapped(why)))
    yaml = YAML()
    yaml.width = 4096
    yaml.default_flow_style = False
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = io.StringIO()
    yaml.dump(values, out)
    comments = [f"# {line}" for sentence in head for line in _wrapped(sentence)]
    text = "\n".join([*comments, out.getvalue()])
    load(yaml.load(text))
    return text


def _chosen(recipe: Recipe) -> dict[str, Any]:
    """What differs from the defaults; the model by its name alone where nothing else is said of it."""
    found: dict[str, Any] = recipe.model_dump(exclude_defaults=True)
    found.pop("luthier", None)
    if set(found["model"]) == {"id"}:
        found["model"] = found["model"]["id"]
    for key in ("objective", "parameters"):
        if isinstance(found.get(key), list) and len(found[key]) == 1:
            found[key] = found[key][0]
    order = [key for key in Recipe.model_fields if key in found]
    return {key: found[key] for key in order}


def _wrapped(sentence: str) -> list[str]:
    import textwrap

    return textwrap.wrap(" ".join(sentence.split()), WIDTH)
