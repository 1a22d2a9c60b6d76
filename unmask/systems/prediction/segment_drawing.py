"""A segmentation drawn over its picture: colours, borders, names, a legend."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from unmask.systems.prediction.drawing import INK, PAPER, QUIET, as_picture, font, label, palette, plate, scaled, shade

if TYPE_CHECKING:
    from unmask.systems.prediction.segmentation import Segment, Segmentation

SMALLEST = 0.004  # share of the picture below which a region gets no name
LEGEND = 14  # classes in the legend; the rest is summed up


def drawn(found: Segmentation, *, size: int = 512, opacity: float = 0.5) -> Image.Image:
    """The picture about ``size`` pixels high (never smaller than it is, up to 1,440), regions in colour with dark and light
    borders, names on those that have room, and a legend right of it."""
    height, width = found.map.shape
    shown = min(max(size, height), 1440)
    ground = as_picture(np.full((height, width, 3), 235, np.uint8) if found.image is None else found.image)
    if ground.size != (width, height):
        ground = ground.resize((width, height), Image.Resampling.BICUBIC)
    ground = scaled(ground, shown, sharp=False)
    rows = (np.arange(ground.height) * height // ground.height).clip(max=height - 1)
    columns = (np.arange(ground.width) * width // ground.width).clip(max=width - 1)
    regions = found.regions()
    numbers, colours = _numbered(found, regions)
    big = numbers[np.ix_(rows, columns)]
    pixels = np.asarray(ground, dtype=np.float32)
    tint = np.concatenate([np.zeros((1, 3), np.float32), np.asarray(colours, np.float32).reshape(-1, 3)])[big]
    painted = np.where(big[..., None] > 0, pixels * (1 - opacity) + tint * opacity, pixels)
    _borders(painted, big)
    picture = Image.fromarray(painted.clip(0, 255).astype(np.uint8))
    _names(picture, found, regions, colours, big)
    return _with_legend(picture, found, regions)


def class_colours(found: Segmentation) -> np.ndarray:
    """uint8 ``[K, 3]``, the caller's or the palette's."""
    highest = max([len(found.classes), *(s.label + 1 for s in found.regions())])
    colours = palette(highest)
    if found.colours is not None:
        own = np.asarray(found.colours, dtype=np.uint8).reshape(-1, 3)[:highest]
        colours[: len(own)] = own
    return colours


def _numbered(found: Segmentation, regions: list[Segment]) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """int ``[H, W]``: 1 + the place of the region in the list, 0 = none (of overlapping ones the smaller lies on top), and
    a colour a region: its class's, in shades for several objects of one class."""
    numbers = np.zeros(found.map.shape, dtype=np.int64)
    for place in sorted(range(len(regions)), key=lambda i: -regions[i].area):
        numbers[found.mask_of(regions[place])] = place + 1
    of_class, seen, colours = class_colours(found), Counter[int](), []
    for region in regions:
        colours.append(shade(of_class[region.label], seen[region.label]))
        seen[region.label] += 1
    return numbers, colours


def _borders(pixels: np.ndarray, numbers: np.ndarray) -> None:
    """Between two regions: a white line of one pixel, and a dark one beside it (in place)."""
    edge = np.zeros(numbers.shape, dtype=bool)
    edge[:, 1:] |= numbers[:, 1:] != numbers[:, :-1]
    edge[1:] |= numbers[1:] != numbers[:-1]
    dark = np.zeros_like(edge)
    dark[:-1] |= edge[1:]
    dark[:, :-1] |= edge[:, 1:]
    pixels[dark & ~edge] *= 0.35
    pixels[edge] = 255


def _names(
    picture: Image.Image, found: Segmentation, regions: list[Segment], colours: list[Any], numbers: np.ndarray
) -> None:
    """A name where each region is widest; largest first, and none over another."""
    pen = ImageDraw.Draw(picture)
    typeface = font(max(picture.height // 34, 11))
    taken: list[tuple[float, float, float, float]] = []
    for place in sorted(range(len(regions)), key=lambda i: -regions[i].area):
        region = regions[place]
        mine = numbers == place + 1
        if mine.sum() < SMALLEST * mine.size:
            continue
        text = found.name(region.label)
        if region.score is not None and found.task != "semantic":
            text += f" {100 * region.score:.0f} %"
        centre = _widest(mine)
        box = plate(pen, centre, text, typeface)
        if any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
            continue
        taken.append(box)
        label(pen, centre, text, colours[place], typeface)


def _widest(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the pixel that is farthest from everything outside the mask."""
    from scipy import ndimage

    step = max(min(mask.shape) // 256, 1)  # a coarse look is enough to place a name
    coarse = np.pad(mask[::step, ::step], 1)
    inside = ndimage.distance_transform_edt(coarse)
    y, x = np.unravel_index(int(np.argmax(inside)), inside.shape)
    return float((x - 1) * step), float((y - 1) * step)


def _with_legend(picture: Image.Image, found: Segmentation, regions: list[Segment]) -> Image.Image:
    areas, counts = Counter[int](), Counter[int]()
    for region in regions:
        areas[region.label] += region.area
        counts[region.label] += 1
    if not areas:
        return picture
    typeface = font(max(picture.height // 34, 11))
    row = max(min(round(typeface.size * 1.7), picture.height // max(min(len(areas), LEGEND) + 1, 1)), 10)
    if row < typeface.size + 2:
        typeface = font(row - 2)
    colours = class_colours(found)
    lines = []
    for label_, area in areas.most_common(LEGEND):
        many = f" x {counts[label_]}" if found.task != "semantic" and counts[label_] > 1 else ""
        share = 100 * area / found.map.size
        lines.append(
            (colours[label_], f"{found.name(label_)}{many}", f"{share:.1f} %" if share < 10 else f"{share:.0f} %")
        )
    pen = ImageDraw.Draw(picture)
    name_width = max(pen.textlength(name, font=typeface) for _, name, _ in lines)
    share_width = max(pen.textlength(share, font=typeface) for _, _, share in lines)
    wide = round(row + name_width + share_width + 28)
    sheet = Image.new("RGB", (picture.width + wide, picture.height), PAPER)
    sheet.paste(picture, (0, 0))
    pen = ImageDraw.Draw(sheet)
    left = picture.width + 8
    for i, (colour, name, share) in enumerate(lines):
        middle = (i + 0.5) * row + 4
        half = max(row * 0.3, 3)
        pen.rectangle(
            (left, middle - half, left + 2 * half, middle + half), fill=tuple(map(int, colour)), outline=QUIET
        )
        pen.text((left + 2 * half + 6, middle), name, fill=INK, font=typeface, anchor="lm")
        pen.text((sheet.width - 6, middle), share, fill=QUIET, font=typeface, anchor="rm")
    rest = len(areas) - len(lines)
    if rest > 0 and (len(lines) + 1) * row <= sheet.height:
        pen.text((left, (len(lines) + 0.5) * row + 4), f"and {rest} more", fill=QUIET, font=typeface, anchor="lm")
    return sheet
