"""``--recipe auto``: what to train on data that nobody has trained on yet, by written rules.

The rules (M = the median image, h x w; "accelerator" is a GPU or the like):

1. Image. The longest side is M's, at most 224 on an accelerator, 160 on a CPU with 8 cores or more, 112 on a smaller
   one; never enlarged. The shape is M's where the images are alike (smallest, median and largest differ by less than
   10 % in aspect) and not longer than 2 : 1, else a square of the shorter side. Sides are rounded to whole patches.
2. Patch. Of 2, 4, 8, 16, 32 the one whose token count is nearest to 196 (accelerator) or 100 (CPU), on a logarithmic
   scale, among those that give 49 ... 256 tokens: large enough that tokens are few, small enough that neighbours help.
   A backbone that was asked for by name brings its own patch; then only the image is fitted to it.
3. Model. A ViT. Accelerator: base from 100,000 images and 16 GB of memory on, small from 5,000 images on, else tiny.
   CPU: small from 20,000 images and 16 cores on, tiny from 8 cores on, else micro (6 blocks, 192 wide). A few images
   do not fill a large model.
4. Batch. At least 16; at most 64 on a CPU, 64 for every 4 GB of accelerator memory up to 1,024; a power of two that
   gives at least 8 steps an epoch, and never more than there are images.
5. Epochs. Masked pre-training wants to see each image often: 200,000 images seen on a CPU, 4,000,000 on an
   accelerator, divided by the count, between 10 and 400 (CPU) or 50 and 800 (accelerator); a twentieth is warm-up.
6. Learning rate. The recipe's own (tiny on a CPU, small on an accelerator) times the square root of the ratio of the
   batches: what keeps the noise of AdamW's updates equal.
7. Crops. Random crops of 20 ... 100 % of the area; 50 ... 100 % where a side is below 64 pixels (there is little to
   crop). Half of the images are flipped. Pixels are standardised with the data's own mean and deviation.

What the user says stands, and a rule that reads a value (the batch, say) reads the user's. A classifier that starts from
a trained encoder (``init=RUN``) takes its backbone and image size from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PATCHES = (2, 4, 8, 16, 32)
FEWEST, MOST = 49, 256


@dataclass(frozen=True)
class Machine:
    """What the rules need to know of a machine. memory_gb: the accelerator's, 0 on a CPU."""

    device: str = "cpu"
    cores: int = 2
    memory_gb: float = 0.0
    bf16: bool = False

    @property
    def accelerated(self) -> bool:
        return self.device != "cpu"

    @property
    def words(self) -> str:
        kind = f"{self.device}, {self.memory_gb:.0f} GB" if self.accelerated else f"{self.cores} CPU cores"
        return f"{kind}, {'bf16' if self.bf16 else 'fp32'}"


@dataclass
class Choice:
    """Options to lay over the base recipe, and the three lines that say why."""

    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def base_recipe(machine: Machine) -> str:
    """The recipe that the rules start from."""
    return "small" if machine.accelerated else "tiny"


def choose(
    facts: Any, machine: Machine, base: Mapping[str, Mapping[str, Any]], given: Mapping[str, Mapping[str, Any]]
) -> Choice:
    """The options by the rules above.

    facts: :class:`unmask.contracts.DataFacts` of the raw data. base, given: mappings with "data", "model", "train"; the
    recipe's options and the user's.
    """
    count = facts.count or 50_000  # a stream does not tell
    median, alike = _median(facts)
    asked = _backbone_name(given["model"].get("backbone"))
    multiple = _patch_of(given["model"].get("backbone"))
    choice = Choice()

    size = given["data"].get("image_size")
    if size is None:
        rough = _rough_size(median, alike and not _hierarchical(asked), machine)
        patch = multiple or _patch(rough, machine)
        size = tuple(max(round(side / patch), 1) * patch for side in rough)
        choice.data["image_size"] = list(size)
    else:
        size = (size, size) if isinstance(size, int) else tuple(size)
        patch = multiple or _patch(size, machine, exact=True)
    model = asked or f"vit_{_model(count, machine)}_patch{patch}"
    choice.model["backbone"] = {"name": model}

    batch = given["train"].get("batch_size") or _batch(count, machine)
    choice.train["batch_size"] = batch
    epochs = given["train"].get("epochs")
    if epochs is None and given["train"].get("steps") is None:
        epochs = _epochs(count, machine)
        choice.train["epochs"] = epochs
    choice.train["steps"] = None
    if epochs is not None:
        choice.train["warmup_epochs"] = round(epochs / 20, 2)
    elif given["train"].get("steps"):
        choice.train["warmup_steps"] = given["train"]["steps"] // 20
    lr, base_lr = given["train"].get("lr"), given["train"].get("base_lr")
    if lr is None and base_lr is not None:  # the user's rule for the rate stands
        lr = base_lr * batch / int({**base["train"], **given["train"]}.get("base_batch") or 256)
    else:
        lr = choice.train["lr"] = lr or _rate(base["train"], batch)

    small = min(size) < 64
    choice.data |= {"augment": "crop_flip", "crop_scale": [0.5 if small else 0.2, 1.0], "normalise": "dataset"}
    if base["data"].get("augment") == "rand_augment":  # a classifier's recipe knows better
        del choice.data["augment"]
    choice.lines = _lines(facts, machine, count, median, alike, size, patch, model, asked, batch, epochs, lr, given)
    return choice


# --- the rules, one function each ---


def _median(facts: Any) -> tuple[tuple[int, int], bool]:
    """(h, w) of the median image, and whether all have nearly its aspect."""
    if facts.sizes:
        sizes = [tuple(size) for size in facts.sizes]
        aspects = [h / w for h, w in sizes]
        return sizes[1], max(aspects) / min(aspects) < 1.1
    size = tuple(facts.image_size or (224, 224))
    return (size[-2], size[-1]), True


