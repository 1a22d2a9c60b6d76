"""Whole models of anyone's: opened, fed, saved, refused."""

import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import unmask
from unmask.contracts import Preprocessing
from unmask.errors import UserError
from unmask.models import UserModel, open_model
from unmask.models.saving import restore
from unmask.systems.compression.structure import find_structure
from unmask.systems.compression.surgery import cut

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "classes": 4}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def vit() -> UserModel:
    torch.manual_seed(0)
    return open_model("timm/vit_tiny_patch16_224", pretrained=False, **SMALL)


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def halves(model: UserModel, neurons: int = 8, heads: int = 2) -> UserModel:
    """Every layer keeps its first heads and neurons."""
    return cut(
        model,
        {u: torch.arange(u.count) < (heads if u.kind == "head" else neurons) for u in find_structure(model).all()},
    )


def test_a_timm_model_is_saved_and_opened_with_equal_answers(tmp_path: Path) -> None:
    model = vit()
    batch = model.example(3)
    model.save(tmp_path / "m")
    assert torch.equal(open_model(tmp_path / "m").logits(batch), model.logits(batch))
    assert isinstance(unmask.load(tmp_path / "m"), nn.Module)


def test_random_weights_are_said() -> None:
    with pytest.warns(UserWarning, match="random weights"):
        open_model("torchvision/squeezenet1_1", pretrained=False, classes=3)


def test_a_checkpoint_decides_the_number_of_classes(tmp_path: Path) -> None:
    first = open_model("torchvision/resnet18", pretrained=False, classes=5, image_size=32)
    save_file(first.module.state_dict(), tmp_path / "w.safetensors")
    second = open_model("torchvision/resnet18", weights=tmp_path / "w.safetensors", image_size=32)
    batch = first.example(2)
    assert len(second.classes or ()) == 5
    assert torch.equal(first.logits(batch), second.logits(batch))


def test_a_cut_timm_vit_loads_in_timm_without_this_library(tmp_path: Path) -> None:
    model = halves(vit())
    model.save(tmp_path / "m")
    space: dict = {"__file__": str(tmp_path / "m" / "load_plain.py")}
    source = (tmp_path / "m" / "load_plain.py").read_text()
    assert "unmask" not in source.replace("without unmask", "")
    exec(source, space)
    batch = model.example(3)
    assert torch.allclose(space["load"]()(batch["image"]), model.logits(batch), atol=1e-6)


def test_a_vit_that_was_cut_alike_everywhere_is_built_by_timms_own_options() -> None:
    import timm
    from timm.layers import Attention

    from unmask.models.saving import plain_config

    model = halves(vit())
    options, _ = plain_config(model)
    assert options is not None
    size = options.pop("attn_head_dim")

    class Narrow(Attention):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, attn_head_dim=size, **kwargs)

    arguments = {**model.made, **options, "attn_layer": Narrow}
    plain = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    plain.load_state_dict(model.module.state_dict())
    batch = model.example(2)
    assert torch.allclose(plain(batch["image"]), model.logits(batch), atol=1e-6)


def test_layers_that_differ_are_told_to_be_beyond_the_librarys_config() -> None:
    from unmask.models.saving import plain_config

    model = vit()
    units = find_structure(model)
    kept = {u: torch.arange(u.count) < 8 + 4 * i for i, u in enumerate(units.neurons)}
    options, why = plain_config(cut(model, kept))
    assert options is None
    assert "different numbers" in why


def test_a_bert_with_fewer_neurons_loads_with_plain_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = open_model(bert())
    smaller = halves(model, neurons=12, heads=3)
    smaller.save(tmp_path / "b")
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "b").eval()
    batch = model.example(2, 8)
    again = open_model(tmp_path / "b").logits(batch)
    assert torch.allclose(plain(**smaller.inputs(batch)).logits, smaller.logits(batch), atol=1e-6)
    assert torch.allclose(again, smaller.logits(batch), atol=1e-6)


def test_a_llama_with_fewer_heads_loads_with_plain_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    smaller = halves(open_model(transformers.LlamaForCausalLM(config)), neurons=10, heads=1)
    smaller.save(tmp_path / "l")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "l").eval()
    batch = smaller.example(2, 8)
    assert torch.allclose(plain(**smaller.inputs(batch)).logits, smaller.logits(batch), atol=1e-5)


def test_a_torchvision_bottleneck_resnet_cut_alike_is_built_by_its_width() -> None:
    from torchvision.models.resnet import Bottleneck, ResNet

    from unmask.models.saving import plain_config

    torch.manual_seed(0)
    net = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3)
    model = UserModel(
        net.eval(),
        "image classifier",
        "torchvision",
        "torchvision/resnet50",
        ("a", "b", "c"),
        Preprocessing(image_size=(32, 32)),
    )
    inner = [u for u in find_structure(model).channels if ".conv3" not in u.name and u.name.startswith("layer")]
    inner = [u for u in inner if "conv1" in u.name or "conv2" in u.name]
    smaller = cut(model, {u: torch.arange(u.count) < u.count // 2 for u in inner})
    options, why = plain_config(smaller)
    assert options is not None, why
    plain = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3, **options).eval()
    plain.load_state_dict(smaller.module.state_dict())
    batch = model.example(2)
    assert torch.allclose(plain(batch["image"]), smaller.logits(batch), atol=1e-5)


def test_a_module_of_ones_own_is_restored_by_its_maker(tmp_path: Path) -> None:
    def made() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

    torch.manual_seed(0)
    model = open_model(made(), classes=2, preprocessing=Preprocessing(image_size=(8, 8)))
    units = find_structure(model).channels[0]
    smaller = cut(model, {units: torch.arange(8) < 3})
    smaller.save(tmp_path / "m")
    again = restore(made(), tmp_path / "m")
    batch = model.example(2)
    assert torch.equal(again(batch["image"]), smaller.logits(batch))
    with pytest.raises(UserError, match="build it"):
        open_model(tmp_path / "m")


@pytest.mark.slow
def test_a_cut_model_answers_alike_in_onnxruntime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    import onnxruntime

    smaller = halves(vit())
    smaller.export_onnx(tmp_path / "o")
    session = onnxruntime.InferenceSession(tmp_path / "o" / "model.onnx")
    batch = smaller.example(5)
    found = session.run(None, {"image": batch["image"].numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), smaller.logits(batch), atol=1e-4)


# --- bad input ---


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self):
            return (print, ("run",))

    (tmp_path / "w.pth").write_bytes(pickle.dumps(Bad()))
    with pytest.raises(UserError, match="wants to run code"):
        open_model("torchvision/resnet18", weights=tmp_path / "w.pth")


def test_an_encoder_without_a_head_is_no_classifier(tmp_path: Path) -> None:
    from unmask.backbones import build
    from unmask.official.hub import save_encoder

    save_encoder(build("vit_nano_patch4", image_size=8), tmp_path / "e")
    with pytest.raises(UserError, match="no classifier"):
        open_model(tmp_path / "e")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("timm/resnet81", "did you mean"),
        ("torchvision/resnet81", "did you mean"),
        ("nothing/here", "no model nothing/here"),
    ],
)
def test_unknown_names_are_told_the_nearest(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_model(word, pretrained=False)


def test_a_file_alone_asks_for_its_architecture(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="whose architecture"):
        open_model(path)
