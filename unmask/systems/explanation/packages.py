"""Other people's methods behind the same interface: the ``lime`` package, and captum's attributions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from unmask.config import Config, Field
from unmask.contracts import Attribution, Preprocessing
from unmask.draw import Draw
from unmask.errors import MissingExtra, UserError
from unmask.models import UserModel
from unmask.systems.explanation.perturbing import LimeSettings, likeliest, picture_of
from unmask.systems.explanation.regions import checked, count_of, painted
from unmask.systems.explanation.talk import rate

Talk = Callable[[str], None]


class LimePackage:
    """The ``lime`` package as it is (``LimeImageExplainer``); hidden regions get one colour."""

    class Config(LimeSettings):
        pass

    def __init__(self, config: Any = None):
        self.config: Any = config or self.Config()

    def explain(
        self, model: UserModel, image: Tensor, target: int | None, draw: Draw, *, tell: Talk | None = None
    ) -> Attribution:
        """Heat: each region's weight. Raises ``MissingExtra`` without the package, ``UserError`` for a masking it does not have."""
        try:
            from lime.lime_image import LimeImageExplainer
        except ImportError:
            raise MissingExtra("the method lime", "lime", "explain") from None
        import time

        c = self.config
        known = model.preprocessing or Preprocessing(channels=image.shape[0])
        colours = {"grey": _mean_colour(known), "black": (0.0,) * 3, "white": (1.0,) * 3, "mean": None}
        if c.masking not in colours:
            known_words = ", ".join(colours)
            raise UserError(
                f"the lime package hides with {known_words}, not {c.masking}: the method {c.masking} is LIME with it"
            )
        if image.shape[0] not in (1, 3):
            raise UserError(
                f"the lime package takes pictures of 1 or 3 channels, not {image.shape[0]}: method=grey is LIME, too"
            )
        label = int(likeliest(model, image).argmax()) if target is None else target
        segments = checked(c.segments(picture_of(image, model.preprocessing))).cpu()
        mean, std = (torch.tensor(v)[:, None, None] for v in (known.mean, known.std))
        pixels = (image.cpu() * std + mean).expand(3, -1, -1).permute(1, 2, 0).double().numpy()
        seen, started = [0], time.monotonic()

        def answer(pictures: Any) -> np.ndarray:
            batch = torch.from_numpy(np.stack(pictures)).float().permute(0, 3, 1, 2)[:, : image.shape[0]]
            with torch.no_grad():
                found = model.scores(image=((batch - mean) / std).to(image.device)).float().softmax(dim=1)
            seen[0] += len(batch)
            if tell is not None:
                tell(rate(seen[0], c.samples, started))
            return found.cpu().double().numpy()

        state = int(draw.integers("lime", 0, 2**31 - 1, (1,), shared=True))
        with _without_bar():
            explained = LimeImageExplainer(c.kernel_width, random_state=state).explain_instance(
                pixels,
                answer,
                labels=(label,),
                top_labels=None,
                hide_color=colours[c.masking],
                num_samples=c.samples,
                batch_size=c.batch_size,
                segmentation_fn=lambda _: segments.numpy(),
                num_features=count_of(segments),
            )
        weights = torch.zeros(count_of(segments))
        for region, value in explained.local_exp[label]:
            weights[region] = float(value)
        score = explained.score[label] if isinstance(explained.score, dict) else explained.score
        notes = {"r2": float(score), "regions": count_of(segments), "samples": c.samples, "masking": c.masking}
        return Attribution(painted(weights, segments), label, {**notes, "weights": weights, "segments": segments})


@contextmanager
def _without_bar() -> Iterator[None]:
    """The package draws a bar of its own; the progress is told by us."""
    from lime import lime_image

    before = lime_image.tqdm
    lime_image.tqdm = lambda rows, *_, **__: rows
    try:
        yield
    finally:
        lime_image.tqdm = before


def _mean_colour(known: Preprocessing) -> tuple[float, ...]:
    return tuple(known.mean) if len(known.mean) == 3 else (known.mean[0],) * 3


