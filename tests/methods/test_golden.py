"""Numbers computed with the authors' own code, kept in tests/golden (or in the folder named by ITM_GOLDEN: same names and fields, other values and shapes).

One registry says what happens to every block of every file: a check, `Pending` (a later part of the project brings it), or `Warn` (a recorded defect,
not a target; it is checked against the right value beside it). A block that is not registered is an error."""
import copy
import json
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_nb.core.errors_files import DataError
from itm_nb.metrics.ranks import by_gallery, in_galleries, mean_summary, Ranks, ranks_of, summary
from itm_nb.metrics.relevance import many_positives, match_summary
from itm_nb.models.cross_encoder import UNITER, CrossEncoder, from_uniter, to_uniter
from itm_nb.methods.generator import (
    fill, Lexicon, mask_copies, members, pack, penalty, refill_law, suspects, unit_law)
from itm_nb.methods.losses import hinge, triplet_term
from itm_nb.methods.samplers import Candidates, top
from itm_nb.methods.tags_dc import (
    PRESETS, discrimination, mean_where, synthetic, tags_terms, TagsTerms, warm_linear, word_counts,
    word_loss)

torch.set_num_threads(1)
HOME = Path(__file__).parents[1]/'golden'
FOLDER = Path(os.environ.get('ITM_GOLDEN') or HOME)             # conftest.py refuses one that has nothing of all this
ABSENT = 'golden block absent from the folder:'
PROSE = {'_description', '_about', '_fields', 'description', 'vocabulary_note', 'reading_note', 'uniter_tags_outer'}


@dataclass(frozen=True)
class Check:
    check: object             # block -> None, raises AssertionError
    inputs: tuple = ()        # fields that are given, not computed: changing one need not fail the check


@dataclass(frozen=True)
class Warn(Check):
    reason: str = ''


@dataclass(frozen=True)
class Pending:
    reason: str


def near(got, want, tol=1e-9):
    np.testing.assert_allclose(np.asarray(got, dtype=float), np.asarray(want, dtype=float), rtol=0, atol=tol)


def array(x): return np.array(x, dtype=np.float64)


# ---- metrics.json ---------------------------------------------------------------------------------------------------------------------------

def same_summary(got, want):
    "Every number of a golden row: recalls, medr, meanr and, where given, rsum"
    for d in ('i2t', 't2i'):
        for k, v in want[d].items():
            if k != 'ranks': near(got[d][k], v)
    if 'rsum' in want: near(got['rsum'], want['rsum'])


def check_matrices(block):
    assert block
    for m in block:
        S, img_of = array(m['sims']), np.repeat(np.arange(len(m['captions_per_image'])), m['captions_per_image'])
        assert S.shape == (m['n_images'], m['n_captions'])
        tied = any(len(set(line)) < len(line) for line in [*S.tolist(), *S.T.tolist()])
        assert tied == m['has_ties']
        for rule in ('official', 'pessimistic', 'optimistic'):
            want = m[rule]
            if not want: assert rule == 'official'; continue
            for blocks in ({}, dict(rows=2, cols=3)):
                r = ranks_of(S, img_of, ties='pessimistic' if rule == 'official' else rule, tie=0, **blocks)
                same_summary(summary(r), want)
                for d in ('i2t', 't2i'): assert getattr(r, d).tolist() == want[d]['ranks']


def check_five_fold(block):
    S, size = array(block['sims']), block['fold_size_images']
    N, M = S.shape; assert (N, M) == (block['n_images'], block['n_captions'])
    img_of, fold = np.arange(M) // (M//N), np.arange(N) // size
    same_summary(summary(ranks_of(S, img_of, tie=0)), block['full_matrix'])
    r = in_galleries(lambda i, j, own: ranks_of(S[i][:,j], own, tie=0), img_of, fold)
    rows = by_gallery(r, img_of, fold)
    assert len(rows) == len(block['folds'])
    for got, want in zip(rows, block['folds']): same_summary(got, want)
    mean, want = mean_summary(rows), block['mean_over_folds']
    same_summary(mean, want)
    for d in ('i2t', 't2i'): near(np.mean([mean[d][k] for k in ('r1', 'r5', 'r10')]), want[f'average_recall_{d}'])


def check_eccv(block):
    assert block
    for case in block:
        ids = dict(i2t=(case['image_ids'], case['caption_ids']), t2i=(case['caption_ids'], case['image_ids']))
        S = array(case['sims'])
        given, order = {}, {}
        for d, (queries, items) in ids.items():
            q, k = ({str(x): n for n, x in enumerate(xs)} for xs in (queries, items))
            given[d] = {q[a]: [k[str(b)] for b in v] for a, v in case[f'gt_{d}'].items()}
            order[d] = {q[a]: [k[str(b)] for b in v] for a, v in case[f'retrieved_{d}'].items()}
            for a, found in order[d].items(): assert found == np.argsort(-(S if d == 'i2t' else S.T)[a]).tolist()
        got = many_positives(S, given, tie=0)
        means = match_summary(got)
        for d, want in case['official'].items():
            m, mean = got[d], means[d]
            near(mean['map_r'], 100*want['map_at_r']); near(mean['rp'], 100*want['r_precision']); near(mean['r1'], 100*want['r1'])
            for k in (1, 5, 10): near(mean[f'r{k}'], 100*want[f'recall_at_{k}'])
            at = {int(q): n for n, q in enumerate(m.query)}
            assert len(want['per_query']) == len(m.query) and m.dropped == len(ids[d][0]) - len(m.query)
            for row, q in zip(want['per_query'], given[d]):
                n = at[q]; assert str(row['query']) == str(ids[d][0][q]) and row['R'] == m.R[n] and row['r1'] == (m.first[n] == 0)
                near(m.ap[n], row['average_precision_at_r']); near(m.rp[n], row['r_precision'])


# ---- scan.json ------------------------------------------------------------------------------------------------------------------------------

def check_gpo(block):
    from itm_nb.models.encoders import GPO
    assert block
    for case in block:
        gpo = GPO(case['d_pe'], case['d_hidden']).double()
        w = {k: torch.tensor(v, dtype=torch.float64) for k, v in case['weights'].items()}
        gpo.gru.load_state_dict({k.removeprefix('gru_'): v for k, v in w.items() if k.startswith('gru_')})
        gpo.linear.load_state_dict(dict(weight=w['linear_weight']))
        x = torch.tensor(case['features'], dtype=torch.float64, requires_grad=True); lengths = torch.tensor(case['lengths'])
        pooled = gpo(x, lengths)
        near(pooled.detach(), case['pooled'])
        near(gpo.weights(lengths, x.shape[1]).detach()[:,:len(case['pool_weights'][0])], case['pool_weights'])
        (grad,) = torch.autograd.grad((pooled * torch.tensor(case['upstream_gradient'], dtype=torch.float64)).sum(), x)
        near(grad, case['grad_features'])
        table = array(case['positional_encoding_float64']); p = np.arange(len(table))[:,None] / 10000**(np.arange(0, case['d_pe'], 2)/case['d_pe'])
        near(table[:,0::2], np.sin(p)); near(table[:,1::2], np.cos(p))
        near(pooled.detach(), case['pooled_released_float32_positions'], 1e-4)          # for information: their table is fp32
        near(array(case['pool_weights']), case['pool_weights_released_float32_positions'], 1e-4)


def check_scan(block):
    from itm_nb.models.cross_attention import CrossAttention, Side
    images, captions = torch.tensor(block['images'], dtype=torch.float64), torch.tensor(block['captions'], dtype=torch.float64)
    mask = torch.arange(captions.shape[1]) < torch.tensor(block['caption_lengths'])[:,None]
    whole = torch.ones(images.shape[:2], dtype=torch.bool); up = torch.tensor(block['upstream_gradient'], dtype=torch.float64)
    assert block['cases']
    for case in block['cases']:
        score = CrossAttention((Side(dict(t2i='text', i2t='image')[case['direction']], case['lambda_softmax'], case['agg_func'], case['lambda_lse'], case['raw_feature_norm']),))
        for size in (2**18, 7):
            a, b = images.clone().requires_grad_(), captions.clone().requires_grad_()
            S = score.matrix(a, whole, b, mask, size)
            near(S.detach(), case['scores']); ga, gb = torch.autograd.grad((S*up).sum(), (a, b))
            near(ga, case['grad_images']); near(gb, case['grad_captions'])
        n = min(len(images), len(captions))
        near(score.pairs(images[:n], whole[:n], captions[:n], mask[:n]), S.detach().diagonal())


