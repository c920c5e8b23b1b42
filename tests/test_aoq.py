"""AOQ from lists to loss: the whole path against a plain loop, what each switch and each placebo changes, lists that do not belong here, mining and training."""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from itm_nb.aoq import PLACEBOS, PRESETS, STAGES, Watch, aoq, lists_of, quintuplet
from itm_nb.data import SPECIALS, Batches, DataError, Split, Vocabulary, fingerprint, order
from itm_nb.methods import Method, costs, explain, fetches, vse0
from itm_nb.offline import Anywhere, Draw, Lists, depth, load_lists, mine_model, save_lists
from itm_nb.samplers import Source, Step, View, hardest, in_batch, semi_hard, top
from itm_nb.similarity import States, matrix_of, picked_of
from itm_nb.train import Config, corpus, embed, fit, prepare, train_step, _pack

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
    method = Method(*aoq(stage, preset, lists=tmp_path, train=train, share=.25, reduce='sum')); sw = PRESETS[preset]
    for epoch in range(4):
        parts = costs(method, step_of(train, Table(S), method, CAPS, seed, epoch))
        d = Draw(load_lists(tmp_path, {}), IMG_OF, 4, 2, sw['tied'])(CAPS, seed, epoch); hits += int((d['I3'] == d['I4']).sum())
        want = by_loop(S, d, CAPS, IMG_OF, stage, sw['clamp'], sw['detach'], sw['true_pairs'], sw['same_image'])
        for side in ('i2t', 't2i'): torch.testing.assert_close(parts[f'aoq/{side}'], want[side], rtol=1e-12, atol=1e-12)
        got, ref = (torch.autograd.grad(sum(x.values()), S)[0] for x in (parts, want)); torch.testing.assert_close(got, ref, rtol=1e-10, atol=1e-12)
    assert hits or stage == 'online' or sw['tied'] or seed     # true pairs among the unanchored do occur


def one(method, train, S, seed=0, epoch=0, caps=CAPS): return float(sum(costs(method, step_of(train, Table(S), method, caps, seed, epoch)).values()).detach())


@pytest.mark.parametrize('switch', [k for k in PRESETS['faithful'] if k not in ('detach', 'reduce')])
def test_each_switch_alone_changes_the_loss(switch, tmp_path):
    S, train = table(1).detach()*2, train_of(); S[0,:3] += 2.; save(tmp_path, S, train.split, (4, 2))       # captions of one image are its hardest
    made = lambda **kw: Method(*aoq('adap', 'faithful', lists=tmp_path, train=train, share=.25, alpha=.1, **kw))
    both = [[one(made(**kw), train, S, e) for e in range(6)] for kw in ({}, {switch: PRESETS['corrected'][switch]})]
    assert both[0] != both[1] and all(map(np.isfinite, both[0] + both[1]))


def test_detaching_changes_the_gradient_alone(tmp_path):
    S, train = table(), train_of(); split = train.split; save(tmp_path, S, split, (4, 2)); got = []
    for kw in (dict(), dict(detach=True), dict(placebo='detached')):
        m = Method(*aoq(lists=tmp_path, train=train, share=.25, **kw)); loss = sum(costs(m, step_of(train, Table(S), m, CAPS)).values())
        got.append((float(loss.detach()), torch.autograd.grad(loss, S)[0]))
    assert got[0][0] == got[1][0] == got[2][0] and torch.equal(got[1][1], got[2][1]) and not torch.allclose(got[0][1], got[1][1])


# ---------------------------------------------------------------- placebos

def test_random_needs_no_lists_and_is_never_the_own_image(tmp_path):
    train = train_of(); m = Method(*aoq('quin', placebo='random', train=train)); S = table()
    for e in range(20):
        f = fetches(m, torch.as_tensor(train.split.cap_ids[CAPS.numpy()]), 0, e); b = train.take(CAPS, f)
        assert (b['text.off3']['img_ids'] != b['img_ids']).all() and (b['image.off3']['img_ids'] != b['img_ids']).all()
    assert np.isfinite(one(m, train, S))


def test_second_draws_are_anchored_and_their_own(tmp_path):
    S, train = table(), train_of(); split = train.split; save(tmp_path, S, split, (12, 5)); m = Method(*aoq('quin', lists=tmp_path, train=train, share=.8, placebo='second'))
    step = step_of(train, Table(S), m, CAPS); total_, other = 0., 0
    for side in ('i2t', 't2i'):
        c = m.sources['off'].pool(View(step, side)); x = {k: v.detach() for k, v in c.also.items()}; own = IMG_OF[CAPS]
        again = step.batch['text.off4' if side == 'i2t' else 'image.off4']; at = (Table(S).text(again['tokens'], 0) if side == 'i2t' else Table(S).image(again['feats'], 0))[:,0]
        assert torch.equal(x['apart'], S.detach()[own, at] if side == 'i2t' else S.detach()[at, CAPS]); other += int((x['apart'] != c.score[:,0]).sum())
    assert other > 5


