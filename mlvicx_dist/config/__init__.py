"""Every setting of the product: typed, with its unit in its name, from YAML plus dotted overrides.

`load_config(path, overrides)` reads a file by its key `kind` and answers with a frozen model;
whatever is wrong in it becomes one sentence that names the file, the key and the way out.
"""

from mlvicx_dist.config.base import Cached, Settings
from mlvicx_dist.config.compare import FLOORS, PIXELS, UNTRAINED, CompareConfig, Task
from mlvicx_dist.config.evaluate import (
    Bootstrap,
    EvaluateConfig,
    FewLabels,
    FineTune,
    Knn,
    Probe,
    Segment,
)
from mlvicx_dist.config.files import (
    Config,
    load_as,
    load_config,
    parse_config,
    parse_yaml,
    to_tree,
)
from mlvicx_dist.config.keys import flat, set_key
from mlvicx_dist.config.methods import LOSS_KEYS, METHODS, MODEL_KEYS, SUPERVISED, Method
from mlvicx_dist.config.pretrain import (
    MAY_VARY,
    NUMBER_BYTES,
    LocalHead,
    Loss,
    Model,
    Precision,
    PretrainConfig,
    PretrainData,
    Projector,
    Run,
    Train,
    VicWeights,
    Views,
    Workers,
)
from mlvicx_dist.config.sweep import Dimension, Search, SweepConfig, Target

__all__ = [
    "FLOORS",
    "LOSS_KEYS",
    "MAY_VARY",
    "METHODS",
    "MODEL_KEYS",
    "NUMBER_BYTES",
    "PIXELS",
    "SUPERVISED",
    "UNTRAINED",
    "Bootstrap",
    "Cached",
    "CompareConfig",
    "Config",
    "Dimension",
    "EvaluateConfig",
    "FewLabels",
    "FineTune",
    "Knn",
    "LocalHead",
    "Loss",
    "Method",
    "Model",
    "Precision",
    "PretrainConfig",
    "PretrainData",
    "Probe",
    "Projector",
    "Run",
    "Search",
    "Segment",
    "Settings",
    "SweepConfig",
    "Target",
    "Task",
    "Train",
    "VicWeights",
    "Views",
    "Workers",
    "flat",
    "load_as",
    "load_config",
    "parse_config",
    "parse_yaml",
    "set_key",
    "to_tree",
]
