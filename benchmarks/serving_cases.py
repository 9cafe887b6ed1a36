"""The serving benchmark: a model, its server on a free port, and clients of it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from benchmarks.harness import SEED
from inference.model_folder import save_model_folder
from inference.pipeline import TextToImage
from inference.sampling import SamplingParams
from inference.serving.engine import Engine, EngineLimits, ModelOptions, Models
from inference.serving.limits import Limits
from inference.serving.server import make_server
from inference.serving.service import Service
from seq2seq import EncoderDecoder, Seq2SeqConfig, TextTokenizer
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.fingerprint import code_fingerprint
from tokenloom_common.errors import RunFailedError

ROUTE = "/v1/images/generations"
PROMPT = "a large red heart"
PARTIALS = 3
"""The first of three partial images comes after a quarter of the tokens."""
WAIT_SECONDS = 300.0


class Shape(NamedTuple):
    """Sizes of a random model."""

    side: int
    grid: int
    width: int
    layers: int
    codes: int


SHAPES = {True: Shape(16, 4, 32, 2, 64), False: Shape(32, 8, 256, 4, 512)}
"""By --quick."""


def make_model(folder: Path, shape: Shape) -> Path:
    """Save a model folder of random weights; what it draws means nothing, its time does."""
    torch.manual_seed(SEED)
    captions = [f"{PROMPT} {number} {word}" for number in range(20) for word in ("apple", "house")]
    text = TextTokenizer.train(captions, vocab_size=320, text_length=20)
    image = VQGAN(VQGANConfig(
        resolution=shape.side, channels=16, channel_multipliers=(1, 2, 4), num_res_blocks=1,
        norm_groups=8, attention_resolutions=(), mid_attention=False, z_channels=16, embed_dim=8,
        codebook_size=shape.codes))
    with torch.no_grad():  # k-means fills the codebook
        image.train()(torch.rand(shape.codes, 3, shape.side, shape.side) * 2 - 1)
    image.eval()
    seq2seq = EncoderDecoder(Seq2SeqConfig(
        text_vocab_size=text.vocab_size, text_length=20, codebook_size=shape.codes,
        grid=(shape.grid, shape.grid), width=shape.width, heads=2, head_dim=shape.width // 2,
        encoder_layers=2, decoder_layers=shape.layers,
        tokenizer_fingerprint=code_fingerprint(image))).eval()
    params = SamplingParams(guidance_scale=2.0, top_k=64)
    return save_model_folder(folder, image, seq2seq, text, params, "# benchmark\n")


@contextmanager
def served(folder: Path, rows: int, device: str) -> Iterator[Client]:
    """Serve a model folder in this process, as `tokenloom serve` does."""
    limits = Limits(deadline=WAIT_SECONDS, queue=1024)
    models = Models({"model": folder}, ModelOptions(rows=rows, device=device))
    engine = Engine(models, EngineLimits(limits.queue, limits.deadline))
    engine.load("model")
    engine.start()
    server = make_server(Service(engine, limits=limits))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield Client(listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        engine.close()
        listening.close()


class Client:
    """Asks for images; every request has a connection of its own, as clients do."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.seconds: list[float] = []  # of each request of `flood`

    def flood(self, requests: int) -> list[bytes]:
        """Send all requests at once -> the pixels of each image."""
        with ThreadPoolExecutor(requests) as pool:
            return list(pool.map(self.draw, range(requests)))

    def draw(self, seed: int) -> bytes:
        """Draw one image -> its pixels."""
        start = time.perf_counter()
        connection, response = self._post({"prompt": PROMPT, "seed": seed})
        reply = json.loads(response.read())
        connection.close()
        self.seconds.append(time.perf_counter() - start)
        content = base64.b64decode(reply["data"][0]["b64_json"])
        return Image.open(io.BytesIO(content)).tobytes()

    def first_partial(self, seed: int) -> None:
        """Wait for the first partial image of a stream, and leave."""
        connection, response = self._post(
            {"prompt": PROMPT, "seed": seed, "stream": True, "partial_images": PARTIALS})
        line = response.readline()
        while line.startswith(b":") or not line.strip():
            line = response.readline()
        if b"partial_image" not in line:
            raise RunFailedError(f"the stream began with {line[:100]!r}")
        response.readline()  # its picture
        connection.close()

    def _post(self, body: dict[str, Any]) -> tuple[http.client.HTTPConnection,
                                                   http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        connection.request("POST", ROUTE, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RunFailedError(f"the server answered {response.status}: {response.read(300)!r}")
        return connection, response


def one_after_another(model: TextToImage, requests: int) -> list[bytes]:
    """Draw the same images by single calls of `generate` -> their pixels."""
    return [model.generate(PROMPT, seed=seed).images[0].tobytes() for seed in range(requests)]


def quarter_of_the_tokens(model: TextToImage, seed: int) -> None:
    """Draw a quarter of an image's tokens, without a picture of them."""
    quarter = max(1, model.seq2seq.config.num_tokens // (PARTIALS + 1))
    for _ in model.stream(PROMPT, seed=seed, every=quarter):
        return
