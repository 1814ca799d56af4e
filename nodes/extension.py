"""What the host asks the pack for: its nodes.

Node ids, input ids and orders, and output orders are a contract with saved workflows.
"""

from comfy_api.latest import ComfyExtension, io

from .apply_ref_adapter import CATApplyRefAdapter
from .clip_vision_output import CATVisualPromptToClipVision
from .compare import CATCompareFeatures
from .conditioning import CATInpaintConditioning, CATScheduler
from .crop_and_stitch import CATCropAroundMask, CATStitch
from .demo_scene import CATDemoScene
from .host import model_files
from .load import CATLoadCheckpoint, CATLoadWeights
from .sample_photo import CATSamplePhoto, lay_out_sample
from .train_parts import CATTrainRefAdapter, CATTrainSemInpainter
from .visual_prompt import CATEncodeVisualPrompt, CATSemanticInpaint, CATVisualPromptPreview

NODES = [
    CATLoadCheckpoint,
    CATLoadWeights,
    CATSemanticInpaint,
    CATEncodeVisualPrompt,
    CATApplyRefAdapter,
    CATInpaintConditioning,
    CATCropAroundMask,
    CATStitch,
    CATScheduler,
    CATVisualPromptPreview,
    CATVisualPromptToClipVision,
    CATCompareFeatures,
    CATTrainSemInpainter,
    CATTrainRefAdapter,
    CATDemoScene,
    CATSamplePhoto,
]


class CATDiffusionExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> CATDiffusionExtension:
    """Called once by the host when it loads the pack."""
    model_files.register_folder()
    lay_out_sample()
    return CATDiffusionExtension()
