"""What the metrics notebook cannot say in a cell: brute force in plain Python on many random matrices,
blocks of every shape, bad input."""
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import sparse, stats

from itm_nb.metrics import ranks as ranks_module, relevance, statistics
from itm_nb.core.errors_files import DataError
from itm_nb.metrics.ranks import (
    TIE, by_gallery, exact_matmul, galleries, mean_summary, Ranks, ranks, ranks_blocks, ranks_of, summary)
from itm_nb.metrics.relevance import chance, chance_many, many_positives, match_summary, oracle
from itm_nb.metrics.statistics import bootstrap, corrected_t, paired, per_photo, sensitivity

torch.set_num_threads(1)


# ---- slow references: plain Python loops, written from the definitions -------------------------------------

def slow_ranks(S, img_of, ties, tie):
    "Ranks by looking at every pair; float64 arithmetic on the given scores"
    S = [[float(x) for x in row] for row in S]
    eps = tie * max(abs(x) for row in S for x in row)
    def before(s, p): return s >= p - eps if ties == 'pessimistic' else s > p + eps
    i2t, t2i = [], []
    for i, row in enumerate(S):
        best = max(row[j] for j in range(len(row)) if img_of[j] == i)
        i2t.append(sum(1 for j in range(len(row)) if img_of[j] != i and before(row[j], best)))
    for j in range(len(S[0])):
        own = S[img_of[j]][j]
        t2i.append(sum(1 for i in range(len(S)) if i != img_of[j] and before(S[i][j], own)))
    return i2t, t2i


def slow_matches(S, pos, ign, eps):
    """Per query with a positive: (query, R, average precision, R-precision, first rank), by walking down
    the list; wrong ones first in a tie"""
    out = []
    for q, row in enumerate(S):
        right = [k for k in range(len(row)) if pos[q][k]]
        if not right: continue
        wrong = [k for k in range(len(row)) if not pos[q][k] and not ign[q][k]]
        right.sort(key=lambda k: -row[k])
        places = [n + 1 + sum(1 for w in wrong if row[w] >= row[k] - eps) for n, k in enumerate(right)]
        R = len(right)
        ap = sum((n+1)/p for n, p in enumerate(places) if p <= R) / R
        out.append((q, R, ap, sum(p <= R for p in places)/R, places[0]-1))
    return out


def random_case(rng, kind):
    "A small problem: unequal captions per image, any order, scores of the kind asked for"
    N = int(rng.integers(1, 9))
    per = rng.integers(1, 6, N)
    M = int(per.sum())
    img_of = np.repeat(np.arange(N), per)
    if rng.random() < .6: img_of = rng.permutation(img_of)
    S = {'random': lambda: rng.standard_normal((N, M)),
         'ties': lambda: rng.integers(-2, 3, (N, M)) / 4,
         # inside, on and outside the tie
         'near': lambda: rng.integers(-1, 2, (N, M)) + 1e-6*rng.integers(-4, 5, (N, M)),
         'constant': lambda: np.full((N, M), float(rng.standard_normal())),
         'zero': lambda: np.zeros((N, M)),
         'outlier': lambda: np.where(rng.random((N, M)) < .05, -1e4,
                                     rng.integers(-2, 3, (N, M)) / 100 + 1e-3*rng.random((N, M)))}[kind]()
    return S.astype(rng.choice(['float32', 'float64', 'float16'])), img_of


# ---- ranks -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['random', 'ties', 'near', 'constant', 'zero', 'outlier'])
def test_ranks_equal_brute_force(kind):
    "6 x 170 matrices x 2 tie rules x 2 tolerances, whole and in odd blocks: equal to the loops, bit for bit"
    rng = np.random.default_rng(list(map(ord, kind)))
    for n in range(170):
        S, img_of = random_case(rng, kind)
        for ties, tie in itertools.product(('pessimistic', 'optimistic'), (TIE, 0.)):
            want = slow_ranks(S, img_of, ties, tie)
            whole = ranks_of(S, img_of, ties, tie)
            parts = ranks_of(torch.from_numpy(S), img_of, ties, tie, rows=int(rng.integers(2, 6)),
                             cols=int(rng.integers(3, 15)))
            for got in (whole, parts):
                assert (got.i2t.tolist(), got.t2i.tolist()) == want, (kind, n, ties, tie, S, img_of)


