"""ToMoE: a dense language model becomes a sparse Mixture-of-Experts by learned dynamic structural pruning.

Gao et al., "ToMoE: Converting Dense Large Language Models to Mixture-of-Experts through Dynamic Structural Pruning",
https://arxiv.org/abs/2501.15316. Every original weight stays frozen; what is learned is which of them each token uses.

    sites, network      routers and mask decoders of attention and MLP; all that is trained, and one draw of masks
    masking             the masked forward pass (pseudo-MoE)
    objective           R_P, R_U, R_L
    accounting          T(w), the target p, added parameters
    training            a training step
    start               where training begins (not in the paper)
    conversion          from learned masks to a sparse model
    method              hyperparameters and presets

What other methods that train use too is in `methods.training`: the loop, text blocks, checkpoints, the hypernetwork,
ST-GumbelSigmoid and ST-GumbelSoftmax, KD.
"""

from methods.tomoe.method import ToMoE as ToMoE
