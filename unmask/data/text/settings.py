"""``TextSettings``: which text, cut into tokens and rows how."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from unmask.config import Config, Field

COLUMNS = ("text", "pair", "label", "document")


class TextSettings(Config):
    """Which text, cut into tokens and rows how."""

    uri: str = Field(description="a .txt (.gz, .xz), .jsonl or .parquet file, a folder of them, or hf:NAME")
    split: str = Field("train", description='"train", "test", or a share in a fixed shuffled order: "train[:80%]"')
    limit: int | None = Field(None, ge=1, description="use only so many rows, a fixed random choice")
    columns: dict[str, str] = Field(
        {},
        description='names of the columns, {"text": ..., "pair": ..., "label": ..., "document": ...}, where they differ',
    )
    tokenizer: str = Field(
        "bpe",
        description='"bpe" or "chars": learned from the text; or a tokenizer.json, a transformers folder, a hub id',
    )
    vocabulary: int = Field(8192, ge=16, description="tokens that a learned bpe has, special ones included")
    style: Literal["bert", "roberta", "gpt"] = Field(
        "bert", description="special tokens of a learned tokenizer, and how a row is framed by them"
    )
    lowercase: bool = Field(False, description="a learned tokenizer sees lower-case letters only")
    length: int = Field(128, ge=4, description="tokens in a row, special ones included")
    rows: Literal["stream", "each", "packed"] = Field(
        "stream",
        description="stream: all text behind one another, cut every `length` tokens; each: a text a row, padded to the longest "
        "of its batch; packed: several short texts in a row, each seeing only itself",
    )
    paragraph_separator: str = Field("\n\n", description="what parts the paragraphs of a text")
    cache: bool = Field(True, description="keep tokens in memory-mapped files ($UNMASK_CACHE or ~/.cache/unmask)")

    @model_validator(mode="after")
    def _columns_are_known(self) -> TextSettings:
        unknown = set(self.columns) - set(COLUMNS)
        if unknown:
            raise ValueError(f"columns names {sorted(unknown)[0]!r}: it takes {', '.join(COLUMNS)}")
        if not self.paragraph_separator:
            raise ValueError("paragraph_separator is empty: write the characters between two paragraphs, \\n\\n say")
        return self