def test_blocks_equal_whole_on_larger_matrices():
    """Block shape never matters for given scores; also when the undecided scores are too many and the pass
    repeats itself"""
    rng = np.random.default_rng(3)
    for n in range(6):
        N = int(rng.integers(40, 70))
        per = rng.integers(1, 8, N)
        img_of = rng.permutation(np.repeat(np.arange(N), per))
        # even n: all within a few ties
        S = (rng.standard_normal((N, len(img_of))) * (1 if n % 2 else 1e-6)
             + (0 if n % 2 else 1)).astype('float32')
        whole = ranks_of(S, img_of, rows=N, cols=len(img_of))
        for rows, cols in ((7, 13), (3, 1000), (1000, 5), (16, 64), (512, 2048)):
            part = ranks_of(S, img_of, rows=rows, cols=cols)
            assert (part.i2t == whole.i2t).all() and (part.t2i == whole.t2i).all()
        assert (whole.i2t.tolist(), whole.t2i.tolist()) == slow_ranks(S, img_of, 'pessimistic', TIE)


def test_undecided_scores_are_bounded(monkeypatch):
    """Scores that all lie within two ties overflow the store of undecided ones: the pass is repeated, the
    ranks are the same, nothing piles up"""
    rng = np.random.default_rng(5)
    img_of = np.repeat(np.arange(60), 5)
    S = np.ones((60, 300), 'float32') + rng.integers(0, 40, (60, 300)).astype('float32') * np.float32(2**-22)
    want = slow_ranks(S, img_of, 'pessimistic', TIE)
    monkeypatch.setattr(ranks_module, '_KEEP', 100)
    asked, held = [], []
    add = ranks_module.Tally.add
    def watched(self, *args):
        add(self, *args)
        held.append(self.held)
    monkeypatch.setattr(ranks_module.Tally, 'add', watched)
    got = ranks_blocks(lambda r, c: asked.append(1) or torch.from_numpy(S[r, c]), 60, 300, img_of, rows=8,
                       cols=32)
    assert (got.i2t.tolist(), got.t2i.tolist()) == want
    assert len(asked) == 1 + 2*8*10 and max(held) <= 100 + 8*32


def test_every_block_is_asked_once():
    "A cross-encoder's block may cost minutes: sorted or not, no block is scored twice"
    rng = np.random.default_rng(1)
    for shuffled in (False, True):
        img_of = np.repeat(np.arange(50), rng.integers(1, 7, 50))
        if shuffled: img_of = rng.permutation(img_of)
        S = torch.from_numpy(rng.standard_normal((50, len(img_of))))
        seen = torch.zeros(S.shape, dtype=torch.int64)
        def block(r, c):
            seen[r, c] += 1
            return S[r, c]
        ranks_blocks(block, *S.shape, img_of, rows=8, cols=16)
        # one probe for type and device
        seen[0, 0 if not shuffled else int(np.argsort(img_of, kind='stable')[0])] -= 1
        assert (seen == 1).all()


def test_memory_mapped_half_precision(tmp_path):
    rng = np.random.default_rng(2)
    img_of = rng.permutation(np.repeat(np.arange(30), 4))
    S = rng.standard_normal((30, 120)).astype('float16')
    np.save(tmp_path/'s.npy', S)
    m = np.load(tmp_path/'s.npy', mmap_mode='r')
    a, b = ranks_of(m, img_of, rows=7, cols=9), slow_ranks(S, img_of, 'pessimistic', TIE)
    assert (a.i2t.tolist(), a.t2i.tolist()) == b
    assert not isinstance(m, type(None)) and (np.load(tmp_path/'s.npy') == S).all()  # only read


def test_embeddings_equal_brute_force():
    """Whole numbers as embeddings: exact products, many ties; half precision inputs and any block shape
    give the same"""
    rng = np.random.default_rng(4)
    for n in range(100):
        N = int(rng.integers(1, 25))
        img_of = rng.permutation(np.repeat(np.arange(N), rng.integers(1, 6, N)))
        img, txt = (torch.tensor(rng.integers(-3, 4, (k, 6)), dtype=torch.float32) for k in (N, len(img_of)))
        want = slow_ranks(img @ txt.T, img_of, 'pessimistic', TIE)
        for a in (ranks(img, txt, img_of), ranks(img.half(), txt.half(), img_of, rows=3, cols=5),
                  ranks(img.numpy(), txt.numpy(), torch.from_numpy(img_of))):
            assert (a.i2t.tolist(), a.t2i.tolist()) == want


