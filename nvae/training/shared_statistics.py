"""Which processes share the statistics of batch normalization, and how running ones stay equal."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nvae.regularizers import batchnorms

SHARING = ("world", "node", "none")


class SharedStatistics:
    """Batch statistics of a model over several processes, from construction until :meth:`close`.

    They have process groups of their own: in the default one their small reductions would queue
    behind the gradients' large ones. Every process makes all groups, in the same order.

    Where not all processes share, each group's running statistics move apart within a step;
    :meth:`settle` brings them together at its end, so that average, validation, checkpoints and
    what resumes from them are the same on every rank.

    Args:
        model: whose layers share, on every rank the same.
        sharing: ``world``, all processes; ``node``, those of a machine; ``none``.
        node: this process's machine, equal for those that share it.
        timeout: after which a reduction that some process did not join is an error; None: torch's.
    """

    def __init__(
        self,
        model: nn.Module,
        sharing: str = "world",
        node: int = 0,
        timeout: timedelta | None = None,
    ) -> None:
        self._norms = batchnorms(model)
        world = dist.get_world_size()
        members = [list(range(world))] if sharing == "world" else _by_node(node)
        self._differ = world > 1 and (sharing == "none" or len(members) > 1)
        self._group: Any = None
        if sharing != "none" and max(map(len, members)) > 1:
            options = None
            if dist.get_backend() == "nccl":  # the small reductions go first
                options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
                if timeout is not None:  # said twice, or torch warns of the difference
                    options._timeout = timeout
            self._group, _ = dist.new_subgroups_by_enumeration(
                members, timeout=timeout, pg_options=options, group_desc="batch statistics"
            )
        for norm in self._norms:
            norm.group = self._group

    @torch.no_grad()
    def settle(self) -> None:
        """Running statistics become their mean over all ranks; once a step, by one reduction."""
        if not self._differ or not self._norms:
            return
        running = [b for norm in self._norms for b in (norm.running_mean, norm.running_var)]
        # in float64 the sum of equal numbers is exact, and a step that is left out changes nothing
        mean = torch.cat([b.flatten() for b in running]).double()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        pieces: list[Tensor] = list(mean.split([b.numel() for b in running]))
        torch._foreach_copy_(running, [p.view_as(b) for p, b in zip(pieces, running, strict=True)])

    def close(self) -> None:
        """Give the groups back, on every rank; layers are on their own again."""
        for norm in self._norms:
            norm.group = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None


def _by_node(node: int) -> list[list[int]]:
    """The ranks of every machine; a launcher may number them in any order."""
    nodes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, node)
    return [[r for r, n in enumerate(nodes) if n == each] for each in sorted(set(nodes))]
