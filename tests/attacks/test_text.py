"""Text of other people in tables, pages and figures: a label is shown and obeyed by nobody, whatever it holds; names become files only where they belong."""
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from itm_nb.analysis import figures, search
from itm_nb.core.names import NAME, checked_name, escape_markup, escape_mathtext, slug
from itm_nb.methods.method import as_table
from itm_nb.runs.records import made_up_record, read_records, write_record
from itm_nb.analysis.audit import audit_markdown
from itm_nb.analysis.compare_runs import compare, find_run, scatter
from itm_nb.analysis.tables import differences, latex, markdown, table, write_table
from itm_nb.cli import itm_run

ROOT = Path(__file__).parent.parent.parent
NASTY = ['<script>alert(1)</script>', '$x_{$', '$\\frac{$', '$$', '\\$', 'a | b | c', '![x](http://a.example/b.png)', '[a](javascript:alert(1))', '`a`', '</td></tr></table><script>x</script>', '&lt;b&gt;', '<img src=x onerror=alert(1)>',
         '$\\def\\x{\\x}\\x$', '\\input{x}', '%', '_a_ *b*', 'é 犬 🐕', '<svg/onload=x>', 'a$b$c', '^{', '=cmd()', '../../etc', "it's", '"q"', '<!-- -->', 'x' * 300]


class Tags(HTMLParser):
    "Which elements a browser would make of a text"
    def __init__(self, text): super().__init__(); self.seen = []; self.feed(text); self.close()
    def handle_starttag(self, tag, attrs): self.seen.append(tag)
    def handle_comment(self, data): self.seen.append('comment')


@pytest.fixture
def drawn():
    "Draw a figure as a reader would see it, and hand back all of its texts"
    def f(fig):
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); fig.canvas.draw()        # a font may lack a sign
        return [t.get_text() for t in fig.findobj(plt.Text)]
    yield f
    plt.close('all')


def records(nasty, n=2):
    "Runs whose method and data set are called so"
    more = dict(curves=dict(epoch=[0, 1], val_rsum=[1., 2.], loss=[1., .5], clipped=[0., 0.]), search=dict(val=[1., 2.], best_of=[1.5, 2.]))
    recs = [made_up_record(nasty, 1., seed, **more) for seed in range(n)]
    for r in recs: r['data']['label'] = nasty
    return recs


@pytest.mark.parametrize('text', NASTY)
def test_a_table_is_a_table(text, tmp_path):
    "No element, no picture, no link, no further cell; in .md and in the page"
    recs = records(text); base = [made_up_record('base', 1., s) for s in range(2)]
    for r in base: r['data']['label'] = text
    for tab in (table(recs, [text], draws=20), differences(recs + base, [text], 'base', draws=20)):
        md = write_table(tab, tmp_path/'t')[1].read_text(); rows = [l for l in md.splitlines() if l.startswith('|')]
        assert not Tags(md).seen and not re.search(r'!?\[[^\]]*\]\([^)]*\)', md) and len({len(re.findall(r'(?<!\\)\|', l)) for l in rows}) == 1, md
        tex = latex(tab).splitlines(); said = [l for l in tex if not l.startswith('%')]; assert len(tex) - len(said) == 1 and not any('\\input{' in l for l in said)
    assert not Tags(as_table([dict(who=text, x=1.)])).seen and as_table([dict(who=text)]).count('\n') == 2
    rows = pd.DataFrame([dict(side=s, rule='', sampler=text, hardness=1., violating=1., top1=1.) for s in ('i2t', 't2i')]); assert not Tags(audit_markdown(rows)).seen


@pytest.mark.parametrize('text', NASTY)
def test_a_figure_shows_what_stands_there(text, drawn, tmp_path):
    "Titles, ticks, legends and notes; as a file the SVG holds no element of the text's"
    recs = records(text); control = made_up_record(text + '!', 3., kind='control'); control['data']['label'] = text
    made = [figures.dots(recs + [control], [text], controls=[text + '!'], draws=20), figures.curves(recs, [text]), figures.recall_curve(recs, [text]), figures.searched(recs, [text])]
    floor = pd.DataFrame([dict(test=text, se_matched=1., se_same_photos=1., se_other_photos=1.)]); made.append(figures.above_floor(floor, pd.DataFrame(dict(step=[1.], test=[text]))))
    for fig in made:
        seen = drawn(fig); assert any(escape_mathtext(text) in t for t in seen), seen
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); svg = figures.save_figure(made[0], tmp_path/'f')[0].read_text()
    assert not {'script', 'img', 'table'} & set(Tags(re.sub('<!--.*?-->', '', svg, flags=re.S)).seen) and '<script' not in svg


@pytest.mark.parametrize('text', NASTY)
def test_the_words_of_a_query_are_words(text, drawn):
    fig, ax = plt.subplots(); said = text.split() or [text]; search.bars(ax, said, np.ones(len(said))); seen = drawn(fig); assert all(escape_mathtext(w) in seen for w in said)


def test_two_runs_with_such_names_are_compared(drawn, tmp_path):
    a, b = (find_run(write_record(tmp_path, r)) for r in records('$x_{$'))
    drawn(scatter(compare(a, b), ['$x_{$', '<script>$']))


@pytest.mark.parametrize('text', NASTY)
def test_escaped_text_is_read_as_it_stood(text):
    import html
    assert html.unescape(escape_markup(text)) == text and not Tags(escape_markup(text)).seen and '|' not in escape_markup(text)
    assert re.fullmatch(NAME[1:-1], slug(text)) and slug(text)[0] != '.'


def test_every_name_that_is_committed_passes_the_door():
    recs = read_records(ROOT/'figures'/'results'); assert len(recs) > 1000
    for r in recs: checked_name(r['sweep'], 'record'); checked_name(r['config'].get('arm') or 'a', 'record', blanks=True)
    assert slug('vse0 regions') == 'vse0_regions' and len({slug(r['method']) for r in recs}) == len({r['method'] for r in recs})


def test_a_page_of_such_records_writes_where_it_should(tmp_path, monkeypatch):
    "The report of a sweep with a nasty label and arm: files in `figures` alone, no element of theirs in any"
    nasty = '<script>x</script> $x_{$ a/../../b'
    for r in records(nasty, 3): write_record(tmp_path/'r', r)
    for r in (made_up_record('vse0', .5, s) for s in range(3)): r['data']['label'] = nasty; r['curves'] = dict(epoch=[0, 1], val_rsum=[1., 2.]); write_record(tmp_path/'r', r)
    before = {p for p in tmp_path.rglob('*')}
    assert itm_run(['study', '-p', 'records', str(tmp_path/'r'), '-p', 'figures', str(tmp_path/'deep'/'figures'), '-p', 'out', str(tmp_path/'out'), '-p', 'base', 'vse0', '--quiet']) == 0
    new = {p for p in tmp_path.rglob('*') if p.is_file()} - before; assert new and all((tmp_path/'deep'/'figures') in p.parents or (tmp_path/'out') in p.parents for p in new)
    for p in (p for p in new if p.suffix in ('.md', '.html', '.svg')): assert '<script>' not in p.read_text('utf-8'), p.name
    assert any(p.suffix == '.md' for p in new) and any(p.suffix == '.svg' for p in new)


@pytest.mark.parametrize('name', ['x/../../y', '..', '.hidden', 'a b', '<script>'])
def test_a_sweep_that_is_no_name_starts_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); assert itm_run(['train', '-p', 'sweep', name, '-p', 'preset', 'tiny', '--quiet']) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not list(tmp_path.iterdir())