def test_duplicates_in_other_blocks_are_ties():
    """Copies of the right sentence, multiplied in another block and another shape of block, tie with it
    and stand before it"""
    g = torch.Generator().manual_seed(0)
    img = torch.nn.functional.normalize(torch.randn(40, 257, generator=g), dim=1)
    txt = torch.nn.functional.normalize(img + .01*torch.randn(40, 257, generator=g), dim=1)
    txt = torch.cat([txt, txt[:39]])
    img_of = torch.cat([torch.arange(40), torch.arange(1, 40)])     # image i+1 owns a copy of sentence i
    r = ranks(img, txt, img_of, rows=16, cols=23)
    assert (r.i2t[:39] == 1).all() and r.i2t[39] == 0  # one copy each stands before
    assert (ranks(img, txt, img_of, ties='optimistic', rows=16, cols=23).i2t == 0).all()


def test_precision_is_fp32_whatever_the_surroundings():
    g = torch.Generator().manual_seed(1)
    img, txt = torch.randn(300, 64, generator=g), torch.randn(900, 64, generator=g)
    img_of = torch.arange(900) // 3
    want = ranks(img, txt, img_of)
    old = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        with torch.autocast('cpu', dtype=torch.bfloat16): got = ranks(img, txt, img_of)
        assert torch.get_float32_matmul_precision() == 'medium'
        with exact_matmul():
            assert torch.get_float32_matmul_precision() == 'highest'
    finally: torch.set_float32_matmul_precision(old)
    assert (got.i2t == want.i2t).all() and (got.t2i == want.t2i).all()
    low = ranks_blocks(lambda r, c: (img[r].bfloat16() @ txt[c].bfloat16().T).float(), 300, 900, img_of)
    assert (low.t2i != want.t2i).mean() > .1  # the test can tell


def test_own_captions_and_order_do_not_matter():
    "Ranks follow their caption when captions are reordered, and their image when images are"
    rng = np.random.default_rng(6)
    for _ in range(50):
        S, img_of = random_case(rng, 'ties')
        a = ranks_of(S, img_of)
        p, q = rng.permutation(len(img_of)), rng.permutation(len(S))
        b = ranks_of(S[q][:,p], np.argsort(q)[img_of[p]])
        assert (b.t2i == a.t2i[p]).all() and (b.i2t == a.i2t[q]).all()


def test_galleries_equal_submatrices():
    rng = np.random.default_rng(7)
    img_of = rng.permutation(np.repeat(np.arange(40), rng.integers(1, 5, 40)))
    gallery = rng.integers(0, 4, 40) * 10
    img, txt = (torch.tensor(rng.integers(-3, 4, (k, 5)), dtype=torch.float32) for k in (40, len(img_of)))
    r, rows = (galleries(img, txt, img_of, gallery),
               by_gallery(galleries(img, txt, img_of, gallery), img_of, gallery))
    for n, g in enumerate(np.unique(gallery)):
        i, j = np.flatnonzero(gallery == g), np.flatnonzero(gallery[img_of] == g)
        want = slow_ranks((img @ txt.T)[i][:,j], [list(i).index(img_of[k]) for k in j], 'pessimistic', TIE)
        assert (r.i2t[i].tolist(), r.t2i[j].tolist()) == want
        assert rows[n] == summary(Ranks(np.array(want[0]), np.array(want[1])))
    assert math.isclose(mean_summary(rows)['rsum'], np.mean([x['rsum'] for x in rows]))


def test_medr_rounds_down_and_counts_from_one():
    assert summary(Ranks(np.array([0, 1]), np.array([3, 0, 9, 9])))['i2t']['medr'] == 1
    assert summary(Ranks(np.array([0, 1]), np.array([3, 0, 9, 9])))['t2i'] == dict(r1=25., r5=50., r10=100.,
        medr=7., meanr=6.25)


# ---- many right answers ------------------------------------------------------------------------------------

