"""Find the sets of weights that a checkpoint holds, and choose one.

Trainers keep an average of the weights (EMA) beside the raw ones: in a container of its own, or
under a prefix among the names, where latent diffusion's LitEma even takes the dots out. A set is
found by its landmark, a tensor that every model of the kind has: each place (containers and prefix)
that holds the landmark holds a set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from tokenloom_common.errors import UserError

CONTAINERS = ("state_dict", "model", "module")
"""Keys of the raw weights, the preferred ones first: Lightning, plain scripts, DeepSpeed."""
MAX_DEPTH = 5  # of containers within containers
MAX_SHOWN = 80  # letters of a place in a message

# DistributedDataParallel, torch.compile, Lightning's strategies, FSDP, activation checkpointing
_WRAPPERS = ("module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module",
             "_checkpoint_wrapped_module", "_fpw_module")
_WRAPPERS_WITHOUT_DOTS = re.compile(f"^(?:{'|'.join(_WRAPPERS)})+")
# ema, model_ema, ema_0.999, EMACallback, modelEma, averaged_model, avg_params; not schema
_AVERAGE = re.compile(r"(?<![A-Za-z])[Ee]ma(?![a-z])|(?<![A-Z])EMA|[a-z]Ema(?![a-z])|"
                      r"(?i:averag(?:ed|ing|e)?|shadow|polyak)|"
                      r"(?<![A-Za-z])(avg|swa)(?![A-Za-z])")
_RAW = "online_model"  # ema-pytorch's name of the raw weights beside their average
# attributes by which training code holds a model
_HOLDERS = ("model", "net", "network", "generator", "online_model")
_OPTIMIZER = re.compile(r"(^|_)opt")
_OTHER_NETWORKS = ("loss", "discriminator", "perceptual_loss")
# counters beside averages: of torch's AveragedModel, ema-pytorch, LitEma
_COUNTERS = ("n_averaged", "initted", "step", "decay", "num_updates")


@dataclass(frozen=True)
class WeightsLayout:
    """How the checkpoints of one kind of model keep their weights.

    landmarks: names of tensors, of which every model of this kind has one. prefixes: where a larger
    model keeps this one, the preferred place first. containers: see CONTAINERS.
    prefers_average: the project's own sampler takes the average where there is one.
    """

    landmarks: tuple[str, ...]
    prefixes: tuple[str, ...] = ("",)
    containers: tuple[str, ...] = CONTAINERS
    prefers_average: bool = True


@dataclass(frozen=True)
class WeightSet:
    """One set of weights by plain names.

    keys: of the containers that it is in. prefix: of its names there. part: the prefix that tells
    which model of a larger one it is (`first_stage_model.`), "" for a model by itself.
    """

    keys: tuple[str, ...]
    prefix: str
    part: str
    is_average: bool
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def place(self) -> str:
        """Keys and prefix joined with dots, in one line; "" for the top level."""
        joined = ".".join([*self.keys, self.prefix]).strip(".")
        return " ".join(joined.split())[:MAX_SHOWN]

    @property
    def label(self) -> str:
        """The place as messages show it."""
        return f"`{self.place}`" if self.place else "the top level"


@dataclass(frozen=True)
class Container:
    """A mapping in a checkpoint that holds tensors: the keys that lead to it, and its tensors."""

    keys: tuple[str, ...]
    tensors: dict[str, Tensor] = field(repr=False)


def containers_of(payload: Mapping, depth: int = 0, keys: tuple[str, ...] = (),
                  seen: set[int] | None = None) -> Iterator[Container]:
    """Every mapping with tensors, at the top or nested; states of optimizers are left out."""
    seen = set() if seen is None else seen
    if id(payload) in seen or depth > MAX_DEPTH:  # a hostile mapping may hold itself
        return
    seen.add(id(payload))

    tensors = {str(key): value for key, value in payload.items() if isinstance(value, Tensor)}
    if tensors:
        yield Container(keys, tensors)
    for key, value in payload.items():
        if isinstance(value, Mapping) and not _OPTIMIZER.search(str(key)):
            yield from containers_of(value, depth + 1, (*keys, str(key)), seen)


def is_average_name(name: str) -> bool:
    """Whether a key, prefix or file name calls what it holds an average."""
    return _AVERAGE.search(name) is not None


def averages_without_names(payload: Mapping) -> list[str]:
    """Places of averages that are lists of tensors, as torch_ema and diffusers keep them."""
    found = []
    # one level down: {"ema": {"shadow_params": [...]}}
    below = [(f"{key}.", value) for key, value in payload.items() if isinstance(value, Mapping)]
    for above, mapping in [("", payload), *below]:
        for key, value in mapping.items():
            is_list = isinstance(value, (list, tuple)) and len(value) > 0
            if is_list and is_average_name(str(key)) and isinstance(value[0], Tensor):
                found.append(" ".join(f"{above}{key}".split())[:MAX_SHOWN])
    return found


def plain_name(name: str) -> str:
    """A tensor's name without the parts that wrappers add, wherever they stand."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts)


