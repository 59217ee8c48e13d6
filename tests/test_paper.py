"The paper's tables, run again: small runs, how they go on, and what the page says of made results"
import json, sys
from pathlib import Path
import pytest, torch
from torch import nn
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.paper import common, page
from benchmarks.paper.common import Recipe, Results, bench_of, dense, recipe_of, run, sparsified, work
from benchmarks.paper.findings import Cell, Table, paper_margin, verdict
from benchmarks.paper.table5 import lottery
from benchmarks.paper.table6 import taught
from benchmarks.paper.table7 import regularized
from benchmarks.paper.table8 import folded
from benchmarks.paper.table9 import decomposed

TINY = Recipe('digits', images=256, pretraining=128, epochs=2, bs=32)
TABLES = page.all_tables()
RUNS = list(dict.fromkeys(r for t in TABLES.values() for r in t.runs))

# --- Runs
def test_runs_go_on(tmp_path, monkeypatch):
    "A finished run is a line, and is not done again; a line that is not whole is"
    runs = [run(dense), run(sparsified, start='finetune', sparsity=50, granularity='kernel')]
    results = Results(TINY, tmp_path)
    work(runs, TINY, results, n_seeds=1)
    lines = results.path.read_text().splitlines()
    assert len(lines)==2 and [json.loads(o)['run'] for o in lines]==[o.key for o in runs]
    done = []
    was = common.one
    monkeypatch.setattr(common, 'one', lambda *args: done.append(args[1:]) or was(*args))
    work(runs, TINY, Results(TINY, tmp_path), n_seeds=1)
    assert not done
    results.path.write_text('\n'.join([lines[0], lines[1][:20]]))
    with pytest.warns(UserWarning, match='not whole'): again = Results(TINY, tmp_path)
    work(runs, TINY, again, n_seeds=1)
    assert done==[(runs[1],0)] and results.path.read_text().splitlines()==lines  # the same numbers, to the bit

def test_processes(tmp_path):
    "Another process finds what this one would"
    wanted,results = run(dense),Results(TINY, tmp_path)
    work([wanted], TINY, results, n_seeds=2, processes=2)
    assert Results(TINY, tmp_path).of(wanted)=={s: wanted(bench_of(TINY), s) for s in range(2)}

def test_failure_is_told(tmp_path):
    "A run that fails ends the work, and what was done before it stays"
    good,bad = run(dense),run(sparsified, start='scratch', sparsity=50, granularity='kernal')
    results = Results(TINY, tmp_path)
    with pytest.raises(ValueError, match='kernel'): work([good,bad], TINY, results, n_seeds=1)
    assert list(Results(TINY, tmp_path).found)==[good.key]

def test_recipe_has_its_own_results(tmp_path):
    assert Recipe().name==Recipe(path='x').name!=Recipe(epochs=11).name
    Results(TINY, tmp_path).add(run(dense), 0, dict(accuracy=1.))
    assert not Results(Recipe('digits'), tmp_path).found

def test_wrong_data(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='fashion-mnist, digits, caltech-101'): recipe_of('cifar')
    with pytest.raises(ValueError, match='--path'): recipe_of('caltech-101', str(tmp_path/'none'))
    monkeypatch.setattr(common, 'FASHION', tmp_path/'none')
    with pytest.raises(ValueError, match='dataset-fashion-mnist'): recipe_of('fashion-mnist')

def test_starts():
    "A seed is the same network before each run; a pretrained one has all but the last layer from elsewhere"
    bench = bench_of(TINY)
    a,b,fine = bench.network(0),bench.network(0),bench.network(0, 'finetune')
    assert all(torch.equal(x, y) for x,y in zip(a.parameters(), b.parameters()))
    given = bench.pretrained()
    assert all(torch.equal(v, given[k]) for k,v in fine.state_dict().items() if k in given)
    assert torch.equal(fine.fc.weight, a.fc.weight) and not torch.equal(fine.stem[0].weight, a.stem[0].weight)
    with pytest.raises(ValueError, match='scratch, finetune'): bench.network(0, 'fine')

def test_kinds_of_runs(monkeypatch):
    "What each kind of run has to do, on few digits"
    bench = bench_of(TINY)
    res = lottery(bench, 0, 70, rewind_epoch=1)
    assert 69<res['zeros']<=70
    soft,features = (taught(bench, 0, o, .5) for o in ('SoftTarget','Attention'))
    assert soft['teacher']==features['teacher'] and len({soft['accuracy'],features['accuracy'],dense(bench, 0)['accuracy']})==3
    res = folded(bench, 0)
    assert res['changed']==0 and res['params']-res['folded_params']==8+2*(8+16+32)+16+32  # each norm had two numbers a channel, and leaves a bias
    res = decomposed(bench, 0)
    assert res['params']==330 and res['params, 50 %']==5*(32+10)+10 and res['params, 75 %']<res['params, 25 %']<330
    monkeypatch.setattr(bench, 'measured', lambda model: sum(float(m.weight.abs().sum()) for m in model.modules() if isinstance(m, nn.Conv2d)))
    by_weight,by_filter,hardly = (regularized(bench, 0, g, a) for g,a in (('weight',.1),('filter',.1),('weight',1e-7)))
    assert by_weight<by_filter<hardly  # a filter's share of the penalty is the mean of its weights

