"""Pairs that somebody marked as true are never negatives; without a list nothing changes."""

import numpy as np
import pytest

from itm_nb.core.errors_files import DataError
from itm_nb.data.known_pairs import mark_pair
from itm_nb.training.config import config
from itm_nb.training.corpus import corpus
from itm_nb.training.loop import fit, Inputs, load_picks

TINY = dict(preset='tiny', dim=16, d_word=8, image_hidden=16, epochs=2, batch=50, dropout=0.)


@pytest.fixture(scope='module')
def world(tmp_path_factory): return corpus(config(TINY), cache=tmp_path_factory.mktemp('worlds'))


def pairs_of(run):
    "{(image, caption)} that were negatives, in either direction"
    p = load_picks(run/'picks.bin')
    i2t = p['side'] == b'i2t'
    images, captions = (np.where(i2t, p['image'], p['other_image']),
                        np.where(i2t, p['other_caption'], p['caption']))
    return set(zip(images.tolist(), captions.tolist()))


@pytest.mark.parametrize('method', ['vsepp', 'fne(queue=200,min_count=20)', 'margin_filter(queue=200)'])
def test_a_marked_pair_is_never_a_negative(world, tmp_path, method):
    cfg = config(TINY | dict(method=method))
    fit(cfg, tmp_path/'plain', world, progress=False)
    before, train = sorted(pairs_of(tmp_path/'plain')), world.split('train')
    text = {int(i): c for i, c in zip(train.cap_ids, train.captions)}
    marked = [p for p in before if p[1] in text][:40]
    for image, caption in marked:
        mark_pair(tmp_path/'list.csv', str(image), text[caption])
    inputs = Inputs(known_false_negatives=tmp_path/'list.csv')
    fit(cfg, tmp_path/'again', world, progress=False, inputs=inputs)
    said = {(i, text[c]) for i, c in marked}
    after = {(i, text[c]) for i, c in pairs_of(tmp_path/'again') if c in text}
    assert len(marked) == 40 and not said & after and len(after) > 40
    assert (tmp_path/'plain'/'log.jsonl').read_bytes() != (tmp_path/'again'/'log.jsonl').read_bytes()


def test_no_list_and_a_list_of_nothing_train_the_same(world, tmp_path):
    cfg = config(TINY | dict(method='infonce'))
    fit(cfg, tmp_path/'a', world, progress=False)
    (tmp_path/'list.csv').write_text('image,caption\n')
    fit(cfg, tmp_path/'b', world, progress=False, inputs=Inputs(known_false_negatives=tmp_path/'list.csv'))
    assert (tmp_path/'a'/'log.jsonl').read_bytes() == (tmp_path/'b'/'log.jsonl').read_bytes()


def test_infonce_leaves_a_marked_pair_out_of_the_softmax(world, tmp_path):
    "All sentences marked as true of all pictures: nothing is left to tell apart, so the loss is 0"
    train = world.split('train')
    lines = ''.join(f'{i},{c}\n' for i in train.img_ids[:200] for c in sorted(set(train.captions)))
    (tmp_path/'all.csv').write_text('image,caption\n' + lines)
    few = train.subset(np.arange(40))
    some = type(world)(**{**world.__dict__, 'split': lambda part: few if part == 'train'
                          else world.split(part)})
    t = fit(config(TINY | dict(method='infonce', epochs=1)), tmp_path/'run', some, progress=False,
            inputs=Inputs(known_false_negatives=tmp_path/'all.csv'))
    assert '"loss": 0.0' in (tmp_path/'run'/'log.jsonl').read_text() and t.step > 0


def test_another_list_is_another_run(world, tmp_path):
    "A run is not gone on with under another list, and its id is another"
    from itm_nb.core.project import template
    from itm_nb.runs.identity import run_id
    from itm_nb.runs.parameters import parameters, resolve
    cfg = config(TINY)
    a, b = tmp_path/'a.csv', tmp_path/'b.csv'
    mark_pair(a, str(world.split('train').img_ids[0]), world.split('train').captions[9])
    mark_pair(b, str(world.split('train').img_ids[1]), world.split('train').captions[9])
    fit(cfg, tmp_path/'run', world, progress=False, inputs=Inputs(known_false_negatives=a))
    with pytest.raises(DataError, match='other data'):
        fit(cfg, tmp_path/'run', world, progress=False, inputs=Inputs(known_false_negatives=b))
    known = parameters(template('train'))
    plain = resolve(known, {})
    ids = {run_id('train', plain | dict(known_false_negatives=str(x))) for x in ('', a, b)}
    copy = tmp_path/'elsewhere.csv'
    copy.write_bytes(a.read_bytes())
    assert len(ids) == 3 and run_id('train', plain | dict(known_false_negatives=str(copy))) in ids
