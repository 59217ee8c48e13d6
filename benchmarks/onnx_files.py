"""Networks of others as ONNX files: exported, compared at their own batch, at 1 and at 5 samples, and run in ONNX Runtime

`python benchmarks/onnx_files.py [NAME...]` prints a row for each: `resnet18` is torchvision's, `timm/…` is timm's, `hf/…` is of transformers, with a small configuration.
After `:` stands what the library has made of it: `pruned` (half of the channels), `folded`, `decomposed`, `shared` (16 values a layer), `sparse` (half of the weights zero).
Weights are random, so that nothing is zero or equal by chance. A row has seconds of the export with all comparisons, bytes of the file, the largest difference, and milliseconds of a call with one sample
in PyTorch and in ONNX Runtime, in turn, with as many threads each as PyTorch has; and whether the file was refused for a network with other numbers in one layer."""
import gc, os, re, sys, tempfile, time, warnings
from copy import deepcopy
import torch
from torch import nn
from fasterai.export.all import ONNXModel, export_onnx, verify_onnx

warnings.filterwarnings('ignore')
TURNS = 15 # calls that are timed
SEED = 0

VISION = '''resnet18 resnet18:pruned resnet18:folded resnet18:shared resnet18:sparse resnet50:pruned+folded mobilenet_v2 mobilenet_v2:pruned+folded mobilenet_v3_small mobilenet_v3_small:pruned
densenet121 densenet121:pruned efficientnet_b0 efficientnet_b0:folded vgg11_bn:pruned+folded+decomposed googlenet inception_v3 shufflenet_v2_x0_5 regnet_y_400mf squeezenet1_1 convnext_tiny:pruned
vit_b_32 swin_t swin_v2_t maxvit_t lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large r3d_18'''.split()
TIMM = '''resnet10t resnet10t:pruned+folded efficientvit_b0 convnext_atto mobilenetv4_conv_small_035 mixer_s32_224 vit_tiny_patch16_224 vit_tiny_patch16_224:pruned swin_tiny_patch4_window7_224
coat_lite_tiny levit_128s ghostnet_050 hrnet_w18_small regnetx_002:shared mobilevit_xxs poolformer_s12 xcit_nano_12_p16_224 edgenext_xx_small repvgg_a0:folded test_nfnet eva02_tiny_patch14_224'''.split()
TEXT = 'bert bert:pruned bert:shared distilbert gpt2 llama vit t5 whisper roberta deberta'.split()
NAMES = [*VISION, *(f'timm/{o}' for o in TIMM), *(f'hf/{o}' for o in TEXT)]

def vision(name):
    import torchvision
    more = dict(init_weights=False) if name in ('googlenet','inception_v3') else {}
    if name.endswith(('mobilenet_v3_large',)) and name!='mobilenet_v3_large': more['weights_backbone'] = None
    make = torchvision.models.get_model
    size = {'inception_v3':299}.get(name, 224 if name.startswith(('vit','swin','maxvit')) else 96)
    x = torch.randn(2, 3, 8, 64, 64) if name=='r3d_18' else torch.randn(2, 3, size, size)
    return make(name, weights=None, **more),x

def of_timm(name):
    import timm
    model = timm.create_model(name)
    return model,torch.randn(2, *(model.default_cfg.get('input_size') or (3,224,224)))

