"""The registry of mixers, and the layouts in which a model's blocks use them.

This module imports no mixer and no torch, so that a configuration is checked quickly.
`stu.mixers` says what a mixer is, and makes one by its name here.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stu.config import ModelConfig
    from stu.mixers import Mixer

MIXERS: "dict[str, str | Callable[[ModelConfig], Mixer]]" = {
    "stu": "stu.stu_mixer:make_stu",
    "hyena": "stu.hyena:Hyena",
    "attention": "stu.attention:SlidingWindowAttention",
}
"""Constructors of mixers, which take a model's configuration: a class or function, or the import
path of one."""

LAYOUTS: dict[str, tuple[str, ...]] = {"hybrid": ("stu", "attention")}
"""Layouts of several mixers, which the blocks take in turn. The name of a mixer is a layout too:
all blocks then use it."""


def register_mixer(name: str, mixer: "str | Callable[[ModelConfig], Mixer]") -> None:
    """Make `mixer` available under `name` as a layout of its own and as a part of others.

    A model that uses it can be loaded only where it is registered.
    """
    if name in MIXERS or name in LAYOUTS:
        raise ValueError(f"{name} is the name of another mixer or layout")
    MIXERS[name] = mixer


def layout_names() -> list[str]:
    """Return the values that `ModelConfig.layout` may have."""
    return [*LAYOUTS, *MIXERS]


def mixer_names(layout: str) -> tuple[str, ...]:
    """Return the mixers that the blocks of `layout` take in turn."""
    return LAYOUTS.get(layout, (layout,))
