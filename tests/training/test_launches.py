"""A step of a deep network must not drown the host in launches."""

import pytest

from benchmarks.launches import operations_of_a_step
from nvae.cli.config import compose_train
from nvae.ops.multi_tensor import _copied_table

BUDGET = 9_200
"""Operations of a step of the paper's CIFAR-10; 24,700 before they were counted."""


@pytest.mark.slow
def test_a_step_of_cifar10_stays_within_its_budget() -> None:
    counted = operations_of_a_step(compose_train(["experiment=cifar10"]), batch=32)
    total = sum(operations.total for operations in counted.values())
    assert total <= BUDGET, {name: o.counts.most_common(20) for name, o in counted.items()}
    # one op for all parameters and their moving averages, and the learning rate's way to the device
    assert counted["optimizer"].total <= 3, counted["optimizer"].counts
    # gradients from the data and from the regularizers are added, rounded and masked many at once,
    # and nobody's gradient is filled with zeros
    assert counted["backward"].counts["zeros"] == 0
    assert counted["backward"].counts["_foreach_add"] > 10
    # the kernels' path is what was counted
    assert counted["forward"].counts["bn_swish_depthwise_moments"] > 50
    # sums become moments, move running statistics and pass their gradients on without a launch
    assert counted["forward"].counts["channel_moments"] > 150
    assert counted["forward"].counts["moments"] == 0
    # but for the one layer in front of an upsampling, whose pixels count four times
    assert counted["forward"].counts["lerp_"] <= 4
    # the tables of a step are all kept: where one is not found, the host waits for the device
    tables = 1 + sum(
        operations.counts[name]
        for operations in counted.values()
        for name in ("weight_norms", "weight_norms_backward")
    )
    assert tables > 20
    assert 2 * tables < _copied_table.cache_info().maxsize
