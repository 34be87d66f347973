"""Settings of replicas on a Ray cluster."""

from dataclasses import dataclass, fields

from serve.config import is_whole
from stu.common.errors import UserError, setting_name


@dataclass(frozen=True)
class ClusterConfig:
    """Replicas on a Ray cluster. Raises UserError for a value that is not allowed."""

    max_replicas: int | None = None
    """Maximum number of replicas on a Ray cluster. While requests queue, Ray starts more replicas
    than `replicas`, up to this number, and ends them when they are not needed. None: always
    `replicas`."""
    cpus_per_replica: int = 1
    """Number of CPUs reserved for each replica on a Ray cluster, and threads of a replica without a
    GPU."""
    gpus_per_replica: int | None = None
    """Number of GPUs reserved for each replica on a Ray cluster, 1 or 0. Set it if hosts with GPUs
    join the cluster only while replicas wait for them. None: 1 if a host of the cluster has GPUs at
    the start."""
    scale_up_seconds: float = 30.0
    """Time in seconds for which requests queue before Ray starts another replica."""
    scale_down_seconds: float = 600.0
    """Time in seconds for which a replica is not needed before Ray ends it."""

    def __post_init__(self) -> None:
        for name in ("max_replicas", "cpus_per_replica"):
            count = getattr(self, name)
            if count is not None and (not is_whole(count) or count < 1):
                raise UserError(name, count, "a whole number >= 1")
        gpus = self.gpus_per_replica
        if gpus is not None and (not is_whole(gpus) or gpus > 1):
            raise UserError("gpus_per_replica", gpus, "0 or 1, as an engine uses one GPU")
        for name in ("scale_up_seconds", "scale_down_seconds"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 10**9:
                raise UserError(name, value, "a number >= 0, in seconds")
            if name in self.changed and self.max_replicas is None:
                fix = f"without {setting_name('max_replicas')} no replicas are added; leave it out"
                raise UserError(name, value, fix=fix)

    @property
    def changed(self) -> list[str]:
        """Names of the settings that are not at their defaults."""
        return [own.name for own in fields(self) if getattr(self, own.name) != own.default]
