// Light as spherical harmonics, as rig_core/sh.py and rig_core/light_prior.py have it. No side effects:
// ComfyUI imports every .js of a pack, and this one only defines.
//
// A light is 27 numbers, nine coefficients of red, green and blue: light[3 * k + c]. The basis is DECA's:
// 1, x, y, z, xy, xz, yz, x²-y², 3z²-1; x to the right of the picture, y up, z to the viewer.
// Directions point to the source. Shading is in display space; physical light is linear.

const Y0 = Math.sqrt(1 / (4 * Math.PI)), Y1 = Math.sqrt(3 / (4 * Math.PI)), Y2 = Math.sqrt(15 / (4 * Math.PI));
const Y = [Y0, Y1, Y1, Y1, Y2, Y2, Y2, Y2 / 2, Y2 / Math.sqrt(12)];
const BAND = [1, ...Array(3).fill((2 * Math.PI) / 3), ...Array(5).fill(Math.PI / 4)];
export const CONSTANTS = Y.map((y, k) => y * BAND[k]);
const LUMINANCE = [0.2126, 0.7152, 0.0722];

// What is known of the lights before a first run: those of the open head, grey.
const grey = (values) => Float64Array.from({ length: 27 }, (_, i) => values[Math.floor(i / 3)]);
export const MEAN = grey([2.66, 0, 0.13, 0.12, 0, 0, 0.08, 0.05, 0.04]);
export const STD = grey([0.57, 0.24, 0.17, 0.18, 0.12, 0.14, 0.18, 0.14, 0.2]);

/** The nine basis functions at a unit normal, constants included: shading = basis . light. */
export function basis(x, y, z) {
    return [1, x, y, z, x * y, x * z, y * z, x * x - y * y, 3 * z * z - 1].map((t, k) => t * CONSTANTS[k]);
}

/** Shading [r, g, b] of a normal, not clipped. */
export function shade(x, y, z, light) {
    const b = basis(x, y, z);
    return [0, 1, 2].map((c) => b.reduce((sum, v, k) => sum + v * light[3 * k + c], 0));
}

/** Degrees to a unit direction: azimuth 0 the camera's side, 90 the right of the picture; elevation 90 above. */
export function fromAngles(azimuth, elevation) {
    const a = (azimuth * Math.PI) / 180, e = (elevation * Math.PI) / 180;
    return [Math.sin(a) * Math.cos(e), Math.sin(e), Math.cos(a) * Math.cos(e)];
}

/** The inverse of fromAngles: [azimuth, elevation] in degrees. */
export function toAngles([x, y, z]) {
    return [(Math.atan2(x, z) * 180) / Math.PI, (Math.asin(Math.max(-1, Math.min(1, y))) * 180) / Math.PI];
}

/** Physical light of one distant source, linear: see sh.from_direction. ambient: a number. */
export function fromDirection(d, intensity = 1, colour = [1, 1, 1], softness = 0, ambient = 0) {
    const cos = Math.cos((softness * Math.PI) / 2);
    const soft = [1, (1 + cos) / 2, (cos * (1 + cos)) / 2]; // a spherical cap's zonal coefficients
    const b = basis(...d);
    const light = new Float64Array(27);
    for (let k = 0; k < 9; k++) {
        const band = k === 0 ? 0 : k < 4 ? 1 : 2;
        const lamp = b[k] * (k === 0 ? Math.PI : 1 / BAND[k]) * soft[band];
        for (let c = 0; c < 3; c++) light[3 * k + c] = lamp * intensity * colour[c] + (k === 0 ? ambient / Y0 : 0);
    }
    return light;
}

/** n nearly even unit directions, [3n]. */
function fibonacci(n) {
    const points = new Float64Array(3 * n);
    for (let i = 0; i < n; i++) {
        const z = 1 - (2 * i + 1) / n, s = Math.sqrt(1 - z * z), phi = i * Math.PI * (3 - Math.sqrt(5));
        points.set([s * Math.cos(phi), s * Math.sin(phi), z], 3 * i);
    }
    return points;
}

