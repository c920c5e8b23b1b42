"""What a step costs does not depend on how large the data are, and data of COCO's size fit where a laptop
has room."""
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from itm_nb.data.splits import Split
from itm_nb.training import loop
from itm_nb.training.config import Config
from itm_nb.training.corpus import Corpus

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
