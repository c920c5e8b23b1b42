"""Search against brute force: blocks, ties, every kind of score, words and regions left out one by one,
questions that cannot be asked."""
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from itm_nb.core.errors_files import DataError
from itm_nb.data.batches import Vocabulary
from itm_nb.data.splits import Split
from itm_nb.models.factory import MODELS
from itm_nb.analysis.search import (
    answering, ask, bare, find_images, find_sentences, open_run, region_gains, shelf, tell, top_k, unknown,
    why, word_gains)
from itm_nb.training.build import build
from itm_nb.training.config import config
from itm_nb.training.corpus import Corpus

N, R, D, CAPS = (13, 5, 6, ('a red ball', 'the dog runs over a hill', 'two men', 'red red red hats and a dog',
                            'a hill'))


@pytest.fixture(scope='module')
def split():
    g = np.random.default_rng(0); M = 2*N
    x = g.normal(size=(N, R, D)).astype('f4'); num = g.integers(2, R+1, N); x[np.arange(R) >= num[:,None]] = 0
    return Split('test', x, num, [CAPS[j % len(CAPS)] for j in range(M)], np.arange(M)//2, np.arange(N)+100,
                 np.arange(M)+500)


def on(kind, split):
    "A model with fresh weights and everything it can find"
    vocab = Vocabulary.build(CAPS)
    own = dict(dropout=0., dim=8, d_word=8, image_hidden=0, image_pool='mean', text='gru', heads=2, layers=1)
    model = build(config(own | dict(similarity=kind)), D, len(vocab))
    # a fresh transformer says the same of everything
    for p in model.parameters(): p.data *= 12 if kind == 'cross' and p.ndim > 1 else 1
    return shelf(model, vocab, Corpus('made', lambda part: split))


def one(s, regions, sentence):
    "Slow: one picture, one sentence"
    ids, lengths = s.vocab.encode([sentence])
    with torch.no_grad():
        img = s.model.image(torch.as_tensor(regions)[None], torch.tensor([len(regions)]))
        return float(s.model.pairs(img, s.model.text(ids, lengths))[0].detach())


def real(split, i): return split.feats[i,:split.num[i]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 12), st.integers(1, 7), st.integers(1, 9),
       st.integers(2, 50), st.integers(0, 999))
def test_the_best_of_many(n, m, k, rows, cols, values, seed):
    "Few different values, so nearly everything is tied; the order must be that of a stable sort of the whole"
    S = torch.randint(values, (n, m), generator=torch.Generator().manual_seed(seed)).float()
    idx, score = top_k(lambda r, c: S[r,c], n, m, k, rows, cols)
    assert idx.tolist() == [sorted(range(m), key=lambda j: (-row[j], j))[:k] for row in S.tolist()]
    assert torch.equal(score, S.gather(1, idx))


def test_no_block_is_larger_than_asked():
    seen = []
    def score(r, c): seen.append((r.stop-r.start, c.stop-c.start)); return torch.rand(seen[-1])
    top_k(score, 700, 9000, 5)
    assert max(seen) == (256, 4096) and sum(a*b for a, b in seen) == 700*9000


@pytest.mark.parametrize('bad', [0, -3])
def test_no_answers_asked_for(bad):
    with pytest.raises(DataError, match='at least 1'): top_k(lambda r, c: torch.zeros(1, 1), 1, 1, bad)


def test_a_nan_is_never_an_answer():
    with pytest.raises(DataError, match='NaN'): top_k(lambda r, c: torch.full((1, 3), torch.nan), 1, 3, 1)


KINDS = sorted(MODELS)


