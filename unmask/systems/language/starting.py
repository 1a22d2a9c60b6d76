"""Where a text encoder's sizes and tokenizer come from: the data, or the checkpoint that a training starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.data.text import TextSettings, Tokenizer
from unmask.errors import UserError
from unmask.systems.language.checkpoints import Start, start_from
from unmask.systems.language.encoder import EncoderConfig

FREE = ("dropout", "attention_dropout")  # what continued training may choose anew
LEARNED = ("bpe", "chars")


def tokenizer_of(settings: TextSettings, start: Start | None) -> Tokenizer | None:
    """The checkpoint's tokenizer where the settings name none of their own; None: as the settings say. Raises ``UserError``."""
    if start is None or settings.tokenizer not in LEARNED:
        return None
    if start.tokenizer is None:
        raise UserError(
            f"{start.where} holds no tokenizer, and one learned anew would not fit it: give data.tokenizer=FOLDER"
        )
    return start.tokenizer


def encoder_for(
    config: EncoderConfig, init: str | None, extra: Mapping[str, Any], length: int, types: int = 0, *, slug: str
) -> EncoderConfig:
    """The encoder's sizes with what the data and the checkpoint tell; of a checkpoint all is taken but the rates of dropout.
    types: token
    types that are needed. Raises ``UserError`` for what does not fit: fewer words than the tokenizer's, more tokens than
    positions."""
    special = extra["special"]
    if init:
        start = start_from(init).config.whole()
        if length > start.positions:
            raise UserError(
                f"rows of {length} tokens are longer than the {start.positions} positions of {init}: "
                f"use data.length={start.positions}"
            )
        update = {name: getattr(config, name) for name in FREE if name in config.model_fields_set}
        return start.model_copy(update={**update, "types": max(start.types, types)})
    told = {"vocabulary": int(extra["vocabulary"]), "positions": length}
    for name, value in told.items():
        given = getattr(config, name)
        if given and given < value:
            what = "tokens of the data" if name == "vocabulary" else "tokens of a row"
            raise UserError(f"{slug}: encoder.{name}={given} is less than the {value} {what}: leave it out")
    style = "roberta" if extra.get("style") == "roberta" and "style" not in config.model_fields_set else config.style
    filled = {k: getattr(config, k) or v for k, v in told.items()}
    pad = config.pad if config.pad is not None else special["pad"]
    own = config.types or (2 if style == "bert" else 1)
    return config.model_copy(update={**filled, "style": style, "pad": pad, "types": max(own, types)}).whole()
