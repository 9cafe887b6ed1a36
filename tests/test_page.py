"""The page of `tokenloom serve` in a real Chromium: drawing, address, words, history, the keyboard."""

from __future__ import annotations

from urllib.parse import parse_qs

import pytest

from tests.page_browser import Page
from tests.page_server import picture, pixels

pytestmark = pytest.mark.long
ESCAPE, ENTER, TAB, SPACE = "\ue00c", "\ue007", "\ue004", "\ue00d"
RIGHT, DOWN = "\ue014", "\ue015"
WATCH = """
window.seen = [new Set(), new Set(), new Set(), new Set()];
new MutationObserver(() => document.querySelectorAll('#grid img').forEach((image, index) =>
  window.seen[index].add(image.src))).observe(document.body, {subtree: true, childList: true, attributes: true});
"""


def address(page: Page) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(page.hash().partition("?")[2]).items()}


def asked(page: Page) -> list[dict[str, object]]:
    """The requests so far, in the order of their seeds."""
    return sorted(page.server.behaviour.requests, key=lambda body: body["seed"])


# ---- drawing


def test_four_pictures_grow_and_end(page):
    page.js(WATCH)
    page.draw("red cat on a mat")
    assert page.js("return window.seen.map(urls => urls.size)") == [4, 4, 4, 4]
    assert page.text("#status") == "All 4 pictures are finished."
    first = int(page.value("seed"))
    assert [body["seed"] for body in asked(page)] == [first, first + 1, first + 2, first + 3]
    assert all(body["n"] == 1 and body["stream"] and body["partial_images"] == 3 for body in asked(page))
    assert page.pictures() == [pixels(picture(body, 1)) for body in asked(page)]


def test_an_example_is_drawn_by_a_click(page):
    chip = page.all("#examples button")[1]
    chip.click()
    page.finished(4)
    assert asked(page)[0]["prompt"] == chip.text == page.value("prompt")


def test_the_address_draws_the_same(page):
    page.type("#negative", "blue & green? 100%")
    page.type("#temperature", "0.7")
    page.draw("ein Kätzchen 🐈 + “Hut”")
    before, shown, drawn = asked(page), page.pictures(), page.hash()
    page.server.behaviour.requests.clear()
    page.open(drawn)
    page.finished(4)
    assert asked(page) == before
    assert page.pictures() == shown
    assert page.hash() == drawn
    assert (page.value("negative"), page.value("temperature")) == ("blue & green? 100%", "0.7")


def test_an_address_of_a_prompt_alone_gets_the_rest_without_a_step_for_the_back_button(page):
    page.draw("dog")
    dog = page.hash()
    page.js("location.hash = '#/?prompt=cat'")
    page.wait(lambda: "seed" in address(page) and address(page)["prompt"] == "cat", "the whole address")
    page.finished(4)
    assert {name: address(page)[name] for name in ("count", "guidance", "top_p")} == {
        "count": "4", "guidance": "2", "top_p": "1"}
    page.driver.back()
    page.wait(lambda: page.hash() == dog, "the address before")


def test_again_takes_a_new_seed_and_nothing_else(page):
    page.draw("cat")
    first = asked(page)[0]
    page.server.behaviour.requests.clear()
    page.find("#again").click()
    page.finished()
    again = asked(page)[0]
    assert again["seed"] != first["seed"] and {**again, "seed": 0} == {**first, "seed": 0}
    assert address(page)["seed"] == str(again["seed"])


def test_more_like_this_seed_keeps_it_and_changes_guidance_and_temperature(page):
    page.draw("cat")
    page.all("#grid button")[2].click()
    seed = asked(page)[2]["seed"]
    page.server.behaviour.requests.clear()
    page.find("#like").click()
    page.finished(4)
    drawn = {(body["guidance_scale"], body["temperature"]) for body in asked(page)}
    assert drawn == {(2.5, 1), (2, 1.1), (1.6, 1), (2, 0.9)}
    assert {body["seed"] for body in asked(page)} == {seed}
    assert address(page)["vary"] == "1"

    page.server.behaviour.requests.clear()
    page.open(page.hash())
    page.finished(4)
    assert {(body["guidance_scale"], body["temperature"]) for body in asked(page)} == drawn


