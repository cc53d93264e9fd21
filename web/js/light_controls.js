// The controls below the light ball. Each function makes a row for a LightBall and returns {root, tell};
// tell(state, given) lets the row follow the node's values. No side effects.
import { button, clamp, element } from "./panel.js";
import { fromHex, toHex } from "./light_view.js";
import { COLOURS, PRESETS, SOFTNESS } from "./presets.js";
import { say } from "./words.js";

const RATE = 12; // frames a second of an orbit that plays

/** A list of lamps by name that sets all values of one at once; `tell(values)` shows which one they are. */
function presetList(panel, label, lamps) {
    const list = element("select", { label });
    list.append(element("option", { value: "", hidden: true, disabled: true }, say("preset")));
    for (const name of Object.keys(lamps)) list.append(element("option", { value: name }, say(name)));
    list.addEventListener("change", () => panel.together(lamps[list.value]));
    const is = (values) => ([, lamp]) => Object.entries(lamp).every(([k, v]) => v === values[k]);
    const tell = (values) => { list.value = Object.entries(lamps).find(is(values))?.[0] ?? ""; };
    return { list, tell };
}

/** Swatches of usual lamps, and any colour. */
function colourPicker(panel) {
    const swatches = Object.entries(COLOURS).map(([name, [red, green, blue]]) => {
        const swatch = button({ className: "face-rig-swatch", label: say("Colour: {name}", { name: say(name) }) });
        swatch.style.background = toHex([red, green, blue]);
        swatch.addEventListener("click", () => panel.together({ red, green, blue }));
        return swatch;
    });
    const any = element("input", { type: "color", className: "face-rig-swatch", label: say("Colour of the lamp") });
    any.addEventListener("input", () => {
        panel.begin(); // until the picker is closed
        const [red, green, blue] = fromHex(any.value);
        panel.setAll({ red, green, blue });
    });
    for (const end of ["change", "blur"])
        any.addEventListener(end, () => {
            panel.done();
            panel.changed(true);
        });
    const root = element("div", { className: "face-rig-colours" }, ...swatches, any);
    const tell = (s) => {
        if (!panel.open) any.value = toHex([s.red, s.green, s.blue]); // else the open picker would jump
    };
    return { root, tell };
}

/** Presets and colours, for SH Light Edit. */
export function lampRow(panel) {
    const lamps = Object.fromEntries(Object.entries(PRESETS).map(([name, { colour, ...lamp }]) => {
        const [red, green, blue] = colour;
        return [name, { ...lamp, red, green, blue }];
    }));
    const presets = presetList(panel, say("Lights by name"), lamps), colours = colourPicker(panel);
    const root = element("div", { className: "face-rig-foot" }, presets.list, colours.root);
    const tell = (s, given) => {
        presets.tell(s);
        colours.tell(s);
        for (const control of [presets.list, ...colours.root.children]) control.disabled = given;
    };
    return { root, tell };
}

/** Play, scrub, softness and colours, for Light Orbit. stop() goes back to its first frame. */
export function orbitRow(panel) {
    let playing = false;
    const show = (frame) => {
        panel.frame = frame;
        panel.changed();
    };
    const pause = () => {
        playing = false;
        panel.changed(true);
    };
    const start = () => {
        playing = true;
        const from = performance.now() - (1000 * panel.frame) / RATE;
        const step = (now) => {
            if (!playing || !panel.visible()) return pause();
            const frame = Math.floor((RATE * (now - from)) / 1000) % panel.value("frames", 1);
            if (frame !== panel.frame) show(frame);
            requestAnimationFrame(step);
        };
        requestAnimationFrame(step);
        panel.changed(true);
    };
    const play = button({ className: "face-rig-play" });
    play.addEventListener("click", () => (playing ? pause() : start()));
    const range = { type: "range", min: 0, step: 1, className: "face-rig-scrub" };
    const scrub = element("input", { ...range, label: say("Frame of the orbit") });
    const scrubTo = (frame) => {
        playing = false;
        show(clamp(Math.round(frame), 0, Number(scrub.max)));
    };
    scrub.addEventListener("input", () => scrubTo(Number(scrub.value)));
    scrub.addEventListener("pointermove", (e) => {
        const { left, width } = scrub.getBoundingClientRect();
        scrubTo(((e.clientX - left) / width) * scrub.max);
    });
    const number = element("span", { className: "face-rig-number" });
    const presets = presetList(panel, say("Hard or soft"), SOFTNESS);

    const colours = colourPicker(panel);
    const root = element("div", { className: "face-rig-foot" }, play, scrub, number, presets.list, colours.root);
    const tell = (s) => {
        colours.tell(s);
        scrub.max = s.frames - 1;
        scrub.value = s.frame;
        number.textContent = `${s.frame + 1} / ${s.frames}`;
        play.textContent = playing ? "❚❚" : "▶";
        play.title = say(playing ? "Pause" : "Play the orbit");
        presets.tell(s);
    };
    const stop = () => {
        playing = false;
        show(0);
    };
    return { root, tell, stop };
}
