"""``evaluate``: what its result holds, what it compares with, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from unmask.backbones import build
from unmask.contracts import Encoder, Preprocessing, Progress
from unmask.errors import UserError
from unmask.evaluation.features import features
from unmask.evaluation.fresh import fresh
from unmask.evaluation.measure import evaluate
from unmask.evaluation.monitors import KnnMonitor, RankMeMonitor, monitors_for
from unmask.evaluation.pictures import confusion_picture, feature_picture, principal_colours, save_picture
from unmask.evaluation.training import HeadSettings


def small(**options) -> Encoder:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "in_channels": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return build("vit_nano_patch4", **{**sizes, **options}).eval()


def stripes(count: int = 240, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy grey images whose class is the width of a bright stripe."""
    labels = torch.arange(count) % classes
    images = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 0.8
    for i, label in enumerate(labels.tolist()):
        images[i, :, :, : 4 * label + 2] += 1.5
    return images, labels


class Blind(Encoder):
    """An encoder of another package: no name, one parameter, the same features for every image but noise of its own."""

    embed_dim, in_channels, image_size, patch_size, strides, map_dims = 8, 1, (16, 16), (4, 4), (4,), (8,)

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Conv2d(1, 8, 4, 4)
        self.options = {}

    def tokens(self, x, **_):
        return self.proj(x).flatten(2).transpose(1, 2)

    def maps(self, x, **_):
        return [self.proj(x)]


@pytest.mark.parametrize("probe", ["ridge", "knn", "linear", "attentive"])
def test_a_result_holds_everything_that_a_report_needs(probe, tmp_path):
    options = {"settings": HeadSettings(epochs=3, base_lr=(1.0,))} if probe in ("linear", "attentive") else {}
    result = evaluate(small(), stripes(), probe, baseline=2, out=tmp_path, **options)
    saved = json.loads((tmp_path / f"{probe}.json").read_text())
    assert saved["probe"] == probe
    assert saved["data"] == "tensors"
    assert 0 <= saved["top1"] <= saved["top5"] <= 1
    assert len(saved["confusion"]) == len(saved["classes"]) == 4
    assert sum(map(sum, saved["confusion"])) == saved["test_samples"] == 48
    assert saved["train_samples"] == 192
    assert "80 %" in saved["split"]
    random = saved["baseline"]["random initialisation"]
    assert len(random["values"]) == len(random["seeds"]) == 2
    assert saved["margin"] == pytest.approx(saved["top1"] - random["top1"])
    assert saved["baseline"]["always the commonest class"]["top1"] == pytest.approx(0.25)
    assert saved["seconds"] > 0
    for picture in saved["pictures"]:
        assert np.asarray(Image.open(tmp_path / picture["file"])).std() > 1
    assert result["top1"] == saved["top1"]


def test_a_probe_of_features_that_tell_the_class_beats_chance_by_far():
    assert evaluate(small(), stripes(), "ridge", baseline=0)["top1"] > 0.6


def test_the_baseline_is_the_same_network_with_other_weights_and_its_noise_is_stated():
    result = evaluate(small(), stripes(), "ridge", baseline=3)
    random = result["baseline"]["random initialisation"]
    assert random["top1"] == pytest.approx(np.mean(random["values"]))
    assert random["top1_std"] == pytest.approx(np.std(random["values"], ddof=1))
    again = evaluate(small(), stripes(), "ridge", baseline=3)
    assert again["baseline"]["random initialisation"]["values"] == random["values"]


def test_rankme_needs_no_labels_and_says_how_many_samples_it_saw(tmp_path):
    result = evaluate(small(), stripes()[0], "rankme", baseline=2, out=tmp_path)
    assert 1 <= result["rankme"] <= 32
    assert result["samples"] == 240
    assert "rankme_std" in result["baseline"]["random initialisation"]
    assert (tmp_path / "rankme.json").is_file()


def test_few_labels_leave_a_stratified_share_of_the_training_images():
    result = evaluate(small(), stripes(400), "ridge", labels=0.1, baseline=0)
    assert result["train_samples"] == 32
    assert result["test_samples"] == 80


def test_the_linear_probe_can_learn_from_augmented_views():
    settings = HeadSettings(epochs=4, base_lr=(1.0,))
    clean = evaluate(small(), stripes(120), "linear", baseline=0, settings=settings)
    augmented = evaluate(small(), stripes(120), "linear", baseline=0, settings=settings, views=2)
    again = evaluate(small(), stripes(120), "linear", baseline=0, settings=settings, views=2)
    assert augmented["confusion"] == again["confusion"]
    assert augmented["confusion"] != clean["confusion"]


