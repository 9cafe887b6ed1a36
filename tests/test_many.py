"""Many prompts in one batch: the API, the prompts file, and every way a line can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from inference.memory import estimate as memory
from inference.requests import PromptRequest, prompt_requests, read_prompt_lines
from tests import tiny
from tokenloom import SamplingParams, TextToImage, main
from tokenloom_common.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder) -> TextToImage:
    return TextToImage.from_pretrained(folder, device="cpu")


REQUESTS = [
    PromptRequest("a red heart", 2, 5),
    PromptRequest("octopus", 1, 9, SamplingParams(guidance_scale=1.0, top_k=4)),
    PromptRequest("a blue square", 3, 1, SamplingParams(guidance_scale=4.0, guidance_end=0.5), negative_prompt="red"),
]


@pytest.mark.parametrize("batch_size", [2, 3, 32])
def test_every_picture_is_the_one_that_generate_draws(model, batch_size):
    found = {(picture.request, picture.index): picture for picture in model.generate_many(REQUESTS, batch_size)}
    assert set(found) == {(number, at) for number, request in enumerate(REQUESTS) for at in range(request.num_images)}
    for number, request in enumerate(REQUESTS):
        alone = model.generate(request.prompt, request.num_images, request.params, request.seed,
                               negative_prompt=request.negative_prompt)
        for at in range(request.num_images):
            picture = found[number, at]
            assert torch.equal(picture.image_tokens, alone.image_tokens[at])
            assert picture.image.tobytes() == alone.images[at].tobytes()
            assert (picture.prompt, picture.seed, picture.params) == (request.prompt, alone.seeds[at], alone.params)


def test_requests_are_read_as_there_is_room(model):
    read = []

    def endless():
        number = 0
        while True:
            read.append(number)
            yield PromptRequest("octopus", seed=number)
            number += 1

    pictures = model.generate_many(endless(), batch_size=4)
    first = [next(pictures) for _ in range(3)]
    assert len(read) < 20
    assert sorted(picture.request for picture in first) == [0, 1, 2] or len(first) == 3
    pictures.close()


@pytest.mark.parametrize(("request_", "words"), [
    (PromptRequest("x" * 20_000), "request 1: a prompt has 20,000 characters"),
    (PromptRequest("a heart", 0), "request 1: num_images must be a whole number of at least 1"),
    (PromptRequest("a heart", params=SamplingParams(guidance_scale=1.0), negative_prompt="red"), "request 1: a negative"),
    (PromptRequest("a heart", layout=[1, 2]), "request 1: this model was trained without layouts")])
def test_a_wrong_request_is_named(model, request_, words):
    with pytest.raises(UserError, match=words):
        list(model.generate_many([request_]))


def test_a_batch_too_small_for_guidance_is_refused(model):
    with pytest.raises(UserError, match="needs 2 rows"):
        list(model.generate_many([PromptRequest("a heart")], batch_size=1))


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_prompts_file_is_read_with_defaults_from_the_options(tmp_path):
    base, defaults = SamplingParams(top_k=8), PromptRequest("", 2, 7, None, "blue")
    path = write(tmp_path / "p.txt", "a red heart", "", "  octopus ")
    text = prompt_requests(path, read_prompt_lines(path), defaults, base)
    assert text == [PromptRequest(prompt, 2, 7, base, "blue") for prompt in ("a red heart", "octopus")]
    path = write(tmp_path / "p.jsonl", '{"prompt": "a cat", "seed": 3, "guidance_scale": 5.0}', '{"prompt": "b"}')
    lines = prompt_requests(path, read_prompt_lines(path), defaults, base)
    assert lines == [PromptRequest("a cat", 2, 3, SamplingParams(top_k=8, guidance_scale=5.0), "blue"),
                     PromptRequest("b", 2, 7, base, "blue")]


@pytest.mark.parametrize(("line", "words"), [
    ("{", "line 2: not JSON"), ('["a"]', "line 2: expected an object with a \"prompt\""), ('{"seed": 1}', "line 2: expected"),
    ('{"prompt": "a", "sede": 1}', "line 2: unknown field 'sede'; did you mean 'seed'"),
    ('{"prompt": "a", "top_k": -1}', "line 2: its sampling.*top_k")])
def test_a_wrong_line_is_named(tmp_path, line, words):
    path = write(tmp_path / "p.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(UserError, match=words):
        prompt_requests(path, read_prompt_lines(path), PromptRequest(""), SamplingParams())


def test_the_command_saves_every_picture_of_a_file(folder, tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", '{"prompt": "a red heart", "num_images": 2, "seed": 4}',
                 '{"prompt": "octopus", "guidance_scale": 1.0}')
    assert main(["generate", "--prompts", str(path), "--model", str(folder), "--out", str(tmp_path / "out"), "--device", "cpu",
                 "--batch-size", "4"]) == 0
    names = sorted(Path(line).name for line in capsys.readouterr().out.splitlines())
    assert names == ["a-red-heart-seed4.png", "a-red-heart-seed5.png", "octopus-seed0.png"]
    told = json.loads(Image.open(tmp_path / "out" / "octopus-seed0.png").text["tokenloom"])
    assert (told["prompt"], told["seed"], told["guidance_scale"], told["top_k"]) == ("octopus", 0, 1.0, 8)


@pytest.mark.parametrize(("options", "words"), [
    (["a heart", "--prompts", "FILE"], "captions and --prompts: give one of them"),
    (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: cannot be read"),
    (["--prompts", "FILE", "--jacobi", "4"], "--jacobi does not go with --prompts"),
    (["--prompts", "FILE", "--attention", "heart"], "--attention does not go with --prompts"),
    (["--prompts", "EMPTY"], "holds no prompt"),
    ([], "no prompt given")])
def test_wrong_commands_are_one_line(folder, tmp_path, capsys, options, words):
    names = {"FILE": str(write(tmp_path / "p.txt", "a heart")), "EMPTY": str(write(tmp_path / "e.txt", ""))}
    assert main(["generate", *(names.get(option, option) for option in options), "--model", str(folder), "--out",
                 str(tmp_path / "out"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert words in error[0]
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("call", [
    lambda model: model.generate("a heart", num_images=4), lambda model: model.sample_tokens("a heart", num_images=4),
    lambda model: model.stream("a heart", num_images=4), lambda model: model.generate_many([PromptRequest("a heart")])])
def test_what_cannot_fit_is_refused_with_its_bytes_before_anything_is_allocated(model, monkeypatch, call):
    monkeypatch.setattr(memory, "available_memory", lambda device: 30_000)
    monkeypatch.setattr(type(model.decoder), "prefill", lambda *_: pytest.fail("sampled"))
    with pytest.raises(UserError, match=r"needs [\d,]+ bytes .* of memory, and 2\d,\d+ bytes .* are there"):
        list(call(model))


@pytest.mark.parametrize(("call", "remedy"), [
    (lambda model: model.stream("a heart", num_images=4), "num_images=1"),
    (lambda model: model.generate_many([PromptRequest("a heart")], 4), "--batch-size 1 (batch_size=1)")])
def test_the_remedy_is_the_option_that_the_call_has(model, monkeypatch, call, remedy):
    monkeypatch.setattr(memory, "largest_batch", lambda *_, **__: 1)
    monkeypatch.setattr(memory, "available_memory", lambda device: 30_000)
    with pytest.raises(UserError) as refused:
        list(call(model))
    assert str(refused.value).endswith(f"1 at a time would fit: {remedy}")
