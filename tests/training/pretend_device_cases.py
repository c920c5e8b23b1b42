"""On a pretend accelerator (`pretend_device.py`) every kind of method and model does what it does on the
CPU, and the host seldom waits."""
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pretend_device as there
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from pretend_device import DEVICE, LEDGER, OnDevice

from itm_nb.data.pixels import augment, KINDS as VIEWS, OPERATIONS, Pixels
from itm_nb.data.splits import Split
from itm_nb.analysis.audit import audit
from itm_nb.analysis.search import find_images, find_sentences, shelf
from itm_nb.methods import generator, memory_bank, offline_mining
from itm_nb.metrics import ranks as ranks_module
from itm_nb.models.encode import embed, rank_split
from itm_nb.models.encoders import GPO, GRUTower
from itm_nb.methods.memory_bank import Ring
from itm_nb.training import loop
from itm_nb.training.config import config
from itm_nb.training.corpus import corpus, Corpus
from itm_nb.training.loop import fit, Saving

SMALL = dict(preset='tiny', epochs=2, batch=64, dim=16, d_word=16, image_hidden=16, dropout=0., heads=2,
             layers=1)
# Each arm: settings that differ, waits and blocking uploads a step may have, operations of a step. What one
# is, `pretend_device.py` says; all are counted: forward, backward, clipping and the optimiser's step.
KINDS = dict(
    vsepp=({}, 0, 0, 340), infonce=(dict(method='infonce'), 0, 0, 310),
    aoq=(dict(method="aoq(placebo='random')"), 0, 0, 1080),
    fne=(dict(method='fne(queue=256)'), 0, 0, 760),
    tags=(dict(method='tags', similarity='two_modes'), 1, 0, 1300))
MORE = dict(
    vse0=(dict(method='vse0'), 0, 0, 290), semihard=(dict(method='semihard'), 0, 0, 350),
    aoq_faithful=(dict(method="aoq(preset='faithful',placebo='random')"), 0, 0, 1080),
    fne_faithful=(dict(method="fne(preset='faithful',queue=256)"), 0, 0, 700),
    fne_warmup=(dict(method='fne_warmup'), 0, 0, 360),
    mlm_warmup=(dict(method='vsepp|mlm_warmup', similarity='two_modes'), 0, 0, 1000),
    tags_dc=(dict(method='tags(discrimination=.5,correction=.5)', similarity='two_modes'), 1, 0, 1700),
    tags_faithful=(dict(method="tags(preset='faithful')", similarity='cross', batch=16), 1, 0, 1200),
    tags_unshared=(dict(method="tags(sharing='unshared')", similarity='two_modes'), 1, 0, 2000),
    multi_positive=(dict(method='multi_positive'), 0, 0, 350), gist=(dict(method='gist'), 0, 0, 430),
    margin_filter=(dict(method='margin_filter'), 0, 0, 500),
    # their own numbers stay on the host: a scale and a bias, a threshold of every caption
    sigmoid=(dict(method='sigmoid'), 4, 0, 300), glofnd=(dict(method='glofnd'), 8, 0, 530),
    topk=(dict(image_pool='topk'), 0, 0, 360), chunk=(dict(chunk=32), 0, 0, 600),
    gru_last=(dict(text='gru_last'), 0, 0, 1050),
    captioner=(dict(image='vsrn', captioner=8, method='vsepp|caption()'), 0, 0, 4250),
    scan_i2t=(dict(similarity='scan_i2t', text='gru', epochs=1), 0, 0, 2500))
NET = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
VIT, BERT = (json.dumps(dict(NET, **kw)) for kw in (dict(model_type='vit', patch_size=8),
                                                    dict(model_type='bert')))
SEEING = dict(data='images', size=16, vision=VIT, text_model=BERT, batch=16, image_pool='mean',
              tokenizer='pieces', wordpiece_vocab=60)
PICTURES = dict(
    pixels_crop=(SEEING | dict(method='infonce', augment='crop'), 0, 0, 1080),
    pixels_rand=(SEEING | dict(method='infonce', augment='rand'), 0, 0, 1300))
