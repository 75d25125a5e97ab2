"""The house: imports run one way, and nothing that is no code is committed."""

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
FLOORS = re.search(r"\n    (errors, .*?< cli)\n", PAGE, re.DOTALL)[1].split("<")
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in re.findall(r"\w+", names)}
LEVEL["__main__"] = LEVEL["cli"]


def imports(path):
    """What a module imports of the package, anywhere in it, by the name after the first dot."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found = {n.split(".")[1] for n in names if n.startswith("mlvicx_dist.")}
        yield from found - {"__version__"}


def test_imports_run_one_way():
    package = ROOT / "mlvicx_dist"
    assert set(LEVEL) <= {path.stem for path in package.iterdir()}
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
