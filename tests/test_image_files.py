"""Recipes in PNG, JPEG and WebP files: what is written, that it comes back, and files that cannot be trusted."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import replace
from io import BytesIO
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from inference.image_files.encode import FORMATS, XMP_KEY, encode_image
from inference.image_files.fingerprint import model_fingerprint
from inference.image_files.infotext import infotext
from inference.image_files.read import image_format, read_image_file, read_recipe, read_recipes
from inference.image_files.recipe import Recipe, parse_recipes
from inference.sampling import SamplingParams
from tests import tiny
from tokenloom_common.errors import MissingFileError, UserError

(IMAGE,) = tiny.pictures(1)
RECIPE = Recipe("a red heart", 7, SamplingParams(top_k=8, guidance_scale=2.0), "blue", None, "demo/model", "0123456789abcdef",
                {"weights": "float32", "image_tokens": 16, "tokenloom": "0.1.0"})
NASTY = ['say "octopus", twice: \\n\n\nnew line', "🐙🎉 👩‍👩‍👧", "קטן ‮right to left", "Negative prompt: x\nSteps: 9",
         "<b>&amp;]]>", "a\x00b", "\udcff broken", "", " ", "\u2028\x85\x0c", "{}", "tokenloom:", "x" * 10_000, "🐙" * 10_000]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
EVERY_FORMAT = pytest.mark.parametrize("output_format", FORMATS)


def opened(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    image.load()
    return image


# ---- there and back


@pytest.mark.long
@EVERY_FORMAT
@settings(max_examples=200, deadline=None, derandomize=True)
@given(prompt=TEXTS, negative=st.none() | TEXTS, revised=st.none() | TEXTS, seed=st.integers(0, 2**63 - 1))
def test_every_prompt_comes_back_as_it_was(output_format, prompt, negative, revised, seed):
    recipe = replace(RECIPE, prompt=prompt, negative_prompt=negative, revised_prompt=revised, seed=seed)
    assert read_recipe(encode_image(IMAGE, output_format, recipe=recipe), "x") == recipe


@EVERY_FORMAT
@pytest.mark.parametrize("prompt", NASTY, ids=range(len(NASTY)))
def test_odd_prompts_come_back_as_they_were(output_format, prompt):
    recipe = replace(RECIPE, prompt=prompt, negative_prompt=prompt, revised_prompt=prompt)
    assert read_recipe(encode_image(IMAGE, output_format, recipe=recipe), "x") == recipe
    assert read_recipes(encode_image(IMAGE, output_format, recipe=[recipe, RECIPE]), "x") == [recipe, RECIPE]


@EVERY_FORMAT
def test_the_same_image_and_recipe_are_the_same_bytes(output_format):
    shuffled = replace(RECIPE, extra=dict(reversed(RECIPE.extra.items())))
    assert encode_image(IMAGE, output_format, recipe=RECIPE) == encode_image(IMAGE.copy(), output_format, recipe=shuffled)


@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_png_and_webp_keep_every_pixel(output_format):
    data = encode_image(IMAGE, output_format, recipe=RECIPE)
    assert opened(data).convert("RGB").tobytes() == IMAGE.tobytes()
    assert image_format(data, "x") == output_format


def test_a_lower_compression_value_makes_a_smaller_file():
    for output_format in ("jpeg", "webp"):
        assert len(encode_image(IMAGE, output_format, 10)) < len(encode_image(IMAGE, output_format, 90))


@pytest.mark.parametrize(("output_format", "compression", "words"), [
    ("gif", None, "unknown output format 'gif'"), ("jpeg", 101, "0 to 100, got 101"), ("webp", -1, "0 to 100, got -1"),
    ("jpeg", True, "got True"), ("jpeg", 50.0, "got 50.0"), ("png", 50, "PNG is lossless")])
def test_impossible_formats_and_compressions_are_refused(output_format, compression, words):
    with pytest.raises(UserError, match=re.escape(words)):
        encode_image(IMAGE, output_format, compression)


# ---- what other programs see


def a1111(text: str) -> tuple[str, str, dict[str, str]]:
    """Read the text as AUTOMATIC1111's parse_generation_parameters does: prompt, negative prompt, fields."""
    *lines, last = text.strip().split("\n")
    prompt, negative, is_negative = "", "", False
    for line in lines:
        if line.startswith("Negative prompt:"):
            is_negative, line = True, line[16:].strip()
        if is_negative:
            negative += ("\n" if negative else "") + line
        else:
            prompt += ("\n" if prompt else "") + line
    fields = {}
    for name, value in re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last):
        fields[name] = json.loads(value) if value.startswith('"') else value
    return prompt, negative, fields


