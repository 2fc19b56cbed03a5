"""The ``serve`` verb: the models, the socket, and the server on it."""

import ipaddress
import logging
import re
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from job.config.schema import Config
from job.errors import UserError, report_os_error
from job.inference.ensemble import Ensemble
from job.inference.generate import load_model
from job.serving.api import Service, build_app
from job.serving.connection import Connection
from job.serving.conversations import Conversations, ServedModel
from job.serving.guard import LOOPBACK_NAMES, Guard
from job.training.checkpoint import LoadedCheckpoint

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", "8000"
TOKEN_ENV_VAR, TOKEN_FILE_ENV_VAR = "LANES_SERVE_TOKEN", "LANES_SERVE_TOKEN_FILE"
_MIN_TOKEN_CHARACTERS, _MAX_TOKEN_BYTES = 16, 4096
_CHOOSE_ANOTHER = "choose a random one: openssl rand -hex 32"
_MAX_CONNECTIONS = 1000
_STOP_TIMEOUT_S = 2  # for responses that are being sent when the server stops


class Server(uvicorn.Server):
    """A server that ends all streams when it stops, and so does not wait for them."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops the server."""
        self.service.engine.close()
        logging.getLogger("uvicorn.error").disabled = True  # of tasks that are cancelled next
        await super().shutdown(sockets)


def load_models(checkpoints: Sequence[LoadedCheckpoint], config: Config) -> list[ServedModel]:
    """Returns the models of checkpoints, each under a name of its own.

    Args:
        checkpoints: of any vocabularies
        config: ``evaluate.weights``, and the cell of ``model`` as the user gave it

    Raises:
        UserError: as ``load_model``
    """
    models: dict[str, ServedModel] = {}
    for loaded in checkpoints:
        vocabulary, model_config = loaded.vocabulary, loaded.config.model
        model = load_model(loaded, config.model, config.evaluate.weights)
        name, number = (base := loaded.config.run.name or "model"), 1
        while name in models:
            number += 1
            name = f"{base} ({number})"
        description = f"{model_config.cell}, {' and '.join(map(str, model_config.layer_sizes))} units"
        ensemble = Ensemble([model], None if loaded.config.generate.unknown else vocabulary.unknown_id)
        models[name] = ServedModel(
            name, loaded.checkpoint.step, ensemble, vocabulary, loaded.config.corpus, loaded.config.run.seed,
            description,
        )  # fmt: skip
    return list(models.values())


def read_token(environment: Mapping[str, str], host: str) -> str:
    """Returns the token that clients need; empty if there is none, which only a loopback address may have.

    Args:
        environment: may have the token, or the name of a file with it
        host: the address that the server listens on

    Raises:
        UserError: it is missing or too short, or its file cannot be read
    """
    file, token = environment.get(TOKEN_FILE_ENV_VAR), environment.get(TOKEN_ENV_VAR)
    origin = TOKEN_ENV_VAR if file is None else f"{TOKEN_FILE_ENV_VAR} = {file}"
    if file is not None:
        with report_os_error(f"{origin}: cannot be read"), Path(file).open("rb") as stream:
            token = stream.read(_MAX_TOKEN_BYTES).decode(errors="replace").strip()
    if token is None and not is_loopback(host):
        problem = f"--host = {host}: others can reach it, and there is no token"
        raise UserError(problem, f"set {TOKEN_ENV_VAR}, or {TOKEN_FILE_ENV_VAR} to the name of a file with it")
    if token is not None and len(token) < _MIN_TOKEN_CHARACTERS:
        problem = f"{origin}: has fewer than {_MIN_TOKEN_CHARACTERS} characters"
        raise UserError(problem, _CHOOSE_ANOTHER)
    if token is not None and not re.fullmatch("[!-~]+", token):  # a header cannot have the others
        raise UserError(f"{origin}: has a character that is not a letter, digit or sign of ASCII", _CHOOSE_ANOTHER)
    return token or ""


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach an address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: str) -> socket.socket:
    """Returns a socket that listens on an address. Raises UserError if that is not possible."""
    number, problem = _parse_port(port), f"--host {host} --port {port}: cannot listen there"
    try:
        with report_os_error(problem, "choose another --port (0: any free one) or --host"):
            family, *_ = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            return socket.create_server((host, number), family=family)
    except UnicodeError:  # from the encoding of international names, which have a largest length
        raise UserError(f"--host = {host}: is not an address or name", "choose another one") from None


def _parse_port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text[:6]) >= 1 << 16:
        raise UserError(f"--port = {text}: is not a port", "give a number from 0 to 65535")
    return int(text)


def build_server(models: Sequence[ServedModel], host: str, token: str) -> Server:
    """Returns a server of models, which has not started.

    Args:
        models: each with a name of its own
        host: the address that it listens on
        token: that clients need; empty: none
    """
    service = Service(models, Conversations())
    hosts = LOOPBACK_NAMES | {_url_name(host)} if is_loopback(host) else None
    config = uvicorn.Config(
        Guard(build_app(service), token, hosts), http=Connection, loop="asyncio", ws="none", lifespan="off",
        log_config=None, access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS, timeout_graceful_shutdown=_STOP_TIMEOUT_S,
    )  # fmt: skip
    return Server(config, service)


def run_server(server: Server, listener: socket.socket) -> int:
    """Serves requests of a socket that listens until SIGINT or SIGTERM; returns the exit status."""
    received: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        received.append(number)
        server.should_exit = True

    # The server has handlers of its own while it runs, and afterwards sends itself again what it received.
    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run([listener])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else 0


def page_address(host: str, listener: socket.socket) -> str:
    """Returns the address of the page."""
    return f"http://{_url_name(host)}:{listener.getsockname()[1]}/"


def _url_name(host: str) -> str:
    return f"[{host.lower()}]" if ":" in host else host
