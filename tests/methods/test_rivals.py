"Rivals against the numbers of their public implementations, against slow references, and in a short training"
import copy
import json
import math
import os
from pathlib import Path

import pytest
import torch

from itm_nb.methods.losses import infonce
from itm_nb.methods.method import losses
from itm_nb.methods.registry import named
from itm_nb.methods.rivals import (
    RIVALS, ScaleAndBias, Thresholds, filter_mined, glofnd, guide_keeps, margin_filter, passes, rescaled_infonce,
    row_quantile, sides_of, sigmoid, sigmoid_cost, softmax_of_copies, threshold_step)
from itm_nb.methods.samplers import Step
from itm_nb.models.similarity import Model
from itm_nb.training.config import Config
from itm_nb.training.corpus import corpus
from itm_nb.training.loop import fit, Saving

HOME = Path(os.environ.get('ITM_GOLDEN') or Path(__file__).parents[1]/'golden')
FILE = HOME/'rivals.json'
GOLDEN = json.loads(FILE.read_text('utf-8'))['cases'] if FILE.is_file() else {}
tensor = lambda x: torch.tensor(x, dtype=torch.double)
cases = lambda block: [pytest.param(c, id=c['name']) for c in GOLDEN.get(block, [])]


def near(got, want):
    "To the tolerance of the file; infinities are strings there"
    want = [float(x) for x in flat(want)]
    torch.testing.assert_close(tensor(flat(got)), tensor(want), rtol=1e-9, atol=1e-10)


def flat(x):
    x = x.detach().tolist() if isinstance(x, torch.Tensor) else x
    return [y for z in x for y in flat(z)] if isinstance(x, list) else [x]


def all_but(x):
    "A square matrix without its diagonal, row by row"
    n = len(x)
    return x[~torch.eye(n, dtype=torch.bool)].view(n, n-1)


# ---- golden numbers

@pytest.mark.parametrize('case', cases('softmax_family'))
@pytest.mark.parametrize('name, copies', [('infonce', 'negatives'), ('same_image_masked', 'masked'), ('multi_positive_out', 'out'),
                                          ('multi_positive_sum', 'sum')])
def test_captions_of_one_photo(case, name, copies):
    want, ids = case[name], torch.tensor(case['image_ids'])
    v, t = (tensor(case[k]).requires_grad_() for k in ('image_features', 'text_features'))
    same, n = all_but(ids[:,None] == ids), len(ids)
    if copies == 'out' and same.all(): return              # the package returns 0 where there is no negative
    s = v @ t.T
    cost = lambda s: softmax_of_copies(s.diagonal(), all_but(s), torch.ones(n, n-1).bool(), same, case['temperature'], copies)
    loss = (cost(s).mean() + cost(s.T).mean())/2
    near(loss, want['loss'])
    for x, k in ((v, 'image'), (t, 'text')): near(torch.autograd.grad(loss, x, retain_graph=True)[0], want[f'grad_{k}_features'])


@pytest.mark.parametrize('case', cases('siglip'))
def test_sigmoid_loss(case):
    v, t = (tensor(case[k]).requires_grad_() for k in ('image_features', 'text_features'))
    odds, n = ScaleAndBias(case['scale'], case['bias'] or 0., 1e-3), len(v)
    z, none = odds(v @ t.T), torch.zeros(n, n-1).bool()
    if case['negative_only']: loss = sigmoid_cost(torch.full((n,), torch.inf), z, torch.ones(n, n).bool(), torch.zeros(n, n).bool()).mean()
    else: loss = sigmoid_cost(z.diagonal(), all_but(z), ~none, none, 'negatives').mean()
    near(loss, case['loss']); loss.backward()
    near(v.grad, case['grad_image_features']); near(t.grad, case['grad_text_features'])
    near(odds.log_scale.grad/case['scale'], case['grad_scale'])                            # ours learns the logarithm
    if case['bias'] is not None: near(odds.bias.grad, case['grad_bias'])


