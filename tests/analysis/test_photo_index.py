"""What `itm_search` stands on: data sets that hold their pictures inside, lists of marks, many vectors."""
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_nb.analysis import photo_index
from itm_nb.analysis.photo_index import mark, negatives, open_index, small_picture
from itm_nb.analysis.search import search
from itm_nb.cli import itm_search
from itm_nb.core.errors_files import DataError
from itm_nb.training.config import KNOWN, OF_CONFIG, config
from itm_nb.training.corpus import corpus
from itm_nb.training.fine_tune import fine_tune
from itm_nb.training.loop import fit
from photos import paint, tiny_clip


@pytest.fixture(scope='module')
def nets(tmp_path_factory):
    at = tmp_path_factory.mktemp('nets')
    tiny_clip(at/'tiny-clip')
    return at


def data_set(at, parts, columns=('image', 'caption'), captions=True):
    "A data set of the real package; parts: {name: numbers of pictures}; the first picture twice in its part"
    datasets = pytest.importorskip('datasets', reason="no datasets: pip install 'itm_nb[data]'")
    made = {}
    for name, numbers in parts.items():
        for i in numbers:
            paint(at/'files'/f'{i:03d}.png', i)
        raw = lambda i: dict(bytes=(at/'files'/f'{i:03d}.png').read_bytes(), path=None)
        rows = [*numbers, numbers[0]]
        columns_of = {columns[0]: [raw(i) for i in rows]}
        if captions:
            columns_of[columns[1]] = [[f'it is {i:03d}', f'it is {i:03d} , seen {k}'] for k, i in enumerate(rows)]
        made[name] = datasets.Dataset.from_dict(columns_of).cast_column(columns[0], datasets.Image())
    datasets.DatasetDict(made).save_to_disk(str(at/'set'))
    return at/'set', {p: (at/'files'/f'{i:03d}.png').read_bytes() for p in parts for i in parts[p]}


PARTS = dict(train=range(12), validation=range(12, 16), test=range(16, 20))


