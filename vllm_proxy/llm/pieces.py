"""The text of single tokens as a person reads it, and their kinds."""

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm.tokenizers import TokenizerLike

KINDS = (
    "word start",
    "word continuation",
    "digit",
    "punctuation",
    "whitespace",
    "special",
    "part of a character",
)

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's byte fallback
_SPACE = "\u2581"  # SentencePiece's


def _byte_of_char() -> dict[str, int]:
    """Return the bytes by character in GPT-2's alphabet, in which byte-level BPE writes tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {chr(byte): byte for byte in printable}
    return chars | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


class TokenText(NamedTuple):
    """One token, decoded alone.

    Attributes:
        text: with its leading space; bytes that do not form a character are written `⟨E2 98⟩`.
        is_special: whether it is one of the tokenizer's special tokens.
        is_whole: whether all its bytes form characters.
    """

    text: str
    is_special: bool = False
    is_whole: bool = True


class TokenTexts:
    """The texts of a tokenizer's tokens, decoded when needed; without a tokenizer, their ids."""

    def __init__(self, tokenizer: "TokenizerLike | None") -> None:
        self._tokenizer = tokenizer
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._known: dict[int, TokenText] = {}

    def __getitem__(self, token_id: int) -> TokenText:
        """Return the text of a token."""
        if token_id not in self._known:
            self._known[token_id] = self._read(token_id)
        return self._known[token_id]

    def _read(self, token_id: int) -> TokenText:
        if self._tokenizer is None:
            return TokenText(f"⟨{token_id}⟩")
        (token,) = self._tokenizer.convert_ids_to_tokens([token_id])
        if token is None:  # padding of the vocabulary
            return TokenText(f"⟨{token_id}⟩", is_special=True)
        if token_id in self._special:
            return TokenText(str(token), is_special=True)
        text = self._tokenizer.decode([token_id])
        if isinstance(token, bytes):
            return _of_bytes(token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return _of_bytes(bytes([int(match[1], 16)]))
        if all(char in _BYTE_OF_CHAR for char in token):
            data = bytes(_BYTE_OF_CHAR[char] for char in token)
            # Other tokenizers also have tokens of these characters, but they mean other bytes.
            if data.decode(errors="replace") == text:
                return _of_bytes(data)
        return TokenText(token.replace(_SPACE, " ") if _SPACE in token else text or token)

    def kinds(self, token_ids: Sequence[int]) -> list[str]:
        """Return the kind, one of `KINDS`, of each token of an answer."""
        kinds, inside_word = [], False
        for token_id in token_ids:
            token = self[token_id]
            kind = _kind(token, inside_word)
            # An incomplete character may turn out to be a letter.
            inside_word = kind == "part of a character" or (
                not token.is_special and token.text[-1:].isalpha()
            )
            kinds.append(kind)
        return kinds


def _of_bytes(data: bytes) -> TokenText:
    text, is_whole = "", True
    while data:
        try:
            return TokenText(text + data.decode(), is_whole=is_whole)
        except UnicodeDecodeError as error:
            wrong = data[error.start : error.end].hex(" ").upper()
            text += f"{data[: error.start].decode()}⟨{wrong}⟩"
            data, is_whole = data[error.end :], False
    return TokenText(text.replace("⟩⟨", " "), is_whole=is_whole)


def _kind(token: TokenText, inside_word: bool) -> str:
    if token.is_special:
        return "special"
    if not token.is_whole:
        return "part of a character"
    word = token.text.strip()
    if not word:
        return "whitespace"
    if all(char.isnumeric() for char in word):
        return "digit"
    if not any(unicodedata.category(char)[0] in "LMN" for char in word):
        return "punctuation"
    return "word continuation" if inside_word and word[0] == token.text[0] else "word start"
