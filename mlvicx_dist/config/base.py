"""What every setting shares: frozen, typed, a key that does not exist is an error."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""What a folder may be called."""


class Settings(BaseModel):
    """Base of all settings: frozen, and a key that does not exist is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )


class Cached(Settings):
    """Where a node keeps what it would else fetch or make again."""

    cache_dir: str | None = None
    """For shards of s3://, gs:// and http(s)://, and embeddings; None: a folder of the temp dir."""
    cache_gb: Positive = 50.0
    """How much of them it keeps, in 10^9 bytes."""
