"""How to train: every option of the loop, with its meaning. Read without importing torch."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from unmask.config import Config, Field
from unmask.errors import UserError, nearest

TRACKERS = ("tensorboard", "wandb")


class TrainSettings(Config):
    """How to train. ``steps`` and ``epochs``: one is in force; ``steps`` wins when both are given."""

    steps: int | None = Field(None, ge=1, description="optimiser steps; wins over epochs")
    epochs: float | None = Field(None, gt=0, description="passes over the data")
    batch_size: int = Field(64, ge=1, description="samples of one optimiser step, over all processes and micro-batches")
    accumulate: int = Field(1, ge=1, description="micro-batches that make one optimiser step")

    optimizer: Literal["adamw", "lamb", "lars", "sgd"] = Field("adamw", description="the optimiser")
    lr: float | None = Field(None, ge=0, description="learning rate, absolute; wins over base_lr")
    base_lr: float = Field(
        1.5e-4, ge=0, description="learning rate for a batch of base_batch; scaled by batch_size / base_batch"
    )
    base_batch: int = Field(256, ge=1, description="the batch that base_lr is meant for")
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of Adam's and LAMB's two averages")
    eps: float = Field(1e-8, gt=0, description="added to the denominator of Adam and LAMB")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD and LARS")
    weight_decay: float = Field(0.05, ge=0, description="weight decay, not on parameters with fewer than two axes")
    weight_decay_end: float | None = Field(
        None, ge=0, description="weight decay at the end, reached along a half cosine"
    )

    schedule: Literal["cosine", "linear", "constant", "multistep"] = Field(
        "cosine", description="learning rate after the warm-up"
    )
    milestones: list[float] = Field(
        [],
        description="multistep: where the rate is multiplied by gamma; epochs, or shares of the run when all are below 1",
    )
    gamma: float = Field(0.1, gt=0, description="multistep: factor at each milestone")
    warmup_epochs: float | None = Field(None, ge=0, description="length of the linear warm-up in epochs")
    warmup_steps: int | None = Field(
        None, ge=0, description="length of the linear warm-up in steps; wins over warmup_epochs"
    )
    warmup_lr: float = Field(0.0, ge=0, description="learning rate at the first step of the warm-up")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine or line")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor on the learning rate from each layer to the one below"
    )
    clip_norm: float | None = Field(None, gt=0, description="largest norm of all gradients together")
    clip_each: float | None = Field(None, gt=0, description="largest norm of the gradient of each parameter")

    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="arithmetic of the forward pass; auto: bf16 where the hardware multiplies it fast, else fp32",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="compile the repeated blocks; auto: on a CUDA GPU"
    )
    channels_last: bool = Field(False, description="store images and convolutions with channels last")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the moving average of the weights; 0: none")
    seed: int = Field(0, description="seed of everything random")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps ...")

    log_every: int = Field(10, ge=1, description="steps between two lines of metrics")
    save_every: int | None = Field(
        None, ge=0, description="steps between two checkpoints; 0: only the last; default: ten a run"
    )
    keep_last: int = Field(2, ge=1, description="checkpoints kept, besides the best")
    preview_every: int | None = Field(
        None, ge=0, description="steps between two previews; 0: none; default: four a run"
    )
    probe_every: int | None = Field(None, ge=0, description="steps between two probes; 0: none; default: five a run")
    reference_every: int | None = Field(
        None,
        ge=0,
        description="steps between two measurements of the trivial predictors; 0: none; default: twenty a run",
    )
    best: str | None = Field(None, description="metric whose best checkpoint is kept and exported (loss, knn_top1 ...)")
    best_mode: Literal["auto", "min", "max"] = Field(
        "auto", description="whether best means smallest or largest; auto: smallest for losses"
    )
    trackers: list[str] = Field([], description="where metrics also go: tensorboard, wandb")

    @field_validator("betas")
    @classmethod
    def _betas_below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas={list(value)} must lie in [0, 1)")
        return value

    @field_validator("trackers")
    @classmethod
    def _known_trackers(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in TRACKERS:
                raise ValueError(f"no tracker {name!r}: {nearest(name, TRACKERS)}")
        return value

    @field_validator("milestones")
    @classmethod
    def _rising_milestones(cls, value: list[float]) -> list[float]:
        if sorted(value) != list(value) or any(m <= 0 for m in value):
            raise ValueError(f"milestones={value} must be positive and rising")
        return value

    @model_validator(mode="after")
    def _even_micro_batches(self) -> TrainSettings:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}: "
                f"use batch_size={max(self.batch_size // self.accumulate, 1) * self.accumulate}"
            )
        return self

    @property
    def peak_lr(self) -> float:
        """``lr``, or ``base_lr x batch_size / base_batch``."""
        return self.lr if self.lr is not None else self.base_lr * self.batch_size / self.base_batch

    @property
    def best_is_largest(self) -> bool:
        """Whether the metric named by ``best`` is better when larger."""
        return self.best_mode == "max" or (self.best_mode == "auto" and "loss" not in (self.best or ""))

    def total_steps(self, steps_per_epoch: int | None) -> int:
        """How many optimiser steps the run has. Raises ``UserError`` when neither steps nor epochs tells."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise UserError("train: how long? give --steps N or --epochs N")
        if not steps_per_epoch:
            raise UserError(
                f"train: epochs={self.epochs:g} cannot be counted on data of unknown length: give --steps N"
            )
        return max(round(self.epochs * steps_per_epoch), 1)

    def resolved(self, steps_per_epoch: int | None) -> TrainSettings:
        """The same settings with steps, epochs (where the data has a length) and every interval as a number."""
        steps = self.total_steps(steps_per_epoch)

        def interval(given: int | None, times: int) -> int:
            return max(steps // times, 1) if given is None else given

        return self.model_copy(
            update={
                "steps": steps,
                "epochs": steps / steps_per_epoch if steps_per_epoch else self.epochs,
                "save_every": interval(self.save_every, 10),
                "preview_every": interval(self.preview_every, 4),
                "probe_every": interval(self.probe_every, 5),
                "reference_every": interval(self.reference_every, 20),
            }
        )
