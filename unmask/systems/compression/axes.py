"""The axes of tensors as a graph is followed: which channels they carry, and what a reshape makes of them."""

from __future__ import annotations

from dataclasses import dataclass, field


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _words(
    """
    relu relu_ gelu gelu_ silu silu_ sigmoid sigmoid_ tanh tanh_ hardswish hardswish_ hardsigmoid
    hardsigmoid_ hardtanh hardtanh_ leaky_relu leaky_relu_ elu elu_ dropout dropout_ feature_dropout clone
    contiguous detach detach_ alias to _to_copy clamp clamp_ clamp_min neg abs exp sqrt rsqrt pow square
    lift_fresh_copy softplus mish mish_ logical_not type_as erf alpha_dropout relu6 relu6_ celu selu
    log_sigmoid max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool1d avg_pool1d
    adaptive_avg_pool1d upsample_bilinear2d upsample_nearest2d upsample_bicubic2d constant_pad_nd pad
    _assert_tensor_metadata
    """
)
BINARY = _words(
    """
    add add_ sub sub_ mul mul_ div div_ maximum minimum where masked_fill masked_fill_ rsub
    """
)
MOVES = _words(
    """
    view reshape _unsafe_view permute transpose t contiguous clone expand unsqueeze squeeze select slice
    unbind getitem split split_with_sizes chunk alias detach to _to_copy dropout flatten unflatten
    lift_fresh_copy
    """
)


@dataclass(eq=False)
class Space:
    """One set of channels. roles: (parameter or buffer, its axis, "out" | "with" | "in", copies of each channel)."""

    size: int
    roles: list[tuple[str, int, str, int]] = field(default_factory=list)
    frozen: str = ""
    parent: Space | None = None
    order: int = 0

    def root(self) -> Space:
        here = self
        while here.parent is not None:
            here = here.parent
        return here

    def freeze(self, reason: str) -> None:
        root = self.root()
        root.frozen = root.frozen or reason


def join(a: Space, b: Space) -> Space:
    """Both are one from now on."""
    a, b = a.root(), b.root()
    if a is b:
        return a
    if a.size != b.size:
        a.freeze("joined with another width")
        b.freeze("joined with another width")
        return a
    if b.order < a.order:
        a, b = b, a
    b.parent = a
    a.roles += b.roles
    a.frozen = a.frozen or b.frozen
    return a


Label = tuple[Space, int] | None  # a space, and how many places in a row belong to each channel


def reshaped(labels: list[Label], old: tuple[int, ...], new: tuple[int, ...]) -> list[Label]:
    """Labels after a view: axes that stay keep them; a flattening with the channels outermost repeats them; every other
    split or merge freezes the space."""
    out: list[Label] = [None] * len(new)
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = 1, 1
        left: list[int] = []
        right: list[int] = []
        while True:
            if (
                a == b
                and (left or right)
                and (a > 1 or (i >= len(old) or j >= len(new)) or (old[i] != 1 and new[j] != 1))
            ):
                break
            if a <= b and i < len(old):
                a *= old[i]
                left.append(i)
                i += 1
            elif j < len(new):
                b *= new[j]
                right.append(j)
                j += 1
            else:
                break
        big_left = [k for k in left if old[k] > 1]
        big_right = [k for k in right if new[k] > 1]
        marked = [k for k in big_left if labels[k] is not None]
        if len(big_left) == 1 and len(big_right) == 1:
            out[big_right[0]] = labels[big_left[0]]
        elif len(big_right) == 1 and marked == big_left[:1]:
            label = labels[big_left[0]]
            inner = 1
            for k in big_left[1:]:
                inner *= old[k]
            out[big_right[0]] = (label[0], label[1] * inner) if label is not None else None
        else:
            for k in marked:
                label = labels[k]
                assert label is not None
                label[0].freeze("is split into heads or parts")
    return out
