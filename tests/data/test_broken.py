"""Broken folders in every layout: one typed error that names the file, nothing written, nothing executed; and odd but sound ones, read right."""
import contextlib
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from itm_nb.data import splits
from itm_nb.core.errors_files import DataError
from itm_nb.data.layouts import KNOWN, LAYOUTS, check_layout, info_layout, open_layout, recognise
from itm_nb.data.safe_files import look, safe_npz
from itm_nb.cli import itm_data

PART = ['train']*4 + ['val']*2 + ['test']*2
CAPS = [[f'picture {i}, sentence {k}' for k in range(2)] for i in range(8)]


def draw(path, i, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.full((24, 32, 3), (40 + 20*i, 200 - 20*i, 90), 'uint8'); x[6:18, 2*i:2*i+12] = 250 - 9*i; Image.fromarray(x).save(path, **kw)

def write_json(path, d): path.write_text(json.dumps(d))

def karpathy(at):
    for i in range(8): draw(at/'images'/f'p{i}.png', i)
    write_json(at/'dataset_toy.json', dict(images=[dict(filename=f'p{i}.png', split=PART[i], imgid=i, sentences=[
        dict(raw=c, sentid=2*i + k) for k, c in enumerate(CAPS[i])]) for i in range(8)]))

def albef(at):
    for i in range(8): draw(at/'images'/f'p{i}.png', i)
    write_json(at/'a_train.json', [dict(image=f'images/p{i}.png', caption=c) for i in range(4) for c in CAPS[i]])
    for p in ('val', 'test'): write_json(at/f'a_{p}.json', [dict(image=f'images/p{i}.png', caption=CAPS[i]) for i in range(8) if PART[i] == p])

def rows(end='png'): return [(f'p{i}.{end}', c, PART[i]) for i in range(8) for c in CAPS[i]]

def captions(at):
    for i in range(8): draw(at/f'p{i}.png', i)
    with open(at/'captions.csv', 'w', newline='') as f: csv.writer(f, lineterminator='\n').writerows([('file', 'caption', 'split'), *rows()])

def jsonl(at):
    for i in range(8): draw(at/f'p{i}.png', i)
    (at/'captions.jsonl').write_text(''.join(json.dumps(dict(file=f, caption=c, split=p)) + '\n' for f, c, p in rows()))

def boxes(at):
    rng = np.random.default_rng(0)
    for i in range(8): np.savez(at/f'p{i}.npz', **photo(rng, 10 + i))
    (at/'captions.jsonl').write_text(''.join(json.dumps(dict(file=f, caption=c, split=p)) + '\n' for f, c, p in rows('npz')))

def photo(rng, n):
    return dict(features=rng.normal(size=(n, 6)).astype('f4'), conf=np.linspace(.9, .1, n).astype('f4'),
                norm_bb=np.sort(rng.random((n, 2, 2)), 1).reshape(n, 4).astype('f4'))

def scan(at):
    rng = np.random.default_rng(0)
    for a, part in ((0, 'train'), (10, 'dev'), (20, 'test')):
        np.save(at/f'{part}_ims.npy', rng.normal(size=(4, 3, 5)).astype('f4'))
        (at/f'{part}_ids.txt').write_text(''.join(f'{a + i}\n' for i in range(4)))
        (at/f'{part}_caps.txt').write_text(''.join(f'sentence {k} of {a + i}\n' for i in range(4) for k in range(2)))

def imagefolder(at):
    for p in ('train', 'val', 'test'):
        d = at/dict(val='validation').get(p, p); d.mkdir()
        for i in range(8):
            if PART[i] == p: draw(d/f'p{i}.png', i)
        with open(d/'metadata.csv', 'w', newline='') as f: csv.writer(f, lineterminator='\n').writerows([('file_name', 'caption'), *(r[:2] for r in rows() if r[2] == p)])

def kaggle(at):
    for i in range(8): draw(at/'Images'/f'p{i}.png', i)
    with open(at/'captions.txt', 'w', newline='') as f: csv.writer(f, lineterminator='\n').writerows([('image', 'caption'), *(r[:2] for r in rows())])

def flickr30k(at):
    for i in range(8): draw(at/'flickr30k_images'/f'p{i}.png', i)
    (at/'results.csv').write_text('image_name| comment_number| comment\n' + ''.join(f'p{i}.png| {k}| {c}\n' for i in range(8) for k, c in enumerate(CAPS[i])))

SOUND = dict(karpathy=karpathy, albef=albef, captions=captions, jsonl=jsonl, boxes=boxes, scan=scan, imagefolder=imagefolder, kaggle=kaggle, flickr30k=flickr30k)

def make(at, kind): at.mkdir(parents=True, exist_ok=True); SOUND[kind](at); return at


class Canary:
    "Unpickling this writes a file"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return (open, (self.path, 'w'))


def edit(name, old, new):
    "A damage: other text in a file"
    def damage(at): raw = (at/name).read_text(); assert old in raw; (at/name).write_text(raw.replace(old, new, 1))
    return damage

def raw(name, f):
    "A damage: other bytes in a file"
    def damage(at): (at/name).write_bytes(f((at/name).read_bytes()))
    return damage

def tree(name, f):
    "A damage: another structure in a JSON file"
    def damage(at): d = json.loads((at/name).read_text()); d = f(d) or d; write_json(at/name, d)
    return damage

def instead(name, put):
    "A damage: something else in the place of a file"
    def damage(at): (at/name).unlink(); put(at/name)
    return damage

def arrays(**change):
    "A damage: other arrays for a photo"
    def damage(at):
        z = photo(np.random.default_rng(1), 12); z |= {k: f(z[k]) for k, f in change.items()}; np.savez(at/'p1.npz', **z)
    return damage

def bomb(b):
    b = bytearray(b); b[16:24] = (60_000).to_bytes(4, 'big')*2; b[29:33] = zlib.crc32(bytes(b[12:29])).to_bytes(4, 'big'); return bytes(b)

def zip_bomb(at): np.savez_compressed(at, features=np.zeros(70 << 20), conf=np.ones(1), norm_bb=np.ones((1, 4)))

def objects(at): np.savez(at, features=np.array([Canary(at.parent/'fired')], dtype=object), conf=np.ones(1), norm_bb=np.ones((1, 4)), allow_pickle=True)

def lying_header(at):
    "An npy header that asks for 8 TB"
    h = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"; h += b' '*(117 - len(h)) + b'\n'
    with zipfile.ZipFile(at, 'w') as z: z.writestr('features.npy', b'\x93NUMPY\x01\x00' + len(h).to_bytes(2, 'little') + h + bytes(64))

def image(i, **kw): return lambda d: d['images'][i].update(kw)
def sent(i, **kw): return lambda d: d['images'][i]['sentences'][0].update(kw)

K, A, C = 'dataset_toy.json', 'a_train.json', 'captions.csv'
# name -> (layout, damage, file in the message, words of the message)
BROKEN = {
    'JSON cut off': ('karpathy', raw(K, lambda b: b[:200]), K, 'broken JSON'),
    'deep JSON': ('karpathy', raw(K, lambda b: b'{"images":' + b'['*200_000), K, 'broken JSON'),
    'number of 5000 digits': ('karpathy', edit(K, '"imgid": 3', '"imgid": ' + '9'*5000), K, 'broken JSON'),
    'no list of images': ('karpathy', tree(K, lambda d: dict(pictures=d['images'])), K, 'no list of images'),
    'a list instead': ('karpathy', tree(K, lambda d: d['images']), K, 'no list of images'),
    'NaN as id': ('karpathy', tree(K, image(2, imgid=float('nan'))), K, "imgid 'nan'"),
    'bool as id': ('karpathy', tree(K, image(2, imgid=True)), K, "imgid 'True'"),
    'id beyond 15 digits': ('karpathy', tree(K, image(2, imgid=10**18)), K, 'imgid'),
    'image id twice': ('karpathy', tree(K, image(2, imgid=3)), K, 'imgid 3 for the second time'),
    'sentence id twice': ('karpathy', tree(K, sent(2, sentid=0)), K, 'sentid 0 for the second time'),
    'image twice': ('karpathy', tree(K, image(2, filename='p0.png')), K, 'images/p0.png for the second time'),
    'unknown part': ('karpathy', tree(K, image(2, split='extra')), K, "the part 'extra'"),
    'no part': ('karpathy', tree(K, image(2, split=None)), K, "the part 'None'"),
    'no test': ('karpathy', tree(K, lambda d: dict(images=d['images'][:6])), K, 'no image in test'),
    'no sentences': ('karpathy', tree(K, image(2, sentences=[])), K, 'no caption'),
    'sentences as text': ('karpathy', tree(K, image(2, sentences='a dog')), K, 'no list of sentences'),
    'caption is a number': ('karpathy', tree(K, sent(2, raw=7)), K, "the caption '7'"),
    'blank caption': ('karpathy', tree(K, sent(2, raw=' \n ')), K, 'an empty caption'),
    'NUL in a caption': ('karpathy', tree(K, sent(2, raw='a\0b')), K, 'NUL'),
    'half a surrogate pair': ('karpathy', tree(K, sent(2, raw='\ud800')), K, 'half a character'),
    'caption of a megabyte': ('karpathy', tree(K, sent(2, raw='a'*10**6)), K, '1000000 characters'),
    'path up': ('karpathy', tree(K, image(2, filename='../p1.png')), K, 'leaves the folder'),
    'filepath up': ('karpathy', tree(K, image(2, filepath='a/../..')), K, 'leaves the folder'),
    'absolute path': ('karpathy', tree(K, image(2, filename='/dev/zero')), K, 'absolute path'),
    'NUL in a name': ('karpathy', tree(K, image(2, filename='p\0.png')), K, 'unprintable'),
    'name is a list': ('karpathy', tree(K, image(2, filename=['p2.png'])), K, 'file name'),
    'two JSON files': ('karpathy', lambda at: shutil.copy(at/K, at/'dataset_b.json'), 'set', '2 files'),
    'image missing': ('karpathy', lambda at: (at/'images/p2.png').unlink(), 'p2.png', 'cannot be opened'),
    'link in a loop': ('karpathy', instead('images/p2.png', lambda p: p.symlink_to(p)), 'p2.png', 'cannot be opened'),
    'image folder in a loop': ('karpathy', lambda at: (shutil.rmtree(at/'images'), (at/'images').symlink_to(at/'images')), 'p0.png', 'cannot be opened'),
    'a pipe': ('karpathy', instead('images/p2.png', os.mkfifo), 'p2.png', 'not an ordinary file'),
    'a device': ('karpathy', instead('images/p2.png', lambda p: p.symlink_to('/dev/zero')), 'p2.png', 'not an ordinary file'),
    'a folder as image': ('karpathy', instead('images/p2.png', lambda p: p.mkdir()), 'p2.png', 'not an ordinary file'),
    'image of length zero': ('karpathy', raw('images/p2.png', lambda b: b''), 'p2.png', 'length zero'),
    'image cut off': ('karpathy', raw('images/p2.png', lambda b: b[:-20]), 'p2.png', 'cut off'),
    'a web page as image': ('karpathy', raw('images/p2.png', lambda b: b'<html>'), 'p2.png', 'no readable picture'),
    'a bomb of pixels': ('karpathy', raw('images/p2.png', bomb), 'p2.png', 'no readable picture'),
    'a pickle as image': ('karpathy', raw('images/p2.png', lambda b: b'\x80\x04\x95' + bytes(30)), 'p2.png', 'no readable picture'),
    'a copy in another part': ('karpathy', lambda at: shutil.copy(at/'images/p1.png', at/'images/p7.png'), 'p7.png', 'a copy of images/p1.png'),
    'list cut off': ('albef', raw(A, lambda b: b[:99]), A, 'broken JSON'),
    'an empty list': ('albef', tree(A, lambda d: d.clear()), A, 'no list of entries'),
    'a list of texts': ('albef', tree(A, lambda d: ['a dog']), A, 'no dictionary'),
    'entry without image': ('albef', tree(A, lambda d: d[1].pop('image') and None), A, 'file name'),
    'entry without caption': ('albef', tree(A, lambda d: d[1].pop('caption') and None), A, "the caption 'None'"),
    'caption list holding a number': ('albef', tree('a_val.json', lambda d: d[0].update(caption=['a', 1])), 'a_val.json', "the caption '1'"),
    'an image in train and val': ('albef', tree('a_val.json', lambda d: d[0].update(image='images/p0.png')), 'a_val.json', 'p0.png in train and in val'),
    'image_id is NaN': ('albef', tree(A, lambda d: d[1].update(image_id=float('nan'))), A, "image_id 'nan'"),
    'image_id of two images': ('albef', tree(A, lambda d: [x.update(image_id='coco_1') for x in d] and None), A, "image_id 'coco_1' of images/p1.png"),
    'image_id is a list': ('albef', tree(A, lambda d: d[1].update(image_id=[1])), A, "image_id '[1]'"),
    'no val list': ('albef', lambda at: (at/'a_val.json').unlink(), 'set', '0 files'),
    'albef path up': ('albef', tree(A, lambda d: d[1].update(image='x/../../y.png')), A, 'leaves the folder'),
    'albef caption list empty': ('albef', tree('a_val.json', lambda d: d[0].update(caption=[])), 'a_val.json', 'no caption'),
    'another column': ('captions', edit(C, 'caption', 'comment'), C, 'the columns file, comment, split'),
    'a misspelt split': ('captions', edit(C, 'split', 'spilt'), C, 'the columns file, caption, spilt'),
    'a column twice': ('captions', edit(C, 'split', 'caption'), C, 'the columns file, caption, caption'),
    'semicolons in the first line alone': ('captions', edit(C, 'file,caption,split', 'file;caption;split'), C, 'fields instead of 3'),
    'colons': ('captions', raw(C, lambda b: b.replace(b',', b':')), C, 'the columns file:caption:split'),
    'a column that may say the parts': ('captions', edit(C, 'split', 'subset'), C, 'subset may say the parts'),
    'damaged pixels of a PNG': ('karpathy', raw('images/p2.png', lambda b: b[:60] + bytes([b[60] ^ 1]) + b[61:]), 'p2.png', 'damaged data'),
    'npz: a box from right to left': ('boxes', arrays(norm_bb=lambda x: x[:, [2, 1, 0, 3]]), 'p1.npz', 'ends before it begins'),
    'npz: a box from bottom to top': ('boxes', arrays(norm_bb=lambda x: x[:, [0, 3, 2, 1]]), 'p1.npz', 'ends before it begins'),
    'a field too many': ('captions', edit(C, ',train', ',train,x'), C, 'fields instead of 3'),
    'an open quote': ('captions', raw(C, lambda b: b + b'p7.png,"open,test\n'), C, 'broken csv'),
    'a field of a megabyte': ('captions', edit(C, 'sentence 1', 'x'*10**6), C, 'broken csv'),
    'NUL in the table': ('captions', edit(C, 'sentence 1', 'sen\0tence'), C, 'NUL'),
    'latin-1 table': ('captions', raw(C, lambda b: b.replace(b'sentence 1', b'caf\xe9', 1)), C, 'not UTF-8'),
    'only the header': ('captions', raw(C, lambda b: b.split(b'\n')[0] + b'\n'), C, 'no captions'),
    'table of length zero': ('captions', raw(C, lambda b: b''), C, 'length zero'),
    'backslash in a name': ('captions', edit(C, 'p0.png', 'a\\p0.png'), C, 'backslash'),
    'a drive letter': ('captions', edit(C, 'p0.png', 'C:/p0.png'), C, 'absolute path'),
    'an empty field': ('captions', edit(C, 'picture 0, sentence 0', ''), C, 'an empty caption'),
    'csv: unknown part': ('captions', edit(C, ',train', ',Train'), C, "the part 'Train'"),
    'csv: two parts': ('captions', edit(C, ',train', ',test'), C, 'p0.png in test and in train'),
    'both tables': ('captions', lambda at: (at/'captions.jsonl').write_text('{}'), 'set', '2 files'),
    'jsonl: not JSON': ('jsonl', raw('captions.jsonl', lambda b: b + b'{"file": \n'), 'captions.jsonl', 'no JSON object'),
    'jsonl: a list': ('jsonl', raw('captions.jsonl', lambda b: b + b'[1]\n'), 'captions.jsonl', 'no JSON object'),
    'jsonl: an empty line': ('jsonl', raw('captions.jsonl', lambda b: b.replace(b'\n', b'\n\n', 1)), 'captions.jsonl', 'no JSON object'),
    'jsonl: deep': ('jsonl', raw('captions.jsonl', lambda b: b + b'['*200_000), 'captions.jsonl', 'no JSON object'),
    'jsonl: another column': ('jsonl', edit('captions.jsonl', '"caption"', '"text"'), 'captions.jsonl', 'the columns file, text'),
    'npz cut off': ('boxes', raw('p1.npz', lambda b: b[:len(b)//2]), 'p1.npz', 'cannot be read'),
    'npz: a flipped byte': ('boxes', raw('p1.npz', lambda b: b[:300] + bytes([b[300] ^ 255]) + b[301:]), 'p1.npz', 'cannot be read'),
    'npz: no zip': ('boxes', raw('p1.npz', lambda b: b'no zip'), 'p1.npz', 'cannot be read'),
    'npz: a bomb': ('boxes', instead('p1.npz', zip_bomb), 'p1.npz', 'unpacked'),
    'npz: objects': ('boxes', instead('p1.npz', objects), 'p1.npz', 'Python objects'),
    'npz: a header that lies': ('boxes', instead('p1.npz', lying_header), 'p1.npz', 'is said to be'),
    'npz: no boxes': ('boxes', instead('p1.npz', lambda p: np.savez(p, features=np.ones((3, 6), 'f4'))), 'p1.npz', 'no conf, norm_bb'),
    'npz: NaN': ('boxes', arrays(features=lambda x: x*np.nan), 'p1.npz', 'NaN'),
    'npz: float64 too large': ('boxes', arrays(features=lambda x: x.astype('f8') + 1e300), 'p1.npz', 'infinity'),
    'npz: NaN box': ('boxes', arrays(norm_bb=lambda x: x*np.nan), 'p1.npz', 'NaN'),
    'npz: boxes in pixels': ('boxes', arrays(norm_bb=lambda x: x*500), 'p1.npz', 'outside the photo'),
    'npz: integers': ('boxes', arrays(features=lambda x: x.astype(int)), 'p1.npz', 'int64'),
    'npz: other dims': ('boxes', arrays(features=lambda x: x[:, :4]), 'p1.npz', '4 dims'),
    'npz: too few confidences': ('boxes', arrays(conf=lambda x: x[:-1]), 'p1.npz', 'conf (11,)'),
    'npz: no box at all': ('boxes', arrays(features=lambda x: x[:0], conf=lambda x: x[:0], norm_bb=lambda x: x[:0]), 'p1.npz', '(0, 6)'),
    'nothing known': ('karpathy', lambda at: (at/K).rename(at/'notes.txt'), 'set', '0 layouts'),
    'two layouts': ('karpathy', lambda at: write_json(at/'a_train.json', []), 'set', '2 layouts karpathy, albef'),
    'hf: a part nobody knows': ('imagefolder', lambda at: (at/'validation').rename(at/'holdout'), 'metadata.csv', "the part 'holdout'"),
    'hf: two tables in a part': ('imagefolder', lambda at: (at/'train'/'metadata.jsonl').write_text('{}'), 'train', '4 tables'),
    'hf: a table above the others': ('imagefolder', lambda at: shutil.copy(at/'train'/'metadata.csv', at), 'set', '4 tables'),
    'hf: no test': ('imagefolder', lambda at: shutil.rmtree(at/'test'), 'metadata.csv', 'no image in test'),
    'kaggle: two folders of pictures': ('kaggle', lambda at: shutil.copytree(at/'Images', at/'Copies'), 'captions.txt', 'p0.png in Copies and in Images'),
    'kaggle: no header': ('kaggle', edit('captions.txt', 'image,caption\n', ''), 'captions.txt', 'the columns p0.png'),
    'flickr30k: two bars missing': ('flickr30k', edit('results.csv', 'p1.png| 1| ', 'p1.png 1 '), 'results.csv', '1 fields instead of 3'),
    'flickr30k: a bar missing elsewhere': ('flickr30k', edit('results.csv', 'p1.png| 1| ', 'p1.png one| '), 'results.csv', '2 fields instead of 3'),
    'flickr30k: a bar in a caption': ('flickr30k', edit('results.csv', 'picture 1, sentence 1', 'picture | 1'), 'results.csv', '4 fields instead of 3'),
}


def state(at): return sorted((str(p), p.lstat().st_mtime_ns, p.lstat().st_size) for p in at.rglob('*'))

def read_all(at, **kw):
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); return {p: open_layout(at, p, **kw) for p in ('train', 'val', 'test')}


@pytest.mark.parametrize('case', BROKEN)
def test_broken(tmp_path, case):
    kind, damage, file, words = BROKEN[case]; at = make(tmp_path/'set', kind); read_all(at); damage(at); before, start = state(at), time.process_time()
    with pytest.raises(DataError) as e: read_all(at)
    assert Path(e.value.where).name == file and words in str(e.value) and e.value.wanted and len(e.value.remedy) >= 8, e.value
    said = io.StringIO()
    with contextlib.redirect_stdout(said): assert itm_data(['check', str(at)]) != 0
    errors = [l for l in said.getvalue().split('\n') if l.startswith('error')]
    assert len(errors) == 1 and file in errors[0], errors
    assert time.process_time() - start < 5 and state(at) == before and not (at/'fired').exists()


def test_there_are_enough_kinds(): assert len(BROKEN) >= 100 and {b[0] for b in BROKEN.values()} == set(SOUND) - {'scan'}   # SCAN's: test_data.py


@pytest.mark.parametrize('case', ['NUL in a name', 'npz: objects'])
def test_command_line(tmp_path, case):
    kind, damage, file, words = BROKEN[case]; at = make(tmp_path/'set', kind); damage(at)
    r = subprocess.run([sys.executable, '-c', 'from itm_nb.cli import itm_data; itm_data()', 'check', str(at)], capture_output=True, text=True)
    assert r.returncode == 1 and file in r.stdout and words in r.stdout and 'Traceback' not in r.stderr, r


@pytest.mark.parametrize('line,bad', [(4, '../x.png,c,train'), (6, 'p2.png,,train'), (9, 'p3.png,c,Train'), (2, 'p0.png,c')])
def test_the_line_is_named(tmp_path, line, bad):
    at = make(tmp_path/'set', 'captions'); lines = (at/C).read_text().split('\n'); lines[line-1] = bad; (at/C).write_text('\n'.join(lines))
    with pytest.raises(DataError) as e: open_layout(at, 'train')
    assert e.value.line == line


def test_line_after_a_quoted_newline(tmp_path):
    at = make(tmp_path/'set', 'captions'); lines = (at/C).read_text().split('\n'); lines[1] = 'p0.png,"two\nlines",train'; lines[3] = '/x.png,c,train'
    (at/C).write_text('\n'.join(lines))
    with pytest.raises(DataError) as e: open_layout(at, 'train')
    assert e.value.line == 5


@pytest.mark.parametrize('kw,words', [(dict(layout='lmdb'), 'lmdb'), (dict(name='flickr9k'), 'flickr9k'), (dict(name='flickr8k'), '4 images in train'),
                                      (dict(dims=3), 'settings dims'), (dict(table='../x.json'), 'leaves the folder')])
def test_bad_arguments(tmp_path, kw, words):
    at = make(tmp_path/'set', 'karpathy')
    with pytest.raises(DataError, match=words): open_layout(at, 'train', **kw)


@pytest.mark.parametrize('part', ['', 'Test', '../val', None, 'extra'])
def test_bad_part(tmp_path, part):
    with pytest.raises(DataError, match='part'): open_layout(make(tmp_path/'set', 'jsonl'), part)


def test_missing_package(tmp_path, monkeypatch):
    at = tmp_path/'set'; at.mkdir(); write_json(at/'dataset_dict.json', dict(splits=['train'])); monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(DataError, match='pip install datasets'): open_layout(at, 'train')


def sound(at, **kw):
    s = read_all(at, **kw)
    assert [len(s[p]) for p in s] == [4, 2, 2] and [c for p in s for c in s[p].captions] == sum(CAPS, [])
    splits.check_parts(s); return s

def thumbed(path):
    "A JPEG whose first segment holds a whole JPEG of its own"
    im, small = Image.open(path), io.BytesIO(); im.resize((8, 6)).convert('RGB').save(small, 'JPEG'); big = io.BytesIO(); im.convert('RGB').save(big, 'JPEG')
    inside, b = b'Exif\0\0' + small.getvalue(), big.getvalue(); path.write_bytes(b[:2] + b'\xff\xe1' + (len(inside) + 2).to_bytes(2, 'big') + inside + b[2:])

def redraw(**kw): return lambda at: draw(at/'p1.png', 1, **kw)
def as_mode(mode, name='p1.png', **kw): return lambda at: Image.open(at/'p1.png').convert(mode).save(at/name, **kw)

def rename(new):
    def f(at): (at/'p1.png').rename(at/new); (at/C).write_text((at/C).read_text().replace('p1.png', new))
    return f

# name -> (layout, change): read exactly as before
ODD = {
    'CRLF': ('captions', raw(C, lambda b: b.replace(b'\n', b'\r\n'))),
    'byte order mark': ('captions', raw(C, lambda b: b'\xef\xbb\xbf' + b)),
    'no newline at the end': ('captions', raw(C, lambda b: b.rstrip())),
    'every field quoted': ('captions', lambda at: csv.writer(open(at/C, 'w', newline=''), quoting=csv.QUOTE_ALL).writerows([('file', 'caption', 'split'),
                                                                                                                            *rows()])),
    'columns in another order': ('captions', lambda at: csv.writer(open(at/C, 'w', newline='')).writerows([('split', 'caption', 'file'),
                                                                                                           *(r[::-1] for r in rows())])),
    'an empty line in csv': ('captions', raw(C, lambda b: b.replace(b'\n', b'\n\n', 3))),
    'a newline in quotes': ('captions', raw(C, lambda b: b.replace(b'"picture 1, sentence 0"', b'"picture 1,\nsentence 0"'))),
    'blanks around a caption': ('captions', raw(C, lambda b: b.replace(b'"picture 1, sentence 0"', b'"  picture 1,  sentence 0 "'))),
    'name with a blank': ('captions', rename('my photo 1.png')),
    'name with umlauts': ('captions', rename('Käsekuchen öß.png')),
    'name with Chinese': ('captions', rename('照片.png')),
    'no ending': ('captions', rename('photo')),
    'dots in a name': ('captions', rename('a..b.png')),
    'grey image': ('captions', as_mode('L')),
    'palette': ('captions', as_mode('P')),
    'transparency': ('captions', as_mode('RGBA')),
    '16 bit': ('captions', as_mode('I;16')),
    'black and white': ('captions', as_mode('1')),
    'CMYK JPEG under png': ('captions', as_mode('CMYK', format='JPEG')),
    'progressive JPEG': ('captions', as_mode('RGB', format='JPEG', progressive=True)),
    'webp': ('captions', as_mode('RGB', format='WEBP')),
    'validation for val': ('captions', raw(C, lambda b: b.replace(b',val', b',validation'))),
    'bytes behind the image': ('captions', raw('p1.png', lambda b: b + b'\n\n')),
    'other files about': ('captions', lambda at: [(at/n).write_text('x') for n in ('README.md', '.DS_Store', 'Thumbs.db')]),
    'jsonl with CRLF': ('jsonl', raw('captions.jsonl', lambda b: b.replace(b'\n', b'\r\n'))),
    'jsonl in ASCII escapes and a mark': ('jsonl', raw('captions.jsonl', lambda b: b'\xef\xbb\xbf' + b.replace(b'sentence', b'\\u0073entence'))),
    'linked image folder': ('karpathy', lambda at: ((at/'images').rename(at.parent/'elsewhere'), (at/'images').symlink_to(at.parent/'elsewhere'))),
    'restval': ('karpathy', raw(K, lambda b: b.replace(b'"train"', b'"restval"', 2))),
    'more keys in JSON': ('karpathy', tree(K, lambda d: [x.update(cocoid=5, tokens=['a']) for x in d['images']] and dict(d, dataset='toy'))),
    'no ids in JSON': ('karpathy', tree(K, lambda d: [x.pop('imgid') for x in d['images']] and None)),
    'filepath': ('karpathy', lambda at: ((at/'images').rename(at/'val2014'), (at/'images').mkdir(), (at/'val2014').rename(at/'images'/'val2014'),
                 tree(K, lambda d: [x.update(filepath='val2014') for x in d['images']] and None)(at))),
    'an image id per entry': ('albef', tree(A, lambda d: [x.update(image_id='coco_' + x['image']) for x in d] and None)),
    'numbers as image ids': ('albef', tree(A, lambda d: [x.update(image_id=int(x['image'][8])) for x in d] and None)),
    'an empty image id': ('albef', tree(A, lambda d: [x.update(image_id=None) for x in d] and None)),
    'more columns': ('captions', raw(C, lambda b: b.replace(b'split\n', b'split,width,licence\n').replace(b'train\n', b'train,640,cc\n').replace(b'val\n', b'val,640,cc\n').replace(b'test\n', b'test,640,cc\n'))),
    'a column without a name': ('captions', lambda at: csv.writer(open(at/C, 'w', newline='')).writerows([('', 'file', 'caption', 'split'), *((k, *r) for k, r in enumerate(rows()))])),
    'image for file': ('captions', edit(C, 'file', 'image')),
    'file_name for file': ('captions', edit(C, 'file', 'file_name')),
    'semicolons': ('captions', lambda at: csv.writer(open(at/C, 'w', newline=''), delimiter=';').writerows([('file', 'caption', 'split'), *rows()])),
    'tabs': ('captions', lambda at: (at/C).write_text('file\tcaption\tsplit\n' + ''.join('\t'.join(r) + '\n' for r in rows()))),
    'bars with blanks': ('captions', lambda at: (at/C).write_text('file| caption| split\n' + ''.join('| '.join(r) + '\n' for r in rows()))),
    'jsonl with more keys': ('jsonl', lambda at: (at/'captions.jsonl').write_text(''.join(json.dumps(dict(file=f, caption=c, split=p, id=7)) + '\n' for f, c, p in rows()))),
    'other tables about': ('karpathy', lambda at: [(at/n).write_text('run,score\n1,2\n') for n in ('results.csv', 'captions.txt')]),
    'a film behind a PNG': ('captions', raw('p1.png', lambda b: b + bytes(200_000))),
    'a JPEG with a film': ('captions', lambda at: (as_mode('RGB', format='JPEG')(at), raw('p1.png', lambda b: b + bytes(200_000))(at))),
    'a phone JPEG with a small picture inside': ('captions', lambda at: thumbed(at/'p1.png')),
    'a TIFF of whole numbers': ('captions', lambda at: Image.fromarray(np.asarray(Image.open(at/'p1.png').convert('L')).astype('int32')).save(at/'p1.png', format='TIFF')),
    'lists in train': ('albef', lambda at: write_json(at/A, [dict(image=f'images/p{i}.png', caption=CAPS[i]) for i in range(4)])),
}


@pytest.mark.parametrize('case', ODD)
def test_odd_but_sound(tmp_path, case):
    kind, change = ODD[case]; before = sound(make(tmp_path/'set', kind)); change(tmp_path/'set'); after = sound(tmp_path/'set')
    for p in before: assert np.array_equal(before[p].img_of, after[p].img_of) and np.array_equal(before[p].img_ids, after[p].img_ids)
    assert not [f for f in check_layout(tmp_path/'set') if f.level != 'info'] and len(info_layout(tmp_path/'set')) > 20


@pytest.mark.parametrize('k', [1, 3, 8])
def test_unequal_captions(tmp_path, k):
    at = make(tmp_path/'set', 'karpathy'); n = [1 + (i*k) % 8 for i in range(8)]
    tree(K, lambda d: [x.update(sentences=[dict(raw=f'{i} {j}') for j in range(n[i])]) for i, x in enumerate(d['images'])] and None)(at)
    s = read_all(at); assert np.bincount(s['train'].img_of).tolist() == n[:4] and s['train'].captions[n[0]] == '1 0'
    assert np.bincount(open_layout(at, 'train', max_captions=2).img_of).tolist() == [min(2, x) for x in n[:4]]


def test_boxes_float64_and_wide(tmp_path):
    at = make(tmp_path/'set', 'boxes'); want = read_all(at)['train']
    for f in at.glob('*.npz'):
        z = safe_npz(f); z['features'] = z['features'].astype('f8'); z['norm_bb'] = np.concatenate([z['norm_bb'], z['norm_bb'][:, :3]], 1); np.savez(f, **z)
    got = read_all(at)['train']; assert np.array_equal(got.feats, want.feats) and np.array_equal(got.boxes, want.boxes) and got.feats.dtype == np.float32


@pytest.mark.parametrize('least,fewest,most', [(.2, 10, 100), (.5, 1, 3), (2., 4, 9), (0., 0, 12)])
def test_boxes_against_slow(tmp_path, least, fewest, most):
    at = make(tmp_path/'set', 'boxes'); s = open_layout(at, 'train', least=least, fewest=fewest, most=most)
    for i in range(4):
        z = safe_npz(at/f'p{i}.npz'); kept = sorted(range(len(z['conf'])), key=lambda j: -z['conf'][j])
        kept = [j for r, j in enumerate(kept) if r < most and (z['conf'][j] > least or r < fewest)]
        assert s.num[i] == len(kept) and np.array_equal(s.feats[i, :len(kept)], z['features'][kept]) and not s.feats[i, len(kept):].any()


def test_table_without_parts(tmp_path):
    at = make(tmp_path/'set', 'captions'); (at/C).write_text('file,caption\n' + ''.join(f'p{i}.png,"{c}"\n' for i in range(8) for c in CAPS[i]))
    with pytest.warns(UserWarning, match='no column split'): s = open_layout(at, 'train')
    parts = read_all(at); assert [len(p) for p in parts.values()] == [6, 1, 1]; splits.check_parts(parts)
    assert sorted(c for p in parts.values() for c in p.captions) == sorted(sum(CAPS,
                                                                               [])) and [f.name for f in s.files] == [f.name for f in parts['train'].files]


def test_columns_are_named(tmp_path):
    at = make(tmp_path/'set', 'captions'); edit(C, 'file,caption,split', 'file_name,caption_0,part')(at)
    assert len(open_layout(at, 'test', columns=dict(file='file_name', caption='caption_0', split='part'))) == 2
    with pytest.raises(DataError, match='columns'): open_layout(at, 'test', columns=dict(file='file_name'))


def test_known_sizes(tmp_path, monkeypatch):
    at = make(tmp_path/'set', 'karpathy'); toy = KNOWN['flickr8k'].__class__(dict(train=(4,), val=(2,), test=(2,)), 'free')
    monkeypatch.setitem(KNOWN, 'toy', toy); sound(at, name='toy'); assert any('free' in l for l in info_layout(at, name='toy'))
    tree(K, image(0, split='val'))(at)
    with pytest.raises(DataError, match='3 images in train'): open_layout(at, 'train', name='toy')


@pytest.mark.parametrize('kind', SOUND)
def test_subset_concat_fingerprint(tmp_path, kind):
    at = make(tmp_path/'set', kind); assert recognise(at) == LAYOUT(kind) and recognise(at) in LAYOUTS
    s = read_all(at); t = s['train'].subset([2, 0]); assert len(t) == 2 and t.img_ids.tolist() == s['train'].img_ids[[2, 0]].tolist()
    if kind != 'boxes': assert len(splits.concat(list(s.values()))) == sum(map(len, s.values()))
    moved = tmp_path/'moved'; shutil.copytree(at, moved); f = splits.fingerprint(s['train']); assert f == splits.fingerprint(read_all(moved)['train'])
    if kind in ('karpathy', 'captions'): draw(s['train'].files[1], 20); assert splits.fingerprint(read_all(at)['train']) != f


FUZZ = settings(deadline=None, max_examples=25, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

@pytest.mark.parametrize('kind,name', [('karpathy', K), ('albef', A), ('captions', C), ('jsonl', 'captions.jsonl'), ('boxes', 'p1.npz'), ('karpathy',
                                                                                                                                          'images/p1.png'),
                                       ('scan', 'train_ims.npy'), ('scan', 'train_ids.txt'), ('scan', 'train_caps.txt')])
def test_fuzzed_bytes(tmp_path, kind, name):
    at = make(tmp_path/'set', kind); sane = (at/name).read_bytes()

    @FUZZ
    @given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255) | st.binary(max_size=6) | st.none()), min_size=1, max_size=5))
    def fuzz(changes):
        b = sane
        for where, what in changes:
            i = int(where*len(b)); b = b[:i] if what is None else b[:i] + (bytes([what]) + b[i+1:] if isinstance(what, int) else what + b[i:])
        (at/name).write_bytes(b)
        with contextlib.suppress(DataError), warnings.catch_warnings(): warnings.simplefilter('ignore'); open_layout(at, 'train', LAYOUT(kind))
    fuzz()

