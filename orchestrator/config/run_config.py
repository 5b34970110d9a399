"""The one run configuration: YAML in, validated, frozen.

Every refusal is one line that names the key, the value and what is allowed, and comes before any actor starts.
Values are never repaired: `auto` is a value that a user writes, and is resolved later against the cluster.
What a key means, and the unit of a number, stand here, at the key: command line and documentation are made from it.
"""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le
from pydantic import Field, PositiveInt, Strict, ValidationError

from orchestrator.config.model import ModelConfig, check_model
from orchestrator.config.precision import PrecisionSection, check_precision
from orchestrator.config.section import (
    Layers,
    Nodes,
    Number,
    Parts,
    Positions,
    Ranks,
    Real,
    Seconds,
    Section,
    Steps,
    Unit,
)
from orchestrator.config.settings import apply_override, read_tree
from orchestrator.config.training import DataSection, OptimizerSection, TrainingSection
from orchestrator.refusal import ConfigError, Spelled, refusal
from orchestrator.schedule.ir.stages import PLACEMENTS, Stages
from orchestrator.schedule.kinds.registry import NAMES, TABLE
from orchestrator.topology import is_label, is_selector

Auto = Literal["auto"]
Pair = Annotated[tuple[PositiveInt, PositiveInt], Strict(False), Unit("positions, ranks")]  # YAML has lists only


class RunSection(Section):
    """What a run is called, where it is kept, and what its chance begins with."""

    name: Annotated[str, Spelled("letters, digits and any of . _ -, the first a letter or a digit")] = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the run, and of its folder in run.directory")
    directory: str = Field("auto", description="folder of all runs: a path or any pyarrow.fs URI; auto: ./runs, under "
                                               "`ray job` ~/dualray/runs")
    seed: Annotated[int, Unit("")] = Field(1234, ge=0, description="of random weights and of the order of sequences")


class LayoutSection(Section):
    """Which rank stands where in pipelines, EP groups and replicas."""

    pipeline: Positions = Field(2, gt=0, description="positions of one pipeline (PP)")
    expert: Annotated[Ranks, Gt(0)] | Auto = Field("auto", description="ranks of one EP group")
    data: Annotated[int, Unit("replicas"), Gt(0)] | Auto = Field(
        "auto", description="replicas: sets of rows that together hold every expert")
    shape: Pair | Auto = Field("auto", description="[positions on a node, ranks of a position on a node]")
    layers_per_stage: list[Annotated[Layers, Gt(0)]] | Auto = Field(
        "auto", description="of each stage in turn; auto: near-equal shares")
    hops: Literal["auto", 1, 2] = Field(
        "auto", description="of a token to its experts: straight to each rank, or once to a node and on from there; auto: 2 "
                            "where an EP group has several ranks on a node")
    group_parts: Parts = Field(1, ge=1, description="parts that an expert group left over may be cut into for different nodes, "
                                                    "where groups do not divide by the rows; 1: none is cut")


class PlacementSection(Section):
    """Which rank holds which expert, while the run goes on."""

    every: Steps = Field(0, ge=0, description="steps between placements of the experts by measured load; 0: they stay")
    least_gain: Number = Field(0.05, ge=0, description="a layer's experts stay unless its busiest rank, divided by the mean, "
                                                     "falls by more than this")


Duration = Annotated[Real, Unit("a shared unit of time")]


class CostsSection(Section):
    """Durations of a whole position's work on one microbatch, in any unit that they share."""

    forward: Duration = Field(1.0, gt=0, description="of all layers")
    backward_input: Duration = Field(1.0, gt=0, description="the part of backward that the position before waits for")
    backward_weight: Duration = Field(1.0, gt=0, description="the part that gives gradients of weights")
    dispatch: Duration = Field(0.25, ge=0, description="all dispatches of one forward")
    combine: Duration = Field(0.25, ge=0, description="all combines of one forward")
    hop: Duration = Field(0.05, ge=0, description="a tensor's way from one position to another")


