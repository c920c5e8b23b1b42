"""What the notebook 8_analysis/04_audit cannot say about itself: every sampler against drawn batches,
blocks, bounds, damaged records"""
import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch

from itm_nb.methods import samplers
from itm_nb.analysis.audit import (
    BANDS, FALSE, HALF, SAMPLERS, TRUE, UNKNOWN, audit, audit_markdown, audit_picks, by_pick, hardest_of,
    of_judgements, of_matrix, ranked, ranks_between, read_audits, semi_hard_of, shuffled, suspects,
    top_share, uniform_pick, weighted, write_audit)
from itm_nb.core.errors_files import DataError
from itm_nb.data.folds import Judgements
from itm_nb.analysis.audit_runs import audit_command


def world(seed, N=12, most=4, D=6, ties=False):
    "Images with 1 to `most` sentences in mixed order, vectors, labels of four kinds"
    g = np.random.default_rng(seed); img_of = g.permutation(np.repeat(np.arange(N), g.integers(1, most+1, N)))
    img, txt = (torch.tensor(g.normal(size=(n, D)).round(0 if ties else 6)).float() for n in (N, len(img_of)))
    label = g.choice([UNKNOWN, FALSE, TRUE, HALF], (N, len(img_of)), p=[.4, .3, .2, .1]).astype(np.int8)
    return img, txt, torch.tensor(img_of), label


# ---------------------------------------------------------------- every weight, by enumeration

def enumerated(score, img_of, side, pair, n, below):
    "Mean over all batches of n pairs that hold `pair`: place of the best eligible candidate, in plain loops"
    own, M = int(img_of[pair]), len(img_of)
    batches = list(itertools.combinations([j for j in range(M) if j != pair], n-1))
    out = np.zeros(score.shape[1 if side == 'i2t' else 0])
    pos = float(np.mean([score[own, j] for j in range(M)
                         if img_of[j] == own])) if side == 'i2t' else float(score[own, pair])
    for batch in batches:
        there = {j: score[own, j] for j in batch
                 if img_of[j] != own} if side == 'i2t' else {int(img_of[j]): score[img_of[j], pair]
            for j in batch if img_of[j] != own}
        there = {k: float(v) for k, v in there.items() if not below or v < pos}
        if there: out[max(there, key=there.get)] += 1
    return out/len(batches)

@pytest.mark.parametrize('seed', range(4))
def test_batches_by_enumeration(seed):
    img, txt, img_of, _ = world(seed, 5, 3)
    score = img @ txt.T
    M = len(txt)
    g = np.random.default_rng(seed)
    own = img_of == torch.arange(5)[:,None]
    c = dict(i2t=ranked(score, own), t2i=ranked(score.T, own.T, torch.bincount(img_of), M, side='t2i'))
    for n in {2, 3, min(5, M)}:
        pair = int(g.integers(M))
        for side in ('i2t', 't2i'):
            row = int(img_of[pair]) if side == 'i2t' else pair
            for make, below in ((hardest_of(n), False), (semi_hard_of(n), True)):
                w = make(c[side])
                placed = torch.zeros(c[side].col.shape[1]).scatter_(0, c[side].col[row], w[row]).numpy()
                np.testing.assert_allclose(placed, enumerated(score, img_of, side, pair, n, below), atol=1e-5)

@pytest.mark.parametrize('name', [*SAMPLERS, *BANDS])
def test_weights_are_probabilities_of_legal_candidates(name):
    for seed in range(3):
        img, txt, img_of, _ = world(seed, 40)
        for side in ('i2t', 't2i'):
            A, C = (img, txt) if side == 'i2t' else (txt, img)
            a, b = (torch.arange(40), img_of) if side == 'i2t' else (img_of, torch.arange(40))
            c = ranked(A @ C.T, a[:,None] == b, None if side == 'i2t' else torch.bincount(img_of), len(txt),
                       side=side)
            w = (SAMPLERS | BANDS)[name](c); total = w.sum(1)
            assert w.shape == c.score.shape and (w >= -1e-6).all() and (total <= 1
                + 1e-5).all() and (w[~c.eligible] == 0).all()
            if name in ('uniform', 'hardest of all', 'top 1 %', 'skip 3'):
                assert torch.allclose(total, torch.ones(len(A)), atol=1e-5)

