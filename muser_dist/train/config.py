"""TrainConfig: workers, batch, optimizer, checkpoints, and what becomes of failures."""

import re
from dataclasses import dataclass
from typing import Literal

from muser_dist.errors import require
from muser_dist.strict import Strict


@dataclass(frozen=True)
class TrainConfig(Strict):
    workers: int | str = 2
    """Ray Train workers (W), or a range such as 2:8: the run starts with as many of them as there is room for, and goes
    on with more or fewer when nodes join or leave. The learning curve does not depend on W."""
    gpu: bool = False
    """One GPU for each worker (nccl); without, CPU (gloo)."""
    gpu_share: float = 1.0
    """Share of a GPU that the worker reserves, so that several small runs use one at a time. A run of several workers
    needs whole ones: nccl refuses two ranks on one GPU."""
    cpus_per_worker: float = 1.0
    """Logical CPUs that each worker reserves."""
    resource: str = ""
    """A custom resource of which each worker takes one: keeps workers on the nodes that declare it
    (ray start --resources '{"trainer": 8}'), and, without GPUs, a range of workers from taking the CPUs that decode."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 0 shares nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs the towers under autocast; parameters, gradients and the loss stay float32."""
    samples: int = 32_768
    """Length of training in samples, all passes over the data together."""
    global_batch: int = 128
    """Rows in one optimizer step over all workers (N); every row is a negative for every other."""
    chunk: int = 32
    """Rows that are dealt and encoded at a time (c); must divide global_batch."""
    cache_gradients: bool = True
    """Encodes chunks twice, so that memory holds the activations of one chunk however many a step has (GradCache).
    Off, it holds those of all of a worker's chunks, and towers run forward once in place of twice. The result is the
    same, and so is the time where each worker has one chunk."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum, with which MUSER was published."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup_samples: int = 4_096
    """Samples of linear warm-up; a half cosine to zero follows."""
    weight_decay: float = 0.05
    """Weight decay, of AdamW decoupled; none on temperatures, biases and norms."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates of the first and second moment; the first is the momentum of SGD."""
    clip_norm: float = 1.0
    """Gradient norm over all parameters that steps are clipped to; 0 means no clipping."""
    max_loss: float = 0.0
    """A step whose loss is above is not applied, and training stops, as it does when the loss or the gradient is not
    finite; 0 means no such bound."""
    ema_samples: int = 0
    """Half-life in samples of an exponential moving average of the weights, which is exported in place of the last
    weights; 0 means none."""
    offload: bool = False
    """Keeps optimizer state and float32 weights in the CPU's memory, and updates them there (ZeRO-Offload); from ZeRO
    stage 1 on."""
    checkpoint_samples: int = 8_192
    """Samples between checkpoints."""
    checkpoint_storage: str = ""
    """Folder or fsspec URL (s3://...) of the run's checkpoints; the run's folder when not given. data.storage_options
    holds for it too."""
    checkpoint_patience: float = 900.0
    """Seconds for which a checkpoint is written again and again when the storage fails; then the run ends."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay, and the one with the lowest loss besides."""
    log_steps: int = 10
    """Optimizer steps between lines of metrics.jsonl."""
    trackers: tuple[Literal["tensorboard", "wandb", "ray"], ...] = ()
    """Where the lines of metrics.jsonl go besides: event files of TensorBoard in the run's folder, Weights & Biases
    (key from WANDB_API_KEY), gauges of Ray for its dashboard and Prometheus."""
    profile: tuple[int, int] | None = None
    """First and last optimizer step of which each worker writes a trace, for chrome://tracing or Perfetto."""
    max_failures: int = 3
    """How often the run goes on from its last checkpoint after workers died. Nodes that are preempted do not count."""
    hang_seconds: float = 600.0
    """A worker that takes longer for a collective, or to answer, counts as dead; on CPUs it is named."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.samples // self.global_batch

    @property
    def chunks_per_step(self) -> int:
        """Chunks in a global batch (K)."""
        return self.global_batch // self.chunk

    def chunks_per_worker(self, workers: int) -> int:
        """Forward passes of each of so many workers in a step; the last may be on all-masked chunks."""
        return -(-self.chunks_per_step // workers)

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most workers of the run."""
        least, _, most = str(self.workers).partition(":")
        return int(least), int(most or least)

    @property
    def ema_decay(self) -> float:
        """Weight of the old average in a step of the moving average of weights."""
        return 0.5 ** (self.global_batch / self.ema_samples)

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", str(self.workers)) is not None,
            f"train.workers is {self.workers!r}; give a number of at least 1, or a range such as 2:8",
        )
        least, most = self.worker_range
        require(
            least == most or self.gpu or bool(self.resource),
            f"train.workers is {self.workers!r}, and nothing but CPUs would limit the workers: they would take those "
            "that decode; give --train.resource NAME, a custom resource that the workers' nodes declare",
        )
        require(0 < self.gpu_share <= 1, f"train.gpu_share is {self.gpu_share}; give a share above 0, up to 1")
        require(
            self.gpu_share == 1 or most == 1,
            f"train.gpu_share is {self.gpu_share}, but {most} workers need a GPU each; give --train.workers 1",
        )
        require(least <= most, f"train.workers is {self.workers!r}; the first number of a range is the smaller one")
        require(self.chunk >= 1, "train.chunk must be at least 1")
        require(
            self.global_batch >= 2 and self.global_batch % self.chunk == 0,
            f"train.global_batch ({self.global_batch}) must be a multiple of train.chunk ({self.chunk}); "
            f"nearest: {max(1, round(self.global_batch / self.chunk)) * self.chunk}",
        )
        require(
            self.samples >= self.global_batch,
            f"train.samples ({self.samples}) is less than one global batch ({self.global_batch}); give at least that",
        )
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"train.betas is {self.betas[0]:g} {self.betas[1]:g}; give two numbers from 0 to below 1, such as 0.9 0.98",
        )
        require(
            self.optimizer != "sgd" or self.betas[0] > 0,
            "train.betas: the first is the momentum of SGD, which Nesterov's needs to be above 0, such as 0.9",
        )
        require(not self.offload or self.zero_stage > 0, "train.offload needs a --train.zero-stage of 1 or more")
        require(
            self.profile is None or 1 <= self.profile[0] <= self.profile[1],
            "train.profile names the first and the last step, from 1 on, such as 100 110",
        )
        for name in ("lr", "checkpoint_samples", "log_steps", "keep_checkpoints", "hang_seconds"):
            require(getattr(self, name) > 0, f"train.{name} must be positive")
        for name in (
            "cpus_per_worker",
            "weight_decay",
            "clip_norm",
            "warmup_samples",
            "max_failures",
            "max_loss",
            "ema_samples",
            "checkpoint_patience",
        ):
            require(getattr(self, name) >= 0, f"train.{name} must not be negative")
