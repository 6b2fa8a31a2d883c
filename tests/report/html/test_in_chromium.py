"""report.html in a real browser. Needs Chromium, its driver and selenium; skipped without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.report.html.hostile import ATTACK, VERDICTS, hostile_run
from tpaw.evaluation.compare import compare
from tpaw.evaluation.load import _read
from tpaw.report.html.comparison import write_comparison
from tpaw.report.html.page import write_report
from tpaw.report.html.study import write_study_page

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

RESULTS = Path(__file__).parents[3] / "docs" / "results"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver"),
]


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    with webdriver.Chrome(options=options, service=service) as found:
        yield found


@pytest.fixture(scope="module")
def path(finished, tmp_path_factory):
    run = hostile_run(finished[0], tmp_path_factory.mktemp("hostile"))
    return write_report(run, finished[1])


@pytest.fixture
def page(browser, path):
    """Open the page, at a fragment if one is given; afterwards nothing was logged or asked for."""

    def open_page(fragment=""):
        browser.get("about:blank")
        browser.get_log("performance")
        browser.get(path.as_uri() + fragment)
        return browser

    yield open_page
    nothing_happened(browser, path)


def nothing_happened(browser, path):
    """Nothing was logged, asked for or run."""
    assert browser.get_log("browser") == []
    messages = [json.loads(m["message"])["message"] for m in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == REQUEST]
    assert {url.partition("#")[0] for url in asked} <= {path.as_uri(), "about:blank"}
    assert not browser.execute_script("return window.broken")
    assert browser.find_elements(By.TAG_NAME, "img") == []


REQUEST = "Network.requestWillBeSent"


def listed(browser):
    return browser.find_elements(By.CSS_SELECTOR, "#list button")


def choose(browser, select, value):
    Select(browser.find_element(By.ID, select)).select_by_value(value)


def of_kind(*verdicts):
    return [k for k in range(10) if VERDICTS[k % 4] in verdicts]


def prompts(browser):
    """The numbers at the ends of the listed prompts."""
    return [int(b.text.rpartition(" ")[2]) for b in listed(browser)]


def test_filters(page):
    browser = page()
    assert prompts(browser) == list(range(10))
    for kind, expected in {
        "wrong to right": of_kind("00111"),
        "right to wrong": of_kind("11000"),
        "always wrong": of_kind("00000"),
        "always right": of_kind("11111"),
        "truncated": [5],
        "longest change": list(range(9, -1, -1)),
    }.items():
        choose(browser, "kind", kind)
        assert prompts(browser) == expected, kind
    marks = [e.text for e in browser.find_elements(By.CSS_SELECTOR, ".marks")]
    assert marks[-1] == "✗✗✓✓✓"
    choose(browser, "set", "training")
    assert len(listed(browser)) == 24
    kinds = [o.get_attribute("value") for o in Select(browser.find_element(By.ID, "kind")).options]
    assert kinds == ["all", "changed", "truncated", "longest change"]


def test_search(page):
    browser = page()
    query = browser.find_element(By.ID, "query")
    browser.find_element(By.TAG_NAME, "body").send_keys("/")
    assert browser.switch_to.active_element == query
    query.send_keys("PROMPT 7")
    assert prompts(browser) == [7]
    assert browser.find_element(By.ID, "count").text == "1 of 10 shown"
    query.clear()
    query.send_keys("nobody wrote this")
    assert listed(browser) == []
    assert browser.find_element(By.ID, "item").text == ""


def test_differences(page):
    browser = page()
    listed(browser)[3].click()
    answers = browser.find_elements(By.CSS_SELECTOR, ".answer")
    assert [a.find_element(By.TAG_NAME, "h4").text for a in answers] == [
        f"θ_{i} ✓ right" for i in range(5)
    ]

    def parts(answer, tag):
        found = answer.find_elements(By.TAG_NAME, tag)
        return "".join("".join(e.get_property("textContent") for e in found).split())

    assert parts(answers[2], "del") == "target3"
    assert parts(answers[2], "ins") == "answer2xxxxxx"
    choose(browser, "against", "before")
    answers = browser.find_elements(By.CSS_SELECTOR, ".answer")
    assert parts(answers[0], "ins") == ""
    assert parts(answers[2], "del") == "1"
    assert parts(answers[2], "ins") == "2xxx"
    choose(browser, "against", "none")
    assert browser.find_elements(By.CSS_SELECTOR, "ins, del") == []


def test_texts_are_shown_as_they_are(page):
    browser = page()
    shown = browser.find_element(By.CSS_SELECTOR, "#item .text").get_property("textContent")
    assert shown == f"{ATTACK} prompt 0"
    assert "a <b> & 'run'" in browser.find_element(By.TAG_NAME, "h1").text


def test_a_link_leads_to_an_item_and_keys_go_on(page):
    browser = page()
    choose(browser, "kind", "right to wrong")
    listed(browser)[1].click()
    address = browser.execute_script("return location.hash")
    browser.get("about:blank")
    browser = page(address)
    assert prompts(browser) == of_kind("11000")
    current = [b.get_attribute("aria-current") for b in listed(browser)]
    assert current == ["false", "true", "false"]
    target = f"prompt {of_kind('11000')[1]}"
    assert browser.find_element(By.CSS_SELECTOR, "#item .text").text.endswith(target)
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys("j")
    body.send_keys("j")  # stays at the last one
    assert listed(browser)[2].get_attribute("aria-current") == "true"
    body.send_keys("k")
    listed(browser)[1].send_keys(Keys.ARROW_UP)
    assert listed(browser)[0].get_attribute("aria-current") == "true"


@pytest.mark.parametrize(
    "fragment", ["#samples/none/x", "#samples/heldout/all/gone", "#%", "#cost"]
)
def test_other_links_lead_to_a_whole_page(page, fragment):
    browser = page(fragment)
    assert len(listed(browser)) == 10


def fits_and_can_be_read(browser, width, scheme):
    """No wider than the window, and with the contrast of WCAG 2, AA."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        wide, luminance = browser.execute_script(
            """
            const of = (colour) => {
              const [r, g, b] = colour.match(/\\d+/g).map((v) => v / 255)
                .map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
              return .2126 * r + .7152 * g + .0722 * b;
            };
            const back = getComputedStyle(document.body).backgroundColor;
            const texts = ['body', '.legend', '.alarms li', '.answer .facts', '.answer .right'];
            return [document.documentElement.scrollWidth,
              [of(back), ...texts.map((s) => document.querySelector(s))
                .filter((e) => e).map((e) => of(getComputedStyle(e).color))]];
            """
        )
        assert wide <= width
        back, *texts = luminance
        assert (back > 0.9) == (scheme == "light")
        assert len(texts) >= 2
        for text in texts:  # WCAG 2, AA
            assert (max(text, back) + 0.05) / (min(text, back) + 0.05) >= 4.5
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(page, width, scheme):
    fits_and_can_be_read(page(), width, scheme)


