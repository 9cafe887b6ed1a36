"""Errors of the server and of the network, as the page says them; nothing that was typed is lost."""

from __future__ import annotations

import pytest

from inference.serving.errors import as_api_error, invalid, refused, too_late
from tests.page_browser import Page
from tests.page_server import Behaviour
from tokenloom_common.errors import UserError

pytestmark = pytest.mark.long
ENTER = "\ue007"


def start(page: Page, prompt: str = "red cat") -> None:
    page.type("#negative", "blue")
    page.type("#prompt", prompt)
    page.keys(ENTER)


def kept(page: Page) -> bool:
    return (page.value("prompt"), page.value("negative")) == ("red cat", "blue")


def test_a_busy_server_is_said_and_asked_again_by_itself(page):
    page.server.behaviour.failures = [(429, "the queue is full", {"retry_after": 1})] * 4
    start(page)
    page.told("The server is busy. Trying again by itself.")
    assert "Trying again in 1 s" in page.text("#message-wait")
    page.finished(4)
    assert not page.find("#message").is_displayed() and len(page.server.behaviour.requests) == 8


def test_waiting_for_a_busy_server_can_be_cancelled(page):
    page.server.behaviour.failures = [(429, "the queue is full", {"retry_after": 60})] * 4
    start(page)
    page.told("busy")
    page.find("#cancel").click()
    page.told("Cancelled")
    assert not page.find("#message").is_displayed() and kept(page)


@pytest.mark.parametrize(("status", "says"), [
    (504, "Drawing took longer than the server allows. Not finished within 120 s"), (500, "The server failed.")])
def test_a_failure_is_said_and_trying_again_draws_what_is_missing(page, status, says):
    page.server.behaviour.failures = [(status, "not finished within 120 s", {})] * 2
    start(page)
    page.told(says)
    assert sorted(page.states()) == ["done", "done", "failed", "failed"] and kept(page)
    page.find("#message-again").click()
    page.finished(4)
    assert len(page.server.behaviour.requests) == 6 and not page.find("#message").is_displayed()


def test_a_refused_prompt_is_said_at_the_prompt(page):
    page.server.behaviour.failures = [(400, "the prompt was refused (violence)", {"param": "prompt"})] * 4
    start(page)
    page.told("Not drawn. The prompt was refused (violence).")
    assert page.text("#prompt-error") == "the prompt was refused (violence)" and kept(page)
    assert not page.find("#message-again").is_displayed()
    page.type("#prompt", "blue cat")
    assert page.text("#prompt-error") == ""


def test_a_server_that_is_gone_is_said_and_comes_back(page):
    page.offline(True)
    start(page)
    page.told("The server does not answer. Is “tokenloom serve” still running? What you typed is still here.")
    assert kept(page)
    page.offline(False)
    page.find("#message-again").click()
    page.finished(4)


def test_a_page_opened_while_the_server_has_no_models_yet_draws_its_address_later(page):
    start(page)
    page.finished(4)
    address = page.hash()
    page.server.behaviour = Behaviour(models_failure=True)
    page.open(address)
    page.told("The server failed.")
    assert page.server.behaviour.requests == []
    page.server.behaviour.models_failure = False
    page.find("#message-again").click()
    page.finished(4)
    assert kept(page)


def test_a_stream_that_breaks_off_is_no_finished_picture(page):
    page.server.behaviour.cut = True
    start(page)
    page.told("The connection broke off before the picture was finished.")
    assert set(page.states()) == {"failed"} and kept(page)
    assert not page.find("#download").is_displayed()


@pytest.mark.parametrize(("error", "says", "again"), [
    (refused("the safety filter refused the images of seeds 3 (nudity)"),
     "Not drawn. The safety filter refused the images of seeds 3 (nudity).", False),
    (too_late(120), "Drawing took longer than the server allows. Not finished within 120 s", True),
    (invalid(UserError("the layout does not fit")), "Not drawn. The layout does not fit.", False),
    (as_api_error(RuntimeError("a bug")), "The server failed; its log has the reason", True)])
def test_an_error_within_a_stream_is_said_as_that_of_a_reply(page, error, says, again):
    page.server.behaviour.late_error = error
    start(page)
    page.told(says)
    assert page.text("#message-text").startswith(says)
    assert set(page.states()) == {"failed"} and page.find("#message-again").is_displayed() == again


