"""Cross-attention scores against the plain way: one image, one sentence, no padding, attended vectors
built; every option, values and gradients."""
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from itm_nb.models.cross_attention import AGGS, NORMS, SCORES, bfan, CrossAttention, parts, Side, l2_normalize

torch.set_num_threads(1)


def normal(x, kind):
    "x (K, Q): normalised over the queries of each source element"
    if kind.startswith('clipped'): x = torch.where(x > 0, x, .1*x)
    if kind.endswith('l2norm'): return x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-8)
    if kind.endswith('l1norm'): return x / (x.abs().sum(1, keepdim=True) + 1e-8)
    return x.softmax(1) if kind == 'softmax' else x


def slow_side(v, w, s):
    "v (R, D) regions, w (L, D) words, nothing padded"
    src, qry = (v, w) if s.query == 'text' else (w, v)
    a = (s.sharp * normal(src @ qry.T, s.norm)).softmax(0)
    if s.focal:
        kept = []
        for j in range(len(src)):
            excess = a[j]*len(src) - a.sum(0) if s.focal == 'equal' else sum((a[j]-a[k])*a[k].sqrt()
                for k in range(len(src)))
            kept.append(torch.where(excess > 0, a[j], 0.))
        a = torch.stack(kept)
        a = a / a.sum(0)
    r = []
    for q in range(len(qry)):
        c = sum(a[k,q]*src[k] for k in range(len(src)))
        r.append((qry[q]@c) / (qry[q].norm()*c.norm()).clamp(min=1e-8))
    r = torch.stack(r)
    return {'LogSumExp': lambda: (r*s.lse).logsumexp(0)/s.lse, 'Mean': r.mean, 'Sum': r.sum,
            'Max': r.max}[s.agg]()


def slow(V, n, W, m, score):
    return torch.stack([torch.stack([sum(slow_side(V[i,:n[i]], W[j,:m[j]], s) for s in score.sides)
                                     for j in range(len(W))]) for i in range(len(V))])


def sets(seed, sizes, D=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(sizes)
    return (l2_normalize(torch.randn(len(sizes), int(sizes.max()), D, generator=g, dtype=dtype)), sizes,
            torch.arange(int(sizes.max())) < sizes[:,None])


ALL = [CrossAttention((Side(q, 5., agg, 4., norm),))
       for q, agg, norm in itertools.product(('text', 'image'), AGGS, NORMS)] + \
      [bfan(f) for f in ('equal', 'prob')] + [CrossAttention((Side('text', 9.), Side('image', 4., lse=5.)))]


@pytest.mark.parametrize('score', ALL, ids=lambda s: '+'.join(f'{x.query}-{x.agg}-{x.norm}{x.focal}'
    for x in s.sides))
def test_values_and_gradients_equal_the_slow_way(score):
    V, n, vm = sets(0, [4, 2, 5])
    W, m, wm = sets(1, [3, 5, 2, 2])
    up = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    def run(f, rows=slice(None), cols=slice(None)):
        a, b = V[rows].clone().requires_grad_(), W[cols].clone().requires_grad_()
        y = f(a, b)
        g = up[:,:3].diagonal() if y.ndim == 1 else up
        (y*g).sum().backward()
        return y.detach(), a.grad, b.grad
    want = run(lambda a, b: slow(a, n, b, m, score))
    for block in (2**18, 9): 
        for x, y in zip(run(lambda a, b: score.matrix(a, vm, b, wm, block)), want):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    got = run(lambda a, b: score.pairs(a, vm, b, wm[:3]), cols=slice(3))
    for x, y in zip(got, run(lambda a, b: slow(a, n, b, m, score).diagonal(), cols=slice(3))):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize('name', SCORES)
def test_single_precision(name):
    V, n, vm = sets(3, [6, 4, 5, 6], D=64)
    W, m, wm = sets(4, [5, 7, 3], D=64)
    score = SCORES[name]()
    def run(dtype):
        a, b = V.to(dtype).requires_grad_(), W.to(dtype).requires_grad_()
        y = score.matrix(a, vm, b, wm)
        y.sum().backward()
        return y.detach(), a.grad, b.grad
    for x, y in zip(run(torch.float32), run(torch.float64)):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', SCORES)
@pytest.mark.parametrize('junk', [0., 1e6, float('nan'), float('inf')])
def test_padding_reaches_neither_value_nor_gradient(name, junk):
    V, n, vm = sets(5, [4, 1, 3])
    W, m, wm = sets(6, [2, 5, 1])
    score = SCORES[name]()
    want, out = score.matrix(V, vm, W, wm), []
    a, b = (V.masked_fill(~vm[...,None], junk).requires_grad_(),
            W.masked_fill(~wm[...,None], junk).requires_grad_())
    got = score.matrix(a, vm, b, wm)
    assert torch.equal(got, want)
    (got.sum() + score.pairs(a, vm, b, wm).sum()).backward()
    for g, mask in ((a.grad, vm), (b.grad, wm)): assert g.isfinite().all() and not g[~mask].any()
    # more padding changes nothing beyond rounding
    wide = (F.pad(V, (0, 0, 0, 3), value=7.), F.pad(vm, (0, 3)), F.pad(W, (0, 0, 0, 2), value=7.),
            F.pad(wm, (0, 2)))
    torch.testing.assert_close(score.matrix(*wide), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(score.pairs(*wide), want.diagonal(), rtol=0, atol=1e-12)


def test_a_zero_vector_has_a_finite_gradient():
    V, n, vm = sets(7, [3, 3])
    W, m, wm = sets(8, [3, 2])
    for name in SCORES:
        a, b = V.clone(), W.clone()
        a[0,1] = 0
        b[1,0] = 0
        a.requires_grad_()
        b.requires_grad_()
        y = SCORES[name]().matrix(a, vm, b, wm)
        y.sum().backward()
        assert y.isfinite().all() and a.grad.isfinite().all() and b.grad.isfinite().all()


def test_parts_hold_every_set_once_with_little_padding():
    x, sizes, mask = sets(9, [3, 9, 1, 9, 4, 4, 2, 7])
    got, at = parts(x, mask, 12)
    held = torch.cat([F.pad(p.keep, (0, 9-p.keep.shape[1])) for p in got])[at]
    assert torch.equal(held, mask) and all(p.keep.numel() <= 12 or len(p.keep) == 1 for p in got)
    assert sum(p.keep.numel() for p in got) < mask.numel()*.75
    for p in got:
        assert torch.equal(p.x, p.lanes.view(p.x.shape[1], len(p.x), -1).transpose(0,
            1)) and torch.allclose(p.gram, p.x @ p.x.mT)


@pytest.mark.parametrize('bad', [dict(query='words'), dict(agg='Median'), dict(norm='l3norm'),
                                 dict(focal='both')])
def test_unknown_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): replace(Side('text', 9.), **bad)
