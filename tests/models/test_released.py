"""The authors' files in and out: every release in small, to the last bit; files that are cut off,
poisoned, too short or of another shape; words; rows from weights."""
import argparse
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from itm_nb.core.commands import SetupError
from itm_nb.core.errors_files import DataError
from itm_nb.models.factory import from_pretrained
from itm_nb.models.released_checkpoints import (
    RELEASES, convert, described, give, itm_convert, read_pth, restore, take, vocabulary_of)

torch.set_num_threads(1)
GOLDEN = Path(__file__).parents[1]/'golden'
BASE = json.loads((GOLDEN/'state_dicts.json').read_text())['models']
NETS = json.loads((GOLDEN/'state_dicts_fne_tags.json').read_text())
SIZES = {8481: 11, 11353: 11, 28996: 13, 30522: 13, 8224: 6, 577: 5, 512: 7, 300: 5, 6144: 24, 3072: 24,
         2048: 8, 1536: 18, 1024: 8, 768: 8, 812: 11, 96: 96, 32: 32}
OPT = dict(SCAN=dict(cross_attn='t2i', lambda_softmax=9., lambda_lse=6., agg_func='LogSumExp',
                     raw_feature_norm='clipped_l2norm'), BFAN=dict(focal_type='prob', lambda_softmax=20.))


def small(shape): return [SIZES.get(n, n) for n in shape]


def drawn(keys, sizes=small, seed=0):
    "Random tensors of shapes made small; whole numbers where the release has some"
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(sizes(s), generator=g) if t == 'float32'
            else torch.randint(0, 5, sizes(s), generator=g) for k, (s, t) in keys.items()}


def layers(keys, most=2):
    "The first layers of a network"
    import re
    return {k: v for k, v in keys.items() if not (m := re.search(r'encoder\.layer\.(\d+)\.', k))
            or int(m.group(1)) < most}


def of_base(name, **kw):
    "State dictionaries of a region model"
    return [drawn(layers({k: (s, t) for k, s, t in BASE[name][part]}), **kw)
            for part in ('img_enc', 'txt_enc', 'caption_model') if part in BASE[name]]


def vsrn_sizes(shape):
    return [dict([(2048, 8), (6144, 24), (512, 6), (1536, 18), (812, 11), (300, 5), (1024, 12)]).get(n,
        SIZES.get(n, n)) for n in shape]


def vse_sizes(shape):
    return [dict([(2048, 6), (1024, 8), (512, 4), (3072, 24), (300, 5)]).get(n, SIZES.get(n, n))
            for n in shape]


def bert_vse_sizes(shape):
    return [dict([(2048, 6), (1024, 8)]).get(n, SIZES.get(n, n))
            for n in shape] if 30522 not in shape and shape != [512, 768] else [13 if 30522 in shape else 7,
        8]


def of_fne():
    "FNE's one state dictionary, small: two layers, pictures of 2 x 2 patches"
    s = drawn(layers(NETS['fne']['keys']))
    s['idx_queue'] = torch.tensor([[4, 5, -100, -100, -100, -100]])
    s['queue_ptr'] = torch.tensor([2])
    return [s]


def of_uniter(name):
    s = drawn(layers(NETS[name]['keys']))
    words = s['uniter.embeddings.word_embeddings.weight']
    for k in s:
        if k.endswith('decoder.weight'): s[k] = words.clone()
    return [s]


CASES = dict(scan_t2i=lambda: of_base('SCAN_f30k'), bfan=lambda: of_base('BFAN_coco'),
             vsrn=lambda: of_base('VSRN_f30k', sizes=vsrn_sizes),
             vsrn_coco=lambda: of_base('VSRN_coco', sizes=vsrn_sizes),
             vsrn_aoq=lambda: of_base('AOQ_VSRN_f30k', sizes=vsrn_sizes),
             vse_infinity=lambda: of_base('VSE_infinity_region_BiGRU_f30k', sizes=vse_sizes),
             vse_infinity_bert=lambda: of_base('VSE_infinity_region_BERT', sizes=bert_vse_sizes), fne=of_fne,
             tags1=lambda: of_uniter('tags_stage1_base'), tags2=lambda: of_uniter('tags_stage2_base'),
             tags_itm=lambda: of_uniter('uniter_base_itm_finetuned'),
             tags_pretrained=lambda: of_uniter('uniter_base_pretrained'))
