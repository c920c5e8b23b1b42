"""AOQ from lists to loss: the whole path against a plain loop, what each switch and each placebo changes, lists that do not belong here, mining and training."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_nb.core.errors_files import DataError
from itm_nb.data.batches import SPECIALS, Batches, Vocabulary
from itm_nb.data.splits import fingerprint, Split
from itm_nb.models.encode import embed
from itm_nb.models.similarity import picked_of
from itm_nb.methods.aoq import (
    _AllTerms, PRESETS, STAGES, aoq, kept, lists_of, Mining, Quintuplet, quintuplet)
from itm_nb.methods.fne import bank_source, Memory
from itm_nb.methods.method import losses, explain, fetches, Method
from itm_nb.methods.offline_mining import SHARE, depth, Draw, Lists, load_lists, mine_model, save_lists
from itm_nb.methods.registry import named, schedule
from itm_nb.methods.samplers import in_batch, semi_hard, Source, Step, top, DirectedStep
from itm_nb.training.build import build
from itm_nb.training.config import config, Config
from itm_nb.training.loop import fit, Inputs, load_picks, Saving
from itm_nb.runs.identity import OF_A_RUN
from itm_nb.runs.run_folder import finish
from itm_nb.runs.sweep_plan import entries, read_sweep, sweep_file

ROOT = Path(__file__).resolve().parents[2]
torch.set_num_threads(1)
N, M = 6, 15
IMG_OF = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 5, 5])     # unequal numbers of captions


class Table:
    "A model that knows a score for every pair: encodings are numbers of rows and columns"
    def __init__(self, S): self.S = S
    def image(self, feats, num): return feats[:,0].long()
    def text(self, tokens, lengths): return tokens[:,1:2] - len(SPECIALS)
    def pairs(self, img, txt): return self.S[img[:,0], txt[:,0]]
    def matrix(self, img, txt): return self.S[img[:,0]][:,txt[:,0]]
    def at(self, anchor, other, idx, i2t=True): return picked_of(self.pairs, anchor, other, idx, i2t)


def train_of(img_of=IMG_OF, n=N):
    "Batches whose feature is the number of the image, whose only word is that of the caption; ids are no places"
    m = len(img_of); captions = tuple(chr(97 + j) for j in range(m))
    split = Split('train', np.arange(n, dtype=np.float32).reshape(n, 1, 1), np.ones(n, int), captions, img_of.numpy(), np.arange(n)*7 + 50, np.arange(m)[::-1]*3 + 100)
    return Batches(split, Vocabulary.build(captions))


def save(folder, S, split, h=(3, 3), about=None):
    "Lists of a score table, by plain sorting"
    S = S.detach(); own = torch.as_tensor(split.img_of); n, m = S.shape; out = {}
    for side, A, q, k, w in (('i2t', S, torch.arange(n), own, h[0]), ('t2i', S.T, own, torch.arange(n), h[1])):
        v, i = A.masked_fill(q[:,None] == k, -torch.inf).sort(dim=1, descending=True, stable=True); v, i = v[:,:w], i[:,:w]
        out[side] = Lists(i.masked_fill(v == -torch.inf, -1).int().numpy(), v.float().numpy())
    save_lists(folder, out, about or dict(data=fingerprint(split), split='train')); return out


def table(seed=0): return torch.randn(N, M, generator=torch.Generator().manual_seed(seed)).double().mul(.3).requires_grad_()


def step_of(train, model, method, caps, seed=0, epoch=0):
    b = train.take(caps, fetches(method, torch.as_tensor(train.split.cap_ids[caps.numpy()]), seed, epoch))
    return Step(model, model.image(b['feats'], None), model.text(b['tokens'], None), b['img_ids'], b['cap_ids'], seed, epoch, b)


def by_loop(S, d, caps, own, stage='adap', clamp=False, detach=False, true_pairs=True, same_image=True, m=.2, alpha=.3, beta=1.5):
    "The released loss, one anchor after the other, from the dossier's formulas"
    out = dict(i2t=0., t2i=0.); own = own.tolist()
    for a, j in enumerate(caps.tolist()):
        i, p = own[j], S[own[j], j]; T3, I3, T4, I4 = (int(d[k][a]) for k in ('T3', 'I3', 'T4', 'I4'))
        rivals = [b for b, c in enumerate(caps.tolist()) if b != a and (same_image or own[c] != i)]
        for side, off, un, hard in (('i2t', S[i,T3], S[I3,T3], [S[i,caps[b]] for b in rivals]), ('t2i', S[I3,j], S[I4,T4], [S[own[caps[b]],j] for b in rivals])):
            n = max(hard, key=lambda x: float(x.detach())); w = beta - (off - n)/alpha
            if clamp: w = w.clamp(min=0)
            if detach: w = w.detach()
            cost = (m + n - p).clamp(min=0) * (w if stage == 'adap' else 1.)
            if stage != 'online': cost = cost + (off - p).clamp(min=0)
            if stage in ('quin', 'adap') and (true_pairs or I3 != I4): cost = cost + (un - p).clamp(min=0)
            out[side] = out[side] + cost
    return out


CAPS = torch.tensor([0, 3, 1, 5, 9, 11, 13])      # 0 and 1 are of one image


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('seed', range(3))
def test_the_whole_path_equals_a_plain_loop(stage, preset, seed, tmp_path):
    S, train = table(seed), train_of(); save(tmp_path, S, train.split, (4, 2)); hits = 0
    method = aoq(stage=stage, preset=preset, offline=Mining(tmp_path, .25), train=train, reduce='sum')
    sw = PRESETS[preset]
    for epoch in range(4):
        parts = losses(method, step_of(train, Table(S), method, CAPS, seed, epoch))
        d = Draw(load_lists(tmp_path, {}), IMG_OF, 4, 2, sw['tied'])(CAPS, seed, epoch); hits += int((d['I3'] == d['I4']).sum())
        want = by_loop(S, d, CAPS, IMG_OF, stage, sw['clamp'], sw['detach'], sw['true_pairs'], sw['same_image'])
        for side in ('i2t', 't2i'): torch.testing.assert_close(parts[f'aoq/{side}'], want[side], rtol=1e-12, atol=1e-12)
        got, ref = (torch.autograd.grad(sum(x.values()), S)[0] for x in (parts, want)); torch.testing.assert_close(got, ref, rtol=1e-10, atol=1e-12)
    assert hits or stage == 'online' or sw['tied'] or seed     # true pairs among the unanchored do occur


def one(method, train, S, seed=0, epoch=0, caps=CAPS): return float(sum(losses(method, step_of(train, Table(S), method, caps, seed, epoch)).values()).detach())


@pytest.mark.parametrize('stage', STAGES[1:])
@pytest.mark.parametrize('clamp, detach', [(False, False), (True, False), (True, True)])
def test_one_function_gives_the_terms_and_gradients_of_each(stage, clamp, detach):
    g = torch.Generator().manual_seed(7)
    x = [(5*torch.rand(400, generator=g, dtype=torch.double)).round()/5 for _ in range(5)]     # many ties
    x[1][:20] = -torch.inf
    ok, far = torch.rand(2, 400, generator=g) > .2
    def both(how):
        y = [t.clone().requires_grad_() for t in x]
        cost = how(*y)
        return cost.detach(), torch.autograd.grad((cost*torch.linspace(-1, 1, 400)).sum(), y, allow_unused=True)
    weigh = dict(clamp=clamp, detach=detach)
    def plain(pos, on, off, away, pos_on):
        given = dict(off_ok=ok, unanchored_valid=far, pos_on=pos_on)
        return sum(quintuplet(pos, on, off, away, stage=stage, **given,
                              **(weigh if stage == 'adap' else {})).values())
    hyper = dict(alpha=.3, beta=1.5) | weigh
    (cost, into), (want, slow) = both(plain), both(
        lambda *y: _AllTerms.apply(*y, ok, far, .2, 0., STAGES.index(stage), hyper))
    assert torch.equal(cost, want) and (cost > 0).sum() > 50
    for a, b in zip(into, slow):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=0, atol=1e-14))


@pytest.mark.parametrize('switch', [k for k in PRESETS['faithful'] if k not in ('detach', 'reduce')])
def test_each_switch_alone_changes_the_loss(switch, tmp_path):
    S, train = table(1).detach()*2, train_of(); S[0,:3] += 2.; save(tmp_path, S, train.split, (4, 2))       # captions of one image are its hardest
    made = lambda **kw: aoq(Quintuplet(alpha=.1), Mining(tmp_path, .25), preset='faithful', train=train, **kw)
    both = [[one(made(**kw), train, S, e) for e in range(6)] for kw in ({}, {switch: PRESETS['corrected'][switch]})]
    assert both[0] != both[1] and all(map(np.isfinite, both[0] + both[1]))


def test_detaching_changes_the_gradient_alone(tmp_path):
    S, train = table(), train_of(); split = train.split; save(tmp_path, S, split, (4, 2)); got = []
    for kw in (dict(), dict(detach=True), dict(placebo='detached')):
        m = aoq(offline=Mining(tmp_path, .25), train=train, **kw); loss = sum(losses(m, step_of(train, Table(S), m, CAPS)).values())
        got.append((float(loss.detach()), torch.autograd.grad(loss, S)[0]))
    assert got[0][0] == got[1][0] == got[2][0] and torch.equal(got[1][1], got[2][1]) and not torch.allclose(got[0][1], got[1][1])


# ---------------------------------------------------------------- placebos

def test_random_needs_no_lists_and_is_never_the_own_image(tmp_path):
    train = train_of(); m = aoq(stage='quin', placebo='random', train=train); S = table()
    for e in range(20):
        f = fetches(m, torch.as_tensor(train.split.cap_ids[CAPS.numpy()]), 0, e); b = train.take(CAPS, f)
        assert (b['text.off3']['img_ids'] != b['img_ids']).all() and (b['image.off3']['img_ids'] != b['img_ids']).all()
    assert np.isfinite(one(m, train, S))


def test_second_draws_are_anchored_and_their_own(tmp_path):
    S, train = table(), train_of(); split = train.split; save(tmp_path, S, split, (12, 5)); m = aoq(stage='quin', offline=Mining(tmp_path, .8), train=train, placebo='second')
    step = step_of(train, Table(S), m, CAPS); total_, other = 0., 0
    for side in ('i2t', 't2i'):
        c = m.sources['off'].pool(DirectedStep(step, side)); x = {k: v.detach() for k, v in c.also.items()}; own = IMG_OF[CAPS]
        again = step.batch['text.off4' if side == 'i2t' else 'image.off4']; at = (Table(S).text(again['tokens'], 0) if side == 'i2t' else Table(S).image(again['feats'], 0))[:,0]
        assert torch.equal(x['unanchored'], S.detach()[own, at] if side == 'i2t' else S.detach()[at, CAPS]); other += int((x['unanchored'] != c.score[:,0]).sum())
    assert other > 5


def test_permuted_and_constant_weights(tmp_path):
    S, train = table(2), train_of(); split = train.split; save(tmp_path, S, split, (4, 2)); kw = dict(offline=Mining(tmp_path, .25), train=train, reduce='sum')
    plain, mixed, flat = (aoq(placebo=p, **kw) for p in ('', 'permuted', 'constant')); watch = flat.sources['off'].stateful[0]
    values = [one(m, train, S) for m in (plain, mixed, flat)]; assert len(set(values)) == 3
    assert watch.run[1] == 2*len(CAPS) and one(flat, train, S) != values[2]      # the mean goes on
    w = torch.arange(5.); assert torch.equal(watch.mean(w), torch.full((5,), float(watch.run[0]/watch.run[1])))


@pytest.mark.parametrize('stage, placebo, says', [('tri', 'second', 'for the stages'), ('online', 'random', 'for the stages'), ('quin', 'permuted', 'for the stages'), ('adap', 'none', 'no placebo'), ('five', '', 'stage is one of')])
def test_what_does_not_fit_is_said(stage, placebo, says):
    with pytest.raises(ValueError, match=says): aoq(stage=stage, placebo=placebo, train=train_of())
    with pytest.raises(ValueError, match='no switch called'): aoq(train=train_of(), clampp=True)


# ---------------------------------------------------------------- lists

def test_lists_that_do_not_belong_here(tmp_path):
    S, train = table(), train_of(); split = train.split; save(tmp_path/'good', S, split); save(tmp_path/'run'/'lists', S, split)
    lists_of(tmp_path/'good', split, .2); lists_of(tmp_path/'run', split, .2)
    save(tmp_path/'other', S[:,:14], train_of(IMG_OF[:14]).split); (tmp_path/'half').mkdir(); (tmp_path/'half'/'i2t_idx.npy').write_bytes((tmp_path/'good'/'i2t_idx.npy').read_bytes())
    for at, share, says in (('', .2, 'no mined lists'), (tmp_path/'other', .2, 'lists of data'), (tmp_path/'half', .2, 'no lists.json'), (tmp_path/'good', .5, 'entries')):
        with pytest.raises(DataError, match=says): aoq(offline=Mining(at, share), train=train)
    with pytest.raises(DataError, match='no training data'): aoq(offline=Mining(tmp_path/'good'))


def test_an_anchor_without_negatives_costs_nothing(tmp_path):
    "Lists with empty rows: the anchor gets itself, and nothing of it counts"
    S, train = table(), train_of(); split = train.split; lists = save(tmp_path, S, split, (4, 2)); lists['i2t'].idx[0] = -1; lists['t2i'].idx[0] = -1; save_lists(tmp_path, lists, dict(data=fingerprint(split)))
    m = aoq(stage='quin', offline=Mining(tmp_path, .25), train=train)
    step = step_of(train, Table(S), m, CAPS)
    for side in ('i2t', 't2i'):
        c = m.sources['off'].pool(DirectedStep(step, side)); ok = [side == 't2i' and k == 2 or k not in (0, 2) for k in range(len(CAPS))]; ok[0] = False
        assert c.eligible[:,0].tolist() == ok and not c.also['unanchored_valid'][0] and not c.also['unanchored_valid'][2]
    assert np.isfinite(one(m, train, S)); rows = explain(m, step, side='i2t'); assert any(r['barred'] == 'same image' for r in rows if r['source'] == 'off')


def test_any_pick_may_be_the_online_negative(tmp_path):
    S, train = table(), train_of(); split = train.split; save(tmp_path, S, split, (4, 2)); kw = dict(offline=Mining(tmp_path, .25), train=train)
    a = aoq(on='semi_hard', **kw); b = aoq(**kw).but(on=Source(in_batch, semi_hard)); c = aoq(on=top(1), **kw); d = aoq(**kw); e = aoq(on=top(3), **kw)
    assert one(a, train, S) == one(b, train, S) != one(d, train, S) == one(c, train, S); assert abs(one(e, train, S) - one(d, train, S)) < 1e-12


# ---------------------------------------------------------------- the gradient through the weight, and the mixture with FNE

class Vectors:
    "A dual model of free vectors, one for each image and each sentence"
    def __init__(self, v, t): self.v, self.t = v, t
    def image(self, feats, num): return self.v[feats.reshape(len(feats), -1)[:,0].long()]
    def text(self, tokens, lengths): return self.t[tokens[:,1] - len(SPECIALS)]
    def pairs(self, img, txt): return (img*txt).sum(1)
    def matrix(self, img, txt): return img @ txt.T
    def at(self, anchor, other, idx, i2t=True): return torch.einsum('bd,bkd->bk', anchor, other[idx])


def pulled(method, tmp_path):
    "(loss, gradient in image and sentence vectors) of a method, in a batch in which online negatives are drawn far below the offline ones"
    g = torch.Generator().manual_seed(3); v, t = (torch.nn.functional.normalize(torch.randn(n, 4, generator=g).double(), dim=1).requires_grad_() for n in (N, M))
    train = train_of(); save(tmp_path, v @ t.T, train.split, (4, 2)); made = named(method, lists=str(tmp_path), train=train, seed=0)
    step = step_of(train, Vectors(v, t), made, torch.tensor([0, 3, 5, 9, 11, 13])); loss = sum(losses(made, step).values())
    return loss.item(), torch.cat([x.flatten() for x in torch.autograd.grad(loss, (v, t))])


OLD, DRAW = 'aoq({}share=0.25),on=itm_nb.fne:bank_source({})', "pool='batch', floor='none'"

def test_the_mixture_is_detached_and_the_old_string_means_what_it_meant(tmp_path):
    "One loss; the gradient of aoq_fne is that of the detached weight, that of the committed string the other"
    old, said, kept_, new, asked = (pulled(m, tmp_path) for m in (OLD.format('', DRAW), OLD.format('detach=True, ', DRAW), OLD.format('detach=False, ', DRAW), f'aoq_fne(share=0.25, {DRAW})',
                                                                  f'aoq_fne(share=0.25, detach=False, {DRAW})'))
    assert old[0] == said[0] == kept_[0] == new[0] == asked[0] > 0
    assert torch.equal(old[1], kept_[1]) and torch.equal(old[1], asked[1]) and torch.equal(new[1], said[1]) and (old[1] - new[1]).abs().max() > .01


@pytest.mark.parametrize('how, detached', [('', False), ("on='hardest', ", False), ("on='uniform', ", True), ("on='semi_hard', ", True), ("on='uniform', detach=False, ", False), ('detach=True, ', True),
                                           ("preset='faithful', ", False), ("preset='faithful', on='uniform', ", True), ("placebo='detached', ", True), ("placebo='detached', detach=False, ", True)])
def test_the_weight_is_detached_wherever_the_online_negative_is_not_the_hardest(how, detached, tmp_path):
    "Against the same setting with `detach` said: equal to the one, not to the other"
    plain = how.replace('detach=False, ', '').replace('detach=True, ', '').replace("placebo='detached', ", '')
    got, yes, no = (pulled(f'aoq({x}share=0.25)', tmp_path)[1] for x in (how, plain + 'detach=True, ', plain + 'detach=False, '))
    assert torch.equal(got, yes if detached else no) and not torch.equal(yes, no)


def test_the_mixture_of_another_pool_and_of_a_pick_of_ones_own(tmp_path):
    train = train_of(); save(tmp_path, table(), train.split, (4, 2)); kw = dict(offline=Mining(tmp_path, .25), train=train)
    def force(**more):
        off = torch.tensor([.5], requires_grad=True); one_ = torch.ones(1, 1).bool(); p = torch.tensor([.6])
        n = {'on': torch.tensor([[.45]]), 'on.valid': one_, 'on.pos': p, 'off': off[:,None], 'off.valid': one_, 'off.pos': p}; aoq(**kw, **more).terms['aoq'](n).backward(); return off.grad.item()
    assert force() == pytest.approx(-.05/.3, abs=1e-6) == force(pool=in_batch, detach=False)
    assert force(pool=in_batch) == force(on=top(2)) == force(pool=bank_source(memory=Memory(8)).pool) == 0


# ---------------------------------------------------------------- from a finished run to lists to training

TINY = Config(preset='tiny', text='mean', text_pool='mean', dim=16, d_word=8, image_hidden=0, epochs=2, batch=64, method='vse0', dropout=0., lr=5e-3)


@pytest.fixture(scope='module')
def mined(tmp_path_factory):
    "A warm run, and what the template `mine` makes of it in a process of its own"
    at = tmp_path_factory.mktemp('mined'); t = fit(TINY, at/'warm', progress=False); finish(at/'warm')
    code = 'import sys; from itm_nb.cli import itm_run; sys.exit(itm_run())'
    given = dict(init=at/'warm', preset='tiny', share=.02, out=at/'lists of warm', progress=False)
    command = [sys.executable, '-c', code, 'mine', '--quiet', *(x for k, v in given.items() for x in ('-p', k, str(v)))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)), cwd=at); assert done.returncode == 0, done.stderr
    return at/'lists of warm', t


def test_mined_lists_are_those_of_brute_force(mined):
    folder, t = mined; lists = load_lists(folder/'lists', dict(data=fingerprint(t.train.split), split='train')); img, txt = embed(t.core, t.train); own = t.train.img_of
    for (side, got), A, q, k in zip(sorted(lists.items()), (img @ txt.T, txt @ img.T), (torch.arange(len(img)), own), (own, torch.arange(len(img)))):
        want = A.masked_fill(q[:,None] == k, -torch.inf).sort(dim=1, descending=True, stable=True); h = got.idx.shape[1]; assert h == (20, 5)[side == 't2i']
        np.testing.assert_allclose(got.score, want.values[:,:h], atol=1e-6); assert (q[:,None] != k[torch.tensor(np.array(got.idx)).long()]).all()
    found = json.loads((folder/'report.json').read_text()); assert 0 < found['collisions'] < .5 and 0 < found['i2t']['false'] < 1 and (folder/'DONE').is_file()


@pytest.mark.parametrize('name, change', [
    ('dual', {}), ('faithful', dict(method="aoq(preset='faithful', share=0.02)")), ('scan', dict(similarity='scan_t2i')), ('bfan', dict(similarity='bfan_equal')),
    ('cross', dict(similarity='cross', layers=1, heads=2, batch=128)), ('vsrn', dict(image='vsrn', text='gru_last', captioner=8, method='aoq(share=0.02)|caption()')),
    ('fne', dict(method="aoq(share=0.02),on=itm_nb.fne:bank_source()")), ('fne detached', dict(method='aoq_fne(share=0.02, queue=64)')),
    ('late', dict(method="aoq(placebo='constant', share=0.02)", warmup=1))])
def test_every_kind_of_model_trains_on_mined_lists(name, change, mined, tmp_path):
    t = fit(replace(TINY, **dict(method='aoq(share=0.02)', epochs=1 + (name == 'late')) | change), tmp_path/name, progress=False, inputs=Inputs(lists=str(mined[0])))
    told = [json.loads(l) for l in (tmp_path/name/'log.jsonl').read_text().splitlines()]; m = [l['monitor'] for l in told if 'monitor' in l][-1]
    assert all(np.isfinite(l['loss']) for l in told if 'loss' in l) and {'weight_mean', 'pulled', 'collisions', 'active_offline'} <= m.keys()
    rows = load_picks(tmp_path/name/'picks.bin'); assert {b'on', b'off'} <= set(rows['source']) and (rows['other_image'] != rows['image']).all() if name != 'faithful' else True
    off = rows[rows['source'] == b'off']; assert (off['other_caption'][off['side'] == b'i2t'] >= 0).all() and (off['other_image'] >= 0).all()


def test_lists_of_other_data_are_refused_by_a_run(mined, tmp_path):
    for cfg, lists, says in ((replace(TINY, method='aoq(share=0.02)', seed=5), mined[0], 'lists of data'), (replace(TINY, method='aoq()'), '', 'no mined lists'),
                             (replace(TINY, method='aoq(share=0.5)'), mined[0], 'share=0.5')):
        with pytest.raises(DataError, match=says): fit(cfg, tmp_path/says.split()[0], progress=False, inputs=Inputs(lists=str(lists)))
    with pytest.raises(ValueError, match='needs a captioner'): fit(replace(TINY, method='vsepp|caption()'), tmp_path/'mute', progress=False)
    with pytest.raises(ValueError, match='nothing is mined'): aoq(offline=Mining(refresh=1), placebo='random', train=mined[1].train, model=mined[1].core)


def test_mining_that_is_stopped_leaves_nothing_to_be_accepted(mined, tmp_path):
    class Stop(Exception): pass
    def tick(n): raise Stop
    img, txt = embed(mined[1].core, mined[1].train)
    with pytest.raises(Stop): save_lists(tmp_path, mine_model(mined[1].core, img, txt, mined[1].train.img_of, (20, 5), tick), dict(data=fingerprint(mined[1].train.split)))
    with pytest.raises(DataError, match='no lists.json'): aoq(offline=Mining(tmp_path), train=mined[1].train)
    half = tmp_path/'half'; shutil.copytree(mined[0]/'lists', half); (half/'t2i_idx.npy').write_bytes((half/'t2i_idx.npy').read_bytes()[:-8])
    with pytest.raises(DataError, match='missing or changed'): aoq(offline=Mining(half), train=mined[1].train)


def test_counts_and_the_running_mean_survive_a_resume(mined, tmp_path):
    cfg = replace(TINY, method="aoq(placebo='constant', share=0.02)", epochs=1); whole = fit(cfg, tmp_path/'whole', progress=False, inputs=Inputs(lists=str(mined[0])))
    def stop(n):
        if n == 9: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(cfg, tmp_path/'two', progress=False, inputs=Inputs(lists=str(mined[0])), on_step=stop, saving=Saving(every=5))
    fit(cfg, tmp_path/'two', progress=False, inputs=Inputs(lists=str(mined[0])), saving=Saving(every=5))
    assert whole.steps > 9
    for f in ('log.jsonl', 'picks.bin', 'best/model.safetensors'): assert (tmp_path/'whole'/f).read_bytes() == (tmp_path/'two'/f).read_bytes(), f


@pytest.mark.parametrize('given', [True, False])
def test_lists_that_keep_up_are_those_of_the_model_of_the_day_and_survive_a_resume(given, mined, tmp_path):
    lists = dict(inputs=Inputs(lists=str(mined[0]))) if given else {}; cfg = replace(TINY, method='aoq(share=0.02, refresh=1)', decay='none', epochs=1)
    one = fit(cfg, tmp_path/'one', progress=False, **lists); cfg = replace(cfg, epochs=2); whole = fit(cfg, tmp_path/'whole', progress=False, **lists)
    keeper = next(o for o in whole.stateful() if hasattr(o, 'every')); want = mine_model(one.core, *embed(one.core, one.train), one.train.img_of, (20, 5))
    for side in want: assert torch.equal(keeper.lists[side].idx, want[side].idx), side
    told = [json.loads(l)['monitor'] for l in (tmp_path/'whole'/'log.jsonl').read_text().splitlines() if 'monitor' in l]
    assert 'lists_kept' not in told[0] and 0 < told[-1]['lists_kept'] < 1
    def stop(n):
        if n == whole.per_epoch + 4: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(cfg, tmp_path/'two', progress=False, on_step=stop, saving=Saving(every=3), **lists)
    fit(cfg, tmp_path/'two', progress=False, saving=Saving(every=3), **lists)
    for f in ('log.jsonl', 'picks.bin', 'best/model.safetensors'): assert (tmp_path/'whole'/f).read_bytes() == (tmp_path/'two'/f).read_bytes(), f


@pytest.mark.parametrize('seed', range(3))
def test_share_of_lists_that_stayed_against_sets(seed):
    g = torch.Generator().manual_seed(seed); a, b = (torch.stack([torch.randperm(30, generator=g)[:9] for _ in range(40)]) for _ in range(2)); b[::4,5:] = -1; a[::7,3:] = -1
    both = sum(len({*x.tolist()} & {*y.tolist()} - {-1}) for x, y in zip(a, b)); assert abs(kept(a, b, rows=7) - both/int((b >= 0).sum())) < 1e-12


# ---------------------------------------------------------------- the sweeps

@pytest.mark.parametrize('name', sorted(p.stem for p in (ROOT/'nbs'/'experiments'/'sweeps').glob('aoq_*.yaml')))
def test_every_run_of_a_sweep_can_be_built(name, tmp_path):
    "Settings resolve, models can be made (at the size of the profile tiny where there is one), methods find what they name"
    train = train_of(); save(tmp_path, table(), train.split, (9, 4)); path = sweep_file(name); spec = read_sweep(path)
    spec = read_sweep(path, 'tiny') if 'tiny' in spec['profiles'] else spec; spec['search'] = {}; found = entries(spec, name, tmp_path/'runs')
    assert len({e.block for e in found}) == len(spec['blocks']); folders = {str(e.out): e for e in found}; built = {}
    for e in found:
        if e.block or e.template != 'train': continue
        cfg = config({k: v for k, v in e.values.items() if k not in OF_A_RUN}); cfg = replace(cfg, dim=min(cfg.dim, 16), d_word=min(cfg.d_word, 8), captioner=min(cfg.captioner, 8)); kind = (cfg.similarity, cfg.image, cfg.text, cfg.captioner, cfg.dim, cfg.d_word)
        model = built[kind] = built.get(kind) or build(cfg, 20, 50)
        m = schedule(cfg.method, cfg.warmup, cfg.warmup_method, margin=cfg.margin, model=model, train=train, lists=str(tmp_path) if e.values['lists'] else '')[-1][1]
        assert ('off' in m.sources) == (e.values['lists'] != '' or 'random' in cfg.method)
        if e.values['init']: assert {k: built_like(folders[e.values['init']], k) for k in KIND} == {k: e.values[k] for k in KIND}       # what it goes on from is the same model
    mines = [e for e in found if e.template == 'mine']; assert len(mines) >= len(spec['blocks'])
    for e in mines: parent = folders[e.values['init']]; assert all(e.values[k] == parent.values[k] for k in ('data', 'preset', 'rho', 'regions', 'folds', 'fold', 'similarity') if k in parent.values) and parent.block == e.block

KIND = ('similarity', 'image', 'text', 'dim', 'd_word', 'captioner', 'image_hidden', 'regions', 'fold', 'seed')
def built_like(e, k): return e.values[k]


def test_depths_of_the_sweeps_are_those_of_the_paper():
    for name, n in (('aoq_flickr30k', 29_000), ('aoq_coco', 113_287)):
        spec = read_sweep(sweep_file(name)); share = spec['runs']['mined']['share']; said = spec['arms']['scan_aoq']['method']
        used = float(said.partition('share=')[2].rstrip(')')) if 'share=' in said else SHARE
        assert depth(5*n, n, share) == (300, 60) == depth(5*n, n, used)
