"The page: what is found, beside the paper, and the tables"
from pathlib import Path
from statistics import fmean, stdev
import torch
from .common import ROOT, Recipe, Results, arguments, recipe_of, work
from .findings import CONFIDENCE, margins, paper_margin, verdict

README = Path(__file__).parent/'README.md'
OFF = 3  # points between the zeros that were asked for and those that are there, from which the page says so

def all_tables():
    "By number, as the paper has them"
    from . import table1, table2, table3, table4, table5, table6, table7, table8, table9
    return {o.TABLE.number: o.TABLE for o in (table1, table2, table3, table4, table5, table6, table7, table8, table9)}

def shown(values): # Of the seeds
    "Mean and spread"
    if isinstance(values[0], int) and len(set(values))==1: return f'{values[0]:,}'  # a count
    mean = f'{fmean(values):.2f}'
    return f'{mean} ± {stdev(values):.2f}' if len(values)>1 else mean

def shown_paper(value): # (mean, standard deviation) or (count,)
    return f'{value[0]:.2f} ± {value[1]:.2f}' if len(value)>1 else f'{value[0]:,}'

def line(*cells): return '| '+' | '.join(cells)+' |'
def header(*cells): return [line(*cells), '|'+'---|'*len(cells)]

def here(cell, results): # `Cell`, or None
    "Numbers of the seeds"
    return [] if cell is None else [o[cell.name] for o in results.of(cell.run).values()]

def seeds_of(values):
    counts = sorted({len(o) for o in values})
    return '–'.join(str(o) for o in dict.fromkeys((counts[0],counts[-1])))

def off_target(table, results):
    "Cells of whose weights more or less is zero than was asked for: a sentence"
    found = {}
    for row,cells in table.rows.items():
        for o in cells:
            args = dict(o.run.args) if o is not None else {}
            zeros = [r['zeros'] for r in results.of(o.run).values()] if 'sparsity' in args else []
            if zeros and abs(fmean(zeros)-args['sparsity'])>OFF: found.setdefault(row, {})[args['sparsity']] = f'{fmean(zeros):.0f}'
    rows = [f'{row} '+', '.join(f'{v} % for {s} %' for s,v in cells.items()) for row,cells in found.items()]
    return f'Zeros in the weights of convolutions, where they are more than {OFF} points from what was asked for: {"; ".join(rows)}.' if rows else ''

def table_text(table, results):
    "A table: rows from here, each with the paper's below it"
    out = [f'## Table {table.number}: {table.title}', '', *header('','','seeds',*table.columns)]
    for row,cells in table.rows.items():
        values = [here(o, results) for o in cells]
        known = [v for o,v in zip(cells, values) if o is not None]
        out.append(line(f'`{row}`', 'here', seeds_of(known), *(shown(v) if v else '' for v in values)))
        if row in table.paper: out.append(line(table.names.get(row, ''), 'paper', '3', *map(shown_paper, table.paper[row])))
    notes = [o for o in (table.note, off_target(table, results)) if o]
    return '\n'.join([*out, *(p for o in notes for p in ('',o))])

def findings_rows(tables, results):
    "For each finding: table, sentence, the paper's margin, that of here, seeds and verdict"
    for table in tables.values():
        for f in table.findings:
            ours,theirs = margins(f, table, tables, results),paper_margin(f, table, tables)
            spread = f' ± {stdev(ours):.2f}' if len(ours)>1 else ''
            mean = f'{fmean(ours):+.2f}{spread}' if ours else ''
            yield table.number, f.says, '' if theirs is None else f'{theirs:+.2f}', mean, len(ours), verdict(ours, f.within)

def findings_text(tables, results):
    rows = list(findings_rows(tables, results))
    counts = ', '.join(f'{k} {n}' for k in ('holds','does not hold','not told apart','too few seeds') if (n := sum(o[-1]==k for o in rows)))
    out = ['## What is found', '', f'{len(rows)} findings: {counts}.', '', *header('table','finding','paper','here','seeds','verdict'),
        *(line(str(n), says, theirs, ours, str(seeds), word) for n,says,theirs,ours,seeds,word in rows)]
    return '\n'.join(out)

def recipe_text(recipe):
    where = 'one thread of a processor for each run' if recipe.device=='cpu' else 'a GPU'
    training = (f'A training has {recipe.epochs} epochs of Adam at a constant rate of {recipe.lr:g}, batches of {recipe.bs} and no augmentation, '
        f'on {where} (torch {torch.__version__.split("+")[0]}).')
    if recipe.data=='caltech-101':
        return (f'ResNet-18 learns four fifths of Caltech-101, of {recipe.pixels} pixels; accuracy is that of the other images. '
            f'Pretrained weights are those of ImageNet, and the teacher is a ResNet-34. {training}')
    return (f'A ResNet with three stages of one block (8, 16 and 32 channels) learns {recipe.images:,} images of {recipe.data}; '
        f'accuracy is that of all validation images. Pretrained weights come from two epochs of {recipe.pretraining:,} other images of the same data, '
        f'with a new last layer; the teacher has two blocks a stage. {training}')

def page(tables, recipe, results):
    "The text of the page"
    paper = '*FasterAI: A Lightweight Library for Neural Networks Compression*, Electronics 2022, 11(22), 3789'
    other = '' if recipe.data=='caltech-101' else ', with another network and other images: compare differences, not accuracies'
    intro = f"""# The tables of the FasterAI paper, run again

Hubens et al., {paper}, train a ResNet-18 on Caltech-101 for 30 epochs, three times for each number. Here are the same comparisons{other}.

{recipe_text(recipe)}

This page is written by `python -m benchmarks.paper`, which goes on where it was stopped; `python -m benchmarks.paper.table3` runs one table. With `--data caltech-101 --path FOLDER` the data and the settings are the paper's.

Numbers are percent of images, mean ± standard deviation over seeds. A seed is the same initial weights and the same order of images in all rows.

A finding is a difference, in points, that is positive where it holds; it is taken for each seed. It *holds* or *does not hold* if the whole interval of its mean
({CONFIDENCE:.0%}, Student's t) lies on one side of zero, else it is *not told apart*. Where numbers should be the same, the interval has to lie within the difference that
counts as none. Of a hundred differences that are none, five would be told apart by chance. The column of the paper has the same difference of the paper's means, without a spread."""
    return '\n\n'.join([intro, findings_text(tables, results), *(table_text(o, results) for o in tables.values())])+'\n'

ORDER = 6,8,9,3,4,7,1,2,5  # of the tables: short ones first, and the longest runs last

def main(table=None, description=__doc__, argv=None): # One `Table`, by default all
    "Run what is missing, and write the page of all tables or print the one"
    p = arguments(description)
    if table is None: p.add_argument('--page', help='where to write the page; by default README.md for the default recipe, else beside the results')
    p.add_argument('--no-runs', action='store_true', help='only show what there is')
    o = p.parse_args(argv)
    recipe,tables = recipe_of(o.data, o.path, o.device),all_tables()
    results = Results(recipe, o.folder)
    asked = [tables[n] for n in ORDER] if table is None else [tables[table.number]]
    runs = list(dict.fromkeys(r for t in asked for r in t.runs))
    if not o.no_runs: work(runs, recipe, results, o.seeds, o.processes)
    if table is not None: return print(table_text(asked[0], results))
    path = Path(o.page) if o.page else README if recipe==Recipe() else Path(o.folder)/f'{recipe.name}.md'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(tables, recipe, results), encoding='utf-8')
    print(f'{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}: {sum(len(results.of(r)) for r in runs)} of {len(runs)*o.seeds} runs')
