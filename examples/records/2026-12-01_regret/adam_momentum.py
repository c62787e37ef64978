# PYTHONPATH=. python examples/records/2026-12-01_regret/adam_momentum.py DATA characters_adamw,novels_lm,cifar10_vit,fashion_mnist_autoencoder,shakespeare_lm,friedman
# Final losses of the default where Adam's first moment counts as a momentum of 0 (now), 0.81 and 0.9; log ratios of the last two to the first, by seed.
import sys,json,math,statistics as st
import torch; torch.set_num_threads(1)
from pathlib import Path
from examples.benchmarks.compare.clients import Shared
from examples.benchmarks.compare.data import load_task
from examples.benchmarks.compare.heldout import HELD_OUT
from examples.benchmarks.compare.methods import Setting
from examples.benchmarks.compare.plot import smooth
from examples.benchmarks.compare.simulate import Experiment, simulate
from lightning_lopt.meta.local import LocalOptimizer
from lightning_lopt.functional.blended import retained_momentum
from lightning_lopt.network import AdaMLP
net=AdaMLP.bundled(); D=Path(sys.argv[1])
ORIG=LocalOptimizer.retained_momentum
def ret(b): LocalOptimizer.retained_momentum=lambda self,H,b=b: retained_momentum(b,H) if self.kind=="adamw" else ORIG(self,H)
jobs=[]
R=Path('examples/records/2026-11-30_default')
for f in sys.argv[2].split(','):
    if (R/f"{f}.jsonl").exists():
        rows=[json.loads(l) for l in open(R/f"{f}.jsonl")]
        r=next(r for r in rows if r['method']=='learned')
        best=min((st.fmean(smooth(q['losses'])[-1] for q in rows if q['method']==m) ,m) for m in {q['method'] for q in rows}-{'learned'})
        jobs.append((f,r['task'],r['local_optimizer'],r['local_lr'],r['num_workers'],r['local_steps'],len(r['losses'])-1,r.get('decay',False),best))
    else:
        for h in HELD_OUT['first']:
            if h.task==f:
                for d in (False,True): jobs.append((f,h.task,h.optimizer,h.local_lr,h.num_workers,h.local_steps,h.num_rounds,d,None))
for f,task,opt,lr,K,H,n,decay,best in jobs:
    t=load_task(task,D); fin={}
    for b in (0.,.81,.9):
        ret(b); runs=simulate(Shared(t),[Setting("learned",lr)],[0,1,2],Experiment(K,H,n,LocalOptimizer(opt),decay),net)
        fin[b]=[min(smooth(c)[-1],t.max_loss) for c in runs.losses[0].tolist()]
    ret(0.); a=simulate(Shared(t),[Setting("local_sgd",lr)],[0,1,2],Experiment(K,H,n,LocalOptimizer(opt),decay),net); fa=[smooth(c)[-1] for c in a.losses[0].tolist()]
    print(f,opt,'lr',lr,'K',K,'H',H,'rounds',n,'decay',decay,'avg %.4f'%st.fmean(fa),'now %.4f'%st.fmean(fin[0.]),'b.81 %.4f'%st.fmean(fin[.81]),'log ratios',[round(math.log(y/x),3) for x,y in zip(fin[0.],fin[.81])],'best baseline',best,flush=True)
