"""Networks of `transformers` as towers: they train, freeze, save, load and resume like our own; nothing
outside the repository is needed."""
import hashlib
import json
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from itm_nb.core import project
from itm_nb.models import pretrained
from itm_nb.runs import identity, parameters
from itm_nb.core.errors_files import DataError
from itm_nb.core.random import order
from itm_nb.data.pixels import Pixels
from itm_nb.data.splits import Split
from itm_nb.data.tokenizers import Pieces
from itm_nb.models.factory import from_pretrained, save_pretrained
from itm_nb.models.pretrained import (
    depths, describe, fill, find, freeze_parts, groups, layers, network, TextTower, tower, VisionTower)
from itm_nb.models.similarity import Model
from itm_nb.training.checkpoint import Stopped
from itm_nb.training.config import config, Config, current_names
from itm_nb.training.corpus import corpus, Corpus
from itm_nb.training.loop import evaluate, fit, prepare, Saving, train_step

ROOT = Path(__file__).parents[2]
SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
EYE = dict(SMALL, patch_size=8)
VIT, BERT = json.dumps(dict(EYE, model_type='vit')), json.dumps(dict(SMALL, model_type='bert'))
CLIP = json.dumps(dict(model_type='clip', projection_dim=16, vision_config=EYE, text_config=SMALL))
SIGLIP = json.dumps(dict(model_type='siglip', vision_config=EYE, text_config=SMALL))
MOBILE = json.dumps(dict(model_type='mobilenet_v2', depth_multiplier=.1, depth_divisible_by=4, min_depth=4,
                         finegrained_output=False))
BASE = dict(data='images', size=16, dim=16, d_word=8, epochs=2, batch=16, method='infonce', lr=.003,
            image_pool='mean', dropout=.1, tokenizer='pieces', wordpiece_vocab=60)
PAIRS = dict(vit_bert=dict(vision=VIT, text_model=BERT, augment='rand'),
             clip=dict(vision=CLIP, text_model=CLIP, augment='crop'),
             siglip=dict(vision=SIGLIP, text_model=SIGLIP),
             mobile=dict(vision=MOBILE, text='gru', tokenizer='words', freeze='stats'))
COLOURS, SHAPES = ('red', 'green', 'blue', 'white'), ('square', 'bar', 'pole')


def draw(folder, part, n, start):
    "Coloured shapes on grey as image files, two sentences each"
    g = np.random.default_rng(start)
    files, caps = [], []
    for i in range(n):
        c, s = g.integers(4), g.integers(3)
        x = np.full((20, 20, 3), 90, np.uint8) + g.integers(0, 20, (20, 20, 3)).astype(np.uint8)
        h, w = ((10, 10), (4, 16), (16, 4))[s]
        a, b = g.integers(0, 20-h+1), g.integers(0, 20-w+1)
        x[a:a+h, b:b+w] = [(220, 30, 30), (30, 200, 30), (30, 30, 220), (250, 250, 250)][c]
        files.append(folder/f'{part}{i}.png')
        Image.fromarray(x).save(files[-1])
        caps += [f'a {COLOURS[c]} {SHAPES[s]}', f'there is one {SHAPES[s]} , {COLOURS[c]}']
    return Split(part, None, np.ones(n, int), caps, np.arange(2*n)//2, np.arange(n)+start,
                 np.arange(2*n)+10*start, source=part, files=files)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp('drawn')
    return {p: draw(folder, p, n, s) for p, n, s in (('train', 40, 1000), ('val', 16, 2000),
                                                     ('test', 16, 3000))}


def pictures(cfg, drawn, cache=None, workers=0, models=''):
    return Corpus('drawn', drawn.__getitem__, pixels=lambda s: Pixels(s.files, cfg.size, cfg.resize, cache),
                  workers=workers, models=models)


