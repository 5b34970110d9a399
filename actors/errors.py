"""Errors as they are told to others: in one line, whatever they are made of."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Of what it says; its kind, where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def named_line(error: BaseException) -> str:
    """The same with its kind before it."""
    kind, said = type(error).__name__, first_line(error)
    return kind if said == kind else f"{kind}: {said}"
