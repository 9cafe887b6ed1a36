"""Errors of libraries are passed on without their advice about options that Tokenloom does not have."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from seq2seq.frozen_text_files import load_encoder
from tests import tiny
from tokenloom_common.errors import UserError, one_line, run_command, without_foreign_advice

ADVICE = ("The repository X contains custom code which must be executed to correctly load the model. You can inspect it at "
          "https://hf.co/X. Please pass the argument `trust_remote_code=True` to allow custom code to be run.")
CUDA = ("CUDA error: device-side assert triggered. CUDA kernel errors might be asynchronously reported at some other API call. "
        "For debugging consider passing CUDA_LAUNCH_BLOCKING=1. Compile with `TORCH_USE_CUDA_DSA` to enable assertions.")


def raised(call) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(("text", "left"), [
    (ADVICE, "The repository X contains custom code which must be executed to correctly load the model."),
    (CUDA, CUDA[:CUDA.index(" For debugging")]),
    ("Vocabulary size too high (9). Please set it to <= 7, or use --character_coverage.", "Vocabulary size too high (9)."),
    ("401 Unauthorized. Make sure you are logged in with `huggingface-cli login`, or pass `token=`.", "401 Unauthorized."),
    ("Set trust_remote_code=True.", "")])
def test_advice_is_cut_where_it_begins(text, left):
    assert without_foreign_advice(text) == left


@pytest.mark.parametrize("text", [
    "", "No such file or directory: 'a. b. c'", "Expecting value: line 1 column 1 (char 0)",
    "You need sentencepiece. You can install it with: `pip install sentencepiece`. Please note that you may need to restart.",
    "Cannot reach x: offline mode is enabled. To disable it, please unset the `HF_HUB_OFFLINE` environment variable."])
def test_other_messages_stay_whole(text):
    assert without_foreign_advice(text) == text


def test_our_own_messages_stay_whole():
    assert one_line(UserError("a. b weights_only c")) == "a. b weights_only c"


def test_torchs_advice_to_load_any_pickle_is_left_out(tmp_path):
    torch.save(pytest.raises, tmp_path / "a.pt")  # a function of a module, which weights are not
    error = raised(lambda: torch.load(tmp_path / "a.pt", weights_only=True))
    assert isinstance(error, pickle.UnpicklingError)
    assert "weights_only" in str(error)
    assert one_line(error).startswith("UnpicklingError: Weights only load failed")
    assert "weights_only" not in one_line(error)
    assert "two options" not in one_line(error)


def test_numpys_advice_to_load_objects_is_left_out(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}]))
    error = raised(lambda: np.load(tmp_path / "a.npy"))
    assert "allow_pickle" in str(error)
    assert "allow_pickle" not in one_line(error)


def test_a_state_dict_that_does_not_fit_is_named_without_strict():
    error = raised(lambda: torch.nn.Linear(1, 1).load_state_dict({"weight": torch.zeros(1, 1)}))
    assert "Missing key" in one_line(error)
    assert "strict=False" not in one_line(error)


def test_an_encoder_with_code_of_its_own_is_refused_in_our_words(tmp_path):
    pytest.importorskip("transformers")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}, "architectures": ["Own"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r": needs Python code of its own, which is never run; give an encoder that") as caught:
        load_encoder(str(tmp_path), None)
    assert "trust_remote_code" not in str(caught.value)


def test_a_full_gpu_is_answered_with_our_options(capsys):
    text = ("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated memory is large try setting "
            "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation. See documentation.")

    def full(argv):
        raise torch.OutOfMemoryError(text)

    assert run_command(full, [], "prog") == 1
    assert capsys.readouterr().err == ("prog: error: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB; take "
                                       "fewer pictures at a time: --batch-size, train.batch_size\n")


def test_a_text_tokenizer_that_is_damaged_is_named_without_the_librarys_words(tmp_path):
    folder = tiny.model_folder(tmp_path / "m") / "text_tokenizer"
    (folder / "spiece.model").write_bytes(b"nonsense")
    from seq2seq import TextTokenizer

    with pytest.raises(UserError, match=r"spiece.model: not a SentencePiece model"):
        TextTokenizer.from_pretrained(folder)
