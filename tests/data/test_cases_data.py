"""Folders, captions and scores as people really have them, made here: each is read, with the right values - or refused with the remedy named."""
import json
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from itm_nb.data import scan_layout, splits
from itm_nb.core.errors_files import DataError
from itm_nb.core.project import template
from itm_nb.data.batches import run_together, Vocabulary, words
from itm_nb.data.layouts import check_layout, info_layout, open_layout, recognise
from itm_nb.data.pixels import decode
from itm_nb.data.safe_files import look
from itm_nb.data.splits import first_captions
from itm_nb.data.tokenizers import Pieces
from itm_nb.runs.external_scores import foreign
from itm_nb.runs.parameters import parameters, resolve
from itm_nb.cli import itm_data

PARTS = ('train', 'val', 'test')


def paint(path, i):
    path.parent.mkdir(parents=True, exist_ok=True); x = np.full((36, 48, 3), (37*i) % 255, 'uint8'); x[5:20, 5:25] = (200, (20*i) % 255, 90)
    Image.fromarray(x).save(path)

def read(at, **kw):
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); return {p: open_layout(at, p, **kw) for p in PARTS}

def captions_by_file(parts): return {Path(s.files[i]).name: [c for c, k in zip(s.captions, s.img_of) if k == i] for s in parts.values() for i in range(len(s))}

def is_sound(at, **kw): return not [f.text for f in check_layout(at, **kw) if f.level == 'error'] and itm_data(['check', str(at)]) == 0


# ---- phones

def test_a_film_behind_a_phone_picture_is_left_alone(tmp_path):
    "3 MB of film, and no end of a JPEG in the last 70 kB of it"
    for i in range(12): paint(tmp_path/f'{i:02d}.jpg', i)
    plain = decode(tmp_path/'03.jpg', 32); film = np.random.default_rng(3).integers(0, 255, 3_000_000, dtype=np.uint8).tobytes()
    with open(tmp_path/'03.jpg', 'ab') as f: f.write(film + film[-70_000:].replace(b'\xd9', b''))
    (tmp_path/'captions.csv').write_text('file,caption\n' + ''.join(f'{i:02d}.jpg,a thing number {i}\n' for i in range(12)))
    assert look(tmp_path/'03.jpg') == (48, 36) and np.array_equal(decode(tmp_path/'03.jpg', 32), plain)
    assert captions_by_file(read(tmp_path))['03.jpg'] == ['a thing number 3'] and is_sound(tmp_path)


def test_a_cut_jpeg_is_noticed_though_a_small_picture_lies_inside(tmp_path):
    "The thumbnail in the first segment has an end of its own: it is stepped over"
    import io
    big, small = io.BytesIO(), io.BytesIO(); x = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(x).save(big, 'JPEG'); Image.fromarray(x[:20, :20]).save(small, 'JPEG'); b, inside = big.getvalue(), b'small picture' + small.getvalue()
    whole = b[:2] + b'\xff\xe5' + (len(inside) + 2).to_bytes(2, 'big') + inside + b[2:]; f = tmp_path/'a.jpg'
    f.write_bytes(whole); assert look(f) == (200, 200)
    for n in range(len(inside) + 800, len(whole) - 2, 997):
        f.write_bytes(whole[:n])
        with pytest.raises(DataError, match='cut off'): look(f)


# ---- pictures whose damage or scale a decoder passes over

def test_every_flipped_byte_of_a_pngs_pixels_is_noticed(tmp_path):
    x = np.cumsum(np.random.default_rng(0).integers(0, 3, (60, 80, 3)), 0).astype('uint8'); f = tmp_path/'a.png'; Image.fromarray(x).save(f); whole = f.read_bytes()
    assert np.array_equal(decode(f, 40), decode(f, 40)); first = whole.index(b'IDAT')
    for at in range(first, len(whole) - 12, 61):
        f.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at+1:])
        for reader in (look, decode):
            with pytest.raises(DataError, match='a.png'): reader(f)


