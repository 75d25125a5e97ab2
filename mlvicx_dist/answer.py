"""The front door of every command: its work done, its answer printed, its exit code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

from mlvicx_dist.errors import UserError
from mlvicx_dist.progress import plain, say
from mlvicx_dist.stopping import exit_code, sigterm_interrupts


class Answer:
    """What a command says: JSON for machines, lines for people, and an exit code."""

    def __init__(self, document: dict[str, Any], lines: Sequence[str], code: int = 0) -> None:
        self.document, self.lines, self.code = document, lines, code


def answered(
    work: Callable[[], Answer], *, name: str, as_json: bool, stopped: str = "stopped"
) -> int:
    """Do the work of a command and print its answer on stdout, where nothing else goes.

    Args:
        work: Of the command.
        name: Of the command, before what is said of an error.
        as_json: One JSON document, or lines.
        stopped: What is said where a signal ends it.

    Returns:
        0 done, 1 failed, 2 the user's error, 3 files refused; after Ctrl-C 130, after SIGTERM 143,
        as shells say it: 128 and the signal.
    """
    asked: list[int] = []
    try:
        # Ray prints of its own accord.
        with redirect_stdout(sys.stderr), sigterm_interrupts() as asked:
            found = work()
    except UserError as error:
        say(f"{name}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say(f"{name}: {stopped}")
        return exit_code(asked)
    text = json.dumps(found.document) if as_json else plain("\n".join(found.lines))
    return found.code if not text or _printed(text) else 1


def _printed(text: str) -> bool:
    """Whether a text could be printed on stdout.

    That it is not read to its end, as by `head`, is no error; a full disk is one, which is said.
    """
    try:
        try:
            print(text, flush=True)
        except UnicodeEncodeError as error:
            # A terminal of an old encoding.
            print(text.encode(error.encoding, "replace").decode(error.encoding), flush=True)
    except OSError as error:
        # Python would try again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            say(f"the answer cannot be written ({error.strerror}); make room where stdout goes.")
            return False
    return True