def test_by_pick_is_the_pick():
    "A pick of the training loop on the whole pool equals the exact sampler; on random pools it comes near"
    img, txt, img_of, _ = world(1, 30, 1); c = ranked(img @ txt.T, img_of == torch.arange(30)[:,None])
    for pick, exact in ((samplers.hardest, hardest_of()), (samplers.semi_hard, semi_hard_of()),
                        (samplers.top(4), ranks_between(0, 3)), (samplers.every, uniform_pick)):
        assert torch.allclose(by_pick(pick)(c), exact(c), atol=1e-6)
    drawn = by_pick(samplers.draw(1), times=600)(c)
    assert abs(drawn.sum(1) - 1).max() < 1e-4 and abs(drawn[:, :29] - 1/29).max() < .04
    assert abs(by_pick(samplers.hardest, 5, 800)(c) - hardest_of(5)(c)).max() < .07

def test_weighted_and_shares():
    c = ranked(torch.tensor([[.5, .4, .3, .2, .1]]), torch.tensor([[True, False, False, False, False]]))
    assert torch.allclose(weighted(lambda s, p: (s > .25).float())(c)[0], torch.tensor([.5, .5, 0, 0, 0]))
    for share, k in ((0., 1), (.25, 1), (.5, 2), (1., 4)): assert (top_share(share)(c) > 0).sum() == k


# ---------------------------------------------------------------- sums, bounds, blocks

def slow(img, txt, img_of, label, sampler, side):
    "Bounds, hardness and violations of one sampler, anchor by anchor"
    score = (img @ txt.T).numpy()
    N, M = score.shape
    u = f = t = hard = over = total = 0.
    load = np.zeros(M if side == 'i2t' else N)
    for a in range(N if side == 'i2t' else M):
        s, lab = (score[a], label[a]) if side == 'i2t' else (score[:, a], label[:, a])
        own = (img_of == a).numpy() if side == 'i2t' else (np.arange(N) == int(img_of[a]))
        copies = None if side == 'i2t' else torch.bincount(img_of)
        c = ranked(torch.tensor(s)[None], torch.tensor(own)[None], copies, M, side=side)
        w, col = sampler(c)[0].numpy(), c.col[0].numpy()
        for x, k in zip(w, col):
            if own[k]: continue
            load[k] += x; hard += x*s[k]; total += x; over += x*(s[k] > s[own].mean() - .2)
            u += x*(lab[k] == UNKNOWN); f += x*(lab[k] == FALSE); t += x*(lab[k] == TRUE)
    load /= load.sum()
    return dict(lower=100*t/(u+f+t), judged_only=100*t/(t+f), upper=100*(t+u)/(u+f+t),
                judged=100*(t+f)/(u+f+t), hardness=hard/total, violating=100*over/total,
                effective=100/(load**2).sum()/len(load))

@pytest.mark.parametrize('block', [1, 77, 10**6])
def test_audit_against_loops(block):
    img, txt, img_of, label = world(3)
    tab = audit(img, txt, img_of, SAMPLERS | BANDS, dict(x=lambda i, j: label[np.ix_(i, j)]), draws=50,
                block=block).set_index(['side', 'sampler'])
    for side in ('i2t', 't2i'):
        for name in ('uniform', 'hardest of 32', 'hardest of all', 'top 1 %', 'skip 3', 'ranks 4-10',
                     'semi-hard of 128'):
            want = slow(img, txt, img_of, label, (SAMPLERS | BANDS)[name], side)
            for k, x in want.items():
                assert abs(tab.loc[(side, name), k] - x) < 2e-3*max(1, abs(x)), (side, name, k)

def test_intervals_cover_the_share_of_all_photographs():
    """Samples of photographs: 95 % intervals of the lower bound hold the share of the whole collection in
    about 95 %"""
    g = np.random.default_rng(0); held = 0
    p = g.beta(1, 4, 4000); share = p.mean()
    for t in range(200):
        take = g.choice(4000, 100); n = 3
        image = np.repeat(np.arange(100), n); y = g.random(300) < np.repeat(p[take], n)
        lab = np.full((100, 300), FALSE, np.int8); lab[image, np.arange(300)] = np.where(y, TRUE, FALSE)
        r = audit_picks(image, np.arange(300), dict(x=lambda i, j: lab[np.ix_(i, j)]), draws=300,
                        seed=t).iloc[0]
        held += r.lower_lo <= 100*share <= r.lower_hi
    assert held >= 180, held

