"""The static page in a browser: it sorts, filters, goes by keyboard, fits a phone, keeps silent,
and asks for nothing.

Needs Chromium and `pip install 'widthbench[browser]'`. Set WIDTHBENCH_SHOTS to a folder to keep
screenshots.
"""

import os
import shutil
from pathlib import Path

import pytest
from made import record, suite

from widthbench.report import site

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
EVIL = "<img src=x onerror=window.hit=1>"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page of one suite with many rows, an evil plug-in, a failure, and claims."""
    budgets = ("macs:0.5", "macs:0.25", "macs:0.125")
    sizes = {"macs:0.5": 50, "macs:0.25": 25, "macs:0.125": 12}
    names = ["base", "l1-norm", "nmf", "random-channels", EVIL]
    records = [
        record(t, s, top1=60.0 + 5 * i + s, budget=b, macs=sizes[b], key=f"{i}{j}{s}" * 10)
        for i, t in enumerate(names)
        for j, b in enumerate(budgets)
        for s in range(3)
    ]
    records.append(record("broken", status="failed", reason=EVIL, key="f" * 40))
    other = record("nmf", 0, 77.0, key="e" * 40)
    other = other.model_copy(update={"cell": other.cell.model_copy(update={"model": "mlp"})})
    records.append(other)
    row = {
        "what": "x",
        "reported": "90%",
        "measured": "91% (n=5)",
        "verdict": "reproduced",
        "rule": "±1",
        "check": "",
        "records": [records[4].key],
    }
    claim = {
        "document": "000",
        "title": "t",
        "technique": "l1-norm",
        "id": "M1",
        "text": "says so",
        "note": EVIL,
        "needs": "",
        "readings": {},
        "verdict": "reproduced",
        "rows": [row, {**row, "what": "y", "verdict": "not run", "measured": "–"}],
    }
    shown = site.Shown("s", suite(), records, [], "ab" * 32)
    path = tmp_path_factory.mktemp("site") / "site.html"
    path.write_text(site.html([shown], [claim]))
    return f"file://{path}"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip(
        "playwright.sync_api", reason="needs pip install 'widthbench[browser]'"
    )
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield opened
        opened.close()


@pytest.fixture(params=[(1400, 1000), (390, 844)], ids=["desktop", "phone"])
def page(browser, address, request):
    """The page at two sizes; afterwards nothing must have been said, asked for, or run."""
    width, height = request.param
    opened = browser.new_page(viewport={"width": width, "height": height})
    said, asked = [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda r: asked.append(r.url))
    opened.goto(address)
    yield opened
    assert said == []
    assert [url for url in asked if not url.startswith((address, "blob:"))] == []
    assert opened.evaluate("window.hit") is None
    opened.close()


def go(page, route):
    page.goto(f"{page.url.partition('#')[0]}#{route}")
    page.wait_for_selector("section:not([hidden]) table.board.dataTable", state="attached")
    if route.startswith("suite/"):  # which moves what is below
        page.wait_for_selector("section:not([hidden]) .chart .scatterlayer .trace")
        page.locator("section:not([hidden]) details.all > summary").click()


def column(page, number):
    return page.locator(
        f"section:not([hidden]) table.board tbody tr td:nth-child({number})"
    ).all_inner_texts()


def eventually(page, holds, what=""):
    """Wait for something that the page does a moment later."""
    for _ in range(50):
        if holds():
            return
        page.wait_for_timeout(100)
    raise AssertionError(what or holds)


def shoot(page, name):
    if folder := os.environ.get("WIDTHBENCH_SHOTS"):
        page.screenshot(
            path=Path(folder) / f"{name}-{page.viewport_size['width']}.png", full_page=True
        )


def test_it_sorts_by_click_and_by_keyboard(page):
    go(page, "suite/s")

    def scores():
        return [float(text.split()[0]) for text in column(page, 7) if text]

    before = scores()
    head = page.locator("section:not([hidden]) table.board thead th").nth(6)
    head.locator(".dt-column-title").click()
    eventually(page, lambda: scores() == sorted(before), "a click sorts")
    assert before != sorted(before)
    head.locator("[tabindex='0'], button").first.focus()
    page.keyboard.press("Enter")
    eventually(page, lambda: scores() == sorted(before, reverse=True), "Enter sorts the other way")


def test_it_filters_by_text_and_by_column(page):
    go(page, "suite/s")
    box = page.get_by_label("Filter rows:").locator("visible=true")
    box.fill("nmf")
    eventually(page, lambda: set(column(page, 2)) == {"nmf"}, "text filters")
    box.fill("")
    page.locator("section:not([hidden]) table.board thead th").nth(3).locator(
        "button.dtcc-button, .dtcc-button"
    ).last.click()
    page.locator(".dtcc-dropdown:visible input").fill("macs:0.25")
    page.keyboard.press("Enter")
    eventually(page, lambda: set(column(page, 4)) == {"macs:0.25"}, "a column filters")


def test_a_rows_link_opens_its_record_and_escape_closes_it(page):
    go(page, "suite/s")
    link = page.locator("section:not([hidden]) td.records a").first
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    assert "#record/s/" in page.url
    assert '"top1"' in page.locator("#record-text").inner_text()
    shoot(page, "record")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog:not([open])", state="attached")
    eventually(page, lambda: page.url.endswith("#suite/s"), "back on the suite")


def test_an_address_leads_straight_to_a_record(page):
    address = page.url
    page.goto("about:blank")
    page.goto(f"{address}#record/s/{'f' * 40}")
    page.wait_for_selector("dialog[open]")
    assert EVIL in page.locator("#record-where").inner_text()


def test_claims_filter_by_verdict_and_lead_to_records(page):
    go(page, "claims")
    shoot(page, "claims")
    assert column(page, 5) == ["reproduced", "not run"]
    page.locator("section:not([hidden]) details summary").first.click()
    page.locator("section:not([hidden]) details a").first.click()
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    eventually(page, lambda: page.url.endswith("#claims"), "back on the claims")


def test_charts_are_drawn_and_redrawn(page):
    go(page, "suite/s")
    page.wait_for_selector("section:not([hidden]) .chart .scatterlayer .trace")
    names = page.locator("section:not([hidden]) .chart .legendtext").all_text_contents()
    assert {"base", "l1-norm", EVIL} <= set(names)
    first = page.locator("section:not([hidden]) .chart .xtitle").text_content()
    page.locator("section:not([hidden]) select[data-role=axis]").select_option("params")
    page.wait_for_function(
        "t => document.querySelector('section:not([hidden]) .chart .xtitle').textContent !== t",
        arg=first,
    )
    shoot(page, "suite")


def test_the_menu_of_networks_filters_matrix_chart_and_table_alike(page):
    go(page, "suite/s")
    shown = "section:not([hidden]) .matrix:not([hidden])"
    assert page.locator(shown).count() == 1
    assert set(column(page, 1)) == {"lenet5 on digits"}
    page.locator("section:not([hidden]) select[data-role=place]").select_option("mlp on digits")
    eventually(page, lambda: set(column(page, 1)) == {"mlp on digits"}, "the table follows")
    assert page.locator(shown).count() == 1
    assert "77.00" in page.locator(shown).inner_text()
    title = page.locator("section:not([hidden]) .chart .gtitle")
    eventually(page, lambda: title.text_content() == "mlp on digits", "the chart follows")


def test_no_page_is_wider_than_its_window(page):
    shoot(page, "overview")
    for route in ("overview", "claims", "suite/s"):
        page.goto(f"{page.url.partition('#')[0]}#{route}")
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), route


ODD = (
    "record/%zz/x",
    "record/__proto__/toString",
    "record/s/toString",
    "record/s/__proto__",
    "record",
    "record//",
    "%",
    "suite/x",
)


@pytest.mark.parametrize("odd", ODD)
def test_an_address_that_leads_nowhere_shows_a_page(page, odd):
    go(page, "claims")
    page.goto(f"{page.url.partition('#')[0]}#{odd}")
    page.wait_for_timeout(200)
    assert page.locator("section:not([hidden])").count() == 1
    assert page.locator("dialog[open]").count() == 0


def test_committed_results_fit_a_phone(browser, tmp_path):
    """Real suites: long names of networks, many rows."""
    results = Path(__file__).parents[2] / "results" / "published"
    shown = [site._shown(results / name, {}) for name in ("shrinking", "lenet-public", "digits")]
    (tmp_path / "site.html").write_text(site.html(shown, site._claims(results)))
    page = browser.new_page(viewport={"width": 390, "height": 844})
    for route in ("overview", "claims", *(f"suite/{s.name}" for s in shown)):
        page.goto(f"file://{tmp_path}/site.html#{route}")
        page.wait_for_timeout(1500)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, route
        shoot(page, f"real-{route.replace('/', '-')}")
    page.close()


def test_without_scripts_everything_can_be_read(browser, address):
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto(address)
    text = page.locator("main").inner_text()
    assert "parameters, MACs left" in text
    assert "says so" in text
    assert page.locator("details.all tbody tr").count() == 18
    page.close()
