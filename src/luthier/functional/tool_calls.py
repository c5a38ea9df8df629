"""Tool calls as text: writing tools and calls, reading calls back without running them, and judging them.

A call is ``name(argument=value, ...)`` with JSON values; a tool is shown as a Python-like stub. Values are read with
Python's ``ast`` one by one (argument names may be Python's own words, such as ``from``) and compared as JSON.

Source: "TL-Training: A Task-Feature-Based Framework for Training Large Language Models in Tool Use", EMNLP 2025, arXiv
2412.15495.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Decode = Callable[[Sequence[int]], str]

ERRORS = (
    *("unparsable", "hallucinated_tool", "wrong_tool"),
    *("hallucinated_argument", "redundant_argument", "missing_argument", "wrong_value"),
)
_OPENING = re.compile(r"([\w.\-]*)\(")
_KEYWORD = re.compile(r"\s*([^\W\d][\w.\-]*)\s*=(?!=)")
_WORDS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Tool:
    """A tool that may be called: its parameters map names to their JSON schemas, in the order of the schema."""

    name: str
    description: str
    parameters: Mapping[str, Mapping[str, Any]]
    required: tuple[str, ...]

    @property
    def order(self) -> list[str]:
        """Parameter names, required ones first: the order of the stub and of positional arguments."""
        return [*self.required, *(name for name in self.parameters if name not in self.required)]


@dataclass(frozen=True)
class Call:
    """A call with its arguments in the order in which they were written."""

    name: str
    arguments: Mapping[str, Any]


# -- tools


def read_tools(value: Any) -> list[Tool]:
    """Tools from a list of JSON function schemas, with or without ``{"type": "function", "function": ...}`` around.

    Raises:
        ValueError: it is no such list, or two tools have the same name.
    """
    if not isinstance(value, list):
        raise ValueError("the tools are not a list of function schemas")
    tools = [_tool(item) for item in value]
    names = [tool.name for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two tools have the name '{twice[0]}'")
    return tools


def _tool(item: Any) -> Tool:
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError("a tool has no name")
    name, schema = function["name"], function.get("parameters") or {}
    properties = schema.get("properties") or {} if isinstance(schema, dict) else None
    required = schema.get("required") or [] if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or not all(isinstance(p, dict) for p in properties.values()):
        raise ValueError(f"the parameters of the tool '{name}' are not a JSON schema with properties")
    if not isinstance(required, list) or not set(required) <= set(properties):
        raise ValueError(f"the tool '{name}' requires a parameter that is not among its properties")
    return Tool(name, str(function.get("description") or ""), properties, tuple(required))


def stub(tool: Tool) -> str:
    """A tool as the head of a Python function: required parameters first, a line for each in the docstring."""

    def kind(name: str) -> str:
        told = tool.parameters[name].get("type") or "any"
        return " | ".join(map(str, told)) if isinstance(told, list) else str(told)

    head = [f"{n}: {kind(n)}" + ("" if n in tool.required else " = None") for n in tool.order]
    lines = [f"    {n} ({kind(n)}): {tool.parameters[n].get('description') or ''}".rstrip() for n in tool.order]
    body = ['    """', f"    {tool.description}".rstrip(), "", "    Args:", *lines, '    """']
    return "\n".join(["Function:", f"def {tool.name}({', '.join(head)}):", *body])


def stubs(tools: Sequence[Tool]) -> str:
    """All tools, an empty line between them."""
    return "\n\n".join(map(stub, tools))


# -- calls


def render_call(call: Call) -> str:
    """``name(argument=json, ...)`` in the order of the call's arguments."""
    told = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call.arguments.items()]
    return f"{call.name}({', '.join(told)})"


def parse_call(text: str, tools: Sequence[Tool] = (), *, whole: bool = False) -> Call:
    """The first ``name(arguments)`` of a text; nothing is evaluated.

    Args:
        text: what a model wrote.
        tools: whose schemas give positional arguments their names; one too many is called ``#3`` by its place.
        whole: nothing but the call may stand in the text.

    Returns:
        The call; its name is empty where the text only has arguments in parentheses.

    Raises:
        ValueError: there is no call, or it cannot be read.
    """
    found = list(_OPENING.finditer(text))
    if not found:
        raise ValueError("there is no call name(argument=value, ...) in it")
    first = next((match for match in found if match[1]), found[0])
    name, pieces, end = first[1], *_split(text, first.end())
    if whole and (text[: first.start()].strip() or text[end + 1 :].strip()):
        raise ValueError("there is more than the call in it")
    order = next((tool.order for tool in tools if tool.name == name), [])
    arguments: dict[str, Any] = {}
    for place, piece in enumerate(pieces):
        keyword = _KEYWORD.match(piece)
        key = keyword[1] if keyword else order[place] if place < len(order) else f"#{place + 1}"
        if key in arguments:
            raise ValueError(f"the argument '{key}' is given twice")
        arguments[key] = _parsed(piece[keyword.end() :] if keyword else piece)
    return Call(name, arguments)


