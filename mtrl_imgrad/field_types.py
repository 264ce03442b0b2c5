"""Whether values have the types that a dataclass declares, as a file that is read back may not have them."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

LARGEST_INTEGER = 2**63 - 1


def check_types(cls: Any, section: str, values: dict[str, Any]) -> None:
    """Check the values of a dataclass's fields, given by name.

    Raises:
        ValueError: one has another type than its field, or there is no such field.
    """
    hints, known = get_type_hints(cls), {field.name for field in dataclasses.fields(cls)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{section}{name}: this version knows no such field.")
        if not fits(value, hints[name]):
            raise ValueError(f"{section}{name}: {value!r} is not allowed; it must be {spelled(hints[name])}.")


def fits(value: object, hint: Any) -> bool:
    """Whether a value has a type. A whole number is a float too, a truth value is no number, and what is no plain type
    (a user's class) fits anything."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return any(value == each and type(value) is type(each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(each, get_args(hint)[0]) for each in value)
    if hint is float:
        return type(value) is float or fits(value, int)
    if hint is int:
        return type(value) is int and abs(value) <= LARGEST_INTEGER
    return type(value) is hint if hint in (bool, str, types.NoneType) else True


def spelled(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(spelled(each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(repr(each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list, each {spelled(get_args(hint)[0])}"
    words = {bool: "true or false", int: "a whole number of at most 64 bits", float: "a number", str: "text"}
    return words.get(hint, "None" if hint is types.NoneType else str(hint))
