"""FNE and its memory against slow references: moments, weights and draws by plain loops, the ring against a list, resume and several devices to the last bit."""
import math
from dataclasses import asdict, replace
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import chdtrc

import test_seam as seam
from devices import in_worlds, started
from itm_nb.analysis import calibration
from itm_nb.methods import fne
from itm_nb.models.similarity import Model
from itm_nb.methods.losses import hinge, triplet_term
from itm_nb.methods.memory_bank import Bank, Momentum, Ring
from itm_nb.methods.method import losses, Method, vse0
from itm_nb.methods.samplers import hardest, of_scores, Source, Step, DirectedStep
from itm_nb.training.checkpoint import save_checkpoint
from itm_nb.training.config import Config
from itm_nb.training.corpus import corpus
from itm_nb.training.loop import _pack, fit, prepare, resume
from itm_nb.runs.run_record import curves, picks
from itm_nb.analysis.audit import ranked

torch.set_num_threads(1)
QUICK = settings(max_examples=60, deadline=None)
class Cosine: matrix, pairs, at = Model.matrix, Model.pairs, Model.at
def yes(x): return torch.ones_like(x, dtype=torch.bool)
def known(mp, vp, mn, vn, n=1000): return torch.tensor([[n, mp, vp*(n-1)], [2*n, mn, vn*(2*n-1)]], dtype=torch.double)
def rows(ids, score=None):
    "A view of anchors that have nothing but ids"
    return DirectedStep(Step(Cosine(), torch.zeros(len(ids), 2), torch.zeros(len(ids), 2), ids, ids), 'i2t')


# ---- moments
numbers = st.lists(st.floats(-1, 1, width=32), min_size=0, max_size=12)


@QUICK
@given(st.lists(numbers, min_size=1, max_size=6))
def test_moments_do_not_mind_how_numbers_are_spread(parts):
    tensors = [torch.tensor(p, dtype=torch.double) for p in parts]; whole = torch.cat(tensors)
    one = fne.moments(whole, yes(whole)); some = torch.zeros(3, dtype=torch.double); back = some
    for x in tensors: some = fne.merge(some, fne.moments(x, yes(x)))
    for x in tensors[::-1]: back = fne.merge(fne.moments(x, yes(x)), back)
    for m in (some, back): torch.testing.assert_close(m, one, rtol=0, atol=1e-12)
    if len(whole) > 1: assert math.isclose(float(fne.variances(some)), whole.var().item(), abs_tol=1e-12)


def slow_observed(S, ids, least, negatives, mask):
    "By loops over plain numbers"
    n, pos, neg = len(S), [], []
    for i in range(n):
        off = lambda k: k != i and not (mask and ids[k] == ids[i])
        row, col = [S[i][k] for k in range(n) if off(k)], [S[k][i] for k in range(n) if off(k)]
        if any(S[i][i] < x for x in row+col) or (not row and least == -math.inf): continue
        pos.append(S[i][i])
        neg += row+col if negatives == 'all' else [max(row+[least]), max(col+[least])]
    return pos, neg


@pytest.mark.parametrize('least', [-math.inf, 0.])
@pytest.mark.parametrize('negatives', ['hardest', 'all'])
@pytest.mark.parametrize('mask', [True, False])
def test_observed_against_loops(least, negatives, mask):
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = int(rng.integers(1, 8)); ids = rng.integers(0, 5, n); S = rng.normal(0, .4, (n, n)) + np.eye(n)*.5
        pos, neg = slow_observed(S.tolist(), ids.tolist(), least, negatives, mask); t = torch.tensor(ids)
        got = fne.observed(torch.from_numpy(S), t[:,None] == t if mask else None, least, negatives)
        for m, x in zip(got, (pos, neg)):
            want = [len(x), np.mean(x) if x else 0, np.sum((np.array(x)-np.mean(x))**2) if x else 0]
            np.testing.assert_allclose(m, want, atol=1e-12)


