"""Thirty training steps of the authors' own code, replayed with ours in float64: encoder outputs, scores, losses, gradients, clipping, every optimiser step, final weights.

Traces lie in tests/golden/traces, or in `traces/` of the folder named by ITM_GOLDEN; one that is in neither is skipped. What a trace's file calls a mistake is made on purpose, one at a time, and must be seen."""
import json
import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from itm_nb.methods.aoq import adaptive_weight, Quintuplet, quintuplet
from itm_nb.models.cross_attention import bfan, cross_attention, l2_normalize
from itm_nb.models.encoders import GRUTower, RegionTower
from itm_nb.models.vsrn import (
    caption_cost, caption_targets, Captioner, from_released, LastTower, released_name, to_released,
    VSRNTower)

torch.set_num_threads(1)
FOLDERS = [Path(x)/'traces' for x in (os.environ.get('ITM_GOLDEN'), Path(__file__).parents[1]/'golden') if x]
NAMES = ('scan_t2i', 'scan_i2t', 'bfan_equal', 'bfan_prob', 'vsrn', 'vsrn_coco', 'aoq_bfan', 'aoq_bfan_prob', 'aoq_vsrn', 'aoq_vsrn_coco')
SLACK = re.compile(r'Rs_GCN_\d+\.W\.(0\.bias|1\.running_mean)$')      # zero gradient but for rounding (a batch normalisation follows): own tolerance


@cache
def trace(name):
    at = next((f for f in FOLDERS if (f/f'{name}.npz').is_file()), None)
    if at is None: pytest.skip(f'golden block absent from the folder: traces/{name}')                # not kept in the repository, or not in that of ITM_GOLDEN
    with np.load(at/f'{name}.npz', allow_pickle=False) as z: data = {k: z[k] for k in z.files}
    return json.loads((at/f'{name}.json').read_text('utf-8')), data


