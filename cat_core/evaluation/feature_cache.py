"""Features that were made before, so that a stopped evaluation goes on and a new one is quick."""

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .extractors import Extractor
from .metrics import EvaluationError


class FeatureCache:
    """A file of features by extractor and by what the picture shows.

    The key is a hash of the pixels, so a picture that was made again, or another crop, is another
    one, and a folder may move.

    Raises EvaluationError where the file cannot be used.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.base = sqlite3.connect(path)
            self.base.execute(
                "create table if not exists features (key blob primary key, feature blob)"
            )
        except (OSError, sqlite3.Error) as error:
            raise EvaluationError(
                f"{path} cannot be used as a cache ({error}). Delete it or give another --cache."
            ) from error

    def __call__(self, extractor: Extractor, identity: str) -> Extractor:
        """The same extractor, asked only for what is not in the cache.

        Args:
            identity: of the extractor, its weights included.
        """

        def cached(pictures: Sequence[Image.Image]) -> torch.Tensor:
            keys = [_key(identity, picture) for picture in pictures]
            features: dict[int, torch.Tensor] = {}
            unknown = []
            for place, key in enumerate(keys):
                found = self._find(key)
                if found is None:
                    unknown.append(place)
                else:
                    features[place] = found
            if unknown:
                made = extractor([pictures[place] for place in unknown]).float()
                features.update(zip(unknown, made, strict=True))
                self._keep([keys[place] for place in unknown], made)
            return torch.stack([features[place] for place in range(len(keys))])

        return cached

    def _find(self, key: bytes) -> torch.Tensor | None:
        found = self.base.execute("select feature from features where key = ?", (key,)).fetchone()
        return None if found is None else torch.from_numpy(np.frombuffer(found[0], "<f4").copy())

    def _keep(self, keys: Sequence[bytes], features: torch.Tensor) -> None:
        rows = []
        for key, feature in zip(keys, features, strict=True):
            rows.append((key, feature.cpu().numpy().astype("<f4").tobytes()))
        try:
            with self.base:  # whole or not at all
                self.base.executemany("insert or replace into features values (?, ?)", rows)
        except sqlite3.Error as error:
            raise EvaluationError(
                f"Cannot write {self.path}: {error}. Check free space and permissions."
            ) from error


def _key(identity: str, picture: Image.Image) -> bytes:
    digest = hashlib.sha256(f"{identity}\0{picture.size}\0".encode())
    digest.update(np.asarray(picture).tobytes())
    return digest.digest()