def test_fine_tuning_leaves_the_encoder_alone_and_beats_chance(tmp_path):
    encoder = small()
    before = {n: v.clone() for n, v in encoder.state_dict().items()}
    options = {
        "steps": 40,
        "lr": 2e-3,
        "batch_size": 32,
        "model": {"mixup": 0, "cutmix": 0},
        "data_options": {"augment": "none"},
    }
    result = evaluate(encoder, stripes(120), "finetune", baseline=0, out=tmp_path, compile="off", **options)
    assert result["top1"] > 0.5
    assert result["settings"]["train"]["layer_decay"] == 0.65
    assert result["settings"]["train"]["steps"] == 40
    assert all(torch.equal(v, before[n]) for n, v in encoder.state_dict().items())
    assert (tmp_path / "finetune-confusion.png").is_file()


def test_fine_tuning_takes_an_encoder_of_another_package():
    options = {"steps": 3, "batch_size": 16, "layer_decay": 1.0}
    assert 0 <= evaluate(Blind(), stripes(40), "finetune", baseline=1, **options)["top1"] <= 1


def test_options_of_a_trained_probe_are_words_and_a_wrong_one_names_the_nearest():
    result = evaluate(small(), stripes(60), "linear", baseline=0, epochs=2, base_lr=1.0)
    assert result["settings"] == {"base_lr": 1.0}
    with pytest.raises(UserError, match="did you mean epochs"):
        evaluate(small(), stripes(60), "linear", epoch=2)
    with pytest.raises(UserError, match="probe linear"):
        evaluate(small(), stripes(60), "linear", epochs=-2)
    with pytest.raises(UserError, match='no option "k" in probe ridge'):
        evaluate(small(), stripes(60), "ridge", k=2)


def test_an_option_that_fine_tuning_does_not_have_names_the_nearest():
    with pytest.raises(UserError, match="did you mean steps"):
        evaluate(small(), stripes(40), "finetune", stepss=3)


def test_separate_parts_are_taken_as_given():
    x, y = stripes(80)
    result = evaluate(small(), {"train": (x, y), "test": (x[:20], y[:20])}, "knn", baseline=0)
    assert (result["train_samples"], result["test_samples"]) == (80, 20)
    assert result["split"] == "train and test as given"


def test_an_encoder_of_another_package_is_measured_and_reset_for_the_baseline():
    encoder = Blind()
    before = encoder.proj.weight.clone()
    result = evaluate(encoder, stripes(80), "knn", baseline=2)
    assert torch.equal(before, encoder.proj.weight)
    assert not torch.equal(fresh(encoder, 0).proj.weight, fresh(encoder, 1).proj.weight)
    assert len(set(result["baseline"]["random initialisation"]["values"])) >= 1


def test_fresh_leaves_the_callers_random_state():
    state = torch.random.get_rng_state()
    first, again = fresh(small(), 3), fresh(small(), 3)
    torch.manual_seed(0)
    fresh(small(), 4)
    assert torch.equal(first.blocks[0].mlp.fc1.weight, again.blocks[0].mlp.fc1.weight)
    del state


def test_bytes_are_prepared_as_the_encoder_was_trained():
    encoder = small()
    encoder.preprocessing = Preprocessing(mean=(0.25,), std=(0.5,), image_size=(16, 16), channels=1)
    raw = torch.randint(0, 256, (6, 1, 16, 16), dtype=torch.uint8)
    from_bytes, _ = features(encoder, raw, precision="fp32")
    from_floats, _ = features(encoder, (raw / 255 - 0.25) / 0.5, precision="fp32")
    torch.testing.assert_close(from_bytes, from_floats, atol=1e-5, rtol=1e-5)


def test_every_pool_gives_its_width_and_the_encoder_keeps_its_mode():
    encoder = small().train()
    x, _ = stripes(6)
    for pool, shape in {
        "auto": (6, 32),
        "mean": (6, 32),
        "cls": (6, 32),
        "maps": (6, 32),
        "tokens": (6, 17, 32),
    }.items():
        assert features(encoder, x, pool)[0].shape == shape
    assert encoder.training
    assert encoder.blocks[0].training
    with pytest.raises(UserError, match="no class token"):
        features(small(class_token=False), x, "cls")


# --- bad input ------------------------------------------------------------------------------------------------------


def test_data_without_labels_names_rankme():
    with pytest.raises(UserError, match="rankme"):
        evaluate(small(), stripes()[0], "ridge")


