"""The interface of static steps: a cache's part in a step that can be captured as a CUDA graph.

`Cache.step` chooses views and slices in Python, which is fastest on a CPU. A static step computes
the same on the same storage from tensors alone: whatever changes from step to step is in the
tensors that it gets, which the host fills before (`Cache.begin_static`), and no number of Python
may change. Padding is written to and read from rows and pages that no sequence has, and nothing
that these hold, not even NaN, reaches the output of another row.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Numbers = NDArray[np.int64]
"""Numbers of a step, on the host."""


class StaticStep(ABC):
    """One cache's part in a step over tensors that stay where they are.

    A step begins with `begin`, whatever the number of rows; then each layer steps, by a method with
    the arguments of the cache's own `step`.
    """

    ends_pages: ClassVar[bool] = False
    """Whether it has pages that end in a step."""
    num_shared: int = 0
    """Numbers of a step that all rows share."""
    num_own: int = 0
    """Numbers of each row."""

    @abstractmethod
    def begin(self, rows: Tensor, shared: Tensor, own: Tensor) -> None:
        """Begin a step, or the end of a page.

        Args:
            rows: Rows of the batch, `[B]`, in any order. Numbers above all rows are padding.
            shared: Numbers `[num_shared]` of the step.
            own: Numbers `[B, num_own]` of the rows.
        """

    def end_pages(self) -> None:  # noqa: B027
        """Finish the pages that end in this step, if any do, after all layers have stepped."""
