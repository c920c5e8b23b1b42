"The drawn world against a second opinion (scenes_brute.py), and everything it promises about itself"
import hashlib
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import scenes_brute as brute
from itm_nb.core.errors_files import DataError
from itm_nb.scenes.captions import FORMS, word
from itm_nb.scenes.dataset import PARTS, make, one_word, reader_scores, swapped, twin_foils, word_foils
from itm_nb.scenes.grammar import (
    COLOURS, NONE, SHAPES, SPELLINGS, VOCABULARY, encode, judge, judge_all, parse, scene, Scenes, truth)
from itm_nb.scenes.world import EDITS, OUTLINES, draw, make_scenes, make_types, stream, visible

GRAMMAR = brute.Grammar(SPELLINGS)


@pytest.fixture(scope='module')
def tiny(): return make('tiny', seed=3)


@pytest.fixture(scope='module')
def small(): return make('small')


def scored(scenes, i, sentence):
    "The second opinion in the coding of `truth`"
    tree = GRAMMAR.sentence(sentence)
    return NONE if tree is None else int(2*brute.truth(brute.objects(scenes, i), tree))


def mangled(rng, sentences, count):
    "Sentences near the language: captions, halves of two captions, words replaced, dropped, doubled, exchanged"
    out = []
    for kind in rng.integers(0, 6, count):
        a, b = (sentences[j].split() for j in rng.integers(0, len(sentences), 2))
        i, j = rng.integers(0, len(a), 2)
        if kind == 1: a = a[:i] + b[rng.integers(0, len(b)):]
        if kind == 2: a[i] = VOCABULARY[rng.integers(len(VOCABULARY))]
        if kind == 3: a = a[:i] + a[i+1:]
        if kind == 4: a[i], a[j] = a[j], a[i]
        if kind == 5: a = one_word(rng, ' '.join(a), None).split() if one_word(rng, ' '.join(a), None) else a
        out.append(' '.join(a))
    return out


def random_meanings(rng, count, nouns=('thing', 'thing', 'round', 'boxy', 'pointed', *SHAPES)):
    "Sentences of every kind of clause, also those a speaker seldom says, with general words so that many are true"
    pick = lambda *options: options[rng.integers(len(options))]
    spell = lambda p: pick(*SPELLINGS[p])
    def nominal(many):
        words = [spell(pick(*slot)) for slot, p in zip(brute.SLOTS, (.25, .3, .3)) if rng.random() < p]
        noun = pick(*nouns)
        head = spell('thing' if noun in brute.FAMILY else noun)
        head = {'leaf': 'leaves', 'cross': 'crosses', 'plus': 'pluses'}.get(head, head + 's') if many else head
        return ' '.join(words + ([spell(noun)] if noun in brute.FAMILY else []) + [head])
    np_ = lambda: f'{pick("a", "a", "some", "one", "another")} {nominal(False)}'
    number = lambda: pick('two', 'three', 'four', 'exactly two', 'at least two', 'at least three', 'a couple of', 'a few', 'several', 'many', 'six')
    relation = lambda: pick('left of', 'right of', 'above', 'below', 'near', 'far from', 'bigger than', 'the same colour as', 'and')
    adjective = lambda: spell(pick(*pick(*brute.SLOTS)))
    clause = lambda: pick(lambda: np_(), lambda: 'there is ' + np_(), lambda: f'{number()} {nominal(True)}', lambda: f'{np_()} {relation()} {np_()}',
                          lambda: f'no {nominal(False)}', lambda: f'all {nominal(True)} are {adjective()}', lambda: f'most {nominal(True)} are {adjective()}',
                          lambda: f'only {nominal(True)}', lambda: f'{np_()} in the {pick("top", "bottom", "left", "right", "middle")}')()
    return [clause() + (f' {pick("and", ";")} {clause()}' if rng.random() < .6 else '') for _ in range(count)]