@pytest.mark.parametrize('kind,values,factor', [('whole numbers to 255', np.arange(256, dtype='int32'), 1), ('whole numbers to 65,535', np.arange(256, dtype='int32')*257, 1/257),
                                                ('decimals to 1', np.arange(256, dtype='float32')/255, 255), ('decimals to 255', np.arange(256, dtype='float32'), 1)])
def test_a_tiff_of_32_bits_is_scaled_by_the_rule(tmp_path, kind, values, factor):
    Image.fromarray(values.reshape(16, 16)).save(tmp_path/'a.tiff'); x = decode(tmp_path/'a.tiff', 16)
    assert np.array_equal(x[..., 0].ravel(), np.floor(values*factor + .01).astype('uint8')) and (x == x[..., :1]).all()


@pytest.mark.parametrize('values', [np.array([[-1, 5]], 'int32'), np.array([[0, 70_000]], 'int32'), np.array([[0, 1e6]], 'float32'), np.array([[-.5, 1]], 'float32'),
                                    np.array([[0, np.nan]], 'float32'), np.array([[0, np.inf]], 'float32')])
def test_a_tiff_of_32_bits_without_a_scale_is_refused_not_black(tmp_path, values):
    Image.fromarray(values).save(tmp_path/'a.tiff')
    with pytest.raises(DataError, match='a.tiff.*values from'): decode(tmp_path/'a.tiff', 4)


# ---- tables

def test_kaggles_flickr8k(tmp_path):
    "Images/ and captions.txt with `image,caption` on top, five lines a picture"
    rows, want = ['image,caption'], {}
    for i in range(20):
        paint(tmp_path/'Images'/f'{1000+i}_ab.jpg', i); want[f'{1000+i}_ab.jpg'] = [f'A thing , number {i} seen {k} .' for k in range(5)]
        rows += [f'{1000+i}_ab.jpg,"{c}"' for c in want[f'{1000+i}_ab.jpg']]
    (tmp_path/'captions.txt').write_text('\n'.join(rows) + '\n'); parts = read(tmp_path)
    assert recognise(tmp_path) == 'captions' and [len(s) for s in parts.values()] == [16, 2, 2] and captions_by_file(parts) == want and is_sound(tmp_path)
    splits.check_parts(parts); assert any('A thing , number' in l for l in info_layout(tmp_path))


@pytest.mark.parametrize('below', ['', 'flickr30k_images'])
def test_flickr30ks_results_with_bars(tmp_path, below):
    "Bars with blanks, quotes that mean nothing, commas, and the line of the published file that lacks its second bar"
    rows, want = ['image_name| comment_number| comment'], {}
    for i in range(20):
        name = f'{2000+i}.jpg'; paint(tmp_path/below/name, i); want[name] = [f'A man , "number {i}" seen {k} .' for k in range(5)]
        rows += [f'{name}| {k}{"| " if (i, k) != (7, 4) else "   "}{c}' for k, c in enumerate(want[name])]
    (tmp_path/'results.csv').write_text('\n'.join(rows) + '\n'); parts = read(tmp_path)
    assert recognise(tmp_path) == 'captions' and captions_by_file(parts) == want and is_sound(tmp_path)
    with pytest.warns(UserWarning, match='results.csv, line 41: no bar'): open_layout(tmp_path, 'train')
    assert captions_by_file(read(tmp_path, separator='|')) == want
    with pytest.raises(DataError, match='results.csv.*separator'): open_layout(tmp_path, 'train', separator='bar')


