#!/bin/sh
# Makes the hash-pinned export anew from pyproject.toml (`make lock`). It holds no download addresses.
# torch is left out: it is installed first and alone (install.sh), since its CPU build is not on PyPI.
set -eu
cd "$(dirname "$0")/.."
links=$(.venv/bin/pip config get :env:.find-links 2>/dev/null || .venv/bin/pip config get global.find-links 2>/dev/null || true)
if [ -n "$links" ]; then torch="--find-links=$links"; else torch="--torch-backend=cpu"; fi
.venv/bin/uv pip compile pyproject.toml --extra cpu --extra dev --extra tracing --extra errors --extra bench \
    --override requirements/overrides.txt \
    --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --no-emit-package torch \
    --quiet "$torch" -o requirements/dev.txt >/dev/null
printf 'uv==%s\n' "$(.venv/bin/uv --version | cut -d' ' -f2)" |
    .venv/bin/uv pip compile - --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
        --quiet -o requirements/uv.txt >/dev/null
