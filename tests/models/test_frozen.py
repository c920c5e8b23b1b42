"""Frozen networks are run once: what is looked up equals what would be computed, for every network,
pooling and kind of freezing."""
import copy
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from itm_nb.models import frozen_cache
from itm_nb.data.folds import folds
from itm_nb.data.pixels import Pixels
from itm_nb.data.splits import Split
from itm_nb.data.tokenizers import load
from itm_nb.models.encode import embed
from itm_nb.models.factory import from_pretrained
from itm_nb.models.frozen_cache import (
    keep_pictures, keep_sentences, Reading, reading_of, sentence_rows, stored)
from itm_nb.models.parts import ImageParts, network_of, TextParts
from itm_nb.models.pretrained import describe, find, layers, tower
from itm_nb.training.config import config, Config
from itm_nb.training.corpus import Corpus, in_fold
from itm_nb.training.loop import evaluate, fit, Inputs, prepare, train_step
from itm_nb.runs.identity import run_id

SMALL = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
EYE = dict(SMALL, patch_size=8)
VIT, BERT = json.dumps(dict(EYE, model_type='vit')), json.dumps(dict(SMALL, model_type='bert'))
CLIP = json.dumps(dict(model_type='clip', projection_dim=16, vision_config=EYE, text_config=SMALL))
SIGLIP = json.dumps(dict(model_type='siglip', vision_config=EYE, text_config=SMALL))
MOBILE = json.dumps(dict(model_type='mobilenet_v2', depth_multiplier=.1, depth_divisible_by=4, min_depth=4,
                         finegrained_output=False))
T5 = json.dumps(dict(model_type='t5', d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2))
MODERN = json.dumps(dict(SMALL, model_type='modernbert', local_attention=4, cls_token_id=2, sep_token_id=3))
COLOURS, SHAPES = ('red', 'green', 'blue', 'white'), ('square', 'bar', 'pole')


def sentences(n=40, words=50, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (n,), generator=g)
    tokens = torch.randint(5, words-1, (n, 11), generator=g)
    return tokens.masked_fill(torch.arange(11) >= lengths[:, None], 0), lengths


def pictures(folder, part, n, start):
    "Coloured shapes as image files, two sentences each"
    g = np.random.default_rng(start)
    files, caps = [], []
    for i in range(n):
        c, s = g.integers(4), g.integers(3)
        x = g.integers(80, 120, (20, 20, 3)).astype(np.uint8)
        h, w = ((10, 10), (4, 16), (16, 4))[s]
        x[2:2+h, 2:2+w] = [(220, 30, 30), (30, 200, 30), (30, 30, 220), (250, 250, 250)][c]
        files.append(folder/f'{part}{i}.png')
        Image.fromarray(x).save(files[-1])
        caps += [f'a {COLOURS[c]} {SHAPES[s]} {i % 7}', f'there is one {SHAPES[s]} , {COLOURS[c]}']
    return Split(part, None, np.ones(n, int), caps, np.arange(2*n)//2, np.arange(n)+start,
                 np.arange(2*n)+10*start, source=part, files=files)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp('drawn')
    return {p: pictures(folder, p, n, s) for p, n, s in (('train', 40, 1000), ('val', 16, 2000),
                                                         ('test', 16, 3000))}


BASE = dict(data='images', size=16, dim=16, d_word=8, epochs=2, batch=16, method='infonce', lr=.003,
            image_pool='mean', dropout=.1, tokenizer='pieces', wordpiece_vocab=60)


def data(cfg, drawn, states=''):
    return Corpus('drawn', drawn.__getitem__, pixels=lambda s: Pixels(s.files, cfg.size, cfg.resize),
                  states=str(states))


def files(folder): return sorted(p.name for p in Path(folder).glob('states-*.npy'))


def same(a, b, eps=1e-6): return float((a-b).detach().abs().max()) <= eps


@pytest.mark.parametrize('freeze', ['all', '2', '2+embeddings'])
@pytest.mark.parametrize('net,pool', [(BERT, p) for p in ('mean', 'cls', 'last', 'max', 'gpo', 'pooler')]
                         + [(CLIP, 'x'), (SIGLIP, 'x'), (MODERN, 'mean'), (T5, 'mean')])
