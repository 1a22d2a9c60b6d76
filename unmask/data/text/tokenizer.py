"""``Tokenizer``: text to ids and back, learned from text or somebody else's, and what a model must know of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unmask.errors import MissingExtra, UserError, nearest

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

Style = Literal["bert", "roberta", "gpt"]
FILE = "tokenizer.json"
# pad, unknown, start (cls), separator, mask
SPECIAL: dict[str, tuple[str, ...]] = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
    "gpt": ("<|pad|>", "<|unk|>", "<|endoftext|>", "<|endoftext|>", "<|mask|>"),
}
ROLES = ("pad", "unk", "cls", "sep", "mask")


@dataclass(frozen=True)
class Encoded:
    """One row. ids; words: the number of the word that a token is a piece of, -100 for special tokens; types: 0 for the first
    text of a pair, 1 for the second."""

    ids: list[int]
    words: list[int]
    types: list[int]


class Tokenizer:
    """A Hugging Face tokenizer with the roles of its special tokens. ``special`` maps pad, unk, cls, sep, mask to ids; a role that
    the tokenizer does not have is missing from it."""

    def __init__(self, backend: Backend):
        self.backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values()) + 1
        self.special: dict[str, int] = {}
        for role, names in zip(ROLES, zip(*SPECIAL.values(), strict=True), strict=True):
            found = next((n for n in names if n in vocabulary), None)
            if found is not None:
                self.special[role] = vocabulary[found]
        self.style: Style = next(
            (s for s in ("bert", "roberta", "gpt") if SPECIAL[s][2] in vocabulary),  # type: ignore[misc]
            "gpt",
        )
        if "pad" not in self.special:  # gpt-2 has none: what ends a text pads it
            self.special["pad"] = self.special.get("sep", 0)

    # --- where they come from ---
    @staticmethod
    def learned(
        texts: Iterable[str],
        *,
        kind: Literal["bpe", "chars"] = "bpe",
        vocabulary: int = 8192,
        style: Style = "bert",
        lowercase: bool = False,
    ) -> Tokenizer:
        """Learn one from texts: byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909), or one token a character.

        Raises ``UserError`` for text too small for the vocabulary.
        """
        tokenizers = _tokenizers()
        specials = list(dict.fromkeys(SPECIAL[style]))
        if kind == "chars":
            found = sorted({c for text in texts for c in (text.lower() if lowercase else text)} | {"\n"})
            vocab = {token: i for i, token in enumerate([*specials, *(c for c in found if c not in specials)])}
            backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=SPECIAL[style][1]))
            backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
            backend.decoder = tokenizers.decoders.Fuse()
        else:
            backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=SPECIAL[style][1]))
            backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
            backend.decoder = tokenizers.decoders.ByteLevel()
            alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
            if vocabulary < len(alphabet) + len(specials):
                raise UserError(
                    f"vocabulary={vocabulary} is too small: bytes and special tokens alone are {len(alphabet) + len(specials)}"
                )
            trainer = tokenizers.trainers.BpeTrainer(
                vocab_size=vocabulary, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
            )
            backend.train_from_iterator(((t.lower() if lowercase else t) for t in texts), trainer)
        if lowercase:
            backend.normalizer = tokenizers.normalizers.Lowercase()
        backend.add_special_tokens(specials)
        _frame(backend, style)
        return Tokenizer(backend)

    @staticmethod
    def load(name: str | Path) -> Tokenizer:
        """A ``tokenizer.json``, a folder that holds one (of transformers, or a model of ours), or a hub id.

        Raises ``UserError`` in one line.
        """
        path = Path(name)
        file = path / FILE if path.is_dir() else path
        if path.is_dir() and not file.is_file() and (path / "model" / FILE).is_file():
            file = path / "model" / FILE
        if file.is_file():
            try:
                return Tokenizer.from_text(file.read_text(encoding="utf-8"), where=str(file))
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file} cannot be read: {error}") from None
        if path.is_dir() and not (path / "vocab.txt").is_file() and not (path / "vocab.json").is_file():
            raise UserError(f"{path} holds no {FILE}: save the tokenizer there")
        if not path.exists() and "/" not in str(name) and not str(name).replace("-", "").replace("_", "").isalnum():
            raise UserError(f"no tokenizer {name}: {nearest(str(name), ['bpe', 'chars'])}")
        return _of_transformers(str(name))

    @staticmethod
    def from_text(text: str, where: str = FILE) -> Tokenizer:
        """From the content of a ``tokenizer.json``."""
        try:
            return Tokenizer(_tokenizers().Tokenizer.from_str(text))
        except UserError:
            raise
        except Exception as error:  # the Rust side raises plain exceptions
            raise UserError(f"{where} is no tokenizer: {str(error).splitlines()[0][:160]}") from None

    def text(self) -> str:
        """The content of a ``tokenizer.json``; equal tokenizers give equal text."""
        return self.backend.to_str()

    # --- use ---
    def encode(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        length: int | None = None,
        special: bool = True,
    ) -> list[Encoded]:
        """Rows framed as the model expects them, cut to ``length`` tokens, the longer side of a pair first."""
        if length is not None:
            self.backend.enable_truncation(length, strategy="longest_first")
        else:
            self.backend.no_truncation()
        self.backend.no_padding()
        given: list[Any] = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        out = []
        for row in self.backend.encode_batch(given, add_special_tokens=special):
            words = [-100 if w is None else w for w in row.word_ids]
            if pairs is not None and any(row.type_ids):
                first = 1 + max((w for w, s in zip(words, row.sequence_ids, strict=True) if s == 0), default=-1)
                words = [w if w == -100 or s == 0 else w + first for w, s in zip(words, row.sequence_ids, strict=True)]
            out.append(Encoded(row.ids, words, row.type_ids))
        return out

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def piece(self, index: int) -> str:
        """One token as a person reads it, with a leading space where a word begins."""
        token = self.backend.id_to_token(int(index))
        if token is None or int(index) in self.special.values():
            return token or f"<{index}>"
        return self.backend.decode([int(index)], skip_special_tokens=False) or token

    def facts(self) -> dict[str, Any]:
        """What a model must know, for ``DataFacts.extra``: ``vocabulary`` and ``special``, ``style``."""
        return {"vocabulary": self.size, "special": dict(self.special), "style": self.style}


def _frame(backend: Any, style: Style) -> None:
    """How a row begins and ends, as the models of that style were trained: [CLS] A [SEP] B [SEP], <s> A </s></s> B </s>."""
    if style == "gpt":
        return
    start, end = SPECIAL[style][2], SPECIAL[style][3]
    ids = [(start, backend.token_to_id(start)), (end, backend.token_to_id(end))]
    pair = f"{start}:0 $A:0 {end}:0 $B:1 {end}:1" if style == "bert" else f"{start} $A {end} {end} $B {end}"
    backend.post_processor = _tokenizers().processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=pair, special_tokens=ids
    )


def _of_transformers(name: str) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtra(f"tokenizer={name}", "transformers", "text") from None
    from unmask.official.hub import hub_reason
    from unmask.official.reach import quick_hub

    try:
        with quick_hub():
            found = AutoTokenizer.from_pretrained(name, use_fast=True)
    except Exception as error:  # the client raises many kinds for what is one fact to a user
        raise UserError(f"no tokenizer {name}: no folder is there, and from the Hub: {hub_reason(error)}") from None
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{name} has no fast tokenizer: save one as {FILE}")
    return Tokenizer.from_text(backend.to_str(), where=name)


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtra("text", "tokenizers", "text") from None
    return tokenizers


def same(a: str, b: str) -> bool:
    """Whether two ``tokenizer.json`` texts give the same ids: the same vocabulary and merges."""
    one, two = json.loads(a), json.loads(b)
    return one.get("model") == two.get("model") and one.get("added_tokens") == two.get("added_tokens")
