"""A method in a bare PyTorch loop: no run folder, no engine, five lines around ``loss``.

python examples/bare_loop.py
"""

import torch

from unmask.draw import Seeded
from unmask.systems.pretraining.mae.model import MAE


def main(steps: int = 5) -> None:
    backbone = {"name": "vit_nano_patch4", "image_size": 28, "in_channels": 1}
    model = MAE(MAE.Config(backbone=backbone, decoder={"embed_dim": 64, "depth": 1, "num_heads": 4}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    images = torch.randn(16, 1, 28, 28)  # your batch, standardised
    for step in range(steps):
        loss = model.loss({"image": images}, draw=Seeded(0, step))["loss"]  # everything random is asked of the draw
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: {loss.item():.3f}")


if __name__ == "__main__":
    main()