@pytest.mark.parametrize("guidance", ["0.8", "1.25", "100"])
@pytest.mark.parametrize("temperature", ["0", "100"])
def test_variations_are_what_the_server_takes_with_a_negative_prompt(page, guidance, temperature):
    variations = page.js("""
        const [guidance, temperature] = arguments;
        return import('/page/drawing.js').then(({variationsOf}) =>
          variationsOf({guidance, temperature, negative: 'blue', count: '8'}))""", guidance, temperature)
    assert len(variations) >= 8
    assert {"guidance": "1"} not in variations and {"temperature": temperature} not in variations
    assert all(0 <= float(value) <= 100 for changed in variations for value in changed.values())
    assert len({tuple(changed.items()) for changed in variations}) == len(variations)


def test_escape_cancels_what_is_drawn_and_keeps_what_is_typed(page):
    page.server.behaviour.held = True
    page.type("#prompt", "slow cat")
    page.keys(ENTER)
    page.wait(lambda: "drawing" in page.states(), "the first part of a picture")
    page.keys(ESCAPE)
    page.told("Cancelled")
    page.wait(lambda: page.server.behaviour.cancelled == 4, "four requests to end")
    assert set(page.states()) == {"cancelled"} and page.value("prompt") == "slow cat"
    assert not page.find("#cancel").is_displayed()


def test_unchanged_settings_are_not_drawn_twice(page):
    page.draw("cat")
    page.find("#draw").click()
    page.told("the same pictures")
    assert len(asked(page)) == 4


def test_a_seed_keeps_all_its_digits(page):
    page.type("#seed", "9007199254740993")
    page.draw("cat")
    assert [body["seed"] for body in asked(page)] == [9007199254740993 + index for index in range(4)]


def test_a_wrong_value_is_said_at_its_field_and_nothing_is_sent(page):
    page.type("#prompt", "cat")
    page.type("#seed", "5")
    for name, value, says in [
            ("count", "0", "A whole number, 1 to 8."), ("count", "1.5", "A whole number, 1 to 8."),
            ("guidance", "", "A number is needed here."),
            ("top_k", "1.5", "A whole number of at least 0."), ("top_p", "1.5", "A number, above 0, up to 1."),
            ("top_p", "0", "A number, above 0, up to 1."), ("seed", "-1", "A seed is a whole number"),
            ("seed", "9223372036854775800", "A seed is a whole number from 0 to"), ("prompt", "", "Say what")]:
        before = page.value(name)
        page.type(f"#{name}", value)
        page.find("#draw").click()
        page.reads(f"#{name}-error", says)
        assert page.js("return document.activeElement.id") == name
        assert page.find(f"#{name}").get_attribute("aria-invalid") == "true"
        page.type(f"#{name}", before)
    assert asked(page) == []


def test_a_prompt_is_shown_as_text(page):
    page.draw("<b>cat</b><img src=x>")
    assert page.all("#words img, #words b, #history b") == []
    assert page.text("#words") == "<b>cat</b><img src=x>"


def test_the_model_is_chosen_where_there_are_several(page):
    assert not page.find("#model").is_displayed()
    page.server.behaviour.models = ("small", "large")
    page.open()
    page.type("#temperature", "0.5")
    page.js("const m = document.getElementById('model'); m.value = 'large'; m.dispatchEvent(new Event('change'))")
    assert (page.value("guidance"), page.value("temperature")) == ("5", "0.5")  # what was typed stays
    page.draw("cat")
    assert {body["model"] for body in asked(page)} == {"large"} and address(page)["model"] == "large"


# ---- words


