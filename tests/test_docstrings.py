"""Every public name is documented, with an example; pytest runs the examples of the package."""

from __future__ import annotations

import inspect

import pytest

import opdc

PUBLIC = [getattr(opdc, name) for name in opdc.__all__ if callable(getattr(opdc, name))]
PUBLIC += [getattr(opdc.nn, name) for name in opdc.nn.__all__]
PUBLIC += [opdc.metrics.mean, opdc.metrics.all_reduce]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__qualname__)
def test_public_names_are_documented(thing):
    assert inspect.getdoc(thing)
    if thing is not opdc.metrics.all_reduce:  # which needs a process group
        assert ">>>" in inspect.getdoc(thing)


def test_all_is_what_there_is():
    functions = {name for name, value in vars(opdc).items() if inspect.isfunction(value)}
    assert functions <= set(opdc.__all__)
