"""`tokenloom estimate`: memory of sampling, or, with --config, all that a training run takes."""

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

RUN_CONFIGS: dict[str, type[RunConfig]] = {
    "seq2seq": Seq2SeqRunConfig,
    "tokenizer": TokenizerRunConfig,
    "matcher": MatcherRunConfig,
}
STAND_INS = {"run_dir": "RUN", "data.path": "DATA", "image_tokenizer": "TOKENIZER"}
"""Keys without a default -> a stand-in where they are not given; nothing is read there."""
MOST_PROCESSES = 1 << 16
DESCRIPTION = ("Calculate what a training run will take, before it starts: memory of a process, "
               "steps, FLOPs, hours, disk. Every other option is a key of the config: "
               "--section.key value.")
EXAMPLES = """examples:
  tokenloom estimate --config training/recipes/small_seq2seq.yaml --data.path TOKENS \\
      --image_tokenizer TOKENIZER_RUN/model
  tokenloom estimate --config small_seq2seq --model.preset parti-3b --train.batch_size 2048 \\
      --gpus 64 --gpu H100 --grid 32x32"""
SIZE_OPTIONS = {
    "codebook_size": "codes",
    "text_length": "text ids per caption",
    "vocab_size": "entries of the text tokenizer",
    "feature_width": "width of a frozen text encoder",
    "rows": "rows of the data",
}
SHORT_PHASES = {  # column heads of at most 14 characters
    "forward and backward": "backward",
    "reducing gradients": "reducing",
    "optimizer step": "step",
    "samples and export": "export",
}


def main(argv: Sequence[str] | None = None) -> int:
    """`tokenloom estimate`: of sampling, or with --config of a training run."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # one command for users, two programs: --config tells which
    if not any(argument.split("=")[0] == "--config" for argument in arguments):
        return estimate_cli.main(arguments)
    options, rest = _parser().parse_known_args(arguments)  # rest: --config and keys of the config
    config, kind = _read_config(options.kind, rest)
    machine, precision = _machine(options, config)
    given = GivenSizes(options.grid, options.codebook_size, options.text_length, options.vocab_size,
                       options.feature_width, options.rows)
    sizes = Sizes(given)
    found = sizes_of_run(config, sizes)
    sizes.check_all_read()  # a size that this run has no use for is an error, not ignored

    plan = plan_of(config, precision, found.model, found.tokenizer)
    report = report_of(plan, machine, found.rows)
    values = {"kind": kind, **report.values, "assumed": sizes.assumed,
              "not_counted": sizes.not_counted, "calculated": True}
    if options.json:
        print(json.dumps(values, indent=2))
    else:
        _print(values, report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="tokenloom estimate", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, description=DESCRIPTION,
        epilog=EXAMPLES)
    parser.add_argument("--kind", choices=list(RUN_CONFIGS), help="which kind of run the config "
                        "is of (default: told by its keys and name)")
    parser.add_argument("--gpus", type=int, default=1,
                        help="processes, each with a GPU (default 1)")
    parser.add_argument("--gpu", help="kind of GPU, for its memory and speed: "
                        f"{', '.join(PEAK_FLOPS)} (default: the one that is here, or the CPU)")
    parser.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilisation: share of "
                        "the GPU's peak that is used (default 0.4)")
    parser.add_argument("--memory", help="memory of a process, such as 80GiB (default: that of "
                        "--gpu, or what this machine has left)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")

    sizes = parser.add_argument_group("sizes that files would say, where there are none yet")
    sizes.add_argument("--grid",
                       help=f"rows x columns of image tokens (default {DEFAULTS['grid']})")
    for name, meaning in SIZE_OPTIONS.items():
        default = f" (default {DEFAULTS[name]})" if DEFAULTS[name] else ""
        sizes.add_argument(f"--{name.replace('_', '-')}", type=int, help=meaning + default)
    return parser


# ---- config ----

def _read_config(kind: str | None, argv: list[str]) -> tuple[RunConfig, str]:
    """Read the config, and tell its kind of run by its keys and, where they allow two, its name."""
    name = _config_name(argv)
    if not name:
        raise UserError("--config needs a value")
    values = read_mapping(find_recipe(name))
    given = {argument[2:].split("=")[0] for argument in argv if argument.startswith("--")}
    errors: dict[str, UserError] = {}
    configs: dict[str, RunConfig] = {}
    # a config of one kind is refused by the others, whose keys differ
    for one in [kind] if kind else RUN_CONFIGS:
        config_class = RUN_CONFIGS[one]
        arguments = [*_stand_ins(config_class, given, values), *argv]
        try:
            configs[one] = load_config(config_class, arguments, "tokenloom estimate", "")
        except UserError as error:
            errors[one] = error

    named = [one for one in RUN_CONFIGS if one in Path(name).stem]
    if not configs:
        # the mistake in the kind that the file's name says is the one to report
        blamed = [one for one in named if one in errors] or list(errors)
        raise errors[blamed[0]]
    likely = [one for one in named if one in configs] or list(configs)
    if len(likely) > 1:
        raise UserError(f"--config {name} could be of {' or '.join(likely)}; say which with --kind")
    return configs[likely[0]], likely[0]


def _config_name(argv: list[str]) -> str:
    """Return the value of --config; "" without one."""
    # not argparse's work: the name is needed before it is known which config class to parse with
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if flag == "--config":
            return value
    for argument in argv:
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return ""


def _stand_ins(config_class: type[RunConfig], given: set[str], values: dict[str, Any]) -> list[str]:
    """Return options for the required keys that neither the command line nor the file has."""
    added: list[str] = []
    for key, value in STAND_INS.items():
        section_name, _, rest = key.partition(".")
        if section_name not in config_class.model_fields or key in given:
            continue
        section = values.get(section_name)
        if rest:
            in_file = isinstance(section, dict) and rest in section
        else:
            in_file = section_name in values
        # a model folder to start from brings its own image tokenizer
        starts_from_model = "init_from" in given or values.get("init_from") is not None
        brought = key == "image_tokenizer" and starts_from_model
        if not in_file and not brought:
            added += [f"--{key}", value]
    return added


# ---- machine ----

def _machine(options: argparse.Namespace, config: RunConfig) -> tuple[Machine, str]:
    """Return the machine that the run is planned for, and the run's precision on it."""
    if not 1 <= options.gpus <= MOST_PROCESSES:
        raise UserError(f"--gpus {options.gpus}: expected 1 to {MOST_PROCESSES:,}")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu}: expected a share above 0 and at most 1; 0.3 to 0.5 "
                        "is usual")
    gpu_here = torch.cuda.is_available()
    cuda = gpu_here or options.gpu is not None  # a run on --gpu can be planned on a laptop
    name = options.gpu or (torch.cuda.get_device_name() if gpu_here else "cpu")
    entry = known_gpu(name) if cuda else None
    if options.gpu is not None and entry is None:
        choose(PEAK_FLOPS, options.gpu, "--gpu")  # raises, and lists the names

    precision = resolve_precision(config, torch.device("cuda" if cuda else "cpu"))
    peak = peak_flops(name, precision) if cuda else None
    if entry is not None:
        require_precision(entry, peak, precision)
    memory = _memory(options, entry, cuda)
    return Machine(options.gpus, cuda, entry or name, memory, peak, options.mfu), precision


