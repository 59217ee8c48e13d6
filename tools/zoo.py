"""Networks that others wrote: all of torchvision, one or more architectures of each module of timm, and YOLO where ultralytics is installed

`make zoo`, or `python tools/zoo.py [NAME...]`, prints a row for each: `resnet18` is torchvision's, `timm/resnet10t` is timm's, `yolo/yolo11n` is a file of ultralytics.
Weights, biases, scales and statistics are random, so that nothing is zero or equal by chance. The stages:

- zero: two of five filters are zeroed, tied ones together; by hand where `Sparsifier(coupled=True)` refuses.
- lossless: `Pruner().prune_model` removes them; outputs are compared.
- ratio: `Pruner(model, 30).prune_model()` removes three of ten channels; the outputs keep their shapes.
- fold: `BN_Folder().fold` takes the norms away; outputs are compared.
- saved: `save_pruned`, and `load_pruned` into a fresh network; outputs are compared.
- step: what the ratio left is trained for a step, with finite gradients.
- file: for classifiers of torchvision, all bits come back from a compressed file of dense, of sparse and of shared weights.

A row is right if all that holds, and if whatever stayed that was to go was told in a warning.
Each network has a process of its own, so that one that fails, hangs or is too large does not end the run.
Rows go to a file of JSON lines, and a run goes on where the last one stopped."""
import argparse, json, math, multiprocessing, os, re, signal, sys, tempfile, time, traceback, warnings
from collections import Counter
from contextlib import contextmanager
from copy import deepcopy
from concurrent.futures import ThreadPoolExecutor,as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT/'build'/'zoo.jsonl'
MEMORY = 1300         # MB of float32 parameters of the largest network of torchvision
DOUBLE = 250e6        # bytes of parameters up to which outputs are compared in float64
FILE_MOST = 30e6      # parameters of the largest network that is written to a compressed file: that takes time
ZEROED,RATIO = 40,30  # percent of the filters that are zeroed; percent of the channels that a ratio takes
ENOUGH = .75          # share of what was asked for below which a warning is due
PATIENCE = 10         # how many times longer than its time of the processor a process may take, on a busy machine
MIXED = 'takes all channels together'  # the reason of `Pruner.left` why zeros have to stay if outputs are to
SLOW = 10             # seconds that a removal may take on two quiet cores
LOSSLESS = dict(float64=1e-4, float32=1e-3)  # largest relative differences of outputs
FOLDED = dict(float64=1e-10, float32=1e-3)
SAVED = 1e-6
ROUNDINGS = 10     # how many times what rounding the inputs makes
SAME = 1e-10      # relative difference that rounding makes anywhere
clock = time.process_time  # one thread: what a quiet core would take