def test_many_positives_equal_brute_force():
    """300 random problems: any number of right answers, some queries without, ties, ignored pairs, every
    form of input"""
    rng = np.random.default_rng(8)
    for n in range(300):
        N, M = rng.integers(1, 12, 2)
        S = (rng.integers(-3, 4, (N, M)) / 4 if n % 2 else rng.standard_normal((N, M))).astype('float32')
        pos = rng.random((N, M)) < rng.choice([.1, .3, .8])
        ign = (rng.random((N, M)) < .2) & ~pos
        eps = TIE * float(np.abs(S).max())
        form = [lambda x: x, torch.from_numpy, sparse.csr_matrix,
                lambda x: {i: np.flatnonzero(x[i]) for i in range(len(x))}][n % 4]
        given = form(pos) if n % 4 != 3 else dict(i2t=form(pos), t2i=form(pos.T))
        got = many_positives(S if n % 3 else torch.from_numpy(S), given,
                             ign if n % 4 != 2 else sparse.csr_matrix(ign), rows=int(rng.integers(1, 6)))
        for d, want in (('i2t', slow_matches(S, pos, ign, eps)),
                        ('t2i', slow_matches(S.T, pos.T, ign.T, eps))):
            m = got[d]
            assert m.dropped + len(m.query) == (N if d == 'i2t' else M) and len(m.query) == len(want)
            for k, (name, exact) in enumerate([('query', 1), ('R', 1), ('ap', 0), ('rp', 0), ('first', 1)]):
                np.testing.assert_allclose(getattr(m, name), [w[k] for w in want], rtol=0,
                                           atol=0 if exact else 1e-12)


@pytest.mark.parametrize('ties', ['pessimistic', 'optimistic'])
@pytest.mark.parametrize('seed', range(6))
def test_one_pass_in_small_blocks_gives_what_whole_rows_give(seed, ties):
    "Ties, right answers that differ by direction, ignored pairs, missing answers, blocks smaller than R"
    rng, passed = np.random.default_rng(seed), 0
    for n in range(12):
        N, M = rng.integers(20, 90, 2)
        S = torch.tensor(rng.integers(-9, 10, (N, M))/8 if n % 3 == 0 else rng.standard_normal((N, M)))
        S = S.float() if n % 2 else S
        share = rng.choice([.02, .1, .4])
        pos, ign = rng.random((N, M)) < share, rng.random((N, M)) < .1
        if n % 4 == 1:
            S = S + 2*torch.from_numpy(pos)
        given = {d: relevance.relevant(x & ~y, x.shape) for d, x, y in (
            ('i2t', pos, ign), ('t2i', (pos if n % 2 else rng.random((N, M)) < share).T, ign.T))}
        lost = {d: rng.integers(0, 3, k)*(rng.random(k) < .2) for d, k in (('i2t', N), ('t2i', M))}
        part, *sizes = relevance._parts(S)
        args = sizes, given, relevance.relevant(ign, (N, M)), lost, TIE, ties
        want = relevance._by_blocks(part, *args, 16)
        for cols, rows in ((7, 9), (32, 16), (2048, 512)):
            got = relevance._one_pass(part, relevance._pairs(S, part), *args, cols, rows)
            if got is None:         # the largest score came as a surprise: whole rows are the answer
                continue
            passed += 1
            for d, k in itertools.product(('i2t', 't2i'), ('query', 'R', 'first', 'ap', 'rp')):
                np.testing.assert_allclose(getattr(got[d], k), getattr(want[d], k), rtol=0, atol=1e-12)
    assert passed >= 24


def test_identity_truth_gives_the_ranks():
    "If only the own pairs are right, `first` is the rank, from embeddings as from the matrix"
    rng = np.random.default_rng(9)
    img_of = rng.permutation(np.repeat(np.arange(50), rng.integers(1, 5, 50)))
    img, txt = (torch.tensor(rng.integers(-3, 4, (k, 5)), dtype=torch.float32) for k in (50, len(img_of)))
    true = img_of[None] == np.arange(50)[:,None]
    r = ranks(img, txt, img_of)
    for scores in ((img, txt), img @ txt.T):
        m = many_positives(scores, true)
        assert (m['i2t'].first == r.i2t).all() and (m['t2i'].first == r.t2i).all()


# ---- oracle, chance ----------------------------------------------------------------------------------------

def test_oracle_by_enumeration():
    """All orders of the tied answers, counted one by one; captions that are not even true of their own
    image included"""
    rng = np.random.default_rng(10)
    for _ in range(20):
        N = 3
        img_of = np.repeat(np.arange(N), [2, 1, 2])
        M = len(img_of)
        true = rng.random((N, M)) < .4
        true[img_of, np.arange(M)] |= rng.random(M) < .8
        said = oracle(img_of, true, ks=(1, 2, 3))
        def expect(row, own):  # every order within the true, then every order within the rest
            top, rest = [k for k in range(len(row)) if row[k]], [k for k in range(len(row)) if not row[k]]
            got = [min((list(a)+list(b)).index(o) for o in own) for a in itertools.permutations(top)
                   for b in itertools.permutations(rest)]
            return np.array(got)
        i2t = [expect(true[i], np.flatnonzero(img_of == i)) for i in range(N)]
        t2i = [expect(true[:,j], [img_of[j]]) for j in range(M)]
        for d, want in (('i2t', i2t), ('t2i', t2i)):
            for k in (1, 2, 3):
                assert math.isclose(said[d][f'r{k}'], 100*np.mean([(w < k).mean() for w in want]),
                                    abs_tol=1e-9)
            assert math.isclose(said[d]['meanr'], np.mean([w.mean() for w in want]) + 1, abs_tol=1e-9)


