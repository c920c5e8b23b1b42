# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Words that can look at the image
# > One transformer read in two ways - words alone, or words together with image regions - and three heads that speak about single words

# %%
#| default_exp language

# %%
#| export
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertEncoder

from itm_nb.data import DataError, regular_file

# %%
#| hide
import tempfile
from fastcore.test import expect_fail, test_close, test_eq


# %% [markdown]
# A tower of notebook 03 gives one vector for a sentence. To refill a masked word one needs more: a vector for every *word*, and a way for words to look at the image. `Stream` is the single-stream transformer of
# UNITER: words and regions are embedded side by side and every one attends to every other. Leave the regions out and the same weights read text alone.
#
# $$ \text{word } l: \; LN(w_l + p_l + e_0) \qquad\quad \text{region } i: \; LN(LN(W_f f_i) + LN(W_b b_i) + e_1) $$
#
# | paper symbol | here |
# |---|---|
# | word, position, type embeddings $w, p, e$ | `embeddings` |
# | region feature $f$, box $b$ (seven numbers) | `feats` $(B,R,d)$, `boxes` $(B,R,7)$ |
# | masked-word head, discrimination head, correction head | `mlm`, `disc`, `cor` |
#
# The blocks are those of `transformers` (attention by `scaled_dot_product_attention`), so BERT's weights fit.
#
# **Boxes.** A data set gives corners as shares of width and height; UNITER adds width, height and area.

# %%
#| export
def seven(
    boxes:Tensor,   # (.., 4) x1, y1, x2, y2 as shares of width and height
)->Tensor:          # (.., 7) with width, height and area
    "The seven numbers UNITER says about a box"
    size = boxes[..., 2:] - boxes[..., :2]
    return torch.cat([boxes, size, size.prod(-1, keepdim=True)], -1)


# %%
seven(torch.tensor([.1, .2, .5, .7]))

# %%
test_close(seven(torch.tensor([.1, .2, .5, .7])), torch.tensor([.1, .2, .5, .7, .4, .5, .2]))


# %% [markdown]
# **Regions.** Padding comes out as rows of zeros, and a row of zeros *is* padding from here on: so the rows of a batch can be picked, repeated and reordered without carrying a mask beside them.

# %%
#| export
class Regions(nn.Module):
    "Region features, and where they stand, as the transformer wants them"
    def __init__(self,
        d_in:int,             # length of a region's feature vector
        dim:int,              # width of the transformer
        d_box:int=0,          # numbers per box: 0 (no boxes) or 7
        dropout:float=.1,
    ):
        super().__init__()
        self.img_linear, self.img_layer_norm = nn.Linear(d_in, dim), nn.LayerNorm(dim, eps=1e-12)
        self.pos_linear, self.pos_layer_norm = (nn.Linear(d_box, dim), nn.LayerNorm(dim, eps=1e-12)) if d_box else (None, None)
        self.LayerNorm, self.dropout = nn.LayerNorm(dim, eps=1e-12), nn.Dropout(dropout)

    def forward(self,
        feats:Tensor,          # (B, R, d_in)
        mask:Tensor,           # (B, R) which regions are real
        kind:Tensor,           # (dim,) type embedding of regions
        boxes:Tensor=None,     # (B, R, d_box)
    )->Tensor:                 # (B, R, dim), zero where there is no region
        "A vector for every region"
        x = self.img_layer_norm(self.img_linear(feats)) + kind
        if self.pos_linear is not None: x = x + self.pos_layer_norm(self.pos_linear(boxes))
        return self.dropout(self.LayerNorm(x))*mask[...,None]


# %% [markdown]
# **A head over words**: a small layer, then the scalar product with every word vector - the same vectors that words are read with.

# %%
#| export
class WordHead(nn.Module):
    "From the state of a word to scores of all words; the decoder is the table of word embeddings"
    def __init__(self, dim:int, n_words:int):
        super().__init__()
        self.dense, self.LayerNorm, self.bias = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=1e-12), nn.Parameter(torch.zeros(n_words))

    def forward(self, states:Tensor, table:Tensor)->Tensor:   # (.., dim), (V, dim) -> (.., V)
        "Logits over the vocabulary"
        return F.linear(self.LayerNorm(F.gelu(self.dense(states))), table, self.bias)


# %% [markdown]
# **The stream.** `read` gives states of words alone, `look` states of words that see regions; `guess` and `correct` turn states into words. The vocabulary is wide, so hand these two only the rows that need it.

# %%
#| export
def real_words(
    tokens:Tensor,   # (B, L), padded with 0
)->Tensor:           # (B, L)
    "Everything up to the last word; a 0 before it (a generator that may draw padding) is a word like others"
    return (tokens != 0).flip(1).byte().cummax(1).values.flip(1).bool()

