"""Train CAT-Diffusion, one stage at a time.

    python tools/train.py sem-inpainter --base sd15_inpainting.safetensors clip_vit_l14.safetensors \\
        --data data/manifest.jsonl --run runs/sem-inpainter --cache cache/sem-inpainter

The same command continues a run that was stopped, killed or out of disk. For several GPUs start it with
`accelerate launch tools/train.py ...` in ComfyUI's Python with CAT_DIFFUSION_COMFYUI set to ComfyUI's folder.
Needs requirements-train.txt. Prepare data with tools/prepare_data.py.
"""

import argparse
import dataclasses
import gc
import sys
from pathlib import Path

import inside

ROOT = Path(__file__).resolve().parents[1]


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("stage", help="sem-inpainter, ref-adapter, ref-adapter-unet, cascade-sem-inpainter, cascade; unet (plain "
                                      "inpainting), ref-adapter-observed (the ablation without SemInpainter)")
    parser.add_argument("--base", type=Path, nargs="+", required=True, metavar="FILE",
                        help="what to start from: SD 1.5 inpainting checkpoint, CLIP ViT-L/14 vision file, CAT weights of "
                             "earlier stages; of parts that several have, the last one's")
    parser.add_argument("--data", type=Path, required=True, help="manifest (JSON lines), see tools/prepare_data.py")
    parser.add_argument("--split", default="train", help="which records of the manifest")
    parser.add_argument("--run", type=Path, required=True, help="folder for checkpoints and log; continued if it exists")
    parser.add_argument("--cache", type=Path, help="folder for encoded samples; filled first, then used instead of pictures")
    parser.add_argument("--masked", action="store_true", help="sem-inpainter: the paper's masked loss instead of the official code's")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures for the VAE, in pixels")
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--batch-size", type=int, default=128, help="over all processes")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="samples at once in each process")
    parser.add_argument("--warmup", type=int, default=0, help="steps over which the rates rise")
    parser.add_argument("--rates", type=float, default=1.0, metavar="X", help="times the stage's learning rates (1e-4 new, 1e-5 pretrained)")
    parser.add_argument("--final-rate", type=float, default=1.0, help="share of the rates left at the end, by a cosine; 1 = constant")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations: less memory, more time")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--samples-every", type=int, default=1000, metavar="N",
                        help="draw RUN/samples/step-N.png on four fixed samples every N steps: inpainted pictures, or for "
                             "sem-inpainter the similarity of features; 0 = never")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--licence", default="unknown", help="licence of the result, for its header")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    inside.add_host_options(parser)
    return parser