def KIND(case):
    "The release that a case is of"
    if case in RELEASES: return case
    return next(k for k in RELEASES if case.startswith(k[:4]) and not k.startswith('uniter'))


def written(case, path, change=lambda s: s):
    "A file as the authors write it"
    states = change(CASES[case]())
    opt = argparse.Namespace(**OPT.get(dict(scan_t2i='SCAN', bfan='BFAN').get(case), {}), margin=.2)
    torch.save(states[0] if KIND(case) == 'tags'
               else dict(epoch=3, model=states, best_rsum=1.5, opt=opt, Eiters=7), path)
    return states


@pytest.mark.parametrize('case', CASES)
def test_in_and_out_to_the_last_bit(case, tmp_path):
    states = written(case, tmp_path/'a.pth')
    convert(tmp_path/'a.pth', KIND(case), tmp_path/'ours')
    restore(tmp_path/'ours', tmp_path/'b.pth')
    a, b = read_pth(tmp_path/'a.pth'), read_pth(tmp_path/'b.pth')
    if KIND(case) != 'tags':
        assert {k: v for k, v in a.items() if k != 'model'} == {k: v for k, v in b.items() if k != 'model'}
        b = b['model']
    else: b = [b]
    for mine, theirs in zip(b, states, strict=True):
        assert list(mine) == list(theirs) and all(mine[k].dtype == v.dtype and torch.equal(mine[k], v)
                                                  for k, v in theirs.items())
    once, twice = (from_pretrained(tmp_path/f).state_dict() for f in ('ours', 'ours'))
    convert(tmp_path/'b.pth', KIND(case), tmp_path/'again')
    twice = from_pretrained(tmp_path/'again').state_dict()
    assert once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once)


def test_half_precision_comes_back_as_half(tmp_path):
    half = lambda states: [{k: v.half() if v.is_floating_point() else v for k, v in s.items()}
                           for s in states]
    states = written('tags1', tmp_path/'a.pt', half)
    convert(tmp_path/'a.pt', 'tags', tmp_path/'ours')
    restore(tmp_path/'ours', tmp_path/'b.pt')
    b = read_pth(tmp_path/'b.pt')
    assert from_pretrained(tmp_path/'ours').pooler.weight.dtype == torch.float32 and all(torch.equal(b[k], v)
        and b[k].dtype == v.dtype for k, v in states[0].items())


def test_fne_begins_a_memory(tmp_path):
    from safetensors.torch import load_file

    from itm_nb.methods.memory_bank import Bank
    states = written('fne', tmp_path/'a.pth')
    model = convert(tmp_path/'a.pth', 'fne', tmp_path/'ours')
    bank = Bank(6)
    bank.load_state_dict(load_file(tmp_path/'ours'/'memory.safetensors'))
    assert (bank.ring.at, bank.ring.written) == (2, 2) and torch.equal(bank.ring.images.T,
        states[0]['image_queue']) and bank.waiting.keys() == model.state_dict().keys()
    assert (model.config['image']['pool'], model.config['text']['even']) == ('all', 30)


def test_a_file_of_python_two(tmp_path):
    "Old container, byte strings instead of texts"
    class Old(pickle._Pickler):
        dispatch = dict(pickle._Pickler.dispatch)
        def save_str(self, x):
            b = x.encode('latin1')
            self.write(b'U' + bytes([len(b)]) + b)
            self.memoize(x)
        dispatch[str] = save_str
    class Module:
        Pickler = Old
        dump = staticmethod(lambda obj, f, protocol=2: Old(f, protocol).dump(obj))
        __name__ = 'old'
    states = CASES['scan_t2i']()
    torch.save(dict(model=states, opt=argparse.Namespace(**OPT['SCAN'], data_path='caf\xe9')),
               tmp_path/'old.tar', pickle_module=Module, pickle_protocol=2,
               _use_new_zipfile_serialization=False)
    found = read_pth(tmp_path/'old.tar')
    assert found['opt'].data_path == 'caf\xe9' and torch.equal(found['model'][0]['fc.bias'],
        states[0]['fc.bias'])
    convert(tmp_path/'old.tar', 'scan_t2i', tmp_path/'ours')


class Evil:
    def __init__(self, at): self.at = at
    def __reduce__(self): return os.system, (f'touch {self.at}',)


