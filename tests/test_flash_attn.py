"The forest through flash-attn's own kernels, which a CPU can only interpret."
import json, os
import pytest
from conftest import ROOT, run


@pytest.mark.slow
@pytest.mark.parametrize('which, lines', [('FA2', 34), ('FA3', 18)])
def test_flash_attention(which, lines):
    "Forward and backward as near to fp64 as flash-attn's own tests ask: unequal pieces, shared heads, five levels, sinks."
    peer = ROOT/'.peers/flash_attn'
    if not (peer/'hopper').is_dir(): pytest.skip('no flash-attn in .peers/flash_attn; run tools/flash_attn.sh')
    path = os.pathsep.join(filter(None, (os.environ.get('PYTHONPATH'), str(peer))))
    done, _ = run(['tests/flash_attn_cpu.py', which], PYTHONPATH=path, TRITON_INTERPRET='1', FLASH_ATTENTION_TRITON_AMD_ENABLE='TRUE')
    assert done.returncode == 0, done.stderr
    *results, shape = map(json.loads, done.stdout.splitlines())
    assert len(results) == lines and shape['calls'] > 3 and max(shape['pieces']) > 10
    assert not [r for r in results if not r['error'] <= r['allowed']]
