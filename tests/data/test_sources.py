"""Fetching, against a server that breaks lines, knows no Range, sends another file or nothing; full disks; archives that want out; the Hub."""
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from itm_nb.core.errors_files import DataError
from itm_nb.data.download import SOURCES, download, File, get, Source, unpack, verify

ROOT = Path(__file__).parents[2]
ENV = os.environ | dict(PYTHONPATH=str(ROOT), no_proxy='*')
DATA = np.random.default_rng(0).bytes(700_000)
SHA = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    "Files, and how it misbehaves: `drops` lines after so many bytes, no Range, statuses to give first"
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Answer)
        self.files, self.drops, self.status, self.asked = {'/f.bin': DATA}, [], [], []
        self.ranges, self.tags, self.slow, self.moved = True, True, 0., {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def url(self, path): return f'http://127.0.0.1:{self.server_port}{path}'


class Answer(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *a): pass

    def do_GET(self):
        s = self.server; data = s.files.get(self.path); s.asked.append(self.headers.get('Range')); start = 0
        if self.path in s.moved: self.send_response(302); self.send_header('Location', s.moved[self.path]); self.send_header('Content-Length', '0'); self.end_headers(); return
        if s.status or data is None: self.send_error(s.status.pop(0) if s.status else 404); return
        tag = f'"{hashlib.md5(data).hexdigest()}"'; want = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or '')
        if want and s.ranges and self.headers.get('If-Range') == tag:
            start = int(want[1])
            if start >= len(data): self.send_response(416); self.send_header('Content-Range', f'bytes */{len(data)}'); self.send_header('Content-Length', '0'); self.end_headers(); return
            self.send_response(206); self.send_header('Content-Range', f'bytes {start}-{len(data)-1}/{len(data)}')
        else: self.send_response(200)
        if s.tags: self.send_header('ETag', tag)
        self.send_header('Content-Length', str(len(data)-start)); self.end_headers()
        stop = s.drops.pop(0) if s.drops else len(data)
        for a in range(start, stop, 1 << 16):
            try: self.wfile.write(data[a:min(a + (1 << 16), stop)]); time.sleep(s.slow)
            except OSError: return
        if stop < len(data): self.wfile.flush(); self.close_connection = True; self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server():
    s = Server(); yield s
    s.shutdown(); s.server_close()


def take(server, folder, path='/f.bin', **kw): return download(server.url(path), folder/'f.bin', **dict(pause=.01, tries=4) | kw)


def test_a_line_that_breaks_three_times(server, tmp_path):
    "Every request goes on where the last one ended; the hash is that of the whole"
    server.drops = [200_000, 350_000, 600_000]
    assert take(server, tmp_path, sha256=SHA).read_bytes() == DATA
    starts = [int(r[6:-1]) if r else 0 for r in server.asked]
    assert starts[0] == 0 and len(starts) == 4 and starts == sorted(starts) and all(a > b - (1 << 16) - 1 for a, b in zip(starts[1:], (200_000, 350_000, 600_000)))
    assert [p.name for p in tmp_path.iterdir()] == ['f.bin']


def test_gone_on_with_in_another_process_after_a_kill(server, tmp_path):
    "SIGKILL in the middle: what had come is kept, nothing has the file's name, and the next command asks for the rest alone"
    server.slow = .1; code = f'from itm_nb.data.download import download; download({server.url("/f.bin")!r}, {str(tmp_path/"f.bin")!r})'
    p = subprocess.Popen([sys.executable, '-c', code], env=ENV); part = tmp_path/'f.bin.part'
    while not (part.is_file() and part.stat().st_size > 200_000): assert p.poll() is None; time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait(); n = part.stat().st_size
    assert 0 < n < len(DATA) and not (tmp_path/'f.bin').exists()
    server.slow = 0.; assert take(server, tmp_path, sha256=SHA).read_bytes() == DATA and server.asked[-1] == f'bytes={n}-'


