"""Read one YAML text as plain values, within limits that no configuration reaches.

A few hundred bytes of YAML can stand for gigabytes, because an alias repeats what it names.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from tpaw.errors import brief

FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")

MAX_CHARACTERS = 200_000
MAX_DEPTH = 50
MAX_VALUES = 10_000
MAX_DIGITS = 100


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does: 1e-6 is a float. PyYAML follows YAML 1.1: 1e-6 is text.

    A date is text, as in YAML 1.2. A key that occurs twice in a mapping is refused.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        # Each complete node to its number of values, with everything that aliases repeat.
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refusal(f"more than {MAX_DEPTH} lists or mappings inside each other", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and node not in self._sizes:
            raise _refusal("an alias inside of what it names", mark)
        if node is not None and node not in self._sizes:
            self._sizes[node] = 1 + sum(self._sizes[part] for part in _parts(node))
            if max(self._sizes[node], len(self._sizes)) > MAX_VALUES:
                raise _refusal(f"more than {MAX_VALUES} values, aliases included", mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.rpartition(":")[2]
        if kind == "int" and len(node.value) > MAX_DIGITS:
            raise _refusal(f"a number of more than {MAX_DIGITS} characters", node.start_mark)
        try:
            return super().construct_object(node, deep=deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            raise _refusal(f"{brief(node.value)} is not a valid {kind}", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refusal("a key is a list or a mapping; use text", key_node.start_mark)
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise _refusal(f"the key {brief(key)} occurs twice", key_node.start_mark)
            seen.add(key)
        return dict(super().construct_mapping(node, deep=deep))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """Parse a YAML text.

    Args:
        text: one YAML document.

    Returns:
        Nested dictionaries, lists, text, numbers, booleans and None.

    Raises:
        yaml.YAMLError: the text is not valid YAML, or it is larger than a configuration can be.
            The error names the line.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"{len(text)} characters; at most {MAX_CHARACTERS} are read")
    return yaml.load(text, _Loader)


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _refusal(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