@pytest.mark.filterwarnings('ignore:.*a copy of')
@pytest.mark.parametrize('end', ['csv', 'jsonl'])
def test_hugging_faces_imagefolder(tmp_path, end):
    want = {}
    for p, n in dict(train=12, validation=4, test=4).items():
        for i in range(n): paint(tmp_path/p/f'{p}{i}.jpg', 10*i + n); want[f'{p}{i}.jpg'] = [f'a thing number {i} of {p}']
        lines = [json.dumps(dict(file_name=f'{p}{i}.jpg', text=f'a thing number {i} of {p}')) if end == 'jsonl' else f'{p}{i}.jpg,a thing number {i} of {p}' for i in range(n)]
        (tmp_path/p/f'metadata.{end}').write_text('\n'.join(lines if end == 'jsonl' else ['file_name,caption', *lines]) + '\n')
    parts = read(tmp_path); assert recognise(tmp_path) == 'imagefolder' and [len(s) for s in parts.values()] == [12, 4, 4] and captions_by_file(parts) == want
    assert all(Path(f).name.startswith(dict(val='validation').get(p, p)) for p, s in parts.items() for f in s.files) and is_sound(tmp_path)


def test_a_picture_in_val_and_in_test_is_said_one_of_train_is_refused(tmp_path):
    "The case that circulates has equal pictures in validation and test: that is a warning; a test picture that was trained on is not read at all"
    for p, n in dict(train=3, validation=2, test=2).items():
        for i in range(n): paint(tmp_path/p/f'{p}{i}.png', i + 10*(p == 'train'))
        (tmp_path/p/'metadata.csv').write_text('file_name,caption\n' + ''.join(f'{p}{i}.png,a thing\n' for i in range(n)))
    with pytest.warns(UserWarning, match='test0.png: a copy of validation/validation0.png'): open_layout(tmp_path, 'test')
    assert any(f.level == 'warning' and 'a copy of' in f.text for f in check_layout(tmp_path)) and is_sound(tmp_path)
    paint(tmp_path/'test'/'test0.png', 10)
    with pytest.raises(DataError, match='test0.png: a copy of train/train0.png'): open_layout(tmp_path, 'val')


def test_one_table_above_the_parts(tmp_path):
    for p in ('train', 'validation', 'test'): paint(tmp_path/p/'a.jpg', len(p))
    (tmp_path/'metadata.csv').write_text('file_name,caption\n' + ''.join(f'{p}/a.jpg,seen in {p}\n' for p in ('train', 'validation', 'test')))
    assert {p: s.captions for p, s in read(tmp_path).items()} == dict(train=['seen in train'], val=['seen in validation'], test=['seen in test'])
    (tmp_path/'metadata.csv').write_text((tmp_path/'metadata.csv').read_text() + 'b.jpg,no part\n')
    with pytest.raises(DataError, match='b.jpg in no part'): open_layout(tmp_path, 'train')


def test_columns_as_a_setting_says_them(tmp_path):
    for i in range(9): paint(tmp_path/f'{i}.png', i)
    (tmp_path/'captions.csv').write_text('photo;comment;part\n' + ''.join(f'{i}.png;seen {i};{PARTS[i//3]}\n' for i in range(9))); given = 'file=photo, caption=comment, split=part'
    assert [s.captions[0] for s in read(tmp_path, columns=given).values()] == ['seen 0', 'seen 3', 'seen 6'] == [s.captions[0] for s in read(tmp_path, columns=given, separator=';').values()]
    assert not [f for f in check_layout(tmp_path, columns=given) if f.level == 'error'] and len(info_layout(tmp_path, columns=given)) > 20
    with pytest.raises(DataError, match='columns='): open_layout(tmp_path, 'train')
    for wrong in ('file=photo;caption=comment', 'file', 'picture=photo,caption=comment', 'file=photo,file=comment', 'file=,caption=comment', 7):
        with pytest.raises(DataError, match='columns'): open_layout(tmp_path, 'train', columns=wrong)


# ---- how many captions

@pytest.fixture
def more_than_five(tmp_path):
    images, s = [], 0
    for i in range(60):
        paint(tmp_path/'images'/f'{i}.png', i); k = 7 if i % 9 == 0 else 6 if i % 9 == 4 else 5
        images.append(dict(filename=f'{i}.png', imgid=i, split=PARTS[(i >= 42) + (i >= 51)], sentences=[dict(raw=f'a thing number {i} seen {j}', sentid=s + j) for j in range(k)])); s += k
    (tmp_path/'dataset_tiny.json').write_text(json.dumps(dict(images=images, dataset='tiny'))); return tmp_path


