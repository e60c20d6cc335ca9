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


def values(page: Page, name: str, trace: int, key: str) -> list[Any]:
    found: list[Any] = page.run(f"return Array.from({drawing(name)}._fullData[{trace}].{key})")
    return found


def test_it_needs_no_network_and_says_nothing_in_the_console(page: Page) -> None:
    assert page.messages() == []
    assert page.requests() == []


def test_every_picture_is_drawn(page: Page) -> None:
    for name in PICTURES:
        count = page.run(f"return {drawing(name)}._fullData.length")
        assert count > 0, name
        marks = ".scatterlayer .trace, .barlayer .point, .heatmaplayer image"
        assert page.run(f"return {drawing(name)}.querySelectorAll('{marks}').length") > 0, name


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
    for number, (method, row) in enumerate(zip(METHODS, table, strict=True)):
        folder = made / "runs" / f"{method}-seed0"
        summary = json.loads((folder / "summary.json").read_text())
        head = dict(zip(heads, row, strict=True))
        assert head["test accuracy\nfinal"] == f"{summary['final_metric']:.4f}"
        assert head["test accuracy\nbest"] == f"{summary['best_metric']:.4f}"
        megabytes = summary["total_bytes"] / 1e6
        assert head["sent\ntotal, MB"] == f"{megabytes:.{2 if megabytes >= 0.1 else 5}f}"
        lines = page.run(
            f"return {drawing('accuracy')}._fullData.filter(t => t.legendgroup === '{number}')"
            ".map(t => [t.x[t.x.length - 1], t.y[t.y.length - 1]])"
        )
        assert lines[-1] == pytest.approx([megabytes, summary["final_metric"]], rel=1e-6)


def test_switches_change_the_picture(made: Path, page: Page) -> None:
    text = (made / "runs" / "fedobd-seed0" / "rounds.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    choose(page, "accuracy", 0, 3)
    assert values(page, "accuracy", 0, "x") == [1, 2, 3]  # stage 1 of FedOBD
    assert page.run(f"return {drawing('accuracy')}._fullLayout.xaxis.title.text") == "round"
    choose(page, "accuracy", 1, 1)
    assert page.run(f"return {drawing('accuracy')}._fullLayout.xaxis.type") == "log"
    choose(page, "accuracy", 0, 1)
    sent = records[0]["uplink_bytes"] / 1e6
    assert values(page, "accuracy", 0, "x")[0] == pytest.approx(sent, rel=1e-6)
    choose(page, "traffic", 1, 1)
    names = page.run(f"return {drawing('traffic')}._fullData.map(t => t.name)")
    assert names[:2] == ["header", "levels"]
    before = page.run(f"return {drawing('uploads')}._fullData[0].z.length")
    choose(page, "uploads", 0, 1)  # SMAFD, whose blocks are tensors
    assert page.run(f"return {drawing('uploads')}._fullData[0].z.length") > before
    assert page.messages() == []


def test_hover_tells_block_size_and_difference(made: Path, page: Page) -> None:
    told = page.run(
        f"const place = {drawing('uploads')};"
        "Plotly.Fx.hover(place, {xval: 1, yval: 1});"
        "return place.querySelector('.hoverlayer').textContent"
    )
    schema = json.loads((made / "runs" / "fedobd-seed0" / "schema.json").read_text())
    assert schema["blocks"][1][0][-19:] in told
    assert "parameters" in told
    assert re.search(r"round 1: \d+ clients, \d+ %", told)
    assert "mean block difference 0." in told


def test_hover_names_the_line_and_fits_a_phone(made: Path, browser: Page) -> None:
    browser.emulate(width=390)
    browser.open(made / "report.html")
    browser.show_all()
    told, left, right = browser.run(
        f"const place = {drawing('accuracy')};"
        "Plotly.Fx.hover(place, [{curveNumber: 0, pointNumber: 1}]);"
        "const label = place.querySelector('.hoverlayer .hovertext');"
        "const box = label.getBoundingClientRect();"
        "return [label.textContent, box.left, box.right]"
    )
    assert told.startswith("fedobdtest accuracy 0.")
    assert told.endswith("MB sent, up and downround 2, stage 1")
    assert 0 <= left < right <= 390


def test_hover_names_the_stage_where_two_lines_meet(page: Page) -> None:
    for point, stage in ((0, 1), (1, 2)):
        page.run(
            f"const place = {drawing('accuracy')};"
            "const line = place.data.findIndex(trace => trace.line.dash === 'dot');"
            f"Plotly.Fx.hover(place, [{{curveNumber: line, pointNumber: {point}}}]);"
        )
        text = f"{drawing('accuracy')}.querySelector('.hoverlayer').textContent"
        page.wait(f"{text}.endsWith('stage {stage}')")


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
        found: str = page.run(f"return {drawing('accuracy')}._fullLayout.font.color")
        return found

    assert color() == "#1b1f24"
    page.emulate(scheme="dark")
    page.wait(f"{drawing('accuracy')}._fullLayout.font.color === '#e6e9ed'")
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"


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
        assert browser.run(f"return {drawing(name)}.querySelector('.main-svg').clientWidth") <= 390


def test_it_prints(made: Path, page: Page, tmp_path: Path) -> None:
    page.emulate(scheme="dark")
    page.print_to_pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    page.wait(f"{drawing('accuracy')}._fullLayout.width > 700")  # as wide as the window again
    page.wait(f"{drawing('accuracy')}._fullLayout.height === 480")
    assert page.run("return document.querySelectorAll('details[open]').length") == 0
    assert page.messages() == []