def test_all_pictures_of_a_data_set_are_searched(nets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at, _ = data_set(tmp_path, PARTS)
    index = open_index('tiny-clip', at, nets)
    raw = {(tmp_path/'files'/f'{i:03d}.png').read_bytes(): i for i in range(20)}
    number = [raw[Path(f).read_bytes()] for f in index.shelf.split.files]
    assert sorted(number) == list(range(20)) and index.left_out == 0
    part = ['train' if i < 12 else 'val' if i < 16 else 'test' for i in number]
    assert index.part == part
    for i, n in enumerate(number):
        said = {index.shelf.split.captions[j] for j in index.own(i)}
        assert {f'it is {n:03d}'} < said and all(f'{n:03d}' in c for c in said)
        assert small_picture(index, i)[:3] == b'\xff\xd8\xff'
    found, _ = index.find('it is 007', 50)
    assert sorted(i for i, _ in found) == list(range(20))
    row = negatives(index, 0, 1)[0]
    assert mark(index, 0, row['sentence']) == 1 and index.marks == at/'false_negatives.csv'


def test_negatives_of_a_run_on_a_data_set_are_found_again(nets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at, _ = data_set(tmp_path, PARTS)
    asked = {s.name: s.default for s in KNOWN.values()} | dict(
        model='tiny-clip', folder=str(at), models=str(nets), method='vsepp', epochs=1)
    values, _ = fine_tune(asked, ['model', 'folder', 'models', 'method', 'epochs'])
    cfg = config({s.name: values[s.name] for s in OF_CONFIG})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(cfg, tmp_path/'run', corpus(cfg, at, tmp_path/'cache', nets), progress=False)
    index = open_index(tmp_path/'run', at, nets)
    assert len(index) == 20 and index.method == 'vsepp' and set(index.picked) <= set(range(20)) and index.picked
    assert all(index.part[i] == 'train' for i in index.picked)


def test_a_data_set_without_a_word_and_with_other_names(nets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at, _ = data_set(tmp_path, dict(sample=range(3), more=range(2, 5)), ('img', ''), captions=False)
    index = open_index('tiny-clip', at, nets)
    # one picture stands in both parts
    assert len(index) == 5 and not index.written.any() and index.part == ['']*5
    assert len(index.find('it is 001', 9)[0]) == 5


def test_a_data_set_without_pictures_is_one_clear_error(nets, tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets', reason="no datasets: pip install 'itm_nb[data]'")
    monkeypatch.chdir(tmp_path)
    d = datasets.Dataset.from_dict(dict(text=['a'], label=[1]))
    datasets.DatasetDict(train=d).save_to_disk(str(tmp_path/'set'))
    with pytest.raises(DataError, match='one that holds pictures'):
        open_index('tiny-clip', tmp_path/'set', nets)


@pytest.mark.parametrize('name, made, said', (
    ('list.csv', lambda p: p.write_text('picture;words\n'), 'the columns'),
    ('list.csv', lambda p: p.write_bytes(b'image,caption\n\xff\n'), 'UTF-8'),
    ('list.csv', lambda p: p.mkdir(), 'a folder, not a file'),
    ('list.csv', lambda p: os.symlink('/nowhere/at/all', p), 'a dead link'),
    ('nowhere/list.csv', lambda p: None, 'there is no folder')))
def test_marks_are_looked_at_before_anything_is_encoded(nets, tmp_path, monkeypatch, capsys, name, made, said):
    "Before a model is opened, too: the one that is named is not there"
    monkeypatch.chdir(tmp_path)
    paint(tmp_path/'photos'/'000.png', 0)
    made(tmp_path/name)
    assert itm_search(['no-such-model', 'photos', '--marks', name, '--no-browser']) == 2
    told = capsys.readouterr().err
    assert said in told and told.count('\n') == 1 and not (tmp_path/'runs').exists()


def test_a_damaged_list_beside_the_pictures_is_told_too(nets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paint(tmp_path/'photos'/'000.png', 0)
    (tmp_path/'photos'/'false_negatives.csv').write_text('x')
    with pytest.raises(DataError, match='the columns'):
        open_index('no-such-model', tmp_path/'photos', nets)


@pytest.fixture
def faiss_alone(monkeypatch):
    "faiss from 300 vectors on; our own product refuses"
    pytest.importorskip('faiss', reason='no faiss: pip install faiss-cpu')
    monkeypatch.setattr(photo_index, '_MANY', 300)
    def no(*a):
        raise AssertionError('the product with all')
    return lambda: monkeypatch.setattr(photo_index, 'search', no)


def whole_numbers(n, d, most=3, seed=0):
    "Vectors whose products are exact, so that many scores are equal"
    return torch.from_numpy(np.random.default_rng(seed).integers(-most, most+1, (n, d)).astype('f4'))


def test_faiss_gives_our_answers_ties_included(faiss_alone):
    x = whole_numbers(5000, 24)
    x[10:40] = x[3]                              # copies
    q = torch.cat([x[3:4], whole_numbers(40, 24, seed=1)])
    near, how = photo_index._near(x)
    assert how == 'by faiss, exactly'
    want = search(q, x, 48)
    assert (want[1][:, 1:] == want[1][:, :-1]).float().mean() > .3           # ties there are
    ours = search(q, x, 5)
    faiss_alone()
    got = near(q, 48)
    assert (got[0] == want[0]).all() and (got[1] == want[1]).all()
    assert all((a == b).all() for a, b in zip(near(q, 5), ours))


def test_faiss_gives_our_answers_for_unit_vectors(faiss_alone):
    g = torch.Generator().manual_seed(0)
    x, q = (torch.nn.functional.normalize(torch.randn(n, 64, generator=g), dim=1) for n in (4000, 30))
    near, _ = photo_index._near(x)
    want = search(q, x, 20)
    faiss_alone()
    at, score = near(q, 20)
    assert (at == want[0]).all() and torch.allclose(score, want[1], atol=1e-6)


@pytest.mark.parametrize('x', (torch.ones(900, 8), torch.zeros(900, 8)))
def test_more_ties_than_candidates_are_left_to_the_product(faiss_alone, x):
    near, _ = photo_index._near(x)
    at, score = near(torch.ones(2, 8), 7)
    assert (at == torch.arange(7)).all() and (score == x[0].sum()).all()


def test_few_vectors_or_no_faiss(monkeypatch):
    few = torch.zeros(10, 4)
    assert photo_index._near(few) == (None, '') and photo_index._MANY == 100_000
    monkeypatch.setattr(photo_index, '_MANY', 10)
    monkeypatch.setattr(photo_index, 'find_spec', lambda name: None)
    near, how = photo_index._near(few)
    assert near is None and 'pip install faiss-cpu' in how


def test_the_index_asks_faiss(nets, tmp_path, monkeypatch):
    "The same answers of the page's index with faiss and without"
    pytest.importorskip('faiss', reason='no faiss: pip install faiss-cpu')
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        paint(tmp_path/'photos'/f'{i:03d}.png', i % 7)
    before = open_index('tiny-clip', 'photos', nets)
    monkeypatch.setattr(photo_index, '_MANY', 8)
    asked = []
    real = photo_index._by_faiss
    monkeypatch.setattr(photo_index, '_by_faiss', lambda *a: asked.append(a[-1]) or real(*a))
    after = open_index('tiny-clip', 'photos', nets)
    assert (before.how, after.how) == ('', 'by faiss, exactly')
    for k in (1, 3, 8):
        assert [i for i, _ in after.find('it is 003', k)[0]] == [i for i, _ in before.find('it is 003', k)[0]]
        assert [i for i, _ in after.like(2, k)] == [i for i, _ in before.like(2, k)]
    assert asked == [1, 2, 3, 4, 8, 9]
