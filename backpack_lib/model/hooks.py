"""Hooks: functions in a model's lists `patches` and `weight_hooks`, which its forward pass calls.

Edits patch sense vectors as they are computed; topic control changes contextualisation weights.
"""

from contextlib import contextmanager


@contextmanager
def hooked(hooks: list, hook):
    """Keeps a hook in a model's list for as long as the `with` lasts, also if it ends in an exception."""
    hooks.append(hook)
    try:
        yield
    finally:
        hooks[:] = [other for other in hooks if other is not hook]