class Replay:
    "One trace, step by step; `mistake` changes one rule"
    def __init__(self, name, mistake=''):
        about, self.z = trace(name); self.name, self.mistake, self.tol = name, mistake, about['tolerance']; self.c = c = about['config']
        self.vsrn, self.aoq = 'vsrn' in name, name.startswith('aoq')
        sizes = dict(d_in=c['img_dim'], dim=c['embed_size']); words = dict(n_words=c['vocab_size'], dim=c['embed_size'], d_word=c['word_dim'])
        if self.vsrn:
            f30k = c['data_name'].startswith('f30k'); over = 'features' if mistake == 'regions_of_unit_length' else 'regions'
            self.parts = dict(img_enc=VSRNTower(**sizes, final_norm=f30k, early_norm=not f30k, over=over), txt_enc=LastTower(**words),
                              caption_model=Captioner(c['vocab_size'], c['dim_vid'], c['dim_hidden'], c['dim_word'], c['input_dropout_p']))
        else:
            self.parts = dict(img_enc=RegionTower(**sizes), txt_enc=GRUTower(**words))
            if 'cross_attn' in c: self.score = cross_attention(f"scan_{c['cross_attn']}", sharp=c['lambda_softmax'], lse=c['lambda_lse'], agg=c['agg_func'], norm=c['raw_feature_norm'])
            else: self.score = bfan(c['focal_type'], c['lambda_softmax'])
        for k, m in self.parts.items(): from_released(m.double(), self.weights('init', k))
        self.params = {f'{k}.{released_name(m, n)}': p for k, m in self.parts.items() for n, p in m.named_parameters()}
        self.twice = [p for n, p in self.params.items() if n.startswith('caption_model.') and mistake != 'captioner_counted_once']
        ids = {id(p) for p in self.twice}
        self.opt = [torch.optim.Adam([p for p in self.params.values() if id(p) not in ids]), *([torch.optim.Adam(self.twice)] if self.twice else [])]

    def weights(self, when, part):
        head = f'{when}/{part}.'
        return {k[len(head):]: torch.from_numpy(np.array(v)) for k, v in self.z.items() if k.startswith(head)}

    def get(self, key): return torch.from_numpy(np.array(self.z[key]))

    def near(self, got, key, tol, mask=None):
        got, want = got.detach().double().numpy(), np.asarray(self.z[key], dtype=float)
        if mask is not None: got, want = got[mask], want[mask]
        np.testing.assert_allclose(got, want, rtol=0, atol=tol, err_msg=f'{self.name} {key}')

    # ---- encoding and scoring

    def image(self, x):      # -> what is scored, regions for the captioner
        num = torch.full((len(x),), x.shape[1])
        if not self.vsrn: return l2_normalize(self.parts['img_enc'].states(x)), None
        regions = self.parts['img_enc'].states(x, num)
        return F.normalize(self.parts['img_enc'].read(regions, num), dim=-1, eps=1e-300), regions

    def text(self, tokens, lengths):
        if self.vsrn: return F.normalize(self.parts['txt_enc'](tokens, lengths), dim=-1, eps=1e-300)
        return l2_normalize(self.parts['txt_enc'].states(tokens, lengths))

    def masks(self, img, txt, lengths): return img, torch.ones(img.shape[:2], dtype=torch.bool), txt, torch.arange(txt.shape[1]) < lengths[:,None]
    def matrix(self, img, txt, lengths): return img @ txt.T if self.vsrn else self.score.matrix(*self.masks(img, txt, lengths))
    def pairs(self, img, txt, lengths): return (img*txt).sum(1) if self.vsrn else self.score.pairs(*self.masks(img, txt, lengths))

    def evaluate(self, key):
        for m in self.parts.values(): m.eval()
        with torch.no_grad():
            lengths = self.get('eval/lengths'); S = self.matrix(self.image(self.get('eval/images'))[0], self.text(self.get('eval/captions'), lengths), lengths)
        for m in self.parts.values(): m.train()
        self.near(S, f'eval/{key}', self.tol['eval_scores_abs'])

    # ---- one step

    def encode(self, b):
        "Three passes of their own: batch statistics are those of each"
        groups = [('', 'images', 'captions', 'lengths')] + ([(s, f'images{s}', f'captions{s}', f'lengths{s}') for s in ('_off', '_off2')] if self.aoq else [])
        x = [[self.get(f'batch/{b}/{k}') for k in g[1:]] for g in groups]
        if self.mistake == 'three_passes_joined_in_one':
            image, regions = self.image(torch.cat([g[0] for g in x])); n = len(x[0][0]); images = [(image[k*n:(k+1)*n], regions[k*n:(k+1)*n]) for k in range(3)]
        else: images = None
        return {g[0]: ((images[k] if images else self.image(i)), self.text(t, n), n) for k, (g, (i, t, n)) in enumerate(zip(groups, x))}

    def loss(self, t, check):
        b = int(self.z[f'step/{t}/batch']); e = self.encode(b); (img, regions), txt, n = e['']
        S = self.matrix(img, txt, n); own = torch.eye(len(S), dtype=torch.bool)
        if self.mistake == 'same_image_captions_masked': i = self.get(f'batch/{b}/image_index'); own = i[:,None] == i
        on = dict(i2t=S.masked_fill(own, -torch.inf).max(1).values, t2i=S.masked_fill(own, -torch.inf).max(0).values); pos = S.diagonal(); named = dict(scores=S)
        if self.aoq:
            (i3, _), t3, n3 = e['_off']; (i4, _), t4, n4 = e['_off2']
            off = dict(i2t=self.pairs(img, t3, n3), t2i=self.pairs(i3, txt, n)); apart = dict(i2t=self.pairs(i3, t3, n3), t2i=self.pairs(i4, t4, n4))
            ok = self.get(f'batch/{b}/I3') != self.get(f'batch/{b}/I4') if self.mistake == 'pairs_with_I3_equal_I4_masked' else None
            w = dict(alpha=self.c['alpha'], beta=self.c['beta']); how = Quintuplet(self.c['marginonline'], self.c['marginoffline'], **w)
            parts = {s: quintuplet(pos, on[s], off[s], apart[s], how, unanchored_valid=ok, detach=self.mistake == 'detached_weights') for s in on}
            named |= dict(pos=pos, unanch_33=apart['i2t'], unanch_44=apart['t2i'], term_unanch_33=parts['i2t']['unanchored'], term_unanch_44=parts['t2i']['unanchored'])
            for s in on: named |= {f's_on_{s}': on[s], f'off_{s}': off[s], f'weight_{s}': adaptive_weight(on[s], off[s], **w), f'term_off_{s}': parts[s]['offline']}
        else:
            how = Quintuplet(self.c['margin'])
            parts = {s: quintuplet(pos, on[s], pos, pos, how, stage='online') for s in on}
        named |= {f'term_on_{s}': parts[s]['online'] for s in on}; loss = sum(v.sum() for p in parts.values() for v in p.values())
        if self.vsrn:
            labels, keep = self.get(f'batch/{b}/caption_labels'), self.get(f'batch/{b}/caption_masks') > 0
            if self.mistake == 'mask_ends_with_the_sentence': keep = caption_targets(self.get(f'batch/{b}/captions'), n, self.c['max_len'], one_more=False)[1]
            said = caption_cost(self.parts['caption_model'], regions, torch.full((len(S),), regions.shape[1]), labels, keep, self.c['max_len'] - 1).sum() / len(S)
            named |= dict(loss_retrieval=loss, loss_caption=said); loss = loss + said
        if check:
            if t == 0: self.first(e, regions, b)
            tol = self.tol['step0_abs'] if t == 0 else self.tol['scores_abs']
            for k, v in named.items(): self.near(v, f'step/{t}/{k}', tol if 'loss' not in k else self.tol['loss_abs'])
        return loss

    def first(self, e, regions, b):
        "Encoder outputs of the first step"
        tol = self.tol['step0_abs']
        for s, ((img, r), txt, _) in e.items():
            self.near(img, f'step/0/img_emb{s}', tol)
            if f'step/0/cap_emb{s}' in self.z: self.near(txt, f'step/0/cap_emb{s}', tol)
            if r is not None: self.near(r, f'step/0/region_emb{s}', tol)
        if self.vsrn:
            words = self.get(f'batch/{b}/caption_labels')[:,:self.c['max_len']-1]
            self.near(self.parts['caption_model'](regions, torch.full((len(regions),), regions.shape[1]), words), 'step/0/caption_logprobs', tol)

    def step(self, t, check=True):
        loss = self.loss(t, check)
        for p in self.params.values(): p.grad = None
        loss.backward()
        if check: self.grads(t, loss)
        unique = torch.stack([p.grad.norm() for p in self.params.values()]).square().sum()
        norm = (unique + sum(p.grad.square().sum() for p in self.twice)).sqrt(); factor = min(1., float(self.c['grad_clip'] / (norm + 1e-6)))
        for p in self.params.values(): p.grad *= factor
        for p in self.twice: p.grad *= factor                                # once more, and two steps with it: the release lists these twice
        if check:
            self.near(norm, f'step/{t}/grad_norm', self.tol['grad_norm_abs']); self.near(unique.sqrt(), f'step/{t}/grad_norm_unique', self.tol['grad_norm_abs'])
        for opt in self.opt:
            for g in opt.param_groups: g['lr'] = float(self.z[f'step/{t}/lr'])
        for opt in [*self.opt, *self.opt[1:]]: opt.step()
        if check: self.after(t)
        return loss.item()

    def sketch(self, of):
        rows = []
        for name, at in zip(self.z['meta/param_names'], self.z['meta/sketch_indices']):
            x = of(self.params[str(name)]).detach().flatten(); rows.append(torch.cat([torch.stack([x.sum(), x.square().sum()]), x[torch.from_numpy(at)]]))
        return torch.stack(rows)

    def firm(self): return np.array([not SLACK.search(str(n)) for n in self.z['meta/param_names']])

    def grads(self, t, loss):
        self.near(loss, f'step/{t}/loss', self.tol['loss_abs']); self.near(self.sketch(lambda p: p.grad), f'step/{t}/grad_sketch', self.tol['sketch_abs'], self.firm())
        if t == 0:
            for k, p in self.params.items(): self.near(p.grad.reshape(self.z[f'step/0/grad/{k}'].shape), f'step/0/grad/{k}', self.tol['step0_abs'])

    def after(self, t):
        self.near(self.sketch(lambda p: p), f'step/{t}/sketch', self.tol['sketch_abs'], self.firm())
        if f'step/{t}/buffers' not in self.z: return
        now = {f'{k}.{n}': v for k, m in self.parts.items() for n, v in to_released(m).items()}
        for n, want in zip(self.z['meta/buffer_names'], np.split(self.z[f'step/{t}/buffers'], np.cumsum(self.z['meta/buffer_sizes'])[:-1])):
            tol = self.tol['null_directions_abs'] if SLACK.search(str(n)) else self.tol['sketch_abs']
            np.testing.assert_allclose(now[str(n)].double().numpy().reshape(-1), want, rtol=0, atol=tol, err_msg=f'{n} after step {t}')

    def last(self):
        for part, m in self.parts.items():
            got, want = to_released(m), self.weights('final', part); assert set(got) == set(want)
            for k in want: self.near(got[k], f'final/{part}.{k}', self.tol['null_directions_abs'] if SLACK.search(k) else self.tol['final_params_abs'])
        state = {id(p): s for opt in self.opt for p, s in opt.state.items()}
        for row, k in enumerate(('exp_avg', 'exp_avg_sq')):
            got = self.sketch(lambda p: state[id(p)][k])
            want = np.stack([self.z[f'final_adam/{n}'][row] for n in self.z['meta/param_names']])
            np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=self.tol['sketch_abs'], err_msg=k)
        for opt, n in zip(self.opt, (1, 2)): assert all(int(s['step']) == n*len(self.z['order']) for s in opt.state.values())