@pytest.mark.parametrize('kw,want', [(dict(), (225, 48, 48)), (dict(max_captions=5), (210, 45, 45)), (dict(max_captions=5, captions_of_split='test'), (225, 48, 45)),
                                     (dict(max_captions=1, captions_of_split='train,val'), (42, 9, 48)), (dict(max_captions=6, captions_of_split='dev'), (225, 47, 48))])
def test_papers_rank_the_first_five_captions(more_than_five, kw, want):
    whole, parts = read(more_than_five), read(more_than_five, **kw); assert tuple(len(s.captions) for s in parts.values()) == want
    for p, s in parts.items():
        cut = kw.get('max_captions', 0) if p.replace('val', 'dev') in kw.get('captions_of_split', 'train,val,test').replace('val', 'dev') else 0
        own = {i: [(c, int(k)) for c, k, j in zip(whole[p].captions, whole[p].cap_ids, whole[p].img_of) if j == i][:cut or None] for i in range(len(s))}
        assert own == {i: [(c, int(k)) for c, k, j in zip(s.captions, s.cap_ids, s.img_of) if j == i] for i in range(len(s))}      # the first ones, under their own ids
    assert splits.fingerprint(parts['test']) != splits.fingerprint(whole['test']) or want[2] == 48


def test_more_than_five_captions_are_said(more_than_five):
    assert any('max_captions=5' in f.text for f in check_layout(more_than_five)) and not any('max_captions=5' in f.text for f in check_layout(more_than_five, max_captions=5))
    for wrong in (dict(max_captions=-1), dict(max_captions=2.), dict(max_captions=True), dict(max_captions=5, captions_of_split='tset'), dict(captions_of_split=5)):
        with pytest.raises(DataError, match='|'.join(wrong)) as e: open_layout(more_than_five, 'test', **wrong)
        assert 'dataset_tiny.json' in str(e.value)


# ---- SCAN's arrays without ids

@pytest.mark.parametrize('repeated', [False, True])
def test_scan_without_ids(tmp_path, repeated):
    "As SCAN's own loader reads them: captions / images each; validation and test may repeat every row for each sentence"
    r = np.random.default_rng(0); x = {}
    for p, n in dict(train=60, dev=20, test=20).items():
        x[p] = r.normal(size=(n, 4, 16)).astype('float32'); np.save(tmp_path/f'{p}_ims.npy', x[p].repeat(5, 0) if repeated and p != 'train' else x[p])
        (tmp_path/f'{p}_caps.txt').write_text(''.join(f'a {p} thing {i} seen {k}\n' for i in range(n) for k in range(5)))
    with pytest.warns(UserWarning, match='dev_ids.txt: not there; 20 images are counted, 5 sentences each'): s = open_layout(tmp_path, 'val')
    assert np.array_equal(s.feats, x['dev']) and s.captions[7] == 'a dev thing 1 seen 2' and s.img_of.tolist() == np.repeat(np.arange(20), 5).tolist()
    parts = read(tmp_path); splits.check_parts(parts); assert len(splits.concat(list(parts.values()))) == 100 and is_sound(tmp_path)
    assert len(scan_layout.read_scan(tmp_path, 'test', max_captions=3).captions) == 60
    with pytest.raises(DataError, match='no table'): scan_layout.read_scan(tmp_path, 'test', columns='file=x')


# ---- scripts

