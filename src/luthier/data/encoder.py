"""Text to token ids in batches, with the places of characters among the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.core.store import content_hash


class Encoded:
    """Token ids of one text, and which token holds a character."""

    __slots__ = ("_encoding", "ids", "size")

    def __init__(self, ids: list[int], encoding: Any, size: int) -> None:
        self.ids, self._encoding, self.size = ids, encoding, size

    def token_at(self, character: int) -> int:
        """The first token at or after a character; the number of tokens past the end."""
        while character < self.size:
            token = self._encoding.char_to_token(character)
            if token is not None:
                return int(token)
            character += 1  # white space that no token holds
        return len(self.ids)


class Encoder:
    """A tokenizer, used without padding, truncation or special tokens unless asked.

    Args:
        tokenizer: a transformers tokenizer; a slow one works, without :attr:`has_offsets`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._fast = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        self.has_offsets = self._fast is not None
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        # Only what the tokenizer itself puts first counts: many declare a BOS that they never write.
        self.adds_bos = self.bos is not None and tokenizer("a")["input_ids"][0] == self.bos
        self.special = set(tokenizer.all_special_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special |= {i for i, token in added.items() if token.special}

    def encode(self, texts: Sequence[str], *, special: bool = False) -> list[Encoded]:
        """The tokens of each text.

        Args:
            texts: the texts.
            special: with the special tokens that the tokenizer adds by itself.
        """
        if self._fast is None:
            found = self.tokenizer(list(texts), add_special_tokens=special)["input_ids"] if texts else []
            return [Encoded(list(ids), None, len(t)) for ids, t in zip(found, texts, strict=True)]
        self._fast.no_truncation()
        self._fast.no_padding()
        encodings = self._fast.encode_batch(list(texts), add_special_tokens=special)
        return [Encoded(e.ids, e, len(t)) for e, t in zip(encodings, texts, strict=True)]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """As :meth:`encode`, ids alone and without offsets, which is faster."""
        if self._fast is None:
            return [e.ids for e in self.encode(texts)]
        self._fast.no_truncation()
        self._fast.no_padding()
        return [e.ids for e in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def fingerprint(self) -> str:
        """A hash of what decides the ids: the tokenizer's files' content and its special tokens."""
        if self._fast is None:
            return content_hash(type(self.tokenizer).__name__, self.tokenizer.get_vocab(), repr(self.tokenizer))
        self._fast.no_truncation()
        self._fast.no_padding()
        return content_hash(self._fast.to_str(), self.bos, self.eos, sorted(self.special))
