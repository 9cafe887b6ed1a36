"""OpenAI's images API by its own client: images, streams, models, and an exception for each kind of error."""

from __future__ import annotations

import base64
import io
import json

import openai
import pytest
from PIL import Image

from inference.hooks.applied import Hooks
from inference.hooks.expansion import Expansion
from inference.image_files.read import read_recipe
from inference.serving.auth import ApiKey
from inference.serving.limits import Limits
from tests.fake_engine import FakeEngine
from tests.serving_http import KEY, ROUTE, running, wait_for


@pytest.fixture(scope="module")
def server():
    with running(key=ApiKey(KEY)) as one:
        yield one


@pytest.fixture(scope="module")
def client(server):
    with server.client() as one:
        yield one


def opened(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def post(server, body, **options):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **options.pop("headers", {})}
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return server.http.post(ROUTE, content=content, headers=headers, **options)


# ---- images

def test_a_client_draws_three_images_of_following_seeds(client):
    reply = client.images.generate(prompt="a red heart", n=3, extra_body={"seed": 7})
    assert [image.seed for image in reply.data] == [7, 8, 9]
    assert len({image.id for image in reply.data}) == 3
    assert (reply.size, reply.output_format, reply.background) == ("16x16", "png", "opaque")
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.total_tokens) == (3, 48, 51)
    assert reply.usage.input_tokens_details.text_tokens == 3
    assert opened(reply.data[1].b64_json).getpixel((0, 0)) == (8, 0, 0)


