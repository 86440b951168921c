"""What values in params.yaml can be, and what all its sections have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Percent = Annotated[float, Field(ge=0, le=100)]


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
