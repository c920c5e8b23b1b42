"""`itm_search`: a real server, asked by HTTP and by a socket that does not behave; a real browser where
there is one."""
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip('starlette', reason="the page needs the extra `app`: pip install 'itm_nb[app]'")
pytest.importorskip('uvicorn', reason="the page needs the extra `app`: pip install 'itm_nb[app]'")

from itm_nb.data.known_pairs import read_pairs
from itm_nb.data.prepare import prepare
from itm_nb.training.config import KNOWN, OF_CONFIG, config
from itm_nb.training.corpus import corpus
from itm_nb.training.fine_tune import fine_tune
from itm_nb.training.loop import fit, Inputs
from photos import folder_of, paint, tiny_clip

EVIL = '<img src=x onerror="document.title=1"> & <script>document.title=2</script>'


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "A run on 40 pictures, its page served by the real command; ended by Ctrl-C"
    at = tmp_path_factory.mktemp('search')
    folder_of(at/'photos', 36, 4)
    with open(at/'photos'/'captions.txt', 'a') as f:
        f.write('000.jpg,"' + EVIL.replace('"', '""') + '"\n')
    paint(at/'photos'/'silent.png', 500)
    paint(at/'outside.png', 501)
    os.symlink(at/'outside.png', at/'photos'/'link.png')
    tiny_clip(at/'models'/'tiny-clip')
    prepare(at/'photos')
    asked = {s.name: s.default for s in KNOWN.values()} | dict(model='tiny-clip', folder=str(at/'photos'),
        models=str(at/'models'),
                                                               method='vsepp', epochs=2,
        cache=str(at/'cache'))
    values, _ = fine_tune(asked, ['model', 'folder', 'models', 'method', 'epochs'])
    cfg = config({s.name: values[s.name] for s in OF_CONFIG})
    fit(cfg, at/'run', corpus(cfg, at/'photos', at/'cache', at/'models'), progress=False)
    env = os.environ | dict(PYTHONPATH=str(Path(__file__).parents[2]), HF_HUB_OFFLINE='1')
    p = subprocess.Popen([sys.executable, '-m', 'itm_nb', 'search', 'run', 'photos', '--models', 'models',
                          '--no-browser'], cwd=at, env=env,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = [p.stdout.readline(), p.stdout.readline()]
    assert 'pictures' in said[0] and said[1].startswith('http://127.0.0.1:'), (said, p.poll(),
        p.stderr.read() if p.poll() is not None else '')
    yield at, int(said[1].split(':')[2].split('/')[0])
    p.send_signal(signal.SIGINT)
    assert p.wait(60) == 0 and p.stderr.read() == ''


def ask(port, path, method='GET', body=None, **headers):
    c = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    c.request(method, path, body, {k.replace('_', '-'): v for k, v in headers.items()})
    r = c.getresponse()
    raw = r.read()
    return r.status, json.loads(raw) if r.getheader('content-type') == 'application/json' else raw


def raw(port, text):
    "The status line of a request that no client would send"
    with socket.create_connection(('127.0.0.1', port), 60) as s:
        s.sendall(text.encode())
        got = b''
        while part := s.recv(65536):
            got += part
    return got


def test_type_see_click_mark(served):
    at, port = served
    status, d = ask(port, '/api/find?q=it%20is%20003')
    names = [p['name'] for p in d['pictures']]
    # all parts, and the one without a word
    assert status == 200 and len(names) == 41 and 'silent.png' in names and 'link.png' not in names
    i = next(p['i'] for p in d['pictures'] if p['name'] == 'Images/000.jpg')
    status, one = ask(port, f'/api/picture/{i}?q=it%20is%20003')
    assert EVIL in one['sentences'] and len(one['like']) == 12 and [w['word'] for w in one['why']] == ['it',
        'is', '003']
    assert (one['negatives_title'] == 'Negatives it had in training'
            or one['negatives_title'] == 'Sentences of other pictures')
    n = one['negatives'][0]
    assert not n['marked'] and n['text'] not in one['sentences']
    said = dict(Origin=f'http://127.0.0.1:{port}', Content_Type='application/json')
    mark = json.dumps(dict(picture=i, sentence=n['sentence'], true=True))
    assert ask(port, '/api/mark', 'POST', mark, **said)[0] == 200
    assert read_pairs(at/'photos'/'false_negatives.csv') == [('Images/000.jpg', n['text'])]
    assert ask(port, f'/api/picture/{i}?q=')[1]['negatives'][0]['marked']
    status, jpeg = ask(port, f'/small/{i}.jpg')
    assert status == 200 and jpeg[:3] == b'\xff\xd8\xff' and jpeg == ask(port, f'/small/{i}.jpg')[1]


def test_what_was_marked_is_left_out_of_the_next_training(served):
    at, port = served
    cfg_run = at/'next'
    asked = {s.name: s.default for s in KNOWN.values()} | dict(model='tiny-clip', folder=str(at/'photos'),
        models=str(at/'models'), method='vsepp', epochs=1)
    values, _ = fine_tune(asked, ['model', 'folder', 'models', 'method', 'epochs'])
    cfg = config({s.name: values[s.name] for s in OF_CONFIG})
    train = corpus(cfg, at/'photos', at/'cache', at/'models').split('train')
    first, last = Path(train.files[0]).relative_to(at/'photos').as_posix(), train.captions[-1]
    (at/'marks.csv').write_text(f'image,caption\n{first},"{last}"\n')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        t = fit(cfg, cfg_run, corpus(cfg, at/'photos', at/'cache', at/'models'), progress=False,
                inputs=Inputs(known_false_negatives=at/'marks.csv'))
    assert 'known_false_negatives' in t.prints


def test_negatives_of_the_log_are_those_of_the_run(served):
    "By a loop over the log, for every training picture"
    from itm_nb.analysis.photo_index import negatives, open_index
    from itm_nb.training.loop import load_picks
    at, _ = served
    index = open_index(at/'run', at/'photos', at/'models')
    assert index.picked and index.method == 'vsepp'
    cfg = config({s.name: s.default for s in OF_CONFIG} | dict(data='images'))
    train = corpus(cfg, at/'photos').split('train')
    name = {int(k): Path(f).relative_to(at/'photos').as_posix() for k, f in zip(train.img_ids, train.files)}
    text = {int(k): c for k, c in zip(train.cap_ids, train.captions)}
    slow = {}
    for r in load_picks(at/'run'/'picks.bin'):
        i, j = (r['image'], r['other_caption']) if r['side'] == b'i2t' else (r['other_image'], r['caption'])
        slow.setdefault(name[int(i)], {}).setdefault(text[int(j)], []).append(float(r['score']))
    for i, f in enumerate(index.names):
        got = {r['text']: (r['times'], r['score']) for r in negatives(index, i, 1000)} if f in slow else {}
        want = {c: (len(s), max(s)) for c, s in slow.get(f, {}).items()}
        assert got.keys() == want.keys() and all(got[c][0] == want[c][0]
                                                 and abs(got[c][1] - want[c][1]) < 1e-6 for c in want)


def test_twenty_hostile_requests(served):
    at, port = served
    ok = f'Host: 127.0.0.1:{port}\r\nConnection: close\r\n'
    paths = ['/../../etc/passwd', '/small/../../../etc/passwd', '/small/..%2f..%2f..%2fetc%2fpasswd',
             '/small/%2e%2e/outside.png', '/photos/Images/000.jpg',
             '/small//etc/passwd', f'/{at}/outside.png', '/small/000.jpg%00.jpg', '/small/-1.jpg',
             '/small/99.jpg', '/small/link.png',
             '/large/' + '9'*4000 + '.jpg', '/static/../page.js', 'http://evil.example/', '/captions.txt',
             '/splits.json']
    got = [raw(port, f'GET {p} HTTP/1.1\r\n{ok}\r\n') for p in paths]
    assert not [g[:60] for g in got if b' 404 ' not in g[:40] and b' 400 ' not in g[:40]
                and b' 403 ' not in g[:40]
                and not (b' 200 ' in g[:40] and b'<title>Search pictures' in g)]
    assert not any(b'root:' in g or b'image,caption' in g or b'\xff\xd8\xff' in g for g in got)
    heads = ['Host: evil.example', f'Host: localhost.evil.example:{port}',
             f'Host: 127.0.0.1:{port}\r\nOrigin: http://evil.example',
             f'Host: 127.0.0.1:{port}\r\nOrigin: null',
             f'Host: 127.0.0.1:{port}\r\nSec-Fetch-Site: cross-site', '',
             f'Host: 127.0.0.1:{port}\r\nHost: evil.example']
    got = [raw(port, f'GET /api/find?q=x HTTP/1.1\r\n{h}\r\nConnection: close\r\n\r\n' if h
               else 'GET /api/find?q=x HTTP/1.0\r\n\r\n') for h in heads]
    assert not [g[:60] for g in got if b' 403 ' not in g[:40] and b' 400 ' not in g[:40]]
    posts = [raw(port, f'POST /api/mark HTTP/1.1\r\n{ok}{h}Content-Length: 48\r\n\r\n'
                 + '{"picture": 0, "sentence": 0, "true": true}     ')
             for h in ('', 'Content-Type: application/json\r\n',
                       f'Origin: http://127.0.0.1:{port}\r\nContent-Type: text/plain\r\n',
                       'Origin: http://evil.example\r\nContent-Type: application/json\r\n')]
    assert all(b' 403 ' in g[:40] for g in posts)
    assert len(paths) + len(heads) + len(posts) >= 20


def browser():
    "Debian's chromium, driven by playwright; skipped with the reason where one of them is missing"
    p = pytest.importorskip('playwright.sync_api', reason='no playwright: the page is tested by HTTP alone')
    path = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not path: pytest.skip('no chromium: the page is tested by HTTP alone')
    return p.sync_playwright, path


def test_in_a_browser(served):
    "Type, see, click, mark; captions are text: nothing of theirs runs"
    start, path = browser()
    at, port = served
    shots = Path(os.environ.get('ITM_SCREENSHOTS') or at)
    with start() as p:
        b = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        page = b.new_page(viewport=dict(width=1280, height=860))
        page.set_default_timeout(120_000)
        errors = []
        page.on('pageerror', lambda e: errors.append(str(e)))
        page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
        page.goto(f'http://127.0.0.1:{port}/')
        page.wait_for_selector('#grid .tile img')
        page.screenshot(path=shots/'search_first.png')
        page.fill('#query', 'it is 003')
        page.press('#query', 'Enter')
        page.locator('#about', has_text='the best').wait_for()
        page.locator('#grid .tile', has_text='Images/000.jpg').first.click()
        page.wait_for_selector('#one:not([hidden]) ul.negatives')
        assert EVIL in page.inner_text('#one') and page.title() == 'Search pictures'
        page.wait_for_timeout(500)
        page.screenshot(path=shots/'search_picture.png')
        boxes = page.locator('#one ul.negatives input')
        before = (len(read_pairs(at/'photos'/'false_negatives.csv'))
                  if (at/'photos'/'false_negatives.csv').exists() else 0)
        marked = boxes.last.is_checked()         # by a test before this one
        boxes.last.click()                       # the policy forbids eval, so nothing is polled by scripts
        page.locator('#about', has_text='known_false_negatives').wait_for()
        assert len(read_pairs(at/'photos'/'false_negatives.csv')) == before + 1 - 2*marked
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 || i.loading "
                             "== 'lazy')")
        page.screenshot(path=shots/'search_marked.png')
        b.close()
    assert not errors