def spoil(name, tmp):
    "(file, release) of a file that must be refused"
    file = tmp/'a.pth'
    less = lambda k: lambda states: [{a: v for a, v in s.items() if a != k} for s in states]
    kind = 'scan_t2i'
    match name:
        case 'cut off': written(kind, file); file.write_bytes(file.read_bytes()[:-500])
        case 'one byte': file.write_bytes(b'P')
        case 'empty': file.write_bytes(b'')
        case 'text': file.write_text('<html>not found</html>')
        case 'folder': file.mkdir()
        case 'evil': torch.save(dict(model=[Evil(tmp/'hacked')]), file)
        case 'evil beside':
            states = CASES[kind]()
            torch.save(dict(model=states, opt=Evil(tmp/'hacked')), file)
        case 'evil pickle': file.write_bytes(pickle.dumps(Evil(tmp/'hacked'), 2))
        case 'a module': torch.save(torch.nn.Linear(2, 2), file)
        case 'no model': torch.save(dict(epoch=1), file)
        case 'a list': torch.save([1, 2], file)
        case 'one dictionary': written(kind, file, lambda s: s[:1])
        case 'numbers': written(kind, file, lambda s: [s[0], {k: 1. for k in s[1]}])
        case 'missing': written(kind, file, less('rnn.bias_hh_l0_reverse'))
        case 'missing table': written(kind, file, less('embed.weight'))
        case 'more': written(kind, file, lambda s: [s[0] | {'fc.more': torch.ones(1)}, s[1]])
        case 'shape': written(kind, file, lambda s: [s[0] | {'fc.bias': torch.ones(3)}, s[1]])
        case 'other attention': written(kind, file); kind = 'scan_i2t'
        case 'other release': written(kind, file); kind = 'vsrn'
        case 'no memory': written('fne', file, less('idx_queue')); kind = 'fne'
        case 'odd memory':
            kind, queue = 'fne', torch.zeros(1, 4, dtype=torch.int64)
            written(kind, file, lambda s: [s[0] | dict(idx_queue=queue)])
        case 'no copy': written('fne', file, less('visual_encoder_m.layernorm.bias')); kind = 'fne'
        case 'untied':
            kind, table = 'tags', {'cls.predictions.decoder.weight': torch.zeros(13, 8)}
            written('tags2', file, lambda s: [s[0] | table])
        case 'no layer':
            kind = 'tags'
            written('tags2', file, less('uniter.encoder.layer.1.output.dense.weight'))
        case 'not base': written('tags2', file); kind = 'uniter_base'
    return file, kind


BAD = ('cut off', 'one byte', 'empty', 'text', 'folder', 'evil', 'evil beside', 'evil pickle', 'a module',
       'no model', 'a list', 'one dictionary', 'numbers', 'missing', 'missing table', 'more', 'shape',
       'other attention', 'other release', 'no memory', 'odd memory', 'no copy', 'untied', 'no layer',
       'not base')


@pytest.mark.parametrize('name', BAD)
def test_bad_files_are_refused(name, tmp_path):
    """The file is named, something is to be done about it, nothing was run, nothing is left that a later
    command would take for a model"""
    file, kind = spoil(name, tmp_path)
    with pytest.raises(DataError) as e: convert(file, kind, tmp_path/'ours')
    assert (str(file) in str(e.value) and e.value.remedy and not (tmp_path/'hacked').exists()
            and not (tmp_path/'ours'/'config.json').exists())
    if name.startswith('evil') or name == 'a module': assert 'can run code' in str(e.value)


@pytest.mark.parametrize('text', ['{}', '[]', '{"word2idx": {"<pad>": 0}}',
                                  '{"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 4}', '{"<pad>": "0"}', '{',
                                  '', '\x80abc'])
def test_bad_vocabularies_are_refused(text, tmp_path):
    file = tmp_path/'v.json'
    file.write_bytes(text.encode('latin1'))
    with pytest.raises(DataError) as e: vocabulary_of(file, 'scan_t2i', 4)
    assert str(file) in str(e.value) and e.value.remedy


