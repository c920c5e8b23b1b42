"""`itm_nb.data.splits` and `itm_nb.data.folds` against bad input, slow references and the committed fold file; everything is made up here."""
import hashlib
import json
import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_nb.core import errors_files, random as random_module
from itm_nb.data import batches, checks, folds, scan_layout, splits
from itm_nb.core.errors_files import DataError

N, R, D, K = 6, 4, 5, 3            # images, regions, dimensions, sentences per image of each part


def write_scan(folder, first=100, parts=(('train', N), ('dev', N), ('test', N)), k=K, boxes=True):
    "A SCAN folder of invented images: features (N, R, D) float32, counts, boxes, ids, k sentences each"
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for part, n in parts:
        np.save(folder/f'{part}_ims.npy', rng.normal(size=(n, R, D)).astype('float32'))
        np.save(folder/f'{part}_num.npy', rng.integers(1, R + 1, n))
        if boxes: np.save(folder/f'{part}_boxes.npy', np.sort(rng.random((n, R, 2, 2)), 2).reshape(n, R, 4).astype('float32'))
        (folder/f'{part}_ids.txt').write_text(''.join(f'{first + i}\n' for i in range(n)))
        (folder/f'{part}_caps.txt').write_text(''.join(f'sentence {j} about photo {first + i}\n' for i in range(n) for j in range(k)))
        first += n
    return folder


@pytest.fixture
def scan(tmp_path): return write_scan(tmp_path/'set')


class Canary:
    "Unpickling this writes a file"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return (open, (self.path, 'w'))


def edit(name, f):
    "A damage: load an array, change it, save it"
    def damage(folder):
        x = f(np.load(folder/name)); np.save(folder/name, x)
    return damage

def text(name, f):
    "A damage: change the bytes of a file"
    def damage(folder): (folder/name).write_bytes(f((folder/name).read_bytes()))
    return damage

def line(name, i, new):
    "A damage: replace line i (from 1) of a text file"
    def damage(folder):
        lines = (folder/name).read_bytes().split(b'\n'); lines[i-1] = new; (folder/name).write_bytes(b'\n'.join(lines))
    return damage

def instead(name, make):
    "A damage: remove a file and put something else in its place"
    def damage(folder): (folder/name).unlink(); make(folder/name)
    return damage

def setting(i, value):
    def f(x): x = x.copy(); x[i] = value; return x
    return f

def header(descr, shape):
    "An npy file whose header says what it likes"
    h = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    h += b' ' * (63 - (10 + len(h)) % 64) + b'\n'
    return b'\x93NUMPY\x01\x00' + len(h).to_bytes(2, 'little') + h + bytes(64)

def objects(path):
    np.save(path, np.array([Canary(path.parent/'fired')]*N, dtype=object), allow_pickle=True)

def raw_pickle(path): path.write_bytes(pickle.dumps(Canary(path.parent/'fired')))

def renamed_npz(path):
    with open(path, 'wb') as f: np.savez(f, x=np.ones(3))


