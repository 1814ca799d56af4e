/**
 * What is read in Chinese where the page is: choices of the pack's nodes, and the notes and titles of its example workflows.
 *
 * A workflow saves the values of choices as they are. Its two notes change places, so that the open one is in the page's language.
 * Titles that one has changed stay as they are.
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

/** Of groups and nodes in the example workflows. */
const TITLES = new Map(Object.entries({
    "Model files": "模型文件",
    "1 Photo and mask": "1 照片和遮罩",
    "1 Picture with a hole": "1 有洞的图片",
    "1 Picture with two holes": "1 有两个洞的图片",
    "1 Train on a folder": "1 用一个文件夹训练",
    "2 A photo that it has not seen": "2 没有训练过的照片",
    "2 First object": "2 第一个物体",
    "2 What goes there": "2 放什么",
    "3 Draw": "3 绘制",
    "3 Draw with CAT": "3 用 CAT 绘制",
    "3 Draw without CAT": "3 不用 CAT 绘制",
    "3 Second object": "3 第二个物体",
    "3 What was learned": "3 学到了什么",
    "4 Draw both": "4 绘制两个物体",
    "4 Result": "4 结果",
    "4 Result: left plain, right CAT": "4 结果：左为普通重绘，右为 CAT",
    "5 Result": "5 结果",
    "Edges to follow": "要遵循的边缘",
    "... + yours": "…… + 你的模型",
    "Both holes": "两个洞",
    "Both prompts": "两个提示词",
    "CAT Conditioning": "CAT 条件",
    "CAT weights": "CAT 权重",
    "CLIP vision": "CLIP 视觉模型",
    "Colour and shape (type its name)": "颜色和形状（输入名称）",
    "Encode the picture": "编码图片",
    "First hole": "第一个洞",
    "First object": "第一个物体",
    "First object (type its name)": "第一个物体（输入名称）",
    "First prompt": "第一个提示词",
    "Image to mask": "图像转遮罩",
    "In the first hole": "在第一个洞里",
    "In the second hole": "在第二个洞里",
    "Inpainting - SD 1.5": "局部重绘模型 - SD 1.5",
    Loss: "损失",
    "Mask to image": "遮罩转图像",
    "Negative prompt": "负面提示词",
    "Object to paint (type its name)": "要画的物体（输入名称）",
    "Photo and mask": "照片和遮罩",
    "Picture of the object": "物体的图片",
    "Picture whose edges to follow": "提供边缘的图片",
    "Plain conditioning": "普通局部重绘条件",
    "Plain sampling": "普通采样",
    "Positive prompt": "正面提示词",
    "Put both back": "贴回两个物体",
    "Put it back": "贴回照片",
    "SD 1.5 inpainting": "SD 1.5 局部重绘模型",
    "Scale to 512x512": "缩放到 512x512",
    "Second hole": "第二个洞",
    "Second object": "第二个物体",
    "Second object (type its name)": "第二个物体（输入名称）",
    "Second prompt": "第二个提示词",
    Seed: "种子",
    "Soft edge": "柔和边缘",
    "What is under its mask (type its name)": "遮罩下的物体（输入名称）",
    "Your checkpoint": "你的 Checkpoint",
}));
const ENGLISH_TITLES = new Map([...TITLES].map(([english, chinese]) => [chinese, english]));

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
        if (!open) return; // not one of the pack's
        const titles = language() === "zh" ? TITLES : ENGLISH_TITLES;
        for (const titled of [...app.graph.groups, ...app.graph.nodes]) titled.title = titles.get(titled.title) ?? titled.title;
    },

    nodeCreated(node) {
        for (const [input, labels] of Object.entries(CHINESE[node.comfyClass] ?? {})) {
            const widget = node.widgets?.find(({ name }) => name === input);
            if (!widget) continue;
            widget.options.getOptionLabel = (value) => (language() === "zh" && labels[value]) || String(value ?? "");
        }
    },
});