def _memory(options: argparse.Namespace, entry: str | None, cuda: bool) -> int | None:
    """Bytes that a process may use; None: unknown."""
    if options.memory is not None:
        return bytes_of(options.memory)
    if options.gpu is not None:
        return GPU_MEMORY[entry or ""] * 10**9  # makers' GB, not GiB
    memory = available_memory("cuda" if cuda else "cpu")
    if memory is None or cuda:  # each process has a GPU of its own
        return memory
    return memory // options.gpus  # processes of one machine share its memory


# ---- output ----

def _print(values: dict[str, Any], report: Report) -> None:
    batch = values["pictures"] // values["steps"]  # of all processes
    plan = (f"{values['processes']} x {values['device']}, {values['precision']}, batch {batch:,} "
            f"({values['micro_batch']} a process and micro-batch)")
    print(f"{values['kind']}: {values['parameters']['trainable']:,} parameters; {plan}\n")
    _print_stages(values, report)
    own = values["stages"][values["zero_stage"]]  # the stage that the config asks for
    if own["main_memory"]:
        print(f"main memory of a process beside: {human(own['main_memory'])} (float32 copies, "
              "offloaded state)")
    _print_work(values)
    _print_disk(values["disk"])
    for sentence in values["assumed"]:
        print(f"assumed: {sentence}")
    for sentence in values["not_counted"]:
        print(f"not counted: {sentence}")
    print(f"stage {values['zero_stage']} {values['advice']}")


def _print_stages(values: dict[str, Any], report: Report) -> None:
    """Print the table of memory: a row per part, a column per ZeRO stage."""
    memories = report.stages.values()
    _print_row("MiB of a process, by ZeRO stage", list(report.stages))
    for part in (*PARTS, "total"):
        cells = ["-" if memory is None else f"{getattr(memory, part) / MIB:,.1f}"
                 for memory in memories]
        _print_row(part.replace("_", " "), cells)
    _print_row("largest in", [_largest_phase(memory) for memory in memories])

    words = {None: "unknown", True: "fits", False: "does not"}  # None: this memory is not known
    fits = []
    for stage in values["stages"]:
        fits.append(words[stage.get("fits")] if stage["possible"] else "refused")
    limit = "unknown memory" if values["memory"] is None else human(values["memory"])
    _print_row(f"of {limit}", fits)


def _print_row(name: str, cells: Sequence[Any]) -> None:
    # cells as wide as the longest phase, see SHORT_PHASES
    print(f"{name:<34}" + "".join(f"{cell:>14}" for cell in cells))


def _print_work(values: dict[str, Any]) -> None:
    """Print steps, images, arithmetic and time."""
    counts = [f"{values['pictures']:,} pictures"]
    if values["tokens"]:
        counts.append(f"{values['tokens']:,} image tokens")
    if values["epochs"] is not None:
        counts.append(f"{values['epochs']:,.1f} epochs of {values['rows']:,} rows")
    print(f"\nsteps {values['steps']:,}: {', '.join(counts)}")

    flops = values["flops"]
    print(f"arithmetic: {flops['run']:.3g} FLOPs, {flops['picture']:.3g} a picture")
    hours = values["hours"]
    if hours is None:
        print("time: unknown for this device; give --gpu")
        return
    time = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"
    teraflops = values["peak_flops"] / 1e12
    print(f"time: {time} at MFU {values['mfu']:g} of {teraflops:,.0f} TFLOP/s")


def _print_disk(disk: dict[str, Any]) -> None:
    shards = f", token shards {human(disk['token_shards'])}" if disk["token_shards"] else ""
    print(f"disk: {human(disk['total'])} = {disk['checkpoints']} checkpoints of "
          f"{human(disk['checkpoint'])}, export {human(disk['export'])}{shards}")


def _largest_phase(memory: Any) -> str:
    """Name the part of a step in which most memory is in use."""
    if memory is None:
        return "-"
    return SHORT_PHASES.get(memory.phase, memory.phase)
