"""From a Python type to a structural OpenAPI v3 schema, as a CustomResourceDefinition wants it.

Structural means: a type everywhere, no references, and alternatives only where they are of one type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sonoforge_trainer.contract import Part

Schema = dict[str, Any]
Path = tuple[str, ...]

# The API server bounds the cost of a rule by the size of what it may meet, so nothing in a spec is without a bound.
_MAX_LENGTH, _MAX_ITEMS, _MAX_PROPERTIES = 1024, 64, 64

_CONSTRAINTS = (
    "enum",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
)


@dataclass(frozen=True)
class Rule:
    """A CEL rule on a type, or on one field of it."""

    owner: type[Part]
    """The type it belongs to."""
    rule: str
    """CEL expression that holds for a good value `self`."""
    message: str
    """What is wrong and what to do next. It names no values: a text made of numbers has no bound that CEL can see."""
    field: str = ""
    """Field of the type that the rule is on, in camelCase; empty for the type itself."""

    def document(self) -> Schema:
        """An entry of x-kubernetes-validations."""
        return {"rule": self.rule, "message": self.message}


@dataclass(frozen=True)
class Options:
    """How a schema is made."""

    rules: tuple[Rule, ...] = ()
    """CEL rules of the types that occur."""
    lists: Mapping[tuple[type[Part], str], tuple[str, ...]] | None = None
    """Lists whose entries are unique, by type and field: the fields of their key, or none for a set."""
    defaults: bool = True
    """Whether fields get their defaults from the API server."""
    constraints: bool = True
    """Whether values are checked. Off where only the operator writes: an older CRD must not refuse a newer operator."""
    hint: Callable[[Path], str] | None = None
    """A sentence to add to the description of the field at a path."""


def structural(model: type[Part], options: Options) -> Schema:
    """The structural schema of a type."""
    whole = model.model_json_schema(by_alias=True)
    return _Builder(whole.get("$defs", {}), options).part(whole, model.__name__, ())


class _Builder:
    def __init__(self, definitions: Mapping[str, Schema], options: Options) -> None:
        self._definitions = definitions
        self._options = options
        self._lists = {(owner.__name__, field): keys for (owner, field), keys in (options.lists or {}).items()}

    def part(self, source: Schema, owner: str, path: Path) -> Schema:
        """The schema of a type with fields."""
        made: Schema = {"description": source["description"], "type": "object"}
        if source.get("required"):
            made["required"] = source["required"]
        made["properties"] = {
            name: self._field(field, owner, name, (*path, name)) for name, field in source["properties"].items()
        }
        self._add_rules(made, owner, "")
        return made

    def _field(self, source: Schema, owner: str, name: str, path: Path) -> Schema:
        made = self._value(source, path)
        own, of_type = source.get("description", ""), made.get("description", "")
        if of_type.startswith(own.removesuffix(".")):
            own = ""  # the type says the same and more
        texts = [own, of_type, self._options.hint(path) if self._options.hint else ""]
        made = {"description": "\n".join(t for t in texts if t)} | {k: v for k, v in made.items() if k != "description"}
        if made.get("type") == "array" and (self._options.constraints or (owner, name) in self._lists):
            keys = self._lists.get((owner, name))
            made["x-kubernetes-list-type"] = "atomic" if keys is None else "map" if keys else "set"
            if keys:
                made["x-kubernetes-list-map-keys"] = list(keys)
        if self._options.defaults and "default" in source:
            self._add_default(made, source["default"])
        self._add_rules(made, owner, name)
        return made

    def _value(self, source: Schema, path: Path) -> Schema:
        if "$ref" in source:
            name = source["$ref"].rsplit("/", 1)[1]
            return self.part(self._definitions[name], name, path)
        if "anyOf" in source:
            return self._alternatives(source["anyOf"], path)
        made: Schema = {}
        if source.get("x-kubernetes-int-or-string"):
            made |= {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}
        else:
            made["type"] = source["type"]
        if made.get("type") == "integer":
            made["format"] = "int64"
        made |= {key: source[key] for key in _CONSTRAINTS if key in source and self._options.constraints}
        if "const" in source and self._options.constraints:
            made["enum"] = [source["const"]]
        if not self._options.constraints and ("enum" in source or "const" in source):
            made["description"] = f"One of {', '.join(map(str, source.get('enum', [source.get('const')])))}."
        _closed_bounds(made)
        match made.get("type"):
            case "array":
                entries = source.get("prefixItems") or [source["items"]]
                assert all(entry == entries[0] for entry in entries), f"{path}: entries of different types"
                made["items"] = self._value(entries[0], path)
            case "object":
                self._mapping(made, source, path)
        return self._bounded(made)

    def _mapping(self, made: Schema, source: Schema, path: Path) -> None:
        values = [source["additionalProperties"]] if source.get("additionalProperties") not in (None, True) else []
        values += source.get("patternProperties", {}).values()
        if values:
            made["additionalProperties"] = self._value(values[0], path)
        else:
            made["x-kubernetes-preserve-unknown-fields"] = True

    def _alternatives(self, sources: list[Schema], path: Path) -> Schema:
        values = [s for s in sources if s.get("type") != "null"]
        nullable = {"nullable": True} if len(values) < len(sources) else {}
        if len(values) == 1:
            return self._value(values[0], path) | nullable
        # Texts of two forms: one pattern says what is allowed, where anyOf would only say that nothing fitted.
        assert all(v["type"] == "string" for v in values), f"{path}: alternatives of different types"
        patterns = [v["const"] if "const" in v else v["pattern"].removeprefix("^").removesuffix("$") for v in values]
        longest = max(v.get("maxLength", _MAX_LENGTH) for v in values if "pattern" in v)
        joined = {"type": "string", "pattern": f"^({'|'.join(patterns)})$", "maxLength": longest}
        return self._value(joined, path) | nullable

    def _bounded(self, made: Schema) -> Schema:
        if not self._options.constraints:
            return made
        match made.get("type"):
            case "string" if "enum" not in made:
                made.setdefault("maxLength", _MAX_LENGTH)
            case "array":
                made.setdefault("maxItems", _MAX_ITEMS)
            case "object" if "additionalProperties" in made:
                made.setdefault("maxProperties", _MAX_PROPERTIES)
        return made

    def _add_default(self, made: Schema, default: object) -> None:
        """A field that is empty by default stays away. Rules judge a part's default as it stands, so it is complete."""
        if "properties" in made:
            if not made.get("required") and not made.get("nullable"):
                fields = made["properties"]
                made["default"] = {name: field["default"] for name, field in fields.items() if "default" in field}
        elif default not in (None, "", [], {}):
            made["default"] = default

    def _add_rules(self, made: Schema, owner: str, field: str) -> None:
        rules = [r.document() for r in self._options.rules if r.owner.__name__ == owner and r.field == field]
        if rules:
            made["x-kubernetes-validations"] = made.get("x-kubernetes-validations", []) + rules


def _closed_bounds(made: Schema) -> None:
    """JSON Schema says exclusiveMinimum: 0 where OpenAPI 3.0 says minimum: 0, exclusiveMinimum: true."""
    for name, exclusive, step in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
        bound = made.pop(exclusive, None)
        if bound is None:
            continue
        if made["type"] == "integer":
            made[name] = bound + step
        else:
            made |= {name: bound, exclusive: True}