def test_a_word_shows_what_it_painted(page):
    page.draw("red cat")
    page.wait(lambda: len(page.all("#words button")) == 2, "words")
    red, cat = page.all("#words button")
    page.hover(red)
    page.wait(lambda: page.all("#stage canvas[data-word=red]"), "heat")
    assert page.text("#word-place") == "“red” painted mostly at the top left"
    assert heat(page, 0.1) < heat(page, 0.9)  # dark where it did not paint
    page.hover(cat)
    page.wait(lambda: page.all("#stage canvas[data-word=cat]"), "the other word")
    assert page.text("#word-place") == "“cat” painted mostly at the top right"
    assert heat(page, 0.1) > heat(page, 0.9)
    page.hover(page.find("h1"))
    page.wait(lambda: not page.all(".frame canvas"), "the pictures without heat")
    page.all("#grid button")[1].click()
    page.wait(lambda: len(page.server.behaviour.word_requests) == 2, "the other picture's words")
    page.all("#grid button")[0].click()
    page.wait(lambda: page.all("#words button"), "words")
    assert set(page.server.behaviour.word_requests.values()) == {1}


def heat(page: Page, across: float) -> int:
    """How opaque the heat of the selected picture is at its upper edge."""
    return page.js("""const canvas = document.querySelector('#stage canvas');
        return canvas.getContext('2d').getImageData(arguments[0] * canvas.width, 10, 1, 1).data[3]""", across)


def test_a_tapped_word_stays_and_a_second_tap_ends_it(page):
    page.draw("red cat")
    page.wait(lambda: page.all("#words button"), "words")
    page.find("#words button").click()
    page.hover(page.find("h1"))
    page.wait(lambda: page.all("#stage canvas[data-word=red]"), "heat")
    assert page.find("#words button").get_attribute("aria-pressed") == "true"
    page.find("#words button").click()
    page.hover(page.find("h1"))
    page.wait(lambda: not page.all(".frame canvas"), "the picture without heat")


def test_words_are_found_behind_characters_that_javascript_counts_twice(page):
    page.draw("🐈🐈 red cat")
    page.wait(lambda: len(page.all("#words button")) == 3, "words")
    assert [button.text for button in page.all("#words button")] == ["🐈🐈", "red", "cat"]


def test_words_that_the_server_has_forgotten_are_said(page):
    page.server.behaviour.forget = True
    page.draw("red cat")
    page.reads("#words-hint", "no longer keeps")
    page.server.behaviour.forget = False
    page.find("#draw").click()  # as the hint says
    page.wait(lambda: len(page.all("#words button")) == 2, "words")
    assert len(asked(page)) == 5 and page.states() == ["done"] * 4


# ---- history


def test_the_history_brings_a_run_back_without_drawing_it(page):
    page.draw("red cat")
    first, shown = page.hash(), page.pictures()
    page.draw("blue dog")
    assert len(page.all("#history button")) == 2
    requests = len(asked(page))
    page.all("#history button")[1].click()
    page.told("Brought back")
    assert (page.value("prompt"), page.hash(), page.pictures()) == ("red cat", first, shown)
    page.driver.back()
    page.wait(lambda: page.value("prompt") == "blue dog", "the run before")
    assert len(asked(page)) == requests


# ---- the keyboard alone


def test_everything_is_reached_with_the_keyboard_alone(page):
    page.js("document.activeElement.blur()")
    page.keys(TAB, TAB, "red cat", ENTER)
    page.finished(4)
    page.wait(lambda: page.all("#words button"), "words")
    reached = []
    for _ in range(60):
        page.keys(TAB)
        reached.append(page.js("const e = document.activeElement; return e.id || e.closest('[id]').id"))
        if reached[-1] == "history":
            break
    assert {"again", "negative", "seed", "guidance", "recipe-file", "grid", "words", "download", "like",
            "history"} <= set(reached)
    # one stop each for pictures and words: arrow keys move inside
    assert (reached.count("grid"), reached.count("words")) == (1, 1)

    page.js("document.querySelector('#grid button').focus()")
    page.keys(RIGHT, DOWN, ENTER)
    assert page.all("#grid button")[3].get_attribute("aria-pressed") == "true"
    page.wait(lambda: page.all("#words button"), "words")
    page.keys(TAB, RIGHT)
    page.wait(lambda: page.all("#stage canvas[data-word=cat]"), "heat of the focused word")
    page.keys(TAB, TAB, ENTER)
    page.finished(4)
    assert address(page)["vary"] == "1"
