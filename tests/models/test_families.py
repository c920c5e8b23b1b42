"""Families of networks, saved by `transformers` itself with tiny random weights: each is a tower, or one
clear refusal before data are opened."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from itm_nb.core.errors_files import DataError
from itm_nb.data.pixels import normalise
from itm_nb.models.factory import from_pretrained
from itm_nb.models.pretrained import PAIRS, describe, fill, find, longest, suited, tower
from itm_nb.training.config import config
from itm_nb.training.corpus import corpus, Corpus
from itm_nb.training.loop import fit, prepare, train_step

WORDS = ('dog cat bus child beach red blue car tree boat man woman bike ball street lake snow horse house '
         'plane'.split())
PIECES = {t: i for i, t in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'a', 'number', 'on', 'the',
                                      *WORDS])}
N = len(PIECES)
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
EYE = dict(SMALL, image_size=32, patch_size=8)
READ = dict(SMALL, vocab_size=N, max_position_embeddings=14)
ENDS = dict(eos_token_id=3, bos_token_id=2, pad_token_id=0)


def pair(model, conf, text={}, vision={}, **kw):
    return lambda: model(conf(text_config=READ | text, vision_config=EYE | vision, **kw))
def single(model, conf, **kw): return lambda: model(conf(**kw))


FAMILIES = dict(      # name -> what makes a network with random weights
    clip=pair(T.CLIPModel, T.CLIPConfig, ENDS, projection_dim=32),
    metaclip_2=pair(T.MetaClip2Model, T.MetaClip2Config, dict(ENDS, projection_dim=32),
                    dict(projection_dim=32), projection_dim=32),
    siglip=pair(T.SiglipModel, T.SiglipConfig, dict(projection_size=32)),
    siglip2=pair(T.Siglip2Model, T.Siglip2Config, dict(projection_size=32), dict(num_patches=16)),
    chinese_clip=pair(T.ChineseCLIPModel, T.ChineseCLIPConfig, projection_dim=32),
    altclip=pair(T.AltCLIPModel, T.AltCLIPConfig, dict(project_dim=32, pad_token_id=1), projection_dim=32),
    blip=pair(T.BlipModel, T.BlipConfig, dict(projection_dim=32, encoder_hidden_size=32), projection_dim=32),
    dual=lambda: T.VisionTextDualEncoderModel(T.VisionTextDualEncoderConfig.from_vision_text_configs(
        T.ViTConfig(**EYE), T.BertConfig(**READ), projection_dim=32)),
    bert=single(T.BertModel, T.BertConfig, **READ),
    distilbert=single(T.DistilBertModel, T.DistilBertConfig, dim=32, n_layers=2, n_heads=2, hidden_dim=64,
                      vocab_size=N,
                      max_position_embeddings=14),
    roberta=single(T.RobertaModel, T.RobertaConfig, **READ, pad_token_id=1),
    camembert=single(T.CamembertModel, T.CamembertConfig, **READ, pad_token_id=1),
    mpnet=single(T.MPNetModel, T.MPNetConfig, **READ),
    electra=single(T.ElectraModel, T.ElectraConfig, **READ, embedding_size=16),
    albert=single(T.AlbertModel, T.AlbertConfig, **READ, embedding_size=16),
    t5=single(T.T5Model, T.T5Config, d_model=32, num_layers=2, num_heads=2, d_ff=64, d_kv=16, vocab_size=N),
    bart=single(T.BartModel, T.BartConfig, d_model=32, encoder_layers=2, decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=N,
                max_position_embeddings=32,
                decoder_start_token_id=2, **ENDS),
    gpt2=single(T.GPT2Model, T.GPT2Config, n_embd=32, n_layer=2, n_head=2, vocab_size=N, n_positions=32,
                bos_token_id=2, eos_token_id=3),
    qwen2=single(T.Qwen2Model, T.Qwen2Config, **READ | dict(max_position_embeddings=32),
                 num_key_value_heads=2))
TWO = list(FAMILIES)[:8]
READS = dict(clip=14, metaclip_2=14, siglip=14, siglip2=14, chinese_clip=14, altclip=12, blip=14, dual=14,
             bert=14, distilbert=14, roberta=12,
             # tokens; 0: any number
             camembert=12, mpnet=12, electra=14, albert=14, t5=0, bart=32, gpt2=32, qwen2=32)
REFUSED = [      # side, description, what is said
    ('text_model', dict(model_type='fnet'), 'fnet cannot be the text tower: it takes no attention_mask'),
    ('text_model', dict(model_type='vit'),
     'vit cannot be the text tower: it is called with pixel_values, not input_ids'),
    ('text_model', dict(model_type='whisper'),
     'whisper cannot be the text tower: it is called with input_features'),
    ('vision', dict(model_type='bert'),
     'bert cannot be the vision tower: it is called with input_ids, not pixel_values'),
    ('vision', dict(model_type='wav2vec2'),
     'wav2vec2 cannot be the vision tower: it is called with input_values'),
    ('vision', dict(model_type='owlvit', text_config={}, vision_config={}),
     'owlvit, several networks that cannot be taken apart; wanted one of clip'),
    ('text_model', dict(model_type='flava'), 'flava, several networks that cannot be taken apart')]


def shelve(folder, network):
    "As a downloaded network lies on a disk: weights, description, tokeniser"
    t = Tokenizer(models.WordLevel(PIECES, unk_token='[UNK]'))
    t.normalizer, t.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    t.post_processor = processors.TemplateProcessing('[CLS] $A [SEP]',
                                                     special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    network.save_pretrained(folder)
    t.save(str(folder/'tokenizer.json'))


def photos(folder, times):
    "60 pictures with five sentences each, which say the same so many times"
    (folder/'images').mkdir(parents=True)
    rows = []
    for i in range(60):
        colour = [37*i % 255, 91*i % 255, 151*i % 255]
        Image.fromarray(np.full((36, 48, 3), colour, 'uint8')).save(folder/'images'/f'{i}.png')
        say = [['a', WORDS[i % 20], 'number', WORDS[7*i % 20], 'on', 'the', WORDS[(i//20+k) % 20]]*times
               for k in range(5)]
        part = 'train' if i < 42 else 'val' if i < 51 else 'test'
        rows.append(dict(filename=f'{i}.png', imgid=i, split=part,
                         sentences=[dict(raw=' '.join(s), sentid=5*i+k) for k, s in enumerate(say)]))
    (folder/'dataset_t.json').write_text(json.dumps(dict(images=rows)))
    return folder


@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    T.logging.set_verbosity_error()
    T.logging.disable_progress_bar()
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('networks')
    shelve(folder/'vit', T.ViTModel(T.ViTConfig(**EYE)))
    for name, make in FAMILIES.items(): shelve(folder/name, make())
    return folder


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('photos')
    return dict(short=photos(folder/'short', 1), long=photos(folder/'long', 6), cache=folder/'cache')


def settings(name, **kw):
    return config(dict(data='images', vision=name if name in TWO else 'vit', text_model=name, tokenizer='own',
                       epochs=1, batch=16, size=32, dim=32) | kw)


@pytest.mark.parametrize('name', FAMILIES)
def test_a_family_trains_saves_and_loads(name, shelf, data, tmp_path):
    "One epoch; the network learns down to its words; the kept model gives the same vectors"
    cfg = settings(name)
    t = fit(cfg, tmp_path/'run', corpus(cfg, data['short'], cache=data['cache'], models=shelf),
            progress=False)
    assert np.isfinite(t.history[0]['rsum'])
    start = build_towers(name, shelf)[1].net.state_dict()
    b = t.val.take(torch.arange(9))
    loaded = from_pretrained(tmp_path/'run'/'best')
    model = t.core.eval()
    with torch.no_grad():
        ours, again = (m(b['feats'], b['mask'].sum(1), b['tokens'], b['lengths']) for m in (model, loaded))
    assert all(torch.equal(x, y) and x.isfinite().all() and x.shape == (9, 32) for x, y in zip(ours, again))
    moved = [k for k, v in start.items() if not torch.equal(v, model.text_tower.net.state_dict()[k])]
    assert any('embed' in k or 'wte' in k or 'shared' in k for k in moved) and len(moved) > 5


@pytest.mark.parametrize('name', FAMILIES)
def test_captions_that_are_too_long_are_cut(name, shelf, data):
    cfg = settings(name)
    t = prepare(cfg, corpus(cfg, data['long'], cache=data['cache'], models=shelf))
    assert t.train.lengths.max() == (READS[name]
                                     or 44) and np.isfinite(float(sum(train_step(t, torch.arange(16),
        0).values())))


def build_towers(name, shelf):
    "Both towers of a family with the weights of its folder"
    text = find(name, shelf)
    eye = text if name in TWO else find('vit', shelf)
    made = describe(eye, 'vision', 32, size=32), describe(text, 'text', 32, n_words=N)
    return [fill(tower(**d), s).eval() for d, s in zip(made, (eye, text))]


def sentences():
    g = torch.Generator().manual_seed(1)
    n = torch.tensor([9, 4, 6, 3])
    x = torch.randint(4, N, (4, 9), generator=g)
    x[:,0] = 2
    x[torch.arange(4), n-1] = 3
    return x, n, torch.arange(9) < n[:,None]


@pytest.mark.parametrize('name', TWO)
@torch.no_grad()
def test_the_halves_are_the_pair(name, shelf):
    "The pair itself, loaded whole by `transformers`, compares the same vectors"
    whole = T.AutoModel.from_pretrained(shelf/name).eval()
    eye, reader = build_towers(name, shelf)
    x, n, mask = sentences()
    photo = torch.randint(0, 256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    seen = normalise(photo)
    if name == 'siglip2':
        kw = dict(pixel_values=seen.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(3, 16,
            -1),
                  pixel_attention_mask=torch.ones(3, 16), spatial_shapes=torch.full((3, 2), 4))
    else: kw = dict(pixel_values=seen)
    vector = lambda out: out if torch.is_tensor(out) else out.pooler_output
    assert torch.allclose(eye(photo), vector(whole.get_image_features(**kw)), atol=1e-5)
    pad = reader.pad
    ids = x.masked_fill(~mask, pad)
    if 'siglip' in name: theirs = whole.get_text_features(torch.nn.functional.pad(ids, (0, 5), value=pad))
    else: theirs = whole.get_text_features(ids, attention_mask=mask.long())
    assert torch.allclose(reader(x, n), vector(theirs), atol=1e-5)


@pytest.mark.parametrize('name', [k for k in FAMILIES if k not in TWO])
@torch.no_grad()
def test_a_reading_network_is_the_one_on_the_disk(name, shelf):
    whole = T.AutoModel.from_pretrained(shelf/name).eval()
    net = whole.get_encoder() if whole.config.is_encoder_decoder else whole
    reader = build_towers(name, shelf)[1]
    x, n, mask = sentences()
    want = net(input_ids=x.masked_fill(~mask, reader.pad), attention_mask=mask.long()).last_hidden_state
    got = reader._run(x, n).last_hidden_state
    assert torch.equal(got[mask], want[mask])


@pytest.mark.parametrize('name', FAMILIES)
@torch.no_grad()
def test_what_a_network_can_read_is_known_beforehand(name, shelf):
    "So many tokens go through; one more does not, where positions are a table"
    source = find(name, shelf)
    half = source.config.get('text_config', source.config)
    most = longest(half)
    assert most == READS[name]
    if not most: return
    net = build_towers(name, shelf)[1].net
    run = lambda n: net(input_ids=torch.full((1, n), 5), attention_mask=torch.ones(1, n, dtype=torch.long))
    assert run(most).last_hidden_state.isfinite().all()
    if name != 'qwen2':
        with pytest.raises((IndexError, RuntimeError, ValueError)): run(most + 1)


@pytest.mark.parametrize('side,network,said', REFUSED,
                         ids=lambda x: x['model_type'] if isinstance(x, dict) else None)
def test_what_is_not_supported_is_refused_by_name_before_data_are_opened(side, network, said, shelf):
    def nobody(part): raise AssertionError('data were opened')
    cfg = settings('bert', tokenizer='words', **{side: json.dumps(network)})
    with pytest.raises(DataError, match=said): prepare(cfg, Corpus('none', nobody, models=shelf))


GONE = dict(chinese_clip='text_model.encoder.layer.1', dual='vision_model.encoder', t5='encoder.block.1',
            bart='encoder.layers.1',
            blip='text_projection', altclip='visual_projection')


@pytest.mark.parametrize('name', GONE)
def test_a_weight_that_is_missing_in_a_half_is_named(name, shelf, tmp_path):
    shutil.copytree(shelf/name, tmp_path/name)
    (tmp_path/'vit').symlink_to(shelf/'vit')
    f = tmp_path/name/'model.safetensors'
    have = load_file(f)
    gone = next(k for k in have if k.startswith(GONE[name]))
    save_file({k: v for k, v in have.items() if k != gone}, f, metadata=dict(format='pt'))
    said = f'no {GONE[name]}' if 'projection' in gone else r'no weight .* \(1 are missing\)'
    with pytest.raises(DataError, match=rf'{name}: {said}.*; wanted model.safetensors with every weight'):
        build_towers(name, tmp_path)


def test_weights_of_the_other_half_may_be_missing(shelf, tmp_path):
    "Encoders alone are published too: what a tower does not use is not asked for"
    shutil.copytree(shelf/'t5', tmp_path/'t5')
    f = tmp_path/'t5'/'model.safetensors'
    save_file({k: v for k, v in load_file(f).items() if not k.startswith('decoder.')}, f,
              metadata=dict(format='pt'))
    (tmp_path/'vit').symlink_to(shelf/'vit')
    a, b = build_towers('t5', tmp_path)[1], build_towers('t5', shelf)[1]
    assert all(torch.equal(v, b.net.state_dict()[k]) for k, v in a.net.state_dict().items())


def table():
    "What the documentation says about families, from what is tested here"
    rows = ['| family | what it becomes | vector of a pair | reads (tokens, at the tested size) |',
            '|---|---|---|---|']
    for name in FAMILIES:
        kind = dict(dual='vision-text-dual-encoder').get(name, name)
        becomes = 'both towers' if name in TWO else 'text tower'
        rows.append(f'| `{kind}` | {becomes} | {PAIRS.get(kind, "")} | {READS[name] or "any number"} |')
    rows += [f'| `{n["model_type"]}` | refused: '
             f'{said.split(": ")[-1].split(";")[0].removeprefix(n["model_type"] + ", ")} | | |'
             for _, n, said in REFUSED]
    return '\n'.join(rows)


def test_the_documentation_lists_what_is_tested_here():
    book = json.loads((Path(__file__).parents[2]/'nbs'/'4_models/01_pretrained.ipynb').read_text('utf-8'))
    print(table())
    assert any(table() in ''.join(c['source'])
               for c in book['cells']), f'put this table at the end of 4_models/01_pretrained:\n{table()}'
    assert set(PAIRS) <= {dict(dual='vision-text-dual-encoder').get(k, k) for k in TWO}