def _rough_size(median: tuple[int, int], alike: bool, machine: Machine) -> tuple[float, float]:
    limit = 224 if machine.accelerated else 160 if machine.cores >= 8 else 112
    height, width = median
    if not alike or max(median) / min(median) > 2:
        height = width = min(median)
    factor = min(1.0, limit / max(height, width))
    return height * factor, width * factor


def _patch(size: tuple[float, ...], machine: Machine, exact: bool = False) -> int:
    """exact: the size stands, so the patch must divide it."""
    wanted = 196 if machine.accelerated else 100
    fits: list[tuple[float, int]] = []
    for patch in PATCHES:
        if exact and any(side % patch for side in size):
            continue
        tokens = math.prod(max(round(side / patch), 1) for side in size)
        outside = 0 if FEWEST <= tokens <= MOST else 10
        fits.append((outside + abs(math.log(tokens / wanted)), patch))
    return min(fits)[1] if fits else _divisor(size, wanted)


def _divisor(size: tuple[float, ...], wanted: int) -> int:
    """An odd size (225, say): of all patches that divide it, the one nearest to the wanted token count."""
    sides = [int(side) for side in size]
    whole = math.gcd(*sides)
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    return min(divisors, key=lambda d: abs(math.log(math.prod(side // d for side in sides) / wanted)))


def _model(count: int, machine: Machine) -> str:
    if machine.accelerated:
        return "base" if count >= 100_000 and machine.memory_gb >= 16 else "small" if count >= 5_000 else "tiny"
    return "small" if count >= 20_000 and machine.cores >= 16 else "tiny" if machine.cores >= 8 else "micro"


def _batch(count: int, machine: Machine) -> int:
    most = min(1024, max(64, 64 * int(machine.memory_gb // 4))) if machine.accelerated else 64
    wanted = max(16, min(most, count // 8))
    return min(2 ** int(math.log2(wanted)), max(count // 2 * 2, 1))  # even: mixing pairs samples


def _epochs(count: int, machine: Machine) -> int:
    seen, least, most = (4_000_000, 50, 800) if machine.accelerated else (200_000, 10, 400)
    return max(least, min(most, round(seen / count)))


def _rate(train: Mapping[str, Any], batch: int) -> float:
    own = int(train.get("batch_size") or 64)
    lr = train.get("lr")
    if lr is None:
        lr = float(train.get("base_lr") or 1.5e-4) * own / int(train.get("base_batch") or 256)
    return float(f"{lr * math.sqrt(batch / own):.2g}")


# --- reading what the user asked for ---


def _backbone_name(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("name")
    return str(value) if value else None


def _hierarchical(name: str | None) -> bool:
    """Whether a backbone halves its maps stage by stage; its windows and published weights are made for squares."""
    return name is not None and re.search(r"(^|/)(vit|deit|beit|eva)\w*_patch_?\d+", name) is None


def _patch_of(value: Any) -> int | None:
    """What the sides of an image must be multiples of, for a backbone that was asked for; None where rules choose it."""
    name = _backbone_name(value)
    if name is None:
        return None
    if isinstance(value, Mapping) and isinstance(value.get("patch_size"), int):
        return value["patch_size"]
    found = re.search(r"patch_?(\d+)", name)
    return int(found[1]) if found and not _hierarchical(name) else 32  # five halvings: Swin and the convnets


# --- the three lines ---


def _lines(
    facts: Any,
    machine: Machine,
    count: int,
    median: tuple[int, int],
    alike: bool,
    size: tuple[int, ...],
    patch: int,
    model: str,
    asked: str | None,
    batch: int,
    epochs: float | None,
    lr: float,
    given: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    height, width = median
    kind = {1: "grey", 3: "colour"}.get(facts.channels or 3, f"{facts.channels}-channel")
    number = f"{facts.count:,}" if facts.count is not None else "a stream of"
    sizes = f"{height} x {width}" if alike else f"of many shapes (median {height} x {width})"
    length = f"{epochs:g} epochs" if epochs is not None else "the steps you gave"
    shown = f"{size[0]} x {size[1]} pixels"
    if not _hierarchical(asked) and not any(side % patch for side in size):
        shown += f" ({math.prod(side // patch for side in size)} patches of {patch})"
    shrunk = size[0] * size[1] < 0.9 * height * width
    if given["model"].get("init"):
        why = "the encoder it starts from brings its backbone and its image size"
    elif given["data"].get("image_size") is not None:
        why = "the image size is yours" + (
            ", and so is the backbone" if asked else f", and patches of {patch} divide it"
        )
    elif asked:
        why = f"you asked for {asked}, whose images are multiples of {patch}"
    else:
        why = f"{'smaller images keep' if shrunk else 'the images keep their size, which keeps'} a step affordable on this device"
    if epochs is None or given["train"].get("epochs") is not None:
        length_why = "your length stands"
    else:
        length_why = f"{count / batch:.0f} steps an epoch leave every image seen {epochs:g} times"
    own_rate = given["train"].get("lr") is not None or given["train"].get("base_lr") is not None
    rate_why = "your rate stands" if own_rate else "the rate is the recipe's, scaled with the square root of the batch"
    return [
        f"auto: {number} {kind} {'image' if facts.count == 1 else 'images'} {sizes} (height x width), "
        f"{facts.bit_depth or 8} bit; {machine.words}",
        f"auto: {model} on {shown}, batch {batch}, {length}, learning rate {lr:g}",
        f"auto: because {why}; {length_why}; {rate_why}",
    ]
