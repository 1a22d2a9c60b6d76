"""Options that make a real training last seconds."""

QUIET = {"talk": lambda line: None}
SHORT = {"steps": 4, "batch_size": 16, "device": "cpu"}
SMALL = {
    "data.limit": 64,
    "backbone.depth": 1,
    "decoder.depth": 1,
    "train.compile": "off",
    "train.probe_every": 0,
    "train.precision": "fp32",
}