@pytest.mark.parametrize('name', NAMES)
def test_thirty_steps(name):
    r = Replay(name); r.evaluate('scores_init')
    for t, b in enumerate(r.z['order']): assert int(r.z[f'step/{t}/batch']) == b; r.step(t)
    r.evaluate('scores_final'); r.last()


OURS = dict(vsrn=('regions_of_unit_length', 'mask_ends_with_the_sentence'), vsrn_coco=('regions_of_unit_length', 'mask_ends_with_the_sentence'))
MADE = ('captioner_counted_once', 'detached_weights', 'three_passes_joined_in_one', 'pairs_with_I3_equal_I4_masked', 'same_image_captions_masked')


@pytest.mark.parametrize('name', NAMES)
def test_each_mistake_is_seen(name):
    "Every rule of `faithful`, turned off alone, breaks the trace - at the step the file says, where it says one"
    about, z = trace(name); told = about['mistakes_it_catches']; made = [k for k in told if k in MADE] + list(OURS.get(name, ())); assert made
    for mistake in made:
        r, limit = Replay(name, mistake), told.get(mistake, {}).get('first_step_beyond_loss_tolerance', 3)
        off = [abs(r.step(t, check=False) - float(z[f'step/{t}/loss'])) > r.tol['loss_abs'] for t in range(limit + 1)]
        assert any(off), mistake
        if mistake in told: assert off.index(True) == limit, mistake


