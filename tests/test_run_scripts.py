"""The scripts of the paper's tables: what they would start is a config that loads, at the paper's global batch."""

import argparse
import os
import shlex
import subprocess
import sys

import pytest

from lavis_evlgen import plugin  # noqa: F401
from lavis_evlgen.config import EvlgenConfig
from tests.run_tools import ROOT

SCRIPTS = ROOT / "run_scripts"
MIX, CCS = {"laion115m", "ccs14m", "image_captions"}, {"ccs14m", "image_captions"}
# arguments -> (model type, connector, steps, data[, pictures a step, warm-up steps])
TRAINING = {
    "paper/table1_opt.sh 250k": ("opt2.7b", "tomeformer", 250_000, MIX),
    "paper/table1_opt.sh 150k": ("opt2.7b", "tomeformer", 150_000, MIX),
    "paper/table1_opt.sh 150k-11m": ("opt2.7b", "tomeformer", 150_000, CCS),
    "paper/table1_opt.sh 90k": ("opt2.7b", "tomeformer", 90_000, MIX),
    "paper/table1_blip2.sh 1": ("pretrain", None, 250_000, MIX),
    "paper/table1_blip2.sh 2": ("opt2.7b", "qformer", 80_000, MIX),
    "paper/table5_vicuna.sh 250k": ("vicuna7b", "tomeformer", 250_000, MIX),
    "paper/table5_vicuna.sh 150k": ("vicuna7b", "tomeformer", 150_000, MIX),
    "paper/table5_vicuna.sh 90k": ("vicuna7b", "tomeformer", 90_000, MIX),
    "paper/table5_vicuna.sh 150k-11m": ("vicuna7b", "tomeformer", 150_000, CCS),
    "paper/table8_vit.sh vicuna7b clip_L": ("vicuna7b", "tomeformer", 60_000, CCS, 160, 2000),
    "paper/table9_r.sh 13": ("opt2.7b", "tomeformer", 60_000, CCS, 160, 2000),
}


def script(words: str, **environment) -> subprocess.CompletedProcess:
    name, *arguments = words.split()
    command = ["bash", str(SCRIPTS / name), *arguments]
    known = {key: value for key, value in os.environ.items() if key not in ("GPUS", "NODES", "BATCH", "HEAD")}
    return subprocess.run(command, capture_output=True, text=True, env=known | environment, cwd="/")