def digest(run):
    files = [p for p in sorted(Path(run).rglob('*')) if p.is_file()
             and p.name not in ('timing.jsonl', 'lock') and p.parent.name != 'previous']
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize('name', PAIRS)
def test_trains_saves_loads_and_works_ahead(name, drawn, tmp_path):
    """Through `fit` and `evaluate`; equal bytes for 0 and 4 loader threads, with and without a cache;
    equal scores after loading elsewhere"""
    cfg = config(BASE | PAIRS[name])
    run = tmp_path/'a'
    t = fit(cfg, run, pictures(cfg, drawn), progress=False)
    evaluate(run, pictures(cfg, drawn))
    again = tmp_path/'b'
    other = pictures(cfg, drawn, tmp_path/'cache', workers=4)
    fit(cfg, again, other, progress=False)
    evaluate(again, other)
    assert digest(run) == digest(again) and t.steps == 10
    b = t.val.take(torch.arange(20))
    model = t.core.eval()
    os.rename(run/'best', tmp_path/'elsewhere')
    loaded = from_pretrained(tmp_path/'elsewhere')
    with torch.no_grad():
        a, z = (m(b['feats'], b['mask'].sum(1), b['tokens'], b['lengths']) for m in (model, loaded))
        assert torch.equal(model.matrix(*a), loaded.matrix(*z)) and a[0].shape == (20, 16)
    save_pretrained(loaded, tmp_path/'c')
    assert all((tmp_path/'c'/f).read_bytes() == (tmp_path/'elsewhere'/f).read_bytes()
               for f in ('config.json', 'model.safetensors'))


def test_it_learns_something(drawn, tmp_path):
    "Twelve kinds of pictures and their sentences: one batch again and again"
    cfg = config(BASE | PAIRS['vit_bert'] | dict(augment='none', batch=32, lr=.005, decay='none', dropout=0.))
    t = prepare(cfg, pictures(cfg, drawn))
    caps = order(80, 0, 0)[:32]
    costs = [float(sum(train_step(t, caps, 0).values())) for _ in range(60)]
    assert np.isfinite(costs).all() and costs[-1] < .7*costs[0]


@pytest.mark.parametrize('step', [3, 6])
def test_killed_and_resumed_with_pictures(step, drawn, tmp_path):
    cfg = config(BASE | PAIRS['vit_bert'] | dict(freeze='1', layer_decay=.5, weight_decay=.01))
    ways = [tmp_path/'whole', tmp_path/'killed']
    fit(cfg, ways[0], pictures(cfg, drawn), progress=False, saving=Saving(every=2))
    pid = os.fork()
    if pid == 0:
        try: fit(cfg, ways[1], pictures(cfg, drawn, tmp_path/'cache', 2), progress=False,
                 saving=Saving(every=2), on_step=lambda s: os.kill(os.getpid(), signal.SIGKILL) if s == step else None)
        finally: os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    fit(cfg, ways[1], pictures(cfg, drawn, tmp_path/'cache', 2), progress=False, saving=Saving(every=2))
    assert digest(ways[0]) == digest(ways[1])


def test_region_features_with_0_and_4_threads(tmp_path):
    cfg = Config(preset='tiny', text='gru', dim=16, d_word=8, image_hidden=16, epochs=2, batch=64,
                 method='vsepp', warmup=1)
    for n in (0, 4):
        data = corpus(cfg, workers=n)
        fit(cfg, tmp_path/str(n), data, progress=False)
        evaluate(tmp_path/str(n), data)
    assert digest(tmp_path/'0') == digest(tmp_path/'4')


# ---- freezing and rates

def built(cfg, drawn): return prepare(cfg, pictures(cfg, drawn))


@pytest.mark.parametrize('name,freeze,text_freeze',
                         [('vit_bert', 'all', 'embeddings'), ('vit_bert', '1', '2'),
                          ('clip', 'embeddings', 'all'), ('mobile', 'all', ''),
                                                    ('mobile', '5+stats', '')])
def test_what_is_frozen_keeps_its_bits(name, freeze, text_freeze, drawn):
    t = built(config(BASE | PAIRS[name] | dict(freeze=freeze, text_freeze=text_freeze, weight_decay=.1)),
              drawn)
    model = t.core
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for i in range(3): train_step(t, order(80, 0, i)[:16], i)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    for side, what in (('image_tower', freeze), ('text_tower', text_freeze)):
        net = getattr(getattr(model, side), 'net', None)
        if net is None: continue
        depth, top = depths(net), {'all': 99, 'embeddings': 0, '': -1}.get(what.split('+')[0], None)
        top = int(what.split('+')[0]) if top is None else top
        assert not [k for k, d in depth.items() if d <= top and f'{side}.net.{k}' in moved]
        assert all(any(f'{side}.net.{k}' in moved for k, d in depth.items() if d == at)
                   for at in set(depth.values()) if at > top)
        if 'stats' in what or what == 'all':
            assert not [k for k in moved if k.startswith(f'{side}.net')
                        and ('running' in k or 'num_batches' in k)]
    assert any('joint' in k for k in moved) or name == 'siglip'


