"""The report's page in a real browser without a network.

Needs Debian's chromium and chromium-driver: `apt-get install chromium chromium-driver`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedobd.experiments import compare, load_config, run
from fedobd.report import write_report
from tests.browser_page import BINARY, DRIVER, Page, open_browser
from tests.toy import CONFIG

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.skipif(
        not (BINARY.exists() and DRIVER.exists()), reason="chromium or chromium-driver is missing"
    ),
]

METHODS = ("fedobd", "fedavg", "fedpaq", "feddropoutavg", "smafd")
HOSTILE = "<script>window.struck = 1</script><img src=x onerror='window.struck = 1'>"
PICTURES = ("accuracy", "traffic", "uploads", "bits", "levels")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs and their page; a block of FedOBD's has a hostile name."""
    folder = tmp_path_factory.mktemp("browser")
    (folder / "toy.toml").write_text(CONFIG, encoding="utf-8")
    config = load_config(str(folder / "toy.toml"))
    compare(config, folder / "runs", seeds=[0], methods=METHODS)
    schema = folder / "runs" / "fedobd-seed0" / "schema.json"
    values = json.loads(schema.read_text())
    values["blocks"][0][0] = HOSTILE
    schema.write_text(json.dumps(values))
    write_report([folder / "runs"], folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with open_browser() as page:
        yield page


@pytest.fixture
def page(made: Path, browser: Page) -> Page:
    """The page, newly opened, all its pictures drawn."""
    browser.emulate()
    seconds = browser.open(made / "report.html")
    print(f"opened in {seconds:.2f} s")
    browser.show_all()
    return browser


def drawing(name: str) -> str:
    """Return an expression of JavaScript for a picture's element."""
    return f"document.querySelector('#section-1-{name} .drawing')"


def choose(page: Page, name: str, switch: int, option: int) -> None:
    """Choose an option of a picture's switch, as a click does."""
    page.run(
        f"const field = document.querySelectorAll('#section-1-{name} fieldset')[{switch}];"
        "const list = field.querySelector('select');"
        f"if (list) {{ list.value = '{option}';"
        "  list.dispatchEvent(new Event('change', {bubbles: true})); }"
        f"else field.querySelectorAll('input')[{option}].click();"
    )


def rows(page: Page, name: str, data: str) -> list[dict[str, Any]]:
    """Return the rows of a picture's data set, as Vega holds it."""
    held: list[dict[str, Any]] = page.run(
        f"return {drawing(name)}.view.data('{data}').map(row => ({{...row}}))"
    )
    return held


def marks(page: Page, name: str) -> list[str]:
    """Return the kinds of what is drawn, one for each item within the axes."""
    kinds: list[str] = page.run(
        "const kinds = [];"
        "function visit(mark) {"
        "  if (mark.role === 'mark' && mark.marktype !== 'group') {"
        "    kinds.push(...mark.items.map(item => mark.marktype));"
        "  }"
        "  for (const item of mark.items || []) (item.items || []).forEach(visit);"
        "}"
        f"visit({drawing(name)}.view.scenegraph().root);"
        "return kinds"
    )
    return kinds


def title_of_x(page: Page, name: str) -> str:
    """Return the title of a picture's horizontal axis."""
    title: str = page.run(
        "let text;"
        "function visit(mark) {"
        "  if (mark.role === 'axis-title' && mark.items[0].orient !== 'left'"
        "      && !mark.items[0].angle) text = mark.items[0].text;"
        "  for (const item of mark.items || []) (item.items || []).forEach(visit);"
        "}"
        f"visit({drawing(name)}.view.scenegraph().root);"
        "return text"
    )
    return title


def hover(page: Page, name: str, x: str, y: str) -> str:
    """Move the mouse to a place within the axes, and return what is told there.

    Args:
        page: with the picture.
        name: of the picture.
        x: expression of JavaScript for the place in pixels, which may use the scales of `view`.
        y: the same.
    """
    place = (
        f"const view = {drawing(name)}.view;"
        f"const box = {drawing(name)}.querySelector('canvas').getBoundingClientRect();"
        f"return [box.left + view.origin()[0] + ({x}), box.top + view.origin()[1] + ({y})]"
    )
    for moved in (0, 1):  # the mouse's coming brings the picture to life
        left, top = page.run(place)
        page.move_mouse(left + moved, top)
        page.wait(f"{drawing(name)}.dataset.live")
    page.wait("document.querySelector('#vg-tooltip-element.visible')")
    told: str = page.run(
        "return [...document.querySelectorAll('#vg-tooltip-element tr')]"
        ".map(row => [...row.children].map(cell => cell.textContent).join(' ')).join('; ')"
    )
    return told


def test_it_needs_no_network_and_says_nothing_in_the_console(page: Page) -> None:
    assert page.messages() == []
    assert page.requests() == []


def test_every_picture_is_drawn(page: Page) -> None:
    wanted = {
        "accuracy": {"area", "line", "symbol"},
        "traffic": {"rect", "rule", "text"},
        "uploads": {"rect", "rule", "text"},
        "bits": {"symbol"},
        "levels": {"line", "symbol", "rule", "text"},
    }
    assert set(wanted) == set(PICTURES)
    for name, kinds in wanted.items():
        assert set(marks(page, name)) == kinds, name


def test_the_numbers_are_those_of_the_runs(made: Path, page: Page) -> None:
    table = page.run(
        "return [...document.querySelector('table').querySelectorAll('tbody tr')]"
        ".map(row => [...row.children].map(cell => cell.textContent))"
    )
    assert [row[0] for row in table] == list(METHODS)
    heads = page.run(
        "return [...document.querySelectorAll('table:first-of-type')[0].querySelectorAll('thead "
        "th')].map(cell => cell.textContent)"
    )
    for method, row in zip(METHODS, table, strict=True):
        folder = made / "runs" / f"{method}-seed0"
        summary = json.loads((folder / "summary.json").read_text())
        head = dict(zip(heads, row, strict=True))
        assert head["test accuracy\nfinal"] == f"{summary['final_metric']:.4f}"
        assert head["test accuracy\nbest"] == f"{summary['best_metric']:.4f}"
        megabytes = summary["total_bytes"] / 1e6
        assert head["sent\ntotal, MB"] == f"{megabytes:.{2 if megabytes >= 0.1 else 5}f}"
        line = [row for row in rows(page, "accuracy", "points") if row["line"] == method]
        wanted = pytest.approx([megabytes, summary["final_metric"]], rel=1e-6)
        assert [line[-1]["total"], line[-1]["metric"]] == wanted


def test_switches_change_the_picture(made: Path, page: Page) -> None:
    text = (made / "runs" / "fedobd-seed0" / "rounds.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    choose(page, "accuracy", 0, 3)
    page.wait(f"{drawing('accuracy')}.view.scale('x').domain()[1] > 5")
    assert title_of_x(page, "accuracy") == "round"
    choose(page, "accuracy", 1, 1)
    page.wait(f"{drawing('accuracy')}.view.scale('x').type === 'log'")
    choose(page, "accuracy", 0, 1)
    sent = records[0]["uplink_bytes"] / 1e6
    page.wait(f"{drawing('accuracy')}.view.scale('x').domain()[1] < 1")
    assert title_of_x(page, "accuracy") == "MB sent up"
    assert rows(page, "accuracy", "points")[0]["up"] == pytest.approx(sent, rel=1e-6)
    choose(page, "traffic", 1, 1)
    page.wait(f"{drawing('traffic')}.view.data('up')[0].name === 'header'")
    names = list(dict.fromkeys(row["name"] for row in rows(page, "traffic", "up")))
    assert names[:2] == ["header", "levels"]
    before = len(rows(page, "uploads", "cells"))
    choose(page, "uploads", 0, 1)  # SMAFD, whose blocks are tensors
    page.wait(f"{drawing('uploads')}.view.data('cells').length > {before}")
    assert page.messages() == []


def test_hover_tells_block_size_and_difference(made: Path, page: Page) -> None:
    schema = json.loads((made / "runs" / "fedobd-seed0" / "schema.json").read_text())
    name = schema["blocks"][1][0]
    label = f"view.data('cells').find(row => row.name.startsWith('1 {name}')).name"
    told = hover(page, "uploads", "view.scale('x')(1)", f"view.scale('y')({label}) + 5")
    assert re.search(rf"block · parameters 1 {re.escape(name)} · [\d,]+; round 1; ", told), told
    assert re.search(r"clients \d+; % of the clients \d+; mean block difference 0\.", told)


def point(field: str, line: str, number: int, scale: str) -> str:
    """Return an expression for the place of a line's point on a scale."""
    found = f"view.data('points').filter(row => row.line === '{line}')[{number}].{field}"
    return f"view.scale('{scale}')({found})"


def hover_point(page: Page, line: str, number: int) -> str:
    at = [point(field, line, number, scale) for field, scale in (("total", "x"), ("metric", "y"))]
    return hover(page, "accuracy", *at)


def test_hover_names_the_line_and_fits_a_phone(made: Path, browser: Page) -> None:
    browser.emulate(width=390)
    browser.open(made / "report.html")
    browser.show_all()
    told = hover_point(browser, "fedobd", 1)
    pattern = r"line fedobd; test accuracy 0\.\d{4}; MB sent, up and down 0\.\d{3}; "
    assert re.match(pattern, told), told
    assert told.endswith("round 2; stage 1")
    left, right = browser.run(
        "const box = document.querySelector('#vg-tooltip-element').getBoundingClientRect();"
        "return [box.left, box.right]"
    )
    assert 0 <= left < right <= 390


def test_hover_names_the_stage_of_each_point(page: Page) -> None:
    for number, stage in ((2, 1), (3, 2)):
        assert hover_point(page, "fedobd", number).endswith(f"round {number + 1}; stage {stage}")


def test_hostile_names_do_not_run(page: Page) -> None:
    assert page.run("return window.struck") is None
    assert page.run("return document.querySelectorAll('img').length") == 0
    assert page.run("return document.body.textContent.includes('<script>window.struck')")
    page.run(
        "const made = document.createElement('script'); made.textContent = 'window.struck = 2';"
        "document.body.append(made)"
    )
    assert page.run("return window.struck") is None  # the content policy holds
    assert len(page.messages()) == 1


def test_plots_follow_light_and_dark(page: Page) -> None:
    def color() -> str:
        fill: str = page.run(f"return {drawing('accuracy')}.view.signal('paper')")
        return fill

    assert color() == "#ffffff"
    page.emulate(scheme="dark")
    page.wait(f"{drawing('accuracy')}.view.signal('paper') === '#14181d'")
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    pixels = page.run(
        f"const canvas = {drawing('accuracy')}.querySelector('canvas');"
        "const {data} = canvas.getContext('2d')"
        "  .getImageData(0, 0, canvas.width, canvas.height);"
        "let light = 0;"
        "for (let place = 0; place < data.length; place += 4) {"
        "  if (data[place] > 200 && data[place + 2] > 200 && data[place + 3] > 200) light += 1;"
        "}"
        "return light"
    )
    assert pixels > 50  # the letters


def test_long_names_fit_a_phone(made: Path, browser: Page, tmp_path: Path) -> None:
    folders = []
    for rate in (0.3, 0.4, 0.5):
        keys = [f"methods.fedobd.codec.dropout_rate={rate}", "federation.shared_start=true"]
        folders.append(tmp_path / f"a-run-with-a-very-long-name-of-its-own-{rate}")
        run(load_config(str(made / "toy.toml"), overrides=keys), folders[-1])
    write_report(folders, tmp_path / "report.html")
    browser.emulate(width=390)
    browser.open(tmp_path / "report.html")
    browser.show_all()
    assert browser.run("return document.documentElement.scrollWidth") <= 390


def test_it_fits_a_phone(made: Path, browser: Page) -> None:
    browser.emulate(width=390)
    browser.open(made / "report.html")
    browser.show_all()
    assert browser.run("return document.documentElement.scrollWidth") <= 390
    for name in PICTURES:
        assert browser.run(f"return {drawing(name)}.querySelector('canvas').clientWidth") <= 390


def test_it_prints(made: Path, page: Page, tmp_path: Path) -> None:
    page.emulate(scheme="dark")
    page.print_to_pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    page.wait(f"{drawing('accuracy')}.querySelector('canvas')?.clientWidth > 700")  # as before
    page.wait(f"{drawing('accuracy')}.querySelector('canvas').clientHeight > 400")
    page.wait(f"{drawing('accuracy')}.view.signal('paper') === '#14181d'")
    assert page.run("return document.querySelectorAll('details[open]').length") == 0
    assert page.messages() == []