def check_reasoning(block):
    from itm_nb.models.vsrn import Reasoning
    assert block
    for case in block:
        v = torch.tensor(case['input'], dtype=torch.float64, requires_grad=True); out, up = v, torch.tensor(case['upstream_gradient'], dtype=torch.float64)
        assert len(case['blocks']) == case['n_blocks']
        junk = torch.nn.functional.pad(v, (0, 0, 0, 2)); keep = torch.arange(v.shape[1] + 2).expand(len(v), -1) < v.shape[1]      # padding changes nothing
        for b in case['blocks']:
            w = {k: torch.tensor(x, dtype=torch.float64) for k, x in b.items()}
            assert w['g_weight'].shape == (case['inter_channels'], v.shape[2])
            m = Reasoning(v.shape[2], case['inter_channels'], case['batch_norm']).double().eval()
            m.load_state_dict({f'{k}.{p}': w[f'{k}_{p}'] for k in ('g', 'theta', 'phi', 'W') for p in ('weight', 'bias')} |
                              ({f'norm.{p}': w[f'bn_{p}'] for p in ('weight', 'bias', 'running_mean', 'running_var')} if case['batch_norm'] else {}), strict=False)
            if case['batch_norm']: m.norm.eps = b['bn_eps']
            out, junk = m(out, keep[:,:-2]), m(junk, keep)
        near(out.detach(), case['output']); near(junk[:,:-2].detach(), case['output'])
        near(torch.autograd.grad((out*up).sum(), v)[0], case['grad_input'])


# ---- aoq.json -------------------------------------------------------------------------------------------------------------------------------

def check_aoq_evaluation(block):
    S = array(block['sims']); N, M = S.shape
    r = ranks_of(S, np.arange(M) // (M//N), tie=0)
    same_summary(summary(r), block)
    assert r.i2t.tolist() == block['i2t_ranks'] and r.t2i.tolist() == block['t2i_ranks']


def check_bfan(block):
    from itm_nb.models.cross_attention import bfan, l2_normalize
    images, captions = (l2_normalize(torch.tensor(block[f'{k}_raw'], dtype=torch.float64)) for k in ('images', 'captions'))
    mask = torch.arange(captions.shape[1]) < torch.tensor(block['caption_lengths'])[:,None]
    given = images, torch.ones(images.shape[:2], dtype=torch.bool), captions, mask
    assert {r['focal_type'] for r in block['results']} == {'equal', 'prob'}
    for r in block['results']:
        score = bfan(r['focal_type'], r['lambda_softmax'])
        near(score.matrix(*given), r['scores']); near(score.pairs(*given), r['diagonal_by_offline_fn'])


def aoq_sides(S, o1, o2, u3, u4, hyper, **kw):
    "Both directions of the released loss, every row of the batch taken for another image (as released: only the diagonal is left out)"
    from itm_nb.methods.aoq import adaptive_weight, Quintuplet, quintuplet
    from itm_nb.methods.losses import hinge
    hyper = {k: float(v) for k, v in hyper.items()}
    own = torch.eye(len(S), dtype=torch.bool); out = {}
    for side, M, off, apart in (('i2t', S, o1, u3), ('t2i', S.T, o2, u4)):
        on, at = M.masked_fill(own, -torch.inf).max(1); k = dict(alpha=hyper['alpha'], beta=hyper['beta'])
        how = Quintuplet(hyper['margin_online'], hyper['margin_offline'], **k)
        parts = quintuplet(S.diagonal(), on, off, apart, how, **kw)
        out[side] = parts, dict(hard=at, s_on=on, hinge_on=hinge(S.diagonal(), on, hyper['margin_online']), weight=adaptive_weight(on, off, **k))
    return out


def same_parts(sides, want):
    hard = dict(i2t='hard_caption_index', t2i='hard_image_index')
    for side, (parts, by) in sides.items():
        assert by['hard'].tolist() == want[hard[side]]
        for k in ('s_on', 'hinge_on', 'weight'): near(by[k].detach(), want[f'{k}_{side}'])
        for theirs, ours in (('on', 'online'), ('off', 'offline')): near(parts[ours].detach(), want[f'term_{theirs}_{side}'])
        near(parts['unanchored'].detach(), want['term_unanch_' + dict(i2t='33', t2i='44')[side]])


def total(sides): return sum(v.sum() for parts, _ in sides.values() for v in parts.values())


def check_aoq_loss(block):
    from itm_nb.methods.aoq import adaptive_weight
    from itm_nb.methods.losses import hinge
    assert block
    for case in block:
        given = [torch.tensor(case[k], dtype=torch.float64, requires_grad=True) for k in ('S', 'off_i2t', 'off_t2i', 'unanch_33', 'unanch_44')]
        hyper = {k: v for k, v in case['hyper'].items() if k != 'max_violation'}; S = given[0]; pos = S.diagonal()
        if case['hyper']['max_violation']:
            sides = aoq_sides(*given, hyper); loss = total(sides)
            near(pos.detach(), case['parts']['pos']); same_parts(sides, case['parts'])
        else:      # documented, not a target: the weights of the images multiply the columns
            own, kw = torch.eye(len(S), dtype=torch.bool), dict(alpha=hyper['alpha'], beta=hyper['beta']); rest = S.masked_fill(own, -torch.inf)
            w = [adaptive_weight(rest.max(d).values, o, **kw) for d, o in ((1, given[1]), (0, given[2]))]
            loss = sum((hinge(p, S, hyper['margin_online']).masked_fill(own, 0.)*v).sum() for p, v in ((pos[:,None], w[0]), (pos, w[1])))
            loss = loss + sum(hinge(pos, x, hyper['margin_offline']).sum() for x in given[1:])
        near(loss.item(), case['loss'])
        for g, k in zip(torch.autograd.grad(loss, given), ('S', 'off_i2t', 'off_t2i', 'unanch_33', 'unanch_44')): near(g, case['grad'][k])
        if (want := case.get('grad_if_weights_were_detached_NOT_OFFICIAL')):
            for g, k in zip(torch.autograd.grad(total(aoq_sides(*given, hyper, detach=True)), given), ('S', 'off_i2t', 'off_t2i', 'unanch_33', 'unanch_44')):
                if k in want: near(g, want[k])


def check_aoq_vectors(block):
    x = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in block['inputs'].items()}
    def pairs(a, b): return (x[a]*x[b]).sum(1)
    given = dict(S=x['im'] @ x['s'].T, off_i2t=pairs('im', 's_off'), off_t2i=pairs('im_off', 's'), unanch_33=pairs('im_off', 's_off'), unanch_44=pairs('im_off2', 's_off2'))
    assert block['hyper']['max_violation']
    for k, v in block['similarities'].items(): near(given[k].detach(), v)
    sides = aoq_sides(*given.values(), {k: v for k, v in block['hyper'].items() if k != 'max_violation'}); loss = total(sides)
    near(given['S'].diagonal().detach(), block['parts']['pos']); same_parts(sides, block['parts']); near(loss.item(), block['loss'])
    for k, g in zip(x, torch.autograd.grad(loss, list(x.values()))): near(g, block['grad'][k])


def check_mining(block):
    from itm_nb.methods.offline_mining import mine
    img, txt = (torch.tensor(block[f'{k}_embeddings'], dtype=torch.float32) for k in ('image', 'caption'))
    me, own = torch.arange(len(img)), torch.arange(len(txt)) // (len(txt)//len(img))
    for how, blocks in (('torch', {}), ('torch', dict(rows=3, cols=4)), ('faiss', {})):
        for q, k, a, b, want in ((img, txt, me, own, block['i2t_candidates']), (txt, img, own, me, block['t2i_candidates'])):
            assert mine(q, k, a, b, len(want[0]), how=how, **blocks)[0].idx.tolist() == want


# ---- state_dicts.json: names and shapes of the authors' checkpoints ---------------------------------------------------------------------------

def check_released(block):
    "Models built (without memory) with the sizes of the file have every key of the release, in shape and number, and no other"
    from itm_nb.models.encoders import GRUTower, RegionTower
    from itm_nb.models.vsrn import Captioner, LastTower, to_released, VSRNTower
    files = {k: {name: (tuple(shape), kind) for name, shape, kind in block[k]} for k in ('img_enc', 'txt_enc', 'caption_model') if k in block}
    (dim, d_in), (n_words, d_word) = files['img_enc']['fc.weight'][0], files['txt_enc']['embed.weight'][0]
    vsrn = 'img_rnn.weight_ih_l0' in files['img_enc']
    with torch.device('meta'):
        ours = dict(img_enc=VSRNTower(d_in, dim, final_norm='bn.weight' in files['img_enc'], early_norm='bn.weight' not in files['img_enc']) if vsrn else RegionTower(d_in, dim),
                    txt_enc=(LastTower if vsrn else GRUTower)(n_words, dim, d_word))
        if 'caption_model' in files:
            (d_hid, d_reg), (n_out, d_say) = (files['caption_model'][k][0] for k in ('encoder.vid2hid.weight', 'decoder.embedding.weight'))
            ours['caption_model'] = Captioner(n_out, d_reg, d_hid, d_say)
    assert set(files) == set(block['float_values']) == set(ours) <= set(block['outer']['model'])
    for part, module in ours.items():
        got = {k: (tuple(v.shape), str(v.dtype).removeprefix('torch.')) for k, v in to_released(module).items()}
        assert got == files[part]
        assert sum(v.numel() for v in to_released(module).values() if v.is_floating_point()) == block['float_values'][part]