def test_an_unknown_probe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean linear"):
        evaluate(small(), stripes(), "liner")


def test_classes_that_differ_between_the_parts_are_named():
    from unmask.evaluation.samples import from_tensors

    x, y = stripes(40)
    first = from_tensors(x, y, classes=("a", "b", "c", "d"))
    second = from_tensors(x, y, classes=("a", "b", "c", "e"))
    with pytest.raises(UserError, match=r"classes of train and test differ.*d, e"):
        evaluate(small(), {"train": first, "test": second}, "ridge")


def test_a_single_class_is_refused():
    with pytest.raises(UserError, match="two or more"):
        evaluate(small(), (stripes(20)[0], torch.zeros(20, dtype=torch.int64)), "ridge")


# --- pictures -------------------------------------------------------------------------------------------------------


def test_pictures_are_drawn(tmp_path):
    path = confusion_picture([[5, 1], [0, 6]], ["cat", "dog"], tmp_path / "confusion.png", title="ridge")
    assert np.asarray(Image.open(path)).std() > 10
    picture = feature_picture(small(), stripes(4)[0])
    assert len(picture.rows) == 4
    assert all(cell.std() > 1 for row in picture.rows for cell in row)
    assert save_picture(picture, tmp_path / "pca.png").stat().st_size > 500


def test_colours_are_the_first_principal_components():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 50, 3, generator=generator) * torch.tensor([1.0, 10.0, 3.0])
    colours = principal_colours(tokens)
    assert colours.shape == (2, 50, 3)
    assert 0 <= float(colours.min()) <= float(colours.max()) <= 1
    for component, axis in enumerate((1, 2, 0)):
        both = torch.stack((colours[..., component].flatten(), tokens[..., axis].flatten()))
        assert abs(float(torch.corrcoef(both)[0, 1])) > 0.95


# --- while training -------------------------------------------------------------------------------------------------


class Holder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = small()


def test_the_monitor_is_knn_with_labels_and_rankme_without():
    labelled, bare = monitors_for(stripes(1600))[0], monitors_for(stripes(40)[0])[0]
    assert isinstance(labelled, KnnMonitor)
    assert isinstance(bare, RankMeMonitor)
    assert labelled.train.count == 1000
    assert labelled.test.count == 320
    state = torch.random.get_rng_state()
    values = labelled(Holder(), Progress())
    assert torch.equal(state, torch.random.get_rng_state())
    assert 0.25 < values["knn_top1"] <= 1
    assert 1 <= bare(Holder(), Progress())["rankme"] <= 32


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    return "sample:fashion"


@pytest.mark.slow
def test_probes_of_a_trained_encoder_beat_its_random_initialisation_on_real_images(fashion, tmp_path):
    import unmask.data as data
    from unmask.contracts import configured
    from unmask.engine.settings import TrainSettings
    from unmask.engine.stages import Stage, train
    from unmask.systems.prediction.classifier.model import Classifier

    settings = data.DataSettings(uri=fashion, augment="shift_flip", shift=2)
    batches = data.Batches(data.open(fashion), settings, 64)
    options = {"backbone": {"name": "vit_nano_patch7"}, "mixup": 0, "cutmix": 0, "head_std": 0.02}
    config = Classifier.adapted(configured(Classifier, options), batches.facts)
    how = TrainSettings(steps=120, lr=1e-3, warmup_steps=10, save_every=0, preview_every=0, compile="off")
    stage = Stage("classifier", lambda: Classifier.build(config), batches, how, monitors=monitors_for(batches))
    run = train([stage], tmp_path / "run", describe={"system": "classifier"})
    kinds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [k["values"]["knn_top1"] for k in kinds if k["kind"] == "probe"]
    assert curve[-1] > curve[0] + 0.05
    for probe in ("knn", "linear"):
        result = evaluate(run, fashion, probe, out=run / "evaluation", limit=1000)
        assert result["split"].startswith("train and test splits of the data; 1,000 of the ")
        assert result["margin"] > 2 * result["baseline"]["random initialisation"]["top1_std"]
    few = evaluate(run, fashion, "ridge", labels=0.01, baseline=0)
    assert few["train_samples"] < 0.02 * batches.facts.count


def test_a_data_set_is_read_by_its_uri_and_limited(fashion):
    encoder = small(image_size=28)
    result = evaluate(encoder, fashion, "knn", baseline=0, limit=60)
    assert (result["train_samples"], result["test_samples"]) == (60, 60)
    assert len(result["classes"]) == 10
    assert result["classes"][0] == "T-shirt/top"