def test_looked_up_sentences_equal_computed_ones_with_their_gradient(net, pool, freeze, tmp_path):
    torch.manual_seed(0)
    made = tower(**describe(find(net), 'text', 16, pool, n_words=50, freeze=freeze))
    encoded = sentences()
    weights = torch.randn(40, 16)
    def one():
        made.eval()
        made.zero_grad()
        out = made(*encoded)
        if out.requires_grad: (out*weights).sum().backward()           # of a whole frozen pair nothing learns
        return out.detach(), {k: p.grad.clone() for k, p in made.named_parameters() if p.grad is not None}
    plain, grads = one()
    kept = keep_sentences(made, [encoded], tmp_path)
    if kept is None:
        assert freeze != 'all' and net in (SIGLIP, T5)
        return       # padding counts; layers hand on position biases
    found, again = one()
    assert same(plain, found) and grads.keys() == again.keys()
    for k in grads: assert same(grads[k], again[k], 1e-4*(1+float(grads[k].abs().max()))), k
    assert kept.pooled == (freeze == 'all' and pool not in ('max', 'gpo'))
    if freeze == 'all': assert not [k for k in grads if k.startswith('net.')]
    new = sentences(6, seed=9)
    # some are not in the file
    mixed = made(torch.cat([encoded[0][:3], new[0]]), torch.cat([encoded[1][:3], new[1]]))
    made.kept = None
    assert same(mixed, made(torch.cat([encoded[0][:3], new[0]]), torch.cat([encoded[1][:3], new[1]])))


@pytest.mark.parametrize('freeze', ['all', '2'])
@pytest.mark.parametrize('net,pool', [(VIT, p) for p in ('mean', 'cls', 'topk', 'all', 'pooler')]
                         + [(CLIP, 'x'), (SIGLIP, 'x'), (MOBILE, 'mean'), (MOBILE, 'max')])
def test_looked_up_pictures_equal_computed_ones_with_their_gradient(net, pool, freeze, drawn, tmp_path):
    torch.manual_seed(0)
    made = tower(**describe(find(net), 'vision', 16, pool, 16, freeze=freeze)).eval()
    s = drawn['val']
    x = Pixels(s.files, 16)[:]
    weights = torch.randn(16, 16)
    def one(given):
        made.zero_grad()
        out = made(given)
        if out.requires_grad: (out*weights).sum().backward()
        return out.detach(), {k: p.grad.clone() for k, p in made.named_parameters() if p.grad is not None}
    plain, grads = one(x)
    kept = keep_pictures(made, [(drawn['train'].files, lambda: Pixels(drawn['train'].files, 16)),
                                (s.files, lambda: x)], tmp_path)
    given = kept.pictures(s.files)[torch.arange(16)]
    assert given.ndim == 3
    found, again = one(given)
    assert same(plain, found) and grads.keys() == again.keys()
    for k in grads: assert same(grads[k], again[k], 1e-4*(1+float(grads[k].abs().max()))), k
    assert same(made(x), plain), 'the same tower reads raw pictures'
    if freeze == 'all' and pool in ('mean', 'cls'): assert given.shape[1] == 1


@pytest.mark.parametrize('about', [dict(vision=VIT, text_model=BERT, freeze='all', text_freeze='all'),
                                   dict(vision=VIT, text_model=BERT, freeze='2', text_freeze='1'),
                                   dict(vision=CLIP, text_model=CLIP, freeze='all', text_freeze='all'),
                                   dict(vision=VIT, text_model=BERT, freeze='all', text_freeze='all',
                                        similarity='scan_t2i', image_pool='topk'),
                                   dict(vision=VIT, text_model=BERT, freeze='all', text_freeze='all',
                                        image_parts='net:-1:mean+net:2:max+net:out:first',
                                        text_parts='heads_words'),
                                   dict(vision=VIT, text_model=BERT, freeze='all', text_freeze='2',
                                        image_parts='net:pooler', text_parts='net:1:mean+net:3:max|bag'),
                                   dict(vision=VIT, text_model=BERT, freeze='all', text_freeze='all',
                                        image_parts='net:-1', text_parts='token_states',
                                        similarity='bfan_equal')],
                         ids=['frozen', 'last_layers', 'clip', 'scan', 'parts', 'parts_last_layer',
                              'parts_bfan'])
