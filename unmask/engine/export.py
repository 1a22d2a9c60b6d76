"""What a finished run leaves for others: the system, its encoder, and what a learning compressor made."""

from __future__ import annotations

from pathlib import Path

from unmask.contracts import Trainable
from unmask.engine.checkpoint import save_tensors
from unmask.engine.run import mended_errors, write_json


def export(model: Trainable, folder: Path) -> None:
    """Write ``model/``, ``encoder/`` where there is one, and ``compressed/`` where ``finish`` gives something."""
    with mended_errors(f"exporting to {folder}"):
        model.save_pretrained(folder / "model")
        if model.encoder is not None:
            from unmask.official.hub import save_encoder

            save_encoder(model.encoder, folder / "encoder", system=model.slug)
        compressed = model.finish()
        if compressed is not None:
            (folder / "compressed").mkdir(exist_ok=True)
            save_tensors(compressed.model.state_dict(), folder / "compressed" / "model.safetensors")
            write_json(folder / "compressed" / "report.json", compressed.report)
            for name, content in compressed.files.items():
                (folder / "compressed" / name).write_bytes(content)
