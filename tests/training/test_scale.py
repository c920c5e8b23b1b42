"""What a step costs does not depend on how large the data are, and data of COCO's size fit where a laptop
has room."""
import re
import string
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from itm_nb.core.errors_files import DataError
from itm_nb.data import batches
from itm_nb.data.batches import padded, words
from itm_nb.data.splits import Split
from itm_nb.training import loop
from itm_nb.training.config import Config
from itm_nb.training.corpus import Corpus, corpus

SMALL = Config(data='scan', text='mean', text_pool='mean', dim=8, d_word=4, image_hidden=0, epochs=3,
               batch=16,
               method='vsepp', warmup=0, dropout=0.)
WORDS = 'one two three four five six seven eight nine ten'.split()


def invented(n, name='train', k=2):
    "n images of 3 regions and k sentences each; all sentences are of one length and use the same ten words"
    rng = np.random.default_rng(n)
    said = [' '.join(rng.permutation(WORDS)[:4]) for _ in range(k*n - 3)]
    said += [' '.join(WORDS[i:i+4]) for i in (0, 3, 6)]  # the words are known however few there are
    first = dict(train=0, val=10**6, test=2*10**6)[name]
    feats = rng.normal(size=(n, 3, 5)).astype('float32')
    return Split(name, feats, np.full(n, 3), said, np.repeat(np.arange(n), k), first + np.arange(n),
                 rng.permutation(5*first + 5*n)[:k*n])


def corpus_of(n): return Corpus(f'{n} images', lambda part: invented(n if part == 'train' else 20, part))


class Work(TorchDispatchMode):
    "Counts operations, and numbers that they make anew"
    calls = made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls += 1
            self.made += sum(x.numel() for x in torch.utils._pytree.tree_leaves(out)
                             if isinstance(x, torch.Tensor))
        return out


@pytest.mark.parametrize('method', ['vsepp', 'vse0', "aoq(placebo='random')",
                                    "aoq(preset='faithful', placebo='random')"])
def test_a_step_does_as_much_whatever_the_number_of_images(method):
    found = []
    for n in (100, 2000):
        t = loop.prepare(Config(**vars(SMALL) | dict(method=method)), corpus_of(n))
        for owner in t.stateful(): loop.call_hooks([owner], 'start_epoch', 0)
        with Work() as work:
            for t.step in range(4):
                if t.step == 2: work.calls = work.made = 0        # what is made once is made by now
                loop.train_step(t, *loop._batch(t, t.step))
        found.append((work.calls, work.made))
    assert found[0] == found[1]


def test_the_order_of_an_epoch_is_made_once(monkeypatch, tmp_path):
    asked, order = [], loop.order
    monkeypatch.setattr(loop, 'order', lambda *at: asked.append(at) or order(*at))
    loop._order.cache_clear()
    loop.fit(SMALL, tmp_path, corpus_of(50), progress=False)
    assert asked == [(100, SMALL.seed, e) for e in range(SMALL.epochs)]


def said_before(sentence):
    "The rule of words as it was written first"
    text = re.sub("['’]", '', unicodedata.normalize('NFC', sentence).lower())
    return re.findall(r'[^\W_]+|;', text)


def test_the_short_way_to_words_gives_the_same_words():
    rng = np.random.default_rng(0)
    plain = np.array(list(string.printable + "''__;;--   ") + [chr(i) for i in range(32)])
    marked = np.array(list('éÉüßıñçØ’\u212a\u017f AKk9_'))  # letters; \u212a, the Kelvin sign, is NFC of K
    for letters in (plain, marked, np.concatenate([plain, marked])):
        for _ in range(500):
            s = ''.join(rng.choice(letters, rng.integers(0, 30)))
            assert words(s) == said_before(s), repr(s)


def test_lists_of_different_lengths_as_one_array():
    rng = np.random.default_rng(0)
    for shape in (0, 1, 50):
        ids = [rng.integers(-2**40, 2**40, rng.integers(0, 9)).tolist() for _ in range(shape)]
        tokens, lengths = padded(iter(ids))
        assert lengths.tolist() == [len(x) for x in ids] and tokens.dtype == lengths.dtype == torch.int64
        width = max(map(len, ids), default=0)
        assert tokens.shape == (shape, width) and tokens.tolist() == [x + [0]*(width-len(x)) for x in ids]


