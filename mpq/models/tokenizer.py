"""A lossless tokenizer: the longest matching piece of the vocabulary, else single bytes."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


class PieceTokenizer:
    """Greedy longest-match tokenizer over byte strings.

    The vocabulary is all single bytes, in order, then longer pieces, so every text can be encoded.

    >>> tokenizer = PieceTokenizer(["the", " sea"])
    >>> tokenizer.encode("the sea!"), tokenizer.decode([256, 257, 33])
    ([256, 257, 33], 'the sea!')
    """

    def __init__(self, pieces: Iterable[str]) -> None:
        self.pieces = [bytes([byte]) for byte in range(256)] + [piece.encode("utf-8") for piece in pieces]
        self._index = {piece: token for token, piece in enumerate(self.pieces)}
        self._longest = max(map(len, self.pieces))

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""
        data, tokens, start = text.encode("utf-8"), [], 0
        while start < len(data):
            for size in range(min(self._longest, len(data) - start), 0, -1):
                token = self._index.get(data[start : start + size])
                if token is not None:
                    tokens.append(token)
                    start += size
                    break
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.pieces[token] for token in tokens).decode("utf-8", errors="replace")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PieceTokenizer":
        """The tokenizer of a JSON list of pieces."""
        return cls(json.loads(Path(path).read_text("utf-8")))