@pytest.mark.parametrize('case', cases('gist'))
def test_a_guide(case):
    unit = lambda k: torch.nn.functional.normalize(tensor(case[k]), dim=1)
    leaf = {k: tensor(case[k]).requires_grad_() for k in ('anchor', 'positive', 'negative') if k in case}
    a, p, *rest = (torch.nn.functional.normalize(x, dim=1) for x in leaf.values())
    ga, gp, within = unit('guide_anchor'), unit('guide_positive'), case['contrast_anchors']
    s, g = sides_of(a, p, a, p, within), sides_of(ga, gp, ga, gp, within)
    if rest: s, g = torch.cat([s, a @ rest[0].T], 1), torch.cat([g, ga @ unit('guide_negative').T], 1)
    own = g.diagonal(); n = len(a); near(own, case['guide_positive_similarity'])
    keep = guide_keeps(g, own, case['margin'], case['margin_strategy'] == 'relative')
    near(s.masked_fill(~(keep | torch.eye(n, s.shape[1]).bool()), -torch.inf)/case['temperature'], case['scores_over_temperature'])
    ok = keep & ~torch.eye(n, s.shape[1]).bool()                                            # the own pair stands apart
    loss = infonce(s.diagonal(), s, ok, case['temperature']).mean(); near(loss, case['loss']); loss.backward()
    for k, x in leaf.items(): near(x.grad, case[f'grad_{k}'])


@pytest.mark.parametrize('case', cases('mining_filters'))
def test_mined_negatives(case):
    queries, documents = list(dict.fromkeys(a for a, _ in case['pairs'])), list(dict.fromkeys(case['documents']))
    score = torch.tensor(case['scores'])[[case['queries'].index(q) for q in queries]][:, [case['documents'].index(d) for d in documents]]
    own = torch.tensor([[[q, d] in case['pairs'] for d in documents] for q in queries])
    name = dict(absolute_margin='absolute', relative_margin='relative', max_score='highest', min_score='lowest', num_negatives='take',
                range_min='skip', range_max='deep')
    for run in case['runs']:
        kw = {name[k]: v for k, v in run['settings'].items() if k in name and v is not None}
        idx, ok = filter_mined(score, own, **kw)
        got = {q: [documents[j] for j, o in zip(i.tolist(), k.tolist()) if o] for q, i, k in zip(queries, idx, ok)}
        want = {q: [] for q in queries}
        for q, _, d, *_ in run['triplets']:
            if d not in want[q]: want[q].append(d)
        assert got == want, run['settings']


def test_thresholds_of_the_image_text_code():
    block = GOLDEN.get('glofnd_update') or pytest.skip('no golden numbers of rivals')
    for case in (block['trace'], *block['variants']):
        kw = case.get('settings') or {k: case[k] for k in ('start_update', 'lda_start')}
        start = case['lambda_init']; start = start if isinstance(start, list) else [start]*case['N']
        state = torch.stack([tensor(start), *torch.zeros(2, case['N']).double()], 1)
        for step in case['steps']:
            i, s, e = torch.tensor(step['idx']), tensor(step['sim']), step['epoch']
            off = ~torch.eye(len(i), dtype=torch.bool)
            if e == kw['start_update'] and kw.get('init_quantile'): state[i,0] = row_quantile(s, off, case['alpha'])
            elif e >= kw['start_update']:
                share = ((s > state[i,:1]) & off).double().sum(1)/(len(i)-1)
                more = dict(clip=kw.get('clip_grad_mult') or 0., normalize=kw.get('normalize_grad', False))
                state[i] = threshold_step(state[i], share, e+1, case['alpha'], case['lr_lambda'], **more)
            near(state, torch.stack([tensor(step[f'{k}_all']) for k in ('lambda', 'm', 'v')], 1))
            keep = off & ~(s > state[i,:1]) if e >= kw['lda_start'] else off
            assert keep.int().tolist() == step['keep']


def test_masks_at_the_edge():
    case = GOLDEN['glofnd_update']['mask_edges']; s = tensor(case['sim'])
    assert (~(s > tensor(case['lambda_'])[:,None]) & ~torch.eye(4, dtype=torch.bool)).int().tolist() == case['keep']
    case = GOLDEN['glofnd_update']['minibatch_quantile']; s = tensor(case['sim'])
    near(row_quantile(s, ~torch.eye(6, dtype=torch.bool), case['alpha']), case['quantile'])


