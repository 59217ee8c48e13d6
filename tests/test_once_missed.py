"""What the library once got wrong on networks, tensors and wrappers that it did not make itself, each with the smallest input that shows it"""
import contextlib, copy, math, random, warnings
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import DeformConv2d
from fasterai.core.graph import unknown_ops
from fasterai.misc.all import BN_Folder, Conv_Decomposer, FC_Decomposer
from fasterai.prune.all import Pruner
from fasterai.quantize.all import KMeansQuantizer
from fasterai.report.all import report
from fasterai.sparse.all import Sparsifier
from tiny import Net, warnings_are

x = torch.randn(2,3,10,10)
def conv(i, o, k=3, **kw): return nn.Conv2d(i, o, k, **kw)

@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield

def dead(model, layer, n=3):
    "`model` in eval mode, with `n` filters of zeros in `layer`"
    with torch.no_grad():
        m = model.get_submodule(layer)
        m.weight[:n],m.bias[:n] = 0,0
    return model.eval()

BETWEEN = dict(normalize=lambda t: F.normalize(t, dim=1), cumsum=lambda t: t.cumsum(2), gather=lambda t: t.gather(3, torch.zeros(1,1,1,1, dtype=torch.long).expand(*t.shape[:3], 2)),
    grid_sample=lambda t: F.grid_sample(t, F.affine_grid(torch.eye(2,3)[None].expand(len(t),-1,-1), t.shape, align_corners=False), align_corners=False), sort=lambda t: t.sort(2).values,
    topk=lambda t: t.topk(3, 3).values, median=lambda t: t.median(2, keepdim=True).values, tril=lambda t: t.tril(), fold=lambda t: F.fold(F.unfold(t, 2), t.shape[2:], 2), lrn=lambda t: F.local_response_norm(t, 2),
    fft=lambda t: torch.fft.fft2(t).real, scatter=lambda t: t.scatter(2, torch.zeros(1,1,1,1, dtype=torch.long).expand(len(t), t.shape[1], 1, t.shape[3]), 0.))

@pytest.mark.parametrize('f', BETWEEN.values(), ids=BETWEEN)
def test_between_two_convolutions(f):
    model = dead(Net(lambda s,x: s.b(f(s.a(x))), a=conv(3,8), b=conv(8,4,1)), 'a')
    with warnings_are('ignore'): small = Pruner().prune_model(model, x)
    torch.testing.assert_close(small(x), model(x))
    assert small.a.out_channels==(8 if f is BETWEEN['lrn'] else 5)  # which takes neighbours together, and says so
    Pruner(model, 50, example_inputs=x).prune_model()
    assert model.a.out_channels==4

def test_a_detector():
    "Boxes are values that nobody knows, and must not be taken for places in memory"
    torch.manual_seed(0)
    backbone = nn.Sequential(conv(3,8,stride=2), nn.ReLU(), conv(8,8,stride=2), nn.ReLU())
    backbone.out_channels = 8
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    model = FasterRCNN(backbone, 3, min_size=64, max_size=64, rpn_anchor_generator=AnchorGenerator(((16,),), ((1.,),)), rpn_pre_nms_top_n_test=20, rpn_post_nms_top_n_test=5)
    dead(model, 'backbone.0')
    with warnings_are('ignore'): small = Pruner().prune_model(model, ([torch.rand(3,64,64)],))
    assert small.backbone[0].out_channels==5
    img = [torch.rand(3,64,64)]
    assert all(torch.allclose(small(img)[0][k], v, atol=1e-5) for k,v in model(img)[0].items())

def test_deformed_convolutions():
    model = dead(Net(lambda s,x: s.b(s.d(s.a(x), s.o(x))), a=conv(3,8,padding=1), o=conv(3,18,padding=1), d=DeformConv2d(8,6,3,padding=1), b=conv(6,4,1)), 'a')
    with quiet(): small = Pruner().prune_model(model, x)
    assert small.d.in_channels==5
    torch.testing.assert_close(small(x), model(x))
    with warnings_are('ignore'): Pruner(model, 50, example_inputs=x).prune_model()
    assert (model.d.in_channels,model.d.out_channels)==(4,3)

