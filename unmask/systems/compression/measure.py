"""One measure for every compressor: the metric, parameters, multiply-adds, bytes on disk and latency, side by side."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from unmask.contracts import Batch
from unmask.errors import UserError
from unmask.models import UserModel

Tell = Callable[[str], None]


def parameters(module: nn.Module) -> int:
    """Numbers in parameters, shared ones once."""
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def macs(model: UserModel, batch: Batch | None = None) -> float:
    """Multiply-adds of one sample (of ``batch``, else of a made-up one): matrix products, convolutions and attention, as torch
    counts them. Biases, norms and activations are not counted."""
    given = model.inputs(batch if batch is not None else model.example(1))
    one = {k: v[:1] for k, v in given.items()}
    counter = FlopCounterMode(display=False)
    was = model.module.training
    model.module.eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        model.scores(**one)
    model.module.train(was)
    return counter.get_total_flops() / 2


def bytes_on_disk(module: nn.Module) -> int:
    """Of all numbers as they are stored. Parameters with many exact zeros count as their other values and one index bit a
    place, where that is less."""
    if any("quantized" in type(m).__module__ for m in module.modules()):
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        return buffer.tell()
    total, seen = 0, set()
    for value in module.state_dict().values():
        if not isinstance(value, Tensor) or (value.data_ptr() in seen and value.numel()):
            continue
        seen.add(value.data_ptr())
        whole = value.numel() * value.element_size()
        sparse = int((value != 0).sum()) * value.element_size() + (value.numel() + 7) // 8
        total += min(whole, sparse) if value.ndim > 1 else whole
    return total


@torch.no_grad()
def metric(model: UserModel, batches: Iterable[Batch], tell: Callable[[int], None] | None = None) -> dict[str, Any]:
    """``accuracy`` in percent of a classifier, ``perplexity`` of a language model (padding left out), and ``samples``.
    Empty without labels. Raises ``UserError`` for labels that the model has no class for."""
    right = count = tokens = samples = 0
    loss = 0.0
    model.module.eval()
    for batch in batches:
        logits = model.logits(batch).float().cpu()
        samples += len(logits)
        if model.kind == "causal lm":
            words = batch.get("tokens", batch.get("input_ids")).cpu()
            mask = batch.get("attention_mask")
            flags = torch.ones_like(words) if mask is None else mask.cpu()
            own = flags[:, 1:].bool() & flags[:, :-1].bool()
            losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), words[:, 1:], reduction="none")
            loss, tokens = loss + float(losses[own].double().sum()), tokens + int(own.sum())
        elif batch.get("label") is not None:
            label = batch["label"].cpu()
            if int(label.max()) >= logits.shape[-1]:
                raise UserError(
                    f"the data has the class {int(label.max())}, {model.name} knows "
                    f"{logits.shape[-1]} classes: give data with its classes"
                )
            right, count = right + int((logits.argmax(-1) == label).sum()), count + len(label)
        if tell is not None:
            tell(samples)
    if tokens:
        return {"perplexity": float(torch.tensor(loss / tokens).exp()), "samples": samples, "tokens": tokens}
    return {"accuracy": 100.0 * right / count, "samples": count} if count else {}


@torch.no_grad()
def latencies(
    models: Mapping[str, UserModel], batch: Batch, *, repeats: int = 15, seconds: float = 6.0
) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward pass of ``batch``, measured in turns so that all models see the same machine: the median and the
    quartiles around it. No more than about ``seconds`` for all of them together, but five turns at least."""
    prepared = {name: (m, m.inputs(batch)) for name, m in models.items()}
    times: dict[str, list[float]] = {name: [] for name in prepared}
    for m, given in prepared.values():
        m.module.eval()
        for _ in range(2):
            m.scores(**given)
    began = time.perf_counter()
    for turn in range(repeats):
        for name, (m, given) in prepared.items():
            _wait(m.device)
            started = time.perf_counter()
            m.scores(**given)
            _wait(m.device)
            times[name].append(1000 * (time.perf_counter() - started))
        if turn >= 4 and time.perf_counter() - began > seconds:
            break
    return {name: spread(values) for name, values in times.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles and how often it was measured."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high, "times": float(len(values))}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def costs(model: UserModel, batch: Batch | None = None) -> dict[str, float]:
    """Parameters, multiply-adds and bytes of a model."""
    return {
        "parameters": float(parameters(model.module)),
        "macs": macs(model, batch),
        "bytes": float(bytes_on_disk(model.module)),
    }


def measured(
    models: Mapping[str, UserModel],
    batches: Callable[[], Iterable[Batch]],
    one: Batch,
    *,
    repeats: int = 15,
    tell: Tell | None = None,
) -> list[dict[str, Any]]:
    """The rows of a report, in order: name, metric, parameters, macs, bytes, latency. batches: the test data, anew at each call.
    one: the batch that latency is measured on."""
    times = latencies(models, one, repeats=repeats)
    rows: list[dict[str, Any]] = []
    for name, model in models.items():
        if tell is not None:
            tell(f"measuring {name} ...")
        found = metric(model, batches())
        sizes = costs(model, one) if name != "int8" else {}
        if name == "int8":  # torch's counter does not see into quantised layers; their products are as many as before
            first = rows[0] if rows else {}
            sizes = {
                "parameters": first.get("parameters", 0.0),
                "macs": first.get("macs", 0.0),
                "bytes": float(bytes_on_disk(model.module)),
            }
        rows.append({"name": name, **found, **sizes, "milliseconds": times[name]})
    return rows