def LAYOUT(kind): return dict(jsonl='captions', kaggle='captions', flickr30k='captions').get(kind, kind)

anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda x: st.lists(x, max_size=3)
                        | st.dictionaries(st.sampled_from(['images', 'filename', 'split', 'sentences', 'raw', 'sentid', 'imgid', 'image', 'caption', 'file']),
                                          x,
                                          max_size=4), max_leaves=8)

@pytest.mark.parametrize('kind,name', [('karpathy', K), ('albef', A), ('jsonl', 'captions.jsonl')])
def test_fuzzed_structure(tmp_path, kind, name):
    at = make(tmp_path/'set', kind); sane = (at/name).read_text()

    def put(d, path, value):
        "The structure with another value somewhere inside"
        keys = list(d) if isinstance(d, dict) else list(range(len(d))) if isinstance(d, list) else []
        if not path or not keys: return value
        d = d.copy(); k = keys[path[0] % len(keys)]; d[k] = put(d[k], path[1:], value); return d

    @FUZZ
    @given(st.lists(st.integers(0, 50), max_size=6), anything)
    def fuzz(path, value):
        if kind == 'jsonl': lines = sane.split('\n'); lines[0] = json.dumps(put(json.loads(lines[0]), path[:1], value)); (at/name).write_text('\n'.join(lines))
        else: write_json(at/name, put(json.loads(sane), path, value))
        with contextlib.suppress(DataError), warnings.catch_warnings(): warnings.simplefilter('ignore'); open_layout(at, 'train', LAYOUT(kind))
    fuzz()