@pytest.mark.filterwarnings('ignore')
def test_prepared_by_fx():
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx
    net = nn.Sequential(conv(3,8), nn.ReLU(), conv(8,4))
    model = prepare_qat_fx(net.train(), get_default_qat_qconfig_mapping('x86'), (x,))
    model(x)
    Pruner(model.eval(), 50, example_inputs=x).prune_model()
    first = next(m for m in model.modules() if hasattr(m, 'out_channels'))
    assert first.out_channels==4 and model(x).shape==(2,4,6,6)

class NormAct(nn.BatchNorm2d):
    "A norm that does more, as other libraries have them"
    def __init__(self, n):
        super().__init__(n)
        self.drop,self.act = nn.Identity(),nn.SiLU()
    def forward(self, x): return self.act(self.drop(super().forward(x)))

def test_a_norm_with_an_activation_of_its_own():
    model = nn.Sequential(conv(3,8), NormAct(8), conv(8,4), NormAct(4)).eval()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(), m.running_var.uniform_(.5,2), m.weight.normal_(), m.bias.normal_()
    with quiet(): folded = BN_Folder().fold(model, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-3, atol=1e-4)

SPOKEN = dict(number=(lambda m: Pruner(50).prune_model(m), ValueError, 'the model comes first'), nothing=(lambda m: Pruner(m).prune_model(), UserWarning, 'nothing to remove'),
    no_zeros=(lambda m: Pruner().prune_model(m), UserWarning, 'nothing to remove'), scripted=(lambda m: Pruner().prune_model(torch.jit.script(m)), ValueError, 'no layers to look into'),
    no_norm=(lambda m: BN_Folder().fold(m), UserWarning, 'no BatchNorm'))

@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('call,kind,says', SPOKEN.values(), ids=SPOKEN)
def test_who_asks_and_gets_nothing_is_told(call, kind, says):
    with pytest.raises(kind, match=says) if kind is ValueError else pytest.warns(kind, match=says): call(nn.Sequential(conv(3,8), nn.ReLU(), conv(8,4)).eval())

def test_transformers_keep_what_a_norm_ties():
    "Zeros that a LayerNorm takes together with others stay, and a warning says so"
    torch.manual_seed(0)
    from torchvision.models import VisionTransformer
    model,image = VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3).eval(),torch.randn(1,3,16,16)
    with warnings_are('ignore'): Sparsifier(model, 'filter', coupled=True, example_inputs=image).sparsify_model(40)
    with pytest.warns(UserWarning, match='were not removed: .*takes all channels together'): small = Pruner().prune_model(model, image)
    torch.testing.assert_close(small(image), model(image))

