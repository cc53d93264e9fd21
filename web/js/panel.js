// A panel inside a node: a picture that shows what the node's widgets say, and hands that move them. The values
// live in those widgets alone, so a graph is the same with and without the page. No side effects.
import { app } from "../../../scripts/app.js";

const REST = 400; // ms without a change that end one step for undo
const panels = new Set(); // weakly: the page drops a subgraph's nodes without a word
let prepared = false; // whether the page has what all panels share
let focused = null; // id of the node whose panel had the keyboard when undo made the node anew

export const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
export const round = (v, step) => Number((Math.round(v / step) * step).toFixed(4));
/** Degrees in -180..180. */
export const around = (v) => ((((v + 180) % 360) + 360) % 360) - 180;

/** An element with properties or attributes; `label` is its title and what a screen reader says. */
export function element(tag, { label, ...attributes } = {}, ...children) {
    const made = document.createElement(tag);
    if (label) Object.assign(attributes, { title: attributes.title ?? label, "aria-label": label });
    for (const [name, value] of Object.entries(attributes)) {
        if (name in made) made[name] = value;
        else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
}

export const button = (attributes) => element("button", { type: "button", ...attributes });

/** Once in a page: the style sheet, and a watch for nodes that the page draws anew. */
export function prepare() {
    if (prepared) return;
    prepared = true;
    document.head.append(element("link", { rel: "stylesheet", href: new URL("panel.css", import.meta.url).href }));
    new MutationObserver(mountAll).observe(document.body, { childList: true, subtree: true });
}

function mountAll() {
    for (const weak of panels) {
        const panel = weak.deref();
        if (panel) mount(panel);
        else panels.delete(weak);
    }
}

/** The name of a node in what the page keeps of a run. */
export function locator({ graph, id }) {
    return graph?.isRootGraph === false ? `${graph.id}:${id}` : String(id);
}

/** Nodes 2.0 of frontend 1.27 leaves such panels out: put them below the node's widgets. */
function mount({ node, root }) {
    if (!LiteGraph.vueNodesMode || root.isConnected || node.graph !== app.canvas?.graph) return;
    document.querySelector(`[data-node-id="${node.id}"] .lg-node-widgets`)?.append(root);
}

/**
 * A panel makes `root`, with `canvas` in it, and joins the node. It paints in `paint()` whenever what `seen()`
 * returns is another. `grab(e)` begins a drag with an object of its own, null for none; `move(e)` goes on, with
 * that object in `drag`. `keys(fine)` has what each key does.
 */
export class Panel {
    constructor(node) {
        this.node = node;
    }

    /** Put the panel into the node, below its widgets; height: the least, px. */
    join(name, height) {
        const { node, root } = this;
        prepare();
        for (const widget of node.widgets ?? []) this.follow(widget);
        root.classList.add("face-rig-panel");
        root.style.setProperty("--least", `${height}px`);
        const widget = node.addDOMWidget(name, `face_rig_${name}`, root, {
            serialize: false, getMinHeight: () => height, onDraw: () => this.look(),
        });
        widget.serialize = false; // the option keeps it out of the prompt, this out of the file
        this.chain("onExecuted", (output) => {
            this.told = output;
            this.changed(true);
        });
        this.chain("onConnectionsChange", () => this.changed());
        this.chain("onRemoved", () => this.remove());
        this.listen();
        this.resizing = new ResizeObserver(() => this.changed(true));
        this.resizing.observe(root);
        panels.add((this.weak = new WeakRef(this)));
        const size = node.computeSize();
        node.setSize([Math.max(size[0], 300), size[1]]);
        this.changed();
    }

    /** Act after what the node does already. */
    chain(name, act) {
        const { node } = this, before = node[name];
        node[name] = function (...values) {
            const result = before?.apply(this, values);
            act(...values);
            return result;
        };
    }

    /** Nothing of a removed panel goes on: no drag, no clock, no element in a node that takes its place. */
    remove() {
        this.removed = true;
        panels.delete(this.weak);
        clearTimeout(this.resting);
        this.done();
        this.resizing.disconnect();
        this.root.remove();
    }

    // --- the node's widgets

    widget(name) {
        return this.node.widgets?.find((w) => w.name === name);
    }

    /** Whether a value comes in through a wire. */
    fixed(name) {
        return !!this.node.inputs?.some((i) => (i.widget?.name ?? i.name) === name && i.link != null);
    }

    /** Set a widget as typing does. */
    set(name, value) {
        const widget = this.widget(name);
        if (!widget || this.fixed(name)) return;
        const { min = -Infinity, max = Infinity } = widget.options ?? {};
        const old = widget.value, wanted = clamp(value, min, max);
        if (old === wanted) return;
        widget.value = wanted;
        widget.callback?.(wanted, app.canvas, this.node);
        this.node.onWidgetChanged?.(name, wanted, old, widget);
        this.node.graph?.setDirtyCanvas(true, true);
        this.changed();
    }

    setAll(values) {
        for (const [name, value] of Object.entries(values)) this.set(name, value);
    }

    /** Paint when a widget changes by other hands. */
    follow(widget) {
        const { callback } = widget;
        widget.callback = (...values) => {
            const result = callback?.apply(widget, values);
            this.changed();
            return result;
        };
    }

    /** What the last run gave the page for this node under a name, if there was one. */
    output(name) {
        return (app.nodeOutputs?.[locator(this.node)] ?? this.told)?.[name];
    }

    // --- undo

    /** All changes until `done` are one step for undo. */
    begin() {
        if (this.open) return;
        this.open = true;
        app.canvas.emitBeforeChange?.();
    }

    done() {
        if (!this.open) return;
        this.open = false;
        app.canvas.emitAfterChange?.();
    }

    /** Several values as one step. */
    together(values) {
        this.begin();
        this.setAll(values);
        this.done();
    }

    /** One step when the hand rests: for wheel and keys, which have no end of their own. */
    stepSoon() {
        clearTimeout(this.resting);
        const check = () => app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.();
        this.resting = setTimeout(check, REST);
    }

    /** ComfyUI leaves ctrl+z in an input to the input, which has nothing to undo here. */
    undo(e) {
        const key = e.key.toLowerCase(), back = key === "z" && !e.shiftKey;
        if (!(e.ctrlKey || e.metaKey) || (!back && key !== "y" && key !== "z")) return;
        if (e.target === this.canvas) {
            focused = this.node.id;
            setTimeout(() => { focused = null; }, 1000);
        }
        if (e.target.tagName !== "INPUT") return;
        e.preventDefault();
        app.extensionManager.command.execute(back ? "Comfy.Undo" : "Comfy.Redo");
    }

    // --- hands

    listen() {
        const { canvas, root } = this;
        canvas.addEventListener("pointerdown", (e) => this.press(e));
        canvas.addEventListener("pointermove", (e) => e.pointerId === this.drag?.id && this.move(e));
        for (const end of ["pointerup", "pointercancel", "lostpointercapture"])
            canvas.addEventListener(end, (e) => e.pointerId === this.drag?.id && this.release());
        canvas.addEventListener("keydown", (e) => this.key(e));
        root.addEventListener("keydown", (e) => this.undo(e));
        root.addEventListener("wheel", (e) => this.wheel(e), { passive: false });
        // a middle button moves the graph also over the panel
        for (const what of ["Down", "Move", "Up"])
            root.addEventListener("pointer" + what.toLowerCase(), (e) => {
                if (what === "Move" ? e.buttons & 4 : e.button === 1) app.canvas["processMouse" + what]?.(e);
            });
        // in Nodes 2.0 a drag over the panel would move the node
        for (const event of ["pointerdown", "dblclick"])
            root.addEventListener(event, (e) => e.button !== 1 && e.stopPropagation());
    }

    press(e) {
        const drag = e.button === 0 && !this.drag && this.grab(e);
        if (!drag) return;
        this.canvas.setPointerCapture(e.pointerId);
        this.canvas.focus({ preventScroll: true });
        this.begin();
        this.drag = { id: e.pointerId, ...drag };
        if (drag.jump) this.move(e);
    }

    release() {
        this.drag = null;
        this.done();
    }

    key(e) {
        if (e.ctrlKey || e.metaKey || e.altKey) return;
        const act = this.keys(e.shiftKey)[e.key];
        if (!act) return;
        e.preventDefault();
        e.stopPropagation();
        act();
        this.stepSoon();
    }

    /** The wheel zooms the graph as beside the panel; in Nodes 2.0 the page around passes it on. */
    wheel(e) {
        if (!this.root.closest("[data-node-id]")) app.canvas.processMouseWheel?.(e);
    }

    // --- the picture

    /** Pixels of the canvas for one of the page: as sharp as the screen shows it. */
    scale() {
        return clamp(app.canvas.ds.scale, 1, 2) * devicePixelRatio;
    }

    /** Make the canvas a square of so many px of the page; its own pixels a side. */
    square(side) {
        this.canvas.style.width = this.canvas.style.height = `${side}px`;
        const pixels = Math.round(side * this.scale());
        if (this.canvas.width !== pixels) this.canvas.width = this.canvas.height = pixels;
        return pixels;
    }

    visible() {
        return this.root.isConnected && this.root.offsetParent !== null;
    }

    /** Paint in the next frame of the screen, once; without `always` only what is different. */
    changed(always = false) {
        if (always) this.last = null;
        if (this.waiting) return;
        this.waiting = true;
        requestAnimationFrame(() => {
            this.waiting = false;
            if (this.removed) return;
            mount(this);
            if (this.visible()) this.look(true);
        });
    }

    /** Called whenever the graph is drawn. */
    look(now = false) {
        const seen = this.seen();
        if (seen === this.last) return;
        if (!now) return this.changed();
        this.last = seen;
        this.paint();
        if (focused === this.node.id) this.canvas.focus({ preventScroll: true });
    }
}
