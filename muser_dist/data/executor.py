"""How Ray Data executes the pipeline: order, block size, memory, and a scheduler that does not spin."""

import time
import warnings
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data._internal.execution import streaming_executor_state
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    ConcurrencyCapBackpressurePolicy,
    ResourceBudgetBackpressurePolicy,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.interfaces import PhysicalOperator
from ray.data.block import BlockMetadata

_PAUSE_SECONDS = 0.02

_SLOTS = "muser_dist.slots"
"""Key of the DataContext under which the policies below find the number of slots."""


class TaskNumbers(Datasource):
    """The column "id" with 0 to count - 1, one row a block: a decoding task each.

    They are made as they are needed: a run has millions, of which Ray Data would keep records.

    Args:
        count: tasks of the run.
        slots: tasks that run at a time.
    """

    def __init__(self, count: int, slots: int) -> None:
        super().__init__()
        self.count = count
        # Not few at a time: Ray Data keeps a record of each time from the start, and each starts a process, which
        # takes seconds.
        self.at_a_time = max(1024, 16 * slots)

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all numbers."""
        return 8 * self.count

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ReadTask]:
        """Read tasks of `at_a_time` numbers each."""

        def task(start: int) -> ReadTask:
            stop = min(start + self.at_a_time, self.count)

            def read() -> Iterable[pa.Table]:
                return (pa.table({"id": [number]}) for number in range(start, stop))

            return ReadTask(read, BlockMetadata(stop - start, 8 * (stop - start), None, None))

        return [task(start) for start in range(0, self.count, self.at_a_time)]

    def dataset(self) -> ray.data.Dataset:
        """The numbers as a dataset that takes no decoding slot."""
        blocks = -(-self.count // self.at_a_time)
        at_once = {"_generator_backpressure_num_objects": -1}  # else two at each look of the scheduler
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of the only way to say so
            return ray.data.read_datasource(
                self, override_num_blocks=blocks, num_cpus=0, concurrency=1, ray_remote_args=at_once
            )


class PausingResourceBudget(ResourceBudgetBackpressurePolicy):
    """Ray's limit by memory, which waits a moment before it says that no output may be read.

    When decoding is ahead of the trainers, tasks have blocks ready that nobody may take yet. Ray
    2.60's scheduler then asks again at once and burns half a core, which on a machine that also
    trains is taken from training. The pause is far below the time that a buffer takes to drain.
    """

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        limit = super().max_task_output_bytes_to_read(op)
        if limit == 0:
            time.sleep(_PAUSE_SECONDS)
        return limit


class NumbersOnDemand(BackpressurePolicy):
    """Makes more task numbers only when few are left: memory does not limit what is so small."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        slots = self._data_context.get_config(_SLOTS)
        self._left = max(256, 8 * slots)  # more than the slots take between two looks of the scheduler
        # It waits so long for all running tasks before it looks what some have made; Ray has no setting for that.
        # At Ray's own 0.1 s looking takes a thirtieth of two cores; with many slots what ends has to wait less.
        streaming_executor_state.WAIT_FOR_TASK_COMPLETION_TIMEOUT_S = max(0.1, 0.75 / slots)

    def can_add_input(self, op: PhysicalOperator) -> bool:
        if not op.name.startswith("Read"):
            return True
        return all(self._topology[after].total_enqueued_input_blocks() < self._left for after in op.output_dependencies)


def set_context(slots: int, blocks: int = 2) -> None:
    """Sets this process's DataContext, which datasets made afterwards take along.

    Args:
        slots: tasks that run at a time.
        blocks: that a task makes without waiting for one of them to be fetched; a task of no more never holds a CPU
            only to wait.
    """
    context = ray.data.DataContext.get_current()
    context.set_config(_SLOTS, slots)
    # One more: with as many as it may have, a task waits until one is fetched, even when there is nothing left to make.
    context._max_num_blocks_in_streaming_gen_buffer = blocks + 1
    context.target_max_block_size = 1  # each chunk, one row, is a block of its own
    context.op_resource_reservation_ratio = 0.1  # of memory for each operator; decoding needs it all
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # a thread in each task that reads /proc for a statistic
    # Without Ray's limit by what consumers can take: it stops reading from all tasks alike, and when a node has died,
    # from the one that makes the lost blocks again, for which all others wait.
    context.set_config(
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
        [ConcurrencyCapBackpressurePolicy, PausingResourceBudget, NumbersOnDemand],
    )


def execution_options(buffer_mib: int, block_bytes: int, slots: int, workers: int) -> ray.data.ExecutionOptions:
    """Options for splitting: with `preserve_order`, block i goes to split i mod W.

    Args:
        buffer_mib: MiB of the object store that blocks may fill until they are consumed; three blocks for each slot
            and each worker where that is more.
        block_bytes: size of a block.
        slots: tasks that run at a time.
        workers: consumers.
    """
    # Ray counts blocks no more when a worker has them: the one in use and two that wait (train/loop.py).
    uncounted = 3 * workers * block_bytes
    limits = ray.data.ExecutionResources(
        object_store_memory=max((buffer_mib << 20) - uncounted, 3 * slots * block_bytes, 1)
    )
    # For each slot a task more than there are CPUs, which waits in Ray's queue: a slot that becomes free has its next
    # one at once, not when Ray Data's scheduler looks again.
    waiting = ray.data.ExecutionResources(cpu=-slots)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of the only way to say so
        return ray.data.ExecutionOptions(preserve_order=True, resource_limits=limits, exclude_resources=waiting)
