"""Mutants of a Python source: one small change each, as a slip of the pen would make it.

    a < b      -> a <= b      compared          group.dp   -> group.tp   swapped
    a == b     -> a != b      inverted          f(a, b)    -> f(b, a)    swapped
    a + b      -> a - b       operator          x.detach() -> x          dropped
    if a       -> if not (a)  inverted          raise …    -> pass       dropped
    3          -> 4           constant          return a   -> return None

What says nothing is left alone: annotations, docstrings, asserts (and `strict`, which is one), imports, and the words
of an error.
"""

import ast
import collections
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

_COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: (r"is", "is not"), ast.IsNot: (r"is\s+not", "is"),
    ast.In: (r"in", "not in"), ast.NotIn: (r"not\s+in", "in"),
}  # fmt: skip
_OPERATORS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"), ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
}  # fmt: skip
_NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "ceil": "floor", "floor": "ceil", "argmin": "argmax",
    "argmax": "argmin", "amax": "amin", "amin": "amax", "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like",
    "ones_like": "zeros_like",
}  # fmt: skip
_GROUPS = {"dp": "tp", "tp": "dp", "pp": "tp", "cp": "tp", "dp_host": "dp", "dp_cp": "dp"}
_DROPPED_METHODS = ("detach", "clone", "float", "double", "contiguous")
_PATHS = "path|folder|file|index|save|digest|partial|checkpoint"
"""What a `/` that joins paths has beside it: another operator there is an error of types, which any run shows."""
_PLAIN_CALLS = ("isinstance", "getattr", "hasattr", "range", "print", "zip")
_TO_DROP = (ast.Expr, ast.Raise, ast.Continue, ast.Break)


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of one file."""

    path: str
    """Of the file, relative to the repository."""
    function: str
    """`Class.method` that it lies in; empty at the module's level."""
    kind: str
    in_function: bool
    """Whether it is run when the function is, not when the module is imported."""
    first_line: int
    """Line on which the statement begins that is changed."""
    line: int
    last_line: int
    start: int
    """Bytes from the file's beginning."""
    stop: int
    replacement: str
    before: str
    """The line, without its blanks, as it is and as the mutant has it."""
    after: str
    nth: int = 1
    """Of the mutants of its function that change equal lines alike, in order of their places."""

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.replacement.encode() + source[self.stop :]

    @property
    def identity(self) -> tuple[str, str, str, str, int]:
        """What it is known by when lines have moved."""
        return self.path, self.function, self.before, self.after, self.nth

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def mutants_of(source: bytes, path: str) -> list[Mutant]:
    """All mutants of one file, in order of their places."""
    visitor = _Visitor(source, path)
    visitor.statements(ast.parse(source).body)
    found = {(m.start, m.stop, m.replacement): m for m in visitor.found}
    ordered = sorted(found.values(), key=lambda m: (m.start, m.stop, m.replacement))
    seen: collections.Counter = collections.Counter()
    for place, mutant in enumerate(ordered):
        seen[mutant.identity] += 1
        ordered[place] = replace(mutant, nth=seen[mutant.identity])
    return ordered