def test_a_run_with_kept_states_is_the_run_without_and_saves_a_whole_model(about, drawn, tmp_path):
    cfg = config(BASE | about)
    plain, kept = data(cfg, drawn), data(cfg, drawn, tmp_path/'states')
    a, b = prepare(cfg, plain), prepare(cfg, kept)
    # before training
    for x, y in zip(embed(a.core, a.val), embed(b.core, b.val)): assert same(real_ones(x), real_ones(y))
    for x, y in zip(a.core.state_dict().values(), b.core.state_dict().values()):
        assert same(x.float(), y.float(), 1e-5)
    assert (network_of(b.core.text_tower).kept
            and b.train.pixels.files is network_of(b.core.image_tower).kept.files)
    out = fit(cfg, tmp_path/'run', kept, progress=False)
    caught = embed(out.core, out.val)
    n = len(files(tmp_path/'states'))
    model, vocab = from_pretrained(tmp_path/'run'/'best'), load(tmp_path/'run'/'best'/'vocab.json')
    raw = embed(model, plain.batches(drawn['val'], vocab))
    model.eval()                              # no states anywhere: pixels and sentences
    S, Q = (m.matrix(*e) for m, e in ((out.core, caught), (model, raw)))
    assert same(S, Q)
    r, *_ = evaluate(tmp_path/'run', kept)
    q, *_ = evaluate(tmp_path/'run', plain)
    # the test part has files of its own
    assert np.array_equal(r.i2t, q.i2t) and np.array_equal(r.t2i,
                                                           q.t2i) and len(files(tmp_path/'states')) == n + 2
    # trained apart: rounding grows from step to step
    whole = fit(cfg, tmp_path/'plain', plain, progress=False)
    assert same(whole.core.matrix(*embed(whole.core, whole.val)), S, 5e-3)


def test_training_does_not_open_the_test_part(drawn, tmp_path):
    cfg = config(BASE | dict(vision=VIT, text_model=BERT, freeze='all', text_freeze='all'))
    asked = []
    d = replace(data(cfg, drawn, tmp_path/'states'), split=lambda p: (asked.append(p), drawn[p])[1])
    prepare(cfg, d)
    assert set(asked) == {'train', 'val'} and len(files(tmp_path/'states')) == 4


def test_all_folds_share_the_files_of_the_official_parts(drawn, tmp_path):
    cfg = config(BASE | dict(vision=VIT, text_model=BERT, freeze='all', text_freeze='all', wordpiece_vocab=1000))
    d = data(cfg, drawn, tmp_path/'states')
    folds(np.concatenate([s.img_ids for s in drawn.values()]), n=4, n_val=8).save(tmp_path/'four.json')
    vocab = load_vocab(drawn)
    seen = []
    for k in range(4):
        fold = in_fold(d, tmp_path/'four.json', k)
        model = prepare(cfg, d).core
        from itm_nb.training.build import remembering
        given = remembering(model, fold, vocab)
        seen.append(files(tmp_path/'states'))
        b = given.batches(fold.split('test'), vocab)
        plain = data(cfg, drawn).batches(fold.split('test'), vocab)
        found = embed(model, b)
        network_of(model.text_tower).kept = None
        for x, y in zip(found, embed(model, plain)): assert same(x, y)
    assert all(s == seen[0] for s in seen)


def load_vocab(drawn):
    from itm_nb.data.tokenizers import Pieces
    return Pieces.build([c for s in drawn.values() for c in s.captions], 60)


def real_ones(e): return e if isinstance(e, torch.Tensor) else e.x[e.mask]


def text(seed=0, **kw):
    torch.manual_seed(seed)
    return tower(**describe(find(BERT), 'text', 16, n_words=50, freeze='all') | kw).eval()