def test_the_released_variance_needs_every_step_in_turn():
    xs = [torch.randn(5, dtype=torch.double) for _ in range(4)]; m, squares, seen = torch.zeros(3, dtype=torch.double), 0., []
    for x in xs: seen += x.tolist(); squares += sum((v-np.mean(seen))**2 for v in x.tolist()); m = fne.merge(m, fne.moments(x, yes(x)), 'drift')
    np.testing.assert_allclose(m, [20, np.mean(seen), squares]); assert abs(float(fne.variances(m)) - np.var(seen, ddof=1)) > 1e-3


# ---- posterior and weights
@QUICK
@given(st.floats(-1, 1), st.floats(.3, .9), st.floats(-.2, .29), st.floats(.001, .05), st.floats(.001, .05), st.floats(1e-5, .2))
def test_posterior_by_logarithms_is_the_quotient_of_densities(s, mp, mn, vp, vn, prior):
    "In numbers of any size (Python's, with logarithms only where both densities vanish)"
    fp, fn = (math.exp(-(s-m)**2/(2*v))/math.sqrt(2*math.pi*v) for m, v in ((mp, vp), (mn, vn)))
    m, x = known(mp, vp, mn, vn), torch.tensor([s], dtype=torch.double)
    got = float(fne.posterior(x, m, prior)); assert 0 <= got <= 1
    if fp*prior + fn*(1-prior) > 1e-250: assert math.isclose(got, fp*prior/(fp*prior + fn*(1-prior)), rel_tol=1e-7, abs_tol=1e-12)
    xs = torch.linspace(-1, 1.5, 101).double(); assert (fne.posterior(xs, m, prior, monotone=True).diff() >= -1e-15).all()


def slow_weight(s, pos, m, eligible, margin=.2, tau=.5, prior=1e-4, threshold=1e-3, min_count=200, floor='global', cutdown=True):
    (n, mp, Mp), (nn, mn, Mn) = m.tolist(); vp, vn = Mp/(n-1), Mn/(nn-1)
    if not eligible or s <= {'global': mp-margin, 'per_anchor': pos-margin, 'none': -math.inf}[floor]: return 0.
    fp, fn = math.exp(-(s-mp)**2/(2*vp))/math.sqrt(vp), math.exp(-(s-mn)**2/(2*vn))/math.sqrt(vn)
    P = fp/(fp + (1-prior)/prior*fn)
    if n > min_count and P > threshold: return math.exp(-tau*P)
    return math.exp(-tau*(s-pos)**2) if cutdown else 1.


def told(**kw):
    "Settings as a function takes them: those of `Posterior` in one"
    own = {k: kw.pop(k) for k in [*kw] if k in asdict(fne.Posterior())}
    return dict(how=fne.Posterior(**own)) | kw


@pytest.mark.parametrize('kw', [{}, dict(tau=5.), dict(prior=.01), dict(threshold=.5), dict(threshold=1.), dict(min_count=2000), dict(floor='per_anchor'), dict(floor='none'),
                                dict(cutdown=False), dict(margin=.05), dict(margin=-1.)], ids=str)
def test_weights_against_loops(kw):
    g = torch.Generator().manual_seed(0); m = known(.6, .008, .36, .009)
    score, pos = torch.rand(6, 40, generator=g, dtype=torch.double), .4+.3*torch.rand(6, generator=g, dtype=torch.double); eligible = torch.rand(6, 40, generator=g) > .2
    want = [[slow_weight(float(score[i,j]), float(pos[i]), m, bool(eligible[i,j]), **kw) for j in range(40)] for i in range(6)]
    np.testing.assert_allclose(fne.weights(score, pos, m, eligible, **told(**kw)), want, atol=1e-10)
    w = fne.weights(score.float(), pos.float(), m, eligible, **told(**kw)); assert w.dtype == torch.float32
    np.testing.assert_allclose(w, want, atol=2e-4)


def test_sure_false_negatives_keep_61_percent_of_a_weight():
    w = fne.weights(torch.tensor([[.99]]), torch.tensor([.6]), known(.6, .01, .3, .01), torch.tensor([[True]]))
    np.testing.assert_allclose(w, math.exp(-.5), atol=1e-3)


# ---- draws
class Given:
    def __init__(self, m): self.moments = m


def expected(w): return w / w.sum(1, keepdim=True)


