"""Text: files to rows, rows to tokens, tokens to batches.

source = open_text("books/", "train")           # rows: texts with labels, pairs, sentences where there are any
batches = TextBatches(TextSettings(uri="books/", length=128), batch_size=32)
"""

from unmask.data.text.batches import TextBatches
from unmask.data.text.documents import Document, documents, sentences_of
from unmask.data.text.settings import TextSettings
from unmask.data.text.source import TextSource, open_text
from unmask.data.text.tokenizer import Tokenizer

__all__ = [
    "Document",
    "TextBatches",
    "TextSettings",
    "TextSource",
    "Tokenizer",
    "documents",
    "open_text",
    "sentences_of",
]
