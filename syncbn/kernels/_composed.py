
from __future__ import annotations
import torch
from torch import Tensor
from syncbn._statistics import *
from syncbn._statistics import Running, statistics, update_running, local_sums, mean_and_variance, refuse_one_value
def _dt(x): return torch.float64 if x.dtype == torch.float64 else torch.float32
def _v(t,x): return t.view([1,-1]+[1]*(x.dim()-2))
def _keep(y,x): return y.to(x.dtype).contiguous(memory_format=torch._prims_common.suggest_memory_format(x))
def moments(x):
    dims=[0,*range(2,x.dim())]
    v=x.to(_dt(x)); count=x.numel()//x.shape[1]
    pivot=v.detach().sum(dims)/max(count,1)
    return torch.cat([local_sums(v-_v(pivot,x),pivot,count), torch.full((1,),count,dtype=torch.float64,device=x.device)])
def normalize(x,total,weight,bias,eps,running):
    known=statistics(total,eps)
    C=x.shape[1]
    mean,inv,_=known.tensor_split([C,2*C])
    dt=_dt(x)
    p=mean.detach().to(dt)
    scale=inv if weight is None else inv*weight
    shift=(p-mean)*scale
    if bias is not None: shift=shift+bias
    y=(x.to(dt)-_v(p,x))*_v(scale.to(dt),x)+_v(shift.to(dt),x)
    update_running(running,total)
    return _keep(y,x),known
def _xhat(x,st):
    C=x.shape[1]
    mean,inv,n=st.tensor_split([C,2*C])
    dt=_dt(x); p=mean.detach().to(dt)
    return (x.to(dt)-_v(p,x))*_v(inv.to(dt),x)+_v(((p-mean)*inv).to(dt),x)
def backward_sums(dy,x,statistics):
    dims=[0,*range(2,x.dim())]
    d=dy.to(_dt(x))
    return torch.cat([d.sum(dims).double(),(d*_xhat(x,statistics)).sum(dims).double()])
def backward_input(dy,x,statistics,weight,sums):
    C=x.shape[1]; dt=_dt(x)
    mean,inv,n=statistics.tensor_split([C,2*C])
    t1,t2=(sums/n.clamp(min=1)).chunk(2)
    scale=inv if weight is None else inv*weight
    return _keep(_v(scale.to(dt),x)*(dy.to(dt)-_v(t1.to(dt),x)-_xhat(x,statistics)*_v(t2.to(dt),x)),x)
