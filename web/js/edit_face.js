// The head of Edit Face: the fitted face under the node's sliders, to be turned by hand.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { draw, unpack } from "./head.js";
import { around, button, element, Panel, round } from "./panel.js";
import { EXPRESSIONS } from "./presets.js";
import { say } from "./words.js";

const HEIGHT = 262; // least of the panel, px
const LARGEST = 512; // px of the drawn picture
const REACH = 130; // degrees of a drag over the width of the picture
const POSE = ["yaw", "pitch", "roll", "jaw", "gaze_x", "gaze_y"];
const FACE = ["smile", "frown", "raise_brows", "lower_brows", "blink", "squint", "wide_eyes", "pucker",
    "puff_cheeks", "sneer"];
const SLIDERS = [...POSE, ...FACE];

const heads = new Map(); // address -> head, of the last few
function load(address, fetched) {
    if (!heads.has(address)) {
        if (heads.size > 8) heads.delete(heads.keys().next().value);
        const read = async (answer) => (answer.ok ? unpack(await answer.arrayBuffer()) : null);
        const head = fetched().then(read).catch(() => null);
        heads.set(address, head);
        head.then((found) => found ?? heads.delete(address)); // the next run may bring it
    }
    return heads.get(address);
}

/** The face of a run, or the open head's mean face before that. */
function loadHead(file) {
    if (file) return load(file.filename, () => api.fetchApi("/view?" + new URLSearchParams(file)));
    return load("", () => fetch(new URL("../heads/open.head", import.meta.url)));
}

class HeadPanel extends Panel {
    constructor(node) {
        super(node);
        this.memory = {}; // arrays that a picture leaves for the next
        this.drawn = new OffscreenCanvas(1, 1);
        this.build();
        this.join("head", HEIGHT);
    }

    build() {
        const range = { role: "slider", "aria-valuemin": -90, "aria-valuemax": 90, tabIndex: 0 };
        const title = say(
            "Drag to turn the head. Shift and drag: tilt. Alt and drag: eyes. Double click: back to the photo.");
        const label = say("Turn of the head");
        this.canvas = element("canvas", { className: "face-rig-head", ...range, label, title });
        this.canvas.addEventListener("dblclick", () => this.zero());
        this.hint = element("div", { className: "face-rig-hint", role: "status" });
        this.reset = button({ textContent: "↺", className: "face-rig-reset", label: say("All sliders to 0") });
        this.reset.addEventListener("click", () => this.zero());
        this.presets = Object.keys(EXPRESSIONS).map((name) => this.preset(name));
        const frame = element("div", { className: "face-rig-frame" }, this.canvas, this.hint, this.reset);
        this.stage = element("div", { className: "face-rig-stage" }, frame);
        this.root = element("div", {}, this.stage, element("div", { className: "face-rig-presets" }, ...this.presets));
    }

    preset(name) {
        const added = say("Expression: {name}, added to the photo's own", { name: say(name) });
        const title = name === "photo" ? say("The photo's own expression") : added;
        const made = button({ textContent: say(name), title });
        made.addEventListener("click", () => this.express(EXPRESSIONS[name]));
        return made;
    }

    zero() {
        this.together(Object.fromEntries(SLIDERS.map((name) => [name, 0])));
    }

    /** The pose stays. */
    express(preset) {
        this.together(Object.fromEntries(["jaw", ...FACE].map((name) => [name, preset[name] ?? 0])));
    }

    // --- hands

    /** Where the pointer is, in widths of the picture from its middle, y up. */
    point(e) {
        const { left, top, width, height } = this.canvas.getBoundingClientRect();
        return [(e.clientX - left) / width - 0.5, 0.5 - (e.clientY - top) / height];
    }

    grab(e) {
        return { mode: e.shiftKey ? "tilt" : e.altKey ? "gaze" : "turn", from: this.point(e), values: this.edit() };
    }

    move(e) {
        const { mode, from, values } = this.drag, at = this.point(e);
        if (mode === "tilt") {
            const angle = Math.atan2(at[1], at[0]) - Math.atan2(from[1], from[0]);
            return this.set("roll", round(around(values.roll + (angle * 180) / Math.PI), 0.5));
        }
        const [x, y] = mode === "gaze" ? ["gaze_x", "gaze_y"] : ["yaw", "pitch"];
        this.set(x, round(values[x] + REACH * (at[0] - from[0]), 0.5));
        this.set(y, round(values[y] + REACH * (at[1] - from[1]), 0.5));
    }

