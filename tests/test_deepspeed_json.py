"""DeepSpeed's JSON from our config and from a user's own file: nothing misspelt, contradictory or unread gets through."""

from __future__ import annotations

import json
import re

import pytest

from tokenloom_common.config import dotted_names
from tokenloom_common.errors import UserError
from training.config.optim import OptimConfig
from training.config.run import RunConfig
from training.engine.deepspeed_json import AUTO, ELSEWHERE, KEYS, OURS, deepspeed_json


def derived(tmp_path, users=None, world_size=2, precision="bfloat16", optim=None, **changes):
    """Our JSON of a small run, with a user's file where there is one."""
    values = {"run_dir": "unused", "train": {"steps": 100, "batch_size": 8, "accumulation": 2},
              "optim": {"gradient_clipping": 0.5}, "deepspeed": {"zero_stage": 2}}
    for section, more in changes.items():
        values[section] |= more
    if users is not None:
        path = tmp_path / "ds.json"
        path.write_text(users if isinstance(users, str) else json.dumps(users))
        values["deepspeed"]["config"] = str(path)
    return deepspeed_json(RunConfig.parse(values, "test"), world_size, precision, 1000, optim)


def test_what_a_users_file_adds_is_used_and_auto_is_what_our_config_says(tmp_path):
    ours = derived(tmp_path)
    users = {
        "train_batch_size": AUTO, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": AUTO,
        "gradient_clipping": 0.5, "bf16": {"enabled": AUTO, "check_grad_overflow": False}, "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": AUTO, "allgather_bucket_size": 7,
                              "stage3_prefetch_bucket_size": AUTO, "offload_optimizer": {"device": "none", "pin_memory": True}},
        "communication_data_type": "fp32", "prescale_gradients": True, "wall_clock_breakdown": True, "steps_per_print": 5}
    found = derived(tmp_path, users)
    assert found == ours | {
        "bf16": {"enabled": True, "check_grad_overflow": False}, "communication_data_type": "fp32", "prescale_gradients": True,
        "wall_clock_breakdown": True, "steps_per_print": 5,
        "zero_optimization": ours["zero_optimization"] | {"overlap_comm": True, "allgather_bucket_size": 7,
                                                          "offload_optimizer": {"device": "none", "pin_memory": True}}}


def all_keys(known=KEYS, prefix=()):
    for key, below in known.items():
        yield (*prefix, key)
        if below is not None:
            yield from all_keys(below, (*prefix, key))


def misspelt(word: str, how: int) -> str:
    """A letter left out, doubled, two swapped, or British."""
    at = len(word) // 2
    swapped = word[:at - 1] + word[at] + word[at - 1] + word[at + 1:]
    return [word[:at] + word[at + 1:], word[:at] + word[at] + word[at:], swapped,
            word.replace("iz", "is") if "iz" in word else word + "s"][how % 4]


TYPOS = [(path, misspelt(path[-1], number)) for number, path in enumerate(all_keys())
         if misspelt(path[-1], number) != path[-1] and len(path[-1]) > 4]


def test_there_are_forty_typos():
    assert len(TYPOS) >= 40
    assert sum(len(path) == 1 for path, _ in TYPOS) >= 10


@pytest.mark.parametrize(("path", "typo"), TYPOS, ids=lambda value: value if isinstance(value, str) else ".".join(value))
def test_a_misspelt_key_is_refused_with_the_nearest_one(tmp_path, path, typo):
    users: dict = {typo: AUTO}
    for section in reversed(path[:-1]):
        users = {section: users}
    with pytest.raises(UserError) as caught:
        derived(tmp_path, users)
    message = str(caught.value)
    assert f"unknown key '{'.'.join((*path[:-1], typo))}'; did you mean '{path[-1]}'?" in message
    assert str(tmp_path) in message
    assert "\n" not in message


@pytest.mark.parametrize("key", ELSEWHERE)
def test_a_key_that_means_nothing_here_says_what_does(tmp_path, key):
    with pytest.raises(UserError, match=f"'{key}' means nothing here: "):
        derived(tmp_path, {key: {}})


def test_what_is_said_instead_is_a_key_of_our_config():
    texts = [text for text in ELSEWHERE.values() if text.startswith("say ")]
    said = {name for text in texts for name in re.findall(r"[a-z_]+\.[a-z_]+|seed", text)}
    assert {"log.tensorboard", "log.wandb", "optim.lr", "seed"} <= said
    assert said <= set(dotted_names(RunConfig))


