"""The report in a real browser: nothing is asked of the network, pointer and keyboard move what they should.

One Chromium for the module; the tests skip where it, its driver or selenium is absent.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from propagation_cases import single_thread
from report_cases import make_runs

from cosettle_cache.cli import run_command

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")

from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

#: A busy machine is no failure.
PATIENCE_S = 60


def find(*names: str) -> str:
    """Return the first program that is there; skip when none is."""
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no {' or '.join(names)} is installed")
    return found


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = find("chromium", "chromium-browser", "google-chrome")
    # Named, so that selenium looks for none and downloads none.
    service = Service(find("chromedriver"))
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=service)
    browser.get("about:blank")
    browser.get_log("performance")  # what Chromium asks of itself for its first tab
    browser.set_page_load_timeout(PATIENCE_S)
    browser.set_script_timeout(PATIENCE_S)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, driver: Any) -> Path:
    root = tmp_path_factory.mktemp("report")
    with single_thread():
        made = make_runs(root)
        explored = ["--features", made.store, "--data-root", made.data_root, "--projection", made.projection]
        line = [
            "report",
            made.scored,
            made.trained,
            made.swept,
            *explored,
            "--out",
            root / "r.html",
            "--quiet",
        ]
        assert run_command(list(map(str, line))) == 0
    return root / "r.html"


@pytest.fixture
def browser(driver: Any, page: Path) -> Any:
    """The browser, at the top of a page that nobody has touched."""
    resize(driver, 1200)
    driver.get(page.as_uri())
    driver.execute_script("localStorage.clear()")
    driver.refresh()
    wait(driver, lambda: driver.execute_script("return document.readyState") == "complete")
    return driver


def resize(driver: Any, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait(driver: Any, happened: Any) -> None:
    WebDriverWait(driver, PATIENCE_S, poll_frequency=0.05).until(lambda _: happened())


def one(driver: Any, selector: str) -> Any:
    return driver.find_element(By.CSS_SELECTOR, selector)


def press(driver: Any, *keys: str) -> None:
    """Press keys where the focus is."""
    ActionChains(driver).send_keys(*keys).perform()


def focus(driver: Any, selector: str) -> Any:
    found = one(driver, selector)
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", found)
    return found


def colour(driver: Any) -> str:
    return str(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))


def test_nothing_is_asked_of_the_network_and_nothing_goes_wrong(browser: Any) -> None:
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    events = [json.loads(item["message"])["message"] for item in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [360, 1200])
def test_no_width_scrolls_sideways(browser: Any, width: int) -> None:
    resize(browser, width)
    browser.execute_script("document.querySelectorAll('details').forEach(item => item.open = true)")
    wait(browser, lambda: browser.execute_script("return innerWidth") == width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_the_button_turns_light_into_dark_and_is_remembered(browser: Any) -> None:
    light = colour(browser)
    button = focus(browser, "#theme")
    press(browser, Keys.ENTER)
    wait(browser, lambda: colour(browser) != light)
    assert button.get_attribute("aria-pressed") == "true"
    browser.refresh()
    wait(browser, lambda: colour(browser) != light)
    one(browser, "#theme").click()
    wait(browser, lambda: colour(browser) == light)


def test_a_head_sorts_its_column_both_ways(browser: Any) -> None:
    cells = "#scores-0 > .scroll tbody tr td:nth-of-type(1)"
    button = one(browser, "#scores-0 > .scroll th:nth-of-type(2) button")

    def values() -> list[float]:
        return [
            float(cell.get_attribute("data-value")) for cell in browser.find_elements(By.CSS_SELECTOR, cells)
        ]

    button.click()
    assert values() == sorted(values())
    assert one(browser, "#scores-0 > .scroll th:nth-of-type(2)").get_attribute("aria-sort") == "ascending"
    button.send_keys(Keys.SPACE)
    assert values() == sorted(values(), reverse=True)


def test_the_slider_moves_all_kinds_of_tokens(browser: Any) -> None:
    images = browser.find_elements(By.CSS_SELECTOR, "[data-overlay=overlay-0-0] img")
    before = [image.get_attribute("src") for image in images]
    assert len(images) == 2
    focus(browser, "[data-overlay=overlay-0-0] input")
    press(browser, Keys.ARROW_RIGHT)
    wait(browser, lambda: one(browser, "[data-overlay=overlay-0-0] .slider output").text == "frame 1")
    after = [image.get_attribute("src") for image in images]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert all("frame 1" in image.get_attribute("alt") for image in images)


def test_play_goes_round_until_it_is_paused(browser: Any) -> None:
    button = one(browser, "[data-overlay=overlay-0-0] button.play")
    output = one(browser, "[data-overlay=overlay-0-0] .slider output")
    browser.execute_script("arguments[0].click()", button)
    for frame in ("frame 5", "frame 0"):
        wait(browser, lambda frame=frame: output.text == frame)
    browser.execute_script("arguments[0].click()", button)
    assert button.text == "Play" and button.get_attribute("aria-pressed") == "false"


def test_charts_are_legible_on_light_and_on_dark(browser: Any) -> None:
    script = """
        const texts = [...document.querySelectorAll(".chart text")];
        const sizes = texts.map((item) => item.getBoundingClientRect().height);
        return [Math.min(...sizes), [...new Set(texts.map((item) => getComputedStyle(item).fill))],
            getComputedStyle(document.body).color];
    """
    least, light, ink = browser.execute_script(script)
    assert least > 8 and ink in light
    one(browser, "#theme").click()
    _, dark, pale = browser.execute_script(script)
    assert pale != ink and pale in dark and ink not in dark


def explored(browser: Any) -> Any:
    """Return the first explorer, drawn."""
    figure = one(browser, "[data-explorer]")
    wait(browser, lambda: figure.get_attribute("data-ready") == "yes")
    return figure


def drawn(browser: Any) -> list[str]:
    """Return what stands on the canvases of the first explorer, the picked one first."""
    script = (
        "return [...document.querySelectorAll('[data-explorer=explorer-0] canvas')].map(c => c.toDataURL())"
    )
    return list(browser.execute_script(script))


def test_a_click_picks_a_patch(browser: Any) -> None:
    figure = explored(browser)
    before = drawn(browser)
    pick = focus(browser, "[data-explorer] canvas.pick")
    box = pick.size
    place = round(0.42 * box["width"]), round(0.1 * box["height"])
    ActionChains(browser).move_to_element_with_offset(pick, *place).click().perform()
    wait(browser, lambda: figure.get_attribute("data-patch") == str(2 * 6 + 5))
    assert all(old != new for old, new in zip(before, drawn(browser), strict=True))
    readings = [item.text for item in figure.find_elements(By.CSS_SELECTOR, ".views output")]
    assert readings[0] == "row 3, column 6"
    # Tokens of the squares are their labels: object 2, in the last column of the lower half, walks left.
    assert (
        readings[1].startswith("nearest: row") and "column 5" in readings[1] and "cosine 1.000" in readings[1]
    )


def test_arrow_keys_move_the_patch_and_page_keys_the_frame(browser: Any) -> None:
    figure = explored(browser)
    focus(browser, "[data-explorer] canvas.pick")
    patch = int(figure.get_attribute("data-patch"))
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_UP)
    wait(browser, lambda: int(figure.get_attribute("data-patch")) == patch + 1 + 6)
    press(browser, *6 * [Keys.ARROW_LEFT])
    wait(browser, lambda: int(figure.get_attribute("data-patch")) % 6 == 0)
    before = drawn(browser)
    press(browser, Keys.PAGE_DOWN)
    output = figure.find_element(By.CSS_SELECTOR, ".slider output")
    wait(browser, lambda: output.text == "frame 2")
    after = drawn(browser)
    assert after[0] == before[0] and after[1] != before[1] and after[2] != before[2]


def test_the_map_is_chosen(browser: Any) -> None:
    explored(browser)
    reading = browser.find_elements(By.CSS_SELECTOR, "[data-explorer] .views output")[1]
    assert "largest weight" in reading.text
    Select(focus(browser, "[data-explorer] select")).select_by_visible_text("cosine")
    wait(browser, lambda: "cosines from" in reading.text and "weight" not in reading.text)


def test_maps_in_the_page_are_those_of_the_tokens(browser: Any) -> None:
    explored(browser)
    script = """
        const done = arguments[0];
        const data = JSON.parse(document.getElementById("data-explorer-0").textContent);
        report.affinity.unpack(data.kinds[0]).then((kind) => {
            const values = report.affinity.cosines(kind, 24, 0, 1);
            const soft = report.affinity.soften(values, 0.1);
            done([[...values], soft.reduce((a, b) => a + b, 0), report.affinity.half(soft)]);
        });
    """
    cosines, total, half = browser.execute_async_script(script)
    # Object 1 fills the upper half of column 0 in frame 0, of column 1 in frame 1: two patches of 24.
    assert [round(value, 2) for value in cosines] == [float(patch in (1, 7)) for patch in range(24)]
    assert abs(total - 1) < 1e-5
    assert half == 2


def test_what_can_be_used_can_be_reached_and_has_a_name(browser: Any) -> None:
    script = """
        const used = [...document.querySelectorAll("button, input, select, a, summary, [role=application]")];
        return used.filter((item) => item.tabIndex < 0 || !(
            item.getAttribute("aria-label") || item.textContent.trim() || item.labels?.length)).length;
    """
    assert browser.execute_script(script) == 0
    focus(browser, "[data-explorer] canvas.pick")
    press(browser, Keys.ARROW_UP)
    outline = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
