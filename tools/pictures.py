"""Draw the picture of the first page from the measured figures in benchmarks/README.md: `python tools/pictures.py [PICTURE]` (default nbs/images/before_after.png)"""
import re,sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEFORE,AFTER = '#b9bec6','#2f6fb0'

def numbers(cell):
    "The numbers of a cell of a table"
    return [float(o) for o in re.findall(r'\d+(?:\.\d+)?', cell)]

def percent(cell):
    "Accuracy of the dense and of the last network, in percent: `85.7 %, 87.0 %, 86.9 %`, or `494, 488, 483 of 500 words`"
    first,*_,last = numbers(cell.partition(' of ')[0])
    of = numbers(cell.partition(' of ')[2])
    scale = 100/of[0] if of else 1
    return first*scale,last*scale

def shipped(text):
    "Rows of the table of `shipped.py`: name, and file in MB, time in ms and accuracy in percent, each before and after"
    lines = text[text.index('\n`shipped.py`'):].split('\n\n')[1].splitlines()
    assert 'right: dense, small, small in int8' in lines[0], 'the table of shipped.py has other columns'
    for line in lines[2:]:
        name,_,file,ms,_,right = (o.strip() for o in line.strip('|').split('|'))
        dense_ms,_,int8_ms = numbers(ms)
        yield name,dict(file=tuple(numbers(file)), ms=(dense_ms,int8_ms), accuracy=percent(right))

PANELS = dict(file=('file, % of before', '{:.1f} → {:.1f} MB'), ms=('time of a call, % of before', '{:.1f} → {:.1f} ms'),
              accuracy=('accuracy, %', '{:.1f} → {:.1f} %'))

def draw(rows, path):
    "Three panels of bars: file, time and accuracy of each network, before and after"
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    fig,axs = plt.subplots(1, 3, figsize=(11,3.8), layout='constrained', sharey=True)
    for ax,(key,(title,text)) in zip(axs, PANELS.items()):
        pairs = [o[key] for _,o in rows]
        scale = [1 if key=='accuracy' else 100/before for before,_ in pairs]
        places = range(len(rows))
        old = ax.barh([i-.18 for i in places], [o[0]*k for o,k in zip(pairs, scale)], .34, color=BEFORE)
        new = ax.barh([i+.18 for i in places], [o[1]*k for o,k in zip(pairs, scale)], .34, color=AFTER)
        for i,o in enumerate(pairs): ax.text(103, i, text.format(*o), va='center', fontsize=8)
        ax.set(xlim=(0,165), xticks=range(0, 101, 25))
        ax.set_title(title, fontsize=10, loc='left')
        ax.spines[['top','right']].set_visible(False)
    axs[0].set_yticks(range(len(rows)), [name for name,_ in rows])
    axs[0].invert_yaxis()
    fig.legend([old,new], ['before','after: fewer channels, in int8'], loc='outside lower center', ncols=2, frameon=False, fontsize=9)
    fig.savefig(path, dpi=130)

def main(path=ROOT/'nbs/images/before_after.png'):
    draw(list(shipped((ROOT/'benchmarks/README.md').read_text(encoding='utf-8'))), path)

if __name__=='__main__': main(*sys.argv[1:])
