/**
 * Choices of the pack's nodes in Chinese. What a workflow saves stays the value itself: only what is read on the node changes.
 */

import { app } from "/scripts/app.js";

const CHINESE = {
    CATInpaintConditioning: {
        fill: { black: "黑色", grey: "灰色" },
        posterior: { mode: "众数", sample: "随机采样" },
    },
    CATDemoScene: {
        scene: {
            "square hole": "方形洞",
            "star-shaped hole": "星形洞",
            "two holes, the lower": "两个洞：下方",
            "two holes, the upper": "两个洞：上方",
        },
    },
};

app.registerExtension({
    name: "cat-diffusion.choices",

    nodeCreated(node) {
        for (const [input, labels] of Object.entries(CHINESE[node.comfyClass] ?? {})) {
            const widget = node.widgets?.find(({ name }) => name === input);
            if (!widget) continue;
            widget.options.getOptionLabel = (value) => {
                const chinese = app.extensionManager.setting.get("Comfy.Locale")?.startsWith("zh");
                return (chinese && labels[value]) || String(value ?? "");
            };
        }
    },
});
