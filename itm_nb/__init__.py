"""Image-text matching: which negatives make a model match images and texts? The names below are imported when they are asked for."""
__version__ = "0.1.0"

_HOME = dict(ranks='metrics.ranks', summary='metrics.ranks', mine='methods.offline_mining', aoq='methods.aoq', fne='methods.fne',
             tags='methods.tags_dc', vsepp='methods.method', infonce='methods.method', audit='analysis.audit',
             search='methods.offline_mining')


def __getattr__(name):
    "The object of that name, from the module that has it"
    from importlib import import_module
    if name not in _HOME: raise AttributeError(f'itm_nb has no {name!r}; there are {sorted(_HOME)}')
    return getattr(import_module(f'itm_nb.{_HOME[name]}'), name)


def __dir__(): return sorted([*globals(), *_HOME])
