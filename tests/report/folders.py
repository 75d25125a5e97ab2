"""Folders of a run, a sweep and a comparison as their commands leave them, without a training."""

import json
from dataclasses import asdict

import numpy as np
import yaml
from small import small_tree

from mlvicx_dist.config import CompareConfig, EvaluateConfig, PretrainConfig, parse_config, to_tree
from mlvicx_dist.evaluate.comparison import images_path, scores_path
from mlvicx_dist.evaluate.embed import Embeddings
from mlvicx_dist.evaluate.evaluation import evaluate
from mlvicx_dist.evaluate.methods import methods_of
from mlvicx_dist.evaluate.task import Scores, images_of, plane, write_images, write_scores
from mlvicx_dist.model.encoder import Encoder
from mlvicx_dist.model.export_folder import save_export
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.storage import make_folder
from mlvicx_dist.tune.confirm import Confirmed
from mlvicx_dist.tune.records import Look, Record, Records

CLASSES = ("Cardiomegaly", "Consolidation", "Effusion", "Mass", "Nodule", "Pleural_Thickening")
HEADS = ("global", "local")


def pretraining(shards, **more):
    return {
        "kind": "pretrain",
        "data": {"shards": [{"path": str(shards)}], "loader_workers": 0},
        **small_tree(),
        "train": {"batch_size": 8, "epochs": 4, "optimizer": "adamw", "warmup_epochs": 1},
        **more,
    }


def rows(count):
    """Those of a training whose loss falls."""
    rng = np.random.default_rng(0)
    found = []
    for k in range(1, count + 1):
        rest = float(np.exp(-k / count * 3) + 0.02 * rng.random())
        row = {"step": 10 * k, "epoch": k / 4, "learning_rate": 1e-3 * rest, "loss": 50 * rest}
        for head in HEADS:
            parts = {"invariance": 10 * rest, "variance": 14 * rest, "covariance": 1 - rest}
            row |= {f"{head}/{term}_weighted": value for term, value in parts.items()}
            row[f"{head}/std"] = 1.1 - rest
        rate = {"images_per_s": 200 + 9 * rng.random(), "data_wait": 0.01, "time_s": 3.0 * k}
        found.append(row | {"encoder/rankme": 64 * (1 - rest / 2), "encoder/std": 0.5} | rate)
    return found


