"""A step whose loss is not finite: find the first tensor that is not, keep the step, and repeat it later.

``failed-step.safetensors`` holds the batch as the loss met it (``batch.*``), the draws (``draw.*``) and, as metadata, what
happened; ``failed-model.safetensors`` beside it holds the weights of that moment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from unmask.contracts import Batch, Progress, Trainable, configured
from unmask.draw import Draw, Recorder, Replay, Scoped
from unmask.engine.checkpoint import about, load_tensors, save_tensors, whole_checkpoints
from unmask.engine.distributed import local_part
from unmask.engine.run import RunFolder, mended_errors, resume_command
from unmask.errors import UserError
from unmask.official.hub import own_config, trainable_class

if TYPE_CHECKING:
    from unmask.engine.loop import NotFinite, Training

STEP_FILE, MODEL_FILE = "failed-step.safetensors", "failed-model.safetensors"


class StepFailed(UserError):
    """A step with a loss or a gradient that is not finite. ``step`` counts from 1; ``tensor`` names the first culprit."""

    def __init__(self, message: str, step: int = 0, tensor: str = ""):
        super().__init__(message)
        self.step, self.tensor = step, tensor


@dataclass
class Finding:
    """What a repeated step showed. ``tensor`` is None when everything was finite this time."""

    tensor: str | None
    batch: dict[str, Any]
    draws: dict[str, Tensor]
    loss: float | None
    micro: int = 0


def examine(
    model: Trainable,
    batch: Batch,
    draw: Draw,
    progress: Progress,
    phase: str,
    *,
    call: Callable[..., Mapping[str, Tensor]] | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    scale: float = 1.0,
    complete: bool = False,
) -> Finding:
    """Repeat one micro-batch, compiled parts in their plain form, and name the first tensor that is not finite.

    Looked at in this order: ``batch.*``, parameters, what each part of the network gives, the losses, the gradients.
    complete: go through forward and backward even when found already (sharded models work in step with the others).
    """
    recorder = Recorder(draw)
    found = first_of((f"batch.{n}", t) for n, t in batch.items() if isinstance(t, Tensor)) or first_of(
        (f"parameter {n}", local_part(p.data)) for n, p in model.named_parameters()
    )
    losses: Mapping[str, Tensor] = {}
    model.zero_grad(set_to_none=True)
    with torch.compiler.set_stance("force_eager"), watched(model) as outputs, autocast():
        losses = (call or model)(batch, Scoped(recorder, "loss"), progress, phase)
    found = found or (outputs[0] if outputs else None) or first_of((f"loss {n!r}", v) for n, v in losses.items())
    if found is None or complete:
        with torch.compiler.set_stance("force_eager"):
            (losses["loss"] * scale).backward()
        parameters = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
        found = found or first_of((f"gradient of {n}", local_part(p.grad)) for n, p in reversed(parameters))  # type: ignore[arg-type]
    model.zero_grad(set_to_none=True)
    loss = losses.get("loss")
    return Finding(found, dict(batch), dict(recorder.recorded), None if loss is None else float(loss.detach()))


def first_of(named: Iterator[tuple[str, Tensor]] | Any) -> str | None:
    """The name of the first tensor with an infinity or a NaN."""
    return next((name for name, tensor in named if not is_finite(tensor)), None)


def is_finite(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor.detach()).all())


@contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of the parts of a network that give something not finite, in the order of the computation."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            tensors = output if isinstance(output, (list, tuple)) else (output,)
            if not found and not all(is_finite(t) for t in tensors if isinstance(t, Tensor)):
                found.append(f"output of {name}")

        return look

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def keep(
    folder: Path,
    finding: Finding,
    *,
    model: Trainable,
    progress: Progress,
    phase: str,
    precision: str,
    seed: int,
    tensor: str,
) -> None:
    """Write the failed step, to be repeated by :func:`replay`."""
    tensors = {f"batch.{n}": t for n, t in finding.batch.items() if isinstance(t, Tensor)}
    tensors |= {f"draw.{n}": t for n, t in finding.draws.items()}
    kind = type(model)
    about = {
        "step": progress.step + 1,
        "progress": asdict(progress),
        "phase": phase,
        "micro": finding.micro,
        "tensor": tensor,
        "loss": None if finding.loss is None else str(finding.loss),
        "precision": precision,
        "seed": seed,
        "entry": f"{kind.__module__}:{kind.__qualname__}",
        "config": own_config(model.config.plain()) if model.config is not None else {},
        "plain": {n: v for n, v in finding.batch.items() if not isinstance(v, Tensor) and _is_plain(v)},
    }
    path = folder / STEP_FILE
    with mended_errors(f"writing {path}"):
        from safetensors.torch import save_file

        whole = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        save_file(whole, path, metadata={"unmask": json.dumps(about)})


def kept_step(training: Training, bad: NotFinite, folder: RunFolder, root: RunFolder) -> StepFailed:
    """Keep the failed step in ``folder``; the error that tells of it. Every process calls it."""
    place, found = training.place, bad.finding
    names = place.gathered(found.tensor if found is not None else None)
    # a gradient may be another process's fault, reduced over all of them: what comes before it is nearer to the cause
    order = sorted((n.startswith("gradient"), i) for i, n in enumerate(names) if n is not None)
    owner = order[0][1] if order else 0
    tensor = names[owner] or "the loss (finite when the step was repeated)"
    state = training.plain_state()

    def write() -> None:
        if place.first:
            keep_model(folder.path, state)
        if place.rank == owner and found is not None:
            keep(
                folder.path,
                found,
                model=training.model,
                progress=training.progress(bad.step),
                phase=bad.phase,
                precision=place.precision,
                seed=training.settings.seed,
                tensor=tensor,
            )

    place.together(write)
    last = whole_checkpoints(folder.checkpoints)
    kept = f"the checkpoint of step {about(last[0])['step']} is kept" if last else "no checkpoint was due before it"
    step = bad.step + 1
    return StepFailed(message(step, training.steps, tensor, root.info, root.path, kept), step, tensor)


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def keep_model(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the weights that the failed step met."""
    with mended_errors(f"writing {folder / MODEL_FILE}"):
        save_tensors(state, folder / MODEL_FILE)


