"""What a system's ``claim.yaml`` says, checked before anything is trained. Imports no torch.

    statement: hiding 75 % of the patches teaches more than hiding 25 %
    source: section 4.1, figure 5
    tiers:
      tiny:
        about: what was reduced from the paper's setting, and why
        budget: {steps: 400, batch_size: 128}      # of every trained arm and seed
        seeds: 3
        data: {uri: cifar10, image_size: 32}       # DataSettings, shared by all arms
        model: {...}                               # the system's Config, shared
        train: {...}                               # TrainSettings, shared
        arms:
          ratio 0.75: {}
          ratio 0.25: [mask_ratio=0.25]            # override words, or nested values: {model: {mask_ratio: 0.25}}
          random initialisation: {untrained: true}
        method: ratio 0.75
        baselines: [ratio 0.25, random initialisation]
        metric: ridge                              # the primary one
        metrics:
          ridge: {probe: ridge, data: cifar10, key: top1}

A tier with ``before: {system, data, model, train}`` trains that once a seed first; ``{before}`` in an arm is its run. An arm
``{compress: {method: optin, budget: macs=0.5}}`` trains nothing: it cuts that run's model and is measured like the others.
``method`` must beat every one of ``baselines`` on ``metric``, or with ``margin: 2`` be less than 2 worse; other arms and
metrics are measured and reported only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import model_validator

from unmask import catalog
from unmask.config import Config, Field, merged, validated, words
from unmask.errors import UserError, nearest
from unmask.plain_yaml import read_yaml

PROBES = ("ridge", "linear", "knn", "attentive", "finetune", "dense", "accuracy", "own")
PARTS = ("data", "model", "train")
# A claim reads its numbers at the end: what only shows a training's course is off unless the claim asks for it.
QUIET = {"probe_every": 0, "preview_every": 0, "reference_every": 0, "keep_last": 1}


class Arm(Config):
    """One side of a comparison: what differs from the tier's shared settings."""

    model: dict[str, Any] = {}
    data: dict[str, Any] = {}
    train: dict[str, Any] = {}
    untrained: bool = Field(False, description="measure the network as it was initialised")
    compress: dict[str, Any] = Field(
        {}, description="nothing is trained: {method, budget, options of the method} on what `before` trained"
    )


class Metric(Config):
    """What is measured on each finished arm. Shares in 0 ... 1 are kept as percent."""

    probe: str = Field(
        description="ridge, linear, knn, attentive: of the frozen encoder; finetune: of a copy trained on; "
        "dense: of patch tokens; accuracy: of the system's own answers; own: a key of the system's own metrics"
    )
    data: str = Field(description="labelled data, as data.open takes it")
    key: str = Field("top1", description="the number taken from the probe's result")
    higher: bool = Field(True, description="whether a higher value is better")
    label: str = Field("", description="how a figure names it; default: the metric's name")
    options: dict[str, Any] = Field({}, description="further settings of the probe")

    @model_validator(mode="after")
    def _known_probe(self) -> Metric:
        if self.probe not in PROBES:
            raise ValueError(f"no probe {self.probe!r}: {nearest(self.probe, PROBES)}")
        return self


