#!/usr/bin/env bash
# Make .venv with the first usable Python 3.11 or 3.12: the one given, or one on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
usable='import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])'
if [ -n "${1:-}" ]; then candidates=("$1"); else candidates=(python3.11 python3.12 python3 python); fi
for python in "${candidates[@]}"; do
  if "$python" -c "$usable" >/dev/null 2>&1; then
    echo "creating .venv with $("$python" --version)"
    exec "$python" -m venv .venv
  fi
done
echo "omnilab needs Python 3.11 or 3.12 with the venv module; tried: ${candidates[*]} (name another: make test PYTHON=/path/to/python3.11)" >&2
exit 1
