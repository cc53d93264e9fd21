// The light ball of SH Light Edit and Light Orbit: the node's light on a ball or on the photo's head.
import { app } from "../../../scripts/app.js";
import { lampRow, orbitRow } from "./light_controls.js";
import { ballPicture, directionAt, draw, EDGE, headPicture, shaded } from "./light_view.js";
import { around, button, clamp, element, Panel, round } from "./panel.js";
import * as sh from "./sh.js";
import { say } from "./words.js";

const NODES = { FaceRig_SHLightEdit: 262, FaceRig_LightOrbit: 236 }; // least heights of the panel, px
const BESIDE = 44; // px of the stage's width that the ball leaves to the slider of the ambient light
// what stands in a node that lacks the widget
const OTHERWISE = {
    azimuth: 0, elevation: 0, intensity: 1, ambient: 0.25, softness: 0.1, red: 1, green: 1, blue: 1, mix: 1, mode: "",
    frames: 24, start: 0, arc: 0,
};
const ZOOMS = 300; // ms in which a zoom that began elsewhere goes on over the ball
const session = { head: true, wheel: -ZOOMS }; // head or ball where there is a choice; when the wheel last zoomed

class LightBall extends Panel {
    constructor(node) {
        super(node);
        this.orbit = node.comfyClass === "FaceRig_LightOrbit";
        this.angle = this.orbit ? "start" : "azimuth";
        this.frame = 0;
        this.build();
        this.join("light_ball", NODES[node.comfyClass]);
    }

    build() {
        const range = { role: "slider", "aria-valuemin": -180, "aria-valuemax": 180, tabIndex: 0 };
        const hint = say("Drag to aim, beyond the rim to go behind. Wheel: intensity. Shift and drag: softness.");
        const label = say("Direction of the light");
        this.canvas = element("canvas", { className: "face-rig-ball", ...range, label, title: hint });
        const range01 = { type: "range", min: 0, max: 1, step: 0.01 };
        const ambient = { className: "face-rig-fill", label: say("Ambient: light from everywhere") };
        this.fill = element("input", { ...range01, ...ambient });
        this.fill.addEventListener("input", () => this.set("ambient", Number(this.fill.value)));
        this.fill.addEventListener("change", () => this.stepSoon());
        this.view = button({ className: "face-rig-view", hidden: true });
        this.view.addEventListener("click", () => {
            session.head = !session.head;
            app.canvas.setDirty(true, true); // every ball looks
            this.changed();
        });
        this.stage = element("div", { className: "face-rig-stage" }, this.canvas, this.fill, this.view);
        this.row = this.orbit ? orbitRow(this) : lampRow(this);
        this.root = element("div", {}, this.stage, this.row.root);
    }

    remove() {
        this.row.stop?.();
        super.remove();
    }

    // --- the light

    value(name, otherwise = OTHERWISE[name]) {
        const value = this.widget(name)?.value;
        return value === undefined ? otherwise : typeof otherwise === "number" ? Number(value) : value;
    }

    /** All values that the picture depends on. */
    state() {
        const s = Object.fromEntries(Object.keys(OTHERWISE).map((name) => [name, this.value(name)]));
        s.given = this.fixed("light");
        s.fixed = this.fixed(this.angle) && this.fixed("elevation");
        s.frame = clamp(this.frame, 0, s.frames - 1);
        if (this.orbit) s.azimuth = sh.orbitAzimuth(s.frame, s.frames, s.start, s.arc);
        return s;
    }

    /** What the last run told of the photo, of its first face. */
    about() {
        return this.output("face_rig_light")?.[0];
    }

    /** The light that the node will make of the widgets: 27 numbers; null where it comes in unseen. */
    light(s, about) {
        const photo = about?.light ?? sh.MEAN;
        if (s.given && !about?.given) return null;
        const lamp = { ...s, colour: [s.red, s.green, s.blue], raw: s.mode === "raw" };
        const fresh = s.given ? about.given : sh.edit(photo, lamp, about?.mean, about?.std);
        return s.mix === 1 ? fresh : sh.mix(photo, fresh, s.mix);
    }

    // --- hands

    /** Where the pointer is, in radii from the centre, y up. */
    point(e) {
        const { left, top, width, height } = this.canvas.getBoundingClientRect();
        return [EDGE * ((2 * (e.clientX - left)) / width - 1), EDGE * (1 - (2 * (e.clientY - top)) / height)];
    }

    grab(e) {
        const [x, y] = this.point(e);
        if (Math.hypot(x, y) > EDGE || this.fixed("light")) return null;
        this.row.stop?.();
        return e.shiftKey ? { soft: this.value("softness") - (x + y) / 2 } : { jump: true };
    }

    move(e) {
        const [x, y] = this.point(e), { soft } = this.drag;
        if (soft === undefined) this.aim(...sh.toAngles(directionAt(x, y)));
        else this.set("softness", round(clamp(soft + (x + y) / 2, 0, 1), 0.05));
    }

    aim(azimuth, elevation) {
        if (Math.abs(elevation) < 89.5) this.set(this.angle, round(azimuth, 1)); // straight above it is any
        this.set("elevation", round(elevation, 1));
    }

