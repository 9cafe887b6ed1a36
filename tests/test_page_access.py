"""The page for everyone: names, contrast, keyboard focus, sizes, dark mode, phone width; axe-core where it is found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.page_browser import PHONE, Page
from tests.page_server import Behaviour

pytestmark = pytest.mark.long
CHECKS = (Path(__file__).parent / "page_checks.js").read_text()
STATIC = ("text_contrast", "border_contrast", "labels", "references", "ids", "headings", "landmarks", "target_size",
          "sideways")
NEEDS_A_NAME = {"button", "link", "textbox", "spinbutton", "combobox", "checkbox", "image", "form", "region",
                "DisclosureTriangle", "searchbox", "option"}
TAB = "\ue004"
LONG = "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen " * 3


def findings(page: Page, check: str) -> list[str]:
    return page.js(CHECKS, check)


def show_everything(page: Page) -> None:
    """Bring the page into a state in which nothing is hidden."""
    page.server.behaviour = Behaviour(layouts=True, models=("small", "a-model-with-a-rather-long-name-" + "x" * 40),
                                      note=f"“{LONG.split()[0]}” is unknown to the model.")
    page.open()
    page.js("document.getElementById('settings').open = true")
    page.find("#layout-on").click()
    page.js("document.getElementById('prompt').value = arguments[0]", LONG)
    page.find("#draw").click()
    page.finished(4)
    page.wait(lambda: page.all("#words button"), "words")
    page.server.behaviour.failures = [(400, "the prompt was refused: " + "x" * 60, {"param": "prompt"})] * 4
    page.find("#again").click()
    page.told("Not drawn")
    page.all("#history button")[0].click()
    page.js("document.querySelectorAll('#key-section, #message, #message-again, #cancel').forEach(e => e.hidden = false)")
    page.js("document.getElementById('message-text').textContent = 'The server is busy.'")
    page.js("document.querySelectorAll('.error').forEach(e => { e.textContent = 'A number is needed here.'; })")


def everywhere(page: Page, checks: tuple[str, ...]) -> dict[str, list[str]]:
    """What the checks find in light and in dark."""
    found = {}
    for scheme in ("light", "dark"):
        page.media(prefers_color_scheme=scheme)
        found |= {f"{check}, {scheme}": findings(page, check) for check in checks}
    return {check: wrong for check, wrong in found.items() if wrong}


def test_nothing_is_wrong_on_the_empty_page(page):
    assert everywhere(page, STATIC) == {}
    assert findings(page, "dark") == []
    page.media(prefers_color_scheme="light")
    assert findings(page, "dark") != []


def test_nothing_is_wrong_when_everything_is_shown(page):
    show_everything(page)
    assert everywhere(page, STATIC) == {}
    page.js("document.getElementById('drop-veil').hidden = false")
    page.js("document.querySelectorAll('.tip').forEach(tip => { tip.style.visibility = 'visible'; })")
    assert everywhere(page, ("text_contrast",)) == {}


def test_nothing_scrolls_sideways_on_a_phone(page):
    show_everything(page)
    for width in (PHONE[0], 320, 768):
        page.size(width, PHONE[1])
        assert {check: findings(page, check) for check in ("sideways", "target_size")} == {
            "sideways": [], "target_size": []}


def test_a_phone_shows_the_pictures_that_are_drawn(page):
    page.size(*PHONE)
    page.open()
    assert not page.find("#seed").is_displayed()  # settings are folded
    page.draw("red cat")
    assert pictures_in_sight(page)
    page.js("scrollTo(0, 0)")
    page.find("#draw").click()  # nothing new to draw
    page.told("the same pictures")
    assert pictures_in_sight(page)
    page.js("scrollTo(0, document.body.scrollHeight)")
    page.find("#history button").click()
    page.told("Brought back")
    assert pictures_in_sight(page)


def pictures_in_sight(page: Page) -> bool:
    top, height = page.js("return [document.getElementById('grid').getBoundingClientRect().top, innerHeight]")
    return 0 <= top < height / 2


def test_a_long_prompt_is_whole_after_the_window_has_changed_and_leaves_draw_in_sight(page):
    page.size(800, PHONE[1])
    page.open()
    page.js("""const prompt = document.getElementById('prompt');
        prompt.value = arguments[0]; prompt.dispatchEvent(new Event('input'))""", LONG)
    page.size(*PHONE)
    page.wait(lambda: page.js("""const {scrollHeight, clientHeight} = document.getElementById('prompt');
        return scrollHeight <= clientHeight"""), "a field of the prompt that holds it")
    page.js("""const prompt = document.getElementById('prompt');
        prompt.value = arguments[0]; prompt.dispatchEvent(new Event('input'))""", "cat " * 500)
    assert page.js("""return document.getElementById('draw').getBoundingClientRect().bottom < innerHeight
        && getComputedStyle(document.getElementById('prompt')).overflowY === 'auto'""")


def test_the_browser_tells_assistive_technology_a_name_for_everything(page):
    show_everything(page)
    page.cdp("Accessibility.enable")
    nodes = [node for node in page.cdp("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles = {node["role"]["value"] for node in nodes}
    assert {"main", "banner", "form", "button", "textbox", "combobox", "spinbutton", "checkbox", "image", "status",
            "alert"} <= roles
    nameless = [node["role"]["value"] for node in nodes if node["role"]["value"] in NEEDS_A_NAME
                and not node.get("name", {}).get("value", "").strip()]
    assert nameless == []


def test_what_has_the_focus_is_seen(page):
    show_everything(page)
    for scheme in ("light", "dark"):
        page.media(prefers_color_scheme=scheme)
        page.js("document.getElementById('skip').focus()")
        rings, seen = [], set()
        for _ in range(70):
            page.keys(TAB)
            here = page.js("""const e = document.activeElement;
                return e === document.body ? '' : (e.id || e.closest('[id]').id) + e.textContent + e.ariaLabel""")
            if not here or here in seen:
                break
            seen.add(here)
            rings += findings(page, "focus_ring")
        assert rings == [] and len(seen) > 25, seen


def test_nothing_moves_where_less_motion_is_wanted(page):
    page.media(prefers_reduced_motion="reduce")
    page.server.behaviour.held = True
    page.type("#prompt", "cat")
    page.keys("\ue007")
    page.wait(lambda: "drawing" in page.states(), "the first part of a picture")
    assert findings(page, "motion") == []
    page.media(prefers_reduced_motion="no-preference")
    assert findings(page, "motion") != []


def test_progress_and_errors_are_announced(page):
    live = page.js("return [...document.querySelectorAll('[role=status], [role=alert]')].map(e => [e.id, e.role])")
    assert ["message-text", "alert"] in live and ["status", "status"] in live
    page.draw("red cat")
    assert page.find("#results").get_attribute("aria-busy") == "false"
    names = [tile.get_attribute("aria-label") for tile in page.all("#grid button")]
    assert names == [f"red cat, seed {int(page.value('seed')) + index}" for index in range(4)]


def test_a_tooltip_shows_on_focus_and_escape_hides_it(page):
    page.draw("red cat")
    page.js("document.getElementById('download').focus()")
    page.keys(TAB)
    tip = page.find("#like-tip")
    page.wait(tip.is_displayed, "the tooltip")
    page.keys("\ue00c")
    page.wait(lambda: not tip.is_displayed(), "no tooltip")


def test_axe_finds_nothing(page):
    candidates = [os.environ.get("AXE_PATH"), "node_modules/axe-core/axe.min.js"]
    script = next((Path(path) for path in candidates if path and Path(path).is_file()), None)
    if script is None:
        pytest.skip("axe-core is not installed (npm install axe-core, or AXE_PATH=axe.min.js)")
    show_everything(page)
    page.js(script.read_text())
    for scheme in ("light", "dark"):
        page.media(prefers_color_scheme=scheme)
        violations = page.js("return axe.run().then(found => found.violations)")
        assert [(one["id"], one["impact"], [node["html"][:120] for node in one["nodes"]]) for one in violations] == []
