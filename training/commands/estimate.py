"""The command estimate: the memory of sampling from a model, or, with --config, everything that a training will take."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from inference.commands import estimate as estimate_cli
from inference.memory.available import available_memory
from inference.memory.sizes import MIB, bytes_of, human
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import OneLineParser, UserError, choose
from training.config.loading import find_recipe, load_config
from training.config.matcher import MatcherRunConfig
from training.config.run import RunConfig
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.tokenizer import TokenizerRunConfig
from training.engine.gpus import GPU_MEMORY, PEAK_FLOPS, known_gpu, peak_flops
from training.engine.launch import resolve_precision
from training.planning.plan import plan_of
from training.planning.report import PARTS, Machine, Report, report_of, require_precision
from training.planning.sizes import DEFAULTS, GivenSizes, Sizes, sizes_of_run

KINDS: dict[str, type[RunConfig]] = {"seq2seq": Seq2SeqRunConfig, "tokenizer": TokenizerRunConfig, "matcher": MatcherRunConfig}
STAND_INS = {"run_dir": "RUN", "data.path": "DATA", "image_tokenizer": "TOKENIZER"}
"""Keys without a default, and what stands for them where they are not given: nothing is read there."""
MOST_PROCESSES = 1 << 16
DESCRIPTION = "Say what a training will take, before it starts: memory of a process, steps, FLOPs, hours, disk. Calculated."


def main(argv: Sequence[str] | None = None) -> int:
    """`tokenloom estimate`: of sampling, or with --config of a training."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not any(argument.split("=")[0] == "--config" for argument in arguments):
        return estimate_cli.main(arguments)
    options, rest = _parser().parse_known_args(arguments)
    config, kind = _config(options.kind, rest)
    machine, precision = _machine(options, config)
    given = GivenSizes(options.grid, options.codebook_size, options.text_length, options.vocab_size,
                       options.feature_width, options.rows)
    sizes = Sizes(given)
    found = sizes_of_run(config, sizes)
    sizes.check_all_read()
    plan = plan_of(config, precision, found.model, found.tokenizer)
    report = report_of(plan, machine, found.rows)
    values = {"kind": kind, **report.values, "assumed": sizes.assumed, "not_counted": sizes.not_counted, "calculated": True}
    if options.json:
        print(json.dumps(values, indent=2))
    else:
        _print(values, report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="tokenloom estimate", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{DESCRIPTION} Every other option is a key of the config: --section.key value.",
        epilog="examples:\n  tokenloom estimate --config training/recipes/small_seq2seq.yaml --data.path TOKENS "
               "--image_tokenizer TOKENIZER_RUN/model\n"
               "  tokenloom estimate --config small_seq2seq --model.preset parti-3b --train.batch_size 2048 --gpus 64 "
               "--gpu H100 --grid 32x32")
    parser.add_argument("--kind", choices=list(KINDS), help="which training the config is of (default: told by its "
                        "keys and name)")
    parser.add_argument("--gpus", type=int, default=1, help="processes, each with a GPU (default 1)")
    parser.add_argument("--gpu", help=f"kind of GPU, for its memory and speed: {', '.join(PEAK_FLOPS)} (default: the one that "
                        "is here, or the CPU)")
    parser.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilisation: share of the GPU's peak that is "
                        "used (default 0.4)")
    parser.add_argument("--memory", help="memory of a process, such as 80GiB (default: that of --gpu, or what this machine has "
                        "left)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    sizes = parser.add_argument_group("what follows from files, where they are not there yet")
    sizes.add_argument("--grid", help=f"rows x columns of image tokens (default {DEFAULTS['grid']})")
    for name, meaning in (("codebook_size", "codes"), ("text_length", "text ids a caption"),
                          ("vocab_size", "entries of the text tokenizer"), ("feature_width", "width of a frozen text encoder"),
                          ("rows", "rows of the data")):
        default = f" (default {DEFAULTS[name]})" if DEFAULTS[name] else ""
        sizes.add_argument(f"--{name.replace('_', '-')}", type=int, help=meaning + default)
    return parser


def _config(kind: str | None, argv: list[str]) -> tuple[RunConfig, str]:
    """The config, and which of the three trainings it is of."""
    given = {argument[2:].split("=")[0] for argument in argv if argument.startswith("--")}
    name = next((value for flag, value in zip(argv, [*argv[1:], ""], strict=True) if flag == "--config"),
                next((argument[9:] for argument in argv if argument.startswith("--config=")), ""))
    if not name:
        raise UserError("--config needs a value")
    values = read_mapping(find_recipe(name))
    named = [one for one in KINDS if one in Path(name).stem]
    errors: dict[str, UserError] = {}
    found: dict[str, RunConfig] = {}
    for one in [kind] if kind else KINDS:
        try:
            found[one] = load_config(KINDS[one], [*_stand_ins(KINDS[one], given, values), *argv], "tokenloom estimate", "")
        except UserError as error:
            errors[one] = error
    likely = [one for one in named if one in found] or list(found)
    if not found:
        raise errors[next(iter([one for one in named if one in errors] or errors))]
    if len(likely) > 1:
        raise UserError(f"--config {name} could be of {' or '.join(likely)}; say which with --kind")
    return found[likely[0]], likely[0]


def _stand_ins(config_class: type[RunConfig], given: set[str], values: dict[str, Any]) -> list[str]:
    added: list[str] = []
    for key, value in STAND_INS.items():
        first, _, rest = key.partition(".")
        section = values.get(first)
        present = isinstance(section, dict) and rest in section if rest else first in values
        brought = key == "image_tokenizer" and ("init_from" in given or values.get("init_from") is not None)
        if first in config_class.model_fields and key not in given and not present and not brought:
            added += [f"--{key}", value]
    return added


def _machine(options: argparse.Namespace, config: RunConfig) -> tuple[Machine, str]:
    """What the training is planned for, and the precision that it has there."""
    if not 1 <= options.gpus <= MOST_PROCESSES:
        raise UserError(f"--gpus {options.gpus}: expected 1 to {MOST_PROCESSES:,}")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu}: expected a share above 0 and at most 1; 0.3 to 0.5 is usual")
    here = torch.cuda.is_available()
    cuda = here or options.gpu is not None
    name = options.gpu or (torch.cuda.get_device_name() if here else "cpu")
    entry = known_gpu(name) if cuda else None
    if options.gpu is not None and entry is None:
        choose(PEAK_FLOPS, options.gpu, "--gpu")
    precision = resolve_precision(config, torch.device("cuda" if cuda else "cpu"))
    peak = peak_flops(name, precision) if cuda else None
    if entry is not None:
        require_precision(entry, peak, precision)
    if options.memory is not None:
        memory: int | None = bytes_of(options.memory)
    elif options.gpu is not None:
        memory = GPU_MEMORY[entry or ""] * 10**9
    else:
        memory = available_memory("cuda" if cuda else "cpu")
        memory = memory if memory is None or cuda else memory // options.gpus  # processes of one machine share it
    return Machine(options.gpus, cuda, entry or name, memory, peak, options.mfu), precision