def run_folder(folder, shards):
    """A finished run, evaluated with few labels and subgroups."""
    run = {"name": "small", "storage_path": str(folder.parent)}
    config = parse_config(pretraining(shards, run=run), "a run")
    assert isinstance(config, PretrainConfig)
    (folder / "evaluations").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_tree(config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    (folder / "state.json").write_text(json.dumps({"state": "finished", "steps": 400}))
    about = {"versions": {"torch": "2"}, "machine": {"cpus": 2}, "world_size": 1, "images": 60}
    (folder / "environment.json").write_text(json.dumps(about))
    settings = parse_config(
        {
            "kind": "evaluate",
            "name": "phantoms",
            "data": {"shards": [str(shards)]},
            "bootstrap": {"draws": 100},
            "few_labels": {"fractions": [0.2, 1.0]},
            "probe": {"l2": [0.1], "max_iterations": 20},
        },
        "an evaluation",
    )
    assert isinstance(settings, EvaluateConfig)
    result = evaluate(embeddings(), settings)
    (folder / "evaluations" / "phantoms.json").write_text(json.dumps(result))
    return folder


def embeddings():
    """Of 400 patients; the first encoder sees what the second does not."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (400, len(CLASSES)))
    seeing, blind, dark = (rng.normal(size=(400, n)).astype(np.float32) for n in (12, 12, 576))
    seeing[:, : len(CLASSES)] += labels * np.linspace(0.4, 2, len(CLASSES))
    blind[:, : len(CLASSES)] += 0.3 * labels
    splits = ["train"] * 200 + ["val"] * 50 + ["test"] * 150
    about = tuple(
        {
            **{"split": split, "patient": str(k), "source": "s", "key": str(k)},
            **{"sex": "FM"[k % 2], "view": ("PA", "AP")[k % 3 == 0], "age": 20 + k % 60},
        }
        for k, split in enumerate(splits)
    )
    return Embeddings((seeing, blind, dark), labels.astype(float), CLASSES, about)


def sweep_folder(folder, shards):
    """Twelve trials of every end, the best one trained anew."""
    settings = {
        "kind": "sweep",
        "name": "small",
        "storage_path": str(folder.parent),
        "pretrain": pretraining(shards),
        "space": {
            "loss.lambda_local": {"log_uniform": [0.1, 10]},
            "loss.global.variance": {"uniform": [5, 50]},
            "model.levels": {"choice": [[1], [1, 3], "all"]},
        },
        "search": {"trials": 12},
        "target": {"every_steps": 4},
    }
    folder.mkdir()
    (folder / "sweep.yaml").write_text(yaml.safe_dump(settings))
    rng = np.random.default_rng(0)
    records = Records(folder / "trials")
    for k in range(12):
        state = ("finished", "pruned", "pruned", "diverged", "failed", "running")[k % 6]
        reached = {"finished": 4, "pruned": 2, "running": 3}.get(state, 2)
        weight = float(10 ** rng.uniform(-1, 1))
        looks = tuple(
            Look(4 * n, 0.6 + 0.03 * n + 0.02 * float(rng.random()), 60.0 * k + 40 * n, 40 * n, 2)
            for n in range(1, reached + 1)
        )
        point = {"loss.lambda_local": weight, "loss.global.variance": float(rng.uniform(5, 50))}
        point["model.levels"] = [[1], [1, 3], "all"][k % 3]
        causes = {"diverged": "step 9: the loss is nan.", "failed": "its worker died."}
        ended = None if state == "running" else 60.0 * k + 40 * reached
        records.write(Record(k, point, state, looks, 60.0 * k, ended, 0, causes.get(state, "")))
    values = {"best": [0.71, 0.74, 0.73], "default": [0.70, 0.71, 0.69]}
    confirmed = Confirmed("probe", 6, [1, 2, 3], values, 0.027, -0.01, 0.06, 0.95, 80, 60)
    (folder / "confirm.json").write_text(json.dumps(asdict(confirmed)))
    (folder / "best.yaml").write_text("kind: pretrain\n")
    return folder


def compare_folder(folder, shards):
    """Two methods beside both floors, two seeds, one encoder with context maps."""
    draws, shares = 100, (0.2, 1.0)
    settings = {
        "kind": "compare",
        "name": "small",
        "storage_path": str(folder.parent),
        "pretrain": pretraining(shards),
        "methods": {"mlvicx": {}, "vicreg": {}, "untrained": {}, "pixels": {}},
        "seeds": [0, 1],
        "tasks": [
            {
                "name": "phantoms",
                "data": {"shards": [str(shards)]},
                "bootstrap": {"draws": draws},
                "few_labels": {"fractions": list(shares)},
            }
        ],
    }
    config = parse_config(settings, "a comparison")
    assert isinstance(config, CompareConfig)
    folder.mkdir()
    (folder / "compare.yaml").write_text(yaml.safe_dump(to_tree(config), sort_keys=False))
    (task,) = config.tasks
    images = images_of(task, config.pretrain)
    for path in (images_path(folder, task.name), scores_path(folder, task.name, "x")):
        make_folder(path.parent)
    write_images(images_path(folder, task.name), images)
    rng = np.random.default_rng(0)
    for strength, method in zip((1.5, 1.0, 0.3, 0.2), methods_of(config), strict=True):
        for run in dict.fromkeys(method.run(seed) for seed in config.seeds):
            noise = rng.normal(size=images.labels.shape)
            few = [
                (
                    0.5 + 0.2 * share * strength + 0.02 * rng.random(5),
                    0.6 + 0.1 * rng.random((5, draws)),
                )
                for share in shares
            ]
            features = rng.normal(size=(len(noise), 4))
            scores = Scores(
                noise + strength * np.nan_to_num(images.labels), 0.7, few, plane(features)
            )
            write_scores(scores_path(folder, task.name, run), scores)
            if not method.floor:
                make_folder(folder / "runs" / run)
                lines = "".join(json.dumps(row) + "\n" for row in rows(5))
                (folder / "runs" / run / "metrics.jsonl").write_text(lines)
    model = build_model(config.pretrain.model, 0)
    export = folder / "runs" / "mlvicx-seed-0" / "exports" / "step-00000050"
    make_folder(export.parent)
    save_export(Encoder.from_model(model, 32), export, card="", known={})
    return folder


FOLDERS = {"run": run_folder, "sweep": sweep_folder, "comparison": compare_folder}