def message(step: int, steps: int, tensor: str, info: Mapping[str, Any], out: Path, kept: str) -> str:
    """The one line that a person reads."""
    return (
        f"step {step} of {steps} is not finite: first in {tensor}; {kept}; the step is kept: unmask replay {out}; "
        f"then go on with a lower lr, clip_norm=1 or precision=fp32: {resume_command(info, out)}"
    )


def failed_step(run: Path) -> Path:
    """The folder of the run or of one of its stages that holds a failed step. Raises ``UserError`` when none does."""
    run = Path(run)
    found = [p.parent for p in (run / STEP_FILE, *sorted(run.glob(f"stages/*/{STEP_FILE}"))) if p.exists()]
    if not found:
        raise UserError(f"nothing to replay in {run}: no step of it has failed (there is no {STEP_FILE})")
    return max(found, key=lambda folder: (folder / STEP_FILE).stat().st_mtime)


def replay(run: Path | str, *, model: Trainable | None = None, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Repeat the failed step of a run on one device, with its batch, its draws and its weights.

    model: the system itself where its class cannot be built from its config alone. Returns ``step``, ``phase``,
    ``recorded`` and ``found`` (the first tensor that was and is not finite; None when finite now), ``loss``, ``same``.
    """
    folder = failed_step(Path(run))
    with safe_open(folder / STEP_FILE, "pt", device=str(device)) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        about = json.loads((file.metadata() or {}).get("unmask", "{}"))
    batch = {n.removeprefix("batch."): t for n, t in tensors.items() if n.startswith("batch.")} | about.get("plain", {})
    draws = {n.removeprefix("draw."): t for n, t in tensors.items() if n.startswith("draw.")}
    if model is None:
        kind = trainable_class(str(about["entry"]), where=folder)
        model = kind.build(configured(kind, own_config(about["config"])))
    model.to(device).train()
    if (folder / MODEL_FILE).exists():
        model.load_state_dict(load_tensors(folder / MODEL_FILE))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(about["precision"])

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(torch.device(device).type, dtype) if dtype is not None else nullcontext()

    finding = examine(model, batch, Replay(draws), Progress(**about["progress"]), about["phase"], autocast=autocast)
    return {
        "step": about["step"],
        "phase": about["phase"],
        "recorded": about["tensor"],
        "found": finding.tensor,
        "loss": finding.loss,
        "same": finding.tensor == about["tensor"],
    }