def started(words: str, **environment) -> tuple[list[str], EvlgenConfig]:
    """(the command that the script would run, its config)."""
    done = script(words, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    options = command[command.index("--options") + 1 :]
    path = ROOT / command[command.index("--cfg-path") + 1]
    return command, EvlgenConfig(argparse.Namespace(cfg_path=str(path), options=options))


@pytest.mark.parametrize("words", TRAINING)
def test_a_table_trains_the_papers_recipe(words):
    command, cfg = started(words, GPUS="8")
    kind, connector, steps, data, batch, warmup = (*TRAINING[words], 1600, 5000)[:6]
    run, model = cfg.run_cfg, cfg.model_cfg
    assert (model.model_type, model.get("connector"), run.max_iters) == (kind, connector, steps)
    assert set(cfg.datasets_cfg) == set(run.train_dataset_ratios) == data
    assert command[3:5] == ["--nproc_per_node", "8"] and run.batch_size_train * 8 * run.accum_grad_iters == batch
    assert (run.init_lr, run.min_lr, run.warmup_steps) == (1e-4, 1e-5, warmup)
    if kind == "vicuna7b":
        assert (run.repetition_penalty, model.bos_token, model.llm_model[-4:]) == (1.5, "</s>", "v1.3")
    elif connector:
        assert run.get("repetition_penalty", 1.0) == 1.0
    assert model.get("vit_layer") == (23 if "clip_L" in words else None)
    for section in cfg.datasets_cfg.values():
        assert {stage.name for stage in section.text_processor.values()} == {"blip_caption"}


def test_four_stages_read_the_folders_that_are_given(tmp_path):
    words = f"four_stages.sh {tmp_path}/coco {tmp_path}/photos {tmp_path}/captions.csv {tmp_path}/rad run.seed=7"
    done = script(words, DRY_RUN="1", NAME="other")
    assert done.returncode == 0, done.stderr
    train, compare = map(shlex.split, done.stdout.splitlines())
    options = train[train.index("--options") + 1 :]
    cfg = EvlgenConfig(argparse.Namespace(cfg_path=str(ROOT / train[train.index("--cfg-path") + 1]), options=options))
    assert [stage.stage.name for stage in cfg.stages] == ["align", "captions", "questions", "radiology"]
    folders = [next(iter(stage.datasets_cfg.values())).images for stage in cfg.stages]
    assert folders == [f"{tmp_path}/{one}" for one in ("coco/images", "photos", "coco/images", "rad/images")]
    assert all(stage.run_cfg.seed == 7 and stage.model_cfg.prompt_attention == "visual" for stage in cfg.stages)
    assert compare == ["evlgen", "compare", "output/stages/other"] and cfg.run_cfg.run_name == "other"
    assert script("four_stages.sh").returncode == 2


# arguments -> (config's data set and its type, task, temporal, frame_pooling, run folder)
CLIPS = {
    "paper/webvid.sh video some.pth": ("webvid2m", None, "evlgen_captioning", True, "mean", "webvid/video"),
    "paper/webvid.sh concat some.pth": ("webvid2m", None, "evlgen_captioning", False, "concat", "webvid/concat"),
    "paper/webvid.sh mean some.pth": ("webvid2m", None, "evlgen_captioning", False, "connector_mean", "webvid/mean"),
    "paper/webvid.sh temporal_queries some.pth": (
        "webvid2m", None, "evlgen_captioning", False, "temporal_queries", "webvid/temporal_queries"
    ),
}  # fmt: skip
for _table, _data in (("table3", "msrvtt"), ("table4", "msvd")):
    for _row, _settings in {
        "image": ("evlgen_captioning", True, "mean"),
        "video": ("evlgen_captioning", True, "mean"),
        "concat": ("evlgen_captioning", False, "concat"),
        "mean": ("evlgen_captioning", False, "connector_mean"),
        "temporal_qformer": ("evlgen_captioning", False, "temporal_qformer"),
        "scst": ("scst", True, "mean"),
    }.items():
        CLIPS[f"paper/{_table}_{_data}.sh {_row} some.pth"] = (
            "video_captions", _data, *_settings, f"{_table}/{_row}"
        )  # fmt: skip


@pytest.mark.parametrize("words", CLIPS)
def test_a_table_of_clips_trains_the_papers_recipe(words):
    command, cfg = started(words, GPUS="4")
    data, kind, task, temporal, pooling, folder = CLIPS[words]
    run, model = cfg.run_cfg, cfg.model_cfg
    assert (model.arch, model.model_type, model.pretrained) == ("evlgen_video", "opt2.7b", "some.pth")
    assert (model.temporal, model.frame_pooling, model.residual, model.num_frames) == (temporal, pooling, "gated", 4)
    assert list(cfg.datasets_cfg) == [data] and run.task == task
    assert {stage.name for stage in cfg.datasets_cfg[data].text_processor.values()} == {"blip_caption"}
    if kind:
        section = cfg.datasets_cfg[data]
        assert section.videos == f"data/{kind}/videos" and f"/{kind}/" in section.annotations.train
    assert f"{run.output_dir}/{run.run_name}" == f"output/paper/{folder}"
    assert command[3:5] == ["--nproc_per_node", "4"] and run.batch_size_train * 4 * run.accum_grad_iters == 64
    assert (run.num_beams, run.max_len, run.min_len, run.batch_size_train) == (5, 20, 5, 8)
    if task == "evlgen_captioning":
        assert (run.warmup_lr, run.init_lr, run.min_lr, run.max_iters) == (1e-8, 1e-5, 1e-6, 50_000)


def test_options_of_a_table_reach_the_config():
    assert started("paper/table9_r.sh 25 run.seed=7", GPUS="1", BATCH="40")[1].model_cfg.tome_r == 25
    assert started("paper/table1_opt.sh 90k", GPUS="8")[1].model_cfg.tome_r == {"target": 29}
    assert started("paper/table8_vit.sh opt2.7b clip_L run.seed=7", GPUS="8")[1].run_cfg.seed == 7
    _, cfg = started("paper/zero_shot.sh vqav2 some.pth model.model_type=vicuna7b")
    assert (cfg.model_cfg.pretrained, cfg.model_cfg.model_type, cfg.run_cfg.evaluate) == ("some.pth", "vicuna7b", True)


def test_vicuna_is_scored_with_its_repetition_penalty():
    for benchmark in ("coco", "nocaps", "flickr30k", "vqav2", "gqa", "okvqa"):
        assert started(f"paper/zero_shot.sh {benchmark} some.pth")[1].run_cfg.repetition_penalty == 1.0
        vicuna = f"paper/zero_shot.sh {benchmark} some.pth model.model_type=vicuna7b"
        assert started(vicuna)[1].run_cfg.repetition_penalty == 1.5
        assert started(f"{vicuna} run.repetition_penalty=2")[1].run_cfg.repetition_penalty == 2


def test_the_split_that_chose_a_checkpoint_does_not_score_it():
    """The tables are of COCO val: the last checkpoint there, as the released configs, or the best on test."""
    done = script("paper/zero_shot.sh coco a/checkpoint_best.pth", DRY_RUN="1")
    assert done.returncode == 2 and "COCO val chose checkpoint_best.pth: give checkpoint_last.pth" in done.stderr
    assert started("paper/zero_shot.sh coco a/checkpoint_last.pth")[1].run_cfg.test_splits == ["val"]
    best = started("paper/zero_shot.sh coco a/checkpoint_best.pth run.test_splits=[test]")[1]
    assert best.run_cfg.test_splits == ["test"]
    assert started("paper/zero_shot.sh gqa a/checkpoint_best.pth")[1].model_cfg.pretrained == "a/checkpoint_best.pth"
    for table in TRAINING:  # what a run reports at its end is of another split than the one that chose
        run = started(table, GPUS="8")[1].run_cfg
        assert set(run.test_splits).isdisjoint(run.valid_splits) and run.test_splits == ["test"]


def test_tables_take_r_from_the_checkpoint():
    """No key of a table's evaluation says how the model merges: that is what it was trained with."""
    command, _ = started("paper/zero_shot.sh coco some.pth")
    options = command[command.index("--options") + 1 :]
    assert options == ["model.pretrained=some.pth"]


@pytest.mark.parametrize(
    "words, benchmark, handed_on",
    [
        ("video_miniature.sh --steps 2 --jobs 1", "video_scenes", "--steps 2 --jobs 1"),
        ("miniature.sh a/b c.txt --steps 2", "miniature", "--images a/b --captions c.txt --steps 2"),
        ("ablations.sh a/b c.txt --jobs 1", "ablations", "--images a/b --captions c.txt --jobs 1"),
        ("ablations.sh --help", "ablations", "--help"),
    ],
)
def test_miniatures_hand_their_options_on(words, benchmark, handed_on):
    done = script(words, DRY_RUN="1")
    script_name = f"benchmarks.experiments.{benchmark}"
    assert shlex.split(done.stdout) == ["python", "-m", script_name, *handed_on.split()]
    assert (ROOT / f"benchmarks/experiments/{benchmark}.py").is_file()


def test_several_nodes_meet_at_one_of_them():
    command, cfg = started("launch.sh projects/evlgen/opt.yaml", GPUS="4", NODES="2", HEAD="first:29500", JOB="7")
    assert command[:12] == shlex.split(
        "python -m torch.distributed.run --nproc_per_node 4 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint first:29500"
    ) + ["--rdzv_id"]
    assert cfg.run_cfg.batch_size_train * 8 * cfg.run_cfg.accum_grad_iters == 1600


def test_processes_have_time_to_save_after_sigterm(tmp_path):
    """Torch's launcher kills after 30 s unless told otherwise."""

    def timeout(**environment) -> str | None:
        command, _ = started("launch.sh projects/evlgen/opt.yaml", GPUS="8", **environment)
        launcher = command[: command.index("train.py")]
        return launcher[launcher.index("--shutdown-timeout") + 1] if "--shutdown-timeout" in launcher else None

    assert (timeout(), timeout(SHUTDOWN="60"), timeout(SHUTDOWN="")) == ("300", "60", None)
    known = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True)
    assert "--shutdown-timeout" in known.stdout
    for name, does in (("scontrol", "echo node1"), ("srun", 'exec "$@"')):  # a cluster that runs what it is given
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "12",
           "SLURM_JOB_NODELIST": "node1", "PATH": f"{tmp_path}:{os.environ['PATH']}", "DRY_RUN": "1"}  # fmt: skip
    command = shlex.split(script("slurm.sh projects/evlgen/opt.yaml run.run_name=a", **job).stdout)
    assert int(command[command.index("--shutdown-timeout") + 1]) < 120  # the job ends 120 s after SIGTERM
    assert command[command.index("--rdzv_id") + 1] == "12"


