// A fitted head from rig_core/preview_mesh.py: unpack, pose, draw. A pure module, also for node.js.
// Metres; x to the right of the picture, y up, z to the viewer. Angles of an edit are degrees.
// No side effects: ComfyUI imports every .js of a pack, and this one only defines.

import { CONSTANTS } from "./sh.js";

const RADIAN = Math.PI / 180;
const TYPES = { int16: Int16Array, uint16: Uint16Array, uint8: Uint8Array, float32: Float32Array };

/** A file of preview_mesh.pack, an ArrayBuffer, as typed arrays. Throws an Error for another file. */
export async function unpack(file) {
    const stream = new Blob([file]).stream().pipeThrough(new DecompressionStream("deflate"));
    const all = await new Response(stream).arrayBuffer();
    const size = new DataView(all).getUint32(0, true);
    const { arrays, ...head } = JSON.parse(new TextDecoder().decode(new Uint8Array(all, 4, size)));
    if (head.format !== 1) throw new Error(`a head of format ${head.format}, wanted 1`);
    const data = all.slice(4 + size);
    head.fields = {};
    for (const [name, a] of Object.entries(arrays)) {
        const size = a.shape.reduce((n, k) => n * k, 1);
        if (a.type === "field") {
            head.fields[name] = field(new Uint8Array(data, a.offset, size), a.count, a.scale);
            continue;
        }
        const type = TYPES[a.type];
        const stored = new type(data.slice(a.offset, a.offset + size * type.BYTES_PER_ELEMENT));
        const width = a.shape[1] ?? 1;
        const plain = a.scale === 1;
        head[name] = plain ? stored : Float32Array.from(stored, (v, i) => v * a.scale + (a.origin?.[i % width] ?? 0));
    }
    head.count = head.rest.length / 3;
    head.start = head.centre && centre(head, pose(head, {}));
    return head;
}

/** Which vertices move at 1, and where to: { index [N], offset [3N] }. */
function field(bytes, count, scale) {
    const index = [];
    for (let i = 0; i < count; i++) if (bytes[i >> 3] & (128 >> (i & 7))) index.push(i);
    const stored = new Int8Array(bytes.buffer, bytes.byteOffset + Math.ceil(count / 8), 3 * index.length);
    return { index: Uint16Array.from(index), offset: Float32Array.from(stored, v => v * scale) };
}

/** Rodrigues' formula: a rotation vector in radians -> nine numbers, row by row. */
export function rotation([x, y, z]) {
    const angle = Math.hypot(x, y, z);
    const a = angle < 1e-6 ? 1 : Math.sin(angle) / angle;
    const b = angle < 1e-6 ? 0.5 : (1 - Math.cos(angle)) / angle ** 2;
    return [
        1 - b * (y * y + z * z), b * x * y - a * z, b * x * z + a * y,
        b * x * y + a * z, 1 - b * (x * x + z * z), b * y * z - a * x,
        b * x * z - a * y, b * y * z + a * x, 1 - b * (x * x + y * y),
    ];
}

function times(a, b) {
    const c = [];
    for (let i = 0; i < 9; i += 3)
        for (let k = 0; k < 3; k++) c.push(a[i] * b[k] + a[i + 1] * b[k + 3] + a[i + 2] * b[k + 6]);
    return c;
}

function add(x, { index, offset }, weight) {
    if (!weight) return;
    for (let n = 0, k = 0; n < index.length; n++) {
        const i = 3 * index[n];
        x[i] += weight * offset[k++];
        x[i + 1] += weight * offset[k++];
        x[i + 2] += weight * offset[k++];
    }
}

/** Turn vertices about a joint, each by its weight 0..1. */
function turn(x, r, [jx, jy, jz], weight) {
    for (let v = 0, i = 0; v < weight.length; v++, i += 3) {
        const w = weight[v];
        if (!w) continue;
        const a = x[i] - jx, b = x[i + 1] - jy, c = x[i + 2] - jz;
        x[i] += w * (r[0] * a + r[1] * b + r[2] * c - a);
        x[i + 1] += w * (r[3] * a + r[4] * b + r[5] * c - b);
        x[i + 2] += w * (r[6] * a + r[7] * b + r[8] * c - c);
    }
}