@pytest.mark.parametrize('kw', [{}, dict(tau=5.), dict(floor='none'), dict(floor='per_anchor'), dict(cutdown=False, threshold=1.), dict(compact=False)], ids=str)
def test_draws_follow_the_weights(kw):
    "Forty random rows with 400 anchors each that differ by nothing but their caption: chi-square over all of them"
    g = torch.Generator().manual_seed(1); R, n, K = 40, 400, 25
    base = torch.rand(R, K, generator=g); eligible = torch.rand(R, K, generator=g) > .1; pos = torch.full((R,), .6)
    score, eligible, pos = (x.repeat_interleave(n, 0) for x in (base, eligible, pos)); m = Given(known(.6, .006, .4, .006))
    pick = fne.fne_pick(m, **told(**kw))
    with torch.no_grad(): p = pick(of_scores(score, eligible, pos), rows(torch.arange(R*n)))
    assert p.valid.all() and p.idx.shape == (R*n, 1) and (p.weights.gather(1, p.idx) > 0).all()
    want = n*expected(p.weights[::n].double()); seen = F.one_hot(p.idx[:,0], K).view(R, n, K).sum(1)
    big = want > 5; assert (seen[want == 0] == 0).all()
    stat = ((seen-want)**2/want)[big].sum()
    assert chdtrc(int(big.sum())-R, float(stat)) > 1e-3      # chi-square


@QUICK
@given(st.lists(st.lists(st.sampled_from([0., 0., 1., .3, 1e-30, 7.]), min_size=4, max_size=4), min_size=1, max_size=5), st.floats(0, 1, exclude_max=True))
def test_draw_at_against_a_running_sum(table, u):
    w = torch.tensor(table, dtype=torch.double); idx, ok = fne.draw_at(w, torch.full((len(w), 1), u, dtype=torch.double))
    for row, i, some in zip(table, idx[:,0].tolist(), ok[:,0].tolist()):
        assert some == (sum(row) > 0)
        if some: assert row[i] > 0 and (sum(row[:i]) <= u*sum(row) or math.isclose(sum(row[:i]), u*sum(row))) and (sum(row[:i+1]) > u*sum(row) or math.isclose(sum(row[:i+1]), sum(row)))


@pytest.mark.parametrize('kw', [{}, dict(floor='per_anchor'), dict(permuted=True), dict(fallback='hinge'), dict(fallback='none'), dict(margin=.05), dict(tau=50.)], ids=str)
def test_weighing_only_what_stands_above_the_floor_changes_nothing(kw):
    g = torch.Generator().manual_seed(2); B, K = 64, 300
    score = .3*torch.randn(B, K, generator=g); eligible = torch.rand(B, K, generator=g) > .05; eligible[3] = False
    c = of_scores(score, eligible, .5+.1*torch.rand(B, generator=g)); v = rows(torch.arange(B)); m = Given(known(.6, .006, .4, .006))
    a, b = (fne.fne_pick(m, compact=x, **told(**kw))(c, v) for x in (True, False))
    assert torch.equal(a.valid, b.valid) and torch.equal(a.idx*a.valid, b.idx*b.valid) and not a.valid[3]
    with torch.no_grad(): torch.testing.assert_close(*(fne.fne_pick(m, compact=x, **told(**kw))(c, v).weights for x in (True, False)))


def test_the_placebo_draws_from_the_same_candidates_with_the_same_weights():
    g = torch.Generator().manual_seed(3); score = torch.rand(200, 60, generator=g); c = of_scores(score, yes(score), torch.full((200,), .6)); v = rows(torch.arange(200)); m = Given(known(.6, .006, .4, .006))
    with torch.no_grad(): real, fake = (fne.fne_pick(m, fne.Posterior(tau=5., threshold=-1.), permuted=x)(c, v).weights for x in (False, True))
    assert torch.equal(real > 0, fake > 0); torch.testing.assert_close(real.sort(1)[0], fake.sort(1)[0]); assert not torch.equal(real, fake)
    high = score > .75; both = [float(w[high].sum()/w.sum()) for w in (real, fake)]; assert both[0] < .5*both[1]        # the real one avoids high scores, the placebo does not