@lru_cache(4)
def without_memory(config):
    "A model of this description without any numbers in it; made once"
    from itm_nb.models.factory import model_of
    with torch.device('meta'): return model_of(json.loads(config))


def through(kind, shapes):
    "Tensors of these shapes (without memory) through our model and back: (model, what is kept beside it); every name in its place, shape, type and order"
    from itm_nb.models.released_checkpoints import described, give, take
    with torch.device('meta'):
        states = [{k: torch.empty(s, dtype=getattr(torch, t)) for k, (s, t) in part.items()} for part in shapes]
        model = without_memory(json.dumps(described(states, kind))); beside = take(model, states, kind); back = give(model, beside, kind)
    assert [{k: (list(v.shape), str(v.dtype).removeprefix('torch.')) for k, v in s.items()} for s in back] == [{k: (list(s), t) for k, (s, t) in part.items()} for part in shapes]
    return model, beside, len(model.state_dict()) + len(beside['released']) + len(beside['memory'])


def check_vse(block):
    "All names of the file have a place: in our model, or beside it where no forward pass reaches"
    shapes = [{k.removeprefix('module.'): (s, t) for k, s, t in block[part]} for part in ('img_enc', 'txt_enc')]
    assert all(k.startswith('module.') for part in ('img_enc', 'txt_enc') for k, *_ in block[part])
    _, beside, n = through('vse_infinity', shapes)
    assert n == sum(map(len, shapes)) and all(re.match(r'0\.mlp\.bns\.1|1\.bert\.pooler', k) for k in beside['released'])
    for part, one in zip(('img_enc', 'txt_enc'), shapes):
        assert sum(int(np.prod(s)) for s, t in one.values() if t == 'float32') == block['float_values'][part]


def check_fne_keys(block):
    "The same for FNE; the slow copies and the memory become the state of a `Bank`"
    from itm_nb.methods.memory_bank import Bank
    model, beside, n = through('fne', [dict(block['keys'])])
    assert n - 1 == len(block['keys']) == block['counts']['keys'] and 'ring.caps' in beside['memory'] and model.config['text']['net']['vocab_size'] == 30522
    size = lambda names: sum(v.numel() for v in names.values() if v.is_floating_point())
    rest = beside['released']; slow = {k: k.replace('_encoder_m.', '_encoder.') for k in rest if '_encoder_m.' in k}
    assert slow and all(rest[k].shape == rest[v].shape for k, v in slow.items())
    for tower, name in (('image', 'visual'), ('text', 'text')):
        pooler = {k: v for k, v in beside['released'].items() if k.startswith(f'0.{name}_encoder.')}
        own = {k: v for k, v in model.state_dict().items() if k.startswith(f'{tower}_tower')}
        assert size(own | pooler) == block['counts'][f'parameters_one_{tower}_encoder']
    assert beside['memory'].keys() == {f'copy.{k}' for k in model.state_dict()} | {f'ring.{k}' for k in ('images', 'texts', 'ids', 'caps', 'place')}
    bank = Bank(beside['memory']['ring.ids'].shape[0])
    assert bank.ring.size == block['config']['queue'] and beside['memory']['ring.images'].shape == (bank.ring.size, 768)
    assert sum(block['counts'][f'parameters_one_{k}_encoder'] for k in ('image', 'text')) == block['counts']['trainable_parameters']


# ---- tags.json ------------------------------------------------------------------------------------------------------------------------------

