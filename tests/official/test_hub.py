"""Saved folders: they load again exactly, and what is wrong with one is said in one line."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from unmask.backbones import build
from unmask.contracts import Preprocessing, configured
from unmask.draw import Seeded
from unmask.errors import UserError
from unmask.official.hub import (
    load_encoder,
    load_trainable,
    push_to_hub,
    save_encoder,
    save_trainable,
    untied,
    write_folder,
)
from unmask.official.load import read_checkpoint
from unmask.systems.pretraining.colormae.model import ColorMAE
from unmask.systems.pretraining.mae.model import MAE
from unmask.systems.pretraining.simmim.model import SimMIM

SMALL = {
    "backbone": {"name": "vit_nano_patch4", "image_size": 16, "depth": 1, "embed_dim": 32},
    "decoder": {"embed_dim": 16, "depth": 1, "num_heads": 2},
}


@pytest.fixture
def model():
    out = MAE(configured(MAE, SMALL))
    out.encoder.preprocessing = Preprocessing(image_size=(16, 16), mean=(0.1, 0.2, 0.3))
    return out.eval()


def test_a_system_comes_back_with_its_weights_config_and_preprocessing(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    again = MAE.from_pretrained(tmp_path / "model")
    batch = {"image": torch.randn(2, 3, 16, 16)}
    assert type(again) is MAE
    assert again.config == model.config
    assert again.encoder.preprocessing == model.encoder.preprocessing
    assert torch.equal(again.loss(batch, Seeded(0))["loss"], model.loss(batch, Seeded(0))["loss"])


def test_an_encoder_comes_back_from_its_own_folder_from_a_system_and_from_a_run(tmp_path, model):
    x = torch.randn(2, 3, 16, 16)
    save_trainable(model, tmp_path / "run" / "model")
    save_encoder(model.encoder, tmp_path / "run" / "encoder", system="mae")
    for place in ("run", "run/encoder", "run/model"):
        assert torch.equal(load_encoder(tmp_path / place)(x), model.encoder(x))
    assert json.loads((tmp_path / "run/encoder/config.json").read_text())["system"] == "mae"


def test_where_weights_came_from_is_not_kept(tmp_path):
    encoder = build("timm/resnet18", image_size=32)
    encoder.options = {"image_size": 32, "pretrained": True, "weights": "w.pth"}
    save_encoder(encoder, tmp_path / "e")
    assert json.loads((tmp_path / "e/config.json").read_text())["backbone"]["options"] == {"image_size": 32}


def test_saving_again_replaces_our_files_and_leaves_others(tmp_path, model):
    folder = tmp_path / "m"
    save_trainable(model, folder)
    (folder / "notes.txt").write_text("mine")
    with torch.no_grad():
        model.decoder.mask_token.add_(1)
    save_trainable(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    assert torch.equal(load_trainable(folder).decoder.mask_token, model.decoder.mask_token)


def test_a_failed_write_leaves_the_old_model_and_nothing_else(tmp_path, model, monkeypatch):
    folder = tmp_path / "m"
    save_trainable(model, folder)
    before = (folder / "model.safetensors").read_bytes()

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unmask.official.hub.save_file", full)
    for target in (folder, tmp_path / "fresh"):
        with pytest.raises(UserError, match="No space left on device"):
            save_trainable(model, target)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_tied_views_and_turned_tensors_are_kept_by_value(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {
        "a": whole,
        "tied": whole,
        "row": whole[1],
        "turned": whole.T,
        "strided": whole[:, ::2],
        "scalar": torch.tensor(3),
    }
    tensors, tied = untied(state)
    assert tied == {"tied": "a"}
    write_folder(tmp_path / "m", {"kind": "encoder"}, state)
    read = read_checkpoint(tmp_path / "m/model.safetensors")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[k], v) for k, v in state.items())


def test_tied_parameters_of_a_module_load_into_it(tmp_path):
    module = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)})
    module["two"].weight = module["one"].weight
    write_folder(tmp_path / "m", {}, module.state_dict())
    module.load_state_dict(read_checkpoint(tmp_path / "m"))


def wrong(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_of_another_system_is_named(tmp_path, model):
    save_trainable(model, tmp_path / "m")
    assert "holds a mae, not a colormae" in wrong(lambda: ColorMAE.from_pretrained(tmp_path / "m"))


def test_what_is_no_model_of_ours_is_refused_in_one_line(tmp_path, model):
    assert "no folder" in wrong(lambda: load_trainable(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in wrong(lambda: load_encoder(tmp_path / "empty"))
    (tmp_path / "empty/config.json").write_text('{"architecture": "bert"}')
    assert "no model saved by unmask" in wrong(lambda: load_encoder(tmp_path / "empty")).replace("not of a", "no")
    save_encoder(model.encoder, tmp_path / "e")
    assert "encoder alone" in wrong(lambda: load_trainable(tmp_path / "e"))
    save_trainable(model, tmp_path / "m")
    (tmp_path / "m/model.safetensors").write_bytes((tmp_path / "m/model.safetensors").read_bytes()[:-5])
    assert "truncated" in wrong(lambda: load_trainable(tmp_path / "m"))


def test_weights_of_another_size_name_what_differs(tmp_path, model):
    save_encoder(model.encoder, tmp_path / "e")
    other = build("vit_nano_patch4", image_size=16, depth=2, embed_dim=32)
    save_encoder(other, tmp_path / "o")
    shutil.copy(tmp_path / "e/model.safetensors", tmp_path / "o/model.safetensors")
    assert "missing blocks.1." in wrong(lambda: load_encoder(tmp_path / "o"))


def test_a_config_cannot_name_code_outside_installed_systems(tmp_path, model):
    save_trainable(model, tmp_path / "m")
    path = tmp_path / "m/config.json"
    described = json.loads(path.read_text())
    for entry in ("os:system", "subprocess:Popen"):
        path.write_text(json.dumps(described | {"entry": entry}))
        assert "no installed system" in wrong(lambda: load_trainable(tmp_path / "m"))
    path.write_text(json.dumps(described | {"entry": "unmask.errors:nearest"}))
    assert "no system that can be trained" in wrong(lambda: load_trainable(tmp_path / "m"))


def test_offline_the_hub_is_one_line(model, monkeypatch):
    import huggingface_hub

    def offline(*_args, **_options):
        raise ConnectionError("Failed to resolve huggingface.co")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", offline)
    assert "no connection" in wrong(lambda: load_trainable("someone/model"))
    assert "no connection" in wrong(lambda: push_to_hub(model, "someone/model"))
    assert "write owner/name" in wrong(lambda: push_to_hub(model, "model"))


def test_a_system_comes_back_without_the_file_its_backbone_began_from(tmp_path):
    weights = tmp_path / "w.safetensors"
    encoder = build("timm/resnet18", image_size=32)
    save_file(encoder.model.state_dict(), weights)
    backbone = {"name": "timm/resnet18", "image_size": 32, "weights": str(weights)}
    model = SimMIM(configured(SimMIM, {"backbone": backbone, "cell_size": 8}))
    save_trainable(model, tmp_path / "m")
    weights.unlink()
    again = load_trainable(tmp_path / "m")
    assert torch.equal(again.encoder.model.conv1.weight, encoder.model.conv1.weight)
    path = tmp_path / "m/config.json"
    described = json.loads(path.read_text())
    assert "weights" not in described["config"]["backbone"]
    described["config"]["backbone"] |= {"weights": "/elsewhere.pth", "arguments": {"checkpoint_path": "/elsewhere.pth"}}
    path.write_text(json.dumps(described))
    load_trainable(tmp_path / "m")


def test_an_encoder_reads_no_other_file_that_its_config_names(tmp_path):
    save_encoder(build("timm/resnet18", image_size=32), tmp_path / "e")
    path = tmp_path / "e/config.json"
    described = json.loads(path.read_text())
    foreign = {
        "checkpoint_path": "/elsewhere.pth",
        "pretrained_cfg_overlay": {"file": "/elsewhere.pth"},
        "act_layer": "gelu",
    }
    described["backbone"]["options"] |= {"weights": "/elsewhere.pth", "pretrained": True, "arguments": foreign}
    path.write_text(json.dumps(described))
    assert load_encoder(tmp_path / "e").options["arguments"] == {"act_layer": "gelu"}


def test_importing_the_commands_modules_runs_no_command(monkeypatch):
    import importlib

    monkeypatch.setattr("unmask.cli.app.main", lambda: pytest.fail("a command ran"))
    for module in ("unmask.__main__", "unmask.cli.__main__"):
        monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.import_module(module)
