"""The reference page of the custom resources, from the same schemas as the CRDs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sonoforge_operator.presets import by_preset, default_text
from sonoforge_operator.schema import Path, Schema
from sonoforge_trainer.contract import PRESETS

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
        for name in ("spec", "status"):
            if name in schema["properties"]:
                parts += _sections(schema["properties"][name], f"{kind}.{name}", (name,))
        if kind == "PretrainJob":
            parts.append(_presets())
    return "\n".join(parts)


def _contents(kinds: Iterable[tuple[str, str, Schema]]) -> str:
    rows = [f"| [{kind}](#{kind.lower()}) | `{short}` | {schema['description']} |" for kind, short, schema in kinds]
    return "\n".join(["| kind | short | purpose |", "|---|---|---|", *rows, ""])


def _sections(schema: Schema, title: str, path: Path) -> Iterator[str]:
    """The table of a part, then those of the parts inside it."""
    yield f"### {title}\n"
    first, _, rest = schema.get("description", "").partition("\n")
    yield f"{_sentences(rest or first)}\n"
    yield "\n".join(["| field | type | default | description |", "|---|---|---|---|", *_rows(schema, path, ""), ""])
    yield from _rules(schema)
    for name, part in _large_parts(schema):
        yield from _sections(_inner(part), f"{title}.{name}", (*path, name))


def _rows(schema: Schema, path: Path, prefix: str) -> Iterator[str]:
    required = schema.get("required", [])
    for name, field in schema["properties"].items():
        here = (*path, name)
        if "properties" in field and not _is_large(field):
            yield from _rows(field, here, f"{prefix}{name}.")
            continue
        default = "required" if name in required else _default(field, here)
        if default == "required" and prefix:
            default = f"required in `{prefix.removesuffix('.')}`"
        description = field.get("description", "")
        if _is_large(field):
            description = description.partition("\n")[0]  # the rest heads its own table
        description = _sentences(description)
        yield f"| `{prefix}{name}` | {_type(field)} | {default} | {_cell(description)} |"


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
    if value is None or value == {}:
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


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
