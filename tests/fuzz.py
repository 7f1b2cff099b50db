"""Random calls: each ends in an error that says something, or in a right answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import opdc

REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError)


def answered_calls(
    count: int,
    random_call: Callable[[], tuple[str, list[Any], dict[str, Any]]],
    check: Callable[[str, list[Any], dict[str, Any], Any], None],
) -> int:
    """How many of `count` calls were answered; `check` has seen each answer."""
    answered = 0
    for _ in range(count):
        name, arguments, given = random_call()
        shown = f"{name} {[getattr(x, 'shape', x) for x in arguments]} {given}"
        try:
            result = getattr(opdc, name)(*arguments, **given)
        except REFUSALS as error:
            assert str(error), shown
            continue
        answered += 1
        try:
            check(name, arguments, given, result)
        except AssertionError as error:
            raise AssertionError(shown) from error
    return answered