@pytest.mark.parametrize('case', cases('glofnd_simclr'))
def test_scaled_up_to_all_negatives(case):
    leaf = [tensor(case[k]).requires_grad_() for k in ('h1', 'h2')]; h1, h2 = (torch.nn.functional.normalize(x, dim=1) for x in leaf)
    n = len(h1); view = lambda a, b: torch.cat([all_but(a @ b.T), all_but(a @ a.T)], 1)
    lam, views, old = tensor(case['lambda_before']), (view(h1, h2), view(h2, h1)), case['epoch'] < case['start']
    if not old:
        share = torch.stack([(x > lam[:,None]).double().mean(1) for x in views]).mean(0)
        state = torch.stack([lam, *torch.zeros(2, n).double()], 1)
        lam = threshold_step(state, share, case['epoch']+1, case['alpha'], case['lr_lambda'])[:,0]
    near(lam, case['lambda_after']); total = 0
    for x in views:
        ok = torch.ones_like(x).bool() if old else ~(x > lam[:,None])
        total += rescaled_infonce((h1*h2).sum(1), x, ok, x.shape[1]/ok.double().sum(1), case['temperature']).mean()
    near(total, case['loss']); total.backward()
    for x, k in zip(leaf, ('h1', 'h2')): near(x.grad, case[f'grad_{k}'])


def test_a_changed_number_is_seen():
    "One change in every block fails its check"
    def fails(check, case, change):
        case = copy.deepcopy(case); change(case)
        with pytest.raises(AssertionError): check(case)
    fails(lambda c: test_captions_of_one_photo(c, 'multi_positive_sum', 'sum'), GOLDEN['softmax_family'][1],
          lambda c: c['multi_positive_sum'].update(loss=c['multi_positive_sum']['loss'] + 1e-6))
    fails(test_sigmoid_loss, GOLDEN['siglip'][0], lambda c: c.update(grad_bias=c['grad_bias'] + 1e-6))
    fails(test_a_guide, GOLDEN['gist'][3], lambda c: c['scores_over_temperature'][0].__setitem__(0, 0.))
    fails(test_scaled_up_to_all_negatives, GOLDEN['glofnd_simclr'][1], lambda c: c['lambda_after'].__setitem__(0, 0.))
    fails(test_mined_negatives, GOLDEN['mining_filters'][2], lambda c: c['runs'][0]['triplets'].pop())


# ---- slow references, on batches with copies

class Cosine: matrix, pairs, at = Model.matrix, Model.pairs, Model.at


def batch(seed, n=7, photos=5, epoch=0):
    g = torch.Generator().manual_seed(seed); unit = lambda: torch.nn.functional.normalize(torch.randn(n, 4, generator=g).double(), dim=1)
    img = torch.randint(photos, (n,), generator=g)
    return Step(Cosine(), unit(), unit(), img, 5*img + torch.arange(n), epoch=epoch)


def slow(step, cost):
    "Sum over both directions of the mean over anchors of cost(score of i with all, its photo, photos)"
    s, img = (step.images @ step.texts.T).tolist(), step.img.tolist(); n = range(len(img))
    return sum(sum(cost(i, [s[i][j] if side else s[j][i] for j in n], img) for i in n)/len(img) for side in (1, 0))