def test_unjudged_strata_and_odds():
    img, txt, img_of, label = world(5, 30); truth = dict(x=lambda i, j: label[np.ix_(i, j)])
    tab = audit(img, txt, img_of, truth=truth, draws=20)
    assert (tab.odds_0 <= tab.odds_1 + 1e-6).all() and np.allclose(tab.odds_0, tab.lower,
        atol=1e-3) and (tab.odds_1 <= tab.upper + 1e-6).all()

def test_a_judge_sees_only_what_may_be_negative():
    img, txt, img_of, label = world(6, 20); other = (torch.ones(20, 1), torch.ones(len(txt), 1)*.5)
    tab = audit(img, txt, img_of, dict(h=hardest_of()), dict(x=lambda i, j: label[np.ix_(i, j)]), judge=other,
                draws=5)
    assert np.allclose(tab.judge, .5)

def test_the_judged_share_of_a_thousand_is_between_its_bounds_for_every_rule():
    g = np.random.default_rng(2); n = 60
    judged = Judgements(np.column_stack([g.integers(n, size=900), g.integers(n, size=900),
                                         g.integers(4, size=900), g.integers(4, size=900)]),
                        np.column_stack([g.integers(n, size=200), g.integers(n, size=200),
                                         g.integers(1, 5, (200, 3))]))
    truth = {r: of_judgements(judged, r, (n, n)) for r in ('strict', 'main', 'lenient')}
    tab = audit(torch.tensor(g.normal(size=(n, 8))).float(), torch.tensor(g.normal(size=(n, 8))).float(),
                np.arange(n), truth=truth, draws=50)
    one = tab.pivot(index=['side', 'sampler'], columns='rule', values='lower')
    assert (one.strict <= one.main + 1e-9).all() and (one.main <= one.lenient + 1e-9).all()
    assert np.allclose(tab.pivot(index=['side', 'sampler'], columns='rule', values='judged').std(axis=1), 0,
                       atol=1e-3)

def test_scenes_truth_is_exact():
    "The audit of the drawn world against counting in its truth matrix"
    from itm_nb.scenes.dataset import make
    w = make('tiny', seed=3); s = w.split('test'); g = torch.Generator().manual_seed(0)
    img, txt = torch.randn(len(s), 4, generator=g), torch.randn(len(s.captions), 4, generator=g)
    tab = audit(img, txt, s.img_of, dict(u=uniform_pick, h=hardest_of()),
                dict(truth=of_matrix(w.matrix('test'))), draws=20).set_index(['side', 'sampler'])
    T = w.matrix('test').astype(int); T[s.img_of, np.arange(len(s.img_of))] = 9
    per = np.array([[(r == 2).sum(), (r == 0).sum()] for r in T])/np.array([[(r != 9).sum()] for r in T])
    assert abs(tab.lower['i2t', 'u'] - 100*per[:,0].sum()/per.sum()) < 1e-3 and (tab.judged > 99.99).all()
    score = np.where(T == 9, -np.inf, (img @ txt.T).numpy()); y = T[np.arange(len(T)), score.argmax(1)]
    assert abs(tab.lower['i2t', 'h'] - 100*(y == 2).sum()/((y == 2) | (y == 0)).sum()) < 1e-3


# ---------------------------------------------------------------- suspects, shuffled pairs, records, command

@pytest.mark.parametrize('block', [1, 50, 10**6])
def test_suspects_against_sorting(block):
    img, txt, img_of, _ = world(7, 15)
    got = suspects(img, txt, img_of, top=40, block=block)
    s = (img @ txt.T).numpy().astype(float)
    s[img_of.numpy(), np.arange(len(img_of))] = -np.inf
    np.testing.assert_allclose(got.score, np.sort(s.ravel())[::-1][:40], rtol=1e-5)
    assert (img_of[got.sentence.values].numpy() != got.image.values).all() and not got.duplicated(['image',
        'sentence']).any()
    assert len(suspects(img[:2], txt[:2], torch.arange(2), top=99)) == 2

