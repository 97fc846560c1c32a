"""The user's mistakes: how any part says that a flag or a file is wrong, and how to mend it.

A `UserError` is told in one line and ends the command with exit status 2 (`configurator.run`). Errors of our own are asserts.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can put right; the text names the flag or file, what is wrong, and the fix."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest known word, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