# kind of model -> settings, operations of a step of VSE++, and of a step of the dearest method on it
MODELS = dict(
    mean_mean=(dict(image_pool='mean'), 340, 1080),
    conv_gpo=(dict(text='conv', image_pool='gpo'), 1160, 3650),
    gru=(dict(text='gru'), 1730, 5400), vsrn=(dict(image='vsrn', text='gru_last'), 2020, 6250),
    scan_t2i=(dict(similarity='scan_t2i', text='gru'), 2470, 6750),
    bfan=(dict(similarity='bfan_equal', text='gru'), 3350, 8350),
    two_modes=(dict(similarity='two_modes'), 520, 1620),
    cross=(dict(similarity='cross', batch=16), 1000, 2450),
    pixels=(SEEING, 1070, 3270), pixels_frozen=(SEEING | dict(freeze='all', text_freeze='all'), 260, 860))


def method_on(method, model):
    """TAGS writes with the model itself where that reads words beside regions, else any words (its control);
    FNE draws from the batch where a model has no vectors that a memory could keep"""
    kind = MODELS[model][0].get('similarity', '')
    if method == 'tags' and kind not in ('two_modes', 'cross'): return "tags(words='random')"
    if method == 'fne' and kind not in ('', 'two_modes'):
        return "vsepp,on=itm_nb.fne:bank_source(pool='batch')"
    return KINDS[method][0].get('method', 'vsepp')


def crossed(method, model):
    """An arm. Of frozen networks states are kept: sentences of TAGS, which nobody knows before, are looked
    for among them on the host"""
    own, least, most = MODELS[model]
    waits, uploads = (0, 0) if method != 'tags' else (5, 6) if model == 'pixels_frozen' else (1, 0)
    return own | dict(method=method_on(method, model)), waits, uploads, least if method == 'vsepp' else most


CROSS = {f'{model} {method}': crossed(method, model) for model in MODELS for method in KINDS}
# relative difference of a loss; 1e-6 elsewhere. Their sums are longer, and taken in another order
NEAR = dict(scan_i2t=1e-4, tags_faithful=1e-5) | {f'cross {m}': 1e-5 for m in KINDS}
ARMS = KINDS | MORE | PICTURES | CROSS
FIRST, LAST = 1, 3     # the steps after the first up to the third are counted: none of them is logged


class Pretending(Accelerator):
    "Accelerate has no backend for it: the rest of it works as on the CPU"
    def __init__(self, cpu=False, **kw):
        self.far = not cpu
        super().__init__(cpu=True, **kw)

    @property
    def device(self): return DEVICE if self.far else torch.device('cpu')


ENOUGH = generator._enough


def as_there(_, sentences):
    "Words of a bucket of TAGS as on a device: what is compared differs in where it is computed alone"
    return ENOUGH(DEVICE, sentences)


@pytest.fixture(autouse=True)
def pretending(monkeypatch):
    monkeypatch.setattr(loop, 'Accelerator', Pretending)
    monkeypatch.setattr(generator, '_enough', as_there)


def painted(folder, part, n, start):
    "Coloured squares as image files, two sentences each"
    draw, names = np.random.default_rng(start), ('red', 'green', 'blue')
    files, said = [], []
    for i in range(n):
        kind = int(draw.integers(3))
        x = draw.integers(60, 120, (20, 20, 3)).astype(np.uint8)
        x[4:14, 2:12, kind] = 240
        files.append(folder/f'{part}{i}.png')
        Image.fromarray(x).save(files[-1])
        said += [f'a {names[kind]} square', f'one square that is {names[kind]}']
    return Split(part, None, np.ones(n, int), said, np.arange(2*n)//2, np.arange(n)+start,
                 np.arange(2*n)+10*start, source=part, files=files)


def few(cfg, folder):
    "A small part of the world, or a few pictures"
    if cfg.vision:
        folder.mkdir(exist_ok=True)
        made = {p: painted(folder, p, n, s) for p, n, s in (('train', 24, 1000), ('val', 8, 2000))}
        return Corpus('painted', made.__getitem__, pixels=lambda s: Pixels(s.files, cfg.size, cfg.resize),
                      states=str(folder/'states'))
    data = corpus(cfg)
    sizes = dict(train=cfg.batch, val=12, test=12)           # some four sentences each: three steps an epoch
    cut = {p: data.split(p).subset(np.arange(k)) for p, k in sizes.items()}
    return Corpus(data.label, cut.__getitem__, world=data.world)


