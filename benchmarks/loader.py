"""Pairs of views a second of one core: shards against torchvision, lightly, webdataset, bare calls.

python benchmarks/loader.py [--json]

One process, one thread, batches of 32, the 224-px views of configs/pretrain/default.yaml, 1024-px
phantoms. Ours: the loader on shards, then photometrics and normalisation as in a training step, on
the same core; `crops alone` is the loader. PIL and v2: torchvision's transforms with the same
parameters on PNG files, in RGB. lightly: its VICReg view with these parameters; its resize is
bilinear and its blur Pillow's. webdataset: the same shards, shuffled and batched; with
torchvision's functions, as its users write it, the same work in grey; with our functions decode,
crops and photometrics are ours, and the stream is all that differs. Bare: decode of bytes in memory
and resize by the libraries that ours calls, at the very crops that it takes. All by turns; medians.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import imagecodecs
import numpy as np
import torch
import webdataset
from lightly.transforms.vicreg_transform import VICRegViewTransform
from PIL import Image
from table import Row, by_turns, main, seconds
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from mlvicx_dist.config import PretrainConfig, load_as
from mlvicx_dist.ingest.pack import pack
from mlvicx_dist.ingest.pixels import Format
from mlvicx_dist.ingest.record import Record
from mlvicx_dist.ingest.shard_task import PackSettings
from mlvicx_dist.ingest.shards import decode_image as decode_stored
from mlvicx_dist.ingest.sources.phantom import write_phantoms
from mlvicx_dist.ingest.splits import Fractions
from mlvicx_dist.model.encoder import NORMALISATION, normalise
from mlvicx_dist.stream import keyed
from mlvicx_dist.stream.augment import CROP_TRIES, crop_box, photometrics, two_views
from mlvicx_dist.stream.loader import Steps, batches
from mlvicx_dist.stream.shardset import ShardSet
from mlvicx_dist.train.allocator import keep_freed_memory

FILES, TURNS, BATCH, ROUNDS = 32, 4, 32, 5
SETTINGS = load_as(
    PretrainConfig, Path(__file__).parents[1] / "configs" / "pretrain" / "default.yaml"
)
VIEWS, SIZE = SETTINGS.views, SETTINGS.views.image_size_px
Run = Callable[[], object]
COMPARED: list[tuple[str, str, float | None]] = [
    ("512-px shards", "PIL from 1024-px PNG", 8.0),
    ("256-px shards", "PIL from 1024-px PNG", 18.0),
    ("1024-px PNG shards", "PIL from 1024-px PNG", None),
    ("512-px shards", "v2 from 1024-px PNG", None),
    ("512-px shards", "lightly from 1024-px PNG", None),
    ("512-px shards", "webdataset, torchvision's functions, 512-px", 1.5),
    ("256-px shards", "webdataset, torchvision's functions, 256-px", 1.5),
    ("512-px shards", "webdataset, our functions, 512-px", None),
    ("256-px shards", "webdataset, our functions, 256-px", None),
    ("512-px shards, crops alone", "bare decode and two crops, 512-px", 0.8),
    ("256-px shards, crops alone", "bare decode and two crops, 256-px", 0.8),
    ("1024-px PNG shards, crops alone", "bare decode and two crops, 1024-px PNG", None),
]


def ours(folder: Path, *, photometric: bool = True) -> Run:
    """An epoch of our loader in this process."""
    steps = Steps(ShardSet.open([folder], splits=["train"]), VIEWS, batch=BATCH, seed=0)

    def run() -> None:
        for batch in batches(steps, start=0, stop=steps.steps_per_epoch, workers=0):
            if photometric:
                on_device(batch.images, batch.table)

    return run


def on_device(images: torch.Tensor, table: torch.Tensor) -> None:
    """What a training step does with both views before the model."""
    for view in (0, 1):
        shown = photometrics(images[view], table[view], kernel_px=VIEWS.blur_kernel_px)
        normalise(shown, SETTINGS.model.channels)


def bare(folder: Path, suffix: str, decode: Callable[[bytes], np.ndarray]) -> Run:
    """The library calls of the crops of our first epoch."""
    tasks = []
    for number, sample in enumerate(stream(folder, shuffle=False)):
        height, width = decode(sample[suffix]).shape
        draw = partial(keyed.uniform, seed=0, epoch=0, purpose=keyed.VIEWS, item=number)
        draws = [draw(4 * CROP_TRIES, part=view) for view in (0, 1)]
        tasks.append((sample[suffix], [crop_box(height, width, VIEWS, each) for each in draws]))

    def run() -> None:
        for data, boxes in tasks:
            image = Image.fromarray(decode(data))
            for box in boxes:
                np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))

    return run


def stream(folder: Path, *, shuffle: bool = True) -> Any:
    """Shards as webdataset reads them."""
    urls = sorted(map(str, folder.glob("*.tar")))
    return webdataset.WebDataset(urls, shardshuffle=shuffle and len(urls)).shuffle(1000 * shuffle)


def with_our_functions(folder: Path) -> None:
    """An epoch of webdataset with our decode, crops and photometrics."""
    numbers = count()

    def views(sample: dict[str, bytes]) -> tuple[np.ndarray, np.ndarray]:
        return two_views(decode_stored(sample["jpg"]), VIEWS, seed=0, epoch=0, sample=next(numbers))

    for images, table in stream(folder).map(views).batched(BATCH):
        on_device(torch.from_numpy(images).transpose(0, 1), torch.from_numpy(table).transpose(0, 1))


def with_torchvision(folder: Path) -> None:
    """An epoch of webdataset as its users write it."""
    views = [torchvision_view(view, channels=1) for view in (0, 1)]
    images = stream(folder).decode("pill").to_tuple("jpg")
    for _ in images.map(lambda image: tuple(view(*image) for view in views)).batched(BATCH):
        pass


def from_files(paths: list[Path], read: Callable[[Path], Any], make: Callable[[int], Any]) -> None:
    """An epoch of image files, collated as PyTorch's loader does."""
    views = [make(view) for view in (0, 1)]
    for start in range(0, len(paths), BATCH):
        images = map(read, paths[start : start + BATCH])
        default_collate([[view(image) for view in views] for image in images])