def tags_ranks(block):
    "Ranks in both directions"
    S = array(block['score_matrix_text_by_image']).T
    return ranks_of(S, np.arange(S.shape[1]) // block['captions_per_image'], tie=0)


def tags_recalls(block):
    "Shares in the authors' names: txt_r* = an image looks for text, img_r* = a text looks for its image"
    s = summary(tags_ranks(block))
    return {f'{a}_{k}': s[d][k]/100 for a, d in (('txt', 'i2t'), ('img', 't2i')) for k in ('r1', 'r5', 'r10')}


def check_tags_recall(block):
    got = tags_recalls(block)
    assert set(block['right']) == set(got)
    for k, v in block['right'].items(): near(got[k], v)


def spurious(ranks, k):
    "Hits that are none: the evaluator counts the row numbers below k of all texts that find their image among the first ten, as if they were ranks"
    return int((ranks[:k] < 10).sum())


def check_tags_published(block):
    "Their image-to-text shares are right; a text-to-image share is too large by as many spurious hits as the data give, at most min(k, texts)"
    got, bad, t2i = tags_recalls(block), block['published_evaluator'], tags_ranks(block).t2i
    for k in (1, 5, 10):
        near(bad[f'txt_r{k}'], got[f'txt_r{k}'])
        near(bad[f'img_r{k}'] - spurious(t2i, k)/len(t2i), got[f'img_r{k}']); near(block['right'][f'img_r{k}'], got[f'img_r{k}'])
    for a in ('txt', 'img'): near(bad[f'{a}_r_mean'], np.mean([bad[f'{a}_r{k}'] for k in (1, 5, 10)]))
    near(bad['r_mean'], np.mean([bad['txt_r_mean'], bad['img_r_mean']]))


def check_tags_gather(block):
    "Right: regions start behind the LONGEST text. Released: behind the length of the last text, so earlier rows read padding or words as regions"
    n, R = block['text_lengths'], block['regions']; L = max(n)
    def rows(start): return [[*range(k), *range(start, start+R), *range(k+R, L+R)] for k in n]
    assert block['right'] == rows(L)
    assert block['released'] == rows(n[-1])
    if n[-1] != L: assert block['released'] != block['right']


def check_tags_hard5(block):
    "More negatives asked for than clean ones there are: the release fills up with penalised rows; the repair stops at the clean ones"
    ids, logit = [tuple(x) for x in block['pool_ids']], array(block['pool_logits'])
    equal, later = np.array([x == ids[0] for x in ids]), np.array([x in ids[n+1:] for n, x in enumerate(ids)])
    near(3*equal, block['penalty_equal_gt']); near(2*later, block['penalty_duplicate'])
    near(logit - 3*equal - 2*later, block['adjusted_scores'])
    clean = [n for n in range(1, len(ids)) if not equal[n] and not later[n]]
    right = sorted(clean, key=lambda n: -logit[n])[:block['hard_size']]
    took = block['selected_indices']
    assert len(clean) == block['effective_number'] and [list(ids[n]) for n in took] == block['selected_ids']
    assert len(took) == block['hard_size'] > len(right) and set(right) < set(took) and sorted(took, key=lambda n: -array(block['adjusted_scores'])[n]) == took
    worst = min(array(block['adjusted_scores'])[took]); assert all(array(block['adjusted_scores'])[n] <= worst for n in range(1, len(ids)) if n not in took)


# ---- fne.json -------------------------------------------------------------------------------------------------------------------------------

from itm_nb.methods import fne                                                  # noqa: E402
from itm_nb.methods.memory_bank import Bank, Momentum, Ring                          # noqa: E402
from itm_nb.methods.samplers import Step, DirectedStep                                  # noqa: E402
from itm_nb.models.similarity import Model                                     # noqa: E402

FAITHFUL = fne.PRESETS['faithful']
tensor = lambda x: torch.tensor(x, dtype=torch.float64)
moments_of = lambda n, mean, var: [n, mean, var*(n-1)]


def given_moments(c, n=1000):
    "Moments from a block's means and variances"
    return tensor([moments_of(n, c['pos_mean'], c['pos_var']), moments_of(2*n, c['neg_mean'], c['neg_var'])])


def same_moments(m, c):
    for row, name in zip((0, 1), ('pos', 'neg')):
        if f'{name}_count' in c: assert m[row,0] == c[f'{name}_count']; near(m[row,1], c[f'{name}_mean'])
        if f'{name}_var' in c: near(fne.variances(m)[row], c[f'{name}_var'])


class Cosine: matrix, pairs, at = Model.matrix, Model.pairs, Model.at


def check_fne_constants(b):
    import inspect
    default = lambda f: {k: v.default for k, v in inspect.signature(f).parameters.items()}
    w = fne.Posterior()
    near(w.tau, b['tau'])
    near(1/w.prior, b['prior_denominator']); near(1-w.threshold, b['no_match_threshold']); assert w.min_count == b['min_accepted_pairs_exclusive']
    for f in (fne.weights, fne.fne, fne.fne_pick, fne.floor_of, fne.fallback_negative): near(default(f)['margin'], b['margin'])


def check_fne_stats(b):
    drift, exact, sums = (torch.zeros(2, 3, dtype=torch.float64) for _ in range(3))
    for c in b['steps']:
        S = tensor(c['scores']); got = fne.observed(S, least=0.)
        off = S.masked_fill(torch.eye(len(S), dtype=torch.bool), -torch.inf); rows, cols = off.amax(1), off.amax(0)
        ok = (S.diagonal() >= rows) & (S.diagonal() >= cols)
        assert ok.nonzero().flatten().tolist() == c['accepted_rows']
        near(S.diagonal()[ok], c['accepted_pos']); near(rows.clamp(min=0)[ok], c['accepted_neg_i2t']); near(cols.clamp(min=0)[ok], c['accepted_neg_t2i'])
        near(got[:,0]*got[:,1], [sum(c['accepted_pos']), sum(c['accepted_neg_i2t']+c['accepted_neg_t2i'])])
        drift, exact = fne.merge(drift, got, 'drift'), fne.merge(exact, got)
        same_moments(drift, c)
    ref = b['exact_unbiased_reference']
    for row, name in zip((0, 1), ('pos', 'neg')): near(exact[row,1], ref[f'{name}_mean']); near(fne.variances(exact)[row], ref[f'{name}_var'])


def check_fne_single(b):
    m = fne.observed(tensor(b['scores']), least=0.)
    same_moments(m, b); assert np.isnan(float(fne.variances(m)[0])) == (b['pos_var_official'] == 'nan')
    none = fne.observed(tensor(b['no_accepted_pair']['scores']), least=0.); same_moments(none, b['no_accepted_pair'])
    near(fne.floor_of(none, tensor([.5])), [[b['no_accepted_pair']['cut_threshold']]])


def check_fne_posterior(block):
    assert block
    for c in block:
        m, s, pos = given_moments(c, 201), tensor(c['sims'])[None], tensor([c['anchor_pos_sim']]); all_ = torch.ones_like(s, dtype=torch.bool)
        pdf = lambda mean, var: torch.exp(-(s-mean)**2/(2*var))/torch.sqrt(tensor(2*np.pi*var))
        near(pdf(c['pos_mean'], c['pos_var'])[0], c['pdf_pos']); near(pdf(c['neg_mean'], c['neg_var'])[0], c['pdf_neg'])
        for space in ('log', 'linear'):
            P = fne.posterior(s, m, space=space)
            near(P[0], c['false_negative_prob']); assert (1-P[0] < 1-1e-3).tolist() == c['flagged']
            near(fne.weights(s, pos, m, all_, space=space)[0], c['weight_final'])
        near(fne.log_odds(s, m)[0], c['log_odds']); near(fne.floor_of(m, pos), [[c['cut_threshold']]])


def check_fne_underflow(b):
    "In float32 the released form loses both densities; the stable one does not, in float32 or float64"
    s, pos, m = torch.tensor([b['sims']]), torch.tensor([b['anchor_pos_sim']]), given_moments(b); all_ = torch.ones_like(s, dtype=torch.bool)
    want = [float(x) for x in b['false_negative_prob_official_f32']]
    np.testing.assert_allclose(fne.posterior(s, m, space='linear')[0].numpy(), np.array(want), atol=1e-6)                   # nan where theirs is
    near(fne.weights(s, pos, m, all_, space='linear')[0], b['weight_final_official_f32'], 1e-6)
    right = b['false_negative_prob_exact_sigmoid']
    near(fne.posterior(s.double(), m)[0], right); near(fne.posterior(s, m)[0], right, 1e-6)
    exact = torch.from_numpy(array(right))
    above = s[0] > fne.floor_of(m, pos)[0]; w = fne.weights(s.double(), pos.double(), m, all_)[0]
    near(w[above & (exact > 1e-3)], torch.exp(-.5*exact)[above & (exact > 1e-3)])
    want_nan = torch.tensor(want).isnan() & above
    if want_nan.any(): assert (fne.weights(s, pos, m, all_, space='linear')[0] - w)[want_nan].abs().min() > .1              # the defect's price, on this case


def cases_of_weights(b, count=500):
    "Both directions of the shared case"
    m, ids = given_moments(b, count), torch.tensor(b['batch_ids']); eligible = ids[:,None] != torch.tensor(b['batch_ids']+b['queue_ids'])
    settings = dict(margin=b['margin'], tau=b['tau'], prior=1/b['prior_denominator'], threshold=1-b['no_match_threshold'], min_count=b['min_count'])
    for side in ('i2t', 't2i'):
        s = tensor(b[f'sims_{side}']); yield side, s, s.diagonal(), eligible, m, settings


def whole_weights(s, pos, m, eligible, space='linear', **kw):
    margin = kw.pop('margin', .2)
    w = fne.weights(s, pos, m, eligible, fne.Posterior(**kw), margin, space=space)
    return fne.with_fallback(w, fne.fallback_negative(s, pos, eligible, margin, 'hinge')[0])


def check_fne_weights(b):
    for kind, count in (('warm', b['min_count'] + 300), ('cold', b['min_count'])):
        for side, s, pos, eligible, m, kw in cases_of_weights(b, count):
            assert (~eligible).tolist() == b['mask']
            near(fne.posterior(s, m, kw['prior']), b[f'fn_prob_{side}'])
            assert fne.fallback_negative(s, pos, eligible, kw['margin'], 'hinge')[0][:,0].tolist() == b[f'hardest_index_{side}']
            w, want = whole_weights(s, pos, m, eligible, **kw), b[f'{kind}_{side}']
            near(w, want['weights']); near(w/w.sum(1, keepdim=True), want['probs']); assert (w > 0).tolist() == want['eligible']
            near(whole_weights(s, pos, m, eligible, **kw, space='log'), w)                         # in logarithms the same, rows without a candidate too


def check_fne_fallback(b):
    s, eligible, pos = tensor(b['sims']), ~torch.tensor(b['mask']), tensor(b['sims']).diagonal()
    m = given_moments(dict(pos_mean=.6, pos_var=.01, neg_mean=.3, neg_var=.01))
    near(torch.where(eligible, (.2+s-pos[:,None]).clamp(min=0), 0.), b['hinge'])
    idx, ok = fne.fallback_negative(s, pos, eligible, fallback='hinge'); assert idx[:,0].tolist() == b['hardest_index']
    near(fne.with_fallback(fne.weights(s, pos, m, eligible, space='linear'), idx), b['weights'])


def bank_term(pos, s, eligible, idx, margin):
    "The term of FNE at given draws, one value per anchor; masked entries count 0"
    named = {'bank': s.gather(1, idx[:,None]), 'bank.valid': eligible.gather(1, idx[:,None]), 'bank.pos': pos}
    return fne.fne(margin=margin).terms['bank'].cost(named)


def check_fne_loss(b, shared=None):
    shared = shared or at(FOLDER, 'fne.cases.weights'); total, top, mean = 0., 0., 0.
    for side, s, _, eligible, m, kw in cases_of_weights(shared):
        s = s.requires_grad_(); pos = s.diagonal(); d, margin = torch.tensor(b[f'draw_{side}']), kw['margin']
        hinges = torch.where(eligible, (margin+s-pos[:,None]).clamp(min=0), 0.); near(hinges.detach(), b[f'hinge_{side}'])
        cost = bank_term(pos, s, eligible, d, margin); near(cost.detach(), b[f'per_anchor_{side}']); total = total + cost.sum().item()
        near(torch.autograd.grad(cost.sum(), s, retain_graph=True)[0], b[f'grad_sum_wrt_sims_{side}'])
        hard = bank_term(pos, s, eligible, fne.fallback_negative(s.detach(), pos.detach(), eligible)[0][:,0], margin).detach()
        near(hard, b['hardest_over_memory'][f'per_anchor_{side}']); top += hard.sum().item()
        w = whole_weights(s.detach(), pos.detach(), m, eligible, **kw); mean += float((w/w.sum(1, keepdim=True)*hinges.detach()).sum())
    n = len(shared['batch_ids'])
    near([total, total/n], [b['loss_sum'], b['loss_divided_by_batch']]); near(mean/n, b['expected_loss_divided_by_batch_warm'])
    near([top, top/n], [b['hardest_over_memory'][k] for k in ('loss_sum', 'loss_divided_by_batch')])


def check_fne_warmup(b):
    "Through the pool and the term of the release's first epoch; scores are given, so the model is a look-up"
    S = tensor(b['scores']).requires_grad_(); n = len(S)
    class Table(Cosine):
        matrix = lambda self, a, o: a @ S @ o.T
        pairs = lambda self, a, o: ((a @ S)*o).sum(1)
        at = lambda self, a, o, idx, i2t=True: torch.einsum('bd,bkd->bk', a @ (S if i2t else S.T), o[idx])
    eye, loss = torch.eye(n, dtype=torch.float64), 0.
    made = fne.fne_warmup(b['margin'])
    source, term = made.sources['own'], made.terms['own']
    for side in ('i2t', 't2i'):
        view = DirectedStep(Step(Table(), eye, eye, torch.zeros(n), torch.arange(n)), side); c = source.pool(view); p = source.selector(c, view)
        loss = loss + term.cost({'own': c.rescore(p.idx)[''], 'own.valid': p.valid, 'own.pos': c.pos}).sum()
    near([loss.item(), loss.item()/n], [b['loss_sum'], b['loss_divided_by_batch']]); near(torch.autograd.grad(loss, S)[0], b['grad_sum_wrt_scores'])


def check_fne_whole(b):
    "Features in, loss and gradients out: through Bank, Statistics and the source"
    v, t, vm, tm, vq, tq = (tensor(b[k]) for k in ('image_feat', 'text_feat', 'image_feat_m', 'text_feat_m', 'image_queue_rows', 'text_queue_rows'))
    v.requires_grad_(); t.requires_grad_(); ids = torch.tensor(b['batch_ids'])
    bank, stats, kw = fne.fne_parts('faithful', fne.Memory(len(vq)))
    bank.ring.make(vq); bank.ring.images, bank.ring.texts, bank.ring.ids, bank.ring.written = vq, tq, torch.tensor(b['queue_ids']), len(vq)
    st = Step(Cosine(), v, t, ids, ids, epoch=1); st.made[id(bank), 'vectors'] = (vm, tm); before = b['stats_before']
    stats.epoch, stats.moments = 1, tensor([moments_of(before[f'{k}_count'], before[f'{k}_mean'], before[f'{k}_var']) for k in ('pos', 'neg')])
    stats.observe(st); same_moments(stats.moments, b['stats_after']); loss = 0.
    for side in ('i2t', 't2i'):
        c = bank.pool(DirectedStep(st, side)); sims, pos = tensor(b[f'sims_{side}']), c.pos.detach()
        every = torch.arange(sims.shape[1]).expand_as(sims); near(c.rescore(every)[''].detach(), sims); near(pos, sims.diagonal())
        near(c.score, sims.masked_fill(ids[:,None] == torch.cat([ids, bank.ring.ids]), -torch.inf))
        w = whole_weights(c.score, pos, stats.moments, c.eligible, margin=b['margin']); near(w, b[f'weights_{side}'])
        idx = ((w > 0)*torch.arange(w.shape[1])).argmax(1); assert idx.tolist() == b[f'draw_{side}']
        term = fne.fne(margin=b['margin']).terms['bank']
        loss = loss + term({'bank': c.rescore(idx[:,None])[''], 'bank.valid': c.eligible.gather(1, idx[:,None]), 'bank.pos': c.pos})
    near(loss.item(), b['loss_divided_by_batch'])
    for got, k in zip(torch.autograd.grad(loss, (v, t)), ('grad_image_feat', 'grad_text_feat')): near(got, b[k])
    assert not vm.requires_grad and not bank.ring.images.requires_grad


def check_fne_queue(b):
    ring = Ring(b['queue_size']); assert all(len(ids) == b['batch_size'] for ids in b['id_batches'])
    for ids, want, at_ in zip(b['id_batches'], b['ids_after'], b['ptr_after'], strict=True):
        x = tensor(ids)[:,None].expand(-1, b['dim']); ring.put(x, -x, torch.tensor(ids))
        assert ring.ids.tolist() == want and ring.at == at_ and ring.images.shape == (b['queue_size'], b['dim'])
        near(ring.images[ring.ids >= 0][:,0], [i for i in want if i >= 0])


def check_fne_ema(b):
    a, s = (torch.nn.Linear(len(b['student']), 1, bias=False).double() for _ in range(2))
    with torch.no_grad(): a.weight[0] = tensor(b['student']); s.weight[0] = tensor(b['teacher_before'])
    m = Momentum(s, b['momentum']); m.follow(a); near(m.model.weight[0].detach(), b['teacher_after'])


def floats(x): return torch.tensor(x, dtype=torch.float64)


def leaf(x): return floats(x).requires_grad_()


def check_tags_triplet(block):
    z = leaf(block['logits']); s, ok = z.sigmoid(), torch.ones(len(block['logits']), block['sample_size']-1, dtype=torch.bool)
    cost = synthetic(z[:,0], z[:,1:], ok, block['margin'], squash=True).mean(); cost.backward()
    near(cost.detach(), block['loss_mean']); near(s.detach(), block['scores']); near(z.grad, block['grad_logits_of_mean'])
    near(hinge(s[:,:1], s[:,1:], block['margin']).detach(), block['loss_elementwise']); near(s[:,1:] <= s[:,:1], block['corrects'])
    named = {'syn': z[:,1:], 'syn.pos': z[:,0], 'syn.valid': ok}
    near(tags_terms(TagsTerms(synthetic=1., margin=block['margin']), squash=True)['synthetic'](named).detach(), block['loss_mean'])


def check_tags_mlm(block):
    z, y = floats(block['logits_K_Ltext_V']), torch.tensor(block['labels']); hit = y != block['ignore']
    loss = word_loss(z, y, block['ignore'])
    near(loss[hit], block['loss_per_masked_position']); near(mean_where(loss[None], hit[None])[0], block['loss_mean'])
    near(z[hit].argmax(-1) == y[hit], block['corrects'])
    for t, p in block['sampling_probabilities_by_temperature'].items(): near(refill_law(z[hit], float(t)), p)


def check_tags_disc(block):
    z, syn, gt = leaf(block['logits_N_Ltext_2']), torch.tensor(block['syn_ids']), torch.tensor(block['gt_ids'])
    kept = syn == gt; w, floor = tuple(block['class_weights_replaced_kept']), block['prob_floor']
    near(kept, block['labels_1_kept_0_replaced'])
    near(floats(w)[kept.long()].flatten()*word_loss(z.detach(), kept.long(), floor=floor).flatten(), block['loss_per_token_flat'])
    every = torch.ones_like(kept)[None]
    near(discrimination(z[None], kept[None], every, w, per='weights').item(), block['loss_weight_normalised_for_contrast'])
    cost = discrimination(z[None], kept[None], every, w, floor=floor)[0]; cost.backward()
    near(cost.detach(), block['loss_mean_over_tokens']); near(z.grad, block['grad_logits_of_mean'])
    n = {'syn.disc': z[None], 'syn.kept': kept[None], 'syn.word': every, 'syn.hit': ~kept[None], 'syn.valid': every[:,:,0], 'syn.right': every}
    assert word_counts(n) | dict(corrected=0, masked=0) == dict(corrected=0, masked=0, **{a: block[b] for a, b in (
        ('kept_right', 'kept_correct'), ('kept', 'kept_total'), ('replaced_right', 'replaced_correct'), ('replaced', 'replaced_total'))})


def check_tags_correction(block):
    z, y = leaf(block['logits_N_Ltext_V']), torch.tensor(block['labels_original_ids']); hit = y != block['ignore']
    loss = word_loss(z, y, block['ignore'], block['prob_floor'])
    near(loss[hit].detach(), block['loss_per_masked_position']); near(z[hit].argmax(-1) == y[hit], block['corrects'])
    named = {'syn.cor': loss[None], 'syn.hit': hit[None], 'syn.valid': torch.ones(1, len(y), dtype=torch.bool)}
    cost = tags_terms(TagsTerms(correction=1.), preset='faithful')['correction'](named); cost.backward()
    near(cost.detach(), block['loss_mean']); near(z.grad, block['grad_logits_of_mean'])


def check_tags_floor(block):
    z, y = floats(block['logits']), torch.tensor([block['label']])
    near(word_loss(z, y, floor=PRESETS['faithful']['cost']['floor'])[0], block['value_with_floor_unweighted'])
    near(word_loss(z, y, floor=PRESETS['corrected']['cost']['floor'])[0], block['plain_log_softmax_value'])


def check_tags_total(block):
    "The four terms and the two retrieval hinges, fed with tensors whose costs are the given components"
    part, w = {k: floats([v]) for k, v in block['components'].items()}, block['weights']
    d, yes = part['discrimination'].expm1().log(), torch.ones(1, 1, 1, dtype=torch.bool)                     # -log softmax of (0, d) at 0 is the component
    named = {'syn': part['synthetic'][:,None] - .2, 'syn.pos': floats([0]), 'syn.valid': yes[0], 'syn.mlm': part['mlm'], 'syn.cor': part['correction'].view(1, 1, 1),
             'syn.hit': yes, 'syn.word': yes, 'syn.kept': ~yes, 'syn.disc': torch.stack([0*d, d], -1).view(1, 1, 1, 2), 'on.pos': floats([0]), 'on.valid': yes[0]}
    value = sum(t(named) for t in tags_terms(TagsTerms(**{k: w[k] for k in ('synthetic', 'mlm', 'discrimination', 'correction')})).values())
    for k in ('text_to_image', 'image_to_text'): value = value + triplet_term('on', .2, weight=w[k])(named | {'on': part[k][:,None] - .2})
    near(value, block['total'])


def check_tags_refill(block):
    copies, y = torch.tensor(block['masked_ids']), torch.tensor(block['mlm_labels']); hit = y != -1
    assert torch.equal(torch.where(hit, torch.tensor(block['gt_ids']), copies)[~hit], copies[~hit]) and torch.equal(y[hit], torch.tensor(block['gt_ids']).expand_as(y)[hit])
    got = fill(copies[None], hit[None], torch.tensor(block['sampled_ids_K_S_L'])[None])[0]
    assert got.tolist() == block['candidates_KS_L']


def check_tags_select(block):
    "The release's penalties, as the pool applies them, and the pick that takes the highest"
    ids, logits = torch.tensor(block['pool_ids'])[None], floats(block['pool_logits'])[None]
    minus = penalty(ids, ids[:,0]); same = (ids == ids[:,:1]).all(-1)
    near(3*same[0], block['penalty_equal_gt']); near((minus-3*same)[0], block['penalty_duplicate']); near((logits-minus)[0], block['adjusted_scores'])
    assert int((minus == 0).sum()) == block['effective_number']
    score = logits[:,1:] - minus[:,1:]; c = Candidates(score, torch.ones_like(score, dtype=torch.bool), logits[:,0], None)
    idx = 1 + top(block['hard_size'])(c, None).idx[0]
    assert idx.tolist() == block['selected_indices'] and ids[0,idx].tolist() == block['selected_ids']


def check_tags_filter(block):
    made, own = torch.tensor(block['candidates'])[None], block['captions_of_the_image_ids_without_cls_sep']
    first, last, long = int(made[0,0,0]), int(made[0,0,-1]), max(map(len, own)) + 2
    own = torch.tensor([[first, *x, last] + [0]*(long-2-len(x)) for x in own])[None]; n = int(max(made.max(), own.max())) + 1
    lex = Lexicon.of([str(i) for i in range(n)], {0, first, last}, first); bad = suspects(made, own, lex)
    for ours, theirs in (('caption', 'is_exact_caption'), ('inside', 'all_tokens_in_caption_vocabulary'), ('repeat', 'is_duplicate_of_an_earlier_candidate')):
        assert bad[ours][0].tolist() == block[theirs]
    keep = ~(bad['caption'] | bad['inside'] | bad['repeat']); assert keep[0].tolist() == block['keep']
    score = floats(block['scores_sigmoid'])[None].masked_fill(~keep, -torch.inf); p = top(made.shape[1])(Candidates(score, keep, None, None), None)
    assert p.idx[p.valid].tolist() == block['kept_indices_hardest_first']


def check_tags_masking(block):
    "Laws, exact marginals, and 200,000 draws of our own that agree with them"
    groups = block['groups_of_token_positions']; units, L = pack([groups], 0), 1 + max(map(max, groups)); member = members(units, L); law = unit_law(member)
    covered = member[0].sum(0); q = {str(l): .15/int(covered[l]) for l in range(L) if covered[l]}
    assert q.keys() == block['position_probability'].keys(); near([q[l] for l in q], [block['position_probability'][l] for l in q])
    near(law[0], block['group_probability']); none = (1-law[0]).prod(); near(none, block['probability_no_group_drawn_then_one_forced'])
    marginal = {l: float(1 - (1-law[0][member[0,:,int(l)]]).prod() + none*member[0,:,int(l)].double().mean()) for l in q}
    for l, p in block['selection_probability_by_position'].items(): near(marginal[l], p)
    names = Lexicon.of([str(k) for k in range(1000)], {0, 1}, 1); row = torch.arange(2, 2+L)[None]
    copies, hit = mask_copies(row, units, torch.tensor([0]), 200_000, names)
    for l, p in block['selection_probability_by_position'].items(): near(hit[0,:,int(l)].double().mean(), p, .006)
    shown, old = copies[hit], row.expand_as(copies[0])[hit[0]]; split = block['split_inside_a_selected_token']
    for k, got in (('mask', shown == 1), ('keep', shown == old), ('random', (shown != 1) & (shown != old))): near(got.double().mean(), split[k], .004)


def check_tags_schedule(block):
    assert block
    for row in block: near(warm_linear(row['step'], row['base_lr'], row['warmup'], row['total']), row['lr'], 1e-15)


# ---- state_dicts_fne_tags.json ----------------------------------------------------------------------------------------------------------------

_sized = {}
def official(size):
    "Our cross-encoder at a published size, without memory, and the parts of the authors' files that have no place in it"
    if size not in _sized:
        with torch.device('meta'):
            d = UNITER[size]['dim']; model = CrossEncoder(**UNITER[size]); e = torch.empty
            rest = {'uniter.img_embeddings.mask_embedding.weight': e(2, 2048), 'itm_output.weight': e(2, d), 'itm_output.bias': e(2),
                    'feat_regress.weight': e(d, 2048), 'feat_regress.bias': e(2048), 'region_classifier.net.3.weight': e(1601, d), 'region_classifier.net.3.bias': e(1601)}
            for head in ('feat_regress', 'region_classifier'): rest |= {f'{head}.net.0.weight': e(d, d), f'{head}.net.0.bias': e(d), f'{head}.net.2.weight': e(d), f'{head}.net.2.bias': e(d)}
        _sized[size] = model, rest
    return _sized[size]


def check_uniter(kind, size):
    "Out: exactly the names and shapes of the authors. In: a table of these names and shapes is taken, and what comes back is what went in"
    def check(block):
        model, rest = official(size); out = to_uniter(model, rest, kind); want = {k: v[0] for k, v in block['keys'].items()}
        assert {k: list(v.shape) for k, v in out.items()} == want and {v[1] for v in block['keys'].values()} == {'float32'}
        assert len(out) == block['counts']['keys']
        tied = [k for k in out if k.endswith('decoder.weight') or k == 'feat_regress.weight']                 # the same tensor under a second name
        assert sum(v.numel() for k, v in out.items() if k not in tied) == block['counts']['parameters']
        given = {k: torch.empty(s, device='meta') for k, s in want.items()}
        from_ = lambda given: from_uniter(model, given)
        if kind != 'itm': assert from_(given).keys() == out.keys() & rest.keys()
        else:
            with pytest.raises(DataError, match='missing'): from_(given)                                        # it cannot write: it has no masked-word head
    return check


# ---- the registry -----------------------------------------------------------------------------------------------------------------------

REGISTRY = {
    'metrics.matrices': Check(check_matrices, ('sims', 'captions_per_image', 'name', 'note')),
    'metrics.coco_five_fold': Check(check_five_fold, ('sims', 'fold_size_images')),
    'metrics.eccv_caption': Check(check_eccv, ('sims', 'image_ids', 'caption_ids', 'gt_i2t', 'gt_t2i', 'name', 'note')),
    'scan.scan': Check(check_scan, ('images', 'captions', 'caption_lengths', 'upstream_gradient', 'lambda_softmax', 'lambda_lse')),
    'scan.vsrn_rs_gcn': Check(check_reasoning, ('name', 'input', 'blocks', 'upstream_gradient')),
    'scan.gpo': Check(check_gpo, ('name', 'features', 'lengths', 'weights', 'd_pe', 'd_hidden', 'upstream_gradient')),
    'aoq.loss_cases': Check(check_aoq_loss, ('name', 'hyper', 'S', 'off_i2t', 'off_t2i', 'unanch_33', 'unanch_44')),
    'aoq.embedding_level': Check(check_aoq_vectors, ('name', 'hyper', 'inputs')),
    'aoq.mining': Check(check_mining, ('image_embeddings', 'caption_embeddings')),
    'aoq.bfan_similarity': Check(check_bfan, ('images_raw', 'captions_raw', 'caption_lengths', 'lambda_softmax')),
    'aoq.evaluation': Check(check_aoq_evaluation, ('sims', 'description')),
    'fne.constants': Check(check_fne_constants),
    'fne.cases.running_stats': Check(check_fne_stats, ('scores',)),
    'fne.cases.single_pair_edge': Check(check_fne_single, ('scores', 'neg_var')),
    'fne.cases.posterior': Check(check_fne_posterior, ('name', 'sims', 'anchor_pos_sim')),
    'fne.cases.float32_underflow': Warn(check_fne_underflow, ('sims', 'anchor_pos_sim', 'pos_mean', 'neg_mean', 'pos_var', 'neg_var'), 'both densities underflow in float32, and 0/0 counts as not suspected'),
    'fne.cases.weights': Check(check_fne_weights, ('batch_ids', 'queue_ids', 'sims_i2t', 'sims_t2i')),
    'fne.cases.fallback': Check(check_fne_fallback, ('sims', 'mask')),
    'fne.cases.loss_sampled': Check(check_fne_loss, ('uses',)),
    'fne.cases.warmup_triplet': Check(check_fne_warmup, ('scores',)),
    'fne.cases.end_to_end': Check(check_fne_whole, ('batch_ids', 'queue_ids', 'image_queue_rows', 'text_queue_rows')),
    'fne.cases.queue': Check(check_fne_queue, ('dim',)),
    'fne.cases.ema': Check(check_fne_ema, ('momentum',)),
    'tags.triplet': Check(check_tags_triplet, ('logits', 'sample_size', 'margin')), 'tags.refill': Check(check_tags_refill, ('gt_ids', 'masked_ids', 'mlm_labels', 'sampled_ids_K_S_L')),
    'tags.select_stage1_hard3': Check(check_tags_select, ('pool_ids', 'pool_logits', 'hard_size')),
    'tags.select_stage1_hard5+pool': Check(check_tags_select, ('pool_ids', 'pool_logits', 'hard_size')),
    'tags.false_negative_filter_reference': Check(check_tags_filter, ('captions_of_the_image_ids_without_cls_sep', 'candidates', 'scores_sigmoid')),
    'tags.mlm': Check(check_tags_mlm, ('logits_K_Ltext_V', 'labels', 'ignore')),
    'tags.discrimination': Check(check_tags_disc, ('logits_N_Ltext_2', 'syn_ids', 'gt_ids', 'class_weights_replaced_kept', 'prob_floor')),
    'tags.correction': Check(check_tags_correction, ('logits_N_Ltext_V', 'labels_original_ids', 'ignore', 'prob_floor')),
    'tags.prob_floor_branch': Check(check_tags_floor, ('logits', 'label')), 'tags.total': Check(check_tags_total, ()), 'tags.masking': Check(check_tags_masking, ('groups_of_token_positions',)),
    'tags.schedule': Check(check_tags_schedule, ('step', 'base_lr', 'warmup', 'total')),
    'tags.recall': Check(check_tags_recall, ('score_matrix_text_by_image', 'captions_per_image', 'text_i_belongs_to_image', 'published_evaluator')),
    'tags.recall+published': Warn(check_tags_published, ('score_matrix_text_by_image', 'captions_per_image', 'text_i_belongs_to_image', 'txt_r1', 'txt_r5', 'txt_r10'),
                                  'the published evaluator adds k spurious text-to-image hits'),
    'tags.released_gather_index': Warn(check_tags_gather, ('text_lengths', 'regions'), 'regions are gathered from behind the last text, not the longest'),
    'tags.select_stage1_hard5': Warn(check_tags_hard5, ('pool_logits',), 'penalised rows enter as negatives'),
    **{f'state_dicts.models.{k}': Check(check_released) for k in ('SCAN_f30k', 'SCAN_coco', 'BFAN_f30k', 'BFAN_coco', 'VSRN_f30k', 'VSRN_coco', 'AOQ_VSRN_f30k', 'AOQ_VSRN_coco')},
    **{f'state_dicts.models.VSE_infinity_region_{k}': Check(check_vse) for k in ('BERT', 'BiGRU_f30k', 'BiGRU_coco')},
    **{f'state_dicts_fne_tags.{name}_{end}': Check(check_uniter(kind, size), ()) for size in ('base', 'large') for name, kind, end in (
        ('uniter', 'pretrained', f'{size}_pretrained'), ('uniter', 'itm', f'{size}_itm_finetuned'), ('tags_stage1', 'tags1', size), ('tags_stage2', 'tags2', size))},
    'state_dicts_fne_tags.fne': Check(check_fne_keys, ('trainable_parameters',)),
    'rivals': Pending('checked in test_rivals.py'),
}


def load(folder, name): return json.loads((Path(folder)/f'{name}.json').read_text(encoding='utf-8'))


def at(folder, path):
    "A block; one that the folder does not have is skipped by its name, and counted at the end (see conftest.py)"
    file, *keys = path.split('+')[0].split('.')
    if not (Path(folder)/f'{file}.json').is_file(): absent(path)
    node = load(folder, file)
    for k in keys: node = node[k] if k in node else absent(path)
    return node


def absent(path): pytest.skip(f'{ABSENT} {path}')


def unregistered(folder, registry=None):
    "Blocks of the files in a folder that nothing in the registry speaks for"
    registry = REGISTRY if registry is None else registry
    def missing(path, node):
        if path in registry: return []
        if isinstance(node, dict) and any(k.startswith(path + '.') for k in registry):
            return [m for k, v in node.items() if k not in PROSE for m in missing(f'{path}.{k}', v)]
        return [path]
    return [m for f in sorted(Path(folder).glob('*.json')) for m in missing(f.stem, json.loads(f.read_text(encoding='utf-8')))]


# ---- tests ----------------------------------------------------------------------------------------------------------------------------------

def test_every_block_is_registered(): assert not unregistered(FOLDER)


@pytest.mark.parametrize('path', REGISTRY)
def test_block(path):
    entry = REGISTRY[path]
    if isinstance(entry, Pending):
        at(FOLDER, path)                                              # the block is there
        pytest.skip(f'pending: {entry.reason}')
    entry.check(at(FOLDER, path))


def leaves(node, inputs, path=()):
    "Paths of all numbers that a check should have compared"
    if isinstance(node, dict): return [x for k, v in node.items() if k not in inputs for x in leaves(v, inputs, path + (k,))]
    if isinstance(node, list): return [x for k, v in enumerate(node) for x in leaves(v, inputs, path + (k,))]
    return [path] if isinstance(node, (int, float)) else []


CHECKED = [k for k, v in REGISTRY.items() if isinstance(v, Check)]


@pytest.mark.parametrize('path', CHECKED)
def test_a_changed_number_is_seen(path):
    """Change expected numbers one at a time (a spread of up to 60): every single change fails the check. Of a
    list of cases only the one that is changed is checked again: each passes alone, and the others do not come
    to know of it"""
    entry, block = REGISTRY[path], at(FOLDER, path)
    places = leaves(block, entry.inputs)
    assert places
    cases = isinstance(block, list)
    if cases:
        for case in block: entry.check([case])
    for place in places[::max(1, len(places)//60)]:
        node = block
        for k in place[:-1]: node = node[k]
        x = node[place[-1]]
        node[place[-1]] = not x if isinstance(x, bool) else x + (1 if isinstance(x, int) else .01)
        try: entry.check([block[place[0]]] if cases else block)
        except (AssertionError, LookupError, ValueError): continue
        finally: node[place[-1]] = x
        pytest.fail(f'{path}: {place} changed from {x} and nobody saw it')
    assert block == at(FOLDER, path), 'a check has changed what it was given'


def test_an_unregistered_block_fails(tmp_path):
    for f in HOME.glob('*.json'): (tmp_path/f.name).write_bytes(f.read_bytes())
    assert not unregistered(tmp_path)
    whole = load(tmp_path, 'metrics'); whole['news'] = [1]; (tmp_path/'metrics.json').write_text(json.dumps(whole))
    whole = load(tmp_path, 'fne'); whole['cases']['news'] = {'a': 1}; (tmp_path/'fne.json').write_text(json.dumps(whole))
    (tmp_path/'other.json').write_text('{"x": 1}')
    assert unregistered(tmp_path) == ['fne.cases.news', 'metrics.news', 'other']
    assert unregistered(HOME, {k: v for k, v in REGISTRY.items() if k != 'aoq.mining'}) == ['aoq.mining']


def test_the_folder_in_the_environment_is_read(tmp_path):
    "pytest itself turns red on another folder with one changed number, and stays green on an equal copy"
    for f in HOME.glob('*.json'): (tmp_path/f.name).write_bytes(f.read_bytes())
    def run(): return pytest_on(tmp_path, 'test_block and aoq.evaluation')[1]
    assert '1 passed' in run()
    whole = load(tmp_path, 'aoq'); whole['evaluation']['t2i_ranks'][0] += 1; (tmp_path/'aoq.json').write_text(json.dumps(whole))
    assert '1 failed' in run()


def test_shapes_are_not_assumed():
    "Blocks of other sizes pass: fewer images, three captions each, fewer cases; so nothing is tied to the sizes at hand"
    rng = np.random.default_rng(0)
    N, c = 7, 3; img_of = np.arange(N*c) // c; S = rng.permutation(N*N*c).reshape(N, N*c) / 10
    r = ranks_of(S, img_of, tie=0); s = summary(r)
    check_aoq_evaluation(dict(sims=S.tolist(), i2t_ranks=r.i2t.tolist(), t2i_ranks=r.t2i.tolist(), **s))
    right = {f'{a}_{k}': s[d][k]/100 for a, d in (('txt', 'i2t'), ('img', 't2i')) for k in ('r1', 'r5', 'r10')}
    given = dict(score_matrix_text_by_image=S.T.tolist(), captions_per_image=c)
    check_tags_recall(given | dict(right=right))
    with pytest.raises(AssertionError): check_tags_recall(given | dict(right=right | {'img_r1': 2.}))
    block = load(HOME, 'metrics')
    check_matrices(block['matrices'][-1:]); check_eccv(block['eccv_caption'][1:])


def released_weights(s, ids, others, mean, var, kw, warm):
    "The release's rule spelled out for one direction, a candidate at a time: probabilities, largest hinges, weights"
    every, prob, hardest, out = [*ids, *others], [], [], []
    density = lambda x, k: math.exp(-(x - mean[k])**2/(2*var[k]))/math.sqrt(2*math.pi*var[k])
    for i, row in enumerate(s):
        P = [density(x, 0)/(density(x, 0) + (kw['prior_denominator'] - 1)*density(x, 1)) for x in row]
        no = [ids[i] == j for j in every]; hinges = [0. if bad else max(0., kw['margin'] + x - row[i]) for x, bad in zip(row, no)]
        w = [0. if bad or x <= mean[0] - kw['margin'] else math.exp(-kw['tau']*p) if warm and 1 - p < kw['no_match_threshold'] else math.exp(-kw['tau']*(x - row[i])**2)
             for x, p, bad in zip(row, P, no)]
        top_ = hinges.index(max(hinges)); prob.append(P); hardest.append(top_)
        out.append(w if any(w) else [float(j == top_) for j in range(len(w))])
    return prob, hardest, out


def weights_block(B=5, Q=9, seed=0, lonely=(1, 3)):
    "A block of the form of fne.cases.weights with other numbers; in the lonely rows nobody stands above the floor"
    rng = np.random.default_rng(seed); ids, others = [7, 8, 9, 7, 11], [8, 20, 21, 11, -100, 22, 9, 23, -100]
    kw = dict(margin=.15, prior_denominator=500, tau=2., no_match_threshold=.99, min_count=900); mean, var = (.55, .2), (.01, .02)
    b = kw | dict(batch_ids=ids, queue_ids=others, mask=[[i == j for j in ids + others] for i in ids], pos_mean=mean[0], neg_mean=mean[1], pos_var=var[0], neg_var=var[1])
    for side in ('i2t', 't2i'):
        s = rng.uniform(.1, .8, (B, B + Q)); s[lonely,:] *= .3; s[range(B),range(B)] = rng.uniform(.3, .6, B); b[f'sims_{side}'] = s.tolist()
        for kind in ('warm', 'cold'):
            prob, hardest, w = released_weights(s.tolist(), ids, others, mean, var, kw, kind == 'warm'); w = np.array(w)
            b |= {f'fn_prob_{side}': prob, f'hardest_index_{side}': hardest, f'{kind}_{side}': dict(weights=w.tolist(), probs=(w/w.sum(1, keepdims=True)).tolist(), eligible=(w > 0).tolist())}
    return b


def test_other_numbers_of_fne_weights_pass():
    "Rows without a candidate are with_fallback on both sides of the comparison; a weight left unfilled, or any other change, is seen"
    for seed in range(5): check_fne_weights(weights_block(seed=seed))
    check_fne_weights(weights_block(lonely=()))
    b = weights_block(); assert [sum(row) for row in np.array(b['warm_i2t']['weights'])[[1, 3]]] == [1, 1]       # the case is there
    bad = copy.deepcopy(b); bad['warm_i2t']['weights'][1] = [0.]*len(bad['warm_i2t']['weights'][1])
    with pytest.raises(AssertionError): check_fne_weights(bad)


def published_evaluator(S, of):
    "The evaluator as published, on texts by images: it counts every entry of (text, rank) pairs that is below k, the texts' numbers too"
    S = torch.tensor(S); own = torch.tensor(of); ten = S.topk(10, dim=1).indices; found = (ten == own[:,None]).nonzero()
    out = {f'img_r{k}': int((found < k).sum())/len(S) for k in (1, 5, 10)}
    best = (-S).argsort(0); at = [min(int((best[:,j] == i).nonzero()) for i in range(len(of)) if of[i] == j) for j in range(S.shape[1])]
    out |= {f'txt_r{k}': sum(r < k for r in at)/len(at) for k in (1, 5, 10)}
    out |= {f'{a}_r_mean': float(np.mean([out[f'{a}_r{k}'] for k in (1, 5, 10)])) for a in ('txt', 'img')}
    return out | dict(r_mean=(out['txt_r_mean'] + out['img_r_mean'])/2)


def recall_block(misses=(0, 3), images=20, c=2, seed=0):
    "A block of the form of tags.recall: texts that miss find ten other images first"
    rng = np.random.default_rng(seed); of = [i // c for i in range(images*c)]; S = rng.permutation(images*images*c).reshape(images*c, images)/1e4
    S[range(len(of)),of] += np.where(np.isin(range(len(of)), misses), -10, .05)
    s = summary(ranks_of(S.T, np.array(of), tie=0)); right = {f'{a}_{k}': s[d][k]/100 for a, d in (('txt', 'i2t'), ('img', 't2i')) for k in ('r1', 'r5', 'r10')}
    return dict(score_matrix_text_by_image=S.tolist(), captions_per_image=c, right=right, published_evaluator=published_evaluator(S, of))


def test_other_numbers_of_the_published_recall_pass():
    "As many spurious hits as the data give: 0, 3, 8 where texts 0 and 3 miss the first ten - not min(k, texts)"
    b = recall_block(); ranks = tags_ranks(b).t2i
    hits = {k: round(len(ranks)*(b['published_evaluator'][f'img_r{k}'] - b['right'][f'img_r{k}'])) for k in (1, 5, 10)}
    assert hits == {1: 0, 5: 3, 10: 8} == {k: spurious(ranks, k) for k in (1, 5, 10)}
    for seed in range(4): x = recall_block(tuple(range(seed, 12, 3)), seed=seed); check_tags_recall(x); check_tags_published(x)
    x = recall_block(misses=()); assert [spurious(tags_ranks(x).t2i, k) for k in (1, 5, 10)] == [1, 5, 10]; check_tags_published(x)
    for k in (1, 5, 10):
        bad = copy.deepcopy(b); bad['published_evaluator'][f'img_r{k}'] = b['right'][f'img_r{k}'] + k/len(ranks)
        with pytest.raises(AssertionError): check_tags_published(bad)


def pytest_on(folder, which='test_block or every_block'):
    "This file's blocks on another folder: (exit code, output). In a fork, so that nothing is imported again"
    with tempfile.TemporaryFile('w+') as said:
        if not (pid := os.fork()):
            code = 1
            try:
                os.environ['ITM_GOLDEN'] = str(folder)
                [os.dup2(said.fileno(), n) for n in (1, 2)]
                sys.stdout = sys.stderr = said
                [sys.modules.pop(m, None) for m in (__name__, 'conftest')]
                code = pytest.main(['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-o', 'addopts=', __file__, '-k', which])
            finally:
                said.flush()
                os._exit(int(code))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        return code, said.read()


def test_a_mistyped_folder_is_an_error(tmp_path):
    "No such folder, a file, an empty folder, one that has only other files: nothing runs, and the name is said"
    (tmp_path/'file').write_text(''); (tmp_path/'empty').mkdir(); (tmp_path/'other').mkdir(); (tmp_path/'other'/'notes.json').write_text('{}')
    for name in ('nowhere', 'file', 'empty', 'other'):
        code, out = pytest_on(tmp_path/name); assert code == 4 and 'ITM_GOLDEN' in out and str(tmp_path/name) in out and 'passed' not in out, out


def test_absent_blocks_are_skipped_by_name_and_counted(tmp_path):
    "A folder with two files, one of them without a block: what is there is checked, what is not is named"
    for name in ('aoq', 'fne'): (tmp_path/f'{name}.json').write_bytes((HOME/f'{name}.json').read_bytes())
    whole = load(tmp_path, 'fne'); del whole['cases']['ema']; (tmp_path/'fne.json').write_text(json.dumps(whole))
    code, out = pytest_on(tmp_path); there = [k for k in REGISTRY if k.split('.')[0] in ('aoq', 'fne') and k != 'fne.cases.ema']
    assert code == 0 and f'{len(there) + 1} passed' in out and f'{len(REGISTRY) - len(there)} golden blocks absent' in out, out
    for name in ('fne.cases.ema', 'tags.recall', 'state_dicts.models.SCAN_f30k', 'state_dicts_fne_tags.fne', 'metrics.matrices'): assert name in out.split('golden blocks absent')[1], name