def test_permuted_and_constant_weights(tmp_path):
    S, train = table(2), train_of(); split = train.split; save(tmp_path, S, split, (4, 2)); kw = dict(lists=tmp_path, train=train, share=.25, reduce='sum')
    plain, mixed, flat = (Method(*aoq(placebo=p, **kw)) for p in ('', 'permuted', 'constant')); watch = flat.sources['off'].keeps[0]
    values = [one(m, train, S) for m in (plain, mixed, flat)]; assert len(set(values)) == 3
    assert watch.run[1] == 2*len(CAPS) and one(flat, train, S) != values[2]      # the mean goes on
    w = torch.arange(5.); assert torch.equal(watch.mean(w), torch.full((5,), float(watch.run[0]/watch.run[1])))


@pytest.mark.parametrize('stage, placebo, says', [('tri', 'second', 'for the stages'), ('online', 'random', 'for the stages'), ('quin', 'permuted', 'for the stages'), ('adap', 'none', 'no placebo'), ('five', '', 'stage is one of')])
def test_what_does_not_fit_is_said(stage, placebo, says):
    with pytest.raises(ValueError, match=says): aoq(stage, placebo=placebo, train=train_of())
    with pytest.raises(ValueError, match='no switch called'): aoq(train=train_of(), clampp=True)


# ---------------------------------------------------------------- lists

def test_lists_that_do_not_belong_here(tmp_path):
    S, train = table(), train_of(); split = train.split; save(tmp_path/'good', S, split); save(tmp_path/'run'/'lists', S, split)
    lists_of(tmp_path/'good', split, .2); lists_of(tmp_path/'run', split, .2)
    save(tmp_path/'other', S[:,:14], train_of(IMG_OF[:14]).split); (tmp_path/'half').mkdir(); (tmp_path/'half'/'i2t_idx.npy').write_bytes((tmp_path/'good'/'i2t_idx.npy').read_bytes())
    for at, share, says in (('', .2, 'no mined lists'), (tmp_path/'other', .2, 'lists of data'), (tmp_path/'half', .2, 'no lists.json'), (tmp_path/'good', .5, 'entries')):
        with pytest.raises(DataError, match=says): aoq(lists=at, train=train, share=share)
    with pytest.raises(DataError, match='no training data'): aoq(lists=tmp_path/'good')


def test_an_anchor_without_negatives_costs_nothing(tmp_path):
    "Lists with empty rows: the anchor gets itself, and nothing of it counts"
    S, train = table(), train_of(); split = train.split; lists = save(tmp_path, S, split, (4, 2)); lists['i2t'].idx[0] = -1; lists['t2i'].idx[0] = -1; save_lists(tmp_path, lists, dict(data=fingerprint(split)))
    m = Method(*aoq('quin', lists=tmp_path, train=train, share=.25)); step = step_of(train, Table(S), m, CAPS)
    for side in ('i2t', 't2i'):
        c = m.sources['off'].pool(View(step, side)); ok = [side == 't2i' and k == 2 or k not in (0, 2) for k in range(len(CAPS))]; ok[0] = False
        assert c.legal[:,0].tolist() == ok and not c.also['apart_ok'][0] and not c.also['apart_ok'][2]
    assert np.isfinite(one(m, train, S)); rows = explain(m, step, side='i2t'); assert any(r['barred'] == 'same image' for r in rows if r['source'] == 'off')


def test_any_pick_may_be_the_online_negative(tmp_path):
    S, train = table(), train_of(); split = train.split; save(tmp_path, S, split, (4, 2)); kw = dict(lists=tmp_path, train=train, share=.25)
    a = Method(*aoq(on='semi_hard', **kw)); b = Method(*aoq(**kw)).but(on=Source(in_batch, semi_hard)); c = Method(*aoq(on=top(1), **kw)); d = Method(*aoq(**kw)); e = Method(*aoq(on=top(3), **kw))
    assert one(a, train, S) == one(b, train, S) != one(d, train, S) == one(c, train, S); assert abs(one(e, train, S) - one(d, train, S)) < 1e-12