@pytest.fixture
def folders(tmp_path):
    "Images of two classes, of several sizes and modes"
    from PIL import Image
    for name,colour in dict(ants='red', bees='blue').items():
        (tmp_path/'images'/name).mkdir(parents=True)
        for i in range(10): Image.new('RGB', (40+i,36), colour).convert('RGB' if i%2 else 'P').save(tmp_path/'images'/name/f'{i}.png')
    return tmp_path/'images'

def test_folders(folders, tmp_path, monkeypatch):
    "The paper's data: four fifths to learn from, ResNet-18, and weights of ImageNet only where they are"
    recipe = Recipe('caltech-101', str(folders), pixels=32, epochs=1, bs=8)
    bench = bench_of(recipe)
    assert [len(y) for _,y in (bench.train,bench.valid)]==[16,4] and bench.train[0].shape==(16,3,32,32)
    red = bench.train[0][bench.train[1]==0]
    assert (red[:,0]>200).all() and (red[:,2]<50).all()
    assert sum(p.numel() for p in bench.network(0).parameters() if p.dim()>2)==11_166_912
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    results,runs = Results(recipe, tmp_path),[run(sparsified, start=o, sparsity=50, granularity='filter') for o in ('scratch','finetune')]
    with pytest.warns(UserWarning, match='1 of 2 runs start from ImageNet.*resnet18.*left out'): work(runs, recipe, results, n_seeds=1)
    assert list(results.found)==[runs[0].key] and 49<results.of(runs[0])[0]['zeros']<=50
    from torchvision.models import resnet18
    for deep in (False,True):
        file = common.weights_file(deep)
        file.parent.mkdir(exist_ok=True)
        torch.save(resnet18().state_dict(), file)
    given = torch.load(common.weights_file(), weights_only=True)
    assert not common.left_out(recipe, runs)
    assert torch.equal(bench.network(0, 'finetune').layer1[0].conv1.weight, given['layer1.0.conv1.weight'])

# --- Tables
def test_tables_are_the_papers():
    "Each row of the paper has its place, and what two tables ask for is run once"
    sizes = {n: (len(t.paper), len(t.columns)) for n,t in TABLES.items()}
    assert sizes=={1:(16,8), 2:(16,8), 3:(13,8), 4:(13,8), 5:(3,4), 6:(3,4), 7:(16,4), 8:(2,2), 9:(2,4)}
    assert len({r.key for r in RUNS})==len(RUNS)==2+120+120+88+88+9+8+60+2
    assert TABLES[1].cell('weight', 'scratch, 90 %')==TABLES[3].cell('large_final', 'scratch, 90 %')==TABLES[4].cell('one_cycle, whole', 'scratch, 90 %')

def test_tables_that_do_not_fit():
    cell = Cell(run(dense))
    with pytest.raises(ValueError, match='1 cells for 2 columns'): Table(1, '', ['a','b'], dict(x=[cell]), {})
    with pytest.raises(ValueError, match="paper's row y"): Table(1, '', ['a'], dict(x=[cell]), dict(y=[(1.,2.)]))

@pytest.mark.parametrize('says, margin', [
    ('small_final is worse than random', 66.34-19.38), ('global is better than local at 90 % of single weights', 79.63-78.46),
    ('SoftTarget is better than no teacher', 84.2625-80.61)])
def test_paper_margins(says, margin):
    "By hand, from the paper's rows"
    (table,found),*_ = [(t,f) for t in TABLES.values() for f in t.findings if says in f.says]
    assert paper_margin(found, table, TABLES)==pytest.approx(margin)

def test_paper_margins_where_it_has_rows():
    "All but one finding can be asked of the paper's own numbers"
    none = [f.says for t in TABLES.values() for f in t.findings if paper_margin(f, t, TABLES) is None]
    assert len(none)==1 and 'trained for as long' in none[0]

# --- Findings
@pytest.mark.parametrize('values, within, word', [
    ([2,2.1,1.9], None, 'holds'), ([-2,-2.1,-1.9], None, 'does not hold'), ([1,2,3], None, 'not told apart'),
    ([5,5], None, 'holds'), ([5], None, 'too few seeds'), ([], None, 'too few seeds'),
    ([.2,-.1,.1], 1, 'holds'), ([3,3.2,2.9], 1, 'does not hold'), ([-3,-3.2,-2.9], 1, 'does not hold'),
    ([.9,1.1,1.], 1, 'not told apart'), ([0,0,0], .01, 'holds')])
def test_verdict(values, within, word): assert verdict(values, within)==word

def test_verdict_is_seldom_wrong():
    "Of differences that are none, one in twenty is told apart"
    torch.manual_seed(0)
    told = [verdict(o)!='not told apart' for o in torch.randn(2000, 5).tolist()]
    assert .035<sum(told)/len(told)<.065

