"""The site: no warning, no broken link, nothing from the network. Partly skipped without the extra `docs`."""
import importlib.util
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import conftest
from itm_nb.analysis import site

ROOT = Path(__file__).parent.parent.parent
ABSENT = [x for x in ('sphinx', 'myst_nb', 'sphinx_design', 'pydata_sphinx_theme', 'latex2mathml')
          if importlib.util.find_spec(x) is None]
docs = pytest.mark.skipif(bool(ABSENT), reason=f'the extra docs is absent: {", ".join(ABSENT)}')


def test_sources_have_a_page_for_everything(tmp_path):
    "Links of every page lead somewhere (else this raises); every page says where it comes from"
    found = site.write_sources(ROOT, tmp_path)
    books = {p for p in found.notebooks if p not in ('nbs/index.ipynb', 'nbs/results.ipynb')}
    assert len(books) > 80 and all((tmp_path/p).is_file() for p in books)
    for p in books:
        cells = json.loads((tmp_path/p).read_text('utf-8'))['cells']
        assert f'Made from the notebook `{p}`' in cells[0]['source'], p
        lines = [x for c in cells if c['cell_type'] == 'code' for x in c['source'].splitlines()]
        assert not any(x.startswith('#|') for x in lines), f'{p}: a line for nbdev is shown'
    assert len(list((tmp_path/'api').rglob('*.md'))) >= len(found.modules)
    start = (tmp_path/'index.md').read_text('utf-8')
    assert start.count('![') == 1
    assert all(f'grid-item-card}} {door}' in start for door in ('Read', 'Run', 'Use'))


@pytest.mark.parametrize('folder', [*(p.name for p in (ROOT/'nbs').glob('[0-9]_*') if p.is_dir()), 'guides'])
def test_a_first_cell_says_what_to_expect(folder):
    "Why, what to read before, and how long on a CPU"
    for p in sorted((ROOT/'nbs'/folder).glob('*.ipynb')):
        first = ''.join(json.loads(p.read_text('utf-8'))['cells'][0]['source'])
        assert '**Read before**' in first and 'CPU' in first, p.name
        assert '**Why**' in first or '**At the end you have**' in first, p.name


def test_a_page_of_results_says_what_to_read_before():
    for p in sorted((ROOT/'nbs'/'experiments').glob('*.ipynb')):
        first = ''.join(json.loads(p.read_text('utf-8'))['cells'][0]['source'])
        assert '**Read before**' in first, p.name


def test_no_page_names_a_machine(tmp_path):
    site.write_sources(ROOT, tmp_path)
    for p in tmp_path.rglob('*.md'):
        assert str(ROOT) not in p.read_text('utf-8') and 'file://' not in p.read_text('utf-8'), p.name


@docs
def test_every_formula_is_read():
    "As MathML, without a word of TeX left over"
    import re
    for p, book in site.find(ROOT).notebooks.items():
        for c in book['cells']:
            if c['cell_type'] != 'markdown': continue
            for tex in re.findall(r'\$\$?([^$`]+)\$\$?', ''.join(c['source'])):
                made = site.mathml(tex)
                assert made.startswith('<math') and '\\' not in made, f'{p}: {tex}'


@docs
def test_a_formula_that_cannot_be_read_is_refused():
    for tex in (r'\frac{1', 'x^2^3', r'\nosuchword{x}', r'\left( a'):
        with pytest.raises(ValueError, match='cannot be read'):
            site.mathml(tex)
    assert site.mathml(r'\{a\}').count('<mo ') == 2


def test_a_name_is_shown_with_its_own_value(tmp_path):
    "Of `a, b = 1, 2` each name has its part"
    import ast
    from itm_nb.analysis.api_pages import _own_value
    for line, want in (("a, b = 'x', {1: 2}", dict(a="'x'", b='{1: 2}')), ('a = 1, 2', dict(a='(1, 2)')),
                       ('a, b = f()', dict(a='f()', b='f()')), ('a: int = 3', dict(a='3'))):
        node, = ast.parse(line).body
        assert {k: ast.unparse(_own_value(node, k)) for k in want} == want
    site.write_sources(ROOT, tmp_path)
    page = (tmp_path/'api'/'runs'/'run_folder.md').read_text('utf-8')
    assert 'BUSY = 76' in page and 'RESUMABLE = 75' in page and 'BUSY = (' not in page


