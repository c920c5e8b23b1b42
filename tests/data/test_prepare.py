"""`itm_data prepare`: copies stay together, whatever the layout; against a slow reference; 200 pictures at
once."""
import json
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itm_nb.cli import itm_data
from itm_nb.core.errors_files import DataError
from itm_nb.data import prepare as module
from itm_nb.data.layouts import check_layout, open_layout
from itm_nb.data.prepare import prepare
from photos import folder_of, paint

PARTS = ('train', 'val', 'test')


def parts_read(at):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return {Path(f).name: p for p in PARTS for f in open_layout(at, p).files}


def test_200_pictures_with_20_copies_need_no_refusal(tmp_path, capsys):
    of = folder_of(tmp_path)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path/'Images').iterdir()}
    began = time.perf_counter()
    assert itm_data(['prepare', str(tmp_path)]) == 0
    print(f'{time.perf_counter()-began:.1f} s')
    said = capsys.readouterr().out
    assert ('200 pictures, 400 captions' in said and '20 copies of 20 pictures: 7 exact' in said
            and '13 near' in said)
    part = parts_read(tmp_path)
    assert len(part) == 200 and all(part[a] == part[b] for a, b in of.items())
    assert [list(part.values()).count(p) for p in PARTS] == [160, 20, 20]
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path/'Images').iterdir()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ['Images', 'captions.txt', 'splits.json']
    assert not [f for f in check_layout(tmp_path) if f.level == 'error']


