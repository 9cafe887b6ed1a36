"""Layouts on the page: painted with the mouse or the keyboard, sent, kept in the address."""

from __future__ import annotations

import pytest
from selenium.webdriver.common.action_chains import ActionChains

from tests.page_server import Behaviour

pytestmark = pytest.mark.long
ENTER, TAB, SPACE = "\ue007", "\ue004", "\ue00d"
RIGHT, DOWN = "\ue014", "\ue015"


def test_layouts_are_painted_sent_and_kept_in_the_address(page):
    assert not page.find("#layout-section").is_displayed()
    page.server.behaviour = Behaviour(layouts=True)
    page.open()
    page.find("#layout-on").click()
    page.find("#layout-editor [aria-label='blue']").click()
    page.all(".layout-cells button")[5].click()
    page.draw("cat")
    expected = [[26] * 4, [26, 2, 26, 26], [26] * 4, [26] * 4]
    assert [body["layout"] for body in page.server.behaviour.requests] == [expected] * 4
    page.server.behaviour.requests.clear()
    page.open(page.hash())
    page.finished(4)
    assert [body["layout"] for body in page.server.behaviour.requests] == [expected] * 4
    page.find("#layout-on").click()
    page.find("#draw").click()
    page.wait(lambda: len(page.server.behaviour.requests) == 8, "four more requests")
    assert "layout" not in page.server.behaviour.requests[-1]


def test_a_layout_is_painted_with_the_keyboard(page):
    page.server.behaviour = Behaviour(layouts=True)
    page.open()
    page.js("document.getElementById('layout-on').focus()")
    page.keys(SPACE, TAB, RIGHT, RIGHT, ENTER, TAB, RIGHT, DOWN, SPACE)
    assert page.js("return document.activeElement.getAttribute('aria-label')") == "row 2, column 2: magenta"


def test_a_layout_is_painted_by_dragging(page):
    page.server.behaviour = Behaviour(layouts=True)
    page.open()
    page.find("#layout-on").click()
    cells = page.all(".layout-cells button")
    ActionChains(page.driver, duration=50).click_and_hold(cells[4]).move_to_element(cells[5]).move_to_element(
        cells[6]).release().perform()
    names = [cell.get_attribute("aria-label").partition(": ")[2] for cell in cells[3:8]]
    assert names == ["white", "red", "red", "red", "white"]
