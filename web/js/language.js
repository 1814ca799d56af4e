/**
 * What is read in Chinese where the page is: choices of the pack's nodes, and the notes of its example workflows.
 *
 * A workflow saves the values of choices as they are. Its two notes change places, so that the open one is in the page's language.
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

const LANGUAGE = "cat-diffusion language"; // a note's property, "en" or "zh"

function language() {
    return app.extensionManager.setting.get("Comfy.Locale")?.startsWith("zh") ? "zh" : "en";
}

/** Exchange what two notes say. */
function exchange(one, other) {
    [one.title, other.title] = [other.title, one.title];
    [one.properties[LANGUAGE], other.properties[LANGUAGE]] = [other.properties[LANGUAGE], one.properties[LANGUAGE]];
    [one.widgets[0].value, other.widgets[0].value] = [other.widgets[0].value, one.widgets[0].value];
}

app.registerExtension({
    name: "cat-diffusion.language",

    afterConfigureGraph() {
        const notes = app.graph.nodes.filter(({ properties }) => properties?.[LANGUAGE]);
        const open = notes.find(({ flags }) => !flags.collapsed);
        const collapsed = notes.find(({ flags }) => flags.collapsed);
        if (open && collapsed?.properties[LANGUAGE] === language()) exchange(open, collapsed);
    },

    nodeCreated(node) {
        for (const [input, labels] of Object.entries(CHINESE[node.comfyClass] ?? {})) {
            const widget = node.widgets?.find(({ name }) => name === input);
            if (!widget) continue;
            widget.options.getOptionLabel = (value) => (language() === "zh" && labels[value]) || String(value ?? "");
        }
    },
});
