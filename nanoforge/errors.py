"""Errors that a user can fix.

A `UserError` is printed in one line and ends the command with exit status 2 (`configurator.run`). A bug is an assert.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A flag, file or argument that the user can correct. The message names it, then the error, then the fix.

    is_reported: by another rank; None where that isn't known.
    """

    is_reported: bool | None = None


class DivergedError(SystemExit):
    """Ends a run whose loss, gradients or weights are not finite any more: with the same arguments it would again."""


def did_you_mean(name: str, valid_names: Iterable[str]) -> str:
    """'; did you mean X?' for the valid name that is most similar, or '' when none is."""
    matches = difflib.get_close_matches(name, list(valid_names), n=1, cutoff=0.6)
    if not matches:
        return ""
    return f"; did you mean {matches[0]}?"