# ---- the table of everything: what is broken is refused by name, what is odd is read, and there is no third thing

TABLE = dict(captions=C, jsonl='captions.jsonl', kaggle='captions.txt', flickr30k='results.csv', imagefolder='train/metadata.csv')
LISTS = dict(karpathy=K, albef=A)
PICTURE = dict(captions='p1.png', jsonl='p1.png', kaggle='Images/p1.png', flickr30k='flickr30k_images/p1.png', imagefolder='train/p1.png', karpathy='images/p1.png', albef='images/p1.png')

def everywhere():
    "name -> (layout, damage, file in the message): the same damages in every layout"
    out, say = {}, 'picture 0, sentence 1'
    for kind, f in TABLE.items() | LISTS.items():
        fit = dict(zero=lambda b: b'', NUL=lambda b: b.replace(b'sentence 1', b'sen\0tence', 1), latin=lambda b: b.replace(b'sentence 1', b'caf\xe9', 1),
                   cut=lambda b: b.rstrip()[:-2] + b'\xe4', page=lambda b: b'<html><body>404</body></html>', UTF16=lambda b: b.decode().encode('utf-16'), png=lambda b: b'\x89PNG\r\n\x1a\n' + b)
        out |= {f'{kind}: {k}': (kind, raw(f, g), f) for k, g in fit.items()}
        shown = {k: f'{k}/p0.png' for k in ('..', '/etc', 'a/../..', 'C:')} | dict(gone='nobody.png')
        old = 'images/p0.png' if kind == 'albef' else 'p0.png'
        out |= {f'{kind}: the name {new}': (kind, edit(f, old, new), new if k == 'gone' else f) for k, new in shown.items()}
        out |= {f'{kind}: {k} caption': (kind, edit(f, say, c), f) for k, c in dict(long='x'*20_000, unprintable_none='').items()}
    for kind, f in PICTURE.items():
        harm = dict(empty=lambda b: b'', cut=lambda b: b[:-30], pixels=lambda b: b[:70] + bytes([b[70] ^ 255]) + b[71:], page=lambda b: b'<html>', length=lambda b: b[:33] + b'\x7f' + b[34:])
        out |= {f'{kind}: a picture, {k}': (kind, raw(f, g), f) for k, g in harm.items()}
        out |= {f'{kind}: a picture is {k}': (kind, instead(f, g), f) for k, g in dict(a_folder=lambda p: p.mkdir(), a_pipe=os.mkfifo, gone=lambda p: None).items()}
    odd = dict(number=7, null=None, text='a', list=[1], truth=True)
    for k, x in odd.items():
        out |= {f'karpathy: a member that is a {k}': ('karpathy', tree(K, lambda d, x=x: d['images'].__setitem__(1, x)), K),
                f'karpathy: a sentence that is a {k}': ('karpathy', tree(K, lambda d, x=x: d['images'][1]['sentences'].__setitem__(0, x)), K),
                f'albef: a member that is a {k}': ('albef', tree(A, lambda d, x=x: d.__setitem__(1, x)), A),
                f'karpathy: split is a {k}': ('karpathy', tree(K, image(1, split=x)), K), f'karpathy: filename is a {k}': ('karpathy', tree(K, image(1, filename=x if k != 'text' else '')), K)}
    for k, x in (odd | dict(dictionary={'a': 1}, fraction=.5)).items():
        if k in ('text', 'list'): continue
        put = lambda d, key, x: (at := d.split('\n'), at.__setitem__(1, json.dumps(json.loads(at[1]) | {key: x})), '\n'.join(at))[-1]
        for key in ('caption', 'split', 'file'):
            out[f'jsonl: {key} is a {k}'] = ('jsonl', raw('captions.jsonl', lambda b, x=x, key=key, put=put: put(b.decode(), key, x).encode()), 'captions.jsonl')
        out[f'karpathy: raw is a {k}'] = ('karpathy', tree(K, sent(1, raw=x)), K); out[f'albef: caption is a {k}'] = ('albef', tree(A, lambda d, x=x: d[1].update(caption=x)), A)
    for kind in ('captions', 'kaggle', 'imagefolder'):
        head = (TABLE[kind], {'captions': 'split', 'kaggle': 'caption', 'imagefolder': 'caption'}[kind])
        out |= {f'{kind}: a row with a field {k}': (kind, edit(TABLE[kind], 'p0.png,"picture 0, sentence 0"', new), TABLE[kind]) for k, new in dict(more='p0.png,x,c', less='p0.png').items()}
        out[f'{kind}: a header with a field more'] = (kind, edit(head[0], head[1], head[1] + ',width'), TABLE[kind])
    return out