def ran(cfg, run, device, every=200, stop=None):
    "A training's losses, its model, and what it cost a step"
    costs = {}
    def look(step):
        if step == FIRST: LEDGER.clear()
        if step == LAST:
            costs.update(waits=LEDGER.waits.copy(), uploads=LEDGER.blocking,
                         kernels=LEDGER.kernels/(LAST-FIRST),
                         operations=sum(LEDGER.operations.values())/(LAST-FIRST))
        if step == stop: raise KeyboardInterrupt
    t = fit(cfg, run, few(cfg, run.with_name('pictures')), device=device, progress=False, on_step=look,
            saving=Saving(every=every))
    return [json.loads(line) for line in (run/'log.jsonl').read_text().splitlines()], t, costs


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "name -> results on the CPU and on the device, run when somebody asks"
    made, folder = {}, tmp_path_factory.mktemp('runs')
    def get(name):
        if name not in made:
            cfg = config(SMALL | ARMS[name][0])
            made[name] = [ran(cfg, folder/f'{name}-{d}', d) for d in ('cpu', 'auto')]
        return made[name]
    get.made = made
    return get


@pytest.mark.parametrize('name', ARMS)
def test_the_same_numbers_as_on_the_cpu(name, runs):
    (log, near, _), (log_there, far, _) = runs(name)
    assert all(p.device.type == 'pretend'
               for p in far.core.parameters()) and not any(p.device.type == 'pretend'
                                                           for p in near.core.parameters())
    assert [x['loss'] for x in log_there if 'loss' in x] == pytest.approx([x['loss']
        for x in log if 'loss' in x], rel=NEAR.get(name, 1e-6), abs=1e-7)
    assert [x['val'] for x in log_there if 'val' in x] == [x['val'] for x in log if 'val' in x]
    assert all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ('i2t', 't2i')
               for a, b in [[rank_split(t.core, t.val) for t in (near, far)]])


@pytest.mark.parametrize('name', ARMS)
def test_a_step_keeps_to_its_budget(name, runs):
    costs, n = runs(name)[1][2], LAST - FIRST
    _, waits, uploads, operations = ARMS[name]
    assert sum(costs['waits'].values()) <= waits*n, costs['waits']
    assert sum(costs['uploads'].values()) <= uploads*n, costs['uploads']
    assert costs['operations'] <= operations


@pytest.mark.parametrize('model', ['scan_t2i', 'bfan', 'cross'])
def test_a_memory_of_models_without_vectors_is_refused_there_too(model, tmp_path):
    cfg = config(SMALL | MODELS[model][0] | dict(method='fne(queue=256)'))
    with pytest.raises(ValueError, match='a memory keeps one vector'): ran(cfg, tmp_path/'run', 'auto')


def test_joined_buckets_give_the_same_loss(monkeypatch, tmp_path):
    "As many sentences go together as the device wants, or as few as on the CPU"
    cfg = config(SMALL | ARMS['tags_dc'][0])
    def first(enough):
        monkeypatch.setattr(generator, '_enough', lambda *_: enough)
        t = loop.prepare(cfg, few(cfg, tmp_path), 'cpu')
        return float(sum(loop.train_step(t, torch.arange(cfg.batch), 0).values()))
    assert first(0) == pytest.approx(first(10**6), rel=1e-6)


def places(t):
    "On which kind of device every tensor of an owner's state is"
    keepers = [o for o in t.stateful() if hasattr(o, 'state_dict')]
    return {(i, k): v.device.type for i, o in enumerate(keepers)
            for k, v in o.state_dict().items() if isinstance(v, torch.Tensor)}


# every kind of method, and every kind of model with a method whose statistics are a part of its state
KILLED = [*KINDS, 'fne_faithful', 'captioner', *(f'{model} fne' for model in MODELS)]


@pytest.mark.parametrize('name', KILLED)
def test_killed_there_and_gone_on_with(name, runs, tmp_path):
    "The same bytes as without the interruption, and every owner's state where it was"
    cfg = config(SMALL | ARMS[name][0])
    log, whole, _ = runs(name)[1]
    with pytest.raises(KeyboardInterrupt): ran(cfg, tmp_path/'run', 'auto', every=2, stop=5)
    log_again, again, _ = ran(cfg, tmp_path/'run', 'auto', every=2)
    assert log_again == log and places(again) == places(whole)
    assert all(torch.equal(v.cpu(), again.core.state_dict()[k].cpu())
               for k, v in whole.core.state_dict().items())


