"""Errors in one sentence."""

import sys
from collections.abc import Callable


def first_line(error: BaseException) -> str:
    """What an error of another library says in its first line, or its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def exit_status(work: Callable[[], None]) -> int:
    """Does the work of a command. An interrupt, or an error that a person can mend, is printed as one sentence."""
    try:
        work()
    except KeyboardInterrupt as interrupt:
        print(interrupt, file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
