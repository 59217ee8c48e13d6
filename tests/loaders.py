"""Every kind of fastai's DataLoaders, made on the spot: folders of images and masks, tables, sentences.

An image is red or blue, a mask says where it is bright, a sentence has good or bad words: a network can learn them, and a fit takes a moment."""
import random, tempfile
from functools import cache
from pathlib import Path
import numpy as np, pandas as pd, torch
from PIL import Image
from fastai.tabular.all import *
from fastai.text.all import *
from fastai.vision.all import *

N,SIDE = 32,32
quiet = dict(num_workers=0)

@cache
def folder():
    "`images/red_0.png`, …, in folders by color as well, and a mask of each"
    root = Path(tempfile.mkdtemp(prefix='images'))
    rng = np.random.default_rng(0)
    for o in ('images','masks','sorted/red','sorted/blue'): (root/o).mkdir(parents=True)
    for i in range(N):
        color = ('red','blue')[i%2]
        x = rng.integers(0, 256, (SIDE,SIDE,3), dtype=np.uint8)
        x[...,2 if color=='red' else 0] //= 3
        Image.fromarray(x).save(root/'images'/f'{color}_{i}.png')
        Image.fromarray(x).save(root/'sorted'/color/f'{i}.png')
        Image.fromarray((x[...,1]//86).astype(np.uint8)).save(root/'masks'/f'{color}_{i}.png')
    return root

def files(): return get_image_files(folder()/'images').sorted()
def color(f): return f.name.split('_')[0]

@cache
def table():
    rng = np.random.default_rng(0)
    kind,size,age = rng.choice(list('xyz'), 64),rng.normal(size=64),rng.normal(size=64)
    return pd.DataFrame(dict(kind=kind, size=size, age=age, label=np.where(size+age>0, 'yes', 'no'), price=size-age))

@cache
def sentences():
    rng,words = random.Random(0),dict(good='fine nice bright quick'.split(), bad='poor dull slow weak'.split())
    rows = [(' '.join(rng.choices(words[o]+'the a film with music'.split(), k=rng.randint(6,24))), o) for o in ['good','bad']*32]
    return pd.DataFrame(rows, columns=['text','label'])

# --- what the fits are made with

def images():
    tfms = dict(item_tfms=Resize(SIDE), batch_tfms=aug_transforms(size=SIDE))
    return ImageDataLoaders.from_name_func(folder(), files(), lambda name: name.split('_')[0], **tfms, bs=8, seed=0, **quiet)

def masks():
    mask,codes = lambda f: folder()/'masks'/f.name,['dark','gray','bright']
    return SegmentationDataLoaders.from_label_func(folder(), files(), mask, codes=codes, batch_tfms=aug_transforms(size=SIDE), bs=8, seed=0, **quiet)

def tables(y='label'):
    columns = dict(cat_names=['kind'], cont_names=['size','age'], y_names=y)
    return TabularDataLoaders.from_df(table(), procs=[Categorify,FillMissing,Normalize], **columns, bs=16, seed=0, **quiet)

def texts(): return TextDataLoaders.from_df(sentences(), text_col='text', label_col='label', bs=16, seq_len=16, seed=0, **quiet)

# --- others, that a report has to deal with

def block(*blocks, getters, n_inp=1):
    how = DataBlock(blocks, getters=getters, n_inp=n_inp, item_tfms=Resize(SIDE), splitter=RandomSplitter(seed=0))
    return how.dataloaders(files(), bs=8, **quiet)

def number(f): return int(f.stem.split('_')[1])
def folders(): return ImageDataLoaders.from_folder(folder()/'sorted', valid_pct=.25, item_tfms=Resize(SIDE), bs=8, seed=0, **quiet)
def numbers(): return block(ImageBlock, RegressionBlock, getters=[noop, lambda f: float(number(f))])
def points(): return block(ImageBlock, PointBlock, getters=[noop, lambda f: torch.tensor([[1.,2.],[3.,4.]])])
def several(): return block(ImageBlock, MultiCategoryBlock, getters=[noop, lambda f: [color(f), 'low' if number(f)%4<2 else 'high']])
def pairs(): return block(ImageBlock, ImageBlock, CategoryBlock, getters=[noop, noop, color], n_inp=2)
def two_labels(): return block(ImageBlock, CategoryBlock, RegressionBlock, getters=[noop, color, lambda f: 1.])
def words(): return TextDataLoaders.from_df(sentences(), text_col='text', is_lm=True, bs=4, seq_len=16, seed=0, **quiet)