def made(tmp_path, accuracy, n_seeds=3, runs=RUNS): # Function of a run and a seed
    "Results without runs"
    results = Results(Recipe(), tmp_path)
    for r in runs:
        for s in range(n_seeds):
            a = accuracy(r, s)
            args = dict(r.args)
            thin = {f'{p} %':a-p/25 for p in (25,50,75)}|{f'params, {p} %':p for p in (25,50,75)}
            more = dict(folded=a, changed=0, params=330, folded_params=300, teacher=90.)
            results.found[r.key][s] = dict(accuracy=a, zeros=float(args.get('sparsity', 0)))|more|thin
    return results

def as_in_the_paper(r, seed):
    "A number that falls with what the paper found to be bad"
    args = dict(r.args)
    criteria = args.get('criteria')
    loss = 10*(criteria in ('small_final','small_init','small_init_small_final'))+5*(criteria=='random')
    loss += 3*(args.get('granularity') in ('filter','shared_kernel'))
    return 80+seed/10-loss*args.get('sparsity', 0)/100

def words(results): return {(n,says):(ours,seeds,word) for n,says,_,ours,seeds,word in page.findings_rows(TABLES, results)}

def test_findings_follow_the_results(tmp_path):
    "The same sentence holds or does not, as the numbers are"
    name = 3,'scratch: small_final is worse than random at 90 %'
    good = words(made(tmp_path, as_in_the_paper))
    bad = words(made(tmp_path, lambda r, s: 160-as_in_the_paper(r, s)))
    assert good[name]==('+4.50 ± 0.00',3,'holds') and bad[name]==('-4.50 ± 0.00',3,'does not hold')
    blocks = 1,'scratch: blocks along one axis (column, row, shared weight, channel) are better than blocks along three (shared kernel, filter) at 90 %'
    assert good[blocks][2]=='holds' and bad[blocks][2]=='does not hold'
    assert good[3,next(f.says for f in TABLES[3].findings if 'squared' in f.says)][2]=='holds'
    assert good[9,'without 75 % of singular values, accuracy is lost'][:2]==('+3.00 ± 0.00',3)

def test_findings_with_few_results(tmp_path):
    "A seed counts where it has all that is compared"
    results = made(tmp_path, as_in_the_paper, 2)
    results.found[TABLES[3].cell('random', 'scratch, 90 %').run.key].pop(1)
    found = words(results)
    assert found[3,'scratch: small_final is worse than random at 90 %']==('+4.50',1,'too few seeds')
    assert found[3,'finetune: small_final is worse than random at 90 %'][1:]==(2,'holds')
    assert all(o==('',0,'too few seeds') for o in words(Results(Recipe(), tmp_path/'none')).values())

def test_page(tmp_path):
    "Rows of here and of the paper, how many seeds there are, and zeros that are off target"
    results = made(tmp_path, as_in_the_paper, 3)
    key = TABLES[1].cell('shared_vertical_slice', 'scratch, 90 %').run.key
    for o in results.found[key].values(): o['zeros'] = 66.7
    results.found[TABLES[1].cell('row', 'scratch, 30 %').run.key].pop(2)
    text = page.page(TABLES, Recipe(), results)
    assert '| `weight` | here | 3 | 80.10 ± 0.10 |' in text and '| `row` | here | 2–3 | 80.05 ± 0.07 |' in text
    assert '|  | paper | 3 | 80.40 ± 0.22 | 80.20 ± 0.71 |' in text and '| small f | paper | 3 | 79.05 ± 0.66 |' in text
    assert 'shared_vertical_slice 67 % for 90 %' in text and '| `images with another class` | here | 3 |  | 0 |' in text
    assert '11,228,838' in text and '2,000 images of fashion-mnist' in text
    assert all(f'## Table {n}:' in text for n in range(1, 10))

def test_command(tmp_path, capsys, monkeypatch):
    "One table is printed; the page of another recipe than the README's lies beside its results"
    args = ['--data','digits','--device','cpu','--folder',str(tmp_path),'--no-runs']
    page.main(TABLES[9], argv=args)
    assert capsys.readouterr().out.startswith('## Table 9')
    page.main(argv=args)
    assert 'images of digits' in (tmp_path/f'{recipe_of("digits", device="cpu").name}.md').read_text(encoding='utf-8')
    monkeypatch.setattr(page, 'README', tmp_path/'README.md')
    page.main(argv=['--device','cpu','--folder',str(tmp_path),'--no-runs'])
    assert '2,000 images' in (tmp_path/'README.md').read_text(encoding='utf-8')

def test_stored_page():
    "The page that is stored has all findings and tables"
    text = (ROOT/'benchmarks/paper/README.md').read_text(encoding='utf-8')
    missing = [f.says for t in TABLES.values() for f in t.findings if f.says not in text]
    assert not missing and all(f'## Table {t.number}: {t.title}' in text for t in TABLES.values())
    assert 'paper/README.md' in (ROOT/'benchmarks/README.md').read_text(encoding='utf-8')
