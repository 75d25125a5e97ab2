"""The methods of a pretraining, and what of `loss` and `model` each reads."""

from __future__ import annotations

from typing import Literal

Method = Literal["mlvicx", "vicreg", "barlow_twins", "simclr", "simsiam", "supervised"]
SUPERVISED: Method = "supervised"
"""The one that reads labels."""
METHODS: dict[str, str] = {
    "mlvicx": "MLVICX (arXiv 2403.11504)",
    "vicreg": "VICReg (arXiv 2105.04906)",
    "barlow_twins": "Barlow Twins (arXiv 2103.03230)",
    "simclr": "SimCLR (arXiv 2002.05709)",
    "simsiam": "SimSiam (arXiv 2011.10566)",
    "supervised": "Supervised (cross-entropy of the labels)",
}
"""What pages call them."""
LOSS_KEYS: dict[Method, tuple[str, ...]] = {
    "mlvicx": ("global", "local", "lambda_local", "level_weights"),
    "vicreg": ("global",),
    "barlow_twins": ("redundancy",),
    "simclr": ("temperature",),
    "simsiam": (),
    "supervised": ("label_splits",),
}
"""What of `loss` each method reads."""
_EACH = ("backbone", "channels", "init")
MODEL_KEYS: dict[str, tuple[str, ...]] = {
    "mlvicx": (*_EACH, "levels", "level_convs", "context", "local", "projector"),
    "vicreg": (*_EACH, "projector"),
    "barlow_twins": (*_EACH, "projector"),
    "simclr": (*_EACH, "projector"),
    "simsiam": (*_EACH, "projector", "predictor_width"),
    "supervised": (*_EACH, "classes"),
}
"""What of `model` each method reads."""