def test_statistics_drift_unless_they_are_frozen(drawn):
    t = built(config(BASE | PAIRS['mobile'] | dict(freeze='')), drawn)
    before = {k: v.clone() for k, v in t.core.state_dict().items() if 'running' in k}
    train_step(t, torch.arange(16), 0)
    assert before and all(not torch.equal(v, t.core.state_dict()[k])
                          for k, v in before.items() if 'mean' in k)


@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize('freeze', ['', '1', 'all'])
def test_every_weight_that_learns_is_in_one_group(name, freeze, drawn):
    cfg = config(BASE | PAIRS[name] | dict(freeze=freeze, layer_decay=.5, pretrained_lr_scale=.1, weight_decay=.01))
    t = built(cfg, drawn)
    model = t.core
    seen = [id(p) for g in t.opt.param_groups for p in g['params']]
    assert sorted(seen) == sorted(id(p) for p in model.parameters()
                                  if p.requires_grad) and len(set(seen)) == len(seen)
    train_step(t, torch.arange(16), 0)
    rate = t.opt.param_groups[0]['lr']/t.opt.param_groups[0]['scale']
    scale = {id(p): g['scale'] for g in t.opt.param_groups for p in g['params']}
    for side in ('image_tower', 'text_tower'):
        made = getattr(model, side)
        for k, p in made.named_parameters():
            if not p.requires_grad: continue
            want = .1*.5**(layers(made.net) + 1 - depths(made.net)[k[4:]]) if k.startswith('net.') else 1.
            assert abs(scale[id(p)] - want) < 1e-12
    assert all(abs(g['lr'] - rate*g['scale']) < 1e-12
               and (g['weight_decay'] > 0) == all(p.ndim > 1 for p in g['params'])
               for g in t.opt.param_groups)


@pytest.mark.parametrize('kind,extra', [('vit', EYE),
                                        ('dinov2',
                                         {k: v for k, v in EYE.items() if k != 'intermediate_size'}),
                                        ('deit', EYE),
                                        ('convnext',
                                         dict(hidden_sizes=[4, 8], depths=[1, 2], num_stages=2,
                                              patch_size=4)),
                                        ('resnet',
                                         dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                                              layer_type='basic')), ('beit', EYE),
                                        ('swin',
                                         dict(patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
                                              window_size=2)), ('siglip_vision_model', EYE)])
def test_many_kinds_of_vision_networks(kind, extra):
    source = find(json.dumps(dict(extra, model_type=kind)))
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (3, 16, 16, 3), generator=g).to(torch.uint8)
    for pool in ('mean', 'max', 'gpo', 'cls', 'pooler'):
        try: t = tower(**describe(source, 'vision', 8, pool, size=16)).eval()
        except ValueError as e:
            assert pool in ('cls', 'pooler') and ('no pooler' in str(e) or 'no first token' in str(e))
            continue
        with torch.no_grad():
            y = t(x)
            assert y.shape == (3, 8) and y.isfinite().all() and torch.allclose(t(x[1:2]), y[1:2], atol=1e-5)
        assert t.states(x).shape[::2] == (3, 8) and {0} < set(depths(t.net).values())


@pytest.mark.parametrize('kind', ['bert', 'roberta', 'distilbert', 'gpt2', 't5', 'clip_text_model',
                                  'siglip_text_model', 'mpnet', 'albert'])
@pytest.mark.parametrize('pool', ['mean', 'cls', 'last', 'max', 'gpo', 'pooler'])
def test_padding_is_never_seen(kind, pool):
    extra = dict(distilbert=dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32),
                 gpt2=dict(n_embd=16, n_layer=2, n_head=2),
                 t5=dict(d_model=16, num_layers=2, d_kv=8, num_heads=2, d_ff=32),
                 albert=dict(SMALL, embedding_size=16)).get(kind, SMALL)
    source = find(json.dumps(dict(extra, model_type=kind)))
    torch.manual_seed(0)
    made = describe(source, 'text', 8, pool, n_words=40)
    if kind == 'roberta': made['net']['pad_token_id'] = 1
    try:
        t = tower(**made).eval()
        t(torch.tensor([[5, 6]]), torch.tensor([2]))
    except (ValueError, AttributeError):
        assert pool == 'pooler'
        return
    x, n = (torch.randint(2, 40, (4, 7), generator=torch.Generator().manual_seed(0)),
            torch.tensor([7, 3, 5, 1]))
    with torch.no_grad():
        full = t(x, n)
        assert full.shape == (4, 8)
        for i in range(4): assert torch.allclose(t(x[i:i+1, :n[i]], n[i:i+1]), full[i:i+1], atol=1e-5)
        other = torch.where(torch.arange(7) < n[:,None], x, 9)
        assert torch.allclose(t(other, n), full, atol=1e-6)
        assert torch.allclose(t(x[[2, 0]], n[[2, 0]]), full[[2, 0]], atol=1e-5)


