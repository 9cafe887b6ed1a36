"""Torch's pickled files (.pt, .pth, .ckpt, .bin) from strangers: tensors and plain containers come out, nothing else runs.

torch's own restricted unpickler (`weights_only=True`) does the reading. Checkpoints of trainers hold further classes beside
their tensors (a callback's name, parsed arguments); those named in HARMLESS are replaced by a stand-in that keeps nothing. A
file that asks for any other class is refused by name before a byte of it is unpickled.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom_common.errors import UserError, one_line

MAX_PICKLE_BYTES = 256 << 20  # the pickle beside the tensors' own bytes: names, shapes, settings


class StandIn:
    """In the place of a class that a checkpoint names and conversion has no use for; it takes anything and keeps nothing."""

    def __init__(self, *args: Any, **values: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def empty_dict(*args: Any) -> dict:
    """In the place of a mapping that is made by a call."""
    return {}


HARMLESS = (
    *(f"pytorch_lightning.callbacks.{name}" for name in (
        "model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping", "lr_monitor.LearningRateMonitor",
        "progress.ProgressBar", "gradient_accumulation_scheduler.GradientAccumulationScheduler")),
    *(f"omegaconf.{name}" for name in (
        "dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata", "nodes.AnyNode",
        "nodes.IntegerNode", "nodes.FloatNode", "nodes.StringNode", "nodes.BooleanNode")),
    "typing.Any", "argparse.Namespace", "pathlib.PosixPath", "pathlib.Path", "pathlib.PurePosixPath",
    "builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str",
    "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct", "numpy.ndarray",
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler", "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes whose instances in a checkpoint are skipped; none of them is imported."""
MAPPINGS: dict[str, Any] = {"pytorch_lightning.utilities.parsing.AttributeDict": dict, "collections.defaultdict": empty_dict}
"""Kinds of mappings -> what is made in their place, since torch's unpickler fills plain ones only."""


def read_torch_file(path: Path) -> Any:
    """What the file holds, its tensors memory-mapped on the CPU. UserError, one line, for anything that is not such a file."""
    _refuse_other_archives(path)
    try:
        with torch.serialization.safe_globals([*((StandIn, name) for name in HARMLESS),
                                               *((made, name) for name, made in MAPPINGS.items())]):
            _refuse_classes(path)
            mapped = _is_zip(path)  # torch wrote no zip before 1.6, and that kind cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise _refused(path, named[1]) from None
        raise _damaged(path, error) from None
    except Exception as error:
        raise _damaged(path, error) from None


def _is_zip(path: Path) -> bool:
    """Whether it is a zip file, as torch writes since 1.6. UserError for a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:  # it reads the directory's place, and may stumble over it
        raise _damaged(path, error) from None


def _refuse_other_archives(path: Path) -> None:
    """A zip that is not torch's, or one whose pickle alone would fill the memory."""
    if not _is_zip(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _damaged(path, error) from None
    pickles = [entry for entry in names if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError(f"{path}: an archive without torch's data.pkl; unpack it first and give the checkpoint inside")
    if pickles[0].file_size > MAX_PICKLE_BYTES or any(e.compress_type != zipfile.ZIP_STORED for e in names):
        raise UserError(f"{path}: not as torch writes it (compressed, or with {pickles[0].file_size:,} bytes of pickle); "
                        "save it again with torch.save")


def _refuse_classes(path: Path) -> None:
    """UserError naming the first class that is neither torch's own nor harmless, before anything is unpickled."""
    if not _is_zip(path):
        return  # torch lists the classes of zip files only; the unpickler refuses the others' while it reads
    unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - set(HARMLESS) - set(MAPPINGS)
    if unknown:
        raise _refused(path, *sorted(unknown))


def _refused(path: Path, *names: str) -> UserError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return UserError(f"{path}: refused: beside tensors it asks for {', '.join(names[:3])}{more}, which could run code; nothing "
                     "of it was run. Where you trust its source, load it there and save its tensors alone")


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path}: not a whole torch checkpoint ({one_line(error)[:160]}); "
                     "download it again")


def checked(name: str, value: Tensor, path: Path) -> Tensor:
    """A dense tensor on the CPU, as a plain one. UserError for another layout, or one that claims more than its file holds."""
    if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
        raise UserError(f"{path}: tensor {name} is {value.layout} on {value.device}; only dense tensors are converted")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{path}: tensor {name} claims {list(value.shape)}, more than the file holds of it; download it again")
    return value.detach()