def test_fine_tuning_on_a_few_labels_of_a_data_set(fashion):
    options = {"steps": 3, "batch_size": 16, "compile": "off"}
    result = evaluate(small(image_size=28), fashion, "finetune", labels=0.01, baseline=0, limit=2000, **options)
    assert result["train_samples"] < 40
    assert result["test_samples"] == 1000


@pytest.fixture
def folder_without_test(tmp_path):
    """40 grey images of two classes in sub-folders, no test split."""
    images, labels = stripes(40, 2)
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        where = tmp_path / "striped" / f"class{label}"
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0].clamp(-2, 4) * 40 + 80).byte().numpy()).save(where / f"{i:03}.png")
    return tmp_path / "striped"


def test_data_without_a_test_split_is_cut_and_the_result_says_so(folder_without_test):
    result = evaluate(small(), str(folder_without_test), "ridge", baseline=0)
    assert result["split"].startswith("no test split: 80 %")
    assert (result["train_samples"], result["test_samples"]) == (32, 8)


def test_a_monitor_never_sees_a_test_image_among_its_neighbours(folder_without_test):
    from unmask.data import open as open_data

    (monitor,) = monitors_for(open_data(str(folder_without_test)))
    train, test = set(monitor.train.ids.tolist()), set(monitor.test.ids.tolist())
    assert train
    assert test
    assert not train & test


def test_a_monitor_measures_on_training_images_even_where_there_is_a_test_split(folder_without_test, tmp_path):
    """``train.best`` chooses a checkpoint by it: the test images must not."""
    import shutil

    from unmask.data import open as open_data

    for split in ("train", "test"):
        shutil.copytree(folder_without_test, tmp_path / "both" / split)
    (monitor,) = monitors_for(open_data(str(tmp_path / "both")))
    assert monitor.test.source.split == "train"
    assert monitor.train.count + monitor.test.count == 40


def test_labels_are_matched_by_the_names_of_the_classes_and_not_by_their_numbers():
    from unmask.evaluation.measure import classes_of
    from unmask.evaluation.samples import from_tensors

    x, y = stripes(120, 3)
    train = from_tensors(x, y, classes=("1", "2", "5"))
    kept = y != 1
    test = from_tensors(x[kept], (y[kept] > 0).long(), classes=("1", "5"))
    whole = evaluate(small(), {"train": train, "test": train}, "ridge", baseline=0)
    part = evaluate(small(), {"train": train, "test": test}, "ridge", baseline=0)
    assert part["classes"] == ["1", "2", "5"]
    assert part["top1"] > 0.6 < whole["top1"]
    assert sum(part["confusion"][1]) == 0
    assert sum(part["confusion"][2]) == 40
    more = from_tensors(x, y, classes=("1", "2", "5"))
    assert classes_of(from_tensors(x, y % 2, classes=("1", "2")), more) == ("1", "2", "5")
    with pytest.raises(UserError, match="classes of train and test differ"):
        classes_of(train, from_tensors(x, y % 2, classes=("1", "3")))


def test_a_limit_for_each_part_is_told_in_the_result():
    result = evaluate(small(), stripes(200), "ridge", baseline=0, limit=(100, 10))
    assert (result["train_samples"], result["test_samples"]) == (100, 10)
    assert "100 of the 160 training images" in result["split"]
    assert "10 of the 40 test images" in result["split"]
    with pytest.raises(UserError, match="limit=0"):
        evaluate(small(), stripes(40), "ridge", limit=0)


def test_sparse_numbers_as_labels_of_a_table_are_matched_between_its_splits(tmp_path):
    import datasets

    x, y = stripes(90, 3)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    pictures = [Image.fromarray((image[0].clamp(-2, 4) * 40 + 80).byte().numpy()) for image in x]
    numbers = [100 + 100 * label for label in y.tolist()]
    for split, kept in (("train", (100, 200, 300)), ("test", (100, 300))):
        rows = [i for i, number in enumerate(numbers) if number in kept]
        table = {"image": [pictures[i] for i in rows], "label": [numbers[i] for i in rows]}
        datasets.Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / f"x-{split}.parquet"))
    result = evaluate(small(), str(tmp_path / "x-train.parquet"), "ridge", baseline=0)
    assert result["classes"] == ["100", "200", "300"]
    assert [sum(row) for row in result["confusion"]] == [30, 0, 30]
    assert result["top1"] > 0.8