# name -> (damage, file in the message, words that must be in the message, line or None); the remedy is checked for all
BAD = {
    'features missing': (lambda f: (f/'dev_ims.npy').unlink(), 'set', 'no dev_ims.npy', None),
    'captions missing': (lambda f: (f/'dev_caps.txt').unlink(), 'set', 'no dev_caps.txt', None),
    'no ids and a sentence too few': (lambda f: ((f/'dev_ids.txt').unlink(), text('dev_caps.txt', lambda b: b[:b.rstrip().rfind(b'\n') + 1])(f)), 'dev_caps.txt', '17 sentences for 6 images', None),
    'two files missing': (lambda f: [(f/n).unlink() for n in ('dev_ims.npy', 'dev_caps.txt')], 'set', 'no dev_ims.npy, dev_caps.txt', None),
    'dev and val': (lambda f: (f/'val_ims.npy').write_bytes((f/'dev_ims.npy').read_bytes()), 'set', 'both dev_* and val_*', None),
    'features of length zero': (text('dev_ims.npy', lambda b: b''), 'dev_ims.npy', 'length zero', None),
    'captions of length zero': (text('dev_caps.txt', lambda b: b''), 'dev_caps.txt', 'length zero', None),
    'counts of length zero': (text('dev_num.npy', lambda b: b''), 'dev_num.npy', 'length zero', None),
    'features cut in the header': (text('dev_ims.npy', lambda b: b[:40]), 'dev_ims.npy', 'cannot be mapped', None),
    'features cut in the data': (text('dev_ims.npy', lambda b: b[:-1]), 'dev_ims.npy', 'cannot be mapped', None),
    'features with a tail': (text('dev_ims.npy', lambda b: b + b'1234'), 'dev_ims.npy', '4 bytes behind', None),
    'no npy file': (text('dev_ims.npy', lambda b: b'<html>not found</html>'), 'dev_ims.npy', 'not an npy file', None),
    'an npz file': (instead('dev_ims.npy', renamed_npz), 'dev_ims.npy', 'not an npy file', None),
    'garbage header': (text('dev_ims.npy', lambda b: b[:10] + b'\xff' * 70 + b[80:]), 'dev_ims.npy', 'cannot be mapped', None),
    'unknown npy version': (text('dev_ims.npy', lambda b: b[:6] + b'\x09' + b[7:]), 'dev_ims.npy', 'cannot be mapped', None),
    'header that calls': (text('dev_ims.npy', lambda b: header("__import__('os').system('touch fired')", (2, 2, 2))), 'dev_ims.npy',
                          'cannot be mapped', None),
    'huge shape': (text('dev_ims.npy', lambda b: header("'<f4'", (2**40, 2**40, 9))), 'dev_ims.npy', 'cannot be mapped', None),
    'negative shape': (text('dev_ims.npy', lambda b: header("'<f4'", (-1, 2, 2))), 'dev_ims.npy', '', None),
    'objects in features': (instead('dev_ims.npy', objects), 'dev_ims.npy', 'Python objects', None),
    'objects in counts': (instead('dev_num.npy', objects), 'dev_num.npy', 'Python objects', None),
    'objects in boxes': (instead('dev_boxes.npy', objects), 'dev_boxes.npy', 'Python objects', None),
    'a pickle': (instead('dev_ims.npy', raw_pickle), 'dev_ims.npy', 'not an npy file', None),
    'int features': (edit('dev_ims.npy', lambda x: x.astype('int32')), 'dev_ims.npy', 'int32', None),
    'uint8 features': (edit('dev_ims.npy', lambda x: x.astype('uint8')), 'dev_ims.npy', 'uint8', None),
    'bool features': (edit('dev_ims.npy', lambda x: x > 0), 'dev_ims.npy', 'bool', None),
    'complex features': (edit('dev_ims.npy', lambda x: x.astype('complex64')), 'dev_ims.npy', 'complex64', None),
    'text features': (edit('dev_ims.npy', lambda x: x.astype('U8')), 'dev_ims.npy', '<U', None),
    'structured features': (edit('dev_ims.npy', lambda x: x.view([('a', 'f4')])), 'dev_ims.npy', "('a', '<f4')", None),
    'foreign byte order': (edit('dev_ims.npy', lambda x: x.astype('>f4')), 'dev_ims.npy', '>f4', None),
    '1-D features': (edit('dev_ims.npy', lambda x: x[:, 0, 0]), 'dev_ims.npy', '(6,)', None),
    '4-D features': (edit('dev_ims.npy', lambda x: x[None]), 'dev_ims.npy', '(1, 6, 4, 5)', None),
    'a single number': (edit('dev_ims.npy', lambda x: x[0, 0, 0]), 'dev_ims.npy', '()', None),
    'no images': (edit('dev_ims.npy', lambda x: x[:0]), 'dev_ims.npy', '(0, 4, 5)', None),
    'no dimensions': (edit('dev_ims.npy', lambda x: x[:, :, :0]), 'dev_ims.npy', '(6, 4, 0)', None),
    'NaN': (edit('dev_ims.npy', setting((3, 1, 2), np.nan)), 'dev_ims.npy', 'row 3', None),
    'infinity': (edit('dev_ims.npy', setting((5, 3, 4), np.inf)), 'dev_ims.npy', 'row 5', None),
    'float64 beyond float32': (edit('dev_ims.npy', lambda x: setting((2, 0, 0), 1e300)(x.astype('float64'))), 'dev_ims.npy', 'row 2', None),
    'one image too few': (edit('dev_ims.npy', lambda x: x[:-1]), 'dev_ids.txt', '6 ids, 5 feature rows, 18 sentences', None),
    'one image too many': (edit('dev_ims.npy', lambda x: np.concatenate([x, x[:1]])), 'dev_ids.txt', '7 feature rows', None),
    'one sentence too few': (text('dev_caps.txt', lambda b: b[:b.rstrip().rfind(b'\n') + 1]), 'dev_ids.txt', '17 sentences', None),
    'one id too few': (text('dev_ids.txt', lambda b: b[4:]), 'dev_ids.txt', '5 ids', None),
    'latin-1 captions': (line('dev_caps.txt', 4, 'un café'.encode('latin1')), 'dev_caps.txt', 'not UTF-8', 4),
    'UTF-16 captions': (text('dev_caps.txt', lambda b: b.decode().encode('utf-16')), 'dev_caps.txt', 'NUL', 1),
    'cut UTF-8 at the end': (text('dev_caps.txt', lambda b: b.rstrip() + b'\xc3'), 'dev_caps.txt', 'not UTF-8', 18),
    'NUL in captions': (line('dev_caps.txt', 7, b'a \0 dog'), 'dev_caps.txt', 'NUL', 7),
    'NUL in ids': (line('dev_ids.txt', 2, b'10\x007'), 'dev_ids.txt', 'NUL', 2),
    'empty caption': (line('dev_caps.txt', 5, b''), 'dev_caps.txt', 'empty line', 5),
    'blank caption': (line('dev_caps.txt', 6, b' \t\r'), 'dev_caps.txt', 'empty line', 6),
    'only newlines': (text('dev_caps.txt', lambda b: b'\n' * 18), 'dev_caps.txt', 'empty line', 1),
    'two newlines at the end': (text('dev_caps.txt', lambda b: b + b'\n'), 'dev_caps.txt', 'empty line', 19),
    'empty id': (line('dev_ids.txt', 3, b''), 'dev_ids.txt', 'empty line', 3),
    'file names as ids': (line('dev_ids.txt', 1, b'1000268201_693b08cb0e.jpg'), 'dev_ids.txt', "'1000268201_693b08cb0e.jpg'", 1),
    'float id': (line('dev_ids.txt', 4, b'107.0'), 'dev_ids.txt', "'107.0'", 4),
    'negative id': (line('dev_ids.txt', 4, b'-7'), 'dev_ids.txt', "'-7'", 4),
    'underscore id': (line('dev_ids.txt', 4, b'1_07'), 'dev_ids.txt', "'1_07'", 4),
    'Arabic digits': (line('dev_ids.txt', 4, '١٢'.encode()), 'dev_ids.txt', 'the id', 4),
    'id of 30 digits': (line('dev_ids.txt', 6, b'1' * 30), 'dev_ids.txt', 'the id', 6),
    'repeated image id': (line('dev_ids.txt', 5, b'106'), 'dev_ids.txt', 'image id 106 for the second time', 5),
    'too few counts': (edit('dev_num.npy', lambda x: x[:-1]), 'dev_num.npy', '(5,)', None),
    '2-D counts': (edit('dev_num.npy', lambda x: x[:, None]), 'dev_num.npy', '(6, 1)', None),
    'float counts': (edit('dev_num.npy', lambda x: x.astype(float)), 'dev_num.npy', 'float64', None),
    'count 0': (edit('dev_num.npy', setting(2, 0)), 'dev_num.npy', '0 regions in row 2', None),
    'count above R': (edit('dev_num.npy', setting(4, R + 1)), 'dev_num.npy', '5 regions in row 4', None),
    'negative count': (edit('dev_num.npy', setting(1, -1)), 'dev_num.npy', '-1 regions in row 1', None),
    'too few boxes': (edit('dev_boxes.npy', lambda x: x[:, :-1]), 'dev_boxes.npy', '(6, 3, 4)', None),
    'boxes of five numbers': (edit('dev_boxes.npy', lambda x: np.concatenate([x, x[..., :1]], 2)), 'dev_boxes.npy', '(6, 4, 5)', None),
    'boxes in pixels': (edit('dev_boxes.npy', lambda x: x * 640), 'dev_boxes.npy', 'box coordinates', None),
    'a box from right to left': (edit('dev_boxes.npy', setting((4, 2), (.5, .1, .4, .2))), 'dev_boxes.npy', 'row 4 that ends before it begins', None),
    'a box from bottom to top': (edit('dev_boxes.npy', setting((1, 0), (.1, .5, .2, .4))), 'dev_boxes.npy', 'row 1 that ends before it begins', None),
    'integer boxes': (edit('dev_boxes.npy', lambda x: (x * 640).astype(int)), 'dev_boxes.npy', 'int64', None),
    'NaN in boxes': (edit('dev_boxes.npy', setting((0, 0, 0), np.nan)), 'dev_boxes.npy', 'nan', None),
    'a folder as features': (instead('dev_ims.npy', lambda p: p.mkdir()), 'dev_ims.npy', 'not an ordinary file', None),
    'a folder as captions': (instead('dev_caps.txt', lambda p: p.mkdir()), 'dev_caps.txt', 'not an ordinary file', None),
    'a pipe as captions': (instead('dev_caps.txt', os.mkfifo), 'dev_caps.txt', 'not an ordinary file', None),
    'a pipe as features': (instead('dev_ims.npy', os.mkfifo), 'dev_ims.npy', 'not an ordinary file', None),
    'a device as ids': (instead('dev_ids.txt', lambda p: p.symlink_to('/dev/zero')), 'dev_ids.txt', 'not an ordinary file', None),
    'a loop of links': (instead('dev_caps.txt', lambda p: p.symlink_to(p)), 'dev_caps.txt', 'cannot be opened', None),
    'a dead link': (instead('dev_num.npy', lambda p: p.symlink_to('nowhere')), 'dev_num.npy', 'cannot be opened', None),
}


