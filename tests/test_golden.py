"""Numbers computed with the authors' own code, kept in tests/golden (or in the folder named by ITM_GOLDEN: same names and fields, other values and shapes).

One registry says what happens to every block of every file: a check, `Pending` (a later part of the project brings it), or `Warn` (a recorded defect,
not a target; it is checked against the right value beside it). A block that is not registered is an error."""
import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_nb.metrics import Ranks, by_gallery, in_galleries, many_positives, match_summary, mean_summary, ranks_of, summary

torch.set_num_threads(1)
HOME = Path(__file__).parent/'golden'
FOLDER = Path(os.environ.get('ITM_GOLDEN') or HOME)
PROSE = {'_description', '_about', '_fields', 'description'}


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
    from itm_nb.encoders import GPO
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


# ---- aoq.json -------------------------------------------------------------------------------------------------------------------------------

def check_aoq_evaluation(block):
    S = array(block['sims']); N, M = S.shape
    r = ranks_of(S, np.arange(M) // (M//N), tie=0)
    same_summary(summary(r), block)
    assert r.i2t.tolist() == block['i2t_ranks'] and r.t2i.tolist() == block['t2i_ranks']


# ---- tags.json ------------------------------------------------------------------------------------------------------------------------------

def tags_recalls(block):
    "Shares in the authors' names: txt_r* = an image looks for text, img_r* = a text looks for its image"
    S = array(block['score_matrix_text_by_image']).T
    s = summary(ranks_of(S, np.arange(S.shape[1]) // block['captions_per_image'], tie=0))
    return {f'{a}_{k}': s[d][k]/100 for a, d in (('txt', 'i2t'), ('img', 't2i')) for k in ('r1', 'r5', 'r10')}


def check_tags_recall(block):
    got = tags_recalls(block)
    assert set(block['right']) == set(got)
    for k, v in block['right'].items(): near(got[k], v)


def check_tags_published(block):
    "Their image-to-text shares are right; every text-to-image share is too large by min(k, texts) spurious hits"
    got, bad, n = tags_recalls(block), block['published_evaluator'], len(block['score_matrix_text_by_image'])
    for k in (1, 5, 10):
        near(bad[f'txt_r{k}'], got[f'txt_r{k}'])
        near(bad[f'img_r{k}'] - min(k, n)/n, got[f'img_r{k}']); near(block['right'][f'img_r{k}'], got[f'img_r{k}'])
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


# ---- the registry -----------------------------------------------------------------------------------------------------------------------

OFFLINE, SCAN, VSRN, FNE, TAGS, WEIGHTS = (Pending(x) for x in (
    'AOQ: offline lists and the quintuplet cost', 'cross-attention scores (SCAN, BFAN)', "VSRN's region graph", 'FNE: statistics, posterior, memory',
    'TAGS-DC: generator, discrimination, correction', "the authors' checkpoints"))

REGISTRY = {
    'metrics.matrices': Check(check_matrices, ('sims', 'captions_per_image', 'name', 'note')),
    'metrics.coco_five_fold': Check(check_five_fold, ('sims', 'fold_size_images')),
    'metrics.eccv_caption': Check(check_eccv, ('sims', 'image_ids', 'caption_ids', 'gt_i2t', 'gt_t2i', 'name', 'note')),
    'scan.scan': SCAN,
    'scan.vsrn_rs_gcn': VSRN,
    'scan.gpo': Check(check_gpo, ('name', 'features', 'lengths', 'weights', 'd_pe', 'd_hidden', 'upstream_gradient')),
    'aoq.loss_cases': OFFLINE, 'aoq.embedding_level': OFFLINE, 'aoq.mining': OFFLINE,
    'aoq.bfan_similarity': SCAN,
    'aoq.evaluation': Check(check_aoq_evaluation, ('sims', 'description')),
    'fne.constants': FNE, 'fne.cases.running_stats': FNE, 'fne.cases.single_pair_edge': FNE, 'fne.cases.posterior': FNE, 'fne.cases.float32_underflow': FNE,
    'fne.cases.weights': FNE, 'fne.cases.fallback': FNE, 'fne.cases.loss_sampled': FNE, 'fne.cases.warmup_triplet': FNE, 'fne.cases.end_to_end': FNE,
    'fne.cases.queue': FNE, 'fne.cases.ema': FNE,
    'tags.triplet': TAGS, 'tags.refill': TAGS, 'tags.select_stage1_hard3': TAGS, 'tags.false_negative_filter_reference': TAGS, 'tags.mlm': TAGS,
    'tags.discrimination': TAGS, 'tags.correction': TAGS, 'tags.prob_floor_branch': TAGS, 'tags.total': TAGS, 'tags.masking': TAGS, 'tags.schedule': TAGS,
    'tags.recall': Check(check_tags_recall, ('score_matrix_text_by_image', 'captions_per_image', 'text_i_belongs_to_image', 'published_evaluator')),
    'tags.recall+published': Warn(check_tags_published, ('score_matrix_text_by_image', 'captions_per_image', 'text_i_belongs_to_image', 'txt_r1', 'txt_r5', 'txt_r10'),
                                  'the published evaluator adds k spurious text-to-image hits'),
    'tags.released_gather_index': Warn(check_tags_gather, ('text_lengths', 'regions'), 'regions are gathered from behind the last text, not the longest'),
    'tags.select_stage1_hard5': Warn(check_tags_hard5, ('pool_logits',), 'penalised rows enter as negatives'),
    'state_dicts': WEIGHTS, 'state_dicts_fne_tags': WEIGHTS,                           # large files, not copied here; present in a full folder
}


def load(folder, name): return json.loads((Path(folder)/f'{name}.json').read_text(encoding='utf-8'))


def at(folder, path):
    file, *keys = path.split('+')[0].split('.')
    node = load(folder, file)
    for k in keys: node = node[k]
    return node


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
        if '.' in path: at(FOLDER, path)                              # the block is there
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
    "Change expected numbers one at a time (a spread of up to 60): every single change fails the check"
    entry, block = REGISTRY[path], at(FOLDER, path)
    places = leaves(block, entry.inputs); assert places
    for place in places[::max(1, len(places)//60)]:
        changed = copy.deepcopy(block); node = changed
        for k in place[:-1]: node = node[k]
        x = node[place[-1]]; node[place[-1]] = not x if isinstance(x, bool) else x + (1 if isinstance(x, int) else .01)
        try: entry.check(changed)
        except (AssertionError, LookupError): continue
        pytest.fail(f'{path}: {place} changed from {x} and nobody saw it')


def test_an_unregistered_block_fails(tmp_path):
    for f in FOLDER.glob('*.json'): (tmp_path/f.name).write_bytes(f.read_bytes())
    assert not unregistered(tmp_path)
    whole = load(tmp_path, 'metrics'); whole['news'] = [1]; (tmp_path/'metrics.json').write_text(json.dumps(whole))
    whole = load(tmp_path, 'fne'); whole['cases']['news'] = {'a': 1}; (tmp_path/'fne.json').write_text(json.dumps(whole))
    (tmp_path/'other.json').write_text('{"x": 1}')
    assert unregistered(tmp_path) == ['fne.cases.news', 'metrics.news', 'other']
    assert unregistered(FOLDER, {k: v for k, v in REGISTRY.items() if k != 'aoq.mining'}) == ['aoq.mining']


def test_the_folder_in_the_environment_is_read(tmp_path):
    "pytest itself turns red on another folder with one changed number, and stays green on an equal copy"
    for f in FOLDER.glob('*.json'): (tmp_path/f.name).write_bytes(f.read_bytes())
    def run(): return subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__, '-k', 'test_block and aoq'], capture_output=True, text=True,
                                     env=os.environ | dict(ITM_GOLDEN=str(tmp_path))).stdout
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
    check_tags_recall(dict(score_matrix_text_by_image=S.T.tolist(), captions_per_image=c, right=right))
    with pytest.raises(AssertionError): check_tags_recall(dict(score_matrix_text_by_image=S.T.tolist(), captions_per_image=c, right=right | {'img_r1': 2.}))
    block = load(FOLDER, 'metrics')
    check_matrices(block['matrices'][-1:]); check_eccv(block['eccv_caption'][1:])
