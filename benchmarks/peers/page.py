"The page of results: each cell comes from rows, and what is better or worse from comparing them"
import ast, statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
OURS = 'ours'
NOISE = 1.02  # values that differ by less are called the same

@dataclass
class Cell:
    "What a library gave for a case, in all rounds"
    values:list = field(default_factory=list)
    details:list = field(default_factory=list)
    of:int|None = None
    error:str|None = None  # Why it failed
    why:str|None = None    # Why there is nothing to measure

    def add(self, row):
        self.error,self.why,self.of = row.get('error') or self.error,row.get('why') or self.why,row.get('of') or self.of
        if row.get('value') is not None:
            self.values.append(row['value'])
            self.details.append(row.get('detail'))

    @property
    def right(self): return bool(self.values) and not self.error
    @property
    def value(self): return statistics.median(self.values)
    @property
    def detail(self):
        "That of the round whose value is in the middle"
        return self.details[sorted(range(len(self.values)), key=lambda i: self.values[i])[(len(self.values)-1)//2]]

@dataclass
class Line:
    "A case in one unit: a cell by library"
    case:str
    unit:str
    best:str|None  # 'low', 'high', or None: to come out right is all
    cells:dict

def number(x):
    "`x` with three digits or more"
    return f'{x:,.0f}' if abs(x)>=100 else f'{x:.3g}'

def lines_of(rows):
    "The `Line`s of a measure, in the order in which they came"
    found = {}
    for r in rows:
        if r.get('unit') is None: continue
        line = found.setdefault((r['case'],r['unit']), Line(r['case'], r['unit'], None, {}))
        line.best = r.get('best') or line.best
        line.cells.setdefault(r['library'], Cell()).add(r)
    for r in rows:  # without a unit: of a process that failed, which may have had several cases, or of a case that the library has not
        if r.get('unit') is not None or not ('error' in r or 'why' in r): continue
        for line in found.values():
            meant = r['case'] and (line.case==r['case'] or line.case.split(',')[0] in r['case'].split())
            if meant and r['library'] not in line.cells: line.cells[r['library']] = Cell(error=r.get('error'), why=r.get('why'))
    return list(found.values())

def apart(a, b): # Cells
    "Do two cells differ by more than noise? Their rounds do not overlap, and the medians are not next to each other"
    low,high = sorted((a,b), key=lambda o: o.value)
    return max(low.values)<min(high.values) and high.value>NOISE*low.value

def verdict(line):
    "What ours is beside the best of the others: a word (better, same, worse, alone, fails), and the sentence of the table"
    own,others = line.cells.get(OURS, Cell()),{k:o for k,o in line.cells.items() if k!=OURS and not o.why}
    right = {k:o for k,o in others.items() if o.right}
    if not own.right: return ('worse',f'worse: {", ".join(right)} can') if right else ('fails','fails')
    if not right: return ('better','better: no other is right') if others else ('alone','alone')
    if not line.best: return 'same','right as well'
    name = min(right, key=lambda k: right[k].value if line.best=='low' else -right[k].value)
    a,b = own.value,right[name].value
    if not apart(own, right[name]): return 'same',f'same as {name}'
    word = 'better' if (a<b)==(line.best=='low') else 'worse'
    times = '' if own.of or not min(a, b)>0 else f' ×{number(max(a, b)/min(a, b))}'
    return word,f'{word} than {name}{times}'

class Notes:
    "Numbers for what is said under a table, each once"
    def __init__(self): self.said = {}
    def __call__(self, text): return self.said.setdefault(text, len(self.said)+1)
    def lines(self): return [f'{n}. `{text.replace("`", "’")}`' for text,n in self.said.items()]

def shown(cell, notes):
    "The text of a cell"
    if cell is None or cell.why: return '—'
    if cell.error: return f'**fails** [{notes(cell.error)}]'
    if not cell.values: return ''
    text = number(cell.value)+(f' of {cell.of}' if cell.of else '')
    if len(set(cell.values))>1: text += f' ({number(min(cell.values))} to {number(max(cell.values))})'
    return text+(f'; {cell.detail}' if cell.detail else '')

def table(head, rows): return [f'| {" | ".join(o)} |' for o in (head, ['---']*len(head), *rows)]

def lacks(rows, libraries):
    "Sentences why a library has no value: for all cases, or for some"
    found = {}
    for r in rows:
        if r.get('why'): found.setdefault((r['library'],r['why']), []).append(r)
    for (library,why),some in found.items():
        cases = list(dict.fromkeys(o['unit'] or o['case'] for o in some if o['unit'] or o['case']))
        yield f'— {library}: {why}'+(f' ({"; ".join(cases)})' if library in libraries and cases else '')

def section(measure, rows, order):
    "Heading, what was measured, table, and what is to be said under it"
    lines,notes = lines_of(rows),Notes()
    there = {k for o in lines for k,c in o.cells.items() if not c.why}
    libraries = [o for o in order if o in there]
    body = [[o.case,o.unit,*(shown(o.cells.get(k), notes) for k in libraries),verdict(o)[1]] for o in lines]
    if notes.said:
        tried = [[c for o in lines if (c := o.cells.get(k)) and not c.why] for k in libraries]
        body.append(['**right**','',*(f'**{sum(c.right for c in o)} of {len(o)}**' for o in tried),''])
    text = ast.get_docstring(ast.parse((HERE/f'{measure}.py').read_text(encoding='utf-8')))
    under = [*notes.lines(),*([''] if notes.said else []),*(f'{o}  ' for o in lacks(rows, libraries))]
    return '\n'.join([f'## `{measure}.py`','',text,'',*table(['','unit',*libraries,'ours is'], body),'',*under]).strip()+'\n'

WORDS = 'better','same','worse','fails','alone'

def summary(by_measure):
    "How often ours is better, the same and worse; and where it is worse"
    words = {m:[(o,*verdict(o)) for o in lines_of(rows)] for m,rows in by_measure.items()}
    counts = {m:Counter(w for _,w,_ in found) for m,found in words.items()}
    total = sum(counts.values(), Counter())
    body = [[f'`{m}.py`',*(str(c[w] or '') for w in WORDS)] for m,c in counts.items()]
    body.append(['**all**',*(f'**{total[w]}**' for w in WORDS)])
    worse = [f'- `{m}.py`, {o.case} ({o.unit}): {text}' for m,found in words.items() for o,w,text in found if w in ('worse','fails')]
    return '\n'.join([*table(['ours is',*WORDS], body),'','Where it is worse, or fails:' if worse else 'It is worse nowhere.','',*worse]).strip()+'\n'

def versions(rows):
    "Each library with its version, and what they stand on"
    found = {}
    for r in rows: found |= {k:v for k,v in r.get('versions', {}).items() if k!='fasterai'}
    return ', '.join(f'{k} {v}' for k,v in found.items())

HEAD = '''# Other libraries beside this one, in one run

`make peers` writes this page from what it has measured; nothing here is written by hand. Each library runs in an environment of its own, and is used as its documentation says; the libraries take turns.
{versions}, {threads} threads.

A value is the median of the rounds, with the lowest and the highest in brackets. *Better* and *worse* compare ours with the best of the others in a row; it is the *same* if the rounds of both overlap, or if the medians differ by less than {noise:.0f} %.
*Alone*: no other library has that. "—": a library does not do that, for the reason under the table.
'''

def page(rows, order, threads, missing={}): # Rows, libraries, number of threads, and cases that have not been measured, by measure
    "The whole page"
    by_measure = {}
    for r in rows: by_measure.setdefault(r['measure'], []).append(r)
    parts = [HEAD.format(versions=versions(rows), threads=threads, noise=100*(NOISE-1)), summary(by_measure)]
    if missing: parts.append('\n'.join(['Not measured in this run:','',*(f'- `{m}.py`: {"; ".join(cases)}' for m,cases in missing.items())])+'\n')
    return '\n'.join([*parts, *(section(m, o, order) for m,o in by_measure.items())])