@pytest.fixture(scope="module")
def other_pages(finished, tmp_path_factory):
    """The pages of a study and of a comparison, with names that try to break out."""
    folder = tmp_path_factory.mktemp("pages")
    study = json.loads((RESULTS / "methods" / "study.json").read_text(encoding="utf-8"))
    study["conditions"] = {f"{ATTACK} {k}": c for k, c in study["conditions"].items()}
    for comparison in study["comparisons"]:
        comparison["condition"] = f"{ATTACK} {comparison['condition']}"
    study |= {"name": ATTACK, "failures": {ATTACK: ATTACK}}
    write_study_page(folder / "study.html", study)
    run = hostile_run(finished[0], folder)
    evaluations = [_read(f"{ATTACK}@{i}", run.evaluation(i)) for i in (0, 2)]
    write_comparison(folder / "comparison.html", compare(evaluations), evaluations)
    return {name: folder / f"{name}.html" for name in ("study", "comparison")}


@pytest.mark.parametrize("name", ["study", "comparison"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_other_pages_fit_and_stay_text(browser, other_pages, name, width, scheme):
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get(other_pages[name].as_uri())
    fits_and_can_be_read(browser, width, scheme)
    nothing_happened(browser, other_pages[name])
    assert "<img src=x onerror" in browser.find_element(By.TAG_NAME, "h1").text


def test_the_answers_of_systems_side_by_side(browser, other_pages):
    browser.get(other_pages["comparison"].as_uri())
    choose(browser, "kind", "wrong to right")
    assert prompts(browser) == [k for k in range(10) if VERDICTS[k % 4][:3:2] == "01"]
    titles = [e.text for e in browser.find_elements(By.CSS_SELECTOR, ".answer h4")]
    assert [title.rpartition("@")[2] for title in titles] == ["0 ✗ wrong", "2 ✓ right"]
    assert len(browser.find_elements(By.CSS_SELECTOR, "svg.chart")) == 1


def test_without_scripts_all_but_the_samples_can_be_read(browser, path):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(path.as_uri())
        text = browser.find_element(By.TAG_NAME, "body").text
        assert "The samples need JavaScript" in text
        assert "held-out problems right" in text
        assert len(browser.find_elements(By.CSS_SELECTOR, "svg.chart")) >= 10
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
