"""Reports and traces as one HTML file that needs no network: scripts and styles are inside of it.

Needs jinja2 and plotly, which the extra `report` installs.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from hallo_numguard.core.errors import NumGuardError
from hallo_numguard.report.html.page import content
from hallo_numguard.report.inputs import Material

COLUMNS = ("where", "kind", "name", "first at", "non-finite", "absmax of the rest", "shape", "dtype", "rank")


class MissingLibrary(NumGuardError):
    """A library that only HTML reports need is not installed."""


def render(material: Material) -> str:
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
        **content(material),
        columns=COLUMNS,
        style=(files / "report.css").read_text("utf-8"),
        scripts=scripts,
        allowed_scripts=list(map(_hash, scripts)),
    )


def _hash(script: str) -> str:
    """What a content security policy calls a script by: no other one runs, whatever a name may smuggle in."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
