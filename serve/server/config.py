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
    """Address to listen on. With 0.0.0.0, other machines can connect; use API keys then."""
    port: int = 8000
    """Port to listen on. 0 chooses a free port, which the log names."""
    uds: Path | None = None
    """Path of a Unix socket to listen on instead of host and port. The umask decides who may
    connect: with 0077 only the same user, with 0007 also the group."""
    model_name: str | None = None
    """Name of the model for clients. Default: the name of its directory."""
    models: dict[str, Any] | str = ""
    """More models, as NAME=PATH separated by commas: requests with NAME as their model use the
    model directory PATH, and requests without a model use MODEL_DIR. Each model has its own
    replicas, with the settings of this command; cache-gib applies to each replica. In a --config
    file, this may be an object with an object for each NAME: `model`, its directory, and any of
    devices, tensor_parallel, replicas, dtype, lora_modules and engine settings that differ."""
    lora_modules: str = ""
    """LoRA adapters for MODEL_DIR, as NAME=PATH separated by commas: requests with NAME as their
    model use the adapter in the folder PATH, which has peft's layout. Rows with different adapters
    decode together."""
    devices: str = "auto"
    """Devices, each with its own replica: a list such as cpu, 0, cuda:1 or 0,1,2,3; all for every
    CUDA device; auto for the first CUDA device, or cpu if there is none."""
    tensor_parallel: int = 1
    """Number of devices to divide the model of each replica among, if it is too large for one: each
    has a part of the weights and of the caches. It must divide the model's width and number of
    attention heads. Consecutive devices of the list form a replica; cpu stands for all of them."""
    replicas: int = 1
    """Number of replicas on each device, which share its memory and processors; with --ray, on the
    cluster."""
    ray: bool = False
    """Run the replicas with Ray Serve on the hosts of the Ray cluster at RAY_ADDRESS, or of this
    host's. The model directory must have the same path on every host. This process remains the HTTP
    server. A cluster can have only one server of a model name."""
    dtype: Dtype = "float32"
    """Data type of the weights."""
    api_keys: Path | None = None
    """File with an API key on each line, optionally followed by name=NAME for the log and metrics,
    requests-per-minute=N, tokens-per-minute=N, and admin to allow the use of /admin. Every request
    needs a key, except for /health, /ready and the page at /, which shows nothing without one.
    SIGHUP reads the file again. Default: the keys in the environment variable STU_API_KEYS,
    separated by commas; if it is not set, requests need no key."""
    requests_per_minute: int | None = None
    """Maximum requests per minute of a key, or of an address if there are no keys. The file of keys
    can set another limit for a key. More are refused with status 429. None: no limit."""
    tokens_per_minute: int | None = None
    """The same for prompt and new tokens. A request is charged for the maximum number of new tokens
    that it asks for; when it ends, unused tokens are credited back."""
    max_waiting: int = 256
    """Maximum number of waiting requests per model. More are refused with status 429. One client
    may use all places; even then, every other client gets an equal share."""
    max_choices: int = 128
    """Maximum number of completions per request body (prompts times n), and of inputs per embedding
    request."""
    max_body_bytes: int = 4 * 2**20
    """Maximum size of a request body, in bytes."""
    batch_dir: Path | None = None
    """Folder on a local disk for the files of /v1/files and the batches of /v1/batches, which
    continue after a restart; each server needs its own. Without it, these paths are not served.
    With it, responses of /v1/responses are stored there too, otherwise in memory."""
    max_file_bytes: int = 512 * 2**20
    """Maximum size of an uploaded file, in bytes. The time limit of an upload is longer than that
    of another body in the same proportion as their size limits."""
    max_stored_bytes: int = 64 * 2**30
    """Maximum total size of an API key's files and of the results of its batches, in bytes. Beyond
    it, uploads are refused."""
    max_batch_rows: int = 1_000_000
    """Maximum number of rows in a batch."""
    max_response_bytes: int = 64 * 2**20
    """Maximum total size of stored responses, in bytes. Beyond it, the least recently used ones are
    removed; 0 stores none."""
    header_timeout_seconds: float = 20.0
    """Time in seconds that a client may take to send the headers of a request."""
    body_timeout_seconds: float = 50.0
    """Time in seconds that a client may take to send the body of a request."""
    request_timeout_seconds: float = 600.0
    """Maximum time in seconds from the arrival of a request to the end of its answer. A request
    that takes longer is ended, and a client that does not read its answer is disconnected."""
    watchdog_seconds: float = 30.0
    """Time in seconds without a response after which a replica is replaced. It must be longer than
    a step takes."""
    drain_seconds: float = 60.0
    """Time in seconds for running requests to finish after the server is asked to stop."""
    json_whitespace: JsonWhitespace = "compact"
    """White space in answers that follow a JSON schema. compact: none. flexible: a line break and
    up to 32 spaces or tabs wherever JSON allows white space."""
    cors_origins: str = ""
    """Origins of web pages that may call the server from a browser, separated by commas."""
    tls_certificate: Path | None = None
    """PEM file with a certificate. With it and tls_key, the server uses HTTPS. SIGHUP reads both
    again."""
    tls_key: Path | None = None
    """PEM file with the private key of the certificate, without a passphrase."""
    metric_prefix: MetricPrefix = "vllm"
    """Prefix of the metrics that vLLM also has. With vllm, dashboards for vLLM work."""
    otlp_traces_endpoint: str | None = None
    """URL of an OpenTelemetry collector, such as http://localhost:4318/v1/traces, to send a trace
    of each request to, by OTLP over HTTP. It needs the extra `tracing`."""
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
