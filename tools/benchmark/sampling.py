"""The sections of tools/bench.py that sample: plain SD inpainting and CAT-Diffusion through the pack's nodes and the host."""

import functools
import gc
import statistics
import time

import comfy.model_management
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.utils
import numpy as np
import torch
from comfy.k_diffusion import sampling as k_diffusion
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from benchmark.rows import Row, rows_in_turn
from cat_diffusion.nodes.apply_ref_adapter import apply_ref_adapter
from cat_diffusion.nodes.conditioning import inpaint_conditioning
from cat_diffusion.nodes.host import memory, model_files
from cat_diffusion.nodes.host.build import (
    build_cat_model,
    build_clip,
    build_clip_vision,
    build_unet,
    build_vae,
)
from cat_diffusion.nodes.host.cat_model import run_sem_inpainter
from cat_diffusion.nodes.host.clip import encode_text
from cat_diffusion.nodes.host.unet import block_name, trained_sigmas
from cat_diffusion.nodes.visual_prompt import encode_visual_prompt, predict
from comfyui import ROOT

PLAIN, OFFICIAL, SHIPPED = (
    "plain SD inpainting",
    "CAT, RefAdapter as in the official code",
    "CAT as shipped",
)
ONCE, SKIPPED = "the same, keys and values computed once", "and no attention for unconditional rows"
CFG, TEXT, PAPER_STEPS = 7.5, "spoon", 50


class OfficialPatch:
    """RefAdapter without shortcuts: keys and values in every call, attention for both kinds of rows.

    `once` keeps keys and values, `skip` keeps unconditional rows out of the attention: what shipped code did before it folded.
    """

    def __init__(self, adapter, tokens: torch.Tensor, once: bool = False, skip: bool = False):
        self.adapter, self.tokens, self.once, self.skip, self.kept = adapter, tokens, once, skip, {}

    def __call__(self, x, extra_options):
        conds, name = extra_options["cond_or_uncond"], block_name(extra_options)
        block, rows = self.adapter.model.block(name), x.unflatten(0, (len(conds), -1))
        looking = [i for i, cond in enumerate(conds) if cond == 0 or not self.skip]
        if not self.once or name not in self.kept:
            tokens = self.tokens.to(x).expand(rows.shape[1], -1, -1)
            prompts = torch.cat(
                [tokens if conds[i] == 0 else torch.zeros_like(tokens) for i in looking]
            )
            if not self.once:
                return x + block(x, prompts)
            self.kept[name] = block.attn3.to_k(prompts), block.attn3.to_v(prompts)
        attn = block.attn3
        q = attn.to_q(block.norm4(rows[looking].flatten(0, 1)))
        added = attn.to_out[0](attn.attention(q, *self.kept[name], attn.heads))
        if not self.skip:
            return x + added
        added, bias = iter(added.unflatten(0, (-1, rows.shape[1]))), attn.to_out[0].bias.to(x)
        return torch.cat(
            [row + (next(added) if i in looking else bias) for i, row in enumerate(rows)]
        )

    def models(self):
        return [self.adapter]

    def to(self, device_or_dtype):
        return self


