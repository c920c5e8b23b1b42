"""The contract of the seam: lists that are fetched, a memory, a generator and mixtures of them, through three kinds of models, on one device and several."""
import json
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from devices import in_worlds, started
from torch import nn

from itm_nb.core.errors_files import DataError
from itm_nb.core.random import order, uniform
from itm_nb.models.encode import rank_split
from itm_nb.models.similarity import matrix_of, picked_of, States
from itm_nb.methods.losses import average, hinge, LossTerm, total, triplet_term
from itm_nb.methods.method import losses, explain, fetches, infonce, Method, vse0, vsepp
from itm_nb.methods.registry import named
from itm_nb.methods.samplers import Candidates, draw, hardest, in_batch, searching, Source, Step, top, DirectedStep
from itm_nb.training.checkpoint import save_checkpoint
from itm_nb.training.config import Config
from itm_nb.training.corpus import corpus
from itm_nb.training.loop import _pack, fit, prepare, resume, Saving, share, train_step, Training

TINY = Config(preset='tiny', text='mean', text_pool='mean', dim=16, d_word=8, image_hidden=0, epochs=2, batch=32, method='vsepp', dropout=0., lr=1e-2)


# ---- three kinds of models behind one interface; the cross-encoder has dropout inside the pair, and all of them heads that few methods use
class Toy(nn.Module):
    def __init__(self, kind, d_in, n_words, d=8, drop=0.):
        super().__init__()
        self.kind, self.see, self.read, self.drop = kind, nn.Linear(d_in, d), nn.Embedding(n_words, d), nn.Dropout(drop)
        self.joint = nn.Sequential(nn.Linear(3*d, d), nn.GELU(), nn.Dropout(drop), nn.Linear(d, 1))
        self.mlm, self.disc = nn.Linear(d, n_words), nn.Linear(d, 2)

    def image(self, feats, num): return self._out(self.drop(self.see(feats.to(self.see.weight))), torch.arange(feats.shape[1]) < num[:,None])
    def text(self, tokens, lengths): return self._out(self.drop(self.read(tokens)), torch.arange(tokens.shape[1]) < lengths[:,None])

    def _out(self, x, mask):
        if self.kind == 'dual': return F.normalize((x*mask[...,None]).sum(1), dim=-1)
        return States(F.normalize(x, dim=-1), mask)

    def pairs(self, img, txt):
        if self.kind == 'dual': return (img*txt).sum(-1)
        if self.kind == 'attend':
            a = (9*txt.x @ img.x.mT).masked_fill(~img.mask[:,None], -torch.inf).softmax(-1) @ img.x
            return (F.cosine_similarity(a, txt.x, dim=-1)*txt.mask).sum(1) / txt.mask.sum(1)
        i, t = mean(img), mean(txt)
        return self.joint(torch.cat([i, t, i*t], -1)).squeeze(-1)

    def matrix(self, img, txt): return img @ txt.T if self.kind == 'dual' else matrix_of(self.pairs, img, txt, most=200)
    def at(self, anchor, other, idx, i2t=True): return picked_of(self.pairs, anchor, other, idx, i2t)
    def token_states(self, img, tokens): return self.read(tokens) + (img if self.kind == 'dual' else mean(img))[:,None]


def mean(e): return (e.x*e.mask[...,None]).sum(1) / e.mask.sum(1)[:,None]
KINDS = ('dual', 'attend', 'joint')


# ---- a dummy mined list: ids that come WITH the batch
class Lists:
    def __init__(self, train): self.img, self.cap, self.of = (torch.as_tensor(a) for a in (train.split.img_ids, train.split.cap_ids, train.split.img_of))

    def fetch(self, cap, seed, epoch):
        u = uniform(cap, 'lists', 2, seed, epoch)
        j, i = (u[:,0]*len(self.cap)).long(), (u[:,1]*len(self.img)).long()
        return {'text.off': self.cap[j], 'image.off': self.img[i]}

    def pool(self, view):
        name = 'text.off' if view.i2t else 'image.off'
        score = view.pairs(view.anchor, view.step.fetched(name))[:,None]
        eligible = (view.step.batch[name]['img_ids'] != view.anchor_ids)[:,None]
        return Candidates(score.detach().masked_fill(~eligible, -torch.inf), eligible, view.positive(), lambda idx: {'': score.gather(1, idx)})


