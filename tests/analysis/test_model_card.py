"""Cards and publishing: a folder, an endpoint made up here, other libraries that open what was exported.

The endpoint answers as the Hub does for small files. Large files (LFS, Xet), logins and rights are not tried.
"""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
import torch
from PIL import Image

from itm_nb.analysis.model_card import card, export, is_clip, publish_command, save_clip
from itm_nb.analysis.compare_runs import find_run
from itm_nb.cli import itm_run
from itm_nb.core.commands import SetupError
from itm_nb.core.errors_files import DataError
from itm_nb.data import tokenizers
from itm_nb.data.prepare import prepare
from itm_nb.models.factory import from_pretrained
from photos import folder_of, tiny_clip

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    "A finished run on the drawn world"
    at = tmp_path_factory.mktemp('card')
    asked = dict(
        preset='tiny',
        dim=16,
        d_word=8,
        image_hidden=16,
        epochs=2,
        batch=50,
        cache=at / 'worlds',
        out=at / 'run',
    )
    assert itm_run(['train', '--quiet', *(str(x) for k, v in asked.items() for x in ('-p', k, v))]) == 0
    return at / 'run'


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    "A finished run that fine-tuned a CLIP, some of its layers too"
    at = tmp_path_factory.mktemp('clip')
    folder_of(at / 'photos', 36, 4)
    tiny_clip(at / 'models' / 'tiny-clip')
    prepare(at / 'photos')
    asked = dict(
        model='tiny-clip',
        folder=at / 'photos',
        models=at / 'models',
        cache=at / 'cache',
        epochs=2,
        freeze='embeddings',
        text_freeze='embeddings',
        lr=0.001,
        out=at / 'run',
    )
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'itm_nb',
            'run',
            'train',
            '--quiet',
            *(str(x) for k, v in asked.items() for x in ('-p', k, v)),
        ],
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-800:]
    return at / 'run', at


def told(path):
    "The head of a card, and its text"
    from huggingface_hub import ModelCard

    c = ModelCard.load(path)
    return c.data, c.text


def test_the_card_says_what_the_record_says(shapes, tmp_path):
    lines = publish_command(
        [str(shapes), 'someone/shapes', '--to', str(tmp_path / 'out'), '--licence', 'cc-by-4.0', '--audit']
    )
    assert lines[-1].endswith('nothing was sent')
    assert {p.name for p in (tmp_path / 'out').iterdir()} == {
        'README.md',
        'record.json',
        'config.json',
        'model.safetensors',
        'vocab.json',
    }
    rec, (head, text) = find_run(shapes).record, told(tmp_path / 'out' / 'README.md')
    have = {r.metric_type: r.metric_value for r in head.eval_results}
    test = rec['metrics']['test']
    want = {f'{s}_{k}': v for s in ('i2t', 't2i') for k, v in test[s].items()} | dict(rsum=test['rsum'])
    assert have == want and head.license == 'cc-by-4.0' and head.model_name == 'someone/shapes'
    assert {r.dataset_revision for r in head.eval_results} == {rec['data']['fingerprint']}
    for part in (
        'Use',
        'Results',
        'Data',
        'Training',
        'Seeds',
        'Negatives',
        'False negatives',
        'Limits',
        'Licence',
    ):
        assert f'\n## {part}\n' in text
    assert f"{test['i2t']['r1']:.1f}" in text and 'a single run' in text and 'drawn pictures' in text
    # of the log of picks, last epoch; what is false is known in the drawn world
    for source, sides in rec['picks'].items():
        for side, p in sides.items():
            assert f"| {source} | " in text and f"| {p['n'][-1]} | {p['score'][-1]:.3f} |" in text
            assert f"{100 * p['false'][-1]:.1f} %" in text
    assert (
        'are false negatives, by the rule *truth*' in text
        and json.loads((tmp_path / 'out' / 'record.json').read_text()) == rec
    )
    assert (tmp_path / 'out' / 'model.safetensors').read_bytes() == (
        shapes / 'best' / 'model.safetensors'
    ).read_bytes()


def test_a_card_without_licence_and_audit_says_so(shapes):
    found = find_run(shapes)
    text = card(found, 'someone/shapes')
    assert 'license: other' in text and 'has not stated a licence' in text and 'Not audited' in text


def test_seeds_of_the_same_arm_are_told(shapes):
    found = find_run(shapes)
    other = json.loads(json.dumps(found.record)) | dict(id='0' * 12, seed=7)
    other['metrics']['test']['rsum'] += 10
    text = card(found, 'a/b', others=[found.record, other, other | dict(id='1' * 12, sweep='another')])
    sums = [found.record['metrics']['test']['rsum'], other['metrics']['test']['rsum']]
    assert (
        f'mean {np.mean(sums):.1f}, standard deviation {np.std(sums, ddof=1):.1f}' in text
        and 'rSum of 2 runs' in text
    )


