"Stored synthetic negatives from end to end: a generator, its store, and runs that draw there"
import errno
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_nb.core.commands import SetupError
from itm_nb.core.errors_files import DataError
from itm_nb.data.splits import fingerprint
from itm_nb.data.tokenizers import Pieces
from itm_nb.methods.registry import named
from itm_nb.methods.stored_sentences import (
    class_words, KINDS, load_sentences, save_sentences, tokens_print, write_sentences, Writer)
from itm_nb.models.parts import network_of
from itm_nb.models.similarity import image_inputs
from itm_nb.training.config import check_method, check_together, Config
from itm_nb.training import generator_training
from itm_nb.training.corpus import corpus
from itm_nb.training.generator_training import ask, fit_generator, lesson
from itm_nb.training.loop import fit, Inputs, prepare, train_step

sys.path.insert(0, str(Path(__file__).parents[1]/'runs'))
from test_strong_base import made_up_photos

BASE = dict(data='scan', image_parts='vector', dim=16, d_word=16, layers=2, heads=2, dropout=0., batch=32,
            epochs=1)


def small_bert(at, vocab_size):
    "A folder with a small BERT, its weights drawn"
    from transformers import BertConfig, BertModel
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    BertModel(BertConfig(vocab_size=vocab_size, max_position_embeddings=32, **sizes)).save_pretrained(at)
    return at


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Photographs, a network that reads, a generator whose upper layers learned, and its store"
    at = tmp_path_factory.mktemp('stored')
    folder = made_up_photos(at/'photos')
    pieces = Pieces.build((folder/'train_caps.txt').read_text().split('\n')[:-1], 60)
    net = small_bert(at/'models'/'net', len(pieces))
    rules = json.loads(pieces.made.to_str())
    (net/'tokenizer.json').write_text(json.dumps(rules))
    cfg = Config(**BASE | dict(text_model='net', tokenizer='own', lr=.01, epochs=30))
    data = corpus(cfg, folder, at/'cache', at/'models')
    l = lesson(cfg, data, upper=2)
    curve = fit_generator(l, at/'generator', patience=6)
    by_class = class_words(l.known.tokens, l.vocab, l.train.split.captions)
    writer = Writer(l.model.eval(), l.known, by_class, 2, 8, 4)
    of = torch.as_tensor(np.array(l.train.split.img_of))
    said, clean = write_sentences(writer, lambda i: image_inputs(l.train.images(i)), of)
    about = dict(data=fingerprint(l.train.split), tokens=tokens_print(l.train.tokens))
    ids = torch.as_tensor(np.array(l.train.split.cap_ids))
    save_sentences(at/'generator'/'sentences', said, ids, about)
    return at, data, l, curve, clean


def heads(at, **more):
    "A run on frozen states and word vectors that learn"
    network = dict(text_model='net', tokenizer='own', text_freeze='all', text_parts='heads_words', lr=.003)
    return Config(**BASE | network | more)


def test_a_generator_learns_to_look(made):
    "A photo is a vector, and its captions name its largest entries: only who looks can guess them"
    at, _, l, curve, clean = made
    said = ask(l, torch.arange(len(l.held.tokens)))
    assert said['found_own'] > said['found_other'] + 8 and said['perplexity_own'] < .9*said['perplexity_other']
    frozen = [k for k, p in l.model.named_parameters() if not p.requires_grad]
    assert any('layer.0' in k for k in frozen) and not any('layer.1' in k for k in frozen)
    whole, _, _ = load_sentences(at/'generator'/'sentences', 'generator', {})
    assert all(clean[k].double().mean() > 1 for k in KINDS) and whole.shape[1] == 4


def test_states_of_stored_sentences_are_looked_up(made):
    "The network is asked once; the loss of a step is what it is without any cache"
    at, data, *_ = made
    cfg, losses = heads(at, method='vsepp|static_tags()'), []
    for d in (data, replace(data, states='')):
        t = prepare(cfg, d, generator=str(at/'generator'))
        net = network_of(t.core.text_tower)
        t.step, asked = 0, []
        net.computed = lambda *x, f=net.computed: asked.append(len(x[0])) or f(*x)
        losses.append({k: float(v) for k, v in train_step(t, torch.arange(32), 0).items()})
        assert bool(asked) == (d.states == '')
    assert losses[0].keys() == losses[1].keys() >= {'synthetic/i2t', 'hardest/i2t'}
    assert all(abs(losses[0][k] - losses[1][k]) < 1e-5 for k in losses[0])


@pytest.mark.parametrize('method', ["vsepp|static_tags(kind='random', hard=0)",
                                    "vsepp|static_tags(pick='fne', prior=0.3)"])
def test_a_run_trains_on_stored_sentences(made, method, tmp_path):
    "Same seed, same bytes; another kind of sentences, other weights"
    at, data, *_ = made
    def weights(i, m):
        inputs = Inputs(generator=at/'generator')
        t = fit(heads(at, method=m), tmp_path/str(i), data, progress=False, inputs=inputs)
        return t.core.state_dict()
    runs = [weights(i, m) for i, m in enumerate((method, method, 'vsepp|static_tags()'))]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values()))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[2].values()))


def test_wrong_uses_are_refused(made):
    at, data, l, *_ = made
    with pytest.raises(SetupError, match='name the run of generate'):
        check_together(dict(method='static_tags()', lists=''))
    with pytest.raises(SetupError, match='kind'):
        check_method("static_tags(kind='best')")
    with pytest.raises(DataError, match='sentences of data'):
        named('static_tags()', train=l.val, generator=str(at/'generator'))
    with pytest.raises(ValueError, match='own tokens'):
        lesson(replace(l.cfg, tokenizer='words'), data)


def test_a_generator_whose_checkpoint_cannot_be_written_says_so(made, tmp_path, monkeypatch):
    "At its next step or at the end, with the folder and what to do"
    def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(generator_training, 'save_checkpoint', full)
    _, data, l, *_ = made
    l = lesson(l.cfg, data, upper=2)
    with pytest.raises(DataError, match='cannot be written') as e:
        fit_generator(l, tmp_path, seconds=0)
    assert str(tmp_path) in str(e.value) and not (tmp_path/'last').exists()
