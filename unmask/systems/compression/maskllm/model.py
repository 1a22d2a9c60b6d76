"""MaskLLM: learnable N:M sparsity (Fang et al. 2024, arXiv:2409.17481). The weights of a trained model are frozen; for each group
of M of them a distribution over the masks that keep N is learned through the model's own loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from unmask import config as configs
from unmask.config import Field, validated
from unmask.contracts import Batch, Compressed, DataFacts, Group, Losses, Picture, Progress, Trainable
from unmask.data.text import TextBatches, TextSettings, Tokenizer
from unmask.draw import Draw, Seeded
from unmask.errors import UserError
from unmask.models import UserModel, open_model
from unmask.models.perplexity import perplexity
from unmask.nn.losses import next_token_loss
from unmask.systems.compression.maskllm.calibrate import one_shot, statistics
from unmask.systems.compression.maskllm.files import load_masks, mask_file
from unmask.systems.compression.maskllm.gates import MaskedLinear
from unmask.systems.compression.maskllm.patterns import check_mask, read_pattern
from unmask.systems.compression.maskllm.pictures import certainty_picture
from unmask.systems.compression.maskllm.wrapping import unwrapped, wrapped

Prior = Literal["sparsegpt", "wanda", "magnitude", "none"]
ONE_SHOT = ("magnitude", "wanda", "sparsegpt", "sparsegpt with update")


def schedule(ends: tuple[float, float] | list[float], fraction: float) -> float:
    """From the first value to the second, linearly in the share of training done."""
    return ends[0] + (ends[1] - ends[0]) * fraction


class MaskLLM(Trainable):
    """Masks of a causal language model. ``network`` is the user's model with its linear layers wrapped."""

    slug = "maskllm"
    loss_units = "nats a token, less the weight regulariser"
    Data: ClassVar[Any] = TextSettings
    measures: ClassVar = {"perplexity": "perplexity, learned masks", "loss": "nats a token, learned masks"}
    lower_is_better = frozenset({"perplexity", "loss"})

    class Config(configs.Config):
        model: str = Field("", description="the trained model: a run of causal_lm, or a folder of transformers")
        pattern: str = Field("2:4", description="KEPT:GROUP; 2:4 is what GPUs accelerate")
        prior: Prior = Field("sparsegpt", description="the one-shot mask that learning starts from")
        masks: str = Field(
            "", description="start from masks of a file instead (.npz, .safetensors, .pt): transfer to new data"
        )
        prior_strength: float = Field(3.0, ge=0, description="weight of the prior, in spreads of the logits")
        scale: tuple[float, float] = Field((1e2, 5e2), description="factor of the logits, from start to end")
        temperature: tuple[float, float] = Field((4.0, 0.05), description="of the Gumbel softmax, from start to end")
        weight_reg: float = Field(1e-5, ge=0, description="reward for keeping large weights")
        fade_reg: bool = Field(
            True, description="the reward fades to nothing (the language code; the vision code keeps it)"
        )
        hard: bool = Field(False, description="sample one candidate, with the gradient of the soft mask")
        gate_std: float = Field(0.01, gt=0, description="spread of the logits at the start")
        lr_scale: float = Field(10.0, gt=0, description="rate of the logits / train.lr")
        train_weights: bool = Field(False, description="learn the weights along")
        calibration: int = Field(128, ge=1, description="samples that the one-shot masks look at")
        damping: float = Field(
            0.01, gt=0, description="SparseGPT: added to the Hessian's diagonal, in parts of its mean"
        )
        layers: str = Field(
            "", description="regular expression of the layers to mask; open: linear layers of repeated blocks"
        )
        recompute: bool = Field(False, description="recompute masks in the backward pass: less memory, more time")
        data: dict[str, Any] = Field({}, description="what it calibrates on; comes from the data settings")

        @property
        def keep_group(self) -> tuple[int, int]:
            return read_pattern(self.pattern)

    def __init__(self, config: configs.Config):
        super().__init__(config)
        c: Any = config
        self.keep, self.group = c.keep_group
        self.user = self.opened(c)
        self.network = self.user.module
        self.network.requires_grad_(c.train_weights)
        self.masked: dict[str, MaskedLinear] = wrapped(self.network, self.keep, self.group, c.layers, c.gate_std)
        self.register_buffer("prepared", torch.zeros((), dtype=torch.bool))

    # --- construction ---
    @classmethod
    def opened(cls, config: Any) -> UserModel:
        """The model to mask. Raises ``UserError`` for one that is not what this class masks."""
        if not config.model:
            raise UserError(
                "maskllm needs a trained model: model=RUN (a run of causal_lm, or a folder of transformers)"
            )
        found = open_model(config.model)
        if found.kind != "causal lm":
            raise UserError(
                f"{config.model} is a {found.kind}, and this recipe masks language models: use --recipe vision"
            )
        return found

    @classmethod
    def recipe_for(cls, model: UserModel) -> str:
        """The recipe for a user's model: masks of an image classifier are learned otherwise than those of a language model."""
        return "vision" if model.kind == "image classifier" else "tiny"

    @classmethod
    def build(cls, config: Any, sources: Mapping[str, Path] | None = None) -> MaskLLM:
        if sources and "model" in sources:
            config = config.model_copy(update={"model": str(sources["model"])})
        return cls(config)

    @classmethod
    def open_batches(cls, config: Any, data: Any, batch_size: int, seed: int) -> Any:
        """Text cut by the model's own tokenizer; where the model is trained in an earlier stage, by the data's."""
        own = _tokenizer(config.model) if config.model else None
        return TextBatches(data, batch_size, seed, tokenizer=own)

    @classmethod
    def adapted(cls, config: Any, facts: DataFacts) -> Any:
        return config.model_copy(update={"data": config.data or dict(facts.extra.get("settings") or {})})

    def parameter_groups(self, phase: str = "main", layer_decay: float = 1.0) -> list[Group]:
        """The logits with their own rate, decay and all; the weights where they are learned."""
        gates = {n: p for n, p in self.named_parameters() if n.endswith("diff_mask.gate")}
        groups = [Group(list(gates), list(gates.values()), self.config.lr_scale, 1.0)]
        rest = {n: p for n, p in self.named_parameters() if p.requires_grad and n not in gates}
        for decay, chosen in (
            (1.0, [n for n, p in rest.items() if p.ndim > 1]),
            (0.0, [n for n, p in rest.items() if p.ndim < 2]),
        ):
            if chosen:
                groups.append(Group(chosen, [rest[n] for n in chosen], 1.0, decay))
        return groups

    # --- priors ---
    @torch.no_grad()
    def prepare(self) -> None:
        """Lean the logits towards the prior masks; once, before the first step. Raises ``UserError``."""
        if bool(self.prepared):
            return
        config = self.config
        priors: dict[str, Tensor] = {}
        if config.masks:
            shapes = {n: tuple(layer.dense.shape) for n, layer in self.masked.items()}
            found = load_masks(Path(config.masks), shapes)
            priors = {n: m.T if self.masked[n].transposed else m for n, m in found.items()}
        elif config.prior != "none":
            priors = {n: p.mask for n, p in self.one_shot(config.prior).items()}
        for name, mask in priors.items():
            check_mask(mask, self.keep, self.group, name)
            self.masked[name].diff_mask.add_prior(mask, config.prior_strength)
        self.prepared.fill_(True)

    @torch.no_grad()
    def one_shot(self, method: str) -> dict[str, Any]:
        """Masks (and weights) of every layer by ``method`` of ``ONE_SHOT``, from one pass of the dense model over the calibration
        samples: name -> ``priors.Pruned``."""
        known = None
        if method != "magnitude":
            with self.using(None):
                known = statistics(self.masked, self.calibration(), self.answer)
        weights = {n: layer.matrix for n, layer in self.masked.items()}
        return one_shot(method, weights, known, (self.keep, self.group), self.config.damping)

    def calibration(self) -> list[Batch]:
        """The first batches of the training data, in the order of seed 0."""
        if not self.config.data:
            raise UserError("maskllm has no data to calibrate on: train it with --data, or give prior=magnitude")
        settings = validated(TextSettings, self.config.data, where="data")
        batches = TextBatches(settings, 1, tokenizer=self._own_tokenizer())
        count = min(self.config.calibration, batches.count)
        order = batches.order(0)[:count]
        return [batches.fetch(order[i : i + 16]) for i in range(0, count, 16)]

    def _own_tokenizer(self) -> Tokenizer | None:
        text = self.side_files.get("tokenizer.json")
        return Tokenizer.from_text(text) if text else _tokenizer(self.config.model)

    # --- learning ---
    def answer(self, batch: Batch) -> Tensor:
        """The network's logits."""
        return self.user.logits(batch)

    def task(self, batch: Batch, draw: Draw) -> Tensor:
        """The model's own loss."""
        total, count = next_token_loss(self.answer(batch), batch)
        return total / count

    def loss(self, batch: Batch, draw: Draw, progress: Progress | None = None, phase: str = "main") -> Losses:
        """Task loss - weight_reg * (1 - t / T) * sum of (W * mask)^2, with masks sampled for this step (section 3.2)."""
        self.prepare()
        fraction = progress.fraction if progress is not None else 0.0
        c = self.config
        scale, temperature = schedule(c.scale, fraction), schedule(c.temperature, fraction)
        kept: Tensor = torch.zeros((), device=next(iter(self.masked.values())).dense.device)
        for layer in self.masked.values():
            mask = layer.draw_mask(draw, scale, temperature, hard=c.hard, recompute=c.recompute)
            kept = kept + (layer.matrix.detach().float() * mask).square().sum()
        task = self.task(batch, draw)
        loss = task - c.weight_reg * ((1 - fraction) if c.fade_reg else 1.0) * kept
        certain = torch.stack([layer.diff_mask.certainty(scale, temperature) for layer in self.masked.values()]).mean()
        return {"loss": loss, "task": task, "certainty": certain}

    @torch.no_grad()
    def references(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> Losses:
        """The model as it was, and the prior's mask, on the same batch."""
        with self.using(None):
            return {"the dense model": self.task(batch, Seeded(0))}

    def preview(self, batch: Batch, draw: Draw, progress: Progress | None = None) -> list[Picture]:
        self.prepare()
        fraction = progress.fraction if progress is not None else 1.0
        scale, temperature = schedule(self.config.scale, fraction), schedule(self.config.temperature, fraction)
        return [certainty_picture(self.masked, scale, temperature)]

    # --- using masks ---
    @contextmanager
    def using(self, masks: Mapping[str, Tensor] | None, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """While inside, the layers take these masks (None: the dense model), and these ``[out, in]`` weights instead of theirs."""
        for name, layer in self.masked.items():
            layer.fixed = (layer.matrix if not weights else weights[name]) * (1 if masks is None else masks[name])
        try:
            yield
        finally:
            for layer in self.masked.values():
                layer.fixed = None

    def final_masks(self) -> dict[str, Tensor]:
        """The likeliest mask of every layer, ``[out, in]``."""
        self.prepare()
        return {name: layer.diff_mask.final() for name, layer in self.masked.items()}

    def measure(
        self,
        data: Any,
        draw: Draw,
        *,
        limit: int | None = None,
        device: torch.device | None = None,
        tell: Callable[[str], None] | None = None,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        """The learned masks on test data, beside the dense model and the one-shot masks of the same pattern."""
        self.prepare()
        score = self.scorer(data, limit, device)
        out: dict[str, Any] = {}
        with self.using(self.final_masks()):
            own = score()
        out.update({k: v for k, v in own.items() if k != "baseline"})
        out["baseline"] = {}
        with self.using(None):
            out["baseline"]["dense"] = self.kept(score())
        for method in ONE_SHOT:
            if tell is not None:
                tell(f"masks by {method} ...")
            found = self.one_shot(method)
            moved = {n: p.weight for n, p in found.items()} if "update" in method else {}
            with self.using({n: p.mask for n, p in found.items()}, moved):
                out["baseline"][method] = self.kept(score())
        return out

    def kept(self, numbers: Mapping[str, Any]) -> dict[str, float]:
        return {k: numbers[k] for k in self.measures if k in numbers}

    def scorer(self, data: Any, limit: int | None, device: torch.device | None) -> Callable[[], dict[str, Any]]:
        settings = data.model_copy(update={"limit": limit or data.limit})
        batches = TextBatches(settings, 1, tokenizer=self._own_tokenizer())
        return lambda: perplexity(self.answer, batches, device)

    def finish(self) -> Compressed:
        """The model with its masked weights at zero, and the masks in its report."""
        self.prepare()
        masks = self.final_masks()
        report: dict[str, Any] = {"pattern": self.config.pattern, "layers": list(masks), "prior": self.config.prior}
        dense = sum(layer.dense.numel() * layer.dense.element_size() for layer in self.masked.values())
        report["bytes"] = {  # of the masked layers: kept values, and one bit a weight that says which
            "dense": dense,
            "masked": int(dense * self.keep / self.group + sum(m.numel() for m in masks.values()) / 8),
        }
        report["kept"] = float(sum(m.sum() for m in masks.values()) / max(sum(m.numel() for m in masks.values()), 1))
        own = {n: m.T if self.masked[n].transposed else m for n, m in masks.items()}
        model = unwrapped(self.opened(self.config).module, self.network, masks)
        return Compressed(model, report, {"mask_compressed.npz": mask_file(own)})


def _tokenizer(model: str) -> Tokenizer | None:
    """The tokenizer beside a model. Raises ``UserError`` where there is none."""
    return Tokenizer.load(model)