# ---- truth -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('what', ['captions', 'mangled', 'any'])
def test_truth_equals_brute_force(small, what):
    rng, s = np.random.default_rng(5), small.split('test')
    scenes = small.scenes('test')
    sentences = {'captions': lambda: [s.captions[j] for j in rng.integers(0, len(s.captions), 4000)], 'mangled': lambda: mangled(rng, s.captions, 4000),
                 'any': lambda: random_meanings(rng, 6000)}[what]()
    images = rng.integers(0, len(s), len(sentences))
    if what == 'captions': images[:1000] = s.img_of[[s.captions.index(c) for c in sentences[:1000]]]       # some where most are true
    fast = truth(scenes, sentences, images)
    slow = np.array([scored(scenes, i, c) for i, c in zip(images, sentences)])
    wrong = np.flatnonzero(fast != slow)
    assert not len(wrong), [(sentences[j], fast[j], slow[j], brute.objects(scenes, images[j])) for j in wrong[:3]]
    assert {0, 1, 2} <= set(fast) and (NONE in fast) == (what == 'mangled')


def test_halves_equal_brute_force():
    "Scenes on the borders of all vague words, so that the halves meet each other"
    rng = np.random.default_rng(6)
    scenes = make_scenes(stream(1, 'borders'), make_types(1), 300)
    for name, values in (('hue', [0, 1/16, 1/8, 1/16]), ('r', [.07, .09, .115, .138, .16]),
                         ('x', [.1, .2, .28, .33, .5, .67]), ('y', [.1, .2, .28, .33, .5, .67])):
        getattr(scenes, name)[:] = rng.choice(values, scenes.x.shape) + (0 if name == 'hue' else rng.uniform(-.004, .004, scenes.x.shape))
    scenes.shape[:] = rng.choice(2, scenes.x.shape)
    common = {w for p in ('red', 'orange', 'plain', *brute.SLOTS[0]) for w in SPELLINGS[p]}
    rare = {w for slot in brute.SLOTS for p in slot for w in SPELLINGS[p]} - common
    sentences = [s for s in random_meanings(rng, 20000, ('thing', 'round', 'circle', 'ring')) if not rare & set(s.split())][:5000]
    images = rng.integers(0, 300, len(sentences))
    fast = truth(scenes, sentences, images)
    slow = np.array([scored(scenes, i, c) for i, c in zip(images, sentences)])
    wrong = np.flatnonzero(fast != slow)
    assert not len(wrong), [(sentences[j], fast[j], slow[j], brute.objects(scenes, images[j])) for j in wrong[:3]]
    assert (fast == 1).mean() > .1


def test_the_three_ways_to_judge_agree(small):
    s, rng = small.split('test'), np.random.default_rng(7)
    extra = random_meanings(rng, 800)
    codes = np.concatenate([small.part('test').codes[:800], encode(extra)[0]])
    facts = small.scenes('test')[np.arange(203)].facts                                       # not a multiple of eight
    block = judge_all(facts, codes)
    image, sentence = np.indices(block.shape)
    assert (judge(facts, codes[sentence.ravel()], image.ravel()).reshape(block.shape) == block).all()
    assert (judge_all(facts, codes, block=5000) == block).all()
    m = small.matrix('test', 1)
    images, captions = small.gallery('test', 1)
    assert m.shape == (1000, len(captions)) and (s.gallery[images] == 1).all()
    assert (small.truth('test', images[:,None], captions[None]) == m).all()
    picks = rng.integers(0, len(captions), (1000, 3))
    assert (small.truth('test', images[:,None], captions[picks]) == np.take_along_axis(m, picks, 1)).all()
    assert (truth(small.scenes('test')[images[:50]], [s.captions[j] for j in captions[:60]]) == m[:50,:60]).all()


def test_dropping_an_adjective(small):
    "Never less true where something is claimed to be there; never more true of what is denied, or of all things there are"
    rng = np.random.default_rng(8)
    scenes = small.scenes('val')
    adjectives = {w for slot in brute.SLOTS for p in slot for w in SPELLINGS[p]}
    seen = dict(more=0, less=0)
    sentences = [s for s in random_meanings(rng, 4000) if not {'one', 'most', 'only', 'exactly', 'couple', 'few', 'several', 'many', *brute.NUMBERS} & set(s.split())
                 and 'same' not in s]
    for s in sentences:
        words = s.split()
        joined = next((k for k, w in enumerate(words) if w == ';'), None)
        if joined or ' and ' in s: continue
        at = [k for k, w in enumerate(words) if w in adjectives and words[k-1] != 'are']
        if not at: continue
        shorter = ' '.join(words[:at[0]] + words[at[0]+1:])
        a, b = truth(scenes, s).astype(int), truth(scenes, shorter).astype(int)
        if words[0] == 'no': assert (b <= a).all(); seen['less'] += 1
        elif words[0] == 'all':
            lo = truth(scenes, 'no ' + ' '.join(words[1:words.index('are')])) < 2                  # some N may exist
            assert (b <= a)[lo].all(); seen['less'] += 1
        else: assert (b >= a).all(); seen['more'] += 1
    assert min(seen.values()) > 50