def outcome(at, broken, file=None, words=''):
    "What came of reading a folder, in words of the table"
    try: read_all(at) if broken else sound(at)
    except AssertionError: return 'read wrongly'
    except DataError as e:
        if not broken: return f'refused though sound: {e}'
        clear = Path(e.where).name == Path(file).name and words in str(e) and e.wanted and len(e.remedy) >= 8
        return 'refused clearly' if clear else f'refused unclearly: {e}'
    except BaseException as e: return f'a raw {type(e).__name__}: {e}'
    return 'accepted though broken' if broken else 'accepted rightly'

def test_the_table_of_all_kinds(tmp_path, capsys):
    "At least 260 broken and odd folders: refused clearly, or accepted rightly; everything else 0"
    import test_data
    cases = {k: (kind, d, True, f, w) for k, (kind, d, f, w) in BROKEN.items()} | {k: (kind, d, True, f, '') for k, (kind, d, f) in everywhere().items()}
    cases |= {f'odd: {k}': (kind, d, False) for k, (kind, d) in ODD.items()}
    cases |= {f'scan: {k}': ('wide', d, True, f, w) for k, (d, f, w, _) in test_data.BAD.items()}
    for kind in SOUND: make(tmp_path/kind, kind)
    test_data.write_scan(tmp_path/'wide'); said = {}
    for n, (name, (kind, damage, *want)) in enumerate(cases.items()):
        at = tmp_path/str(n)/'set'; shutil.copytree(tmp_path/kind, at); damage(at); said[name] = outcome(at, *want); shutil.rmtree(at.parent)
    good = ('refused clearly', 'accepted rightly'); count = {k: list(said.values()).count(k) for k in good}
    with capsys.disabled(): print(f'\n{len(said)} kinds of folders: {count["refused clearly"]} refused clearly, {count["accepted rightly"]} accepted rightly, everything else {len(said) - sum(count.values())}')
    assert len(said) >= 260 and not {k: v for k, v in said.items() if v not in good}


def test_a_picture_without_end_of_any_kind(tmp_path):
    "Wherever a JPEG or PNG is cut, it is noticed"
    for end in ('jpg', 'png'):
        draw(tmp_path/f'a.{end}', 3); b = (tmp_path/f'a.{end}').read_bytes(); assert look(tmp_path/f'a.{end}') == (32, 24)
        for n in range(1, len(b) - 8, 37):
            (tmp_path/'cut').write_bytes(b[:n])
            with pytest.raises(DataError): look(tmp_path/'cut')
