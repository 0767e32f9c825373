"""What counts as one mutant, and that its change is made in the place that it names."""

import ast
import re
from pathlib import Path

from tests.measure.mutations import mutants_of, sources

SOURCE = '''
"""Words are left alone: 1 < 2."""

LIMIT: int = 3


class Box:
    def put(self, value: int | None, number=4):
        """1 < 2"""
        assert value < 5
        if not (value is None or value <= 6):
            raise ValueError(f"{value} > {number + 1}")
        self.kept = value.detach() - number
        dist.broadcast(self.kept, number, group=self.groups.dp)
        return value
'''

CHANGES = {
    ("LIMIT: int = 3", "LIMIT: int = 4", False), ("LIMIT: int = 3", "LIMIT: int = 2", False),
    ("def put(self, value: int | None, number=4):", "def put(self, value: int | None, number=5):", False),
    ("def put(self, value: int | None, number=4):", "def put(self, value: int | None, number=3):", False),
    ("if not (value is None or value <= 6):", "if (value is None or value <= 6):", True),
    ("if not (value is None or value <= 6):", "if not (value is not None or value <= 6):", True),
    ("if not (value is None or value <= 6):", "if not (value is None and value <= 6):", True),
    ("if not (value is None or value <= 6):", "if not (value is None or value < 6):", True),
    ("if not (value is None or value <= 6):", "if not (value is None or value <= 7):", True),
    ("if not (value is None or value <= 6):", "if not (value is None or value <= 5):", True),
    ('raise ValueError(f"{value} > {number + 1}")', "pass", True),
    ("self.kept = value.detach() - number", "self.kept = value - number", True),
    ("self.kept = value.detach() - number", "self.kept = value.detach() + number", True),
    ("dist.broadcast(self.kept, number, group=self.groups.dp)", "pass", True),
    ("dist.broadcast(self.kept, number, group=self.groups.dp)",
     "dist.broadcast(number, self.kept, group=self.groups.dp)", True),
    ("dist.broadcast(self.kept, number, group=self.groups.dp)",
     "dist.broadcast(self.kept, number, group=self.groups.tp)", True),
    ("return value", "return None", True),
}  # fmt: skip


def test_each_slip_is_a_mutant_and_nothing_that_says_nothing() -> None:
    found = mutants_of(SOURCE.encode(), "box.py")
    assert {(mutant.before, mutant.after, mutant.in_function) for mutant in found} == CHANGES
    assert {m.function for m in found if m.in_function} == {"Box.put"}
    for mutant in found:
        lines, changed = SOURCE.splitlines(), mutant.applied(SOURCE.encode()).decode().splitlines()
        different = [n for n, (old, new) in enumerate(zip(lines, changed, strict=True), 1) if old != new]
        assert different == [mutant.line]


def test_equal_changes_of_equal_lines_are_told_apart() -> None:
    """What became of the one was taken for the other's."""
    found = mutants_of(b"def f(a):\n    print(a)\n    print(a)\n\ndef g(a):\n    print(a)\n", "f.py")
    assert [(mutant.function, mutant.line, mutant.nth) for mutant in found] == [("f", 2, 1), ("f", 3, 2), ("g", 6, 1)]
    assert len({mutant.identity for mutant in found}) == 3


def test_mutants_of_the_package_are_python() -> None:
    root = Path(__file__).parents[2]
    for path, source in sources(root, ["hacl_megatron/objective/queue.py", "hacl_megatron/data/order/assignment.py"]):
        found = mutants_of(source, path)
        assert found or not re.search(rb"^ *def ", source, re.MULTILINE)
        for mutant in found:
            ast.parse(mutant.applied(source))
