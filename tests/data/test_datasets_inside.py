"""A data set of the package `datasets` with its pictures inside, written by the real package: by
`save_to_disk`, and in the cache of `load_dataset`."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

datasets = pytest.importorskip('datasets', reason="no datasets: pip install 'itm_nb[data]'")

from itm_nb.core.errors_files import DataError
from itm_nb.data.layouts import open_layout, recognise
from itm_nb.data.prepare import prepare
from photos import paint


def pictures(at, n=12):
    for i in range(n):
        paint(at / f'{i}.png', i)
    return [at / f'{i}.png' for i in range(n)]


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = pictures(tmp_path / 'files')
    as_names = {
        k: datasets.Dataset.from_dict(
            dict(
                image=[dict(bytes=f.read_bytes(), path=None) for f in (*mine, mine[0])],
                caption=[
                    *([f'it is {f.stem}', f'a picture, {f.stem}'] for f in mine),
                    [f'again {mine[0].stem}'],
                ],
            )
        ).cast_column('image', datasets.Image())
        for k, mine in (('train', files[0::3]), ('validation', files[1::3]), ('test', files[2::3]))
    }
    datasets.DatasetDict(as_names).save_to_disk(str(tmp_path / 'set'))
    return tmp_path / 'set', files


def test_pictures_inside_are_the_pictures(inside):
    at, files = inside
    before = {p: p.read_bytes() for p in at.rglob('*') if p.is_file()}
    assert recognise(at) == 'datasets'
    # without the files that they were made of
    bytes_of = [f.read_bytes() for f in files]
    for f in files:
        f.unlink()
    for k, part in enumerate(('train', 'val', 'test')):
        s = open_layout(at, part)
        assert [Path(f).read_bytes() for f in s.files] == bytes_of[k::3]
        first = s.captions[:3]
        assert (
            sorted(first) == sorted([f'it is {k}', f'a picture, {k}', f'again {k}'])
            and len(s.captions) == 9
        )
        assert (np.bincount(s.img_of) == [3, 2, 2, 2]).all()
    kept = list(Path('runs/pictures').rglob('*.png'))
    stamps = {p: p.stat().st_mtime_ns for p in kept}
    assert len(kept) == 12 and all(Image.open(p).size == (96, 72) for p in kept)
    open_layout(at, 'train')
    assert {p: p.stat().st_mtime_ns for p in kept} == stamps
    assert {p: p.read_bytes() for p in at.rglob('*') if p.is_file()} == before


def test_it_can_be_prepared(inside):
    at, files = inside
    prepare(at)
    note = json.loads((at / 'splits.json').read_text())
    assert note['layout'] == 'datasets' and sum(map(len, note['parts'].values())) == 12
    assert sum(len(open_layout(at, p)) for p in ('train', 'val', 'test')) == 12


@pytest.mark.parametrize('raw, match', ((b'', 'no picture inside'), (b'<script>', 'no picture')))
def test_a_row_without_a_picture_is_one_clear_error(tmp_path, monkeypatch, raw, match):
    monkeypatch.chdir(tmp_path)
    (good,) = pictures(tmp_path / 'files', 1)
    rows = dict(
        image=[dict(bytes=good.read_bytes(), path=None), dict(bytes=raw, path=None)], caption=['a', 'b']
    )
    d = datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(image=datasets.Image(decode=False), caption=datasets.Value('string')),
    )
    datasets.DatasetDict(train=d).save_to_disk(str(tmp_path / 'set'))
    with pytest.raises(DataError, match=match):
        open_layout(tmp_path / 'set', 'train')


# the cache of `load_dataset`, made by the real package from a folder without a script; read without a network


PARTS = dict(train=range(6), dev=range(6, 9), test=range(9, 12))
THEIRS = dict(train='train', dev='validation', test='test')


@pytest.fixture(scope='module')
def cached(tmp_path_factory):
    "(home of the cache, bytes of the pictures): parquet files with pictures inside, as most at the Hub are"
    at = tmp_path_factory.mktemp('hub')
    raw = [f.read_bytes() for f in pictures(at / 'files')]
    (at / 'BirdsAtHome').mkdir()
    for part, mine in PARTS.items():
        rows = dict(
            image=[dict(bytes=raw[i], path=f'{i}.png') for i in mine],
            caption=[[f'it is {i}', f'seen again, {i}'] for i in mine],
        )
        d = datasets.Dataset.from_dict(rows).cast_column('image', datasets.Image())
        d.to_parquet(str(at / 'BirdsAtHome' / f'{THEIRS[part]}.parquet'))
    datasets.load_dataset(str(at / 'BirdsAtHome'), cache_dir=str(at / 'datasets'))
    return at / 'datasets', raw


@pytest.fixture
def home(cached, tmp_path, monkeypatch):
    "That cache as the package's own, in a folder where nothing else lies"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_DATASETS_CACHE', str(cached[0]))
    return cached


def test_a_data_set_of_the_hub_is_read_from_the_cache_by_its_name(home, monkeypatch):
    cache, raw = home
    for part, mine in PARTS.items():
        s = open_layout('BirdsAtHome', part)
        assert [Path(f).read_bytes() for f in s.files] == [raw[i] for i in mine]
        assert s.captions == [c for i in mine for c in (f'it is {i}', f'seen again, {i}')]
    # as the package itself reads it offline
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    theirs = datasets.load_dataset('BirdsAtHome', cache_dir=str(cache))
    for part, mine in PARTS.items():
        rows = theirs[THEIRS[part]].cast_column('image', datasets.Image(decode=False))
        s = open_layout('BirdsAtHome', part)
        assert [r['bytes'] for r in rows['image']] == [Path(f).read_bytes() for f in s.files]
        assert [c for said in rows['caption'] for c in said] == s.captions


def test_names_in_the_cache_are_those_of_the_package():
    from datasets.naming import camelcase_to_snakecase
    from itm_nb.data.layouts import _of_hub

    for name in ('anna/BirdsAtHome', 'coco', 'HuggingFaceM4/COCO', 'x/HTTPServer2Go', 'a.b/c-d_e.F', 'A1b/Ab1C'):
        *owner, last = name.split('/')
        assert _of_hub(name) == '___'.join([*owner, camelcase_to_snakecase(last)])
    assert not any(map(_of_hub, ('../x', 'a/b/c', '/etc', '.', '', 'a b', '-x', 'a/../b', 'a\n')))


def test_a_name_with_an_owner_a_path_and_every_level_of_it(home, tmp_path, monkeypatch):
    cache, _ = home
    own = tmp_path / 'cache'
    shutil.copytree(cache / 'birds_at_home', own / 'anna___birds_at_home')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(own))
    (deep,) = own.glob('*/*/*/*/dataset_info.json')
    for name in ('anna/BirdsAtHome', *deep.parents[:4]):
        assert recognise(name) == 'datasets' and len(open_layout(name, 'train')) == 6
    # elsewhere the innermost folder alone is taken for what it is
    shutil.copytree(deep.parent, tmp_path / 'moved')
    assert len(open_layout(tmp_path / 'moved', 'test')) == 3
    with pytest.raises(DataError, match='no such folder'):
        open_layout('anna/others', 'train')


def test_the_newest_version_and_one_config(home, tmp_path, monkeypatch):
    cache, _ = home
    own = tmp_path / 'cache'
    shutil.copytree(cache / 'birds_at_home', own / 'birds_at_home')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(own))
    (old,) = [p for p in own.glob('*/*/*/*') if p.is_dir()]
    new = old.with_name('zz_new')
    shutil.copytree(old, new)
    for age, at in ((100, old), (50, new)):
        os.utime(at, (1e9 - age, 1e9 - age))
    assert open_layout('BirdsAtHome', 'train').source == str(new)
    os.utime(old, (1e9, 1e9))
    assert open_layout('BirdsAtHome', 'train').source == str(old)
    shutil.copytree(old.parents[1], old.parents[2] / 'large')
    with pytest.raises(DataError, match='2 configs, default, large'):
        open_layout('BirdsAtHome', 'train')
    assert len(open_layout(old.parents[2] / 'large', 'train')) == 6


@pytest.mark.parametrize(
    'harm, match',
    (
        (lambda at: next(at.glob('*-train.arrow')).unlink(), '0 rows of train'),
        (lambda at: (at / 'dataset_info.json').write_text('{}'), 'no splits'),
        (lambda at: (at / 'dataset_info.json').write_text('{'), 'dataset_info.json'),
        (lambda at: next(at.glob('*-train.arrow')).write_bytes(b'no arrow'), 'cannot be loaded'),
        (
            lambda at: shutil.copy(next(at.glob('*-test.arrow')), next(at.glob('*-train.arrow'))),
            '3 rows of train',
        ),
    ),
)
def test_a_damaged_cache_is_one_clear_error(home, tmp_path, harm, match):
    (deep,) = home[0].glob('*/*/*/*/dataset_info.json')
    shutil.copytree(deep.parent, tmp_path / 'copy')
    harm(tmp_path / 'copy')
    with pytest.raises(DataError, match=match):
        open_layout(tmp_path / 'copy', 'train')


def test_pictures_that_lie_elsewhere_are_one_clear_error(tmp_path, monkeypatch):
    "A folder of picture files in the cache names them by their paths: nothing outside the data set is read"
    monkeypatch.chdir(tmp_path)
    for part, mine in PARTS.items():
        for i in mine:
            paint(tmp_path / 'birds' / THEIRS[part] / f'{i}.png', i)
        lines = [json.dumps(dict(file_name=f'{i}.png', caption=f'it is {i}')) for i in mine]
        (tmp_path / 'birds' / THEIRS[part] / 'metadata.jsonl').write_text('\n'.join(lines))
    datasets.load_dataset(str(tmp_path / 'birds'), cache_dir=str(tmp_path / 'cache'))
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    (deep,) = (tmp_path / 'cache').glob('*/*/*/*/dataset_info.json')
    with pytest.raises(DataError, match='a picture that lies elsewhere, .*birds/train/0.png'):
        open_layout(deep.parent, 'train')
    # that folder itself can be read
    assert len(open_layout('birds', 'train')) == 6


def test_commands_take_the_name(home, tmp_path, monkeypatch, capsys):
    from itm_nb.cli import itm_data
    from itm_nb.core.commands import SetupError
    from itm_nb.core.project import template
    from itm_nb.runs.parameters import check_places, parameters

    own = tmp_path / 'cache'
    shutil.copytree(home[0], own)
    monkeypatch.setenv('HF_DATASETS_CACHE', str(own))
    assert itm_data(['info', 'BirdsAtHome']) == 0 and 'layout: datasets' in capsys.readouterr().out
    assert itm_data(['prepare', 'BirdsAtHome']) == 0 and '12 pictures, 24 captions' in capsys.readouterr().out
    known = parameters(template('train'))
    check_places(known, dict(folder='BirdsAtHome', data='images'))
    with pytest.raises(SetupError, match='no such folder'):
        check_places(known, dict(folder='OwlsAtHome', data='images'))
    assert itm_data(['info', 'OwlsAtHome']) == 2 and 'no such folder' in capsys.readouterr().err
