"""The peers of `benchmarks decode`: samplers that do the same work through their own loop.

| peer | weights | guidance | images |
|---|---|---|---|
| x-transformers | ours | twice the rows | of any captions |
| transformers (BART) | random, as many per layer | twice the rows | of any captions |
| min-dalle | ours, DALL-E mini's shape | its own, always | of one caption |

All of them include the text encoder. A peer is built from one of our models (`make_peer`), samples
`Work`, and checks that it does the same work (`verify`).
"""

# Axes: B images, R rows (B, or 2B with guidance), s tokens sampled, K codebook size

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
    """A sampler. one_caption: all images of one `Work` must be of the same caption."""

    one_caption: bool

    def sample(self, work: Work) -> Tensor:
        """Sample tokens [R, s] in [0, K), or [B, s] if the peer applies guidance itself."""

    def verify(self, work: Work) -> dict[str, Any]:
        """Return a row of the document's verification, in float32; `ok`: the peer does our work."""


class Kind(NamedTuple):
    """How to make a peer: its module, its class there, and the class's options."""

    module: str
    name: str
    options: dict[str, Any]


_X_TRANSFORMERS = "benchmarks.peers.x_transformers_sampler"
PEERS = {
    "x-transformers": Kind(_X_TRANSFORMERS, "XTransformersPeer", {}),
    "x-transformers, no cache": Kind(_X_TRANSFORMERS, "XTransformersPeer", {"cached": False}),
    "transformers": Kind("benchmarks.peers.bart", "BartPeer", {"cache": "dynamic"}),
    "transformers, static cache": Kind("benchmarks.peers.bart", "BartPeer", {"cache": "static"}),
    "min-dalle": Kind("benchmarks.peers.min_dalle", "MinDallePeer", {}),
}


def make_peer(name: str, model: EncoderDecoder) -> Peer:
    """Build a peer for a model.

    Raises UserError for an unknown name; ValueError, before anything is built, for a model that the
    peer cannot express; ImportError or RuntimeError without the peer's package (check `missing`
    first).
    """
    kind: Kind = choose(PEERS, name, "peer")
    peer_class = getattr(importlib.import_module(kind.module), kind.name)
    return peer_class(model, **kind.options)


def missing(name: str) -> str | None:
    """The package to install if a peer cannot be imported, else None. UserError: unknown peer."""
    kind: Kind = choose(PEERS, name, "peer")
    try:
        importlib.import_module(kind.module).peer_version()
    except (ImportError, RuntimeError) as error:  # RuntimeError: lazy imports of transformers
        return f"{INSTALL} ({one_line(error)[:160]})"
    return None


def peer_version(name: str) -> str:
    """Version of a peer's package. ImportError or RuntimeError without it."""
    kind: Kind = choose(PEERS, name, "peer")
    return importlib.import_module(kind.module).peer_version()


def peer_work(peer: Peer, model: EncoderDecoder, pictures: int, tokens: int,
              guidance: float) -> Work:
    """Work of B images: all of one caption if the peer needs that, else each of its own."""
    captions, images = (1, pictures) if peer.one_caption else (pictures, 1)
    return make_work(model, captions, images, tokens, guidance)


def peer_case(peer: str, pictures: int, tokens: int, guidance: float, config: dict[str, Any],
              device: str, dtype: str) -> Case:
    """Sample `tokens` tokens of each image, from text ids on; the arguments are JSON values."""
    model = make_model(config, device, dtype)
    runner = make_peer(peer, model)
    work = peer_work(runner, model, pictures, tokens, guidance)
    return lambda: runner.sample(work)
