/**
 * On CAT Semantic Inpaint: the photo with CLIP's 16x16 cells and those that the mask covers, before anything is queued.
 *
 * The mask is read from the picture file behind the input, where a node of FILES stands there, CAT Crop Around Mask in between or
 * not. Any other mask exists only once the workflow has run; the node then sends its cells.
 */

import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";

const SIDE = 16; // cells, as CLIP ViT-L/14 at 224 pixels sees them
const FEW = 4; // cells; SemInpainter has hardly any place for an object in fewer
const POLL = 500; // milliseconds between two looks at the nodes behind the inputs

const SENTENCES = {
    en: {
        unconnected: () => "Connect a mask: its cells are shown here.",
        unreadable: () => "This mask comes from another node: its cells are shown after a run.",
        unloaded: () => "The picture of the mask cannot be read. Choose another one.",
        none: () => "No cell is covered. Paint a mask, or paint it larger.",
        few: (count) => `Too small: about ${count} of 256 cells. CLIP will hardly see the hole; paint it larger.`,
        some: (count) => `The mask covers about ${count} of 256 cells.`,
        ran: (count) => `In the last run the mask covered ${count} of 256 cells.`,
        batch: (pictures) => ` First of ${pictures} pictures.`,
    },
    zh: {
        unconnected: () => "请连接遮罩：这里会显示它覆盖的格子。",
        unreadable: () => "这个遮罩由其他节点生成：运行后才能显示它覆盖的格子。",
        unloaded: () => "无法读取遮罩的图像，请另选一张。",
        none: () => "没有覆盖任何格子。请绘制遮罩，或画得更大。",
        few: (count) => `遮罩太小：256 格中约 ${count} 格。CLIP 几乎看不到它，请画得更大。`,
        some: (count) => `遮罩约覆盖 256 格中的 ${count} 格。`,
        ran: (count) => `上次运行时，遮罩覆盖 256 格中的 ${count} 格。`,
        batch: (pictures) => `（${pictures} 张图中的第一张）`,
    },
};

/** Where each node keeps its picture: {url, opaque, channel of the mask}; alpha is the inverted mask. */
const FILES = {
    LoadImage: (value) => picture(value("image"), "alpha"),
    LoadImageMask: (value) => picture(value("image"), value("channel")),
    CATSamplePhoto: (value) => picture(value("image"), "alpha"),
    CATDemoScene: (value) => {
        const url = new URL(`../scenes/${encodeURIComponent(value("scene"))}.png`, import.meta.url).href;
        return { url, opaque: url, channel: "alpha" };
    },
};
const CROP = "CATCropAroundMask";
const SAME_CELLS = ["Reroute", "ImageScaleBy", "ImageScaleToTotalPixels"]; // a picture of another size has the same 16x16 cells

/** The picture that a stock loader names, such as "clipspace/a.png [input]". */
function picture(value, channel) {
    const [, path, type] = /^(.*?)(?: \[(input|output|temp)\])?$/.exec(value);
    const cut = path.lastIndexOf("/");
    const query = new URLSearchParams({ filename: path.slice(cut + 1), subfolder: path.slice(0, Math.max(cut, 0)), type: type ?? "input" });
    const url = api.apiURL(`/view?${query}`);
    return { url, opaque: `${url}&channel=rgb`, channel };
}

function value(node, widget) {
    return node.widgets?.find(({ name }) => name === widget)?.value;
}

/** What a crop node is set to, or undefined if other nodes decide that. */
function cropOf(node) {
    const isLinked = ({ name, link }) => link != null && !["image", "mask"].includes(name);
    if (node.mode !== 0 || node.inputs.some(isLinked)) return undefined;
    return { size: value(node, "size"), context: value(node, "context") };
}

/**
 * The node behind an input and the crop before it: null if unconnected, undefined if it cannot be found from here, as at the edge of
 * a subgraph.
 */
function behind(node, name) {
    let slot = node.inputs.findIndex((input) => input.name === name);
    let crop;
    for (let hops = 0; hops < 100; hops++) {
        const link = node.getInputLink(slot);
        if (!link) return hops === 0 ? null : undefined;
        node = node.graph.getNodeById(link.origin_id);
        slot = 0;
        if (node?.type === CROP && !crop) {
            crop = cropOf(node);
            slot = node.inputs.findIndex((input) => input.name === ["image", "mask"][link.origin_slot]);
            if (!crop || slot < 0) return undefined;
        } else if (crop ? node?.type !== "Reroute" : !SAME_CELLS.includes(node?.type)) {
            // Scaled before it is cropped, a picture would have another square.
            return node ? { origin: node, crop } : undefined;
        }
    }
}

