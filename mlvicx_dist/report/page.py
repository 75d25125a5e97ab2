"""A report: one HTML page that needs nothing else."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader
from plotly.offline import get_plotlyjs

from mlvicx_dist.errors import DataError
from mlvicx_dist.report.run import of_run
from mlvicx_dist.report.sweep import SETTINGS, of_sweep
from mlvicx_dist.storage import Place, place, reaching, told, write_whole


def write_report(folder: str | Place) -> Place:
    """Write `report.html` into the folder of a run or a sweep, local or remote, finished or not.

    Raises:
        DataError: the folder is neither, or cannot be reached or written.
    """
    folder = place(folder)
    try:
        with reaching(folder):
            swept = (folder / SETTINGS).is_file()
    except OSError as error:
        raise DataError(
            f"{folder}: the folder cannot be read ({told(error)}); mend your access to it."
        ) from None
    values = of_sweep(folder) if swept else of_run(folder)
    environment = Environment(loader=PackageLoader("mlvicx_dist.report"), autoescape=True)
    template = environment.get_template("sweep.html.j2" if swept else "run.html.j2")
    path = folder / "report.html"
    try:
        write_whole(path, template.render(**values, plotly=get_plotlyjs()).encode())
    except OSError as error:
        raise DataError(f"{path}: the page cannot be written ({told(error)}).") from None
    return path
