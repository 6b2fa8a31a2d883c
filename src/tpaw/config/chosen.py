"""Sections whose content chooses their class: the objective by its name, a team rule by its key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema


class Chosen:
    """Marks such a section: `Annotated[SerializeAsAny[Base], Chosen(kind_of, kinds)]`.

    Args:
        kind_of: the class of a section, from its content. It may raise a `refusal`.
        kinds: all classes that are known beforehand, for the JSON schema.
        other: the JSON schema of any other; None if there is none.
    """

    def __init__(
        self,
        kind_of: Callable[[Mapping[str, Any]], type[BaseModel]],
        kinds: Callable[[], Iterable[type[BaseModel]]],
        other: Mapping[str, Any] | None = None,
    ) -> None:
        self._kind_of = kind_of
        self._kinds = kinds
        self._others = [dict(other)] if other is not None else []

    def kind_of(self, content: Any) -> type[BaseModel] | None:
        """The class of a section; None if its content does not choose one."""
        try:
            return self._kind_of(content) if isinstance(content, Mapping) else None
        except ValidationError:
            return None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._validated, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        known = [handler(kind.__pydantic_core_schema__) for kind in self._kinds()]
        return {"anyOf": known + self._others}

    def _validated(self, content: Any) -> Any:
        if isinstance(content, Mapping):
            return self._kind_of(content).model_validate(dict(content))
        return content


def refusal(key: str, value: Any, text: str) -> ValidationError:
    """The error of a setting inside a chosen section.

    Args:
        key: of the setting in its section; empty for the section itself.
        value: what was given.
        text: the rest of the message, after the key.
    """
    error = PydanticCustomError("value_error", "{text}", {"text": text})
    location = (key,) if key else ()
    return ValidationError.from_exception_data(
        "section", [InitErrorDetails(type=error, loc=location, input=value)]
    )