@pytest.mark.parametrize('seed', range(5))
def test_methods_against_loops(seed):
    step, T = batch(seed), .1; e = lambda x: math.exp(x/T); total = lambda name: sum(losses(named(name), step).values()).item()
    others = lambda i, img: [j for j in range(len(img)) if img[j] != img[i]]
    copies = lambda i, img: [j for j in range(len(img)) if img[j] == img[i]]
    def summed(i, s, img): return -math.log(sum(e(s[j]) for j in copies(i, img))/sum(map(e, s)))
    def out(i, s, img): return sum(-math.log(e(s[j])/sum(map(e, s))) for j in copies(i, img))/len(copies(i, img))
    def masked(i, s, img): return -math.log(e(s[i])/(e(s[i]) + sum(e(s[j]) for j in others(i, img))))
    for how, cost in (('sum', summed), ('out', out), ('masked', masked)):
        assert total(f"multi_positive(temperature=.1, copies='{how}')") == pytest.approx(slow(step, cost))
    def pairs(i, s, img): return math.log(1 + math.exp(-(5*s[i] - 2))) + sum(math.log(1 + math.exp(5*s[j] - 2)) for j in others(i, img))
    assert total('sigmoid(scale=5., bias=-2.)') == pytest.approx(slow(step, pairs)/2)          # both directions are one matrix
    def far(i, s, img):
        left = [s[j] for j in others(i, img) if s[j] <= s[i] - abs(s[i])*.3]
        return max(0., .2 + max(left) - s[i]) if left else 0.
    assert total("margin_filter(relative=.3, pool='batch')") == pytest.approx(slow(step, far))


@pytest.mark.parametrize('seed', range(3))
def test_a_learned_threshold_against_loops(seed):
    "Three epochs of one batch: the quantile first, then Adam by own visits"
    m, n, alpha, T = glofnd(.1, alpha=.3), 7, .3, .1; lines = m.stateful()[0]; state = {}
    for epoch in range(3):
        step = batch(seed, epoch=epoch); lines.observe(step); img = step.img.tolist(); s = (step.images @ step.texts.T).tolist()
        want = 0.
        for side in (1, 0):
            for i in range(n):
                row = [s[i][j] if side else s[j][i] for j in range(n)]; neg = [row[j] for j in range(n) if img[j] != img[i]]
                if (side, i) not in state: state[side,i] = [float(torch.quantile(tensor(neg), 1-alpha)), 0., 0., 0]
                else:
                    lam, a, b, k = state[side,i]; g = alpha - sum(x > lam for x in neg)/len(neg); a, b, k = .9*a + .1*g, .98*b + .02*g*g, k+1
                    lam -= .05*(a/(1-.9**k))/(math.sqrt(b/(1-.98**k)) + 1e-8); state[side,i] = [max(-1., min(1., lam)), a, b, k]
                kept = [x for x in neg if x <= state[side,i][0]]
                if kept: want += math.log(1 + len(neg)/len(kept)*sum(math.exp(x/T) for x in kept)/math.exp(row[i]/T))/n
        assert float(sum(losses(m, step).values())) == pytest.approx(want)


def test_what_is_kept_is_saved_and_loaded():
    a, b = Thresholds(.3), Thresholds(.3); a.observe(batch(0)); b.load_state_dict(a.state_dict())
    a.observe(batch(1)); b.observe(batch(1)); assert all((a.kept[s] == b.kept[s]).all() for s in a.kept)
    with pytest.raises(ValueError): sigmoid(copies='none') and losses(sigmoid(copies='none'), batch(0))
    assert passes(tensor([[.5]]), tensor([1.]), absolute=.5).all() and set(RIVALS) == {'multi_positive', 'sigmoid', 'margin_filter', 'gist', 'glofnd'}


@pytest.mark.parametrize('name', [*RIVALS])
def test_a_rival_stopped_and_gone_on_with(name, tmp_path):
    "By name, as a sweep has it: a run that was killed ends with the weights and the state of one that was not"
    cfg = Config(data='scenes', preset='tiny', method=name, text='mean', text_pool='mean', dim=16, d_word=8, image_hidden=16, epochs=2,
                 batch=64)
    world = corpus(cfg); whole = fit(cfg, tmp_path/'a', world, progress=False, saving=Saving(every=5))
    def stop(k):
        if k == 7: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(cfg, tmp_path/'b', world, progress=False, saving=Saving(every=5), on_step=stop)
    again = fit(cfg, tmp_path/'b', world, progress=False, saving=Saving(every=5))
    for k, v in whole.core.state_dict().items(): assert v.isfinite().all() and torch.equal(v, again.core.state_dict()[k])
    for a, b in zip(whole.stateful(), again.stateful()):
        for k, v in a.state_dict().items(): assert torch.equal(v, b.state_dict()[k]), k
