"The sweeps on the strong base: equal searches, replicates, and a tiny run of one from end to end on made-up data"
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from itm_nb.runs.sweep_plan import read_sweep, trials
from itm_nb.training.config import check_method

ROOT = Path(__file__).parents[2]
SWEEPS = ROOT/'nbs'/'experiments'/'sweeps'
STRONG = dict(flickr8k_core=10, flickr8k_aoq=10, flickr8k_fne=10, flickr8k_models=5, flickr8k_quality=5, flickr8k_tags=5)


@pytest.mark.parametrize('name, blocks', STRONG.items())
def test_every_arm_has_the_same_search(name, blocks):
    spec = read_sweep(SWEEPS/f'{name}.yaml'); tried = trials(spec)
    searched = {a for a in spec['arms'] if a != 'warm' and not (name == 'flickr8k_core' and a.endswith('_published'))}
    assert tried.keys() == searched and {len(x) for x in tried.values()} == {12} and len(spec['blocks']) == blocks
    for x in (s for settings in tried.values() for s in settings): check_method(x.get('method', 'vsepp'))
    for own in spec['arms'].values(): check_method(own['method'])


def made_up_photos(at, n=dict(train=60, dev=20, test=20), d=8):
    "A folder in the SCAN layout: a photo is a noisy vector, and its captions name its largest entries"
    g = np.random.default_rng(0); at.mkdir()
    for part, k in n.items():
        x = g.normal(size=(k, 1, d)).astype('f4'); np.save(at/f'{part}_ims.npy', x)
        words = [[f'w{j}' for j in np.argsort(-v[0])[:3]] for v in x]
        said = [' '.join(g.permutation(w)) + f' {c}' for w in words for c in ('a', 'b', 'c', 'd', 'e')]
        (at/f'{part}_caps.txt').write_text('\n'.join(said) + '\n'); (at/f'{part}_ids.txt').write_text('\n'.join(map(str, range(k))) + '\n')
    return at


@pytest.mark.slow
@pytest.mark.parametrize('name, some', [('core', ('vsepp', 'aoq', 'glofnd')),
                                        ('tags', ('tags_random', 'tags_static', 'tags_static_fne'))])
def test_the_tiny_profile_from_end_to_end(tmp_path, name, some):
    "Search, choice, lists or stored sentences, and arms: some arms, two settings each, on photographs of noise"
    folder = made_up_photos(tmp_path/'photos')
    spec = yaml.safe_load((SWEEPS/f'flickr8k_{name}.yaml').read_text())
    spec['arms'] = {k: v for k, v in spec['arms'].items() if k in (*some, 'warm')}
    spec['profiles']['tiny'].pop('arms', None)
    spec['search']['arms'] = {k: [dict(zip(v, (x[-1] for x in v.values()))) | dict(lr=r) for r in (.001, .01)]
                              for k, v in spec['search']['arms'].items() if k in some}
    spec['profiles']['tiny'].update(batch=32)
    spec['search'].pop('block')
    (tmp_path/'own.yaml').write_text(yaml.safe_dump(spec, sort_keys=False))
    code = 'import sys; from itm_nb.cli import itm_sweep; sys.exit(itm_sweep())'
    given = [str(tmp_path/'own.yaml'), '--profile', 'tiny', '--runs', str(tmp_path/'runs'), '--jobs', '2',
             '-p', 'folder', str(folder)]
    done = subprocess.run([sys.executable, '-c', code, *given], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    recs = [json.loads(p.read_text()) for p in (tmp_path/'runs').glob('*/records/*.json')]
    found = {r['method']: r for r in recs if r['kind'] == 'run' and r['metrics'].get('test')}
    assert set(some) <= found.keys() and all(found[k]['search']['tried'] == 2 for k in some)
    if name == 'tags':
        stores = list((tmp_path/'runs').glob('*/*/sentences/sentences.json'))
        assert len(stores) == 1                       # written once, shared by search and arms
        said = json.loads((stores[0].parent.parent/'report.json').read_text())
        assert said['perplexity_own'] < 25 and all(said[k]['clean'] > 1 for k in ('generator', 'blind', 'random'))