def test_another_network_other_sentences_and_another_reading_have_other_files(tmp_path):
    a, b = sentences(), sentences(seed=1)
    made = text()
    keep_sentences(made, [a], tmp_path)
    one = files(tmp_path)
    assert len(one) == 1
    keep_sentences(text(), [a], tmp_path)
    keep_sentences(text(dim=8), [tuple(x.flip(0) for x in a)], tmp_path)
    assert files(tmp_path) == one   # the head does not count
    for n, go in enumerate((lambda: keep_sentences(text(1), [a], tmp_path),
                            lambda: keep_sentences(made, [b], tmp_path),
                            lambda: keep_sentences(text(pool='cls'), [a], tmp_path),
                            lambda: keep_sentences(made, [a], tmp_path, Reading((2,), ('mean',))),
                            lambda: keep_sentences(made, [tuple(x[:39] for x in a)], tmp_path)), 2):
        go()
        assert len(files(tmp_path)) == n
    with torch.no_grad(): next(p for k, p in made.net.named_parameters() if 'layer.1' in k)[0] += 1e-3
    keep_sentences(made, [a], tmp_path)
    assert len(files(tmp_path)) == 7, 'one weight differs'


def test_what_is_above_the_frozen_layers_does_not_count(tmp_path):
    made = text(freeze='2')
    a = sentences()
    keep_sentences(made, [a], tmp_path)
    with torch.no_grad(): next(p for k, p in made.net.named_parameters() if 'layer.2' in k)[0] += 1.
    plain = (made.kept, setattr(made, 'kept', None), made(*a))[2]
    keep_sentences(made, [a], tmp_path)
    assert len(files(tmp_path)) == 1 and same(made(*a), plain)


def test_a_changed_picture_has_another_file(drawn, tmp_path):
    made = tower(**describe(find(VIT), 'vision', 16, size=16, freeze='all'))
    f = tmp_path/'a.png'
    Image.new('RGB', (20, 20), 'red').save(f)
    keep = lambda **kw: keep_pictures(made, [([f], lambda: Pixels([f], 16))], tmp_path, **kw)
    keep()
    red = made.kept.files.rows(np.array([0]))
    n = len(files(tmp_path))
    keep(frame='squash')
    assert len(files(tmp_path)) == n + 1
    Image.new('RGB', (20, 20), 'blue').save(f)
    os.utime(f, ns=(1, 1))
    keep()
    assert len(files(tmp_path)) == n + 2 and not same(made.kept.files.rows(np.array([0])), red)


@pytest.mark.parametrize('harm', ['flip', 'cut', 'grow', 'empty', 'note', 'no_note', 'gone'])
def test_a_damaged_file_is_noticed_and_made_again(harm, tmp_path):
    a, made = sentences(), text()
    plain = made(*a)
    keep_sentences(made, [a], tmp_path)
    (f,) = tmp_path.glob('*.npy')
    was = f.read_bytes()
    note = f.with_suffix('.json')
    if harm == 'flip': f.write_bytes(was[:-9] + bytes([was[-9] ^ 1]) + was[-8:])
    if harm == 'cut': f.write_bytes(was[:-64])
    if harm == 'grow': f.write_bytes(was + b'\0')
    if harm == 'empty': f.write_bytes(b'')
    if harm == 'note': note.write_text('{"key": 3')
    if harm == 'no_note': note.unlink()
    if harm == 'gone': f.unlink()
    if harm == 'no_note': keep_sentences(made, [a], tmp_path)
    else:
        with pytest.warns(UserWarning, match='damaged states are computed again'):
            keep_sentences(made, [a], tmp_path)
    assert f.read_bytes() == was and same(made(*a), plain) and not list(tmp_path.glob('.*.tmp'))


def test_a_long_file_is_checked_in_pieces(tmp_path, monkeypatch):
    f = tmp_path/'x'
    f.write_bytes(os.urandom(1 << 20))
    whole = frozen_cache._digest(f, whole=0)
    assert whole == frozen_cache._digest(f, whole=0) != frozen_cache._digest(f)
    f.write_bytes(f.read_bytes()[:-1])
    assert frozen_cache._digest(f, whole=0) != whole


