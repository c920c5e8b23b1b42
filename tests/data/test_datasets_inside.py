"""A data set of the package `datasets` with its pictures inside, written by the real package."""

import json
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