CONTRADICTIONS = [
    ({"train_batch_size": 16}, "'train_batch_size' is 16, and train.batch_size makes it 8"),
    ({"gradient_accumulation_steps": 1}, "train.accumulation makes it 2"),
    ({"train_micro_batch_size_per_gpu": 4}, r"train.batch_size / \(processes x train.accumulation\) makes it 2"),
    ({"gradient_clipping": 1.0}, "optim.gradient_clipping makes it 0.5"),
    ({"zero_optimization": {"stage": 3}}, "'zero_optimization.stage' is 3, and deepspeed.zero_stage makes it 2"),
    ({"bf16": {"enabled": False}}, "train.precision makes it true"),
    ({"fp16": {"enabled": True}}, "train.precision makes it false"),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, 'deepspeed.offload makes it "none"'),
    ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, 'is "nvme", and deepspeed.offload makes it "none"')]


@pytest.mark.parametrize(("users", "words"), CONTRADICTIONS)
def test_another_value_than_ours_is_refused_with_both(tmp_path, users, words):
    with pytest.raises(UserError, match=words):
        derived(tmp_path, users)


def test_every_key_that_is_ours_has_a_contradiction_above():
    flat = [name for users, _ in CONTRADICTIONS for name in flattened(users)]
    assert sorted(flat) == sorted(OURS)


def flattened(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@pytest.mark.parametrize(("text", "words"), [
    ("{", "no JSON file that can be read"), ("[1]", "one object of keys and values, not list"),
    ('{"zero_optimization": 2}', "'zero_optimization' is a section of keys, not 2"),
    ('{"gradient_clipping": {"value": 1}}', "'gradient_clipping' is a value, not a section of keys")])
def test_a_file_of_another_form_is_refused(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        derived(tmp_path, text)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"deepspeed.config: .*nowhere.json: no such file"):
        derived(tmp_path, deepspeed={"config": str(tmp_path / "nowhere.json")})


@pytest.mark.parametrize(("stage", "offload", "words"), [
    (0, "optimizer", "needs zero_stage 1"), (2, "parameters", "needs zero_stage 3")])
def test_what_is_not_sharded_cannot_be_offloaded(tmp_path, stage, offload, words):
    with pytest.raises(UserError, match=words):
        derived(tmp_path, deepspeed={"zero_stage": stage, "offload": offload})


def test_offload_is_said_in_deepspeeds_words(tmp_path):
    zero = derived(tmp_path, deepspeed={"offload": "optimizer"})["zero_optimization"]
    assert (zero["offload_optimizer"], zero.get("offload_param")) == ({"device": "cpu"}, None)
    zero = derived(tmp_path, {"zero_optimization": {"offload_param": {"device": "cpu", "pin_memory": True}}},
                   deepspeed={"zero_stage": 3, "offload": "parameters"})["zero_optimization"]
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_optimizer"] == {"device": "cpu"}


def test_another_engines_clipping_is_its_own(tmp_path):
    other = OptimConfig(gradient_clipping=0.0)
    assert derived(tmp_path, {"gradient_clipping": 0.5}, optim=other)["gradient_clipping"] == 0.0


def test_the_keys_are_those_of_this_deepspeed(group):
    """Sections as DeepSpeed's own models have them; names of the top level as its sources read them."""
    import pathlib

    import deepspeed
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def names(model):
        return {field.alias or name for name, field in model.model_fields.items()}

    zero = KEYS["zero_optimization"]
    for known, model in ((KEYS["bf16"], DeepSpeedBF16Config), (KEYS["fp16"], DeepSpeedFP16Config), (zero, DeepSpeedZeroConfig),
                         (KEYS["comms_logger"], CommsLoggerConfig), (zero["offload_param"], DeepSpeedZeroOffloadParamConfig),
                         (zero["offload_optimizer"], DeepSpeedZeroOffloadOptimizerConfig)):
        assert set(known) <= names(model)
    package = pathlib.Path(deepspeed.__file__).parent
    sources = "".join(path.read_text() for part in ("runtime", "profiling", "comm") for path in (package / part).rglob("*.py"))
    for key in KEYS:
        assert f'"{key}"' in sources or f"'{key}'" in sources, key