def test_a_memory_left_on_the_host_is_found(tmp_path, monkeypatch):
    """As it was until 2026-11: what was loaded stayed where the file was read, and the first resumed step
    of FNE failed on a GPU"""
    def load(self, d):
        self.images, self.texts, self.ids, self.caps = (d[k].clone()
                                                        for k in ('images', 'texts', 'ids', 'caps'))
        self.at, self.written = d['place'].tolist()
    make = Ring.make
    monkeypatch.setattr(Ring, 'load_state_dict', load)
    monkeypatch.setattr(Ring, 'make', lambda self, like: self.images is None and make(self, like))
    cfg = config(SMALL | ARMS['fne'][0])
    with pytest.raises(KeyboardInterrupt): ran(cfg, tmp_path/'run', 'auto', every=2, stop=5)
    with pytest.raises(RuntimeError, match='same device'): ran(cfg, tmp_path/'run', 'auto', every=2)


@pytest.mark.parametrize('name', ['fne', 'aoq', 'tags'])
def test_state_is_put_where_it_was(name, runs):
    "Also into owners that have already worked: a state from the host goes to the device of what it replaces"
    t = runs(name)[1][1]
    keepers = [o for o in t.stateful() if hasattr(o, 'state_dict')]
    before = places(t)
    assert 'pretend' in before.values()
    for o in keepers: o.load_state_dict({k: v.cpu() for k, v in o.state_dict().items()})
    assert places(t) == before


# ---- pictures

