"""The HTML page, in a real browser without a network. Skipped where there is no Chromium."""

from __future__ import annotations

import re
import shutil
import time

import pytest

from hallo_numguard.report import inputs as files
from hallo_numguard.report.html import grid
from hallo_numguard.report.html import render as html
from hallo_numguard.report.html.grid import Cell, Grid

import report_support as support

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no Chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed, which drives Chromium")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens the page of some files; fails on any console message, dialog or request."""
    trouble = []
    pages = []

    def open_page(*paths, **options):
        path = tmp_path / "page.html"
        path.write_text(html.render(files.read(paths)), encoding="utf-8")
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        pages.append(page)
        page.on("console", lambda message: trouble.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: note_request(request, path))
        page.goto(path.as_uri())
        page.locator("#matches", has_text=" of ").wait_for()
        return page

    def note_request(request, path):
        if request.url != path.as_uri() and not request.url.startswith(("data:", "blob:")):
            trouble.append(f"request: {request.url}")

    yield open_page
    for page in pages:
        page.close()
    assert trouble == []


@pytest.fixture
def trace_file(tmp_path):
    return support.write_trace(tmp_path, support.trace())


def hover_text(page, section, row, column):
    """What is told of a cell: the pointer goes where Plotly has drawn it."""
    x, y = page.evaluate(
        """([section, row, column]) => {
            const figure = document.querySelector(section + " .figure");
            figure.scrollIntoView({ block: "start" });
            const { xaxis, yaxis } = figure._fullLayout;
            const box = figure.getBoundingClientRect();
            return [box.left + xaxis._offset + xaxis.d2p(column), box.top + yaxis._offset + yaxis.d2p(row)];
        }""",
        [section, row, column],
    )
    page.mouse.move(x - 3, y)
    page.mouse.move(x, y)
    label = page.locator(f"{section} .hoverlayer .hovertext")
    label.wait_for()
    return label.text_content()


def wait_for_rows(page, count):
    """The page's own policy forbids to wait for an expression, which would have to be evaluated in it."""
    deadline = time.monotonic() + 5
    while page.locator("#offenders tbody tr").count() != count:
        assert time.monotonic() < deadline, "the table did not change"
        page.wait_for_timeout(20)


def listed(page):
    return page.locator("#offenders tbody tr").all_inner_texts()


def test_the_planted_tensor_and_the_verdict_are_seen(show):
    page = show(*support.REAL)
    assert page.get_by_text("parameter hidden.weight[3, 4]: 1 NaN of 384 values").is_visible()
    banner = page.locator("#verdict").inner_text()
    for part in ("Step 21 was skipped", "weights_nonfinite (no loss scale can mend this)", "Repair hidden.weight"):
        assert part in banner
    assert "step 19 was skipped" in page.locator("details").text_content()
    assert page.title() == "Step 21: weights_nonfinite - hallo-numguard"


def test_ranks_environment_and_what_hides_nan_are_seen(show):
    page = show(*support.LAST_STEP)
    assert page.locator("#ranks tbody tr").all_inner_texts() == [
        "rank 0\t2.77681\t0\t0\t492\tnone",
        "rank 1\tnan\t0\t0\t492\tthe first, 7 gradients",
    ]
    environment = page.locator("#environment").inner_text()
    assert "node-0" in environment
    assert "deepspeed\t0.19.8\t0.19.8" in environment
    assert page.get_by_text("Beware: transformers.Trainer").is_visible()


def test_hovering_over_the_heat_map_names_the_tensor(show):
    page = show(*support.REAL)
    text = hover_text(page, "section.grid[data-grid='0']", 1, 20)
    assert "hidden.weight" in text
    assert "step 21" in text
    assert re.search(r"× \d+ not finite", text)
    assert "largest finite value" in hover_text(page, "section.grid[data-grid='0']", 1, 3)


def test_what_is_not_finite_has_a_mark_and_not_a_colour_alone(show):
    page = show(*support.LAST_STEP)
    marks = page.locator("section.grid[data-grid='0'] .textpoint").all_text_contents()
    assert marks
    assert set(marks) == {"×"}


def test_a_trace_is_shown_by_module_and_call(show, trace_file):
    page = show(*support.LAST_STEP, trace_file)
    assert page.get_by_text("encoder.1.proj (Linear, call 1, forward)").is_visible()
    section = "section.grid[data-grid='2']"
    assert "∞" in page.locator(f"{section} .textpoint").all_text_contents()
    assert "2 not finite" in hover_text(page, section, 4, 6)
    page.fill("#search", "encoder.1.proj")
    wait_for_rows(page, 2)
    assert listed(page)[0].startswith("trace.jsonl.gz, call 1\toutput\tencoder.1.proj: output[0]\t0, 5\t2 +Inf")


def test_a_trace_alone_makes_a_page(show, trace_file):
    page = show(trace_file)
    assert page.title().startswith("trace.jsonl.gz")
    assert page.locator("#timeline").count() == 0


def test_the_search_narrows_the_table(show):
    page = show(*support.REAL)
    everything = len(listed(page))
    page.fill("#search", "OUTPUT.bias")
    wait_for_rows(page, 1)
    assert "output.bias" in listed(page)[0]
    page.fill("#search", "no such tensor")
    wait_for_rows(page, 0)
    assert page.locator("#matches").inner_text() == f"0 of {everything}"