def test_chance_by_enumeration():
    said = chance(2, 5, [2, 3], ks=(1, 2, 3))
    for d, cases in (('i2t', [(5, 2), (5, 3)]), ('t2i', [(2, 1)])):
        want = [np.array([min(c) for c in itertools.combinations(range(n), a)]) for n, a in cases]
        for k in (1, 2, 3):
            assert math.isclose(said[d][f'r{k}'], 100*np.mean([(w < k).mean() for w in want]), abs_tol=1e-9)
    for R, K in ((1, 4), (2, 5), (4, 4)):
        every = [np.isin(np.arange(K), c) for c in itertools.combinations(range(K), R)]
        ap = [sum(x[:n+1].sum()/(n+1) for n in range(R) if x[n])/R for x in every]
        assert math.isclose(chance_many([R], K)['map_r'], 100*np.mean(ap), abs_tol=1e-9)
        assert math.isclose(chance_many([R], K)['rp'], 100*np.mean([x[:R].mean() for x in every]),
                            abs_tol=1e-9)


def test_large_galleries_stay_exact():
    "No overflow at COCO's size: the hypergeometric share equals its product form"
    said = chance(5000, 25000)['i2t']
    for k in (1, 5, 10):
        assert math.isclose(said[f'r{k}'], 100*(1 - math.comb(25000-5, k)/math.comb(25000, k)), rel_tol=1e-6)
    own = np.repeat(np.arange(1000), 5)
    assert oracle(own, own[None] == np.arange(1000)[:,None])['rsum'] == 600


# ---- intervals and tests -----------------------------------------------------------------------------------

