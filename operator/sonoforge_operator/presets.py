"""What the presets give to a field that a job leaves out, as text for descriptions and tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from sonoforge_trainer.contract import PRESETS, TrainConfig

Path = tuple[str, ...]

_PRESET: Path = ("recipe", "preset")
_BUDGET: Path = ("recipe", "budgetSamples")
_DATA = {"shards": "s3://bucket/shards.json"}  # required, and never from a preset


def hint(path: Path) -> str:
    """A sentence about the default of a field of `spec.training`; empty for parts and for fields without one."""
    default = default_text(path)
    if default == "preset":
        return f"Default: the preset's ({', '.join(f'{name} {text}' for name, text in by_preset()[path].items())})."
    return f"Default: {default}." if default else ""


def default_text(path: Path) -> str:
    """The default of a field of `spec.training`: a value, `preset` where presets differ from one another, or empty."""
    if path in by_preset():
        return "preset"
    value = _plain_defaults().get(path)
    return "" if value is None else _text(value)


@cache
def by_preset() -> Mapping[Path, Mapping[str, str]]:
    """For each field that presets decide, what each of them gives. Schedule lengths are parts of the budget."""
    resolved = {name: _resolved(name, None) for name in PRESETS}
    longer = {name: _resolved(name, 10 * values[_BUDGET]) for name, values in resolved.items()}
    decided: dict[Path, dict[str, str]] = {}
    for path, first in resolved[PRESETS[0]].items():
        texts = {}
        scales = path != _BUDGET and longer[PRESETS[0]][path] != first
        for name, values in resolved.items():
            texts[name] = f"{values[path] / values[_BUDGET]:.3g} x budgetSamples" if scales else _text(values[path])
        if path != _PRESET and (scales or first != _plain_defaults().get(path) or len(set(texts.values())) > 1):
            decided[path] = texts
    return decided


def _resolved(name: str, budget: int | None) -> dict[Path, Any]:
    recipe = {"preset": name} | ({} if budget is None else {"budgetSamples": budget})
    return dict(_leaves(TrainConfig.resolve({"data": _DATA, "recipe": recipe}).document()))


@cache
def _plain_defaults() -> Mapping[Path, Any]:
    return dict(_leaves(TrainConfig.parse({"data": _DATA}).document()))


def _leaves(document: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        elif (*path, key) != ("data", "shards"):
            yield (*path, key), value


def _text(value: object) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case int():
            return f"{value:,}".replace(",", "_") if value >= 10_000 else str(value)
        case list():
            return f"[{', '.join(_text(v) for v in value)}]"
        case _:
            return str(value)