@pytest.mark.parametrize('kind', VIEWS)
def test_pictures_change_to_the_same_bytes_and_nobody_waits(kind):
    x = torch.randint(0, 256, (40, 24, 24, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    ids, there = torch.arange(40)*7 + 10**9, x.to(DEVICE)
    want = augment(x, ids, 3, 2, kind)
    LEDGER.clear()
    got = augment(there, ids, 3, 2, kind)
    assert not LEDGER.waits and not LEDGER.blocking and got.device.type == 'pretend'
    assert torch.equal(got.cpu(), want) and (kind == 'none') == torch.equal(want, x)


@pytest.mark.parametrize('name', OPERATIONS)
def test_every_operation_on_pictures_is_the_same(name):
    x = torch.randint(0, 200, (3, 12, 12, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x[1], sign = 77, torch.tensor([1., -1., 1.]).double()
    assert torch.equal(OPERATIONS[name](x.to(DEVICE), sign, 7).cpu(), OPERATIONS[name](x, sign, 7))


# ---- mining and ranking

def vectors(n, seed):
    return torch.nn.functional.normalize(torch.randn(n, 32, generator=torch.Generator().manual_seed(seed)),
                                         dim=1)


@pytest.mark.parametrize('how', ['torch', 'half'])
def test_mining_finds_the_same(how):
    q, k, own_q, own_k = vectors(60, 0), vectors(300, 1), torch.arange(60), torch.arange(300) % 60
    near, far = (offline_mining.mine(*(f(x) for x in (q, k, own_q, own_k)), 20, how=how)[0]
                 for f in (lambda x: x, lambda x: x.to(DEVICE)))
    assert torch.equal(near.idx, far.idx) and torch.allclose(near.score, far.score, atol=1e-6)


def test_ranks_are_the_same():
    q, k, own = vectors(60, 0), vectors(300, 1), torch.arange(300) % 60
    near, far = ranks_module.ranks(q, k, own), ranks_module.ranks(q.to(DEVICE), k.to(DEVICE), own)
    assert (near.i2t == far.i2t).all() and (near.t2i == far.t2i).all()


def test_search_and_audit_are_the_same(runs, tmp_path):
    cfg = config(SMALL | ARMS['vsepp'][0])
    both, found = [t for _, t, _ in runs('vsepp')], []
    for t in both:
        s = shelf(t.core, t.vocab, few(cfg, tmp_path), 'test', next(t.core.parameters()).device)
        asked = list(s.batches.split.captions[:5])
        found.append([x.cpu() for x in (*find_images(s, asked, 3), *find_sentences(s, [0, 4, 7], 3))])
    assert all(torch.allclose(a.double(), b.double(), atol=1e-6) for a, b in zip(*found))
    images, sentences = zip(*([x.cpu() for x in embed(t.core, t.val)] for t in both))
    near, far = (audit(i, s, both[0].val.split.img_of) for i, s in zip(images, sentences))
    assert len(near)
    pd.testing.assert_frame_equal(near, far, rtol=1e-4, atol=1e-6)


# ---- the device itself

def test_tensors_of_two_devices_do_not_mix():
    a, b = torch.ones(3).to(DEVICE), torch.ones(3)
    for f in (lambda: a + b, lambda: torch.stack([a, b]), lambda: b[a.long()],
              lambda: a.index_put((torch.tensor([0], device=DEVICE),), b[:1]), lambda: a @ b):
        with pytest.raises(RuntimeError, match='same device'): f()
    # numbers may come along
    assert (a + 1.).cpu().tolist() == (a + torch.tensor(1.)).cpu().tolist() == [2., 2., 2.]
    with pytest.raises(TypeError, match="can't convert"): a.numpy()


@pytest.mark.parametrize('f,waits,blocking', [
    (lambda x: x + 1, 0, 0), (lambda x: x.sum().item(), 1, 0), (lambda x: bool((x > 0).all()), 1, 0),
    (lambda x: x[x > 0], 1, 0), (lambda x: x.nonzero(), 1, 0),
    (lambda x: x.cpu(), 1, 0), (lambda x: x.tolist(), 1, 0), (lambda x: x[[0, 1]], 0, 1),
    (lambda x: x[torch.tensor([0])], 0, 1),
    (lambda x: torch.ones(2).to(DEVICE), 0, 1), (lambda x: torch.ones(2).to(DEVICE, non_blocking=True), 0, 0),
    (lambda x: torch.tensor(2., device=DEVICE), 0, 1),
    (lambda x: torch.zeros(2, device=DEVICE), 0, 0),
    (lambda x: x.repeat_interleave(torch.tensor([1, 2, 1], device=DEVICE)), 1, 1),
    (lambda x: x.unique(), 1, 0)])
def test_what_costs_time_is_counted(f, waits, blocking):
    x = torch.tensor([1., 0., 2.]).to(DEVICE)
    LEDGER.clear()
    f(x)
    assert (sum(LEDGER.waits.values()), sum(LEDGER.blocking.values())) == (waits, blocking)


@pytest.mark.parametrize('made', [lambda: GRUTower(9, 6, 5), lambda: GRUTower(9, 6, 5, pool='gpo')])
def test_recurrent_towers_have_the_same_gradients(made):
    torch.manual_seed(0)
    near = made()
    torch.manual_seed(0)
    far = made().to(DEVICE)
    x = torch.randint(1, 9, (5, 4))
    n = torch.tensor([4, 1, 3, 2, 4])
    for t, y in ((near, near(x, n)), (far, far(x.to(DEVICE), n.to(DEVICE)))):
        (y*torch.arange(6., device=y.device)).sum().backward()
    for (k, p), (_, q) in zip(near.named_parameters(), far.named_parameters()):
        assert torch.allclose(p.grad, q.grad.cpu(), atol=1e-5), k


def test_the_table(runs, capsys):
    "What was measured: printed for whoever looks"
    with capsys.disabled():
        head = ('loss, CPU', 'loss there', 'waits', 'blocking', 'operations', 'kernels')
        widths = (12, 12, 7, 10, 12, 9)
        print(f'\n{"model, method":24}' + ''.join(f'{x:>{w}}' for x, w in zip(head, widths)))
        for name, ((log, *_), (far, _, c)) in runs.made.items():
            n = LAST - FIRST
            last, there = ([x['loss'] for x in rows if 'loss' in x][-1] for rows in (log, far))
            waits, uploads = (sum(c[k].values())/n for k in ('waits', 'uploads'))
            ops = f'{c["operations"]:12.0f}{c["kernels"]:9.0f}'
            print(f'{name:24}{last:12.6f}{there:12.6f}{waits:7.1f}{uploads:10.1f}{ops}')