/** Vertices [3V] under an edit: what pipeline.turn and HeadModel.verts make of it. */
export function pose(head, edit, x = new Float32Array(head.rest.length)) {
    const { fields } = head;
    x.set(head.rest);
    for (const name of head.sliders) add(x, fields[`slider.${name}`], edit[name] ?? 0);
    jaw(head, x, (edit.jaw ?? 0) * RADIAN);
    if (head.eyes) gaze(head, x, (edit.gaze_x ?? 0) * RADIAN, (edit.gaze_y ?? 0) * RADIAN);

    const [yaw, pitch, roll] = ["yaw", "pitch", "roll"].map(k => (edit[k] ?? 0) * RADIAN);
    const step = times(rotation([0, 0, roll]), times(rotation([0, yaw, 0]), rotation([-pitch, 0, 0])));
    const r = times(step, rotation(head.pose.slice(0, 3)));
    const [px, py, pz] = head.pivot;
    for (let i = 0; i < x.length; i += 3) {
        const a = x[i] - px, b = x[i + 1] - py, c = x[i + 2] - pz;
        x[i] = px + r[0] * a + r[1] * b + r[2] * c;
        x[i + 1] = py + r[3] * a + r[4] * b + r[5] * c;
        x[i + 2] = pz + r[6] * a + r[7] * b + r[8] * c;
    }
    if (head.start) recentre(head, x);
    return x;
}

function jaw(head, x, open) {
    const [a, b, c] = head.pose.slice(3, 6);
    const r = rotation([a + open, b, c]);
    const correct = () => {
        add(x, head.fields.sin, (r[7] - r[5]) / 2);
        if (head.fields.cos) add(x, head.fields.cos, (r[4] + r[8]) / 2 - 1);
    }
    if (head.early) correct();
    turn(x, r, head.joint, head.jaw);
    if (!head.early) correct();
}

/** The lids follow, the eyeballs turn about their centres. */
function gaze(head, x, right, up) {
    right += head.pose[6];
    up += head.pose[7];
    const lids = { up, down: -up, right, left: -right };
    for (const [name, angle] of Object.entries(lids)) add(x, head.fields[`lids.${name}`], Math.max(angle, 0));
    const r = times(rotation([0, right, 0]), rotation([-up, 0, 0]));
    for (const eye of [1, 2]) {
        head.eyeballs ??= [1, 2].map(e => Uint8Array.from(head.eyes, v => (v === e ? 1 : 0)));
        turn(x, r, head.centres[eye - 1], head.eyeballs[eye - 1]);
    }
}

function centre(head, x) {
    let a = 0, b = 0;
    for (let v = 0; v < head.centre.length; v++) {
        const w = head.centre[v];
        if (w) (a += w * x[3 * v]), (b += w * x[3 * v + 1]);
    }
    return [a, b];
}

/** The face stays where the fitted one is in the picture, as FLAME's does. */
function recentre(head, x) {
    const [a, b] = centre(head, x);
    for (let i = 0; i < x.length; i += 3) {
        x[i] += head.start[0] - a;
        x[i + 1] += head.start[1] - b;
    }
}

/** Unit normals [3V]: the mean of the faces', weighted by area. */
export function normals(x, faces, n = new Float32Array(x.length)) {
    n.fill(0);
    for (let f = 0; f < faces.length; f += 3) {
        const i = 3 * faces[f], j = 3 * faces[f + 1], k = 3 * faces[f + 2];
        const ax = x[j] - x[i], ay = x[j + 1] - x[i + 1], az = x[j + 2] - x[i + 2];
        const bx = x[k] - x[i], by = x[k + 1] - x[i + 1], bz = x[k + 2] - x[i + 2];
        const cx = ay * bz - az * by, cy = az * bx - ax * bz, cz = ax * by - ay * bx;
        n[i] += cx, n[i + 1] += cy, n[i + 2] += cz;
        n[j] += cx, n[j + 1] += cy, n[j + 2] += cz;
        n[k] += cx, n[k + 1] += cy, n[k + 2] += cz;
    }
    for (let i = 0; i < n.length; i += 3) {
        const length = Math.hypot(n[i], n[i + 1], n[i + 2]) || 1;
        n[i] /= length, n[i + 1] /= length, n[i + 2] /= length;
    }
    return n;
}

/** Pixels [3V] of a square picture: x to the right, y down, and the depth, nearer is less. */
export function project(head, x, side, out = new Float32Array(x.length)) {
    const [a, b, c, d, e, f] = head.camera;
    const half = side / 2;
    for (let i = 0; i < x.length; i += 3) {
        out[i] = (a * x[i] + b * x[i + 1] + c + 1) * half;
        out[i + 1] = (d * x[i] + e * x[i + 1] + f + 1) * half;
        out[i + 2] = -x[i + 2];
    }
    return out;
}

