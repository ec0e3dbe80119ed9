"""Reports and traces as one HTML file with its own scripts and styles, which needs no network.

Needs jinja2 and plotly, which the extra `report` installs.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from hallo_numguard.core.errors import NumGuardError
from hallo_numguard.core.safe_text import MAX_SENTENCE
from hallo_numguard.report.html.grid import MAX_COLUMNS, MAX_ROWS
from hallo_numguard.report.html.page import content
from hallo_numguard.report.inputs import ReportInputs

COLUMNS = ("where", "kind", "name", "first at", "non-finite", "absmax of the rest", "shape", "dtype", "rank")


class MissingLibrary(NumGuardError):
    """A library for HTML reports is not installed."""


def render(inputs: ReportInputs) -> str:
    """Returns the page.

    Raises:
        MissingLibrary: If jinja2 or plotly is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingLibrary(
            f"HTML reports need jinja2 and plotly ({error}): pip install 'hallo-numguard[report]'"
        ) from error
    environment = Environment(
        loader=PackageLoader("hallo_numguard.report.html"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    files = resources.files("hallo_numguard.report.html") / "templates"
    # Browsers read CRLF as LF before they compare with the hash.
    scripts = [text.replace("\r\n", "\n") for text in (get_plotlyjs(), (files / "report.js").read_text("utf-8"))]
    return environment.get_template("report.html.j2").render(
        **content(inputs),
        columns=COLUMNS,
        max_rows=MAX_ROWS,
        max_columns=MAX_COLUMNS,
        max_name=MAX_SENTENCE,
        style=(files / "report.css").read_text("utf-8"),
        scripts=scripts,
        allowed_scripts=list(map(_hash, scripts)),
    )


def _hash(script: str) -> str:
    """Returns the hash of a script for a content security policy, which lets no other script run."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