def _make(folder, log, wait, die):
    def blocks():
        with open(log, 'a') as f: f.write('x')
        yield slice(0, 2), np.ones((2, 3))
        time.sleep(wait)
        if die: os.kill(os.getpid(), signal.SIGKILL)
        yield slice(2, 4), np.full((2, 3), 2.)
    note, x = stored(Path(folder)/'states-a.npy', 'key', (4, 3), blocks, {})
    assert x.sum() == 18


def test_of_two_processes_one_computes_and_the_other_waits_for_it(tmp_path):
    go = multiprocessing.get_context('fork').Process
    ps = [go(target=_make, args=(tmp_path, tmp_path/'log', .5, False)) for _ in range(2)]
    for p in ps: p.start()
    for p in ps:
        p.join(60)
        assert p.exitcode == 0
    assert (tmp_path/'log').read_text() == 'x'


def test_killed_or_failed_while_writing_leaves_nothing_that_counts(tmp_path):
    p = multiprocessing.get_context('fork').Process(target=_make, args=(tmp_path, tmp_path/'log', 0, True))
    p.start()
    p.join(60)
    assert (p.exitcode == -signal.SIGKILL and not list(tmp_path.glob('states-a.npy'))
            and len(list(tmp_path.glob('.*.tmp'))) == 1)
    def broken():
        yield slice(0, 2), np.ones((2, 3))
        raise OSError('disk full')
    with pytest.raises(OSError): stored(tmp_path/'states-a.npy', 'key', (4, 3), broken, {})
    assert not list(tmp_path.glob('.*.tmp'))
    _make(tmp_path, tmp_path/'log', 0, False)
    assert (tmp_path/'log').read_text() == 'xx'


def test_a_copy_of_a_model_shares_the_file(tmp_path):
    made = text()
    keep_sentences(made, [sentences()], tmp_path)
    other = copy.deepcopy(made)
    assert other.kept is made.kept
    assert same(other(*sentences()), made(*sentences()))


def test_nothing_is_kept_where_nothing_is_frozen_or_padding_counts(tmp_path):
    for kw in (dict(freeze=''), dict(freeze='embeddings'), dict(freeze='stats'), dict(pool='all')):
        assert reading_of(text(**kw)) is None and keep_sentences(text(**kw), [sentences()], tmp_path) is None
    assert not files(tmp_path)


def test_states_that_do_not_fit_the_disk_are_not_kept_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_cache.shutil, 'disk_usage', lambda _: type('U', (), dict(free=100)))
    made = text()
    with pytest.warns(UserWarning, match='too little room'):
        assert keep_sentences(made, [sentences()], tmp_path) is None
    assert made.kept is None and torch.isfinite(made(*sentences())).all()


def test_augmented_pictures_are_not_looked_up(drawn, tmp_path):
    cfg = config(BASE | dict(vision=VIT, text_model=BERT, freeze='all', text_freeze='all', augment='rand'))
    t = prepare(cfg, data(cfg, drawn, tmp_path))
    assert (network_of(t.core.image_tower).kept is None and network_of(t.core.text_tower).kept
            and t.train.take(torch.arange(4))['feats'].ndim == 4)


def test_blocks_are_measured_on_the_training_part_saved_and_never_learned(drawn, tmp_path):
    cfg = config(BASE | dict(vision=VIT, text_model=BERT, freeze='all', text_freeze='all',
                             image_parts='net:-1:mean*2', text_parts='heads_words'))
    d = data(cfg, drawn, tmp_path/'s')
    t = prepare(cfg, d)
    blocks = t.core.text_tower.blocks
    before = {k: v.clone() for k, v in t.core.state_dict().items() if k.endswith(('centre', 'factor'))}
    n = len(t.train.lengths)
    x = (t.core.text_tower.raw(*t.train.texts(torch.arange(n)).values()) - blocks.centre)*blocks.factor
    assert len(before) == 4 and same(x.mean(0), torch.zeros(x.shape[1]), 1e-5)
    assert [round(float(p.norm(dim=1).mean()), 4) for p in x.split(blocks.widths, 1)] == [1.]*4
    y = t.core.image_tower
    z = (y.raw(t.train.images(slice(None))['feats'], None) - y.blocks.centre)*y.blocks.factor
    assert abs(float(z.norm(dim=1).mean()) - 2) < 1e-4
    out = fit(cfg, tmp_path/'run', d, progress=False).core.state_dict()
    again = from_pretrained(tmp_path/'run'/'best').state_dict()
    for k, v in before.items(): assert torch.equal(out[k], v) and torch.equal(again[k], v)
    assert not torch.equal(t.core.text_tower.bag.table, out['text_tower.bag.table'])