# ---- memory
@QUICK
@given(st.integers(0, 9), st.lists(st.integers(0, 14), max_size=8))
def test_the_ring_holds_the_last_ones(size, batches):
    ring, seen = Ring(size), []
    for n in batches:
        ids = torch.arange(len(seen), len(seen)+n); ring.put(ids[:,None].double(), -ids[:,None].double(), ids, ids+100); seen += ids.tolist()
        assert sorted(ring.ids[:ring.used].tolist()) == seen[-size:] if size else ring.used == 0
        assert torch.equal(ring.images[:ring.used,0].long(), ring.ids[:ring.used]) and torch.equal(ring.texts, -ring.images) and torch.equal(ring.caps[:ring.used], ring.ids[:ring.used]+100) and ring.at == (len(seen) % size if size else 0)


class Towers(torch.nn.Module):
    matrix, pairs, at = Model.matrix, Model.pairs, Model.at
    def __init__(self, d=5, drop=0.): super().__init__(); self.v, self.t, self.drop = torch.nn.Linear(d, d), torch.nn.Linear(d, d), torch.nn.Dropout(drop)
    def image(self, feats, num): return F.normalize(self.drop(self.v(feats.mean(1))), dim=-1)
    def text(self, tokens, lengths): return F.normalize(self.drop(self.t(tokens)), dim=-1)


def step_of(model, ids, epoch=0, seed=0):
    g = torch.Generator().manual_seed(seed); n, ids = len(ids), torch.as_tensor(ids)
    b = dict(feats=torch.randn(n, 2, 5, generator=g), mask=torch.ones(n, 2), tokens=torch.randn(n, 5, generator=g), lengths=torch.full((n,), 5))
    blank = Step(model, None, None, ids, ids)
    return Step(model, blank.image(b), blank.text(b), ids, 100*seed+torch.arange(n), 0, epoch, b)


@pytest.mark.parametrize('preset', fne.PRESETS)
@pytest.mark.parametrize('ids', [[1], [4, 4, 4], [1, 2, 2]])
@pytest.mark.parametrize('queue', [0, 1, 4])
def test_small_batches_and_empty_memories(preset, ids, queue):
    "A loss, and a gradient that is finite, whatever there is to draw from"
    torch.manual_seed(0); model = Towers(); m = fne.fne(memory=fne.Memory(queue), preset=preset)
    for t in range(3):
        s = step_of(model, ids, epoch=t, seed=t)
        for o in m.stateful(): [getattr(o, hook)(s) for hook in ('before_step', 'observe') if hasattr(o, hook)]
        loss = sum(losses(m, s).values()); grads = torch.autograd.grad(loss, tuple(model.parameters()), allow_unused=True)
        assert loss.isfinite() and all(x is None or x.isfinite().all() for x in grads)
        for o in m.stateful(): getattr(o, 'after_step', lambda s: None)(s)
    if preset == 'corrected' and len(set(ids)) == 1: assert loss.item() == 0. and float(m.stateful()[1].moments.abs().sum()) == 0.


def test_only_anchors_learn_and_by_the_formula():
    torch.manual_seed(0); model = Towers(); parts = fne.fne_parts(memory=fne.Memory(12)); m = fne.fne(parts=parts, margin=1.); bank, stats, _ = parts; B = 6
    for t in range(4): s = step_of(model, range(10*t, 10*t+B), seed=t); bank.before_step(s); stats.observe(s); bank.after_step(s)
    s = step_of(model, [3, 50, 51, 52, 53, 54], seed=9); v, t = s.images.detach().requires_grad_(), s.texts.detach().requires_grad_()
    leaf = Step(model, v, t, s.img, s.cap, 0, 0, s.batch); bank.before_step(leaf); stats.observe(leaf)
    memory = bank.ring.images.clone(), bank.ring.texts.clone(), bank.ring.ids.clone()
    grads = torch.autograd.grad(sum(losses(m, leaf).values()), (v, t))
    vm, tm = bank.vectors(leaf)
    for side, anchors, new, old, grad in (('i2t', v, tm, memory[1], grads[0]), ('t2i', t, vm, memory[0], grads[1])):
        view = DirectedStep(leaf, side); c = bank.pool(view); idx = m.sources['bank'].selector(c, view).idx[:,0]; keys = torch.cat([new, old])
        assert not bool((torch.cat([leaf.all_img, memory[2]])[idx] == leaf.img).any())
        for i in range(B):
            active = 1. + float(anchors[i].detach() @ keys[idx[i]]) - float(anchors[i].detach() @ new[i]) > 0
            torch.testing.assert_close(grad[i], active*(keys[idx[i]] - new[i])/B, rtol=0, atol=1e-6)
    assert all(p.grad is None and not p.requires_grad for p in bank.momentum.model.parameters()) and torch.equal(memory[0], bank.ring.images)


