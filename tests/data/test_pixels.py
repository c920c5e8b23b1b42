"""Pictures are the same bytes everywhere; a stored array is whole or not there; what a loader's threads do cannot be seen in the result."""
import base64
import hashlib
import io
import json
import multiprocessing as mp
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from itm_nb.core.errors_files import DataError
from itm_nb.core.random import order, uniform
from itm_nb.data.batches import Batches, Vocabulary
from itm_nb.data.pixels import (
    FORMATS, KINDS, OPERATIONS, _affine, augment, crop, decode, normalise, Pixels, warp)
from itm_nb.data.splits import Split

# a 24 x 16 photo (4:2:0, quality 80), stored once: decoding is pinned, encoding may differ from library to library
JPEG = ('/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAYEBQYFBAYGBQYHBwYIChAKCgkJChQODwwQFxQYGBcUFhYaHSUfGhsjHBYWICwgIyYnKSopGR8tMC0oMCUoKSj/2wBDAQcHBw'
        'oIChMKChMoGhYaKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCgoKCj/wAARCAAQABgDASIAAhEBAxEB/8QAHwAAAQUBAQEBAQEAAAAA'
        'AAAAAAECAwQFBgcICQoL/8QAtRAAAgEDAwIEAwUFBAQAAAF9AQIDAAQRBRIhMUEGE1FhByJxFDKBkaEII0KxwRVS0fAkM2JyggkKFhcYGRolJicoKSo0NTY3ODk6Q0RFRk'
        'dISUpTVFVWV1hZWmNkZWZnaGlqc3R1dnd4eXqDhIWGh4iJipKTlJWWl5iZmqKjpKWmp6ipqrKztLW2t7i5usLDxMXGx8jJytLT1NXW19jZ2uHi4+Tl5ufo6erx8vP09fb3'
        '+Pn6/8QAHwEAAwEBAQEBAQEBAQAAAAAAAAECAwQFBgcICQoL/8QAtREAAgECBAQDBAcFBAQAAQJ3AAECAxEEBSExBhJBUQdhcRMiMoEIFEKRobHBCSMzUvAVYnLRChYkNO'
        'El8RcYGRomJygpKjU2Nzg5OkNERUZHSElKU1RVVldYWVpjZGVmZ2hpanN0dXZ3eHl6goOEhYaHiImKkpOUlZaXmJmaoqOkpaanqKmqsrO0tba3uLm6wsPExcbHyMnK0tPU'
        '1dbX2Nna4uPk5ebn6Onq8vP09fb3+Pn6/9oADAMBAAIRAxEAPwDv6+cK+na5qtaXDntr/vbW8v8Agm+Y4nl5dO/6Hx9RX2ZRWf8AaP8Ad/H/AIBfsvM//9k=')


def sha(x): return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]


