"""Train CAT-Diffusion, one stage at a time.

    python tools/train.py sem-inpainter --data data/manifest.jsonl --run runs/sem-inpainter \\
        --base sd15_inpainting.safetensors clip_vit_l14.safetensors --cache cache/sem-inpainter

    python tools/train.py plan ref-adapter --base ... --data ... --preset 24gb --price-per-hour 0.5

The same command continues a run that was stopped, killed or out of disk. `plan` measures a few
steps and says what a run will take, and what to change where it does not fit. For several GPUs
start the command in ComfyUI's Python with `accelerate launch tools/train.py ...` or with `torchrun
--nproc-per-node N tools/train.py ... --output-dir FOLDER`: torchrun takes --run for an option of
its own. Needs requirements-train.txt. Prepare data with tools/prepare_data.py.
"""

import argparse
import math
import sys
from pathlib import Path

from comfyui import launch  # which makes the checkout known as cat_diffusion

# isort: split
from cat_diffusion.cat_core.training.stages import CACHE_DTYPES, PICTURES, STAGES
from training import presets


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_inputs(parser)
    add_settings(parser)
    add_outputs(parser)
    add_plan(parser)
    launch.add_host_options(parser)
    arguments = parser.parse_args()
    if arguments.preset:
        arguments = with_preset(parser, arguments)
    check(parser, arguments)
    with launch.importing():
        launch.enter_comfyui(parser, arguments, "train")
        launch.start_host(arguments.cpu or not launch.has_gpu())
        if arguments.plan:
            from training import cost_plan as body
        else:
            from training import stage_run as body

    for sentence in getattr(arguments, "sentences", ()):
        print(sentence, flush=True)
    return body.command(arguments)


