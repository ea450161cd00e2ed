#!/usr/bin/env bash
# Put flash-attn's Python and the Triton it names into .peers/flash_attn: tests run its Triton kernels on a CPU. Nothing is compiled.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .peers/flash_attn/hopper ] && exit 0
echo "installing flash-attn's Triton kernels into .peers/flash_attn (690 MB)"
export FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE
.venv/bin/python -m pip --disable-pip-version-check install -qq --no-deps --no-build-isolation --target .peers/flash_attn \
  flash-attn==2.8.3 triton==3.2.0 einops==0.8.2
