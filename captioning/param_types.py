"""What values in params.yaml can be, and what all its sections have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Percent = Annotated[float, Field(ge=0, le=100)]


Auto = Literal["auto"]
RateWord = Literal["auto", "range_test"]


def _number_or(kind: str, *words: str) -> Discriminator:
    """Tells a number of this kind from one of these words, so that one error, not two, says what could stand there."""

    def tag(value: Any) -> str | None:
        if isinstance(value, str) and value in words:
            return "word"
        return None if isinstance(value, str) and not _is_number(value) else "number"

    listed = ", ".join([f"a valid {kind}", *map(repr, words[:-1])])
    return Discriminator(tag, "number_or_word", f"Input should be {listed} or {words[-1]!r}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


PositiveOrAuto = Annotated[
    Annotated[Positive, Tag("number")] | Annotated[Auto, Tag("word")], _number_or("integer", "auto")
]
RateOrWord = Annotated[
    Annotated[Rate, Tag("number")] | Annotated[RateWord, Tag("word")], _number_or("number", "auto", "range_test")
]


def _plain_name(name: str) -> str:
    # Names become folders and DVC stage names.
    if not name or not all(c.isalnum() or c in "_" for c in name):
        raise ValueError("use letters, digits and underscores only")
    return name


Name = Annotated[str, AfterValidator(_plain_name)]


def _address(url: str) -> str:
    if "://" not in url and not url.startswith("$"):
        raise ValueError("must be an apprise URL such as slack://… or $NAME_OF_AN_ENVIRONMENT_VARIABLE")
    return url


NotifyUrl = Annotated[str, AfterValidator(_address)]


class Section(BaseModel):
    """A section of params.yaml: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