class Stream(nn.Module):
    "A transformer over words, or over words and regions, with heads for masked, replaced and original words"
    def __init__(self,
        n_words:int,           # size of the vocabulary; 0 is padding
        dim:int=256,           # width
        layers:int=4,
        heads:int=4,
        ffn:int=0,             # width of the inner layer; 0: four times the width
        longest:int=64,        # words of a sentence, its ends included
        d_in:int=0,            # length of a region's feature vector; 0: this stream never sees an image
        d_box:int=0,           # numbers per box: 0 or 7
        dropout:float=.1,
    ):
        super().__init__()
        c = BertConfig(vocab_size=n_words, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads,
                       intermediate_size=ffn or 4*dim, max_position_embeddings=longest, hidden_dropout_prob=dropout,
                       attention_probs_dropout_prob=dropout, attn_implementation='sdpa')
        self.config, self.embeddings, self.encoder = c, BertEmbeddings(c), BertEncoder(c)
        self.regions = Regions(d_in, dim, d_box, dropout) if d_in else None
        self.mlm, self.cor, self.disc = WordHead(dim, n_words), WordHead(dim, n_words), nn.Linear(dim, 2)
        self.apply(_start)

    def run(self, x:Tensor, keep:Tensor)->Tensor:   # (B, S, dim) embedded, (B, S) which places are real -> (B, S, dim)
        "The encoder"
        return self.encoder(x, attention_mask=keep[:,None,None].expand(-1, 1, x.shape[1], -1)).last_hidden_state

    def read(self, tokens:Tensor)->Tensor:   # (B, L), 0 is padding -> (B, L, dim)
        "States of words alone"
        return self.run(self.embeddings(tokens), real_words(tokens))

    def see(self, feats:Tensor, mask:Tensor, boxes:Tensor=None)->Tensor:   # (B, R, d_in), (B, R), (B, R, d_box) -> (B, R, dim)
        "Embedded regions, zero where there is none"
        return self.regions(feats, mask, self.embeddings.token_type_embeddings.weight[1], boxes)

    def look(self, regions:Tensor, tokens:Tensor)->Tensor:   # (B, R, dim) from `see`, (B, L) -> (B, L, dim)
        "States of words that see the regions"
        keep = torch.cat([real_words(tokens), (regions != 0).any(-1)], 1)
        return self.run(torch.cat([self.embeddings(tokens), regions], 1), keep)[:,:tokens.shape[1]]

    def guess(self, states:Tensor)->Tensor: return self.mlm(states, self.embeddings.word_embeddings.weight)     # (.., dim) -> (.., V)
    def correct(self, states:Tensor)->Tensor: return self.cor(states, self.embeddings.word_embeddings.weight)   # (.., dim) -> (.., V)

def _start(m):
    "Initial weights of BERT"
    if isinstance(m, (nn.Linear, nn.Embedding)): nn.init.normal_(m.weight, std=.02)
    if isinstance(m, nn.Linear): nn.init.zeros_(m.bias)
    if isinstance(m, nn.Embedding) and m.padding_idx is not None: nn.init.zeros_(m.weight[m.padding_idx:m.padding_idx+1].detach())


# %%
torch.manual_seed(0)
stream = Stream(30, dim=16, layers=2, heads=2, longest=12, d_in=6, d_box=7).eval()
tokens = torch.tensor([[1, 7, 8, 9, 2, 0], [1, 5, 2, 0, 0, 0]])
feats, mask, boxes = torch.randn(2, 3, 6), torch.tensor([[True, True, True], [True, False, False]]), torch.rand(2, 3, 7)
regions = stream.see(feats, mask, boxes)
stream.read(tokens).shape, stream.look(regions, tokens).shape, stream.guess(stream.look(regions, tokens)[tokens == 8]).shape

# %% [markdown]
# ### Edges
# Padding - of words, of regions, with whatever numbers in it - changes nothing; other regions change everything; and without an image the states of `read` do not know of any.

# %%
more = lambda x, n: F.pad(x, (0, n)); states = stream.look(regions, tokens)
wide = stream.see(torch.cat([feats, torch.full((2, 2, 6), 9.)], 1), torch.cat([mask, torch.zeros(2, 2).bool()], 1), torch.cat([boxes, boxes[:,:2]], 1))
test_close(stream.look(wide, more(tokens, 3))[:,:6][tokens != 0], states[tokens != 0], eps=1e-5)
test_close(stream.read(more(tokens, 3))[:,:6][tokens != 0], stream.read(tokens)[tokens != 0], eps=1e-5)
assert (stream.look(regions.flip(0), tokens) - states).abs()[tokens != 0].max() > 1e-3
order = torch.tensor([2, 0, 1])                                                   # regions have no order
test_close(stream.look(regions[:,order], tokens)[tokens != 0], states[tokens != 0], eps=1e-5)