def test_a_server_without_range_starts_over(server, tmp_path):
    server.drops, server.ranges = [300_000], False
    assert take(server, tmp_path, sha256=SHA).read_bytes() == DATA and len(server.asked) == 2


def test_a_server_that_names_no_version_starts_over(server, tmp_path):
    server.drops, server.tags = [300_000], False
    assert take(server, tmp_path).read_bytes() == DATA and server.asked == [None, None]


def test_another_file_under_the_same_name_is_not_joined(server, tmp_path):
    "The beginning of one version and the end of another are no file"
    server.drops = [300_000]
    with pytest.raises(DataError): take(server, tmp_path, tries=1)
    server.files['/f.bin'] = new = DATA[::-1]
    assert take(server, tmp_path).read_bytes() == new


def test_a_wrong_hash_is_refused(server, tmp_path):
    with pytest.raises(DataError, match='Another version or a damaged file'): take(server, tmp_path, sha256='ab'*32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['f.bin.part.version', 'f.bin.refused'] or sorted(p.name for p in tmp_path.iterdir()) == ['f.bin.refused']
    with pytest.raises(DataError, match='any number of|wanted'): take(server, tmp_path, size=5)
    assert take(server, tmp_path, sha256=SHA).read_bytes() == DATA


def test_a_file_with_the_wrong_hash_is_fetched_again(server, tmp_path):
    (tmp_path/'f.bin').write_bytes(b'old'); assert take(server, tmp_path, sha256=SHA).read_bytes() == DATA


def test_statuses(server, tmp_path):
    "404 at once; 503 again; every mirror is named when none answers"
    with pytest.raises(DataError, match='404'): take(server, tmp_path, '/none')
    assert len(server.asked) == 1
    server.status = [503, 500]; assert take(server, tmp_path).read_bytes() == DATA and len(server.asked) == 4
    (tmp_path/'f.bin').unlink()
    with pytest.raises(DataError) as e: download([server.url('/a'), server.url('/b'), 'http://127.0.0.1:9/c'], tmp_path/'f.bin', tries=2, pause=.01)
    assert all(x in str(e.value) for x in ('/a: the server says 404', '/b: the server says 404', ':9/c: no connection'))
    assert download([server.url('/a'), server.url('/f.bin')], tmp_path/'f.bin', pause=.01).read_bytes() == DATA
    with pytest.raises(DataError, match='no address'): download('nonsense', tmp_path/'g', tries=1)


def test_sent_on_by_the_same_scheme_and_no_other(server, tmp_path):
    "A redirect is followed, also a relative one; one to another scheme, or one without an end, is refused, and nothing is there"
    server.moved = {'/a': server.url('/b'), '/b': '/f.bin', '/round': '/round'} | {f'/{s}': f'{s}://127.0.0.1:{server.server_port}/f.bin' for s in ('https', 'ftp')} | {'/file': 'file:///etc/hostname', '/data': 'data:,x', '/late': '/file'}
    assert take(server, tmp_path, '/a', sha256=SHA).read_bytes() == DATA; (tmp_path/'f.bin').unlink()
    for path in ('/https', '/ftp', '/file', '/data', '/late'):
        with pytest.raises(DataError, match='sent on to') as e: take(server, tmp_path, path)
        assert '\n' not in str(e.value) and not (tmp_path/'f.bin').exists()
    with pytest.raises(DataError, match='more than 10 times'): take(server, tmp_path, '/round')


def test_a_broken_line_behind_a_redirect_is_gone_on_with(server, tmp_path):
    server.moved = {'/a': '/f.bin'}; server.drops = [300_000]
    assert take(server, tmp_path, '/a', sha256=SHA).read_bytes() == DATA and server.asked[-1] is not None


def test_every_address_is_https_and_every_known_hash_is_whole():
    "What no publisher states is said in the list that people see, and is never made up"
    from itm_nb.data.download import get_command
    files = [(k, f) for k, s in SOURCES.items() for f in s.files]; assert len(files) >= 9
    assert all(u.startswith('https://') for _, f in files for u in f.urls) and all(re.fullmatch('([0-9a-f]{64})?', f.sha256) for _, f in files)
    said = {l.split()[0]: l for l in get_command([])[0]}
    assert all(("no publisher's hash is known" in said[k]) == (not f.sha256) for k, f in files) and said.keys() == SOURCES.keys()
    assert all('hashes of the Hub' in said[k] for k, s in SOURCES.items() if s.hub)


def test_whole_but_not_yet_renamed(server, tmp_path):
    "Killed between the last byte and the new name: the server has nothing more (416), and the file is taken"
    (tmp_path/'f.bin.part').write_bytes(DATA); (tmp_path/'f.bin.part.version').write_text(f'"{hashlib.md5(DATA).hexdigest()}"')
    assert take(server, tmp_path, sha256=SHA).read_bytes() == DATA and server.asked == [f'bytes={len(DATA)}-']


FULL = '''
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
from itm_nb.core.errors_files import DataError
from itm_nb.data.download import download
try: download(sys.argv[1], sys.argv[2])
except DataError as e: print(e); sys.exit(2)
'''


def test_a_full_disk_is_one_error_and_keeps_what_has_come(server, tmp_path):
    r = subprocess.run([sys.executable, '-c', FULL, server.url('/f.bin'), tmp_path/'f.bin'], env=ENV, capture_output=True, text=True)
    assert r.returncode == 2 and 'Make room and run this again' in r.stdout and not r.stderr.strip(), r.stdout + r.stderr
    assert len(server.asked) == 1 and not (tmp_path/'f.bin').exists()
    n = (tmp_path/'f.bin.part').stat().st_size; assert 300_000 < n <= 400_000
    assert take(server, tmp_path, sha256=SHA).read_bytes() == DATA and server.asked[-1] == f'bytes={n}-'


def test_more_than_the_disk_has_is_refused_before_it_begins(server, tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: type('U', (), dict(free=100_000)))
    with pytest.raises(DataError, match='GiB free'): take(server, tmp_path)
    assert (tmp_path/'f.bin.part').stat().st_size == 0


def test_two_processes_do_not_write_one_file(server, tmp_path):
    import fcntl
    with open(tmp_path/'f.bin.part', 'ab') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(DataError, match='another process'): take(server, tmp_path)


# ---- archives
def zipped(path, *names, kind=0):
    with zipfile.ZipFile(path, 'w') as z:
        for n in names:
            i = zipfile.ZipInfo(n); i.external_attr = kind << 16; z.writestr(i, 'x')
    return path


def tarred(path, name, kind=tarfile.REGTYPE, link=''):
    with tarfile.open(path, 'w:gz') as t:
        m = tarfile.TarInfo(name); m.type, m.linkname = kind, link
        if kind == tarfile.REGTYPE: m.size = 1; t.addfile(m, io.BytesIO(b'x'))
        else: t.addfile(m)
    return path


def bad_archives(d):
    (d/'cut.zip').write_bytes(zipped(d/'w.zip', *(f'{i}.txt' for i in range(50))).read_bytes()[:900]); (d/'text.zip').write_text('hello')
    raw = bytearray(zipped(d/'v.zip', 'a.txt').read_bytes()); raw[raw.index(b'x', 35)] ^= 255; (d/'flip.zip').write_bytes(bytes(raw))
    whole = tarred(d/'w.tgz', 'a').read_bytes(); (d/'cut.tgz').write_bytes(whole[:len(whole)//2])
    return dict(up=zipped(d/'1.zip', 'ok', '../out'), absolute=zipped(d/'2.zip', '/out'), back=zipped(d/'3.zip', 'a\\..\\out'), deep=zipped(d/'4.zip', 'a/../../out'),
                link=zipped(d/'5.zip', 'l', kind=0o120777), tar_up=tarred(d/'6.tgz', '../out'), tar_abs=tarred(d/'7.tgz', '/out'),
                tar_link=tarred(d/'8.tgz', 'l', tarfile.SYMTYPE, '/etc'), tar_hard=tarred(d/'9.tgz', 'l', tarfile.LNKTYPE, '../out'),
                device=tarred(d/'10.tgz', 'null', tarfile.CHRTYPE), cut=d/'cut.zip', text=d/'text.zip', flip=d/'flip.zip', cut_tar=d/'cut.tgz')


@pytest.mark.parametrize('what', ['up', 'absolute', 'back', 'deep', 'link', 'tar_up', 'tar_abs', 'tar_link', 'tar_hard', 'device', 'cut', 'text', 'flip', 'cut_tar'])
def test_archives_that_are_not_unpacked(what, tmp_path):
    "One typed error, nothing outside, nothing half there"
    bad = bad_archives(tmp_path)[what]; before = {p for p in tmp_path.rglob('*')}; to = tmp_path/'to'
    with pytest.raises(DataError): unpack(bad, to)
    new = {p for p in tmp_path.rglob('*')} - before - {to}
    assert all(any(x.name.startswith('.') for x in (p, *p.parents) if to in (x, *x.parents)) for p in new), new        # at most the working folder


def test_an_archive_that_lies_about_its_size_does_not_fill_the_disk(tmp_path, monkeypatch):
    import shutil
    with zipfile.ZipFile(tmp_path/'big.zip', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('zeros', bytes(3_000_000))
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: type('U', (), dict(free=1_000_000)))
    with pytest.raises(DataError, match='GiB free'): unpack(tmp_path/'big.zip', tmp_path/'to')


# ---- sources
def test_get_notes_and_verifies(server, tmp_path):
    "A changed archive under a known name is refused, because the first one's hash was written down"
    b = io.BytesIO()
    with zipfile.ZipFile(b, 'w') as z: z.writestr('x/dataset_toy.json', '{"images": []}'); z.writestr('x/other.json', '1')
    server.files['/s.zip'] = b.getvalue(); s = dict(toy=Source('toy', 'ours', (File((server.url('/s.zip'),), take=('*toy.json',), flat=True),)))
    said = get('toy', tmp_path/'d', s, pause=.01); assert 'licence: ours' in said and (tmp_path/'d'/'dataset_toy.json').is_file() and not (tmp_path/'d'/'other.json').exists()
    assert verify(tmp_path/'d') == [('dataset_toy.json', 'right'), ('s.zip', 'right')]
    (tmp_path/'d'/'s.zip').unlink(); server.files['/s.zip'] = zipped(tmp_path/'n.zip', 'toy.json').read_bytes()
    with pytest.raises(DataError, match='Another version'): get('toy', tmp_path/'d', s, pause=.01)
    (tmp_path/'d'/'sources.json').write_text('{')
    with pytest.raises(DataError, match='broken JSON'): verify(tmp_path/'d')
    (tmp_path/'d'/'sources.json').write_text('{"toy": {"../x": {"sha256": "1"}}}')
    with pytest.raises(DataError, match='leaves the folder'): verify(tmp_path/'d')


def test_steps_where_no_program_can(tmp_path):
    said = get('flickr30k', tmp_path/'f'); assert any('form' in x for x in said) and any('licence' in x for x in said)
    with pytest.raises(DataError, match='one of'): get('flikr30k', tmp_path/'f')
    assert not any('yaml' in k or not (s.files or s.hub or s.steps) for k, s in SOURCES.items())


def test_the_files_of_a_package_without_importing_it(tmp_path, monkeypatch):
    p = tmp_path/'lib'/'toy_labels'; (p/'data').mkdir(parents=True); (p/'__init__.py').write_text('raise SystemExit("imported")')
    (p/'data'/'a.json').write_text('{}'); (p/'data'/'b.txt').write_text('no'); monkeypatch.syspath_prepend(str(tmp_path/'lib'))
    s = dict(toy=Source('toy', 'MIT', package='toy_labels', steps=('pip install it',)))
    said = get('toy', tmp_path/'d', s); assert (tmp_path/'d'/'a.json').is_file() and not (tmp_path/'d'/'b.txt').exists() and 'pip install it' not in str(said)
    assert 'pip install it' in str(get('toy', tmp_path/'d2', dict(toy=Source('toy', 'MIT', package='no_such_package_here', steps=('pip install it',)))))


# ---- the Hub, by its own library, against a small one
HUB = '''
import sys
from pathlib import Path
from itm_nb.core.errors_files import DataError
from itm_nb.data.download import get, Source
toy = dict(toy=Source('toy', 'CC', hub='some/toy', make='metadata'))
try: print(*get('toy', Path(sys.argv[1]), toy), sep='\\n')
except DataError as e: print(e); sys.exit(2)
'''


def hub_of(files):
    "The few answers of the Hub that fetching a data set needs"
    class Hub(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        def log_message(self, *a): pass
        def say(self, body, **more):
            self.send_response(200); [self.send_header(k.replace('_', '-'), v) for k, v in more.items()]
            self.send_header('Content-Length', str(len(body))); self.end_headers()
            if self.command == 'GET': self.wfile.write(body)
        def do_GET(self):
            path = self.path.split('?')[0]; sha = 'a'*40
            if path.startswith('/api/datasets/some/toy/revision/') or path == '/api/datasets/some/toy':
                return self.say(json.dumps(dict(id='some/toy', sha=sha, siblings=[dict(rfilename=f) for f in files])).encode(), Content_Type='application/json')
            if path.startswith('/api/datasets/some/toy/tree/'):
                return self.say(json.dumps([dict(type='file', path=f, size=len(b), oid=hashlib.sha1(b).hexdigest()) for f, b in files.items()]).encode(), Content_Type='application/json')
            m = re.fullmatch(r'/datasets/some/toy/resolve/[^/]+/(.+)', path)
            if not m or m[1] not in files: return self.send_error(404)
            b = files[m[1]]; self.say(b, ETag=f'"{hashlib.sha256(b).hexdigest()}"', X_Repo_Commit=sha, Content_Type='application/octet-stream')
        do_HEAD = do_GET
    s = ThreadingHTTPServer(('127.0.0.1', 0), Hub); threading.Thread(target=s.serve_forever, daemon=True).start(); return s


def from_hub(s, folder, home, offline='0'):
    env = ENV | dict(HF_ENDPOINT=f'http://127.0.0.1:{s.server_port}', HF_HUB_OFFLINE=offline, HF_HOME=str(home), HF_HUB_DISABLE_XET='1')
    return subprocess.run([sys.executable, '-c', HUB, folder], env=env, capture_output=True, text=True, timeout=60)


def test_a_data_set_of_the_hub_becomes_a_folder_we_read(tmp_path):
    "The table of Flickr8k's form and its photos; a program that lies beside is left there; offline it says so"
    from PIL import Image
    def photo(i): b = io.BytesIO(); Image.fromarray(np.full((8, 8, 3), 40*i, np.uint8)).save(b, 'PNG'); return b.getvalue()
    table = 'file_name,split,' + ','.join(f'caption_{k}' for k in range(5)) + '\n'
    table += ''.join(f'p{i}.png,{s},' + ','.join(f'"photo {i}, {k}"' for k in range(5)) + '\n' for i, s in enumerate(('train', 'train', 'validation', 'test')))
    s = hub_of({'metadata.csv': table.encode(), 'run_me.py': b'raise SystemExit', **{f'p{i}.png': photo(i) for i in range(4)}})
    try:
        r = from_hub(s, tmp_path/'d', tmp_path/'home'); assert r.returncode == 0, r.stdout + r.stderr[-2000:]
        assert not (tmp_path/'d'/'run_me.py').exists()
        from itm_nb.data.layouts import open_layout
        t = open_layout(tmp_path/'d', 'train'); assert len(t) == 2 and len(t.captions) == 10 and t.captions[5] == 'photo 1, 0'
        r = from_hub(s, tmp_path/'e', tmp_path/'home2', offline='1'); assert r.returncode == 2 and 'some/toy' in r.stdout
    finally: s.shutdown(); s.server_close()