def scan_folder(at, n, k=2, R=3, D=5, dtype='float32', sparse=False):
    "A folder in the SCAN layout with n training images; sparse: its features are a file with holes"
    at.mkdir()
    for part, size in (('train', n), ('dev', 20)):
        s = invented(size, dict(dev='val').get(part, part), k)
        x = np.lib.format.open_memmap(at/f'{part}_ims.npy', 'w+', dtype, (size, R, D))
        if sparse: x[::max(1, size//50), :, :5] = s.feats[::max(1, size//50),:1]
        else: x[:] = s.feats
        x.flush()
        (at/f'{part}_caps.txt').write_text(''.join(f'{c}\n' for c in s.captions))
        (at/f'{part}_ids.txt').write_text(''.join(f'{s.img_ids[i]}\n' for i in s.img_of))
    return at


@pytest.mark.parametrize('method', ['vsepp', "aoq(placebo='random')"])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_features_that_stay_on_the_disk_give_the_same_bytes(method, dtype, tmp_path, monkeypatch):
    cfg, folder, found = (Config(**vars(SMALL) | dict(method=method)),
                          scan_folder(tmp_path/'data', 60, dtype=dtype), [])
    for most, workers in ((1 << 30, 0), (0, 0), (0, 1), (0, 3)):
        monkeypatch.setattr(batches, '_MAPPED', most)
        run = tmp_path/f'{most}-{workers}'
        t = loop.fit(cfg, run, corpus(cfg, folder, workers=workers), progress=False)
        assert ((t.train.feats is None) == (most == 0)
                and t.train.take(torch.arange(3))['feats'].dtype == torch.float32)
        found.append({p.name: p.read_bytes()
                      for p in run.rglob('*') if p.suffix in ('.safetensors', '.jsonl', '.npz')
                      and p.name != 'timing.jsonl'})
    assert len(found[0]) > 3 and all(f == found[0] for f in found)


def test_a_broken_number_on_the_disk_is_named_in_its_step(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, '_MAPPED', 0)
    folder = scan_folder(tmp_path/'data', 300)
    x = np.load(folder/'train_ims.npy', mmap_mode='r+')
    x[2, 1, 3] = np.nan  # not among the rows that are looked at when a folder is opened
    x.flush()
    with pytest.raises(DataError, match='NaN or infinity in row 2;'):
        loop.fit(SMALL, tmp_path/'run', corpus(SMALL, folder), progress=False)


def test_only_pages_of_a_file_that_is_only_read_are_let_go(tmp_path):
    np.save(tmp_path/'x.npy', np.arange(20.).reshape(10, 2))
    for mode, let_go in (('r', True), ('c', False), ('r+', False)):
        x = np.load(tmp_path/'x.npy', mmap_mode=mode)
        if mode == 'c': x[3] = 7.
        for view in (x, x[1:], x[::2], x[:, :1]):
            assert (batches._file_of(view) is not None) == let_go
            assert np.array_equal(batches._rows(view, [2, 0, 2]), np.array(view[[2, 0, 2]]))
            assert np.array_equal(batches._rows(view, slice(1, 3)), view[1:3])
    assert batches._file_of(np.zeros(3)) is None and x[3, 0] == 6.


LARGE = """
import resource, sys, time
from pathlib import Path
from itm_nb.training import loop
from itm_nb.training.config import Config
from itm_nb.training.corpus import corpus
cfg = Config(data='scan', batch=128, method='vsepp', warmup=0, epochs=1, text='mean', text_pool='mean', dim=64,
             image_hidden=64)
t = loop.prepare(cfg, corpus(cfg, sys.argv[1], workers=int(sys.argv[2])))
for t.step in range(20): loop.train_step(t, *loop._batch(t, t.step))
print(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20)
"""


@pytest.mark.parametrize('images, k, gib, workers', [
    (10_000, 2, 1.2, 1),
    pytest.param(113_287, 5, 3., 0, marks=pytest.mark.slow, id='as many as COCO has')])
def test_resident_memory_does_not_grow_with_the_features(images, k, gib, workers, disk_path):
    "36 regions of 2,048 numbers: 2.7 GiB and 31 GiB, in files with holes"
    folder = scan_folder(disk_path/'data', images, k, 36, 2048, sparse=True)
    ran = subprocess.run([sys.executable, '-c', LARGE, folder, str(workers)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-500:]
    seconds, peak = map(float, ran.stdout.split())
    assert peak < gib and seconds < 60