def test_the_copy_lags_by_its_formula():
    torch.manual_seed(0); a = Towers(); m = Momentum(a, .9); want = {k: v.detach().clone() for k, v in a.named_parameters()}
    for _ in range(5):
        with torch.no_grad(): [p.add_(torch.randn_like(p)) for p in a.parameters()]
        m.follow(a); want = {k: .9*want[k] + .1*v.detach() for k, v in a.named_parameters()}
    for k, v in m.model.named_parameters(): torch.testing.assert_close(v, want[k])


def test_dropout_in_the_copy_is_a_switch():
    torch.manual_seed(0); model = Towers(drop=.5); s = step_of(model, range(8))
    loose, still = Momentum(model), Momentum(model, dropout=False)
    assert not torch.equal(loose.vectors(s)[0], loose.vectors(s)[0]) and torch.equal(still.vectors(s)[0], still.vectors(s)[0])


def test_mixtures_share_one_memory():
    "The memory under another pick, the draw on another pool; one bank told once"
    bank, stats, kw = fne.fne_parts(memory=fne.Memory(20)); own = fne.fne(parts=(bank, stats, kw))
    both = own | Method(dict(hard=Source(bank.pool, hardest, stateful=(bank,)), on=Source(seam.in_batch, fne.fne_pick(stats), stateful=(stats,))),
                                      dict(hard=triplet_term('hard'), on=triplet_term('on')))
    assert both.stateful() == [bank, stats]
    model = Towers(); s = step_of(model, range(6)); bank.before_step(s); stats.observe(s); c = losses(both, s)
    assert set(c) == {f'{a}/{b}' for a in ('bank', 'hard', 'on') for b in ('i2t', 't2i')} and c['hard/i2t'] >= c['bank/i2t'] - 1e-6


@pytest.mark.parametrize('kind', [k for k in seam.KINDS if k != 'dual'])
def test_models_that_score_pair_by_pair_are_refused(kind):
    t = seam.training(kind, 'vsepp'); t.phases = ((0, fne.fne()),)
    with pytest.raises(ValueError, match='one vector per side'): seam.run(t, 1)


def test_nothing_waits_for_the_device():
    """On the `meta` device tensors have no values, so whatever would look at one (and on a GPU wait for it) fails: statistics, pool, weights, draw, fallback, re-scoring, cost, memory"""
    B, D = 6, 8; ids = torch.zeros(B, dtype=torch.int64, device='meta')
    v, t = (torch.zeros(B, D, device='meta', requires_grad=True) for _ in range(2)); s = Step(Cosine(), v, t, ids, ids)
    with pytest.raises(RuntimeError): v.sum().item()
    for preset in fne.PRESETS:
        for kw in ({}, dict(floor='per_anchor'), dict(floor='none'), dict(permuted=True), dict(fallback='none'), dict(monotone=True, space='log')):
            bank, stats, given = fne.fne_parts(preset, fne.Memory(13)); m = fne.fne(parts=(bank, stats, given), **told(**kw)); stats.start = 0; stats.moments = stats.moments.to('meta')
            bank.ring.make(v.detach())
            for _ in range(4): s.made = {(id(bank), 'vectors'): (v.detach(), t.detach())}; stats.observe(s); sum(losses(m, s).values()); bank.fill_from = 0; bank.after_step(s)
    a, b = Towers().to('meta'), Towers().to('meta'); Momentum(a).follow(b)