class Bench:
    """The models of one checkpoint, and timed calls of them."""

    def __init__(self, checkpoint, size: int, rounds: int, cpu: bool):
        self.rounds, self.cuda = rounds, not cpu
        file = model_files.read_path(checkpoint)
        self.model, self.clip, self.vae = (
            build(file) for build in (build_unet, build_clip, build_vae)
        )
        self.vision, self.cat_model = build_clip_vision(file), build_cat_model(file)
        self.prompt = self.see(*self.picture(size))

    def picture(self, size: int, batch: int = 1):
        """IMAGE and MASK of the demo's photograph."""
        files = (
            (ROOT / "tools/photograph/photo.jpg", "RGB"),
            (ROOT / "tools/photograph/mask.png", "L"),
        )
        photo, mask = (
            np.asarray(Image.open(path).convert(mode).resize((size, size)), np.float32) / 255
            for path, mode in files
        )
        return torch.from_numpy(photo)[None].repeat(batch, 1, 1, 1), torch.from_numpy(mask)[
            None
        ].repeat(batch, 1, 1)

    def see(self, image, mask):
        """The visual prompt."""
        return predict(self.cat_model, self.vision, self.clip, image, mask, TEXT)

    def apply(self, prompt=None, model=None):
        """The model with RefAdapter as shipped."""
        return apply_ref_adapter(model or self.model, self.cat_model, prompt or self.prompt)

    def official(self, **shortcuts):
        """The model with RefAdapter as in the official code."""
        model = self.model.clone()
        model.set_model_patch(
            OfficialPatch(self.cat_model.ref_adapter, self.prompt.tokens, **shortcuts),
            "middle_patch",
        )
        return model

    def forms(self) -> dict:
        """The models that are compared."""
        return {PLAIN: self.model, OFFICIAL: self.official(), SHIPPED: self.apply()}

    @functools.lru_cache(maxsize=1)
    def conditioned(self, size: int, batch: int = 1):
        """Positive, negative and latent, as both forms get them."""
        texts = [
            self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text)) for text in (TEXT, "")
        ]
        return inpaint_conditioning(*texts, self.vae, *self.picture(size, batch))

    def call(self, model, size: int, batch: int = 1, inner=None) -> float:
        """Seconds of one step's work, both rows of CFG, inside the host's sampling; `inner` stands in for the timing."""
        seconds = []

        def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
            def step():
                return model(x, sigmas[:1].expand(len(x)), **extra_args)

            if inner:
                inner(step)
                return x
            for repeat in range(6 if self.cuda else 1):  # the first one on a GPU only warms up
                self.wait()
                start = time.perf_counter()
                step()
                self.wait()
                seconds.append(time.perf_counter() - start)
            return x

        self.sample(model, sampler, trained_sigmas(self.model)[[500, 0]], size, batch)
        return min(seconds[1:] or seconds) if seconds else 0.0

    def sample(self, model, sampler, sigmas, size: int, batch: int = 1) -> torch.Tensor:
        """The host's sampling with a k-diffusion sampler function."""
        positive, negative, latent = self.conditioned(size, batch)
        noise = comfy.sample.prepare_noise(latent["samples"], 0)
        return comfy.sample.sample_custom(
            model,
            noise,
            CFG,
            comfy.samplers.KSAMPLER(sampler),
            sigmas,
            positive,
            negative,
            latent["samples"],
            disable_pbar=True,
            seed=0,
        )

    def draw(
        self, models: dict, size: int, steps: int
    ) -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
        """Seconds of each step, and the latent, of a picture by each model. They take turns, step by step: each sampling starts
        the next one inside it, and the innermost makes one Euler step (the host's ddim) of each."""
        sigmas = comfy.samplers.calculate_sigmas(
            self.model.get_model_object("model_sampling"), "ddim_uniform", steps
        )
        running, seconds, latents = {}, {name: [] for name in models}, {}

        def start(names):
            if not names:
                for i in range(steps):
                    for name in list(models)[:: 1 if i % 2 == 0 else -1]:
                        model, x, extra_args = running[name]
                        took, running[name][1] = self.timed(
                            lambda: k_diffusion.sample_euler(
                                model,
                                x,
                                sigmas[i : i + 2].to(x.device),
                                extra_args=extra_args,
                                disable=True,
                            )
                        )
                        seconds[name].append(took)
                return

            def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
                running[names[0]] = [model, x, extra_args]
                start(names[1:])
                return running[names[0]][1]

            latents[names[0]] = self.sample(models[names[0]], sampler, sigmas, size)

        start(list(models))
        return seconds, latents

    def wait(self):
        """Until the GPU has done everything."""
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, function):
        """Seconds, and what the function returns."""
        self.wait()
        start = time.perf_counter()
        result = function()
        self.wait()
        return time.perf_counter() - start, result

    def in_turn(self, calls: dict, rounds: int | None = None) -> dict[str, list[float]]:
        """Seconds of each form; the order turns from round to round, and the first round only warms up."""
        names = list(calls)
        seconds = {name: [] for name in names}
        for i in range(-1, rounds or self.rounds):
            for name in names[max(i, 0) % len(names) :] + names[: max(i, 0) % len(names)]:
                took = calls[name]()
                if i >= 0:
                    seconds[name].append(took)
        return seconds


@functools.lru_cache(maxsize=1)
def _bench(checkpoint, size: int, rounds: int, cpu: bool) -> Bench:
    return Bench(checkpoint, size, rounds, cpu)


def release() -> None:
    """Let go of the models: training wants their memory."""
    _bench.cache_clear()
    Bench.conditioned.cache_clear()
    memory.clear_memory()
    gc.collect()


def section(name: str, arguments):
    """The rows of a section by name."""
    measure = {
        "operations": operations,
        "step": step,
        "adapter": adapter,
        "image": image,
        "sem-inpainter": sem_inpainter,
        "growth": growth,
        "compile": compiled,
        "kernels": kernels,
        "profile": profile_,
    }[name]
    comfy.utils.PROGRESS_BAR_ENABLED = False
    with torch.inference_mode():
        yield from measure(
            _bench(arguments.checkpoint, arguments.size, arguments.rounds, arguments.cpu), arguments
        )


