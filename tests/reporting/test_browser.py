"""Tests the report in headless Chromium: its controls, and that it asks nothing of the network."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.reporting import writing
from tests.support.paths import ROOT
from tests.support.run_files import make_transcript, write_evaluation, write_run
from tests.support.verbs import write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("needs chromium (apt install chromium)", allow_module_level=True)
sync_api: Any = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytestmark = pytest.mark.long

SIZES = [(1280, 900), (390, 844)]
KL = [0.01, 0.02, 0.3, 0.01, 5.0, 0.0]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two runs of other seeds with transcripts, and of an evaluation."""
    root = tmp_path_factory.mktemp("report")
    runs = [write_run(root / f"s{seed}", seed) for seed in (0, 1)]
    rows = [make_transcript(i, 6, top=3, reverse_kl=KL) for i in range(4)]
    write(runs[0] / "rollouts" / "000000.jsonl", rows)
    hits = write_evaluation(root / "e", [True] * 3 + [False] * 5)
    writing.write_report([*map(str, runs), str(hits)], root / "report.html")
    return root / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def open_page(browser: Any, url: str, size=SIZES[0], scheme: str = "light") -> tuple[Any, list]:
    """Opens a page; returns it, with a list of whatever it does that it must not."""
    page = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True)))
    page.emulate_media(color_scheme=scheme)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    allowed = ("file:", "data:", "blob:")
    page.on("request", lambda r: r.url.startswith(allowed) or faults.append(r.url))
    page.goto(url)
    page.wait_for_selector("#tokens span, #facts:empty", state="attached")
    return page, faults


def expect(page: Any, selector: str) -> Any:
    """Waits for what is said of an element. (Conditions in JavaScript would need eval, which the
    page's policy forbids.)"""
    return sync_api.expect(page.locator(selector))


def read_tokens(page: Any) -> str:
    return page.eval_on_selector("#tokens", "node => node.textContent")


def test_slider_and_filters_choose_a_transcript(browser: Any, report: Path) -> None:
    page, faults = open_page(browser, report.as_uri())
    assert page.inner_text("#step-name") == "5" and page.inner_text("#place") == "1 of 4"
    page.focus("#step")
    page.keyboard.press("ArrowLeft")
    expect(page, "#tokens span").to_have_count(6)
    assert page.inner_text("#step-name") == "0"
    page.click("#next")
    expect(page, "#facts").to_contain_text("reward 1")
    assert page.inner_text("#place") == "2 of 4" and "no think" in page.inner_text("#facts")
    for name, value, count in (
        ("finish", "length", 2),
        ("finish", "stop", 2),
        ("mode", "think", 2),
        ("right", "right", 2),
        ("right", "wrong", 2),
    ):
        page.select_option(f"#{name}", value)
        assert page.inner_text("#place") == f"1 of {count} (4 without filters)"
        page.select_option(f"#{name}", "")
    page.select_option("#mode", "think")
    page.select_option("#right", "right")
    assert page.inner_text("#place") == "none of 4" and page.is_disabled("#next")
    page.select_option("#mode", "")
    page.select_option("#source", "2")  # the evaluation
    page.select_option("#right", "wrong")
    assert page.inner_text("#place") == "1 of 5 (8 without filters)"
    expect(page, "#tokens").to_have_text("It is -1.")
    assert not page.is_visible("#step-label") and not page.is_visible("#stat-label")
    assert faults == []


def test_tokens_are_coloured_and_explained(browser: Any, report: Path) -> None:
    """By the pointer and by the keyboard."""
    page, faults = open_page(browser, report.as_uri())
    page.focus("#step")
    page.keyboard.press("ArrowLeft")
    expect(page, "#tokens span").to_have_count(6)
    levels = page.eval_on_selector_all("#tokens span", "x => x.map(node => node.className)")
    assert levels == ["", "", "k2", "", "k5", ""]
    page.hover("#tokens span:nth-child(5)")
    shown = page.inner_text("#detail")
    assert "number 5" in shown and "\t5" in shown and "reverse KL" in shown
    assert "likeliest, student" in shown and "likeliest, teacher" in shown
    assert page.eval_on_selector_all("#detail .tops tr", "x => x.length") == 6
    page.focus("#tokens")
    page.keyboard.press("Home")
    assert "number 1" in page.inner_text("#detail")
    page.keyboard.press("ArrowRight")
    assert "number 2" in page.inner_text("#detail")
    for key, number in (("n", 3), ("n", 5), ("p", 3), ("End", 6), ("ArrowRight", 6)):
        page.keyboard.press(key)
        assert f"number {number}" in page.inner_text("#detail"), key
    page.select_option("#stat", "logp")
    assert "surprise" in page.inner_text("#scale")
    assert faults == []


