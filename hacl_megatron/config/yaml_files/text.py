"""YAML in and out, by PyYAML's safe loader with its traps closed.

`1e-3` is a number here (PyYAML wants `1.0e-3` and takes the rest for text), a key given twice is an error
(PyYAML keeps the last), and errors name file and line. What YAML 1.1 reads as few people write it is an error too:
`010` (octal, 8), `1:30` (sexagesimal, 90) and `None` (the text, for which a folder would be made). No number of a run
is NaN or infinite. Size, depth and what anchors add up to are bounded before anything is built.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_EXPONENT = re.compile(r"^[-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)[eE][-+]?\d+$")
MOST_BYTES = 1 << 18
"""Of a file; a run's own is 8 KB."""
_MOST_VALUES, _MOST_DEPTH, _MOST_CHARACTERS = 20_000, 30, 4096
"""Of a file, with every alias written out; of its mappings and lists; of one value."""

_OCTAL = re.compile(r"^[-+]?0[0-7_]+$")
_SEXAGESIMAL = re.compile(r"^[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?$")
NOTHING = "none"
"""Python's word, in capitals or not, which is a text to YAML; some flags have a choice of that name."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # anchors would make a file for people hard to read


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML loses line breaks such as U+0085 in any other style.
    quoted = not text.isprintable() or text.lower() == NOTHING
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_text)

for _resolver in (_Loader, _Dumper):  # the dumper too, so that the text "1e-3" is written in quotes
    _resolver.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


@dataclass(frozen=True, kw_only=True)
class Document:
    """A YAML mapping and where its entries stand."""

    source: str
    """What errors call the text, usually its path."""
    values: dict[str, Any]
    lines: dict[str, int]
    """Line of each top-level key, counted from 1."""
    unquoted: frozenset[str] = frozenset()
    """Top-level keys whose value is `none` without quotes: a choice of that name, or meant as `null`."""

    def where(self, key: str) -> str:
        return f"{self.source}, line {self.lines[key]}"


def read_yaml_text(path: Path, called: str) -> str:
    """Text of a YAML file, of which no more is read than one may hold.

    Raises:
        ValueError: it cannot be read, is too large or no text; `called` names it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{called}: cannot be read ({error.strerror}); expected a YAML file") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"{called}: more than {MOST_BYTES >> 10} KB, expected a YAML file of flags and sections")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{called}: not UTF-8 text; expected a YAML file") from None


def load_yaml(text: str, source: str) -> Document:
    """Parse a YAML mapping; an empty text is an empty one.

    Raises:
        ValueError: naming `source` and the line, for a syntax error, a key given twice, or another kind of document.
    """
    loader = None
    try:
        _check_bounds(text, source)
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _check_numbers(node, source)
        values = {} if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(filter(None, [error.context, error.problem]))
        raise ValueError(f"{source}, line {mark.line + 1 if mark else 1}: not valid YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{source}, line {line}: not valid YAML: {error.reason}") from None
    except Misread:
        raise
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # A date such as 2024-13-45; a text that is not what its tag says, as !!int "" or !!bool x.
        raise ValueError(f"{source}: not valid YAML: {error}; put text in quotes") from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(values, dict):
        raise ValueError(f"{source}: found a {type(values).__name__}, expected `name: value` lines")
    lines = {} if node is None else {key.value: key.start_mark.line + 1 for key, _ in node.value}
    for key in values:
        if not isinstance(key, str) or key not in lines:  # 3: ..., or a key merged in by `<<`
            raise ValueError(f"{source}: found the key {key!r}, expected the name of a flag or section")
    unquoted = frozenset(key.value for key, value in node.value if _is_nothing(value)) if node is not None else ()
    return Document(source=source, values=values, lines=lines, unquoted=frozenset(unquoted))


class Misread(ValueError):
    """A value that YAML 1.1 does not read as it looks."""


def _check_bounds(text: str, source: str) -> None:
    """Raises Misread for a text that takes long to read or much to hold, before anything is built of it."""
    if len(text) > MOST_BYTES:
        raise Misread(f"{source}: more than {MOST_BYTES >> 10} KB, expected a YAML file of flags and sections")
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []
    values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{source}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, values))
            if len(opened) > _MOST_DEPTH:
                raise Misread(f"{where}: lists or mappings in one another deeper than {_MOST_DEPTH}; expected flags")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise Misread(f"{where}: *{event.anchor[:40]} stands inside what it names; write the value out")
            values += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            if len(event.value) > _MOST_CHARACTERS:
                raise Misread(f"{where}: a value of more than {_MOST_CHARACTERS} characters; expected a flag's")
            if event.anchor is not None:
                sizes[event.anchor] = 1
        values += 1
        if values > _MOST_VALUES:
            raise Misread(
                f"{where}: more than {_MOST_VALUES:,} values, those that aliases stand for counted in; expected flags "
                "and sections"
            )


def _check_numbers(node: yaml.Node, source: str, key: str = "") -> None:
    """Raises Misread for the first number below `node` that is written in base 8 or 60, or is not finite.

    `key` names what holds it.
    """
    if isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            inner = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            _check_numbers(value, source, f"{key}.{inner}" if key else inner)
        return
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_numbers(item, source, key)
        return
    found, where = node.value, f"{source}, line {node.start_mark.line + 1}: {key!r}"
    if node.tag == "tag:yaml.org,2002:float" and _is_not_finite(found):
        raise Misread(f"{where} found {found[:40]}, expected a finite number")
    if node.style is None and isinstance(found, str):
        if node.tag == "tag:yaml.org,2002:int" and _OCTAL.match(found) and int(found.replace("_", ""), 8) > 7:
            plain = found.replace("_", "")
            raise Misread(
                f"{where} found {found}, which YAML reads in base 8, as {int(plain, 8)}; write {int(plain)} or "
                f"{int(plain, 8)}, or put text in quotes"
            )
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and _SEXAGESIMAL.match(found):
            number = yaml.safe_load(found)
            raise Misread(
                f"{where} found {found}, which YAML reads in base 60, as {number}; write {number} if that is meant, or "
                "put text in quotes"
            )
        if key.count(".") and found == NOTHING.capitalize():
            raise Misread(f"{where} found {found}, which YAML reads as text; write null for nothing, or quote the text")


def _is_not_finite(text: str) -> bool:
    try:
        return not math.isfinite(float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan")))
    except ValueError:  # in base 60, or no number at all
        return False


def _is_nothing(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value.lower() == NOTHING


def dump_yaml(values: dict[str, Any]) -> str:
    """`values` as block-style YAML in the order given; `load_yaml` gives them back exactly."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=float("inf")
    )
