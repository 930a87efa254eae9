"""The base of every contract type, and the one way a document becomes one."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Self

import annotated_types
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


class ContractError(ValueError):
    """A document does not fit its contract.

    The message has one line per fault: the path of the field, what was found and what is allowed.
    """


class Misfit(NamedTuple):
    """A field that does not go with another field of the same document."""

    path: str
    """The field, as a path from the part that checks it, for example `schedule.warmupSamples`."""
    found: object
    """Its value."""
    allowed: str
    """What would fit."""


def refuse(*misfits: Misfit) -> None:
    """Called by a validator with all it found: raises the validation error that tells each; does nothing for none."""
    if misfits:
        raise PydanticCustomError("misfit", "fields do not go together", {"misfits": misfits})


def ordered(values: tuple[float, float]) -> tuple[float, float]:
    """A validator for ranges: refuses one whose lower end is above its upper end."""
    if values[0] > values[1]:
        raise PydanticCustomError("range", "two numbers, the lower one first")
    return values


class Part(BaseModel):
    """A frozen, closed record: unknown keys are errors, documents use camelCase, Python uses snake_case."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name
        return _reader_of(cls, info.field_name)(value)

    @classmethod
    def parse(cls, document: object, *, where: str = "", show_values: bool = True) -> Self:
        """Validate a plain document (the result of reading YAML or JSON).

        `where` prefixes every path in the error. `show_values=False` keeps what was found out of the message, for
        documents that hold sample keys. Raises ContractError.
        """
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise ContractError(_explain(cls, error, where, show_values)) from None

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = "", show_values: bool = True) -> Self:
        """Parse JSON text. Raises ContractError, also where the text is not JSON."""
        try:
            document = json.loads(text)
        except ValueError as error:
            # JSON's own message would quote nothing, but a decoding error quotes bytes.
            position = getattr(error, "pos", None)
            raise ContractError(f"{where or cls.__name__}: not JSON (at character {position})") from None
        return cls.parse(document, where=where, show_values=show_values)

    def document(self) -> dict[str, Any]:
        """The plain, JSON-ready form with camelCase keys."""
        return self.model_dump(mode="json", by_alias=True)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces. Equal values give equal bytes."""
        return canonical_json(self.document())

    def digest(self) -> str:
        """`sha256:<hex>` of the canonical JSON."""
        return f"sha256:{hashlib.sha256(self.to_json().encode()).hexdigest()}"


def canonical_json(document: object) -> str:
    """JSON with sorted keys and no spaces."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def load_yaml(text: str, *, where: str) -> object:
    """Read one YAML document, with duplicate keys refused. Raises ContractError."""
    documents = load_yaml_documents(text, where=where)
    if len(documents) > 1:
        raise ContractError(f"{where}: found {len(documents)} documents. Allowed: one")
    return documents[0] if documents else None