@pytest.mark.parametrize('k', [2, 7, 900])
def test_bootstrap_draws_what_scipy_draws(k):
    "The same samples as the library's, once for all rows of a table instead of once for each"
    rng = np.random.default_rng(k)
    s, n = rng.random(k), rng.integers(1, 6, k).astype(float)
    theirs = stats.bootstrap((s, n), lambda s, n, axis=-1: s.sum(axis)/n.sum(axis), paired=True,
                             vectorized=True, n_resamples=3000, batch=max(1, 2**21//k),
                             method='percentile',
                             random_state=np.random.default_rng(5)).bootstrap_distribution
    assert np.allclose(statistics._drawn(s, n, 3000, 5), theirs, rtol=1e-12, atol=0)
    pieces = np.concatenate(list(statistics._pieces(k, 3000, 5)))
    assert (pieces.sum(1) == k).all()


def test_bootstrap_covers():
    "Of 200 samples of clustered data about 95 % of the intervals hold the truth; without clusters far fewer"
    rng = np.random.default_rng(11)
    held = {True: 0, False: 0}
    for _ in range(200):
        photo = rng.standard_normal(80)
        x = np.repeat(photo, 5) + .1*rng.standard_normal(400)
        for use in held:
            _, lo, hi = bootstrap(x, np.repeat(np.arange(80), 5) if use else None, n=400,
                                  seed=int(rng.integers(1e9)))
            held[use] += lo <= 0 <= hi
    assert 178 <= held[True] <= 200 and held[False] < 150


def test_paired_is_calibrated_and_can_see():
    rng = np.random.default_rng(12)
    small = 0
    for n in range(200):
        d = np.repeat(rng.standard_normal(40), 2)
        small += paired(d, np.zeros(80), np.repeat(np.arange(40), 2), n=200, seed=n).p < .05
    assert 2 <= small <= 22                                            # 10 expected
    assert paired(d + 1, np.zeros(80), np.repeat(np.arange(40), 2)).p < .001


def test_sign_flips_by_enumeration():
    x = np.array([.5, -1., 2., 3., .25])
    every = np.array([abs(np.dot(s, x)) for s in itertools.product((-1, 1), repeat=5)])
    assert math.isclose(paired(x, np.zeros(5)).p, (every >= abs(x.sum()) - 1e-12).mean())


def test_unequal_clusters_weigh_by_their_values():
    values, photo = np.array([1., 1., 1., 0.]), np.array(['a', 'a', 'a', 'b'])
    mean, lo, hi = bootstrap(values, photo, n=4000)
    assert mean == .75 and (lo, hi) == (0., 1.)                        # draws: aa, ab, ba, bb
    assert paired(values, np.zeros(4), photo).n == 2


def test_corrected_t_by_hand():
    d = corrected_t([1., 3.], n_train=80, n_test=20)
    assert d.diff == 2 and math.isclose((d.hi-d.lo)/2, 12.7062047364*math.sqrt((.5+.25)*2), rel_tol=1e-9)
    assert corrected_t([1., 1.], 80, 20).p == 0 and math.isnan(corrected_t([1.], 80, 20).p)


def test_per_photo_sums_to_rsum():
    rng = np.random.default_rng(13)
    for _ in range(20):
        S, img_of = random_case(rng, 'random')
        r = ranks_of(S, img_of)
        assert math.isclose(per_photo(r, img_of).mean(), summary(r)['rsum'], abs_tol=1e-9)


def test_sensitivity_lies_between_the_bounds():
    rng = np.random.default_rng(14)
    for _ in range(50):
        t, f, u = rng.integers(0, 20, (3, 10))
        t[0] += 1
        f[0] += 1
        b = statistics.bounds(t, f, u)
        s = sensitivity(t, f, u, odds=(1e12, 1, .5, 0))
        assert b.lower == s[0] <= s[.5] <= s[1] <= s[1e12] <= b.upper + 1e-12


# ---- bad input ---------------------------------------------------------------------------------------------

ok = torch.tensor([[1., 0.], [0., 1.]])
BAD = dict(
    nan=(lambda: ranks_of(ok*torch.nan, [0, 1]), 'NaN'),
    infinite=(lambda: ranks_of(ok/0, [0, 1]), 'NaN'),
    nan_in_a_late_block=(lambda: ranks_of(torch.cat([torch.zeros(9, 10), torch.full((1, 10), torch.nan)]),
                                          np.arange(10), rows=2, cols=3), 'NaN'),
    nan_embedding=(lambda: ranks(ok*torch.nan, ok, [0, 1]), 'NaN'),
    nan_many=(lambda: many_positives(ok*torch.nan, ok > 0), 'NaN'),
    nan_values=(lambda: bootstrap([1., math.nan]), 'finite'),
    a_row=(lambda: ranks_of(ok[0], [0, 1]), '(images, sentences)'),
    no_images=(lambda: ranks_of(torch.zeros(0, 2), [0, 1]), 'at least one'),
    short_img_of=(lambda: ranks_of(ok, [0]), 'one image index'),
    float_img_of=(lambda: ranks_of(ok, [0., 1.]), 'integer'),
    lone_image=(lambda: ranks_of(ok, [0, 0]), '1 images without a sentence'),
    negative=(lambda: ranks_of(ok, [-1, 1]), '0 to 1'),
    dims=(lambda: ranks(ok, torch.ones(2, 3), [0, 1]), '(N, D) and (M, D)'),
    integers=(lambda: ranks(ok.long(), ok, [0, 1]), 'floats'),
    wrong_block=(lambda: ranks_blocks(lambda r, c: torch.zeros(1, 1), 2, 2, [0, 1]), 'a block of'),
    truth_shape=(lambda: many_positives(ok, torch.ones(2, 3) > 0), 'shape'),
    truth_ids=(lambda: many_positives(ok, {'i2t': {0: [7]}}), 'Translate ids'),
    both=(lambda: many_positives(ok, ok > 0, ok > 0), 'neither right nor wrong'),
    clusters=(lambda: bootstrap([1., 2.], ['a']), 'one for each'),
    empty=(lambda: bootstrap([]), 'finite numbers'),
    lengths=(lambda: paired([1.], [1., 2.]), 'same queries'),
    per_image=(lambda: chance(2, 5), 'at least one each'),
    rule=(lambda: ranks_of(ok, [0, 1], ties='mean'), "'pessimistic'"),
)


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_named(name):
    call, words = BAD[name]
    with pytest.raises(DataError, match='.*'.join(words.split()).replace('(', r'\(').replace(')', r'\)')):
        call()
