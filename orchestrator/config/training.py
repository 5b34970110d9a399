"""What is trained on what: data, steps and batches, the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.section import Number, Seconds, Section, Sequences, Steps, Tokens, Unit


class DataSection(Section):
    """The tokenized text, and in which order it is read."""

    path: str = Field("auto", description="folder written by jobs.tokenize (path or URI); auto: the built-in corpus")
    tokenizer: str = Field("byte", description="byte, or the path of a tokenizer.json; must be what the data was made with")
    sequence_length: Tokens = Field(128, ge=4, description="of one sequence; must be what the data was made with")
    shuffle_window: Annotated[int, Unit("row groups")] = Field(
        32, ge=1, description="row groups whose sequences are mixed with each other")
    validation_fraction: Number = Field(0.02, gt=0, lt=0.5, description="share of documents held out by jobs.tokenize")
    prefetch_steps: Steps = Field(4, ge=1, description="batches that are read ahead")


class BatchRamp(Section):
    """A batch that begins small."""

    start_sequences: Sequences = Field(gt=0, description="of the first step")
    steps: Steps = Field(gt=0, description="steps over which the batch grows linearly to training.batch_sequences")


class TrainingSection(Section):
    """How long, in what batches and numbers, and towards what."""

    steps: Steps = Field(100, gt=0, description="optimizer steps of the whole run")
    batch_sequences: Sequences = Field(64, gt=0, description="sequences of one optimizer step, all ranks together")
    batch_ramp: BatchRamp | None = Field(None, description="a smaller batch to begin with; null: none")
    microbatch_sequences: Sequences = Field(4, gt=0, description="sequences that go through the pipeline together, at most")
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        "float32", description="of activations, and of weights where precision says same")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="what backward computes again rather than keeps: selective: norms, up-projections and SwiGLU "
                            "outputs; full: all but the inputs of segments")
    dispatch_precision: Literal["same", "float8"] = Field(
        "same", description="of tokens on their way to experts, and of gradients on theirs: that of training.dtype, or FP8 with "
                            "scales")
    mtp_loss_weight: Number = Field(0.3, ge=0, description="of the loss of multi-token prediction")
    balance_loss_weight: Number = Field(0.0001, ge=0, description="sequence-wise balance loss (report, eq. 17)")
    bias_update_speed: Number = Field(0.001, ge=0, description="gate bias step per optimizer step (report, section 2.1.2)")
    validate_every: Steps = Field(50, ge=0, description="steps between validations; 0: only at the end")
    validation_sequences: Sequences = Field(
        64, ge=0, description="held-out sequences of a validation, the first; 0: no validation at all")
    init_from: str | None = Field(
        None, description="folder with a model to begin with, as Hugging Face keeps DeepSeek-V3: a path or URI; null: random "
                          "weights")
    step_timeout_seconds: Seconds = Field(600.0, gt=0, description="bound on every wait inside a step")


class OptimizerSection(Section):
    """AdamW, and its learning rate: linear warm-up, constant, cosine to the final rate at the run's end."""

    learning_rate: Number = Field(2.2e-4, gt=0, description="after the warm-up")
    final_learning_rate: Number = Field(2.2e-5, ge=0, description="of the last step, where the cosine ends")
    warmup_steps: Steps = Field(20, ge=0, description="steps over which the rate grows linearly")
    constant_steps: Steps = Field(0, ge=0, description="steps at the full rate before the cosine begins")
    beta1: Number = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients, per step")
    beta2: Number = Field(0.95, ge=0, lt=1, description="decay of the mean of their squares, per step")
    epsilon: Number = Field(1e-8, gt=0, description="added to the root that an update is divided by")
    moments: Literal["exact", "bf16"] = Field(
        "exact", description="of AdamW, as they are kept from step to step: as the master weights, or rounded (DeepSeek-V3 "
                             "report, section 3.3.3)")
    weight_decay: Number = Field(0.1, ge=0, description="share of a weight that is taken off per step, times the rate")
    clip_norm: Number = Field(1.0, gt=0, description="norm of all gradients together; larger ones are scaled down to it")
