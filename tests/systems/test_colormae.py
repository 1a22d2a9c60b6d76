"""ColorMAE: MAE under coloured masks, its schedule, the authors' names, and their masks exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from unmask.contracts import Progress, configured
from unmask.draw import Replay, Seeded
from unmask.errors import UserError
from unmask.masks.color import COLORS
from unmask.systems.pretraining.colormae.model import ColorMAE
from unmask.systems.pretraining.colormae.official import load_official, run_case
from unmask.systems.pretraining.mae.model import MAE

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "colormae"
SMALL = {
    "backbone": {"name": "vit_nano_patch4", "image_size": (32, 40), "depth": 1, "embed_dim": 32},
    "decoder": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "bank_size": 6,
    "noise_size": 16,
}
IMAGES = torch.randn(5, 3, 32, 40, generator=torch.Generator().manual_seed(0))


def made(**options) -> ColorMAE:
    torch.manual_seed(0)
    return ColorMAE(configured(ColorMAE, SMALL | options))


@pytest.mark.parametrize("color", COLORS)
def test_each_colour_trains_and_hides_the_same_number(color):
    model = made(color=color)
    mask = model.mask(IMAGES, Seeded(0))
    assert mask.hidden.sum(dim=1).tolist() == [60] * 5
    losses = model.loss({"image": IMAGES}, Seeded(0))
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    assert set(model.references({"image": IMAGES}, Seeded(0)))


def test_white_masks_are_maes():
    model, mae = made(color="white"), MAE(configured(MAE, {k: SMALL[k] for k in ("backbone", "decoder")}))
    assert torch.equal(model.mask(IMAGES, Seeded(4)).hidden, mae.mask(IMAGES, Seeded(4)).hidden)


def test_the_colour_follows_the_schedule():
    model = made(color="green", schedule=[[2, "blue"], [5.5, "red"]])
    at = [model.color_at(Progress(epoch=e)) for e in (0, 1.9, 2, 5, 5.5, 9)]
    assert at == ["green", "green", "blue", "blue", "red", "red"]
    assert model.color_at(None) == "green"
    blue = made(color="blue").mask(IMAGES, Seeded(0)).hidden
    assert torch.equal(model.mask(IMAGES, Seeded(0), Progress(epoch=3)).hidden, blue)


def test_the_bank_is_made_once_and_again_the_same():
    model = made()
    first = model.bank("green", torch.device("cpu"))
    assert model.bank("green", torch.device("cpu")) is first
    assert torch.equal(made().bank("green", torch.device("cpu")), first)
    assert not torch.equal(made(bank_seed=1).bank("green", torch.device("cpu")), first)
    assert not any("bank" in name for name in model.state_dict())


def test_samples_split_over_processes_hide_what_they_would_together():
    for shared in (False, True):
        model = made(shared_crop=shared)
        together = model.mask(IMAGES, Seeded(0)).hidden
        parts = [model.mask(IMAGES[:2], Seeded(0)), model.mask(IMAGES[2:], Seeded(0, first_sample=2))]
        assert torch.equal(together, torch.cat([m.hidden for m in parts]))


def test_the_preview_shows_reconstructions_and_a_mask_of_each_colour():
    pictures = made().preview({"image": IMAGES}, Seeded(0))
    assert [p.name for p in pictures] == ["reconstruction", "masks"]
    assert pictures[1].columns == list(COLORS)
    assert all(cell.dtype == np.uint8 and cell.shape == (64, 80, 3) for row in pictures[1].rows for cell in row)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"color": "grean"}, "'white', 'red', 'blue', 'green' or 'purple'"),
        ({"schedule": [[5, "blue"], [3, "red"]]}, "out of order"),
        ({"schedule": [[0, "blue"]]}, "positive and rising"),
        ({"sigmas": [[1, 2]]}, "takes 2 ranges"),
        ({"noise_size": 8}, "larger than noise_size=8: use noise_size=10"),
        ({"masking": "random"}, "masking"),
        ({"colour": "green"}, "did you mean color"),
        ({"backbone": {"name": "swin_nano", "image_size": 32, "window_size": 4}}, "use simmim"),
    ],
)
def test_what_does_not_fit_is_one_line(options, words):
    with pytest.raises(UserError, match=words) as error:
        made(**options)
    assert "\n" not in str(error.value)


def mmpretrain(model: ColorMAE) -> dict[str, torch.Tensor]:
    """The state under mmpretrain's names, as the authors' files have them."""
    out = {}
    for name, value in model.state_dict().items():
        part, _, rest = name.partition(".")
        for old, new in [
            ("norm1", "ln1"),
            ("norm2", "ln2"),
            ("mlp.fc1", "ffn.layers.0.0"),
            ("mlp.fc2", "ffn.layers.1"),
            ("patch_embed.proj", "patch_embed.projection"),
        ]:
            rest = rest.replace(old, new)
        if part == "encoder":
            rest = rest.replace("blocks.", "layers.") if rest.startswith("blocks") else rest
            out["backbone." + ("ln1." + rest[5:] if rest.startswith("norm.") else rest)] = value
        else:
            rest = {
                "embed": "decoder_embed",
                "blocks": "decoder_blocks",
                "norm": "decoder_norm",
                "predict": "decoder_pred",
            }.get(rest.split(".")[0], rest.split(".")[0]) + rest[len(rest.split(".")[0]) :]
            out["neck." + rest] = value.view(1, 1, -1) if rest == "mask_token" else value
    return out


def test_the_authors_checkpoint_loads_by_rules():
    source = made(backbone={"name": "vit_nano_patch4", "image_size": 16, "depth": 2, "embed_dim": 64})
    state = mmpretrain(source)
    assert {"backbone.layers.1.ffn.layers.0.0.weight", "backbone.ln1.weight", "neck.decoder_blocks.0.ln2.bias"} <= set(
        state
    )
    options = {
        "image_size": 16,
        "num_heads": 4,
        "decoder_num_heads": 2,
        "color": "blue",
        "bank_size": 6,
        "noise_size": 16,
    }
    model = load_official(state, options)
    assert isinstance(model, ColorMAE)
    assert model.config.color == "blue"
    images = torch.randn(2, 3, 16, 16)
    draw = Seeded(0)
    expected = source.encode(images, source.mask_of("blue", images, draw))
    assert torch.equal(model.encode(images, model.mask(images, draw)), expected)


def test_a_file_of_another_system_is_one_line():
    with pytest.raises(UserError, match="not the weights of"):
        load_official({"backbone.conv1.weight": torch.ones(1)})


def official_masks(bank, top, left, across, down, grid, ratio, batch):
    """The authors' loop as their code does it: a round at a time, on a copy of the whole bank."""
    visible = int(grid[0] * grid[1] * (1 - ratio))
    hidden = []
    for r in range(len(top)):
        pieces = bank.clone()[:, top[r] : top[r] + grid[0], left[r] : left[r] + grid[1]]
        pieces = pieces.flip(2) if across[r] else pieces
        pieces = pieces.flip(1) if down[r] else pieces
        for i in range(min(len(bank), batch - r * len(bank))):
            flat = (pieces[i] / pieces[i].max()).flatten()
            mask = torch.ones(flat.numel())
            mask[flat.argsort(descending=True, stable=True)[:visible]] = 0
            hidden.append(mask)
    return torch.stack(hidden)