@pytest.mark.parametrize('name', ('bfan_prob', 'aoq_vsrn'))
def test_a_changed_number_is_seen(name):
    "Arrays of the first step, each changed by a millionth in one place"
    _, z = trace(name); keys = [k for k in z if re.match(r'step/0/(?!batch|epoch|lr|grad_norm_after)', k)]; assert len(keys) > 15
    for k in keys[::1 if name == 'bfan_prob' else 4]:
        r = Replay(name); r.z = dict(z); x = np.array(z[k], dtype=float); x.flat[0] += 1e-6; r.z[k] = x
        with pytest.raises(AssertionError): r.step(0)


@pytest.mark.parametrize('name', [n for n in NAMES if 'vsrn' in n])
def test_caption_targets(name):
    "Labels and masks of the captioner from the captions themselves"
    about, z = trace(name)
    for b in range(5):
        labels, keep = caption_targets(torch.from_numpy(z['data/captions'])[torch.from_numpy(z[f'batch/{b}/caption_index'])],
                                       torch.from_numpy(z[f'batch/{b}/lengths']), about['config']['max_len'])
        assert np.array_equal(labels, z[f'batch/{b}/caption_labels']) and np.array_equal(keep, z[f'batch/{b}/caption_masks'] > 0)


@pytest.mark.parametrize('name', [n for n in NAMES if n.startswith('aoq')])
def test_offline_ids(name):
    "The four offline ids follow from the lists and the two draws, as `offline_mining.Draw` has them"
    from itm_nb.methods import offline_mining
    about, z = trace(name); own = torch.arange(z['cand/t2i'].shape[0]) // 5; h = about['config']['offcandisize']
    lists = {s: offline_mining.Lists(z[f'cand/{s}'], None) for s in ('i2t', 't2i')}
    for b in range(5):
        cap = torch.from_numpy(z[f'batch/{b}/caption_index']); u = torch.from_numpy(np.stack([(z[f'batch/{b}/draw_n'] + .5)/h]*2 + [(z[f'batch/{b}/draw_r'] + .5)/5], 1))
        with pytest.MonkeyPatch.context() as m:
            m.setattr(offline_mining, 'uniform', lambda *a, **k: u)
            got = offline_mining.Draw(lists, own, h, h//5)(cap)
        for k, v in got.items(): assert np.array_equal(v, z[f'batch/{b}/{k}']), k