# ---- whole runs
def training(preset='corrected', drop=0., **kw):
    "The package's loop, the toy dual encoder, one epoch of warm-up"
    t = seam.training('dual', 'vsepp', drop=drop); t.phases = ((0, vse0()), (1, fne.fne(memory=fne.Memory(70), preset=preset, **told(min_count=10, **kw))))
    return t


@pytest.mark.parametrize('preset', fne.PRESETS)
def test_resume_inside_an_epoch_is_bit_equal(preset, tmp_path):
    "Memory, pointer, statistics and momentum weights too; 70 places and batches of 32: the ring wraps round"
    whole = training(preset, drop=.2); first = seam.run(whole, 7)
    part = training(preset, drop=.2); seam.run(part, 4); save_checkpoint(tmp_path/'last', *_pack(part)); (tmp_path/'log.jsonl').touch()
    again = training(preset, drop=.2); assert resume(again, tmp_path) and again.step == 4
    tail = seam.run(again, 7); a, b = seam.everything_of(whole), seam.everything_of(again)
    assert seam.same(a, b) and any('ring.images' in k for k in a) and any('copy.' in k for k in a) and any('moments' in k for k in a)
    assert [{k: float(v) for k, v in c.items()} for c in first[4:]] == [{k: float(v) for k, v in c.items()} for c in tail]
    place = next(v for k, v in a.items() if k.endswith('ring.place')); assert place.tolist() == [5*32 % 70 if preset == 'faithful' else 7*32 % 70, 70]


def worker(folder):
    "What each process does"
    from safetensors.torch import save_file
    from itm_nb.core.distributed import devices
    seam.prepare(seam.TINY, seam.data()); rank, world = devices(); out = {}
    for preset in fne.PRESETS:
        t = training(preset); c = seam.run(t, 6)
        out |= {f'{preset}.{k}': v for k, v in seam.everything_of(t).items()} | {f'{preset}.cost.{i}.{k}': v for i, x in enumerate(c) for k, v in x.items()}
    save_file({k: v.contiguous().clone() for k, v in out.items()}, f'{folder}/out_{world}_{rank}.safetensors')


@pytest.mark.slow
def test_devices_do_not_change_a_run(tmp_path):
    "One, two and four: losses, weights, momentum weights, memory, pointer and statistics agree, on every rank"
    from safetensors.torch import load_file
    started(__file__, tmp_path, 1, 2, 4)
    one = load_file(tmp_path/'out_1_0.safetensors')
    for world in (2, 4):
        for r in range(world):
            got = load_file(tmp_path/f'out_{world}_{r}.safetensors'); assert got.keys() == one.keys()
            for k, v in one.items(): torch.testing.assert_close(got[k], v, rtol=0, atol=1e-6, msg=lambda m: f'{world} devices, rank {r}, {k}: {m}')




# ---- as a method of a run
SMALL = Config(preset='tiny', text='mean', dim=16, d_word=16, image_hidden=16, epochs=3, batch=64, lr=5e-3)
@lru_cache(1)
def drawn(): return corpus(SMALL)


@pytest.mark.parametrize('name', ['fne(queue=64)', "fne(pick='hardest', queue=64)", "fne(pick='uniform', queue=0)", "fne(preset='faithful', queue=64, start=0)", "fne(prior='known', tau=5.0, negatives='all', window='run')",
                                  "vsepp,on=itm_nb.fne:bank_source(pool='batch', tau=5.0)", 'infonce|fne(queue=8)'])
def test_a_string_names_the_whole_method(name, tmp_path):
    cfg = replace(SMALL, method=name, warmup=2); t = fit(cfg, tmp_path/'r', drawn(), progress=False)
    if 'known' in name:
        fit(cfg, tmp_path/'twice', drawn(), progress=False)
        for f in ('log.jsonl', 'picks.bin', 'best/model.safetensors'): assert (tmp_path/'r'/f).read_bytes() == (tmp_path/'twice'/f).read_bytes()
    told = curves(tmp_path/'r'); assert all(math.isfinite(x) for k in ('accepted', 'pos_mean', 'pos_sd', 'neg_mean', 'neg_sd') for x in told[k])
    assert told['accepted'][-1] > 0 and told['pos_mean'][-1] > told['neg_mean'][-1]
    seen = picks(tmp_path/'r', t.train.split, drawn().world); source = 'on' if 'batch' in name else 'bank'
    for side in ('i2t', 't2i'): assert all(0 <= x <= 1 for x in seen[source][side]['false'] if x is not None) and seen[source][side]['epoch'] == [2]


