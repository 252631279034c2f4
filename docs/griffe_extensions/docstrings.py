"""What the generator of the reference has to be told about rarefy's docstrings and classes."""

from typing import Any

import griffe

_DATACLASS, _MODEL = "pydantic.dataclasses.dataclass", "pydantic.BaseModel"


class Docstrings(griffe.Extension):
    """Shows `Example:` as code, and the fields of pydantic's classes as the arguments that they are."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object whose docstring was read."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Called for every class whose fields are known."""
        decorators = {decorator.callable_path for decorator in cls.decorators}
        is_model = _MODEL in {getattr(base, "canonical_path", "") for base in cls.bases}
        if is_model or _DATACLASS in decorators:
            kind = griffe.ParameterKind.keyword_only if is_model else None
            cls.set_member("__init__", griffe.Function("__init__", parameters=_parameters(cls, kind)))


def _parameters(cls: griffe.Class, kind: griffe.ParameterKind | None) -> griffe.Parameters:
    kind = kind or griffe.ParameterKind.positional_or_keyword
    fields = {name: field for name, field in cls.attributes.items() if name[0] != "_" and field.annotation}
    own = griffe.Parameter("self", kind=griffe.ParameterKind.positional_only)
    return griffe.Parameters(
        own,
        *(griffe.Parameter(name, kind=kind, default=field.value) for name, field in fields.items()),
    )
