"""What every stage's `main()` shares: a clear end for errors that a user can mend."""

from __future__ import annotations

import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """Calls a stage's `main`. A `CapstanError` is printed without a traceback and ends with exit code 1."""
    from captioning.errors import CapstanError

    try:
        main()
    except CapstanError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted: nothing was published; run `dvc repro` again to go on", file=sys.stderr)
        sys.exit(130)