class ScheduleSection(Section):
    """In which order a rank works through the microbatches of a step."""

    kind: Literal[NAMES] = Field("dualpipe", description="a published one; searched: a shorter one, with schedule.costs")
    chunks: Annotated[int, Unit("stages"), Gt(0)] | Auto = Field(
        "auto", description="stages of a position that a microbatch passes, of the interleaved kinds and searched")
    placement: Literal[*PLACEMENTS, "auto"] = Field("auto", description="how searched folds the stages")
    most_activations: Annotated[Real, Unit("microbatches"), Ge(1)] | Auto = Field(
        "auto", description="microbatches on all layers of a position that searched may keep at once")
    costs: CostsSection = Field(CostsSection(), description="what searched minimises the duration with, and the order of operations "
                                                            "inside an action follows from")
    overlap: bool = Field(True, description="false: dispatch and combine run in turn with compute, in the same order")


class TopologySection(Section):
    """Which nodes a run takes, and how many ranks of each."""

    virtual_nodes: Nodes = Field(0, ge=0, le=16384, description="0: Ray's own nodes; N: divide one machine's ranks into N nodes")
    ranks_per_node: Annotated[Ranks, Gt(0), Le(1024)] | Auto = Field(
        "auto", description="of a node, at most; auto: what the node offers, in GPUs, units of `rank` or CPUs")
    resource: str = Field(
        "auto", min_length=1, description="of Ray, that a rank takes a unit of; auto: GPU where any node has one, else `rank` "
                                          "where any node offers it, else CPU")
    labels: dict[str, str] = Field({}, description="only nodes with these labels of Ray's; a value, !value, in(value, ...) or "
                                                   "!in(value, ...) by label")


class ElasticSection(Section):
    """How a run goes on while nodes come and go."""

    copies: Annotated[int, Unit("owners")] = Field(
        1, ge=0, le=2, description="further owners of each optimizer shard, on other nodes")
    min_nodes: Nodes = Field(1, ge=1, description="with fewer the run waits")
    max_nodes: Annotated[Nodes, Gt(0)] | Auto = Field("auto", description="nodes that are used at once; auto: all there are")
    beat_seconds: Seconds = Field(0.2, gt=0, description="between two signs of life of a rank")
    silence_seconds: Annotated[Seconds, Gt(0)] | Auto = Field(
        "auto", description="without a sign of life a rank or node is lost; above 3 beats; auto: 1.5, or 15 on virtual nodes, "
                            "which share one host")
    cool_down_seconds: Seconds = Field(30.0, ge=0, description="a lost node is left alone; doubles with each loss, up to 32 times")
    abort_seconds: Seconds = Field(
        2.0, gt=0, description="allowance for ranks to let go of what they communicate: a rank that is not free after this twice"
                               " and 1.5 times the silence, or 10 s, is given up")
    form_seconds: Seconds = Field(5.0, gt=0, description="bound on making process groups after a change")
    wait_seconds: Annotated[Seconds, Gt(0)] | None = Field(
        None, description="for min_nodes, before the run gives up; null: for ever")
    stuck_seconds: Annotated[Seconds, Gt(0)] | Auto = Field(
        "auto", description="no rank finishes anything for so long: the step is interrupted, and who hangs is replaced; auto: "
                            "10, or 10 median steps")
    orphan_seconds: Seconds = Field(
        300.0, gt=0, description="how long ranks and coordinator go on without the process that started the run: as long it can "
                                 "be taken over by the same command")
    storage_seconds: Seconds = Field(300.0, gt=0, description="how long storage may be away before the run ends")
    give_up_seconds: Seconds = Field(1800.0, gt=0, description="without a committed step, before the run ends")