    keys(fine) {
        const by = fine ? 0.5 : 2.5, { yaw, pitch, roll } = this.edit();
        return {
            ArrowLeft: () => this.set("yaw", yaw - by),
            ArrowRight: () => this.set("yaw", yaw + by),
            ArrowUp: () => this.set("pitch", pitch + by),
            ArrowDown: () => this.set("pitch", pitch - by),
            PageUp: () => this.set("roll", roll + by),
            PageDown: () => this.set("roll", roll - by),
            Home: () => this.zero(),
        };
    }

    // --- the picture

    /** The sliders; what comes in through a wire is not known here and counts as 0. */
    edit() {
        const value = (name) => (this.fixed(name) ? 0 : Number(this.widget(name)?.value) || 0);
        return Object.fromEntries(SLIDERS.map((name) => [name, value(name)]));
    }

    /** What the last run told of the face, of the first one. */
    about() {
        return this.output("face_rig_head")?.[0];
    }

    seen() {
        return JSON.stringify([this.edit(), this.scale(), this.about()]);
    }

    /** The head to draw: a new one is drawn as soon as it is there. */
    head() {
        const file = this.about(), name = file?.filename ?? "";
        if (this.wanted !== name || this.since !== this.told) {
            Object.assign(this, { wanted: name, since: this.told });
            loadHead(file).then(async (head) => {
                const found = head ?? (await loadHead());
                if (this.wanted !== name || this.removed) return;
                this.shown = { head: found, own: !!(file && head) };
                this.changed(true);
            });
        }
        return this.shown;
    }

    paint() {
        const { head, own } = this.head() ?? {}, edit = this.edit();
        const side = Math.max(Math.min(this.stage.clientWidth, this.stage.clientHeight), 64);
        const pixels = this.square(side);
        const context = this.canvas.getContext("2d");
        context.clearRect(0, 0, pixels, pixels);
        if (head) {
            context.imageSmoothingQuality = "high";
            context.globalAlpha = own ? 1 : 0.55;
            context.drawImage(this.render(head, edit, Math.min(2 * pixels, LARGEST)), 0, 0, pixels, pixels);
            context.globalAlpha = 1;
        }
        this.tell(head, own, edit);
    }

    /** The head on a canvas of its own, finer than shown for smooth edges. */
    render(head, edit, side) {
        const { drawn } = this;
        if (drawn.width !== side) {
            drawn.width = drawn.height = side;
            this.image = null;
        }
        const context = drawn.getContext("2d");
        this.image ??= context.createImageData(side, side);
        draw(head, edit, side, this.image.data, this.memory);
        context.putImageData(this.image, 0, 0);
        return drawn;
    }

    /** The controls follow the values. */
    tell(head, own, edit) {
        const lacks = own && !head.sliders.length && [...FACE, "gaze_x", "gaze_y"].some((k) => edit[k]);
        const about = lacks ? say("This head has pose and jaw only") : "";
        this.hint.textContent = own ? about : say("Run once to see the face");
        const turn = say(edit.yaw < 0 ? "{n} degrees left" : "{n} degrees right", { n: Math.abs(edit.yaw) });
        const lift = say(edit.pitch < 0 ? "{n} degrees down" : "{n} degrees up", { n: Math.abs(edit.pitch) });
        const tilt = say("tilted {n} degrees", { n: edit.roll });
        this.canvas.setAttribute("aria-valuenow", edit.yaw);
        this.canvas.setAttribute("aria-valuetext", [turn, lift, tilt].join(", "));
        this.reset.hidden = Object.values(edit).every((v) => !v);
        Object.values(EXPRESSIONS).forEach((preset, i) => {
            const same = ["jaw", ...FACE].every((k) => edit[k] === (preset[k] ?? 0));
            this.presets[i].setAttribute("aria-pressed", same);
        });
    }
}

app.registerExtension({
    name: "face_rig.edit_face",
    nodeCreated(node) {
        if (node.comfyClass === "FaceRig_EditFace") node.faceRigHead = new HeadPanel(node);
    },
});
