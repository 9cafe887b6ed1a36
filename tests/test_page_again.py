"""Pressing Draw, Enter or Try again once more: nothing that is drawn or typed is thrown away."""

from __future__ import annotations

import pytest

from tests.page_browser import Page
from tests.page_server import Behaviour

pytestmark = pytest.mark.long
ENTER = "\ue007"


def prompts(page: Page) -> list[str]:
    return [str(body["prompt"]) for body in page.server.behaviour.requests]


def test_pressing_draw_twice_goes_on_with_what_is_drawn(page):
    page.server.behaviour.held = True
    page.type("#prompt", "red cat")
    page.keys(ENTER, ENTER, ENTER)
    page.wait(lambda: "drawing" in page.states(), "the first part of a picture")
    page.find("#draw").click()
    page.server.behaviour.held = False
    page.finished(4)
    assert len(prompts(page)) == 4 and page.server.behaviour.cancelled == 0


def test_drawing_after_a_cancel_draws_what_is_missing(page):
    page.server.behaviour.failures = [(429, "the queue is full", {"retry_after": 60})]
    page.type("#prompt", "red cat")
    page.keys(ENTER)
    page.wait(lambda: page.states().count("done") == 3, "three pictures")
    page.find("#cancel").click()
    page.wait(lambda: page.all("#history button"), "the history")
    page.find("#draw").click()
    page.wait(lambda: len(prompts(page)) > 4, "one more request")
    page.finished(4)
    page.told("All 4 pictures are finished.")
    assert len(prompts(page)) == 5 and len(page.all("#history button")) == 1


def test_an_escape_that_ends_the_input_of_a_character_cancels_nothing(page):
    page.server.behaviour.held = True
    page.type("#prompt", "slow cat")
    page.keys(ENTER)
    page.wait(lambda: "drawing" in page.states(), "the first part of a picture")
    page.js("""document.getElementById('prompt').dispatchEvent(
        new KeyboardEvent('keydown', {key: 'Escape', isComposing: true, bubbles: true}))""")
    assert page.find("#cancel").is_displayed()
    page.server.behaviour.held = False
    page.finished(4)


def test_parts_of_a_cancelled_run_are_let_go(page):
    page.js("""window.live = new Set();
        const [create, revoke] = [URL.createObjectURL, URL.revokeObjectURL];
        URL.createObjectURL = blob => { const url = create(blob); live.add(url); return url; };
        URL.revokeObjectURL = url => { live.delete(url); revoke(url); };""")
    page.server.behaviour.held = True
    page.type("#prompt", "red cat")
    page.keys(ENTER)
    page.wait(lambda: page.states() == ["drawing"] * 4, "the first part of each picture")
    page.find("#cancel").click()
    page.wait(lambda: page.states() == ["cancelled"] * 4, "the end of the run")
    page.server.behaviour.held = False
    page.draw("blue dog")
    assert page.js("return live.size") == 4


@pytest.mark.parametrize("address", ["", "#/?prompt=blue+dog&seed=5&count=2"])
def test_trying_again_after_a_failed_start_draws_what_was_typed(page, address):
    page.server.behaviour = Behaviour(models_failure=True)
    page.open(address)
    page.told("The server failed.")
    page.type("#prompt", "red cat")
    page.server.behaviour.models_failure = False
    page.find("#message-again").click()
    page.finished(4)
    assert prompts(page) == ["red cat"] * 4