class CheckpointSection(Section):
    """What is kept on storage, to continue from."""

    every: Steps = Field(50, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: Annotated[int, Unit("checkpoints")] = Field(3, gt=0, description="of a run, the newest; older ones are deleted")


class TelemetrySection(Section):
    """What a run tells of itself, and where it is asked."""

    host: str = Field("auto", description="address that exporters bind to; auto: of the host itself where a run has one host only, "
                                          "else each node's own in the cluster")
    port: Annotated[int, Unit(""), Field(ge=0, le=65535)] | Auto = Field(
        "auto", description="of the coordinator's page, metrics and target list; auto: the first free one of 9464 to 9473, 0: any")
    peak_teraflops: Annotated[Real, Unit("TFLOP/s"), Gt(0)] | Auto = Field(
        "auto", description="what a rank's accelerator can do in dense BF16 products, for model FLOPs utilisation; auto: by its "
                            "name, if it is a known one")
    tensorboard: bool = Field(False, description="event files in the run folder's `tensorboard`, for a folder that is a local path")
    timeline_seconds: Seconds = Field(10.0, gt=0, description="between two steps whose spans the page shows")
    trace_steps: list[Annotated[Steps, Ge(0)]] = Field(default_factory=list, description="steps, counted from 0, whose spans go to "
                                                                                "trace.json")


class RunConfig(Section):
    run: RunSection = RunSection()
    model: ModelConfig = ModelConfig()
    data: DataSection = DataSection()
    training: TrainingSection = TrainingSection()
    precision: PrecisionSection = PrecisionSection()
    optimizer: OptimizerSection = OptimizerSection()
    layout: LayoutSection = LayoutSection()
    placement: PlacementSection = PlacementSection()
    schedule: ScheduleSection = ScheduleSection()
    topology: TopologySection = TopologySection()
    elastic: ElasticSection = ElasticSection()
    checkpoint: CheckpointSection = CheckpointSection()
    telemetry: TelemetrySection = TelemetrySection()

    @property
    def stages(self) -> Stages:
        """Where the stages live. `auto` placement: both, or a loop where both would need an even number of positions.

        Raises ConfigError (a ValueError) with key `positions`, `chunks` or `placement`: what the kind does not take.
        """
        chosen = (None if value == "auto" else value for value in (self.schedule.chunks, self.schedule.placement))
        return TABLE[self.schedule.kind].stages(self.layout.pipeline, *chosen)


def load(path: str | None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read `path` (none: all defaults), apply `key=value` overrides, validate.

    Raises ConfigError: the file is missing or not YAML, a key is unknown, a value has the wrong type or range, or
    settings contradict each other.
    """
    return parse(read_tree(path) if path else {}, overrides)


def parse(tree: dict[str, Any], overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Validate a nested dictionary after applying `dotted.key=value` overrides (values are YAML). Leaves `tree` as it is."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        apply_override(tree, override)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise refusal(error, RunConfig, tree) from None
    check(config)
    return config


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML; `parse(yaml.safe_load(dump(c))) == c`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def check(config: RunConfig) -> None:
    """Rules that span keys. Raises ConfigError for the first that fails."""
    check_model(config.model)
    _check_layout(config)
    training, optimizer, data = config.training, config.optimizer, config.data
    if training.batch_ramp and training.batch_ramp.start_sequences > training.batch_sequences:
        raise ConfigError("training.batch_ramp.start_sequences", training.batch_ramp.start_sequences,
                          f"at most training.batch_sequences = {training.batch_sequences}")
    if optimizer.final_learning_rate > optimizer.learning_rate:
        raise ConfigError("optimizer.final_learning_rate", optimizer.final_learning_rate,
                          f"at most optimizer.learning_rate = {optimizer.learning_rate}")
    if training.dispatch_precision == "float8" and config.model.hidden_size % 128:
        raise ConfigError("training.dispatch_precision", "float8",
                          f"same: model.hidden_size = {config.model.hidden_size} is not a multiple of 128, the channels of a scale")
    check_precision(config.precision, training.dtype)
    _check_elastic(config.elastic)
    if late := [step for step in config.telemetry.trace_steps if step >= training.steps]:
        raise ConfigError("telemetry.trace_steps", late[0], f"below training.steps = {training.steps}: steps count from 0")
    if data.sequence_length > config.model.max_position_embeddings:
        raise ConfigError("data.sequence_length", data.sequence_length,
                          f"at most model.max_position_embeddings = {config.model.max_position_embeddings}")


def _check_elastic(elastic: ElasticSection) -> None:
    if elastic.max_nodes != "auto" and elastic.max_nodes < elastic.min_nodes:
        raise ConfigError("elastic.max_nodes", elastic.max_nodes, f"at least elastic.min_nodes = {elastic.min_nodes}")
    if elastic.silence_seconds != "auto" and elastic.silence_seconds <= 3 * elastic.beat_seconds:
        raise ConfigError("elastic.silence_seconds", elastic.silence_seconds,
                          f"above {3 * elastic.beat_seconds:g}: 3 x elastic.beat_seconds, for a beat may be late")


def _check_layout(config: RunConfig) -> None:
    layout, model = config.layout, config.model
    pipeline = layout.pipeline
    _check_schedule(config)
    stages = config.stages.count
    if stages > model.num_hidden_layers:
        raise _too_many_stages(config)
    if layout.shape != "auto":
        c, k = layout.shape
        if pipeline % c:
            raise ConfigError("layout.shape", list(layout.shape), f"[c, k] with c a divisor of layout.pipeline = {pipeline}")
        if layout.expert != "auto" and layout.expert % k:
            raise ConfigError("layout.shape", list(layout.shape), f"[c, k] with k a divisor of layout.expert = {layout.expert}")
    if layout.group_parts > model.experts_per_group:
        raise ConfigError("layout.group_parts", layout.group_parts,
                          f"at most {model.experts_per_group}: model.n_routed_experts / model.n_group")
    per_stage = layout.layers_per_stage
    if per_stage != "auto" and (len(per_stage) != stages or sum(per_stage) != model.num_hidden_layers):
        raise ConfigError("layout.layers_per_stage", per_stage,
                          f"{stages} positive numbers whose sum is model.num_hidden_layers = {model.num_hidden_layers}")
    topology = config.topology
    if topology.virtual_nodes and topology.ranks_per_node == "auto":
        raise ConfigError("topology.ranks_per_node", "auto", "a number when topology.virtual_nodes is set")
    virtual = f"topology.virtual_nodes = {topology.virtual_nodes}, 0 takes those that Ray has"
    if topology.virtual_nodes and topology.resource != "auto":
        raise ConfigError("topology.resource", topology.resource, f"auto with virtual nodes: {virtual}")
    if topology.virtual_nodes and topology.labels:
        raise ConfigError("topology.labels", topology.labels, f"nothing with virtual nodes: {virtual}")
    for label, value in topology.labels.items():
        if not is_label(label):
            raise ConfigError("topology.labels", topology.labels, f"a label that Ray takes, not {label}")
        if not is_selector(value):
            raise ConfigError(f"topology.labels.{label}", value, "a label's value, !value, in(value, ...) or !in(value, ...)")


def _check_schedule(config: RunConfig) -> None:
    """What the kind takes."""
    schedule, kind = config.schedule, TABLE[config.schedule.kind]
    free = {"placement": kind.stage_placement is None, "most_activations": kind.searched, "chunks": kind.chunks is None}
    for key, choice in free.items():
        if getattr(schedule, key) != "auto" and not choice:
            raise ConfigError(f"schedule.{key}", getattr(schedule, key), f"auto: {kind.name} leaves no choice")
    if free["placement"] and schedule.placement == "auto" and schedule.chunks != "auto":
        raise ConfigError("schedule.chunks", schedule.chunks, "auto, unless schedule.placement is given too")
    try:
        _ = config.stages
    except ConfigError as error:
        key = "layout.pipeline" if error.key == "positions" else f"schedule.{error.key}"
        raise ConfigError(key, error.value, error.allowed) from None


def _too_many_stages(config: RunConfig) -> ConfigError:
    pipeline, chunks, layers = config.layout.pipeline, config.stages.chunks, config.model.num_hidden_layers
    if config.schedule.chunks != "auto" and pipeline <= layers:
        return ConfigError("schedule.chunks", chunks, f"at most {layers // pipeline}: layout.pipeline x schedule.chunks = "
                                                      f"{pipeline * chunks} stages, model.num_hidden_layers = {layers}")
    if chunks > layers:
        return ConfigError("model.num_hidden_layers", layers, f"at least {chunks}: {config.schedule.kind} has {chunks} stages on "
                                                              "each position")
    if chunks == 1:
        return ConfigError("layout.pipeline", pipeline, f"at most model.num_hidden_layers = {layers}")
    return ConfigError("layout.pipeline", pipeline, f"at most {layers // chunks}: {config.schedule.kind} has {chunks} stages on "
                                                    f"each position, model.num_hidden_layers = {layers}")
