"""One image: as a source lists it, and as a shard tells of it, without anything of the patient."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlvicx_dist.errors import DataError
from mlvicx_dist.ingest.masks import RunLengths

KEY_BYTES = 16
VIEWS = ("PA", "AP", "LL", "RL", "LATERAL")
"""What a shard says of a view; whatever else a table or a header holds stays there."""
OLDEST_AGE = 89
ALLOWED_KEYS = ("source", "patient", "split", "view", "sex", "age", "labels", "boxes", "phash")
"""What the JSON of a sample may hold, and nothing else (DESIGN 5)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """A finding's place in pixels of the image that it belongs to."""

    label: str
    left: float
    top: float
    right: float
    bottom: float

    def scaled(self, factor: float) -> dict[str, Any]:
        """The box in an image resized by `factor`, as JSON values."""
        sides = {name: round(getattr(self, name) * factor, 2) for name in _SIDES}
        return {"label": self.label, **sides}


_SIDES = ("left", "top", "right", "bottom")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One image as a source lists it; `image_id` and `patient_id` are in clear and stay here.

    `path` is a path or a URL. View, sex and age that are None are taken from a DICOM header.
    """

    source: str
    image_id: str
    path: str
    patient_id: str
    labels: Mapping[str, int | None]
    split: str | None = None
    view: str | None = None
    sex: str | None = None
    age: int | None = None
    boxes: tuple[Box, ...] = ()
    mask: RunLengths | None = None


def sample_key(salt: bytes, source: str, image_id: str) -> str:
    """The key of an image: hexadecimal, unguessable without the owner's salt."""
    return _hash(salt, "image", source, image_id)


def patient_key(salt: bytes, source: str, patient_id: str) -> str:
    """The key of a patient, likewise."""
    return _hash(salt, "patient", source, patient_id)


def salt_digest(salt: bytes) -> str:
    """What a manifest tells of the salt: enough to know it again, not to use it."""
    return _hash(salt, "salt")


def _hash(salt: bytes, *parts: str) -> str:
    text = "\x1f".join(parts).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, key=salt, digest_size=KEY_BYTES).hexdigest()


def load_salt(path: Path | None = None) -> bytes:
    """The owner's salt, made at the first use with mode 600.

    Args:
        path: Its file; None is `mlvicx/salt` in the user's config folder.

    Raises:
        DataError: the file cannot be read or made, or is no salt.
    """
    if path is None:
        config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        path = Path(config) / "mlvicx" / "salt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32) + "\n")
        salt = bytes.fromhex(path.read_text().strip())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not hexadecimal"
        raise DataError(
            f"{path}: the salt cannot be used ({reason}); give a file of 64 hexadecimal digits "
            "with --salt-file, or a path where one can be made."
        ) from None
    if len(salt) != 32:
        raise DataError(
            f"{path}: a salt is 64 hexadecimal digits; give such a file, or remove this one if no "
            "shards were made with it."
        )
    return salt


def sample_json(
    record: Record, *, patient: str, split: str, classes: tuple[str, ...], scale: float, phash: str
) -> dict[str, Any]:
    """What a shard tells of an image: the allow-list of DESIGN 5 and nothing else.

    Args:
        record: The image.
        patient: Its patient's key.
        split: The split that it is in.
        classes: Class names in order; a class that the record does not name is null.
        scale: Stored pixels over original pixels, for the boxes.
        phash: Perceptual hash, 64 hexadecimal digits.
    """
    age = record.age
    view = (record.view or "").upper().split(" ")[0]
    return {
        "source": record.source,
        "patient": patient,
        "split": split,
        "view": view if view in VIEWS else None,
        "sex": record.sex if record.sex in ("F", "M") else None,
        "age": min(age, OLDEST_AGE) if age is not None and 0 <= age <= 130 else None,
        "labels": {name: record.labels.get(name) for name in classes},
        "boxes": [box.scaled(scale) for box in record.boxes],
        "phash": phash,
    }