# of each module of timm one or more, the smallest of each kind of block; `:` is followed by arguments that make a network small enough
TIMM = '''
beit_base_patch16_224 beitv2_base_patch16_224
halonet_h1 halonet26t eca_botnext26ts_256 lambda_resnet26t haloregnetz_b sebotnet33ts_256
repvgg_a0 mobileone_s0 mobileone_s1 gernet_s regnetz_b16 regnetz_b16_evos resnext26ts eca_resnext26ts seresnext26ts gcresnext26ts bat_resnext26ts resnet51q resnet50_mlp resnet50_clip
cait_xxs24_224
coat_tiny coat_lite_tiny
convit_tiny
convmixer_768_32
convnext_atto convnext_zepto_rms convnextv2_atto convnext_atto_ols convnext_tiny_hnf
cpubone_nano cpubone_b0_bfrobust
crossvit_tiny_240 crossvit_9_dagger_240
csatv2
cs3darknet_focus_s darknet17 cspresnext50 cs3sedarknet_xdw cspresnet50d cs3edgenet_x
cspnext_tiny
davit_tiny
deepseek_vit_412m:depth=2
deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224
densenet121 densenetblur121d
dla46_c dla46x_c dla34 dla60_res2net dla60_res2next
dpn48b dpn68
edgenext_xx_small edgenext_small
efficientformer_l1
efficientformerv2_s0
efficientnet_b0 efficientnet_b0_gn test_efficientnet_ln test_efficientnet_evos mobilenetv2_035 mobilenetv1_100 mnasnet_small semnasnet_050 tinynet_e fbnetc_100 spnasnet_100 mixnet_s tf_mixnet_s
tf_efficientnet_lite0 efficientnet_blur_b0 efficientnet_es tf_efficientnet_b0 efficientnet_cc_b0_4e efficientnetv2_rw_t tf_efficientnetv2_b0 gc_efficientnetv2_rw_t mobilenet_edgetpu_v2_xs efficientnet_x_b3
efficientvim_m1
efficientvit_b0 efficientvit_l1
efficientvit_m0
eva02_tiny_patch14_224 vit_tiny_patch16_dinov3_qkvb vit_pe_core_tiny_patch16_384 vit_small_patch16_rope_mixed_224 vit_small_plus_patch16_dinov3
fasternet_t0
fastvit_t8 fastvit_sa12
focalnet_tiny_srf
gcvit_xxtiny
gemma4_vit_167m:depth=2
ghostnet_050 ghostnetv2_100 ghostnetv3_050
hardcorenas_b
hgnetv2_b0 hgnet_tiny
hiera_tiny_224 hiera_small_abswin_256
sam2_hiera_tiny hieradet_small
hrnet_w18_small
iformer_t
inception_next_atto
inception_resnet_v2
inception_v3
inception_v4
lcnetv2_small
levit_128s levit_conv_128s
lowformer_b0
mambaout_femto
test_coatnet test_maxvit maxvit_rmlp_pico_rw_256 coatnext_nano_rw_224 coatnet_nano_rw_224 maxxvitv2_nano_rw_256 maxvit_tiny_tf_224
poolformer_s12 poolformerv2_s12 caformer_s18 convformer_s18
mixer_s32_224 gmlp_ti16_224 gmixer_12_224 resmlp_12_224
lcnet_035 mobilenetv3_small_050 mobilenetv3_rw mobilenetv4_conv_small_035 tf_mobilenetv3_small_075 mobilenetv4_hybrid_medium_075 mobilenetv4_conv_aa_medium fbnetv3_b
mobilenetv5_base
mobilevit_xxs mobilevitv2_050
mvitv2_tiny
naflexvit_base_patch16_parfac_gap naflexvit_base_patch16_siglip
nasnetalarge
nest_tiny nest_tiny_jx
nextvit_small
test_nfnet nf_resnet26 nf_ecaresnet26 nf_seresnet26 nf_regnet_b0 eca_nfnet_l0 dm_nfnet_f0
pit_ti_224 pit_ti_distilled_224
pnasnet5large
pvt_v2_b0 pvt_v2_b2_li
qwen3_vit_88m
rdnet_tiny
regnetx_002 regnety_002 regnetv_040 regnetz_005 regnety_040_sgn
repghostnet_050
repvit_m1 repvit_m0_9
res2net50_26w_4s res2next50 res2net50d
resnest14d resnest50d_4s2x40d
resnet10t resnet18 resnetblur18 seresnet18 ecaresnet26t seresnext26t_32x4d resnet50_gn resnetaa34d resnext50_32x4d resnet50s resnetrs50
resnetv2_18 resnetv2_18d resnetv2_50x1_bit resnetv2_50d_gn resnetv2_50d_evos resnetv2_50d_frn
rexnet_100 rexnetr_100
selecsls42
legacy_seresnet18 legacy_seresnext26_32x4d
sequencer2d_s
shvit_s1
skresnet18 skresnet50 skresnext50_32x4d
starnet_s050
swiftformer_xs
swin_tiny_patch4_window7_224 swin_s3_tiny_224
swinv2_tiny_window8_256
swinv2_cr_tiny_224
tiny_vit_5m_224
tnt_s_legacy_patch16_224 tnt_s_patch16_224
tresnet_m
twins_svt_small twins_pcpvt_small
vgg11 vgg11_bn
visformer_tiny
vit_tiny_patch16_224 test_vit3 test_vit4 vit_dwee_patch16_reg1_gap_256 vit_dpwee_patch16_reg1_gap_256 vit_pwee_patch16_reg1_gap_256 vit_small_patch14_reg4_dinov2 flexivit_small vit_base_patch16_rpn_224 vit_base_patch32_clip_quickgelu_224
vit_tiny_r_s16_p8_224 vit_small_resnet26d_224
test_vit_relpos vit_relpos_small_patch16_rpn_224 vit_srelpos_small_patch16_224
samvit_base_patch16_224
vitamin_small_224
volo_d1_224
ese_vovnet19b_slim_dw eca_vovnet39b ese_vovnet39b_evos
legacy_xception
xception41 xception41p
xcit_nano_12_p16_224 xcit_nano_12_p8_224
'''.split()

# a size of each version of YOLO, and of each task
YOLO = '''
yolov3-tiny yolov5n yolov5s yolov6n yolov8n yolov8s yolov9t yolov9s yolov10n yolov10s yolo11n yolo11s yolo12n yolo12s yolo26n yolo26s
yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls yolov8n-p2 yolov8n-ghost yolo11n-seg yolo11n-pose yolo11n-obb yolo11n-cls
yolo12n-seg yolo12n-pose yolo12n-obb yolo26n-seg yolo26n-pose yolo26n-obb
'''.split()

# --- networks and their inputs

@dataclass
class Network:
    "How a network is made, and what to feed it"
    name:str
    kind:str          # Kind of torchvision, or the module of timm
    make:object       # Function that gives the network, in float32 and in eval mode
    inputs:tuple      # Arguments of a call in eval mode
    larger:tuple=()   # The same with larger images, if the network takes them
    targets:tuple=()  # Further arguments of a call in training

    def lively(self):
        "The network with weights of which none is zero or equal by chance; it has never run: some keep what they have computed"
        return randomize(self.make())

    def blank(self, dtype=None):
        "The network with zeros for all that a file brings"
        model = self.make().to(dtype)
        for v in model.state_dict().values(): v.zero_()
        return model

