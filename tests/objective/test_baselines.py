"""The baselines: their losses belong to the global batch, and they train through the same loop."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from group import run_group
from group import settings as run_settings
from processes import free_port, run_processes
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from mlvicx_dist import load_encoder
from mlvicx_dist.config import (
    LocalHead,
    Loss,
    Model,
    Projector,
    load_config,
    parse_config,
    to_tree,
)
from mlvicx_dist.errors import ConfigError
from mlvicx_dist.model.mlvicx import build_model
from mlvicx_dist.objective.baselines import FROM_LIBRARY, baseline_loss, check_library
from mlvicx_dist.objective.batch_norm import convert_batch_norm
from mlvicx_dist.objective.global_batch import ddp_scale
from mlvicx_dist.objective.labels import label_loss
from mlvicx_dist.report.charts import of_run
from mlvicx_dist.report.run import _heads
from mlvicx_dist.stream.order import rank_shares
from mlvicx_dist.train.fingerprint import fingerprint
from mlvicx_dist.train.step import TwoViews

ROWS, WIDTH = 7, 12
BASELINES = ("vicreg", *FROM_LIBRARY)
CLASSES = ["a", "b", "c"]
# Unequal numbers of known labels in any two parts of the batch, and a row without one.
NAN = float("nan")
LABELS = torch.tensor(
    [[0, 1, NAN], [NAN] * 3, [1, 0, 0], [1, NAN, 1], [0, 0, 0], [NAN, NAN, 1], [1, 1, 0]]
)


def step(method, world_size, rank):
    """The loss, the mean deviation and the gradients of one float64 step."""
    torch.set_num_threads(1)
    shares = rank_shares(ROWS, world_size)
    predictor = 4 if method == "simsiam" else None
    settings = Model(
        backbone="test_resnet",
        levels=[],
        context=False,
        local=LocalHead(resize_px=8, channels=4, pool=2),
        projector=Projector(width=WIDTH),
        predictor_width=predictor,
        classes=CLASSES if method == "supervised" else None,
    )
    model = build_model(settings, 0).double()
    if world_size > 1:
        convert_batch_norm(model, torch.device("cpu"))
    module = TwoViews(model)
    if world_size > 1:
        module = DistributedDataParallel(module, forward_sync_buffers=False)
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(2, ROWS, 1, 32, 32, generator=generator, dtype=torch.float64)
    start = sum(shares[:rank])
    own = slice(start, start + shares[rank])
    first, second, _ = module(*views[:, own])
    if method == "supervised":
        logits = torch.cat([first["global"], second["global"]])
        loss, spread = label_loss(logits, LABELS[own].repeat(2, 1)), torch.tensor(1.0)
    else:
        loss, spread = baseline_loss(method, first, second, Loss(), shares=shares)
    (loss * ddp_scale()).backward()
    return loss.item(), spread.item(), {n: p.grad for n, p in model.named_parameters()}


def steps(rank, world_size, port, path):
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    methods = (*FROM_LIBRARY, "supervised")
    found = {method: step(method, world_size, rank) for method in methods}
    if rank == world_size - 1:
        torch.save(found, path)
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_processes_with_unequal_shares_equal_one(world_size, tmp_path):
    path = str(tmp_path / "found.pt")
    run_processes(steps, (world_size, free_port(), path), world_size)
    for method, (loss, spread, gradients) in torch.load(path).items():
        one_loss, one_spread, expected = step(method, 1, 0)
        assert loss == pytest.approx(one_loss, rel=1e-12), method
        assert spread == pytest.approx(one_spread, rel=1e-12), method
        assert gradients.keys() == expected.keys()
        scale = max(g.abs().max() for g in expected.values())
        assert scale > 1e-6
        apart = max((gradients[n] - g).abs().max() for n, g in expected.items())
        assert apart <= 1e-12 * scale, method


def plain(method, a, b, p, q):
    """The formulas of the papers."""
    if method == "simsiam":
        ones = [functional.cosine_similarity(*pair) for pair in ((p, b), (q, a))]
        return -(ones[0].mean() + ones[1].mean()) / 2
    if method == "simclr":
        z = functional.normalize(torch.cat([a, b]), dim=1)
        cosines = (z @ z.T / Loss().temperature).fill_diagonal_(-torch.inf)
        other = torch.arange(len(z)).roll(len(a))
        return functional.cross_entropy(cosines, other)
    a, b = ((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() for x in (a, b))
    c = a.T @ b / len(a)
    on, off = (c.diagonal() - 1).square().sum(), c.square().sum() - c.diagonal().square().sum()
    return on + Loss().redundancy * off


@pytest.mark.parametrize("method", FROM_LIBRARY)
def test_the_library_computes_what_the_paper_says(method):
    generator = torch.Generator().manual_seed(0)
    a, b, p, q = torch.randn(4, 9, 6, generator=generator, dtype=torch.float64)
    first, second = {"global": a, "prediction": p}, {"global": b, "prediction": q}
    loss, spread = baseline_loss(method, first, second, Loss(), shares=[9])
    assert loss.item() == pytest.approx(plain(method, a, b, p, q).item(), rel=1e-12)
    assert spread.item() == pytest.approx(a.std(0).mean().item(), rel=1e-12)


@pytest.mark.parametrize("method", ["barlow_twins", "simclr"])
def test_the_librarys_default_would_be_another_loss_on_two_workers(method):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 8, 6, generator=generator, dtype=torch.float64)

    def loss(rows):
        views = ({"global": x[rows]} for x in (a, a + b))
        return baseline_loss(method, *views, Loss(), shares=[len(a[rows])])[0].item()

    halves = (loss(slice(4)) + loss(slice(4, 8))) / 2
    assert abs(halves - loss(slice(8))) > 0.1 * abs(loss(slice(8)))


@pytest.mark.parametrize("method", FROM_LIBRARY)
def test_a_loss_is_at_least_float32(method):
    a, b = torch.randn(2, 8, 16).bfloat16()
    first, second = ({"global": x, "prediction": x} for x in (a, b))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = baseline_loss(method, first, second, Loss(), shares=[8])
    exact = baseline_loss(
        method,
        *({"global": x.double(), "prediction": x.double()} for x in (a, b)),
        Loss(),
        shares=[8],
    )[0]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("method", BASELINES)
def test_a_short_training_lowers_the_loss_and_exports_an_encoder(phantom_shards, tmp_path, method):
    changes = {"epochs": 40, "batch_size": 24, "learning_rate_per_256": 0.05}
    tree = run_settings(phantom_shards, tmp_path, **{f"train__{k}": v for k, v in changes.items()})
    tree |= {"method": method, "checkpoint": {}}
    run_dir = tmp_path / "small"
    assert not run_group(tree, run_dir, 1)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert rows[-1]["global/std"] > 0
    assert _heads(rows) == ["global"]
    titles = [chart["title"] for chart in of_run(rows, ["global"])]
    assert ("Weighted terms, global" in titles) == (method == "vicreg")
    (export,) = (run_dir / "exports").iterdir()
    encoder = load_encoder(export)
    assert encoder(torch.rand(2, 1, 32, 32)).shape == (2, encoder.features)
    again = load_encoder(run_dir)
    assert torch.equal(encoder(torch.zeros(1, 1, 32, 32)), again(torch.zeros(1, 1, 32, 32)))
    assert {"vicreg": "VICReg", "barlow_twins": "Barlow", "simclr": "SimCLR"}.get(
        method, "SimSiam"
    ) in (export / "README.md").read_text()


def config(tmp_path, method, **changes):
    tree = run_settings("shards", tmp_path, **changes)
    return parse_config({**tree, "method": method}, "a.yaml")


@pytest.mark.parametrize("method", [*BASELINES, "supervised"])
def test_a_method_is_one_key_whose_resolved_settings_can_be_read_again(tmp_path, method):
    found = config(tmp_path, method)
    assert (found.model.levels, found.model.context) == ([], False)
    assert (found.model.predictor_width is not None) == (method == "simsiam")
    assert parse_config(to_tree(found), "again") == found
    assert fingerprint(found, ["m"])["method"] == method


@pytest.mark.parametrize("method", ["vicreg", "barlow_twins", "simclr", "supervised"])
def test_a_preset_is_the_default_but_for_the_method(method):
    presets = Path(__file__).parents[2] / "configs" / "pretrain"
    found, default = (to_tree(load_config(presets / f"{n}.yaml")) for n in (method, "default"))
    assert (found["method"], found["model"]["levels"]) == (method, [])
    default["model"] |= {"levels": [], "context": False}
    for section in ("views", "model", "loss", "train", "workers", "checkpoint"):
        assert found[section] == default[section]


def test_the_fingerprint_of_mlvicx_does_not_know_the_baselines(tmp_path):
    loss = fingerprint(config(tmp_path, "mlvicx"), ["m"])["loss"]
    assert list(loss) == ["global", "local", "lambda_local", "level_weights"]


def test_heads_that_a_method_has_not_are_left_out(tmp_path):
    usual = Model()
    for method in ("vicreg", "supervised"):
        found = config(
            tmp_path, method, model__local={"channels": 8}, model__projector={"width": 8}
        )
        assert (found.model.local, found.model.level_convs) == (usual.local, usual.level_convs)
        assert (found.model.projector == usual.projector) == (method == "supervised")


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        ("vicreg", {"model__levels": "all"}, "model.levels=[]"),
        ("simclr", {"model__context": True}, "model.context=false"),
        ("simclr", {"model__predictor_width": 4}, "predictor_width belongs to method simsiam"),
        ("simsiam", {"model__predictor_width": None}, "predictor_width belongs to method simsiam"),
        ("vicreg", {"loss__lambda_local": 2}, "loss.lambda_local has no effect with"),
        ("simclr", {"loss__global": {"variance": 3}}, "loss.global has no effect"),
        ("mlvicx", {"loss__temperature": 0.5}, "loss.temperature has no effect"),
        ("simclr", {"loss__label_splits": ["val"]}, "loss.label_splits has no effect"),
        ("vicreg", {"model__classes": ["a"]}, "model.classes belongs to method supervised"),
        ("supervised", {"model__classes": ["a", "a"]}, "classes must name each class once"),
        ("supervised", {"loss__label_splits": ["val"]}, "names 'val', but data.splits"),
        ("barlow", {}, "must be one of mlvicx, vicreg, barlow_twins"),
    ],
)
def test_what_a_method_does_not_have_is_refused(tmp_path, method, changes, said):
    with pytest.raises(ConfigError, match=r"^a\.yaml: \w") as error:
        config(tmp_path, method, **changes)
    assert said in str(error.value)


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setattr("mlvicx_dist.objective.baselines.find_spec", lambda name: None)
    check_library("vicreg")
    with pytest.raises(ConfigError, match=r"pip install 'mlvicx_dist\[baselines\]'"):
        check_library("simclr")