TOY = scene('circle red plain .07 .2 .5', 'star blue striped .16 .8 .5', 'circle .0625 plain .12 .5 .15')        # the third is between red and orange

@pytest.mark.parametrize('sentence, value, grammatical', [
    ('a red circle', 2, True), ('an orange circle', 1, True), ('a orange circle', 1, False), ('an red circle', 2, False), ('a green circle', 0, True),
    ('two circles', 2, True), ('two circle', 2, False), ('two red circles', 1, True), ('three circles', 0, True), ('three things', 2, True), ('one star', 2, True),
    ('one circle', 0, True), ('one red circle', 1, True), ('one stars', 2, False), ('at least two circles', 2, True), ('at least three circles', 0, True),
    ('at least two red things', 1, True), ('exactly two round things', 2, True), ('a couple of circles', 2, True), ('a few circles', 2, True), ('a few stars', 1, True),
    ('a few hearts', 0, True), ('several circles', 1, True), ('several things', 2, True), ('many things', 1, True), ('many circles', 0, True),
    ('no moon', 2, True), ('no moons', 2, True), ('no star', 0, True), ('no orange thing', 1, True), ('all circles are plain', 2, True), ('all circles are red', 1, True),
    ('all things are plain', 0, True), ('all moons are red', 0, True), ('all circle are plain', 2, False), ('most things are plain', 2, True),
    ('most circles are small', 1, True), ('most stars are blue', 0, True), ('only circles', 0, True), ('only round things', 0, True), ('only things', 2, True),
    ('a circle left of a star', 2, True), ('a star left of a circle', 0, True), ('a star bigger than a red circle', 2, True), ('a circle above a circle', 2, True),
    ('a circle near a star', 0, True), ('a red circle the same colour as a circle', 1, True), ('a circle and another circle', 2, True),
    ('a star and another star', 0, True), ('a star ; a star', 2, True), ('a star ; another star', 0, True), ('a circle ; another circle', 2, True),
    ('another star', 2, False), ('no moon ; another star', 2, False), ('there is a star ; no moon', 2, True), ('a star in the right', 2, True),
    ('a star in the middle', 0, True), ('a circle in the top', 2, True), ('a small red circle left of a star ; no moon', 2, True),
    ('a red star', 0, True), ('a star and a circle and a moon', 0, True), ('a huge lined azure star', 2, True),
    ('', NONE, False), ('red', NONE, False), ('a dog', NONE, False), ('circle a', NONE, False), ('a red', NONE, False), ('the star', NONE, False),
    ('a star left a circle', NONE, False), ('a star ;', NONE, False), ('; a star', NONE, False), ('a star a circle', NONE, False), ('no', NONE, False),
    ('all circles are', NONE, False), ('all circles red', NONE, False), ('a circle red', NONE, False), ('a star in the', NONE, False), ('at two stars', NONE, False),
    ('a striped big star', NONE, False), ('a round star', NONE, False), ('a Red circle', NONE, False), ('a star ; a moon ; a leaf', NONE, False),
    ('no red and a star', NONE, False), ('there is two stars', NONE, False)])
def test_truth_and_grammar_by_table(sentence, value, grammatical):
    assert truth(TOY, sentence)[0] == value == scored(TOY, 0, sentence)
    meaning, tree = parse(sentence), GRAMMAR.sentence(sentence)
    assert (meaning is not None and meaning.grammatical) == grammatical == bool(tree and tree[1])


def test_grammar_flags_equal_brute_force(small):
    rng = np.random.default_rng(9)
    swap = {'a': 'an', 'an': 'a', 'star': 'stars', 'stars': 'star', 'thing': 'things', 'circle': 'circles', 'some': 'two', 'one': 'six'}
    sentences = random_meanings(rng, 3000) + mangled(rng, small.split('val').captions, 2000)
    sentences = [' '.join(swap.get(w, w) if rng.random() < .2 else w for w in s.split()) for s in sentences]
    ours = [(m is not None, m is not None and m.grammatical) for m in map(parse, sentences)]
    theirs = [(t is not None, bool(t and t[1])) for t in map(GRAMMAR.sentence, sentences)]
    assert ours == theirs and {(False, False), (True, False), (True, True)} == set(ours)


