"""`stu-serve`: an OpenAI-compatible HTTP server."""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from serve.config import EngineConfig
from serve.ray.config import ClusterConfig
from serve.server.access.keys import Keys
from serve.server.config import ServerConfig
from serve.server.listening import is_reached_from_outside, listening
from serve.server.operating.logs import log_as_json
from stu.common.cli import ArgumentParser, exit_if_terminated, run_command
from stu.common.processes import Hangups

logger = logging.getLogger("stu")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 if a signal stopped the server, 2 if it could not start."""
    return run_command("stu-serve", lambda: serve(_parse(argv)), "serve", ServerConfig)


def serve(config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT, then let running requests end.

    Raises UserError or OSError if the server cannot start.
    """
    repeats = log_as_json()
    hangups, keys = Hangups(), Keys(config.api_keys)
    with listening(config) as sockets:
        if not len(keys) and any(map(is_reached_from_outside, sockets)):
            logger.warning(
                "--host %s without API keys: everyone who reaches this machine may use the "
                "server; give --api-keys, or set STU_API_KEYS",
                config.host,
            )
        # This imports torch and the HTTP stack, which takes seconds: not for a wrong command line.
        from serve.server.http_server import run_server

        exit_if_terminated()
        run_server(config, keys, sockets, hangups, repeats.report)
    return 0


def config_from(settings: Mapping[str, Any]) -> ServerConfig:
    """Return the configuration with these settings, which may be texts as in a command line.

    Raises UserError for a setting that is not allowed.
    """
    return _config(_parser(exits=False).parse_object(dict(settings)))


def _parse(argv: Sequence[str] | None) -> ServerConfig:
    return _config(_parser().parse_args(argv))


def _config(parsed: Any) -> ServerConfig:
    values = parsed.as_dict()
    values.pop("config", None)
    engine = {setting.name: values.pop(setting.name) for setting in fields(EngineConfig)}
    cluster = {setting.name: values.pop(setting.name) for setting in fields(ClusterConfig)}
    return ServerConfig(**values, engine=EngineConfig(**engine), cluster=ClusterConfig(**cluster))


def _parser(exits: bool = True) -> ArgumentParser:
    parser = ArgumentParser(
        exits=exits,
        prog="stu-serve",
        description="Serve a model to OpenAI clients at /v1/completions, /v1/chat/completions, "
        "/v1/responses and /v1/embeddings, with a playground at /. After SIGTERM, running requests "
        "may finish and no new ones are accepted; a second SIGTERM ends everything at once.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, help="Model directory to serve")
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_settings(ServerConfig)
    return parser


if __name__ == "__main__":
    sys.exit(main())
