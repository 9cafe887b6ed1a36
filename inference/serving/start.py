"""`tokenloom serve` from its checked options on: models, engine, service, server."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from prometheus_client import disable_created_metrics

from inference.hooks.applied import Hooks
from inference.hooks.concepts_file import folder_concepts
from inference.hooks.expanders import KNOWN_CONCEPTS, load_expander
from inference.hooks.expansion import PromptExpander
from inference.hooks.known_concepts import KnownConcepts
from inference.hooks.safety import SafetyFilter
from inference.serving.auth import ApiKey
from inference.serving.engine import Engine, EngineLimits
from inference.serving.engine.models import ModelOptions, Models, find_models, model_name
from inference.serving.limits import Limits
from inference.serving.logs import log_event, start_logging
from inference.serving.server import DrainingServer, make_server
from inference.serving.service import Service
from inference.shipped import DEFAULT_NAME, default_model_folder
from tokenloom_common.errors import RunFailedError, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeOptions:
    """The command line, checked. model: None for the shipped one, unless `models` is given."""

    model: str | None = None
    models: Path | None = None
    host: str = "127.0.0.1"
    key: ApiKey | None = None
    limits: Limits = field(default_factory=Limits)
    loading: ModelOptions = field(default_factory=ModelOptions)
    threads: int | None = None
    log_prompts: bool = False
    expand: str | None = None
    safety: SafetyFilter | None = None


def serve_until_stopped(options: ServeOptions, listening: socket.socket) -> int:
    """Serve on a bound socket until a signal. UserError for a model that cannot be served."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    disable_created_metrics()  # a second series for each counter, with the time of its first event
    service = make_service(options)
    start_logging(options.log_prompts)
    server = make_server(service)
    address = shown_address(listening)
    names = service.model_names
    log_event(log, logging.INFO, "listening", url=address, models=list(names))
    print(f"Serving {', '.join(names)} at {address} (the page) and {address}/v1 (OpenAI clients); "
          "Ctrl+C stops.", flush=True)
    return run_server(server, listening)


def run_server(server: DrainingServer, listening: socket.socket) -> int:
    """Load the first model while the server already answers, and serve until it is stopped.

    What went wrong in loading is raised once the server has ended.
    """
    service = server.service
    failures: list[BaseException] = []

    def load() -> None:
        try:
            service.engine.load(service.model_names[0])
            if service.draining and not service.active:  # stopped while it was loading
                return
            service.engine.start()  # also to draw what was asked for before the stop
            service.loading = False
            if not service.draining:
                log_event(log, logging.INFO, "ready", model=service.model_names[0])
        except BaseException as error:
            failures.append(error)
            server.should_exit = True

    service.loading = True
    loader = threading.Thread(target=load, name="load", daemon=True)
    loader.start()
    try:
        server.run(sockets=[listening])
    finally:
        loader.join(server.seconds_left)
        service.engine.close()
    if failures:
        raise failures[0]
    if server.failed:
        raise RunFailedError("the model thread has ended; its log line has the reason")
    log_event(log, logging.INFO, "stopped")
    return 0


def make_service(options: ServeOptions) -> Service:
    """Return the service of the options; no weights are loaded."""
    folders = model_folders(options.model, options.models)
    models = Models(folders, options.loading)
    limits = options.limits
    engine = Engine(models, EngineLimits(queue=limits.queue, deadline=limits.deadline))
    places = {name: models[name].folder for name in models.names}
    concepts = {name: found for name, folder in places.items()
                if (found := folder_concepts(folder)) is not None}
    hooks = {}
    for name in models.names:
        expander: PromptExpander | None = None
        if options.expand == KNOWN_CONCEPTS:
            if name not in concepts:
                raise UserError(f"--expand {KNOWN_CONCEPTS}: model {name} has no concepts.json "
                                f"in {places[name]}; leave it out, or serve another model")
            expander = KnownConcepts(concepts[name])
        elif options.expand is not None:
            expander = load_expander(options.expand)
        hooks[name] = Hooks(expander, options.safety, _say_nothing)

    shipped = DEFAULT_NAME if options.model is None and options.models is None else None
    return Service(engine, hooks, concepts, limits, options.key, options.host, shipped,
                   options.log_prompts)


def model_folders(model: str | None, models: Path | None) -> Mapping[str, str | Path]:
    """Return the folders to serve by name; MODEL first, so that it is the one by default."""
    if model is None and models is None:
        return {DEFAULT_NAME: default_model_folder()}
    folders: dict[str, str | Path] = {}
    if model is not None:
        folders[model_name(model)] = model
    if models is not None:
        for name, folder in find_models(models).items():
            if name in folders and Path(folders[name]).resolve() != folder.resolve():
                raise UserError(f"{folders[name]} and {folder} would both be called {name}; "
                                "rename one")
            folders.setdefault(name, folder)
    return folders


def shown_address(listening: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _say_nothing(note: str) -> None:
    """Take a hook's note, which is said in the reply and not on stderr: it has the prompt."""
