"""The loop: one optimiser step after another, for any system.

A step asks nothing of the device: losses and norms are summed where they are, and read when a line of metrics is due. What a
step draws depends on (seed, step, sample) alone, so that a resumed run, or one on other processes, does the same.
"""

from __future__ import annotations

import itertools
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.contracts import Progress, Trainable
from unmask.draw import Scoped, Seeded
from unmask.engine import failure
from unmask.engine.allocator import keep_freed_memory
from unmask.engine.checkpoint import generators, restore_generators
from unmask.engine.distributed import Place, WholeModel, distribute, unsynchronised, whole_state
from unmask.engine.ema import Ema
from unmask.engine.optim import build_optimizer, clip, learning_parameters, set_rates, skip_where
from unmask.engine.precision import compile_blocks, should_compile
from unmask.engine.schedule import learning_rate, weight_decay
from unmask.engine.settings import TrainSettings
from unmask.errors import UserError


class Training:
    """One stage's model, data and optimisers, able to take steps. Who logs, saves and stops is the keeper."""

    def __init__(self, model: Trainable, batches: Any, settings: TrainSettings, place: Place):
        """settings: resolved (``TrainSettings.resolved``)."""
        self.model, self.batches, self.settings, self.place = model, batches, settings, place
        self.device = place.device
        self.steps = settings.total_steps(batches.steps_per_epoch)
        self.steps_per_epoch: int | None = batches.steps_per_epoch
        self.share = settings.batch_size // (place.world * settings.accumulate)
        if self.device.type == "cpu":
            keep_freed_memory()
        model.to(self.device)
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)
        self.whole = WholeModel(model, place) if place.sharded else None
        self.compiled = should_compile(settings.compile, self.device)
        if self.compiled:
            compile_blocks(model.blocks_to_compile(), forgiving=settings.compile == "auto")
        self.module: nn.Module = distribute(model, place)
        self.optimizers = {p: build_optimizer(model, settings, p, sharded=place.sharded) for p in model.phases}
        self.parameters = {p: [q for g in o.param_groups for q in g["params"]] for p, o in self.optimizers.items()}
        self.ema = Ema(model, settings.ema) if settings.ema else None
        self.scaler = place.accelerator.scaler
        self.done = 0  # optimiser steps taken
        self.lr = 0.0
        self.sums: dict[str, Tensor] = {}  # since the last line of metrics
        self.summed = 0
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.last: tuple[Mapping[str, Any], Seeded] | None = None
        self.data: Iterator[Mapping[str, Any]] = iter(())
        self.data_state: dict[str, Any] | None = None  # of streamed data, as it was ...
        self.data_step = 0  # ... when this many steps were done

    # --- position ---
    def progress(self, step: int | None = None) -> Progress:
        step = self.done if step is None else step
        each = self.steps_per_epoch
        epochs = self.steps / each if each else self.settings.epochs or 1.0
        return Progress(step, self.steps, step / each if each else step / self.steps * epochs, epochs)

    def open_data(self) -> None:
        """Start the stream of this process's micro-batches at the present step."""
        place, accumulate = self.place, self.settings.accumulate
        self.data = iter(
            self.batches.iterate(
                self.done, rank=place.rank, world=place.world, accumulate=accumulate, state=self.data_state
            )
        )

    def draw(self, step: int, micro: int) -> Seeded:
        """The source of one micro-batch: its samples' places in the global batch are accumulation slices of rank slices."""
        return Seeded(self.settings.seed, step, (micro * self.place.world + self.place.rank) * self.share)

    # --- one step ---
    def step(self) -> None:
        """Take one optimiser step. Raises :class:`NotFinite` before one that is not finite is applied (on a CPU)."""
        step, settings = self.done, self.settings
        progress = self.progress()
        self.lr = learning_rate(settings, step, self.steps, self.steps_per_epoch)
        decay = weight_decay(settings, step, self.steps)
        raws = self.next_raw()
        kept = len(self.model.phases) > 1  # several phases see the same batches
        ready: list[Any] = [self.prepare(raw, step, micro) for micro, raw in enumerate(raws)] if kept else []
        for index, phase in enumerate(self.model.phases):
            optimizer = self.optimizers[phase]
            set_rates(optimizer, self.lr, decay)
            self.module.zero_grad(set_to_none=True)
            total = torch.zeros((), device=self.device)
            for micro, raw in enumerate(raws):
                batch = ready[micro] if kept else self.prepare(raw, step, micro)
                draw = self.draw(step, micro)
                last = micro == len(raws) - 1
                with nullcontext() if last else unsynchronised(self.module, self.place):
                    with self.place.accelerator.autocast():
                        losses = self.module(batch, Scoped(draw, "loss"), progress, phase)
                    self.place.accelerator.backward(losses["loss"] / len(raws))
                total += losses["loss"].detach().float() / len(raws)
                self.add(losses, "" if index == 0 else f"{phase}.", 1 / len(raws))
                self.last = (batch, draw)
            self.apply(optimizer, phase, step, total, raws)
        self.model.after_step(progress)
        if self.ema is not None:
            self.ema.update()
        self.done += 1
        self.summed += 1

    def next_raw(self) -> list[Mapping[str, Any]]:
        raws = list(itertools.islice(self.data, self.settings.accumulate))
        if len(raws) < self.settings.accumulate:
            raise UserError(
                f"the data ended at step {self.done} of {self.steps}: give --steps {max(self.done, 1)} or more data"
            )
        return raws

    def prepare(self, raw: Mapping[str, Any], step: int, micro: int) -> Mapping[str, Any]:
        """A raw micro-batch on the device, transformed."""
        moved = on_device(raw, self.device)
        with torch.no_grad():
            batch = self.batches.transform(moved, Scoped(self.draw(step, micro), "data"), train=True)
        if self.settings.channels_last:
            batch = {n: _channels_last(v) for n, v in batch.items()}
        return batch

    def add(self, losses: Mapping[str, Tensor], prefix: str, share: float) -> None:
        for name, value in losses.items():
            value = value.detach().float() * share
            before = self.sums.get(prefix + name)
            self.sums[prefix + name] = value if before is None else before + value

    def apply(self, optimizer: torch.optim.Optimizer, phase: str, step: int, loss: Tensor, raws: Sequence[Any]) -> None:
        """Clip, look whether everything is finite, and step."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm = clip(self.parameters[phase], self.settings, sharded=self.place.sharded)
        # fp16 expects infinite gradients now and then: the scaler skips those steps and lowers its scale
        bad = ~torch.isfinite(loss) if self.scaler is not None else ~(torch.isfinite(loss) & torch.isfinite(norm))
        bad = self.place.largest(bad.to(torch.int64)).bool()
        if self.device.type == "cpu":
            if bool(bad):  # reading is free here
                self.fail(step, phase, raws)
        else:
            self.first_bad = torch.where((self.first_bad < 0) & bad, step, self.first_bad)
            if self.scaler is None:
                skip_where(optimizer, self.first_bad >= 0)
        if self.scaler is not None:
            self.scaler.step(optimizer)
            self.scaler.update()
        else:
            optimizer.step()
        self.add({"grad_norm": norm}, "" if phase == self.model.phases[0] else f"{phase}.", 1.0)

    # --- what is not finite ---
    def check(self) -> None:
        """Raise :class:`NotFinite` if a step since the last look was not finite. Waits for the device."""
        if self.device.type == "cpu":
            return
        step = int(self.first_bad)
        if step >= 0:
            self.fail(step, self.model.phases[0], None)
        if self.scaler is not None and self.scaler.get_scale() < 1e-6:
            self.fail(self.done - 1, self.model.phases[0], None)

    def fail(self, step: int, phase: str, raws: Sequence[Any] | None) -> None:
        """Repeat the step to find what went wrong, and raise. raws: its micro-batches, None to read them again."""
        if raws is None:
            raws = self.read_again(step)
        sharded = self.place.sharded
        found: failure.Finding | None = None
        for micro, raw in enumerate(raws):
            finding = failure.examine(
                self.model,
                self.prepare(raw, step, micro),
                self.draw(step, micro),
                self.progress(step),
                phase,
                call=self.module if sharded else None,
                autocast=self.place.accelerator.autocast,
                scale=(self.scaler.get_scale() if self.scaler is not None else 1.0) / len(raws),
                complete=sharded,
            )
            finding.micro = micro
            if found is None or (found.tensor is None and finding.tensor is not None):
                found = finding
        raise NotFinite(step, phase, found)

    def read_again(self, step: int) -> list[Mapping[str, Any]]:
        """The raw micro-batches of an earlier step: by its number, or along the stream from the last known position."""
        place, accumulate = self.place, self.settings.accumulate
        start = self.data_step if self.data_state else step
        again = self.batches.iterate(
            start, rank=place.rank, world=place.world, accumulate=accumulate, state=self.data_state
        )
        first = (step - start) * accumulate
        return list(itertools.islice(iter(again), first, first + accumulate))

    # --- looking at the model ---
    @contextmanager
    def looking(self) -> Iterator[Trainable | None]:
        """The model as probes and previews meet it: whole, averaged weights if there are, evaluation mode, uncompiled;
        global generators are left as they were. None on all processes but the first."""
        kept = generators(self.device)
        training = self.model.training
        with self.ema.in_place() if self.ema is not None else nullcontext(), torch.compiler.set_stance("force_eager"):
            model = self.whole.refreshed(self.model) if self.whole is not None else self.model
            if model is not None:
                model.eval()
            try:
                yield model if self.place.first else None
            finally:
                if model is not None and model is not self.model:
                    model.cpu()
                self.model.train(training)
                restore_generators(kept, self.device)
        self.place.barrier()

    def references(self) -> dict[str, float]:
        """The loss that trivial predictors reach on the batch and the draw of the last step."""
        if self.last is None:
            return {}
        batch, draw = self.last
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), self.place.accelerator.autocast():
            values = self.model.references(batch, Scoped(draw, "loss"), self.progress(self.done - 1))
        if self.place.sharded:  # a look without a backward pass leaves the root gathered, and the next gradients wrong
            self.model.reshard()  # type: ignore[operator]
        if not values:
            return {}
        means = self.place.mean(torch.stack([v.detach().float() for v in values.values()])).tolist()
        return dict(zip(values, means, strict=True))

    def taken_sums(self) -> dict[str, float]:
        """Means over the steps since the last call, over all processes; starts anew. Waits for the device."""
        if not self.summed:
            return {}
        means = self.place.mean(torch.stack(list(self.sums.values())) / self.summed).tolist()
        out = dict(zip(self.sums, means, strict=True))
        self.sums, self.summed = {}, 0
        return out

    def plain_state(self) -> Mapping[str, Any]:
        """The whole model's state (collective when sharded)."""
        return whole_state(self.model) if self.place.sharded else self.model.state_dict()


class NotFinite(Exception):
    """Raised inside the loop; the keeper turns it into :class:`~unmask.engine.failure.StepFailed`."""

    def __init__(self, step: int, phase: str, finding: failure.Finding | None):
        super().__init__(f"step {step + 1} is not finite")
        self.step, self.phase, self.finding = step, phase, finding


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Tensors of a batch moved to the device, the rest as it is."""
    return {n: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for n, v in batch.items()}


def _channels_last(value: Any) -> Any:
    if isinstance(value, Tensor) and value.ndim == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def parameter_count(model: nn.Module) -> int:
    """All parameters that learn."""
    return sum(p.numel() for p in learning_parameters(model))


def memory_mb(device: torch.device) -> float:
    """The most memory that tensors took on a GPU; on a CPU, what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
