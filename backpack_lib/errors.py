"""Errors in one sentence."""


def first_line(error: BaseException) -> str:
    """What an error of another library says in its first line, or its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