def test_words_of_a_bag_start_from_the_network_and_unseen_ones_stay_there(drawn, tmp_path):
    cfg = config(BASE | dict(text_model=BERT, vision=VIT, text_freeze='all', text_parts='net:-1:mean+bag'))
    d = data(cfg, drawn, tmp_path/'s')
    t = prepare(cfg, d)
    bag, words = t.core.text_tower.bag, t.core.text_tower.words
    seen = torch.zeros(len(t.vocab), dtype=torch.bool)
    tokens, lengths = t.vocab.encode(drawn['train'].captions)
    seen[tokens[torch.arange(tokens.shape[1]) < lengths[:, None]]] = True
    assert len(bag.table) == int(seen.sum())+1 < len(t.vocab) and torch.equal(bag.table[1:], words[seen])
    a, b = int(seen.nonzero()[0]), int((~seen).nonzero()[0])
    mean = bag(torch.tensor([[a, b, 0]]), torch.tensor([2]), words)[0]
    assert same(mean, (words[a]+words[b])/2)
    assert torch.equal(bag.states(torch.tensor([[a, b]]), torch.tensor([2]), words)[0], words[[a, b]])


def test_a_run_of_pieces_can_start_from_another(drawn, tmp_path):
    cfg = config(BASE | dict(vision=VIT, text_model=BERT, freeze='all', text_freeze='all', text_parts='heads',
                             epochs=1))
    d = data(cfg, drawn, tmp_path/'s')
    first = fit(cfg, tmp_path/'a', d, progress=False).core.state_dict()
    t = fit(replace(cfg, lr=1e-9, seed=1), tmp_path/'b', d, progress=False, inputs=Inputs(init=tmp_path/'a'))
    for k, v in t.core.state_dict().items(): assert same(v.float(), first[k].float(), 1e-5), k


def test_new_settings_at_their_default_change_no_id():
    from itm_nb.core.project import template
    from itm_nb.runs.parameters import parameters
    values = {k: p.default for k, p in parameters(template('train')).items()}
    assert {'image_parts', 'text_parts'} <= values.keys()
    old = {k: v for k, v in values.items() if k not in ('image_parts', 'text_parts')}
    assert run_id('train', values) == run_id('train', old) != run_id('train',
        values | dict(text_parts='heads'))


@pytest.mark.parametrize('given,said', [(dict(text_parts='net:1:mean'), 'name a text_model'),
                                        (dict(image_parts='vector', image='vsrn'),
                                         'VSRN is an image tower of its own'),
                                        (dict(text_parts='bag', similarity='cross'), 'parts are for towers')])
def test_parts_that_cannot_be_are_refused_with_the_settings(given, said):
    with pytest.raises(ValueError, match=said): config(given)


@pytest.mark.parametrize('parts,said', [('net:9:mean', 'layer 9 of a network that has 3'),
                                        ('net:1:avg', 'no pooling called'),
                                        ('net:1', 'say how net is pooled'), ('', 'no block'),
                                        ('regions:mean', 'no regions')])
def test_parts_that_cannot_be_are_refused_with_the_model(parts, said, drawn):
    cfg = config(BASE | dict(vision=VIT, text_model=BERT, text_parts=parts or 'bag+')); 
    with pytest.raises(ValueError, match=said): prepare(cfg, data(cfg, drawn))
