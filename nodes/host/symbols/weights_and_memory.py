"""Weights: where they lie, in which type, and how the host reads and moves them."""

from collections.abc import Iterable, Iterator

import comfy.lora
import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch

# comfy/ops.py:821 (manual_cast): layers that compute in the type of their input. Without them
# CAT's parts have to be in the U-Net's type.
CASTING_LAYERS = comfy.ops.manual_cast

# comfy/ops.py:459 (disable_weight_init): layers whose weights are uninitialised memory, with
# gradients. Without them building a U-Net takes seconds for weights that a file overwrites.
PLAIN_LAYERS = comfy.ops.disable_weight_init

# comfy/model_management.py:2060 (InterruptProcessingException): the user has pressed Cancel. No
# Exception, so that nothing catches it by the way. Without it Cancel stops no training.
Cancelled = comfy.model_management.InterruptProcessingException


class LayersWithWeights(comfy.ops.disable_weight_init):
    """The host's layers, which have their weights from the start.

    With dynamic VRAM its Linear has none until a file brings them, and tells who brings his own by
    the identity of this method: comfy/ops.py:498 (_load_from_state_dict). Without it the keys of a
    file cannot be compared with those of the module.
    """

    class Linear(comfy.ops.disable_weight_init.Linear):
        _load_from_state_dict = torch.nn.Module._load_from_state_dict


def new_patcher(module: torch.nn.Module, dynamic: bool = True):
    """A ModelPatcher that computes on the GPU and waits where the host keeps its U-Nets.

    comfy/model_patcher.py:2142 (CoreModelPatcher). Where dynamic VRAM is on, main.py:278
    (CoreModelPatcher) puts another class under the name, hence no import of the name. Without it
    no part loads.
    """
    kind = comfy.model_patcher.CoreModelPatcher if dynamic else comfy.model_patcher.ModelPatcher
    return kind(
        module,
        load_device=compute_device(),
        offload_device=waiting_device(),
    )


def compute_device() -> torch.device:
    """Where the host computes.

    comfy/model_management.py:194 (get_torch_device). Without it all is computed on the CPU.
    """
    return comfy.model_management.get_torch_device()


def waiting_device() -> torch.device:
    """Where the host keeps a U-Net that it does not need.

    comfy/model_management.py:1068 (unet_offload_device). Without it --highvram is ignored.
    """
    return comfy.model_management.unet_offload_device()


def results_device() -> torch.device:
    """Where the host keeps what travels on its wires.

    comfy/model_management.py:1227 (intermediate_device). Without it --gpu-only is ignored.
    """
    return comfy.model_management.intermediate_device()


def device_of(patcher) -> torch.device:
    """Where a ModelPatcher's or a CLIP_VISION's module computes once it is loaded.

    comfy/model_patcher.py:357 (load_device) and comfy/clip_vision.py:49 (load_device). Without it
    inputs lie elsewhere than weights.
    """
    return patcher.load_device


def load(patchers: list, activations: int = 0, wholly: bool = False) -> None:
    """Let the host move ModelPatchers to where they compute, and others away.

    comfy/model_management.py:901 (load_models_gpu). Without it weights stay on the CPU.

    Args:
        activations: bytes needed beside the weights.
        wholly: not only what fits.
    """
    comfy.model_management.load_models_gpu(
        patchers, memory_required=activations, force_full_load=wholly
    )


def unload_all() -> None:
    """Take all models off the GPU; the host loads them again when it needs them.

    comfy/model_management.py:2025 (unload_all_models) and comfy/model_management.py:2007
    (soft_empty_cache). Without it training has only the memory that is left over.
    """
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def raise_if_cancelled() -> None:
    """Raise Cancelled where the user has pressed Cancel.

    comfy/model_management.py:2078 (throw_exception_if_processing_interrupted). See Cancelled.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()


def is_dynamic(patcher) -> bool:
    """Whether the host pages the weights in by itself, straight from the file's tensors.

    comfy/model_patcher.py:402 (is_dynamic). Such a module takes the tensors as they are,
    `assign=True`; without it they are copied, and have to fit into memory twice.
    """
    return patcher.is_dynamic()


def keep_dtypes(module: torch.nn.Module) -> None:
    """Let the host remember in which type each weight came.

    comfy/model_management.py:1037 (archive_model_dtypes). Without it dynamic VRAM computes in the
    wrong type.
    """
    comfy.model_management.archive_model_dtypes(module)


def set_factory(patcher, build, *arguments) -> None:
    """How the host makes the model again for another device, or without dynamic VRAM.

    comfy/model_patcher.py:438 (cached_patcher_init): it calls build(*arguments,
    disable_dynamic=True). Without it hooks and more than one GPU are refused.
    """
    patcher.cached_patcher_init = (build, arguments)


def patchers_of_patches(model) -> list:
    """The ModelPatchers that the patches of a MODEL bring.

    comfy/model_patcher.py:785 (model_patches_models). Without it the benchmark measures a load.
    """
    return model.model_patches_models()


def bytes_of(patchers: Iterable) -> int:
    """What ModelPatchers hold, as the host counts it.

    comfy/model_patcher.py:405 (model_size). Without it the benchmark cannot tell what CAT holds.
    """
    return sum(patcher.model_size() for patcher in patchers)


def parameter_count(tensors: dict[str, torch.Tensor]) -> int:
    """What the host chooses types and devices by.

    comfy/utils.py:175 (calculate_parameters). Without it sum numel() over the tensors.
    """
    return comfy.utils.calculate_parameters(tensors)


def read_tensors(path) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Tensors and metadata of a weight file, by the host's own reader.

    comfy/utils.py:122 (load_torch_file). Without it see streams_files and maps_no_files.
    """
    tensors, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    return tensors, metadata


def streams_files() -> bool:
    """Whether the host reads weight files by a reader of its own, to page them into the GPU.

    comfy/memory_management.py:173 (aimdo_enabled). Without it files are mapped, which is slower
    with dynamic VRAM.
    """
    return comfy.memory_management.aimdo_enabled


def maps_no_files() -> bool:
    """Whether the user forbade it to map files into memory (--disable-mmap).

    comfy/utils.py:41 (DISABLE_MMAP). Without it the user's setting is ignored.
    """
    return comfy.utils.DISABLE_MMAP


def patched_weights(model, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, fp32 copy on the CPU) of a MODEL's weights, with its LoRAs in them.

    comfy/model_patcher.py:858 (get_key_patches): a key has ((weight, convert), *patches), for
    comfy/lora.py:438 (calculate_weight). Without them a RefAdapter cannot be trained for a MODEL
    of the host.
    """
    for key, ((weight, convert), *patches) in model.get_key_patches(prefix).items():
        copy = weight.detach().to("cpu", torch.float32, copy=True)
        plain = convert(copy, inplace=True)
        yield key, comfy.lora.calculate_weight(patches, plain, key) if patches else plain