def test_shuffled_pairs_are_chance():
    from itm_nb.metrics.relevance import chance
    g = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(120, 16, generator=g), dim=1)
    assert abs(np.mean([shuffled(x, x, np.arange(120), seed=s) for s in range(30)]) - chance(120,
        120)['rsum']) < 3

def test_records_are_small_whole_and_checked(tmp_path):
    img, txt, img_of, label = world(8)
    tab = audit(img, txt, img_of, truth=dict(main=lambda i, j: label[np.ix_(i, j)]), draws=20)
    about = dict(id='ab'*6, method='m', sweep='s', preset=None, seed=0, block=dict(fold=None, seed=0),
                 data=dict(label='d'))
    path = write_audit(tmp_path, about, tab, dict(shuffled=1.))
    first = path.read_bytes()
    rec = read_audits(tmp_path)[0]
    assert write_audit(tmp_path, about, pd.DataFrame(rec['audit']), rec['control']).read_bytes() == first
    assert audit_markdown(pd.DataFrame(rec['audit']), 'main') == audit_markdown(tab, 'main')
    for change in (lambda r: r.pop('audit'), lambda r: r.update(schema='x'), lambda r: r.update(audit=[1]),
                   lambda r: r.update(audit=5), lambda r: r.update(id='cd'*6)):
        bad = json.loads(first); change(bad); path.write_text(json.dumps(bad))
        with pytest.raises(DataError): read_audits(tmp_path)
    for raw in ('[]', '3', '{', 'null'):
        path.write_text(raw)
        with pytest.raises(DataError): read_audits(tmp_path)

@pytest.mark.parametrize('case', [
    lambda i, t, o: audit(i[0], t, o), lambda i, t, o: audit(i, t[:, :2], o),
    lambda i, t, o: audit(i, t, o[:3]), lambda i, t, o: audit(i[:1], t, o*0),
    lambda i, t, o: audit(i, t, o*0), lambda i, t, o: audit(i[:3], t, o),
    lambda i, t, o: audit_picks([], [], {}), lambda i, t, o: audit_picks([1], [1, 2], {}),
])
def test_bad_input_is_named(case):
    img, txt, img_of, _ = world(9)
    with pytest.raises(DataError): case(img, txt, img_of)

def test_command(tmp_path, capsys):
    from itm_nb.cli import itm_data
    img, txt, img_of, _ = world(10, 30); np.savez(tmp_path/'v.npz', img=img, txt=txt, img_of=img_of)
    assert itm_data(['audit', '--vectors', str(tmp_path/'v.npz'), '--csv', str(tmp_path/'t.csv'),
                     '--suspects', str(tmp_path/'s.csv'), '--top', '5']) == 0
    assert ('| hardest of all |' in capsys.readouterr().out and len(pd.read_csv(tmp_path/'s.csv')) == 5
            and len(pd.read_csv(tmp_path/'t.csv')) == 2*len(SAMPLERS))
    for bad in ([], ['--run', str(tmp_path)], ['--vectors', str(tmp_path/'t.csv')],
                ['--vectors', 'nowhere.npz']):
        assert itm_data(['audit', *bad]) == 2

def test_a_finished_run_is_audited(tmp_path):
    "Train for a moment, audit with exact truth, write the record, read the page"
    from itm_nb.training.config import Config
    from itm_nb.training.loop import fit
    from itm_nb.analysis.audit_runs import audit_run
    cfg = Config(preset='tiny', dim=16, d_word=8, image_hidden=16, epochs=1, batch=32)
    run = tmp_path/'run'
    fit(cfg, run, progress=False)
    about, rows, control = audit_run(run); path = write_audit(tmp_path/'a', about, rows, control)
    assert (set(rows.rule) == {'truth'} and (rows.judged > 99.9).all() and about['method'] == 'vsepp'
            and 0 <= control['shuffled'] < 60)
    assert control['suspects_100']['judged'] == 100 and path.stat().st_size < 60_000
    about, rows, _ = audit_run(run, part='train')
    assert set(rows.rule) == {'truth'} and rows.anchors.max() > 256