@pytest.mark.parametrize(
    "words, environment, message",
    [
        ("launch.sh", {}, "which config"),
        ("launch.sh projects/none.yaml", {}, "projects/none.yaml does not exist"),
        ("launch.sh projects/evlgen/opt.yaml max_iters", {"GPUS": "8"}, "max_iters is not KEY=VALUE"),
        ("launch.sh projects/evlgen/opt.yaml", {"GPUS": "3"}, "no multiple of GPUS x NODES x BATCH = 300"),
        ("launch.sh projects/evlgen/opt.yaml", {"GPUS": "many"}, "GPUS=many is not a whole number"),
        ("launch.sh projects/evlgen/opt.yaml", {"GPUS": "4", "NODES": "2"}, "needs HEAD=host:port"),
        ("launch.sh projects/evlgen/opt.yaml", {"GPUS": "8", "SHUTDOWN": "1m"}, "SHUTDOWN=1m is not a whole number"),
        ("paper/table1_opt.sh 10k", {}, "which row"),
        ("paper/table5_vicuna.sh", {}, "which row"),
        ("paper/table1_blip2.sh 3", {}, "which stage"),
        ("paper/table8_vit.sh opt2.7b", {}, "which LLM"),
        ("paper/table9_r.sh many", {}, "how many merges"),
        ("paper/zero_shot.sh gqa", {}, "which checkpoint"),
        ("paper/webvid.sh image some.pth", {}, "webvid: which row? video, concat, mean, temporal_q"),
        ("paper/table3_msrvtt.sh", {}, "table3_msrvtt: which row? video, concat, mean"),
        ("paper/table3_msrvtt.sh video run.seed=1", {}, "which checkpoint does video start from"),
        ("paper/table4_msvd.sh late some.pth", {}, "table4_msvd: which row"),
        ("ablations.sh photos", {}, "ablations: which pictures, and which captions?"),
        ("slurm.sh projects/evlgen/opt.yaml", {}, "start it with sbatch"),
    ],
)
def test_a_script_says_what_it_lacks(words, environment, message):
    done = script(words, **environment)
    assert done.returncode != 0 and message in done.stderr, done.stderr