def assert_says(e, file, said, line, folder):
    "The message names the file, what was found, the line, what was wanted and a remedy"
    assert Path(e.where).name == file, e
    assert said in str(e) and file in str(e), e
    assert e.line == line and (line is None or f'line {line}:' in str(e)), e
    assert e.wanted and len(e.remedy) > 10 and e.remedy in str(e), e
    assert not (folder/'fired').exists() and not Path('fired').exists()        # nothing was executed


@pytest.mark.parametrize('case', BAD)
def test_bad_scan_folder(scan, case):
    damage, file, said, at = BAD[case]
    scan_layout.read_scan(scan, 'val')                                                # sound before
    damage(scan)
    before = {p.name: p.lstat().st_mtime_ns for p in scan.iterdir()}
    with warnings.catch_warnings(), pytest.raises(DataError) as e:
        warnings.simplefilter('ignore'); scan_layout.read_scan(scan, 'val')
    assert_says(e.value, file, said, at, scan)
    assert before == {p.name: p.lstat().st_mtime_ns for p in scan.iterdir()}   # nothing was written


@pytest.mark.parametrize('part', ['../set/dev', 'Test', '', '/etc/passwd', 'dev\0', 'extra', 'testall', None])
def test_bad_part(scan, part):
    with pytest.raises(DataError) as e: scan_layout.read_scan(scan, part)
    assert e.value.remedy and 'set' in str(e.value)


@pytest.mark.parametrize('folder', ['nowhere', 'set/dev_caps.txt', 'a\0b'])
def test_bad_folder(scan, folder):
    with pytest.raises(DataError, match='no such folder|cannot be opened'): scan_layout.read_scan(scan.parent/folder, 'val')


@pytest.mark.parametrize('settings,said', [
    (dict(dims=0), 'dims=0'), (dict(dims=D+1), 'of 5'), (dict(dims=2.), 'dims=2.0'), (dict(dims=True), 'dims=True'),
    (dict(dims='3'), "dims='3'"), (dict(regions=[]), 'at least one'), (dict(regions=[4]), 'regions'),
    (dict(regions=[2, 1]), 'increasing'), (dict(regions=[1, 1]), 'increasing'),
    (dict(regions='global'), 'regions'), (dict(regions=[[0, 1]]), 'regions'), (dict(regions=[.5]), 'regions'),
    (dict(regions=slice(9, 12)), 'at least one'), (dict(regions=[R-1]), 'has none of the regions')])
def test_bad_settings(scan, settings, said):
    np.save(scan/'dev_num.npy', np.array([1, 2, 3, 4, 4, 4]))
    with pytest.raises(DataError) as e: scan_layout.read_scan(scan, 'val', **settings)
    assert_says(e.value, 'dev_ims.npy', said, None, scan)


# --- what is accepted ---

def test_reads_what_was_written(scan):
    s = scan_layout.read_scan(scan, 'val'); x, num = np.load(scan/'dev_ims.npy'), np.load(scan/'dev_num.npy')
    assert isinstance(s.feats, np.memmap) and np.array_equal(s.feats, x) and np.array_equal(s.num, num)
    assert s.captions == (scan/'dev_caps.txt').read_text().split('\n')[:-1] and s.name == 'val' == scan_layout.read_scan(scan, 'dev').name
    assert s.img_of.tolist() == [i for i in range(N) for _ in range(K)] and s.img_ids.tolist() == list(range(106, 112))
    assert s.cap_ids.tolist() == [5*i + k for i in range(106, 112) for k in range(K)]
    assert np.array_equal(s.boxes, np.load(scan/'dev_boxes.npy'))


def test_optional_files(scan):
    (scan/'dev_num.npy').unlink(); (scan/'dev_boxes.npy').unlink()
    s = scan_layout.read_scan(scan, 'val')
    assert s.boxes is None and (s.num == R).all()


def test_val_for_dev_and_testall(scan):
    for kind in ('ims.npy', 'caps.txt', 'ids.txt', 'num.npy', 'boxes.npy'):
        os.rename(scan/f'dev_{kind}', scan/f'val_{kind}'); (scan/f'testall_{kind}').write_bytes((scan/f'test_{kind}').read_bytes())
    assert len(scan_layout.read_scan(scan, 'val')) == N and scan_layout.read_scan(scan, 'testall').name == 'testall'
    assert not [f for f in checks.check_folder(scan) if f.level == 'error']


