"""What the evaluations of a run say of a checkpoint, as lines of its model card."""

from __future__ import annotations

import json
from typing import Any

from mlvicx_dist.errors import DataError
from mlvicx_dist.evaluate.summary import summary
from mlvicx_dist.model.encoder import Encoder, encoder_digest
from mlvicx_dist.storage import Place, reaching, read_bytes, told

NONE = ["Not evaluated."]
HIDDEN = "the evaluation's own file says why"
"""A reason may name a folder of the machine, and a card may be published."""


def evaluation_lines(weights: Place, encoder: Encoder) -> list[str]:
    """The evaluations of an encoder in its run's folder; those of other checkpoints are named.

    They are told by the digest of the weights, since another run may have had the folder before.

    Nothing where there are none, or where an export lies in no run: beside it may be anything.

    Raises:
        DataError: an evaluation cannot be read.
    """
    shown: list[str] = []
    others: list[str] = []
    digest = encoder_digest(encoder)
    for path in _files(weights.parent.parent):
        try:
            with reaching(path):
                result = json.loads(read_bytes(path))
            about = str(result["checkpoint"]).removesuffix(".pt")
            if result.get("encoder") == digest:
                shown += _one(result)
            else:
                others.append(f"`{result['name']}` ({about})")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = told(error) if isinstance(error, OSError) else type(error).__name__
            raise DataError(
                f"{path}: the evaluation cannot be read ({reason}); evaluate again, or remove it."
            ) from None
    if others:
        words = f"Evaluations of other weights in this run, not shown: {', '.join(others)}."
        return [*(shown or [*NONE, ""]), words]
    return shown


def _files(run_dir: Place) -> list[Place]:
    folder = run_dir / "evaluations"
    try:
        with reaching(folder):
            if not (run_dir / "config.yaml").is_file():
                return []
            found = [path for path in folder.iterdir() if path.name.endswith(".json")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(
            f"{folder}: the evaluations cannot be listed ({told(error)}); mend your access to it."
        ) from None
    return sorted(found, key=lambda path: str(path.name))


def _one(result: dict[str, Any]) -> list[str]:
    overlap = result.get("overlap", {"unknown": "it was not looked for"})
    if "unknown" in overlap:
        overlap = {**overlap, "unknown": HIDDEN}
    if "unknown" in overlap.get("labels", {}):
        overlap = {**overlap, "labels": {**overlap["labels"], "unknown": HIDDEN}}
    return [
        f"### {result['name']}",
        "",
        "The frozen encoder beside the same one untrained, on patients that no probe has seen. How",
        "each figure is made: docs/evaluation.md of mlvicx_dist.",
        "",
        "```text",
        *summary({**result, "overlap": overlap}),
        "```",
        "",
    ]
