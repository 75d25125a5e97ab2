"""The weights under the names of timm's plain model, where that is the same function.

It is so without context gates, for backbones whose plain model ends where their levels end.
"""

from __future__ import annotations

import timm
import torch
from safetensors.torch import save

from mlvicx_dist.export.agreement import close, phantoms
from mlvicx_dist.model.encoder import NORMALISATION, Encoder, normalise

FILE = "timm.safetensors"


def timm_weights(encoder: Encoder) -> tuple[bytes | None, str]:
    """What `timm.create_model(backbone, in_chans=C, num_classes=0)` takes, and words on it.

    Returns:
        The bytes of a safetensors file, and how to use it; or None, and why there is none.
    """
    settings = encoder.settings
    plain = f"timm's plain `{settings.backbone}`"
    if encoder.gated:
        return None, (
            f"{plain} is another function: it has none of the context gates, which are part of "
            "this encoder. Take it with `mlvicx_dist.load_encoder`."
        )
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(settings.backbone, in_chans=settings.channels, num_classes=0)
    own = encoder.backbone.backbone.state_dict()
    # timm joins the first two parts of a name by '_' where it takes a model apart into levels.
    names = {key: key if key in own else key.replace(".", "_", 1) for key in model.state_dict()}
    unknown = sorted(key for key, name in names.items() if name not in own)
    if unknown or len(names) != len(own):
        what = f" ({unknown[0]} and others)" if unknown else ""
        return None, (
            f"{plain} is another function: it has layers after the last level that were not "
            f"pretrained{what}. Take this one with `mlvicx_dist.load_encoder`."
        )
    weights = {key: own[name].detach().cpu().contiguous() for key, name in names.items()}
    model.load_state_dict(weights)
    images = phantoms(encoder.image_size_px)
    with torch.inference_mode():
        expected = encoder(images)
        found = model.eval()(normalise(images.float() / 255, settings.channels))
    if found.shape != expected.shape or not close(found, expected):
        return None, (
            f"{plain} is another function with the same weights: it pools in another way. Take "
            "this one with `mlvicx_dist.load_encoder`."
        )
    mean, std = (list(values) for values in NORMALISATION[settings.channels])
    return save(weights), (
        f"`{FILE}` holds the same weights for `timm.create_model({settings.backbone!r}, "
        f"in_chans={settings.channels}, num_classes=0)` and `load_state_dict(…, strict=True)`: the "
        f"same embeddings, of images in [0, 1] from which {mean} was subtracted and that were "
        f"divided by {std}."
    )
