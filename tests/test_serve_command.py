"""The command line of `tokenloom serve`: every mistake is one line, before a model is loaded; its models and hooks."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest

from inference.commands.serve import serve
from inference.hooks.concepts_file import Concept, Concepts
from inference.serving import start
from inference.serving.auth import KEY_VARIABLE
from inference.serving.engine.models import ModelOptions
from inference.serving.limits import Limits
from inference.serving.start import ServeOptions, make_service, model_folders, run_server
from inference.shipped import DEFAULT_NAME
from tests import launching, tiny
from tests.serving_http import KEY, request_bytes, send, until_closed, wait_for
from tokenloom import main
from tokenloom_common.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """Call the command -> the one line that it says."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> str:
        code = main(["serve", "--port", "0", *map(str, arguments)])
        shown = capsys.readouterr()
        assert code == 2, shown.err
        assert shown.out == ""
        [line] = shown.err.splitlines()
        assert line.startswith("tokenloom serve: error: ")
        return line
    return call


@pytest.mark.parametrize(("arguments", "words"), [
    (["--port", "70000"], "--port 70000 must be 0 to 65,535"),
    (["--rows", "0"], "--rows 0 must be 1 to 4,096"),
    (["--queue", "0"], "--queue 0 must be 1 to 10,000"),
    (["--deadline", "nan"], "--deadline nan must be 1 to 86,400"),
    (["--deadline", "0.5"], "--deadline 0.5 must be 1 to 86,400"),
    (["--max-n", "11"], "--max-n 11 must be 1 to 10"),
    (["--threads", "0"], "--threads 0 must be 1 to"),
    (["--memory", "8 apples"], "--memory '8 apples': expected a number and a unit"),
    (["--models", "nowhere"], "--models nowhere: no such folder"),
    (["--models", ".", "--text-encoder", "t5"], "--text-encoder is of one model"),
    (["nowhere/model"], "nowhere/model"),
    (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines, so a key is needed"),
    (["--host", "no.such.host.invalid"], "so a key is needed"),
    (["--host", ""], "so a key is needed"),
    (["--api-key-file", "nowhere"], "--api-key-file nowhere: no such file"),
    (["--expand", "nothing"], "--expand 'nothing': unknown"),
    (["--safety", "nothing"], "--safety 'nothing': unknown"),
    (["--device", "abacus"], "--device abacus"),
    (["--weights", "int4"], "--weights"),
    (["--prot", "1"], "--prot"),
    (["--log-prompt"], "--log-prompt"),
])
def test_a_mistake_is_one_line(refused, arguments, words):
    assert words in refused(*arguments)


@pytest.mark.parametrize(("content", "words"), [
    ("", "has 0 characters"), ("short", "has 5 characters, at least 16"),
    ("two words of a long key", "one line of ASCII without spaces"),
    ("ключключключключключ", "one line of ASCII"), (f"{KEY}\n{KEY}", "one line"), ("x" * 5000, "too large for a key")])
def test_a_key_that_is_none_is_refused_and_not_shown(refused, tmp_path, content, words):
    (tmp_path / "key").write_text(content, encoding="utf-8")
    line = refused("--api-key-file", "key")
    assert words in line
    assert not content or content.split()[0] not in line


def test_two_keys_are_one_too_many(refused, tmp_path, monkeypatch):
    (tmp_path / "key").write_text(KEY)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert "both give a key" in refused("--api-key-file", "key")


def test_a_key_is_no_option(refused):
    assert "--api-key" in refused("--api-key", KEY)


def test_a_port_that_is_taken_is_said(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = refused("--port", taken.getsockname()[1])
    assert "address already in use; give another --port" in line


def test_a_missing_package_names_the_extra(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    assert "pip install 'tokenloom[serve]'" in refused()


@pytest.mark.long
def test_mistakes_are_found_before_torch_is_imported():
    code = ("import sys, tokenloom\n"
            "code = tokenloom.main(sys.argv[1:])\n"
            "print(code, 'torch' in sys.modules)")
    for arguments in (["--host", "0.0.0.0"], ["--models", "/nowhere"], ["--rows", "0"], ["--api-key-file", "/nowhere"]):
        done = subprocess.run([sys.executable, "-c", code, "serve", *arguments], cwd=launching.REPOSITORY,
                              env=launching.environment(), capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["2", "False"], done.stderr


# ---- models and hooks

def test_models_of_a_folder_come_after_the_one_that_is_named(folder):
    tiny.model_folder(folder.parent / "other" / "model")
    assert list(model_folders(None, folder.parent)) == ["other", "tiny"]
    assert list(model_folders(str(folder), folder.parent)) == ["tiny", "other"]


def test_two_models_of_one_name_are_refused(folder, tmp_path):
    tiny.model_folder(tmp_path / "tiny")
    with pytest.raises(UserError, match="would both be called tiny"):
        model_folders(str(folder), tmp_path)


def test_without_a_name_the_shipped_model_is_served(folder, monkeypatch):
    monkeypatch.setattr(start, "default_model_folder", lambda: folder)
    service = make_service(ServeOptions(loading=ModelOptions(device="cpu")))
    assert service.model_names == (DEFAULT_NAME,)
    assert service.shipped == DEFAULT_NAME
    assert make_service(ServeOptions(str(folder), loading=ModelOptions(device="cpu"))).shipped is None


def test_known_concepts_need_a_model_that_has_some(folder):
    options = ServeOptions(str(folder), expand="known-concepts", loading=ModelOptions(device="cpu"))
    with pytest.raises(UserError, match=r"has no concepts\.json"):
        make_service(options)


def test_an_unknown_word_is_said_where_the_model_has_concepts(folder, tmp_path):
    model = tmp_path / "with-concepts"
    shutil.copytree(folder, model)
    Concepts((Concept("red heart"),), frozenset({"red", "heart", "two"})).write(model / "concepts.json")
    service = make_service(ServeOptions(str(model), loading=ModelOptions(device="cpu")))
    assert "none of its words" in asyncio.run(service.prepare("with-concepts", "hovercraft")).note
    assert asyncio.run(service.prepare("with-concepts", "a red heart")).note is None
    service = make_service(ServeOptions(str(model), expand="known-concepts", loading=ModelOptions(device="cpu")))
    prepared = asyncio.run(service.prepare("with-concepts", "two harts"))
    assert (prepared.revised, "'harts'" in prepared.note) == ("red heart", True)


def test_a_signal_while_the_model_is_loading_ends_the_server(folder, monkeypatch):
    loading, may_go_on = threading.Event(), threading.Event()
    service = make_service(ServeOptions(str(folder), loading=ModelOptions(device="cpu"), limits=Limits(drain=0.1)))

    def load(name: str) -> None:
        loading.set()
        assert may_go_on.wait(60)

    monkeypatch.setattr(service.engine, "load", load)
    started: list[bool] = []
    monkeypatch.setattr(service.engine, "start", lambda: started.append(True))
    server = start.make_server(service)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))

    def stop() -> None:
        assert loading.wait(60)
        wait_for(lambda: server.started)
        server.handle_exit(signal.SIGTERM, None)

    threading.Thread(target=stop).start()
    assert run_server(server, listening) == 0  # although the model never comes
    listening.close()
    may_go_on.set()
    for thread in threading.enumerate():
        if thread.name == "load":
            thread.join(60)
    assert started == []


def test_what_was_asked_for_while_the_model_was_loading_is_drawn_before_the_end(folder, monkeypatch):
    loading, may_go_on, replies = threading.Event(), threading.Event(), []
    service = make_service(ServeOptions(str(folder), loading=ModelOptions(device="cpu")))
    load_model = service.engine.load

    def load(name: str) -> None:
        loading.set()
        assert may_go_on.wait(60)
        load_model(name)

    monkeypatch.setattr(service.engine, "load", load)
    server = start.make_server(service)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))

    def stop() -> None:
        assert loading.wait(60)
        wait_for(lambda: server.started)
        connection = send(listening.getsockname()[1], request_bytes({"prompt": "a red heart"}))
        wait_for(lambda: service.active)
        server.handle_exit(signal.SIGTERM, None)
        may_go_on.set()
        replies.append(until_closed(connection))

    stopping = threading.Thread(target=stop)
    stopping.start()
    assert run_server(server, listening) == 0
    stopping.join(60)
    listening.close()
    assert b"200 OK" in replies[0]


def test_the_text_encoder_reaches_the_models(monkeypatch):
    asked = []
    monkeypatch.setattr(start, "serve_until_stopped", lambda options, listening: asked.append(options) or 0)
    assert serve(["--port", "0", "--text-encoder", "t5"]) == 0
    assert asked[0].loading.text_encoder == "t5"


@pytest.mark.long
def test_a_model_that_cannot_be_loaded_ends_the_command(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    [weights] = (broken / "seq2seq").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    service = make_service(ServeOptions(str(broken), loading=ModelOptions(device="cpu")))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    with pytest.raises(UserError, match="seq2seq"):
        run_server(start.make_server(service), listening)
    listening.close()


def test_the_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert "tokenloom serve --models runs --memory 8GiB" in shown


