"""YAML in and out, by PyYAML's safe loader with its three traps closed.

`1e-3` is a number here (PyYAML wants `1.0e-3` and takes the rest for text), a key given twice is an error
(PyYAML keeps the last), and errors name file and line.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml

_EXPONENT = re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$")


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
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


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

    def where(self, key: str) -> str:
        return f"{self.source}, line {self.lines[key]}"


def load_yaml(text: str, source: str) -> Document:
    """Parse a YAML mapping; an empty text is an empty one.

    Raises:
        ValueError: naming `source` and the line, for a syntax error, a key given twice, or another kind of document.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = {} if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(filter(None, [error.context, error.problem]))
        raise ValueError(f"{source}, line {mark.line + 1 if mark else 1}: not valid YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"{source}, line {line}: not valid YAML: {error.reason}") from None
    except ValueError as error:  # a date such as 2024-13-45
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
    return Document(source=source, values=values, lines=lines)


def dump_yaml(values: dict[str, Any]) -> str:
    """`values` as block-style YAML in the order given; `load_yaml` gives them back exactly."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=float("inf")
    )
