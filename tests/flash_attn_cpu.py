"""flash-attn's own kernels on a CPU: its Triton kernels, run by Triton's interpreter, stand behind torch's two flash attention operators, which ask for what
those of CUDA ask for. A line of JSON for every tensor: its largest error, and what flash-attn's own tests allow.

test_flash_attn.py runs it, with what tools/flash_attn.sh fetches on the path. FA2 or FA3: the same kernels behind torch's wrapper of flash attention 3.
"""
import ast, json, sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from flash_attn.flash_attn_interface import flash_attn_gpu as kernels
from torch.nn.attention import _fa3, activate_flash_attention_impl

from omnilab.forest import operator
from omnilab.forest.kernels import LEVELS, VARLEN, level_calls, run_calls, run_calls_backward
from omnilab.forest.plan import plan
from omnilab.forest.tree import Row, forest

KEPT = {}       # a library's operators go with it


def mend(interpreter):
    "Triton 3.2's interpreter knows neither bf16 products nor rounding to bf16, and takes launch options for arguments."
    interpreter.RESERVED_KWS += ['waves_per_eu', 'num_buffers_warp_spec', 'num_consumer_groups', 'reg_dec_producer', 'reg_inc_consumer']
    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float
    dot = builder.create_dot

    def exact(x, old, new, rounding):
        if {old, new} != {tl.bfloat16, tl.float32}: return convert(x, old, new, rounding)
        x = torch.from_numpy(np.ascontiguousarray(x))
        return (x.bfloat16().view(torch.uint16) if new == tl.bfloat16 else x.view(torch.bfloat16).float()).numpy()

    def wide(self, a, b, *rest):
        return dot(self, *(self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)
    interpreter._convert_float, builder.create_dot = exact, wide


def forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal): # output and log-sum-exp [heads, t], as on CUDA; these kernels give [t, heads]
    assert all(x.stride(-1) == 1 and x.dtype == q.dtype for x in (q, k, v)) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    for cu, longest, x in ((cu_q, max_q, q), (cu_k, max_k, k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0 and cu[-1] == len(x) and cu.diff().max() == longest and cu.diff().min() > 0
    out, lse, *_ = kernels.varlen_fwd(q, k, v, None, cu_q, cu_k, None, None, None, None, max_q, max_k, 0., scale, False, causal, -1, -1, 0., False)
    return out, lse.T.contiguous()


def backward(g, q, k, v, out, lse, grads, cu_q, cu_k, max_q, max_k, scale, causal):
    assert lse.shape == (q.shape[1], len(q)) and lse.dtype == torch.float32 and lse.is_contiguous() and all(x.dtype == q.dtype for x in (g, out))
    ends = cu_q, cu_k, None, max_q, max_k
    return kernels.varlen_bwd(g.contiguous(), q, k, v, out.contiguous(), lse.T.contiguous(), *grads, *ends, 0., scale, False, causal, -1, -1, 0., False)[:3]


def fa2_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, **rest):
    assert not (dropout or debug or rest)
    return *forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal), torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64), q.new_empty(0)


def fa2_backward(g, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, seed, unused, *, scale=None, **rest):
    assert not (dropout or rest) and seed.dtype == torch.uint64 and seed.shape == (2,)
    return backward(g, q, k, v, out, lse, (None,) * 3, cu_q, cu_k, max_q, max_k, scale, causal)


def named(of): # what flash-attn's own Python calls the arguments of flash attention 3's compiled functions
    tree = ast.parse((Path(kernels.__file__).parents[2]/'hopper/flash_attn_interface.py').read_text())
    call = next(x for x in ast.walk(tree) if isinstance(x, ast.Call) and ast.unparse(x.func) == f'flash_attn_3_cuda.{of}')
    return [ast.unparse(x) for x in call.args]


def fa3(of, args): # arguments by name; nothing that the forest has no use for is on
    a = dict(zip(named(of), args, strict=True))
    assert a['window_size[0]'] == a['window_size[1]'] == -1 and a['softcap'] == 0 and a.get('attention_chunk', 0) == 0
    return a, (a['cu_seqlens_q'], a['cu_seqlens_k'], a['max_seqlen_q'], a['max_seqlen_k'], a['softmax_scale'], a['causal'])


def fa3_fwd(*args):
    a, rest = fa3('fwd', args)
    return *forward(a['q'], a['k'], a['v'], *rest), None, None


def fa3_bwd(*args):
    a, rest = fa3('bwd', args)
    backward(*(a[n] for n in ('dout', 'q', 'k', 'v', 'out', 'softmax_lse')), (a['dq'], a['dk'], a['dv']), *rest)