def images(*shape, seed=0):
    "Random numbers of `shape`"
    import torch
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def runs(model, inputs):
    "Does `model` run with the arguments `inputs`?"
    from fasterai.core.running import SLIPS,call_with,untouched
    try:
        with untouched(model): call_with(model, inputs)
    except SLIPS: return False
    return True

def larger_of(model, x):
    "One image that is 32 pixels higher and 64 wider than those of `x`, if `model` runs with it"
    bigger = (images(1, *x.shape[1:-2], x.shape[-2]+32, x.shape[-1]+64, seed=1),)
    return bigger if runs(model, bigger) else ()

@cache
def torchvision_kinds():
    "Kind of each network of torchvision, by name"
    from torchvision import models
    kinds = {n:'classification' for n in models.list_models(module=models)}
    for kind in ('segmentation','detection','video','optical_flow','quantization'):
        kinds |= {n:kind for n in models.list_models(module=getattr(models, kind))}
    return kinds

def detector_options(name):
    "Arguments with which a detector of torchvision takes small images, and finds something with random weights"
    base = dict(num_classes=2 if 'keypoint' in name else 5, weights_backbone=None)
    small = dict(min_size=96, max_size=128)
    if name.startswith('ssd'): return base|dict(score_thresh=0., detections_per_img=20)
    if name.startswith(('retinanet','fcos')): return base|small|dict(score_thresh=0., detections_per_img=20)
    return base|small|dict(box_score_thresh=0., box_detections_per_img=20, rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=20)

@contextmanager
def small_clips():
    "torchvision's multiscale transformers are made for eight frames of 64 pixels, not for sixteen of 224"
    from unittest.mock import patch
    from torchvision.models.video import mvit
    own = mvit._mvit
    def make(**options): return own(**{**options, 'spatial_size':(64,64), 'temporal_size':8})
    with patch.object(mvit, '_mvit', make): yield

def findings(sizes):
    "For each image of `sizes`, the two things that are to be found in it"
    import torch
    boxes,points = torch.tensor([[8.,8.,40.,48.],[20.,10.,60.,50.]]),torch.tensor([20.,20.,1.])
    def masks(size): return torch.ones(2, *size, dtype=torch.uint8)
    return [dict(boxes=boxes, labels=torch.ones(2).long(), masks=masks(o), keypoints=points.repeat(2, 17, 1)) for o in sizes]

def torchvision_network(name):
    "The `Network` of torchvision that is called `name`"
    from torchvision import models
    from fasterai.core.running import example_inputs_for
    kind,options,inputs,targets = torchvision_kinds()[name],{},(),()
    if kind=='detection':
        sizes = [(96,128),(96,96)]
        options,inputs,targets = detector_options(name),([images(3, *o) for o in sizes],),(findings(sizes),)
    if kind=='segmentation':
        options,inputs = dict(weights_backbone=None, num_classes=10),(images(2, 3, 64, 64),)
        if 'lraspp' not in name: options['aux_loss'] = True
    if kind=='video':
        inputs = (images(2, 3, 16, 224, 224) if name=='s3d' else images(2, 3, 8, 64, 64),)
    if kind=='optical_flow': inputs = (images(1, 3, 128, 128),images(1, 3, 128, 128, seed=1),2)
    if kind=='quantization': options = dict(quantize=False)
    if kind in ('classification','video','quantization'): options['num_classes'] = 10
    if 'googlenet' in name or 'inception' in name: options['aux_logits'] = False
    def make():
        with small_clips(): return models.get_model(name, weights=None, **options).eval()
    model = make()
    inputs = inputs or example_inputs_for(model)
    larger = larger_of(model, inputs[0]) if kind in ('classification','segmentation','quantization') else ()
    return Network(name, kind, make, inputs, larger, targets)

def timm_network(full):
    "The `Network` of timm that is called `name`, with the smallest images that it runs with; `name:depth=2` passes an argument"
    import timm
    from fasterai.core.running import SLIPS
    name,*given = re.split('[:,]', full)
    given = {k:int(v) for o in given for k,v in [o.split('=')]}
    def create(**options): return timm.create_model(name, pretrained=False, num_classes=10, **given, **options).eval()
    kind,sized,model = timm.models._registry._model_to_module[name],True,None
    for size in (64,96,120,128,160,192,224,256,288,320,384):
        if sized:
            try: model = create(img_size=size)
            except TypeError: sized,model = False,create()
            except SLIPS: continue
        x,options = images(2, 3, size, size),dict(img_size=size) if sized else {}
        def make(): return create(**options)
        if runs(model, (x,)): return Network(f'timm/{full}', kind, make, (x,), larger_of(model, x))
    raise ValueError(f'found no size of images that {full} runs with')