LANGUAGES = dict(hi=('एक कुत्ता समुद्र तट पर दौड़ रहा है', 8), bn=('একটি কুকুর দৌড়াচ্ছে', 3), te=('ఒక కుక్క పరిగెత్తుతోంది', 3), ar=('كلبٌ يجري على الشاطئ', 4), he=('כֶּלֶב רץ', 2),
                 ko=('개가 해변을 달린다', 3), vi=('một con chó chạy', 4), de=('Ein Hund läuft', 3), fr=("un chien court à l'eau", 5), ta=('ஒரு நாய் ஓடுகிறது', 3))

@pytest.mark.parametrize('lang', LANGUAGES)
def test_marks_stay_with_their_letters(lang):
    "As many words as stand between blanks, and nothing of a word is lost"
    s, n = LANGUAGES[lang]; plain = unicodedata.normalize('NFC', s).lower().replace("'", '')
    assert words(s) == plain.split() and len(words(s)) == n == len(Vocabulary.build([s])) - 4
    assert words(unicodedata.normalize('NFD', s)) == words(s) and run_together([s]) == 0


def test_marks_alone_are_no_words():
    assert words('a ❤️ dog ́ ⃣') == ['a', 'dog'] and words('٣ ١٢') == ['٣', '١٢'] and words('co\u00adop') == ['coop'] and words('می\u200cخواهم') == ['میخواهم']
    assert words('a;b é;ü') == ['a', ';', 'b', 'é', ';', 'ü']


