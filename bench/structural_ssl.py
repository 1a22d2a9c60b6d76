"""Training steps on text, on the CPU: which objective costs what, packed against padded rows, and transformers beside ours.

    python bench/structural_ssl.py [--data TEXT] [--dim 192] [--depth 6] [--length 64] [--batch 32] [--vocabulary 8192] [--rounds 5]
                                   [--threads N] [--json FILE]

Objectives: MLM with the logits of every place (transformers' BertForMaskedLM with the same weights, rows and labels, and
ours), MLM at the
chosen places alone, RTS. Losses of the three MLMs are asserted equal. Packed: the same texts, as many, in rows of several
texts and in rows of one,
padded; the loss is asserted equal. Forward and backward, fp32, no dropout; sides take turns; ratios are of medians (above 1:
ours is faster).
Text: real where --data is given (a column of sentences or paragraphs), else lengths drawn like those of paragraphs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.draw import Seeded
from unmask.systems.language.checkpoints import Start, adopt, config_of, ours
from unmask.systems.language.structural_ssl.model import StructuralSSL
from unmask.systems.language.structural_ssl.structure import Row, packed, padded

SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}


def texts(data: Path | None, vocabulary: int, count: int, length: int) -> tuple[list[np.ndarray], str]:
    """Tokens of many texts, framed and cut to the length."""
    if data is None:
        draws = np.random.default_rng(0)
        sizes = np.clip(draws.lognormal(3.3, 0.8, count).astype(int), 3, length)
        return [np.concatenate(([2], draws.integers(5, vocabulary, n - 2), [3])) for n in sizes], "drawn lengths"
    from unmask.data.text import TextBatches, TextSettings

    batches = TextBatches(TextSettings(uri=str(data), vocabulary=vocabulary, length=length, rows="each"), 1)
    some = batches.order(0)[:count]
    offsets = batches.data.offsets
    return [np.asarray(batches.data.ids[offsets[r] : offsets[r + 1]]).astype(np.int64) for r in some], data.name


def taking_turns(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(rounds):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def systems(asked: argparse.Namespace, vocabulary: int) -> tuple[Any, StructuralSSL, StructuralSSL]:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=asked.dim,
        num_hidden_layers=asked.depth,
        num_attention_heads=max(asked.dim // 64, 1),
        intermediate_size=4 * asked.dim,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    peer = transformers.BertForMaskedLM(config)
    encoder = config_of(config.to_dict())
    made = []
    for objective in ("mlm", "rts"):
        model = StructuralSSL(StructuralSSL.Config(objective=objective, encoder=encoder.plain(), special=SPECIAL))
        adopt(model, Start(encoder, ours(peer.state_dict()), None, "bert", "peer"))
        made.append(model)
    return peer, made[0], made[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("dim", 192),
        ("depth", 6),
        ("length", 64),
        ("batch", 32),
        ("vocabulary", 8192),
        ("rounds", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    found, source = texts(asked.data, asked.vocabulary, 4 * asked.batch, asked.length)
    peer, mlm, rts = systems(asked, asked.vocabulary)
    stream = np.concatenate(found)
    tokens = torch.from_numpy(np.resize(stream, asked.batch * asked.length).reshape(asked.batch, -1))
    tokens[:, 0], tokens[:, -1] = 2, 3
    batch = {"tokens": tokens}
    changed, labels = mlm.changed(batch, Seeded(0))

    def step(model: Any, loss: Tensor) -> float:
        model.zero_grad(set_to_none=True)
        loss.backward()
        return float(loss.detach())

    def all_logits() -> float:
        logits = mlm.word_logits(mlm.network({"tokens": changed}))
        return step(mlm, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))

    def chosen_logits() -> float:
        return step(mlm, mlm.token_loss(mlm.network({"tokens": changed}), labels, batch)[0])

    sides: dict[str, Callable[[], float]] = {
        "transformers": lambda: step(peer, peer(input_ids=changed, labels=labels).loss),
        "mlm, all logits": all_logits,
        "mlm": chosen_logits,
        "rts": lambda: step(rts, rts.loss(batch, Seeded(0))["loss"]),
    }
    first = [sides[n]() for n in ("transformers", "mlm, all logits", "mlm")]
    assert max(first) - min(first) < 1e-4 * max(first), f"the losses differ: {first}"
    times = taking_turns(sides, asked.rounds)
    results: dict[str, Any] = {"source": source, "loss": first[0], "seconds": times, "threads": torch.get_num_threads()}
    shape = f"{asked.depth} x {asked.dim}, {asked.batch} rows of {asked.length}, V {asked.vocabulary}"
    print(f"{shape}, {torch.get_num_threads()} threads; text: {source}")
    for name, seconds in times.items():
        print(f"  {name:18} {seconds * 1000:8.1f} ms   {times['transformers'] / seconds:5.2f}x of transformers")

    rows = [
        Row(t, np.where((t == 2) | (t == 3), -100, np.arange(len(t))), np.zeros(len(t), np.int64))
        for t in found[: 2 * asked.batch]
    ]
    wide = asked.length
    alone, together = padded(rows, 0), packed(rows, 0, wide)
    alone_changed, alone_labels = mlm.changed(alone, Seeded(1))
    # the same tokens hidden in both
    wanted = list(range(len(rows)))
    packed_changed, packed_labels = together["tokens"].clone(), torch.full_like(together["tokens"], -100)
    for r in wanted:
        (row, at), size = together["starts"][r].tolist(), len(rows[r].tokens)
        packed_changed[row, at : at + size] = alone_changed[r, :size]
        packed_labels[row, at : at + size] = alone_labels[r, :size]

    def run(rows_of: dict[str, Tensor], changed_to: Tensor, marked: Tensor) -> float:
        return step(mlm, mlm.token_loss(mlm.network({**rows_of, "tokens": changed_to}), marked, rows_of)[0])

    pair: dict[str, Callable[[], float]] = {
        "padded": lambda: run(alone, alone_changed, alone_labels),
        "packed": lambda: run(together, packed_changed, packed_labels),
    }
    losses = [side() for side in pair.values()]
    assert abs(losses[0] - losses[1]) < 1e-4 * losses[0], f"the losses differ: {losses}"
    spent = taking_turns(pair, asked.rounds)
    full = [float((b["attention_mask"] > 0).float().mean()) for b in (alone, together)]
    results |= {"packing": spent, "full": full, "rows": [len(alone["tokens"]), len(together["tokens"])]}
    print(
        f"{len(rows)} texts, MLM step: padded {results['rows'][0]} rows, {100 * full[0]:.0f} % text; "
        f"packed {results['rows'][1]}, {100 * full[1]:.0f} %"
    )
    print(
        f"  padded {spent['padded'] * 1000:.1f} ms, packed {spent['packed'] * 1000:.1f} ms: "
        f"{spent['padded'] / spent['packed']:.2f}x"
    )
    if asked.json:
        asked.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
