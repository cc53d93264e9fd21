// Colours of our wires: faces warm, lights yellow, pictures of the head blue, networks violet.
import { app } from "../../../scripts/app.js";

const COLOURS = {
    FACE_MODEL: "#b39ddb",
    FACE_CODE: "#e8a27c",
    FACE_LANDMARKS_68: "#7fc8a9",
    FACE_CROP: "#9fb4c4",
    FACE_MOTION: "#5fb8c4",
    FACE_BUFFERS: "#6f9fe0",
    FACE_EMBED: "#d98cb3",
    SH_LIGHT: "#f2c94c",
    IDENTITY_ENCODER: "#b39ddb",
    SHADOW_ESTIMATOR: "#b39ddb",
    FACE_PARSER: "#b39ddb",
};

// A palette blanks the types that it does not know whenever it is chosen, so a blank gives the default back;
// a palette that knows ours wins.
function colour(table, type, otherwise) {
    let own = table[type];
    Object.defineProperty(table, type, {
        configurable: true, enumerable: true, get: () => own || otherwise, set: (value) => { own = value; },
    });
}

app.registerExtension({
    name: "face_rig.colours",
    setup() {
        for (const [type, otherwise] of Object.entries(COLOURS)) {
            colour(app.canvas.default_connection_color_byType, type, otherwise);
            colour(LGraphCanvas.link_type_colors, type, otherwise);
        }
    },
});