@pytest.mark.parametrize('name', ('alone', 'a/b/c', 'a b/c', '../up', 'a/..', ''))
def test_a_name_that_the_hub_would_refuse(shapes, name, tmp_path):
    with pytest.raises(SetupError, match='OWNER/NAME'):
        publish_command([str(shapes), name, '--to', str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()


def test_what_is_no_finished_run_is_refused(shapes, tmp_path):
    with pytest.raises((SetupError, DataError)):
        export(tmp_path, tmp_path / 'out', 'a/b')
    broken = tmp_path / 'broken'
    import shutil

    shutil.copytree(shapes, broken)
    shutil.copytree(shapes.parent / 'records', tmp_path / 'records')
    (broken / 'best' / 'model.safetensors').write_bytes(b'other weights')
    with pytest.raises(DataError):
        export(broken, tmp_path / 'out', 'a/b')


class Hub(BaseHTTPRequestHandler):
    "What of the Hub is used: make a repository, commit files, look it up, fetch files"

    kept, asked = {}, []

    def log_message(self, *_):
        pass

    def answer(self, body, status=200, **headers):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k, v in {'Content-Length': len(raw), 'Content-Type': 'application/json', **headers}.items():
            self.send_header(k, str(v))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(raw)

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        if self.headers.get('Transfer-Encoding') == 'chunked':
            raw = b''
            while n := int(self.rfile.readline(), 16):
                raw += self.rfile.read(n)
                self.rfile.readline()
        path = unquote(urlparse(self.path).path)
        self.asked.append((path, self.headers.get('Authorization')))
        if path == '/api/repos/create':
            d = json.loads(raw)
            return self.answer(
                dict(url=f'http://{self.headers["Host"]}/{d.get("organization", "someone")}/{d["name"]}')
            )
        if path == '/api/validate-yaml':
            return self.answer(dict(errors=[], warnings=[]))
        if '/preupload/' in path:
            files = [
                dict(path=f['path'], uploadMode='regular', shouldIgnore=False)
                for f in json.loads(raw)['files']
            ]
            return self.answer(dict(files=files))
        if '/commit/' in path:
            repo = path.removeprefix('/api/models/').partition('/commit/')[0]
            for line in map(json.loads, raw.splitlines()):
                if line['key'] == 'file':
                    self.kept.setdefault(repo, {})[line['value']['path']] = base64.b64decode(
                        line['value']['content']
                    )
            return self.answer(
                dict(
                    commitUrl=f'http://{self.headers["Host"]}/{repo}/commit/' + 'a' * 40,
                    commitOid='a' * 40,
                    pullRequestUrl=None,
                )
            )
        self.answer(dict(error='unknown'), 404)

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        for repo, files in self.kept.items():
            if path.startswith(f'/api/models/{repo}/tree/'):
                return self.answer(
                    [dict(type='file', path=f, size=len(raw), oid='b' * 40) for f, raw in files.items()]
                )
            if path.startswith(f'/api/models/{repo}'):
                return self.answer(
                    dict(
                        id=repo,
                        modelId=repo,
                        sha='a' * 40,
                        private=False,
                        tags=[],
                        downloads=0,
                        likes=0,
                        siblings=[dict(rfilename=f) for f in files],
                    )
                )
            for f, raw in files.items():
                if path in (f'/{repo}/resolve/main/{f}', f'/{repo}/resolve/{"a" * 40}/{f}'):
                    return self.answer(
                        raw,
                        **{
                            'ETag': f'"{hash(raw) & 0xFFFFFFFF:08x}"',
                            'X-Repo-Commit': 'a' * 40,
                            'Content-Type': 'application/octet-stream',
                        },
                    )
        self.answer(dict(error='Repository not found'), 404, **{'X-Error-Code': 'RepoNotFound'})

    do_HEAD = do_GET


@pytest.fixture
def endpoint(tmp_path):
    "An endpoint on this machine, and what another process needs to ask it"
    Hub.kept, Hub.asked = {}, []
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | dict(
        HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}',
        HF_HUB_OFFLINE='0',
        HF_TOKEN='hf_made_up',
        HF_HOME=str(tmp_path / 'hf'),
        HF_HUB_DISABLE_XET='1',
        HF_HUB_DISABLE_TELEMETRY='1',
        PYTHONPATH=str(ROOT),
        NO_PROXY='127.0.0.1',
    )
    yield env
    server.shutdown()


GET = '''
import sys, torch
from itm_nb.core.errors_files import DataError
from itm_nb.data import tokenizers
from itm_nb.data.prepare import prepare
from itm_nb.models.factory import from_pretrained, model_folder
from safetensors.torch import load_file
model, at = from_pretrained('someone/shapes'), model_folder('someone/shapes')
want = load_file(sys.argv[1])
assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items())
vocab = tokenizers.load(at/'vocab.json')
print(sorted(p.name for p in at.iterdir()), tuple(model.text(*vocab.encode(['a moon'])).shape))
try: from_pretrained('someone/nothing')
except DataError as e: print('refused:', 'OWNER/NAME' in str(e))
'''


def python(argv, env, folder):
    "A process of its own"
    return subprocess.run([sys.executable, *argv], env=env, cwd=folder, capture_output=True, text=True)


def test_published_to_an_endpoint_and_had_from_there(shapes, endpoint, tmp_path):
    done = python(['-m', 'itm_nb', 'run', 'publish', str(shapes), 'someone/shapes'], endpoint, tmp_path)
    assert done.returncode == 0 and done.stdout.rstrip().endswith('/someone/shapes'), done.stderr[-800:]
    kept = Hub.kept['someone/shapes']
    assert set(kept) == {'README.md', 'record.json', 'config.json', 'model.safetensors', 'vocab.json'}
    assert (
        kept['model.safetensors'] == (shapes / 'best' / 'model.safetensors').read_bytes()
        and b'model-index' in kept['README.md']
    )
    assert {who for _, who in Hub.asked} <= {'Bearer hf_made_up', None}
    done = python(['-c', GET, str(shapes / 'best' / 'model.safetensors')], endpoint, tmp_path)
    assert done.returncode == 0, done.stderr[-1500:]
    first, last = done.stdout.splitlines()[-2:]
    assert first == "['config.json', 'model.safetensors', 'vocab.json'] (1, 16)" and last == 'refused: True'


def test_without_a_network_one_line_says_what_to_do(shapes, tmp_path):
    env = os.environ | dict(HF_HUB_OFFLINE='1', PYTHONPATH=str(ROOT), HF_HOME=str(tmp_path))
    done = python(['-m', 'itm_nb', 'run', 'publish', str(shapes), 'someone/shapes'], env, tmp_path)
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and '--to FOLDER' in line and 'hf auth login' in line


def both_ways(run, at):
    "Vectors of two pictures and three sentences by this package; the files"
    model, vocab = from_pretrained(run / 'best'), tokenizers.load(run / 'best' / 'vocab.json')
    files = [at / f'{i}.png' for i in range(2)]
    for i, f in enumerate(files):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), 'uint8')).save(f)
    x = torch.from_numpy(np.stack([np.asarray(Image.open(f)) for f in files]))
    said = ['it is 003, seen 1', 'it is 017', 'is']
    with torch.no_grad():
        return (
            model.image(x, torch.ones(2, dtype=torch.int64)),
            model.text(*vocab.encode(said)),
            files,
            said,
        )


