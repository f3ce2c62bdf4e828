"""What training costs, counted on a real batch, so that what is frozen counts as it runs."""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode


def flops_per_image(step, batch: dict) -> float:
    """Floating-point operations of forward and backward on one picture of `batch`; a multiply-add is two. Where numbers
    of visual tokens are drawn, the mean over all draws.

    step: the trainer's TrainingStep. A pass of its own, whose gradients are thrown away: weights, buffers, random
    generators and the steps to come stay what they were. (The counter decides which kernels torch takes, so a step
    under it would differ from others in its last bits.) Counts matrix products, convolutions and attention, of visual
    prompts of different length with their padding: tensors have the same shapes whatever the pictures.
    """
    kept = [(buffer, buffer.clone()) for buffer in step.model.buffers()]  # a pass in training mode may move them
    # without DDP, which would wait for a backward pass
    model = step.model.module if isinstance(step.model, DistributedDataParallel) else step.model
    gpus = [step.device] if step.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), FlopCounterMode(display=False) as counter:
        draws = len(step.draws) or 1
        for micro_step in range(draws):  # each of these takes another one
            loss = step.forward(model, batch, micro_step)["loss"]
            torch.autograd.grad(loss, step.parameters, allow_unused=True)
    with torch.no_grad():
        for buffer, before in kept:
            if not torch.equal(buffer, before):
                buffer.copy_(before)
    return counter.get_total_flops() / draws / len(batch["image"])
