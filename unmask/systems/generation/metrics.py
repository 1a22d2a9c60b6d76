"""How far generated images are from real ones: Fréchet distance, Inception score, precision and recall.

Every number says by which features it was taken. Inception's (what papers report) need weights that torch-fidelity
downloads or finds; where they are absent a small convolutional classifier of ours, trained once on the same data and kept in
the cache, takes their place, and its numbers are labelled so: they compare models on these data, not with papers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.data.batches import Batches, everything
from unmask.data.settings import DataSettings
from unmask.draw import Seeded
from unmask.errors import UserError

Tell = Callable[[str], None]
INCEPTION = "Inception-v3 (torch-fidelity's weights), 2048 features"


@dataclass
class Features:
    """A way to look at images: ``look(images float [B, C, H, W] in [-1, 1])`` gives (features ``[B, D]``, logits ``[B, K]``)."""

    name: str
    look: Callable[[Tensor], tuple[Tensor, Tensor]]
    comparable: bool  # whether papers use the same

    @torch.no_grad()
    def of(self, images: Tensor, batch: int = 100) -> tuple[Tensor, Tensor]:
        """float64 features ``[n, D]`` and logits ``[n, K]`` of all images."""
        parts = [self.look(part) for part in images.split(batch)]
        return torch.cat([f for f, _ in parts]).double().cpu(), torch.cat([g for _, g in parts]).double().cpu()


# --- distances --------------------------------------------------------------------------------------------------


class _AsTheyAre(nn.Module):
    """Features that are taken already, in the place where torchmetrics puts a network."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2·(Σ₁Σ₂)^½) of two sets of features ``[n, D]``, by torchmetrics, in float64.

    Raises ``UserError`` for fewer than two of either.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(first), len(second)) < 2:
        raise UserError("a Fréchet distance needs two images of each kind or more")
    metric = FrechetInceptionDistance(feature=_AsTheyAre(first.shape[1])).set_dtype(torch.float64)
    metric.update(first.double(), real=True)
    metric.update(second.double(), real=False)
    return max(float(metric.compute()), 0.0)


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL(p(class | image) ‖ p(class)) of ``[n, K]``; between 1 and K."""
    log_p = logits.double().log_softmax(dim=1)
    mean = log_p.exp().mean(dim=0, keepdim=True).clamp(min=1e-16).log()
    return float((log_p.exp() * (log_p - mean)).sum(dim=1).mean().exp())


def precision_recall(real: Tensor, made: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Shares in [0, 1] (Kynkäänniemi et al. 2019): of made images within reach of a real one, of real ones within reach of a made.

    An image reaches as far as its ``neighbours``-th nearest of its own kind. real, made: ``[n, D]``, more than neighbours each.
    """
    if min(len(real), len(made)) <= neighbours:
        raise UserError(f"precision and recall need more than {neighbours} images of each kind")
    real, made = real.double(), made.double()

    def within(points: Tensor, centres: Tensor) -> float:
        reach = torch.cdist(centres, centres).kthvalue(neighbours + 1, dim=1).values  # the nearest is itself
        return float((torch.cdist(points, centres) <= reach).any(dim=1).double().mean())

    return within(made, real), within(real, made)


def distances(real: Tensor, made: Tensor, features: Features) -> dict[str, Any]:
    """All of the above between two sets of images, float ``[n, C, H, W]`` in [-1, 1], with the features' name beside them."""
    (real_f, _), (made_f, made_logits) = features.of(real), features.of(made)
    found: dict[str, Any] = {
        "frechet": frechet_distance(real_f, made_f),
        "inception_score": inception_score(made_logits),
        "features": features.name,
        "comparable_with_papers": features.comparable,
        "samples": len(made),
        "real_images": len(real),
    }
    if min(len(real), len(made)) > 3:
        found["precision"], found["recall"] = precision_recall(real_f, made_f)
    return found


# --- features ---------------------------------------------------------------------------------------------------


def open_features(
    data: Any, *, extractor: str = "auto", device: torch.device | str = "cpu", tell: Tell | None = None
) -> Features:
    """The features to measure by. extractor: "inception", "own", or "auto": Inception where its weights are at hand, else a
    network of ours trained on ``data`` (validated image settings; its training split). Raises ``UserError``."""
    if extractor not in ("auto", "inception", "own"):
        raise UserError(f"no feature extractor {extractor!r}: it takes auto, inception or own")
    if extractor != "own":
        found = _inception(device)
        if found is not None:
            return found
        if extractor == "inception":
            raise UserError(
                "Inception's weights are not at hand (torch-fidelity downloads them once when online): use extractor=own"
            )
    return own_features(data, device=device, tell=tell)


