"""The peers of `benchmarks decode`: samplers of image tokens that do a model of ours' work through a loop of their own.

| peer | weights | guidance | pictures |
|---|---|---|---|
| x-transformers | ours | twice the rows | of any captions |
| transformers (BART) | random, as many in a layer | twice the rows | of any captions |
| min-dalle | ours, DALL-E mini's shape | its own, always | of one caption |

All of them include the caption's encoder. A peer is built from one of our models (`make_peer`), draws `Work` and proves that it
does the same work (`verify`).
"""

# Axes: B pictures, R rows (B, or 2B with guidance), s tokens drawn

from __future__ import annotations

import importlib
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from benchmarks.decode.reference import Work, make_model, make_work
from benchmarks.harness import Case
from seq2seq import EncoderDecoder
from tokenloom_common.errors import choose, one_line

INSTALL = "pip install tokenloom[bench]"


class Peer(Protocol):
    """What draws. one_caption: all pictures of some work are of one caption."""

    one_caption: bool

    def sample(self, work: Work) -> Tensor:
        """Tokens [R, s] in [0, K); [B, s] where guidance is its own."""

    def verify(self, work: Work) -> dict[str, Any]:
        """A row of the document's verification; `ok` says whether it does our work. In float32."""


class Kind(NamedTuple):
    """How a peer is made: its module and class there, the class's options, whether it has our weights."""

    module: str
    name: str
    options: dict[str, Any]
    same_weights: bool


PEERS = {
    "x-transformers": Kind("benchmarks.peers.x_transformers_sampler", "XTransformersPeer", {}, True),
    "x-transformers, no cache": Kind("benchmarks.peers.x_transformers_sampler", "XTransformersPeer", {"cached": False}, True),
    "transformers": Kind("benchmarks.peers.bart", "BartPeer", {"cache": "dynamic"}, False),
    "transformers, static cache": Kind("benchmarks.peers.bart", "BartPeer", {"cache": "static"}, False),
    "min-dalle": Kind("benchmarks.peers.min_dalle", "MinDallePeer", {}, True),
}
"""Name -> what it is."""


def make_peer(name: str, model: EncoderDecoder) -> Peer:
    """The peer for a model. UserError for an unknown name; ValueError, before anything is built, for a model that it cannot
    be; ImportError or RuntimeError without its package (`missing` says so before)."""
    kind: Kind = choose(PEERS, name, "peer")
    return getattr(importlib.import_module(kind.module), kind.name)(model, **kind.options)


def missing(name: str) -> str | None:
    """What to install, in one line, where a peer cannot be imported; None where it can. UserError for an unknown name."""
    kind: Kind = choose(PEERS, name, "peer")
    try:
        importlib.import_module(kind.module).peer_version()
    except (ImportError, RuntimeError) as error:  # transformers turns what fails inside its lazy imports into RuntimeError
        return f"{INSTALL} ({one_line(error)[:160]})"
    return None


def peer_version(name: str) -> str:
    """The version of a peer's package. ImportError or RuntimeError without it."""
    return importlib.import_module(choose(PEERS, name, "peer").module).peer_version()


def peer_work(peer: Peer, model: EncoderDecoder, pictures: int, tokens: int, guidance: float) -> Work:
    """`pictures` pictures, of one caption where the peer has no other way, else each of its own."""
    captions, images = (1, pictures) if peer.one_caption else (pictures, 1)
    return make_work(model, captions, images, tokens, guidance)


def peer_case(peer: str, pictures: int, tokens: int, guidance: float, config: dict[str, Any], device: str, dtype: str) -> Case:
    """The first `tokens` tokens of `pictures` pictures, from text ids on. The arguments are JSON values."""
    model = make_model(config, device, dtype)
    runner = make_peer(peer, model)
    work = peer_work(runner, model, pictures, tokens, guidance)
    return lambda: runner.sample(work)