def activate_fa3():
    "As on a Hopper GPU, with a package whose two compiled functions are ours; the wrapper's question for the GPU is answered yes."
    sys.modules['flash_attn_interface'] = ModuleType('flash_attn_interface')
    lib = KEPT.setdefault('FA3', torch.library.Library('flash_attn_3', 'DEF'))
    for of in ('fwd', 'bwd'): lib.define(f'{of}(Tensor q) -> Tensor')
    activate_flash_attention_impl('FA3')
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f'aten::_flash_attention_{of}', 'CUDA') for of in ('forward', 'backward'))
    _fa3._FA3_CUDA_FWD, _fa3._FA3_CUDA_BWD, _fa3._fa3_common_support_error = fa3_fwd, fa3_bwd, lambda *a: None
    return _fa3._fa3_flash_attention_forward_impl_default, _fa3._fa3_flash_attention_backward_impl


def dense(q, k, v, sees, sinks=None): # every score written out
    group = q.shape[1] // k.shape[1]
    s = (q @ k.repeat_interleave(group, 1).mT * q.shape[-1]**-.5).masked_fill(~sees, -torch.inf)
    if sinks is not None: s = torch.cat([s, sinks[:, None, None].expand(1, -1, s.shape[2], 1)], -1)
    return s.softmax(-1)[..., :len(sees)] @ v.repeat_interleave(group, 1)


def trees():
    "Triangles and rectangles of many sizes, five levels of them, the longest over a kernel's block."
    def ids(n): return torch.randint(9, 60, (n,)).tolist()
    long, prompt = ids(150), ids(30)
    rows = [[7] * 5 + a for a in ([1] * 4 + [2] * 3, [1] * 4 + [3] * 6, [4] * 2, [5] + [6] * 3, [5] + [8] * 2 + [2], [5] + [8] * 2 + [3, 3])]
    return rows + [long + ids(12), long + ids(40), ids(90)] + [prompt + ids(n) for n in (12, 9, 14)]


def runs(name, dtype, ours, tensors, sees):
    "A line for every result. Allowed is twice (gradients: three times) the error of plain attention in this format; sinks, four numbers, may round twice."
    at = [x.double().requires_grad_() for x in tensors], [x.detach().clone().requires_grad_() for x in tensors]
    want, plain = (dense(*x[:3], sees, *x[3:]) for x in at)
    g = torch.randn_like(plain)
    got = ours(g, *tensors)
    refs, plains = [want, *torch.autograd.grad(want, at[0], g.double())], [plain, *torch.autograd.grad(plain, at[1], g)]
    for part, a, ref, b in zip(('out', 'q', 'k', 'v', 'sinks'), got, refs, plains, strict=False):
        error, usual = ((x.double() - ref).abs().max().item() for x in (a, b))
        allowed = (2 if part == 'out' else 3) * usual + 1e-5
        if part == 'sinks': allowed = max(allowed, 2 * torch.finfo(dtype).eps * ref.abs().max().item())
        print(json.dumps(dict(case=name, dtype=str(dtype).removeprefix('torch.'), part=part, error=error, allowed=allowed)), flush=True)


def main(which):
    torch.manual_seed(0)
    mend(interpreter)
    fwd, bwd = activate_fa3() if which == 'FA3' else (fa2_forward, fa2_backward)
    lib = torch.library.Library('aten', 'IMPL')
    lib.impl('_flash_attention_forward', fwd, 'CPU'); lib.impl('_flash_attention_backward', bwd, 'CPU')
    p = plan(forest([Row(torch.tensor(r), torch.arange(len(r)) >= 1) for r in trees()], min_shared=1))
    calls = level_calls(p.rule)

    def pieces(g, q, k, v):
        out, lse = run_calls(q, k, v, calls, q.shape[-1]**-.5, VARLEN['flash'])
        return out, *run_calls_backward(g, q, k, v, out, lse, calls, q.shape[-1]**-.5, VARLEN['flash'])

    def whole(g, *x):
        x = [y.detach().requires_grad_() for y in x]
        with patch.dict(LEVELS, cpu=VARLEN['flash']):
            out = operator.attention(*x[:3], p, sinks=x[3])
            return out, *torch.autograd.grad(out, x, g)

    formats = (torch.float32,) * (which == 'FA2') + (torch.float16, torch.bfloat16)
    for heads, kv, d in ((4, 2, 24), (4, 1, 64))[:len(formats) - 1]:
        for dtype in formats:
            x = [torch.randn(1, h, len(p), d).to(dtype) for h in (heads, kv, kv)]
            runs(f'{heads} heads of {d}, {kv} of keys', dtype, pieces, x, p.visible())
    for dtype in formats[-2:]:
        x = [torch.randn(1, len(p), h, 32).to(dtype).transpose(1, 2) for h in (4, 2, 2)]
        runs('operator with sinks', dtype, whole, [*x, torch.randn(4).to(dtype)], p.visible())
    print(json.dumps(dict(tokens=len(p), calls=len(calls), pieces=[len(c.cu_q) - 1 for c in calls])))


if __name__ == '__main__': main(*sys.argv[1:])