class Budget(Config):
    """What every trained arm may spend on every seed."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)

    def sentence(self) -> str:
        return f"{self.steps} steps of {self.batch_size} samples for every arm and seed"


class Cost(Config):
    """Time an image against image side, for some backbones: one figure beside the claim."""

    sides: list[int] = Field(min_length=2)
    backbones: dict[str, dict[str, Any]] = Field(description="name in the figure -> {name: backbone, options}")
    repeats: int = Field(5, ge=1)


class Before(Config):
    """What is trained once a seed before the arms, for all of them alike; its run is ``{before}`` in their settings."""

    system: str
    data: dict[str, Any] = {}
    model: dict[str, Any] = {}
    train: dict[str, Any] = Field(description="steps and batch_size among them")

    @model_validator(mode="after")
    def _has_a_length(self) -> Before:
        for key in ("steps", "batch_size"):
            if not isinstance(self.train.get(key), int):
                raise ValueError(f"before needs train.{key}")
        return self


class Tier(Config):
    """One size of the experiment: "tiny" for two cores, "small" for one GPU."""

    about: str
    budget: Budget
    seeds: int = Field(3, ge=3, description="a paired test of fewer says nothing")
    system: str = Field("", description="what is trained, where it is not the claim's own system")
    before: Before | None = Field(None, description="what all arms of a seed start from")
    data: dict[str, Any] = {}
    model: dict[str, Any] = {}
    train: dict[str, Any] = {}
    arms: dict[str, Arm] = Field(min_length=2)
    method: str
    baselines: list[str] = Field(min_length=1)
    metric: str
    margin: float = Field(0.0, ge=0, description="how much worse than a baseline it may be (non-inferiority)")
    metrics: dict[str, Metric] = Field(min_length=1)
    cost: Cost | None = None

    @model_validator(mode="before")
    @classmethod
    def _words(cls, values: Any) -> Any:
        """Arms written as override words become nested values."""
        if not isinstance(values, Mapping) or not isinstance(values.get("arms"), Mapping):
            return values
        return {**values, "arms": {name: _arm(arm) for name, arm in values["arms"].items()}}

    @model_validator(mode="after")
    def _names(self) -> Tier:
        for role, name in [("method", self.method), *(("baseline", b) for b in self.baselines)]:
            if name not in self.arms:
                raise ValueError(f"{role} {name!r} is no arm: {nearest(name, self.arms)}")
        if self.method in self.baselines:
            raise ValueError(f"{self.method!r} cannot be its own baseline")
        if self.metric not in self.metrics:
            raise ValueError(f"metric {self.metric!r} is not among the metrics: {nearest(self.metric, self.metrics)}")
        for name, settings in [("the tier", self.train), *((f"arm {n!r}", a.train) for n, a in self.arms.items())]:
            if spent := {"steps", "epochs", "batch_size", "seed"} & set(settings):
                raise ValueError(f"{name} sets train.{min(spent)}: the budget and the seeds belong to all arms alike")
        return self

    def settings(self, arm: str) -> dict[str, dict[str, Any]]:
        """``data``, ``model`` and ``train`` of one arm, the budget included, the seed not."""
        own = self.arms[arm]
        parts = {part: merged(getattr(self, part), getattr(own, part)) for part in PARTS}
        parts["train"] = {**QUIET, **parts["train"], "steps": self.budget.steps, "batch_size": self.budget.batch_size}
        return parts


class Claim(Config):
    """A statement of a paper that can be shown at small scale."""

    statement: str
    source: str = Field(description="the paper's section, table or figure")
    expect: str = Field("", description="what we expected before we ran it")
    tiers: dict[Literal["tiny", "small"], Tier] = Field(min_length=1)


def _arm(values: Any) -> Any:
    if not isinstance(values, list):
        return {} if values is None else values
    parts: dict[str, Any] = {}
    for key, value in words(str(w) for w in values).items():
        if key in PARTS and isinstance(value, Mapping):
            parts[key] = value
        else:
            parts.setdefault("model", {})[key] = value
    return parts


def read_claim(path: Path, where: str = "") -> Claim:
    """The claim in one file. Raises ``UserError`` in one line naming the file, the key and what it takes."""
    where = where or str(path)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {error}") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: a claim is a mapping with the keys {', '.join(Claim.model_fields)}")
    return validated(Claim, values, where=where)


def claim_of(slug: str) -> Claim:
    """The claim of a system. Raises ``UserError`` for an unknown system and for one without a claim."""
    path = catalog.card(slug).beside("claim.yaml")
    if path is None:
        raise UserError(f"{slug} has no claim to reproduce: {nearest(slug, with_claims())}")
    return read_claim(path, f"the claim of {slug}")


def with_claims() -> list[str]:
    """The slugs of all systems that have a claim."""
    return sorted(slug for slug, card in catalog.cards().items() if card.beside("claim.yaml"))


def tier_of(slug: str, name: str) -> tuple[Claim, Tier]:
    """The claim and one of its tiers. Raises ``UserError`` naming the tiers there are."""
    claim = claim_of(slug)
    if name not in claim.tiers:
        raise UserError(f"the claim of {slug} has no tier {name!r}: {nearest(name, claim.tiers)}")
    return claim, claim.tiers[name]  # type: ignore[index]