# ---- a dummy memory of vectors: momentum copy, ring, statistics (seen before any draw), another positive than the student's
class Memory:
    def __init__(self, model, size=48, d=8):
        import copy
        self.copy = copy.deepcopy(model).requires_grad_(False); like = next(model.parameters())
        self.v, self.t = (torch.zeros(size, d).to(like) for _ in range(2))
        self.ids, self.at, self.stats, self.epoch = torch.full((size,), -1), torch.tensor(0), torch.zeros(2, dtype=torch.double), torch.tensor(-1)

    def start_epoch(self, epoch): self.stats.zero_(); self.epoch = torch.tensor(epoch)

    def before_step(self, step):
        from itm_nb.models.similarity import gather
        with torch.no_grad():
            for p, q in zip(self.copy.parameters(), step.model.parameters()): p.lerp_(q, .05)
            self.copy.eval(); img, txt = step.image(step.batch, self.copy), step.text(step.batch, self.copy)
            flat = lambda e: e if torch.is_tensor(e) else mean(e)
            self.hv, self.ht = gather(flat(img)), gather(flat(txt))

    def observe(self, step):
        with torch.no_grad():
            S = (self.hv @ self.ht.T).double(); own = S.diagonal()
            self.stats += torch.stack([own.sum(), torch.tensor(float(len(own)), dtype=torch.double)])

    def after_step(self, step):
        at = (self.at + torch.arange(len(self.hv))) % len(self.ids)
        self.v[at], self.t[at], self.ids[at] = self.hv, self.ht, step.all_img
        self.at = (self.at + len(at)) % len(self.ids)

    def pool(self, view):
        flat = lambda e: e if torch.is_tensor(e) else mean(e)
        new, old = (self.ht, self.t) if view.i2t else (self.hv, self.v)
        keys, ids, mine = torch.cat([new, old]), torch.cat([view.step.all_img, self.ids]), flat(view.anchor)
        own = view.step.first + torch.arange(len(mine))
        score = (mine @ keys.T).detach(); eligible = (ids != view.anchor_ids[:,None]) & (ids >= 0)
        return Candidates(score.masked_fill(~eligible, -torch.inf), eligible, (mine*keys[own]).sum(1),
                          lambda idx: {'': (mine[:,None]*keys[idx]).sum(-1)}, about=lambda: {'image': ids, 'not yet filled': ids < 0, 'same image': ids == view.anchor_ids[:,None]})

    def pick(self, c, view):
        floor = self.stats[0]/self.stats[1].clamp(min=1) - 1.
        return draw(2, lambda c, v: (-.5*(c.score.double()-c.pos.detach()[:,None])**2).exp()*(c.score > floor), purpose='memory')(c, view)

    def state_dict(self): return {f'copy.{k}': v for k, v in self.copy.state_dict().items()} | {k: getattr(self, k) for k in ('v', 't', 'ids', 'at', 'stats', 'epoch')}
    def load_state_dict(self, d):
        self.copy.load_state_dict({k[5:]: v for k, v in d.items() if k.startswith('copy.')})
        for k in ('v', 't', 'ids', 'at', 'stats', 'epoch'): setattr(self, k, d[k].clone())