@pytest.mark.parametrize('wrap', [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_one_layer_with_a_computed_weight(wrap):
    model = nn.Sequential(conv(3,8), nn.ReLU(), wrap(conv(8,8)), nn.ReLU(), conv(8,4))
    with pytest.warns(UserWarning, match='1 layer is left out.* 2 by '): Sparsifier(model, 'filter').sparsify_model(50)
    assert [int((model[i].weight==0).flatten(1).all(1).sum()) for i in (0,2,4)]==[4,0,2]

def test_a_weight_that_is_expanded():
    model = nn.Sequential(nn.Linear(3,8), nn.Linear(8,16))
    model[1].weight = nn.Parameter(torch.randn(1,8).expand(16,8))
    was = copy.deepcopy(model[0].weight)
    with pytest.raises(ValueError, match='1.weight is expanded, so its elements share memory'): Sparsifier(model, layer_type=nn.Linear).sparsify_model(50)
    assert torch.equal(model[0].weight, was)

def test_numbers_that_cannot_be_ranked():
    model = nn.Sequential(conv(3,8), nn.ReLU(), conv(8,4))
    model[0].weight.data[0] = torch.nan
    for call in (lambda: Pruner(model, 50, example_inputs=x).prune_model(), lambda: Pruner().prune_model(model, x), lambda: Sparsifier(model).sparsify_model(50), lambda: Conv_Decomposer().decompose(model)):
        with pytest.raises(ValueError, match='numbers of 0.weight are nan'): call()
    normed = nn.Sequential(conv(3,8), nn.ReLU(), conv(8,4))
    with torch.no_grad(): normed[0].weight[:3] = 0
    nn.utils.parametrizations.weight_norm(normed[0])  # the norm of a filter of zeros divides it
    for call in (lambda: Pruner(normed, 50, example_inputs=x).prune_model(), lambda: Pruner().prune_model(normed, x)):
        with pytest.raises(ValueError, match='of 216 numbers of 0.weight are nan'): call()
    linear = nn.Sequential(nn.Linear(8,8))
    linear[0].weight.data[0] = torch.inf
    with pytest.raises(ValueError, match='numbers of 0.weight are nan'): FC_Decomposer().decompose(linear)

def test_layers_without_entries():
    with pytest.raises(ValueError) as e: Sparsifier(nn.Sequential(nn.Linear(0,4)), layer_type=nn.Linear).sparsify_model(50)
    assert 'it has Linear' not in str(e.value)

COMPLEX = dict(imaginary=lambda t: torch.view_as_real(torch.complex(t, 2*t))[...,1], angle=lambda t: torch.complex(t, t).abs(), times=lambda t: (torch.complex(t, t)*1j).real, conj=lambda t: torch.complex(t, t).conj().imag,
    ifft=lambda t: torch.fft.ifft(torch.fft.fft(t)).imag, polar=lambda t: torch.polar(t.abs(), t).real)

@pytest.mark.parametrize('f', COMPLEX.values(), ids=COMPLEX)
@pytest.mark.parametrize('verify', [True,False])
def test_both_parts_of_a_complex_number_are_unknown(f, verify):
    model = dead(Net(lambda s,x: s.b(f(s.a(x))), a=nn.Conv1d(3,8,3,padding=1), b=nn.Conv1d(8,4,1)), 'a')
    series = torch.randn(2,3,16)
    with quiet(): small = Pruner(verify=verify).prune_model(model, series)
    assert small.a.out_channels==5
    torch.testing.assert_close(small(series), model(series))

class Stateful(nn.Module):
    "Counts, remembers and writes as it runs"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(6,8),nn.Linear(8,4)
        self.calls,self.log,self.seen,self.last,self.total = 0,[],{},None,torch.zeros(())
    def forward(self, x):
        self.calls += 1
        self.log.append(x.shape)
        self.seen[len(self.log)] = x.shape
        self.last = x
        self.total += x.detach().sum()
        return self.b(self.a(x).relu())

@pytest.mark.parametrize('use', [lambda m,x: Pruner().prune_model(m, x), lambda m,x: BN_Folder().fold(m, x), lambda m,x: Sparsifier(m, layer_type=nn.Linear).sparsify_model(50), lambda m,x: FC_Decomposer().decompose(m, example_inputs=x),
    lambda m,x: Pruner(m, 50, example_inputs=x).prune_model(), lambda m,x: report(m, m, x, progress=False), lambda m,x: unknown_ops(m, x)], ids=['lossless','fold','sparsify','decompose','ratio','report','unknown'])
def test_what_a_model_keeps_comes_back(use):
    "Runs of ours leave no trace in attributes, whatever is in them"
    model,x = dead(Stateful(), 'a'),torch.randn(2,6)
    model(x)
    was = model.calls,list(model.log),dict(model.seen),model.last,model.total.clone()
    with warnings_are('ignore'): use(model, torch.randn(2,6))
    assert (model.calls,model.log,model.seen)==was[:3] and model.last is was[3] and torch.equal(model.total, was[4])

class Built(nn.Module):
    "Makes its layers in the first run"
    made = False
    def forward(self, x):
        if not self.made: self.a,self.b,self.made = nn.Linear(6,8),nn.Linear(8,4),True
        return self.b(self.a(x).relu())

def test_layers_that_a_first_run_makes_stay():
    model,x = Built(),torch.randn(2,6)
    with warnings_are('ignore'): Pruner(model, 50, example_inputs=x).prune_model()
    assert model.made and model.a.out_features==4 and model(x).shape==(2,4)

def test_derivatives_inside():
    "Those that are computed backward are followed; forward ones are refused in words, and must not end the process"
    def model(f): return dead(Net(lambda s,x: f(s.e, x), e=nn.Sequential(nn.Linear(3,16), nn.Tanh(), nn.Linear(16,3))), 'e.0', 8)
    points = torch.randn(5,3)
    backward = model(lambda e,x: torch.func.grad(lambda p: e(p).sum())(x))
    with warnings_are('ignore'): assert Pruner().prune_model(backward, points).e[0].out_features==8
    forward = model(lambda e,x: torch.func.jvp(e, (x,), (torch.ones_like(x),))[1])
    with pytest.raises(ValueError, match='computed forward'): Pruner().prune_model(forward, points)
    with pytest.raises(ValueError, match='no channel of this Net can be removed'): Pruner(forward, 50, example_inputs=points).prune_model()

def test_a_matrix_that_is_computed():
    "What another input multiplies is read, whichever parameter or buffer was added before"
    for f in (lambda t,i: t+i, lambda t,i: t*i, lambda t,i: t):
        model = Net(lambda s,x: s.o(torch.bmm(x.transpose(1, 2), f(s.d(s.h(x[...,0]).relu()).view(-1,3,3), s.i)).transpose(1, 2)), h=nn.Linear(3,16), d=nn.Linear(16,9), o=nn.Conv1d(3,4,1)).eval()
        model.register_buffer('i', torch.eye(3))
        points = torch.randn(4,3,20)
        with pytest.warns(UserWarning, match='nothing to remove'): assert Pruner(verify=False).prune_model(model, points).h.out_features==16
        dead(model, 'h', 8)
        assert Pruner().prune_model(model, points).h.out_features==8

LEAVES = dict(tolist=lambda x: x.amax().tolist(), numpy=lambda x: float(x.detach().cpu().numpy().max()), array=lambda x: float(np.asarray(x.cpu()).max()), item=lambda x: x.max().item())

@pytest.mark.parametrize('f', LEAVES.values(), ids=LEAVES)
def test_numbers_of_the_input_that_leave(f):
    "They are no constants: of another input they are others"
    model = dead(Net(lambda s,x: s.b(s.a(x)+max(0, f(x)-5)), a=conv(3,8), b=conv(8,4,1)), 'a')
    with pytest.warns(UserWarning, match='cannot be run on unknown inputs'): small = Pruner().prune_model(model, x)
    torch.testing.assert_close(small(x+9), model(x+9))

ROWS = dict(index=lambda h,i: h[i], index_select=lambda h,i: h.index_select(0, i), embedding=lambda h,i: F.embedding(i, h), gather=lambda h,i: h.gather(0, i[:,None].expand(-1, h.shape[1])),
    index_add=lambda h,i: torch.zeros_like(h).index_add(0, i[:7], h), put=lambda h,i: torch.zeros_like(h).index_put((i[:7].sort().indices,), h))  # each row once: of several, a GPU takes any

@pytest.mark.parametrize('f', ROWS.values(), ids=ROWS)
def test_rows_that_an_input_picks(f):
    "As the edges of a graph do: channels of zeros are zeros in each row"
    model,inputs = dead(Net(lambda s,x,i: s.o(f(s.l(x).relu(), i)), l=nn.Linear(4,16), o=nn.Linear(16,2)), 'l', 8),(torch.randn(7,4),torch.randint(0, 7, (20,)))
    with quiet(): small = Pruner().prune_model(model, inputs)
    assert small.l.out_features==8
    torch.testing.assert_close(small(*inputs), model(*inputs))

SCALED = dict(root=lambda t: t*math.sqrt(t.size(-1)), power=lambda t: F.normalize(t, dim=-1)*t.shape[-1]**.5, mean=lambda t: t*torch.sigmoid(t.sum(-1, keepdim=True)/t.shape[-1]), product=lambda t: t*t.shape[-1])

@pytest.mark.parametrize('f', SCALED.values(), ids=SCALED)
def test_numbers_that_a_width_makes(f):
    "What is computed with how many channels there are would change with them: they stay, and the rest goes"
    model,inputs = dead(dead(Net(lambda s,x: s.o(s.g(f(s.e(x))).relu()), e=nn.Linear(6,16), g=nn.Linear(16,24), o=nn.Linear(24,2)), 'e', 8), 'g', 12),torch.randn(4,6)
    with pytest.warns(UserWarning, match=r'8 were not removed: 8 in e: .*test_once_missed.py'): small = Pruner().prune_model(model, inputs)
    assert (small.e.out_features,small.g.out_features)==(16,12)
    torch.testing.assert_close(small(inputs), model(inputs))

class Octave(nn.Module):
    "A weight that is used in pieces"
    def __init__(self):
        super().__init__()
        self.c,self.w,self.o = conv(3,16,padding=1),conv(16,16,padding=1),conv(16,2,1)
    def forward(self, x):
        h,w = self.c(x),self.w.weight
        return self.o(torch.cat([F.conv2d(h[:,:12], w[:12,:12], padding=1), F.conv2d(h[:,12:], w[12:,12:], padding=1)], 1))

def test_pieces_of_a_weight():
    "A cut that runs without weights and not with them is tried once"
    model = dead(dead(Octave(), 'c', 8), 'w', 8)
    with warnings_are('ignore'): small = Pruner().prune_model(model, x)
    torch.testing.assert_close(small(x), model(x))

class Noisy(nn.Module):
    "Draws numbers, by `draw`, in eval mode"
    def __init__(self, draw):
        super().__init__()
        self.a,self.b,self.draw = conv(3,8),conv(8,4,1),draw
        self.torchs,self.numpys = torch.Generator().manual_seed(3),np.random.default_rng(0)
    def forward(self, x): return self.draw(self, self.b(self.a(x).relu()))

DRAWN = dict(own=lambda s,y: y+torch.randn(len(y),4,1,1, generator=s.torchs), numpys=lambda s,y: y*s.numpys.random(), numpy=lambda s,y: y*np.random.rand(), python=lambda s,y: y*random.random(), torch=lambda s,y: y*torch.rand(1))

@pytest.mark.parametrize('draw', DRAWN.values(), ids=DRAWN)
def test_models_that_draw_numbers(draw):
    "The same ones in each run of ours, and none are missing afterwards"
    model = dead(Noisy(draw), 'a')
    states = lambda: (model.torchs.get_state().tolist(),model.numpys.bit_generator.state,random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist())
    was = states()
    with quiet(): assert Pruner().prune_model(model, x).a.out_channels==5
    assert states()==was

def test_numbers_for_each_channel():
    "Fewer channels draw fewer numbers: the error says so"
    model = dead(Net(lambda s,x: s.b(F.dropout(s.a(x).relu(), .3, training=True)), a=conv(3,8), b=conv(8,4,1)), 'a')
    with pytest.raises(ValueError, match='the network draws random numbers|runs otherwise each time'): Pruner().prune_model(model, x)

class Routed(nn.Module):
    "Sends each sample to one of four experts"
    def __init__(self):
        super().__init__()
        self.i,self.gate,self.o = nn.Linear(6,16),nn.Linear(16,4),nn.Linear(16,2)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(16,24), nn.GELU(), nn.Linear(24,16)) for _ in range(4)])
    def forward(self, x):
        h = self.i(x).relu()
        y,chosen = torch.zeros_like(h),self.gate(h).argmax(-1)
        for k,f in enumerate(self.experts):
            rows = (chosen==k).nonzero()[:,0]
            if len(rows): y = y.index_add(0, rows, f(h[rows]))
        return self.o(y+h)

def test_experts_that_no_sample_went_to():
    "They may read what the others read: that stays, and all batches still run"
    torch.manual_seed(0)
    model,few,many = Routed().eval(),torch.randn(1,6),torch.randn(64,6)
    with pytest.warns(UserWarning, match='did not run, and may read or make the channels of experts'): Pruner(model, 50, example_inputs=few).prune_model()
    assert model(many).shape==(64,2)
    assert sum(f[0].out_features==12 for f in model.experts)==1 and model.i.out_features==16

@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('use', [lambda m: Sparsifier(m, 'filter', coupled=True, example_inputs=x), lambda m: BN_Folder().fold(m, x), lambda m: KMeansQuantizer(3).quantize(m), lambda m: Pruner().prune_model(m, x)],
    ids=['coupled','fold','share','lossless'])
def test_a_scripted_part(use):
    model = nn.Sequential(conv(3,8), nn.BatchNorm2d(8), torch.jit.script(nn.Sequential(conv(8,8,1), nn.ReLU())), conv(8,4,1)).eval()
    with pytest.raises(ValueError, match='2 is a .* of TorchScript, whose shapes are fixed: use the module that it was made from'): use(model)
