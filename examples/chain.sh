#!/bin/sh
# One folder of your own, every verb: pre-train, segment, classify, compress, explain, export.
#
#   sh examples/chain.sh PHOTOS STREETS OUT
#
# PHOTOS: images in one sub-folder a class. STREETS: images with label maps, train/ and test/ each with images/ and labels/, and
# classes.txt. OUT: a new folder. UNMASK_QUICK=1 takes a few steps of everything, to see that it runs.
set -eu
photos=$1 streets=$2 out=$3
steps() { if [ -n "${UNMASK_QUICK:-}" ]; then echo "--steps 4 --batch-size $1"; fi; }
mkdir -p "$out"

# 1. an encoder learns from hidden patches, without a label
unmask train mae --data "$photos" --recipe tiny --image-size 32 $(steps 8) --out "$out/mae"

# 2. it becomes a segmenter and a classifier
unmask train pem --recipe camvid --data "$streets" init="$out/mae" data.image_size=64 $(steps 4) --out "$out/segmenter"
unmask predict "$out/segmenter" "$streets/test/images" -o "$out/seen"
unmask train classifier --data "$photos" --recipe tiny init="$out/mae" $(steps 8) --out "$out/classifier"

# 3. the classifier gets smaller
unmask compress "$out/classifier" --method optin --data "$photos" --budget macs=0.6 -o "$out/smaller" calibration=16

# 4. what does the small one look at?
first=$(find "$photos" -type f | sort | head -n 1)
unmask explain "$out/smaller" "$first" --method lime,saliency -o "$out/why" samples=64

# 5. away with it: model.onnx gives the same answers in onnxruntime
unmask export "$out/smaller" --to onnx --whole -o "$out/onnx"
