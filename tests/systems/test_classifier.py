"""The supervised classifier: learns in a bare loop, starts from other encoders, predicts what a person can read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from unmask.catalog import card, recipes
from unmask.contracts import DataFacts, Preprocessing, configured
from unmask.draw import Recorder, Seeded
from unmask.errors import UserError
from unmask.systems.prediction.classifier.model import Classifier
from unmask.systems.prediction.transfer import transfer

TINY = {"name": "vit_nano_patch4", "image_size": 16, "in_channels": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny(**options) -> Classifier:
    torch.manual_seed(0)
    return Classifier(configured(Classifier, {"backbone": TINY, "classes": 3, "head_std": 0.02, **options}))


def bars_of_light(count: int = 96):
    """Grey images whose class is where a bright bar stands."""
    labels = torch.arange(count) % 3
    images = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.3
    for i, label in enumerate(labels.tolist()):
        images[i, :, :, 5 * label : 5 * label + 4] += 2
    return images, labels


def trained(model: Classifier, steps: int = 40) -> list[float]:
    images, labels = bars_of_light()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = model.loss({"image": images, "label": labels}, Seeded(0, step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_it_learns_in_a_bare_loop_and_answers_right():
    model = tiny(mixup=0.0, cutmix=0.0, smoothing=0.0)
    losses = trained(model)
    images, labels = bars_of_light()
    model.eval()
    assert losses[-1] < 0.3 * losses[0]
    assert float((model.logits(images).argmax(1) == labels).float().mean()) > 0.95


def test_mixing_smoothing_and_drop_path_are_drawn_by_name_and_repeat():
    model = tiny(backbone={**TINY, "drop_path": 0.2})
    images, labels = bars_of_light(8)
    recorder = Recorder(Seeded(1, 4))
    first = model.loss({"image": images, "label": labels}, recorder)["loss"]
    assert "drop_path" in recorder.recorded
    assert len(recorder.recorded) > 1
    again = model.loss({"image": images, "label": labels}, Seeded(1, 4))["loss"]
    other = model.loss({"image": images, "label": labels}, Seeded(1, 5))["loss"]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_mixing_and_smoothing_the_loss_is_the_mean_cross_entropy_and_nothing_is_drawn():
    model = tiny(mixup=0.0, cutmix=0.0, smoothing=0.0)
    images, labels = bars_of_light(8)
    recorder = Recorder(Seeded(0))
    loss = model.loss({"image": images, "label": labels}, recorder)["loss"]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(model.logits(images), labels))
    assert not recorder.recorded


def test_smoothing_is_torchs_label_smoothing():
    model = tiny(mixup=0.0, cutmix=0.0, smoothing=0.1)
    images, labels = bars_of_light(8)
    loss = model.loss({"image": images, "label": labels}, Seeded(0))["loss"]
    expected = torch.nn.functional.cross_entropy(model.logits(images), labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_a_plain_vit_is_pooled_by_mean_and_fc_norm_without_the_encoders_norm():
    model = tiny()
    images, _ = bars_of_light(4)
    assert isinstance(model.encoder.norm, torch.nn.Identity)
    mean = model.encoder.tokens(images)[:, 1:].mean(dim=1)
    expected = torch.nn.functional.layer_norm(mean, (32,), eps=1e-6)
    torch.testing.assert_close(model.features(images), expected)
    assert not any(n.startswith("encoder.norm") for n, _ in model.named_parameters())


def test_the_class_token_keeps_the_encoders_norm():
    model = tiny(pool="cls")
    images, _ = bars_of_light(4)
    assert model.fc_norm is None
    torch.testing.assert_close(model.features(images), model.encoder.tokens(images)[:, 0])


def test_layer_decay_multiplies_the_rate_by_depth_as_in_mae():
    model = tiny()
    scale = {n: g.lr_scale for g in model.parameter_groups(layer_decay=0.65) for n in g.names}
    decay = {n: g.decay_scale for g in model.parameter_groups(layer_decay=0.65) for n in g.names}
    depth = 2
    assert scale["encoder.patch_embed.proj.weight"] == pytest.approx(0.65 ** (depth + 1))
    assert scale["encoder.cls_token"] == pytest.approx(0.65 ** (depth + 1))
    assert scale["encoder.blocks.0.attn.qkv.weight"] == pytest.approx(0.65**depth)
    assert scale["encoder.blocks.1.mlp.fc2.bias"] == pytest.approx(0.65)
    assert scale["fc_norm.weight"] == scale["head.weight"] == scale["head.bias"] == 1
    assert decay["head.bias"] == decay["fc_norm.weight"] == decay["encoder.cls_token"] == 0
    assert decay["head.weight"] == decay["encoder.blocks.0.attn.qkv.weight"] == 1


def test_a_frozen_encoder_does_not_move():
    model = tiny(freeze=True, mixup=0.0, cutmix=0.0)
    before = model.encoder.blocks[0].mlp.fc1.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    images, labels = bars_of_light(8)
    model.loss({"image": images, "label": labels}, Seeded(0))["loss"].backward()
    optimizer.step()
    assert torch.equal(before, model.encoder.blocks[0].mlp.fc1.weight)
    assert not model.encoder.training
    assert model.head.weight.grad is not None


def test_the_data_fills_in_channels_size_and_classes():
    facts = DataFacts(uri="photos", channels=4, image_size=(12, 20), classes=("cat", "dog"))
    config = Classifier.adapted(configured(Classifier, {"backbone": "vit_nano_patch4"}), facts)
    model = Classifier(config)
    assert model.classes == ("cat", "dog")
    assert model.logits(torch.zeros(2, 4, 12, 20)).shape == (2, 2)


def test_data_without_labels_is_refused_in_one_line():
    with pytest.raises(UserError, match="needs labels, photos has none"):
        Classifier.adapted(configured(Classifier, {"backbone": "vit_nano_patch4"}), DataFacts(uri="photos"))
    with pytest.raises(UserError, match="needs labels"):
        tiny().loss({"image": torch.zeros(2, 1, 16, 16)}, Seeded(0))


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(UserError, match="did you mean smoothing"):
        configured(Classifier, {"smothing": 0.1})


# --- starting from other encoders ---------------------------------------------------------------------------------


def encoder(**options):
    from unmask.backbones import build

    torch.manual_seed(1)
    return build("vit_nano_patch4", **{k: v for k, v in {**TINY, **options}.items() if k != "name"})


def test_init_takes_the_encoder_of_a_folder_and_its_config_then_names_it_no_more(tmp_path):
    from unmask.official.hub import save_encoder

    source = encoder()
    source.preprocessing = Preprocessing(mean=(0.3,), std=(0.2,), image_size=(16, 16), channels=1)
    save_encoder(source, tmp_path / "encoder")
    facts = DataFacts(channels=1, image_size=(16, 16), classes=("a", "b"))
    config = Classifier.adapted(configured(Classifier, {"init": str(tmp_path / "encoder")}), facts)
    model = Classifier.build(config)
    assert model.encoder.num_layers == 2, "the backbone comes from the folder when none is given"
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    assert model.encoder.preprocessing == source.preprocessing
    assert model.config.init is None


def test_a_model_saved_after_init_loads_without_the_folder_it_came_from(tmp_path):
    import shutil

    from unmask.official.hub import save_encoder

    save_encoder(encoder(), tmp_path / "encoder")
    model = Classifier.build(
        configured(Classifier, {"backbone": TINY, "classes": 2, "init": str(tmp_path / "encoder")})
    )
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "encoder")
    loaded = Classifier.from_pretrained(tmp_path / "model")
    images, _ = bars_of_light(2)
    torch.testing.assert_close(loaded.logits(images), model.eval().logits(images))


def test_transfer_resizes_learned_positions_and_relative_tables():
    source = encoder(position="learned", relative=("per_block",))
    target = encoder(position="learned", relative=("per_block",), image_size=24)
    transfer(target, source)
    assert torch.equal(target.pos_embed[:, :1], source.pos_embed[:, :1])
    assert torch.equal(target.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    table = target.block_biases[0].relative_position_bias_table
    assert torch.equal(table[-3:], source.block_biases[0].relative_position_bias_table[-3:])
    middle, old = len(table[:-3]) // 2, len(source.block_biases[0].relative_position_bias_table[:-3]) // 2
    torch.testing.assert_close(
        table[middle], source.block_biases[0].relative_position_bias_table[old], atol=1e-4, rtol=0
    )


def test_transfer_copies_a_shared_relative_table_into_every_block():
    source, target = encoder(relative=("shared",)), encoder(relative=("per_block",))
    transfer(target, source)
    for bias in target.block_biases:
        assert torch.equal(bias.relative_position_bias_table, source.rel_pos_bias.relative_position_bias_table)


def test_transfer_starts_learned_positions_from_the_fixed_table():
    source, target = encoder(), encoder(position="learned")
    transfer(target, source)
    images, _ = bars_of_light(2)
    torch.testing.assert_close(target.tokens(images), source.tokens(images))


def test_transfer_from_another_size_of_network_is_refused_in_one_line():
    with pytest.raises(UserError, match="does not fit"):
        transfer(encoder(embed_dim=64), encoder(), where="runs/a")


def test_transfer_resizes_the_tables_of_shifted_windows():
    from unmask.backbones import build

    sizes = {"in_channels": 1, "patch_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}
    source = build("swin_tiny", **sizes, image_size=16, window_size=4)
    target = build("swin_tiny", **sizes, image_size=12, window_size=3)
    transfer(target, source)
    assert torch.equal(target.layers[0].blocks[0].attn.qkv.weight, source.layers[0].blocks[0].attn.qkv.weight)
    tables = [m.layers[0].blocks[0].attn.relative_position_bias_table for m in (source, target)]
    assert [len(t) for t in tables] == [49, 25]
    torch.testing.assert_close(tables[1][12], tables[0][24], atol=0.02, rtol=0.3)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_published_fine_tuned_file_becomes_a_classifier_with_the_same_answers(pool):
    from unmask.systems.prediction.classifier.official import load_official

    model = tiny(backbone={**TINY, "position": "learned"}, pool=pool).eval()
    official = {n.removeprefix("encoder."): v for n, v in model.state_dict().items()}
    assert ("fc_norm.weight" in official) == (pool == "mean")
    loaded = load_official(official, {"num_heads": 2})
    images, _ = bars_of_light(3)
    torch.testing.assert_close(loaded.logits(images), model.logits(images))
    with pytest.raises(UserError, match="no head"):
        load_official({n: v for n, v in official.items() if not n.startswith("head")})


# --- predicting ---------------------------------------------------------------------------------------------------


@pytest.fixture
def predictor():
    model = tiny(classes=("left", "middle", "right"), mixup=0.0, cutmix=0.0, smoothing=0.0)
    trained(model)
    model.encoder.preprocessing = Preprocessing(mean=(0.3,), std=(0.25,), image_size=(16, 16), channels=1)
    return model.eval()


def picture(label: int) -> Image.Image:
    array = np.full((16, 16), 76, dtype=np.uint8)
    array[:, 5 * label : 5 * label + 4] = 204
    return Image.fromarray(array)


def test_files_pictures_arrays_and_tensors_are_predicted_alike(predictor, tmp_path):
    picture(2).save(tmp_path / "right.png")
    array = np.asarray(picture(2))
    tensor = torch.from_numpy(array.copy())[None]
    results = predictor.predict([tmp_path / "right.png", picture(2), array, tensor, str(tmp_path / "right.png")])
    assert [r.answer for r in results] == ["right"] * 5
    assert results[0].source == str(tmp_path / "right.png")
    for other in results[1:]:
        torch.testing.assert_close(other.probabilities, results[0].probabilities)
    assert float(results[0].probabilities.sum()) == pytest.approx(1)


def test_a_colour_photograph_of_another_size_is_predicted_by_a_grey_model(predictor):
    wide = picture(0).convert("RGB").resize((64, 64))
    assert predictor.predict([wide])[0].answer == "left"


def test_scores_are_saved_as_json_and_drawn(predictor, tmp_path):
    result = predictor.predict([picture(1)])[0]
    saved = json.loads(result.save(tmp_path / "deep" / "first").read_text())
    assert saved["answer"] == "middle"
    assert next(iter(saved["probabilities"])) == "middle"
    assert np.asarray(result.overlay(size=96)).std() > 10


def test_a_file_that_is_no_image_is_named_in_one_line(predictor, tmp_path):
    (tmp_path / "note.png").write_text("hello")
    with pytest.raises(UserError, match=r"note\.png"):
        predictor.predict([tmp_path / "note.png"])
    with pytest.raises(UserError, match=r"absent\.png"):
        predictor.predict([tmp_path / "absent.png"])


# --- what a person sees -------------------------------------------------------------------------------------------


def test_its_loss_is_held_against_answering_the_same_for_all():
    model = tiny(mixup=0.0, cutmix=0.0)
    images, labels = bars_of_light(9)
    references = model.eval().references({"image": images, "label": labels}, Seeded(0))
    assert float(references["all classes alike"]) == pytest.approx(float(torch.log(torch.tensor(3.0))))
    assert float(references["how often each class occurs"]) == pytest.approx(
        float(torch.log(torch.tensor(3.0))), abs=1e-5
    )


def test_the_preview_shows_images_beside_their_answers():
    images, labels = bars_of_light(12)
    preview = tiny().eval().preview({"image": images, "label": labels}, Seeded(0))[0]
    assert len(preview.rows) == 8
    assert all(cell.dtype == np.uint8 and cell.ndim == 3 for row in preview.rows for cell in row)


def test_its_card_and_every_recipe_are_valid():
    from unmask.data.settings import DataSettings
    from unmask.engine.settings import TrainSettings

    assert card("classifier").load() is Classifier
    known = recipes("classifier")
    assert {"paper", "small", "tiny"} <= set(known)
    for recipe in known.values():
        DataSettings.model_validate(recipe["data"])
        TrainSettings.model_validate(recipe["train"])
        configured(Classifier, recipe["model"])
