"""Read torch's pickled files (.pt, .pth, .ckpt, .bin) from strangers without running their code.

torch's own restricted unpickler (`weights_only=True`) reads tensors and plain containers. Trainers'
checkpoints hold further classes beside their tensors (a callback's name, parsed arguments): those
in HARMLESS are replaced by a stand-in that keeps nothing. A file that asks for any other class is
refused by name before a byte of it is unpickled.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenloom_common.errors import UserError
from tokenloom_common.file_contents import not_whole

WHAT = "torch checkpoint"
MAX_PICKLE_BYTES = 256 << 20  # the pickle beside the tensors' own bytes: names, shapes, settings
_ZIP_ERRORS = (zipfile.BadZipFile, OSError, ValueError)  # zipfile trusts offsets in the file


class StandIn:
    """Replaces a class that a checkpoint names and conversion does not need; keeps nothing."""

    # arguments and state are the two ways in which the unpickler hands an object its content
    def __init__(self, *args: Any, **values: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def empty_dict(*args: Any) -> dict:
    """Replaces a call that makes a mapping."""
    return {}


HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "pytorch_lightning.callbacks.progress.ProgressBar",
    "pytorch_lightning.callbacks.gradient_accumulation_scheduler.GradientAccumulationScheduler",
    "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata", "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.IntegerNode", "omegaconf.nodes.FloatNode", "omegaconf.nodes.StringNode",
    "omegaconf.nodes.BooleanNode",
    "typing.Any", "argparse.Namespace",
    "pathlib.PosixPath", "pathlib.Path", "pathlib.PurePosixPath",
    "builtins.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str",
    "numpy.dtype", "numpy.ndarray",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes whose instances in a checkpoint are skipped; none of them is imported."""
MAPPINGS: dict[str, Any] = {"pytorch_lightning.utilities.parsing.AttributeDict": dict,
                            "collections.defaultdict": empty_dict}
"""Mapping classes -> a replacement, since torch's unpickler fills plain dicts only."""


def read_torch_file(path: Path) -> Any:
    """The file's content, with tensors memory-mapped on the CPU.

    UserError in one line for a class that could run code, and for anything that is not such a file.
    """
    is_zip = _is_zip(path)
    if is_zip:
        _refuse_other_archives(path)
    stand_ins: list[Any] = [(StandIn, name) for name in HARMLESS]
    stand_ins += [(replacement, name) for name, replacement in MAPPINGS.items()]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            if is_zip:  # torch lists the classes of zip files only; else the unpickler refuses them
                _refuse_classes(path)
            # torch wrote no zip before 1.6, and the older format cannot be mapped
            warnings.simplefilter("ignore")  # torch's, on pickles of others
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UserError:
        raise
    except pickle.UnpicklingError as error:  # names a refused class in its message only
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise _refused(path, named[1]) from None
        raise not_whole(path, WHAT) from None
    except Exception:  # a damaged pickle can raise anything
        raise not_whole(path, WHAT) from None


def _is_zip(path: Path) -> bool:
    """Whether it is a zip file, as torch writes since 1.6. UserError for a damaged one."""
    try:
        return zipfile.is_zipfile(path)
    except _ZIP_ERRORS:
        raise not_whole(path, WHAT) from None


def _refuse_other_archives(path: Path) -> None:
    """UserError for a zip that is not torch's, or one whose pickle alone would fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (*_ZIP_ERRORS, NotImplementedError):
        raise not_whole(path, WHAT) from None

    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError(f"{path}: an archive without torch's data.pkl; unpack it first and give "
                        "the checkpoint inside")
    # written by torch.jit.save: its code folder is a program
    if any("/code/" in entry.filename for entry in entries):
        raise UserError(f"{path}: a TorchScript program, not weights; save the state_dict() of the "
                        "module that it holds with torch.save")
    # compressed entries cannot be mapped, and may unpack to far more than the file's size
    is_compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if is_compressed or pickles[0].file_size > MAX_PICKLE_BYTES:
        raise UserError(f"{path}: not as torch writes it (compressed, or with "
                        f"{pickles[0].file_size:,} bytes of pickle); save it again with torch.save")


def _refuse_classes(path: Path) -> None:
    """UserError naming the first classes that are neither torch's own nor harmless."""
    asked = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    unknown = asked - set(HARMLESS) - set(MAPPINGS)
    if unknown:
        raise _refused(path, *sorted(unknown))


def _refused(path: Path, *names: str) -> UserError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return UserError(f"{path}: refused: beside tensors it asks for {', '.join(names[:3])}{more}, "
                     "which could run code; nothing of it was run. If you trust its source, load "
                     "it there and save its tensors alone")


def checked(name: str, value: Tensor, path: Path) -> Tensor:
    """A dense tensor on the CPU without its gradient.

    UserError for another kind of tensor, and for one that claims more than its file holds.
    """
    if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
        raise UserError(f"{path}: tensor {name} is {value.layout} on {value.device}; only dense "
                        "tensors are converted")
    # strides of 0 turn a few stored bytes into a tensor of any size
    claimed = value.numel() * value.element_size()
    if claimed > value.untyped_storage().nbytes():
        raise UserError(f"{path}: tensor {name} claims {list(value.shape)}, more than the file "
                        "holds of it; download it again")
    return value.detach()  # a checkpoint may hold nn.Parameters
