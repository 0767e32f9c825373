"""Which cases of a module its selected tests ask for, so that a shared fixture leaves out the others."""

from collections.abc import Iterable
from typing import TypeVar

import pytest

Value = TypeVar("Value")


def selected(request: pytest.FixtureRequest, name: str, values: Iterable[Value]) -> list[Value]:
    """Those of `values` that the parameter `name` has in this run, among the tests that use the fixture of `request`.

    All of them when a test of the run uses the fixture without that parameter, for it may look at any.
    """
    asked = []
    for test in request.session.items:
        if test.module is request.module and request.fixturename in test.fixturenames:
            parameters = test.callspec.params if hasattr(test, "callspec") else {}
            if name not in parameters:
                return list(values)
            asked.append(parameters[name])
    return [value for value in values if value in asked]