@pytest.mark.parametrize(("output_format", "name"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_a_file_of_each_format_holds_its_recipe(client, output_format, name):
    reply = client.images.generate(prompt="a 'red' heart\n🐙", output_format=output_format,
                                   extra_body={"seed": 5, "top_k": 3, "guidance_scale": 4.0, "negative_prompt": "blue"})
    content = base64.b64decode(reply.data[0].b64_json)
    assert Image.open(io.BytesIO(content)).format == name
    recipe = read_recipe(content, "it")
    assert (recipe.prompt, recipe.seed, recipe.negative_prompt) == ("a 'red' heart\n🐙", 5, "blue")
    assert (recipe.params.top_k, recipe.params.guidance_scale, recipe.params.temperature) == (3, 4.0, 1.0)
    assert recipe.model == "fake"


def test_a_lower_compression_makes_a_smaller_file(client):
    sizes = [len(client.images.generate(prompt="a", output_format="jpeg", output_compression=quality, extra_body={"seed": 1})
                 .data[0].b64_json) for quality in (0, 100)]
    assert sizes[0] < sizes[1]


def test_fields_of_openai_without_effect_are_taken(server, client):
    reply = client.images.generate(
        prompt="a", quality="hd", style="vivid", moderation="low", user="u", background="opaque", response_format="b64_json",
        size="auto", model="fake", safety_identifier="someone")
    assert reply.safety_identifier == "someone"
    assert reply.quality == "high"
    assert client.images.generate(prompt="a", quality="low", size="16x16").quality == "low"
    # null is the same as leaving a field out
    fields = ("n", "model", "size", "seed", "stream", "layout", "top_p")
    assert post(server, {"prompt": "a", **dict.fromkeys(fields)}).status_code == 200


def test_the_engine_is_asked_for_what_the_request_says(server, client):
    client.images.generate(prompt="a", n=2, model="group/other", extra_body={
        "seed": 3, "temperature": 0, "top_p": 0.5, "layout": [[1, 2], [3, 4]]})
    asked = server.engine.jobs[-1].asked
    assert (asked.model, asked.partial_images) == ("group/other", 0)
    assert (asked.request.num_images, asked.request.seed, asked.request.layout) == (2, 3, [[1, 2], [3, 4]])
    params = asked.request.params
    assert (params.temperature, params.top_p, params.top_k, params.guidance_scale) == (0, 0.5, 8, 2.0)


def test_without_a_seed_each_request_has_another(client):
    seeds = {client.images.generate(prompt="a").data[0].seed for _ in range(4)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


# ---- streams

def test_a_client_streams_partial_images_and_the_finished_one(client):
    events = list(client.images.generate(prompt="a", stream=True, partial_images=2, extra_body={"seed": 9}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert {(event.size, event.background, event.output_format, event.quality) for event in events} == {
        ("16x16", "opaque", "png", "auto")}
    last = events[-1]
    assert (last.usage.output_tokens, last.seed, last.id) == (16, 9, "image-9")
    assert opened(last.b64_json).size == (16, 16)
    assert isinstance(last, openai.types.ImageGenCompletedEvent)


def test_a_stream_of_several_images_says_which_one_each_event_is_of(client):
    events = list(client.images.generate(prompt="a", n=3, stream=True, partial_images=1, extra_body={"seed": 1}))
    finished = [event for event in events if event.type == "image_generation.completed"]
    assert [(event.image_index, event.seed) for event in finished] == [(0, 1), (1, 2), (2, 3)]
    assert len(events) == 6


def test_a_stream_is_named_events_that_nothing_may_collect_on_the_way(server):
    reply = post(server, {"prompt": "a", "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-store", "no")
    event, data, *rest = reply.text.split("\n")
    assert event == "event: image_generation.completed"
    assert json.loads(data.removeprefix("data: "))["type"] == "image_generation.completed"
    assert rest == ["", ""]


# ---- models

def test_models_are_listed_and_found_by_name(client):
    assert [model.id for model in client.models.list()] == ["fake", "group/other"]
    model = client.models.retrieve("group/other")
    assert (model.object, model.created, model.owned_by) == ("model", 1_700_000_000, "tokenloom")
    assert model.tokenloom["size"] == "16x16"


# ---- errors

@pytest.mark.parametrize(("fields", "param", "words"), [
    ({"sede": 1}, "sede", "unknown field 'sede'; did you mean 'seed'?"),
    ({"prompt": ""}, "prompt", "at least 1 character"),
    ({"prompt": "x" * 2001}, "prompt", "at most 2000 characters, got 2,001"),
    ({"prompt": 3}, "prompt", "valid string"),
    ({"prompt": None}, "prompt", "valid string"),
    ({"prompt": "\ud800"}, "prompt", "string"),
    ({"n": 11}, "n", "less than or equal to 10"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": "2"}, "n", "valid integer"),
    ({"n": True}, "n", "valid integer"),
    ({"n": 1.5}, "n", "valid integer"),
    ({"size": "1024x1024"}, "size", "this model draws 16x16, got '1024x1024'"),
    ({"background": "transparent"}, "background", "no transparency"),
    ({"response_format": "url"}, "response_format", "there are no URLs"),
    ({"output_format": "svg"}, "output_format", "'png', 'webp' or 'jpeg'"),
    ({"output_compression": 101}, "output_compression", "less than or equal to 100"),
    ({"output_compression": 50}, "output_compression", "needs output_format webp or jpeg"),
    ({"partial_images": 4, "stream": True}, "partial_images", "less than or equal to 3"),
    ({"partial_images": 2}, "partial_images", "needs stream: true"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": 2**63}, "seed", "less than or equal to"),
    ({"temperature": 101}, "temperature", "less than or equal to 100"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_k": 2**40}, "top_k", "less than or equal to"),
    ({"guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
    ({"layout": [[1], [2, 3]]}, "layout", "rows of one length"),
    ({"layout": [[-1]]}, "layout", "greater than or equal to 0"),
    ({"image_url": "http://169.254.169.254/"}, "image_url", "unknown field"),
])
def test_a_wrong_field_is_named_with_what_it_may_be(server, fields, param, words):
    reply = post(server, {"prompt": "a", **fields})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert not server.engine.waiting


def test_a_name_that_is_no_text_is_no_param(server):
    error = post(server, '{"prompt": "a", "\\ud800": 1}').json()["error"]
    assert (error["param"], error["code"]) == (None, "invalid_value")


def test_a_missing_prompt_is_named(server):
    assert post(server, {"n": 1}).json()["error"]["code"] == "missing_required_parameter"


@pytest.mark.parametrize(("body", "words"), [
    ("", "no JSON"), ("{", "no JSON"), ("[1]", "must be a JSON object, got list"), ('{"prompt": NaN}', "NaN is no JSON"),
    (b"\xff\xfe", "no JSON"), ("[" * 20_000, "nested too deeply"), ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "no JSON")])
def test_a_body_that_is_no_object_is_refused(server, body, words):
    reply = post(server, body)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


def test_a_body_that_any_web_page_could_send_is_refused(server):
    reply = post(server, {"prompt": "a"}, headers={"Content-Type": "text/plain"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_media_type")


def raised(call) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    error = caught.value
    assert error.request_id
    assert error.type
    return error


def test_each_kind_of_error_is_the_clients_own_exception(server, client):
    error = raised(lambda: client.images.generate(prompt="a", extra_body={"sede": 1}))
    assert (type(error), error.param, error.code) == (openai.BadRequestError, "sede", "unknown_parameter")
    error = raised(lambda: client.images.generate(prompt="a", model="dall-e-3"))
    assert (type(error), error.code) == (openai.NotFoundError, "model_not_found")
    error = raised(lambda: client.models.retrieve("grou/other"))
    assert (type(error), error.code) == (openai.NotFoundError, "model_not_found")
    assert "did you mean 'group/other'?" in str(error)
    for key in ("wrong", KEY[:-1], KEY + "0"):
        with server.client(key=key) as other:
            error = raised(lambda one=other: one.images.generate(prompt="a"))
        assert (type(error), error.code) == (openai.AuthenticationError, "invalid_api_key")


def test_a_full_queue_and_the_deadline_are_the_clients_own_exceptions():
    with running(FakeEngine(plays=False, queue=0)) as server, server.client() as client:
        error = raised(lambda: client.images.generate(prompt="a"))
        assert (type(error), error.code, error.response.headers["retry-after"]) == (
            openai.RateLimitError, "rate_limit_exceeded", "3")
        server.engine.queue = 1
    with running(FakeEngine(plays=False), Limits(deadline=0.05)) as server, server.client() as client:
        error = raised(lambda: client.images.generate(prompt="a"))
        assert (type(error), error.status_code, error.code) == (openai.InternalServerError, 504, "deadline_exceeded")
        assert [job.cancelled for job in server.engine.jobs] == [True]


def test_a_failure_of_ours_tells_nothing_of_itself(server, client, monkeypatch, caplog):
    def broken(asked):
        raise RuntimeError("/home/someone/secret")

    monkeypatch.setattr(server.engine, "submit", broken)
    error = raised(lambda: client.images.generate(prompt="a"))
    assert (type(error), error.code, error.type) == (openai.InternalServerError, "internal_error", "server_error")
    assert "secret" not in error.response.text
    assert "secret" in caplog.text


def test_an_image_that_fails_ends_the_request(server, client):
    server.engine.plays = False
    try:
        with openai_stream(client) as events:
            wait_for(lambda: server.engine.waiting)
            server.engine.waiting[0].start()
            server.engine.waiting[0].fail("out of memory", "error")
            with pytest.raises(openai.APIError, match="the server failed") as caught:
                list(events)
        assert caught.value.code == "internal_error"
    finally:
        server.engine.plays = True


class openai_stream:
    """A stream whose request is sent in a thread, since its reply begins with the first event."""

    def __init__(self, client) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self.pool = ThreadPoolExecutor(1)
        self.future = self.pool.submit(lambda: client.images.generate(prompt="a", stream=True))

    def __enter__(self):
        return self._events()

    def _events(self):
        yield from self.future.result()

    def __exit__(self, *error) -> None:
        self.pool.shutdown()


# ---- hooks

class Expander:
    def expand(self, prompt: str) -> Expansion:
        return Expansion(f"{prompt}, noto style", "noto style was added")


class Filter:
    def check_prompt(self, prompt: str):
        return "a word of the list" if "weapon" in prompt else None

    def check_images(self, images):
        return ["too red" if image.getpixel((0, 0))[0] >= 100 else None for image in images]


@pytest.fixture(scope="module")
def hooked():
    with running(hooks={"fake": Hooks(Expander(), Filter(), lambda note: None)}) as one:
        yield one


def test_what_was_drawn_instead_is_said_and_kept(hooked):
    with hooked.client() as client:
        [image] = client.images.generate(prompt="a heart", extra_body={"seed": 1}).data
        assert (image.revised_prompt, image.note) == ("a heart, noto style", "noto style was added")
        recipe = read_recipe(base64.b64decode(image.b64_json), "it")
        assert (recipe.prompt, recipe.revised_prompt) == ("a heart", "a heart, noto style")
        assert hooked.engine.jobs[-1].asked.request.prompt == "a heart, noto style"
        [other] = client.images.generate(prompt="a heart", model="group/other", extra_body={"seed": 1}).data
        assert other.revised_prompt is None


def test_a_refused_prompt_is_not_drawn(hooked):
    before = len(hooked.engine.jobs)
    with hooked.client() as client:
        error = raised(lambda: client.images.generate(prompt="a weapon"))
    assert (error.status_code, error.code, error.type) == (400, "moderation_blocked", "image_generation_user_error")
    assert "a word of the list" in str(error)
    assert len(hooked.engine.jobs) == before


def test_a_refused_image_is_said_and_left_out(hooked):
    with hooked.client() as client:
        reply = client.images.generate(prompt="a", n=3, extra_body={"seed": 98})
        assert [image.seed for image in reply.data] == [98, 99]
        assert reply.refused == [{"index": 2, "seed": 100, "reason": "Filter: too red"}]
        error = raised(lambda: client.images.generate(prompt="a", extra_body={"seed": 100}))
        assert (error.code, "seeds 100 (Filter: too red)" in str(error)) == ("moderation_blocked", True)


def test_a_refused_image_is_not_seen_while_it_is_drawn_either(hooked):
    events = []
    with hooked.client() as client, pytest.raises(openai.APIError, match="too red") as caught:
        for event in client.images.generate(prompt="a", n=2, stream=True, partial_images=2, extra_body={"seed": 99}):
            events.append(event)
    assert caught.value.code == "moderation_blocked"
    assert {event.seed for event in events} == {99}
    assert len(events) == 3
