"What must be gone, worked out slowly: plain loops, exact fractions and Python's sort; nothing of the library is used"
from fractions import Fraction
from itertools import product
from math import floor, inf, isnan
import numpy as np
from torch import nn

AXES = {nn.Conv1d:'oiw', nn.Conv2d:'oihw', nn.Conv3d:'oidhw', nn.Linear:'oi', nn.ConvTranspose1d:'iow', nn.ConvTranspose2d:'iohw', nn.ConvTranspose3d:'iodhw'}

# Axes that number the blocks, by granularity and number of dimensions of the weight: Linear, Conv1d, Conv2d, Conv3d. None: it has no such blocks
NUMBERED = dict(
    weight=('oi','oiw','oihw','oidhw'), column=('i','oiw','oiw','oiw'), row=('o',None,'oih','oih'), shared_weight=('i','iw','ihw','idhw'),
    channel=('o','ow','ohw','odhw'), kernel=('oi',)*4, shared_channel=(None,'w','hw','dhw'), shared_column=(None,'iw','iw','iw'), shared_row=(None,None,'ih','ih'),
    vertical_slice=(None,'ow','ow','ow'), horizontal_slice=(None,None,'oh','oh'), shared_vertical_slice=(None,'w','w','w'), shared_horizontal_slice=(None,None,'h','h'),
    shared_kernel=('i',)*4, filter=('o',)*4, layer=('',)*4)

def numbered(granularity, axes): return NUMBERED[granularity][len(axes)-2]

def exact(n, pct): return floor(Fraction(str(pct))*n/100)

def block_ids(shape, axes, granularity):
    "Number of the block that each weight belongs to"
    names = numbered(granularity, axes)
    keys = [tuple(at for at,a in zip(idx, axes) if a in names) for idx in product(*map(range, shape))]
    order = {k:i for i,k in enumerate(sorted(set(keys)))}
    return np.array([order[k] for k in keys]).reshape(shape)

def block_scores(scores, ids):
    "Mean of each block's scores; exact, so that what should be a tie is one"
    rows = [[] for _ in range(ids.max()+1)]
    for s,i in zip(scores.flat, ids.flat): rows[i].append(Fraction(float(s)))
    return [sum(r)/len(r) for r in rows]

def key(s): return inf if isnan(s) else s

def fall(scores, gone, k, spare=True):
    "Which blocks of each layer are gone when `k` of all are: `gone`, and the lowest others; a layer's last one is spared"
    gone = [set(o) for o in gone]
    for _,layer,i in sorted((key(s),l,i) for l,ss in enumerate(scores) for i,s in enumerate(ss)):
        if sum(map(len, gone))>=k: break
        if i not in gone[layer] and not (spare and len(gone[layer])==len(scores[layer])-1): gone[layer].add(i)
    return gone

def rise(scores, gone, k):
    "Which are still gone when only `k` are: the highest return"
    left = sorted((key(scores[l][i]),l,i) for l,o in enumerate(gone) for i in o)[:k]
    return [{i for _,l,i in left if l==layer} for layer in range(len(gone))]