def yolo_network(name):
    "The `Network` that ultralytics makes of its file `name`.yaml"
    from ultralytics import YOLO
    def make(): return YOLO(f'{name}.yaml', verbose=False).model.eval()
    inputs = (images(2, 3, 64, 64),)
    return Network(f'yolo/{name}', YOLO(f'{name}.yaml', verbose=False).task, make, inputs, larger_of(make(), inputs[0]))

FAMILIES = {'timm':timm_network, 'yolo':yolo_network}  # what others than torchvision make, by the prefix of its names
PACKAGES = {'timm':'timm', 'yolo':'ultralytics'}

def family_of(name):
    "Whose network `name` is"
    prefix = name.partition('/')[0]
    return prefix if prefix in FAMILIES else 'torchvision'

def network(name):
    "The `Network` of this name"
    return FAMILIES.get(family_of(name), torchvision_network)(name.partition('/')[2] or name)

def randomize(model, seed=0):
    "`model` with random statistics, scales and shifts of its normalizations"
    import torch
    gen = torch.Generator().manual_seed(seed)
    def uniform(t): return torch.rand(t.shape, generator=gen)+.5
    def normal(t): return torch.randn(t.shape, generator=gen)*.1
    with torch.no_grad():
        for n,b in model.named_buffers():
            if n.endswith('running_mean'): b.copy_(normal(b))
            if n.endswith('running_var'): b.copy_(uniform(b))
        for p in model.parameters():
            # a head, a gate or a layer scale that starts as (nearly) nothing
            if p.numel() and (p==p.flatten()[0]).all(): p.copy_(normal(p))
        for m in model.modules():
            if 'Norm' in type(m).__name__ and getattr(m, 'weight', None) is not None:
                m.weight.copy_(uniform(m.weight))
                if getattr(m, 'bias', None) is not None: m.bias.copy_(normal(m.bias))
    return model

# --- counting and zeroing

def size(model): return sum(p.numel() for p in model.parameters())

def filter_weights(model):
    "Weights of convolutions and linear layers, their filters first"
    from torch import nn
    kinds = nn.modules.conv._ConvNd,nn.Linear
    found = [m for m in model.modules() if isinstance(m, kinds) and m.weight is not None]
    return [m.weight.transpose(0, 1) if getattr(m, 'transposed', False) and m.groups==1 else m.weight for m in found]

def filters(model): return sum(len(w) for w in filter_weights(model))
def zero_filters(model): return sum(int((w.flatten(1)==0).all(1).sum()) for w in filter_weights(model) if w.numel())

def norm_names(model):
    "Names of the layers that keep a running mean"
    return {n for n,m in model.named_modules() if m._buffers.get('running_mean') is not None}

def zero_by_hand(model):
    "Zero two of five filters of each layer but the last, with the scales and shifts of a norm that is registered right after it"
    import torch
    from torch import nn
    parts = [m for m in model.modules() if m._parameters]
    kinds = nn.modules.conv._ConvNd,nn.Linear
    last = max(i for i,m in enumerate(parts) if isinstance(m, kinds))
    with torch.no_grad():
        for m,after in zip(parts[:last], parts[1:]):
            if not isinstance(m, kinds): continue
            w = m.weight.transpose(0, 1) if getattr(m, 'transposed', False) and m.groups==1 else m.weight
            gone,normed = len(w)*ZEROED//100,norm_names(after)=={''} and after._parameters.get('weight') is not None
            for p in (w, m.bias, *((after.weight,after.bias) if normed else ())):
                if p is not None and len(p)==len(w): p[:gone] = 0
    return model

# --- the stages

def said(seen):
    "What fasterai warned of, each once"
    ours = [o for o in seen if Path(o.filename).is_relative_to(ROOT) and not issubclass(o.category, (FutureWarning,DeprecationWarning))]
    return list(dict.fromkeys(str(o.message)[:600] for o in ours))

def place(e):
    "Where exception `e` was raised, and the last lines of the library and of the network on the way there"
    frames = traceback.extract_tb(e.__traceback__)
    def last(word): return [o for o in frames if word in o.filename][-1:]
    picked = [frames[-1],*last('/fasterai/'),*last('/timm/'),*last('/torchvision/'),*last('/ultralytics/')]
    return ' < '.join(dict.fromkeys(f'{"/".join(Path(o.filename).parts[-3:])}:{o.lineno} {o.name}' for o in picked))

def trained(model, net):
    "Train `model` for one step; how many parameters have a gradient. A `ValueError` if there is none, or one that is not finite"
    import torch
    from fasterai.core.running import call_with,tensors_of
    model.train()
    out = call_with(model, (*net.inputs,*net.targets))
    sum(o.sum() for o in tensors_of(out) if o.is_floating_point()).backward()
    grads = {n:p.grad for n,p in model.named_parameters() if p.grad is not None}
    wild = [n for n,g in grads.items() if not g.isfinite().all()]
    if not grads or wild: raise ValueError(f'gradients that are not finite: {", ".join(wild[:3])}' if wild else 'there are no gradients')
    torch.optim.SGD(model.parameters(), lr=1e-6).step()
    if not runs(model.eval(), net.inputs): raise ValueError('the model does not run any more')
    return len(grads)

