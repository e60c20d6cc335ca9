"""Page: a report as one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedobd import __version__
from fedobd._lookup import not_installed
from fedobd.report._chart import Chart, Labels
from fedobd.report._content import (
    charts_of,
    content_of,
    drawing_step,
    lead,
    left_out,
    read_deliveries,
)
from fedobd.report._gather import Section
from fedobd.report._templates import read_template, templates


def make_page(sections: Sequence[Section]) -> str:
    """Return the report as HTML."""
    library, script = _library(), read_template("script.js")
    step = drawing_step(sections)
    drawings = _Drawings()
    parts = []
    for number, section in enumerate(sections, start=1):
        deliveries = read_deliveries(section)
        charts = charts_of(section, deliveries, step)
        for chart in charts:
            drawings.add(f"section-{number}-{chart.name}", chart)
        content = content_of(section, deliveries)
        parts.append({**content, "charts": charts, "left_out": left_out(section)})
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            policy=_policy(library, script),
            lead=lead(sections),
            parts=parts,
            version=__version__,
            style=read_template("style.css"),
            drawings=drawings.to_json(),
            library=library,
            script=script,
        )
    )


@dataclass(slots=True)
class _Drawings:
    """What the page's script draws: views of each figure, by its id and the chosen options."""

    charts: dict[str, dict[str, Any]] = field(default_factory=dict)
    # Numbers of specifications and columns, which occur in many views and stand in the page once.
    pool: dict[str, int] = field(default_factory=dict)

    def add(self, place: str, chart: Chart) -> None:
        """Take in a chart."""
        self.charts[place] = {
            ".".join(map(str, key)): {
                "spec": self._number(view.spec),
                "data": {
                    name: {key: self._column(values) for key, values in columns.items()}
                    for name, columns in view.data.items()
                },
            }
            for key, view in chart.views.items()
        }

    def _column(self, values: NDArray[Any] | Labels) -> int:
        if isinstance(values, Labels):
            return self._number({"texts": values.texts, "codes": self._column(values.codes)})
        return self._number(_typed(values))

    def _number(self, value: Any) -> int:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
        return self.pool.setdefault(text, len(self.pool))

    def to_json(self) -> str:
        """Return JSON that can stand in a script element."""
        charts = json.dumps(self.charts, separators=(",", ":"))
        return f'{{"charts":{charts},"pool":[{",".join(self.pool)}]}}'.replace("<", "\\u003c")


def _typed(values: NDArray[Any]) -> dict[str, str]:
    """Return an array as the page's script takes it: base64 of its little-endian elements."""
    array = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    data = base64.b64encode(array.tobytes()).decode("ascii")
    return {"type": f"{array.dtype.kind}{array.dtype.itemsize}", "data": data}


def _library() -> str:
    """Return the source of Vega-Lite and what it needs."""
    try:
        from vl_convert import javascript_bundle
    except ModuleNotFoundError as error:
        raise not_installed("this", error, "report") from error
    return javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _policy(*scripts: str) -> str:
    """Return a content policy that allows these scripts, and nothing from outside."""
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
