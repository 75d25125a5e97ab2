"""A report: one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import gzip
from functools import cache

from jinja2 import Environment, PackageLoader, TemplateError
from plotly.offline import get_plotlyjs

from mlvicx_dist.errors import DataError, first_line
from mlvicx_dist.evaluate import comparison
from mlvicx_dist.report.compare import of_comparison
from mlvicx_dist.report.run import of_run
from mlvicx_dist.report.sweep import SETTINGS, of_sweep
from mlvicx_dist.storage import Place, place, reaching, told, write_whole

KINDS = {
    SETTINGS: (of_sweep, "sweep.html.j2"),
    comparison.SETTINGS: (of_comparison, "compare.html.j2"),
}
"""By the settings file that a folder has: where a page's values come from, and its template."""


def write_report(folder: str | Place) -> Place:
    """Write `report.html` into the folder of a run, a sweep or a comparison, finished or not.

    Raises:
        DataError: the folder is none of these, or cannot be reached or written.
    """
    folder = place(folder)
    try:
        with reaching(folder):
            kind = next((kind for kind in KINDS if (folder / kind).is_file()), None)
    except OSError as error:
        raise DataError(_unread(folder, error)) from None
    values_of, page = KINDS.get(kind or "", (of_run, "run.html.j2"))
    environment = Environment(loader=PackageLoader("mlvicx_dist.report"), autoescape=True)
    template = environment.get_template(page)
    path = folder / "report.html"
    try:
        text = template.render(**values_of(folder), plotly=packed_plotly())
    except OSError as error:
        raise DataError(_unread(folder, error)) from None
    except (LookupError, TypeError, ValueError, AttributeError, TemplateError) as error:
        raise DataError(
            f"{folder}: a file in it is not as it was written ({type(error).__name__}: "
            f"{first_line(error)}); restore the folder, or remove what was changed."
        ) from None
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise DataError(f"{path}: the page cannot be written ({told(error)}).") from None
    return path


def _unread(folder: Place, error: OSError) -> str:
    return f"{folder}: the folder cannot be read ({told(error)}); mend your access to it."


@cache
def packed_plotly() -> str:
    """Plotly's script as gzip in base64, which the page unpacks: 2 MB in place of 4.8."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 6, mtime=0)).decode()
