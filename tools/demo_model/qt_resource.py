"""The files inside a compiled Qt resource (.rcc), in which some programs ship their pictures.

The format is that of Qt's own reader (qtbase, src/corelib/io/qresource.cpp): a header, a tree of
folders, the contents, and the names that the tree points to. All numbers are big-endian.
"""

import struct
import zlib
from dataclasses import dataclass
from functools import partial

_MAGIC = b"qres"
_COMPRESSED = 1  # by zlib, after the length of what it was
_FOLDER = 2
_ZSTD = 4
_NODE_SIZE = {1: 14, 2: 22, 3: 22}  # bytes, by the format's version: since 2 with a date


class ResourceError(ValueError):
    """No Qt resource, or one that cannot be read."""


@dataclass(frozen=True)
class _Resource:
    blob: bytes
    version: int
    tree: int
    contents: int
    names: int

    def node(self, index: int) -> tuple[int, int, int, int]:
        """Where the name is, flags, and a folder's count and first child or a file's place."""
        start = self.tree + index * _NODE_SIZE[self.version]
        name, flags = struct.unpack_from(">IH", self.blob, start)
        if flags & _FOLDER:
            return name, flags, *struct.unpack_from(">II", self.blob, start + 6)
        place = struct.unpack_from(">I", self.blob, start + 10)[0]  # after country and language
        return name, flags, 0, place

    def name(self, place: int) -> str:
        start = self.names + place
        length = struct.unpack_from(">H", self.blob, start)[0]
        begin = start + 6  # after a hash of the name
        return self.blob[begin : begin + 2 * length].decode("utf-16-be")

    def content(self, flags: int, place: int) -> bytes:
        start = self.contents + place
        size = struct.unpack_from(">I", self.blob, start)[0]
        content = self.blob[start + 4 : start + 4 + size]
        if flags & _ZSTD:
            raise ResourceError("The file is compressed by zstd, expected zlib or none.")
        return zlib.decompress(content[4:]) if flags & _COMPRESSED else content


def open_resource(blob: bytes) -> dict[str, partial]:
    """The files of a resource by their paths in it; calling one gives its bytes.

    Raises ResourceError for anything but a resource of version 1 to 3.
    """
    if blob[:4] != _MAGIC:
        raise ResourceError(f"A Qt resource begins with {_MAGIC!r}, found {blob[:4]!r}.")
    resource = _Resource(blob, *struct.unpack_from(">4I", blob, 4))
    if resource.version not in _NODE_SIZE:
        raise ResourceError(f"Qt resource of version {resource.version}, expected 1, 2 or 3.")
    files = {}
    waiting = [(0, "")]
    while waiting:
        index, folder = waiting.pop()
        name, flags, count, place = resource.node(index)
        path = f"{folder}{resource.name(name)}" if index else ""  # the root has no name
        if flags & _FOLDER:
            inside = f"{path}/" if path else ""
            waiting.extend((place + child, inside) for child in range(count))
        else:
            files[path] = partial(resource.content, flags, place)
    return files
