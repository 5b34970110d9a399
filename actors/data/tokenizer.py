"""Text to token ids: bytes, or any `tokenizer.json` of the `tokenizers` package.

A document is bytes. The byte tokenizer takes them as they are; a `tokenizer.json` needs text, so bytes that are not UTF-8
become U+FFFD, the replacement character. Special tokens that a document spells out are ordinary text: only the packing
writes end-of-document ids, so no document can forge one.
"""

from __future__ import annotations

import hashlib
import json
from typing import Protocol

import numpy

from actors.files import storage

BYTE = "byte"
_BYTE_DEFINITION = b"256 byte values, then end of document"
_END_NAMES = ("<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|eos|>", "[EOS]",
              "<end_of_text>")


class TokenizerError(ValueError):
    """A tokenizer that cannot be used. `str()` is the one line a user sees."""


class Tokenizer(Protocol):
    """`fingerprint`: sha256 of what defines it; ids are 0..vocab_size-1 and `end_of_document` is one of them."""

    kind: str
    fingerprint: str
    vocab_size: int
    end_of_document: int

    def encode(self, document: bytes | str) -> numpy.ndarray: ...

    def decode(self, tokens: numpy.ndarray) -> str: ...

    def decode_bytes(self, tokens: numpy.ndarray) -> bytes: ...


class ByteTokenizer:
    """256 byte values, and 256 for end of document."""

    kind = BYTE
    fingerprint = hashlib.sha256(_BYTE_DEFINITION).hexdigest()
    vocab_size = 257
    end_of_document = 256

    def encode(self, document: bytes | str) -> numpy.ndarray:
        """int32 [bytes of the document], without an end-of-document id."""
        return numpy.frombuffer(_as_bytes(document), dtype=numpy.uint8).astype(numpy.int32)

    def decode(self, tokens: numpy.ndarray) -> str:
        """Text without end-of-document ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def decode_bytes(self, tokens: numpy.ndarray) -> bytes:
        tokens = numpy.asarray(tokens)
        return tokens[tokens < 256].astype(numpy.uint8).tobytes()


class JsonTokenizer:
    """A `tokenizer.json`. Its normaliser, pre-tokeniser and model apply; its post-processor (begin and end marks) does not."""

    kind = "tokenizer.json"

    def __init__(self, definition: bytes, name: str, end_token: str | None = None, configured_end: str | None = None):
        """Raises TokenizerError: not a tokenizer definition, or no clear end-of-document token.

        Args:
            definition: the file's bytes. name: what errors call it.
            end_token: the end-of-document token that the user named; outranks `configured_end`, that of the
                `tokenizer_config.json` beside it, which outranks a token with a customary name.
        """
        self._definition = definition
        self._arguments = (definition, name, end_token, configured_end)
        self._tokenizer = _parse(definition, name)
        self.fingerprint = hashlib.sha256(definition).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.end_of_document = _end_id(vocabulary, name, end_token, configured_end)

    def __reduce__(self):
        return JsonTokenizer, self._arguments

    def encode(self, document: bytes | str) -> numpy.ndarray:
        """int32 [tokens of the document], without an end-of-document id."""
        text = _as_bytes(document).decode("utf-8", "replace")
        return numpy.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=numpy.int32)

    def decode(self, tokens: numpy.ndarray) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode(numpy.asarray(tokens).tolist(), skip_special_tokens=True)

    def decode_bytes(self, tokens: numpy.ndarray) -> bytes:
        """Of that text."""
        return self.decode(tokens).encode("utf-8", "replace")


def load(name: str, end_token: str | None = None) -> Tokenizer:
    """The tokenizer called `name`: `byte`, or the path or URI of a tokenizer.json (or of the folder that holds one).

    `end_token`: the text of its end-of-document token, where the file leaves that unclear.
    Raises TokenizerError: no such file, not a tokenizer.json, no clear end-of-document token.
    """
    if name == BYTE:
        if end_token is not None:
            raise TokenizerError(f"end-of-document token {end_token!r}: the byte tokenizer has its own")
        return ByteTokenizer()
    try:
        file = storage.join(name, "tokenizer.json") if storage.is_folder(name) else name
        definition = storage.read_bytes(file)
        folder = file.rpartition("/")[0] or ("/" if file.startswith("/") else ".")
        beside = storage.join(folder, "tokenizer_config.json")
        configured = storage.read_bytes(beside) if storage.exists(beside) else b"{}"
    except storage.StorageError as error:
        raise TokenizerError(f"tokenizer {error}; allowed: byte, or the path of a tokenizer.json") from None
    return JsonTokenizer(definition, file, end_token, _configured_end(configured))


def _as_bytes(document: bytes | str) -> bytes:
    return document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document


def _parse(definition: bytes, name: str):
    import tokenizers  # here: only users of a tokenizer.json need the package

    try:
        parsed = tokenizers.Tokenizer.from_buffer(definition)
    except Exception as error:  # the package raises plain Exception for every malformed file
        raise TokenizerError(f"tokenizer {name}: not a tokenizer.json ({' '.join(str(error).split())[:200]})") from None
    parsed.no_truncation()
    parsed.no_padding()
    parsed.encode_special_tokens = True
    return parsed


def _configured_end(configured: bytes) -> str | None:
    try:
        token = json.loads(configured).get("eos_token")
    except (ValueError, AttributeError):
        return None
    return token.get("content") if isinstance(token, dict) else token


def _end_id(vocabulary: dict[str, int], name: str, end_token: str | None, configured_end: str | None) -> int:
    for token in (end_token, configured_end):
        if token is not None:
            if token not in vocabulary:
                raise TokenizerError(f"end-of-document token {token!r}: not in the vocabulary of {name}")
            return vocabulary[token]
    candidates = [token for token in _END_NAMES if token in vocabulary]
    if len(candidates) != 1:
        found = f"several ({', '.join(candidates)})" if candidates else "none of the customary names"
        raise TokenizerError(f"tokenizer {name}: which token ends a document is unclear, found {found}; name it with --end-token")
    return vocabulary[candidates[0]]