def test_curves_are_read_by_pointer_and_keyboard(browser: Any, report: Path) -> None:
    page, faults = open_page(browser, report.as_uri())
    chart = page.locator(".chart", has_text="Loss").first
    chart.locator(".plot").hover()
    assert "1 more of other seeds" in chart.locator("output").inner_text()
    chart.focus()
    page.keyboard.press("Home")
    assert "step 0" in chart.locator("output").inner_text()
    page.keyboard.press("ArrowRight")
    text = chart.locator("output").inner_text()
    assert "step 1" in text and "0.55 (0.5 to 0.6)" in text
    assert faults == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_nothing_is_in_the_way_of_a_reader(
    browser: Any, report: Path, size: tuple[int, int], scheme: str
) -> None:
    """axe-core finds no serious fault, and a phone need not scroll sideways."""
    axe: Any = pytest.importorskip("axe_playwright_python.base", reason="has axe-core")
    page, faults = open_page(browser, report.as_uri(), size, scheme)
    page.focus("#tokens")
    page.keyboard.press("n")
    page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true; })")
    page.evaluate(axe.AXE_FILE_PATH.read_text())
    found = page.evaluate("axe.run()")["violations"]
    serious = [
        (x["id"], [node["html"][:200] for node in x["nodes"]])
        for x in found
        if x["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert faults == []


def test_many_long_transcripts_open_quickly(browser: Any, tmp_path: Path) -> None:
    """200 transcripts of 2,000 tokens, with five likeliest tokens of both models."""
    run = write_run(tmp_path / "a")
    for step in range(25):
        rows = [make_transcript(8 * step + i, 2000, top=5) for i in range(8)]
        write(run / "rollouts" / f"{step:06d}.jsonl", rows)
    out = tmp_path / "report.html"
    writing.write_report([str(run)], out)
    assert out.stat().st_size < 15e6
    start = time.perf_counter()
    page, faults = open_page(browser, out.as_uri())
    expect(page, "#tokens span").to_have_count(2000)
    seconds = time.perf_counter() - start
    assert seconds < 3 and faults == [], seconds


def test_hostile_transcripts_are_texts(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    odd = ["<script>document.title='bad'</script>", "\ud800", "\u202e\u05e9\u05dc", "x" * 100_000]
    odd += ["<img src=x onerror=\"document.title='bad'\">", "\x00", "</script><b>"]
    fields = {"prompt": odd[0], "response": "".join(odd), "token_texts": odd}
    write(run / "rollouts" / "000005.jsonl", [make_transcript(0, len(odd), **fields)])
    writing.write_report([str(run)], tmp_path / "report.html")
    page, faults = open_page(browser, (tmp_path / "report.html").as_uri())
    assert read_tokens(page) == "".join(odd)
    page.focus("#tokens")
    for _ in odd:
        page.keyboard.press("ArrowRight")
    assert page.title().startswith("Report") and faults == []
    assert page.evaluate("document.querySelectorAll('#tokens *').length") == len(odd)


def test_a_watched_page_keeps_its_place(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=3)
    command = [sys.executable, "-m", "distill.report", str(run), "--watch"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().split()[1]
            page = browser.new_page()
            faults: list[str] = []
            page.on("console", lambda message: faults.append(message.text))
            page.goto(url)
            page.wait_for_selector("#tokens span")
            page.select_option("#mode", "no_think")
            page.click("#next")
            expect(page, "#place").to_contain_text("2 of 2")
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 3, "stage": "opd", "train/loss": 0.1}\n')
            page.wait_for_selector("text=4 of 6 steps", timeout=60_000)
            expect(page, "#place").to_contain_text("2 of 2")
            assert page.input_value("#mode") == "no_think" and faults == []
        finally:
            process.terminate()
