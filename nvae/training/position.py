"""Where a run is, counted in images, so that it may go on with another number of devices.

Schedules go by the share of the run's images that have been seen. In steps of G images that is the
position, images seen / G, of the total, T = images in all / G. A run that never changes G is always
at position global_step. Where G changes (without `data.global_batch` it follows the devices), the
steps counted so far were of another size: global_step goes on counting them, and the position is
global_step plus a constant, :func:`steps_ahead`.

Lightning counts an epoch's micro-batches. Other devices make another number of them of the same
images, so the counters of the epoch at hand are rewritten; totals over the run only ever grow, so
that no batch's noise is drawn twice.
"""

from typing import Any

from nvae.data.samplers import TrainSampler

Plain = dict[str, Any]

ENTRY = "images"
"""Key in checkpoints: images ``seen``, and images ``a_step``."""


def images_a_step(run_config: Plain) -> int:
    """G of a run's configuration, plain types."""
    data = run_config["data"]
    if data.get("global_batch"):
        return int(data["global_batch"])
    accumulated = run_config["trainer"].get("accumulate_grad_batches", 1)
    return int(data["batch_size"] * processes(run_config) * accumulated)


def processes(run_config: Plain) -> int:
    """Of a run's configuration, on all machines."""
    trainer = run_config["trainer"]
    return int(trainer.get("devices", 1) * trainer.get("num_nodes", 1))


def steps_ahead(checkpoint: Plain, a_step: int, run_config: Plain | None) -> float:
    """What to add to global_step for the position in steps of ``a_step`` images.

    Args:
        checkpoint: to go on from.
        a_step: images in a step of this start.
        run_config: of this start; None: unknown.
    """
    step, before = checkpoint["global_step"], checkpoint.get("run_config")
    if ENTRY in checkpoint:
        seen = checkpoint[ENTRY]["seen"]
        # an integer: positions stay what they were, bit for bit
        return 0 if seen == step * a_step else seen / a_step - step
    if not before or not run_config:
        return 0
    # of an earlier version, which did not let G change; a small data set's may be smaller than said
    was, now = images_a_step(before), images_a_step(run_config)
    return 0 if was == now else step * was / now - step


def recount_batches(loops: Plain, sampler: TrainSampler, batches_per_epoch: int) -> int:
    """Count the micro-batches of the epoch at hand as this start cuts them.

    Args:
        loops: Lightning's state, changed in place.
        sampler: of this start.
        batches_per_epoch: of this start.

    Returns:
        Micro-batches of the epoch that were done before.
    """
    fit = loops["fit_loop"]
    progress, states = fit["epoch_loop.batch_progress"], fit["state_dict"].get("combined_loader")
    if not states:  # it read other loaders than ours
        return 0
    if progress["is_last_batch"]:  # what is left over of the images now is not this epoch's
        done = batches_per_epoch
    else:
        done = len(sampler) - sampler.remaining(states[0]["position"])
    current = progress["current"]
    more = done - current["ready"]
    for name in current:
        current[name] += more
    return done