# ---- weights

@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    "A folder of networks with weights, as `transformers` saves them"
    from transformers import AutoConfig, AutoModel, BertForMaskedLM, MobileNetV2ForImageClassification
    folder = tmp_path_factory.mktemp('models')
    torch.manual_seed(3)
    words = dict(json.loads(BERT), vocab_size=60)
    BertForMaskedLM(AutoConfig.for_model(**words)).save_pretrained(folder/'bert')
    (MobileNetV2ForImageClassification(AutoConfig.for_model(
        **json.loads(MOBILE))).half().save_pretrained(folder/'mobile'))
    pair = json.loads(CLIP)
    pair['text_config'] = dict(SMALL, vocab_size=60)
    pair['vision_config'] = dict(EYE, image_size=16)
    AutoModel.from_config(AutoConfig.for_model(**pair)).save_pretrained(folder/'clip')
    pieces = Pieces.build(['a red square', 'there is one blue pole , green'], 60).made.to_str()
    for f in ('bert', 'clip'): (folder/f/'tokenizer.json').write_text(pieces)
    (folder/'mobile'/'preprocessor_config.json').write_text(json.dumps(dict(image_mean=[.4, .5, .6],
        image_std=[.2, .2, .2])))
    return folder


@pytest.mark.parametrize('cfg', [dict(vision='mobile', text_model='bert', tokenizer='own', freeze='all'),
                                 dict(vision='clip', text_model='clip', tokenizer='own', temperature=0.)])
def test_a_model_needs_its_source_only_once(cfg, shelf, drawn, tmp_path):
    """Weights, their own tokens and their own constants of normalisation; afterwards the folder of the
    source is not looked at again"""
    cfg = config(BASE | cfg)
    t = prepare(cfg, pictures(cfg, drawn, models=shelf))
    net = t.core.image_tower.net.state_dict()
    from safetensors.torch import load_file
    have = load_file(shelf/cfg.vision/'model.safetensors')
    prefix = 'mobilenet_v2.' if cfg.vision == 'mobile' else 'vision_model.'
    same = [k for k in net if prefix + k in have]
    assert same and all(torch.equal(net[k].float(), have[prefix+k].float())
                        for k in same if net[k].is_floating_point())
    if cfg.vision == 'mobile': assert t.core.config['image']['mean'] == [.4, .5, .6]
    else:
        assert torch.equal(t.core.image_tower.joint.weight,
                           have['visual_projection.weight']) and torch.equal(t.core.text_tower.joint.weight,
            have['text_projection.weight'])
    assert set(t.prints) == {'train', 'val', 'vision', 'text_model'}
    fit(cfg, tmp_path, pictures(cfg, drawn, models=shelf), progress=False)
    text = (tmp_path/'best'/'config.json').read_text()
    assert str(shelf) not in text and 'transformers_version' not in text
    evaluate(tmp_path, pictures(cfg, drawn, models='nowhere'))


@pytest.mark.parametrize('cfg', [dict(similarity='two_modes', vision=VIT, heads=2,
                                      method='vsepp|tags(mlm=0.1)'),
                                 dict(similarity='cross', vision='mobile', heads=2, method='vsepp'),
                                 dict(similarity='cross', vision=VIT, text_model='bert', tokenizer='own',
                                      method='vsepp|tags(mlm=0.1)'),
                                 dict(similarity='two_modes', vision='clip', text_model='bert', tokenizer='own',
                                      method='infonce|mlm_warmup()')])
