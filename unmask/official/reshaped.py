"""A model whose layers are smaller than its architecture says: what was cut, as data, and how the cut model is made again.

The architecture is built by whoever owns it (timm, torchvision, transformers, ours); ``reshape`` then makes room for the
smaller weights. ``SCRIPT`` does the same without this library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SCRIPT = '''"""Load the smaller model beside this file without unmask: torch, safetensors and the library that the model is of."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

HERE = Path(__file__).parent


class Constant(nn.Module):
    """Always the same vector: what is left of an attention that lost all its heads."""

    def __init__(self, size, extra):
        super().__init__()
        self.extra = extra
        self.register_buffer("value", torch.zeros(size))

    def forward(self, *inputs, **named):
        x = next(v for v in (*inputs, *named.values()) if isinstance(v, torch.Tensor))
        out = self.value.expand(*x.shape[:-1], -1)
        return (out, *(None,) * self.extra) if self.extra else out


def shrink(model, surgery):
    """Make room in a freshly built model for the smaller weights."""
    for name, (size, extra) in surgery["constants"].items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Constant(size, extra))
    for name, shape in surgery["shapes"].items():
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        if isinstance(getattr(module, last, None), nn.Parameter) or last == "bias":
            setattr(module, last, nn.Parameter(torch.zeros(shape)))
        else:
            setattr(module, last, torch.zeros(shape))
    for name, values in surgery["attributes"].items():
        for key, value in values.items():
            setattr(model.get_submodule(name), key, value)
    return model


def load():
{build}
    shrink(model, json.loads((HERE / "surgery.json").read_text()))
    missing, left = model.load_state_dict(load_file(HERE / "model.safetensors"), strict=False)
    assert not left and all(name.startswith("lm_head.") for name in missing), (missing, left)
    if missing:  # tied to the embedding
        model.tie_weights()
    return model.eval()
