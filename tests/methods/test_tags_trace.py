"""Training steps recorded from the authors' own program, replayed with our cross-encoder, generator and costs; and every switch, turned back alone, breaks its trace.

Not ours and written here: the optimiser (AdamW with eps before the bias correction), which belongs to the record, and the gather indices of its batches."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_nb.models.cross_encoder import CrossEncoder, from_uniter, to_uniter
from itm_nb.methods.generator import (
    _corrections, fill, Lexicon, mlm_loss, penalty, refill, refill_law, suspects)
from itm_nb.methods.samplers import Candidates, top
from itm_nb.methods.tags_dc import (
    correction_term, discrimination_term, synthetic, tags_terms, TagsTerms, warm_linear, word_counts)

torch.set_num_threads(1)
FOLDER = Path(os.environ.get('ITM_GOLDEN') or Path(__file__).parents[1]/'golden')/'traces'
STAGE1 = {'tags_stage1_defect': dict(blind=True, shift=False), 'tags_stage1_released': dict(blind=True, shift=True), 'tags_stage1_repaired': dict(blind=False, shift=False)}
NOISE = 'attention.self.key.bias'            # its gradient is zero by algebra; what the record shows there is rounding


def load(name):
    if not (FOLDER/f'{name}.npz').is_file(): pytest.skip(f'golden block absent from the folder: traces/{name}')
    z = np.load(FOLDER/f'{name}.npz', allow_pickle=False)
    return json.loads((FOLDER/f'{name}.json').read_text('utf-8')), {k: z[k] for k in z.files}


def t(x): return torch.as_tensor(x if x.dtype.kind == 'f' else x.astype('int64'))


def model_of(c, z, **kw):
    m = CrossEncoder(**_sizes(c)).double()
    rest = from_uniter(m, {k[5:]: t(v) for k, v in z.items() if k.startswith('init/')}, **kw)
    return m.train(), rest


class Published:
    "The release's AdamW: eps is added before the bias correction, decay comes after the step, names with bias or LayerNorm do not decay"
    def __init__(self, model, c): self.p, self.c, self.m, self.n = dict(model.named_parameters()), c, {}, 0

    def step(self, lr):
        self.n += 1; b1, b2 = self.c['betas']; size = lr*(1-b2**self.n)**.5/(1-b1**self.n); c = self.c
        live = [p for p in self.p.values() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(live, c['grad_norm']).item()
        with torch.no_grad():
            for k, p in self.p.items():
                if p.grad is None: continue
                m, v = self.m.setdefault(k, (torch.zeros_like(p), torch.zeros_like(p))); m.mul_(b1).add_(p.grad, alpha=1-b1); v.mul_(b2).addcmul_(p.grad, p.grad, value=1-b2)
                p.addcdiv_(m, v.sqrt().add_(c['eps']), value=-size)
                if not ('bias' in k or 'LayerNorm.weight' in k): p.mul_(1 - lr*c['weight_decay'])
        return norm


def same(got, want, tol=1e-9, what=''): np.testing.assert_allclose(np.asarray(got, float), np.asarray(want, float), rtol=0, atol=tol, err_msg=what)


def sketch(state, names):
    rows = []
    for k in names:
        x = state[k].detach().flatten(); n = len(x)
        rows.append([x.sum(), (x*x).sum(), x[0], x[n//3], x[(2*n)//3], x[-1]])
    return np.array(rows, float)


def triplet(model, make, n, H, margin):
    "The release's retrieval triplet on a given pool: row 0 is the positive; pool logits, kept rows, logits with gradient, cost"
    with torch.no_grad(): pool = make(torch.arange(n))
    kept = 1 + top(H)(Candidates(pool[None,1:], torch.ones(1, n-1, dtype=torch.bool), None, None), None).idx[0]
    r = make(torch.cat([torch.zeros(1, dtype=torch.long), kept]))
    return pool, kept, r, synthetic(r[:1], r[None,1:], torch.ones(1, H, dtype=torch.bool), margin, squash=True)[0]


def gathered(model, tokens, regions, index, keep):
    "The release's way to join words and regions: rows of [padded words | regions] in a given order. Needed for its wrong orders only"
    s = model.stream; both = torch.cat([s.embeddings(tokens), regions], 1)
    x = both.gather(1, index[...,None].expand(-1, -1, both.shape[-1]))
    return model._score(s.run(x, keep.bool())[:,0])


def replay_pair(model, c, b, s, switch, drop, check):
    "One pair of one step: masked words, synthetic triplet, both retrieval triplets -> its loss"
    H, margin = c['H'], c['margin']
    cap, R = t(b['txt_input_ids'])[None], t(b['txt_num_regions'])
    seen = torch.arange(b['txt_img_feat'].shape[1]) < R[:,None]
    images = lambda: model.image(t(b['txt_img_feat']), seen, t(b['txt_img_pos_feat']))
    img = images()
    # masked words: one pass gives the loss and the law of the draws
    copies, labels = t(b['mlm_input_ids'])[None], t(b['mlm_txt_labels'])[None]; hit = labels != -1
    place, z = refill(model, img[:1], cap, copies, hit)
    mlm = mlm_loss(place, z, cap, copies.shape)[0]
    check('mlm_loss', mlm); K, L = copies.shape[1:]; draws = t(s['draw_ids'])
    never = None if switch.get('special', True) else torch.arange(c['vocab']) < c['word0']
    law = refill_law(z.detach(), c['temperature'], never); at = [(int(p)//L, int(p) % L) for p in place]
    same([law[i, draws[k,:,l]].numpy() for i, (k, l) in enumerate(at)], [s['draw_prob'][k,:,l] for k, l in at], what='draw_prob')
    # the pool of refilled captions
    made = fill(copies, hit, draws[None])
    check('syn_candidates', torch.cat([cap[:,None], made], 1)[0], 0)
    minus = penalty(torch.cat([cap[:,None], made], 1), cap)[0]
    check('syn_penalty', minus, 0); assert int((minus == 0).sum()) == int(s['syn_clean_count'])
    def score(rows): return model.pairs(img[:1].expand(len(rows), -1, -1), rows)
    positive = lambda: model.blind(img[:1], cap) if switch['blind'] else score(cap)
    with torch.no_grad(): raw = torch.cat([positive(), score(made[0])])
    check('syn_pool_logits', raw)
    if drop == 'penalty': adjusted, eligible = raw[1:] - minus[1:], torch.ones(1, len(made[0]), dtype=torch.bool)
    else:
        bad = suspects(made, cap[:,None], Lexicon.of([str(i) for i in range(c['vocab'])], {0}, c['mask'])); eligible = ~(bad['caption'] | bad['repeat'])
        adjusted = raw[1:].masked_fill(~eligible[0], -torch.inf)
    p = top(H)(Candidates(adjusted[None], eligible, None, None), None); kept = made[0][p.idx[0]]
    same(kept, s['syn_candidates'][s['syn_kept']], 0, 'kept rows')              # ties between equal rows are not ours to order
    neg = score(kept); check('syn_logits', torch.cat([positive(), neg]))
    syn = tags_terms(TagsTerms(synthetic=1., margin=margin), squash=True)['synthetic']({'syn': neg[None], 'syn.pos': positive(), 'syn.valid': p.valid}); check('syn_loss', syn)
    # a caption looks for its image; an image (of another loader) for its caption
    t2i = triplet(model, lambda k: model.pairs(img[k], cap.expand(len(k), -1)), len(img), H, margin)
    other = model.image(t(b['img_img_feat'])[None], torch.ones(1, len(b['img_img_feat']), dtype=torch.bool), t(b['img_img_pos_feat'])[None])
    texts, N = t(b['img_input_ids']), len(b['img_input_ids'])
    def i2t_score(k):
        if not switch['shift']: return model.pairs(other.expand(len(k), -1, -1), texts[k])
        return gathered(model, texts[k], other.expand(len(k), -1, -1), t(b['img_gather_index'])[k], t(b['img_attn_masks'])[k])
    i2t = triplet(model, i2t_score, N, H, margin)
    for name, (pool, rows, r, cost) in dict(t2i=t2i, i2t=i2t).items():
        check(f'{name}_pool_logits', pool); assert sorted(rows.tolist()) == sorted(s[f'{name}_kept'].tolist()), name
        check(f'{name}_loss', cost)
    return c['mlm_lambda']*mlm + c['nsgd_rank_lambda']*syn + i2t[3] + t2i[3]


def under(z, prefix): return {k[len(prefix):]: v for k, v in z.items() if k.startswith(prefix)}


def compare_step(model, rest, z, k, names, loss, norm, kind):
    same(loss, z[f'step/{k}/loss']); same(norm, z[f'step/{k}/grad_norm'], 1e-8)
    quiet = [i for i, n in enumerate(names) if NOISE not in n]
    same(sketch(to_uniter(model, rest, kind), names)[quiet], z[f'step/{k}/sketch'][quiet], 1e-8, 'sketch')


def stage1(name, steps=None, **change):
    "Replay; `change` turns switches"
    info, z = load(name); c = info['config']; switch = STAGE1[name] | {k: v for k, v in change.items() if k in ('blind', 'shift', 'special')}; drop = change.get('drop', 'penalty')
    model, rest = model_of(c, z, restart=change.get('restart', False)); opt, names = Published(model, c), z['sketch/names'].tolist()
    for k in range(steps or info['n_steps']):
        parts = []
        for a in range(c['accumulate']):
            s = under(z, f'step/{k}/{a}/')
            check = lambda key, got, tol=1e-9: same(got.detach(), s[key], tol, f'step {k}, pair {a}: {key}')
            parts.append(replay_pair(model, c, under(z, f'batch/{k}/{a}/'), s, switch, drop, check))
        loss = sum(parts)/len(parts); model.zero_grad(set_to_none=True); loss.backward()
        lr = warm_linear(k+1, c['lr'], c['warmup'], c['total']); same(lr, z[f'step/{k}/lr'], 1e-15)
        compare_step(model, rest, z, k, names, loss.item(), opt.step(lr), 'tags1')
    final = to_uniter(model, rest, 'tags1')
    if steps is None:
        for n, v in under(z, 'final/').items():
            if NOISE not in n: same(final[n].detach(), v, 1e-8, n)


def stage2(steps=None, restart=True, per='words', weights=None, labels='hit', floor=None):
    "Discrimination and correction on given sentences"
    info, z = load('tags_stage2_gd'); c = info['config']; model, rest = model_of(c, z, restart=restart); opt, names = Published(model, c), z['sketch/names'].tolist()
    floor = c['prob_floor'] if floor is None else floor
    terms = (discrimination_term(weight=c['disc_lambda'], weights=weights or tuple(c['class_weights_replaced_kept']), per=per, floor=floor),
             correction_term(weight=c['correction_lambda'], floor=floor))
    for k in range(steps or info['n_steps']):
        parts = []
        for a in range(c['accumulate']):
            b, s = under(z, f'batch/{k}/{a}/'), under(z, f'step/{k}/{a}/'); syn, gt = t(b['syn_input_ids']), t(b['gt_input_ids'])[None]
            hit = (t(b['syn_txt_labels']) != -1)[None] if labels == 'hit' else (syn != gt)[None]
            img = model.image(t(b['img_feat'])[None], torch.ones(1, len(b['img_feat']), dtype=torch.bool), t(b['img_pos_feat'])[None])
            states = model.tokens(img.expand(len(syn), -1, -1), syn)[None]
            named = {f'syn.{n}': v for n, v in _corrections(model, states, hit, gt, int(hit.sum(-1).max())).items()}
            named |= {'syn.hit': hit, 'syn.disc': model.stream.disc(states), 'syn.kept': (syn == gt)[None], 'syn.word': torch.ones_like(hit), 'syn.valid': torch.ones(1, len(syn), dtype=torch.bool)}
            disc, cor = (term(named) for term in terms); parts.append(disc + cor)
            at = f'step {k}, pair {a}: '
            same(named['syn.disc'][0].detach().softmax(-1), s['disc_p'], what=at + 'disc_p')
            same(disc.item()/c['disc_lambda'], s['disc_loss'], what=at + 'disc'); same(cor.item()/c['correction_lambda'], s['correction_loss'], what=at + 'cor')
            same(named['syn.cor'][0][hit[0]].detach(), s['correction_losses'], what=at + 'correction losses'); assert list(word_counts(named).values()) == s['counters'].tolist()
        loss = sum(parts)/len(parts); model.zero_grad(set_to_none=True); loss.backward()
        compare_step(model, rest, z, k, names, loss.item(), opt.step(warm_linear(k+1, c['lr'], c['warmup'], c['total'])), 'tags2')


@pytest.mark.parametrize('name', STAGE1)
def test_stage_one_replays(name): stage1(name)


def test_stage_two_replays(): stage2()


@pytest.mark.parametrize('name,change', [('tags_stage1_defect', dict(blind=False)), ('tags_stage1_released', dict(blind=False)), ('tags_stage1_repaired', dict(blind=True)),
                                         ('tags_stage1_released', dict(shift=False)), ('tags_stage1_defect', dict(drop='mask')),
                                         ('tags_stage1_repaired', dict(drop='mask')), ('tags_stage1_released', dict(drop='mask')), ('tags_stage1_repaired', dict(special=False))], ids=str)
def test_a_switch_turned_alone_breaks_stage_one(name, change):
    with pytest.raises(AssertionError): stage1(name, **change)


@pytest.mark.parametrize('change', [dict(per='weights'), dict(weights=(1., 1.)), dict(labels='changed'), dict(floor=.3)], ids=str)
def test_a_switch_turned_alone_breaks_stage_two(change):
    with pytest.raises(AssertionError): stage2(**change)


def test_the_start_of_stage_two():
    "The record's start is the release's: ranking, discrimination and correction are copies; starting once more changes nothing, and a trained head would be lost"
    info, z = load('tags_stage2_gd'); model, rest = model_of(info['config'], z); state = model.state_dict()
    assert torch.equal(state['rank.weight'], rest['itm_output.weight'][1:2]) and torch.equal(state['stream.disc.weight'], rest['itm_output.weight'])
    assert all(torch.equal(state[k], state[k.replace('.cor.', '.mlm.')]) for k in state if '.cor.' in k)
    _, z1 = load('tags_stage1_repaired'); last = {k[6:]: t(v) for k, v in z1.items() if k.startswith('final/')}
    kept, lost = CrossEncoder(**_sizes(info['config'])).double(), CrossEncoder(**_sizes(info['config'])).double(); from_uniter(kept, last); from_uniter(lost, last, restart=True)
    assert torch.equal(kept.rank.weight, last['rank_output.weight']) and not torch.equal(lost.rank.weight, last['rank_output.weight'])


def _sizes(c): return dict(n_words=c['vocab'], dim=c['hidden'], layers=c['layers'], heads=c['heads'], ffn=c['ffn'], longest=c['max_pos'], d_in=c['img_dim'], d_box=7, dropout=c['dropout'])