def test_a_stream_beside_patches_and_from_a_bert_learns_and_is_kept(cfg, shelf, drawn, tmp_path):
    cfg = config(BASE | dict(epochs=1, dropout=0.) | cfg)
    data = pictures(cfg, drawn, models=shelf)
    t = prepare(cfg, data)
    start = {k: v.clone() for k, v in t.core.state_dict().items()}
    if cfg.text_model:
        from safetensors.torch import load_file
        have = {k.removeprefix('bert.'): v for k, v in load_file(shelf/'bert'/'model.safetensors').items()}
        words = have['embeddings.word_embeddings.weight']
        assert torch.equal(start['stream.embeddings.word_embeddings.weight'][:-1],
                           words[:len(start[
            'stream.embeddings.word_embeddings.weight'])-1]) and torch.equal(
            start['stream.encoder.layer.1.output.dense.weight'], have['encoder.layer.1.output.dense.weight'])
    t = fit(cfg, tmp_path/'run', data, progress=False)
    moved = {k for k, v in t.core.state_dict().items() if v.is_floating_point()
             and not torch.equal(v, start[k])}
    assert any(k.startswith('image_tower.') for k in moved) and any(k.startswith('stream.encoder.')
        for k in moved)
    again = from_pretrained(tmp_path/'run'/'best')
    assert torch.equal(again.state_dict()['stream.regions.img_linear.weight'],
                       t.core.cpu().state_dict()['stream.regions.img_linear.weight'])


def test_a_stream_wants_a_bert(drawn, shelf):
    with pytest.raises(ValueError, match="set tokenizer='own'"):
        prepare(config(BASE | dict(similarity='cross', vision=VIT, text_model='bert')),
                pictures(Config(), drawn, models=shelf))
    with pytest.raises(DataError, match='bert, for similarity=cross'):
        prepare(config(BASE | dict(similarity='cross', vision=VIT, text_model=CLIP)),
                pictures(Config(), drawn, models=shelf))


def test_other_weights_of_the_same_name_are_noticed(shelf, drawn, tmp_path):
    import shutil
    cfg = config(BASE | dict(vision='mobile', text='mean', tokenizer='words'))
    mine = tmp_path/'models'
    shutil.copytree(shelf, mine)
    with pytest.raises(Stopped):
        fit(cfg, tmp_path/'run', pictures(cfg, drawn, models=mine), progress=False,
            on_step=lambda s: os.kill(os.getpid(), signal.SIGTERM))
    f = mine/'mobile'/'model.safetensors'
    raw = bytearray(f.read_bytes())
    raw[-3] ^= 1
    f.write_bytes(raw)
    with pytest.raises(DataError, match='other data'):
        fit(cfg, tmp_path/'run', pictures(cfg, drawn, models=mine), progress=False)


