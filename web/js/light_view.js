// The picture of the light ball: where the pointer aims, and how ball, head and lamp are drawn. No side effects.
import * as sh from "./sh.js";

export const EDGE = 1.45; // half the canvas in radii of the ball
const BEHIND = 1.38; // where a light from straight behind is shown, in radii
const BALL = 160; // px of the shaded ball, drawn larger or smaller
const ALBEDO = 0.5; // of the ball, as the node's own
const HEAD = 2.6; // side of the head's picture in radii

/** Unit direction of a point in radii from the centre, y up: on the ball the lit point, beyond its rim behind. */
export function directionAt(x, y) {
    const far = Math.hypot(x, y);
    if (far <= 1) return [x, y, Math.sqrt(1 - far * far)];
    const near = Math.max(1 - (far - 1) / (BEHIND - 1), 0);
    return [(x / far) * near, (y / far) * near, -Math.sqrt(1 - near * near)];
}

/** The inverse of directionAt: [x, y]. */
export function placeOf([x, y, z]) {
    const near = Math.hypot(x, y);
    if (z >= 0) return [x, y];
    const far = 1 + (1 - near) * (BEHIND - 1);
    return near > 1e-9 ? [(x / near) * far, (y / near) * far] : [0, far];
}

/** Linear to #rrggbb, the strongest of the three at full. */
export function toHex(colour) {
    const most = Math.max(...colour, 1e-6);
    return "#" + colour.map((v) =>
        Math.round(255 * (v / most) ** (1 / 2.2)).toString(16).padStart(2, "0")).join("");
}

/** #rrggbb to linear with the strongest at 1, two decimals; black is no colour and gives white. */
export function fromHex(hex) {
    const linear = [1, 3, 5].map((i) => (parseInt(hex.slice(i, i + 2), 16) / 255) ** 2.2);
    const most = Math.max(...linear);
    return linear.map((v) => (most ? Math.round((100 * v) / most) / 100 : 1));
}

let ball;
/** What to shade: {size, basis, albedo, cover} of the grey ball. */
export function ballPicture() {
    if (!ball) {
        const { normals, cover } = sh.ball(BALL);
        ball = { size: BALL, basis: sh.basisOf(normals), albedo: ALBEDO, cover };
    }
    return ball;
}

/** The same of a head, from the sheet that the node sends: normals, albedo and mask below each other. */
export async function headPicture(sheet) {
    const image = new Image();
    image.src = sheet;
    await image.decode();
    const size = image.width, n = size * size;
    const canvas = new OffscreenCanvas(size, 3 * size);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const rgba = context.getImageData(0, 0, size, 3 * size).data;
    const normals = new Float32Array(3 * n), albedo = new Float32Array(3 * n), cover = new Float32Array(n);
    for (let i = 0; i < n; i++) {
        const v = [0, 1, 2].map((c) => rgba[4 * i + c] / 127.5 - 1), length = Math.hypot(...v) || 1;
        for (let c = 0; c < 3; c++) {
            normals[3 * i + c] = v[c] / length;
            albedo[3 * i + c] = rgba[4 * (i + n) + c] / 255;
        }
        cover[i] = rgba[4 * (i + 2 * n)] / 255;
    }
    return { size, basis: sh.basisOf(normals), albedo, cover };
}

/** Shade a picture under a light into a canvas of its own, which is returned and used again. */
export function shaded(picture, light) {
    const { size } = picture;
    picture.canvas ??= new OffscreenCanvas(size, size);
    const context = picture.canvas.getContext("2d");
    picture.image ??= context.createImageData(size, size);
    sh.paint(picture.image.data, picture.basis, picture.albedo, picture.cover, light);
    context.putImageData(picture.image, 0, 0);
    return picture.canvas;
}

/**
 * Draw everything into a square canvas.
 * shown: {image, head, ink, direction, softness, intensity, colour, path, fixed, faint}; path: directions of
 * an orbit, ink: [r, g, b] of the text.
 */
export function draw(canvas, shown) {
    const context = canvas.getContext("2d"), half = canvas.width / 2, r = half / EDGE;
    const ink = (alpha) => `rgba(${shown.ink.join(",")},${alpha})`;
    const px = r / 70; // line widths grow with the ball
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.setTransform(1, 0, 0, 1, half, half);
    context.imageSmoothingQuality = "high";
    circle(context, 0, 0, r * BEHIND);
    context.fillStyle = ink(0.05);
    context.fill();
    circle(context, 0, 0, r);
    context.strokeStyle = ink(0.25);
    context.lineWidth = px;
    context.stroke();
    context.globalAlpha = shown.faint ? 0.45 : 1;
    const side = shown.head ? HEAD * r : 2 * r;
    context.drawImage(shown.image, -side / 2, -side / 2, side, side);
    context.globalAlpha = 1;
    for (const d of shown.path ?? []) {
        const [x, y] = placeOf(d);
        circle(context, x * r, -y * r, 1.6 * px);
        context.fillStyle = ink(d[2] < 0 ? 0.35 : 0.8);
        context.fill();
    }
    if (!shown.faint) lamp(context, shown, r, px, ink);
}

// the lamp: a disc in its colour that grows with softness, an arc around it for the intensity, an outline
// alone behind the head
function lamp(context, { direction, softness, intensity, colour, fixed }, r, px, ink) {
    const [x, y] = placeOf(direction).map((v, i) => (i ? -v : v) * r);
    const size = (4.5 + 6 * softness) * px, front = direction[2] >= 0;
    circle(context, x, y, size + 2.8 * px);
    context.fillStyle = "rgba(0,0,0,0.45)";
    context.fill();
    circle(context, x, y, size);
    context.lineWidth = 1.6 * px;
    context.strokeStyle = context.fillStyle = fixed ? ink(0.5) : toHex(colour);
    if (front && !fixed) context.fill();
    else context.stroke();
    context.beginPath();
    context.arc(x, y, size + 2.8 * px, -Math.PI / 2, -Math.PI / 2 + (Math.min(intensity, 4) / 4) * 2 * Math.PI);
    context.stroke();
}

function circle(context, x, y, radius) {
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
}