class _Visitor:
    def __init__(self, source: bytes, path: str) -> None:
        self.source, self.path = source, path
        self.line_starts = [0, *(match.end() for match in re.finditer(rb"\n", source))]
        self.names: list[str] = []
        self.in_function = False
        self.statement: ast.stmt | None = None
        self.found: list[Mutant] = []

    def statements(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self.statement = statement
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self.names.append(node.name)
            outside = self.in_function
            if not isinstance(node, ast.ClassDef):
                for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]:
                    self._expression(default)
                self.in_function = True
            self.statements(node.body)
            self.in_function = outside
            self.names.pop()
            return
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.Global | ast.Nonlocal | ast.Pass):
            return
        if isinstance(node, _TO_DROP) and not (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call)):
            self._add("dropped", node, self._start(node), self._stop(node), "pass")
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            return
        if isinstance(node, ast.Return) and not (node.value is None or _is(node.value, None)):
            self._replace("return", node.value, "None")
        if isinstance(node, ast.If | ast.While):
            self._invert(node.test)
        if isinstance(node, ast.AugAssign):
            self._operator(node, node.target, node.value, suffix="=")
        for name, value in ast.iter_fields(node):
            if name == "annotation":
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.expr):
                    self.statement = node
                    self._expression(child)
                elif isinstance(child, ast.withitem):
                    self._expression(child.context_expr)
                elif isinstance(child, ast.ExceptHandler):
                    self.statements(child.body)
                elif isinstance(child, ast.stmt):
                    self.statements([child])

    def _expression(self, node: ast.expr) -> None:
        asserted = [k.value for k in ast.walk(node) if isinstance(k, ast.keyword) and k.arg == "strict"]
        for child in ast.walk(node):
            if child in asserted:
                continue
            if isinstance(child, ast.Compare) and len(child.ops) == 1:
                token, other = _COMPARISONS[type(child.ops[0])]
                self._token("compared", child, child.left, child.comparators[0], token, other)
            elif isinstance(child, ast.Compare):
                for left, op, right in zip(
                    [child.left, *child.comparators], child.ops, child.comparators, strict=False
                ):
                    self._token("compared", child, left, right, *_COMPARISONS[type(op)])
            elif isinstance(child, ast.BinOp):
                self._operator(child, child.left, child.right)
            elif isinstance(child, ast.BoolOp):
                token, other = ("and", "or") if isinstance(child.op, ast.And) else ("or", "and")
                for left, right in zip(child.values, child.values[1:], strict=False):
                    self._token("operator", child, left, right, token, other)
            elif isinstance(child, ast.UnaryOp) and isinstance(child.op, ast.Not | ast.USub):
                begin = self._start(child)  # brackets around what follows stay
                length = len(re.match(rb"not\s+|not|-", self.source[begin:])[0])
                self._add("operator", child, begin, begin + length, "")
            elif isinstance(child, ast.IfExp):
                self._invert(child.test)
            elif isinstance(child, ast.comprehension):
                for test in child.ifs:
                    self._invert(test)
            elif isinstance(child, ast.Constant):
                self._constant(child)
            elif isinstance(child, ast.Call):
                self._call(child)
            elif isinstance(child, ast.Attribute) and child.attr in _GROUPS:
                self._group(child)

    def _call(self, node: ast.Call) -> None:
        name = node.func
        if isinstance(name, ast.Attribute) and name.attr in _DROPPED_METHODS and not node.args and not node.keywords:
            self._add("dropped", node, self._stop(name.value), self._stop(node), "")
        called = name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "")
        if called in _NAMES:
            self._add("swapped", node, self._stop(name) - len(called), self._stop(name), _NAMES[called])
        first, second = (*node.args, None, None)[:2]
        if (
            second is None
            or called in _PLAIN_CALLS
            or isinstance(first, ast.Starred)
            or isinstance(second, ast.Starred)
        ):
            return
        one, other = self._text(first), self._text(second)
        between = self.source[self._stop(first) : self._start(second)].decode()
        if one != other and between.strip() == ",":
            self._add("swapped", node, self._start(first), self._stop(second), other + between + one)

    def _group(self, node: ast.Attribute) -> None:
        if self._text(node.value).endswith("groups"):
            self._add("swapped", node, self._stop(node) - len(node.attr), self._stop(node), _GROUPS[node.attr])

    def _constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace("constant", node, str(not node.value))
        elif isinstance(node.value, int):
            self._replace("constant", node, str(node.value + 1))
            if node.value > 0:
                self._replace("constant", node, str(node.value - 1))
        elif isinstance(node.value, float):
            self._replace("constant", node, repr(node.value * 2 or 1.0))

    def _invert(self, test: ast.expr) -> None:
        simple = isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq | ast.NotEq | ast.Is | ast.IsNot)
        if not simple and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
            self._replace("inverted", test, f"not ({self._text(test)})")

    def _operator(self, node: ast.AST, left: ast.expr, right: ast.expr, suffix: str = "") -> None:
        if type(node.op) not in _OPERATORS or any(isinstance(a, ast.JoinedStr) or _is(a, str) for a in (left, right)):
            return
        if isinstance(node.op, ast.Div) and re.search(_PATHS, self._text(left) + self._text(right), re.IGNORECASE):
            return
        token, other = _OPERATORS[type(node.op)]
        self._token("operator", node, left, right, token + suffix, other + suffix)

    def _token(self, kind: str, node: ast.AST, left: ast.expr, right: ast.expr, token: str, other: str) -> None:
        start, stop = self._stop(left), self._start(right)
        between = self.source[start:stop].decode()
        pattern = token if token[0].isalpha() else re.escape(token)
        if match := re.search(pattern, between):
            begin = start + len(between[: match.start()].encode())
            self._add(kind, node, begin, begin + len(match[0].encode()), other)

    def _replace(self, kind: str, node: ast.expr, text: str) -> None:
        self._add(kind, node, self._start(node), self._stop(node), text)

    def _add(self, kind: str, node: ast.AST, start: int, stop: int, text: str) -> None:
        line_start = self.source.rfind(b"\n", 0, start) + 1
        ends = self.source.find(b"\n", start), self.source.find(b"\n", stop)
        one_end, other_end = (end if end >= 0 else len(self.source) for end in ends)
        before = self.source[line_start : max(one_end, other_end)].decode()
        after = (self.source[line_start:start] + text.encode() + self.source[stop:other_end]).decode()
        mutant = Mutant(
            path=self.path, function=".".join(self.names), kind=kind, in_function=self.in_function,
            first_line=self.statement.lineno, line=self.source.count(b"\n", 0, start) + 1, last_line=node.end_lineno,
            start=start, stop=stop, replacement=text, before=_squeezed(before), after=_squeezed(after),
        )  # fmt: skip
        self.found.append(mutant)

    def _start(self, node: ast.AST) -> int:
        return self.line_starts[node.lineno - 1] + node.col_offset

    def _stop(self, node: ast.AST) -> int:
        return self.line_starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.AST) -> str:
        return self.source[self._start(node) : self._stop(node)].decode()


def _is(node: ast.expr, kind: type | None) -> bool:
    if kind is None:
        return isinstance(node, ast.Constant) and node.value is None
    return isinstance(node, ast.Constant) and isinstance(node.value, kind)


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def sources(root: Any, places: list[str]) -> Iterator[tuple[str, bytes]]:
    """(path relative to `root`, bytes) of the files that `places`, folders or files, name; each once."""
    seen = set()
    for place in places:
        files = [root / place] if (root / place).is_file() else sorted((root / place).rglob("*.py"))
        if not files:
            raise ValueError(f"{place}: no Python file; expected a folder or a file of the repository")
        for file in files:
            if file not in seen:
                seen.add(file)
                yield str(file.relative_to(root)), file.read_bytes()
