"""Every option of the optimizers changes the run or is refused, and the published recipes can be written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.test_adafactor import plain_train, run_config, small
from tests.test_schedules import DALLE, EXAMPLES, PARTI
from tokenloom_common.errors import UserError
from training.config.loading import dump_config, load_config
from training.config.optim import OptimConfig
from training.config.run import RunConfig
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.tokenizer import TokenizerRunConfig
from training.engine.deepspeed_json import deepspeed_json
from training.engine.optim import OPTIMIZERS, SCHEDULES, build_optimizer

ADAFACTOR = {"name": "adafactor"}
CHANGES = {  # option -> what it is changed in, and to what
    "name": ({}, "adafactor"), "lr": ({}, 0.03), "weight_decay": (ADAFACTOR, 0.1), "warmup_steps": ({}, 4),
    "update_clipping": (ADAFACTOR, 0.5), "parameter_scaling": (ADAFACTOR, True), "schedule": ({}, "linear"),
    "final_lr_ratio": ({"schedule": "exponential"}, 0.3), "decay_start_step": ({"schedule": "exponential"}, 5),
    "halve_at_steps": ({"schedule": "halving", "halve_at_steps": [5]}, [4]), "gradient_clipping": ({}, 0.1)}
MORE_CHANGES = [*CHANGES.items(), ("betas", (ADAFACTOR, (0.5, 0.95))), ("betas", (ADAFACTOR, (0.9, 0.8))),
                ("final_lr_ratio", ({"schedule": "linear"}, 0.3)), ("final_lr_ratio", ({"schedule": "cosine"}, 0.3)),
                *(("schedule", ({}, name)) for name in SCHEDULES if name not in ("cosine", "halving"))]


def trained(optim: dict) -> Tensor:
    run, module = run_config(**optim), small()
    plain_train(module, run, range(8))
    return nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize(("option", "change"), MORE_CHANGES, ids=lambda value: str(value)[:40])
def test_every_option_changes_the_run(option, change):
    base, value = change
    assert not torch.allclose(trained(base), trained({**base, option: value}), rtol=0, atol=1e-6)


def test_the_tests_above_know_every_option():
    assert {option for option, _ in MORE_CHANGES} == set(OptimConfig.model_fields)
    assert set(OptimConfig.model_fields["schedule"].annotation.__args__) == set(SCHEDULES)
    assert set(OptimConfig.model_fields["name"].annotation.__args__) == set(OPTIMIZERS)


def test_the_gradient_clipping_of_parti_reaches_deepspeed():
    assert deepspeed_json(run_config(gradient_clipping=4.0), 1, "float32", 10)["gradient_clipping"] == 4.0


GIVEN = {"final_lr_ratio": 0.2, "decay_start_step": 5, "halve_at_steps": [5], "update_clipping": 2.0, "parameter_scaling": True}
READ = {("final_lr_ratio", "cosine"), ("final_lr_ratio", "exponential"), ("final_lr_ratio", "linear"),
        ("decay_start_step", "exponential"), ("halve_at_steps", "halving"), ("update_clipping", "adafactor"),
        ("parameter_scaling", "adafactor")}
CASES = [(option, "schedule", name) for option in ("final_lr_ratio", "decay_start_step", "halve_at_steps") for name in SCHEDULES
         ] + [(option, "name", name) for option in ("update_clipping", "parameter_scaling") for name in OPTIMIZERS]


@pytest.mark.parametrize(("option", "choice", "name"), CASES)
def test_an_option_that_is_not_read_is_refused_by_name(option, choice, name):
    values = {**EXAMPLES.get(name, {}), choice: name, option: GIVEN[option]}
    if (option, name) in READ:
        run_config(**values)
        return
    with pytest.raises(UserError, match=rf"optim\.{option} .* is not read with optim\.{choice} '{name}', only with ") as caught:
        run_config(**values)
    assert "\n" not in str(caught.value)


def test_the_ways_to_refuse_are_all_tried():
    assert set(GIVEN) == set(OptimConfig.READ_BY)
    assert {(option, name) for option, (_, names) in OptimConfig.READ_BY.items() for name in names} == READ


@pytest.mark.parametrize(("values", "words"), [
    ({"schedule": "exponential", "final_lr_ratio": 0}, "final_lr_ratio 0 is never reached by schedule 'exponential'"),
    ({"schedule": "exponential", "decay_start_step": 1}, r"decay_start_step 1 is before .* \(warmup_steps 2\)"),
    ({"schedule": "exponential", "decay_start_step": 8}, r"optim\.decay_start_step 8 is not before the end .*train\.steps 8"),
    ({"schedule": "halving"}, "'halving' needs halve_at_steps"),
    ({"schedule": "halving", "halve_at_steps": [5, 4]}, r"halve_at_steps \[5, 4\] must rise"),
    ({"schedule": "halving", "halve_at_steps": [4, 4]}, r"halve_at_steps \[4, 4\] must rise"),
    ({"schedule": "halving", "halve_at_steps": [1, 4]}, r"no earlier than the warm-up ends \(warmup_steps 2\)"),
    ({"schedule": "halving", "halve_at_steps": [0], "warmup_steps": 0}, "or step 1"),
    ({"schedule": "halving", "halve_at_steps": [4, 8]}, r"optim\.halve_at_steps 8 is not before the end .*train\.steps 8"),
    ({"schedule": "inverse_sqrt", "warmup_steps": 0}, "'inverse_sqrt' with warmup_steps 0"),
    ({"schedule": "exponental"}, "schedule"), ({"name": "adam"}, "name"), ({"update_clipping": 0}, "update_clipping"),
])
def test_what_cannot_be_is_refused_in_one_line(values, words):
    with pytest.raises(UserError, match=words) as caught:
        run_config(**values)
    assert "optim" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adafactor_with_sharded_state_is_refused_with_what_to_do(stage):
    with pytest.raises(UserError, match=rf"optim\.name 'adafactor' with deepspeed\.zero_stage {stage}: .*"
                                        r"use deepspeed\.zero_stage 0, or 'adamw'") as caught:
        run_config(stage, name="adafactor")
    assert "\n" not in str(caught.value)


def test_the_discriminators_optimizer_is_checked_as_well():
    needed = ["--data.path", "d", "--run_dir", "r", "--discriminator_optim.name", "adafactor"]
    with pytest.raises(UserError, match=r"discriminator_optim\.name 'adafactor' with deepspeed\.zero_stage 1"):
        load_config(TokenizerRunConfig, needed, "train.py", "text")
    more = ["--deepspeed.zero_stage", "0", "--discriminator_optim.schedule", "linear"]
    run = load_config(TokenizerRunConfig, [*needed, *more], "train.py", "text")
    assert (run.optim.name, run.discriminator_optim.name) == ("adamw", "adafactor")
    assert (run.optim.schedule, run.discriminator_optim.schedule) == ("cosine", "linear")


@pytest.mark.parametrize("values", [PARTI, DALLE], ids=["parti", "dalle"])
def test_a_published_recipe_is_read_and_written_as_yaml(values, tmp_path: Path):
    argv = [f"--optim.{key}={list(value) if isinstance(value, tuple) else value}" for key, value in values.items()]
    needed = ["--data.path", "d", "--run_dir", "r", "--image_tokenizer", "t", "--deepspeed.zero_stage", "0"]
    run = load_config(Seq2SeqRunConfig, [*needed, "--train.steps", "450000", *argv], "train.py", "text")
    assert run.optim == OptimConfig(**values)
    (tmp_path / "config.yaml").write_text(dump_config(run))
    assert load_config(Seq2SeqRunConfig, ["--config", str(tmp_path / "config.yaml")], "train.py", "text") == run


def test_default_values_of_options_that_are_not_read_are_accepted():
    """A merged config holds every option, also those that its schedule does not read."""
    old = {"lr": 0.001, "betas": [0.9, 0.95], "weight_decay": 0.05, "warmup_steps": 5, "schedule": "constant",
           "final_lr_ratio": 0.05, "gradient_clipping": 1.0}
    run = RunConfig.parse({"run_dir": "r", "optim": old}, "test")
    assert (run.optim.name, run.optim.schedule) == ("adamw", "constant")
    assert type(build_optimizer(small(), OptimConfig())) is torch.optim.AdamW
