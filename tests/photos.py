"""Made pictures with copies among them, and a CLIP of random weights: what tests of people's folders
share."""
import csv

import numpy as np
from PIL import Image


def paint(path, i, size=(96, 72)):
    "Another smooth picture for every i"
    g = np.random.default_rng(i)
    y, x = np.mgrid[:72, :96]/72
    a = np.stack([128 + 100*np.sin(g.uniform(2, 6)*x + g.uniform(2, 6)*y + g.uniform(0, 6)) for _ in 'rgb'],
                 -1)
    for cy, cx, r in g.uniform((.1, .1, .05), (.9, 1.2, .25), (4, 3)):
        a[(y-cy)**2 + (x-cx)**2 < r*r] = g.uniform(0, 255, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a.clip(0, 255).astype('uint8')).resize(size).save(path)


def folder_of(at, n=180, copies=20):
    "n pictures as JPEG, copies of some: the same bytes, smaller, coarser in turn; Kaggle's captions.txt"
    for i in range(n):
        paint(at/'Images'/f'{i:03d}.jpg', i)
    of = {}
    for k in range(copies):
        src, to = at/'Images'/f'{9*k:03d}.jpg', at/'Images'/f'again{k:02d}.jpg'
        of[to.name] = src.name
        if k % 3 == 0:
            to.write_bytes(src.read_bytes())
        elif k % 3 == 1:
            Image.open(src).resize((64, 48)).save(to)
        else:
            Image.open(src).save(to, quality=50)
    rows = [['image', 'caption']] + [[f.name, f'it is {f.stem}, seen {k}']
                                     for f in sorted((at/'Images').iterdir())
                                     for k in range(2)]
    with open(at/'captions.txt', 'w', newline='') as f:
        csv.writer(f).writerows(rows)
    return of


def tiny_clip(folder):
    "A CLIP with random weights and a tokeniser of whole words, as transformers saves one"
    import torch
    import transformers as T
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    T.logging.set_verbosity_error()
    T.logging.disable_progress_bar()
    torch.manual_seed(0)
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'it', 'is', 'seen', ',', *map(str, range(2)),
             *(f'{i:03d}' for i in range(200)),
             *(f'again{i:02d}' for i in range(40))]
    read = dict(small, vocab_size=len(words), max_position_embeddings=16, bos_token_id=2, eos_token_id=3,
                pad_token_id=0)
    see = dict(small, image_size=32, patch_size=8)
    T.CLIPModel(T.CLIPConfig(text_config=read, vision_config=see, projection_dim=32)).save_pretrained(folder)
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='[UNK]'))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.post_processor = processors.TemplateProcessing('[CLS] $A [SEP]',
                                                     special_tokens=[('[CLS]', 2), ('[SEP]', 3)])
    t.save(str(folder/'tokenizer.json'))
    return folder
