"""The written rules of ``--recipe auto``: sensible on data that nobody has trained on yet."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask.api.auto import PATCHES, Machine, choose
from unmask.contracts import DataFacts

LAPTOP = Machine("cpu", cores=2)
GPU = Machine("cuda", cores=16, memory_gb=80, bf16=True)
BASE = {"data": {"augment": "shift_flip"}, "model": {}, "train": {"batch_size": 128, "lr": 1e-3}}
NOTHING = {"data": {}, "model": {}, "train": {}}


def facts(count=300, size=(150, 200), channels=1, depth=16, smallest=None, largest=None):
    return DataFacts("folder", count, channels, sizes=(smallest or size, size, largest or size), bit_depth=depth)


def tokens(choice, patch=None):
    name = choice.model["backbone"]["name"]
    patch = patch or int(name.rsplit("patch", 1)[1])
    return math.prod(side // patch for side in choice.data["image_size"])


def test_300_grey_16_bit_images_get_a_small_model_their_own_shape_and_many_epochs():
    choice = choose(facts(), LAPTOP, BASE, NOTHING)
    height, width = choice.data["image_size"]
    assert choice.model["backbone"]["name"] == "vit_micro_patch8"
    assert (height, width) == (88, 112)
    assert height % 8 == width % 8 == 0
    assert choice.train["batch_size"] == 32
    assert choice.train["epochs"] == 400
    assert len(choice.lines) == 3
    assert "300 grey images 150 x 200 (height x width), 16 bit" in choice.lines[0]


def test_a_million_photographs_on_a_gpu_get_the_paper_s_setting():
    choice = choose(facts(1_281_167, (375, 500), 3, 8, smallest=(200, 300), largest=(900, 700)), GPU, BASE, NOTHING)
    assert choice.data["image_size"] == [224, 224]
    assert choice.model["backbone"]["name"] == "vit_base_patch16"
    assert choice.train["batch_size"] == 1024
    assert choice.train["epochs"] == 50


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(1, 3_000_000),
    height=st.integers(8, 4000),
    width=st.integers(8, 4000),
    machine=st.sampled_from([LAPTOP, GPU, Machine("cpu", cores=32)]),
)
def test_every_choice_divides_and_keeps_tokens_in_range(count, height, width, machine):
    choice = choose(facts(count, (height, width)), machine, BASE, NOTHING)
    patch = int(choice.model["backbone"]["name"].rsplit("patch", 1)[1])
    assert patch in PATCHES
    assert all(side % patch == 0 and side >= patch for side in choice.data["image_size"])
    assert tokens(choice) <= 256
    if min(height, width) >= 14:
        assert tokens(choice) >= 49
    assert 1 <= choice.train["batch_size"] <= count
    assert choice.train["lr"] > 0


def test_images_of_many_shapes_become_squares():
    choice = choose(facts(1000, (300, 400), smallest=(300, 300), largest=(400, 900)), LAPTOP, BASE, NOTHING)
    assert len(set(choice.data["image_size"])) == 1


def test_the_user_s_image_size_stands_and_the_patch_divides_it():
    choice = choose(facts(), LAPTOP, BASE, {**NOTHING, "data": {"image_size": 96}})
    assert "image_size" not in choice.data
    assert choice.model["backbone"]["name"] == "vit_micro_patch8"
    odd = choose(facts(), LAPTOP, BASE, {**NOTHING, "data": {"image_size": 225}})
    assert 225 % int(odd.model["backbone"]["name"].rsplit("patch", 1)[1]) == 0


@pytest.mark.parametrize(
    ("backbone", "multiple"),
    [
        ("swin_tiny", 32),
        ("timm/resnet18", 32),
        ("timm/swin_tiny_patch4_window7_224", 32),
        ("timm/vit_small_patch16_224", 16),
        ("timm/vit_base_patch16_clip_224.openai", 16),
        ("vit_tiny_patch4", 4),
    ],
)
def test_an_asked_for_backbone_stands_and_the_image_fits_it(backbone, multiple):
    choice = choose(facts(), LAPTOP, BASE, {**NOTHING, "model": {"backbone": backbone}})
    assert choice.model["backbone"]["name"] == backbone
    assert all(side % multiple == 0 for side in choice.data["image_size"])


@pytest.mark.parametrize("backbone", ["swin_tiny", "timm/convnext_tiny"])
def test_networks_that_halve_their_maps_get_squares(backbone):
    choice = choose(facts(), LAPTOP, BASE, {**NOTHING, "model": {"backbone": backbone}})
    assert choice.data["image_size"] == [128, 128]


def test_the_user_s_batch_moves_the_learning_rate_with_its_square_root():
    small = choose(facts(10_000), LAPTOP, BASE, {**NOTHING, "train": {"batch_size": 32}})
    large = choose(facts(10_000), LAPTOP, BASE, {**NOTHING, "train": {"batch_size": 128}})
    assert large.train["lr"] == pytest.approx(1e-3)
    assert small.train["lr"] == pytest.approx(5e-4)


def test_steps_that_the_user_gives_leave_no_epochs():
    choice = choose(facts(), LAPTOP, BASE, {**NOTHING, "train": {"steps": 7}})
    assert "epochs" not in choice.train


def test_a_stream_of_unknown_length_gets_a_choice():
    assert choose(DataFacts("shards", None, 3, (224, 224)), LAPTOP, BASE, NOTHING).train["batch_size"] == 64
