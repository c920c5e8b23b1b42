
#| export
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from itm_nb.data import DataError, Split
from itm_nb.truth import (ALL, COLOURS, COUNT, FAMILIES, MOST, MOST_OBJECTS, NO, NONE, ONLY, PAIR, PLACES, PREDICATES, RELATIONS, SHAPES, SIZES, SPELLINGS,
                          TEXTURES, THERE, VOCABULARY, WIDTH, Scenes, encode, judge, judge_all, judge_clauses, parse, plural, scene, truth, _sets, _unique_rows)
from itm_nb.world import (EDITS, MIXED, MOST_REGIONS, Kin, Types, boxes_of, colour_name, detect, draw, latents, make_scenes, make_twins, make_types, show,
                          stream, visible, _choose, _MIX)



#| export
FORMS = dict(two=.55, conjunction=.20, relation=.15, count=.05, one=.03, quantity=.01, no=.01)
_FIRST = np.array([[.45, .2, .15, .15, .05, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0], [.6, .4, 0, 0, 0, 0, 0],
                   [0, 0, 0, 0, 0, 1, 0], [.4, .3, .3, 0, 0, 0, 0]])     # form -> there, place, and, relation, count, quantity, no
_SECOND = np.array([[0, .6, .3, 0, 0, .1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [.7, .3, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0],
                    [0, .7, .3, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]) # form -> nothing, there, place, and, relation, count, quantity, no
_THERE, _PLACE, _AND, _RELATION, _COUNT, _QUANTITY, _NO = range(1, 8)

def _say(rng, names, much, forced):
    "A noun phrase for each object: (K, 5) certain names -> (K, 4) predicates; `much` in [0, 1] is how much to say"
    out = np.where((rng.random((len(names), 3)) < much[:,None]*[.6, .8, 1.2]) | forced[:,:3], names[:,:3], 0)
    u = rng.random(len(names)) + .25*much + forced[:,3]
    noun = np.where(u < .1, 0, np.where((u < .25) & (names[:,4] > 0), names[:,4], names[:,3]))
    return np.concatenate([out, noun[:,None]], 1)

def _any_true(rng, true):
    "The index of one of the true columns, -1 where there is none"
    return np.where(true.any(-1), (rng.random(true.shape)*true).argmax(-1), -1)

def _clauses(rng, facts, own, template, a, b, one, two):
    "(K, 17) clauses made from noun phrases a, b about objects one, two of the scenes `own`"
    c = np.zeros((len(own), WIDTH), 'i1')
    c[:,0] = np.array([0, THERE, THERE, PAIR, PAIR, COUNT, ALL, NO])[template]
    c[:,5:9] = np.where((template > 0)[:,None], a, 0)
    is_ = lambda *t: np.flatnonzero(np.isin(template, t))
    k = is_(_AND, _RELATION); c[k,10:14] = b[k]
    k = is_(_PLACE); at = (facts.atoms[0,-len(PLACES):,own[k]] >> one[k,None]) & 1
    c[k,9] = np.where((p := _any_true(rng, at)) >= 0, p + PREDICATES.index(PLACES[0]), 0)
    k = is_(_RELATION); to = facts.pairs[0,1:,one[k],own[k]] >> two[k,None] & 1
    c[k,1] = _any_true(rng, to) + 1
    k = is_(_QUANTITY); c[k,0] = rng.choice([ALL, MOST, ONLY], len(k))
    k = k[c[k,0] != ONLY]; c[k,10:13] = np.where(np.arange(3) == rng.integers(0, 3, len(k))[:,None], facts.names[own[k],one[k],:3], 0)
    c[k[c[k,10:13].any(1) == 0],0] = ONLY
    return _numbers(rng, facts, own, c, is_(_COUNT))

def _numbers(rng, facts, own, c, k):
    "Count what the noun phrases of rows k fit: none, one, or a number said in one of several ways"
    n = np.bitwise_count(_sets(facts, c[k,5:9], own[k]))[0].astype('i1')
    c[k,0] = np.where(n == 0, NO, np.where(n == 1, THERE, COUNT)); c[k,14] = n == 1
    way = np.where(n >= 2, rng.integers(0, 3, len(k)), -1)
    vague = np.array([[2, 3, 1], [3, 5, 1], [4, 99, 1]], 'i1')[_choose(rng, np.array([[1, 1, 1], [1, 1, 1], [1, 0, 0], [.5, .5, 0], [0, .5, .5], [0, .5, .5], [0, 0, 1]])[n]
                                                                     / np.array([3, 3, 1, 1, 1, 1, 1])[n,None])]
    least = np.minimum(n, 2 + (rng.random(len(k))*(n-1)).astype('i1'))
    zero = np.zeros_like(n)
    c[k,2:5] = np.select([(way == w)[:,None] for w in range(3)], [np.stack([n, n, zero], 1), np.stack([least, zero + 99, zero], 1), vague], 0)
    return c

def _draft(rng, facts, own, form, lead, forced, gone, veil):
    "(K, 2, 17) things that may be said of scenes `own`; objects with a small `lead` are spoken of first"
    n = np.bitwise_count(facts.atoms[0,0,own])
    order = np.argsort(rng.random((len(own), MOST_OBJECTS)) + lead + 9*(np.arange(MOST_OBJECTS) >= n[:,None]), 1)
    one, two, three = order[:,0], order[:,1], order[np.arange(len(own)),np.minimum(n-1, 2)]
    first = 1 + _choose(rng, _FIRST[form]); second = _choose(rng, _SECOND[form])
    objects = np.stack([one, two, three], 1)
    names = facts.names[own[:,None],objects]
    k = np.flatnonzero(veil >= 0); agreed = facts.names[veil[k,None],objects[k]]
    names[k] *= names[k] == agreed                                                 # silence about an edit: say what holds of both scenes
    lost = gone[:,3] > 0                                                          # an object that is no longer there: count what is left
    names[lost,0], first[lost] = gone[lost], _COUNT
    first = np.where((forced[:,1] & (forced[:,0].sum(-1) == 0)[:,None]).any(-1), _RELATION, first)
    much = rng.random(len(own))
    less = np.where(np.isin(first, (_COUNT, _QUANTITY)), .5*much, much)
    a, b = _say(rng, names[:,0], less, forced[:,0]), _say(rng, names[:,1], much, forced[:,1])
    pair = np.isin(first, (_AND, _RELATION))
    d = np.where(pair[:,None], _say(rng, names[:,2], much, np.zeros((len(own), 4), bool)), b)
    about = np.where(pair, three, two)
    other = rng.integers(0, facts.names.shape[0], len(own))                       # what is not there is taken from other scenes
    d = np.where((second == _NO)[:,None], _say(rng, facts.names[other,0], np.minimum(1, much + .3), np.zeros((len(own), 4), bool)), d)
    c = np.stack([_clauses(rng, facts, own, first, a, b, one, two), _clauses(rng, facts, own, second, d, d, about, about)], 1)
    again = np.isin(c[:,0,0], (THERE, PAIR)) & (c[:,1,0] == THERE) & (c[:,1,14] == 0) & (c[:,1,8] == c[:,0,8])
    c[:,1,-1] = again & (rng.random(len(own)) < .7)
    return c



#| export
_RELATION_WORDS = np.array([len(r.split()) for r in RELATIONS])

def _lengths(c):
    "Fewest and most words of each (.., 17) clause"
    phrase = lambda ids: (ids[...,:3] > 0).sum(-1) + 1 + (ids[...,3] >= PREDICATES.index('round'))*(ids[...,3] <= PREDICATES.index('pointed'))
    kind, a, b = c[...,0], phrase(c[...,5:9]), phrase(c[...,10:14])
    exact = (kind == COUNT) & (c[...,2] == c[...,3])
    at_least, few = (kind == COUNT) & ~exact & (c[...,4] == 0), (kind == COUNT) & (c[...,4] == 1) & (c[...,2] == 2)
    low = a + 1 + np.select([kind == 0, (kind == THERE) & (c[...,9] > 0), kind == PAIR, (kind == ALL) | (kind == MOST), at_least, few],
                            [-a-1, 3, _RELATION_WORDS[c[...,1]] + b + 1, 2, 2, 1], 0)
    free = ((kind == THERE) & (c[...,9] == 0) & (c[...,16] == 0)) | ((kind == PAIR) & (c[...,1] == 0))
    return low, low + np.select([free, exact], [2, 1], 0)

def _fits(codes):
    "Can this meaning be said in 5 to 16 words?"
    low, high = _lengths(codes)
    join = codes[:,1,0] > 0
    return (high.sum(1) + join >= 5) & (low.sum(1) + join <= 16)



#| export
def frequency(
    pool,                  # `Facts` of the reference scenes
    codes:np.ndarray,      # (K, 2, 17) meanings
    block:int=1024,        # clauses at a time
)->np.ndarray:             # (K,) how many scenes of the pool each is true of
    "How often each meaning is strictly true ('another' is read as 'a')"
    clauses, row = _unique_rows(codes.reshape(-1, WIDTH))
    clauses = clauses[order := np.argsort(clauses[:,0], kind='stable')]; row = np.argsort(order)[row].reshape(-1, 2)
    bits = np.concatenate([np.packbits(judge_clauses(pool, clauses[i:i+block])[0], axis=-1) for i in range(0, len(clauses), block)])
    out = [np.bitwise_count(bits[row[i:i+block,0]] & bits[row[i:i+block,1]]).sum(-1, dtype='i4') for i in range(0, len(row), block)]
    return np.concatenate(out)



#| export
POOL = 2000
_ANY, _MENTION, _SILENT = 0, 1, 2

@dataclass(frozen=True, eq=False)
class Wish:
    "What a caption has to be: one row per caption"
    own:np.ndarray       # (M,) its scene
    form:np.ndarray      # (M,) index into FORMS
    duty:np.ndarray      # (M,) 0 free, 1 must mention the twin's edit, 2 must not
    parent:np.ndarray    # (M,) the scene the duty is about
    lead:np.ndarray      # (M, 6) objects with small values are spoken of first
    forced:np.ndarray    # (M, 2, 4) size, texture, colour, noun of the first and second phrase that must be said
    gone:np.ndarray      # (M, 5) names of an object that the twin lost, else 0
    veil:np.ndarray      # (M,) a scene whose objects must share what is said, -1: none

    def rows(self, k): return Wish(**{f: getattr(self, f)[k] for f in self.__dataclass_fields__})

def make_wish(rng, scenes, kin):
    "Three to six captions per image (mean 4), their forms and their duties"
    each = 3 + _choose(rng, np.broadcast_to([.4, .3, .2, .1], (len(scenes), 4)))
    own = np.repeat(np.arange(len(scenes)), each); M = len(own)
    nth = np.arange(M) - np.repeat(each.cumsum() - each, each)
    form = _choose(rng, np.broadcast_to(list(FORMS.values()), (M, len(FORMS))))
    parent = kin.parent[own]
    duty = np.where(parent < 0, _ANY, 1 + (nth + rng.integers(0, 2, len(scenes))[own]) % 2)
    edit, one, two, fewer = (v[own] for v in (kin.edit, kin.one, kin.two, kin.fewer))
    lead, forced, gone = np.zeros((M, MOST_OBJECTS)), np.zeros((M, 2, 4), bool), np.zeros((M, 5), 'i1')
    push = np.where(duty == _MENTION, -1, 1.)
    k = np.flatnonzero((parent >= 0) & ~fewer); lead[k,one[k]] = push[k]
    k = np.flatnonzero((parent >= 0) & np.isin(edit, (EDITS.index('order'), EDITS.index('swap')))); lead[k,two[k]] = push[k]
    told = lambda name: np.flatnonzero((duty == _MENTION) & (edit == EDITS.index(name)))
    forced[told('texture'),0,1] = forced[told('colour'),0,2] = forced[told('shape'),0,3] = True
    forced[told('swap'),:,2:] = True; forced[told('order'),1,3] = True           # (second phrase only: read as 'use a relation')
    k = np.flatnonzero((duty == _MENTION) & fewer); gone[k] = scenes.facts.names[parent[k],one[k]]
    return Wish(own, form, duty, parent, lead, forced, gone, np.where((duty == _SILENT) & ~fewer, parent, -1))

def speak(
    rng:np.random.Generator,
    scenes:Scenes,         # S of them
    wish:Wish,             # M captions
    pool,                  # `Facts` of the reference scenes
    mu:float,              # aim at log10 of the frequency, on average
    spread:float=.6,       # ... and its standard deviation
    candidates:int=12,     # thoughts per caption
    common:float=.03,      # more frequent than this is not worth saying
)->tuple:                  # (M, 2, 17) meanings, each true of its scene; (M,) the duties that were met
    "What the speaker says; a duty that cannot be met in 30 rounds (a scene full of look-alikes) is dropped"
    duty, aim, codes = wish.duty.copy(), rng.normal(mu, spread, len(wish.own)), np.zeros((len(wish.own), 2, WIDTH), 'i1')
    todo, tries = np.arange(len(wish.own)), 0
    while len(todo):
        if tries == 60: raise DataError('speaker', f'{len(todo)} scenes without a caption', 'something true and not too common to say', 'Take another seed.')
        if tries == 30: duty[todo] = _ANY
        k = np.repeat(todo, candidates); w = replace(wish.rows(k), duty=duty[k])
        if tries > 3: w = replace(w, form=np.where(rng.random(len(k)) < .7, 0, 1 + rng.integers(0, 3, len(k))))
        c = _draft(rng, scenes.facts, w.own, w.form, w.lead, w.forced, w.gone, w.veil)
        ok = _fits(c) & (judge(scenes.facts, c, w.own) == 2)
        twin = np.flatnonzero(ok & (w.duty > 0))
        ok[twin] &= judge(scenes.facts, c[twin], w.parent[twin]) == np.where(w.duty[twin] == _MENTION, 0, 2)
        hits = np.zeros(len(k), 'i4')
        if ok.any(): hits[ok] = frequency(pool, c[ok])
        size = pool.atoms.shape[-1]
        miss = np.where(ok & (hits <= common*size), np.abs(np.log10((hits + .5)/size) - aim[k]), np.inf).reshape(-1, candidates)
        best = miss.argmin(1); found = np.isfinite(miss[np.arange(len(todo)),best])
        codes[todo[found]] = c.reshape(len(todo), candidates, 2, WIDTH)[np.arange(len(todo)),best][found]
        todo, tries = todo[~found], tries + 1
    return codes, duty



#| export
_COUNT_WORDS = dict(zip(range(2, 7), ('two', 'three', 'four', 'five', 'six')))

class _Voice:
    "Puts one meaning into words; all choices come from one row of uniforms"
    def __init__(self, u): self.u = iter(u)
    def chance(self, p): return next(self.u) < p
    def spell(self, predicate):
        words = SPELLINGS[PREDICATES[predicate]]; v = next(self.u)
        return words[0] if v < .6 or len(words) == 1 else words[1 + int((v-.6)/.4*(len(words)-1))]
    def nominal(self, ids, many=False):
        words = [self.spell(p) for p in ids[:3] if p]
        family = PREDICATES[ids[3]] in FAMILIES
        head = self.spell(0 if family else ids[3])
        return words + [self.spell(ids[3])]*family + [plural(head) if many else head]
    def phrase(self, ids, one=False, another=False):
        words = self.nominal(ids); some = self.chance(.06)
        det = 'one' if one else 'another' if another else 'some' if some else 'an' if words[0][0] in 'aeiou' else 'a'
        return [det] + words
    def number(self, least, most, soft, longer):
        if soft: return {2: ['a', 'few'], 3: ['several'], 4: ['many']}[least]
        if most > least: return ['at', 'least', _COUNT_WORDS[least]]
        long = self.chance(.3) or longer
        return ['a', 'couple', 'of'] if least == 2 and self.chance(.3) else ['exactly']*long + [_COUNT_WORDS[least]]
    def clause(self, c, longer):
        kind, a, b = c[0], c[5:9], c[10:14]
        there = ['there', 'is']*(self.chance(.15) or longer)
        if kind == THERE: return self.phrase(a, c[14], c[16]) + (['in', 'the', PREDICATES[c[9]]]) if c[9] else (not c[16])*there + self.phrase(a, c[14], c[16])
        if kind == PAIR: return ['there', 'is']*(bool(there) and c[1] == 0) + self.phrase(a, c[14]) + RELATIONS[c[1]].split() + self.phrase(
            b, c[15], c[1] == 0 and a[3] == b[3] and self.chance(.5))
        if kind == COUNT: return self.number(*c[2:5], longer) + self.nominal(a, True)
        if kind in (ALL, MOST): return [{ALL: 'all', MOST: 'most'}[kind]] + self.nominal(a, True) + ['are', self.spell(max(b))]
        return [{NO: 'no', ONLY: 'only'}[kind]] + self.nominal(a, kind == ONLY)

def word(
    rng:np.random.Generator,
    codes:np.ndarray,       # (M, 2, 17) meanings
    least:int=5,            # words
    most:int=16,
)->list:                    # M sentences
    "Sentences with these meanings"
    u, out = rng.random((len(codes), 2, 40)), []
    for code, draws in zip(codes.tolist(), u.tolist()):
        for longer, row in ((False, draws[0]), (True, draws[1]), (False, [.99]*40)):   # as it comes; the long way; the short way
            voice = _Voice(row)
            words = voice.clause(code[0], longer)
            if code[1][0]:
                plain = code[0][0] == code[1][0] == THERE and not code[0][9] and not code[1][9]   # 'a star and a moon' would be one clause
                words = words + [';' if voice.chance(.5) or plain else 'and'] + voice.clause(code[1], longer)
            if least <= len(words) <= most: break
        out.append(' '.join(words))
    return out



#| export
PRESETS = dict(tiny=(256, 64, (128,)), small=(2000, 500, (1000,)*2), full=(10_000, 1000, (1000,)*5))   # train, val, galleries of test
PARTS = ('train', 'val', 'test')

@dataclass(frozen=True, eq=False)
class Part:
    "All that is known of one split: what a model may see, and what only the judge sees"
    scenes:Scenes           # the judge's
    kin:Kin                 # who is a twin of whom
    codes:np.ndarray        # (M, 2, 17) meanings
    duty:np.ndarray         # (M,) 1: mentions the twin's edit, 2: does not, 0: not a twin's caption
    split:Split             # the model's

@dataclass(frozen=True, eq=False)
class World:
    "Scenes, captions and the truth of every pair"
    preset:str
    rho:float               # aimed share of true cross pairs, percent
    seed:int
    sigma:float             # noise of the regions
    tau:float               # share of twins
    eps:float               # share of wrong captions
    types:Types
    parts:dict              # name -> Part

    def part(self, name):
        if name not in self.parts: raise DataError('world', f'split {name!r}', f'one of {", ".join(PARTS)}')
        return self.parts[name]
    def split(self, name:str)->Split: return self.part(name).split
    def scenes(self, name:str)->Scenes: return self.part(name).scenes

    def truth(self,
        name:str,            # split
        images,              # image indices, any shape
        captions,            # caption indices, broadcast against them
    )->np.ndarray:           # uint8 half units 0, 1, 2 in the broadcast shape
        "Truth of pairs, judged when asked"
        p = self.part(name); i, c = np.broadcast_arrays(images, captions)
        flat = [judge(p.scenes.facts, p.codes[c.ravel()[k:k+2**18]], i.ravel()[k:k+2**18]) for k in range(0, max(i.size, 1), 2**18)]
        return np.concatenate(flat).reshape(i.shape)

    def matrix(self,
        name:str,            # split
        gallery:int=None,    # None: the whole split
    )->np.ndarray:           # (N, M) uint8 half units
        "Truth of every pair of a gallery"
        images, captions = self.gallery(name, gallery)
        p = self.part(name)
        return judge_all((p.scenes if gallery is None else p.scenes[images]).facts, p.codes[captions])

    def gallery(self,
        name:str,            # split
        gallery:int=None,    # None: the whole split
    )->tuple:                # image indices, caption indices
        "Which images and captions are searched together"
        s = self.split(name); keep = np.ones(len(s), bool) if gallery is None else s.gallery == gallery
        if not keep.any(): raise DataError('world', f'gallery {gallery} of {name}', f'0 to {s.gallery.max()}')
        return np.flatnonzero(keep), np.flatnonzero(keep[s.img_of])

def make(
    preset:str='small',      # 'tiny', 'small' or 'full'
    rho:float=.25,           # wanted share of true cross pairs, percent
    seed:int=0,
    sigma:float=.35,         # noise of the region features
    tau:float=.3,            # share of scenes that are twins
    eps:float=0.,            # share of captions that are wrong by one word
)->World:
    "A world: the same arguments give the same bytes"
    if preset not in PRESETS: raise DataError('scenes', f'preset {preset!r}', f'one of {", ".join(PRESETS)}')
    types = make_types(seed); pool = make_scenes(stream(seed, 'pool'), types, POOL)
    train, val, tests = PRESETS[preset]
    parts, images, captions = {}, 0, 0
    for name, sizes in zip(PARTS, ((train,), (val,), tests)):
        parts[name] = p = _make_part(name, sizes, rho, seed, sigma, tau, eps, types, pool, images, captions)
        images, captions = images + len(p.scenes), captions + len(p.codes)
    return World(preset, rho, seed, sigma, tau, eps, types, parts)

def _make_part(name, sizes, rho, seed, sigma, tau, eps, types, pool, first_image, first_caption):
    "One split: scenes with twins in each gallery, captions, regions"
    novel, rng = name == 'test', lambda what, g=0: stream(seed, name, what, g)
    made = [make_twins(rng('twins', g), make_scenes(rng('scenes', g), types, n, novel), types, tau, novel) for g, n in enumerate(sizes)]
    scenes = Scenes.join([m[0] for m in made]); offset = np.cumsum([0, *sizes[:-1]])
    kin = Kin(*(np.concatenate([np.where(getattr(m[1], f) >= 0, getattr(m[1], f) + o, -1) if f == 'parent' else getattr(m[1], f)
                                for m, o in zip(made, offset)]) for f in Kin.__dataclass_fields__))
    wish = make_wish(rng('wish'), scenes, kin)
    codes, duty = speak(rng('speaker'), scenes, wish, pool.facts, aim_for(rho, tau, sizes[0]))
    sentences = word(rng('words'), codes)
    feats, boxes, num = detect(rng('regions'), scenes, pool, sigma)
    split = Split(name, feats, num, sentences, wish.own, first_image + np.arange(len(scenes)), first_caption + np.arange(len(codes)), boxes,
                  np.repeat(np.arange(len(sizes)), sizes), f'scenes seed {seed}')
    return Part(scenes, kin, codes, duty, split)

def aim_for(
    rho:float,               # wanted share of true cross pairs, percent
    tau:float,               # share of twins
    images:int,              # in a gallery
)->float:                    # mean of log10 of the frequencies to aim at
    "Calibration of the speaker"
    return np.log10(rho/100) - .4

