"""How Ray Data executes the pipeline: order, block size, and a scheduler that does not spin."""

import time

import ray.data
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    ConcurrencyCapBackpressurePolicy,
    DownstreamCapacityBackpressurePolicy,
    ResourceBudgetBackpressurePolicy,
)
from ray.data._internal.execution.interfaces import PhysicalOperator

_PAUSE_SECONDS = 0.02


class _PausesWhenFull:
    """Waits a moment before it says that no output may be read.

    When decoding is ahead of the trainers, tasks have blocks ready that nobody may take yet. Ray
    2.60's scheduler then asks again at once and burns half a core, which on a machine that also
    trains is taken from training. The pause is far below the time that a buffer takes to drain.
    """

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        limit = super().max_task_output_bytes_to_read(op)  # type: ignore[misc]
        if limit == 0:
            time.sleep(_PAUSE_SECONDS)
        return limit


class PausingResourceBudget(_PausesWhenFull, ResourceBudgetBackpressurePolicy):
    """Ray's limit by memory, pausing."""


class PausingDownstreamCapacity(_PausesWhenFull, DownstreamCapacityBackpressurePolicy):
    """Ray's limit by what later operators can take, pausing."""


def set_context() -> None:
    """Sets this process's DataContext, which datasets made afterwards take along."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1  # each chunk, one row, is a block of its own
    context.enable_progress_bars = False
    context.set_config(
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
        [ConcurrencyCapBackpressurePolicy, PausingResourceBudget, PausingDownstreamCapacity],
    )


def execution_options(buffer_mib: int) -> ray.data.ExecutionOptions:
    """Options for splitting: with `preserve_order`, block i goes to split i mod W.

    Args:
        buffer_mib: MiB of the object store that blocks may fill while they wait to be consumed.
    """
    limits = ray.data.ExecutionResources(object_store_memory=buffer_mib << 20)
    return ray.data.ExecutionOptions(preserve_order=True, resource_limits=limits)