def test_pairs_against_a_loop():
    g = np.random.default_rng(0)
    bits = g.integers(0, 2**63, (60, 4)).astype(np.uint64)
    colours = g.integers(0, 256, (60, 192)).astype(np.int16)
    for i in range(20):                                    # near ones, at the borders of both rules
        bits[40+i] = bits[i]
        for b in g.choice(256, 10 + i % 5, replace=False):
            bits[40+i, b//64] ^= np.uint64(1 << int(b % 64))
        colours[40+i] = (colours[i] + 3 + i % 4).clip(0, 255)
    def alike(i, j):
        differ = sum(bin(int(a) ^ int(b)).count('1') for a, b in zip(bits[i], bits[j]))
        return differ <= 12 and sum(abs(int(a)-int(b)) for a, b in zip(colours[i], colours[j]))/192 < 5
    slow = [[i, j] for i in range(60) for j in range(i+1, 60) if alike(i, j)]
    assert 3 < len(slow) < 20
    for block in (1, 7, 256):
        assert module._near_copies(bits, colours, block).tolist() == slow


def test_random_groups_always_get_one_part_each():
    g = np.random.default_rng(1)
    for _ in range(200):
        group = np.unique(g.integers(0, g.integers(4, 30), g.integers(10, 80)), return_inverse=True)[1]
        given = g.choice(['', 'train', 'val', 'test'], len(group), p=g.dirichlet(np.ones(4))).tolist()
        part = module._parts_of(group, given, g.random(len(group)))
        for k in range(group.max()+1):
            here = {p for p, q in zip(part, group) if q == k}
            said = {p for p, q in zip(given, group) if q == k and p}
            assert len(here) == 1
            # a part that was given goes to the first of train, val, test; or it fills one that would be empty
            first = min(said, key=PARTS.index, default=None)
            assert first is None or here == {first} or first == 'train'


@pytest.mark.parametrize('layout', ['karpathy', 'imagefolder', 'albef', 'jsonl', 'metadata'])
def test_every_layout_with_pictures(tmp_path, layout):
    "Copies across the official parts: all go to train, nothing else moves"
    names = {p: [f'{p}{i}.png' for i in range(n)] for p, n in zip(PARTS, (12, 4, 4))}
    sub = dict(karpathy=lambda p: 'images', imagefolder=lambda p: dict(val='validation').get(p, p))
    place = lambda p, f: tmp_path/(sub.get(layout, lambda p: 'pics')(p))/f
    for p in PARTS:
        for i, f in enumerate(names[p]):
            paint(place(p, f), 100*PARTS.index(p) + i)
    place('test', 'test1.png').write_bytes(place('train', 'train3.png').read_bytes())
    Image.open(place('val', 'val0.png')).resize((60, 45)).save(place('test', 'test2.png'))
    if layout == 'karpathy':
        images = [dict(filename=f, split=p, imgid=100*PARTS.index(p)+i,
                       sentences=[dict(raw=f'it is {f}', sentid=100*PARTS.index(p)+i)])
                  for p in PARTS for i, f in enumerate(names[p])]
        (tmp_path/'dataset_toy.json').write_text(json.dumps(dict(images=images)))
    elif layout == 'imagefolder':
        for p in PARTS:
            (place(p, 'x').parent/'metadata.csv').write_text('file_name,caption\n'
                + ''.join(f'{f},it is {f}\n' for f in names[p]))
    elif layout == 'albef':
        for p in PARTS:
            (tmp_path/f'toy_{p}.json').write_text(json.dumps([dict(image=f'pics/{f}', caption=f'it is {f}')
                for f in names[p]]))
    elif layout == 'jsonl':
        (tmp_path/'captions.jsonl').write_text(''.join(json.dumps(dict(file=f'pics/{f}', caption=f'it is {f}',
            split=p)) + '\n' for p in PARTS for f in names[p]))
    else:
        (tmp_path/'metadata.csv').write_text('file_name,caption,split\n'












































































































































































































































































































































































































































































































                                             + ''.join(f'pics/{f},it is {f},{p}\n' for p in PARTS for f in names[p]))
    done = prepare(tmp_path)
    assert done.path == tmp_path/'splits.json' and any('2 pictures have another part' in l for l in done.lines)
    part = parts_read(tmp_path)
    want = {f: p for p in PARTS for f in names[p]} | {'test1.png': 'train', 'test2.png': 'val'}
    assert part == want


def test_a_copy_without_preparing_is_refused_with_the_remedy(tmp_path):
    folder_of(tmp_path, 30, 3)
    rows = (tmp_path/'captions.txt').read_text().splitlines()
    (tmp_path/'captions.txt').write_text('\n'.join(['image,caption,split', *(r + (',test' if r.startswith('again') else ',train') for r in rows[1:])]) + '\n')
    with pytest.raises(DataError, match='itm_data prepare'):
        open_layout(tmp_path, 'train')


@pytest.mark.parametrize('text', ['{"format": "itm_nb splits 1"}', '{"format": "itm_nb splits 1", "layout": "captions", "table": "", "parts": {"train": ["000.jpg", "000.jpg"]}}',
                                  '{"format": "itm_nb splits 1", "layout": "nowhere", "table": "", "parts": {}}', '{"format": "itm_nb splits 1", "layout": "captions", "table": "../x.csv", "parts": {}}',
                                  '{"format": "itm_nb splits 1", "layout": "captions", "table": "", "parts": {"extra": []}}', '{"format": "itm_nb splits 1", "layout": [1], "table": "", "parts": {}}', '{'])
def test_a_damaged_splits_file_is_one_clear_error(tmp_path, text):
    folder_of(tmp_path, 10, 1)
    (tmp_path/'splits.json').write_text(text)
    with pytest.raises(DataError, match='splits.json'):
        open_layout(tmp_path, 'train')


def test_a_splits_file_of_somebody_else_is_left_alone(tmp_path):
    folder_of(tmp_path, 12, 0)
    (tmp_path/'splits.json').write_text('{"train": [1, 2]}')
    with pytest.warns(UserWarning, match='no column split'):
        open_layout(tmp_path, 'train')
    with pytest.raises(DataError, match='says something else'):
        prepare(tmp_path)
    assert (tmp_path/'splits.json').read_text() == '{"train": [1, 2]}'


def test_a_link_out_of_the_folder_is_refused_and_nothing_is_written(tmp_path):
    at = tmp_path/'photos'
    folder_of(at, 12, 0)
    paint(tmp_path/'outside.jpg', 99)
    (at/'Images'/'003.jpg').unlink()
    os.symlink(tmp_path/'outside.jpg', at/'Images'/'003.jpg')
    with pytest.raises(DataError, match='leads out'):
        prepare(at)
    assert not (at/'splits.json').exists()
