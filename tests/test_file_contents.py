"""A file that is no weights is called what it is, in our words and with what to do."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tokenloom
from inference.checkpoints import convert
from tests import tiny
from tokenizer_image import load_tokenizer
from tokenloom_common.errors import UserError
from tokenloom_common.file_contents import not_whole


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("vq.pt"))
    return buffer.getvalue()


WRONG = {
    "page": (b"<!DOCTYPE html><html>404</html>", "a web page; download the file itself"),
    "page after blanks": (b"\xef\xbb\xbf\r\n  <html lang='en'><head></head></html>", "a web page; download the file itself"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page; download the file itself"),
    "answer": (json.dumps({"error": "Repository not found"}).encode(), "JSON text, as a server answers; download the file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a pointer of Git LFS; run `git lfs pull`"),
    "annex": (b"/annex/objects/SHA256E-s1--00.pt\n", "a pointer of git-annex; run `git annex get`"),
    "empty": (b"", "an empty file; download it again"),
    "zeros": (bytes(2000), "zeros at its start, as an interrupted download leaves them; download it again"),
    "gzip": (gzip.compress(b"x" * 99), "a gzip archive; unpack it"),
    "tar": (tar_bytes(), "a tar archive; unpack it"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(600), "a GGUF file; give the weights that it was made from"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(600), "an HDF5 file; give its weights as"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("name", ["vq.pt", "vq.ckpt", "vq.safetensors", "pytorch_model.bin"])
def test_a_download_that_is_something_else_is_named(tmp_path, capsys, case, name):
    content, words = WRONG[case]
    path = tmp_path / name
    path.write_bytes(content)
    assert tokenloom.main(["convert", "taming", str(path), str(tmp_path / "out")]) == 2
    what = "safetensors file" if path.suffix == ".safetensors" else "torch checkpoint"
    said = capsys.readouterr()
    assert f"error: {path}: not a whole {what} but {words}" in said.err
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def protocol_four(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": [1.5]}, protocol=4))


def cut(path: Path, keep: int) -> None:
    save = save_file if path.suffix == ".safetensors" else torch.save
    save({"a": torch.zeros(500)}, path)
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize(("name", "write", "words"), [
    ("x.pt", lambda path: cut(path, 1000), "but a cut or damaged one; download it again"),
    ("x.safetensors", lambda path: cut(path, 1000), "but a cut or damaged one; download it again"),
    ("x.safetensors", lambda path: cut(path, 30), "but a cut or damaged one; download it again"),
    ("x.pt", lambda path: save_file({"a": torch.zeros(5)}, path), "but a safetensors file; rename it to end in .safetensors"),
    ("x.safetensors", lambda path: torch.save({"a": torch.zeros(5)}, path), "but a zip archive, as torch.save writes; rename"),
    ("x.safetensors", lambda path: torch.save({"a": torch.zeros(5)}, path, _use_new_zipfile_serialization=False),
     "but a pickle, as torch.save writes; rename it to end in .pt"),
    ("x.pkl.pt", protocol_four, "but a pickle that torch.save did not write; load it where it was made"),
    ("x.pt", lambda path: path.write_bytes(b"\1\2\3random"), "torch checkpoint; download it again")])
def test_a_part_and_another_format_are_named(tmp_path, recwarn, name, write: Callable[[Path], object], words):
    write(tmp_path / name)
    with pytest.raises(UserError) as caught:
        convert("taming", tmp_path / name)
    said = str(caught.value)
    assert words in said
    assert "\n" not in said
    for advice in ("weights_only", "torch.load", "miniz", "Error"):  # of the libraries
        assert advice not in said
    assert not recwarn.list  # torch has one for pickles of others


def test_a_program_is_refused_as_one(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
    with pytest.raises(UserError, match="a TorchScript program, not weights; save the state_dict"):
        convert("taming", tmp_path / "x.pt")


@pytest.mark.parametrize("case", ["lfs", "page", "empty"])
def test_our_own_folders_say_it_too(tmp_path, case):
    tiny.vqgan().save_pretrained(tmp_path / "vq")
    content, words = WRONG[case]
    (tmp_path / "vq" / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a whole safetensors file but") as caught:
        load_tokenizer(tmp_path / "vq")
    assert words.split(";")[0] in str(caught.value)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.pt").write_bytes(b"")
    monkeypatch.setattr(Path, "open", refuse)
    assert str(not_whole(tmp_path / "x.pt", "torch checkpoint")) == f"{tmp_path / 'x.pt'}: cannot be read (permission denied)"