# ---- a dummy generator: the pool IS a pass of the model; by-products (`also`), eligible rows compacted, heads on the kept
class Generator:
    def __init__(self, n=6): self.n = n

    def pool(self, view):
        if not view.i2t: return None
        s, m, n = view.step, view.step.model, self.n; tokens, lengths = s.batch['tokens'], s.batch['lengths']; B, L = tokens.shape
        place = (view.uniform('place', n)*lengths[:,None]).long()
        z = m.mlm(m.token_states(s.images, tokens)); zp = z.gather(1, place[...,None].expand(-1, -1, z.shape[-1]))
        nll = F.cross_entropy(zp.flatten(0, 1), tokens.gather(1, place).flatten(), reduction='none').view(B, n).mean(1)
        with torch.no_grad():
            cum = zp.softmax(-1).double().cumsum(-1)
            word = torch.searchsorted(cum, view.uniform('word', n)[...,None]*cum[...,-1:], right=True).clamp(max=z.shape[-1]-1)
            made = torch.where(torch.arange(L) == place[...,None], word, tokens[:,None])
        eligible = (made != tokens[:,None]).any(-1) & ((word[...,0] > 3))
        rows = eligible.flatten().nonzero().squeeze(1); score = torch.full((B*n,), -torch.inf).to(z)
        text = lambda made, of: m.text(made, lengths[of])
        with searching(m):
            if len(rows): score[rows] = m.pairs(s.images[rows//n].detach(), text(made.flatten(0, 1)[rows], rows//n))
        def rescore(idx):
            k = idx.shape[1]; e = made.gather(1, idx[...,None].expand(-1, -1, L)).flatten(0, 1); of = torch.arange(B).repeat_interleave(k)
            kept = (e == tokens[of]).long(); h = m.token_states(s.images[of], e)
            disc = F.cross_entropy(m.disc(h).flatten(0, 1), kept.flatten(), reduction='none').view(B, k, L)
            real = torch.arange(L) < lengths[:,None,None]; disc = (disc*real).sum(-1) / real.sum(-1)       # padding must not matter: its length is the device's own
            return {'': m.pairs(s.images[of], text(e, of)).view(B, k), 'disc': disc}
        return Candidates(score.view(B, n), eligible, view.positive(), rescore, dict(mlm=nll), about=lambda: {'copy of a true caption': ~eligible})


def off(train): l = Lists(train); return Method(dict(off=Source(l.pool, hardest, l.fetch)), dict(off=triplet_term('off', reduce='sum', weight=.1)))
def memory(model): m = Memory(model); return Method(dict(bank=Source(m.pool, m.pick, stateful=(m,))), dict(bank=triplet_term('bank', over=average)))
def synthetic():
    g = Generator(); one = dict(sides=('i2t',))
    return Method(dict(syn=Source(g.pool, top(2))), dict(syn=triplet_term('syn', over=average, **one), mlm=LossTerm(lambda n: n['syn.mlm'], ('syn',), .1, **one),
                  disc=LossTerm(lambda n: average(n['syn.disc'], n['syn.valid']), ('syn',), .1, **one)))
def mixture(model, train): bank = memory(model).sources['bank']; return vsepp().but(on=bank) | off(train) | synthetic() | infonce(.1)
MAKERS = dict(vsepp=lambda m, t: vsepp(), vse0=lambda m, t: vse0(), infonce=lambda m, t: infonce(.1), off=lambda m, t: off(t),
              memory=lambda m, t: memory(m), synthetic=lambda m, t: synthetic(), mixture=mixture)


_data = {}
def data():
    if not _data: _data['it'] = corpus(TINY)
    return _data['it']


def training(kind, name, drop=0., warm=True, chunk=0, double=True)->Training:
    "The package's own loop around a toy model: one epoch of `vse0`, then the method, whose owners live from the start"
    t = prepare(replace(TINY, chunk=chunk), data())
    torch.manual_seed(3); model = Toy(kind, t.train.feats.shape[-1], len(t.vocab), drop=drop)
    t.model = model.double() if double else model; t.opt = torch.optim.Adam(t.model.parameters(), lr=1e-2)
    method = MAKERS[name](t.model, t.train); t.phases = ((0, vse0()), (1, method)) if warm else ((0, method),)
    return t


def run(t, steps, until=None):
    "Some steps of the first two epochs; returns the losses"
    out = []
    while t.step < (until or steps):
        epoch, i = divmod(t.step, 2)                                       # two steps per epoch here
        if i == 0:
            for o in t.stateful():
                if hasattr(o, 'start_epoch'): o.start_epoch(epoch)
        out.append(train_step(t, order(len(t.train.lengths), 0, epoch)[i*32:(i+1)*32], epoch)); t.step += 1
    return out


def everything_of(t): return {k: v.clone() for k, v in _pack(t)[0].items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', MAKERS)
def test_resume_is_bit_equal(name, kind, tmp_path):
    "Stopped after three steps (inside an epoch of the method), put into a fresh training: weights, moments, memories and losses are the same bits"
    whole = training(kind, name, drop=.2); costs_whole = run(whole, 6)
    part = training(kind, name, drop=.2); run(part, 3); save_checkpoint(tmp_path/'last', *_pack(part)); (tmp_path/'log.jsonl').touch()
    again = training(kind, name, drop=.2); assert resume(again, tmp_path) and again.step == 3
    tail = run(again, 6)
    assert same(everything_of(whole), everything_of(again))
    assert [{k: float(v) for k, v in c.items()} for c in costs_whole[3:]] == [{k: float(v) for k, v in c.items()} for c in tail]
    assert all(torch.isfinite(v).all() for v in everything_of(whole).values() if v.is_floating_point())
    moved = everything_of(whole); assert any(not torch.equal(v, everything_of(training(kind, name))[k]) for k, v in moved.items() if k.startswith('model.'))


def test_owners_of_all_phases_run_from_the_start():
    t = training('dual', 'memory'); run(t, 2)                              # the warm-up only
    (bank,) = t.stateful(); assert int((bank.ids >= 0).sum()) == 48 and int(bank.epoch) == 0 and float(bank.stats[1]) == 64


def test_the_order_of_hooks_and_that_each_may_be_missing():
    seen = []
    class Owner:
        def before_step(self, step): seen.append('before')
        def observe(self, step): seen.append('observe')
        def after_step(self, step): seen.append('after')
    pool = lambda view: seen.append('pool') or in_batch(view)
    pick = lambda c, view: seen.append('pick') or hardest(c)
    t = training('dual', 'vsepp'); t.phases = ((0, Method(dict(on=Source(pool, pick, stateful=(Owner(), object()))), dict(on=triplet_term('on')))),); run(t, 1)
    assert seen == ['before', 'observe'] + ['pool', 'pick']*2 + ['after']


# ---- several devices
def worker(folder):
    "What each process of a test with several devices does"
    from safetensors.torch import save_file
    from itm_nb.core.distributed import devices
    prepare(TINY, data()); rank, world = devices(); out = {}
    for kind in KINDS:
        for name in ('vsepp', 'vse0', 'mixture'):                          # the mixture holds all the others
            t = training(kind, name); c = run(t, 4)
            out |= {f'{kind}.{name}.{k}': v for k, v in everything_of(t).items()} | {f'{kind}.{name}.cost.{i}.{k}': v for i, x in enumerate(c) for k, v in x.items()}
    save_file({k: v.contiguous().clone() for k, v in out.items()}, f'{folder}/out_{world}_{rank}.safetensors')
    t = fit(replace(TINY, epochs=1), f'{folder}/run_{world}', data(), progress=False, saving=Saving(every=3))
    if world == 2:
        try: share(torch.arange(31)); raise SystemExit('31 over 2 devices was not refused')
        except ValueError as e: assert 'cannot be shared by 2 devices' in str(e)
        stopped_and_resumed(folder, rank)


def stopped_and_resumed(folder, rank):
    "One of two processes is asked to stop: both do, after the same step; what goes on from there ends with the same bytes"
    import signal
    from itm_nb.training import loop as train
    from itm_nb.training.checkpoint import Stopped
    train.LOG_EVERY = 4; stop = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 and rank == 1 else None
    cfg = replace(TINY, epochs=1); fit(cfg, f'{folder}/whole', data(), progress=False)
    try: fit(cfg, f'{folder}/broken', data(), progress=False, on_step=stop); raise SystemExit('not stopped')
    except Stopped as e: assert 'after step 4' in str(e), e
    fit(cfg, f'{folder}/broken', data(), progress=False)


@pytest.fixture(scope='module')
def worlds(tmp_path_factory):
    "What 1, 2 and 4 devices came to"
    from safetensors.torch import load_file
    folder = tmp_path_factory.mktemp('worlds')
    worker(folder)
    started(__file__, folder, 2, 4)
    return folder, {(w, r): load_file(folder/f'out_{w}_{r}.safetensors') for w in (1, 2, 4) for r in range(w)}


@pytest.mark.parametrize('world', (2, 4))
def test_devices_do_not_change_a_run(world, worlds):
    one, many = worlds[1][1, 0], worlds[1][world, 0]
    assert one.keys() == many.keys()
    far = {k: float((one[k].double()-many[k].double()).abs().max()) for k in one if one[k].numel()}
    assert max(far.values()) < 1e-6, sorted(far.items(), key=lambda x: -x[1])[:5]


@pytest.mark.parametrize('world', (2, 4))
def test_every_device_holds_the_same(world, worlds):
    "Weights, moments, memories, statistics, losses, meters: not nearly, but bit by bit"
    for r in range(1, world): assert same(worlds[1][world, 0], worlds[1][world, r])


@pytest.mark.parametrize('world', (2, 4))
def test_fit_on_several_devices(world, worlds):
    "The package's own model through `fit`: the log of one device to 1e-5, its files once, its ranks"
    a, b = (worlds[0]/f'run_{w}' for w in (1, world))
    la, lb = ([json.loads(l) for l in (x/'log.jsonl').read_text().splitlines()] for x in (a, b))
    assert len(la) == len(lb) and [l.keys() for l in la] == [l.keys() for l in lb]
    assert all(abs(x[k]-y[k]) < 1e-5 for x, y in zip(la, lb) for k in ('loss', 'norm') if k in x)
    assert sorted(p.name for p in a.rglob('*')) == sorted(p.name for p in b.rglob('*'))


def test_several_devices_stop_together_and_resume(worlds):
    whole, broken = (worlds[0]/x for x in ('whole', 'broken'))
    for f in ('log.jsonl', 'last/tensors.safetensors', 'best/model.safetensors', 'ranks_val.npz'): assert (whole/f).read_bytes() == (broken/f).read_bytes(), f


# ---- batches of any kind
def step_of(t, caps, method, epoch=1):
    b = t.train.take(caps, fetches(method, torch.as_tensor(t.train.split.cap_ids[caps.numpy()]), 0, epoch)); m = t.core
    return Step(m, m.image(b['feats'], b['mask'].sum(1)), m.text(b['tokens'], b['lengths']), b['img_ids'], b['cap_ids'], 0, epoch, b)


def priced(t, caps, method):
    "Loss and gradients of a batch, with the owners' hooks"
    step = step_of(t, caps, method)
    for o in method.stateful(): o.before_step(step); o.observe(step)
    t.core.zero_grad(); parts = losses(method, step); loss = sum(parts.values()); loss.backward()
    return {k: float(v.detach()) for k, v in parts.items()}, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in t.core.parameters()]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', sorted(set(MAKERS) - {'memory', 'mixture'}))
def test_the_order_of_a_batch_does_not_matter(name, kind):
    t = training(kind, name, warm=False); caps = order(len(t.train.lengths), 0, 0)[:16]; m = t.phases[0][1]
    a, ga = priced(t, caps, m); b, gb = priced(t, caps[torch.randperm(16, generator=torch.Generator().manual_seed(0))], m)
    assert a.keys() == b.keys() and all(abs(a[k]-b[k]) < 1e-9 for k in a)
    for x, y in zip(ga, gb): torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('kind', KINDS)
def test_the_order_of_a_batch_does_not_matter_to_a_memory(kind):
    "A draw walks the candidates in their order, so here the hardest is picked; the ring holds the same entries"
    t = training(kind, 'memory'); m = t.phases[1][1].but(bank=replace(t.phases[1][1].sources['bank'], selector=hardest)); run(t, 2)
    caps = order(len(t.train.lengths), 0, 5)[:16]; before = {k: v.clone() for k, v in t.stateful()[0].state_dict().items()}
    a, ga = priced(t, caps, m); t.stateful()[0].load_state_dict(before); b, gb = priced(t, caps.flip(0), m)
    assert all(abs(a[k]-b[k]) < 1e-9 for k in a)
    for x, y in zip(ga, gb): torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', MAKERS)
def test_one_image_only_and_a_batch_of_one(name, kind):
    "No eligible negative inside the batch: no NaN, and what needs one losses nothing"
    t = training(kind, name, warm=False); m = t.phases[0][1]; first = int(t.train.split.img_of[0])
    mates = torch.as_tensor((t.train.split.img_of == first).nonzero()[0])
    for caps in (mates, mates[:1]):
        parts, grads = priced(t, caps, m)
        assert all(map(torch.isfinite, map(torch.tensor, parts.values()))) and all(g.isfinite().all() for g in grads)
        if name in ('vsepp', 'vse0', 'infonce', 'memory'): assert not any(parts.values()) and not any(g.any() for g in grads)


@pytest.mark.parametrize('kind', KINDS)
def test_empty_pools(kind):
    "A source without a pool, one without a candidate, and one where all are barred: zero, whatever the pick and the cost"
    t = training(kind, 'vsepp'); caps = order(len(t.train.lengths), 0, 0)[:8]
    B = len(caps); zero = lambda K, v: Candidates(torch.full((B, K), -torch.inf).double(), torch.zeros(B, K).bool(), v.positive(), lambda idx: {'': v.at(v.other, idx)})
    for pool in (lambda v: None, lambda v: zero(0, v), lambda v: zero(8, v)):
        for pick in (hardest, top(3), draw(2)):
            for cost in (triplet_term('on'), triplet_term('on', over=average)):
                parts, grads = priced(t, caps, Method(dict(on=Source(pool, pick)), dict(on=cost)))
                assert not any(parts.values()) and not any(g.any() for g in grads)
                mixed = priced(t, caps, Method(dict(on=Source(pool, pick)), dict(on=cost)) | infonce(.1))[0]
                assert sum(mixed.values()) == pytest.approx(sum(priced(t, caps, infonce(.1))[0].values()), abs=1e-12)


@pytest.mark.parametrize('kind', KINDS)
def test_search_then_rescore_equals_the_full_matrix(kind):
    t = training(kind, 'vsepp'); rnd = torch.Generator().manual_seed(1)
    for n in (2, 7, 24):
        caps = torch.randint(0, 60, (n,), generator=rnd); a, ga = priced(t, caps, vsepp())
        step = step_of(t, caps, vsepp()); S = t.core.matrix(step.images, step.texts); bad = step.img[:,None] == step.img; pos = t.core.pairs(step.images, step.texts)
        naive = sum(torch.where(~bad.all(d), hinge(pos, S.masked_fill(bad, -99.).amax(d)), 0.).mean() for d in (0, 1))
        t.core.zero_grad(); naive.backward()
        assert sum(a.values()) == pytest.approx(float(naive.detach()), abs=1e-12)
        for x, p in zip(ga, t.core.parameters()): torch.testing.assert_close(x, torch.zeros_like(x) if p.grad is None else p.grad, rtol=1e-9, atol=1e-11)


def test_a_joint_network_searches_in_evaluation_mode_and_scores_in_training_mode():
    "Dropout blurs what is scored with gradient, never what is looked at; and the mode comes back"
    t = training('joint', 'vsepp', drop=.5); t.core.train(); caps = order(len(t.train.lengths), 0, 0)[:16]; step = step_of(t, caps, vsepp())
    a, b = (in_batch(DirectedStep(Step(t.core, step.images, step.texts, step.img, step.cap), 'i2t')) for _ in range(2))
    assert torch.equal(a.score, b.score) and not torch.equal(a.pos, b.pos) and t.core.training and not a.score.requires_grad
    idx = hardest(a).idx; assert not torch.equal(a.rescore(idx)[''], a.rescore(idx)['']) and a.rescore(idx)[''].requires_grad


# ---- large batches in parts
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', MAKERS)
def test_a_batch_in_parts_is_the_batch(name, kind):
    whole, parts = (training(kind, name, chunk=c) for c in (0, 7)); a, b = run(whole, 4), run(parts, 4)
    for x, y in zip(a, b): assert x.keys() == y.keys() and all(abs(float(x[k]-y[k])) < 1e-9 for k in x)
    for (k, x), y in zip(everything_of(whole).items(), everything_of(parts).values()): torch.testing.assert_close(x, y, rtol=0, atol=1e-7, msg=k)


def test_parts_draw_the_same_dropout_twice():
    "With dropout, gradients in parts are those of the parts' own forward passes: finite differences along the gradient agree"
    def loss(shift):
        t = training('dual', 'infonce', drop=.3, warm=False, chunk=8)
        with torch.no_grad():
            for p, d in zip(t.core.parameters(), direction): p.add_(shift*d)
        caps = order(len(t.train.lengths), 0, 0)[:32]; value = sum(train_step(t, caps, 0).values())
        return float(value), t
    direction = [torch.zeros_like(p) for p in training('dual', 'infonce').core.parameters()]
    _, t = loss(0.); direction = [p.grad.clone() for p in t.core.parameters()]                     # clipped: its length does not matter
    eps = 1e-6; slope = (loss(eps)[0]-loss(-eps)[0])/(2*eps); norm2 = sum(float((d*d).sum()) for d in direction)
    scale = float(t.meter[1]/max(float(t.meter[1]), norm2**.5)); true = norm2*float(t.meter[1])/norm2**.5
    assert scale > 0 and slope == pytest.approx(true, rel=1e-5)


def test_batch_normalisation_refuses_parts():
    t = training('dual', 'vsepp', chunk=8); t.model.norm = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match='batch normalisation'): train_step(t, torch.arange(32), 0)


# ---- the rest of the contract
def test_what_is_fetched_is_what_was_asked_for():
    t = training('dual', 'off'); m = t.phases[1][1]; caps = order(len(t.train.lengths), 0, 0)[:8]; ids = torch.as_tensor(t.train.split.cap_ids[caps])
    want, step = fetches(m, ids, 0, 1), step_of(t, caps, m)
    at = [list(t.train.split.cap_ids).index(i) for i in want['text.off'].tolist()]
    torch.testing.assert_close(step.fetched('text.off'), t.core.text(t.train.tokens[at], t.train._lengths[at])); assert step.fetched('text.off') is step.fetched('text.off')
    assert step.batch['text.off']['img_ids'].tolist() == [int(t.train.split.img_ids[t.train.split.img_of[j]]) for j in at]
    assert torch.equal(fetches(m, ids.flip(0), 0, 1)['image.off'].flip(0), want['image.off'])      # follows the caption
    with pytest.raises(ValueError, match='two sources fetch'):
        fetches(Method(dict(a=Source(None, None, lambda *_: dict(x=1)), b=Source(None, None, lambda *_: dict(x=2))), {}), ids, 0, 1)


@pytest.mark.parametrize('kind', KINDS)
def test_explain_says_why(kind):
    t = training(kind, 'mixture', warm=False); m = t.phases[0][1]; caps = torch.as_tensor((t.train.split.img_of < 3).nonzero()[0][:9]); step = step_of(t, caps, m)
    for o in m.stateful(): o.before_step(step); o.observe(step)
    rows = explain(m, step, most=60); barred = {s: {r['barred'] for r in rows if r['source'] == s} for s in m.sources}
    assert barred['all'] == {'', 'own pair', 'same image'} and {'not yet filled', 'same image'} <= barred['on'] and '' in barred['syn']
    assert all(r['weight'] is not None for r in rows if r['source'] == 'on') and {r['picked'] for r in rows} >= {0, 1}
    assert all(r['picked'] == 0 for r in rows if r['barred']) and {'cost of hardest', 'cost of off', 'cost of mlm'} <= rows[0].keys()
    json.dumps(rows)


@pytest.mark.parametrize('kind', ('attend', 'joint'))
def test_a_split_is_ranked_by_any_model(kind):
    t = training(kind, 'vsepp', double=False); r = rank_split(t.core.eval(), t.val); s = t.val.split
    from itm_nb.models.encode import embed
    img, txt = embed(t.core, t.val, block=7); S = t.core.matrix(img, txt).detach(); gallery = s.gallery[s.img_of] if s.gallery is not None else 0*s.img_of
    for j in range(0, len(s.captions), 17):
        own = int(s.img_of[j]); others = [i for i in range(len(s)) if i != own and (s.gallery is None or s.gallery[i] == gallery[j])]
        assert abs(int((S[others, j] >= S[own, j]-1e-6).sum()) - r.t2i[j]) <= 1


def test_a_method_of_ones_own(tmp_path):
    "From a file, through `fit`: settings and data reach the maker, another source under a checkpoint is refused"
    own = tmp_path/'own.py'
    own.write_text('from itm_nb.methods.method import vsepp\n\ndef mine(margin, model, train):\n    assert len(train.lengths) and list(model.parameters())\n    return vsepp(margin)\n')
    cfg = replace(TINY, method=f'{own}:mine', epochs=1); plain = replace(TINY, epochs=1)
    a, b = fit(cfg, tmp_path/'a', data(), progress=False, allow_code=True), fit(plain, tmp_path/'b', data(), progress=False)
    assert all(torch.equal(x, y) for x, y in zip(a.core.state_dict().values(), b.core.state_dict().values())) and a.code and not b.code
    from itm_nb.runs.identity import source_hash
    assert source_hash(f'{own}:mine') == f'{source_hash("vsepp")}+{a.code}' and len(a.code) == 12
    own.write_text(own.read_text() + '\n')
    with pytest.raises(DataError, match='source of its method'): fit(cfg, tmp_path/'a', data(), progress=False, allow_code=True)
    with pytest.raises(DataError, match="nothing called 'mime'.*Did you mean 'mine'"): named(f'{own}:mime', allow_code=True)


def test_losses_and_picks_alone():
    "In anyone's loop: tensors and ids, no Step, no Model"
    from itm_nb.methods.samplers import every, of_scores, semi_hard
    S = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_(); ids = torch.tensor([0, 0, 1, 2, 3, 3]); eligible = ids[:,None] != ids
    for pick in (hardest, top(2), every, semi_hard):
        c = of_scores(S, eligible); p = pick(c); loss = total(hinge(c.pos[:,None], c.rescore(p.idx)['']), p.valid).sum(); loss.backward()
        assert loss.isfinite() and not S.grad[0,1] and not S.grad[5,4]; S.grad = None


if __name__ == '__main__': in_worlds(worker, data)
