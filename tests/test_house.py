"""The house: imports run one way, and nothing that is no code is committed."""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = [
    ("errors", "config", "progress", "session", "storage"),
    ("ingest",),
    ("stream",),
    ("model",),
    ("objective",),
    ("train",),
    ("evaluate",),
    ("tune",),
    ("report",),
    ("plan", "doctor", "export", "demo", "profile"),
    ("cli", "__main__"),
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (n.split(".")[1] for n in names if n.startswith("mlvicx_dist."))


def test_imports_run_one_way():
    package = ROOT / "mlvicx_dist"
    wrong = []
    for path in package.rglob("*.py"):
        own = path.relative_to(package).with_suffix("").parts[0]
        if own == "__init__":
            continue
        wrong += [f"{path}: {name}" for name in imports(path) if LEVEL[name] > LEVEL[own]]
    assert wrong == []


def test_no_data_is_committed():
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False
    )
    suffixes = {".dcm", ".jpg", ".jpeg", ".tif", ".tar", ".pt", ".safetensors", ".parquet"}
    assert [name for name in listed.stdout.split() if Path(name).suffix in suffixes] == []