/** Draw triangles with colours at their corners [3V], 0..255, into a square RGBA picture, cleared before.
 *  pixels: Uint8ClampedArray [4 side side]; depth: Float32Array [side side], a memory to use again. */
export function raster(points, faces, colours, side, pixels, depth) {
    pixels.fill(0);
    depth.fill(Infinity);
    for (let f = 0; f < faces.length; f += 3) {
        const i = 3 * faces[f], j = 3 * faces[f + 1], k = 3 * faces[f + 2];
        const x0 = points[i], y0 = points[i + 1], x1 = points[j], y1 = points[j + 1];
        const x2 = points[k], y2 = points[k + 1];
        const area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0);
        if (Math.abs(area) < 1e-9) continue;
        const left = Math.max(0, Math.ceil(Math.min(x0, x1, x2) - 0.5));
        const right = Math.min(side - 1, Math.floor(Math.max(x0, x1, x2) - 0.5));
        const top = Math.max(0, Math.ceil(Math.min(y0, y1, y2) - 0.5));
        const bottom = Math.min(side - 1, Math.floor(Math.max(y0, y1, y2) - 0.5));
        // weights of the second and the third corner at a pixel, and their steps
        const ux = (y2 - y0) / area, uy = (x0 - x2) / area, vx = (y0 - y1) / area, vy = (x1 - x0) / area;
        const z0 = points[i + 2], dz1 = points[j + 2] - z0, dz2 = points[k + 2] - z0;
        for (let y = top; y <= bottom; y++) {
            let u = (left + 0.5 - x0) * ux + (y + 0.5 - y0) * uy;
            let v = (left + 0.5 - x0) * vx + (y + 0.5 - y0) * vy;
            for (let at = y * side + left, end = y * side + right; at <= end; at++, u += ux, v += vx) {
                if (u < -1e-6 || v < -1e-6 || u + v > 1.000001) continue;
                const z = z0 + u * dz1 + v * dz2;
                if (z >= depth[at]) continue;
                depth[at] = z;
                const w = 1 - u - v, p = 4 * at;
                pixels[p] = w * colours[i] + u * colours[j] + v * colours[k];
                pixels[p + 1] = w * colours[i + 1] + u * colours[j + 1] + v * colours[k + 1];
                pixels[p + 2] = w * colours[i + 2] + u * colours[j + 2] + v * colours[k + 2];
                pixels[p + 3] = 255;
            }
        }
    }
}

/** Colours [3V], 0..255: shading (see sh.js, not clipped) x albedo. */
export function colours(n, albedo, light, out = new Float32Array(n.length)) {
    const l = Float32Array.from(light, (v, i) => 255 * v * CONSTANTS[Math.floor(i / 3)]);
    for (let i = 0; i < n.length; i += 3) {
        const x = n[i], y = n[i + 1], z = n[i + 2];
        const xy = x * y, xz = x * z, yz = y * z, d = x * x - y * y, zz = 3 * z * z - 1;
        for (let c = 0; c < 3; c++) {
            const s = l[c] + x * l[c + 3] + y * l[c + 6] + z * l[c + 9] + xy * l[c + 12] + xz * l[c + 15] +
                yz * l[c + 18] + d * l[c + 21] + zz * l[c + 24];
            out[i + c] = Math.min(Math.max(s * albedo[i + c], 0), 255);
        }
    }
    return out;
}

/** Draw the head under an edit into a square RGBA picture, alpha 0 around it.
 *  edit: degrees and weights by name; memory: an object that keeps arrays for the next picture. */
export function draw(head, edit, side, pixels, memory = {}) {
    if (memory.head !== head) Object.assign(memory, { head, x: undefined, n: undefined, p: undefined, c: undefined });
    if (memory.side !== side) Object.assign(memory, { side, depth: new Float32Array(side * side) });
    memory.x = pose(head, edit, memory.x);
    memory.n = normals(memory.x, head.faces, memory.n);
    memory.p = project(head, memory.x, side, memory.p);
    memory.c = colours(memory.n, head.albedo, head.light, memory.c);
    raster(memory.p, head.faces, memory.c, side, pixels, memory.depth);
}