def _print(values: dict[str, Any], report: Report) -> None:
    plan = f"{values['processes']} x {values['device']}, {values['precision']}, batch {values['pictures'] // values['steps']:,}"
    print(f"{values['kind']}: {values['parameters']['trainable']:,} parameters; {plan} "
          f"({values['micro_batch']} a process and micro-batch)\n")
    rows = {name: [_cell(memory, name) for memory in report.stages.values()] for name in (*PARTS, "total")}
    print(f"{'MiB of a process, by ZeRO stage':<34}" + "".join(f"{stage:>14}" for stage in report.stages))
    for name, cells in rows.items():
        print(f"{name.replace('_', ' '):<34}" + "".join(f"{cell:>14}" for cell in cells))
    print(f"{'largest in':<34}" + "".join(f"{_moment(memory):>14}" for memory in report.stages.values()))
    fits = {None: "unknown", True: "fits", False: "does not"}
    print(f"{'of ' + (human(values['memory']) if values['memory'] is not None else 'unknown memory'):<34}" + "".join(
        f"{fits[stage.get('fits')] if stage['possible'] else 'refused':>14}" for stage in values["stages"]))
    own = values["stages"][values["zero_stage"]]
    if own["main_memory"]:
        print(f"main memory of a process beside: {human(own['main_memory'])} (float32 copies, offloaded state)")
    print(f"\nsteps {values['steps']:,}: {values['pictures']:,} pictures"
          + (f", {values['tokens']:,} image tokens" if values["tokens"] else "")
          + (f", {values['epochs']:,.1f} epochs of {values['rows']:,} rows" if values["epochs"] is not None else ""))
    print(f"arithmetic: {values['flops']['run']:.3g} FLOPs, {values['flops']['picture']:.3g} a picture")
    if values["hours"] is not None:
        hours = values["hours"]
        print(f"time: {f'{hours:,.1f} hours' if hours >= 1 else f'{60 * hours:,.1f} minutes'} at MFU {values['mfu']:g} of "
              f"{values['peak_flops'] / 1e12:,.0f} TFLOP/s")
    else:
        print("time: unknown for this device; give --gpu")
    disk = values["disk"]
    print(f"disk: {human(disk['total'])} = {disk['checkpoints']} checkpoints of {human(disk['checkpoint'])}, export "
          f"{human(disk['export'])}" + (f", token shards {human(disk['token_shards'])}" if disk["token_shards"] else ""))
    for sentence in values["assumed"]:
        print(f"assumed: {sentence}")
    for sentence in values["not_counted"]:
        print(f"not counted: {sentence}")
    print(f"stage {values['zero_stage']} {values['advice']}")


def _cell(memory: Any, name: str) -> str:
    return "-" if memory is None else f"{getattr(memory, name) / MIB:,.1f}"


def _moment(memory: Any) -> str:
    short = {"forward and backward": "backward", "reducing gradients": "reducing", "optimizer step": "step",
             "samples and export": "export"}
    return "-" if memory is None else short.get(memory.phase, memory.phase)
