"""Smaller folders: against slow cutting by hand in every form the SCAN layout has, Karpathy's JSON, judgements; and nothing left behind by what fails."""
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from itm_nb import cli
from itm_nb.core.errors_files import DataError
from itm_nb.data.folds import read_judgements
from itm_nb.data.layouts import check_layout, open_layout
from itm_nb.data.scan_layout import read_scan
from itm_nb.data.subset import subset

SIZES = dict(train=9, dev=4, test=6)


def scan(folder, form='', sizes=SIZES, k=3, most=0):
    "A SCAN folder; form: what is unusual about it. Returns {(part, id): (features, sentences)}"
    g, first, truth = np.random.default_rng(1), 50, {}; folder.mkdir(parents=True)
    for part, n in sizes.items():
        x = g.normal(size=(n, 3, 5)).astype('f8' if form == 'f8' else 'f2' if form == 'f2' else 'f4'); ids = first + g.permutation(n); first += n
        per = np.full(n, k) if not most else g.integers(1, most+1, n)
        caps = [[f'{part} {i} no {j}' for j in range(m)] for i, m in zip(ids, per)]; order = np.arange(per.sum())
        if form == 'flat': x = x[:,0]
        if form == 'mixed':                                            # an id for each sentence; rows stand in the order in which images come first
            first_of = np.cumsum(per) - per; order = np.r_[first_of, g.permutation(np.setdiff1d(order, first_of))]
        lines, line_ids = [c for cs in caps for c in cs], np.repeat(ids, per)
        np.save(folder/f'{part}_ims.npy', np.repeat(x, per, 0) if form == 'repeated' else x)
        (folder/f'{part}_caps.txt').write_text('\ufeff'*(form == 'bom') + ''.join(lines[j] + '\n' for j in order), 'utf-8')
        (folder/f'{part}_ids.txt').write_text(''.join(f'{i}\n' for i in (ids if form == 'per image' else line_ids[order])))
        if form == 'counts': np.save(folder/f'{part}_num.npy', g.integers(1, 4, n)); np.save(folder/f'{part}_boxes.npy', np.sort(g.random((n, 3, 2, 2)), 2).reshape(n, 3, 4))
        truth |= {(part, int(i)): (v, sorted(c)) for i, v, c in zip(ids, x.reshape(n, -1, 5), caps)}
    return truth


@pytest.mark.filterwarnings('ignore:.*(float64|one vector)')
@pytest.mark.parametrize('seed', [None, 3])
@pytest.mark.parametrize('form', ['', 'repeated', 'per image', 'mixed', 'flat', 'f8', 'f2', 'bom', 'counts'])
def test_every_form_of_the_scan_layout(form, seed, tmp_path):
    truth = scan(tmp_path/'a', form, most=0 if form in ('per image', 'repeated') else 4); said = subset(tmp_path/'a', tmp_path/'b', 5, seed, dict(val=2))
    assert said == dict(train=5, val=2, test=5, judged=0) and not [f for f in check_layout(tmp_path/'b') if f.level == 'error']
    for part, name in (('train', 'train'), ('val', 'dev'), ('test', 'test')):
        old, new = read_scan(tmp_path/'a', part), read_scan(tmp_path/'b', part); assert (tmp_path/'b'/f'{name}_ims.npy').is_file()
        if seed is None: assert new.img_ids.tolist() == old.img_ids[:len(new)].tolist()
        assert new.feats.dtype == (np.float16 if form == 'f2' else np.float32)
        for i, image in enumerate(new.img_ids.tolist()):
            x, caps = truth[name, image]; j = old.img_ids.tolist().index(image)
            assert np.array_equal(new.feats[i], x.astype(new.feats.dtype)) and new.num[i] == old.num[j]
            assert sorted(c for c, k in zip(new.captions, new.img_of) if k == i) == caps
            if form == 'counts': assert np.array_equal(new.boxes[i], old.boxes[j])
    assert (form == 'counts') == (tmp_path/'b'/'train_num.npy').is_file()