/** The basis at n directions, those with z >= 0 only where asked for: [9m]. */
function basisOver(n, front = false) {
    const points = fibonacci(n), rows = [];
    for (let i = 0; i < n; i++)
        if (!front || points[3 * i + 2] >= 0) rows.push(...basis(points[3 * i], points[3 * i + 1], points[3 * i + 2]));
    return Float64Array.from(rows);
}

/** Inverse of a symmetric positive 9x9 matrix, Gauss-Jordan. */
function inverse9(m) {
    const a = Array.from({ length: 9 }, (_, i) =>
        Array.from({ length: 18 }, (_, j) => (j < 9 ? m[9 * i + j] : +(j - 9 === i))));
    for (let i = 0; i < 9; i++) {
        const pivot = a[i][i];
        for (let j = 0; j < 18; j++) a[i][j] /= pivot;
        for (let r = 0; r < 9; r++) {
            if (r === i) continue;
            const f = a[r][i];
            for (let j = 0; j < 18; j++) a[r][j] -= f * a[i][j];
        }
    }
    return Float64Array.from(a.flatMap((row) => row.slice(9)));
}

let sphere; // made at first use: the module is imported with every page
function projection() {
    if (!sphere) {
        const b = basisOver(1024), gram = new Float64Array(81);
        for (let i = 0; i < b.length; i += 9)
            for (let j = 0; j < 9; j++) for (let k = 0; k < 9; k++) gram[9 * j + k] += b[i + j] * b[i + k];
        sphere = { b, inverse: inverse9(gram) };
    }
    return sphere;
}

/** Linear light to display space: max(E, 0)^(1/2.2) projected over the sphere, see sh.encode_light. */
export function encodeLight(light) {
    const { b, inverse } = projection();
    const moment = new Float64Array(27), out = new Float64Array(27);
    for (let i = 0; i < b.length; i += 9)
        for (let c = 0; c < 3; c++) {
            let e = 0;
            for (let k = 0; k < 9; k++) e += b[i + k] * light[3 * k + c];
            const v = Math.max(e, 0) ** (1 / 2.2);
            for (let k = 0; k < 9; k++) moment[3 * k + c] += b[i + k] * v;
        }
    for (let j = 0; j < 9; j++)
        for (let k = 0; k < 9; k++) for (let c = 0; c < 3; c++) out[3 * j + c] += inverse[9 * j + k] * moment[3 * k + c];
    return out;
}

/** Lights a to b at w, 0 gives a. */
export function mix(a, b, w) {
    return Float64Array.from(a, (v, i) => v + w * (b[i] - v));
}

const clamp = (v, low, high) => Math.min(Math.max(v, low), high);
const luminance = (light) => LUMINANCE.reduce((sum, weight, c) => sum + weight * light[c], 0); // of the constants

// light_prior._base: the prior's mean with a constant term within zMax of its own; hue goes before level
function base(constant, mean, std, zMax) {
    const wanted = constant.map((v) => Math.max(v, 1e-3));
    const low = wanted.map((_, c) => Math.max(mean[c] - zMax * std[c], 1e-3));
    const high = wanted.map((_, c) => mean[c] + zMax * std[c]);
    const least = Math.max(...wanted.map((v, c) => low[c] / v));
    const most = Math.min(...wanted.map((v, c) => high[c] / v));
    const level = least > most ? Math.sqrt(least * most) : Math.min(most, Math.max(least, 1));
    const out = Float64Array.from(mean);
    wanted.forEach((v, c) => { out[c] = clamp(v * level, low[c], high[c]); });
    return out;
}

