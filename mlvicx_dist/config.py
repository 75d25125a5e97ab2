"""Every setting of the product: typed, with its unit in its name, from YAML plus dotted overrides.

`load_config(path, overrides)` reads a file by its key `kind` and answers with a frozen model;
whatever is wrong in it becomes one sentence that names the file, the key and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mlvicx_dist.errors import ConfigError, nearest

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Base of all settings: frozen, and a key that does not exist is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )


class ShardFolder(Settings):
    """A folder of shards and how densely it is sampled, relative to the largest weight."""

    path: str
    weight: Positive = 1.0


class PretrainData(Settings):
    """Which images are trained on."""

    shards: list[ShardFolder] = Field(min_length=1)
    splits: list[str] = Field(default=["train"], min_length=1)
    loader_workers: Annotated[int, Field(ge=0)] = 1
    """Loader processes a training worker; 0 loads in the training process."""
    cache_dir: str | None = None
    """Where a node keeps shards of s3://, gs:// and http(s)://; None: a folder of the temp dir."""
    cache_gb: Positive = 50.0
    """How much of them it keeps, in 10^9 bytes."""


class Views(Settings):
    """The two views (DESIGN 4.1); a pair of numbers is (view 1, view 2) or (low, high)."""

    image_size_px: Annotated[int, Field(ge=16, le=2048)] = 224
    crop_scale: tuple[Fraction, Fraction] = (0.2, 1.0)
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip_p: Fraction = 0.5
    jitter_p: Fraction = 0.8
    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    blur_p: tuple[Fraction, Fraction] = (1.0, 0.1)
    blur_kernel_px: Annotated[int, Field(ge=1)] = 23
    blur_sigma_px: tuple[Positive, Positive] = (0.1, 2.0)
    solarise_p: tuple[Fraction, Fraction] = (0.0, 0.2)

    @model_validator(mode="after")
    def _ordered(self) -> Views:
        for name in ("crop_scale", "crop_ratio", "blur_sigma_px"):
            low, high = getattr(self, name)
            if low > high or low <= 0:
                raise ValueError(f"{name} must be [low, high] with 0 < low <= high")
        if self.blur_kernel_px % 2 == 0 or self.blur_kernel_px >= 2 * self.image_size_px:
            raise ValueError("blur_kernel_px must be odd and less than twice image_size_px")
        return self


class LocalHead(Settings):
    """From level maps to local vectors (DESIGN 3.3)."""

    fusion: Literal["sum", "per_level"] = "sum"
    resize_px: Count = 64
    channels: Count = 512
    pool: Count = 4

    @model_validator(mode="after")
    def _divides(self) -> LocalHead:
        if self.resize_px % self.pool:
            raise ValueError("resize_px must be a multiple of pool")
        return self


class Projector(Settings):
    """Linear, batch norm, ReLU, …, linear and, with `last_norm`, a batch norm at the end."""

    width: Count = 4096
    layers: Annotated[int, Field(ge=1, le=8)] = 3
    last_norm: bool = False


class Model(Settings):
    """Backbone, context bottlenecks and heads (DESIGN 4.1, 4.3)."""

    backbone: str = "resnet18"
    channels: Literal[1, 3] = 1
    init: Literal["random", "imagenet"] = "random"
    levels: Literal["all"] | list[Annotated[int, Field(ge=0)]] = "all"
    level_convs: Literal["trained", "frozen"] = "trained"
    context: bool = True
    local: LocalHead = LocalHead()
    projector: Projector = Projector()

    @model_validator(mode="after")
    def _levels(self) -> Model:
        if self.levels != "all" and len(set(self.levels)) != len(self.levels):
            raise ValueError("levels must name each level once")
        return self


class VicWeights(Settings):
    """Coefficients of one VIC term; variance is the mean of the two hinges (DESIGN 4.1)."""

    invariance: NonNegative = 25.0
    variance: NonNegative = 25.0
    covariance: NonNegative = 1.0


class Loss(Settings):
    """L = VIC(global) + lambda_local * VIC(local); several local vectors are averaged."""

    global_: VicWeights = Field(default=VicWeights(), alias="global")
    local: VicWeights = VicWeights()
    lambda_local: NonNegative = 1.0


class Train(Settings):
    """The optimisation; `batch_size` is the global batch."""

    batch_size: Annotated[int, Field(ge=2)] = 256
    epochs: Count = 300
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    optimizer: Literal["lars", "adamw"] = "lars"
    learning_rate_per_256: Positive = 0.2
    """The learning rate is this times batch_size / 256."""
    weight_decay: NonNegative = 1e-6
    warmup_epochs: NonNegative = 10.0
    cosine_over: Literal["after_warmup", "all_steps"] = "after_warmup"
    precision: Literal["float32", "bf16"] = "float32"
    recompute: bool = False
    """Keep only the level maps for backward and compute the rest again: less memory, more time."""
    deterministic: bool = False
    init_from: str | None = None
    """A checkpoint, export or run whose weights this run starts from."""
    log_every_steps: Count = 10