def load_yaml_documents(text: str, *, where: str) -> list[object]:
    """Read all documents of a YAML text, with duplicate keys refused. Raises ContractError."""
    try:
        return list(yaml.load_all(text, Loader=_UniqueKeyLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ContractError(f"{where}{line}: {problem}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader keeps the last of two equal keys without a word; a silent override is a silent wrong run."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _explain(model: type[BaseModel], error: ValidationError, where: str, show_values: bool) -> str:
    lines = []
    for fault in error.errors(include_url=False):
        place = _place(model, fault["loc"])
        path = ".".join(str(part) for part in ((where,) if where else ()) + place.location) or model.__name__
        found = f"found {_short(fault['input'])}" if show_values else "found a value that is not shown here"
        match fault["type"]:
            case "extra_forbidden":
                names = sorted(_place(model, fault["loc"][:-1]).keys)
                close = difflib.get_close_matches(str(place.location[-1]), names, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                lines.append(f"{path}: unknown key{hint} Allowed: {', '.join(names)}")
            case "missing":
                lines.append(f"{path}: required, but not given. Allowed: {place.allowed or 'any value'}")
            case "misfit":
                for misfit in fault["ctx"]["misfits"]:
                    value = f"found {_short(misfit.found)}" if show_values else "found a value that is not shown here"
                    lines.append(f"{path}.{misfit.path}: {value}. Allowed: {misfit.allowed}")
            case "range":
                lines.append(f"{path}: {found}. Allowed: {fault['msg']}")
            case "value_error":
                lines.append(f"{path}: {fault['ctx']['error']} ({found})")
            case _:
                lines.append(f"{path}: {found}. Allowed: {place.allowed or fault['msg']}")
    return "\n".join(dict.fromkeys(lines))  # each type of a union has its own fault; told of the union, they are one


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Place(NamedTuple):
    """A field of a document."""

    location: tuple[int | str, ...]
    """Its path."""
    annotation: Any
    """Its type, None where the model has no such field."""
    constraints: tuple[Any, ...] = ()
    """What its type has to fulfil besides."""

    @property
    def allowed(self) -> str:
        """What it may hold; empty where that is not known."""
        return "" if self.annotation is None else _allowed(self.annotation, self.constraints)

    @property
    def keys(self) -> list[str]:
        """The keys that it may have."""
        annotation = _alternatives(self.annotation)[0]
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [field.alias or name for name, field in annotation.model_fields.items()]
        return []


def _place(model: type[BaseModel], location: tuple[int | str, ...]) -> _Place:
    """The field of a fault, through nested models, lists and mappings.

    It ends at a union of several types, and at a mapping's key: what pydantic adds there is in no document.
    """
    annotation: Any = model
    constraints: tuple[Any, ...] = ()
    for depth, part in enumerate(location):
        types_there = _alternatives(annotation)
        if len(types_there) > 1:
            return _Place(location[:depth], annotation, constraints)
        annotation, _ = _unwrap(types_there[0])
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            for name, field in annotation.model_fields.items():
                if part in (name, field.alias):
                    annotation, constraints = field.annotation, tuple(field.metadata)
                    break
            else:
                return _Place(location, None)
        else:
            arguments = [a for a in typing.get_args(annotation) if a is not Ellipsis]
            if not arguments:
                return _Place(location, None)
            if location[depth + 1 :] == ("[key]",):
                return _Place(location[: depth + 1], arguments[0])
            index = part if isinstance(part, int) and typing.get_origin(annotation) is tuple else -1
            annotation, constraints = arguments[min(index, len(arguments) - 1)], ()
    return _Place(location, annotation, constraints)


def _unwrap(annotation: Any) -> tuple[Any, list[Any]]:
    """An annotation and its constraints, of `Annotated[int, Field(gt=0)]` for example."""
    if typing.get_origin(annotation) is not typing.Annotated:
        return annotation, []
    inner, *extras = typing.get_args(annotation)
    return inner, [c for extra in extras for c in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]


def _alternatives(annotation: Any) -> list[Any]:
    """The types of a union, without None; of anything else itself."""
    inner, _ = _unwrap(annotation)
    if typing.get_origin(inner) in (typing.Union, types.UnionType):
        return [a for a in typing.get_args(inner) if a is not type(None)]
    return [annotation]


class _NoNumber:
    """A value that pydantic would convert to a number, and so refuses, at its place; it is shown as it was."""

    def __init__(self, value: bool | str) -> None:
        self._value = value

    def __repr__(self) -> str:
        return repr(self._value)


_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
"""YAML 1.1 reads 1e-3 and 1.5e3 as texts."""


_Reader = Callable[[object], object]


@functools.cache
def _reader_of(model: type[Part], field: str) -> _Reader:
    """Makes true, false and texts stand for no numbers, as they do in pydantic: `true` is not 1 second."""
    return _reader(model.model_fields[field].annotation)


def _reader(annotation: Any) -> _Reader:
    types_there = [_unwrap(a)[0] for a in _alternatives(annotation)]
    if all(a in (int, float) for a in types_there):
        return functools.partial(_number, float in types_there)
    if typing.get_origin(types_there[0]) not in (list, tuple, dict, Mapping):
        return _as_it_is
    readers = [_reader(a) for a in typing.get_args(types_there[0]) if a is not Ellipsis]
    return _as_it_is if all(r is _as_it_is for r in readers) else functools.partial(_each, readers)


def _as_it_is(value: object) -> object:
    return value


def _number(real: bool, value: object) -> object:
    if not isinstance(value, bool | str):
        return value
    return float(value) if real and isinstance(value, str) and _EXPONENT.fullmatch(value) else _NoNumber(value)


def _each(readers: list[_Reader], value: object) -> object:
    """Items of a list or tuple, each by the reader of its place or the last; values of a mapping by the last."""
    if isinstance(value, list | tuple):
        if not {bool, str, list, tuple, dict}.intersection(map(type, value)):
            return value  # a manifest lists hundreds of thousands of numbers
        return [readers[min(i, len(readers) - 1)](item) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {key: readers[-1](item) for key, item in value.items()}
    return value


_SYMBOLS = {annotated_types.Ge: ">=", annotated_types.Gt: ">", annotated_types.Le: "<=", annotated_types.Lt: "<"}


def _allowed(annotation: Any, constraints: Iterable[Any] = ()) -> str:
    inner, own = _unwrap(annotation)
    choices = _alternatives(inner)
    parts = [_type_name(inner) if choices == [inner] else " or ".join(_allowed(choice) for choice in choices)]
    for constraint in (*constraints, *own):
        for kind, symbol in _SYMBOLS.items():
            if isinstance(constraint, kind):
                parts.append(f"{symbol} {getattr(constraint, kind.__name__.lower())}")
        pattern = getattr(constraint, "pattern", None)
        if pattern:
            parts.append(f"matching {pattern}")
        if isinstance(constraint, annotated_types.MinLen):
            parts.append(f"at least {constraint.min_length} long")
        if isinstance(constraint, annotated_types.MaxLen):
            parts.append(f"at most {constraint.max_length} long")
    return " ".join(parts)


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments if a is not type(None))
    if origin in (list, tuple):
        return "a list of " + ", ".join(_type_name(a) for a in arguments if a is not Ellipsis)
    if origin in (dict, Mapping):
        return "a mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a mapping with the keys " + ", ".join(f.alias or n for n, f in annotation.model_fields.items())
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(
        annotation, str(annotation)
    )
