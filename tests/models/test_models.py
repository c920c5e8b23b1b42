"""Every kind of model through the whole loop: trained, stopped and gone on with, saved, ranked against a
plain loop, averaged"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from itm_nb.core.errors_files import DataError
from itm_nb.metrics.ranks import ranks_of, summary
from itm_nb.models.encode import embed, rank_encoded, rank_split, scores_of
from itm_nb.models.encoders import mean_pool, MeanTower, RegionTower
from itm_nb.models.factory import from_pretrained
from itm_nb.training.build import build
from itm_nb.training.config import config, Config
from itm_nb.training.corpus import corpus, Corpus
from itm_nb.training.loop import PICK, evaluate, fit, load_picks, prepare, Saving
from itm_nb.runs.external_scores import ensemble
from itm_nb.runs.run_record import picks

SMALL = dict(preset='tiny', text='mean', dim=16, d_word=16, image_hidden=0, epochs=1, batch=64, lr=1e-3,
             heads=2, layers=1)
KINDS = dict(scan_t2i={}, scan_i2t={}, bfan_prob={}, two_modes={},
             cross=dict(dim=8, method='infonce', batch=32),
             cosine=dict(image='vsrn', text='gru_last', captioner=8))
def cfg_of(kind, **kw): return config(SMALL | dict(similarity=kind) | KINDS[kind] | kw)

def few(cfg, n=12):
    "A small part of the world"
    data = corpus(cfg)
    cut = {p: data.split(p).subset(np.arange(k)) for p, k in (('train', 64), ('val', n), ('test', n))}
    return Corpus(data.label, cut.__getitem__, boxes=cfg.boxes)


@pytest.mark.parametrize('kind', KINDS)
def test_stopped_and_gone_on_with_is_the_same(kind, tmp_path):
    cfg = cfg_of(kind, epochs=2)
    data = few(cfg)
    whole = fit(cfg, tmp_path/'whole', data, progress=False)
    half = whole.steps//2
    class Enough(Exception): pass
    def stop(step):
        if step == half: raise Enough
    with pytest.raises(Enough):
        fit(cfg, tmp_path/'twice', data, progress=False, saving=Saving(every=1), on_step=stop)
    again = fit(cfg, tmp_path/'twice', data, progress=False, saving=Saving(every=1))
    for k, v in whole.core.state_dict().items(): assert torch.equal(v, again.core.state_dict()[k]), k
    for f in ('log.jsonl', 'picks.bin', 'ranks_val.npz'):
        assert (tmp_path/'whole'/f).read_bytes() == (tmp_path/'twice'/f).read_bytes(), f
    loaded = from_pretrained(tmp_path/'whole'/'best')
    img, txt = embed(loaded, whole.val)
    S = loaded.matrix(img, txt).detach()
    s = whole.val.split
    assert (rank_split(loaded,
                       whole.val).i2t.tolist() == np.load(tmp_path/'whole'/'ranks_val.npz')['i2t'].tolist())
    slow = torch.stack([torch.stack([loaded.pairs(img[i:i+1], txt[j:j+1])[0] for j in range(len(txt))])
                        for i in range(3)]).detach()
    assert (slow - S[:3]).abs().max() < 1e-4


def test_a_run_is_evaluated_by_whole_numbers_too(tmp_path):
    "`search='int8'`: the same file of ranks; where scores are no products of vectors it is refused by name"
    cfg = Config(preset='tiny', text='mean', dim=64, image_hidden=16, epochs=1, batch=64, method='vse0')
    data = few(cfg)
    fit(cfg, tmp_path, data, progress=False)
    evaluate(tmp_path, data)
    want = (tmp_path/'ranks_test.npz').read_bytes()
    (tmp_path/'ranks_test.npz').unlink()
    with pytest.MonkeyPatch.context() as m:
        m.setattr('itm_nb.metrics.ranks.ranks_blocks', None)              # not by blocks
        evaluate(tmp_path, data, search='int8')
    assert (tmp_path/'ranks_test.npz').read_bytes() == want
    t = prepare(cfg_of('scan_t2i'), few(cfg_of('scan_t2i')))
    with pytest.raises(DataError, match='no products of two vectors'):
        rank_split(t.core, t.val, search='int8')


def test_mean_scores_of_several_models():
    cfgs = [cfg_of('scan_t2i'), cfg_of('bfan_prob'), cfg_of('scan_t2i', seed=1, world=0)]
    data = few(cfgs[0])
    ts = [prepare(c, data) for c in cfgs]
    encoded = [(t.core, *embed(t.core, t.val)) for t in ts]
    s = ts[0].val.split
    S = sum(m.matrix(a, b).detach() for m, a, b in encoded)/3
    want, got = ranks_of(S, s.img_of), rank_encoded(encoded, s)
    # near-ties are decided by block shape
    assert summary(want)['rsum'] == pytest.approx(summary(got)['rsum'], abs=2)
    i, j = np.array([3, 0]), np.array([5, 2, 1])
    assert torch.allclose(scores_of(encoded)(i, j), S[i][:,j], atol=1e-5)
    pair = scores_of([(None, torch.eye(4), torch.eye(4)[:3])])(i, np.array([1, 2]))
    assert [len(x) for x in pair] == [2, 2]


@pytest.mark.parametrize('kw,said', [
    (dict(similarity='cosin'), 'there are'), (dict(similarity='cross', text_freeze='all'),
                                              'text_freeze is for text towers'),
                                              (dict(similarity='cross', vision='x', boxes=True),
                                               'have no boxes'),
                                               (dict(similarity='scan_t2i', image='vsrn'), 'wants regions'),
    (dict(captioner=4), 'regions of VSRN'), (dict(boxes=True), 'where regions are'),
    (dict(similarity='bfan_equal', agg='Max'), 'mean over the queries'), (dict(layers=0), 'wanted 1')])
def test_settings_that_do_not_go_together(kw, said):
    with pytest.raises(ValueError, match=said): config(kw)


def test_settings_of_the_attention_arrive():
    m = build(cfg_of('scan_t2i', attention_scale=4., lse_scale=3., agg='Mean', norm='softmax'), 5, 20)
    (side,) = m.score.sides
    assert (side.sharp, side.lse, side.agg, side.norm) == (4., 3., 'Mean',
                                                           'softmax') and m.config[
        'attention'] == dict(sharp=4., lse=3., agg='Mean', norm='softmax')
    plain = build(cfg_of('scan_t2i'), 5, 20)
    assert plain.config['attention'] == {} and plain.score.sides[0].sharp == 9.
    coco = build(cfg_of('cosine', image='vsrn_coco'), 5, 20).image_tower
    assert coco.early_norm and coco.norm is None


def test_boxes_reach_the_transformer(tmp_path):
    cfg = cfg_of('cross', boxes=True)
    data = few(cfg)
    t = prepare(cfg, data)
    b = t.train.take(torch.arange(4))
    assert b['boxes'].shape == (*b['feats'].shape[:2], 4) and t.core.config['d_box'] == 7
    img, txt = embed(t.core, t.val)
    moved = t.val
    moved.boxes = moved.boxes.flip(1)
    assert not torch.equal(t.core.pairs(img[:4], txt[:4]), t.core.pairs(embed(t.core, moved)[0][:4], txt[:4]))
    with pytest.raises(DataError, match='no boxes'):
        prepare(cfg, Corpus('x', lambda p: replace(data.split(p), boxes=None), boxes=True))


def test_picks_are_logged_and_judged(tmp_path):
    cfg = config(SMALL | dict(epochs=3, method='vsepp|infonce'))
    data = corpus(cfg)
    t = fit(cfg, tmp_path/'r', data, progress=False)
    rows = load_picks(tmp_path/'r'/'picks.bin')
    train = t.train.split
    assert set(rows['source']) == {b'on'} and set(rows['side']) == {b'i2t',
        b't2i'} and sorted(set(rows['epoch'])) == [0, 1, 2]
    image = dict(zip(train.cap_ids, train.img_ids[train.img_of]))
    assert all(image[r['caption']] == r['image'] != r['other_image']
               and image[r['other_caption']] == r['other_image'] for r in rows) and (rows['score'] <= 1).all()
    found = picks(tmp_path/'r', train, data.world)['on']['i2t']
    last = rows[(rows['epoch'] == 2) & (rows['side'] == b'i2t')]
    at = {v: k for k, v in enumerate(train.img_ids)}
    cap = {v: k for k, v in enumerate(train.cap_ids)}
    true = [int(data.world.truth('train', np.array(at[r['image']]), np.array(cap[r['other_caption']]))) == 2
            for r in last]
    assert found['n'][2] == len(last) and found['false'][2] == pytest.approx(np.mean(true),
        abs=1e-4) and found['score'][2] == pytest.approx(last['score'].mean(), rel=1e-3)
    assert 'false' not in picks(tmp_path/'r', train)['on']['i2t']
    (tmp_path/'cut').write_bytes((tmp_path/'r'/'picks.bin').read_bytes()[:-1])
    with pytest.raises(DataError, match=str(PICK.itemsize)): load_picks(tmp_path/'cut')


@pytest.mark.parametrize('pool', ['max', 'mean', 'topk', 'gpo'])
def test_padding_costs_no_products_and_changes_nothing(pool):
    "Where only some regions are real, values and gradients are those of the tower that encodes padding too"
    torch.manual_seed(0)
    tower = RegionTower(5, 6, hidden=8, pool=pool).double()
    feats, num = torch.randn(7, 4, 5, dtype=torch.float64), torch.tensor([4, 1, 2, 3, 4, 1, 2])
    seen = []
    tower.mlp[0].register_forward_hook(lambda m, x, y: seen.append(x[0].numel()//5))
    def results(f):
        tower.zero_grad()
        y = f()
        (y*torch.arange(6)).sum().backward()
        return [y.detach(), *(p.grad.clone() for p in tower.parameters() if p.grad is not None)]
    ours, whole = results(lambda: tower(feats, num)), results(lambda: tower.pool(tower.states(feats), num))
    assert seen == [17, 28] and len(ours) == len(whole) and all(torch.allclose(a, b, atol=1e-12)
        for a, b in zip(ours, whole))
    full = torch.full((7,), 4)
    assert torch.equal(tower(feats, full), tower.pool(tower.states(feats), full))


def test_the_published_normalisation_sees_padding():
    "VSE-infinity's batch normalisation counts every row: leaving padding out would change what it learns"
    torch.manual_seed(0)
    a, b = (RegionTower(5, 6, hidden=8, pool='max', norm=True) for _ in range(2))
    b.load_state_dict(a.state_dict())
    feats, num = torch.randn(7, 4, 5), torch.tensor([4, 1, 2, 3, 4, 1, 2])
    assert torch.equal(a(feats, num), b.pool(b.states(feats), num)) and torch.equal(a.mlp[2].running_mean,
        b.mlp[2].running_mean)


def test_off_the_cpu_nothing_is_counted():
    "On a device that holds no values, so that nobody can count its padding, towers run forward and backward"
    num = torch.tensor([4, 1, 2], device='meta')
    image = RegionTower(5, 6, hidden=8, pool='max', dropout=.1).to('meta')
    text = MeanTower(9, 6, 5, dropout=.1).to('meta')
    y = image(torch.empty(3, 4, 5, device='meta'),
              num) * text(torch.zeros(3, 4, dtype=torch.long, device='meta'), num)
    y.sum().backward()
    assert y.shape == (3, 6) and all(p.grad is not None for m in (image, text) for p in m.parameters())
    with pytest.raises((RuntimeError, TypeError, NotImplementedError)):
        image.only_real(torch.empty(3, 4, 5, device='meta'), num)


def test_words_of_padding_change_nothing():
    "The mean of words, with and without looking padding up: values and gradients"
    torch.manual_seed(0)
    tower = MeanTower(9, 6, 5).double()
    tokens, lengths = torch.randint(1, 9, (7, 4)), torch.tensor([4, 1, 2, 3, 4, 1, 2])
    def results(f):
        tower.zero_grad()
        y = f()
        (y*torch.arange(6)).sum().backward()
        return [y.detach(), *(p.grad.clone() for p in tower.parameters())]
    ours, whole = (results(lambda: tower(tokens, lengths)),
                   results(lambda: tower.linear(mean_pool(tower.words(tokens), lengths))))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, whole))
