"""The settings of `stu-serve`."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from serve.config import EngineConfig, is_whole
from serve.sampling_params import JsonWhitespace

Dtype = Literal["float32", "bfloat16"]
MetricPrefix = Literal["vllm", "stu"]


@dataclass(frozen=True)
class ServerConfig:
    """What `stu-serve` serves, where, and within which limits."""

    model: Path
    """Model directory."""
    host: str = "127.0.0.1"
    """Address to listen at. Other machines reach it at 0.0.0.0: give API keys then."""
    port: int = 8000
    """0: one that is free, which the log names."""
    uds: Path | None = None
    """Path of a Unix socket to listen at instead of host and port. The umask decides who may
    connect: with 0077 the same user alone, with 0007 the group as well."""
    model_name: str | None = None
    """What clients call the model. None: the name of its directory."""
    devices: str = "auto"
    """auto: the first CUDA device, or cpu without any. all: every CUDA device. Or a list: cpu, 0,
    cuda:1, 0,1,2,3: an engine, in a process of its own, on each."""
    replicas: int = 1
    """Engines on each of these devices, which share its processors or memory."""
    dtype: Dtype = "float32"
    """Of the weights."""
    api_keys: Path | None = None
    """File with an API key on each line. Every request must have one of them, but for those to
    /health and /ready, and to the page at /, which shows nothing without a key. None: the keys in
    the environment variable STU_API_KEYS, separated by commas; if that is not set, no key is
    needed."""
    max_waiting: int = 256
    """Requests that may wait; those beyond are told to come again (429). One client may have them
    all; others then may have as many as an equal share still."""
    max_choices: int = 128
    """Completions that one body may ask for: prompts times n."""
    max_body_bytes: int = 4 * 2**20
    """Of a request."""
    header_timeout_seconds: float = 20.0
    """Seconds a client may take to send the headers of a request."""
    body_timeout_seconds: float = 50.0
    """Seconds a client may take to send the body of a request."""
    request_timeout_seconds: float = 600.0
    """Seconds from the arrival of a request to the end of its answer. A request that takes longer
    is ended, and the connection of a client that does not read its answer is closed."""
    watchdog_seconds: float = 30.0
    """After which an engine that gives no sign of life is killed, and another started. A step may
    take no longer."""
    drain_seconds: float = 60.0
    """That running requests have to end, once the server is asked to stop."""
    json_whitespace: JsonWhitespace = "compact"
    """White space in answers that follow a JSON schema. compact: none. flexible: a line break and
    up to 32 spaces or tabs wherever JSON allows white space."""
    cors_origins: str = ""
    """Web pages' origins that browsers may call from, separated by commas."""
    tls_certificate: Path | None = None
    """PEM file; with tls_key, https is served."""
    tls_key: Path | None = None
    """PEM file."""
    metric_prefix: MetricPrefix = "vllm"
    """Of the metrics that vLLM has too, so that its dashboards work."""
    log_prompts: bool = False
    """Write prompts and completions to the log, with the line that each request has there."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """How requests are decoded together."""

    def __post_init__(self) -> None:
        for name, least in {"replicas": 1, "max_waiting": 1, "max_choices": 1}.items():
            value = getattr(self, name)
            self._require(name, is_whole(value) and value >= least, f"a whole number >= {least}")
        self._require("port", is_whole(self.port) and self.port < 2**16, "from 0 to 65535")
        is_size = is_whole(self.max_body_bytes) and self.max_body_bytes >= 1024
        self._require("max_body_bytes", is_size, "a whole number >= 1024")
        for name in (
            "header_timeout_seconds",
            "body_timeout_seconds",
            "request_timeout_seconds",
            "watchdog_seconds",
            "drain_seconds",
        ):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and 0 < value < 10**9
            self._require(name, is_number, "a number above 0, in seconds")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: give both, or none")
        for name in ("tls_certificate", "tls_key"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name} {path}: no such file")
        if self.api_keys is not None and not self.api_keys.is_file():
            # What stands there may be a key, which no log should have.
            shown = f" {self.api_keys}" if len(self.api_keys.parts) > 1 else ""
            raise ValueError(
                f"api_keys{shown}: no such file; it takes the path of a file with a key on each "
                "line, not a key"
            )

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.model_name or self.model.resolve().name

    def keys(self) -> list[str]:
        """Return the API keys, none if the server is open to all.

        Raises ValueError for a file or a variable without any, for both, or for a key that no
        header can hold.
        """
        variable = os.environ.get("STU_API_KEYS")
        if self.api_keys is not None:
            if variable is not None:
                raise ValueError(
                    f"api_keys {self.api_keys} and the environment variable STU_API_KEYS are both "
                    "set, and but one is read: unset the other"
                )
            lines = self.api_keys.read_text(encoding="utf-8").split("\n")
            keys = [line.strip() for line in lines if line.strip()]
            if not keys:
                raise ValueError(f"api_keys {self.api_keys}: has no key; write one on each line")
        elif variable is not None:
            keys = [key.strip() for key in variable.split(",") if key.strip()]
            if not keys:
                raise ValueError(
                    "the environment variable STU_API_KEYS is set and has no key: write keys into "
                    "it, separated by commas, or unset it to serve everyone without a key"
                )
        else:
            keys = []
        for key in keys:
            if not key.isascii() or not key.isprintable() or " " in key or "," in key:
                raise ValueError(
                    "an API key has a space, a comma, or a character beyond printable ASCII: "
                    "change it; a file has a key on each line, STU_API_KEYS commas between keys"
                )
        return keys

    def replica_json(self, device: str) -> dict[str, Any]:
        """What one engine's process needs to know."""
        return {
            "model": str(self.model),
            "device": device,
            "dtype": self.dtype,
            "engine": asdict(self.engine),
        }

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}")