def test_the_timeline_shows_skipped_steps_and_losses_that_are_not_finite(show):
    page = show(*support.REAL)
    legend = page.locator("#timeline .legendtext").all_text_contents()
    assert "skipped step" in legend
    assert "loss, rank 1" in legend
    assert page.evaluate("document.getElementById('timeline').layout.shapes.length") >= 2
    bad = page.evaluate(
        "document.getElementById('timeline').data.filter(one => one.marker?.symbol === 'x').map(one => one.x)"
    )
    assert [21] in bad


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_system_and_the_button(show, scheme):
    page = show(*support.LAST_STEP, color_scheme=scheme)

    def brightness():
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        paper = page.evaluate("document.getElementById('timeline').layout.paper_bgcolor")
        assert paper.lower() in ("#ffffff", "#14181d")
        return sum(map(int, re.findall(r"\d+", colour)))

    before = brightness()
    assert (before > 380) == (scheme == "light")
    page.click("#theme")
    assert (brightness() > 380) != (scheme == "light")


def test_a_narrow_screen_needs_no_sideways_scrolling(show, trace_file):
    page = show(*support.LAST_STEP, trace_file, viewport={"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_hostile_names_are_text(show, tmp_path):
    hostile = support.hostile_report()
    prefixes = [
        support.write_trace(tmp_path, support.trace(prefix=name), f"{at}.gz")
        for at, name in enumerate(support.HOSTILE)
        if name.isprintable()
    ]
    page = show(support.write_report(tmp_path, hostile), *prefixes)
    rows = "\n".join(listed(page))
    for name in ("<script>alert(1)</script>", "[/x][bold]shout", "{{ 7 * 7 }}%{x}$x$<b>bold</b>"):
        assert name in rows
    assert "\x1b" not in page.content()
    assert page.locator("main script, main img, main a, main b").count() == 0
    text = hover_text(page, "section.grid[data-grid='0']", 5, 0)
    assert "{{ 7 * 7 }}%{x}$x$<b>bold</b>" in text


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """50,000 parameters, all of whose gradients are NaN in the last step, as they are after a NaN loss."""
    names = [
        f"model.layers.{layer}.experts.{expert}.{kind}.weight"
        for layer in range(100)
        for expert in range(125)
        for kind in "abcd"
    ]
    planted = names[31_337]
    one = support.report(names, names, first=support.offender(planted, kind="parameter"))
    return support.write_report(tmp_path_factory.mktemp("large"), one), planted


def test_fifty_thousand_rows_neither_freeze_nor_hide_anything(show, large):
    path, planted = large
    page = show(path)
    began = time.monotonic()
    assert page.get_by_text(f"parameter {planted}[0, 1]").is_visible()
    assert page.locator("#offenders tbody tr").count() == 500
    assert page.locator("#matches").inner_text() == "the first 500 of 50001 of 50001"
    page.fill("#search", planted)
    wait_for_rows(page, 2)
    assert planted in hover_text(page, "section.grid[data-grid='0']", 0, 4)
    pager = page.locator("section.grid[data-grid='0'] output")
    assert pager.inner_text().startswith("1 to 40 of ")
    page.click("section.grid[data-grid='0'] .on")
    assert pager.inner_text().startswith("41 to 80 of ")
    page.fill("section.grid[data-grid='0'] .filter", planted)
    page.locator("section.grid output", has_text="1 to 1 of 1").wait_for()
    assert time.monotonic() - began < 15


# -- what needs no browser --------------------------------------------------------------------------------------------


def test_the_page_asks_for_nothing_and_lets_no_other_script_run():
    text = html.render(files.read(support.LAST_STEP))
    assert "default-src 'none'; script-src 'sha256-" in text.replace("&#39;", "'")
    head, _, _ = text.partition("<style>")
    assert "http" not in head.replace("http-equiv", "")


def rows_of(count, bad=()):
    return {f"layers.{at // 10}.part.{at % 10}": [Cell(float(at), 3 * (at in bad))] for at in range(count)}


def test_few_rows_stay_as_they_are():
    few = Grid(["1"], rows_of(30))
    assert grid.with_fewer_rows(few, limit=30) is few


def test_many_rows_are_put_together_by_module_but_for_those_that_are_not_finite():
    fewer = grid.with_fewer_rows(Grid(["1"], rows_of(400, bad={7, 399})), limit=100)
    assert len(fewer.rows) <= 100
    assert fewer.rows["layers.0.part.7"] == [Cell(7.0, 3)]
    assert fewer.rows["layers.39.part.9"] == [Cell(399.0, 3)]
    assert fewer.rows["layers.5.part.* (10 tensors)"] == [Cell(59.0)]
    assert "2 of the 2 that are not finite" in fewer.note


def test_where_all_is_bad_the_first_offender_keeps_its_row_and_nothing_is_lost():
    rows = rows_of(4000, bad=range(4000))
    fewer = grid.with_fewer_rows(Grid(["1"], rows), first=["layers.300.part.3", "not recorded"], limit=100)
    assert len(fewer.rows) <= 100
    assert "layers.300.part.3" in fewer.rows
    assert sum(row[0].nonfinite for row in fewer.rows.values()) == 12_000


def test_names_without_modules_end_in_one_row():
    rows = {f"p{at}": [Cell(1.0)] for at in range(500)}
    assert list(grid.with_fewer_rows(Grid(["1"], rows), limit=50).rows) == ["all others (500 tensors)"]


@pytest.mark.parametrize(("count", "limit", "left"), [(0, 5, 0), (5, 5, 5), (6, 5, 3), (1000, 120, 112)])
def test_columns_are_put_together_where_there_are_too_many(count, limit, left):
    labels, places = grid.bins([str(at) for at in range(count)], limit)
    assert len(labels) == left
    assert len(places) == count
    assert places == sorted(places)
    assert not labels or places[-1] == left - 1