def of_transformers(name):
    import transformers as t
    ids = dict(input_ids=torch.randint(3, 90, (2,12)), attention_mask=torch.tensor([[1]*12,[1]*9+[0]*3]))
    small = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64)
    if name=='bert': return t.BertForSequenceClassification(t.BertConfig(**small)),ids
    if name=='roberta': return t.RobertaForMaskedLM(t.RobertaConfig(**small, pad_token_id=1)),ids
    if name=='deberta': return t.DebertaV2Model(t.DebertaV2Config(**small)),ids
    if name=='distilbert': return t.DistilBertModel(t.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64)),ids
    if name=='gpt2': return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)),ids
    if name=='llama': return t.LlamaForCausalLM(t.LlamaConfig(**small, num_key_value_heads=2)),ids
    if name=='vit': return t.ViTForImageClassification(t.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8)),dict(pixel_values=torch.randn(2,3,32,32))
    if name=='t5': return t.T5Model(t.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)),{**ids, 'decoder_input_ids':ids['input_ids'][:,:5]}
    if name=='whisper':
        config = t.WhisperConfig(vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
            max_source_positions=20, max_target_positions=20, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
        return t.WhisperModel(config),dict(input_features=torch.randn(2,8,40), decoder_input_ids=ids['input_ids'][:,:5])

def made(model, x, how):
    "What the library makes of `model`"
    if how=='pruned':
        from fasterai.prune.all import Pruner
        return Pruner(model, 50, example_inputs=x).prune_model()
    if how=='folded':
        from fasterai.misc.all import BN_Folder
        return BN_Folder().fold(model, x)
    if how=='decomposed':
        from fasterai.misc.all import FC_Decomposer
        return FC_Decomposer().decompose(model, .5, example_inputs=x)
    if how=='shared':
        from fasterai.quantize.all import KMeansQuantizer
        KMeansQuantizer(4).quantize(model)
        return model
    if how=='sparse':
        from fasterai.sparse.all import Sparsifier
        Sparsifier(model, 'weight', 'global').sparsify_model(50)
        return model
    raise ValueError(how)

def seeded(model):
    "Norms that have seen something, and no layer whose weights are all zero, or whose output is"
    gen = torch.Generator().manual_seed(SEED)
    for p in model.parameters():
        if not p.any(): p.data.normal_(0, .1, generator=gen)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, .1, generator=gen)
            m.running_var.uniform_(.5, 1.5, generator=gen)
    return model

def spoiled(model):
    "A copy with other numbers in the middle layer"
    other = deepcopy(model)
    layers = [m for m in other.modules() if isinstance(m, (nn.Conv2d,nn.Conv3d,nn.Linear)) and 'weight' in m._parameters]
    with torch.no_grad(): layers[len(layers)//2].weight.mul_(-1.5)
    return other

def ms(f):
    best = float('inf')
    for _ in range(TURNS):
        start = time.perf_counter()
        f()
        best = min(best, time.perf_counter()-start)
    return 1000*best

def row(name):
    torch.manual_seed(SEED)
    net,_,hows = name.partition(':')
    make = of_timm if net.startswith('timm/') else of_transformers if net.startswith('hf/') else vision
    model,x = make(net.split('/')[-1])
    model = seeded(model).eval()
    for how in filter(None, hows.split('+')): model = made(model, x, how)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        file = export_onnx(model, x, f'{folder}/model.onnx')
        took = time.perf_counter()-start
        try: verify_onnx(spoiled(model), file, x)
        except ValueError as e: refused = re.search(r'(?:differs is|those of) (.*?, an? \w+)', str(e))[1]
        else: refused = 'NOT REFUSED'
        runs = ONNXModel(file, 'cpu', threads=torch.get_num_threads())
        one = {k:v[:1] for k,v in x.items()} if isinstance(x, dict) else x[:1]
        with torch.inference_mode(): ours = ms(lambda: model(**one) if isinstance(one, dict) else model(one))
        return f'{took:5.1f} s  {file.n_bytes/1e6:7.2f} MB  {file.difference:.0e}  {ours:7.2f}  {ms(lambda: runs(one)):7.2f} ms  opset {file.opset}  | {refused}'

if __name__=='__main__':
    right,names = 0,sys.argv[1:] or NAMES
    for name in names:
        try:
            said = row(name)
            right += 'NOT REFUSED' not in said
        except (ValueError,RuntimeError,TypeError,AttributeError,KeyError,AssertionError,IndexError,ImportError) as e:
            said = f'-- {type(e).__name__}: {str(e)[:300]}'
            if '-v' in os.environ.get('SHOW', ''): import traceback; traceback.print_exc()
        print(f'{name:44} {said}', flush=True)
        gc.collect()
    print(f'{right} of {len(names)}')