def test_words_of_bert(tmp_path):
    (tmp_path/'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'a', 'dog',
                                                 '##s', 'ones', 'Dog']))
    fne = vocabulary_of(tmp_path/'vocab.txt', 'fne', 10)
    cased = vocabulary_of(tmp_path/'vocab.txt', 'tags', 10)
    assert fne.show("A Dogs, one's-a") == ['[CLS]', 'a', 'dog', '##s', 'ones', 'a',
                                           '[SEP]'] and cased.show('a Dog') == ['[CLS]', 'a', 'Dog', '[SEP]']
    assert fne.encode(['a '*50])[1].tolist() == [30] and cased.encode(['a '*50])[1].tolist() == [52]


def test_the_command(tmp_path, capsys):
    written('scan_t2i', tmp_path/'a.pth')
    words = ['<pad>', '<start>', '<end>', '<unk>', *'abcdefg']
    (tmp_path/'v.json').write_text(json.dumps(dict(word2idx={w: i for i, w in enumerate(words)})))
    run = lambda *a: itm_convert([str(x) for x in a])
    assert run(tmp_path/'a.pth', '--as', 'scan_t2i', '--vocab', tmp_path/'v.json', '--out',
               tmp_path/'ours') == 0 and 'scan_t2i' in capsys.readouterr().out
    assert run(tmp_path/'ours', '--to-released', '--out', tmp_path/'b.pth') == 0
    assert run(tmp_path/'a.pth', '--out', tmp_path/'ours') == 2 and '--as' in capsys.readouterr().err
    assert run(tmp_path/'a.pth', '--as', 'scan', '--out',
               tmp_path/'ours') == 2 and 'there are' in capsys.readouterr().err
    assert run(tmp_path/'no.pth', '--as', 'bfan', '--out',
               tmp_path/'x') == 2 and 'no.pth' in capsys.readouterr().err
    with pytest.raises(SetupError): restore(tmp_path/'ours', tmp_path/'b.pth', 'fne')


@pytest.mark.slow
@pytest.mark.parametrize('name', ['SCAN_f30k', 'BFAN_coco', 'VSRN_f30k', 'AOQ_VSRN_coco',
                                  'VSE_infinity_region_BiGRU_f30k'])
def test_full_size(name, tmp_path):
    "Random weights in the published sizes, theirs -> ours -> theirs, by the file"
    kind = dict(SCAN='scan_t2i', BFAN='bfan', VSRN='vsrn', AOQ='vsrn', VSE='vse_infinity')[name.split('_')[0]]
    states = of_base(name, sizes=list)
    torch.save(dict(model=states), tmp_path/'a.pth')
    convert(tmp_path/'a.pth', kind, tmp_path/'ours')
    (tmp_path/'a.pth').unlink()
    restore(tmp_path/'ours', tmp_path/'b.pth')
    for mine, theirs in zip(read_pth(tmp_path/'b.pth')['model'], states, strict=True):
        assert list(mine) == list(theirs) and all(torch.equal(mine[k], v) for k, v in theirs.items())


@pytest.mark.slow
def test_a_row_from_weights(tmp_path):
    "itm_run evaluate -p weights FOLDER, as a user runs it: the same weights elsewhere make the same row"
    from itm_nb.data.batches import Vocabulary
    from itm_nb.models.factory import model_of, save_pretrained
    from itm_nb.training.config import Config
    from itm_nb.training.corpus import corpus
    split = corpus(Config(preset='tiny')).split('test')
    vocab = Vocabulary.build(split.captions)
    model = model_of(dict(similarity='scan_t2i', image=dict(kind='region', d_in=split.feats.shape[2], dim=8),
                          text=dict(kind='gru', n_words=len(vocab), dim=8, d_word=8)))
    for name in 'ab':
        save_pretrained(model, tmp_path/name)
        vocab.save(tmp_path/name/'vocab.json')
    made = [subprocess.run([sys.executable, '-c', 'from itm_nb.cli import itm_run; itm_run()', 'evaluate',
                            '-p', 'weights', str(tmp_path/n), '-p', 'preset', 'tiny', '-p', 'out',
                            str(tmp_path/'runs'/n), '--quiet'],
                           capture_output=True, text=True) for n in 'ab']
    assert [m.returncode for m in made] == [0, 0], made[0].stderr
    rows = [json.loads(f.read_text()) for f in (tmp_path/'runs'/'records').glob('*.json')]
    assert len(rows) == 1 and rows[0]['config']['weights'].startswith('sha256:')