def near(a, b):
    return torch.allclose(torch.nn.functional.normalize(torch.as_tensor(a).float(), dim=-1), b, atol=1e-5)


def test_a_fine_tuned_clip_opens_in_transformers(clip, tmp_path):
    import transformers as T

    run, at = clip
    export(run, tmp_path / 'out', 'someone/clip', models=str(at / 'models'))
    there = tmp_path / 'out' / 'transformers'
    img, txt, files, said = both_ways(run, tmp_path)
    pair, reader = T.CLIPModel.from_pretrained(there), T.AutoTokenizer.from_pretrained(there)
    look = (
        T.CLIPImageProcessorPil.from_pretrained(there)
        if hasattr(T, 'CLIPImageProcessorPil')
        else T.CLIPImageProcessor.from_pretrained(there)
    )
    with torch.no_grad():
        words = reader(said, padding=True, return_tensors='pt')
        seen = look([Image.open(f) for f in files], return_tensors='pt')
        out = pair(
            input_ids=words['input_ids'],
            attention_mask=words['attention_mask'],
            pixel_values=seen['pixel_values'],
        )
    assert near(out.image_embeds, img) and near(out.text_embeds, txt)
    cfg = find_run(run).record['config']
    base = T.CLIPModel.from_pretrained(at / 'models' / 'tiny-clip')
    scale = float(base.logit_scale) if not cfg['temperature'] else -np.log(cfg['temperature'])
    assert abs(float(pair.logit_scale) - scale) < 1e-5
    # some weights have learnt: it is not the network it began as
    assert not torch.equal(pair.visual_projection.weight, base.visual_projection.weight)
    assert (
        "CLIPModel.from_pretrained('someone/clip', subfolder='transformers')"
        in (tmp_path / 'out' / 'README.md').read_text()
    )


def test_a_fine_tuned_clip_opens_in_sentence_transformers(clip, tmp_path):
    S = pytest.importorskip('sentence_transformers', reason='sentence-transformers is not installed')
    run, at = clip
    assert save_clip(run, tmp_path / 'clip', find_run(run).record, str(at / 'models'))
    img, txt, files, said = both_ways(run, tmp_path)
    both = S.SentenceTransformer(str(tmp_path / 'clip'))
    assert near(both.encode(said), txt) and near(both.encode([Image.open(f) for f in files]), img)


def test_what_is_no_clip_is_not_exported_as_one(shapes, tmp_path):
    assert not is_clip(from_pretrained(shapes / 'best').config)
    assert (
        not save_clip(shapes, tmp_path / 'clip', find_run(shapes).record)
        and not (tmp_path / 'clip').exists()
    )