def unwrapped(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Tensors by plain names. UserError if two would get one name."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new_name = plain_name(name)
        if new_name in plain:
            raise UserError(f"{where}: holds {new_name} twice, with and without a wrapper's prefix")
        plain[new_name] = tensor
    return plain


def find_sets(payload: Mapping, layout: WeightsLayout, where: Path) -> list[WeightSet]:
    """Every set of weights in a checkpoint. UserError where wrappers hide two tensors in a name."""
    containers = []
    for container in containers_of(payload):
        if any(_has_landmark(name, layout) for name in container.tensors):
            containers.append(Container(container.keys, unwrapped(container.tensors, where)))

    sets: list[WeightSet] = []
    dotless: list[tuple[Container, str, str]] = []
    for container in containers:
        prefixes = _prefixes(container, layout)
        stems = _dotless_stems(container, layout)
        dotless += [(container, stem, leaf) for stem, leaf in stems.items()]
        sets += [_set_below(prefix, container, [*prefixes, *stems]) for prefix in prefixes]
    if "current_model_state" in payload:  # Lightning's averaging keeps the raw weights there
        sets = [replace(found, is_average=found.keys == ("state_dict",)) for found in sets]

    if dotless and not sets:
        raise UserError(f"{where}: holds an average alone, whose names have lost their dots "
                        f"({dotless[0][2]}); give a file that has the raw weights too")
    for container, stem, leaf in dotless:
        found = _dotless_set(container, stem, leaf, sets, where)
        if found is not None:
            sets.append(found)
    return sets


def _has_landmark(name: str, layout: WeightsLayout) -> bool:
    plain = plain_name(name)
    last = plain.rpartition(".")[2]
    return any(_ends_with(plain, landmark) or last.endswith(landmark.replace(".", ""))
               for landmark in layout.landmarks)


def _ends_with(name: str, landmark: str) -> bool:
    return name == landmark or name.endswith(f".{landmark}")


def _prefixes(container: Container, layout: WeightsLayout) -> list[str]:
    """The prefixes under which landmarks are, "" among them if one has none."""
    found = []
    for name in container.tensors:
        for landmark in layout.landmarks:
            prefix = name.removesuffix(landmark)
            is_other = any(part in _OTHER_NETWORKS for part in prefix.split("."))
            if _ends_with(name, landmark) and prefix not in found and not is_other:
                found.append(prefix)
    return found


def _dotless_stems(container: Container, layout: WeightsLayout) -> dict[str, str]:
    """Prefix -> the landmark's name below it, for averages whose names have lost their dots."""
    found: dict[str, str] = {}
    for name in container.tensors:
        stem, dot, leaf = name.rpartition(".")
        for landmark in layout.landmarks:
            if "." in landmark and leaf.endswith(landmark.replace(".", "")):
                found[stem + dot] = leaf
    return found


def _set_below(prefix: str, container: Container, all_prefixes: Sequence[str]) -> WeightSet:
    """The tensors under a prefix, without those of a set further below."""
    inner = tuple(other for other in all_prefixes
                  if other.startswith(prefix) and len(other) > len(prefix))
    tensors = {}
    for name, tensor in container.tensors.items():
        if name.startswith(prefix) and not (inner and name.startswith(inner)):
            tensors[name.removeprefix(prefix)] = tensor

    parts = prefix.split(".")
    says_average = any(is_average_name(part) for part in [*container.keys, *parts])
    is_average = "n_averaged" in tensors or (says_average and _RAW not in parts)
    if is_average:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in _COUNTERS}
    return WeightSet(container.keys, prefix, _part(parts), is_average, tensors)


def _part(prefix: Sequence[str]) -> str:
    """A prefix without what tells holders and averages: `model.vqvae_ema.` -> `vqvae.`."""
    bare = [_AVERAGE.sub("", part).strip("_-0123456789") for part in prefix]
    return "".join(f"{part}." for part in bare if part and part not in _HOLDERS)


def _dotless_set(container: Container, stem: str, leaf: str, sets: Sequence[WeightSet],
                 where: Path) -> WeightSet | None:
    """An average whose names lack their dots, under the names of the set that it averages.

    leaf: its name of the landmark, below the prefix `stem`. None if no raw set fits it.
    """
    lead = _WRAPPERS_WITHOUT_DOTS.match(leaf)
    wrappers = lead[0] if lead else ""
    for raw in sets:
        parts = raw.prefix.split(".")
        # its names may begin at any part of the raw set's prefix: it may average a module within
        for start in range(len(parts)):
            short = {name: wrappers + ".".join([*parts[start:-1], name]).replace(".", "")
                     for name in raw.tensors}
            if raw.is_average or leaf not in short.values():
                continue
            found = {name: container.tensors[stem + short[name]] for name in short
                     if stem + short[name] in container.tensors}
            if len({short[name] for name in found}) < len(found):
                raise UserError(f"{where}: two tensors have one name in its average {stem}*, whose "
                                "names have lost their dots; give a file of the raw weights alone")
            return WeightSet(container.keys, stem, raw.part, True, found)
    return None
