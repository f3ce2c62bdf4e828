"""The run section of a config: what `runner_evlgen` takes, in words, and what its numbers may be."""

from lavis_evlgen.models.compile import PARTS

# what the values may be: lavis_evlgen/config/values.py says how these tables are read
NUMBERS = {
    "max_iters": (1, 10**9), "iters_per_inner_epoch": (1, 10**9), "init_lr": (0.0, 100.0), "min_lr": (0.0, 100.0),
    "warmup_lr": (0.0, 100.0), "warmup_steps": (0, 10**9), "weight_decay": (0.0, 10.0), "beta2": (0.0, 0.999999),
    "max_grad_norm": (0.0, 1e9), "batch_size_train": (1, 10**6), "batch_size_eval": (1, 10**6),
    "accum_grad_iters": (1, 10**6), "num_workers": (0, 1000), "seed": (0, 4 * 10**9), "log_freq": (1, 10**9),
    "sheet_pictures": (0, 10_000), "keep_every": (0, 10**9), "world_size": (1, 10**6), "run_name": (0, 10**18),
    "save_every": (0, 10**9),
}  # fmt: skip
SWITCHES = ("compile", "llm_grad_checkpoint", "evaluate", "tensorboard", "distributed",
            "deterministic", "mix_per_rank")  # fmt: skip
CHOICES = {
    "amp": (False, "bf16", "fp16", True, "auto", "fp32"),
    "compile": tuple(PARTS),
    "lr_sched": ("linear_warmup_cosine_step_lr",),
}
TEXTS = ("runner", "task", "output_dir", "run_name", "resume_ckpt_path", "device", "dist_url", "save_every")
LISTS = {"compile": set(PARTS), "train_splits": {"train"}, "valid_splits": str, "test_splits": str}
MAPPINGS = {"train_dataset_ratios": (0.0, 1e9)}
AT_MOST = {"min_lr": ("init_lr", None)}
CONFIG_KEYS = {
    "runner": "runner_evlgen",
    "task": "what is done with model and data: evlgen_captioning, evlgen_vqa, scst, or a LAVIS task",
    "max_iters": "optimizer steps of the run",
    "iters_per_inner_epoch": "evaluate and save every this many steps",
    "lr_sched": "linear_warmup_cosine_step_lr: linear warm-up, then cosine to min_lr; moves at every step",
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
    "run_name": "name of this run's folder in output_dir (a time stamp)",
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
