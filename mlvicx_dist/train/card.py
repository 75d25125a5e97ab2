"""What an export says of itself: the record of its training, and the model card.

Nothing is said that was not recorded; what is not known is called so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlvicx_dist.config import LOSS_KEYS, METHODS, SUPERVISED, PretrainConfig, to_tree
from mlvicx_dist.model.encoder import NORMALISATION, Encoder

ELSEWHERE = "weights of another run or export"
"""In the place of a path: a card may be published."""
STARTS = {
    "imagenet": "timm's ImageNet weights, whose terms hold for what is made of them",
    "random": "random weights",
}
KEPT = ("method", "views", "model", "loss", "train")


def training_record(config: PretrainConfig, state: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a training, without a path of the machine, as JSON values.

    Args:
        config: Its settings.
        state: Of a checkpoint: `step`, `manifests`, `versions` and perhaps `data`.

    Returns:
        `run`, `step`, `settings` that change the mathematics, `data` (a dict a shard folder:
        `manifest`, its digest, and where they were recorded `sources` and `images`) and `versions`.
    """
    tree = to_tree(config)
    settings = {key: tree[key] for key in KEPT}
    settings["data"] = {"splits": config.data.splits}
    settings["loss"] = {key: tree["loss"][key] for key in LOSS_KEYS[config.method]}
    if config.train.init_from:
        settings["train"]["init_from"] = ELSEWHERE
    return {
        "run": config.run.name,
        "step": state["step"],
        "settings": settings,
        "data": state.get("data") or [{"manifest": digest} for digest in state["manifests"]],
        "versions": dict(state["versions"]),
    }


def model_card(
    encoder: Encoder,
    training: Mapping[str, Any],
    *,
    evaluation: Sequence[str] = ("Not evaluated.",),
    usage: Sequence[str] = (),
) -> str:
    """The model card: use, training, evaluation, limits, privacy and licence, as Markdown.

    Args:
        encoder: What is exported.
        training: See `training_record`; empty where nothing is known.
        evaluation: Its lines.
        usage: A paragraph for each further file, and for what there is not.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    settings = training.get("settings", {})
    mean, std = NORMALISATION[encoder.settings.channels]
    environment = Environment(
        loader=PackageLoader("mlvicx_dist.train", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        # Markdown.
        autoescape=False,
    )
    return environment.get_template("card.md.j2").render(
        encoder=encoder,
        training=training,
        method=METHODS[settings["method"]] if settings else "",
        start=_start(settings) if settings else "",
        labels=labels_read(settings),
        mean=mean,
        std=std,
        evaluation=evaluation,
        usage=usage,
        named=_named,
    )


def _start(settings: Mapping[str, Any]) -> str:
    return ELSEWHERE if settings["train"]["init_from"] else STARTS[settings["model"]["init"]]


def labels_read(settings: Mapping[str, Any]) -> str:
    """What of labels the training read, in words that follow 'pretrained on chest radiographs'."""
    if settings.get("method") != SUPERVISED:
        return "without labels"
    return f"with the labels of {', '.join(settings['model']['classes'] or ['all classes'])}"


def _named(values: Mapping[str, Any], form: str) -> str:
    """Names and their values in a row, numbers with commas."""
    return ", ".join(
        form % (name, f"{value:,}" if isinstance(value, int) else value)
        for name, value in values.items()
    )
