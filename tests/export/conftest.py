"""A run that was not trained: what is exported is the same."""

import pytest
import torch
import yaml
from small import small_tree

from mlvicx_dist.config import parse_config, to_tree
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.train.checkpoint import save_checkpoint

DATA = [
    {"manifest": "ab" * 32, "images": 1234, "sources": {"nih": 2000, "ours": 500}, "weight": 1.0}
]


def _make_run(folder, *, data=DATA, **model):
    """A run of one checkpoint, of step 3; its batch norms have seen images."""
    tree = {
        "kind": "pretrain",
        "run": {"name": folder.name, "storage_path": str(folder.parent)},
        "data": {"shards": [{"path": str(folder / "private-place")}]},
        "train": {"batch_size": 8, "seed": 5},
        **small_tree(),
    }
    tree["model"] = {**tree["model"], **model}
    config = parse_config(tree, "test")
    network = build_model(config.model, 0).train()
    torch.manual_seed(0)
    network.encoder(torch.randn(4, config.model.channels, 32, 32))
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(to_tree(config)))
    state = {
        "step": 3,
        "model": network.state_dict(),
        "optimizer": {},
        "settings": to_tree(config),
        "manifests": ["ab" * 32],
        "versions": {"mlvicx_dist": "0.1.0", "torch": "2.x"},
    }
    save_checkpoint(folder, {**state, **({"data": data} if data else {})}, keep=1)
    return folder


@pytest.fixture(scope="session")
def make_run():
    return _make_run


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    return _make_run(tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture
def exported(run_dir, tmp_path):
    """An export of it, to be damaged."""
    from mlvicx_dist.export.command import export

    return export(run_dir, tmp_path / "export").folder