def test_the_parameters_chunk_is_read_by_a1111s_grammar():
    recipe = replace(RECIPE, prompt='a "red" heart, Noto: style\n(big:1.2)', negative_prompt="blue, green", model="a,b: c",
                     params=SamplingParams(top_k=8, guidance_scale=2.5, guidance_schedule="cosine", guidance_power=2.0))
    text = opened(encode_image(IMAGE, recipe=recipe)).info["parameters"]
    prompt, negative, fields = a1111(text)
    assert (prompt, negative) == (recipe.prompt, "blue, green")
    assert fields == {
        "Steps": "16", "Sampler": "Autoregressive", "CFG scale": "2.5", "Seed": "7", "Size": "16x16",
        "Model hash": "0123456789abcdef", "Model": "a,b: c", "Temperature": "1.0", "Top k": "8", "Top p": "1.0", "Min p": "0.0",
        "CFG schedule": "cosine", "CFG power": "2.0", "Version": "Tokenloom 0.1.0"}


def test_what_was_really_drawn_is_the_prompt_that_viewers_show():
    prompt, _, fields = a1111(infotext(replace(RECIPE, prompt="a kraken, big", revised_prompt="octopus"), (16, 16)))
    assert (prompt, fields["Original prompt"]) == ("octopus", "a kraken, big")


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
@pytest.mark.parametrize("prompt", ["a red heart", "🐙 ünï"])
def test_jpeg_and_webp_carry_the_text_as_exif_user_comment(output_format, prompt):
    recipe = replace(RECIPE, prompt=prompt)
    comment = opened(encode_image(IMAGE, output_format, recipe=recipe)).getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == infotext(recipe, (16, 16))


@EVERY_FORMAT
def test_every_format_says_that_the_picture_was_generated(output_format):
    info = opened(encode_image(IMAGE, output_format, recipe=replace(RECIPE, prompt="<&>\"'"))).info
    packet = info[XMP_KEY] if output_format == "png" else info["xmp"].decode()
    (described,) = ElementTree.fromstring(packet).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert described.attrib["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"] == (
        "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia")


def test_the_json_has_flat_keys():
    values = json.loads(opened(encode_image(IMAGE, recipe=RECIPE)).info["tokenloom"])
    assert values == {
        "prompt": "a red heart", "seed": 7, **RECIPE.params.plain(), "negative_prompt": "blue", "model": "demo/model",
        "model_fingerprint": "0123456789abcdef", "weights": "float32", "image_tokens": 16, "tokenloom": "0.1.0",
        "digitalSourceType": "trainedAlgorithmicMedia"}


def test_without_a_recipe_a_file_holds_pixels_alone():
    image = IMAGE.copy()
    image.info = {"comment": b"secret", "parameters": "secret", "exif": b"Exif\0\0secret", "xmp": b"secret"}
    png, jpeg, webp = (encode_image(image, output_format) for output_format in ("png", "jpeg", "webp"))
    assert re.findall(rb"IHDR|IDAT|IEND|tEXt|iTXt|zTXt|eXIf", png) == [b"IHDR", b"IDAT", b"IEND"]
    assert {kind for kind, _ in opened(jpeg).applist} == {"APP0"}
    assert not re.search(b"EXIF|XMP |secret|trainedAlgorithmicMedia", webp + jpeg + png)


# ---- files that anybody may have sent


def with_json(text: str, output_format: str = "png") -> bytes:
    class Written(Recipe):
        def to_json(self):
            return text
    return encode_image(IMAGE, output_format, recipe=Written("x", 0, SamplingParams()))


WRONG = {
    "no JSON": ("{", "no JSON that can be read"),
    "deep": ("[" * 100_000, "no JSON that can be read"),
    "digits": ('{"seed": ' + "1" * 5000 + "}", "no JSON that can be read"),
    "a number": ("7", "no JSON object but a int"),
    "empty list": ("[]", "list of recipes is empty"),
    "list of numbers": ("[1]", "no JSON object"),
    "no prompt": ('{"seed": 1}', "has no 'prompt'"),
    "prompt of numbers": ('{"prompt": 5, "seed": 1}', "'prompt' must be text, got 5"),
    "no seed": ('{"prompt": "x"}', "has no 'seed'"),
}
WRONG_VALUES = {
    "seed": [-1, 1.5, True, "7", 2**63, None], "top_k": [-1, "8", 1.5, True], "temperature": [float("nan"), "hot", None],
    "guidance_schedule": ["square", 3], "negative_prompt": [5, [], {}], "model": [["/etc"], 7], "model_fingerprint": [7],
    "weights": [8], "layout": [[], ["a"], [1.5], [-1], "1 2", {"a": 1}, [True]], "score": [float("inf"), "high"],
    "matcher": [7], "revision": [1.0], "image_tokens": [-1, "16"]}


