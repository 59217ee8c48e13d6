"Tables as grids of runs, and what is found in them: comparisons of means, with their spread"
import math
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Callable
from scipy.stats import t as student
from .common import Results, Run, SPARSITIES, STARTS, dense, run

CONFIDENCE = .95  # of an interval for a mean over seeds

@dataclass(frozen=True)
class Cell:
    "A number of a run"
    run:Run
    name:str='accuracy' # Which of its numbers

@dataclass
class Finding:
    "A sentence, and a margin that is positive where it holds"
    says:str
    margin:Callable # Function of `at(row, column, table=…)`, the number of a cell
    within:float|None=None # For numbers that should be the same: the largest difference that counts as none

@dataclass
class Table:
    "One of the paper's tables: cells by row and column, what the paper has there, and findings"
    number:int
    title:str
    columns:list
    rows:dict # Name of a row -> its cells
    paper:dict # Name of a row -> the paper's (mean, standard deviation), or a count
    findings:list=field(default_factory=list)
    names:dict=field(default_factory=dict) # Of rows, as the paper has them, where they are other ones
    note:str=''
    def __post_init__(self):
        for o,cells in self.rows.items():
            if len(cells)!=len(self.columns): raise ValueError(f'table {self.number}, row {o}: {len(cells)} cells for {len(self.columns)} columns')
        for o,cells in self.paper.items():
            if o not in self.rows or len(cells)!=len(self.columns): raise ValueError(f"table {self.number}: the paper's row {o} does not fit")
    @property
    def runs(self): "Each once"; return list(dict.fromkeys(o.run for cells in self.rows.values() for o in cells if o is not None))
    def cell(self, row, column): return self.rows[row][self.columns.index(column)]

def numbers(text):
    "The paper's rows: a name and a colon, then `mean±std` for each column"
    def number(o): return tuple(map(float, o.split('±')))
    rows = (o.split(':') for o in text.strip().splitlines())
    return {name.strip(): list(map(number, cells.split())) for name,cells in rows}

BOTH = [f'{start}, {s} %' for start in STARTS for s in SPARSITIES]  # columns of tables 1 to 4
BASELINE = (80.61,.42),(90.03,.54)  # of table 1, which tables 2 to 4 refer to

def grid(f, **args): # What trains; arguments of all runs of a row
    "A row of tables 1 to 4: each start, each sparsity"
    return [Cell(run(f, start=start, sparsity=s, **args)) for start in STARTS for s in SPARSITIES]

def baseline():
    "The row of dense networks, whatever the sparsity"
    return [Cell(run(dense, start=start)) for start in STARTS for _ in SPARSITIES]

def paper_baseline(): return [BASELINE[i] for i in range(len(STARTS)) for _ in SPARSITIES]

def interval(margins):
    "Where their mean lies, with `CONFIDENCE` (Student's t)"
    mean,n = fmean(margins),len(margins)
    half = student.ppf((1+CONFIDENCE)/2, n-1)*stdev(margins)/math.sqrt(n)
    return mean-half,mean+half

def verdict(margins, within=None): # Of each seed; see `Finding`
    "holds, does not hold or not told apart: on which side of the border is the interval of the mean?"
    if len(margins)<2: return 'too few seeds'
    low,high = interval(margins)
    if within is None: return 'holds' if low>0 else 'does not hold' if high<0 else 'not told apart'
    if -within<=low and high<=within: return 'holds'
    return 'does not hold' if low>within or high<-within else 'not told apart'

class Missing(KeyError): "A cell has no number"

def margins(finding, table, tables, results:Results):
    "The margin of each seed that has all that it needs"
    seeds = sorted({s for found in results.found.values() for s in found})
    def of_seed(seed):
        def at(row, column, table=table.number):
            cell = tables[table].cell(row, column)
            found = results.of(cell.run)
            if seed not in found: raise Missing(row, column)
            return found[seed][cell.name]
        return finding.margin(at)
    res = []
    for s in seeds:
        try: res.append(of_seed(s))
        except Missing: continue  # the seed is not counted, and the page says how many are
    return res

def paper_margin(finding, table, tables):
    "The margin of the paper's means; None where the paper has none of the rows"
    def at(row, column, table=table.number):
        found = tables[table]
        if row not in found.paper: raise Missing(row, column)
        return found.paper[row][found.columns.index(column)][0]
    try: return finding.margin(at)
    except Missing: return None