# %% [markdown]
# Word vectors, and so both word heads, are shared: a masked-word lesson moves the vectors that words are read with.

# %%
stream.guess(stream.read(tokens)[:,1]).logsumexp(-1).sum().backward()
assert stream.embeddings.word_embeddings.weight.grad[20].abs().sum() > 0                                      # word 20 occurs in no sentence
test_eq(stream.cor.bias.grad, None); test_eq(real_words(torch.tensor([[1, 0, 2, 0]])).tolist(), [[True, True, True, False]])

# %% [markdown]
# ## BERT's weights, by path
# A folder written by `transformers` (`model.safetensors`) fits into the same places, with or without its masked-word head. The file must hold every block of the stream; regions and the other heads keep their own
# start, and the correction head starts as a copy of the masked-word head, as in TAGS.

# %%
#| export
_BERT = (('bert.embeddings.', 'embeddings.'), ('bert.encoder.', 'encoder.'), ('cls.predictions.transform.dense.', 'mlm.dense.'),
         ('cls.predictions.transform.LayerNorm.', 'mlm.LayerNorm.'), ('cls.predictions.bias', 'mlm.bias'))

def _words(name, v, own):
    "A table of words: our last word, a mask for vocabularies without one, keeps its start; rows that no token has are left out"
    table = name.endswith('word_embeddings.weight') or name in ('mlm.bias', 'cor.bias')
    if not table or own is None or v.shape == own.shape or v.shape[1:] != own.shape[1:] or len(v) < len(own)-1: return v
    return torch.cat([v[:len(own)-1], own[-1:]])

def load_bert(
    stream:Stream,
    folder,          # with `model.safetensors` of a BertModel or BertForMaskedLM
)->list:             # what kept its own start
    "Start a stream from BERT"
    file = regular_file(Path(folder)/'model.safetensors'); found, own = load_file(file), stream.state_dict()
    found = {k if k.startswith(('bert.', 'cls.')) else f'bert.{k}': v for k, v in found.items()}
    ours = {b + k[len(a):]: v for k, v in found.items() for a, b in _BERT if k.startswith(a)}
    ours |= {k.replace('mlm.', 'cor.', 1): v for k, v in ours.items() if k.startswith('mlm.')}
    ours = {k: _words(k, v, own.get(k)) for k, v in ours.items() if not k.endswith('position_ids')}
    need = [k for k in own if k.startswith(('embeddings.', 'encoder.'))]
    odd = [k for k in {*need, *ours} if k not in own or k not in ours or own[k].shape != ours[k].shape]
    if odd:
        k = sorted(odd)[0]; shape = lambda d: tuple(d[k].shape) if k in d else 'missing'
        raise DataError(file, f'{k} is {shape(ours)}', f'{shape(own)}', 'Build the stream with the sizes of this BERT.')
    return stream.load_state_dict(ours, strict=False).missing_keys


# %%
from transformers import BertForMaskedLM
torch.manual_seed(1); bert = BertForMaskedLM(BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=12)).eval()
torch.nn.init.normal_(bert.cls.predictions.bias)
with tempfile.TemporaryDirectory() as folder:
    bert.save_pretrained(folder); kept = load_bert(stream, folder)
    with expect_fail(DataError, 'Build the stream with the sizes'): load_bert(Stream(30, dim=16, layers=1, heads=2, longest=12), folder)
sorted({k.split('.')[0] for k in kept})

# %%
want = bert(input_ids=tokens, attention_mask=(tokens != 0).long()).logits
test_close(stream.guess(stream.read(tokens))[tokens != 0], want[tokens != 0], eps=1e-5); test_close(stream.correct(stream.read(tokens)), stream.guess(stream.read(tokens)))
test_eq(sorted({k.split('.')[0] for k in kept}), ['disc', 'regions'])
with expect_fail(DataError, 'cannot be opened'): load_bert(stream, 'nowhere')
with tempfile.TemporaryDirectory() as folder:
    bert.save_pretrained(folder); one_more = Stream(31, dim=16, layers=2, heads=2, longest=12, dropout=0.).eval(); start = one_more.embeddings.word_embeddings.weight[-1].clone()
    load_bert(one_more, folder); test_close(one_more.guess(one_more.read(tokens))[tokens != 0][:,:30], want[tokens != 0], eps=1e-5); test_eq(one_more.embeddings.word_embeddings.weight[-1], start)

# %%
#| hide
import nbdev; nbdev.nbdev_export()
