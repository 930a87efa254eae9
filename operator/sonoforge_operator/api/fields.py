"""Types of fields that more than one resource has: names, amounts, durations, and the metadata of an object."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from sonoforge_trainer.contract import Part

GROUP = "sonoforge.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"


def _a_network(text: str) -> str:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError("not a network in CIDR notation; write for example 10.20.0.0/16") from None
    return text


def _number_as_text(value: object) -> object:
    """YAML reads `cpu: 8` as a number; a quantity is a text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Duration = Annotated[str, Field(pattern=r"^([0-9]+(s|m|h|d))+$", max_length=32)]
Count = Annotated[int, Field(ge=0)]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
OptionalObjectName = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", max_length=253)]
QUALIFIED = r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
QualifiedName = Annotated[str, Field(pattern=f"^{QUALIFIED}$", max_length=317)]
"""Name of a label, taint or resource, with or without a DNS prefix."""
LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)]
_AMOUNT = r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?"
_INT_OR_STRING: dict[str, Any] = {"x-kubernetes-int-or-string": True}
Quantity = Annotated[
    str,
    Field(pattern=f"^{_AMOUNT}$", max_length=32, json_schema_extra=_INT_OR_STRING),
    BeforeValidator(_number_as_text),
]
"""An amount of a resource as Kubernetes writes it: 500m, 8, 32Gi."""
OptionalQuantity = Annotated[
    str,
    Field(pattern=f"^({_AMOUNT})?$", max_length=32, json_schema_extra=_INT_OR_STRING),
    BeforeValidator(_number_as_text),
]
Cidr = Annotated[str, AfterValidator(_a_network), Field(max_length=64, json_schema_extra={"format": "cidr"})]
Port = Annotated[int, Field(ge=1, le=65_535)]
NodeSelector = Annotated[dict[QualifiedName, LabelValue], Field(max_length=64)]
Resources = Annotated[dict[QualifiedName, Quantity], Field(max_length=32)]


class Metadata(Part):
    """The part of an object's metadata that matters here; whatever else a cluster adds is left alone."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=63)]
    """Name of the object."""
    uid: str = ""
    """Identity of the object, given by the cluster; a local run derives one."""
    generation: int = 1
    """Version of the spec."""


class NameRef(Part):
    """A reference to an object in the same namespace."""

    name: ObjectName
    """Name of the object."""


def seconds(duration: str) -> int:
    """`1h30m` in seconds."""
    total, number = 0, ""
    for letter in duration:
        if letter.isdigit():
            number += letter
        else:
            total += int(number) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[letter]
            number = ""
    return total
