"""A training step with KnowledgeDistillationCallback beside what it cannot do without: the student's step and the teacher's forward pass in inference mode.

resnet34 teaches resnet18, 10 classes, batches of 32 images of 3×64×64. Time: both sides take turns batch by batch, so that they see the machine in the same state.
Memory: each side in a process of its own, how far its peak of resident memory rises over the same networks at rest.

    python benchmarks/distillation.py [steps]      default: 20
"""
import json, os, subprocess, sys, time, warnings
warnings.filterwarnings('ignore', category=FutureWarning)
import torch
from torchvision.models import resnet18, resnet34
from fasterai.distill.all import KnowledgeDistillationCallback
from training_step import begin, learner

STAGES = ['layer1','layer2','layer3','layer4']
HOW = dict(logits=dict(), features=dict(loss=['SoftTarget','Attention'], activations_student=STAGES, activations_teacher=STAGES))

def sides(n_steps, how, **student): # What `KnowledgeDistillationCallback` takes, and what `learner` does
    "Functions that take a step: with the callback, the student's alone, the teacher's forward pass alone"
    (ours,batch),(base,_) = learner(n_steps, **student),learner(n_steps, **student)
    teacher = resnet34(num_classes=10).eval().to(batch[0].device)
    begin(ours, [KnowledgeDistillationCallback(teacher, **how)])
    begin(base, [])
    def teach():
        with torch.inference_mode(): teacher(batch[0])
    return lambda i: ours.one_batch(i, batch), lambda i: base.one_batch(i, batch), lambda i: teach()

def timed(n_steps, name):
    fs,wall,cpu = sides(n_steps, HOW[name]),([],[],[]),([],[],[])
    for i in range(n_steps):
        for f,ws,cs in zip(fs, wall, cpu):
            start = time.perf_counter(),time.process_time()
            f(i)
            ws.append(time.perf_counter()-start[0])
            cs.append(time.process_time()-start[1])
    for what,times in dict(wall=wall, cpu=cpu).items():  # processor time hardly depends on what else the machine does
        ours,step,teach = (sorted(o[2:]) for o in times)  # two steps to warm up
        mean,median = (lambda o: 1e3*sum(o)/len(o)),(lambda o: 1e3*o[len(o)//2])
        print(f'{name:8} {what:4} {n_steps} steps: {mean(ours):.1f} ms beside {mean(step):.1f} (student) + {mean(teach):.1f} (teacher) ms'
              f' = ×{mean(ours)/(mean(step)+mean(teach)):.3f} (of medians ×{median(ours)/(median(step)+median(teach)):.3f}); ×{mean(ours)/mean(step):.2f} of the student\'s step', flush=True)

MALLOC = dict(MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536')  # glibc gives back at once what is freed: otherwise the peak is a matter of luck
def peak(which='VmHWM'): return next(int(o.split()[1]) for o in open('/proc/self/status') if o.startswith(which))/1024

def memory(side, name):
    ours,step,teach = sides(4, HOW[name])
    at_rest = peak('VmRSS')
    open('/proc/self/clear_refs', 'w').write('5')  # the peak from here on
    for i in range(4):
        if side=='ours': ours(i)
        else:
            step(i)
            if side=='beside': teach(i)
    print(json.dumps(peak()-at_rest))

if __name__=='__main__':
    if sys.argv[1:2]==['--memory']: memory(*sys.argv[2:])
    else:
        print(f'torch {torch.__version__}, {torch.get_num_threads()} threads')
        for name in HOW: timed(int(sys.argv[1]) if sys.argv[1:] else 20, name)
        for name in HOW:
            mib = {o: float(subprocess.run([sys.executable, __file__, '--memory', o, name], capture_output=True, text=True, check=True, env=os.environ | MALLOC).stdout.splitlines()[-1]) for o in ('ours','beside','student')}
            print(f'{name:8} memory: {mib["ours"]:.0f} MiB beside {mib["beside"]:.0f} MiB = ×{mib["ours"]/mib["beside"]:.3f}; {mib["student"]:.0f} MiB the student\'s step alone', flush=True)
