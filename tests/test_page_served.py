"""The page before the real server: a tiny model, and, when asked, the docs' picture of a trained one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from inference.image_files.read import read_recipe
from inference.serving.engine import Engine
from inference.serving.engine.models import Models
from tests import tiny
from tests.page_browser import WINDOW
from tests.serving_http import running

pytestmark = pytest.mark.long
SCREENSHOT = "TOKENLOOM_SCREENSHOT"
MODEL = "TOKENLOOM_SCREENSHOT_MODEL"
PROMPT = "TOKENLOOM_SCREENSHOT_PROMPT"
WORD = "TOKENLOOM_SCREENSHOT_WORD"


def test_the_real_server_draws_for_the_page(page, tmp_path):
    folder = tiny.model_folder(tmp_path / "tiny", layout_kind="colors", layout_classes=27, layout_grid=(2, 2))
    engine = Engine(Models({"tiny": folder}))
    engine.start()
    with running(engine) as served:
        page.open(url=served.url + "/")
        page.type("#seed", "9007199254740993")
        page.type("#negative", "blue circle")
        page.find("#layout-on").click()
        page.all(".layout-cells button")[1].click()
        page.draw("a red octopus")
        page.wait(lambda: len(page.all("#words button")) == 3, "words")
        page.hover(page.all("#words button")[2])
        page.wait(lambda: page.all("#stage canvas[data-word=octopus]"), "heat")
        assert "“octopus” painted" in page.text("#word-place")

        saved = page.download("#download", tmp_path)
        recipe = read_recipe(saved.read_bytes(), saved.name)
        assert (recipe.prompt, recipe.seed, recipe.negative_prompt) == ("a red octopus", 9007199254740993, "blue circle")
        assert recipe.extra["layout"] == [26, 18, 26, 26]

        # in a new page, its file alone draws it again
        shown = page.pictures()[0]
        page.open(url=served.url + "/")
        page.find("#recipe-file").send_keys(str(saved))
        page.reads("#status", "is filled in; Draw makes it again.")
        page.find("#draw").click()
        page.finished(4)
        assert page.pictures()[0] == shown

        page.js("document.getElementById('top_k').removeAttribute('min')")
        page.type("#top_k", "-1")
        page.find("#draw").click()
        page.told("Not drawn.")
        assert page.text("#top_k-error") != ""
    engine.close()


@pytest.mark.skipif(SCREENSHOT not in os.environ, reason=f"{SCREENSHOT}=docs/images/page.png writes the docs' picture, "
                    f"of the shipped model, or of {MODEL}; {PROMPT} and its {WORD} to point at")
def test_the_docs_picture_is_drawn(page):
    from inference.shipped import DEFAULT_NAME, default_model_folder
    folder = Path(os.environ.get(MODEL) or default_model_folder())
    engine = Engine(Models({DEFAULT_NAME: folder}))
    engine.load(DEFAULT_NAME)
    engine.start()
    with running(engine) as served:
        page.size(*WINDOW)
        page.open(url=served.url + "/")
        for prompt in ("octopus", "slice of pizza", os.environ.get(PROMPT, "smiling cat face with heart eyes")):
            page.js("location.hash = arguments[0]", f"#/?prompt={prompt.replace(' ', '+')}&seed=7")
            page.reads("#history", prompt)
        page.wait(lambda: page.all("#words button"), "words")
        word = os.environ.get(WORD, "heart")
        page.hover(next(button for button in page.all("#words button") if button.text == word))
        page.wait(lambda: page.all("#stage canvas"), "heat")
        page.js("return new Promise(resolve => setTimeout(resolve, 500))")
        page.driver.save_screenshot(os.environ[SCREENSHOT])
    engine.close()
    assert Path(os.environ[SCREENSHOT]).stat().st_size < 300_000
