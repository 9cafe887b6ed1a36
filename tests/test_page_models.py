"""Which of several served models draws a recipe or an address."""

from __future__ import annotations

import pytest

from tests.page_server import SAMPLING, picture

pytestmark = pytest.mark.long


@pytest.fixture
def two_models(page):
    page.server.behaviour.models = ("small", "large")
    return page.open()


@pytest.mark.parametrize("name", [None, "runs/large", "small"])
def test_a_recipe_chooses_the_model_of_its_fingerprint(two_models, name, tmp_path):
    page = two_models
    file = tmp_path / "bird.png"
    recipe = {"prompt": "blue bird", "seed": 7, **SAMPLING, "model": name}
    file.write_bytes(picture(recipe, 1, model_fingerprint="large"))
    page.find("#recipe-file").send_keys(str(file))
    page.told("The recipe of bird.png is filled in")
    assert page.value("model") == "large" and "another model" not in page.text("#status")


def test_an_address_of_a_model_that_is_not_served_says_so(two_models):
    page = two_models
    page.open("#/?prompt=cat&seed=5&count=2&model=gone")
    page.finished(2)
    page.told("There is no model “gone” here: “small” draws instead.")
    assert {body["model"] for body in page.server.behaviour.requests} == {"small"}