def counted(function) -> float:
    """Multiplications, in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2e9


def step_multiplications(bench: Bench, model, size: int, batch: int = 1) -> float:
    """Multiplications of a step's work, in units of 1e9, on tensors without content: nothing is computed."""
    meta, config = torch.device("meta"), bench.model.model.model_config.unet_config
    unet = UNetModel(
        **{**config, "dtype": torch.float32}, device=meta, operations=comfy.ops.disable_weight_init
    )
    side, rows = size // 8, 2 * batch
    context = torch.empty(rows, 77, config["context_dim"], device=meta)
    options = {
        "patches": model.model_options["transformer_options"].get("patches", {}),
        "cond_or_uncond": [1, 0],
    }
    return counted(
        lambda: unet(
            torch.empty(rows, unet.in_channels, side, side, device=meta),
            torch.empty(rows, device=meta),
            context=context,
            transformer_options=options,
        )
    )


def operations(bench: Bench, arguments):
    """Multiplications of a step of each form, and of what runs once a picture."""
    counts = {
        name: step_multiplications(bench, model, arguments.size)
        for name, model in bench.forms().items()
    }
    for name, count in counts.items():
        yield Row(
            f"a step, {name}", "GMAC", [count], [count / counts[PLAIN]] if name != PLAIN else []
        )
    for what, function in (
        ("CLIP vision, CLIP text, SemInpainter", lambda: bench.see(*bench.picture(arguments.size))),
        ("folding", bench.apply),
    ):
        once = counted(function)
        yield Row(
            f"once: {what}",
            "GMAC",
            [once],
            [once / PAPER_STEPS / counts[PLAIN]],
            f"of {PAPER_STEPS} plain steps",
        )


def step(bench: Bench, arguments):
    """One step of each form, in turn, and the memory that the forms hold."""
    forms = bench.forms()
    seconds = bench.in_turn(
        {
            name: functools.partial(bench.call, model, arguments.size)
            for name, model in forms.items()
        }
    )
    yield from rows_in_turn(seconds, PLAIN)
    for name, model in forms.items():
        held = sum(patcher.model_size() for patcher in model.model_patches_models()) / 1e6
        yield Row(f"weights beside the U-Net, {name}", "MB", [held], note="as the host counts them")
    if bench.cuda:
        for name, model in forms.items():
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()
            torch.cuda.reset_peak_memory_stats()
            bench.call(model, arguments.size)
            yield Row(f"peak GPU memory, {name}", "MB", [torch.cuda.max_memory_allocated() / 1e6])


def adapter(bench: Bench, arguments):
    """The adapters of one step, called with the shapes that the U-Net calls them with; what they must read and write at least."""
    calls, patches = adapter_calls(bench, arguments.size), adapter_patches(bench)
    seconds = bench.in_turn(
        {
            name: lambda patch=patch: bench.timed(lambda: [patch(*call) for call in calls])[0]
            for name, patch in patches.items()
        },
        3 * bench.rounds,
    )
    yield from rows_in_turn(seconds, OFFICIAL)
    large = torch.empty(2**28, dtype=torch.uint8, device=calls[0][0].device)
    copying = bench.in_turn({"copy": lambda: bench.timed(large.clone)[0]})["copy"]
    least = patches[SHIPPED].folded.model_size() + sum(2 * x.nbytes for x, _ in calls)
    ceiling = 2 * large.nbytes / min(copying)
    yield Row(
        "memory bandwidth, copying 268 MB", "GB/s", [2 * large.nbytes / s / 1e9 for s in copying]
    )
    yield Row(
        "memory bandwidth, CAT as shipped at least",
        "GB/s",
        [least / s / 1e9 for s in seconds[SHIPPED]],
        [least / s / ceiling for s in seconds[SHIPPED]],
        "of copying",
    )


def adapter_calls(bench: Bench, size: int, batch: int = 1) -> list[tuple]:
    """The arguments that a step calls a patch with."""
    calls = []

    def record(x, extra_options):
        calls.append(
            (
                torch.randn_like(x),
                {key: extra_options[key] for key in ("block", "block_index", "cond_or_uncond")},
            )
        )
        return x

    model = bench.model.clone()
    model.set_model_patch(record, "middle_patch")
    bench.call(model, size, batch)
    return calls[-len(bench.cat_model.architecture.ref_adapter.blocks) :]


