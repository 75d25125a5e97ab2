#!/usr/bin/env bash
# Makes a machine a node: what pyproject.toml asks for, in the versions of constraints.txt, in a
# virtual environment beside this file, and the shell in which `ray up` starts Ray. The code itself
# comes with each job. A second run changes nothing and takes seconds.
#
#   node.sh [PACKAGE ...]      more packages, such as the client of a store
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "node.sh: $(hostname): $python is older than 3.11; set PYTHON to a newer one." >&2
  exit 1
fi
if [[ ! -x venv/bin/python ]]; then
  # Debian and Ubuntu leave a part of venv out.
  "$python" -m venv venv || { sudo apt-get -q update && sudo apt-get -qy install python3-venv; }
  "$python" -m venv venv
fi
venv/bin/python - >requirements.txt <<'END'
import tomllib
from pathlib import Path

print(*tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"], sep="\n")
END
venv/bin/python -m pip install --quiet --disable-pip-version-check \
  --constraint constraints.txt --requirement requirements.txt "$@"

# Ray's commands run in a login shell that reads ~/.bashrc.
cat >env.sh <<END
export PATH=$PWD/venv/bin:\$PATH
# Whoever has no token gets no further than the door.
export RAY_AUTH_MODE=token
# A job that is stopped has this long to write a checkpoint; Ray's own is 3 s.
export RAY_JOB_STOP_WAIT_TIME_S=60
export RAY_USAGE_STATS_ENABLED=0
# Ray's workers are nice by 15: beside any other load they get almost nothing.
export RAY_worker_niceness=0
ulimit -n 65536 2>/dev/null || ulimit -n "\$(ulimit -Hn)"
END
grep -qsF "$PWD/env.sh" ~/.bashrc || echo ". $PWD/env.sh" >>~/.bashrc
