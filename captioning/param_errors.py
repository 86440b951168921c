"""What pydantic finds wrong in params.yaml, said with the path of the key there, and what may have been meant."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin

from captioning.errors import unknown_name
from captioning.param_types import Section


@dataclass
class _Place:
    """Where an error's location leads: a path of keys, and the section that holds the last one."""

    path: list[str] = field(default_factory=list)
    section: type[Section] | None = None
    others: list[type[Section]] = field(default_factory=list)
    """Sections that could stand in its place with another `type` or `name`."""


def explain(root: type[Section], detail: Any) -> str:
    """One of a ValidationError's details as a line."""
    place = _find(root, detail["loc"])
    path, kind = ".".join(place.path), detail["type"]
    if kind == "extra_forbidden":
        return f"{path}: unknown key{_meant(place)}"
    if kind == "missing":
        return f"{path}: missing; every key must stand in params.yaml"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_tag(place.path, detail)
    message = detail["msg"].removeprefix("Value error, ")
    if not path or isinstance(detail["input"], dict):
        return f"{path}: {message}" if path else message
    return f"{path}: {message} (got {detail['input']!r})"


def _meant(place: _Place) -> str:
    assert place.section is not None
    key = place.path[-1]
    owners = [tag for other in place.others if key in other.model_fields for tag in _tags(other)]
    if owners:
        return f" (of {', '.join(owners)} only)"
    near = get_close_matches(key, place.section.model_fields, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _wrong_tag(path: list[str], detail: Any) -> str:
    key = detail["ctx"]["discriminator"].strip("'")
    where = ".".join([*path, key])
    if detail["type"] == "union_tag_not_found":
        return f"{where}: missing; every key must stand in params.yaml"
    owner = path[0].removesuffix("_settings") if path[0].endswith("_settings") else path[-1]
    choices = [choice.strip("' ") for choice in detail["ctx"]["expected_tags"].split(",")]
    return f"{where}: {unknown_name(f'{owner} {key}', detail['ctx']['tag'], choices)}"


def _find(root: type[Section], location: Sequence[str | int]) -> _Place:
    """Walks the types as the validator did. Its locations also name the member of a union that it tried, which is no
    key: such parts are left out."""
    place, options = _Place(), [root]
    for part in location:
        sections = [option for option in options if _is_section(option)]
        if len(sections) > 1:
            options = [section for section in sections if part in _tags(section)]
            place.others = [section for section in sections if section not in options]
            continue
        if sections:
            place.section = sections[0]
            known = place.section.model_fields.get(str(part))
            options = _options(known.annotation) if known else []
        else:
            inner = _items(options, part)
            if inner is None:
                continue
            place.others, options = [], inner
        place.path.append(str(part))
    return place


def _is_section(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, Section)


def _options(annotation: Any) -> list[Any]:
    """The members of a union, nested or annotated; of another type itself."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _options(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [option for member in get_args(annotation) for option in _options(member)]
    return [annotation]


def _items(options: list[Any], part: str | int) -> list[Any] | None:
    """The types of a mapping's values (for a key) or of a list's items (for a number); None where there are none."""
    for option in options:
        if get_origin(option) is dict:
            return _options(get_args(option)[1])
        if get_origin(option) in (list, tuple) and isinstance(part, int):
            return _options(get_args(option)[0])
    return None


def _tags(section: type[Section]) -> list[str]:
    """The values of the key that tells a union's sections apart."""
    for key in ("type", "name"):
        if key in section.model_fields:
            return list(get_args(section.model_fields[key].annotation))
    return []
