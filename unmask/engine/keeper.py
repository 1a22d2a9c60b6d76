"""What happens around the steps of one stage: metrics, previews, probes, checkpoints, stopping, resuming, exporting.

Everything of a step is written before the checkpoint of that step, so that a resume can cut the metrics at the checkpoint
and go on as if nothing had happened.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from unmask.contracts import Progress, Trainable
from unmask.draw import Seeded
from unmask.engine import checkpoint, failure
from unmask.engine.display import Display
from unmask.engine.export import export
from unmask.engine.loop import NotFinite, Training, memory_mb, on_device
from unmask.engine.pictures import save_pictures
from unmask.engine.run import Interrupted, RunFolder, resume_command
from unmask.engine.schedule import warmup_length
from unmask.engine.settings import TrainSettings
from unmask.engine.stopping import StopRequest
from unmask.errors import UserError

PREVIEW_SAMPLES = 8
_REFUSED = 1 << 16  # above any signal: the first process could not write
_SAME = ("seed", "batch_size", "optimizer")  # what an exact resume cannot change


class Monitor(Protocol):
    """Measures the model now and then; its numbers stand in ``metrics.jsonl`` under kind "probe"."""

    def every(self, settings: TrainSettings) -> int:
        """Steps between two measurements; 0: never. settings: resolved, so that ``probe_every`` is a number."""
        ...

    def __call__(self, model: Trainable, progress: Progress) -> dict[str, float]: ...


def refuse_changes(settings: TrainSettings, same: Mapping[str, Any], path: Path) -> None:
    """Raises ``UserError`` for a setting that would make the run in ``path`` another one. same: those it was saved with."""
    for name, value in same.items():
        if (now := getattr(settings, name)) != value:
            raise UserError(f"train.{name} was {value} in {path} and is now {now}: resume with train.{name}={value}")


class Keeper:
    """One stage with its folder. ``root``: the run that it belongs to, whose command resumes it."""

    def __init__(
        self,
        training: Training,
        folder: RunFolder,
        root: RunFolder,
        display: Display,
        monitors: Sequence[Monitor],
        stop: StopRequest,
        title: str,
    ):
        self.training, self.folder, self.root, self.display, self.stop = training, folder, root, display, stop
        self.monitors, self.title = list(monitors), title
        self.settings, self.place = training.settings, training.place
        self.before = 0.0  # seconds of the processes that went before
        self.started = self.window = time.perf_counter()
        self.paused = 0.0
        self.window_step = 0
        self.best: dict[str, float] | None = None  # value, step
        self.latest: dict[str, float] = {}
        self.saved = -1
        self.problem: str | None = None  # what the disk said to the first of several processes

    # --- the whole of it ---
    def fit(self, *, resume: bool) -> None:
        """Train to the end, save, export. Raises ``Interrupted``, ``StepFailed``, ``UserError``."""
        training = self.training
        resumed = resume and self.restore()
        if not resumed:
            self.folder.cut_metrics(-1)
            checkpoint.seed_generators(self.settings.seed + self.place.rank)
        training.open_data()
        self.window_step = training.done
        self.start_trackers()
        self.display.start(self.title, training.steps, training.done)
        warmup = warmup_length(self.settings, training.steps_per_epoch)
        if warmup >= training.steps:
            self.display.say(
                f"the warm-up ({warmup:g} steps) outlasts the run ({training.steps} steps): lower warmup_steps or train longer"
            )
        try:
            if not resumed:
                self.probe([m for m in self.monitors if m.every(self.settings)])  # the untrained network's numbers
            self.window, self.paused = time.perf_counter(), 0.0
            while training.done < training.steps:
                training.step()
                self.after_step()
            self.export()
        except NotFinite as bad:
            raise failure.kept_step(training, bad, self.folder, self.root) from None
        finally:
            self.display.stop()
            for tracker in self.place.accelerator.trackers:
                tracker.finish()

    def after_step(self) -> None:
        training, settings, done = self.training, self.settings, self.training.done
        self.display.step(done)
        last = done >= training.steps
        saves = self.due(settings.save_every) or last
        logs = last or done % settings.log_every == 0 or (saves and bool(settings.best))  # best: of this very step
        if logs:
            training.check()
            self.log()
        if self.due(settings.reference_every):
            self.refer()
        if self.due(settings.preview_every) or (last and settings.preview_every):
            self.preview()
        improved = self.probe([m for m in self.monitors if self.due(m.every(settings)) or (last and m.every(settings))])
        if saves and settings.best in self.latest:
            improved |= self.improves(self.latest[settings.best])  # type: ignore[index]
        if saves or improved:
            self.save(best=improved)
        if (number := self.stop_number(logs)) and not last:
            self.leave(number)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What only the first process writes. Where the disk refuses, one process raises at once; of several, all do when
        they next agree on going on, so that none waits for one that has left."""
        try:
            yield
        except UserError as error:
            if self.place.world == 1:
                raise
            self.problem = self.problem or str(error)

    def tell(self, record: Mapping[str, Any]) -> None:
        with self.writing():
            self.folder.log(record)

    def due(self, every: int | None) -> bool:
        return bool(every) and self.training.done % every == 0  # type: ignore[operator]

    # --- metrics ---
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def log(self) -> None:
        training, done = self.training, self.training.done
        sums = training.taken_sums()
        now = time.perf_counter()
        working = max(now - self.window - self.paused, 1e-9)
        rate = (done - self.window_step) * self.settings.batch_size / working
        self.window, self.paused, self.window_step = now, 0.0, done
        progress = training.progress()
        values = {
            "step": done,
            "epoch": progress.epoch,
            "loss": sums.pop("loss"),
            "lr": training.lr,
            "grad_norm": sums.pop("grad_norm"),
            "images_per_second": round(rate, 3),
            "memory_mb": round(memory_mb(training.device), 1),
            "seconds": round(self.seconds(), 3),
            **sums,
        }
        self.latest = {n: v for n, v in values.items() if n not in ("step", "epoch", "seconds")}
        self.tell({"kind": "train", **values})
        facts = getattr(training.batches, "facts", None)
        images = getattr(facts, "image_size", None) or getattr(facts, "channels", None)
        shown = {**values, "samples_per_second": values["images_per_second"], "images_per_second": 0.0}
        self.display.metrics(values if images else shown)
        self.track("train", self.latest)

    def refer(self) -> None:
        with self.pause():
            values = self.training.references()
        if values:
            units = getattr(self.training.model, "loss_units", "")
            self.tell({"kind": "reference", "step": self.training.done, "values": values, "units": units})
            self.display.references(values)
            self.track("reference", values)

    def probe(self, monitors: Sequence[Monitor]) -> bool:
        """Run the monitors; whether the metric named by ``best`` improved."""
        if not monitors:
            return False
        values: dict[str, float] = {}
        with self.pause(), self.training.looking() as model:
            if model is not None:
                for monitor in monitors:
                    values.update(monitor(model, self.training.progress()))
        values = self.place.told(values)
        self.tell({"kind": "probe", "step": self.training.done, "values": values})
        self.display.probe(values)
        self.track("probe", values)
        return self.settings.best in values and self.training.done > 0 and self.improves(values[self.settings.best])  # type: ignore[index]

    def improves(self, value: float) -> bool:
        sign = 1 if self.settings.best_is_largest else -1
        if self.best is not None and sign * value <= sign * self.best["value"]:
            return False
        self.best = {"value": value, "step": self.training.done}
        return True

    def preview(self) -> None:
        training = self.training
        with self.pause(), training.looking() as model:
            if model is not None:
                batch = on_device(training.batches.samples(PREVIEW_SAMPLES), training.device)
                with torch.no_grad():
                    pictures = model.preview(batch, Seeded(self.settings.seed, 0), self.training.progress())
                with self.writing():
                    save_pictures(pictures, self.folder.previews, training.done)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that images per second do not count."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - begun

    # --- trackers ---
    def start_trackers(self) -> None:
        if self.settings.trackers:
            with suppress(OSError):
                (self.folder.path / "trackers").mkdir(exist_ok=True)
            plain = {n: v for n, v in self.settings.plain().items() if isinstance(v, (int, float, str, bool))}
            where = {"wandb": {"dir": str(self.folder.path / "trackers"), "name": self.folder.path.name}}
            self.place.accelerator.init_trackers("unmask", config=plain, init_kwargs=where)

    def track(self, kind: str, values: Mapping[str, float]) -> None:
        if self.settings.trackers:
            self.place.accelerator.log({f"{kind}/{n}": v for n, v in values.items()}, step=self.training.done)

    # --- checkpoints ---
    def save(self, *, best: bool = False) -> None:
        """A checkpoint of now. Never of a model that a step broke."""
        training, root = self.training, self.folder.checkpoints
        training.check()
        if self.saved != training.done:
            with self.pause():
                with self.writing():
                    self.folder.sync_metrics()
                about = {
                    "world": self.place.world,
                    "sharded": self.place.sharded,
                    "seconds": self.seconds(),
                    "best": self.best,
                    "phases": list(training.optimizers),
                    "same": {n: getattr(self.settings, n) for n in _SAME},
                }
                checkpoint.write(root, training.done, self.fill, about, self.place)
            self.saved = training.done
        if best and self.place.first:
            with self.writing():
                checkpoint.mark_best(root, training.done)
        if self.place.first:
            checkpoint.prune(root, self.settings.keep_last)

    def fill(self, folder: Path) -> None:
        """Write this process's part of a checkpoint."""
        training = self.training
        average = training.ema.average if training.ema is not None else None
        if self.place.sharded:
            checkpoint.save_shards(training.model, training.optimizers, average, folder)
        elif self.place.first:
            checkpoint.save_tensors(training.model.state_dict(), folder / "model.safetensors")
            for phase, optimizer in training.optimizers.items():
                checkpoint.save_plain(optimizer.state_dict(), folder / f"optimizer-{phase}.pt")
            if average is not None:
                checkpoint.save_tensors(average, folder / "ema.safetensors")
        training.data_state, training.data_step = dict(training.batches.state_dict()), training.done
        scaler = training.scaler
        mine = {
            "generators": checkpoint.generators(training.device),
            "data": training.data_state,
            "sums": {n: v.detach().cpu() for n, v in training.sums.items()},
            "summed": training.summed,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        checkpoint.save_plain(mine, folder / f"rank-{self.place.rank:05d}.pt")

    def restore(self) -> bool:
        """Go back to the last whole checkpoint; False when there is none yet."""
        root, place = self.folder.checkpoints, self.place
        names = place.told([p.name for p in checkpoint.whole_checkpoints(root)])
        if not names and any(root.glob("step-*")):
            raise UserError(f"nothing to resume from: every checkpoint in {root} is damaged")
        for name in names:
            about = checkpoint.about(root / name)
            refuse_changes(self.settings, about["same"], self.folder.path)
            problem: str | None = None
            try:
                self.load(root / name, about)
            except (OSError, RuntimeError, ValueError, KeyError) as error:
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
            problem = next((p for p in place.gathered(problem) if p is not None), None)
            if problem is None:
                break
            if name == names[-1]:
                raise UserError(f"cannot resume from {root / name}: it does not fit this model ({problem})")
            self.display.say(f"{root / name} cannot be read ({problem}): going back to the one before")
        else:
            return False
        self.folder.cut_metrics(self.training.done)
        return True

    def load(self, folder: Path, about: Mapping[str, Any]) -> None:
        training, place = self.training, self.place
        mine = folder / f"rank-{place.rank:05d}.pt"
        same_world = about["world"] == place.world and mine.exists()
        state = checkpoint.load_plain(mine if same_world else folder / "rank-00000.pt")
        self.load_weights(folder, about)
        if not about["sharded"]:
            for phase, optimizer in training.optimizers.items():
                optimizer.load_state_dict(checkpoint.load_plain(folder / f"optimizer-{phase}.pt"))
        if training.scaler is not None and state["scaler"]:
            training.scaler.load_state_dict(state["scaler"])
        training.done = self.saved = about["step"]
        training.sums = {n: v.to(training.device) for n, v in state["sums"].items()}
        training.summed = state["summed"]
        training.data_state, training.data_step = state["data"] if same_world else None, training.done
        if state["data"] and not same_world:
            raise UserError(
                f"streamed data was at {about['world']} places in {folder}, and there are {place.world} processes now: "
                f"resume with {about['world']} processes"
            )
        if same_world:
            checkpoint.restore_generators(state["generators"], training.device)
        else:
            checkpoint.seed_generators(self.settings.seed + place.rank)
        self.before, self.best = about["seconds"], about["best"]

    def load_weights(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Model, averages and, where sharded, optimisers of a checkpoint."""
        training = self.training
        if about["sharded"] != self.place.sharded:
            was, now = ("sharded (FSDP)", "whole") if about["sharded"] else ("whole", "sharded (FSDP)")
            raise UserError(f"{folder} is {was} and this run is {now}: resume it the way it was launched")
        if about["sharded"]:
            average = training.ema.average if training.ema is not None else None
            checkpoint.load_shards(training.model, training.optimizers, average, folder)
            return
        training.model.load_state_dict(checkpoint.load_tensors(folder / "model.safetensors"))
        if training.ema is not None:
            training.ema.load(checkpoint.load_tensors(folder / "ema.safetensors"))

    # --- ends ---
    def stop_number(self, looks: bool) -> int:
        """The signal that asked to stop, on every process in the same step; 0 when none did.

        Raises ``UserError`` on every process when the first one could not write.
        """
        number = _REFUSED if self.problem else self.stop.number or 0
        if self.place.world == 1:
            return number
        if self.training.device.type != "cpu" and not looks:  # asking the others makes the device wait
            return 0
        number = int(self.place.largest(torch.tensor(number, device=self.training.device)))
        if number == _REFUSED:
            raise UserError(self.place.told(self.problem))
        return number

    def leave(self, number: int) -> None:
        self.save()
        done, steps = self.training.done, self.training.steps
        raise Interrupted(
            f"stopped after step {done} of {steps} and saved; go on with: {resume_command(self.root.info, self.root.path)}",
            number,
        )

    def export(self) -> None:
        """``model/`` and ``encoder/``: of the best checkpoint where ``best`` is set, else of the last step."""
        training, root = self.training, self.folder.checkpoints
        step = training.done
        if self.settings.best is not None:
            chosen = self.place.told(str(checkpoint.best(root) or ""))
            if chosen:
                about = checkpoint.about(Path(chosen))
                self.load_weights(Path(chosen), about)
                step = about["step"]
            else:
                self.display.say(f"best={self.settings.best} was never measured: the last step is exported")
        with training.looking() as model:
            if model is not None:
                with self.writing():
                    export(model, self.folder.path)
        with self.writing():
            self.folder.update(exported_step=step)
        self.stop_number(True)
