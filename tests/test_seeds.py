"""Every published snippet that the library has to run, and the test that runs it.

The sources: the first README, the posts "FasterAI" (2020) and "FasterAI: a library to make smaller and faster neural networks" (2021), the paper
"FasterAI: a lightweight library for neural networks compression" (Electronics 2022), and the README of dnn-compression (a project on Deep Compression).

| source | snippet | test |
|---|---|---|
| README | distill with `KnowledgeDistillation` | test_seeds_distill.py::test_posts |
| README | sparsify with `SparsifyCallback`, all of its options | test_seeds_sparsity.py::test_000_readme |
| README | remove filters with `Pruner` | test_seeds_prune.py::test_snippet |
| README | fold with `BN_Folder` | test_seeds_misc.py::test_snippet |
| README | decompose with `FCDecomposer` | test_seeds_decompose.py::test_readme_and_posts |
| post 2020 | distill, with fastai v1's `callbacks` | test_seeds_distill.py::test_posts |
| post 2020 | sparsify in a fit, by names of arguments | test_seeds_sparsity.py::test_001_post_by_name |
| post 2020 | sparsify at once and step by step, with `Sparsifier.prune` | test_seeds_sparsity.py::test_001_post_sparsifier |
| post 2020 | remove filters of a model and of a student | test_seeds_prune.py::test_snippet |
| post 2020 | fold with `BN_Folder` | test_seeds_misc.py::test_snippet |
| post 2020 | fold with `bn_folding_model` | test_seeds_misc.py::test_001_function |
| post 2020 | decompose with `FCDecomposer` | test_seeds_decompose.py::test_readme_and_posts |
| post 2021 | distill, with `cbs` | test_seeds_distill.py::test_posts |
| post 2021 | sparsify in a fit, with `large_final` | test_seeds_sparsity.py::test_002_post |
| post 2021 | remove filters of a student | test_seeds_prune.py::test_snippet |
| post 2021 | fold a pruned model | test_seeds_misc.py::test_snippet |
| post 2021 | decompose a folded model | test_seeds_decompose.py::test_readme_and_posts |
| paper | listing 1: `Sparsifier` and `SparsifyCallback` | test_seeds_sparsity.py::test_003_listing_1 |
| paper | listing 2: granularities | test_seeds.py::test_paper_listing_2 |
| paper | listing 3: local and global | test_seeds.py::test_paper_listing_3 |
| paper | listings 4, 5: criteria, and criteria of one's own | test_seeds_sparsity.py::test_003_listings_4_and_5 |
| paper | listings 4, 5: the same, given to a `Sparsifier` | test_seeds_sparsity.py::test_003_listings_4_and_5_as_a_users |
| paper | listing 6: schedules | test_seeds_sparsity.py::test_003_listing_6_values |
| paper | listing 7: dense, sparse, dense | test_seeds_sparsity.py::test_003_listing_7_values |
| paper | listings 6, 7: the printed functions as schedules | test_seeds_sparsity.py::test_003_listings_6_and_7_as_printed |
| paper | listing 8: lottery tickets | test_seeds_sparsity.py::test_003_listing_8 |
| paper | listing 9: remove filters | test_seeds_prune.py::test_snippet |
| paper | listing 10: distill answers and layers | test_seeds_distill.py::test_003_listing_10 |
| paper | listing 11: group regularization | test_regularize.py::test_paper_listing_11 |
| paper | listing 12: fold | test_seeds_misc.py::test_snippet |
| paper | listing 13: decompose | test_seeds_decompose.py::test_003_listing_13 |
| paper | table 9: parameters after a decomposition | test_seeds_decompose.py::test_003_table_9 |
| dnn-compression | scan of sparsities, picture and CSV file | test_seeds_sensitivity.py::test_sparsities |
| dnn-compression | scan of bits | test_seeds_sensitivity.py::test_bits |
| dnn-compression | prune in a loop with `LevelPruner`, then share values with `Quantizer` | test_seeds_quantize.py::test_prune_then_share |
"""
import ast, re
from math import prod
from pathlib import Path
import pytest, torch
from torch import nn
from fasterai.sparse.all import Sparsifier

TESTS = Path(__file__).parent
ROWS = re.findall(r'^\| (.+?) \| (.+?) \| (test_\w+\.py)::(\w+) \|$', __doc__, re.M)
FIXED = ('test_masks_are_renewed_when_asked','test_wrong_options','test_wrong_name','test_fractions')  # of what a snippet leads to, not the snippet

def names_in(path): return {o.name for o in ast.parse(path.read_text(encoding='utf-8')).body if isinstance(o, ast.FunctionDef) and o.name.startswith('test_')}

def test_every_row_has_its_test():
    assert len(ROWS)==sum(o.startswith('| ') for o in __doc__.splitlines())-1
    assert not [f'{file}::{test}' for _,_,file,test in ROWS if test not in names_in(TESTS/file)]

def test_every_test_of_a_snippet_has_a_row():
    named = {(file,test) for _,_,file,test in ROWS}
    there = {(p.name,o) for p in TESTS.glob('test_seeds_*.py') for o in names_in(p)-set(FIXED)}
    assert there and there<=named

def test_every_listing_of_the_paper_has_a_row():
    numbers = [int(n) for source,snippet,*_ in ROWS if source=='paper' and 'listing' in snippet for n in re.findall(r'\d+', snippet.partition(':')[0])]
    assert set(numbers)==set(range(1, 14))

LISTING_2 = {  # the axes that a block spans, of a weight of outputs, inputs, height and width; `column` and `row` are those of a kernel
    'weight':'', 'column':'h', 'row':'w', 'shared_weight':'o', 'channel':'i', 'kernel':'hw', 'shared_channel':'oi', 'shared_column':'oh', 'shared_row':'ow', 'vertical_slice':'ih',
    'horizontal_slice':'iw', 'shared_vertical_slice':'oih', 'shared_horizontal_slice':'oiw', 'shared_kernel':'ohw', 'filter':'ihw', 'layer':'oihw'}

@pytest.mark.parametrize('granularity', LISTING_2)
def test_paper_listing_2(granularity):
    "Half of the blocks are zero, rounded down, each of them as a whole: blocks are numbered by the axes that they do not span"
    torch.manual_seed(0)
    model,spans = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.Conv2d(8, 4, 5, bias=False)),LISTING_2[granularity]
    Sparsifier(model, granularity, 'local').sparsify_model(50)
    for layer in model:
        numbered = [i for i,a in enumerate('oihw') if a not in spans]
        blocks = (layer.weight==0).permute(*numbered, *[i for i in range(4) if i not in numbered]).reshape(prod(layer.weight.shape[i] for i in numbered), -1)
        assert torch.equal(blocks.all(1), blocks.any(1)) and int(blocks.all(1).sum())==len(blocks)//2

def test_paper_listing_3():
    "Local compares weights in each layer, global those of all layers, as the listing does with a sort"
    def net():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3))
        model[1].weight.data *= .1
        return model
    before,local,all_layers = net(),net(),net()
    Sparsifier(local, 'weight', 'local').sparsify_model(50)
    Sparsifier(all_layers, 'weight', 'global').sparsify_model(50)
    def lowest(w): return w.abs().flatten().argsort()[:w.numel()//2].sort().values
    for i in (0,1): assert torch.equal((local[i].weight==0).flatten().nonzero().flatten(), lowest(before[i].weight))
    both = torch.cat([o.weight.detach().flatten() for o in before])
    gone = torch.cat([(o.weight==0).flatten() for o in all_layers])
    assert torch.equal(gone.nonzero().flatten(), lowest(both))