/** The picture behind an input: null if unconnected, undefined if it is not simply a file. */
function file(node, name) {
    const found = behind(node, name);
    if (!found || found.origin.mode !== 0) return found && undefined;
    const picture = FILES[found.origin.type]?.((widget) => String(value(found.origin, widget) ?? ""));
    return picture && { ...picture, crop: found.crop };
}

function load(url) {
    return new Promise((resolve) => {
        const image = new Image();
        image.onload = () => resolve(image);
        image.onerror = () => resolve(undefined);
        image.src = url;
    });
}

function canvas(width, height) {
    const made = Object.assign(document.createElement("canvas"), { width, height });
    const context = made.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    return [made, context];
}

/** A mask in grey, white where it masks, in the photo's size. */
function greyMask(image, channel, photo) {
    const [grey, context] = canvas((photo ?? image).naturalWidth, (photo ?? image).naturalHeight);
    context.drawImage(image, 0, 0, grey.width, grey.height);
    const pixels = context.getImageData(0, 0, grey.width, grey.height);
    const offset = ["red", "green", "blue", "alpha"].indexOf(channel);
    for (let i = 0; i < pixels.data.length; i += 4) {
        const masked = offset === 3 ? 255 - pixels.data[i + 3] : pixels.data[i + offset];
        pixels.data.set([masked, masked, masked, 255], i);
    }
    context.putImageData(pixels, 0, 0);
    return grey;
}

/** The square that CAT Crop Around Mask cuts out: cat_core/pictures/crop.py, square_around. */
function squareAround(grey, { size, context }) {
    const { width, height } = grey;
    const { data } = grey.getContext("2d").getImageData(0, 0, width, height);
    let [left, top, right, bottom] = [width, height, 0, 0];
    for (let i = 0; i < width * height; i++) {
        if (data[4 * i] < 2) continue;
        const [x, y] = [i % width, Math.floor(i / width)];
        [left, right] = [Math.min(left, x), Math.max(right, x + 1)];
        [top, bottom] = [Math.min(top, y), Math.max(bottom, y + 1)];
    }
    if (right === 0) [left, top, right, bottom] = [width >> 1, height >> 1, (width >> 1) + 1, (height >> 1) + 1];
    const longer = Math.max(right - left, bottom - top);
    let side = Math.max(size, longer, Math.round(context * longer));
    if (side > Math.min(width, height)) side = Math.max(Math.min(width, height), longer);
    const start = (first, last, length) => {
        const room = length - side;
        return Math.min(Math.max(Math.floor((first + last - side) / 2), Math.min(0, room)), Math.max(0, room));
    };
    return { left: start(left, right, width), top: start(top, bottom, height), side };
}

function cut(picture, square) {
    const [part, context] = canvas(square.side, square.side);
    context.fillRect(0, 0, square.side, square.side);
    context.drawImage(picture, -square.left, -square.top);
    return part;
}

/** A grey mask at CLIP's size, one value of 0 to 255 for each of 224x224 pixels, resized by way of 512x512 as the node does. */
function clipMask(grey) {
    const [middle, context512] = canvas(512, 512);
    context512.drawImage(grey, 0, 0, 512, 512);
    const [, context224] = canvas(224, 224);
    context224.drawImage(middle, 0, 0, 224, 224);
    const pixels = context224.getImageData(0, 0, 224, 224).data;
    return Uint8ClampedArray.from({ length: 224 * 224 }, (_, i) => pixels[4 * i]);
}

/** Row by row, 1 for each cell with a masked pixel. */
function cellsOf(mask) {
    const cells = Array(SIDE * SIDE).fill("0");
    mask.forEach((value, i) => {
        if (value >= 128) cells[Math.floor(i / 224 / 14) * SIDE + Math.floor((i % 224) / 14)] = "1";
    });
    return cells.join("");
}

function draw(target, photo, mask, cells) {
    const scale = 384 / Math.max(photo?.width ?? 1, photo?.height ?? 1);
    const width = (target.width = Math.max(48, Math.round(scale * (photo?.width ?? 1))));
    const height = (target.height = Math.max(48, Math.round(scale * (photo?.height ?? 1))));
    const context = target.getContext("2d");
    context.fillStyle = "rgb(127 127 127)"; // as CLIP sees the hole
    context.fillRect(0, 0, width, height);
    if (photo) context.drawImage(photo, 0, 0, width, height);
    if (mask) {
        const [hole, holes] = canvas(224, 224);
        const pixels = holes.createImageData(224, 224);
        mask.forEach((value, i) => pixels.data.set([127, 127, 127, value], 4 * i));
        holes.putImageData(pixels, 0, 0);
        context.drawImage(hole, 0, 0, width, height);
    }
    for (let i = 0; i < SIDE * SIDE; i++) {
        const [x, y] = [i % SIDE, Math.floor(i / SIDE)].map((at, axis) => (at * [width, height][axis]) / SIDE);
        context.fillStyle = "rgb(255 140 0 / 0.55)";
        if (cells?.[i] === "1") context.fillRect(x, y, width / SIDE, height / SIDE);
        context.strokeStyle = "rgb(255 255 255 / 0.3)";
        context.strokeRect(x, y, width / SIDE, height / SIDE);
    }
}

