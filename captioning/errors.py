"""The one exception that means "the user can mend this", shown without a traceback."""

from __future__ import annotations


class CapstanError(ValueError):
    """Bad input or a missing file. The message says what is wrong and what to do."""


class DamagedError(CapstanError):
    """A file has other bytes than were written. The message names it."""


def unknown_name(kind: str, name: str, choices: object) -> CapstanError:
    """The error of a registry look-up: names the choices, and the nearest one if there is one."""
    from difflib import get_close_matches

    names = sorted(choices)  # type: ignore[call-overload]
    near = get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return CapstanError(f"unknown {kind} {name!r}.{hint} Choices: {', '.join(names)}")


def brief(error: BaseException) -> str:
    """An exception's type and the beginning of its message, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
