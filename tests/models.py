"""Models in float64 that decode from spectral states."""

import torch

from serve.cache.budget import cache_plan
from serve.config import EngineConfig
from stu.config import ModelConfig
from stu.filters import spectral_filters
from stu.mixers import PastInputs
from stu.model import FlashSTU


def float64_model(config: ModelConfig) -> FlashSTU:
    """Return a new model in float64, filters included.

    A model's own filters are rounded to float32: in float64 it would decode in pages, as what
    rounding added to them has no state.
    """
    model = FlashSTU(config).double().eval()
    if model.filters.shape[1]:
        model.filters.copy_(torch.from_numpy(spectral_filters(*model.filters.shape)))
    assert_states(model)
    return model


def assert_states(model: FlashSTU) -> None:
    """Fail unless a model with spectral filters decodes from states by default."""
    plan = cache_plan(PastInputs, model, EngineConfig())
    if model.filters.shape[1]:
        assert plan is not None
        assert plan.info is not None
        assert plan.info.kind == "state", plan.info.reason