@pytest.mark.parametrize(("text", "words"), WRONG.values(), ids=WRONG)
def test_json_that_is_no_recipe_is_one_line_that_names_the_file(text, words):
    with pytest.raises(UserError, match=words) as refused:
        read_recipe(with_json(text), "a.png")
    assert str(refused.value).startswith("a.png: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_VALUES.items() for value in values])
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(UserError, match=name):
        Recipe.parse(json.dumps({**RECIPE.values(), name: value}))


@pytest.mark.parametrize("name", SamplingParams.model_fields)
def test_a_parameter_that_is_missing_is_no_default_of_ours(name):
    values = RECIPE.values()
    del values[name]
    with pytest.raises(UserError, match=f"has no '{name}'"):
        Recipe.parse(json.dumps(values))


def test_what_a_newer_version_wrote_is_kept_and_told():
    recipe = Recipe.parse(json.dumps({**RECIPE.values(), "brush": "soft"}))
    assert recipe.unknown_fields() == ["brush"]
    assert recipe.identity() != RECIPE.identity()
    assert parse_recipes(recipe.to_json()) == [recipe]


def test_a_recipe_of_many_megabytes_is_refused(monkeypatch):
    monkeypatch.setattr("inference.image_files.recipe.MAX_JSON_CHARACTERS", 100)
    with pytest.raises(UserError, match="the limit is 100"):
        read_recipe(encode_image(IMAGE, recipe=RECIPE), "x")


def huge_png(side: int) -> bytes:
    """A PNG file whose header states side x side pixels, without any."""
    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("data", "words"), [
    (b"", "not a picture that can be read"), (b"hello", "not a picture that can be read"),
    (b"GIF89a" + bytes(100), "not a picture that can be read"), (encode_image(IMAGE), "no recipe: it was not drawn by"),
    (encode_image(IMAGE, "jpeg"), "no recipe"), (encode_image(IMAGE, "webp"), "no recipe"),
    (huge_png(30_000), "is over the limit of 25,000,000 pixels"),
    (encode_image(IMAGE, recipe=RECIPE)[:60], "x: is damaged|x: holds no recipe"),
    (encode_image(IMAGE, recipe=[RECIPE, RECIPE]), "is a grid of 2 pictures; give one of them")])
def test_files_without_a_recipe_are_told_in_words(data, words):
    with pytest.raises(UserError, match=words) as refused:
        read_recipe(data, "x")
    assert str(refused.value).startswith("x: ")


def test_a_picture_of_another_program_is_told():
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512")
    file = BytesIO()
    IMAGE.save(file, "PNG", pnginfo=info)
    with pytest.raises(UserError, match="parameters of another program"):
        read_recipe(file.getvalue(), "x")


def test_a_chunk_behind_the_pixels_is_found():
    data = encode_image(IMAGE, recipe=RECIPE)
    start = data.index(b"tEXttokenloom") - 4
    end = start + 12 + int.from_bytes(data[start:start + 4], "big")
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert read_recipe(moved, "x") == RECIPE


@EVERY_FORMAT
def test_damaged_files_never_end_in_anything_but_one_line(output_format, request):
    """Bytes changed, cut and repeated; --mutations N for more."""
    import random

    whole, chance = encode_image(IMAGE, output_format, recipe=RECIPE), random.Random(0)
    for _ in range(request.config.getoption("--mutations")):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)):]
        try:
            read_recipes(bytes(data), "x")
        except UserError as error:
            assert str(error).startswith("x: ")
            assert "\n" not in str(error)


def test_files_that_cannot_be_read_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(MissingFileError, match=r"--from-image .*nowhere\.png: no such file"):
        read_image_file(tmp_path / "nowhere.png", "--from-image")
    with pytest.raises(UserError, match="not a file; give the picture itself"):
        read_image_file(tmp_path, "--from-image")
    monkeypatch.setattr("inference.image_files.read.MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "large").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        read_image_file(tmp_path / "large", "--from-image")


# ---- the model's fingerprint


def test_the_fingerprint_follows_weights_and_settings_but_not_the_card(tmp_path):
    folder = tiny.model_folder(tmp_path / "model")
    before = model_fingerprint(folder)
    (folder / "README.md").write_text("another card")
    (folder / "generation_config.json").write_text("{}")
    assert model_fingerprint(folder) == before
    assert re.fullmatch("[0-9a-f]{16}", before)
    weights = folder / "seq2seq/model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    after = model_fingerprint(folder)
    (folder / "text_tokenizer/config.json").write_text("{}")
    assert len({before, after, model_fingerprint(folder)}) == 3


def test_of_a_large_file_only_blocks_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("inference.image_files.fingerprint.WHOLE_BYTES", 1 << 20)
    weights = tmp_path / "seq2seq/model.safetensors"
    weights.parent.mkdir()
    seen = set()
    for place in (None, 0, 20 << 20, (64 << 20) - 1):  # the first, one in the middle, the last
        with weights.open("wb") as file:
            file.truncate(64 << 20)
            if place is not None:
                file.seek(place)
                file.write(b"x")
        seen.add(model_fingerprint(tmp_path))
    with weights.open("r+b") as file:
        file.truncate((64 << 20) + 1)
    assert len(seen | {model_fingerprint(tmp_path)}) >= 4