def test_the_same_seed_the_same_bytes(tmp_path):
    scan(tmp_path/'a'); files = lambda d: {p.name: p.read_bytes() for p in d.iterdir()}
    for to, seed in (('b', 1), ('c', 1), ('d', 2)): subset(tmp_path/'a', tmp_path/to, 3, seed)
    assert files(tmp_path/'b') == files(tmp_path/'c') and read_scan(tmp_path/'d', 'train').img_ids.tolist() != read_scan(tmp_path/'b', 'train').img_ids.tolist()


def test_coco_5k_is_cut_too(tmp_path):
    scan(tmp_path/'a', sizes=SIZES); scan(tmp_path/'all', sizes=dict(testall=12))
    for p in (tmp_path/'all').iterdir(): shutil.move(p, tmp_path/'a')
    assert subset(tmp_path/'a', tmp_path/'b', 3, sizes=dict(testall=7)) == dict(train=3, val=3, test=3, testall=7, judged=0)
    assert len(open_layout(tmp_path/'b', 'testall')) == 7


def test_judgements_follow_their_sentences(tmp_path):
    "Sentence numbers change, because the image with most sentences is left out; the judged pairs do not"
    scan(tmp_path/'a', most=8); s = read_scan(tmp_path/'a', 'test'); per = np.bincount(s.img_of); most = int(per.argmax()); assert per.max() > 5
    pairs = np.array([(i, j) for i in range(len(s)) for j in range(len(s.captions))]); g = np.random.default_rng(0)
    at = np.column_stack([s.img_ids[pairs[:,0]], s.cap_ids[pairs[:,1]]])
    np.savez(tmp_path/'a'/'judgements.npz', crowd=np.column_stack([at, g.integers(0, 4, (len(at), 2))]), expert=np.column_stack([at[::2], g.integers(1, 5, (len(at[::2]), 3))]))

    def table(folder, ids):
        s = read_scan(folder, 'test'); j = read_judgements(folder/'judgements.npz', s); keep = set(ids)
        return {k: sorted((int(s.img_ids[r[0]]), s.captions[r[1]], *map(int, r[2:])) for r in getattr(j, k)
                          if s.img_ids[r[0]] in keep and s.img_ids[s.img_of[r[1]]] in keep) for k in ('crowd', 'expert')}
    moved = 0
    for seed in range(12):
        said = subset(tmp_path/'a', to := tmp_path/f'b{seed}', 3, seed); new = read_scan(to, 'test'); ids = new.img_ids.tolist()
        assert table(to, ids) == table(tmp_path/'a', ids) and said['judged'] == sum(map(len, table(to, ids).values()))
        old = {c: i for c, i in zip(s.captions, s.cap_ids)}; moved += any(old[c] != i for c, i in zip(new.captions, new.cap_ids))
    assert moved, 'no seed renumbered sentences: the test shows nothing'
    assert s.img_ids[most] in s.img_ids


def karpathy(folder, parts=('train',)*5 + ('test',)*4 + ('restval',)*2 + ('val',)*3, ids=True):
    (folder/'images'/'sub').mkdir(parents=True); g, listed = np.random.default_rng(0), []
    for i, part in enumerate(parts):
        Image.fromarray(g.integers(0, 255, (9, 7, 3), 'uint8')).save(folder/'images'/'sub'/f'{i}.png')
        d = dict(filename=f'{i}.png', filepath='sub', split=part, sentences=[dict(raw=f'{i} says {k}', tokens=['x']) for k in range(1 + i % 3)], cocoid=900+i)
        listed.append(d | dict(imgid=40-i) if ids else d)
    (folder/'dataset_toy.json').write_text(json.dumps(dict(images=listed, dataset='toy'), ensure_ascii=False), 'utf-8'); return listed


