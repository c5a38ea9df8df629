"""Small faults put into correct Python: the text of one place is exchanged, everything else stays as it was written.

A mutation is found in the syntax tree and applied to the source text, so that formatting, names and comments are those
of the correct program and nothing but the fault differs.
"""

from __future__ import annotations

import ast
import io
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from luthier.functional.code_differences import line_starts

Kind = Literal["comparison", "arithmetic", "constant", "boolean", "variable", "statement", "arguments"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_COMPARISONS: dict[str, tuple[str, ...]] = {
    "<": ("<=", ">"),
    "<=": ("<", ">="),
    ">": (">=", "<"),
    ">=": (">", "<="),
    "==": ("!=",),
    "!=": ("==",),
    "in": ("not in",),
    "not in": ("in",),
    "is": ("is not",),
    "is not": ("is",),
}
_ARITHMETIC: dict[str, tuple[str, ...]] = {
    "+": ("-",),
    "-": ("+",),
    "*": ("+",),
    "/": ("*", "//"),
    "//": ("/", "%"),
    "%": ("//",),
    "**": ("*",),
    "<<": (">>",),
    ">>": ("<<",),
    "&": ("|",),
    "|": ("&",),
    "^": ("&",),
}
_COMPARISON_OF = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.In: "in",
    ast.NotIn: "not in",
    ast.Is: "is",
    ast.IsNot: "is not",
}
_ARITHMETIC_OF = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.LShift: "<<",
    ast.RShift: ">>",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.BitXor: "^",
}
_REMOVABLE = (ast.Assign, ast.AugAssign, ast.Expr, ast.Return, ast.Continue, ast.Break)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


@dataclass(frozen=True)
class Mutation:
    """One fault: the characters ``start`` to ``end`` of the source become ``text``."""

    kind: Kind
    start: int
    end: int
    text: str

    def apply(self, source: str) -> str:
        """The faulty source."""
        return source[: self.start] + self.text + source[self.end :]


def parse(source: str) -> ast.Module:
    """The syntax tree, without the compiler's warnings about odd code.

    Raises:
        SyntaxError: it does not parse.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (ValueError, RecursionError, MemoryError) as error:  # NUL characters; nesting without end
            raise SyntaxError(str(error) or type(error).__name__) from error


def parses(source: str) -> bool:
    """Whether it is Python."""
    try:
        parse(source)
    except SyntaxError:
        return False
    return True


def mutations(source: str, *, start: int = 0, kinds: Sequence[Kind] = KINDS) -> list[Mutation]:
    """Every mutation of some kinds, each of which parses, in the order of their places.

    Args:
        source: correct Python.
        start: nothing before this character is changed.
        kinds: ``comparison`` and ``arithmetic`` exchange an operator, ``constant`` is off by one, ``boolean`` negates a
            condition or exchanges and/or and True/False, ``variable`` takes another name of the same function,
            ``statement`` is left out, ``arguments`` next to each other change places.

    Raises:
        SyntaxError: the source does not parse.
    """
    tree, places = parse(source), _Places(source)
    finders = {
        "comparison": partial(_comparisons, tree, places),
        "arithmetic": partial(_arithmetic, tree, places),
        "constant": partial(_constants, tree, places),
        "boolean": partial(_booleans, tree, places),
        "variable": partial(_variables, tree, places),
        "statement": partial(_statements, tree, places),
        "arguments": partial(_arguments, tree, places),
    }
    found = {m for kind in kinds for m in finders[kind]() if m.start >= start}
    changed = [m for m in found if m.apply(source) != source and parses(m.apply(source))]
    return sorted(changed, key=lambda m: (m.start, m.end, KINDS.index(m.kind), m.text))


class _Places:
    """Nodes and tokens as character places in the source."""

    def __init__(self, source: str) -> None:
        self.source, self.starts = source, line_starts(source)
        tokens = tokenize.generate_tokens(io.StringIO(source, newline=None).readline)
        self.words = [
            (self.starts[t.start[0] - 1] + t.start[1], t.string)
            for t in tokens
            if t.type in (tokenize.OP, tokenize.NAME)
        ]

    def _at(self, line: int, column: int) -> int:
        """A place from the tree, whose columns count bytes of UTF-8."""
        begin = self.starts[line - 1]
        end = self.starts[line] if line < len(self.starts) else len(self.source)
        return begin + len(self.source[begin:end].encode()[:column].decode())

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """First character and end of a node."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._at(node.lineno, node.col_offset), self._at(node.end_lineno, node.end_col_offset)

    def text(self, node: ast.expr | ast.stmt) -> str:
        """The source of a node."""
        return self.source[slice(*self.span(node))]

    def between(self, left: ast.expr, right: ast.expr, written: str) -> tuple[int, int] | None:
        """Where an operator of one or two words stands between two operands."""
        begin, end, wanted = self.span(left)[1], self.span(right)[0], written.split()
        inside = [(at, word) for at, word in self.words if begin <= at < end]
        for k in range(len(inside) - len(wanted) + 1):
            part = inside[k : k + len(wanted)]
            if [word for _, word in part] == wanted:
                return part[0][0], part[-1][0] + len(part[-1][1])
        return None


