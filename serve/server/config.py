"""The settings of `stu-serve`."""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from serve.config import EngineConfig, is_whole
from serve.ray.config import ClusterConfig
from serve.sampling_params import JsonWhitespace
from stu.common.cli import option
from stu.common.errors import UserError, setting_name

Dtype = Literal["float32", "bfloat16"]
MetricPrefix = Literal["vllm", "stu"]
OF_EACH_MODEL = (
    *("model", "devices", "tensor_parallel", "replicas", "dtype", "lora_modules"),
    *(setting.name for setting in fields(EngineConfig)),
)
"""Settings that models of `--models` may have of their own."""


@dataclass(frozen=True)
class ServerConfig:
    """Settings of `stu-serve`."""

    model: Path
    """Model directory."""
    host: str = "127.0.0.1"
    """Address to listen at. With 0.0.0.0 other machines can connect; use API keys then."""
    port: int = 8000
    """Port to listen at. 0 takes a free one, which the log names."""
    uds: Path | None = None
    """Path of a Unix socket to listen at instead of host and port. The umask decides who may
    connect: with 0077 only the same user, with 0007 also the group."""
    model_name: str | None = None
    """Name of the model for clients. Default: the name of its directory."""
    models: dict[str, Any] | str = ""
    """More models, as NAME=PATH separated by commas: requests that give a NAME as their model get
    the one in the model directory PATH, and those that give none the first, MODEL_DIR. Each has
    replicas of its own, with the settings of this command; cache-gib is that of each replica. In a
    file of --config it may be an object with an object for each NAME: model, its directory, and
    what differs for it of devices, tensor_parallel, replicas, dtype, lora_modules and the settings
    of engines."""
    lora_modules: str = ""
    """Adapters (LoRA) of MODEL_DIR, as NAME=PATH separated by commas: requests that give a NAME as
    their model get the adapter in the folder PATH, which has peft's layout. Rows with different
    adapters decode together."""
    devices: str = "auto"
    """Devices, each with its own replica: a list such as cpu, 0, cuda:1 or 0,1,2,3; all for every
    CUDA device; auto for the first CUDA device, or cpu without any."""
    tensor_parallel: int = 1
    """Number of devices that each replica divides the model among, for models too large for one:
    each has a part of the weights and of the caches. It must divide the model's width and its
    attention heads. Consecutive devices of the list are a replica's; cpu stands for all of them."""
    replicas: int = 1
    """Number of replicas on each device, which share its processors or memory; with --ray, on the
    cluster."""
    ray: bool = False
    """Run the replicas on the hosts of a Ray cluster, the one at RAY_ADDRESS or this host's, by Ray
    Serve. Each host must find the model directory at the same path. This process remains the HTTP
    server, and one server of a model name may use a cluster."""
    dtype: Dtype = "float32"
    """Number format of the weights."""
    api_keys: Path | None = None
    """File with an API key on each line, and after it, if wanted, its name=NAME for the log and
    metrics, its requests-per-minute=N and tokens-per-minute=N, and admin if it may use /admin.
    Every request must have one of them, except for /health, /ready and the page at /, which shows
    nothing without a key. SIGHUP reads the file again. Default: the keys in the environment
    variable STU_API_KEYS, separated by commas; if it is not set, requests need no key."""
    requests_per_minute: int | None = None
    """Limit of the requests of a key, or of an address where there are no keys, for keys whose line
    in the file names no other. More are refused with status 429. None: no limit."""
    tokens_per_minute: int | None = None
    """The same for tokens of prompts and new tokens. A request counts with all new tokens that it
    asks for, and gets back at its end what it did not use."""
    max_waiting: int = 256
    """Number of requests that may wait, of each model. More are refused with status 429. One client
    may use all places; even then every other client gets an equal share."""
    max_choices: int = 128
    """Number of completions that one body may ask for: prompts times n. Also the most inputs of a
    body for embeddings."""
    max_body_bytes: int = 4 * 2**20
    """Size limit of a request's body, in bytes."""
    batch_dir: Path | None = None
    """Folder on a local disk for the files of /v1/files and the batches of /v1/batches, which
    continue after a restart; each server needs its own. Without it these paths are not served. With
    it, responses of /v1/responses are stored there too, and otherwise in memory."""
    max_file_bytes: int = 512 * 2**20
    """Size limit of a file for a batch, in bytes. An upload may take as many times as long as
    another body as it may be larger."""
    max_stored_bytes: int = 64 * 2**30
    """Size limit of all files of an API key together, with the results of its batches, in bytes.
    Beyond it uploads are refused."""
    max_batch_rows: int = 1_000_000
    """Number of rows that a batch may have."""
    max_response_bytes: int = 64 * 2**20
    """Size limit of all stored responses together, in bytes. Beyond it, those that were used least
    recently are forgotten; 0 stores none."""
    header_timeout_seconds: float = 20.0
    """Time in seconds that a client may take to send the headers of a request."""
    body_timeout_seconds: float = 50.0
    """Time in seconds that a client may take to send the body of a request."""
    request_timeout_seconds: float = 600.0
    """Time in seconds from the arrival of a request to the end of its answer. A request that takes
    longer is ended, and a client that does not read its answer is disconnected."""
    watchdog_seconds: float = 30.0
    """Time in seconds without a sign of life after which a replica is replaced. It must be longer
    than a step takes."""
    drain_seconds: float = 60.0
    """Time in seconds that running requests have to end after the server is asked to stop."""
    json_whitespace: JsonWhitespace = "compact"
    """White space in answers that follow a JSON schema: none if compact; if flexible, a line break
    and up to 32 spaces or tabs wherever JSON allows white space."""
    cors_origins: str = ""
    """Origins of web pages that may call the server from a browser, separated by commas."""
    tls_certificate: Path | None = None
    """PEM file with a certificate. With it and tls_key the server uses https. SIGHUP reads both
    again."""
    tls_key: Path | None = None
    """PEM file with the key of the certificate, without a passphrase."""
    metric_prefix: MetricPrefix = "vllm"
    """Prefix of the metrics that vLLM has too. With vllm, dashboards for vLLM work."""
    otlp_traces_endpoint: str | None = None
    """URL of an OpenTelemetry collector, such as http://localhost:4318/v1/traces, that gets a trace
    of each request by OTLP over HTTP. It needs the extra stu[tracing]."""
    log_prompts: bool = False
    """Write prompts and completions to the log."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Settings of each engine."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Settings of replicas on a Ray cluster."""

    def __post_init__(self) -> None:
        for name, least in {
            "replicas": 1,
            "tensor_parallel": 1,
            "max_waiting": 1,
            "max_choices": 1,
            "max_stored_bytes": 1,
            "max_batch_rows": 1,
        }.items():
            value = getattr(self, name)
            self._require(name, is_whole(value) and value >= least, f"a whole number >= {least}")
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            is_limit = value is None or (is_whole(value) and value >= 1)
            self._require(name, is_limit, "a whole number >= 1, or null")
        self._require("port", is_whole(self.port) and self.port < 2**16, "from 0 to 65535")
        is_size = is_whole(self.max_body_bytes) and self.max_body_bytes >= 1024
        self._require("max_body_bytes", is_size, "a whole number >= 1024")
        least = self.max_body_bytes
        is_size = is_whole(self.max_file_bytes) and self.max_file_bytes >= least
        self._require("max_file_bytes", is_size, f"a whole number >= {least}, max_body_bytes")
        is_size = is_whole(self.max_response_bytes)
        self._require("max_response_bytes", is_size, "a whole number >= 0")
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
        endpoint = self.otlp_traces_endpoint
        is_url = endpoint is None or endpoint.startswith(("http://", "https://"))
        allowed = "a URL such as http://localhost:4318/v1/traces"
        self._require("otlp_traces_endpoint", is_url, allowed)
        if self.ray and self.devices != "auto":
            fix = "with --ray, Ray gives each replica a GPU; leave it out"
            raise UserError("devices", self.devices, fix=fix)
        if self.ray and self.tensor_parallel > 1:
            raise UserError("tensor_parallel", self.tensor_parallel, "1 with --ray")
        for name in () if self.ray else self.cluster.changed:
            fix = (
                f"it is for replicas on a Ray cluster; give {setting_name('ray')}, or leave it out"
            )
            raise UserError(name, getattr(self.cluster, name), fix=fix)
        most = self.cluster.max_replicas
        if most is not None and most < self.replicas:
            raise UserError("max_replicas", most, f"at least {self.replicas}, replicas")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise UserError(
                "tls_key",
                message="--tls-certificate and --tls-key need each other: give both, or none",
            )
        for name in ("tls_certificate", "tls_key"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise UserError(name, message=f"{option(name)} {path}: no such file")
        if self.api_keys is not None and not self.api_keys.is_file():
            # A single word may be a key itself, which no log should have.
            shown = f" {self.api_keys}" if len(self.api_keys.parts) > 1 else ""
            raise UserError(
                "api_keys",
                message=f"--api-keys{shown}: no such file; give the path of a file with a key on "
                "each line, not a key",
            )

    @property
    def adapters(self) -> dict[str, Path]:
        """Folders of adapters by their names for clients. Raises UserError."""
        return _named_paths("lora_modules", self.lora_modules, [self.name])

    @property
    def name(self) -> str:
        """Name of the model for clients."""
        return self.model_name or self.model.resolve().name

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise UserError(name, getattr(self, name), allowed)


def model_configs(config: ServerConfig) -> dict[str, ServerConfig]:
    """Return the settings of each model by its name for clients, those of MODEL_DIR first.

    Raises UserError for settings that a model cannot have of its own, and for names that several
    models or adapters have.
    """
    common = replace(config, models="", lora_modules="", model_name=None)
    found = {config.name: replace(config, models="")}
    for name, settings in _listed(config.models, found).items():
        with errors_of_model(config, name):
            engine, others = _checked(common, settings)
            engine_config = replace(common.engine, **engine)
            found[name] = replace(common, **others, model_name=name, engine=engine_config)
    names = list(found)
    for name, own in found.items():
        with errors_of_model(config, name):
            names += own.adapters
    for name in names:
        if names.count(name) > 1:
            fix = f"each model and each adapter needs a name of its own, and {name} is there twice"
            raise UserError("models", fix=fix)
    return found


def _listed(models: Mapping[str, Any] | str, taken: Container[str]) -> dict[str, dict[str, Any]]:
    """Return the settings that models of `--models` have of their own. Raises UserError."""
    if isinstance(models, str):
        paths = _named_paths("models", models, taken)
        return {name: {"model": path} for name, path in paths.items()}
    for name, own in models.items():
        is_name = isinstance(name, str) and name and name not in taken  # YAML reads 7 as a number
        if not is_name or not isinstance(own, Mapping) or "model" not in own:
            allowed = (
                "an object with an object for each NAME, which has its directory as model; each"
            )
            allowed += " NAME is a text, in quotes if it is a number, and none that of the model"
            raise UserError("models", models, allowed)
    return {name: dict(own) for name, own in models.items()}


@contextmanager
def errors_of_model(config: ServerConfig, name: str) -> Iterator[None]:
    """Let a UserError of the block name the model of `--models` that it is about, if it is one."""
    try:
        yield
    except UserError as error:
        if name == config.name:
            raise
        message = f"{setting_name('models')}: {name}: {error}"
        raise UserError("models", message=message) from error


def _checked(common: ServerConfig, own: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return settings of an engine and the others, with their types. Raises UserError."""
    for setting in own:
        if setting not in OF_EACH_MODEL:
            allowed = f"one of {', '.join(OF_EACH_MODEL)}"
            raise UserError(setting, message=f"{setting} is not allowed: it must be {allowed}")
    engine = {setting: own[setting] for setting in own if hasattr(common.engine, setting)}
    values = {setting: value for setting, value in own.items() if setting not in engine}
    for setting in ("model", "devices", "lora_modules"):
        if isinstance(values.get(setting), int):  # as YAML reads a device's number
            values[setting] = str(values[setting])
        if not isinstance(values.get(setting, ""), str | Path):
            raise UserError(setting, values[setting], "a text")
    if values.get("dtype", common.dtype) not in get_args(Dtype):
        raise UserError("dtype", values["dtype"], f"one of {', '.join(get_args(Dtype))}")
    return engine, {**values, "model": Path(values["model"])}


def _named_paths(field: str, text: str, taken: Container[str]) -> dict[str, Path]:
    """Return paths by their names, given NAME=PATH separated by commas. Raises UserError."""
    found: dict[str, Path] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, path = part.partition("=")
        if not name or not path or name in taken or name in found:
            allowed = "NAME=PATH, separated by commas, each NAME once and none that of the model"
            raise UserError(field, text, allowed)
        found[name] = Path(path)
    return found