class Trial:
    "All that is tried with one network; `row` tells what came of it, and `report` gets it whenever it grows"
    stages = 'zero','lossless','ratio','fold','saved','step'
    def __init__(self, net, report=None):
        import torch
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.net,self.report,self.slim,self.pruned = net,report,None,None
        self.alive,self.inputs,self.larger = net.lively(),net.inputs,net.larger
        self.model = deepcopy(self.alive)
        if 4*size(self.model)<DOUBLE: self.to_double()
        self.dtype = next(self.model.parameters()).dtype
        self.row = dict(model=net.name, kind=net.kind, before=size(self.model), filters=filters(self.model), norms=len(norm_names(self.model)),
            dtype=str(self.dtype).removeprefix('torch.'), inputs=self.shapes(net.inputs))

    def to_double(self):
        "Compare in float64, unless the network's code insists on float32"
        import torch
        from torch.utils._pytree import tree_map
        def double(o): return o.double() if isinstance(o, torch.Tensor) and o.is_floating_point() else o
        model,inputs = deepcopy(self.alive).double(),tree_map(double, self.inputs)
        if runs(model, inputs): self.model,self.inputs,self.larger = model,inputs,tree_map(double, self.larger)

    def all(self, dead):
        "Try all stages but those of `dead`, which have ended a process: their errors, by name"
        for stage in self.stages:
            if stage in dead: self.row[stage] = dict(error=dead[stage])
            else: self.run(stage)
        return self.row

    def run(self, stage):
        self.row[stage],self.stage,start = {},stage,clock()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            try: getattr(self, stage)()
            except Exception as e:  # whatever it is, it belongs into the table
                self.tell(error=f'{type(e).__name__}: {e}'[:600], place=place(e))
                if 'seconds' not in self.row[stage]: self.tell(seconds=clock()-start)
        if seen := said(seen): self.tell(warnings=seen)

    def tell(self, **told):
        self.row[self.stage] |= told
        if self.report: self.report(self.row)

    def shapes(self, o):
        from fasterai.core.running import tensors_of
        return [list(t.shape) for t in tensors_of(o)]

    def state(self, model): return {k:v.clone() for k,v in model.state_dict().items()}

    def same_state(self, model, state):
        import torch
        return all(torch.equal(v, state[k]) for k,v in model.state_dict().items())

    def compare(self, a, b, *inputs):
        "Tell how much outputs differ; and, if at all, how much those of `a` do when its inputs are rounded, as random weights can be ill-conditioned"
        import torch
        from torch.utils._pytree import tree_map
        from fasterai.core.proof import difference,random_like
        inputs = [random_like(o, 3) for o in inputs if o]
        worst = max(difference(a, b, o)[0] for o in inputs)
        self.tell(difference=max(worst, self.row[self.stage].get('difference', 0.)))
        if worst<=SAME: return
        class Rounded(torch.nn.Module):
            "`a` of inputs that are rounded"
            def __init__(self): super().__init__(); self.a = a
            def forward(self, *args): return self.a(*tree_map(rounded, args))
        def rounded(o): return o*(1+4*torch.finfo(o.dtype).eps) if isinstance(o, torch.Tensor) and o.is_floating_point() else o
        self.tell(rounding=max(difference(a, Rounded(), o)[0] for o in inputs))

    def zero(self):
        from torch import nn
        from fasterai.core.running import SLIPS
        from fasterai.sparse.sparsifier import Sparsifier
        self.zeroed,start = deepcopy(self.model),clock()
        types = nn.Conv2d,nn.Conv3d,nn.Linear,nn.MultiheadAttention
        try:
            Sparsifier(self.zeroed, 'filter', 'local', layer_type=types, coupled=True, example_inputs=self.inputs).sparsify_model(ZEROED)
            self.tell(how='coupled')
        except SLIPS as e:
            self.zeroed = zero_by_hand(deepcopy(self.model))
            self.tell(how='by hand', refused=f'{type(e).__name__}: {e}'[:600], place=place(e))
        self.tell(seconds=clock()-start, zeros=zero_filters(self.zeroed))

    def lossless(self):
        from fasterai.prune.pruner import Pruner
        was,start = self.state(self.zeroed),clock()
        pruner = Pruner()
        self.slim = pruner.prune_model(self.zeroed, self.inputs)
        self.tell(seconds=clock()-start, after=size(self.slim), gone=self.row['filters']-filters(self.slim))
        whys = Counter(why for o in pruner.left for why in o['why'].split('; '))
        self.tell(whys=[why for why,_ in whys.most_common() if MIXED not in why][:3])
        self.tell(untouched=self.same_state(self.zeroed, was))
        self.compare(self.zeroed, self.slim, self.inputs, self.larger)

    def ratio(self):
        from fasterai.core.running import call_with,untouched
        from fasterai.prune.pruner import Pruner
        model = deepcopy(self.alive)
        def outputs():
            with untouched(model): return self.shapes(call_with(model, self.net.inputs))
        was,start = outputs(),clock()
        pruner = Pruner(model, RATIO, 'local', example_inputs=self.net.inputs)
        pruner.prune_model()
        self.tell(seconds=clock()-start, after=size(model), gone=self.row['filters']-filters(model), reached=pruner.reached())
        now = outputs()
        # a detector finds more or less with other weights
        self.tell(outputs=len(was)==len(now) if self.net.kind=='detection' else was==now)
        self.pruned = model

    def fold(self):
        from fasterai.misc.bn_folding import BN_Folder
        if not self.row['norms']: return self.tell(folded=0, unsaid=0)
        was,start,folder = self.state(self.model),clock(),BN_Folder()
        new = folder.fold(self.model, self.inputs)
        unsaid = norm_names(self.model)-set(folder.into)-set(folder.left)
        self.tell(seconds=clock()-start, folded=len(folder.into), unsaid=len(unsaid), left=Counter(map(str, folder.left.values())).most_common(3))
        self.tell(untouched=self.same_state(self.model, was))
        self.compare(self.model, new, self.inputs, self.larger)

    def saved(self):
        import tempfile
        from fasterai.prune.pruner import load_pruned,save_pruned
        start,files = clock(),0
        for model,dtype,inputs in ((self.slim,self.dtype,self.inputs),(self.pruned,None,self.net.inputs)):
            if model is None: continue
            fresh = self.net.blank(dtype)
            with tempfile.TemporaryDirectory() as d:
                save_pruned(model, f'{d}/m.safetensors')
                load_pruned(f'{d}/m.safetensors', fresh)
            self.compare(model, fresh, inputs)
            files += 1
        self.tell(seconds=clock()-start, files=files)

    def step(self):
        if self.pruned is None: return self.tell(idle='nothing was removed by ratio')
        start = clock()
        try: self.tell(grads=trained(self.pruned, self.net), seconds=clock()-start)
        except Exception as e:
            try: trained(deepcopy(self.alive), self.net)
            except Exception as own: self.tell(idle=f'the network itself cannot be trained so: {type(own).__name__}: {own}'[:300])
            else: raise e