class CaptumMethod:
    """One of captum's attributions; the baseline is grey (zero behind standardisation). Heat is summed over channels."""

    name: ClassVar[str] = ""

    class Config(Config):
        steps: int = Field(32, ge=2, description="of integrated_gradients")
        samples: int = Field(16, ge=1, description="noises of gradient_shap, evaluations per hundred of kernel_shap")
        window: int | None = Field(None, ge=1, description="pixels of occlusion's square; open: 1/7 of the height")
        stride: int | None = Field(None, ge=1, description="pixels that the square moves; open: half of it")
        layer: str = Field("", description="module of gradcam; open: the last convolution")

    def __init__(self, config: Any = None):
        self.config: Any = config or self.Config()

    def explain(
        self, model: UserModel, image: Tensor, target: int | None, draw: Draw, *, tell: Talk | None = None
    ) -> Attribution:
        try:
            import captum.attr as attr
        except ImportError:
            raise MissingExtra(f"the method {self.name}", "captum", "explain") from None
        label = int(likeliest(model, image).argmax()) if target is None else target
        frozen = [p for p in model.module.parameters() if p.requires_grad]
        state = int(draw.integers("captum", 0, 2**31 - 1, (1,), shared=True))
        for parameter in frozen:
            parameter.requires_grad_(False)
        rectifiers = [m for m in model.module.modules() if getattr(m, "inplace", False) is True]
        for module in rectifiers:
            module.inplace = False  # type: ignore[assignment]
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
                warnings.simplefilter("ignore")
                torch.manual_seed(state)
                heat = self._heat(attr, _Scores(model), image[None].detach().clone().requires_grad_(True), label)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"captum's {self.name} does not work on {model.name}: {lines[0][:160]}") from None
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for module in rectifiers:
                module.inplace = True  # type: ignore[assignment]
        return Attribution(heat.detach()[0].sum(dim=0).cpu(), label, {})

    def _heat(self, attr: Any, scores: nn.Module, x: Tensor, label: int) -> Tensor:
        c, height = self.config, x.shape[2]
        if self.name == "integrated_gradients":
            return attr.IntegratedGradients(scores).attribute(x, target=label, n_steps=c.steps, internal_batch_size=8)
        if self.name == "saliency":
            return attr.Saliency(scores).attribute(x, target=label)
        if self.name == "input_x_gradient":
            return attr.InputXGradient(scores).attribute(x, target=label)
        if self.name == "guided_backprop":
            return attr.GuidedBackprop(scores).attribute(x, target=label)
        if self.name == "deconvolution":
            return attr.Deconvolution(scores).attribute(x, target=label)
        if self.name == "deep_lift":
            return attr.DeepLift(scores).attribute(x, target=label)
        if self.name == "gradient_shap":
            noise = torch.zeros_like(x).detach()
            return attr.GradientShap(scores).attribute(x, noise, n_samples=c.samples, stdevs=0.1, target=label)
        if self.name == "smooth_grad":
            tunnel = attr.NoiseTunnel(attr.Saliency(scores))
            return tunnel.attribute(x, nt_samples=c.samples, nt_samples_batch_size=4, stdevs=0.15, target=label)
        if self.name == "occlusion":
            side = c.window or max(height // 7, 1)
            step = c.stride or max(side // 2, 1)
            shape = (x.shape[1], side, side)
            with torch.no_grad():
                return attr.Occlusion(scores).attribute(
                    x, shape, strides=(x.shape[1], step, step), target=label, perturbations_per_eval=16
                )
        if self.name in ("feature_ablation", "kernel_shap"):
            from unmask.systems.explanation.regions import squares

            mask = squares(tuple(x.shape[-2:]), max(height // 7, 1))[None, None].to(x.device)
            with torch.no_grad():
                if self.name == "kernel_shap":
                    return attr.KernelShap(scores).attribute(
                        x, target=label, feature_mask=mask, n_samples=100 * c.samples // 4, perturbations_per_eval=32
                    )
                return attr.FeatureAblation(scores).attribute(
                    x, target=label, feature_mask=mask, perturbations_per_eval=16
                )
        if self.name == "gradcam":
            layer = _layer(scores, c.layer)
            found = attr.LayerGradCam(scores, layer).attribute(x, target=label)
            return attr.LayerAttribution.interpolate(found, tuple(x.shape[-2:]), "bilinear")
        raise AssertionError(self.name)


class _Scores(nn.Module):
    """A user's model as captum calls one."""

    def __init__(self, model: UserModel):
        super().__init__()
        self.module, self.model = model.module, model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.scores(image=x)


def _layer(scores: nn.Module, name: str) -> nn.Module:
    """The module that Grad-CAM looks at. Raises ``UserError`` for an unknown name and for a network without late convolutions."""
    from unmask.errors import nearest

    modules = dict(scores.module.named_modules())  # type: ignore[union-attr]
    if name:
        if name not in modules:
            raise UserError(f"gradcam: no module {name!r}: {nearest(name, modules)}")
        return modules[name]
    convolutions = [m for m in modules.values() if isinstance(m, nn.Conv2d)]
    if len(convolutions) < 2:
        raise UserError(
            "gradcam reads the last convolution, and this model has one at its entrance only: gradcam.layer=NAME"
        )
    return convolutions[-1]


CAPTUM = {
    "integrated_gradients": "gradients along the way from grey to the image",
    "saliency": "size of the gradient at each pixel",
    "input_x_gradient": "gradient times pixel",
    "gradient_shap": "gradients between noisy copies and grey",
    "smooth_grad": "size of the gradient, averaged over noisy copies",
    "guided_backprop": "gradients through positive signals only",
    "deconvolution": "signals sent back through the rectifiers",
    "deep_lift": "differences to grey, sent back layer by layer",
    "gradcam": "the last convolution's maps, weighted by their gradients",
    "occlusion": "a grey square moved over the image",
    "feature_ablation": "grey squares, one at a time",
    "kernel_shap": "Shapley values of grey squares, by sampling",
}


def captum_method(method: str) -> type[CaptumMethod]:
    """The explainer of one of captum's methods."""
    return type("".join(p.title() for p in method.split("_")), (CaptumMethod,), {"name": method})
