"""The run section of a config: what `runner_evlgen` takes, in words, and what its numbers may be."""

# least and most a number may be; whole numbers where the least is one
NUMBERS = {
    "max_iters": (1, None), "iters_per_inner_epoch": (1, None), "init_lr": (0.0, None), "min_lr": (0.0, None),
    "warmup_lr": (0.0, None), "warmup_steps": (0, None), "weight_decay": (0.0, None), "beta2": (0.0, 1.0),
    "max_grad_norm": (0.0, None), "batch_size_train": (1, None), "batch_size_eval": (1, None),
    "accum_grad_iters": (1, None), "num_workers": (0, None), "seed": (0, None), "log_freq": (1, None),
    "sheet_pictures": (0, None), "keep_every": (0, None),
}  # fmt: skip
LISTS = ("train_splits", "valid_splits", "test_splits")
CONFIG_KEYS = {
    "runner": "runner_evlgen",
    "task": "what is done with model and data: evlgen_captioning, evlgen_vqa, scst, or a LAVIS task",
    "max_iters": "optimizer steps of the run",
    "iters_per_inner_epoch": "evaluate and save every this many steps",
    "lr_sched": "linear_warmup_cosine_step_lr, or another registered schedule",
    "init_lr": "learning rate after warm-up",
    "min_lr": "learning rate at the end",
    "warmup_lr": "learning rate at step 0",
    "warmup_steps": "steps of linear warm-up",
    "weight_decay": "AdamW weight decay of matrices",
    "beta2": "AdamW beta2 (0.999)",
    "max_grad_norm": "clip the gradient to this norm; 0: no clipping (1.0)",
    "batch_size_train": "images per rank and micro-step",
    "batch_size_eval": "images per rank in evaluation",
    "accum_grad_iters": "micro-steps per optimizer step (1)",
    "num_workers": "data-loading processes per rank",
    "amp": "autocast: false, bf16, fp16 (true means fp16, as in LAVIS), auto (bf16 where there is hardware for it)",
    "compile": "parts under torch.compile in training steps: true (all), or of vision, connector, llm (false)",
    "llm_grad_checkpoint": "true: the language model's activations are computed again in the backward pass: less "
    "memory, more time (false)",
    "seed": "seed of weights, order, augmentation and dropout",
    "output_dir": "folder of runs, seen from where you stand",
    "run_name": "name of this run's folder (a time stamp)",
    "resume_ckpt_path": "checkpoint of a run to continue in its folder, or auto: the newest of run_name",
    "evaluate": "true: only evaluate test_splits",
    "keep_every": "evaluate only: keep finished rows every this many batches, to go on when cut off (0: do not)",
    "train_splits": "must be [train]",
    "valid_splits": "splits evaluated during training, e.g. [val]",
    "test_splits": "splits evaluated at the end with the best weights, e.g. [test]",
    "train_dataset_ratios": "shares of micro-steps, {data set: number}; left out: by size (not with shards)",
    "mix_per_rank": "of several training sets, true: each rank draws its own at every micro-step, as LAVIS does; "
    "false: all ranks draw the same one (false)",
    "deterministic": "true: only algorithms that give the same bits every time, on CUDA too; slower, and attention "
    "takes more memory (false)",
    "device": "auto (CUDA where present), cuda, cpu",
    "save_every": "save checkpoint_last.pth between evaluations too: every so many steps, or a time such as 30min, 2h "
    "(0: at evaluations only)",
    "log_freq": "steps between log lines (50)",
    "tensorboard": "write TensorBoard events to the run folder (true)",
    "sheet_pictures": "pictures on captions.png (12)",
    "world_size": "accepted from LAVIS configs; torch.distributed.run decides",
    "dist_url": "accepted from LAVIS configs; torch.distributed.run decides",
    "distributed": "accepted from LAVIS configs; torch.distributed.run decides",
}
