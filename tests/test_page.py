"""The page of `tokenloom serve` in a real Chromium: drawing, address, words, history, recipes, layouts."""

from __future__ import annotations

import base64
import io
from urllib.parse import parse_qs

import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains

from tests.page_browser import Page
from tests.page_server import Behaviour, picture

pytestmark = pytest.mark.long
ESCAPE, ENTER, TAB, SPACE = "\ue00c", "\ue007", "\ue004", "\ue00d"
RIGHT, DOWN = "\ue014", "\ue015"
WATCH = """
window.seen = [new Set(), new Set(), new Set(), new Set()];
new MutationObserver(() => document.querySelectorAll('#grid img').forEach((image, index) =>
  window.seen[index].add(image.src))).observe(document.body, {subtree: true, childList: true, attributes: true});
"""
DROP = """
const [name, text] = arguments;
const bytes = Uint8Array.from(atob(text), character => character.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], name));
for (const type of ['dragover', 'drop']) {
  document.body.dispatchEvent(new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: transfer}));
}
"""


def address(page: Page) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(page.hash().partition("?")[2]).items()}


def recipe_body(**values) -> dict[str, object]:
    return {"prompt": "blue bird", "seed": 7, "guidance_scale": 3.5, "temperature": 0.8, "top_k": 20, "top_p": 0.9,
            "model": "small", **values}


def pixels(file: bytes) -> bytes:
    return Image.open(io.BytesIO(file)).convert("RGBA").tobytes()


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
    steps = page.js("return history.length")
    page.js("location.hash = '#/?prompt=cat'")
    page.wait(lambda: "seed" in address(page) and address(page)["prompt"] == "cat", "the whole address")
    page.finished(4)
    assert {name: address(page)[name] for name in ("count", "guidance", "top_p")} == {
        "count": "4", "guidance": "2", "top_p": "1"}
    assert page.js("return history.length") == steps + 1


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


def test_variations_never_switch_off_what_a_negative_prompt_needs(page):
    variations = page.js("""
        return import('/page/drawing.js').then(({variationsOf}) =>
          variationsOf({guidance: '1.25', temperature: '0', negative: 'blue', count: '8'}))""")
    assert len(variations) >= 8
    assert {"guidance": "1"} not in variations and {"temperature": "0"} not in variations
    assert all(float(value) >= 0 for changed in variations for value in changed.values())
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


# ---- history and files


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


def test_a_picture_is_downloaded_as_the_server_sent_it(page, tmp_path):
    page.draw("red cat!")
    page.all("#grid button")[1].click()
    saved = page.download("#download", tmp_path)
    assert saved.read_bytes() == picture(asked(page)[1], 1)
    assert saved.name == f"red-cat-seed{asked(page)[1]['seed']}.png"


@pytest.mark.parametrize("body", [recipe_body(), recipe_body(seed=9007199254740993, negative_prompt="grün"),
                                  recipe_body(prompt='two\nlines "seed": 5 \\')])
def test_a_dropped_picture_fills_the_form(page, body, tmp_path):
    file = tmp_path / "bird.png"
    file.write_bytes(picture(body, 1))
    page.find("#recipe-file").send_keys(str(file))
    page.told("The recipe of bird.png is filled in")
    filled = {name: page.value(name) for name in ("prompt", "seed", "negative", "guidance", "temperature", "top_k",
                                                  "top_p")}
    assert filled == {"prompt": body["prompt"], "seed": str(body["seed"]), "guidance": "3.5", "temperature": "0.8",
                      "top_k": "20", "top_p": "0.9", "negative": body.get("negative_prompt", "")}
    page.find("#draw").click()
    page.finished(4)
    assert page.pictures()[0] == pixels(file.read_bytes())


def test_a_file_may_be_dropped_anywhere(page):
    page.js(DROP, "bird.png", base64.b64encode(picture(recipe_body(), 1)).decode())
    page.told("The recipe of bird.png is filled in")
    assert page.value("prompt") == "blue bird"


@pytest.mark.parametrize(("content", "says"), [(b"GIF89a", "is not a PNG"), (None, "carries no recipe")])
def test_a_file_without_a_recipe_is_said_and_the_form_stays(page, content, says, tmp_path):
    page.type("#prompt", "cat")
    file = tmp_path / "other.png"
    file.write_bytes(content or picture(recipe_body(), 1).replace(b"tokenloom\0", b"parameter\0"))
    page.find("#recipe-file").send_keys(str(file))
    page.told(says)
    assert page.value("prompt") == "cat"


@pytest.mark.parametrize(("values", "says"), [
    ({"model_fingerprint": "other"}, "another model (small)"), ({"min_p": 0.2}, "another min p"),
    ({"model_fingerprint": "other", "model": None}, "another model (the one that ships with Tokenloom)"),
    ({"model": "gone"}, "There is no model “gone” here: “small” draws instead."),
    ({"weights": "int8"}, "another weights")])
def test_a_recipe_that_will_give_another_picture_is_said(page, values, says, tmp_path):
    file = tmp_path / "bird.png"
    file.write_bytes(picture(recipe_body(), 1, **values))
    page.find("#recipe-file").send_keys(str(file))
    page.told(says)


# ---- layouts


def test_layouts_are_painted_sent_and_kept_in_the_address(page):
    assert not page.find("#layout-section").is_displayed()
    page.server.behaviour = Behaviour(layouts=True)
    page.open()
    page.find("#layout-on").click()
    page.find("#layout-editor [aria-label='blue']").click()
    page.all(".layout-cells button")[5].click()
    page.draw("cat")
    expected = [[26] * 4, [26, 2, 26, 26], [26] * 4, [26] * 4]
    assert [body["layout"] for body in asked(page)] == [expected] * 4
    page.server.behaviour.requests.clear()
    page.open(page.hash())
    page.finished(4)
    assert [body["layout"] for body in asked(page)] == [expected] * 4
    page.find("#layout-on").click()
    page.find("#draw").click()
    page.wait(lambda: len(asked(page)) == 8, "four more requests")
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
