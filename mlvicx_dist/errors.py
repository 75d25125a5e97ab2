"""What can go wrong by a user's hand: one sentence that says what, where and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """An error that a user can cause and mend; its text is one sentence.

    The command line prints the text alone and exits with `exit_code`.
    """

    exit_code = 2


class ConfigError(UserError):
    """A setting that does not exist or has a value that is not allowed."""


class DataError(UserError):
    """A folder, file, shard or manifest that is missing, empty or damaged."""


class CheckpointError(UserError):
    """A checkpoint or export that is damaged or belongs to another model or run."""


class ResourceError(UserError):
    """More workers, memory or disk asked for than there is."""


class TrainingError(UserError):
    """A run that cannot go on, such as one whose workers die again and again."""

    exit_code = 1


class DivergenceError(TrainingError):
    """A loss or weights that are no longer finite."""


class TooManyRefusedError(UserError):
    """More input files were refused than the user allows."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(error: BaseException) -> str:
    """The last line, which is the cause in errors that Ray hands on; likewise."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def nearest(word: str, allowed: Iterable[str]) -> str:
    """A hint such as ` (did you mean 'levels'?)`, or nothing where no allowed word is near."""
    matches = get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