def test_empty_and_single_inputs():
    assert truth(TOY, []).shape == (1, 0)
    assert truth(TOY, ['a star'], [0]).tolist() == [2] and truth(TOY, 'a star', [0, 0]).tolist() == [2, 2]
    one = scene('star red plain .1 .5 .5')
    assert truth(one, ['a star and a thing', 'only stars', 'a thing']).tolist() == [[0, 2, 2]]


# ---- the world ---------------------------------------------------------------------------------------------------------------------

def digest(world):
    h = hashlib.sha256()
    for name in PARTS:
        s = world.split(name)
        for a in (s.feats, s.boxes, s.num, s.img_of, s.img_ids, s.cap_ids, s.gallery, world.part(name).codes, world.scenes(name).hue): h.update(np.ascontiguousarray(a))
        h.update('\n'.join(s.captions).encode())
    return h.hexdigest()


def test_same_arguments_same_bytes(tiny):
    assert digest(make('tiny', seed=3)) == digest(tiny)
    others = [make('tiny', seed=4), make('tiny', seed=3, rho=1., eps=.03), make('tiny', seed=3, sigma=.15)]
    assert len({digest(w) for w in [tiny, *others]}) == 4


def test_sizes_ids_and_galleries(tiny, small):
    assert [len(tiny.split(n)) for n in PARTS] == [256, 64, 128] and [len(small.split(n)) for n in PARTS] == [2000, 500, 2000]
    assert np.bincount(small.split('test').gallery).tolist() == [1000, 1000] and set(tiny.split('test').gallery) == {0}
    for w in (tiny, small):
        for ids in ('img_ids', 'cap_ids'):
            everything = np.concatenate([getattr(w.split(n), ids) for n in PARTS])
            assert len(np.unique(everything)) == len(everything)
        for n in PARTS:
            s = w.split(n)
            assert s.feats.dtype == np.float32 and s.feats.shape[1] <= 10 and s.boxes.shape == s.feats.shape[:2] + (4,)
            padding = np.arange(s.feats.shape[1]) >= s.num[:,None]
            assert (s.feats[padding] == 0).all() and (s.boxes[padding] == 0).all() and (s.feats[~padding] != 0).any(1).all()
            assert s.boxes.min() >= 0 and s.boxes.max() <= 1 and (s.boxes[...,2:] >= s.boxes[...,:2]).all()
            each = np.bincount(s.img_of); assert each.min() >= 3 and each.max() <= 6
            assert abs(each.mean() - 4) < (.5 if w is tiny else .1)


def test_captions_are_sentences_of_the_language(small):
    for n in PARTS:
        s = small.split(n)
        lengths = [len(c.split()) for c in s.captions]
        assert min(lengths) >= 5 and max(lengths) <= 16 and set(' '.join(s.captions).split()) <= set(VOCABULARY)
        codes, known, clean = encode(s.captions)
        assert known.all() and clean.all() and (codes == small.part(n).codes).all()                     # words say exactly what was meant
    used = set(' '.join(small.split('train').captions).split())
    assert len(used) >= len(VOCABULARY) - 3                                                              # nearly every word occurs


def test_every_meaning_can_be_said_and_read_back():
    rng = np.random.default_rng(10)
    codes, known, _ = encode(random_meanings(rng, 3000))
    assert known.all()
    own = [c for c in codes if not (c[0][0] == c[1][0] == 2)]
    spoken = word(rng, np.stack(own), least=1, most=99)
    again, known, clean = encode(spoken)
    same = (again == np.stack(own)).all((1, 2))
    odd = [spoken[j] for j in np.flatnonzero(~same)]
    assert known.all() and same.mean() > .9, odd[:5]


