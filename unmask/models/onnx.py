"""A user's model as an ONNX file, its answers in onnxruntime compared with torch's before it is written."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.errors import MissingExtra, UserError
from unmask.models.user import UserModel
from unmask.official.export import _quiet, check_equal
from unmask.official.hub import write_folder


class _Scores(nn.Module):
    """The logits for inputs by position."""

    def __init__(self, model: UserModel, names: list[str]):
        super().__init__()
        self.module, self.names = model.module, names
        self._model = [model]  # in a list: the module is registered once

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._model[0].scores(**dict(zip(self.names, inputs, strict=True)))


def export_onnx(model: UserModel, folder: Path) -> Path:
    """``model.onnx`` with the inputs of the model (``image``, or ``input_ids`` and ``attention_mask``) and the output
    ``logits``; any batch size. Raises ``UserError``: packages missing, operations that ONNX lacks, other answers."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra("export to onnx", package, "export")
    import onnxruntime

    model.module.cpu().eval()
    example = model.inputs(model.example(3))
    names = list(example)
    whole = _Scores(model, names).eval()
    with torch.no_grad():
        expected = whole(*example.values())
        program = _traced(whole, {n: v[:2] for n, v in example.items()}, model.name)
    buffer = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(buffer, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        found = session.run(None, {n: v[:batch].numpy() for n, v in example.items()})
        check_equal(expected[:batch], torch.from_numpy(found[0]), "onnxruntime")
    described = {
        "format": "onnx",
        "name": model.name,
        "inputs": {n: ["batch", *v.shape[1:]] for n, v in example.items()},
        "outputs": {"logits": ["batch", *expected.shape[1:]]},
        "classes": list(model.classes) if model.classes else None,
        "preprocessing": model.preprocessing.plain() if model.preprocessing else None,
    }
    return write_folder(folder, described, {}, files={"model.onnx": buffer})


def _traced(module: nn.Module, inputs: dict[str, Tensor], name: str) -> Any:
    batch = torch.export.Dim("batch", min=1, max=65536)
    shapes = ({0: batch},) * len(inputs)
    try:
        with _quiet():
            traced = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=(shapes,), strict=False)
            return torch.onnx.export(
                traced, dynamo=True, input_names=list(inputs), output_names=["logits"], verbose=False
            )
    except Exception as error:  # torch reports an operation it cannot translate in many ways
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"{name} cannot be written as ONNX: {lines[0][:160]}") from None