@pytest.mark.parametrize('change', [lambda b: b'\xef\xbb\xbf' + b, lambda b: b.replace(b'\n', b'\r\n'), lambda b: b.rstrip(b'\n'),
                                    lambda b: b.replace(b'\n', b' \n')])
def test_text_variants(scan, change):
    want = scan_layout.read_scan(scan, 'val')
    for f in ('dev_caps.txt', 'dev_ids.txt'): text(f, change)(scan)
    got = scan_layout.read_scan(scan, 'val')
    assert got.captions == want.captions and np.array_equal(got.img_ids, want.img_ids) and splits.fingerprint(got) == splits.fingerprint(want)


def test_only_newlines_end_lines(scan):
    odd = 'one\u2028two\x85three\x0bfour\x1cfive'
    line('dev_caps.txt', 2, odd.encode())(scan)
    assert scan_layout.read_scan(scan, 'val').captions[1] == odd


@pytest.mark.parametrize('change,said', [(lambda x: x.astype('float64'), 'float64'), (lambda x: x[:, 0], 'one vector'),
                                         (lambda x: x.astype('float16'), None), (np.asfortranarray, None)])
def test_feature_variants(scan, change, said):
    x = np.load(scan/'dev_ims.npy'); np.save(scan/'dev_ims.npy', change(x))
    (scan/'dev_num.npy').unlink(); (scan/'dev_boxes.npy').unlink()
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always'); s = scan_layout.read_scan(scan, 'val')
    assert [said in str(m.message) and 'dev_ims.npy' in str(m.message) for m in w] == [True] * (said is not None)
    assert s.feats.ndim == 3 and np.allclose(s.feats, x[:, :1] if said == 'one vector' else x, atol=2e-3) and s.feats.dtype != np.float64
    assert isinstance(s.feats, np.memmap) == (said != 'float64')


def test_linked_features(scan, tmp_path):
    "Refused where they lie outside, read where the caller says so, or where the whole folder is a link"
    os.rename(scan/'dev_ims.npy', tmp_path/'elsewhere.npy')
    (scan/'dev_ims.npy').symlink_to(tmp_path/'elsewhere.npy')
    with pytest.raises(DataError, match='dev_ims.npy: a link that leads out of the folder'): scan_layout.read_scan(scan, 'val')
    assert len(scan_layout.read_scan(scan, 'val', follow_links=True)) == N
    (scan/'dev_ims.npy').unlink(); os.rename(tmp_path/'elsewhere.npy', scan/'dev_ims.npy')
    (tmp_path/'linked').symlink_to(scan); assert len(scan_layout.read_scan(tmp_path/'linked', 'val')) == N


@pytest.mark.parametrize('regions', [None, 0, slice(0, 2), slice(None, None, 2), [0, 1, 3], [0, 2]])
@pytest.mark.parametrize('dims', [None, 2])
def test_columns(scan, regions, dims):
    whole, s = scan_layout.read_scan(scan, 'val'), scan_layout.read_scan(scan, 'val', dims=dims, regions=regions)
    cols = np.atleast_1d(np.arange(R)[slice(None) if regions is None else regions])
    assert np.array_equal(s.feats, whole.feats[:, cols][:, :, :dims]) and np.array_equal(s.boxes, whole.boxes[:, cols])
    assert s.num.tolist() == [sum(c < n for c in cols) for n in whole.num]
    assert isinstance(s.feats, np.memmap) == (regions != [0, 1, 3])            # evenly spaced columns stay on disk


# --- whose is a row ---