def adapter_patches(bench: Bench) -> dict:
    """The forms of the adapters, from the official one to the shipped one, loaded."""
    forms = {
        OFFICIAL: bench.official(),
        ONCE: bench.official(once=True),
        SKIPPED: bench.official(once=True, skip=True),
        SHIPPED: bench.apply(),
    }
    comfy.model_management.load_models_gpu(
        [patcher for model in forms.values() for patcher in model.model_patches_models()]
    )
    return {
        name: model.model_options["transformer_options"]["patches"]["middle_patch"][0]
        for name, model in forms.items()
    }


def image(bench: Bench, arguments):
    """Whole pictures: what both forms share, what CAT adds once, the sampling, whose steps the forms take in turn."""
    parts = {name: [] for name in ("shared", "once", PLAIN, SHIPPED)}
    ratios, picture = [], bench.picture(arguments.size)
    bench.draw(
        {PLAIN: bench.model, SHIPPED: bench.apply(bench.see(*picture))}, arguments.size, 1
    )  # warms up
    for _ in range(arguments.images):
        bench.conditioned.cache_clear()
        encode, _ = bench.timed(lambda: bench.conditioned(arguments.size))
        once, model = bench.timed(lambda: bench.apply(bench.see(*picture)))
        seconds, latents = bench.draw(
            {PLAIN: bench.model, SHIPPED: model}, arguments.size, arguments.steps
        )
        decode, _ = bench.timed(lambda: bench.vae.decode(latents[SHIPPED]))
        ratios += [b / a for a, b in zip(seconds[PLAIN], seconds[SHIPPED])]
        for name, value in {
            "shared": encode + decode,
            "once": once,
            **{form: sum(seconds[form]) for form in seconds},
        }.items():
            parts[name].append(value)

    def totals(factor=1.0):
        plain = [a + factor * b for a, b in zip(parts["shared"], parts[PLAIN])]
        shipped = [
            a + b + factor * c for a, b, c in zip(parts["shared"], parts["once"], parts[SHIPPED])
        ]
        return {PLAIN: plain, SHIPPED: shipped}

    steps = f"{arguments.steps} steps"
    yield from rows_in_turn(
        {f"{steps}, {name}": values for name, values in totals().items()}, f"{steps}, {PLAIN}"
    )
    yield Row(
        "of that shared: CLIP text, VAE", "s", parts["shared"], note="measured once for both forms"
    )
    yield Row("of that once: CLIP, SemInpainter, folding", "s", parts["once"])
    yield from rows_in_turn(
        {f"of that the steps, {name}": parts[name] for name in (PLAIN, SHIPPED)},
        f"of that the steps, {PLAIN}",
    )
    yield Row("each step over the plain one beside it", "x", ratios)
    if arguments.steps != PAPER_STEPS:
        factor, more = PAPER_STEPS / arguments.steps, f"{PAPER_STEPS} steps"
        for row in rows_in_turn(
            {f"{more}, {name}": values for name, values in totals(factor).items()},
            f"{more}, {PLAIN}",
        ):
            row.note = f"composed: sampling of {steps} times {factor:g}"
            yield row


def sem_inpainter(bench: Bench, arguments):
    """The parts of a visual prompt, with the models loaded."""
    picture = bench.picture(arguments.size)
    config = bench.cat_model.architecture.sem_inpainter
    width, count = config.hidden_size, config.grid_size**2
    inputs = (
        torch.randn(1, count, width),
        torch.randn(1, width),
        torch.randn(1, config.text_size),
        torch.ones(1, 1, config.grid_size, config.grid_size),
    )
    for what, function in {
        "CLIP vision, with preprocessing": lambda: encode_visual_prompt(bench.vision, *picture),
        "CLIP text": lambda: encode_text(bench.clip, TEXT),
        "SemInpainter": lambda: run_sem_inpainter(bench.cat_model, *inputs),
        "folding": bench.apply,
        "all of it": lambda: bench.apply(bench.see(*picture)),
    }.items():
        yield Row(
            what,
            "s",
            bench.in_turn({what: lambda function=function: bench.timed(function)[0]})[what],
        )