def harm(folder, what):
    f, c = folder/'model.safetensors', folder/'config.json'
    if what == 'pickle': f.rename(folder/'pytorch_model.bin')
    elif what == 'cut': f.write_bytes(f.read_bytes()[:len(f.read_bytes())//2])
    elif what == 'no config': c.unlink()
    elif what == 'broken config': c.write_text('{')
    elif what == 'a list': c.write_text('[]')
    elif what == 'remote code':
        c.write_text(json.dumps(dict(model_type='mine', auto_map=dict(AutoModel='mine.py--Mine'))))
    elif what == 'other shape': c.write_text(json.dumps(json.loads(c.read_text()) | dict(hidden_size=32)))
    elif what == 'a weight is missing':
        from safetensors.torch import load_file, save_file
        w = load_file(f)
        del w[[k for k in w if 'encoder.layer.1' in k][0]]
        save_file(w, f, metadata=dict(format='pt'))


@pytest.mark.parametrize('what', ['pickle', 'cut', 'no config', 'broken config', 'a list', 'remote code',
                                  'other shape', 'a weight is missing'])
def test_broken_networks_are_named(what, shelf, tmp_path):
    import shutil
    shutil.copytree(shelf/'bert', tmp_path/'bert')
    harm(tmp_path/'bert', what)
    with pytest.raises(DataError, match='bert'):
        source = find('bert', tmp_path)
        fill(tower(**describe(source, 'text', 8)), source)


@pytest.mark.parametrize('bad,wanted', [(dict(vision='nobody/knows-this'), 'no network of this name'),
                                        (dict(vision=MOBILE, image_pool='cls'), 'a grid has no first token'),
                                        (dict(vision=VIT, freeze='9'), 'there are 2'),
                                        (dict(vision='{"model_type": "vit", "depth": 3}'), "setting 'depth'"),
                                        (dict(vision=SIGLIP, dim=20), 'set dim to it'),
                                        (dict(vision=VIT, text_model=BERT, tokenizer='own'),
                                         'comes with weights'),
                                        (dict(vision=VIT, temperature=0.), 'one of a pair'),
                                        (dict(), 'no region features')])
def test_bad_settings_stop_before_training(bad, wanted, drawn, tmp_path):
    cfg = config(BASE | dict(tokenizer='words') | bad)
    data = pictures(cfg, drawn)
    if not cfg.vision: data = replace(data, pixels=None)
    with pytest.raises(ValueError, match=wanted): fit(cfg, tmp_path, data, progress=False)
    assert not (tmp_path/'last').exists()


@pytest.mark.parametrize('bad', [dict(augment='mixup'), dict(image_pool='avg'), dict(resize='pad'),
                                 dict(tokenizer='bytes'), dict(size=0), dict(wordpiece_vocab=-1), dict(data='photos')])
def test_bad_choices(bad):
    with pytest.raises(ValueError): config(BASE | bad)


def test_long_sentences_are_cut_to_what_a_network_reads(drawn):
    short = json.dumps(dict(json.loads(BERT), max_position_embeddings=5))
    cfg = config(BASE | dict(vision=VIT, text_model=short))
    t = prepare(cfg, pictures(cfg, drawn))
    assert t.train.lengths.max() == 5 and np.isfinite(float(sum(train_step(t, torch.arange(16), 0).values())))
    with pytest.raises(DataError, match='at most 5'):
        prepare(replace(cfg, tokenizer='words'), pictures(cfg, drawn))


def test_committed_records_keep_their_ids():
    "A record's settings, filled up with what came later, still give its name"
    known = {k: parameters.parameters(project.template(k)) for k in ('train', 'evaluate')}
    records = [json.loads(p.read_text()) for p in sorted((ROOT/'figures'/'results').glob('*.json'))]
    assert len(records) > 10
    for r in records:
        name = 'evaluate' if r['kind'] == 'control' else 'train'
        told = current_names(r['config'])
        given = {k: v for k, v in told.items() if k in known[name]}
        assert set(told) <= set(known[name]) and identity.run_id(name,
            parameters.resolve(known[name], given)) == r['id']


def another(p):
    "A value of a parameter that its declaration allows, and that is not the default"
    v = p.default
    if isinstance(v, bool): return not v
    options = p.rule.choices or ((v + 'x', 'val', '1', 'file:image') if isinstance(v, str)
                                 else (v*2 + 1, v + 2, v/2))
    for x in options:
        if x == v: continue
        try: return p.parse(x)
        except ValueError: pass
    raise AssertionError(f'{p.name}: no other value among {options}')


def test_later_parameters_count_only_where_they_differ():
    known = parameters.parameters(project.template('train'))
    values = parameters.resolve(known, {})
    base = identity.run_id('train', values)
    always = {*identity.FIRST['train'], *identity.PLACES, *identity.INPUTS}
    later = known.keys() - always
    assert {'vision', 'chunk', 'weight_decay'} <= later
    for k in later: assert identity.run_id('train', values | {k: another(known[k])}) != base, k
    for k, v in dict(cache='x', models='y', workers=3).items():
        assert identity.run_id('train', values | {k: v}) == base


def test_a_pair_without_weights_is_two_halves_of_one_description():
    source = find(CLIP)
    a, b = describe(source, 'vision', 16, size=16), describe(source, 'text', 16, n_words=30)
    m = Model(a, b)
    assert isinstance(m.image_tower, VisionTower) and isinstance(m.text_tower,
        TextTower) and m.image_tower.joint.bias is None
    assert (b['net']['vocab_size'] == 30 and a['net']['image_size'] == 16
            and json.loads(json.dumps(m.config)) == m.config)
    assert network(a['net']).config.hidden_size == 16 and freeze_parts(network(a['net']),
        '') == [] and pretrained.temperature(source) is None
    assert sum(len(g['params']) for g in groups(m, .1)) == len(list(m.parameters()))


@pytest.mark.parametrize('kind', pretrained._BOTH_WAYS)
def test_a_mask_of_all_pairs_is_the_mask_of_the_padding(kind):
    "What is told on an accelerator in place of a mask that would be asked there"
    sizes = dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32) if kind == 'distilbert' else SMALL
    net = pretrained.network(dict(sizes, model_type=kind, vocab_size=30)).eval()
    lengths, ids = torch.tensor([5, 2, 3]), torch.randint(5, 30, (3, 5))
    mask = torch.arange(5) < lengths[:,None]
    plain = pretrained._attention_mask(net.config, mask, lengths)
    assert plain.ndim == 2
    with torch.no_grad():
        a, b = (net(input_ids=ids, attention_mask=m).last_hidden_state
                for m in (plain, mask[:,None,None].expand(-1, -1, 5, -1)))
        assert torch.allclose(a[mask], b[mask], atol=1e-6)
