// What a node of ours has made, shown in it: the pictures where the page would keep the last preview on the way
// there, and the text, which the page (frontend 1.27) does not draw by itself.
import { app } from "../../../scripts/app.js";
import { element, locator, prepare } from "./panel.js";
import { say } from "./words.js";

/** Pictures: the preview goes, so that the page draws what the node gave. */
function picture(node) {
    const place = locator(node), previews = app.nodePreviewImages?.[place] ?? [];
    setTimeout(() => previews.forEach((url) => URL.revokeObjectURL(url)), 1000); // after the last drawing of them
    delete app.nodePreviewImages?.[place];
    node.images = node.imgs = undefined;
    for (const widget of [...(node.widgets ?? [])]) {
        if (widget.name.startsWith("$$")) node.removeWidget(widget); // the page's own, for pictures
    }
}

/** Text: a field below the widgets, to read and to copy from. It is no value of the graph. */
function text(node, lines) {
    let shown = node.widgets?.find((widget) => widget.name === "face_rig_text");
    if (!shown) {
        prepare();
        const field = element("pre", { className: "face-rig-text", tabIndex: 0, label: say("Result") });
        const height = lines.join("\n").includes("\n") ? 140 : 36;
        shown = node.addDOMWidget("face_rig_text", "face_rig_text", field, {
            serialize: false, hideOnZoom: false, getMinHeight: () => height,
        });
        shown.serialize = false;
        node.setSize([Math.max(node.size[0], height > 36 ? 420 : 0), Math.max(node.size[1], node.computeSize()[1])]);
    }
    shown.element.textContent = lines.join("\n");
}

function tell(node, output) {
    if (output?.text) text(node, [output.text].flat().map(String));
}

app.registerExtension({
    name: "face_rig.results",
    beforeRegisterNodeDef(nodeType, nodeData) {
        if (!nodeData.name.startsWith("FaceRig_")) return;
        const before = nodeType.prototype.onExecuted;
        nodeType.prototype.onExecuted = function (output) {
            before?.call(this, output);
            if (output?.images) picture(this);
            tell(this, output);
        };
    },
    loadedGraphNode(node) { // after undo or another tab: what the page remembers of the last run
        if (node.comfyClass?.startsWith("FaceRig_")) tell(node, app.nodeOutputs?.[locator(node)]);
    },
});
