"""How Ray Data executes the pipeline: order, block size, memory, and a scheduler that does not spin."""

import time
from collections.abc import Iterable

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data._internal.execution import streaming_executor_state
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    ConcurrencyCapBackpressurePolicy,
    DownstreamCapacityBackpressurePolicy,
    ResourceBudgetBackpressurePolicy,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data.block import BlockMetadata

_PAUSE_SECONDS = 0.02

# How long the scheduler waits for all running tasks before it looks what some have made. At Ray's own 0.1 s,
# for which it has no setting, looking takes a thirtieth of the CPU time of decoding on two cores.
streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = 0.25

# Task numbers that come at a time, and that must be left before more do: more than a large pool takes
# between two looks of the scheduler. Ray Data keeps a record of each time from the start, so not too few.
_NUMBERS_AT_A_TIME, _NUMBERS_LEFT = 256, 128


class TaskNumbers(Datasource):
    """The column "id" with 0 to count - 1, one row a block: a decoding task each.

    They are made as they are needed: a run has millions, of which Ray Data would keep records.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all numbers."""
        return 8 * self.count

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ReadTask]:
        """Read tasks of a few hundred numbers each."""

        def task(start: int) -> ReadTask:
            stop = min(start + _NUMBERS_AT_A_TIME, self.count)

            def read() -> Iterable[pa.Table]:
                return (pa.table({"id": [number]}) for number in range(start, stop))

            return ReadTask(read, BlockMetadata(stop - start, 8 * (stop - start), None, None))

        return [task(start) for start in range(0, self.count, _NUMBERS_AT_A_TIME)]

    def dataset(self) -> ray.data.Dataset:
        """The numbers as a dataset that takes no decoding slot."""
        blocks = -(-self.count // _NUMBERS_AT_A_TIME)
        return ray.data.read_datasource(self, override_num_blocks=blocks, num_cpus=0, concurrency=1)


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


class NumbersOnDemand(BackpressurePolicy):
    """Makes more task numbers only when few are left: memory does not limit what is so small."""

    def can_add_input(self, op: PhysicalOperator) -> bool:
        if not op.name.startswith("Read"):
            return True
        return all(
            self._topology[after].total_enqueued_input_blocks() < _NUMBERS_LEFT for after in op.output_dependencies
        )


class PausingDownstreamCapacity(_PausesWhenFull, DownstreamCapacityBackpressurePolicy):
    """Ray's limit by what later operators can take, pausing."""


def set_context() -> None:
    """Sets this process's DataContext, which datasets made afterwards take along."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 1  # each chunk, one row, is a block of its own
    context.op_resource_reservation_ratio = 0.1  # of memory for each operator; decoding needs it all
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # a thread in each task that reads /proc for a statistic
    context.set_config(
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
        [ConcurrencyCapBackpressurePolicy, PausingResourceBudget, PausingDownstreamCapacity, NumbersOnDemand],
    )


def execution_options(buffer_mib: int, block_bytes: int, slots: int) -> ray.data.ExecutionOptions:
    """Options for splitting: with `preserve_order`, block i goes to split i mod W.

    Args:
        buffer_mib: MiB of the object store that blocks may fill while they wait to be consumed; three
            blocks for each slot where that is more.
        block_bytes: size of a block.
        slots: tasks that run at a time.
    """
    # Ray counts a task's blocks when it fetches them; until then a task may have two.
    uncounted = 2 * slots * block_bytes
    limits = ray.data.ExecutionResources(
        object_store_memory=max((buffer_mib << 20) - uncounted, slots * block_bytes, 1)
    )
    return ray.data.ExecutionOptions(preserve_order=True, resource_limits=limits)