@pytest.mark.parametrize('seed', [None, 5])
@pytest.mark.parametrize('ids', [True, False])
def test_photos_and_their_json(seed, ids, tmp_path):
    listed = karpathy(tmp_path/'a', ids=ids); said = subset(tmp_path/'a', tmp_path/'b', 2, seed, dict(train=6)); assert said == dict(train=6, val=2, test=2, judged=0)
    cut = json.loads((tmp_path/'b'/'dataset_toy.json').read_text('utf-8')); places = [listed.index(x) for x in cut['images']]
    assert cut['dataset'] == 'toy' and places == sorted(places)
    assert {p.name for p in (tmp_path/'b'/'images'/'sub').iterdir()} == {x['filename'] for x in cut['images']}
    for x in cut['images']:
        one, two = (tmp_path/d/'images'/'sub'/x['filename'] for d in 'ab'); assert one.read_bytes() == two.read_bytes() and not two.is_symlink()
    assert [f for f in check_layout(tmp_path/'b') if f.level == 'error'] == []
    assert sum(x['split'] in ('train', 'restval') for x in cut['images']) == 6


def left(folder): return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize('what', ['there', 'empty there', 'link', 'none', 'csv', 'nan', 'missing', 'pickle', 'bad judgements', 'bad json', 'no photo'])
def test_what_fails_leaves_nothing(what, tmp_path):
    a, to = tmp_path/'a', tmp_path/'b'; (karpathy if what in ('bad json', 'no photo') else scan)(a); n = 0 if what == 'none' else 3
    if what == 'there': to.mkdir(); (to/'x').write_text('mine')
    if what == 'empty there': to.mkdir()
    if what == 'link': os.symlink('nowhere', to)
    if what == 'csv': shutil.rmtree(a); a.mkdir(); (a/'captions.csv').write_text('file,caption\na.png,one\n')
    if what == 'nan': x = np.load(a/'test_ims.npy'); x[1] = np.nan; np.save(a/'test_ims.npy', x)
    if what == 'missing': (a/'dev_caps.txt').unlink()
    if what == 'pickle': np.save(a/'test_ims.npy', np.array([dict()], object), allow_pickle=True)
    if what == 'bad judgements': (a/'judgements.npz').write_text('no')
    if what == 'bad json': (a/'dataset_toy.json').write_text('{')
    if what == 'no photo': (a/'images'/'sub'/'0.png').unlink()
    before = left(tmp_path), left(to) if to.is_dir() else None
    with pytest.raises(DataError): subset(a, to, n)
    assert (left(tmp_path), left(to) if to.is_dir() else None) == before


@pytest.mark.parametrize('where', ['_save_rows', '_cut_judgements', 'check_layout'])
@pytest.mark.parametrize('how', [KeyboardInterrupt, OSError(28, 'No space left on device')])
def test_stopped_in_the_middle(where, how, tmp_path, monkeypatch):
    from itm_nb.data import subset as room
    scan(tmp_path/'a')
    def stop(*a): raise how
    monkeypatch.setattr(room, where, stop)
    wanted = dict(expected_exception=KeyboardInterrupt) if how is KeyboardInterrupt else dict(expected_exception=DataError, match='No space left')
    with pytest.raises(**wanted): subset(tmp_path/'a', tmp_path/'b')
    assert left(tmp_path) == ['a']


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); scan(tmp_path/'a')
    assert cli.itm_data(['subset', 'a', 'b', '-n', '3', '--test', '4', '--seed', '1']) == 0
    assert capsys.readouterr().out.splitlines() == ['train: 3 images', 'val: 3 images', 'test: 4 images', 'they lie in b']
    assert cli.itm_data(['check', 'b']) == 0 and '0 errors' in capsys.readouterr().out
    assert cli.itm_data(['subset', 'a', 'b']) == 2 and capsys.readouterr().err.startswith('itm_data: b: something there already')