def picture(seed, w=40, h=30):
    "Blocks of colour with a little noise"
    g = np.random.default_rng(seed); x = np.kron(g.integers(0, 256, (3, 4, 3)), np.ones((h//3, w//4, 1))) + g.integers(-9, 10, (h, w, 3))
    return Image.fromarray(x.clip(0, 255).astype(np.uint8))


@pytest.fixture
def files(tmp_path):
    kinds = ('png', 'jpg', 'bmp', 'webp', 'gif', 'tiff')
    out = [tmp_path/f'{i:02} bild ü.{kinds[i % 6]}' for i in range(12)]
    for i, f in enumerate(out): picture(i, 40 + 4*i, 30).save(f)
    return out


@pytest.mark.parametrize('size,frame,want', [(16, 'crop', '6e5a68be23215104'), (16, 'squash', 'd000a7a56c73d5bf'), (33, 'crop', '0f14ae591b689b5b')])
def test_pixel_hash_of_a_jpeg(size, frame, want, tmp_path):
    (tmp_path/'a.jpg').write_bytes(base64.b64decode(JPEG))
    assert sha(decode(tmp_path/'a.jpg', size, frame)) == want


@pytest.mark.parametrize('turn', range(1, 9))
def test_every_orientation(turn, tmp_path):
    "The tag undoes what was done to the stored picture"
    todo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    im = picture(3, 40, 30); exif = Image.Exif(); exif[0x0112] = turn
    (im.transpose(todo[turn]) if turn in todo else im).save(tmp_path/'a.png', exif=exif); im.save(tmp_path/'b.png')
    assert np.array_equal(decode(tmp_path/'a.png', 24), decode(tmp_path/'b.png', 24))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'I;16', 'I', 'F'])
@pytest.mark.parametrize('shape', [(40, 30), (1, 1), (1, 300), (300, 1), (129, 128)])
def test_every_mode_and_shape(mode, shape, tmp_path):
    im = picture(1).resize(shape)
    im = Image.fromarray(np.asarray(im.convert('L')).astype(np.uint16)*257) if mode == 'I;16' else im.convert('L').convert(mode) if mode in 'IF' else im.convert(mode)
    kind = 'jpg' if mode == 'CMYK' else 'tiff' if mode in ('F', 'PA', 'I') else 'png'
    if mode == 'PA': im = im.convert('LA')
    im.save(tmp_path/f'a.{kind}'); x = decode(tmp_path/f'a.{kind}', 20)
    assert x.shape == (20, 20, 3) and x.dtype == np.uint8 and x.flags.writeable


def test_transparency_in_a_palette_is_white(tmp_path):
    im = Image.new('P', (8, 8), 0); im.putpalette([10, 20, 30] + [0]*765); im.save(tmp_path/'a.png', transparency=0)
    assert (decode(tmp_path/'a.png', 8) == 255).all()


def test_of_a_moving_picture_the_first(tmp_path):
    a, b = (Image.new('RGB', (8, 8), c) for c in ('red', 'blue')); a.save(tmp_path/'a.gif', save_all=True, append_images=[b])
    assert (decode(tmp_path/'a.gif', 8) == [255, 0, 0]).all()


@pytest.mark.parametrize('seed', range(30))
def test_damaged_files_are_named_and_nothing_else_happens(seed, tmp_path):
    g = np.random.default_rng(seed); buf = io.BytesIO(); picture(seed).save(buf, ('PNG', 'JPEG', 'GIF', 'WEBP', 'TIFF', 'BMP')[seed % 6])
    raw = bytearray(buf.getvalue())
    if seed < 12: raw = raw[:int(g.integers(1, len(raw)))]
    else:
        for at in g.integers(0, min(len(raw), 200), 4): raw[at] ^= int(g.integers(1, 256))
    f = tmp_path/'broken'; f.write_bytes(raw)
    try: x = decode(f, 16); assert x.shape == (16, 16, 3)         # some damage cannot be seen
    except DataError as e: assert 'broken' in str(e)


@pytest.mark.parametrize('what', ['empty', 'text', 'eps', 'folder', 'pipe', 'nothing', 'bomb', 'no right'])
def test_what_is_no_picture(what, tmp_path):
    f = tmp_path/'f.png'
    if what == 'folder': f.mkdir()
    elif what == 'pipe': os.mkfifo(f)
    elif what == 'bomb': Image.new('1', (9000, 9000)).save(f)
    elif what != 'nothing': f.write_bytes(dict(empty=b'', text=b'hello', eps=b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n').get(what, b'x'))
    if what == 'no right':
        f.chmod(0)
        if os.access(f, os.R_OK): pytest.skip('this user may read everything')
    began = time.perf_counter()
    with pytest.raises(DataError, match='f.png'): decode(f)
    assert time.perf_counter() - began < 2


# ---- the stored array

def test_store_is_found_again_and_follows_its_files(files, tmp_path):
    plain, cache = Pixels(files, 16)[:], tmp_path/'cache'
    a = Pixels(files, 16, cache=cache); assert torch.equal(a[:], plain); made = a.path.stat().st_mtime_ns
    assert Pixels(files, 16, cache=cache).path.stat().st_mtime_ns == made
    names = {a.path}
    for other in (Pixels(files[::-1], 16, cache=cache), Pixels(files, 17, cache=cache), Pixels(files, 16, 'squash', cache=cache), Pixels(files[:-1], 16, cache=cache)):
        assert other.path not in names and torch.equal(other[:], Pixels(other.files, other.size, other.frame)[:]); names.add(other.path)
    picture(77, 40, 30).save(files[0]); b = Pixels(files, 16, cache=cache)
    assert b.path not in names and not torch.equal(b[:], plain) and torch.equal(b[1:], plain[1:])


@pytest.mark.parametrize('harm', ['cut', 'grown', 'no note', 'half a note', 'note of another', 'header', 'empty'])
def test_a_store_that_is_not_whole_is_made_again(harm, files, tmp_path):
    a = Pixels(files, 16, cache=tmp_path/'c'); plain, note = a[:].clone(), a.path.with_suffix('.json'); raw, said = a.path.read_bytes(), note.read_bytes()
    del a
    path = next((tmp_path/'c').glob('*.npy'))
    if harm == 'cut': path.write_bytes(raw[:-100])
    elif harm == 'grown': path.write_bytes(raw + b'x')
    elif harm == 'no note': note.unlink(); path.write_bytes(raw[:128] + bytes(len(raw)-128))      # as after a kill in the middle of it
    elif harm == 'half a note': note.write_bytes(said[:20])
    elif harm == 'note of another': note.write_text(json.dumps(json.loads(said) | dict(key='0'*64)))
    elif harm == 'header': path.write_bytes(b'\x93NUMPY\x01\x00' + raw[8:].replace(b'|u1', b'|O0', 1))
    else: path.write_bytes(b'')
    assert torch.equal(Pixels(files, 16, cache=tmp_path/'c')[:], plain)


def _build(files, cache): Pixels(files, 64, cache=cache)


def test_killed_while_storing_and_two_at_once(files, tmp_path):
    ctx = mp.get_context('fork'); cache = tmp_path/'c'
    for delay in (.0, .01, .03):
        p = ctx.Process(target=_build, args=(files*20, cache)); p.start(); time.sleep(delay); os.kill(p.pid, signal.SIGKILL); p.join()
        assert len(list(cache.glob('*.json'))) <= len(list(cache.glob('*.npy'))) if cache.exists() else True
    both = [ctx.Process(target=_build, args=(files*20, cache)) for _ in range(2)]
    for p in both: p.start()
    for p in both: p.join(); assert p.exitcode == 0
    assert torch.equal(Pixels(files*20, 64, cache=cache)[:], Pixels(files*20, 64)[:])


def test_threads_do_not_change_the_store(files, tmp_path):
    a, b = (Pixels(files, 16, cache=tmp_path/str(n), workers=n) for n in (0, 4))
    assert a.path.read_bytes() == b.path.read_bytes() and a.path.name == b.path.name


def test_a_broken_file_stops_the_store(files, tmp_path):
    files[7].write_bytes(files[7].read_bytes()[:40])
    with pytest.raises(DataError, match=files[7].name): Pixels(files, 16, cache=tmp_path/'c')
    assert not list((tmp_path/'c').iterdir())


# ---- augmentation against slow references

def slow_warp(x, m, fill):
    S = len(x); out = np.zeros_like(x)
    for r in range(S):
        for c in range(S):
            p = m @ np.array([c - (S-1)/2, r - (S-1)/2, 1.]) + (S-1)/2
            p = np.floor(p*256 + .5).astype(int); (c0, r0), (fc, fr) = p >> 8, p & 255
            total = np.zeros(3, int)
            for dc, dr in ((0, 0), (1, 0), (0, 1), (1, 1)):
                cc, rr = c0+dc, r0+dr; w = (fc if dc else 256-fc)*(fr if dr else 256-fr)
                inside = 0 <= cc < S and 0 <= rr < S
                v = x[min(max(rr, 0), S-1), min(max(cc, 0), S-1)].astype(int) if inside or fill is None else np.full(3, fill)
                total += w*v
            out[r, c] = (total + 32768) >> 16
    return out


@pytest.mark.parametrize('fill', [None, 128])
@pytest.mark.parametrize('seed', range(4))
def test_warp_against_a_loop(fill, seed):
    g = np.random.default_rng(seed); x = g.integers(0, 256, (3, 9, 9, 3)).astype(np.uint8)
    m = np.eye(2, 3)[None] + g.normal(0, [.3, .3, 4.], (3, 2, 3)); m = np.round(m*64)/64           # no ties of rounding
    want = np.stack([slow_warp(a, b, fill) for a, b in zip(x, m)])
    assert np.array_equal(warp(torch.from_numpy(x), torch.from_numpy(m), fill), want)
    if fill is not None: assert (warp(torch.from_numpy(x), torch.tensor([[1., 0, 1e6], [0, 1, 0]]).double().expand(3, 2, 3), fill) == fill).all()


@pytest.mark.parametrize('seed', range(8))
def test_equalise_is_pillows(seed):
    g = np.random.default_rng(seed); x = (g.beta(*g.uniform(.3, 3, 2), (17, 17, 3))*g.integers(2, 256)).astype(np.uint8)
    assert np.array_equal(OPERATIONS['equalise'](torch.from_numpy(x)[None], torch.ones(1), 7)[0], np.asarray(ImageOps.equalize(Image.fromarray(x))))


def test_moves_go_where_they_say():
    x = torch.zeros(1, 33, 33, 3, dtype=torch.uint8); x[0, 16, 24] = 255; plus, minus = torch.ones(1).double(), -torch.ones(1).double()
    def peak(y): return divmod(int(y[0, ..., 0].masked_fill(y[0, ..., 0] == 128, 0).argmax()), 33)
    for name in ('rotate', 'shear_x', 'shear_y', 'shift_x', 'shift_y'):
        there = OPERATIONS[name](x, plus, 10); back = OPERATIONS[name](there, minus, 10)
        if name in ('rotate', 'shear_y'): assert peak(there) != (16, 24)
        assert np.abs(np.subtract(peak(back), (16, 24))).max() <= 1
    assert peak(OPERATIONS['rotate'](x, plus, 30)) == (24, 16) and peak(OPERATIONS['shear_y'](x, plus, 10))[0] in (13, 14, 18, 19)
    big = torch.zeros(1, 384, 384, 3, dtype=torch.uint8); big[0, 100, 100] = 255
    assert int(OPERATIONS['shift_x'](big, plus, 7)[0, 100, :, 0].masked_fill(big[0, 0, :, 0] == 1, 0)[:370].argmax()) == 93


def test_crops_have_the_drawn_share():
    "A picture whose colour is its place tells what was cut out of it"
    S = 65; ramp = torch.arange(S)*255//(S-1); x = torch.stack([ramp.expand(S, S), ramp[:,None].expand(S, S), ramp.expand(S, S)], -1).to(torch.uint8)[None]
    u = uniform(torch.arange(200), 'test', 5); y = crop(x.expand(200, -1, -1, -1), u).double()
    w, h = (y[:, 32, :, 0].amax(1) - y[:, 32, :, 0].amin(1))/255, (y[:, :, 32, 1].amax(1) - y[:, :, 32, 1].amin(1))/255
    share, ratio = .5 + .5*u[:,0], (4/3)**(2*u[:,1]-1)
    assert (w - (share*ratio).sqrt().clamp(max=1)).abs().max() < .03 and (h - (share/ratio).sqrt().clamp(max=1)).abs().max() < .03
    mirrored = y[:, 32, 0, 0] > y[:, 32, -1, 0]; assert torch.equal(mirrored, u[:,4] >= .5)


def test_operations_are_drawn_as_said():
    "Each of the ten about equally often, half of them not carried out"
    x = torch.from_numpy(noise(48))[None].expand(2000, -1, -1, -1)
    whole = torch.tensor([[1., .5, .5, .5, 0.]]).double()
    from itm_nb.data.pixels import _change
    u = uniform(torch.arange(2000), 'test', 3); same = (_change(x, u, 7) == x).flatten(1).all(1)
    assert abs(float(same.float().mean()) - .55) < .03                         # half are left alone, and a tenth of the rest is the identity
    assert torch.equal(crop(x[:1], whole), x[:1])


def noise(n): return np.random.default_rng(5).integers(30, 220, (n, n, 3)).astype(np.uint8)


@pytest.mark.parametrize('kind', KINDS)
def test_a_view_depends_on_seed_epoch_and_id_alone(kind):
    x = torch.from_numpy(np.stack([np.asarray(picture(i).resize((16, 16))) for i in range(6)])); ids = torch.tensor([5, 900, 7, 10**12, 3, 2]); keep = x.clone()
    a = augment(x, ids, 1, 2, kind); perm = torch.tensor([4, 0, 5, 1, 2, 3])
    assert torch.equal(augment(x[perm], ids[perm], 1, 2, kind), a[perm]) and torch.equal(x, keep)
    assert all(torch.equal(augment(x[i:i+1], ids[i:i+1], 1, 2, kind), a[i:i+1]) for i in range(6))
    torch.manual_seed(0); np.random.seed(0); b = augment(x, ids, 1, 2, kind); assert torch.equal(a, b)
    assert torch.equal(augment(x, ids, 1, 3, kind), a) == (kind == 'none')


def test_normalise_is_what_it_says():
    x = torch.from_numpy(noise(12))[None]; mean, std = [.1, .2, .3], [.4, .5, .6]
    want = (x.double().permute(0, 3, 1, 2)/255 - torch.tensor(mean).view(3, 1, 1))/torch.tensor(std).view(3, 1, 1)
    assert (normalise(x, mean, std).double() - want).abs().max() < 1e-6


# ---- the loader

def toy(N=11, K=3, R=4, D=5, dtype='float32'):
    g = np.random.default_rng(0); caps = [f'word{i % 7} word{i % 5}' for i in range(N*K)]
    return Split('train', g.standard_normal((N, R, D)).astype(dtype), g.integers(1, R+1, N), caps, np.arange(N*K)//K, np.arange(N)+50, np.arange(N*K)+900)


@pytest.mark.parametrize('workers', [1, 4])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_threads_do_not_change_batches_of_features(workers, dtype, tmp_path):
    s = toy(dtype=dtype); np.save(tmp_path/'x.npy', s.feats); s = replace(s, feats=np.load(tmp_path/'x.npy', mmap_mode='r', allow_pickle=False))
    v = Vocabulary.build(s.captions); a, b = Batches(s, v), Batches(s, v, workers=workers)
    steps = [(order(33, 1, e)[i:i+5], e) for e in range(3) for i in range(0, 30, 5)]
    for i, (c, e) in enumerate(steps):
        x, y = a.take(c, epoch=e), b.take(c, epoch=e, ahead=steps[i+1:i+1+2*workers])
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
    assert len(b.coming) == 0 and b.feats is None
    assert torch.equal(b.take(steps[3][0], epoch=0, ahead=steps[9:11])['feats'], a.take(steps[3][0])['feats'])        # not announced: loaded at once
    assert torch.equal(b.take(steps[0][0])['feats'], a.take(steps[0][0])['feats']) and not b.coming    # and what nobody wanted is dropped


@pytest.mark.parametrize('workers', [0, 1, 4])
def test_threads_do_not_change_batches_of_pictures(workers, files, tmp_path):
    N = len(files); s = replace(toy(N), feats=None, files=files, num=np.ones(N, int)); v = Vocabulary.build(s.captions)
    plain = Pixels(files, 16)[:]; px = Pixels(files, 16, cache=tmp_path/'c'); b = Batches(s, v, pixels=px, change=lambda x, ids, e: augment(x, ids, 4, e), workers=workers)
    steps = [(order(36, 1, e)[i:i+9], e) for e in range(2) for i in range(0, 36, 9)]
    for i, (c, e) in enumerate(steps):
        got = b.take(c, epoch=e, ahead=steps[i+1:i+5]); want = augment(plain[s.img_of[c.numpy()]], torch.tensor(s.cap_ids[c.numpy()]), 4, e)
        assert torch.equal(got['feats'], want) and got['feats'].dtype == torch.uint8 and got['mask'].shape == (9, 1) and got['mask'].all()
    assert torch.equal(b.images(torch.arange(N))['feats'], plain) and torch.equal(b.images(slice(2, 5))['feats'], plain[2:5])


def test_bad_features_are_found_by_a_thread_too():
    s = toy(); x = s.feats.copy(); x[4, 1, 2] = np.nan; s = replace(s, feats=x); b = Batches(s, Vocabulary.build(s.captions), workers=2); c = torch.arange(33)
    with pytest.raises(DataError, match='row 4'): b.take(c[:3], epoch=0, ahead=[(c[10:14], 0)]); b.take(c[10:14])


def test_a_split_of_files(files):
    s = replace(toy(12), feats=None, files=files, num=np.ones(12, int)); sub = s.subset(np.array([5, 2]))
    assert len(s) == 12 and sub.files == [files[5], files[2]] and sub.feats is None and list(sub.img_ids) == [55, 52]
    with pytest.raises(DataError, match='a file for every image'): replace(s, files=files[:-1])
    with pytest.raises(DataError, match='1 to 1'): replace(s, num=np.full(12, 2))
    assert set(FORMATS) >= {'JPEG', 'PNG'}
