"""A file that is not packed, and why: never an error of the job, always in its report."""

from __future__ import annotations


class Refused(Exception):  # noqa: N818
    """One input file is left out.

    Attributes:
        code: The reason in one word, by which the report counts.
        detail: What was found.
    """

    def __init__(self, code: str, detail: str) -> None:
        # A garbled header may hold anything: a report is lines of plain text.
        detail = " ".join("".join(c if c.isprintable() else " " for c in detail).split())[:200]
        if detail.startswith(("=", "+", "-", "@")):
            detail = f"'{detail}"  # no spreadsheet takes it for a formula
        super().__init__(code, detail)
        self.code, self.detail = code, detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"