def with_preset(parser: argparse.ArgumentParser, arguments: argparse.Namespace):
    """The arguments again, with a preset's choices where the command line makes none."""
    if arguments.stage not in STAGES:
        return arguments  # which `check` says
    try:
        chosen = presets.choices(arguments.preset, arguments.stage)
    except presets.PresetError as error:
        parser.error(str(error))
    if arguments.fsdp:
        chosen["use_8bit_adam"] = False  # which does not go with it
    if chosen.pop("is_cached"):
        chosen["cache"] = Path(arguments.run or "", "cache")
    parser.set_defaults(**chosen)
    arguments = parser.parse_args()
    arguments.sentences = []
    taken = []
    for name, value in chosen.items():
        option = f"--{name.replace('_', '-')}"
        given = getattr(arguments, name)
        if given == value:
            taken.append(f"{option} {value}")
        else:
            sentence = f"{option} {given} is given, in the place of the preset's {value}."
            arguments.sentences.append(sentence)
    arguments.sentences.append(f"--preset {arguments.preset} chooses {', '.join(taken)}.")
    return arguments


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with an error for what can be told wrong before anything is installed or read."""
    if arguments.stage not in STAGES:
        parser.error(f"unknown stage {arguments.stage}; choose from {', '.join(STAGES)}")
    if arguments.run is None and not arguments.plan:
        parser.error("--run is missing, the folder for checkpoints and log")
    arguments.run = arguments.run or Path("run")  # which a plan does not write
    price = arguments.price_per_hour
    if price is not None and not (price >= 0 and math.isfinite(price)):
        parser.error(f"--price-per-hour is {price}, expected 0 up")
    if price is not None and not arguments.plan:
        parser.error("--price-per-hour is for `plan`, which says what a run costs")
    counts = ("size", "steps", "batch_size", "micro_batch_size", "save_every")
    for name in (*counts, "checkpoints_total_limit", "validation_samples"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected 1 up")
    at_least_0 = ("warmup", "samples_every", "validate_every", "patience")
    for name in (*at_least_0, "dataloader_num_workers"):
        if (getattr(arguments, name) or 0) < 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, expected 0 up")
    if not (arguments.rates > 0 and math.isfinite(arguments.rates)):
        parser.error(f"--rates is {arguments.rates}, expected a number above 0")
    for name in ("final_rate", "ema_decay", "caption_share"):
        if not 0 <= (getattr(arguments, name) or 0) <= 1:
            found = getattr(arguments, name)
            parser.error(f"--{name.replace('_', '-')} is {found}, expected 0 to 1")
    for name in ("max_grad_norm", "snr_gamma"):
        if not 0 <= getattr(arguments, name) < math.inf:
            found = getattr(arguments, name)
            parser.error(f"--{name.replace('_', '-')} is {found}, expected 0 up")
    if arguments.snr_gamma and not STAGES[arguments.stage].diffusion:
        parser.error(f"--snr-gamma is for the diffusion stages, the stage is {arguments.stage}")
    if arguments.batch_size % arguments.micro_batch_size:
        parser.error(
            f"batch_size {arguments.batch_size} is not a multiple of micro_batch_size "
            f"{arguments.micro_batch_size}. Change one of them."
        )
    for name in ("keep_best", "patience"):
        if getattr(arguments, name) and not arguments.validate_every:
            parser.error(
                f"--{name.replace('_', '-')} judges by held-out records: give --validate-every too"
            )
    if arguments.lora_rank < 1:
        parser.error(f"--lora-rank is {arguments.lora_rank}, expected 1 or more, such as 16")
    if arguments.random_flip and arguments.pictures != "crop":
        parser.error("--random-flip mirrors crops: give --pictures crop, or leave it out")
    if arguments.masked and arguments.stage != "sem-inpainter":
        parser.error(f"--masked is a loss of sem-inpainter, the stage is {arguments.stage}")
    if arguments.weights and len(arguments.weights) != len(arguments.data):
        parser.error(
            f"--weights gives {len(arguments.weights)} for {len(arguments.data)} manifests, "
            "expected one each"
        )
    for path in arguments.base:
        if not path.is_file():
            parser.error(f"--base {path} is no file, expected one with weights")


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """What is trained, and on what."""
    parser.add_argument(
        "plan",
        nargs="?",
        choices=("plan",),
        help="before the stage: measure a few steps and say what the run will take; nothing is "
        "written, and --run may be left out",
    )
    parser.add_argument(
        "stage",
        help="sem-inpainter, ref-adapter, ref-adapter-unet, ref-adapter-lora (a LoRA in place of "
        "the whole U-Net, for less memory), cascade-sem-inpainter, cascade; "
        "unet (plain inpainting), ref-adapter-observed (the ablation without SemInpainter)",
    )
    parser.add_argument(
        "--base",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="what to start from: SD 1.5 inpainting checkpoint, CLIP ViT-L/14 vision file, "
        "CAT weights of earlier stages; of parts that several have, the last one's",
    )
    parser.add_argument(
        "--data",
        "--manifest",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="MANIFEST",
        help="manifests (JSON lines), see tools/prepare_data.py",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="WEIGHT",
        help="of the manifests, such as 80 20: how many of 100 samples each gives (default: each "
        "record counts the same)",
    )
    parser.add_argument("--split", default="train", help="which records of the manifest")
    parser.add_argument(
        "--run",
        "--output-dir",
        type=Path,
        help="folder for checkpoints and log; continued if it exists",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder for encoded samples; filled first, then used instead of pictures",
    )
    parser.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        default=CACHE_DTYPES[0],
        help="of CLIP's features of pictures in a new cache: int8 takes half the disk and rounds "
        "them by up to 1/254 of the largest number in each column",
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """How it is trained."""
    parser.add_argument(
        "--masked",
        action="store_true",
        help="sem-inpainter: the paper's masked loss instead of the official code's",
    )
    parser.add_argument(
        "--size", type=int, default=512, help="side of the pictures for the VAE, in pixels"
    )
    parser.add_argument(
        "--pictures",
        choices=PICTURES,
        default="crop",
        help="crop: the short side to 512 pixels and a square around the object, as the official "
        "training does, at another place in each epoch, or with --cache at one place a record; "
        "squash: all of the picture, without its proportion, as evaluation does",
    )
    parser.add_argument(
        "--random-flip", action="store_true", help="mirror half of the crops; not for letters"
    )
    parser.add_argument(
        "--caption-share",
        type=float,
        metavar="SHARE",
        help="of the samples that have label and caption, those that are described by the caption "
        "(default: the official 0.2 with crops; with squashed pictures SemInpainter reads all "
        "labels, and the U-Net all captions)",
    )
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--batch-size", type=int, default=128, help="over all processes")
    parser.add_argument(
        "--micro-batch-size", type=int, default=8, help="samples at once in each process"
    )
    parser.add_argument(
        "--warmup",
        "--lr-warmup-steps",
        type=int,
        default=0,
        metavar="STEPS",
        help="steps over which the rates rise from nothing: for new parts at high rates",
    )
    parser.add_argument(
        "--lr-scheduler",
        choices=("constant", "cosine"),
        default="constant",
        help="what becomes of the rates after that; constant is the paper's, cosine lets them fall "
        "to --final-rate, which settles the weights at the end",
    )
    parser.add_argument(
        "--rates",
        type=float,
        default=1.0,
        metavar="X",
        help="times the stage's learning rates (1e-4 new, 1e-5 pretrained)",
    )
    parser.add_argument(
        "--final-rate",
        type=float,
        metavar="SHARE",
        help="share of the rates left at the end, by a cosine (default: 0 with --lr-scheduler "
        "cosine, else 1)",
    )
    parser.add_argument(
        "--max-grad-norm",
        type=float,
        default=0.0,
        metavar="LENGTH",
        help="shorten longer gradients to this length, against single bad batches; 1 is usual, "
        "0 = never; the log has the length of each step in any case",
    )
    parser.add_argument(
        "--use-ema",
        action="store_true",
        help="keep a moving average of the trained weights too, which often makes better pictures: "
        "ema.safetensors beside weights.safetensors; tools/convert.py --use-ema takes it",
    )
    parser.add_argument(
        "--ema-decay",
        type=float,
        default=0.9999,
        metavar="SHARE",
        help="of that average, what a step leaves of it; less for runs of few steps",
    )
    parser.add_argument(
        "--snr-gamma",
        type=float,
        default=0.0,
        metavar="GAMMA",
        help="diffusion stages: weigh errors by min(snr, GAMMA) / snr, which can learn in fewer "
        "steps; 5 is usual, 0 = all the same, as in the paper",
    )
    parser.add_argument(
        "--use-8bit-adam",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="AdamW with states of 8 bits instead of 32, for a quarter of their memory; needs "
        "bitsandbytes",
    )
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help="several processes: each keeps a piece of what is trained, of its gradients and of "
        "AdamW's states, where one GPU is too small for all of cascade; checkpoints are the same",
    )
    parser.add_argument(
        "--dynamo-backend",
        default="no",
        metavar="NAME",
        help="compile the networks with torch.compile: inductor is the fast one, after minutes",
    )
    parser.add_argument(
        "--lora-rank",
        type=int,
        default=16,
        metavar="R",
        help="of ref-adapter-lora's LoRA on the U-Net's attention: more can learn more",
    )
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations: less memory, more time",
    )


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """What is written, and the machine."""
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument(
        "--checkpoints-total-limit",
        type=int,
        default=2,
        metavar="N",
        help="checkpoints that are kept, the latest ones",
    )
    parser.add_argument(
        "--keep-best",
        action="store_true",
        help="keep the checkpoint of the lowest validation loss besides; RUN/best.json names it. "
        "Needs --validate-every",
    )
    parser.add_argument(
        "--patience",
        type=int,
        default=0,
        metavar="N",
        help="end the run when N validations in a row were no better than one before; 0 = never",
    )
    parser.add_argument(
        "--report-to",
        choices=("tensorboard", "wandb"),
        default="",
        help="show the figures there as well: TensorBoard reads RUN/tensorboard, wandb needs an "
        "account, or WANDB_MODE=offline; the package is to be installed",
    )
    parser.add_argument(
        "--validate-every",
        type=int,
        default=0,
        metavar="N",
        help="measure the loss, and for sem-inpainter the cosines in the hole, on held-out records "
        "every N steps: RUN/validation.csv, with the same timesteps and noise each time; 0 = never",
    )
    parser.add_argument(
        "--validation-split", default="validation", help="which records of the manifest those are"
    )
    parser.add_argument(
        "--validation-samples", type=int, default=64, metavar="N", help="how many of them"
    )
    parser.add_argument(
        "--samples-every",
        type=int,
        default=1000,
        metavar="N",
        help="draw RUN/samples/step-N.png on four fixed samples every N steps: inpainted pictures, "
        "or for sem-inpainter the similarity of features; 0 = never",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dataloader-num-workers",
        type=int,
        metavar="N",
        help="processes that open pictures or read the cache ahead, for each training process; "
        "they change no batch (default: the cores of this machine but one, at most 16)",
    )
    parser.add_argument(
        "--licence", default="unknown", help="licence of the result, for its header"
    )
    parser.add_argument(
        "--data-licence", default="unknown", help="licence of the pictures, for the model card"
    )
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """What is chosen all at once, and what a plan wants to know."""
    parser.add_argument(
        "--preset",
        choices=presets.PRESETS,
        default="",
        help="choose --micro-batch-size, --checkpointing, --use-8bit-adam, --precision and --cache "
        "for GPUs of that memory; options that are given as well win, and that is said",
    )
    parser.add_argument(
        "--price-per-hour",
        type=float,
        metavar="PRICE",
        help="plan: what an hour of the machine costs, with all its GPUs",
    )


if __name__ == "__main__":
    sys.exit(main())
