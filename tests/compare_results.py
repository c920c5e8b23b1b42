"""Which rows of numbers of one Markdown file are missing from another? For a results page that was moved or made anew:

    git show b812f1f:README.md > old.md          # the last README that held all results
    python tests/compare_results.py old.md figures/RESULTS.md
"""
import re
import sys
from collections import Counter
from pathlib import Path


def rows(text):
    "The rows of all tables, as lists of cells"
    lines = (line.strip() for line in text.splitlines())
    return [[cell.strip() for cell in line.strip('|').split('|')]
            for line in lines if line.startswith('|') and not set(line) <= set('|-: ')]


def numbers(row):
    "The numbers of a row without its first cell, as they are written"
    return tuple(n for cell in row[1:] for n in re.findall(r'[-+]?\d[\d,.]*', cell.replace('−', '-')))


def missing(old, new):
    "(rows of numbers in the old text, those of them that the new one does not have, as often)"
    have, counted, gone = Counter(map(numbers, rows(new))), 0, []
    for row in rows(old):
        of_row = numbers(row)
        if not of_row:
            continue
        counted += 1
        if not have[of_row]:
            gone.append(row)
        have[of_row] -= 1
    return counted, gone


if __name__ == '__main__':
    counted, gone = missing(*(Path(p).read_text('utf-8') for p in sys.argv[1:3]))
    print(f'{counted} rows with numbers, {counted - len(gone)} of them equal')
    for row in gone:
        print(' | '.join(row))