@lru_cache(1)
def crowded(): return corpus(replace(SMALL, rho=1.))
@pytest.mark.parametrize('name, source', [('vsepp{}', 'on'), ("fne(pick='hardest', queue=512{})", 'bank'), ('fne(queue=512{})', 'bank')])
def test_an_oracle_never_picks_what_is_true(name, source, tmp_path):
    "The same arm that does not know the truth does, where it takes the hardest"
    def false_of(told, honest):
        cfg = replace(SMALL, rho=1., method=name.format(told), warmup=1, epochs=4); t = fit(cfg, tmp_path/str(honest), crowded(), progress=False)
        seen = picks(tmp_path/str(honest), t.train.split, crowded().world)[source]; assert all(n > 0 for s in ('i2t', 't2i') for n in seen[s]['n'])
        return [x for s in ('i2t', 't2i') for x in seen[s]['false']]
    assert set(false_of(', honest=True' if '(' in name else '(honest=True)', True)) == {0.}
    if name.startswith('fne(queue'): return
    assert max(false_of('', False)) > 0


@pytest.mark.parametrize('similarity', ['scan_t2i', 'bfan_equal', 'cross'])
def test_cross_attention_is_refused_before_training(similarity):
    for name in ('fne', "fne(queue=0)", 'vsepp,on=itm_nb.fne:bank_source'):
        with pytest.raises(ValueError, match='R x L products per entry'): prepare(replace(SMALL, method=name, similarity=similarity, dim=16, d_word=16), drawn())
    prepare(replace(SMALL, method="vsepp,on=itm_nb.fne:bank_source(pool='batch')", similarity=similarity, dim=16, d_word=16), drawn())      # no memory: welcome


@pytest.mark.parametrize('name', ['fne(taw=1.0)', "fne(pick='best')", "fne(pick='uniform', tau=5.0)", "fne(pick='hardest', floor='none')", "fne(preset='best')", "fne(floor='local')", 'fne(prior=0)', 'fne(prior=2.0)', 'fne(queue=-1)',
                                  "fne(window='day')", "fne(negatives='some')", "fne(fallback='dice')", "fne(space='cubic')", "vsepp,on=itm_nb.fne:bank_source(pool='list')"])
def test_wrong_settings_are_refused_before_training(name):
    with pytest.raises(ValueError): prepare(replace(SMALL, method=name), drawn())


def test_the_released_schedule():
    "One epoch of the released warm-up, then the method; the memory lives from the start, and fills from epoch 1"
    t = prepare(replace(SMALL, method="fne(preset='faithful', queue=64)", warmup=1, warmup_method='fne_warmup'), drawn())
    assert [(e, list(m.terms)) for e, m in t.phases] == [(0, ['own']), (1, ['bank'])]; bank, stats = t.stateful()
    assert bank.fill_from == stats.start == 1 and bank.ring.start == 'random' and stats.variance == 'drift'


def test_a_known_prior_is_the_share_of_true_pairs():
    s = drawn().world.split('train'); t = drawn().world.truth('train', np.arange(len(s.num))[:,None], np.arange(len(s.captions))[None]); true = some = 0
    for i in range(t.shape[0]):
        for j in range(t.shape[1]): true += s.img_of[j] != i and t[i,j] == 2; some += s.img_of[j] != i and t[i,j] != 1
    assert math.isclose(fne.true_share(drawn().world), true/some)
    with pytest.raises(ValueError, match='needs a world'): fne.fne(fne.Posterior('known'))


