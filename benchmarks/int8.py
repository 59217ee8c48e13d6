"""int8 beside float: in PyTorch by `Quantizer`, and ways to make a static ONNX file

`python benchmarks/int8.py [NAME...]`: networks of torchvision with folded norms and random weights, and the trained reader of words as `crnn`, for one image, in plain and in channels-last layout.
`python benchmarks/int8.py --onnx`: the reader and an ImageNet classifier as ONNX files, with each way to find the ranges of activations: words read right, classes that are the same, the squared error of the
outputs as a share of their variance, and milliseconds of one image. Ranges are found with other words and crops."""
import sys, tempfile, time, warnings
import torch, torchvision
from torch.nn import functional as F
from fasterai.export.all import ONNXModel, export_onnx
from fasterai.misc.all import BN_Folder
from fasterai.quantize.all import Quantizer
from trained import CHARS, classifier, crops, read, reader, words

warnings.filterwarnings('ignore')
NAMES = 'resnet18','resnet50','mobilenet_v2','vgg16_bn','crnn'
TURNS = 15 # calls that are timed
WIDE = 420 # pixels of a word in a file, whose width is fixed

def in_torch(name):
    if name=='crnn': model,data = reader(),[x for _,x in words(40, 1)]
    else: model,data = torchvision.models.get_model(name, weights=None),[torch.randn(1, 3, 224, 224)]
    model = BN_Folder().fold(model.eval(), data[0])
    for layout in (torch.contiguous_format,torch.channels_last):
        quantizer = Quantizer()
        small = quantizer.quantize(model.to(memory_format=layout), [x.to(memory_format=layout) for x in data])
        rows = quantizer.report()
        whole = rows.iloc[-1]
        line = f'{name} | {str(layout)[6:]} | {rows.int8[:-1].sum()} of {len(rows)-1} | {whole.ms:.1f} → {whole.ms_int8:.1f} ms, {whole.why} | {whole.bytes/1e6:.1f} → {whole.bytes_int8/1e6:.1f} MB | {whole.error:.5f}'
        if name=='crnn': line += f' | {sum(read(small, x)==t for t,x in words(200, 2))} of 200 words, {sum(read(model, x)==t for t,x in words(200, 2))} in float'
        print(line, flush=True)

def text(scores):
    best = scores.argmax(-1).tolist()
    return ''.join(CHARS[c-1] for last,c in zip([0]+best, best) if c and c!=last)

def batch(pairs): return torch.cat([F.pad(x, (0,WIDE-x.shape[-1]), value=1.) for _,x in pairs])

def of_file(path, xs):
    "Outputs, and the best time of one image"
    model,times = ONNXModel(path, 'cpu'),[]
    out = torch.cat([model(x) for x in xs.split(1)])
    for _ in range(TURNS):
        start = time.perf_counter()
        model(xs[:1])
        times.append(time.perf_counter()-start)
    return out,1e3*min(times)

def ways(path):
    "Arguments of ONNX Runtime's quantizer by name"
    import onnx
    from onnxruntime.quantization import CalibrationMethod as Method, QuantType
    layers = [o.name for o in onnx.load(path).graph.node if o.op_type in ('Conv','Gemm','MatMul')]
    def way(method=Method.MinMax, kind=QuantType.QUInt8, leave=(), types=None, **extra):
        return dict(calibrate_method=method, activation_type=kind, nodes_to_exclude=list(leave), extra_options=extra, **({} if types is None else dict(op_types_to_quantize=types)))
    return {'all values (the default)':way(), 'the same with a sign':way(kind=QuantType.QInt8), 'with a sign, symmetric':way(kind=QuantType.QInt8, ActivationSymmetric=True), 'mean of batches':way(CalibMovingAverage=True),
            'without the first layer':way(leave=layers[:1]), 'without the last layer':way(leave=layers[-1:]), 'layers with weights only':way(types=['Conv','Gemm','MatMul']),
            '99.999 % of values':way(Method.Percentile, CalibPercentile=99.999), '99.9 % of values':way(Method.Percentile, CalibPercentile=99.9), 'least entropy':way(Method.Entropy)}

def in_onnx(name, model, data, xs, said):
    from onnxruntime import quantization
    class Data(quantization.CalibrationDataReader):
        def __init__(self): self.rest = iter(data.split(1))
        def get_next(self):
            x = next(self.rest, None)
            return None if x is None else {'x':x.numpy()}
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, xs[:2], f'{folder}/float.onnx')
        quantization.quant_pre_process(f'{folder}/float.onnx', ready := f'{folder}/ready.onnx', skip_symbolic_shape=True)
        out,ms = of_file(ready, xs)
        print(f'{name} | float | {said(out, out)} | | {ms:.1f} ms', flush=True)
        for way,kwargs in ways(ready).items():
            quantization.quantize_static(ready, new := f'{folder}/int8.onnx', Data(), per_channel=True, weight_type=quantization.QuantType.QInt8, quant_format=quantization.QuantFormat.QDQ, **kwargs)
            small,ms = of_file(new, xs)
            print(f'{name} | {way} | {said(out, small)} | {(small-out).square().sum()/(out-out.mean()).square().sum():.4f} | {ms:.1f} ms', flush=True)

if __name__=='__main__':
    names = sys.argv[1:]
    if names!=['--onnx']:
        for o in names or NAMES: in_torch(o)
        sys.exit()
    some = words(200, 2)
    in_onnx('crnn', reader(), batch(words(40, 1)), batch(some), lambda old, new: f'{sum(text(o)==t for o,(t,_) in zip(new, some))} of 200 words')
    in_onnx('efficientnet_lite0', classifier(), crops(2, 1)[0], crops(6, 2)[0], lambda old, new: f'{int((old.argmax(-1)==new.argmax(-1)).sum())} of {len(new)} classes')