    brighter(steps) {
        this.set("intensity", round(this.value("intensity") + 0.05 * steps, 0.05));
    }

    /** On the ball the wheel is the lamp's; ctrl is zoom everywhere, and a zoom that began elsewhere goes on. */
    wheel(e) {
        const over = e.target === this.canvas && Math.hypot(...this.point(e)) <= 1;
        if (!over || e.ctrlKey || e.metaKey || this.fixed("light") || e.timeStamp - session.wheel < ZOOMS) {
            session.wheel = e.timeStamp;
            return super.wheel(e);
        }
        e.preventDefault();
        e.stopPropagation();
        this.turned = clamp((this.turned ?? 0) - e.deltaY / (e.deltaMode ? 3 : 100), -4, 4);
        const steps = Math.trunc(this.turned); // a touchpad sends parts of one
        if (!steps) return;
        this.turned -= steps;
        this.brighter(steps);
        this.stepSoon();
    }

    keys(fine) {
        if (this.fixed("light")) return {};
        const angle = this.value(this.angle), elevation = this.value("elevation"), by = fine ? 1 : 5;
        const turn = (by) => {
            this.row.stop?.();
            this.set(this.angle, around(angle + by));
        };
        const brighter = () => this.brighter(1);
        return {
            ArrowLeft: () => turn(-by),
            ArrowRight: () => turn(by),
            ArrowUp: () => this.set("elevation", elevation + by),
            ArrowDown: () => this.set("elevation", elevation - by),
            "+": brighter,
            "=": brighter, // the same key without shift
            "-": () => this.brighter(-1),
        };
    }

    // --- the picture

    seen() {
        const look = [this.scale(), session.head, LiteGraph.WIDGET_TEXT_COLOR];
        return JSON.stringify([this.state(), look, this.about()?.light]);
    }

    paint() {
        const s = this.state(), about = this.about();
        const head = this.head(about), light = this.light(s, about);
        const picture = (this.shown = head && session.head ? head : ballPicture());
        this.fit();
        const ink = getComputedStyle(this.root).color.match(/[\d.]+/g)?.slice(0, 3) ?? [200, 200, 200];
        draw(this.canvas, {
            ...s, ink, path: this.path(s), faint: !light, head: picture === head,
            image: shaded(picture, light ?? about?.light ?? sh.MEAN),
            direction: sh.fromAngles(s.azimuth, s.elevation), colour: [s.red, s.green, s.blue],
        });
        this.tell(s, !!head, !light || s.given);
    }

    /** Directions of an orbit's frames. */
    path({ frames, start, arc, elevation }) {
        if (!this.orbit || frames < 2) return [];
        const azimuth = (_, i) => sh.orbitAzimuth(i, frames, start, arc);
        return Array.from({ length: frames }, azimuth).map((a) => sh.fromAngles(a, elevation));
    }

    /** The fitted head to shade, decoded once; null until it is there. */
    head(about) {
        const sheet = about?.sheet;
        if (sheet && sheet !== this.sheet) {
            this.sheet = sheet;
            headPicture(sheet).catch(() => null).then((picture) => {
                if (this.sheet !== sheet) return; // of the run before
                this.picture = picture;
                this.changed(true);
            });
        }
        return (sheet && this.picture) || null;
    }

    fit() {
        const side = Math.max(Math.min(this.stage.clientWidth - BESIDE, this.stage.clientHeight), 64);
        this.fill.style.height = `${Math.round(side * 0.8)}px`;
        this.square(side);
    }

    /** The controls follow the values. */
    tell(s, hasHead, given) {
        const azimuth = Math.round(s.azimuth), elevation = Math.round(s.elevation);
        const side = say(azimuth < 0 ? "{n} degrees left" : "{n} degrees right", { n: Math.abs(azimuth) });
        const up = say(elevation < 0 ? "{n} degrees below" : "{n} degrees above", { n: Math.abs(elevation) });
        this.canvas.setAttribute("aria-valuenow", azimuth);
        this.canvas.setAttribute("aria-valuetext", `${side}, ${up}`);
        this.canvas.setAttribute("aria-disabled", given || s.fixed);
        this.root.classList.toggle("fixed", given || s.fixed);
        this.fill.value = s.ambient;
        this.fill.disabled = given || this.fixed("ambient");
        this.view.hidden = !hasHead;
        this.view.textContent = say(session.head ? "ball" : "head");
        this.view.title = say(session.head ? "Show a grey ball" : "Show the head of the photo");
        this.row.tell(s, given);
    }
}

app.registerExtension({
    name: "face_rig.light_ball",
    setup() {
        const elsewhere = (e) => { if (!e.target.closest?.(".face-rig-ball")) session.wheel = e.timeStamp; };
        window.addEventListener("wheel", elsewhere, { capture: true, passive: true });
    },
    nodeCreated(node) {
        if (!NODES[node.comfyClass]) return;
        const panel = (node.faceRigBall = new LightBall(node));
        // one light or an orbit is what the ball shows: the host's pictures of it are left out
        const { onDrawBackground } = node;
        node.onDrawBackground = function (...values) {
            if (!panel.orbit && panel.output("images")?.length > 1) onDrawBackground?.apply(this, values);
        };
    },
});
