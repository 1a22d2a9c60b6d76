"""Pre-train on a folder of your own images, then use the features: from Python, the same as on the command line.

python examples/own_photos.py photos/
"""

import sys

import torch

import unmask


def main(folder: str) -> None:
    run = unmask.train("mae", data=folder, out="runs/own-photos")  # --recipe auto: it says what it chose and why
    scores = unmask.evaluate(run, probe="rankme")
    print(f"directions in use: {scores['rankme']:.1f}")
    encoder = unmask.load(run)
    pixels = torch.randint(0, 256, (1, encoder.in_channels, *encoder.image_size))  # your images, [B, C, H, W]
    print("features:", tuple(encoder(encoder.preprocessing.standardise(pixels)).shape))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "sample:fashion")