@pytest.mark.parametrize('kind', KINDS)
def test_every_score_both_ways(kind, split):
    s = on(kind, split); S = torch.tensor([[one(s, real(split, i), q) for q in CAPS] for i in range(N)])
    for k in (1, 4, 99):
        at, score = find_images(s, list(CAPS), k, rows=2, cols=3)
        torch.testing.assert_close(score, S.T.sort(descending=True).values[:,:k], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(S.T.gather(1, at), score, atol=1e-4, rtol=1e-4)
    at, score = find_sentences(s, [3, 0], 5, rows=1, cols=4)
    of = torch.tensor([CAPS.index(c) for c in split.captions])
    torch.testing.assert_close(score, S[[3, 0]][:,of].sort(descending=True).values[:,:5], atol=1e-4,
                               rtol=1e-4)
    assert tell(s, 3, 5).own.tolist() == (split.img_of[at[0].numpy()] == 3).tolist()


@pytest.mark.parametrize('kind', KINDS)
def test_why_by_hand(kind, split):
    "Each word and each region left out, one pair at a time"
    s, query = on(kind, split), 'a dog runs'; said, gains = word_gains(s, query, [4, 1])
    for row, i in zip(gains, (4, 1)):
        for l, less in enumerate(('dog runs', 'a runs', 'a dog')):
            assert row[l] == pytest.approx(one(s, real(split, i), query) - one(s, real(split, i), less),
                                           abs=2e-4)
    said, parts = region_gains(s, query, 4)
    x = real(split, 4)
    assert min(abs(gains).max(), abs(parts).max()) > 3e-3
    assert said == ['a', 'dog', 'runs'] and parts.shape == (len(x), 3)
    for r in range(len(x)):
        y = np.delete(x, r, 0)
        for l, less in enumerate(('dog runs', 'a runs', 'a dog')):
            want = one(s, x, query) - one(s, x, less) - one(s, y, query) + one(s, y, less)
            assert parts[r,l] == pytest.approx(want, abs=4e-4)
    best = answering(s, query, 4); assert all(parts[r,l] == parts[:,l].max() for l, r in best.items())
    assert why(s, query, 4).axes[0].get_yticklabels()[1].get_text() == 'dog'


def test_questions_that_cannot_be_asked(split):
    s = on('cosine', split)
    for bad in ('', '  ', '?!', None, 7):
        with pytest.raises(DataError, match='at least one word'): ask(s, bad)
    with pytest.raises(DataError, match='never seen.*near ones: .*hill'): ask(s, 'hil zzz')
    with pytest.warns(UserWarning, match='never seen: cat'): found = ask(s, 'a cat', 3)
    assert len(found) == 3 and unknown(s.vocab, "A cat's Hill") == ['cats']
    for bad in (-1, N):
        with pytest.raises(DataError, match=f'0 to {N-1}'): tell(s, bad)


def test_one_word_and_repeated_words(split):
    "Without its only word a sentence is <unk>; a repeated word is left out in one place at a time"
    s = on('cosine', split); said, gains = word_gains(s, 'dog', [0])
    assert gains[0,0] == pytest.approx(one(s, real(split, 0), 'dog') - one(s, real(split, 0), ''), abs=1e-5)
    assert word_gains(s, 'red red', [0])[1].shape == (1, 2)


def test_pictures_nobody_described(tmp_path, split):
    "Features alone: padding of zeros is not counted as regions; bad files are named"
    np.save(tmp_path/'x.npy', split.feats)
    s = bare(tmp_path/'x.npy')
    assert s.num.tolist() == split.num.tolist()
    np.save(tmp_path/'flat.npy', split.feats[:,0].astype('f8'))
    assert bare(tmp_path/'flat.npy').feats.shape == (N, 1, D)
    np.save(tmp_path/'o.npy', np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path/'cut.npy').write_bytes(b'\x93NUMPY')
    np.save(tmp_path/'line.npy', np.zeros(4, 'f4')); np.save(tmp_path/'int.npy', np.zeros((4, 2), int))
    for bad in ('o.npy', 'cut.npy', 'no.npy', 'line.npy', 'int.npy', '.', 'nothing'):
        with pytest.raises(DataError): bare(tmp_path/bad)
    with pytest.raises(DataError, match='no trained model'): open_run(tmp_path)


@pytest.mark.slow
def test_the_notebook_searches_and_so_does_its_model_elsewhere(tmp_path, monkeypatch):
    "`itm_run search` on a tiny world; then its model by folder, in features that nobody described"
    from itm_nb.core.commands import SetupError
    from itm_nb.runs import execution
    from itm_nb.scenes import dataset
    monkeypatch.chdir(tmp_path); quick = dict(preset='tiny', epochs=2, query='a red moon', top=2)
    code, out = execution.start('search', quick | dict(out='a'), bar=False)
    assert code == 0 and (out/'model'/'best').is_dir()
    np.save('x.npy', dataset.make('tiny').split('test').feats[:9])
    for given in (dict(run='a/model'), dict(run='a/model', folder='x.npy')):
        assert execution.start('search', quick | given, bar=False)[0] == 0
    with pytest.raises(SetupError, match="run 'nowhere': no such folder"):
        execution.start('search', quick | dict(run='nowhere', out='b'), bar=False)
    assert not Path('b').exists()