@pytest.mark.parametrize("batch", [1, 4, 5, 12, 23])
@pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.9])
def test_masks_of_many_rounds_sizes_and_ratios_equal_the_authors_loop(batch, ratio):
    generator = torch.Generator().manual_seed(batch)
    bank = torch.randn(5, 13, 13, generator=generator)
    rounds = -(-batch // 5)
    top, left = (torch.randint(0, 13 - 6, (rounds,), generator=generator) for _ in range(2))
    across, down = (torch.randint(0, 2, (rounds,), generator=generator).bool() for _ in range(2))
    names = {"top": top, "left": left, "flip_horizontal": across, "flip_vertical": down}
    config = {"bank_size": 5, "noise_size": 13, "grid_size": 7, "mask_ratio": ratio, "batch_size": batch}
    found, _, _ = run_case(config, {"in.bank": bank, **{f"draw.{k}": v for k, v in names.items()}})
    assert torch.equal(found["mask"], official_masks(bank, top, left, across, down, (7, 7), ratio, batch))
    assert torch.equal(found["visible_ids"], (found["mask"] == 0).nonzero()[:, 1].view(batch, -1))


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no ../shared/golden here")
def test_the_authors_masks_come_out_exactly():
    for path in sorted(GOLDEN.glob("*.json")):
        tensors = load_file(path.with_suffix(".safetensors"))
        found, _, _ = run_case(json.loads(path.read_text())["config"], tensors)
        for name, value in found.items():
            assert torch.equal(value.to(tensors[f"out.{name}"].dtype), tensors[f"out.{name}"]), (path.stem, name)


def test_a_replayed_step_hides_the_same():
    from unmask.draw import Recorder

    model, recorder = made(), Recorder(Seeded(9))
    first = model.mask(IMAGES, recorder).hidden
    assert torch.equal(model.mask(IMAGES, Replay(recorder.recorded)).hidden, first)


def test_references_and_previews_follow_the_schedule_of_colours():
    system = made(schedule=((2, "red"),))
    images = torch.randn(4, system.encoder.in_channels, *system.encoder.image_size)
    late = Progress(step=5, steps=10, epoch=3.0, epochs=4.0)
    assert system.color_at(late) == "red"
    early, later = (system.references({"image": images}, Seeded(0), p) for p in (Progress(), late))
    assert early["bilinear fill"] != later["bilinear fill"]
    assert "uses red" in system.preview({"image": images}, Seeded(0), late)[-1].caption