def slow_owners(n_rows, n_caps, ids):
    "The four readings, one caption at a time"
    names = list(dict.fromkeys(ids))
    if len(ids) == n_caps and (len(names) < len(ids) or n_rows == n_caps):
        if n_rows not in (len(names), n_caps): return None
        return [ids.index(x) if n_rows == n_caps else i for i, x in enumerate(names)], [names.index(x) for x in ids], names
    if len(names) < len(ids) or n_caps % len(ids) or n_rows not in (len(ids), n_caps): return None
    k = n_caps // len(ids)
    return [i*k if n_rows == n_caps else i for i in range(len(ids))], [j // k for j in range(n_caps)], names


def test_owners_against_slow():
    rng, seen = np.random.default_rng(1), {True: 0, False: 0}
    for _ in range(3000):
        n, k = rng.integers(1, 5, 2); names = rng.permutation(9)[:n]
        ids = names if rng.random() < .5 else rng.permutation(np.repeat(names, rng.integers(1, 4, n)))
        caps = [n*k, len(ids), rng.integers(1, 9)][rng.integers(3)]; rows = [n, caps, rng.integers(1, 9)][rng.integers(3)]
        want = slow_owners(rows, caps, ids.tolist())
        try: got = tuple(x.tolist() for x in scan_layout._owners(rows, caps, ids))
        except DataError as e: got = None; assert e.remedy
        assert got == want, (rows, caps, ids)
        seen[want is not None] += 1
    assert min(seen.values()) > 300


def repeat(scan, k, ids):
    for kind in ('ims', 'num', 'boxes'): np.save(scan/f'dev_{kind}.npy', np.repeat(np.load(scan/f'dev_{kind}.npy'), k, 0))
    if ids: (scan/'dev_ids.txt').write_text(''.join(f'{106 + i}\n' for i in range(N) for _ in range(k)))


@pytest.mark.parametrize('ids', [False, True])
def test_repeated_rows(scan, ids):
    want = splits.fingerprint(scan_layout.read_scan(scan, 'val')); repeat(scan, K, ids)
    s = scan_layout.read_scan(scan, 'val')
    assert splits.fingerprint(s) == want and isinstance(s.feats, np.memmap)
    edit('dev_ims.npy', setting((4, 0, 0), 9))(scan)
    with pytest.raises(DataError, match='row 4 differs from row 3') as e: scan_layout.read_scan(scan, 'val')
    assert e.value.remedy


def test_repeated_rows_under_ids_of_sentences(scan):
    repeat(scan, K, False); (scan/'dev_ids.txt').write_text(''.join(f'{i}\n' for i in range(N*K)))
    with pytest.raises(DataError, match='repeat 3 times'): scan_layout.read_scan(scan, 'val')


def test_unequal_counts_in_any_order(scan):
    ids = [107, 106, 106, 111, 108, 109, 110, 106, 111]
    (scan/'dev_ids.txt').write_text('\n'.join(map(str, ids))); (scan/'dev_caps.txt').write_text('\n'.join(f's{j}' for j in range(9)))
    s = scan_layout.read_scan(scan, 'val')
    assert s.img_ids[s.img_of].tolist() == ids and s.img_ids.tolist() == list(dict.fromkeys(ids))
    assert s.cap_ids.tolist() == [535, 530, 531, 555, 540, 545, 550, 532, 556]


def test_caption_ids_against_slow():
    rng = np.random.default_rng(2)
    for _ in range(200):
        n = rng.integers(1, 9); of = rng.integers(0, n, rng.integers(1, 40)); ids = rng.permutation(100)[:n]
        most, k, want = max(5, max(np.bincount(of))), [0]*n, []
        for i in of: want.append(ids[i]*most + k[i]); k[i] += 1
        got = splits.caption_ids(of, ids)
        assert got.tolist() == want and len(set(want)) == len(want)


# --- parts, finite, folder ---

def test_check_parts_and_concat(scan):
    parts = {p: scan_layout.read_scan(scan, p) for p in ('train', 'val', 'test')}
    splits.check_parts(parts)
    whole = splits.concat(list(parts.values()))
    assert whole.feats.dtype == np.float32 and [len(whole), len(whole.captions)] == [3*N, 3*N*K] and whole.boxes.shape == (3*N, R, 4)
    for j in range(3*N*K): assert str(whole.img_ids[whole.img_of[j]]) in whole.captions[j]
    small = dict(parts, test=scan_layout.read_scan(scan, 'test', dims=2))
    with pytest.raises(DataError, match='2 feature dimensions, but 5'): splits.check_parts(small)
    with pytest.raises(DataError, match='equal ones'): splits.concat([parts['train'], scan_layout.read_scan(scan, 'test', regions=[0])])
    text('test_ids.txt', lambda b: b.replace(b'112', b'103'))(scan)
    leak = dict(parts, test=scan_layout.read_scan(scan, 'test'))
    for f in (lambda: splits.check_parts(leak), lambda: splits.concat(list(leak.values()))):
        with pytest.raises(DataError, match='1 image ids that are also in .*e.g. 103') as e: f()
        assert e.value.where.endswith('test') and e.value.remedy


@pytest.mark.parametrize('size', [64 << 20, 100, 24 * 7])                       # one block, blocks of a few rows, an uneven last block
def test_check_finite_reads_everything(tmp_path, monkeypatch, size):
    blocks = splits.row_blocks; monkeypatch.setattr(splits, 'row_blocks', lambda x: blocks(x, size))
    x = np.zeros((1000, 2, 3), dtype='float32'); splits.check_finite(x)
    for row in (0, 1, 499, 999):
        y = x.copy(); y[row, 1, 2] = -np.inf
        with pytest.raises(DataError, match=f'row {row};'): splits.check_finite(y, 'f')
    write_scan(tmp_path, parts=(('train', 200), ('dev', N), ('test', N)))
    edit('train_ims.npy', setting((1, 0, 0), np.nan))(tmp_path)                # row 1 of 200 is not in the sample
    s = scan_layout.read_scan(tmp_path, 'train')
    assert not [f for f in checks.check_folder(tmp_path) if f.level == 'error']
    assert [(f.part, 'row 1;' in f.text) for f in checks.check_folder(tmp_path, full=True) if f.level == 'error'] == [('train', True)]
    with pytest.raises(DataError, match='row 1;'): batches.Batches(s, batches.Vocabulary.build(s.captions))


def test_check_folder(scan):
    assert {f.level for f in checks.check_folder(scan, full=True)} <= {'info'}
    line('train_caps.txt', 1, b'...')(scan); line('train_caps.txt', 4, b'...')(scan); edit('train_ims.npy', setting(0, 0))(scan)
    (scan/'dev_caps.txt').unlink(); line('test_ids.txt', 1, b'101')(scan)
    found = [(f.level, f.part, f.text) for f in checks.check_folder(scan)]
    for level, part, said in (('warning', 'train', 'all zero'), ('warning', 'train', '2 sentences without a word'),
                              ('info', 'train', '1 sentences are used'),
                              ('error', 'val', 'no dev_caps.txt'), ('error', '', 'also in train, e.g. 101')):
        assert sum(l == level and p == part and said in t for l, p, t in found) == 1, (said, found)
    assert len(found) == 5
    assert {(f.level, f.part) for f in checks.check_folder(scan/'nowhere')} == {('error', p) for p in ('train', 'val', 'test')}


def test_describe(scan):
    d = checks.describe(scan_layout.read_scan(scan, 'test'))
    assert json.loads(json.dumps(d)) == d
    assert (d['images'], d['sentences'], d['regions'], d['dims'], d['boxes'], d['mapped']) == (N, N*K, R, D, True, True)
    assert d['different_words'] == 3 + K + N and d['words'] == dict(min=5, mean=5., max=5) and len(d['samples']) == 3


# --- words ---

def slow_words(sentence):
    out = ''
    for c in sentence.lower(): out += '' if c in "'’" else c if c.isalnum() else f' {c} ' if c == ';' else ' '
    return out.split()


def test_words_against_slow():
    rng = np.random.default_rng(3); letters = list("aB1 '’;_-.,!éßЖ中 \t²½")
    for _ in range(2000):
        s = ''.join(rng.choice(letters, rng.integers(0, 30)))
        assert batches.words(s) == slow_words(s), s


def test_vocabulary(tmp_path):
    v = batches.Vocabulary.build(['b b a c', 'a b d;'])
    assert v.words == (*batches.SPECIALS, 'b', 'a', ';', 'c', 'd') and len(v) == 9
    assert batches.Vocabulary.build(['b b a c', 'a b d;'], min_count=2).words == (*batches.SPECIALS, 'b', 'a')
    assert batches.Vocabulary.build(['<unk> <pad>']).words == (*batches.SPECIALS, 'pad', 'unk')      # a sentence cannot name a special
    tokens, lengths = v.encode(['a b', 'zebra', '!', 'b a c d'])
    assert tokens.tolist() == [[1, 5, 4, 2, 0, 0], [1, 3, 2, 0, 0, 0], [1, 3, 2, 0, 0, 0], [1, 4, 5, 7, 8, 2]]
    assert lengths.tolist() == [4, 3, 3, 6]
    assert tokens.dtype == lengths.dtype == torch.int64 and v.encode([])[0].shape == (0, 0)
    v.save(tmp_path/'v.json'); assert batches.Vocabulary.load(tmp_path/'v.json') == v and os.listdir(tmp_path) == ['v.json']
    first = (tmp_path/'v.json').read_bytes(); v.save(tmp_path/'v.json'); assert (tmp_path/'v.json').read_bytes() == first


GOOD = json.dumps(dict(format='itm_nb words 1', words=[*batches.SPECIALS, 'a', 'b']))
BAD_WORDS = {'empty': '', 'not JSON': 'hello', 'cut': GOOD[:-5], 'a list': '[1, 2]', 'a number': '7', 'null': 'null',
             'other format': GOOD.replace('words 1', 'words 9'), 'no words': '{"format": "itm_nb words 1"}',
             'words a string': '{"format": "itm_nb words 1", "words": "abc"}', 'number as word': GOOD.replace('"a"', '1'),
             'empty word': GOOD.replace('"a"', '""'), 'twice': GOOD.replace('"a"', '"b"'), 'no specials': GOOD.replace('<pad>', 'x'),
             'specials elsewhere': GOOD.replace('<pad>', 'x').replace('<start>', '<pad>').replace('x', '<start>'),
             'NUL': GOOD.replace('"a"', '"\0"'),
             'deep': '[' * 100_000, 'huge number': '1' * 10_000}

@pytest.mark.parametrize('case', BAD_WORDS)
def test_bad_vocabulary(tmp_path, case):
    (tmp_path/'v.json').write_text(BAD_WORDS[case])
    with pytest.raises(DataError) as e: batches.Vocabulary.load(tmp_path/'v.json')
    assert 'v.json' in str(e.value) and len(e.value.remedy) > 10


@pytest.mark.parametrize('load', [batches.Vocabulary.load, folds.Folds.load, lambda p: folds.read_judgements(p, toy_split())])
def test_canary_never_fires(tmp_path, load):
    canary = np.array([[Canary(tmp_path/'fired')]], dtype=object)
    raw_pickle(tmp_path/'a'); np.save(tmp_path/'b.npy', canary, allow_pickle=True); np.savez(tmp_path/'c.npz', crowd=canary, expert=canary)
    for name in ('a', 'b.npy', 'c.npz'):
        with pytest.raises(DataError): load(tmp_path/name)
    assert not (tmp_path/'fired').exists()
    pickle.loads(pickle.dumps(Canary(tmp_path/'fired'))).close(); assert (tmp_path/'fired').exists()     # the canary itself works


def test_write_atomic(tmp_path, monkeypatch):
    p = tmp_path/'f'; errors_files.write_atomic(p, b'old')
    def fail(*a): raise OSError(28, 'No space left on device')
    for what in ('fsync', 'replace'):
        with monkeypatch.context() as m:
            m.setattr(os, what, fail)
            with pytest.raises(DataError, match='No space left') as e: errors_files.write_atomic(p, b'new')
        assert p.read_bytes() == b'old' and os.listdir(tmp_path) == ['f'] and e.value.remedy
    with pytest.raises(DataError, match='No such file'): errors_files.write_atomic(tmp_path/'no'/'f', b'')
    with pytest.raises(DataError, match='directory'): errors_files.write_atomic(tmp_path, b'')
    assert os.listdir(tmp_path) == ['f'] and not list(tmp_path.parent.glob('.*.tmp'))


# --- fingerprint, batches, order ---

def toy_split(n=12, k=5, first=0, seed=0):
    rng = np.random.default_rng(seed); of, ids = np.repeat(np.arange(n), k), np.arange(first, first + n)
    return splits.Split('test', rng.normal(size=(n, R, D)).astype('float16'), rng.integers(1, R + 1, n),
                      [' '.join(['word'] * rng.integers(1, 9)) + f' {j}' for j in range(n*k)], of, ids, splits.caption_ids(of, ids))


def test_fingerprint_sees_every_field_and_no_path(scan, tmp_path):
    s = scan_layout.read_scan(scan, 'val'); f = splits.fingerprint(s)
    assert f == splits.fingerprint(scan_layout.read_scan(write_scan(tmp_path/'copy'), 'val')) and len(f) == 64
    near = lambda x: np.where(np.arange(x.size).reshape(x.shape) == x.size - 1, np.nextafter(x, np.float32(9)), x)
    other = [dict(feats=near(s.feats)), dict(feats=s.feats.astype('float16')), dict(num=np.full(N, 1)), dict(boxes=None),
             dict(boxes=near(s.boxes)), dict(img_ids=s.img_ids + 1), dict(cap_ids=s.cap_ids + 1), dict(gallery=np.zeros(N, int)),
             dict(captions=[*s.captions[:-1], 'x']), dict(img_of=np.roll(s.img_of, 1)),
             dict(captions=[s.captions[0] + s.captions[1], '', *s.captions[2:]])]
    prints = {splits.fingerprint(replace(s, **o)) for o in other}
    assert len(prints) == len(other) and f not in prints


def test_fingerprint_of_a_big_map_is_bounded(tmp_path):
    n, width = 3000, 16_384                                       # 187 MiB, a sparse file: only its blocks that were written take space
    x = np.lib.format.open_memmap(tmp_path/'x.npy', 'w+', 'float32', (n, 1, width)); x[-1] = 1; x.flush()
    s = splits.Split('train', np.load(tmp_path/'x.npy', mmap_mode='r'), np.ones(n, int), ['a']*n, np.arange(n), np.arange(n), np.arange(n))
    rows = splits.spread_rows(n, (64 << 20) // (4*width)); assert len(rows) * 4 * width <= 64 << 20 and rows[-1] == n - 1
    f = splits.fingerprint(s); x[rows[5], 0, 7] = 3; x.flush(); assert splits.fingerprint(s) != f
    f = splits.fingerprint(s); x[rows[5] + 1, 0, 7] = 3; x.flush(); assert splits.fingerprint(s) == f       # the stated blind spot


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_batches_against_slow(dtype):
    s = toy_split(); v = batches.Vocabulary.build(s.captions[:20]); b = batches.Batches(s, v, dtype=dtype)
    for cap in random_module.order(len(s.captions), 3).split(7):
        got = b.take(cap)
        for r, j in enumerate(cap.tolist()):
            i = s.img_of[j]; words = [1, *[v.index.get(w, 3) for w in batches.words(s.captions[j])], 2]
            assert got['img'][r] == i and got['cap'][r] == j and got['img_ids'][r] == s.img_ids[i] and got['cap_ids'][r] == s.cap_ids[j]
            assert np.array_equal(got['feats'][r], s.feats[i].astype('float32'))
            assert got['mask'][r].tolist() == [c < s.num[i] for c in range(R)]
            assert got['lengths'][r] == len(words) and got['tokens'][r].tolist() == words + [0] * (got['tokens'].shape[1] - len(words))
        assert got['tokens'].shape[1] == got['lengths'].max() and got['feats'].dtype == torch.float32 and b.feats.dtype == dtype
    chunk, same = b.texts(slice(3, 9)), b.texts(torch.arange(3, 9))
    assert all(torch.equal(chunk[k], same[k]) for k in chunk) and isinstance(b.lengths, np.ndarray)
    assert torch.equal(b.images(np.array([2, 1]))['feats'], b.images(slice(1, 3))['feats'].flip(0))


def test_batches_refuse_what_float16_cannot_hold():
    s = toy_split(); x = s.feats.astype('float32'); x[3] = 1e6
    s = replace(s, feats=x); batches.Batches(s, batches.Vocabulary.build([]))
    with pytest.raises(DataError, match='torch.float16') as e: batches.Batches(s, batches.Vocabulary.build([]), dtype=torch.float16)
    assert e.value.remedy


def test_order():
    draw = random_module.uniform(torch.arange(50), 'order', 1, 3, 2)[:, 0].tolist()
    assert random_module.order(50, 3, 2).tolist() == sorted(range(50), key=lambda i: draw[i])
    for n in (1, 2, 500): assert torch.equal(random_module.order(n, 1, 2).sort()[0], torch.arange(n))
    assert len({tuple(random_module.order(50, s, e).tolist()) for s in range(3) for e in range(3)}) == 9
    where = torch.stack([random_module.order(20, e).argsort() for e in range(400)]).double()      # the place of each caption over 400 orders
    assert (where.mean(0) - 9.5).abs().max() < 4 * (399/12/400)**.5                               # uniform: mean 9.5, variance (20^2-1)/12


def test_draws_are_pinned():
    "The same numbers on every machine and in every version: a changed hash would silently change every run"
    ids = torch.tensor([0, 7, 2**40])
    key = int.from_bytes(hashlib.sha256(b'a\x1f3\x1f4').digest()[:8], 'little') >> 1
    def mix(x):
        x &= 2**64 - 1
        x = ((x ^ (x >> 30)) * 0xbf58476d1ce4e5b9) & (2**64 - 1); x = ((x ^ (x >> 27)) * 0x94d049bb133111eb) & (2**64 - 1)
        return x ^ (x >> 31)
    want = [[(mix(mix(i + key) + c * 0x9e3779b97f4a7c15) >> 11) / 2**53 for c in range(3)] for i in ids.tolist()]
    assert random_module.uniform(ids, 'a', 3, 3, 4).tolist() == want


# --- judgements ---

def test_labels_against_slow(tmp_path):
    rng, s = np.random.default_rng(4), toy_split()
    crowd = np.column_stack([rng.integers(0, 15, 80), rng.integers(0, 75, 80), rng.integers(0, 4, (80, 2))])
    pairs = np.concatenate([crowd[:30, :2], np.column_stack([rng.integers(0, 15, 30), rng.integers(0, 75, 30)])])    # half judged twice
    expert = np.column_stack([pairs, rng.integers(1, 5, (60, 3))])
    np.savez(tmp_path/'j.npz', crowd=crowd, expert=expert)
    j = folds.read_judgements(tmp_path/'j.npz', s); shares = []
    for rule in ('strict', 'main', 'lenient'):
        want = {}
        for i, c, yes, no in crowd.tolist():
            ok = dict(strict=yes > 0 and no == 0, main=yes > no, lenient=yes > 0)[rule]
            if i < 12 and c < 60: want[i, c] = want.get((i, c), False) or ok
        for i, c, *score in expert.tolist():
            ok = dict(strict=min(score) == 4, main=sorted(score)[1] >= 3, lenient=sorted(score)[1] >= 2)[rule]
            if i < 12 and c < 60: want[i, c] = want.get((i, c), False) or ok
        img, cap, label = j.labels(rule)
        assert [(a, b, bool(l)) for a, b, l in zip(img, cap, label)] == [(a, b, want[a, b]) for a, b in sorted(want)]
        shares.append(set(zip(img[label > 0].tolist(), cap[label > 0].tolist())))
    assert shares[0] < shares[1] < shares[2]                                  # each rule is looser than the one before
    part = s.subset(np.array([5, 2]), 'part'); k = folds.read_judgements(tmp_path/'j.npz', part)
    img, cap, label = k.labels(); whole = dict(zip(zip(*j.labels()[:2]), j.labels()[2]))
    assert len(img) and all(whole[part.img_ids[i], part.cap_ids[c]] == l for i, c, l in zip(img, cap, label))


J = dict(crowd=np.array([[0, 0, 3, 0]]), expert=np.array([[0, 1, 1, 2, 3]]))
BAD_JUDGEMENTS = {
    'no crowd': dict(expert=J['expert']), 'no expert': dict(crowd=J['crowd']), 'floats': dict(J, crowd=J['crowd'] * 1.),
    'width': dict(J, crowd=J['crowd'][:, :3]), '1-D': dict(J, expert=J['expert'][0]), 'score 0': dict(J, expert=J['expert'] - 1),
    'score 5': dict(J, expert=J['expert'] + 2),
    'negative votes': dict(J, crowd=-J['crowd']), 'other ids': {k: v + [900, 900, *[0]*(v.shape[1]-2)] for k, v in J.items()}}

@pytest.mark.parametrize('case', BAD_JUDGEMENTS)
def test_bad_judgements(tmp_path, case):
    np.savez(tmp_path/'j.npz', **BAD_JUDGEMENTS[case])
    with pytest.raises(DataError) as e: folds.read_judgements(tmp_path/'j.npz', toy_split())
    assert 'j.npz' in str(e.value) and len(e.value.remedy) > 10


@pytest.mark.parametrize('damage', [lambda b: b'', lambda b: b[:60], lambda b: b[:-30], lambda b: b'hello',
                                    lambda b: b[:100] + b'\xff' * 60 + b[160:]])
def test_damaged_judgements(tmp_path, damage):
    np.savez(tmp_path/'j.npz', **J); folds.read_judgements(tmp_path/'j.npz', toy_split())
    text('j.npz', damage)(tmp_path)
    with pytest.raises(DataError) as e: folds.read_judgements(tmp_path/'j.npz', toy_split())
    assert 'j.npz' in str(e.value) and len(e.value.remedy) > 10


# --- folds ---

@pytest.mark.parametrize('seed', range(6))
def test_folds_properties(seed):
    rng = np.random.default_rng(seed); n, k = int(rng.integers(100, 400)), int(rng.integers(2, 7))
    ids, judged = rng.permutation(10_000)[:n], rng.random(n) < .3
    groups = np.where(rng.random(n) < .1, rng.integers(0, 12, n), 1000 + np.arange(n))
    f = folds.folds(ids, groups, judged, k, n // 10, seed)
    size, of = [len(t) for t in f.test], {i: g for i, g in zip(ids.tolist(), groups.tolist())}
    assert sorted(np.concatenate(f.test)) == sorted(ids) and max(size) - min(size) <= 1
    yes = [np.isin(t, ids[judged]).sum() for t in f.test]; assert max(yes) - min(yes) <= 1
    for j in range(k):
        part = {name: set(x.tolist()) for name, x in f[j].items()}
        assert sum(map(len, part.values())) == n and len(set.union(*part.values())) == n and len(part['val']) == n // 10
        homes = {}
        for name, s in part.items():
            for i in s: homes.setdefault(of[i], set()).add(name)
        assert all(len(h) == 1 for h in homes.values())                        # equal photos are never on two sides
        rest = n - size[j]; want = (n // 10) * np.isin(np.concatenate([f[j]['train'], f[j]['val']]), ids[judged]).sum() / rest
        assert abs(np.isin(f[j]['val'], ids[judged]).sum() - want) <= 3
    p = rng.permutation(n); assert folds.folds(ids[p], groups[p], judged[p], k, n // 10, seed).content() == f.content()
    assert folds.folds(ids, groups, judged, k, n // 10, seed + 1).content() != f.content()


def test_grouped_photos_are_spread():
    ids = np.arange(100); f = folds.folds(ids, np.where(ids < 20, ids//2, ids), n=5, n_val=5)                # ten pairs among 100 photos
    assert [sum(i < 20 for i in t) for t in f.test] == [4]*5 and [len(t) for t in f.test] == [20]*5 and len(f.groups) == 10


@pytest.mark.parametrize('settings', [dict(n=1), dict(n=50), dict(n_val=0), dict(n_val=40), dict(img_ids=np.zeros(40, int))])
def test_bad_fold_settings(settings):
    with pytest.raises(DataError) as e: folds.folds(**{**dict(img_ids=np.arange(40), n=4, n_val=3), **settings})
    assert len(e.value.remedy) > 10


@pytest.mark.parametrize('case', range(8))
def test_changed_fold_file(tmp_path, case):
    f = folds.folds(np.arange(40), n=4, n_val=3); f.save(tmp_path/'f.json')
    assert folds.Folds.load(tmp_path/'f.json').content() == f.content()
    d = json.loads((tmp_path/'f.json').read_text())
    change = [lambda: d['test'][0].pop(), lambda: d['val'][2].__setitem__(0, 999), lambda: d.pop('seed'), lambda: d.update(sha256='0'*64),
              lambda: d.update(extra=1), lambda: d.update(test='abc'), lambda: d['test'].reverse(),
              lambda: d['test'][1].__setitem__(0, 10**30)][case]
    change(); (tmp_path/'f.json').write_text(json.dumps(d))
    with pytest.raises(DataError, match='f.json.*hash') as e: folds.Folds.load(tmp_path/'f.json')
    assert e.value.remedy


def test_same_images():
    s = toy_split(); x = s.feats.copy(); x[7] = x[2]; x[9] = x[2]; x[4] = x[5]
    g = folds.same_images(replace(s, feats=x))
    assert g[7] == g[2] == g[9] and g[4] == g[5] and len(set(g)) == 12 - 3


def test_fold_split(scan):
    parts = {p: scan_layout.read_scan(scan, p) for p in ('train', 'val', 'test')}; ids = np.concatenate([s.img_ids for s in parts.values()])
    f = folds.folds(ids, n=3, n_val=2); tested = []
    for k in range(len(f)):
        out = folds.fold_split(parts, f[k], block=3); splits.check_parts(out); tested += out['test'].img_ids.tolist()
        for name, s in out.items():
            assert np.array_equal(s.img_ids, f[k][name]) and len(s.captions) == K*len(s)
            for j, c in enumerate(s.captions): assert c == f'sentence {j % K} about photo {s.img_ids[s.img_of[j]]}'
        assert np.bincount(out['test'].gallery).tolist() == [3, 3] and out['train'].gallery is None
    assert sorted(tested) == sorted(ids)
    for bad in (dict(f[0], val=f[0]['val'][1:]), dict(f[0], val=f[0]['test']), dict(f[0], val=np.append(f[0]['val'], 9999))):
        with pytest.raises(DataError) as e: folds.fold_split(parts, bad)
        assert e.value.remedy


def test_committed_folds():
    f = folds.Folds.load(Path(__file__).parents[2]/'nbs'/'experiments'/'folds'/'flickr8k_5.json')
    ids = np.sort(np.concatenate(f.test))
    assert ids.tolist() == list(range(8000)) and f.groups == ([3081, 3805],) and len(f.judged) == 1000
    for k in range(5):
        p = f[k]; assert {n: len(x) for n, x in p.items()} == dict(train=5900, val=500, test=1600)
        assert np.isin(p['test'], f.judged).sum() == 200
        assert len(np.unique(np.concatenate(list(p.values())))) == 8000
        assert sum(np.isin([3081, 3805], x).any() for x in p.values()) == 1
    group = np.where(ids == 3805, 3081, ids)
    assert folds.folds(ids, group, np.isin(ids, f.judged), seed=f.seed).content() == f.content()