def _nodes(tree: ast.AST, *, own: bool = False) -> Iterator[ast.AST]:
    """All nodes but those within f-strings, whose places older Pythons do not tell.

    Args:
        tree: where to begin.
        own: leave out functions within it.
    """
    left_out = (ast.JoinedStr, *_SCOPES) if own else (ast.JoinedStr,)
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, left_out)]


def _exchanged(
    kind: Kind, places: _Places, left: ast.expr, right: ast.expr, written: str, others: Sequence[str]
) -> list[Mutation]:
    span = places.between(left, right, written)
    return [] if span is None else [Mutation(kind, *span, other) for other in others]


def _comparisons(tree: ast.AST, places: _Places) -> Iterator[Mutation]:
    for node in _nodes(tree):
        if isinstance(node, ast.Compare):
            for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                written = _COMPARISON_OF[type(operator)]
                yield from _exchanged("comparison", places, left, right, written, _COMPARISONS[written])


def _arithmetic(tree: ast.AST, places: _Places) -> Iterator[Mutation]:
    for node in _nodes(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _ARITHMETIC_OF:
            written = _ARITHMETIC_OF[type(node.op)]
            others = _ARITHMETIC[written]
            if isinstance(node, ast.BinOp):
                yield from _exchanged("arithmetic", places, node.left, node.right, written, others)
            else:
                set_to = [f"{other}=" for other in others]
                yield from _exchanged("arithmetic", places, node.target, node.value, f"{written}=", set_to)


def _constants(tree: ast.AST, places: _Places) -> Iterator[Mutation]:
    for node in _nodes(tree):
        if isinstance(node, ast.Constant) and type(node.value) is int and places.text(node) == str(node.value):
            for value in (node.value + 1, node.value - 1):
                if value >= 0:
                    yield Mutation("constant", *places.span(node), str(value))


def _booleans(tree: ast.AST, places: _Places) -> Iterator[Mutation]:
    for node in _nodes(tree):
        if isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.Constant):
            yield Mutation("boolean", *places.span(node.test), f"not ({places.text(node.test)})")
        elif isinstance(node, ast.BoolOp):
            written, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from _exchanged("boolean", places, left, right, written, [other])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield Mutation("boolean", *places.span(node), places.text(node.operand))
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            yield Mutation("boolean", *places.span(node), str(not node.value))


def _variables(tree: ast.AST, places: _Places) -> Iterator[Mutation]:
    """Each name that is read becomes the one before it and the one behind it among those of its function."""
    for scope in _nodes(tree):
        if isinstance(scope, _SCOPES):
            named = scope.args
            arguments = [*named.posonlyargs, *named.args, *named.kwonlyargs]
            arguments += [a for a in (named.vararg, named.kwarg) if a is not None]
            inside = [n for n in _nodes(scope, own=True) if isinstance(n, ast.Name)]
            # What a comprehension names is known within it alone.
            loops = [n.target for n in _nodes(scope, own=True) if isinstance(n, ast.comprehension)]
            within = {n.id for target in loops for n in _nodes(target) if isinstance(n, ast.Name)}
            stored = [n for n in inside if isinstance(n.ctx, ast.Store) and n.id not in within]
            assigned = sorted((places.span(n)[0], n.id) for n in stored)
            names = list(dict.fromkeys([*(a.arg for a in arguments), *(name for _, name in assigned)]))
            for node in inside:
                if isinstance(node.ctx, ast.Load) and node.id in names:
                    at = names.index(node.id)
                    for other in {names[at - 1], names[(at + 1) % len(names)]} - {node.id}:
                        yield Mutation("variable", *places.span(node), other)


def _statements(tree: ast.AST, places: _Places) -> Iterator[Mutation]:
    for node in _nodes(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if not isinstance(block, list):
                continue
            for statement in block:
                said = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                if isinstance(statement, _REMOVABLE) and not said:
                    yield _left_out(places, statement, alone=len(block) == 1)


def _left_out(places: _Places, statement: ast.stmt, *, alone: bool) -> Mutation:
    """The statement's lines are gone, or ``pass`` stands in its place where something must."""
    start, end = places.span(statement)
    assert statement.end_lineno is not None
    first = places.starts[statement.lineno - 1]
    last = statement.end_lineno
    after = places.starts[last] if last < len(places.starts) else len(places.source)
    if alone or places.source[first:start].strip() or places.source[end:after].strip():
        return Mutation("statement", start, end, "pass")
    if after == len(places.source) and not places.source[end:after].endswith(("\r", "\n")):
        first = len(places.source[:first].rstrip("\r\n"))
    return Mutation("statement", first, after, "")


def _arguments(tree: ast.AST, places: _Places) -> Iterator[Mutation]:
    for node in _nodes(tree):
        if isinstance(node, ast.Call) and not any(isinstance(a, ast.Starred) for a in node.args):
            for left, right in zip(node.args, node.args[1:], strict=False):
                start, middle = places.span(left)
                begin, end = places.span(right)
                text = places.text(right) + places.source[middle:begin] + places.text(left)
                yield Mutation("arguments", start, end, text)