def torchvision_view(view: int, *, channels: int = 3, tv: Any = transforms) -> Any:
    """A view by torchvision: of Pillow's images by `transforms`, of tensors by `v2`."""
    bicubic = transforms.InterpolationMode.BICUBIC
    jitter = tv.ColorJitter(VIEWS.brightness, VIEWS.contrast)
    blur = tv.GaussianBlur(VIEWS.blur_kernel_px, VIEWS.blur_sigma_px)
    return tv.Compose(
        [
            tv.RandomResizedCrop(SIZE, VIEWS.crop_scale, VIEWS.crop_ratio, bicubic),
            tv.RandomHorizontalFlip(VIEWS.flip_p),
            tv.RandomApply([jitter], VIEWS.jitter_p),
            tv.RandomApply([blur], VIEWS.blur_p[view]),
            tv.RandomSolarize(128, VIEWS.solarise_p[view]),
            v2.ToDtype(torch.float32, scale=True) if tv is v2 else transforms.ToTensor(),
            tv.Normalize(*NORMALISATION[channels]),
        ]
    )


def lightly_view(view: int) -> Any:
    """A view by lightly."""
    return VICRegViewTransform(
        input_size=SIZE,
        cj_prob=VIEWS.jitter_p,
        cj_strength=1.0,
        cj_bright=VIEWS.brightness,
        cj_contrast=VIEWS.contrast,
        cj_sat=0.0,
        cj_hue=0.0,
        min_scale=VIEWS.crop_scale[0],
        random_gray_scale=0.0,
        solarize_prob=VIEWS.solarise_p[view],
        gaussian_blur=VIEWS.blur_p[view],
        sigmas=VIEWS.blur_sigma_px,
        hf_prob=VIEWS.flip_p,
    )


def packed(paths: list[Path], out: Path, short_side_px: int, format: Format, turns: int) -> Path:
    """Shards that hold each file `turns` times."""
    records = [
        Record(source="b", image_id=name, path=str(path), patient_id=name, labels={})
        for turn in range(turns)
        for path in paths
        for name in [f"{turn}/{path.name}"]
    ]
    train = Fractions(1.0, 0.0, 0.0)
    settings = PackSettings(short_side_px=short_side_px, format=format, fractions=train)
    pack(records, out, settings=settings, salt=b"\0" * 32)
    return out


def contenders(folder: Path) -> dict[str, Callable[[], float]]:
    """Measurements by name, on files that are made in `folder`."""
    write_phantoms(folder / "files", FILES, size_px=1024, dicom_fraction=0.0)
    paths = sorted((folder / "files").rglob("*.png"))
    from_pillow = partial(from_files, paths, lambda path: Image.open(path).convert("RGB"))
    from_tensors = partial(from_files, paths, lambda path: decode_image(path, ImageReadMode.RGB))
    whole = packed(paths, folder / "1024", 1024, "png8", 1)
    by_pillow = bare(whole, "png", lambda data: np.asarray(Image.open(io.BytesIO(data))))
    once: dict[str, Run] = {
        "PIL from 1024-px PNG": partial(from_pillow, torchvision_view),
        "v2 from 1024-px PNG": partial(from_tensors, partial(torchvision_view, tv=v2)),
        "lightly from 1024-px PNG": partial(from_pillow, lightly_view),
        "1024-px PNG shards": ours(whole),
        "1024-px PNG shards, crops alone": ours(whole, photometric=False),
        "bare decode and two crops, 1024-px PNG": by_pillow,
    }
    often: dict[str, Run] = {}
    for size in (512, 256):
        small = packed(paths, folder / str(size), size, "jpeg", TURNS)
        often |= {
            f"{size}-px shards": ours(small),
            f"webdataset, torchvision's functions, {size}-px": partial(with_torchvision, small),
            f"webdataset, our functions, {size}-px": partial(with_our_functions, small),
            f"{size}-px shards, crops alone": ours(small, photometric=False),
            f"bare decode and two crops, {size}-px": bare(small, "jpg", imagecodecs.jpeg8_decode),
        }
    pairs = [(FILES, *item) for item in once.items()]
    pairs += [(FILES * TURNS, *item) for item in often.items()]
    return {name: partial(rate, number, run) for number, name, run in pairs}


def rate(pairs: int, run: Run) -> float:
    """Pairs a second."""
    return pairs / seconds(run)


def measure() -> list[Row]:
    """Every contender by turns."""
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        rates = by_turns(contenders(Path(folder)), rounds=ROUNDS)
    return [
        Row(f"{mine}, against {other}", rates[mine], rates[other], "pairs/s", limit)
        for mine, other, limit in COMPARED
    ]


if __name__ == "__main__":
    sys.exit(main(str(__doc__).splitlines()[0], measure))