'''


@dataclass
class Surgery:
    """What was cut from a model. shapes: parameter or buffer -> its new shape. attributes: module -> its new whole
    numbers (heads, features). constants: module -> (length of the vector that it gives from now on, further outputs that
    are None). merges: block -> tokens that are left in front of it, and how many first tokens are never merged."""

    shapes: dict[str, list[int]] = field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    constants: dict[str, list[int]] = field(default_factory=dict)
    merges: dict[str, list[int]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(values: Mapping[str, Any]) -> Surgery:
        return Surgery(**{k: dict(v) for k, v in values.items() if k in Surgery.__dataclass_fields__})

    def __bool__(self) -> bool:
        return bool(self.shapes or self.constants or self.merges)

    def under(self, prefix: str) -> Surgery:
        """The part that concerns one submodule, by its names; everything for an empty prefix."""
        dot = prefix + "." if prefix else ""
        cut: dict[str, Any] = {
            part: {k.removeprefix(dot): v for k, v in values.items() if k.startswith(dot)}
            for part, values in self.plain().items()
        }
        return Surgery.of(cut)

    def over(self, prefix: str) -> Surgery:
        """The same as seen from a module that holds this one as ``prefix``."""
        dot = prefix + "." if prefix else ""
        return Surgery.of({part: {dot + k: v for k, v in values.items()} for part, values in self.plain().items()})


class Constant(nn.Module):
    """Always the same vector ``[size]`` at every place: what is left of an attention that lost all its heads.

    extra: how many further outputs (all None) the module that it stands for gives.
    """

    value: Tensor

    def __init__(self, size: int, extra: int = 0):
        super().__init__()
        self.extra = extra
        self.register_buffer("value", torch.zeros(size))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        x = next(v for v in (*inputs, *named.values()) if isinstance(v, Tensor))
        out = self.value.expand(*x.shape[:-1], -1)
        return (out, *(None,) * self.extra) if self.extra else out


class TokenMerging(nn.Module):
    """Bipartite soft matching (Bolya et al. 2023, "Token merging"), down to ``keep`` tokens: even tokens against odd ones by
    cosine similarity, the most similar even ones become part of their best odd partner, a plain mean.

    ``forward(x [B, N, D])`` gives ``[B, keep, D]``: even tokens that are left, in order, then the odd ones. protected: 1
    when token 0 is a class token, which is never merged. At most half of the tokens go in one call.
    """

    def __init__(self, keep: int, protected: int = 1):
        super().__init__()
        self.keep, self.protected = keep, protected

    def forward(self, x: Tensor) -> Tensor:
        return merge_tokens(x, self.keep, self.protected)[0]


def merge_tokens(x: Tensor, keep: int, protected: int = 1) -> tuple[Tensor, Tensor]:
    """``[B, K, D]`` and the original places of the merged tokens ``[B, r]``, most similar first."""
    count = x.shape[1]
    merged = max(min(count - keep, (count - 1) // 2 if protected else count // 2), 0)
    if merged == 0:
        return x, torch.zeros(x.shape[0], 0, dtype=torch.int64, device=x.device)
    even, odd = x[:, ::2], x[:, 1::2]
    unit = nn.functional.normalize(x, dim=-1)
    likeness = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if protected:
        first = torch.zeros_like(likeness)
        first[:, 0] = float("inf")
        likeness = likeness - first
    best, partner = likeness.max(dim=-1)
    # topk twice: an ONNX file has no stable sort
    away = best.topk(merged, dim=-1).indices
    places = torch.arange(even.shape[1], 0, -1, device=x.device, dtype=x.dtype).expand(best.shape)
    left = places.scatter(1, away, 0.0).topk(even.shape[1] - merged, dim=-1).indices  # in order
    width = x.shape[2]
    taken = even.gather(1, away[..., None].expand(-1, -1, width))
    into = partner.gather(1, away)
    sums = odd.scatter_add(1, into[..., None].expand(-1, -1, width), taken)
    sizes = torch.ones_like(odd[..., 0]).scatter_add(1, into, torch.ones_like(into, dtype=x.dtype))
    kept = even.gather(1, left[..., None].expand(-1, -1, width))
    return torch.cat((kept, sums / sizes[..., None]), dim=1), 2 * away


class _MergeFirst:
    """A block's hook: its tokens are merged before they enter."""

    def __init__(self, keep: int, protected: int):
        self.merging = TokenMerging(keep, protected)

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.merging(inputs[0]), *inputs[1:])


def reshape(module: nn.Module, surgery: Surgery) -> nn.Module:
    """Make room in a module for the weights of its cut version, in place; weights have to be loaded afterwards."""
    for name, (size, extra) in surgery.constants.items():
        replace_module(module, name, Constant(size, extra))
    for name, shape in surgery.shapes.items():
        parent, _, last = name.rpartition(".")
        owner = module.get_submodule(parent)
        old = getattr(owner, last, None)
        if isinstance(old, nn.Parameter) or old is None:
            dtype = old.dtype if old is not None else torch.float32
            setattr(owner, last, nn.Parameter(torch.zeros(shape, dtype=dtype)))
        else:
            setattr(owner, last, torch.zeros(shape, dtype=old.dtype))
    for name, values in surgery.attributes.items():
        for key, value in values.items():
            setattr(module.get_submodule(name), key, value)
    for name, (keep, protected) in surgery.merges.items():
        add_merging(module.get_submodule(name), keep, protected)
    module.surgery = surgery  # type: ignore[assignment]
    return module


def add_merging(block: nn.Module, keep: int, protected: int) -> None:
    """From now on the block's tokens are merged down to ``keep`` before they enter."""
    block.register_forward_pre_hook(_MergeFirst(keep, protected))


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    owner = root.get_submodule(parent)
    if isinstance(owner, (nn.Sequential, nn.ModuleList)):
        owner[int(last)] = new
    else:
        setattr(owner, last, new)
