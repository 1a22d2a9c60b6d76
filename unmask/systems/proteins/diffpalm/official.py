"""DiffPALM's numbers: it has no weights of its own but those of the MSA Transformer it asks; and how a fixture is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.draw import Replay
from unmask.official.load import read_checkpoint
from unmask.systems.proteins import couplings as dca
from unmask.systems.proteins.diffpalm.aggregation import aggregated, pair_counts, robust_pairs
from unmask.systems.proteins.diffpalm.model import DiffPALM
from unmask.systems.proteins.diffpalm.optimising import OPTIMISERS, DescentSettings, optimise
from unmask.systems.proteins.diffpalm.problem import Problem
from unmask.systems.proteins.diffpalm.scores import one_body_entropy, two_body_entropy
from unmask.systems.proteins.diffpalm.sinkhorn import inside, matching, sinkhorn, with_noise
from unmask.systems.proteins.msa_transformer.official import network_of

OPTIONS = ("attention_heads", "max_tokens_per_msa")


def load_official(state: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> DiffPALM:
    """The system around ESM's MSA Transformer, whose names the state has; ``model``: further options of the system."""
    options = dict(options or {})
    own = options.pop("model", {})
    options.pop("contact_regression", None)
    return DiffPALM.of(network_of(state, options), **own).eval()


def load_file(path: str | Path, options: Mapping[str, Any] | None = None) -> DiffPALM:
    """A public file of ESM. Raises ``UserError``."""
    return load_official(read_checkpoint(path), options)


# --- fixtures ---------------------------------------------------------------------------------------------------


def run_case(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module | None, dict[str, Tensor]]:
    """Outputs and gradients of one fixture, under the authors' names."""
    return _run(config, tensors) if "train" in config else _operators(config, tensors)


def descent_settings(config: Mapping[str, Any]) -> DescentSettings:
    """Our settings from the authors' arguments."""
    train = config["train"]
    optimiser = dict(train.get("optimizer_kwargs") or {})
    name = str(train.get("optimizer_name", "SGD")).lower()
    usual = OPTIMISERS[name]([torch.zeros(1)]).defaults  # what torch takes where a run says nothing
    plateau = {
        **(train.get("scheduler_kwargs") or {}),
        **(config.get("scheduler_effective") or {"factor": 0.1, "patience": 10}),
    }
    return DescentSettings(
        steps=train["epochs"],
        batch_size=train.get("batch_size", 1),
        mask_probability=config["p_mask"],
        std_init=train.get("std_init", 0.1),
        tau=train.get("tau", 1.0),
        sinkhorn_iterations=train.get("n_sink_iter", 10),
        noise=train.get("noise", True),
        noise_factor=train.get("noise_factor", 0.1),
        noise_std=train.get("noise_std", False),
        noise_schedule=train.get("noise_scheduler", False),
        relabel=train.get("use_rand_perm", False),
        mean_centre=train.get("mean_centering", True),
        optimizer=name,
        lr=optimiser.pop("lr", usual["lr"]),
        weight_decay=optimiser.pop("weight_decay", usual["weight_decay"]),
        optimizer_options=optimiser,
        plateau=train.get("scheduler_name") is not None,
        plateau_factor=plateau["factor"],
        plateau_patience=plateau["patience"],
    )


def _run(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], nn.Module, dict[str, Tensor]]:
    state = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    network = network_of(state, {"attention_heads": config["model"]["attention_heads"]})
    fixed = config.get("fixed_pairings")
    problem = Problem(list(config["species_sizes"]), None if fixed is None else [[(p, q) for p, q in s] for s in fixed])
    draws = {}
    for name, value in tensors.items():
        if name.startswith("draw."):
            # an order, as the uniforms whose ranks it is
            draws[name[5:]] = value.argsort(dim=-1) / value.shape[-1] if name.startswith("draw.perm_") else value
    left, right = tensors["in.left"][0], tensors["in.right"][0]
    positive = tensors["in.positive"][0] if "in.positive" in tensors else None
    (record,) = optimise(network, left, right, problem, descent_settings(config), [Replay(draws)], positive=positive)
    outputs = {
        "losses": torch.tensor(record.losses),
        "lr": torch.tensor(record.lr),
        "partner": torch.stack(record.partner),
        "soft": torch.stack([problem.assemble(soft) for soft in record.soft]),
        "log_alpha": torch.stack([problem.assemble(table, known=False) for table in record.log_alpha]),
    }
    for species, size in enumerate(problem.free_sizes):
        if size:
            outputs[f"grad_log_alpha_{species}"] = torch.stack([g[species, :size, :size] for g in record.gradients])
    return outputs, network, {}


