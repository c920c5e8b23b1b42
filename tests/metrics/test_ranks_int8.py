"""Ranks by whole numbers of 8 bits are the ranks by fp32 blocks, one by one, whatever the vectors."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from itm_nb.core.errors_files import DataError
from itm_nb.metrics import ranks as module
from itm_nb.metrics.ranks import quick_ranks, ranks, tile_scores, tiles_agree, TIE

torch.set_num_threads(1)


def planted(g, N, M, D, noise=.5):
    "A sentence is its image plus noise: own answers stand high, as in a trained model"
    img_of = np.sort(np.concatenate([np.arange(N), g.integers(0, N, M-N)]))
    img = normalize(torch.from_numpy(g.standard_normal((N, D))).float(), dim=1)
    txt = img[img_of] + noise*D**-.5*torch.from_numpy(g.standard_normal((M, D))).float()
    return img, normalize(txt, dim=1), img_of


def tied(g, N, M, D):
    "Sentences and images that are there twice, to the bit and nearly so"
    img, txt, img_of = planted(g, N, M, D)
    txt[::3] = txt[g.integers(0, M, len(txt[::3]))]
    img[::5] = img[g.integers(0, N, len(img[::5]))]
    txt[1::7] = txt[g.integers(0, M, len(txt[1::7]))]*(1 + 1e-7)
    txt[2::7] = txt[g.integers(0, M, len(txt[2::7]))]*(1 - TIE)
    return img, txt, img_of


def clustered(g, N, M, D):
    "All near one of three points"
    _, _, img_of = planted(g, N, M, D)
    centres = torch.from_numpy(g.standard_normal((3, D))).float()
    near = lambda n: centres[g.integers(0, 3, n)] + 1e-3*torch.from_numpy(g.standard_normal((n, D))).float()
    return normalize(near(N), dim=1), normalize(near(M), dim=1), img_of


def zeros(g, N, M, D):
    "Some vectors are nothing but zeros"
    img, txt, img_of = planted(g, N, M, D)
    img[::4], txt[::3] = 0, 0
    return img, txt, img_of


def unequal(g, N, M, D):
    "Lengths from 1/1000 to 1000, and one number that is far larger than all others"
    img, txt, img_of = planted(g, N, M, D)
    img *= torch.from_numpy(10**g.uniform(-3, 3, (N, 1))).float()
    txt *= torch.from_numpy(10**g.uniform(-1, 1, (M, 1))).float()
    txt[M//2, 0] = 50
    return img, txt, img_of


def whole(g, N, M, D):
    "Small whole numbers: every product is exact, and most scores are tied"
    _, _, img_of = planted(g, N, M, D)
    return (*(torch.from_numpy(g.integers(-2, 3, (n, D))).float() for n in (N, M)), img_of)


def unrelated(g, N, M, D):
    "Own answers stand anywhere; all scores may be negative"
    img, txt, img_of = planted(g, N, M, D, noise=50.)
    return img - .5, txt + .5, img_of


def level(g, N, M, D):
    "All places of a vector are nearly equal: what rounding takes adds up instead of cancelling"
    _, _, img_of = planted(g, N, M, D)
    flat = lambda n: torch.from_numpy(g.uniform(size=(n, 1)) + 1e-3*g.standard_normal((n, D))).float()
    return flat(N), flat(M), img_of


KINDS = dict(planted=planted, tied=tied, clustered=clustered, zeros=zeros, unequal=unequal, whole=whole,
             unrelated=unrelated, level=level)


def same(a, b):
    np.testing.assert_array_equal(a.i2t, b.i2t)
    np.testing.assert_array_equal(a.t2i, b.t2i)


@pytest.mark.parametrize('ties', ['pessimistic', 'optimistic'])
@pytest.mark.parametrize('kind', KINDS)
def test_equal_to_fp32(kind, ties):
    "Sorted or not, of any length, in blocks of any shape that tiles divide"
    quick = 0
    for seed in range(12):
        g = np.random.default_rng([seed, len(kind)])
        N, D = int(g.integers(1, 150)), int(g.choice([1, 3, 16, 64, 100, 256, 1024]))
        img, txt, img_of = KINDS[kind](g, N, int(N + g.integers(0, 4*N + 1)), D)
        if seed % 2:
            p = g.permutation(len(txt))
            txt, img_of = txt[p].clone(), img_of[p]
        kw = dict(ties=ties, tie=float(g.choice([0, TIE, TIE, 1e-3])))
        kw |= dict(rows=16*int(g.integers(1, 5)), cols=64*int(g.integers(1, 4))) if seed % 3 else {}
        same(ranks(img, txt, img_of, search='int8', **kw), ranks(img, txt, img_of, **kw))
        quick += quick_ranks(img, txt, img_of, **(dict(ties=ties, tie=TIE) | kw)) is not None
    assert quick >= 3, 'it was hardly ever done by whole numbers'


def test_scores_at_the_very_bar_are_taken_from_the_product_itself():
    "Neighbours of the own score, to the last bit, on both sides of the bar of a tie"
    g = np.random.default_rng(5)
    img, txt, img_of = planted(g, 64, 640, 256)
    S = img @ txt.T
    own = S.masked_fill(torch.arange(64)[:,None] != torch.from_numpy(img_of), -torch.inf)
    best, at = own.max(1)
    free = g.permutation(np.setdiff1d(range(640), at.numpy()))[:300]
    for k in free:                           # a shorter copy of the best sentence of another image
        i = (img_of[k] + 1) % 64
        txt[k] = (1 - TIE*float(S.abs().max()/best[i])*g.uniform(.98, 1.02))*txt[at[i]]
    made = module._WholeNumbers(img, txt, torch.from_numpy(img_of), 'pessimistic', TIE, 32, 128)
    found = module._ranks_whole(made, None)
    assert sum(x.shape[1] for x in made.near) > 60
    same(found, ranks(img, txt, img_of, rows=32, cols=128))


def test_images_that_nobody_asks_for():
    g = np.random.default_rng(0)
    img, txt, img_of = planted(g, 100, 300, 64)
    keep = img_of % 3 > 0
    args = img, txt[keep].clone(), img_of[keep]
    got = quick_ranks(*args, 'pessimistic', TIE, unasked=True)
    same(got, ranks(*args, unasked=True))
    assert (got.i2t[::3] == keep.sum()).all()
    with pytest.raises(DataError, match='without a sentence'):
        ranks(*args, search='int8')


def test_most_is_decided_without_fp32():
    "A thirtieth of the entries at most is looked at again, and a thousandth of these twice"
    img, txt, img_of = planted(np.random.default_rng(1), 1000, 5000, 256, noise=4.)
    made = module._WholeNumbers(img, txt, torch.from_numpy(img_of), 'pessimistic', TIE, 512, 2048)
    same(module._ranks_whole(made, None), ranks(img, txt, img_of))
    assert 0 < made.doubts < made.seen/30 and sum(x.shape[1] for x in made.near) < made.doubts/10


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_ranked_as_ever(dtype):
    img, txt, img_of = planted(np.random.default_rng(2), 90, 400, 64)
    img, txt = img.to(dtype), txt.to(dtype)
    same(quick_ranks(img, txt, img_of, 'pessimistic', TIE), ranks(img, txt, img_of))


def test_the_largest_score_may_hide_among_the_wrong_ones():
    "The width of a tie comes from a pair that is not an own one, in the last block"
    img, txt, img_of = planted(np.random.default_rng(3), 80, 400, 64)
    txt[-1] = -40*img[0]
    for tie in (TIE, 1e-3, 1e-2):
        same(quick_ranks(img, txt, img_of, 'pessimistic', tie, rows=16, cols=64),
             ranks(img, txt, img_of, tie=tie, rows=16, cols=64))


def refused(name, monkeypatch, img, txt):
    "Vectors, and what else is given, of a case that whole numbers cannot settle"
    if name == 'tiles round otherwise':
        monkeypatch.setattr(module, 'tiles_agree', lambda *shape: False)
    if name == 'rows that do not follow each other':
        return img.T.contiguous().T, txt, {}
    if name == 'an odd place in memory':
        return torch.cat([img.flatten()[:1], img.flatten()])[1:].view(img.shape), txt, {}
    if name == 'blocks that tiles do not divide':
        return img, txt, dict(rows=50, cols=300)
    if name == 'nothing but zeros':
        return img*0, txt*0, {}
    if name == 'too much in doubt':
        return torch.full_like(img, .3), torch.full_like(txt, .3), {}
    return img, txt, {}


CASES = ['tiles round otherwise', 'rows that do not follow each other', 'an odd place in memory',
         'blocks that tiles do not divide', 'nothing but zeros', 'too much in doubt']


@pytest.mark.parametrize('name', CASES)
def test_where_it_does_not_help_blocks_are_counted(name, monkeypatch):
    img, txt, img_of = planted(np.random.default_rng(4), 400, 2000, 32)
    img, txt, kw = refused(name, monkeypatch, img, txt)
    assert quick_ranks(img, txt, img_of, 'pessimistic', TIE, **kw) is None
    same(ranks(img, txt, img_of, search='int8', **kw), ranks(img, txt, img_of, **kw))


@pytest.mark.parametrize('change,wanted', [
    (dict(search='int4'), "search: 'int4'; wanted 'fp32' or 'int8'"), (dict(ties='none'), "ties: 'none'"),
    (dict(nan=True), 'NaN or an infinite score'), (dict(img_of=[0]*9), 'one image index for each')])
def test_bad_input_is_named_as_ever(change, wanted):
    img, txt, img_of = planted(np.random.default_rng(6), 20, 40, 16)
    if change.pop('nan', False):
        txt[3, 3] = torch.nan
    with pytest.raises(DataError, match=wanted):
        ranks(img, txt, change.pop('img_of', img_of), **(dict(search='int8') | change))


def test_a_tile_has_the_bits_of_its_block():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(100, 48, generator=g), torch.randn(300, 48, generator=g)
    assert tiles_agree(100, 300, 48, torch.get_num_threads())
    i, j = torch.randint(0, 100, (500,), generator=g), torch.randint(0, 300, (500,), generator=g)
    assert torch.equal(tile_scores(a, b, i, j, 100, 300), (a @ b.T)[i, j])
    S = torch.cat([a[:64] @ b.T, a[64:] @ b.T])
    assert torch.equal(tile_scores(a, b, i, j, 64, 300), S[i, j])


def test_the_benchmark_holds_them_against_their_goal(tmp_path):
    "The cells of the page, at a small size: all ranks equal, and a row for the table at the end"
    page = Path(__file__).parents[2]/'nbs'/'experiments'/'benchmark.ipynb'
    cells = [''.join(c['source']) for c in json.loads(page.read_text())['cells'] if c['cell_type'] == 'code']
    last = next(i for i, x in enumerate(cells) if "write('evaluation', rows)" in x)
    room = {}
    for at, text in enumerate(cells[:last+1]):
        exec(text, room)
        if at == 0:
            room.update(images=250, captions=1250, dim=64, rounds=2, figures=str(tmp_path))
    row = next(r for r in room['GOALS'] if 'whole numbers' in r['work'])
    assert row['goal'] == .6 and row['measured'] > 0 and row['results'] == 'equal (1,500 ranks)'
    assert 'count, whole numbers' in (tmp_path/'benchmark_evaluation.csv').read_text()


@pytest.mark.parametrize('spread', [0., 1e-3, 1e-2, 1.])
def test_rounding_that_is_not_random_is_within_its_bound(spread):
    "By all products, of vectors whose places are equal and less so"
    g = torch.Generator().manual_seed(0)
    q, k = (torch.rand(n, 1, generator=g) + spread*torch.randn(n, 1024, generator=g) for n in (200, 300))
    whole = [module.whole_numbers(x) for x in (q, k)]
    exact = [x.double() for x in (q, k)]
    kept = [step*numbers.double() for numbers, step, _ in whole]
    off = (exact[0] @ exact[1].T - kept[0] @ kept[1].T).abs().amax(1).numpy()
    bound = module.off_by(q, k, *whole)
    assert (off <= bound).all()
    assert not spread or (bound.max() < 60*off.max())