class FiledTrial(Trial):
    "With the compressed file, too"
    stages = *Trial.stages,'file'
    def file(self):
        "All bits of the model come back from its compressed file; how many times smaller that is, for dense, sparse and shared weights"
        import os, tempfile, torch
        from torch import nn
        from fasterai.quantize.all import KMeansQuantizer,load_compressed,save_compressed
        from fasterai.sparse.sparsifier import Sparsifier
        model,start = deepcopy(self.alive),clock()
        def dense(m): return m
        def sparse(m): return Sparsifier(m, 'weight', 'local', layer_type=(nn.Conv2d,nn.Linear,nn.MultiheadAttention)).sparsify_model(90)
        def shared(m): return KMeansQuantizer(4).quantize(m).bfloat16()
        def bits(t): return t.reshape(-1).view(torch.uint8)
        same,times = True,[]
        for change in (dense, sparse, shared):
            model = change(model)
            state,blank = model.state_dict(),deepcopy(model)
            for v in blank.state_dict().values(): v.zero_()
            with tempfile.TemporaryDirectory() as d:
                save_compressed(model, f'{d}/m')
                load_compressed(f'{d}/m', blank)
                times.append(sum(v.nbytes for v in state.values())/os.path.getsize(f'{d}/m'))
            same &= all(torch.equal(bits(v), bits(state[k])) for k,v in blank.state_dict().items())
        self.tell(seconds=clock()-start, bits=same, times=times)

def one(name, report=None, file=False, dead={}):
    "The row of the table for the network called `name`"
    net = network(name)
    filed = file and net.kind=='classification' and size(net.make())<FILE_MOST
    row = (FiledTrial if filed else Trial)(net, report).all(dead)
    return row|dict(problems=problems(row))

# --- what a row says