def growth(bench: Bench, arguments):
    """A plain step where one thing grows, and the shipped adapters' own time in it, which is too small to be told from two steps."""
    size = arguments.growth_size
    cases = [(f"{side} x {side}", bench.apply, side, 1) for side in arguments.sizes]
    cases += [
        (f"{size} x {size}, batch of {batch}, one prompt", bench.apply, size, batch)
        for batch in arguments.batches
    ]
    cases += [
        (
            f"{size} x {size}, batch of {batch}, a prompt each",
            lambda batch=batch: bench.apply(bench.see(*bench.picture(size, batch))),
            size,
            batch,
        )
        for batch in arguments.batches
        if batch > 1
    ]
    cases += [
        (
            f"{size} x {size}, {stack} adapters on each other",
            lambda stack=stack: functools.reduce(
                lambda model, _: bench.apply(model=model), range(stack), bench.model
            ),
            size,
            1,
        )
        for stack in arguments.stacks
    ]
    for what, build, side, batch in cases:
        model = build()
        patches = model.model_options["transformer_options"]["patches"]["middle_patch"]
        comfy.model_management.load_models_gpu(model.model_patches_models())
        calls = adapter_calls(bench, side, batch)
        plain = [
            bench.call(bench.model, side, batch) for _ in range(max(bench.rounds // 3, 1))
        ]  # the recording warmed it up
        own = bench.in_turn(
            {
                what: lambda: bench.timed(
                    lambda: [patch(*call) for patch in patches for call in calls]
                )[0]
            }
        )[what]
        counts = [step_multiplications(bench, form, side, batch) for form in (bench.model, model)]
        yield Row(f"{what}: plain step", "s", plain)
        yield Row(
            f"{what}: adapters",
            "s",
            own,
            [seconds / statistics.median(plain) for seconds in own],
            f"multiplications x {(counts[1] - counts[0]) / counts[0]:.4f}",
        )


def compiled(bench: Bench, arguments):
    """A step with and without torch.compile, plain and as shipped."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    for name, model in ((PLAIN, bench.model.clone()), (SHIPPED, bench.apply())):
        fast = model.clone()
        set_torch_compile_wrapper(fast, backend="inductor")
        try:
            first, _ = bench.timed(lambda: bench.call(fast, arguments.size))
        except Exception as error:  # whatever a compiler throws
            yield Row(
                f"{name}: torch.compile does not work here",
                "s",
                [0.0],
                note=f"{type(error).__name__}: {str(error)[:200]}",
            )
            continue
        yield Row(f"{name}: first step, compiling", "s", [first])
        yield from rows_in_turn(
            bench.in_turn(
                {
                    f"{name}: eager": lambda: bench.call(model, arguments.size),
                    f"{name}: compiled": lambda: bench.call(fast, arguments.size),
                }
            ),
            f"{name}: eager",
        )


def kernels(bench: Bench, arguments):
    """Kernel time and launches of a step, as torch.profiler sees them; on a CPU the operators of PyTorch."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    kind, activity, what = (
        (DeviceType.CUDA, ProfilerActivity.CUDA, "kernels")
        if bench.cuda
        else (DeviceType.CPU, ProfilerActivity.CPU, "operators")
    )
    found = {}

    def profiled(step):
        step()
        bench.wait()
        with profile(activities=[activity]) as profiler:
            step()
            bench.wait()
        events = [event for event in profiler.events() if event.device_type == kind]
        time_ = sum(
            event.self_device_time_total if bench.cuda else event.self_cpu_time_total
            for event in events
        )
        found[name] = (len(events), time_ / 1e6)

    for name, model in bench.forms().items():
        bench.call(model, arguments.size, inner=profiled)
        count, seconds = found[name]
        yield Row(
            f"{what}, {name}",
            "launches",
            [float(count)],
            [count / found[PLAIN][0]] if name != PLAIN else [],
        )
        yield Row(
            f"time in {what}, {name}",
            "s",
            [seconds],
            [seconds / found[PLAIN][1]] if name != PLAIN else [],
        )


def profile_(bench: Bench, arguments):
    """Where the time of the adapters of one step goes, by operator (on a GPU by kernel)."""
    from torch.profiler import ProfilerActivity, profile

    calls, patches = adapter_calls(bench, arguments.size), adapter_patches(bench)
    for name, patch in patches.items():
        for call in calls:
            patch(*call)  # warms up
        bench.wait()
        with profile(
            activities=[ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU]
        ) as profiler:
            for call in calls:
                patch(*call)
            bench.wait()
        found = {
            event.key: (
                event.self_device_time_total if bench.cuda else event.self_cpu_time_total,
                event.count,
            )
            for event in profiler.key_averages()
        }
        total = sum(time_ for time_, _ in found.values())
        yield Row(name, "ms", [total / 1000])
        for key, (time_, count) in sorted(found.items(), key=lambda item: -item[1][0]):
            if time_ >= 0.03 * total:
                yield Row(
                    f"  {key[:60]}",
                    "ms",
                    [time_ / 1000],
                    note=f"{count} calls, {time_ / total:.0%}",
                )
