"""The page and files: pictures that are saved, recipes that are dropped."""

from __future__ import annotations

import base64

import pytest

from tests.page_server import picture, pixels

pytestmark = pytest.mark.long
ENTER = "\ue007"
DROP = """
const [name, text] = arguments;
const bytes = Uint8Array.from(atob(text), character => character.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], name));
for (const type of ['dragover', 'drop']) {
  document.body.dispatchEvent(new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: transfer}));
}
"""


def recipe_body(**values) -> dict[str, object]:
    return {"prompt": "blue bird", "seed": 7, "guidance_scale": 3.5, "temperature": 0.8, "top_k": 20, "top_p": 0.9,
            "model": "small", **values}


def test_a_picture_is_downloaded_as_the_server_sent_it(page, tmp_path):
    page.draw("red cat!")
    page.all("#grid button")[1].click()
    saved = page.download("#download", tmp_path)
    assert saved.read_bytes() == picture(page.server.behaviour.requests[1], 1)
    assert saved.name == f"red-cat-seed{page.server.behaviour.requests[1]['seed']}.png"


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


def test_a_file_without_a_recipe_takes_back_the_try_again_of_another_error(page, tmp_path):
    page.server.behaviour.cut = True
    page.type("#prompt", "red cat")
    page.keys(ENTER)
    page.told("broke off")
    assert page.find("#message-again").is_displayed()
    file = tmp_path / "other.png"
    file.write_bytes(b"GIF89a")
    page.find("#recipe-file").send_keys(str(file))
    page.told("is not a PNG")
    assert not page.find("#message-again").is_displayed()