def problems(row):
    "What is not right about a row: pairs of a kind (wrong, silent, short, refused, error, slow) and its reason"
    found = []
    def add(kind, stage, why): found.append((kind,f'{stage}: {why}'))
    for stage in FiledTrial.stages:
        told = row.get(stage, {})
        if error := told.get('error'): add('refused' if error.startswith('ValueError') else 'error', stage, error)
        if told.get('untouched') is False: add('wrong', stage, 'the model that was given has changed')
        if stage in ('lossless','ratio') and told.get('seconds', 0)>SLOW: add('slow', stage, f"{told['seconds']:.0f} s")
    for stage,most in (('lossless',LOSSLESS[row['dtype']]),('fold',FOLDED[row['dtype']]),('saved',SAVED)):
        told = row.get(stage, {})
        differs = told.get('difference', 0.)
        if not differs<=max(most, ROUNDINGS*told.get('rounding', 0.)): add('wrong', stage, f'outputs differ by {differs:.0e}')
    zero,lossless,ratio,fold = (row.get(o, {}) for o in ('zero','lossless','ratio','fold'))
    def less(stage, done, asked, what):
        told = row[stage].get('warnings')
        add('short' if told else 'silent', stage, f'{done} of {asked} {what}'+(f', and it said: {told[0]}' if told else ', and nothing was said'))
    if zero.get('refused'): add('refused', 'zero', zero['refused'])
    elif 'zeros' in zero and zero['zeros']<ENOUGH*row['filters']*ZEROED/100: less('zero', zero['zeros'], round(row['filters']*ZEROED/100), 'filters were zeroed')
    if 'gone' in lossless:
        asked = zero['zeros']
        # not all can: a norm over channels reads zeros, too
        some = lossless.get('warnings') and (lossless['gone'] or not lossless['whys']) or lossless['gone'] and zero['how']=='by hand'
        if lossless['gone']<ENOUGH*asked and not some: less('lossless', lossless['gone'], asked, 'zero filters went')
    if 'gone' in ratio:
        asked = round(row['filters']*RATIO/100)
        if ratio['gone']<ENOUGH*asked: less('ratio', ratio['gone'], asked, 'filters went')
    if ratio.get('outputs') is False: add('wrong', 'ratio', 'the outputs have other shapes')
    if 'folded' in fold:
        if fold['unsaid']: add('silent', 'fold', f"nothing is said of {fold['unsaid']} of {row['norms']} norms")
        if row['norms'] and not fold['folded']: add('short', 'fold', f"none of {row['norms']} norms went: {fold['left'][:1]}")
    if row.get('file', {}).get('bits') is False: add('wrong', 'file', 'bits have changed')
    return found

def verdict(row):
    "The worst that is the matter with a row, or right"
    kinds = {k for k,_ in row['problems']}
    return next((o for o in ('wrong','silent','error','timeout','refused','short') if o in kinds), 'right')

HEADER = (f"{'network':38} {'kind':18} {'before':>7} | {'zero':>7} {'left':>4} {'gone':>4} {'differ':>6} {'s':>5} | {'left':>4} {'gone':>4} {'s':>5} "
          f"| {'folded':>10} {'differ':>6} {'s':>5} | {'saved':>6} | step | {'file':17} | told | is")

def shown(row):
    "A row as a line of the table"
    zero,lossless,ratio,fold,saved,step,file = (row.get(o, {}) for o in FiledTrial.stages)
    def percent(part, of): return '-' if part is None or not of else f'{100*part/of:.0f}%'
    def small(x): return '-' if x is None else f'{x:.0e}'
    def seconds(told): return f"{told['seconds']:.1f}" if 'seconds' in told else '-'
    asked = row.get('filters', 0)*RATIO/100
    before = f"{row['before']/1e6:.1f}M" if 'before' in row else '-'
    steps = 'ok' if 'grads' in step else 'idle' if 'idle' in step else 'FAIL' if step else '-'
    files = ' '.join(f'×{o:.1f}' for o in file.get('times', []))
    is_ = verdict(row)+(' slow' if 'slow' in {k for k,_ in row['problems']} else '')
    return (f"{row['model']:38} {row.get('kind', ''):18} {before:>7} | {zero.get('how', '-'):>7} {percent(lossless.get('after'), row.get('before')):>4} "
            f"{percent(lossless.get('gone'), zero.get('zeros')):>4} {small(lossless.get('difference')):>6} {seconds(lossless):>5} "
            f"| {percent(ratio.get('after'), row.get('before')):>4} {percent(ratio.get('gone'), asked):>4} {seconds(ratio):>5} "
            f"| {fold.get('folded', '-')!s:>3} of {row.get('norms', '-')!s:>3} {small(fold.get('difference')):>6} {seconds(fold):>5} "
            f"| {small(saved.get('difference')):>6} | {steps:4} | {files:17} | {'silent' if 'silent' in {k for k,_ in row['problems']} else 'yes':6} | {is_}")

def summary(rows, missing=()):
    "How many rows are right, and the reasons of the others, the most frequent first"
    counts,lines = Counter(map(verdict, rows)),[]
    for kind in (*FAMILIES,'torchvision'):
        mine = [o for o in rows if family_of(o['model'])==kind]
        if mine: lines.append(f"{kind}: {sum(verdict(o)=='right' for o in mine)} of {len(mine)} right")
    lines.append(', '.join(f'{counts[o]} {o}' for o in ('right','wrong','silent','short','refused','error','timeout')))
    lines.append(f"{sum('slow' in dict(o['problems']) for o in rows)} took more than {SLOW} s for a removal")
    whys = Counter()
    for row in rows: whys.update({f"{k}: {re.sub(r'[0-9][0-9.e+-]*', '#', why)[:160]}" for k,why in row['problems'] if k!='slow'})
    lines += [f'{n:4} × {why}' for why,n in whys.most_common()]
    for kind,n in Counter(map(family_of, missing)).items(): lines.append(f'{n} networks of {kind} were not tried: {PACKAGES[kind]} is not installed here')
    return '\n'.join(lines)