def looks_like_call(text: str, tools: Sequence[Tool]) -> bool:
    """Whether a text begins as a call does, in JSON or by the name of a tool, so that it should be readable as one."""
    said = text.strip()
    if said.startswith("{"):
        return '"name"' in said
    return any(re.match(rf"{re.escape(tool.name)}\s*[(\n]", said) for tool in tools)


def call_in(text: str, tools: Sequence[Tool]) -> Call | None:
    """The call that a text is, or None where it is plain text.

    A call is written as ``name(argument=value)``, as JSON ``{"name", "arguments"}``, or as the name on a line of its
    own above the JSON of the arguments.

    Raises:
        ValueError: it begins as a call and cannot be read as one.
    """
    said = text.strip()
    if not looks_like_call(said, tools):
        return None
    name, _, rest = said.partition("\n")
    if said.startswith("{"):
        return read_call(_loaded(said))
    if rest.lstrip().startswith("{") and "(" not in name:
        return read_call({"name": name.strip(), "arguments": rest})
    return parse_call(said, tools, whole=True)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"the tool call is not JSON ({error})") from error


def read_call(value: Any) -> Call:
    """A call from ``{"name", "arguments"}``, with ``{"function": ...}`` around it or not; arguments may be JSON text.

    Raises:
        ValueError: it has no name, or its arguments are not a JSON object.
    """
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError("the tool call has no name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise ValueError(f"the arguments of the call to '{function['name']}' are not JSON ({error})") from error
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of the call to '{function['name']}' are not a JSON object")
    return Call(function["name"], arguments)


def _split(text: str, start: int) -> tuple[list[str], int]:
    """The arguments behind an opening parenthesis, cut at the commas between them, and where it closes."""
    depth, quote, begin, at = 0, "", start, start
    pieces: list[str] = []
    while at < len(text):
        character = text[at]
        if quote:
            if character == "\\":
                at += 1
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character == ")" and depth == 0:
            last = text[begin:at]
            return ([*pieces, last] if last.strip() else pieces), at
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            pieces.append(text[begin:at])
            begin = at + 1
        at += 1
    raise ValueError("the call is not closed by a parenthesis")


def _parsed(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes such as "\/" are JSON's, and Python warns of them
            node = ast.parse(text.strip(), mode="eval").body
        return _json(node)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"'{text.strip()[:40]}' is not a value") from error


def _json(node: ast.expr) -> Any:
    """The JSON value of a literal; JSON's and Python's words for true, false and null."""
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str | int | float)):
        return node.value
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _json(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.List | ast.Tuple):
        return [_json(item) for item in node.elts]
    if isinstance(node, ast.Dict) and all(isinstance(k, ast.Constant) and isinstance(k.value, str) for k in node.keys):
        keys = [k.value for k in node.keys if isinstance(k, ast.Constant)]
        return dict(zip(keys, map(_json, node.values), strict=True))
    raise ValueError("only JSON values can be arguments")


def same_value(a: Any, b: Any) -> bool:
    """Whether two JSON values are the same: 1 is 1.0, and true is not 1."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(v, b[k]) for k, v in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


# -- key tokens


def token_at(ids: Sequence[int], character: int, decode: Decode) -> int:
    """The token that holds a character of ``decode(ids)``, found by halving; the number of tokens past the end."""

    def ends(token: int) -> int:
        # A character cut in two decodes to a replacement sign until its last byte is there.
        return len(decode(ids[: token + 1]).rstrip("�"))

    return bisect_right(range(len(ids)), character, key=ends)


def name_span(text: str, name: str) -> tuple[int, int] | None:
    """Where a call's name stands in the text of a call (Python-like, else quoted as in JSON, else the bare word)."""
    word = rf"(?<![\w.\-]){re.escape(name)}"
    for pattern in (rf"{word}(?=\()", rf'(?<="){re.escape(name)}(?=")', rf"{word}(?![\w\-])"):
        if match := re.search(pattern, text):
            return match.span()
    return None


def closing_characters(text: str, start: int, arguments: Mapping[str, Any]) -> list[int]:
    """The characters that close an argument: the quote at its end, and the comma, parenthesis or brace behind it.

    Args:
        text: the text of a call.
        start: where the call's name ends.
        arguments: the call's arguments in order; one that is written in another way is passed over.
    """
    found: list[int] = []
    for name, value in arguments.items():
        told = json.dumps(value, ensure_ascii=False)
        at = text.find(name, start)
        at = text.find(told, at + len(name)) if at >= 0 else -1
        if at < 0:
            continue
        start = at + len(told)
        if told.endswith('"'):
            found.append(start - 1)
        if text[start : start + 1] in tuple(",)}"):
            found.append(start)
    if not arguments and text[start : start + 2] == "()":
        found.append(start + 1)
    return found


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists share from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def key_tokens(
    ids: Sequence[int], call: Call, others: Sequence[Sequence[int]], decode: Decode
) -> tuple[list[int], list[int]] | None:
    """The key tokens P of a target, which decide the tool, and the tokens Q that close its arguments.

    P holds the first token of the name, and for every other tool's name that shares k > 0 tokens with it the token
    where the two depart, the k-th behind the first. Without any closing token Q is the second-last token.

    Args:
        ids: the target's tokens, end token included.
        call: the call it makes.
        others: for every other tool the tokens that would stand here from the name on, had it been called.
        decode: token ids to text, special tokens included.

    Returns:
        (P, Q), sorted places in ``ids``, P without Q; None where the name does not stand in the text.
    """
    text = decode(ids)
    name = name_span(text, call.name)
    if name is None:
        return None
    first = token_at(ids, name[0], decode)
    keys = {first} | {first + k for other in others if (k := common_prefix(ids[first:], other))}
    closing = {token_at(ids, c, decode) for c in closing_characters(text, name[1], call.arguments)}
    closing = closing or {len(ids) - 2}
    return sorted(k for k in keys if k < len(ids)), sorted(c for c in closing - keys if 0 <= c < len(ids))


