# OMP_NUM_THREADS=1 PYTHONPATH=. python examples/records/2026-12-01_roots/times.py minilm 3 old,new,newlong    (tiny_vit 20 old,new)
import sys,time,statistics as st,json
import torch
torch.set_num_threads(1)
from examples.benchmarks.speed.outer_step import parameters, MODELS, _torchvision
from lightning_lopt.functional import blended, whitening, grams, updates
from lightning_lopt.optim import LearnedOptimizer, BlendedNesterov
name,reps=sys.argv[1],int(sys.argv[2]); variants=sys.argv[3].split(',')
shapes=(MODELS[name]() if name in MODELS else _torchvision(name))
U=updates.UPDATES["masked_blended_nesterov"]
def use(v):
    U.__class__.roots=blended.Roots(whitened=whitening.POLYNOMIALS if 'new' in v else whitening.FORMER_POLYNOMIALS)
    grams.LONG=4096 if 'long' in v else 10**9
    grams.gram_shapes.cache_clear()
params=parameters(shapes); opts={}; t={v:[] for v in variants}
for r in range(reps+1):
    for v in variants:
        use(v)
        if v not in opts: opts[v]=LearnedOptimizer(params)
        s=time.process_time(); opts[v].step(); e=time.process_time()-s
        if r: t[v].append(e)
for v in variants: print(name,v,round(st.median(t[v]),4),'ratio',round(st.median(b/a for a,b in zip(t[variants[0]],t[v])),3))
