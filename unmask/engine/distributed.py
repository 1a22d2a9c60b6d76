"""Where a training runs: one process, or many under ``torchrun`` / ``accelerate launch`` with DDP or FSDP2.

Sharding is asked for as Accelerate does: ``accelerate launch --use_fsdp --fsdp_version 2``, or with ``torchrun`` the
environment variable ``ACCELERATE_USE_FSDP=true``. The model is sharded with torch's ``fully_shard`` block by block, which
works on a CPU with gloo too.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import datetime
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unmask.contracts import Trainable
from unmask.engine.precision import chosen_device, chosen_precision
from unmask.engine.settings import TrainSettings
from unmask.errors import MissingExtra, UserError

_PACKAGES = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}
_PATIENCE = datetime.timedelta(hours=2)  # the others wait while the first process probes and saves


@dataclass
class Place:
    """The processes and the device of a training."""

    accelerator: Accelerator
    precision: str
    sharded: bool

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over the processes, on each of them. They hold equal shares of a batch."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.world
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The largest of ``values`` over the processes."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gathered(self, value: Any) -> list[Any]:
        """A plain value of every process, in the order of their ranks."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def told(self, value: Any) -> Any:
        """The first process's value, on every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def together(self, work: Callable[[], None]) -> None:
        """What every process does and not every one writes: where the disk refuses one, all raise what it said."""
        problem: str | None = None
        try:
            work()
        except UserError as error:
            if self.world == 1:
                raise
            problem = str(error)
        problem = next((p for p in self.gathered(problem) if p is not None), None)
        if problem is not None:
            raise UserError(problem)


def open_place(settings: TrainSettings, logs: Path | None = None) -> Place:
    """Find the device and join the other processes. logs: where trackers write.

    Raises ``UserError`` for an absent device or a batch that does not divide.
    """
    device = chosen_device(settings.device)
    precision = chosen_precision(settings.precision, device)
    for name in settings.trackers:
        need_tracker(name)
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    sharded = launched and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded:
        os.environ.setdefault("FSDP_VERSION", "2")
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # an earlier training in this process may have chosen otherwise
    GradientState._reset_state()
    with _chosen(device, launched), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*log_with.*")
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
            log_with=settings.trackers or None,  # type: ignore[arg-type]
            project_config=ProjectConfiguration(project_dir=str(logs), logging_dir=str(logs)) if logs else None,
        )
    if accelerator.num_processes > 1:
        atexit.unregister(_leave_group)
        atexit.register(_leave_group)
    place = Place(accelerator, precision, sharded)
    share = place.world * settings.accumulate
    if settings.batch_size % share:
        raise UserError(
            f"batch_size={settings.batch_size} does not divide into {place.world} processes x accumulate={settings.accumulate}: "
            f"use batch_size={max(settings.batch_size // share, 1) * share}"
        )
    return place


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End this process with ``code``. One of a launched group skips the interpreter's teardown after the exit handlers: threads of
    the collective library can outlive it, and now and then abort a run that is done."""
    if not int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def need_tracker(name: str) -> None:
    """Raise ``MissingExtra`` when the tracker's package is not installed."""
    module, package = _PACKAGES[name]
    try:
        __import__(module)
    except ImportError:
        raise MissingExtra(f"trackers={name}", package, "track") from None


@contextmanager
def _chosen(device: torch.device, launched: bool) -> Iterator[None]:
    """Make Accelerate take exactly this device; under a launcher the local rank decides."""
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if device.index is not None and not launched:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        else:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before


def distribute(model: Trainable, place: Place) -> nn.Module:
    """The module to call in a step: the model itself, or DDP around it, or the model with its parameters sharded."""
    if place.sharded:
        return _sharded(model)
    if place.world == 1:
        return model
    # a system may hold parameters that a phase does not touch; DDP would wait for their gradients for ever
    ids = [place.device.index] if place.device.type == "cuda" else None
    warnings.filterwarnings("ignore", message=".*find_unused_parameters.*")
    return nn.parallel.DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)


def _sharded(model: Trainable) -> nn.Module:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in model.blocks_to_compile():
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "references")
    return model


def unsynchronised(module: nn.Module, place: Place) -> AbstractContextManager[Any]:
    """While inside, gradients stay on each process: for every micro-batch but the last."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    if place.sharded:
        return _unsynchronised_shards(module)
    return contextlib.nullcontext()


@contextmanager
def _unsynchronised_shards(module: Any) -> Iterator[None]:
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


def local_part(tensor: Tensor) -> Tensor:
    """The shard that this process holds (sharing memory); an ordinary tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class WholeModel:
    """An unsharded copy of a sharded model on the first process, for probes, previews and export.

    Made before sharding; filled from the shards by :meth:`refreshed`.
    """

    def __init__(self, model: Trainable, place: Place):
        self.place = place
        self.copy = copy.deepcopy(model).cpu() if place.first else None

    def refreshed(self, model: Trainable) -> Trainable | None:
        """The copy with the model's present weights; None on all processes but the first."""
        state = whole_state(model)
        if self.copy is not None:
            self.copy.load_state_dict(state)
            return self.copy.to(self.place.device)
        return None


def whole_state(model: nn.Module) -> Mapping[str, Any]:
    """The unsharded state of a sharded model on the CPU; full on the first process, empty on the others."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
