"""Page: a report as one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from fedobd import __version__
from fedobd._imports import not_installed
from fedobd.report._content import (
    drawing_step,
    lead,
    left_out,
    plots_of,
    read_deliveries,
    reproductions,
)
from fedobd.report._gather import Section
from fedobd.report._headline import headline
from fedobd.report._plot import Plot, Switch, Trace
from fedobd.report._summary_tables import (
    Table,
    block_table,
    environment_table,
    link_table,
    part_table,
    run_table,
    summary_table,
)
from fedobd.report._template import FIGURE, PAGE, SCRIPT, STYLE
from fedobd.report._uploads import warning

_MOST_BUTTONS = 4  # options that stand beside each other; more are a list to choose from


def make_page(sections: Sequence[Section]) -> str:
    """Return the report as HTML.

    Raises:
        UsageError: plotly is not installed, or the model of a run cannot be read.
    """
    plotly = _plotly()
    step = drawing_step(sections)
    drawings = _Drawings()
    body = [_contents(sections)] if len(sections) > 1 else []
    for number, section in enumerate(sections, start=1):
        body += _section(section, number, step, drawings)
    return PAGE.substitute(
        policy=_policy(plotly, SCRIPT),
        title=escape(_title(sections)),
        lead=escape(lead(sections)),
        style=STYLE,
        body="\n".join(body),
        version=__version__,
        plots=drawings.to_json(),
        plotly=plotly,
        script=SCRIPT,
    )


@dataclass(slots=True)
class _Drawings:
    """What the page's script draws.

    Args:
        plots: views of each figure, by the figure's id and the options that are chosen.
        arrays: numbers of the arrays by their JSON; an array that occurs often stands in the page
            once, and traces hold its number.
    """

    plots: dict[str, dict[str, Any]] = field(default_factory=dict)
    arrays: dict[str, int] = field(default_factory=dict)

    def add(self, place: str, plot: Plot) -> None:
        """Take in a plot."""
        self.plots[place] = {
            ".".join(map(str, key)): {**view, "data": [self._pooled(t) for t in view["data"]]}
            for key, view in plot.views.items()
        }

    def _pooled(self, trace: Trace) -> Trace:
        return {key: self._number(value) for key, value in trace.items()}

    def _number(self, value: Any) -> Any:
        is_array = isinstance(value, list) or (isinstance(value, dict) and "bdata" in value)
        if not is_array:
            return value
        return {"array": self.arrays.setdefault(json.dumps(value), len(self.arrays))}

    def to_json(self) -> str:
        """Return JSON that can stand in a script element."""
        plots = json.dumps(self.plots, separators=(",", ":"), allow_nan=False)
        return f'{{"plots":{plots},"arrays":[{",".join(self.arrays)}]}}'.replace("<", "\\u003c")


def _plotly() -> str:
    """Return the source of plotly.js."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise not_installed("this", error, "report") from error
    source: str = get_plotlyjs()
    return source


def _policy(*scripts: str) -> str:
    """Return a content policy that allows these scripts, and nothing from outside."""
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _title(sections: Sequence[Section]) -> str:
    return "Report" + (f": {sections[0].title}" if len(sections) == 1 else "")


def _contents(sections: Sequence[Section]) -> str:
    links = "".join(
        f'<li><a href="#section-{number}">{escape(_heading(section))}</a></li>'
        for number, section in enumerate(sections, start=1)
    )
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


def _heading(section: Section) -> str:
    return ": ".join(filter(None, (section.title, section.settings)))


def _section(section: Section, number: int, step: int, drawings: _Drawings) -> Iterator[str]:
    """Yield a section's HTML, and add its plots to the drawings."""
    deliveries = read_deliveries(section)
    yield f'<section id="section-{number}"><h2>{escape(section.title)}</h2>'
    if section.settings:
        yield f'<p class="note">{escape(section.settings)}</p>'
    for text in filter(None, map(warning, section.variants)):
        yield f'<p class="warning" role="note"><strong>Warning.</strong> {escape(text)}</p>'
    yield f'<p class="headline">{escape(headline(section))}</p>'
    yield "<h3>Summary</h3>" + _table(summary_table(section))
    yield _details("Every run", [_table(run_table(section))])
    yield _details("Bytes by what they are for", [_table(part_table(section))])
    for plot in plots_of(section, deliveries, step):
        place = f"section-{number}-{plot.name}"
        drawings.add(place, plot)
        yield f"<h3>{escape(plot.title)}</h3>" + _figure(plot, place)
    yield from (f'<p class="note">{escape(text)}</p>' for text in left_out(section))
    yield _details(
        "Blocks as tables",
        [_table(block_table(v, deliveries[v.label])) for v in section.variants],
    )
    yield "<h3>What would this cost on my link?</h3>" + _table(link_table(section))
    yield "<h3>How to run it again</h3>" + _details(
        "Versions and machine", [_table(environment_table(section), "words")]
    )
    for one in reproductions(section):
        commands = escape("\n".join(one.commands))
        yield _details(
            f"{one.label}: commands and configuration",
            [
                f"<pre>{commands}</pre>",
                f'<p class="note">{escape(one.hint)}</p>',
                f'<pre class="toml">{escape(one.toml)}</pre>',
            ],
        )
    yield "</section>"


def _details(summary: str, parts: Sequence[str]) -> str:
    return f"<details><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def _table(table: Table, kind: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    rows = []
    for first, *cells in table.rows:
        row = f'<th scope="row"><span>{escape(first.text)}</span></th>'
        for cell in cells:
            text = f"<span>{escape(cell.text)}</span>"
            row += f'<td class="best">{text}</td>' if cell.is_best else f"<td>{text}</td>"
        rows.append(f"<tr>{row}</tr>")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    kind = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll" tabindex="0"><table{kind}>'
        f"<caption><span>{escape(table.caption)}</span></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


def _figure(plot: Plot, place: str) -> str:
    switches = [
        _switch(switch, f"{place}-switch-{number}") for number, switch in enumerate(plot.switches)
    ]
    return FIGURE.substitute(
        id=place,
        height=plot.height,
        title=escape(plot.title),
        caption=escape(plot.caption),
        switches=f"<form>{''.join(switches)}</form>" if switches else "",
    )


def _switch(switch: Switch, name: str) -> str:
    if len(switch.options) <= _MOST_BUTTONS:
        inner = "".join(
            f'<label><input type="radio" name="{name}" value="{number}"'
            f"{'' if number else ' checked'}> {escape(option)}</label>"
            for number, option in enumerate(switch.options)
        )
    else:
        options = "".join(
            f'<option value="{number}">{escape(option)}</option>'
            for number, option in enumerate(switch.options)
        )
        inner = f'<select autocomplete="off" aria-label="{escape(switch.name)}">{options}</select>'
    hidden = " hidden" if len(switch.options) == 1 else ""
    return f"<fieldset{hidden}><legend>{escape(switch.name)}</legend>{inner}</fieldset>"