@pytest.mark.parametrize('s', ['一只狗在海滩上奔跑', '犬が浜辺を走っている', 'สุนัขวิ่งบนชายหาด'])
def test_sentences_that_are_one_long_word_are_noticed(tmp_path, s):
    "And word pieces, which the message names, do cut them"
    assert run_together([s]) == 1 and len(words(s)) == 1
    with pytest.warns(UserWarning, match='word pieces'): Vocabulary.build([s]*10)
    for i in range(9): paint(tmp_path/f'{i}.png', i)
    (tmp_path/'captions.jsonl').write_text(''.join(json.dumps(dict(file=f'{i}.png', caption=s + str(i), split=PARTS[i//3])) + '\n' for i in range(9)))
    assert any(f.level == 'warning' and 'word pieces' in f.text for f in check_layout(tmp_path))
    pieces = Pieces.build([s, s[:4], s[3:], s + s]*5, 200); row, n = pieces.encode([s]); assert int(n[0]) >= 3 and 1 not in row[0].tolist()       # no [UNK]
    assert 1 not in pieces.encode([s*30])[0][0].tolist()                                  # nor for hundreds of letters without a blank


def test_pieces_keep_vowel_signs_and_drop_accents():
    pieces = Pieces.build([LANGUAGES[k][0] for k in ('hi', 'bn', 'te', 'he')]*5 + ['Café']*5, 400)
    joined = lambda s: ''.join(t.removeprefix('##') for t in pieces.show(s)[1:-1])
    for k in ('hi', 'bn', 'te', 'he'): assert unicodedata.normalize('NFC', joined(LANGUAGES[k][0])) == unicodedata.normalize('NFC', LANGUAGES[k][0]).replace(' ', '')
    assert joined('CAFÉ') == 'cafe'


# ---- scores from elsewhere

@pytest.fixture(scope='module')
def scores(tmp_path_factory):
    at = tmp_path_factory.mktemp('scores'); r = np.random.default_rng(0); of = np.repeat(np.arange(50), 5); S = r.normal(size=(50, 250)).astype('float32'); S[of, np.arange(250)] += 3
    nan = S.copy(); nan[3, 7] = np.nan; inf = np.where(S < -2, -np.inf, S).astype('float32')
    for name, x in dict(s=S, of=of, tie=np.zeros_like(S), nan=nan, half=S.astype('float16'), t=S.T.copy(), f=np.asfortranarray(S), inf=inf, big=S.astype('>f4'), wide=S.astype('>f8'), double=S.astype('f8'),
                        int=(S*1000).astype('int32'), q=S[:, :100], of_q=of[:100], some=S[:, ::7], of_some=of[::7]).items(): np.save(at/f'{name}.npy', x)
    return at, S, of

def row(at, name, of='of', **kw):
    values = resolve(parameters(template('evaluate')), dict(scores=str(at/f'{name}.npy'), img_of=str(at/f'{of}.npy'), arm=name) | kw)
    return foreign(values, at/'runs'/(name + of + ''.join(kw)), None)

def slow(S, of, gallery=None):
    "R@1 of both directions and mean rank of the photos, by loops; photos without a sentence are searched, but ask nothing"
    gallery = np.zeros(len(S), int) if gallery is None else gallery; t, i = [], []
    for j in range(S.shape[1]): t.append(sum(S[k, j] >= S[of[j], j] for k in range(len(S)) if k != of[j] and gallery[k] == gallery[of[j]]))
    for k in sorted(set(of.tolist())):
        best = max(S[k, j] for j in range(S.shape[1]) if of[j] == k); i.append(sum(S[k, j] >= best for j in range(S.shape[1]) if of[j] != k and gallery[of[j]] == gallery[k]))
    return [100*np.mean(np.array(t) == 0), np.mean(t) + 1, 100*np.mean(np.array(i) == 0), np.mean(i) + 1]

def numbers(rec): m = rec['metrics']['test']; return [m['t2i']['r1'], m['t2i']['meanr'], m['i2t']['r1'], m['i2t']['meanr']]


@pytest.mark.parametrize('name', ['s', 'half', 'f', 'big', 'wide', 'double', 'tie'])
def test_scores_in_every_form(scores, name):
    at, S, of = scores; rec = row(at, name); np.testing.assert_allclose(numbers(rec), slow(np.load(at/f'{name}.npy').astype('f8'), of), rtol=1e-9); assert 'unasked' not in rec['data']


@pytest.mark.parametrize('name,unasked', [('q', 30), ('some', 50 - len(set(np.repeat(np.arange(50), 5)[::7])))])
def test_some_questions_against_the_whole_gallery(scores, name, unasked, capsys):
    "Sentences search among all 50 photos; photos that nobody asks for are no queries; the record says how many"
    at, S, of = scores; x, own = np.load(at/f'{name}.npy'), np.load(at/f'of_{name}.npy'); rec = row(at, name, f'of_{name}')
    np.testing.assert_allclose(numbers(rec), slow(x.astype('f8'), own), rtol=1e-9)
    if unasked: assert rec['data']['unasked'] == unasked and rec['data']['images'] == 50 - unasked and f'{unasked} of 50 photos' in capsys.readouterr().out
    else: assert 'unasked' not in rec['data']
    assert rec['data']['captions'] == x.shape[1]


def test_other_photos_in_the_gallery_are_another_test_set(scores):
    at, S, of = scores; np.save(at/'few.npy', S[:20, :100]); alone, among = row(at, 'few', 'of_q'), row(at, 'q', 'of_q')
    assert alone['data']['fingerprint'] != among['data']['fingerprint'] and alone['metrics']['test']['t2i']['r1'] > among['metrics']['test']['t2i']['r1']


def test_galleries_with_photos_nobody_asks_for(scores):
    at, S, of = scores; g = np.arange(50) % 2; np.save(at/'g.npy', g); rec = row(at, 'q', 'of_q', gallery=str(at/'g.npy')); want = []
    for k in (0, 1): want.append(slow(S[g == k][:, :100][:, g[of[:100]] == k].astype('f8'), np.searchsorted(np.flatnonzero(g == k), of[:100][g[of[:100]] == k])))
    np.testing.assert_allclose(numbers(rec), np.mean(want, 0), rtol=1e-9); assert rec['data']['gallery'] == [10, 10] and rec['data']['unasked'] == 30


@pytest.mark.parametrize('name,said', [('nan', 'NaN'), ('inf', 'infinite'), ('t', 'whole numbers'), ('int', 'real numbers')])
def test_scores_that_cannot_be_ranked(scores, name, said):
    with pytest.raises(DataError, match=said): row(scores[0], name)
