"""From a run, checkpoint or export to a folder with the encoder and its card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlvicx_dist.errors import CheckpointError
from mlvicx_dist.export import onnx_file, timm_weights
from mlvicx_dist.export.evidence import NONE, evaluation_lines
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.model.export_folder import EXPORT_FILES, known_of, save_export
from mlvicx_dist.progress import progress
from mlvicx_dist.storage import Place, place, reaching, told
from mlvicx_dist.train.card import model_card, training_record
from mlvicx_dist.train.checkpoint import local_copy, read_checkpoint
from mlvicx_dist.train.weights import find_weights, load_encoder, local_folder, settings_of


@dataclass(frozen=True)
class Exported:
    """A folder that was written: its files, and what is to be known of them."""

    folder: Place
    files: tuple[str, ...]
    words: tuple[str, ...]


def export(source: str | Path, out: str | Path, *, onnx: bool = False) -> Exported:
    """Write the encoder of a run, checkpoint or export to the folder `out`.

    The model card carries what is known of its training, and the evaluations of this checkpoint
    that its run's folder holds.

    Args:
        source: What `load_encoder` takes.
        out: A folder that is not there yet, or is empty; local or remote.
        onnx: Write an ONNX file too.

    Raises:
        CheckpointError: there is no whole checkpoint, `out` holds something or cannot be written,
            or the encoder cannot be written as ONNX.
        ConfigError: the libraries for ONNX are missing.
        DataError: an evaluation of the run cannot be read.
    """
    if onnx:
        onnx_file.check_onnx()
    folder = place(out)
    _check_empty(folder)
    weights = find_weights(source)
    encoder = load_encoder(weights)
    known = _known(weights, encoder)
    more: dict[str, bytes] = {}
    words: list[str] = []
    data, word = timm_weights.timm_weights(encoder)
    words.append(word)
    if data is not None:
        more[timm_weights.FILE] = data
    if onnx:
        with progress("writing and checking ONNX", 1, "files") as bar:
            more[onnx_file.FILE], free = onnx_file.onnx_bytes(encoder)
            bar.advance()
        words.append(onnx_file.words(encoder, free=free))
    card = model_card(
        encoder, known["training"], evaluation=known["evaluation"] or NONE, usage=words
    )
    save_export(encoder, folder, card=card, known=known, more=more)
    return Exported(folder, (*EXPORT_FILES, *more), tuple(words))


def _known(weights: Place, encoder: Encoder) -> dict[str, Any]:
    """How an encoder was trained, and the lines of its evaluations; empty where none is known."""
    if weights.is_dir():
        known = {"training": {}, "evaluation": [], **known_of(local_folder(weights))}
    else:
        state = read_checkpoint(local_copy(weights))
        known = {"training": training_record(settings_of(state, weights), state), "evaluation": []}
    return {**known, "evaluation": evaluation_lines(weights, encoder) or known["evaluation"]}


def _check_empty(folder: Place) -> None:
    """See that nothing is at a place yet.

    Raises:
        CheckpointError: something is, or that cannot be told.
    """
    try:
        with reaching(folder):
            there = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: it cannot be reached ({told(error)}); mend your access to it or give "
            "another folder."
        ) from None
    if there:
        raise CheckpointError(
            f"{folder}: something is there already; give --out a folder that does not exist or is "
            "empty."
        )
