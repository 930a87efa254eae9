"""The reference page of the custom resources, from the same schemas as the CRDs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sonoforge_operator.presets import by_preset, default_text
from sonoforge_operator.schema import Path, Schema
from sonoforge_trainer.contract import PRESETS, canonical_json

_INLINE_FIELDS = 2
"""A part with this many fields or fewer is shown in the table of its owner."""

_INTRODUCTION = """\
<!-- Generated from the types in operator/ by `make generate`. Do not edit. -->

# The custom resources

API group `sonoforge.dev`, version `v1alpha1`; every kind is namespaced. `kubectl explain pj.spec.training.recipe` shows
the same text, and `kubectl get sonoforge` lists objects of every kind.
"""


def reference(kinds: Iterable[tuple[str, str, Schema]]) -> str:
    """The page, from the kind, the short name and the schema of each resource."""
    kinds = list(kinds)
    parts = [_INTRODUCTION, _contents(kinds)]
    for kind, short, schema in kinds:
        parts.append(f"## {kind}\n\n{schema['description']} Short name: `{short}`.\n")
        parts += _rules(schema)
        page = _Tables()
        for name in ("spec", "status"):
            if name in schema["properties"]:
                parts += page.sections(schema["properties"][name], f"{kind}.{name}", (name,))
        if kind == "PretrainJob":
            parts.append(_presets())
    return "\n".join(parts)


def _contents(kinds: Iterable[tuple[str, str, Schema]]) -> str:
    rows = [f"| [{kind}](#{kind.lower()}) | `{short}` | {schema['description']} |" for kind, short, schema in kinds]
    return "\n".join(["| kind | short | purpose |", "|---|---|---|", *rows, ""])


class _Tables:
    """The tables of one kind. A part that occurs at several places has its table at the first."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    def sections(self, schema: Schema, title: str, path: Path) -> Iterator[str]:
        """The table of a part, then those of the parts inside it."""
        yield f"### {title}\n"
        yield f"{_sentences(schema.get('description', ''))}\n"
        if path[0] == "spec":
            head = ["| field | type | default | description |", "|---|---|---|---|"]
        else:
            head = ["| field | type | description |", "|---|---|---|"]
        yield "\n".join([*head, *self._rows(schema, title, path, ""), ""])
        yield from _rules(schema)
        for name, part in _large_parts(schema):
            if self._place(part, f"{title}.{name}") == f"{title}.{name}":
                yield from self.sections(_inner(part), f"{title}.{name}", (*path, name))

    def _place(self, part: Schema, title: str) -> str:
        """Title of the table of a part: of the first that has the same fields."""
        return self._places.setdefault(canonical_json(_inner(part)["properties"]), title)

    def _rows(self, schema: Schema, title: str, path: Path, prefix: str) -> Iterator[str]:
        required = schema.get("required", [])
        large = dict(_large_parts(schema))
        for name, field in schema["properties"].items():
            here = (*path, name)
            key = f"{name}[]" if f"{name}[]" in large else name
            if "properties" in field and key not in large:
                yield from self._rows(field, title, here, f"{prefix}{name}.")
                continue
            description = field.get("description", "")
            if key in large:
                description = description.partition("\n")[0]  # the whole heads its own table
                place = self._place(field, f"{title}.{key}")
                description += "" if place == f"{title}.{key}" else f" Fields as in {place}."
            cells = [f"`{prefix}{name}`", _type(field), _sentences(description).replace("|", "\\|")]
            if path[0] == "spec":
                default = _required_in(prefix) if name in required else _default(field, here)
                cells.insert(2, default)
            yield f"| {' | '.join(cells)} |"


def _required_in(prefix: str) -> str:
    return f"required in `{prefix.removesuffix('.')}`" if prefix else "required"


def _rules(schema: Schema) -> Iterator[str]:
    """The rules of a part and of its plain fields, as a list."""
    rules = list(schema.get("x-kubernetes-validations", []))
    for field in schema["properties"].values():
        if "properties" not in field:
            rules += field.get("x-kubernetes-validations", [])
    if rules:
        yield "\n".join(["Refused:", "", *(f"* {rule['message']}" for rule in rules), ""])


def _large_parts(schema: Schema) -> Iterator[tuple[str, Schema]]:
    for name, field in schema["properties"].items():
        if _is_large(field):
            yield f"{name}[]" if field["type"] == "array" else name, field


def _is_large(field: Schema) -> bool:
    inner = _inner(field)
    return "properties" in inner and (inner is not field or len(inner["properties"]) > _INLINE_FIELDS)


def _inner(field: Schema) -> Schema:
    """The part itself, or the part that a list or a mapping holds."""
    inner = field.get("items") or field.get("additionalProperties") or field
    assert isinstance(inner, dict)
    return inner


def _default(field: Schema, path: Path) -> str:
    if path[:2] == ("spec", "training") and "properties" not in field:
        default = default_text(path[2:])
        return "[preset](#presets)" if default == "preset" else f"`{default}`" if default else ""
    value = field.get("default")
    if value is None or "properties" in field:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(field: Schema) -> str:
    if "properties" in field:
        return "object"
    if field.get("x-kubernetes-int-or-string"):
        return "quantity"
    match field["type"]:
        case "array":
            return f"list of {_type(field['items'])}"
        case "object" if "additionalProperties" in field:
            return f"map to {_type(field['additionalProperties'])}"
    if "enum" in field:
        return " or ".join(f"`{value}`" if value != "" else "empty" for value in field["enum"])
    return str(field["type"]) + _range(field)


def _range(field: Schema) -> str:
    low = f"{'>' if field.get('exclusiveMinimum') else '≥'} {field['minimum']:g}" if "minimum" in field else ""
    high = f"{'<' if field.get('exclusiveMaximum') else '≤'} {field['maximum']}" if "maximum" in field else ""
    return "".join(f", {bound}" for bound in (low, high) if bound)


def _presets() -> str:
    rows = [
        f"| `{'.'.join(path)}` | {' | '.join(texts[name] for name in PRESETS)} |" for path, texts in by_preset().items()
    ]
    head = [f"| field of `spec.training` | {' | '.join(PRESETS)} |", f"|---|{'---|' * len(PRESETS)}"]
    intro = (
        "### Presets\n\nWhat `spec.training.recipe.preset` gives to a field that is left out. "
        "A schedule length that is left out keeps its share of the budget.\n"
    )
    return "\n".join([intro, *head, *rows, ""])


def _sentences(text: str) -> str:
    return " ".join(text.split())