@pytest.mark.parametrize('rho, seed', [(.25, 0), (.05, 0), (.25, 11), (1., 12)])
def test_measured_rho_is_the_wanted_one(small, rho, seed):
    w = small if (rho, seed) == (.25, 0) else make('small', rho=rho, seed=seed)
    for name in PARTS:
        for g in range(w.split(name).gallery.max() + 1):
            m = w.matrix(name, g); images, captions = w.gallery(name, g); own = w.split(name).img_of[captions] - images[0]
            assert (m[own,np.arange(len(own))] == 2).all()                                               # own captions are true
            cross = np.ones(m.shape, bool); cross[own,np.arange(len(own))] = False
            measured = 100*(m[cross] == 2).sum()/(m[cross] != 1).sum()
            assert .8*rho <= measured <= 1.2*rho, (name, g, measured)


@pytest.mark.parametrize('rho', [.25, 1.])
@pytest.mark.parametrize('seed', range(6))
def test_rho_holds_in_the_tiny_world(rho, seed):
    "64 images hold fifty true pairs: twins are fewer there and the speaker tries again"
    w = make('tiny', rho=rho, seed=seed)
    for name, shares in w.card()['rho'].items(): assert .8*rho <= np.mean(shares) <= 1.2*rho, (name, shares)
    assert all(len(w.twins(name).twin) for name in PARTS)


def test_kinds_of_captions_have_their_shares(small):
    shares = small.card()['kinds']
    for kind, wanted in FORMS.items(): assert abs(shares[kind] - 100*wanted) < 8, shares


