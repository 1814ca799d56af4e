"""The pack's nodes. Ids, input ids and orders, and output orders are a contract with saved workflows."""

from comfy_api.latest import ComfyExtension, io

from . import host
from .compare import CATCompareFeatures
from .conditioning import CATInpaintConditioning, CATScheduler
from .demo import CATDemoScene
from .load import CATLoadCheckpoint, CATLoadWeights
from .ref_adapter import CATApplyRefAdapter
from .train import CATTrainRefAdapter, CATTrainSemInpainter
from .visual_prompt import CATEncodeVisualPrompt, CATSemanticInpaint, CATVisualPromptPreview

NODES = [CATLoadCheckpoint, CATLoadWeights, CATSemanticInpaint, CATEncodeVisualPrompt, CATApplyRefAdapter,
         CATInpaintConditioning, CATScheduler, CATVisualPromptPreview, CATCompareFeatures, CATTrainSemInpainter,
         CATTrainRefAdapter, CATDemoScene]


class CATDiffusionExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> CATDiffusionExtension:
    """Called once by the host when it loads the pack."""
    host.register_folder()
    return CATDiffusionExtension()