def _operators(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], None, dict[str, Tensor]]:
    outputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    if "in.log_alpha" in tensors:
        log_alpha = tensors["in.log_alpha"].clone().requires_grad_()
        there = inside([len(log_alpha)])
        noise = tensors.get("draw.noise")
        noisy = with_noise(
            log_alpha[None],
            there,
            None if noise is None else noise[None],
            config.get("noise_factor", 0.1),
            by_spread=config.get("noise_std", False),
        )
        soft = sinkhorn(noisy, there, tau=config.get("tau", 1.0), iterations=config.get("sinkhorn_iterations", 10))[0]
        (soft * tensors["in.cotangent"]).sum().backward()
        orders = [(tensors["draw.perm_row"], tensors["draw.perm_col"])] if "draw.perm_row" in tensors else None
        outputs |= {"soft": soft.detach(), "hard": matching(noisy, [len(log_alpha)], orders)[0]}
        assert log_alpha.grad is not None
        gradients["log_alpha"] = log_alpha.grad
    if "in.soft_left" in tensors:
        left = tensors["in.soft_left"].clone().requires_grad_()
        right = torch.nn.functional.one_hot(tensors["in.right"].long(), left.shape[2]).to(left.dtype)
        both, one = two_body_entropy(left, right), one_body_entropy(left)
        (both - one).backward()
        outputs |= {"two_body_entropy": both.detach(), "one_body_entropy": one.detach()}
        assert left.grad is not None
        gradients["mi_loss_soft_left"] = left.grad
    if "in.msa_train" in tensors:
        outputs |= _coevolution(config, tensors["in.msa_train"], tensors["in.msa_test"])
    if "in.runs" in tensors:
        counts, sizes = pair_counts(tensors["in.runs"]), config["group_sizes"]
        outputs |= {"pair_counts": counts, "aggregated_left_of_right": aggregated(counts, sizes)}
        for cutoff, expected in (config.get("robust_pairs") or {}).items():
            found = robust_pairs(tensors["in.runs"], sizes, float(cutoff), collisions=True)
            if [[list(pair) for pair in species] for species in found] != expected:
                raise AssertionError(f"robust pairs at {cutoff}: {found}, expected {expected}")
    return outputs, None, gradients


def _coevolution(config: Mapping[str, Any], train: Tensor, test: Tensor) -> dict[str, Tensor]:
    number, first = int(config["states"]), int(config["length_left"])
    weights = dca.sequence_weights(train, config.get("identity_distance_threshold", 0.3))
    single, double = dca.frequencies(train, number, pseudocount=config.get("pseudocount_dca", 0.5), weights=weights)
    table = dca.couplings(single, double, official_gauge=True)
    left, right = test[:, :first], test[:, first:]
    energy = -dca.pair_scores(table, left, right)
    pmi = dca.pointwise_information(train, number, pseudocount=config.get("pseudocount_mi", 0.15), weights=weights)[
        :first, :, first:
    ]
    score = dca.pair_scores(pmi, left, right)
    found = {"dca": dca.confidences(energy), "mi": dca.confidences(-score)}
    return {
        "weights": weights,
        "two_site_frequencies": double,
        "couplings": table,
        "dca_energy": energy,
        "pmi": pmi,
        "mi_score": score,
    } | {
        f"{kind}_{name}": torch.from_numpy(value)
        for kind, pair in found.items()
        for name, value in zip(("partner", "confidence"), pair, strict=True)
    }
