"""Pushing and pulling models against a local server that speaks the Hub's endpoints; revisions, the cache, no connection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

import tokenloom
from inference import load_matcher
from inference.scoring.matcher_folder import MatcherScorer
from seq2seq import load_transformer
from seq2seq.frozen_text import FrozenTextEncoder
from tests import tiny
from tests.fake_hub import Hub, running_hub
from tokenizer_image import VQGAN, load_tokenizer
from tokenloom import TextToImage
from tokenloom_common.errors import MissingFileError, RunFailedError, UserError


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(server, tmp_path, monkeypatch) -> Hub:
    """An empty hub, an empty cache, and a token; huggingface_hub reads its environment when it is imported."""
    server.repositories.clear()
    server.requests.clear()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    return server


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("models") / "tiny")


def files(hub: Hub, repo_id: str, branch: str = "main") -> list[str]:
    repository = hub.repositories[repo_id]
    return sorted(name for name in repository.commits[repository.refs[branch]] if name != ".gitattributes")


def test_a_pushed_model_folder_arrives_whole_and_draws_the_same_by_id_and_without_a_connection(hub, folder, monkeypatch):
    model = TextToImage.from_pretrained(folder, device="cpu")
    address = model.push_to_hub("me/model", commit_message="first")
    repository = hub.repositories["me/model"]
    assert address == f"{hub.address}/me/model/commit/{repository.refs['main']}"
    assert files(hub, "me/model") == sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert repository.commits[repository.refs["main"]]["README.md"] == (folder / "README.md").read_bytes()  # the card is kept
    repository.commit("main", {**repository.commits[repository.refs["main"]], "run.py": b"1", "old.bin": b"", "x.pkl": b""})

    expected = model.generate("a red heart", seed=1).image_tokens
    pulled = TextToImage.from_pretrained("me/model", device="cpu")
    assert torch.equal(pulled.generate("a red heart", seed=1).image_tokens, expected)
    assert {path.suffix for path in pulled.parts.folder.rglob("*") if path.is_file()} == {".json", ".safetensors", ".model",
                                                                                           ".md"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    again = TextToImage.from_pretrained("me/model", device="cpu")
    assert not hub.requests
    assert torch.equal(again.generate("a red heart", seed=1).image_tokens, expected)


def test_a_revision_is_what_was_pushed_there(hub):
    first, second = tiny.vqgan(seed=0), tiny.vqgan(seed=1)
    commit = first.push_to_hub("me/tokenizer").rsplit("/", 1)[1]
    second.push_to_hub("me/tokenizer", branch="v2")
    for revision, wanted in ((None, first), ("main", first), (commit, first), ("v2", second)):
        for load in (load_tokenizer, VQGAN.from_pretrained):
            assert torch.equal(load("me/tokenizer", revision=revision).codebook, wanted.codebook), revision
    proposed = second.push_to_hub("me/tokenizer", create_pr=True)
    assert proposed == f"{hub.address}/me/tokenizer/discussions/1"
    assert torch.equal(load_tokenizer("me/tokenizer", revision="refs/pr/1").codebook, second.codebook)
    assert torch.equal(load_tokenizer("me/tokenizer").codebook, first.codebook)
    with pytest.raises(MissingFileError, match=r"^me/tokenizer: the hub model has no revision 'v3'; give a branch, a tag"):
        load_tokenizer("me/tokenizer", revision="v3")


def test_shards_arrive_with_their_index_and_leave_when_the_model_has_none(hub, tmp_path):
    model = tiny.seq2seq()
    sharded = model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    parts = {path.name: path.read_bytes() for path in sharded.iterdir()}
    assert sum(name.endswith(".safetensors") for name in parts) > 1
    model.push_to_hub("me/transformer")
    hub.repositories["me/transformer"].commit("main", parts)
    loaded = load_transformer("me/transformer")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    other = tiny.seq2seq(seed=3)
    other.push_to_hub("me/transformer")
    assert files(hub, "me/transformer") == ["README.md", "config.json", "model.safetensors"]
    assert torch.equal(load_transformer("me/transformer").to_logits.weight, other.to_logits.weight)


def test_a_matcher_is_pushed_with_its_text_tokenizer(hub, tmp_path):
    scorer = load_matcher(tiny.matcher_folder(tmp_path / "matcher"), device="cpu")
    assert isinstance(scorer, MatcherScorer)
    scorer.push_to_hub("me/matcher")
    pictures = tiny.pictures(2)
    pulled = load_matcher("me/matcher", device="cpu")
    assert torch.equal(pulled.scores(pictures, ["a red heart"]), scorer.scores(pictures, ["a red heart"]))


def test_a_model_keeps_the_commit_of_the_text_encoder_it_was_trained_with(hub, tmp_path):
    pytest.importorskip("transformers")
    from tests.fake_hub import Repository

    repository = hub.repositories["me/bert"] = Repository()
    for seed in (0, 1):
        bert = tiny.bert_folder(tmp_path / f"bert{seed}", seed)
        commit = repository.commit("main", {path.name: path.read_bytes() for path in bert.iterdir()})
        if seed == 0:
            saved, first = FrozenTextEncoder.load("me/bert", 12).save_pretrained(tmp_path / "text_tokenizer"), commit
    assert json.loads((saved / "config.json").read_text())["revision"] == first
    assert FrozenTextEncoder.from_pretrained(saved).config.revision == first  # main has another encoder now
    assert FrozenTextEncoder.load("me/bert", 12).config.fingerprint != FrozenTextEncoder.load(
        "me/bert", 12, revision=first).config.fingerprint


def test_a_repository_is_private_when_asked_and_a_public_one_is_not_taken_for_one(hub):
    model = tiny.vqgan()
    model.push_to_hub("me/secret", private=True)
    assert hub.repositories["me/secret"].private
    hub.repositories["me/secret"].private = False
    before = len(hub.repositories["me/secret"].commits)
    with pytest.raises(UserError, match=r"^me/secret: is there already and is public; make it private"):
        model.push_to_hub("me/secret", private=True)
    assert len(hub.repositories["me/secret"].commits) == before


def test_what_cannot_be_fetched_is_one_line(hub, monkeypatch):
    for name, words in (("me/nothing", "no such folder, and no hub model of that name"), ("me/no..thing", "no such folder")):
        with pytest.raises(MissingFileError, match=words) as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingFileError, match="at revision 'v1' is whole in the local cache while HF_HUB_OFFLINE is set"):
        load_tokenizer("me/nothing", revision="v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MissingFileError, match="the hub cannot be reached and the local cache has none"):
        load_tokenizer("me/nothing")


def test_a_local_folder_has_no_revision(folder):
    for load in (load_tokenizer, TextToImage.from_pretrained, load_transformer):
        with pytest.raises(UserError, match="a local folder has no revision 'v1'"):
            load(folder, revision="v1")


def test_the_commands_take_a_revision(hub, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TOKENLOOM_DEBUG", raising=False)
    TextToImage.from_pretrained(folder, device="cpu").push_to_hub("me/model", branch="v1")
    out = str(tmp_path / "out")
    for arguments in (["info", "me/model"], ["estimate", "me/model"],
                      ["generate", "octopus", "--model", "me/model", "--threads", "1", "--device", "cpu", "--out", out]):
        assert tokenloom.main([*arguments, "--revision", "v1"]) == 0, capsys.readouterr().err
        capsys.readouterr()
        assert tokenloom.main([*arguments, "--revision", "v2"]) == 2
        assert capsys.readouterr().err.splitlines() == [
            f"tokenloom {arguments[0]}: error: me/model: the hub model has no revision 'v2'; give a branch, a tag or a whole "
            "commit hash"]


def test_what_cannot_be_pushed_is_one_line(hub, monkeypatch):
    model = tiny.vqgan()
    for wrong in ("model", "a/b/c", "me/mo del", "", "me/bad..name"):
        with pytest.raises(UserError, match="not a hub id"):
            model.push_to_hub(wrong)
    with pytest.raises(UserError, match="leave create_pr or branch 'v1' out"):
        model.push_to_hub("me/model", create_pr=True, branch="v1")
    assert not hub.requests
    with pytest.raises(UserError, match=r"^me/model: the hub refuses the token \(403: Forbidden\); use one that may write"):
        model.push_to_hub("me/model", token="hf_bad")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"^me/model: no token of the hub; run `hf auth login`, set HF_TOKEN, or pass token$"):
        model.push_to_hub("me/model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunFailedError, match=r"^me/model: the hub cannot be reached \(ConnectError"):
        model.push_to_hub("me/model", token="hf_good")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^me/model: cannot push while HF_HUB_OFFLINE is set; unset it$"):
        model.push_to_hub("me/model", token="hf_good")
    assert not hub.repositories


@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_rounded_weights_are_neither_saved_nor_pushed(hub, folder, tmp_path, weights):
    model = TextToImage.from_pretrained(folder, device="cpu", weights=weights)
    for write in (lambda: model.save_pretrained(tmp_path / "again"), lambda: model.push_to_hub("me/model")):
        with pytest.raises(UserError, match=f"rounded to {weights} when they were loaded; load the model with weights="):
            write()
    assert not hub.requests and not (tmp_path / "again").exists()


def test_saving_a_sampler_writes_the_numbers_it_was_loaded_from(folder, tmp_path):
    from safetensors.torch import load_file

    model = TextToImage.from_pretrained(folder, device="cpu")  # whose matrices are views of fused ones
    model.generate("octopus")
    again = model.save_pretrained(tmp_path / "again")
    for part in ("seq2seq", "tokenizer_image"):
        before, after = (load_file(at / part / "model.safetensors") for at in (folder, again))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (again / "README.md").read_text() == (folder / "README.md").read_text()


def test_a_pushed_card_says_what_the_model_is(hub):
    tiny.vqgan().push_to_hub("me/tokenizer")
    repository = hub.repositories["me/tokenizer"]
    card = ModelCard(repository.commits[repository.refs["main"]]["README.md"].decode())
    assert (card.data.library_name, card.data.license, card.data.tags) == ("tokenloom", "unknown", ["tokenloom", "vqgan"])
    assert "Nothing is known here of its training" in card.text and "codebook_size: 32" in card.text
