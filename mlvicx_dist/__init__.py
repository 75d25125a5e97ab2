"""Self-supervised pretraining of chest X-ray encoders at cluster scale (MLVICX)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_encoder"]

if TYPE_CHECKING:
    from mlvicx_dist.train.weights import load_encoder


def __getattr__(name: str) -> Any:
    """Import torch only when an encoder is asked for: `mlvicx --help` stays quick."""
    if name == "load_encoder":
        from mlvicx_dist.train.weights import load_encoder

        return load_encoder
    raise AttributeError(f"module 'mlvicx_dist' has no attribute '{name}'")
