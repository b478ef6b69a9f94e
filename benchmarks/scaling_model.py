"""A cost model of the training step: what a rank has to do, times what each piece of it costs on a machine.

The work comes out of the config and formulas that the documentation gives (docs/objective.md); the costs are
fitted to measurements of one machine, or made of a GPU cluster's data sheet. Nothing is hidden behind anything else
except what `Cluster.overlap` says.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

import numpy as np
from flops import Counts
from scipy.optimize import nnls

from muser_dist.config import RunConfig

_BUCKET = 50_000_000
"""Elements of a gradient that are reduced at a time; see muser_dist/train/engine.py."""

_NUMBER, _ID = 4, 8


@dataclass(frozen=True)
class Demand:
    """What one rank has to do, one thing after another; so much of each thing."""

    towers: float = 0.0
    """Floating point operations of towers and heads."""
    loss: float = 0.0
    """Floating point operations of the products of the loss."""
    updated: float = 0.0
    """Parameters that the rank updates."""
    features: float = 0.0
    """Bytes that it receives before the loss is known: features, and ids and a few numbers of each row."""
    gradients: float = 0.0
    """Bytes that it receives of gradients and of updated parameters."""
    hops: float = 0.0
    """Messages that wait for each other."""
    steps: float = 0.0
    """Steps."""

    def times(self, factor: float) -> "Demand":
        """So much of everything."""
        return Demand(*(factor * value for value in astuple(self)))


@dataclass(frozen=True)
class Costs:
    """Seconds for each operation, parameter, byte, message and step."""

    tower_operation: float
    loss_operation: float
    parameter: float
    byte: float
    message: float
    step: float

    def parts(self, demand: Demand) -> dict[str, float]:
        """Seconds of each part of a demand."""
        return {
            "towers": demand.towers * self.tower_operation,
            "loss": demand.loss * self.loss_operation,
            "features": demand.features * self.byte,
            "gradients": demand.gradients * self.byte,
            "latency": demand.hops * self.message,
            "update": demand.updated * self.parameter,
            "fixed": demand.steps * self.step,
        }

    def seconds(self, demand: Demand) -> float:
        """Of the whole demand."""
        return sum(self.parts(demand).values())


@dataclass(frozen=True)
class Work:
    """What a training step consists of, whatever does it.

    Attributes:
        forward, backward: operations of towers and heads for a row.
        parameters: of the model.
        modalities, pairs, dim, feature_bytes: of the objective; bytes are those of a feature's number on the wire.
        global_batch, chunk, cache_gradients, zero_stage: as in the config.
    """

    forward: float
    backward: float
    parameters: int
    modalities: int
    pairs: int
    dim: int
    feature_bytes: int
    global_batch: int
    chunk: int
    cache_gradients: bool
    zero_stage: int

    @classmethod
    def of(cls, config: RunConfig, counts: Counts) -> "Work":
        """The work of a config whose model has these counts."""
        return cls(
            forward=counts.forward,
            backward=counts.backward,
            parameters=counts.parameters,
            modalities=len(config.model.towers()),
            pairs=len(config.objective.pairs) * max(1, len(config.objective.dims)),
            dim=config.model.projection_dim,
            feature_bytes=2 if config.objective.bf16 else 4,
            global_batch=config.train.global_batch,
            chunk=config.train.chunk,
            cache_gradients=config.train.cache_gradients,
            zero_stage=config.train.zero_stage,
        )

    def step(self, world: int) -> Demand:
        """One training step of each of so many ranks."""
        n, chunks = self.global_batch, -(-self.global_batch // self.chunk // world)
        forwards = 2 if self.cache_gradients and chunks > 1 else 1
        towers = chunks * self.chunk * (forwards * self.forward + self.backward)
        alone = Demand(towers=towers, updated=self.parameters / (world if self.zero_stage else 1), steps=1)
        reductions = chunks if forwards == 2 else 1
        return add(alone, self.objective(n, world), self.zero(world, (forwards + 1) * chunks, reductions))

    def objective(self, n: int, world: int) -> Demand:
        """The loss over n rows and its gradient with respect to features, which are gathered."""
        products = 4 if world == 1 else 5 - 1 / world
        operations = self.pairs * products * 2 * (n / world) * n * self.dim
        features = self.modalities * n * self.dim * self.feature_bytes
        rows = n * (11 * self.pairs * _NUMBER + (self.modalities + 3) * _ID)
        # Features by modality, ids and their number, two exchanges of rows' numbers, sums over ranks.
        collectives = self.modalities + 2 + 2 + 2
        moved = add(gather(features + rows, world), latency(collectives, world))
        return replace(moved, loss=operations)

    def zero(self, world: int, passes: int, reductions: int) -> Demand:
        """What DeepSpeed moves: at stages 1 and 2 whole gradients are summed, then updated parameters gathered.

        At stage 3 parameters are gathered for each pass, forward or backward, and gradients scattered as often as
        they are reduced.
        """
        size, buckets = self.parameters * _NUMBER, math.ceil(self.parameters / _BUCKET)
        if self.zero_stage == 3:
            moved = gather((passes + reductions) * size, world)
            moved = add(moved, latency((passes + reductions) * buckets - 1, world))
        else:
            moved = add(all_reduce(size, world), latency(buckets - 1, world))
            if self.zero_stage:
                moved = add(moved, gather(size, world))
        return replace(moved, features=0.0, gradients=moved.features)


# --- Collectives: bytes that a rank receives in a ring, hops as in a tree ---


def gather(size: float, world: int) -> Demand:
    """An all-gather or reduce-scatter of so many bytes in all."""
    return add(Demand(features=size * (world - 1) / world), latency(1, world))


def all_reduce(size: float, world: int) -> Demand:
    """A sum over ranks of so many bytes."""
    return add(Demand(features=2 * size * (world - 1) / world), latency(2, world))


def latency(collectives: float, world: int) -> Demand:
    """What so many collectives wait besides the bytes."""
    return Demand(hops=collectives * math.ceil(math.log2(world)))


def add(*demands: Demand) -> Demand:
    """All of them."""
    return Demand(*map(sum, zip(*map(astuple, demands), strict=True)))


# --- Costs of a machine, out of measurements ---


def crowd(demand: Demand, world: int, cores: int) -> Demand:
    """The demand as one rank sees it where so many share fewer cores, which move the bytes too."""
    return demand.times(max(1.0, world / cores))


def fit(demands: Sequence[Demand], seconds: Sequence[float]) -> Costs:
    """The costs, none below zero, whose predictions have the least squared relative errors."""
    columns = np.array([_by_cost(demand) for demand in demands]) / np.asarray(seconds)[:, None]
    scale = np.abs(columns).max(axis=0)
    scale[scale == 0] = 1.0  # a cost that nothing measured stays zero
    found, _ = nnls(columns / scale, np.ones(len(columns)))
    return Costs(*(found / scale).tolist())


def _by_cost(demand: Demand) -> list[float]:
    """How much of the demand each of the `Costs` is for."""
    units = np.eye(len(fields(Costs)))
    return [Costs(*unit).seconds(demand) for unit in units]


# --- Costs of a cluster, out of its data sheet ---


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes. Rates are a GPU's; what was not measured is an assumption, and the page says so.

    Attributes:
        name: of the GPU.
        peak: FLOP/s of dense bfloat16 products.
        utilisation, loss_utilisation: shares of it that towers and the loss reach.
        memory: bytes/s of its memory; an update of AdamW moves 28 bytes a parameter.
        node: GPUs of a node.
        nvlink, network: bytes/s that a GPU receives from its own node, and from others.
        link_share: share of those that collectives reach.
        latency: seconds of a message.
        step: seconds of a step that belong to nothing else.
        overlap: share of the gradients' travel that other work hides.
    """

    name: str = "H200"
    peak: float = 989e12
    utilisation: float = 0.45
    loss_utilisation: float = 0.30
    memory: float = 4.8e12
    node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    link_share: float = 0.8
    latency: float = 10e-6
    step: float = 0.005
    overlap: float = 0.0

    def costs(self, world: int) -> Costs:
        """Of a job on so many GPUs; a ring over several nodes is as fast as the network."""
        link = self.nvlink if world <= self.node else self.network
        return Costs(
            tower_operation=1 / (self.peak * self.utilisation),
            loss_operation=1 / (self.peak * self.loss_utilisation),
            parameter=28 / self.memory,
            byte=1 / (link * self.link_share),
            message=self.latency,
            step=self.step,
        )

    def parts(self, work: Work, world: int) -> dict[str, float]:
        """Seconds of a step by part."""
        parts = self.costs(world).parts(work.step(world))
        return parts | {"gradients": parts["gradients"] * (1 - self.overlap)}