let front;
// light_prior._bounded: start + wanted, each band shrunk to |z| <= zMax, then all until the shading of
// visible normals >= floor
function bounded(start, wanted, std, zMax, floor) {
    const most = (from, to) => {
        let z = 1e-6;
        for (let i = 3 * from; i < 3 * to; i++) z = Math.max(z, Math.abs(wanted[i]) / std[i]);
        return Math.min(zMax / z, 1);
    };
    const band1 = most(1, 4), band2 = Math.min(band1, most(4, 9));
    const change = wanted.map((v, i) => v * (i < 3 ? 1 : i < 12 ? band1 : band2));
    front ??= basisOver(512, true);
    let share = 1;
    for (let i = 0; i < front.length; i += 9)
        for (let c = 0; c < 3; c++) {
            let room = -floor, less = 0;
            for (let k = 0; k < 9; k++) {
                room += front[i + k] * start[3 * k + c];
                less -= front[i + k] * change[3 * k + c];
            }
            if (less > 0) share = Math.min(share, Math.max(room, 0) / Math.max(less, 1e-9));
        }
    return change.map((v, i) => start[i] + share * v);
}

/**
 * The light that SH Light Edit and Light Orbit make, see light_prior.edit.
 * lamp: {azimuth, elevation, intensity, ambient, colour, softness, raw}; mean, std: the prior, 27 numbers each.
 */
export function edit(light, lamp, mean = MEAN, std = STD, zMax = 2.5) {
    const { azimuth, elevation, intensity = 1, ambient = 0.25, colour = [1, 1, 1], softness = 0.1, raw } = lamp;
    const d = fromAngles(azimuth, elevation);
    const target = encodeLight(fromDirection(d, intensity, colour, softness, ambient));
    if (raw) return target;
    const reference = encodeLight(fromDirection(d, 1, [1, 1, 1], softness, 0.25));
    const start = base([0, 1, 2].map((c) => (light[c] * target[c]) / reference[c]), mean, std, zMax);
    const gain = luminance(start) / luminance(target);
    return bounded(start, target.map((v, i) => (i < 3 ? 0 : v * gain)), std, zMax, 0.03);
}

/** Azimuth of frame i of an orbit, degrees, see light_prior.orbit. */
export function orbitAzimuth(i, frames, start, arc) {
    return start + (arc * i) / (Math.abs(arc) === 360 ? frames : Math.max(frames - 1, 1));
}

/** The basis of a normal map once, to shade it often: normals [3n] -> [9n]. */
export function basisOf(normals) {
    const out = new Float32Array(normals.length * 3);
    for (let i = 0; i < normals.length / 3; i++)
        out.set(basis(normals[3 * i], normals[3 * i + 1], normals[3 * i + 2]), 9 * i);
    return out;
}

/** Normals [3n] and cover [n] 0..1 of a ball that fills size x size pixels, soft at its rim. */
export function ball(size) {
    const normals = new Float32Array(3 * size * size), cover = new Float32Array(size * size);
    for (let r = 0; r < size; r++)
        for (let c = 0; c < size; c++) {
            let x = (2 * c + 1) / size - 1, y = 1 - (2 * r + 1) / size;
            const far = Math.hypot(x, y), i = r * size + c;
            cover[i] = clamp((1 - far) * (size / 2) + 0.5, 0, 1);
            if (far > 1) { x /= far; y /= far; }
            normals.set([x, y, Math.sqrt(Math.max(1 - x * x - y * y, 0))], 3 * i);
        }
    return { normals, cover };
}

/** Shade pixels: basis [9n], albedo [3n] 0..1 or one number, cover [n] as alpha, into RGBA bytes [4n]. */
export function paint(pixels, basis, albedo, cover, light) {
    const l = Float32Array.from(light), one = typeof albedo === "number";
    for (let i = 0, j = 0, p = 0; p < cover.length; i += 9, j += 4, p++) {
        if (cover[p] === 0) { pixels[j + 3] = 0; continue; }
        let r = 0, g = 0, b = 0;
        for (let k = 0, m = 0; k < 9; k++, m += 3) {
            const v = basis[i + k];
            r += v * l[m]; g += v * l[m + 1]; b += v * l[m + 2];
        }
        const s = one ? 255 * albedo : 255; // a Uint8ClampedArray clips and rounds
        pixels[j] = s * r * (one ? 1 : albedo[3 * p]);
        pixels[j + 1] = s * g * (one ? 1 : albedo[3 * p + 1]);
        pixels[j + 2] = s * b * (one ? 1 : albedo[3 * p + 2]);
        pixels[j + 3] = 255 * cover[p];
    }
}