def test_pages_beside_which_nothing_stands_are_pages(tmp_path):
    "Their names are those of pages that are written; only pages without pages below them"
    from itm_nb.analysis.site import _ALONE, _settings
    site.write_sources(ROOT, tmp_path)
    for name in _settings(ROOT)['html_sidebars']:
        assert any((tmp_path/f'{name}{end}').is_file() for end in ('.md', '.ipynb')), name
    assert len(_ALONE) == 7 and 'toctree' not in (tmp_path/'gallery.md').read_text('utf-8')


@docs
@pytest.mark.slow
def test_the_site_is_built_without_a_warning(monkeypatch, capsys):
    assert site.itm_docs(['--out', '_docs']) == 0
    told = capsys.readouterr().out
    assert ' 0 warnings,' in told and ' 0 broken,' in told
    assert (ROOT/'_docs'/'searchindex.js').is_file()


def test_files_that_begin_first_are_there():
    assert all((ROOT/'tests'/f).is_file() for f in conftest.LONG)
    queue = sorted(['tests/test_house.py::a', 'tests/runs/test_warm.py::b', 'tests/runs/test_kills.py::c'],
                   key=conftest.place_of)
    assert [x[-1] for x in queue] == ['c', 'b', 'a']


def test_counts_of_a_report(tmp_path):
    said = lambda f: SimpleNamespace(nodeid=f'{f}::test_x')
    a, b = said('tests/a.py'), said('tests/b.py')
    stats = dict(passed=[a, a], failed=[b], warnings=[said('x')])
    found = conftest.counts(stats)
    one, two = dict(passed=2, skipped=0, failed=0), dict(passed=0, skipped=0, failed=1)
    assert found == {'tests/a.py': one, 'tests/b.py': two}
    for name in ('tests', 'figures'): (tmp_path/name).mkdir()
    for name in ('tests/a.py', 'tests/b.py'): (tmp_path/name).touch()
    at = tmp_path/'figures'/'tests.json'
    conftest.write_report(at, found, 'one')
    conftest.write_report(at, {'tests/b.py': dict(passed=1, skipped=0, failed=0)}, 'two')
    kept = json.loads(at.read_text())
    assert kept['tests/b.py'] == dict(passed=1, skipped=0, failed=0, commit='two')
    assert kept['tests/a.py']['commit'] == 'one'
    (tmp_path/'tests'/'a.py').unlink()
    conftest.write_report(at, {}, 'three')
    assert list(json.loads(at.read_text())) == ['tests/b.py']


def committed(name):
    "The text of a file as it is committed"
    done = subprocess.run(['git', 'show', f'HEAD:{name}'], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f'{name} is not committed here')
    return done.stdout


def test_the_committed_page_shows_the_committed_counts():
    "`.ci/how_sure` writes both"
    counted = json.loads(committed('figures/tests.json'))
    page = [''.join(o['data']['text/markdown']) for c in json.loads(committed('nbs/how_sure.ipynb'))['cells']
            for o in c.get('outputs', ()) if 'text/markdown' in o.get('data', {})]
    commit, = {r['commit'] for r in counted.values()}
    hostile = [r for f, r in counted.items() if f.startswith('tests/attacks/')]
    numbers = ' | '.join(str(sum(r[k] for r in hostile)) for k in ('passed', 'skipped', 'failed'))
    assert sum(f'Reports of commit: {commit}.' in t for t in page) == 2
    assert any(f'| hostile files and texts | {numbers} |' in t for t in page)


@pytest.mark.parametrize('report, why', (
    ({'tests/test_house.py': 'a'}, 'not of a full run'),
    ({p.relative_to(ROOT).as_posix(): str(len(p.name)) for p in (ROOT/'tests').rglob('test_*.py')},
     'run all tests at one')))
def test_a_report_of_a_part_or_of_several_commits_is_refused(tmp_path, report, why):
    found = {f: dict(passed=1, skipped=0, failed=0, commit=c) for f, c in report.items()}
    (tmp_path/'tests.json').write_text(json.dumps(found))
    page = ROOT/'nbs'/'how_sure.ipynb'
    before = page.read_bytes(), (ROOT/'figures'/'tests.json').exists()
    done = subprocess.run([ROOT/'.ci'/'how_sure', tmp_path/'tests.json'], capture_output=True, text=True)
    assert done.returncode == 1 and why in done.stderr
    assert (page.read_bytes(), (ROOT/'figures'/'tests.json').exists()) == before