def _inception(device: torch.device | str) -> Features | None:
    """torch-fidelity's Inception, where the package and its weights are there already; nothing is downloaded."""
    hub = Path(torch.hub.get_dir()) / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    if not hub.is_file():
        return None
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        return None
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).to(device).eval()

    def look(images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        found = net(pixels.to(device))
        return found[0], found[1]

    return Features(INCEPTION, look, comparable=True)


class SmallClassifier(nn.Module):
    """Three strided convolutions, a mean over places, a linear head: features ``[B, 128]``, logits ``[B, K]``."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        widths = (channels, 32, 64, 128)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1)
            for i, (a, b) in enumerate(itertools.pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, w) for w in widths[1:])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float()
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.silu(norm(convolution(x)))
        pooled = x.mean(dim=(2, 3))
        return pooled, self.head(pooled)


def own_features(
    data: Any, *, steps: int = 400, batch: int = 64, device: torch.device | str = "cpu", tell: Tell | None = None
) -> Features:
    """A :class:`SmallClassifier` of the data's classes (without labels: of four rotations), trained once and kept in the cache.

    The same data, split, size and steps give the same network. data: validated image settings.
    """
    from unmask.data.opening import open_source as open_data

    settings = _plain_settings(data, split="train")
    source = open_data(settings.uri, settings.split, columns=settings.columns, limit=settings.limit)
    batches = Batches(source, settings, min(batch, source.facts.count or batch), seed=0)
    facts = batches.facts
    classes = len(facts.classes) if facts.classes and batches.labels is not None else 0
    told = {
        "uri": settings.uri, "limit": settings.limit, "size": facts.image_size, "channels": facts.channels,
        "classes": classes, "steps": steps, "count": facts.count, "version": 1,
    }  # fmt: skip
    path = _cache() / f"features-{hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()}.safetensors"
    with _seeded():
        net = SmallClassifier(facts.channels or 3, classes or 4)
    if path.is_file():
        from safetensors.torch import load_file

        net.load_state_dict(load_file(path))
    else:
        _train(net.to(device), batches, classes, steps, device, tell)
        _keep(net, path)
    net = net.to(device).eval().requires_grad_(False)
    what = f"{classes} classes" if classes else "four rotations"
    name = f"a small convolutional network of ours, trained on {what} of {settings.uri} for {steps} steps, 128 features"
    return Features(name, lambda images: net(images.to(device)), comparable=False)


@torch.enable_grad()  # a measurement runs without gradients, and this network has to learn
def _train(
    net: SmallClassifier, batches: Batches, classes: int, steps: int, device: torch.device | str, tell: Tell | None
) -> None:
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    raw = batches.iterate(0)
    for step in range(steps):
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in next(raw).items()}
        batch = batches.transform(moved, Seeded(0, step))
        images = batch["image"]
        if classes:
            labels = batch["label"]
        else:
            labels = torch.arange(len(images), device=images.device) % 4
            images = torch.cat([images[labels == k].rot90(k, (2, 3)) for k in range(4)])
            labels = labels.sort().values
        loss = F.cross_entropy(net(images)[1], labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if tell is not None:
            tell(f"features: step {step + 1} of {steps}")


def _keep(net: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        save_file({k: v.cpu().contiguous() for k, v in net.state_dict().items()}, aside)
        aside.replace(path)
    except OSError:
        pass  # without a cache it is trained again: the same network


def _cache() -> Path:
    return Path(os.environ.get("UNMASK_CACHE") or Path.home() / ".cache" / "unmask") / "features"


@contextmanager
def _seeded() -> Iterator[None]:
    """Initial weights that do not depend on what was drawn before, nor change what is drawn after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# --- data and generators ----------------------------------------------------------------------------------------


def _plain_settings(data: Any, *, split: str | None = None, size: Sequence[int] | None = None) -> DataSettings:
    """The data's settings without augmentation but flips, normalised to [-1, 1]."""
    known = {name: getattr(data, name) for name in DataSettings.model_fields if hasattr(data, name)}
    changed: dict[str, Any] = {
        "normalise": "half",
        "augment": "flip",
        "erase": 0.0,
        "rand_augment": None,
        "color_jitter": None,
    }
    if split is not None:
        changed["split"] = split
    if size is not None:
        changed["image_size"] = tuple(size)
    return DataSettings(**{**known, **changed})


def real_images(
    data: Any,
    limit: int,
    *,
    size: Sequence[int] | None = None,
    channels: int | None = None,
    device: torch.device | str = "cpu",
    batch: int = 100,
) -> Iterator[dict[str, Any]]:
    """At most ``limit`` images (a fixed random choice) of the data's split, in [-1, 1], in batches as evaluation sees them."""
    from unmask.data.opening import open_source as open_data

    settings = _plain_settings(data, size=size)
    fewer = limit if settings.limit is None else min(limit, settings.limit)
    source = open_data(settings.uri, settings.split, columns=settings.columns, limit=fewer)
    batches = Batches(source, settings, 1)
    if channels is not None and batches.facts.channels != channels:
        raise UserError(f"{settings.uri} has images of {batches.facts.channels} channels, the model makes {channels}")
    return everything(batches, batch, device=device)


def measure_generator(
    model: Any,
    data: Any,
    *,
    limit: int = 1000,
    extractor: str = "auto",
    seed: int = 0,
    chunk: int = 50,
    device: torch.device | str | None = None,
    tell: Tell | None = None,
    **asked: Any,
) -> dict[str, Any]:
    """``limit`` samples of a generator against as many test images: the numbers of :func:`distances`, and under "baseline" the
    same for other real images (the training split's), which is about as near as anything comes.

    data: validated image settings whose split is the test split. asked: steps, guidance and the like, for ``generate``.
    """
    from unmask.systems.generation.generator import chunked
    from unmask.systems.generation.pictures import from_uint8

    where = device or model.device
    model.to(where).eval()
    size, channels = model.config.image_size, model.config.channels
    real = torch.cat([b["image"].cpu() for b in real_images(data, limit, size=size, channels=channels)])
    count = min(limit, len(real))
    names = model.class_names
    condition = [i % len(names) for i in range(count)] if names else None
    made = []
    for first, samples in chunked(
        model, count, lambda i: Seeded(seed, 0, i), chunk=chunk, condition=condition, **asked
    ):
        made += [s.value for s in samples]
        if tell is not None:
            tell(f"generate: {first + len(samples)} of {count} images")
    features = open_features(data, extractor=extractor, device=where, tell=tell)
    fake = from_uint8(made)[:, :channels]
    found = distances(real, fake, features)
    others = _plain_settings(data, split="train")
    train = torch.cat([b["image"].cpu() for b in real_images(others, count, size=size, channels=channels)])
    found["baseline"] = {
        "other real images": {"frechet": frechet_distance(features.of(real)[0], features.of(train)[0])}
    }
    return found
