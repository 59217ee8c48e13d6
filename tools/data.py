"Images for the demo and the walkthrough, from what is on the machine: no network"
import gzip
from pathlib import Path
import numpy as np

FASHION = Path('/usr/share/datasets/fashion-mnist')  # where Debian's package dataset-fashion-mnist puts it
CLOTHES = ['T-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'boot']

def read_idx(path): # A file of the MNIST family, gzipped
    "The array in an idx file: two zero bytes, type (8: unsigned byte), number of axes, their lengths, the data"
    with gzip.open(path) as f: b = f.read()
    if b[:3]!=b'\0\0\x08': raise ValueError(f'{path} is not an idx file of bytes')
    shape = np.frombuffer(b, '>u4', b[3], 4)
    return np.frombuffer(b, np.uint8, offset=4+4*b[3]).reshape(shape)

def fashion_mnist(n=None, folder=FASHION): # Training images, by default all
    "Fashion-MNIST: (images [n, 28, 28] in [0, 1], labels) for training, the same for validation, names of the classes"
    def part(name, n=None): return read_idx(folder/f'{name}-images-idx3-ubyte.gz')[:n].astype(np.float32)/255, read_idx(folder/f'{name}-labels-idx1-ubyte.gz')[:n].astype(np.int64)
    return part('train', n), part('t10k'), CLOTHES

def digits():
    "scikit-learn's digits: (images [n, 8, 8] in [0, 1], labels) for training, the same for validation, names of the classes"
    from sklearn.datasets import load_digits
    d = load_digits()
    x,y = d.images.astype(np.float32)/16, d.target.astype(np.int64)
    return (x[:1300],y[:1300]), (x[1300:],y[1300:]), [str(o) for o in range(10)]

def best_there_is(n=None): # Training images of Fashion-MNIST, by default all
    "What the data are, and `fashion_mnist` where it is installed, else `digits`"
    if FASHION.exists(): return 'Fashion-MNIST', *fashion_mnist(n)
    return "scikit-learn's digits", *digits()

def loaders(train, valid, bs=64): # (images, labels), twice; images of a batch
    "fastai's DataLoaders of gray images"
    import torch
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    items = [list(zip(torch.from_numpy(x)[:,None], torch.from_numpy(y))) for x,y in (train,valid)]
    return DataLoaders(DataLoader(items[0], bs=bs, shuffle=True, drop_last=True), DataLoader(items[1], bs=500))