class Workers(Settings):
    """The Ray Train worker group."""

    num: Count = 1
    min: Count | None = None
    cpus_per_worker: Count = 1
    use_gpu: bool = False
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often in a row workers may die without a step further than the time before."""
    resize_after_s: Positive = 60.0
    """A group of fewer than `num` grows when there was room for more for this long."""
    start_timeout_s: Positive = 120.0
    """How long Ray waits for the places of a group before it tries again."""
    wait_s: Positive = 86400.0
    """How long a run waits for workers, or hears nothing of them, before it ends."""
    collective_timeout_s: Positive = 600.0
    """How long a worker waits for another one before the group is started anew."""

    @model_validator(mode="after")
    def _bounds(self) -> Workers:
        if self.min is not None and self.min > self.num:
            raise ValueError("min must not be more than num")
        return self


class Checkpoints(Settings):
    """When the state is saved and how much of it is kept."""

    every_s: Positive = 600.0
    every_steps: Count | None = None
    keep: Count = 3
    export_every: Count | None = None
    """Every so many checkpoints the encoder is exported too; always at the end."""


class Run(Settings):
    """Where a run lives: `storage_path/name/`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    storage_path: str = "runs"
    """A folder that all workers see, or a URL (s3://, gs://)."""
    samples_path: str | None = None
    """A folder into which every rank writes which samples it trained on at each step."""


class PretrainConfig(Settings):
    """`kind: pretrain`."""

    kind: Literal["pretrain"]
    method: Literal["mlvicx"] = "mlvicx"
    run: Run
    data: PretrainData
    views: Views = Views()
    model: Model = Model()
    loss: Loss = Loss()
    train: Train = Train()
    workers: Workers = Workers()
    checkpoint: Checkpoints = Checkpoints()


class EvaluateData(Settings):
    """The labelled images: the probe learns on `train`, is tuned on `val`, is judged on `test`."""

    shards: list[str] = Field(min_length=1)
    train: str = "train"
    val: str = "val"
    test: str = "test"
    loader_workers: Annotated[int, Field(ge=0)] = 1


class Embedding(Settings):
    """How the frozen encoder is run."""

    image_size_px: Annotated[int, Field(ge=16, le=2048)] | None = None
    """None: the size that the encoder was pretrained at."""
    batch_size: Count = 64
    use_gpu: bool = False


class Probe(Settings):
    """Multi-label logistic regression on standardised embeddings."""

    l2: list[Positive] = Field(default=[1e-4, 1e-3, 1e-2, 1e-1, 1.0], min_length=1)
    """Penalties tried; the one with the best mean AUROC on the validation split is taken."""
    max_iterations: Count = 200


class Knn(Settings):
    """Cosine nearest neighbours."""

    neighbours: Count = 20


class Bootstrap(Settings):
    """Patient-clustered bootstrap."""

    draws: Annotated[int, Field(ge=100)] = 1000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    seed: Annotated[int, Field(ge=0)] = 0