# -- judging


@dataclass(frozen=True)
class Verdict:
    """What a call is worth beside the wanted one.

    Attributes:
        errors: those of :data:`ERRORS` that it makes; none where it is right.
        reward: the graded reward, from -2 to 1.
        tool: the tool is the wanted one.
        names: so is the tool, and exactly the wanted arguments are given.
        values: share of the wanted arguments given with their value (1 where none is wanted), 0 for another tool.
    """

    errors: tuple[str, ...]
    reward: float
    tool: bool = False
    names: bool = False
    values: float = 0.0


def judge(said: Call | None, wanted: Call, tools: Sequence[Tool]) -> Verdict:
    """Grade a call by its kind of error; None stands for one that cannot be read."""
    if said is None:
        return Verdict(("unparsable",), -2.0)
    schemas = {tool.name: set(tool.parameters) for tool in tools}
    if said.name and said.name not in schemas:
        return Verdict(("hallucinated_tool",), -2.0)
    if said.name != wanted.name:
        return Verdict(("wrong_tool",), -1.5)
    schema, given = schemas.get(said.name, set()), set(said.arguments)
    hallucinated = not given <= schema
    redundant = bool((given & schema) - set(wanted.arguments))
    missing = not set(wanted.arguments) <= given
    right = sum(n in given and same_value(said.arguments[n], v) for n, v in wanted.arguments.items())
    wrong = any(n in given and not same_value(said.arguments[n], v) for n, v in wanted.arguments.items())
    flags = (hallucinated, redundant, missing, wrong)
    return Verdict(
        tuple(error for error, there in zip(ERRORS[3:], flags, strict=True) if there),
        _graded(hallucinated, redundant, missing, wrong),
        tool=True,
        names=given == set(wanted.arguments),
        values=right / len(wanted.arguments) if wanted.arguments else 1.0,
    )


def _graded(hallucinated: bool, redundant: bool, missing: bool, wrong: bool) -> float:
    if hallucinated and redundant and missing:
        return -1.8
    if hallucinated and (redundant or missing):
        return -1.3
    if redundant and missing:
        return -1.0
    if hallucinated:
        return -0.8
    if redundant or missing:
        return -0.5
    return -0.25 if wrong else 1.0


def judge_text(completion: str, wanted: Call, tools: Sequence[Tool]) -> Verdict:
    """:func:`judge` of the first call in a completion."""
    try:
        said: Call | None = parse_call(completion, tools)
    except ValueError:
        said = None
    return judge(said, wanted, tools)


def summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Shares over calls: accuracy of tool, argument names, argument values and whole call; each kind of error."""
    n = max(len(verdicts), 1)
    return {
        "tool_accuracy": sum(v.tool for v in verdicts) / n,
        "name_accuracy": sum(v.names for v in verdicts) / n,
        "value_accuracy": sum(v.values for v in verdicts) / n,
        "call_accuracy": sum(not v.errors for v in verdicts) / n,
        "reward": sum(v.reward for v in verdicts) / n,
        **{error: sum(error in v.errors for v in verdicts) / n for error in ERRORS},
    }


_LEGACY_CALL = re.compile(r"(.*?)\(([\s\S]*?)\)")
_LEGACY_ARGUMENT = re.compile(r"(\w+)\s*=\s*'([^']*)'")


def legacy_reward(completion: str, wanted: str, tools: Sequence[Tool]) -> float:
    """The reward as the released code reads calls: to the first ``)``, and only string values in single quotes."""
    read = [match for text in (completion, wanted) if (match := _LEGACY_CALL.search(text))]
    if len(read) < 2:
        return -2.0
    (name, said), (gold, due) = ((m[1].strip(), dict(_LEGACY_ARGUMENT.findall(m[2]))) for m in read)
    schemas = {tool.name: set(tool.parameters) for tool in tools}
    if name and name not in schemas:
        return -2.0
    if name != gold:
        return -1.5
    known = schemas.get(name)
    # Where no name was found on either side the released code knows no schema and looks for missing arguments alone.
    hallucinated = known is not None and not said.keys() <= known
    redundant = known is not None and bool((said.keys() & known) - due.keys())
    return _graded(hallucinated, redundant, not due.keys() <= said.keys(), said != due)
