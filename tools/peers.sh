#!/usr/bin/env bash
# Make .peers/NAME for programs that can't share our environment; benchmarks find them there.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .peers/swift/bin/swift ] && exit 0
echo "installing ms-swift into .peers/swift (2 GB)"
.venv/bin/python -m venv --clear .peers/swift
pinned=$(grep -E '^(torch|torchvision|transformers)==' constraints.txt)
.peers/swift/bin/python -m pip --disable-pip-version-check install -qq uv torch=="$(grep -oP '^torch==\K.*' constraints.txt)"
VIRTUAL_ENV=$PWD/.peers/swift UV_FIND_LINKS="${PIP_FIND_LINKS:-}" .peers/swift/bin/uv pip install -q $pinned ms-swift==4.6.0 qwen_vl_utils decord