class Grid {
    constructor(node) {
        this.node = node;
        this.element = document.createElement("div");
        this.element.className = "cat-cells";
        this.element.style.cssText = "display: flex; flex-direction: column; gap: 4px; pointer-events: none; overflow: hidden";
        this.canvas = document.createElement("canvas");
        this.canvas.style.cssText = "flex: 1 1 170px; min-height: 0; width: 100%; object-fit: contain";
        this.sentence = document.createElement("div");
        this.sentence.style.cssText = "font: 12px/1.35 sans-serif; color: var(--input-text); text-align: center";
        this.element.append(this.canvas, this.sentence);
    }

    /** Take the place of the grid that an undo has left on the page: Nodes 2.0 keeps what it shows for a node's id. */
    mount() {
        this.element.dataset.node = this.node.id;
        const shown = document.querySelector(`.cat-cells[data-node="${this.node.id}"]`);
        if (shown && ![...grids].some(({ element }) => element === shown)) shown.replaceWith(this.element);
    }

    /** Look at what is behind the inputs; draw again only if it is something else than before. */
    async refresh() {
        this.mount();
        const photo = file(this.node, "image");
        let mask = file(this.node, "mask");
        if (mask?.crop && !photo?.crop) mask = undefined; // the photo's size decides the square
        const chinese = app.extensionManager.setting.get("Comfy.Locale")?.startsWith("zh");
        const state = JSON.stringify([mask, mask === null, photo, chinese, this.ran]);
        if (state === this.state) return;
        this.state = state;
        const opaque = mask && mask.channel !== "alpha";
        const images = await Promise.all([mask, photo].map((found, i) => found && load(i || opaque ? found.opaque : found.url)));
        if (state !== this.state) return;
        let [grey, shown] = [images[0] && greyMask(images[0], mask.channel, images[1]), images[1]];
        if (grey && mask.crop) {
            const square = squareAround(grey, mask.crop);
            [grey, shown] = [cut(grey, square), shown && cut(shown, square)];
        }
        const values = grey && clipMask(grey);
        const cells = values ? cellsOf(values) : mask === undefined ? this.ran?.[0] : undefined;
        const count = cells?.replaceAll("0", "").length;
        this.sentence.textContent = this.say(SENTENCES[chinese ? "zh" : "en"], mask, count);
        this.sentence.style.fontWeight = count < FEW ? "bold" : "normal";
        this.element.dataset.cells = cells ?? "";
        draw(this.canvas, shown, values, cells);
    }

    say(sentences, mask, count) {
        if (mask === null) return sentences.unconnected();
        if (mask === undefined && !this.ran) return sentences.unreadable();
        if (mask === undefined) return sentences.ran(count) + (this.ran.length > 1 ? sentences.batch(this.ran.length) : "");
        if (count === undefined) return sentences.unloaded();
        return count === 0 ? sentences.none() : count < FEW ? sentences.few(count) : sentences.some(count);
    }
}

const grids = new Set();

app.registerExtension({
    name: "cat-diffusion.masked-cells",

    setup() {
        setInterval(() => grids.forEach((grid) => grid.refresh()), POLL);
    },

    nodeCreated(node) {
        if (node.comfyClass !== "CATSemanticInpaint") return;
        const grid = new Grid(node);
        const options = { serialize: false, hideOnZoom: false, getMinHeight: () => 210, getValue: () => "" };
        node.addDOMWidget("masked_cells", "cat_cells", grid.element, options).serialize = false;

        const { onAdded, onRemoved, onExecuted } = node;
        node.onAdded = function () {
            grids.add(grid);
            return onAdded?.apply(this, arguments);
        };
        node.onRemoved = function () {
            grids.delete(grid);
            return onRemoved?.apply(this, arguments);
        };
        node.onExecuted = function (output) {
            grid.ran = output?.cat_cells ?? grid.ran;
            return onExecuted?.apply(this, arguments);
        };
    },
});