def test_the_key_is_asked_for_only_when_the_server_wants_one(page):
    assert not page.find("#key").is_displayed()
    page.server.behaviour.key = "sesame"
    start(page)
    page.told("The server asks for a key.")
    page.wait(lambda: page.js("return document.activeElement.id") == "key", "the field of the key")
    page.keys("wrong", ENTER)
    page.wait(lambda: len(page.server.behaviour.keys) > 4, "the wrong key to be tried")
    page.wait(lambda: page.find("#key").is_displayed(), "the field of the key")
    page.type("#key", "sesame")
    page.find("#use-key").click()
    page.finished(4)
    assert kept(page) and not page.find("#key").is_displayed()
    address = page.hash()
    page.open(address)  # kept in the tab
    page.finished(4)
    assert "sesame" not in page.hash() and page.js("return localStorage.length") == 0


def test_a_key_that_cannot_be_sent_is_said_at_its_field(page):
    page.server.behaviour.key = "sesame"
    start(page)
    page.wait(lambda: page.find("#key").is_displayed(), "the field of the key")
    sent = len(page.server.behaviour.keys)
    for wrong in ("“sesame”", "open sesame", ""):
        page.type("#key", wrong)
        page.keys(ENTER)
        page.reads("#key-error", "A key is letters, digits and signs")
        assert page.js("return document.activeElement.id") == "key"
        page.js("document.getElementById('key-error').textContent = ''")
    assert len(page.server.behaviour.keys) == sent
    page.type("#key", "sesame")
    page.keys(ENTER)
    page.finished(4)
    assert page.find("#key").get_attribute("aria-invalid") == "false"


def test_a_page_opened_without_the_key_draws_its_address_once_it_has_it(page):
    page.server.behaviour.key = "sesame"
    page.open("#/?prompt=red+cat&seed=5&count=2")
    page.wait(lambda: page.find("#key").is_displayed(), "the field of the key")
    page.type("#key", "sesame")
    page.keys(ENTER)
    page.finished(2)
    assert sorted(body["seed"] for body in page.server.behaviour.requests) == [5, 6]


def test_what_was_drawn_instead_of_an_unknown_word_is_said(page):
    page.server.behaviour.note = "“kitteh” is unknown to the model."
    start(page)
    page.finished(4)
    assert page.text("#note") == "“kitteh” is unknown to the model. Drawn as “cat”."
    page.wait(lambda: page.all("#words button"), "words")
    assert [button.text for button in page.all("#words button")] == ["cat"]


def test_an_address_that_cannot_be_drawn_says_why(page):
    page.open("#/?prompt=cat&top_p=7")
    page.reads("#top_p-error", "A number")
    page.open("#/?prompt=cat&count=many&layout=a.b-c&seed=x")
    page.reads("#seed-error", "A seed is")
    assert page.server.behaviour.requests == []


def test_the_focus_is_not_lost_when_what_has_it_disappears(page):
    page.server.behaviour.failures = [(500, "failed", {})] * 4
    start(page)
    page.told("The server failed.")
    page.js("document.getElementById('message-again').focus()")
    page.keys(ENTER)
    page.finished(4)
    assert page.js("return document.activeElement.id") == "draw"


def test_more_like_this_leaves_the_focus_on_the_selected_picture(page):
    start(page)
    page.finished(4)
    page.js("document.getElementById('like').focus()")
    page.keys(ENTER)
    page.finished(4)
    assert page.js("return document.activeElement === document.querySelector('#grid [aria-pressed=true]')")


def test_the_focus_stays_on_a_run_when_another_joins_the_history(page):
    page.draw("blue dog")
    page.server.behaviour.failures = [(429, "the queue is full", {"retry_after": 60})]
    page.type("#prompt", "red cat")
    page.keys(ENTER)
    page.wait(lambda: page.states().count("done") == 3, "three pictures")
    page.js("document.querySelector('#history button').focus()")
    page.keys(ENTER)  # ends the other run, which joins the history
    page.wait(lambda: len(page.all("#history button")) == 2, "the other run")
    assert "blue dog" in page.js("return document.activeElement.ariaLabel ?? ''")