# --- the run

def child(name, path, seconds, file, dead):
    "Try network `name` and write its row, whenever it grows, to `path`; ended after `seconds` of the processor"
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(clock()+seconds),)*2)
    os.dup2(os.open(f'{path}.err', os.O_WRONLY|os.O_CREAT), 2)
    def report(row):
        Path(f'{path}.new').write_text(json.dumps(row), encoding='utf-8')
        os.replace(f'{path}.new', path)
    report(one(name, report, file, dead))

def run(name, seconds, file, workers, dead={}):
    "`one` in a process of its own; if a stage ends the process, once more without it"
    with tempfile.TemporaryDirectory() as d:
        path,start = Path(d)/'row',time.time()
        p = workers.Process(target=child, args=(name,str(path),seconds,file,dead))
        p.start()
        p.join(PATIENCE*seconds)
        late = p.is_alive()
        if late: p.kill()
        p.join()
        row = json.loads(path.read_text(encoding='utf-8')) if path.exists() else dict(model=name)
        told = Path(f'{path}.err').read_text(encoding='utf-8', errors='replace').strip().splitlines() if Path(f'{path}.err').exists() else []
    row['wall'] = time.time()-start
    if 'problems' in row: return row
    stage = next((o for o in reversed(FiledTrial.stages) if o in row), 'start')
    row['problems'] = problems(row) if 'dtype' in row else []
    if late or -p.exitcode in (signal.SIGXCPU,signal.SIGKILL): row['problems'].append(('timeout',f'{stage}: more than {seconds:.0f} s'))
    elif stage=='start': row['problems'].append(('error',f"{stage}: {(told or [''])[-1][:300]}"))
    else: return run(name, seconds, file, workers, {**dead, stage:f'the process ended with {p.exitcode}: {(told or [""])[-1][:300]}'})
    return row

def processes():
    "Processes that start with what each of them needs"
    workers = multiprocessing.get_context('forkserver')
    workers.set_forkserver_preload(['torchvision','fasterai.prune.pruner','fasterai.sparse.sparsifier','fasterai.misc.bn_folding',*[o for o in PACKAGES.values() if has(o)]])
    return workers

def has(package):
    "Is it installed?"
    from importlib.util import find_spec
    return find_spec(package) is not None

def names():
    "All of torchvision that fits, the choice of timm, and that of YOLO where ultralytics is installed"
    from torchvision import models
    def params(n): return next(iter(models.get_model_weights(n))).meta['num_params']
    return [n for n in torchvision_kinds() if params(n)*4<MEMORY*1e6]+[f'timm/{o}' for o in TIMM]+[f'yolo/{o}' for o in YOLO if has('ultralytics')]

def stored(path):
    "Rows that file `path` has, the last of each network"
    if not path.exists(): return {}
    rows = map(json.loads, path.read_text(encoding='utf-8').splitlines())
    return {o['model']:o for o in rows}

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('names', nargs='*', help='networks to try (again); by default all that have no row yet')
    a.add_argument('--one', action='store_true', help='try one in this process, and print all that is known of it')
    a.add_argument('--file', action='store_true', help='try the compressed file, too')
    a.add_argument('--workers', type=int, default=2, help='processes at a time')
    a.add_argument('--timeout', type=float, default=150, help='seconds of the processor for each network')
    a.add_argument('--results', type=Path, default=RESULTS, help='file of JSON lines')
    a.add_argument('--again', action='store_true', help='start over')
    a.add_argument('--show', action='store_true', help='only print what is there')
    a = a.parse_args()
    if a.one:
        print(json.dumps(one(a.names[0], file=a.file), indent=1))
        return 0
    wanted = a.names or names()
    there = {} if a.again or a.names else stored(a.results)
    missing = [o for o in wanted if o not in there and family_of(o) in PACKAGES and not has(PACKAGES[family_of(o)])]
    for kind in {family_of(o):0 for o in missing}: print(f'{PACKAGES[kind]} is not installed here: no network of {kind} is tried', flush=True)
    todo = [] if a.show else [o for o in wanted if o not in there and o not in missing]
    rows = [there[o] for o in wanted if o in there]
    if rows: print(f'{len(rows)} of {len(wanted)} rows are those of {a.results} (--again starts over)', flush=True)
    print(HEADER, flush=True)
    for row in rows: print(shown(row), flush=True)
    a.results.parent.mkdir(parents=True, exist_ok=True)
    if a.again: a.results.unlink(missing_ok=True)
    workers = processes()
    with ThreadPoolExecutor(a.workers) as ex:
        for done in as_completed([ex.submit(run, o, a.timeout, a.file, workers) for o in todo]):
            rows.append(row := done.result())
            print(shown(row), flush=True)
            with a.results.open('a', encoding='utf-8') as f: f.write(json.dumps(row)+'\n')
    print(summary(rows, missing), flush=True)
    return int(bool(missing) or any(verdict(o)!='right' for o in rows))

if __name__=='__main__': sys.exit(main())
