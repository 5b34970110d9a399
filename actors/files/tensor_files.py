"""Tensors of safetensors files, read one by one and by range, from any storage."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch

from actors.files import storage

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
_LONGEST_HEADER = 1 << 30


@dataclass(frozen=True, slots=True)
class StoredTensor:
    raw: bytes
    dtype: torch.dtype
    shape: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.raw), dtype=self.dtype).view(self.shape) if self.raw else torch.empty(
            self.shape, dtype=self.dtype)


class TensorFiles:
    """Of one folder. Each file's header is read once."""

    def __init__(self, directory: str):
        self._directory = directory
        self._headers: dict[str, tuple[dict, int]] = {}

    def names(self, file: str) -> list[str]:
        """Raises as `read`."""
        with storage.open_input(storage.join(self._directory, file), random_access=True) as stream:
            return [name for name in self._header(file, stream)[0] if name != "__metadata__"]

    def read(self, file: str, name: str) -> StoredTensor:
        """Raises StorageError, OSError: it cannot be read. ValueError, KeyError, TypeError, OverflowError: no such tensor, or the
        header is truncated or corrupt; the tensor's own bytes may still be fewer than they should be."""
        with storage.open_input(storage.join(self._directory, file), random_access=True) as stream:
            header, base = self._header(file, stream)
            entry = header[name]
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if not 0 <= begin <= end == begin + math.prod(shape) * dtype.itemsize:
                raise ValueError(entry)
            stream.seek(base + begin)
            return StoredTensor(bytes(stream.read(end - begin)), dtype, shape)

    def _header(self, file: str, stream) -> tuple[dict, int]:
        if file not in self._headers:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length < _LONGEST_HEADER:
                raise ValueError(length)
            self._headers[file] = (json.loads(bytes(stream.read(length))), 8 + length)
        return self._headers[file]