class EvaluateConfig(Settings):
    """`kind: evaluate`."""

    kind: Literal["evaluate"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    data: EvaluateData
    classes: list[str] | None = None
    """None: every class of the shards."""
    embedding: Embedding = Embedding()
    probe: Probe = Probe()
    knn: Knn = Knn()
    bootstrap: Bootstrap = Bootstrap()


Config = PretrainConfig | EvaluateConfig
C = TypeVar("C", PretrainConfig, EvaluateConfig)
KINDS: dict[str, type[PretrainConfig] | type[EvaluateConfig]] = {
    "pretrain": PretrainConfig,
    "evaluate": EvaluateConfig,
}


class _Loader(yaml.SafeLoader):
    """Safe YAML whose numbers are YAML 1.2's: `1e-6` is a float, and a key may stand only once."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen:
            raise ConfigError(
                f"{key.start_mark.name}, line {key.start_mark.line + 1}: the key '{key.value}' "
                "stands twice; remove one of the two."
            )
        seen.add(key.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, name: str) -> Any:
    """The value of a YAML text; `name` says in an error where it came from."""
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}, line {mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or "it is not YAML"
        raise ConfigError(f"{where}: {problem}; correct the YAML there.") from None
    finally:
        loader.dispose()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the settings file at `path`, apply `overrides` ("a.b=c") and check every key.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or a value is not allowed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"{path}: the settings file cannot be read ({reason}); give the path of a YAML file "
            "such as those in configs/."
        ) from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: a settings file is a mapping of keys; begin it with 'kind: pretrain'."
        )
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], name: str) -> Config:
    """Check a tree of settings; `name` says in an error where it came from."""
    kind = tree.get("kind")
    if kind not in KINDS:
        hint = nearest(str(kind), KINDS)
        raise ConfigError(
            f"{name}: the key 'kind' is {kind!r}, but must be one of {', '.join(KINDS)}{hint}."
        )
    try:
        return KINDS[kind].model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_sentence(error, name, KINDS[kind])) from None


def load_as(kind: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """`load_config` for a command that needs one kind of file."""
    config = load_config(path, overrides)
    if not isinstance(config, kind):
        raise ConfigError(
            f"{path}: the key 'kind' is {config.kind!r}, but this command takes "
            f"'kind: {get_args(kind.model_fields['kind'].annotation)[0]}'; give such a file."
        )
    return config


def to_tree(config: BaseModel) -> dict[str, Any]:
    """The settings as plain JSON values, with the keys that the YAML has."""
    return config.model_dump(mode="json", by_alias=True)


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key, such as `train.epochs=5` or `data.shards.0.path=x`, in the tree."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"--set {override}: give it as key.key=value, as in train.epochs=10.")
    value = parse_yaml(text, f"--set {dotted}")
    *parents, last = dotted.split(".")
    node: Any = tree
    for key in parents:
        if isinstance(node, list):
            node = node[_index(node, key, override)]
        elif isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: '{key}' is a value, so it has no key below it.")
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _index(items: list[Any], key: str, override: str) -> int:
    if key.isdigit() and int(key) < len(items):
        return int(key)
    raise ConfigError(
        f"--set {override}: '{key}' is no place in a list of {len(items)}; "
        f"use 0 to {len(items) - 1}."
    )


def _sentence(error: ValidationError, name: str, root: type[Settings]) -> str:
    """The first thing that pydantic found, as one sentence."""
    # The members of a union each complain; a wrong key says more than a wrong value.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    parts = [p for p in first["loc"] if not (isinstance(p, str) and _is_branch(p))]
    key = ".".join(str(part) for part in parts)
    if first["type"] == "extra_forbidden":
        known = _keys_below(root, parts[:-1])
        hint = nearest(str(parts[-1]), known) or f"; the keys there are {', '.join(known)}"
        return f"{name}: the key '{key}' does not exist{hint}."
    if first["type"] == "missing":
        return f"{name}: the key '{key}' is missing; add it."
    message = str(first["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "value_error":
        return f"{name}: in '{key}', {message}."
    given = first["input"]
    if isinstance(given, dict | list) and len(str(given)) > 60:
        given = type(given).__name__
    expected = _expected(root, parts) or message
    return f"{name}: the key '{key}' is {given!r}, but {expected}."


def _is_branch(part: str) -> bool:
    """Whether pydantic added this to a location to say which member of a union it tried."""
    return any(mark in part for mark in ("[", "literal", "constrained")) or part in (
        "int",
        "str",
        "float",
        "tuple",
        "list",
    )


def _expected(root: type[Settings], parts: Sequence[int | str]) -> str | None:
    """What a key with a short list of allowed values allows, where it has one."""
    model = _model_at(root, parts[:-1])
    if model is None or not parts:
        return None
    for field_name, field in model.model_fields.items():
        if (field.alias or field_name) != parts[-1]:
            continue
        if field_name == "levels":
            return "should be 'all' or a list of level numbers such as [1, 2, 3]"
        values = [v for v in get_args(field.annotation) if isinstance(v, str | int)]
        if values:
            return f"must be one of {', '.join(str(v) for v in values)}"
    return None


def _keys_below(root: type[Settings], parts: Sequence[int | str]) -> list[str]:
    model = _model_at(root, parts)
    return [f.alias or n for n, f in model.model_fields.items()] if model else []


def _model_at(root: type[Settings], parts: Sequence[int | str]) -> type[Settings] | None:
    """The settings class that a location leads to."""
    model: Any = root
    for part in parts:
        if isinstance(part, int):
            continue
        for name, field in model.model_fields.items():
            if (field.alias or name) == part:
                candidates = [field.annotation, *get_args(field.annotation)]
                model = next(
                    (c for c in candidates if isinstance(c, type) and issubclass(c, Settings)),
                    None,
                )
                break
        else:
            return None
        if model is None:
            return None
    return model
