// Lights by name, the values of rig_core/light_prior.py PRESETS (tests/test_web.py compares), colours of lamps,
// linear, and expressions. The names are English: see words.js. No side effects.

const lamp = (azimuth, elevation, softness, intensity, ambient, colour = [1, 1, 1]) =>
    ({ azimuth, elevation, softness, intensity, ambient, colour });

export const PRESETS = {
    "rembrandt": lamp(45, 40, 0.1, 1.2, 0.15),
    "butterfly": lamp(0, 50, 0.15, 1.1, 0.2),
    "split left": lamp(-90, 5, 0.05, 1.3, 0.1),
    "split right": lamp(90, 5, 0.05, 1.3, 0.1),
    "rim": lamp(150, 30, 0.05, 1.6, 0.15),
    "overcast": lamp(0, 80, 1, 0.8, 0.5, [0.95, 1, 1.05]),
    "golden hour": lamp(65, 12, 0.05, 1.2, 0.2, [1, 0.72, 0.42]),
    "candle from below": lamp(15, -45, 0.2, 1, 0.06, [1, 0.6, 0.28]),
};

// for a lamp that moves: how hard it is, not where it stands
export const SOFTNESS = {
    "bare bulb": { softness: 0.05, intensity: 1.3, ambient: 0.12 },
    "window": { softness: 0.35, intensity: 1.1, ambient: 0.2 },
    "softbox": { softness: 0.6, intensity: 1, ambient: 0.3 },
    "hazy sky": { softness: 1, intensity: 0.8, ambient: 0.5 },
};

export const COLOURS = {
    "candle": [1, 0.6, 0.28],
    "golden hour": [1, 0.72, 0.42],
    "tungsten": [1, 0.84, 0.64],
    "white": [1, 1, 1],
    "shade": [0.84, 0.93, 1],
    "blue hour": [0.6, 0.78, 1],
};

// added to the photo's own expression; the jaw, in degrees, belongs to it
export const EXPRESSIONS = {
    "photo": {},
    "smile": { smile: 0.8, squint: 0.15 },
    "laugh": { smile: 1, squint: 0.4, raise_brows: 0.2, jaw: 12 },
    "surprised": { raise_brows: 1, wide_eyes: 0.8, jaw: 11 },
    "sad": { frown: 0.9, raise_brows: 0.35, lower_brows: 0.3, blink: 0.2 },
    "angry": { lower_brows: 1, squint: 0.4, sneer: 0.3, frown: 0.4 },
    "kiss": { pucker: 1, blink: 0.15 },
};