def main() -> int:
    sys.path.append(str(ROOT))
    parser = command_line()
    arguments = parser.parse_args()
    inside.ensure_host(parser, arguments, __file__, "train")
    from cat_core.training.stages import STAGES
    if arguments.stage not in STAGES:
        parser.error(f"unknown stage {arguments.stage}; choose from {', '.join(STAGES)}")
    import torch
    inside.load_pack(arguments.cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available()))
    from cat_diffusion.cat_core.training.loop import TrainingError
    from cat_diffusion.cat_core.training.manifest import ManifestError
    from cat_diffusion.cat_core.weights import WeightsError
    try:
        print(f"\nCAT weights: {run(arguments)}")
    except KeyboardInterrupt:
        print(f"\nStopped. The same command continues from {arguments.run}.")
        return 130
    except (TrainingError, ManifestError, WeightsError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments, stage=None) -> Path:
    """Load, build, cache, train; `stage` with rates of its own replaces the one that the arguments name."""
    import torch
    from cat_diffusion.cat_core.training import loop, samples, start
    from cat_diffusion.cat_core.training.objectives import Diffusion, Distillation, stable_diffusion_schedule
    from cat_diffusion.cat_core.training.stages import STAGES
    from cat_diffusion.nodes import host
    from cat_diffusion.nodes.denoiser import Denoiser, trainable_unet
    from sample_pictures import SamplePictures

    stage = stage or STAGES[arguments.stage].scaled(arguments.rates)
    diffusion = stage.objective == "diffusion"
    file = load(arguments.base, diffusion)
    modules = start.trainable_parts(file.architecture, file.parts, arguments.seed)
    encoders, store = encoded_samples(file, stage.objective, arguments.data, arguments.split, arguments.size, arguments.cache)
    fresh = store.fresh if arguments.cache else store
    with torch.inference_mode():
        empty = encoders.context([""]) if diffusion else None
    source = samples.Source(store, arguments.batch_size, arguments.seed, empty)
    architecture = file.architecture
    if diffusion:
        modules["unet"] = trainable_unet(file)
        denoiser = Denoiser(modules["unet"], modules["ref_adapter"] if stage.prompt else None, arguments.checkpointing)
        objective = Diffusion(denoiser, stable_diffusion_schedule(),
                              modules["sem_inpainter"] if stage.prompt == "predicted" else None, stage.prompt == "observed")
    else:
        objective = Distillation(modules["sem_inpainter"], arguments.masked)
    settings = loop.Settings(arguments.steps, arguments.batch_size, arguments.micro_batch_size, arguments.warmup,
                             final_rate=arguments.final_rate, precision=arguments.precision, seed=arguments.seed,
                             save_every=arguments.save_every)

    pictures = SamplePictures(stage, file, modules, encoders, fresh, arguments.run, arguments.seed) if arguments.samples_every else None
    if arguments.cache and not pictures:  # the frozen networks have done their work: their memory is wanted
        file = encoders = fresh.encoders = None
        host.clear_memory()
        gc.collect()

    def on_step(step, figures):
        if pictures and step % arguments.samples_every == 0:
            pictures.draw(step)

    def encoded(step, positions):
        with torch.no_grad():
            return {key: value.clone() for key, value in source(step, positions).items()}  # free of inference mode

    try:
        return loop.train(stage, objective, modules, encoded, arguments.run, settings, architecture,
                          provenance=f"trained on {arguments.data.name}", licence=arguments.licence, cpu=arguments.cpu, on_step=on_step)
    finally:
        if fresh.report.skipped:
            print(f"\n{fresh.report}")


def load(paths, diffusion: bool):
    """Everything that a stage starts from, as one Checkpoint that describes the CAT parts it lacks."""
    from cat_diffusion.cat_core import weights

    file = weights.merge([weights.read(path) for path in paths])
    file.require("clip_text", "clip_vision", *(("unet", "vae") if diffusion else ()))
    return dataclasses.replace(file, architecture=with_cat_parts(file.parts, file.architecture))


def encoded_samples(file, objective: str, data: Path, split: str, size: int, cache: Path | None):
    """The frozen networks, and the samples that they encode; a cache is filled first."""
    import torch
    from cat_diffusion.cat_core.training import manifest, samples
    from cat_diffusion.nodes import builders, host
    from cat_diffusion.nodes.encoders import HostEncoders

    diffusion = objective == "diffusion"
    with torch.inference_mode():
        clip, vision = builders.build_clip(file), builders.build_clip_vision(file)
        vae, model = (builders.build_vae(file), builders.build_unet(file)) if diffusion else (None, None)
    encoders = HostEncoders(vision, clip, vae, model)
    store = samples.Fresh(manifest.read(data, split), data.parent, encoders, objective, size,
                          host.vae_cell(vae) if diffusion else 8)
    if cache:
        store = samples.Shards(cache, store)
        with torch.inference_mode():
            store.fill(lambda done, total: print(f"\rEncoded {done} of {total} shards", end="", flush=True))
        print()
    return encoders, store


def with_cat_parts(parts, architecture):
    """Describe the CAT parts that will be made anew: as wide as CLIP, one adapter a transformer block."""
    from cat_diffusion.cat_core.training import start

    vision, text = parts["clip_vision"], parts["clip_text"]
    width = vision["vision_model.post_layernorm.weight"].shape[0]
    layers = len({key.split(".")[3] for key in vision if key.startswith("vision_model.encoder.layers.")})
    if architecture.sem_inpainter is None:
        heads = architecture.clip_vision_num_heads or max(width // 64, 1)
        text_size = text["text_model.final_layer_norm.weight"].shape[0]
        architecture = dataclasses.replace(architecture, sem_inpainter=start.sem_inpainter_config(width, layers, heads, text_size))
    if architecture.ref_adapter is None and "unet" in parts:
        adapter = start.ref_adapter_config(parts["unet"], architecture.unet_num_heads, width)
        architecture = dataclasses.replace(architecture, ref_adapter=adapter)
    return architecture


if __name__ == "__main__":
    sys.exit(main())