# ---- calibration
@QUICK
@given(st.lists(st.tuples(st.sampled_from([0., .05, .2, .5, .9, 1.]), st.booleans()), min_size=6, max_size=60), st.integers(1, 6))
def test_calibration_against_loops(pairs, bins):
    p, y = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs], float); n = len(p); got = calibration.brier(p, y); base = sum(y)/n
    assert math.isclose(got['brier'], sum((a-b)**2 for a, b in zip(p, y))/n, abs_tol=1e-12) and math.isclose(got['base'], base)
    if 0 < base < 1: assert math.isclose(got['skill'], 1 - got['brier']/(base*(1-base)), abs_tol=1e-9)
    share = {v: sum(b for a, b in zip(p, y) if a == v)/sum(a == v for a in p) for v in set(p)}; order = sorted(p); edge = [round(k*n/bins + 1e-9) if (k*n/bins) % 1 != .5 else round(k*n/bins) for k in range(bins+1)]
    r = calibration.reliability(p, y, bins)
    for k, row in enumerate(r.to_dict('records')):
        mine = order[edge[k]:edge[k+1]]; assert row['n'] == len(mine)
        if mine: assert math.isclose(row['said'], sum(mine)/len(mine), abs_tol=1e-12) and math.isclose(row['true'], sum(share[v] for v in mine)/len(mine), abs_tol=1e-12) and -1e-9 <= row['lo'] <= row['true'] + 1e-9
    d = calibration.decomposed(r); assert d['uncertainty'] >= -1e-12 and d['resolution'] <= d['uncertainty'] + 1e-9


def test_as_hard_as_keeps_every_anchors_hardness():
    g = torch.Generator().manual_seed(0); score = torch.rand(9, 30, generator=g); own = torch.zeros(9, 30, dtype=torch.bool); own[torch.arange(9), torch.arange(9)] = True
    c = ranked(score, own); m = known(.7, .01, .4, .02); eligible = c.eligible; flat = lambda c: c.eligible.double()/c.eligible.sum(1, keepdim=True)
    for kw in ({}, dict(tau=5.), dict(tau=50., prior=.1), dict(floor='per_anchor')):
        how = fne.Posterior(min_count=0, **kw); draw = calibration.fne_sampler(m, how)
        rival = calibration.fne_sampler(m, fne.Posterior(threshold=1., cutdown=False, floor=how.floor))
        s = torch.where(eligible, c.score, 0.).double(); a, b = draw(c), calibration.as_hard_as(rival, draw)(c)
        torch.testing.assert_close((a*s).sum(1), (b*s).sum(1), atol=1e-6, rtol=0); torch.testing.assert_close(b.sum(1), torch.ones(9, dtype=torch.double)); assert (b[rival(c) == 0] == 0).all()
        want = fne.weights(c.score, c.pos, m, c.eligible, how); rows = want.sum(1) > 0; torch.testing.assert_close(a[rows], (want/want.sum(1, keepdim=True)).double()[rows], rtol=1e-5, atol=1e-7)
        assert all(abs(float(p[0]) - 1) < 1e-9 for p in a[~rows])
    log = torch.log(calibration.as_hard_as(flat, calibration.fne_sampler(m, fne.Posterior(tau=5., min_count=0, floor='none')))(c)[0][:20]); step = log.diff()/c.score[0][:20].diff()
    assert (step - step.mean()).abs().max() < 1e-3*step.abs().max() + 1e-6                         # an exponential tilt of the rival and nothing else


def test_moments_of_saved_vectors_are_those_of_training():
    "Observed over saved vectors = observed by `Statistics` in the steps of an epoch"
    from itm_nb.core.random import order
    g = torch.Generator().manual_seed(1); img = F.normalize(torch.randn(20, 6, generator=g), dim=1); own = torch.arange(20).repeat_interleave(3); txt = F.normalize(img[own] + .5*torch.randn(60, 6, generator=g), dim=1)
    for negatives in ('hardest', 'all'):
        stats = fne.Statistics(negatives=negatives)
        for caps in order(60, 4, 0).split(15): stats.observe(Step(Cosine(), img[own[caps]], txt[caps], own[caps], caps))
        torch.testing.assert_close(calibration.moments_of(img, txt, own, 15, seed=4, negatives=negatives), stats.moments)


if __name__ == '__main__': in_worlds(worker, seam.data)
