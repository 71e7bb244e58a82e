"""Leaving a step out where the optimiser itself cannot."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class HostSwitch(Optimizer):
    """Mixed into optimisers that the device cannot switch off: here the host asks it, and waits."""

    found_inf: Tensor | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure, then the step unless ``found_inf`` is set."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # torch's unfused optimisers insist that they were not given a flag they would ignore
        flag, self.found_inf = self.found_inf, None
        if flag is None or not bool(flag):
            super().step()
        self.found_inf = flag
        return loss
