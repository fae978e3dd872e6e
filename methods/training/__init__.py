"""What methods that train share. None of it knows what is trained: masks, adapters or anything else.

loop                the loop: noise, gradients of several processes, clipping, non-finite losses, checkpoints
data                text blocks
state, log          checkpoints, training.csv
seeding             generators seeded for a while
recomputation       activation checkpointing
losses, precision   distillation and next-token loss on a few tokens at a time, fp32 beside a model of less
hypernetwork        embeddings of sites from fixed noise, for masks
straight_through    0/1 masks with a gradient
"""
