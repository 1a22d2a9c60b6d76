"""OPTIN: pruning by trajectories, in one shot. Khaki and Plataniotis, ICLR 2024, arXiv:2403.17921.

Hide one head, one MLP neuron, one convolution channel (or one token) at a time, run one batch, and measure how far the later
layers' features and the answers move. Rank all of them, and keep the best set that fits the budget. No gradients, no training.

    smaller = OPTIN(OPTIN.Config()).compress(open_model("timm/vit_tiny_patch16_224"), batches, parse_budget("macs=0.6"), Seeded(0))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from unmask import config as configs
from unmask.config import Field
from unmask.contracts import Batch, Budget, Compressed
from unmask.draw import Draw, permutation
from unmask.errors import UserError
from unmask.models import UserModel
from unmask.official.reshaped import add_merging
from unmask.systems.compression import baselines
from unmask.systems.compression.allocate import Frame
from unmask.systems.compression.optin import ranking
from unmask.systems.compression.optin.channels import ChannelTrajectories
from unmask.systems.compression.optin.importance import Setting, Trajectories
from unmask.systems.compression.optin.scores import Factors, fisher_scores, scored
from unmask.systems.compression.optin.tokens import schedule, token_terms
from unmask.systems.compression.structure import Structure, Units, find_structure
from unmask.systems.compression.surgery import check_cut, cut

Unit = Literal["heads", "neurons", "channels", "tokens"]
HEAD_WEIGHT, NEURON_WEIGHT = 10.0, 100.0  # how much more the first unit counts, where positions are weighted


class OPTIN:
    """``compress`` returns a smaller copy; ``Compressed.report["importance"]`` holds what was found."""

    slug = "optin"

    class Config(configs.Config):
        loss_type: Literal["MMD", "KL", "MMD+KL"] = Field("MMD+KL", description="which terms a score has")
        aggregate: Literal["sum", "mean"] = Field("sum", description="over the entries of the Gram matrices")
        feature: Literal["auto", "mlp", "input", "attention", "hidden"] = Field(
            "auto",
            description="what of a block is compared; auto: its MLP's output (text), its attention's input (images)",
        )
        contribution: float = Field(10.0, gt=0, description="how many times MD is to outweigh the KL (lambda)")
        temperature: float = Field(4.0, gt=0, description="T; the KL counts T^2 times")
        divide_logits_by_t: bool = Field(False, description="divide the logits by T, as distillation does")
        sample_rows: int = Field(768, ge=2, description="rows of the features that are compared (K)")
        resample_rows: bool = Field(False, description="other rows for every comparison (the released code)")
        head_include_last_layer: bool = Field(
            True, description="the last layer's heads are compared by its own feature"
        )
        neuron_include_last_layer: bool = Field(True, description="the same for neurons and channels")
        last_layer_factor_head: float = Field(0.5, gt=0)
        last_layer_factor_neuron: float = Field(0.5, gt=0)
        head_factor: float = Field(0.5, gt=0)
        neuron_factor: float = Field(1.0, gt=0)
        index_weighting: bool = Field(False, description="the first units count more, by position (the released code)")
        carry_head_masks: bool = Field(
            False, description="earlier layers run without their last head (the released code)"
        )
        units: tuple[Unit, ...] = Field(("heads", "neurons", "channels"), description="what is cut; tokens are merged")
        allocation: Literal["global", "uniform"] = Field(
            "global", description="uniform: the same number in every layer"
        )
        counts: Literal["model", "layers"] = Field(
            "model", description="the budget is of the whole model, or of its heads and neurons alone (the paper)"
        )
        sequence_length: float | None = Field(
            None, gt=0, description="tokens that costs are counted for; open: the data's"
        )
        token_share: float = Field(
            0.5, gt=0, lt=1, description="share of the saving that tokens bring, where they are units"
        )
        calibration: int = Field(128, ge=1, description="samples of the one batch")
        importance: Literal["trajectory", "fisher", "magnitude", "random"] = Field(
            "trajectory", description="OPTIN's score, or one that it is compared with, under the same search"
        )
        search: Literal["fast", "plain"] = Field(
            "fast", description="plain: one full pass a unit, as the released code"
        )
        candidates: int = Field(0, ge=0, description="units in one pass; 0: as many as suit")
        ranking: str | None = Field(None, description="a ranking file (.json, .safetensors) instead of measuring")
        cache: bool = Field(True, description="keep scores under $UNMASK_CACHE, by all options, model and data")

        @model_validator(mode="after")
        def _units(self) -> OPTIN.Config:
            if not set(self.units) - {"tokens"}:
                raise ValueError("tokens alone save nothing that heads and neurons cannot: add heads or neurons")
            return self

    def __init__(self, config: OPTIN.Config | None = None):
        self.config = config or self.Config()

    # --- the verb ---
    def compress(
        self,
        model: UserModel,
        data: Iterable[Batch],
        budget: Budget,
        draw: Draw,
        *,
        tell: Callable[[str], None] | None = None,
    ) -> Compressed:
        """A smaller copy of the model. data: batches to calibrate on, the first ``calibration`` samples are taken.

        Raises ``UserError``: a budget out of reach, nothing to cut, an empty batch, a ranking of another shape.
        """
        c = self.config
        structure = self._chosen(find_structure(model))
        batch = calibration_batch(data, c.calibration)
        began = time.monotonic()
        scores, tokens = self.scores(model, structure, batch, draw, tell=tell)
        frame = Frame(model, structure, budget, batch, c.sequence_length, c.counts, c.allocation == "uniform")
        if tokens is not None:
            smaller, keep, kept_tokens = self._with_tokens(frame, scores, tokens)
        else:
            keep, kept_tokens = frame.keep(scores), None
            smaller = cut(model, keep)
        if kept_tokens is None:
            check_cut(model, smaller, keep)
        told = {
            "seconds": round(time.monotonic() - began, 2),
            "budget": {"kind": budget.kind, "target": frame.target, "before": frame.before},
            "layers": [
                {"name": u.name, "kind": u.kind, "block": u.block, "scores": s.tolist(), "kept": keep[u].tolist()}
                for u, s in scores.items()
            ],
            "refused": structure.refused,
            "tokens": kept_tokens,
        }
        return Compressed(smaller, {"importance": told})  # type: ignore[arg-type]

    def _chosen(self, found: Structure) -> Structure:
        units = self.config.units
        heads = found.heads if "heads" in units else []
        neurons = found.neurons if "neurons" in units else []
        channels = found.channels if "channels" in units else []
        if not (heads or neurons or channels):
            raise UserError(f"the model has none of the units {', '.join(units)}: {_some(found.refused)}")
        if "neurons" not in units and found.neurons and not channels:
            raise UserError("units: heads without neurons are not searched: give units=[heads,neurons]")
        return Structure(heads, neurons, channels, found.refused, found.layers)

    # --- scores ---
    def scores(
        self,
        model: UserModel,
        structure: Structure,
        batch: Batch,
        draw: Draw,
        *,
        tell: Callable[[str], None] | None = None,
    ) -> tuple[dict[Units, Tensor], Tensor | None]:
        """Each unit's score (at most 0, the lowest the most important), and the tokens' ``[L, N]`` where they are asked for."""
        c = self.config
        if c.ranking is not None:
            return ranking.read_ranking(Path(c.ranking), structure.all()), None
        if c.importance == "random":
            return baselines.random_scores(draw, structure), None
        if c.importance == "magnitude":
            return baselines.magnitude_scores(model, structure), None
        inputs = model.inputs(batch)
        if c.importance == "fisher":
            return fisher_scores(model, structure.all(), batch, inputs), None
        rows = self._rows(draw, self._row_count(model, inputs, structure))
        path = ranking.cached(ranking.key_of({"v": 1, **c.plain()}, model, inputs, rows))
        if c.cache and not c.resample_rows and (found := ranking.recall(path, structure.all())) is not None:
            if tell is not None:
                tell("scores of the same model, data and options are at hand")
            return found[0], found[1].get("tokens")
        scores, tokens = self._measured(model, structure, inputs, rows, draw, tell)
        if c.cache and not c.resample_rows:
            ranking.remember(path, scores, {} if tokens is None else {"tokens": tokens})
        return scores, tokens

    def _measured(
        self,
        model: UserModel,
        structure: Structure,
        inputs: dict[str, Tensor],
        rows: Tensor | None,
        draw: Draw,
        tell: Callable[[str], None] | None,
    ) -> tuple[dict[Units, Tensor], Tensor | None]:
        c = self.config
        setting = self.setting(model, rows, draw)
        out: dict[Units, Tensor] = {}
        tokens = None
        if structure.transformer:
            work = Trajectories(model, structure, inputs, setting)
            for kind, layers in (("head", work.heads), ("neuron", work.neurons)):
                present = [u for u in layers if u is not None]
                if not present:
                    continue
                md, kl = work.run(kind, c.search, _teller(tell, f"{kind}s"))
                score = scored(md, kl, c.loss_type, c.contribution, self.factors(kind))
                out |= {u: score[i, : u.count] for i, u in enumerate(layers) if u is not None}
            if "tokens" in c.units:
                tokens = self._token_scores(model, work, tell)
        elif "tokens" in c.units:
            raise UserError(f"{model.name} has no tokens to merge: leave units=tokens out")
        if structure.channels:
            convolutions = ChannelTrajectories(
                model, structure.channels, inputs, setting, lambda n: self._rows(draw, n)
            )
            terms = convolutions.run(c.search, _teller(tell, "channels"))
            # one list of factors runs through all layers, as they are visited
            md, kl = torch.cat([m for m, _ in terms]), torch.cat([k for _, k in terms])
            flat = scored(md[None], kl[None], c.loss_type, c.contribution, Factors(c.neuron_factor))[0]
            parts = list(flat.split([u.count for u in structure.channels]))
            parts[-1] = parts[-1] * c.last_layer_factor_neuron
            out |= dict(zip(structure.channels, parts, strict=True))
        return out, tokens

    def setting(self, model: UserModel, rows: Tensor | None, draw: Draw) -> Setting:
        """The options as the terms need them."""
        c = self.config
        position = c.feature if c.feature != "auto" else "mlp" if model.text else "input"
        return Setting(
            position=position,
            aggregate=c.aggregate,
            temperature=c.temperature,
            divide=c.divide_logits_by_t,
            head_last=c.head_include_last_layer,
            neuron_last=c.neuron_include_last_layer,
            need_md=c.loss_type != "KL",
            need_kl="KL" in c.loss_type,
            once_more=c.loss_type == "MMD",
            carry=c.carry_head_masks,
            resample=_Resampled(draw, rows) if c.resample_rows and rows is not None else None,
            rows=rows,
            group=c.candidates,
        )

    def factors(self, kind: str) -> Factors:
        c = self.config
        if kind == "head":
            return Factors(c.head_factor, c.last_layer_factor_head, HEAD_WEIGHT if c.index_weighting else 1.0)
        return Factors(c.neuron_factor, c.last_layer_factor_neuron, NEURON_WEIGHT if c.index_weighting else 1.0)

    def _rows(self, draw: Draw, count: int) -> Tensor | None:
        """The compared rows of ``count``; None where all are."""
        if count <= self.config.sample_rows:
            return None
        return permutation(draw, "row_permutation", (count,))[: self.config.sample_rows]

    def _row_count(self, model: UserModel, inputs: dict[str, Tensor], structure: Structure) -> int:
        if not structure.transformer:
            return 0
        work = Trajectories(model, structure, inputs, Setting())
        feature = work.base().features[0]
        return feature.shape[:-1].numel()

    # --- tokens ---
    def _token_scores(self, model: UserModel, work: Trajectories, tell: Callable[[str], None] | None) -> Tensor:
        if model.text:
            raise UserError(f"{model.name} reads text with a mask a token: tokens are merged in image models only")
        c = self.config
        md, kl = token_terms(work, protected_tokens(model), _teller(tell, "tokens"))
        score = torch.full_like(md, -torch.inf)
        known = md > -torch.inf
        flat = scored(md[known][None], kl[known][None], c.loss_type, c.contribution, Factors(c.head_factor))[0]
        score[known] = flat
        score[-1] *= c.last_layer_factor_head
        return score

    def _with_tokens(
        self, frame: Frame, scores: dict[Units, Tensor], tokens: Tensor
    ) -> tuple[UserModel, dict[Units, Tensor], list[int]]:
        """Tokens first, until their share of the saving is gone; heads and neurons pay for the rest, with costs at the mean
        of the lengths. What the mean leaves over the budget is taken off and searched again."""
        if frame.budget.kind != "macs":
            raise UserError(f"tokens have a price in MACs, not in {frame.budget.kind}: give a budget macs=...")
        blocks, count = frame.structure.blocks, tokens.shape[1]
        protected = protected_tokens(frame.model)

        def cost(lengths: list[int]) -> float:
            total = 0.0
            for n in lengths:
                one = frame.unit_costs("macs", float(n))
                assert one is not None
                total += one.heads * one.head + one.neurons * one.neuron
            return total

        if frame.unit_costs("macs") is None:
            raise UserError(f"{frame.model.name} has layers of several widths: tokens are merged where all are alike")
        kept = schedule(tokens, (frame.before - frame.target) * self.config.token_share, cost)
        mean = sum(kept) / len(kept)
        target = frame.target
        for _ in range(6):
            inner = Frame(frame.model, frame.structure, Budget("macs", target, relative=False), frame.batch, mean)
            costs = inner.unit_costs("macs")
            assert costs is not None
            fixed = frame.before - cost([count] * len(blocks))
            keep = inner._searched(scores, max(target - fixed, costs.head), costs)
            smaller = cut(frame.model, keep)
            lengths = [count, *kept[:-1]]
            for path, n, before in zip(blocks, kept, lengths, strict=True):
                if n < before:
                    add_merging(smaller.module.get_submodule(path), n, protected)
                    smaller.surgery.merges[path] = [n, protected]
            over = frame.cost(smaller) - frame.target
            if over <= 1e-6 * frame.target:
                return smaller, keep, kept
            target -= over * 1.02
        raise UserError(f"budget macs={frame.budget.amount:g} cannot be reached with tokens: leave units=tokens out")


class _Resampled:
    """Other rows at every comparison."""

    def __init__(self, draw: Draw, rows: Tensor):
        self.draw, self.keep, self.turn = draw, len(rows), 0
        self.count = int(rows.max()) + 1

    def __call__(self) -> Tensor:
        self.turn += 1
        return permutation(self.draw, f"row_permutation_{self.turn}", (self.count,))[: self.keep]


def protected_tokens(model: UserModel) -> int:
    """1 where token 0 is a class token. Raises ``UserError`` for models whose tokens have neighbours by place."""
    module: Any = model.module
    owner = module.encoder if hasattr(module, "encoder") and hasattr(module.encoder, "prefix_tokens") else module
    owner = getattr(owner, "model", owner)
    if getattr(owner, "rel_pos_bias", None) is not None or getattr(owner, "block_biases", None) is not None:
        raise UserError(f"{model.name} has relative positions, which merged tokens do not have: leave units=tokens out")
    prefix = int(getattr(owner, "num_prefix_tokens", getattr(owner, "prefix_tokens", 0)))
    if prefix > 1:
        raise UserError(f"{model.name} has {prefix} class tokens: tokens are merged with one or none")
    return prefix


def calibration_batch(data: Iterable[Batch], count: int) -> dict[str, Any]:
    """The first ``count`` samples of the batches as one. Raises ``UserError`` where there are none, and for texts of several
    lengths without a mask."""
    parts: list[Batch] = []
    have = 0
    for batch in data:
        size = len(next(v for v in batch.values() if isinstance(v, Tensor)))
        parts.append(batch)
        have += size
        if have >= count:
            break
    if not have:
        raise UserError("no sample to calibrate on: the data is empty")
    names = [k for k, v in parts[0].items() if isinstance(v, Tensor) and all(k in p for p in parts)]
    lengths = {p[k].shape[1] for p in parts for k in ("tokens", "input_ids") if k in p}
    if len(lengths) > 1:
        if "attention_mask" not in names:
            raise UserError(f"texts of {len(lengths)} lengths without an attention mask cannot be compared: give one")
        longest = max(lengths)
        parts = [{k: _padded(v, longest) if k in _TEXT else v for k, v in p.items()} for p in parts]
    return {k: torch.cat([p[k] for p in parts])[:count] for k in names}


_TEXT = ("tokens", "input_ids", "attention_mask", "token_type_ids")


def _padded(value: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(value, (0, length - value.shape[1]))


def _teller(tell: Callable[[str], None] | None, what: str) -> Callable[[int, int], None] | None:
    if tell is None:
        return None
    began = time.monotonic()

    def say(done: int, total: int) -> None:
        rate = done / max(time.monotonic() - began, 1e-6)
        left = (total - done) / max(rate, 1e-6)
        tell(f"importance: {done:,} of {total:,} {what}, {rate:,.0f} a second, {left:.0f} s left")

    return say


def _some(refused: dict[str, str]) -> str:
    return "; ".join(f"{k} {v}" for k, v in list(refused.items())[:2])