@dataclass(frozen=True)
class Prediction:
    """A step on so many GPUs.

    Attributes:
        efficiency: samples/s of a GPU over those of the smallest number of GPUs in the same table.
        decode_cpus: cores that must decode meanwhile.
        held: bytes of gathered features on each GPU.
    """

    world: int
    global_batch: int
    parts: dict[str, float]
    samples_per_second: float
    efficiency: float
    decode_cpus: float
    held: float


def predict(
    cluster: Cluster, works: dict[int, Work], decode_seconds: float, most_lost: float = 0.2
) -> tuple[list[Prediction], int]:
    """Predictions for each number of GPUs and its work, and the knee.

    Args:
        cluster: where.
        works: by number of GPUs, ascending; efficiency is relative to the first.
        decode_seconds: of a core for a clip.
        most_lost: the knee is the most GPUs before efficiency has fallen by this.
    """
    found: list[Prediction] = []
    for world, work in works.items():
        parts = cluster.parts(work, world)
        rate = work.global_batch / sum(parts.values())
        first = found[0].samples_per_second / found[0].world if found else rate / world
        held = work.modalities * work.global_batch * work.dim * work.feature_bytes
        efficiency = rate / world / first
        found.append(Prediction(world, work.global_batch, parts, rate, efficiency, rate * decode_seconds, held))
    knee = found[0].world
    for prediction in found:
        if prediction.efficiency < 1 - most_lost:
            break
        knee = prediction.world
    return found, knee
