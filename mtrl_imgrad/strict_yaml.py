"""YAML as configurations need it: one mapping, small, with every key once.

What plain YAML allows beside this is ambiguous (a key twice: the last one wins in silence) or a danger (an alias of a
collection: a few lines that stand for gigabytes).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LARGEST = 2**18
"""Bytes; a whole configuration has about 2 000."""
MOST_BITS = 4096
"""Of a whole number; Python writes no much longer ones. The fields have their own, narrower, limits."""
DEEPEST = 20
"""Collections in one another; a configuration has 2, and lists in them."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases of collections, keys given twice and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"more than {DEEPEST} collections in one another are not allowed")
        node = super().compose_node(parent, index)  # pyright: ignore[reportArgumentType]
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent) and not isinstance(node, yaml.ScalarNode):
            raise yaml.YAMLError(f"the alias *{event.anchor} of a collection is not allowed; write it out")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError("a list or a mapping as a key is not allowed")
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value!r} is given twice; it must be there once")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node)
        if number.bit_length() > MOST_BITS:
            raise yaml.YAMLError(f"the number {node.value[:20]}... is not allowed; it must be shorter")
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: what is wrong with the file, in one line without its name.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"a configuration must have at most {LARGEST // 1024} KiB")
    try:
        found = yaml.load(content.decode("utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"it must be text in UTF-8 ({error.reason} at byte {error.start})") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: numbers and dates that do not exist
        raise ValueError(f"it cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ValueError(f"it must be a YAML mapping of fields; it is {type(found).__name__}")
    for key in found:
        if not isinstance(key, str):
            raise ValueError(f"{key!r}: the name of a field must be text")
    return found