def test_objects_can_be_seen(small):
    "Rendered with plain masks, object by object: at least 60 % of each is visible"
    from PIL import Image, ImageDraw
    scenes, size = small.scenes('test'), 300
    for i in range(0, 150):
        masks = []
        for o in range(scenes.n[i]):
            img = Image.new('1', (2*size, 2*size))                                                        # the frame is the middle half
            xy = (OUTLINES[SHAPES[scenes.shape[i,o]]]*scenes.r[i,o] + [scenes.x[i,o], scenes.y[i,o]])*size + size/2
            ImageDraw.Draw(img).polygon([tuple(p) for p in xy], fill=1); masks.append(np.array(img))
        frame = np.zeros_like(masks[0]); frame[size//2:-size//2,size//2:-size//2] = True
        for o, mask in enumerate(masks):
            seen = mask & frame & ~np.any([np.zeros_like(mask), *masks[o+1:]], axis=0)
            assert seen.sum() >= .55*mask.sum(), (i, o, seen.sum()/mask.sum())                            # .6, less what 40 sample points can miss
    for n in PARTS: assert visible(small.scenes(n)).min() >= .6


def test_twins_differ_by_one_edit(small):
    for name in PARTS:
        scenes, t, s, part = small.scenes(name), small.twins(name), small.split(name), small.part(name)
        assert abs(len(t.twin)/len(s) - .3) < .05 and (t.original < t.twin).all() and (s.gallery[t.original] == s.gallery[t.twin]).all()
        assert set(np.unique(t.edit)) == set(EDITS) and min(np.unique(t.edit, return_counts=True)[1]) > .08*len(t.twin)
        for a, b, kind in zip(t.original, t.twin, t.edit):
            p, q = brute.objects(scenes, a), brute.objects(scenes, b)
            different = [o for o in range(min(len(p), len(q))) if p[o] != q[o] and not (repr(p[o]) == repr(q[o]))]
            if kind == 'number': assert abs(len(p) - len(q)) == 1; continue
            assert len(p) == len(q) and len(different) == (2 if kind in ('order', 'swap') else 1), (kind, p, q)
            keys = {k for o in different for k in p[o] if repr(p[o][k]) != repr(q[o][k])}
            assert keys <= {'colour': {'hue', 'light'}, 'swap': {'hue', 'light'}, 'order': {'x', 'y'}}.get(kind, {kind})
            if kind == 'swap': assert {repr((p[o]['hue'], p[o]['light'])) for o in different} == {repr((q[o]['hue'], q[o]['light'])) for o in different}


def test_half_of_the_captions_of_twins_tell(small):
    for name in PARTS:
        t, s = small.twins(name), small.split(name)
        original = np.full(len(s), -1); original[t.twin] = t.original
        assert (small.truth(name, original[s.img_of[t.mention]], t.mention) == 0).all()                  # a true negative
        assert (small.truth(name, original[s.img_of[t.silent]], t.silent) == 2).all()                    # a false negative
        of_twins = np.isin(s.img_of, t.twin).sum()
        assert len(t.mention) + len(t.silent) >= .995*of_twins and abs(len(t.mention)/of_twins - .5) < .02


def test_swap_foils_have_the_same_words(small):
    foils, s = twin_foils(small, 'test'), small.split('test')
    assert len(foils) >= 60
    for i, j, foil in foils:
        assert s.img_of[j] == i and sorted(s.captions[j].replace('an ', 'a ').split()) == sorted(foil.replace('an ', 'a ').split())
        assert parse(foil).grammatical and scored(small.scenes('test'), i, foil) == 0
    assert swapped('an orange star and a red moon') == 'a red star and an orange moon' and swapped('a red star and a moon') is None


def test_word_foils_are_false_and_differ_by_one_word(small):
    foils, s = word_foils(small, 'val', tries=1), small.split('val')
    assert len(foils) > 300
    for i, j, foil in foils:
        a, b = ([w for w in c.split() if w not in ('a', 'an')] for c in (s.captions[j], foil))
        assert len(a) == len(b) and sum(x != y for x, y in zip(a, b)) == 1 and s.img_of[j] == i
    assert (truth(small.scenes('val'), [f for *_, f in foils], [i for i, *_ in foils]) == 0).all()


def test_held_out_pairs_are_only_in_test(small):
    assert small.types.held_out.sum() == 18 and .2 < small.novel('test').mean() < .7
    assert not small.novel('train').any() and not small.novel('val').any()


def test_wrong_captions():
    w = make('tiny', eps=.1, seed=1)
    n = 'train'; s = w.split(n); t = w.truth(n, s.img_of, np.arange(len(s.captions)))
    assert .05 < (t == 0).mean() < .15 and ((t == 0) | (t == 2)).all()
    assert (encode(s.captions)[0] == w.part(n).codes).all()


@pytest.mark.parametrize('bad, wanted', [(dict(preset='big'), 'tiny, small, full'), (dict(rho=5.), 'percent'), (dict(rho=0.), 'percent'), (dict(tau=1.), 'tau 0 to'),
                                         (dict(tau=-.1), 'tau 0 to'), (dict(eps=2.), 'eps 0 to'), (dict(sigma=-1.), 'sigma')])
def test_bad_arguments(bad, wanted):
    with pytest.raises(DataError, match=wanted): make(**{'preset': 'tiny', **bad})


def test_bad_names(tiny):
    with pytest.raises(DataError, match='train, val, test'): tiny.split('dev')
    with pytest.raises(DataError, match='0 to 0'): tiny.matrix('test', 3)
    with pytest.raises(DataError, match='swap'): twin_foils(tiny, 'test', 'mirror')


def test_extremes_of_the_knobs():
    for kw in (dict(tau=0.), dict(tau=.6, rho=1.), dict(sigma=0.), dict(rho=.05)):
        w = make('tiny', seed=2, **kw)
        for n in PARTS:
            s = w.split(n)
            assert (w.truth(n, s.img_of, np.arange(len(s.captions))) == 2).all() and (len(w.twins(n).twin) > 0) == (w.tau > 0)


def test_drawing():
    img = draw(TOY, 0, 100)
    px = np.array(img).astype(int)
    assert img.size == (100, 100) and px[50,20,0] > 180 and px[50,20,2] < 90 and px[15,50,0] > 180               # the red circle, the one at the top
    assert (np.array(draw(TOY, 0, 100)) == px).all()


def test_speed(small):
    start = time.process_time(); make('small', seed=21); assert time.process_time() - start < 15                # 3 s on an idle core
    start = time.process_time(); small.matrix('test', 0); assert time.process_time() - start < 1.5              # .06 s


@pytest.mark.slow
@pytest.mark.parametrize('rho', [.05, .25, 1.])
@pytest.mark.parametrize('seed', [31, 32, 33, 34])
def test_rho_over_many_worlds(rho, seed):
    test_measured_rho_is_the_wanted_one(None, rho, seed)


@pytest.mark.slow
def test_full_is_made_in_a_minute():
    start = time.process_time(); w = make('full'); assert time.process_time() - start < 60
    assert [len(w.split(n)) for n in PARTS] == [10_000, 1000, 5000]
    for n, shares in w.card()['rho'].items(): assert .2 < np.mean(shares) < .3, n
