"""Phantoms of frontal chest radiographs: thickness of tissue along each ray, then a film curve.

A phantom is a pure function of (seed, index). Findings are drawn independently of one another and
of the patient, the exposure and the position, with a severity that reaches down to the subtle.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

CLASSES = ("cardiomegaly", "consolidation", "effusion", "nodule", "pneumothorax")
PREVALENCE = 0.35
BITS = 12


@dataclass(frozen=True)
class Phantom:
    """A drawn radiograph: uint16 [H, W] in 0 … 4095, bone bright, and what is known of it."""

    pixels: np.ndarray
    labels: dict[str, int]
    sex: str
    age: int
    view: str


@dataclass
class _Chest:
    """The rays of one patient and the thickness along them; x grows to the image's right."""

    rng: np.random.Generator
    x: np.ndarray
    y: np.ndarray
    thickness: np.ndarray = field(init=False)
    lungs: np.ndarray = field(init=False)
    texture: np.ndarray = field(init=False)

    def ellipse(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        edge: float = 0.05,
        power: float = 2,
    ) -> np.ndarray:
        """1 inside a soft-edged (super)ellipse, 0 outside."""
        radius = np.abs((self.x - x) / width) ** power + np.abs((self.y - y) / height) ** power
        return _step(1 - radius, edge * power)

    def noise(self, cells: int) -> np.ndarray:
        """Smooth random texture with about `cells` cells a side, standard deviation about 1."""
        small = self.rng.standard_normal((cells, cells)).astype(np.float32)
        size = (self.x.shape[1], self.x.shape[0])
        return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))


def draw_phantom(seed: int, index: int, *, size_px: int = 256) -> Phantom:
    """Draw the patient `index` of the population `seed`."""
    rng = np.random.default_rng([seed, index])
    labels = {name: int(rng.random() < PREVALENCE) for name in CLASSES}
    severity = {name: float(rng.random()) for name in CLASSES}
    sex, age = ("F", "M")[rng.integers(2)], int(rng.integers(20, 90))
    view = "AP" if rng.random() < 0.35 else "PA"
    chest = _position(rng, size_px)
    _body(chest, sex)
    _lungs(chest)
    heart = 0.19 + 0.02 * rng.standard_normal() + (0.02 if view == "AP" else 0.0)
    if labels["cardiomegaly"]:
        heart += 0.06 + 0.08 * severity["cardiomegaly"]
    _mediastinum(chest, heart)
    for name, draw in _FINDINGS.items():
        if labels[name]:
            draw(chest, severity[name])
    chest.thickness += chest.texture * chest.lungs
    _bones(chest)
    return Phantom(_film(chest, size_px), labels, sex, age, view)


def _position(rng: np.random.Generator, size_px: int) -> _Chest:
    """Turn, shift and scale the patient before the detector."""
    axis = np.linspace(-1, 1, size_px, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    angle, zoom = np.radians(rng.normal(0, 4)), rng.uniform(0.88, 1.15)
    wide = zoom * rng.uniform(0.92, 1.08)
    x, y = x - rng.normal(0, 0.06), y - rng.normal(0, 0.06)
    turned = (np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x)
    return _Chest(rng, turned[0] / wide, turned[1] / zoom)


def _body(chest: _Chest, sex: str) -> None:
    """Trunk, shoulders, abdomen and breasts."""
    rng = chest.rng
    habitus = rng.uniform(0.75, 1.3)
    trunk = chest.ellipse(0, 0.35, 0.92, 1.35, edge=0.03, power=3)
    neck = chest.ellipse(0, -1.0, 0.26, 0.4, power=4)
    shoulders = chest.ellipse(0, -0.62, 1.15, 0.3, edge=0.08)
    chest.thickness = habitus * np.maximum(np.maximum(trunk, 0.8 * neck), 0.75 * shoulders)
    chest.thickness += 0.05 * chest.noise(6) * trunk
    if sex == "F":
        size, low = rng.uniform(0.1, 0.3), rng.uniform(0.3, 0.45)
        for side in (-1, 1):
            chest.thickness += size * chest.ellipse(0.45 * side, low, 0.32, 0.28, edge=0.25)


def _lungs(chest: _Chest) -> None:
    """Two air spaces over the domes of the diaphragm, with vessels that thin out from the hila."""
    rng = chest.rng
    air = rng.uniform(0.45, 0.62)
    low = 0.5 + rng.normal(0, 0.05)
    right = chest.ellipse(-0.42, -0.08, 0.32, 0.72, edge=0.05, power=2.6)
    left = chest.ellipse(0.42, -0.06, 0.31, 0.72, edge=0.05, power=2.6)
    domes = np.where(chest.x < 0, low - 0.05, low) + 1.1 * (np.abs(chest.x) - 0.42) ** 2
    above = _step(domes - chest.y, 0.04)
    chest.lungs = np.clip(right + left, 0, 1) * above
    below = 1 - _step(domes - chest.y, 0.05)
    chest.thickness += -air * chest.lungs + 0.25 * below * chest.ellipse(0, 0.8, 0.85, 0.7)
    hila = np.minimum(np.hypot(chest.x - 0.16, chest.y), np.hypot(chest.x + 0.16, chest.y))
    vessels = 0.6 * np.abs(chest.noise(18)) + 0.4 * np.abs(chest.noise(40))
    chest.texture = rng.uniform(0.08, 0.16) * vessels * np.exp(-1.8 * hila)


def _mediastinum(chest: _Chest, heart: float) -> None:
    """Spine, great vessels, trachea and heart (its half width in `heart`)."""
    rng = chest.rng
    middle = np.exp(-((chest.x / 0.11) ** 2))
    bodies = 1 + 0.25 * np.cos(2 * np.pi * (chest.y + rng.random()) / 0.16)
    chest.thickness += 0.22 * middle * bodies
    chest.thickness += 0.2 * chest.ellipse(0.02, -0.3, 0.15, 0.45, edge=0.2)
    chest.thickness -= 0.18 * chest.ellipse(0, -0.72, 0.045, 0.36, edge=0.3, power=4)
    tilt = rng.uniform(0.15, 0.35)
    along = (chest.x - 0.1 - 0.4 * (heart - 0.19)) + tilt * (chest.y - 0.25)
    radius = (along / (heart * 1.25)) ** 2 + ((chest.y - 0.24) / 0.3) ** 2
    chest.thickness += rng.uniform(0.34, 0.45) * _step(1 - radius, 0.12)
    for side in (-1, 1):
        chest.thickness += 0.1 * chest.ellipse(0.19 * side, 0.0, 0.08, 0.13, edge=0.5)


def _bones(chest: _Chest) -> None:
    """Posterior ribs that fall outwards, anterior ones fainter, and the clavicles."""
    rng, side = chest.rng, np.abs(chest.x)
    gap, first = rng.uniform(0.125, 0.15), rng.uniform(-0.85, -0.75)
    density = rng.uniform(0.07, 0.14)
    inside = _step(0.84 - side, 0.05) * _step(side - 0.06, 0.03)
    for slope, curve, faint in ((0.28, -0.55, 1.0), (-0.5, 0.95, 0.5)):
        # The height on the chest wall at which a ray meets a rib, counted in ribs.
        level = (chest.y - first - slope * side - curve * side**2) / gap
        near = np.exp(-((((level + 0.5) % 1) - 0.5) ** 2) / (2 * 0.16**2))
        counted = _step(level + 0.5, 0.2) * _step(9.5 - level, 0.2)
        chest.thickness += density * faint * near * counted * inside
    clavicle = chest.y - (-0.62 - 0.22 * (side - 0.1))
    chest.thickness += 0.2 * np.exp(-((clavicle / 0.035) ** 2)) * inside * _step(0.75 - side, 0.05)


def _effusion(chest: _Chest, severity: float) -> None:
    """Fluid at the base with a meniscus that rises along the chest wall."""
    side = chest.rng.choice((-1, 1))
    level = 0.47 - 0.12 - 0.33 * severity
    meniscus = level - 0.5 * np.clip(side * chest.x - 0.35, 0, 1) ** 1.2
    half = _step(side * chest.x - 0.08, 0.02)
    fluid = _step(chest.y - meniscus, 0.05) * half
    chest.thickness += 0.45 * fluid * chest.lungs
    chest.texture = chest.texture * (1 - fluid)


def _nodule(chest: _Chest, severity: float) -> None:
    """One to three round opacities in the lungs."""
    rng = chest.rng
    for _ in range(rng.integers(1, 4)):
        x = rng.choice((-1, 1)) * rng.uniform(0.27, 0.58)
        y, radius = rng.uniform(-0.5, 0.3), rng.uniform(0.05, 0.065) + 0.035 * severity
        chest.thickness += (0.22 + 0.2 * severity) * chest.ellipse(x, y, radius, radius, edge=0.3)


def _pneumothorax(chest: _Chest, severity: float) -> None:
    """Air between chest wall and lung: a fine pleural line, and no vessels outside it."""
    side = chest.rng.choice((-1, 1))
    depth = 0.07 + 0.13 * severity
    lung = ((side * chest.x - 0.12) / (0.58 - depth)) ** 2 + ((chest.y - 0.3) / (1.08 - depth)) ** 2
    half = _step(side * chest.x - 0.12, 0.03)
    outside = _step(lung - 1, 0.06) * half * chest.lungs
    line = np.exp(-(((lung - 1) / 0.07) ** 2)) * half * chest.lungs
    chest.texture = chest.texture * (1 - outside)
    chest.thickness += 0.1 * line - (0.1 + 0.08 * severity) * outside


def _consolidation(chest: _Chest, severity: float) -> None:
    """A patch of filled air spaces with a cloudy edge."""
    rng = chest.rng
    x, y = rng.choice((-1, 1)) * rng.uniform(0.28, 0.5), rng.uniform(-0.4, 0.3)
    width, height = (
        rng.uniform(0.12, 0.18) + 0.1 * severity,
        rng.uniform(0.12, 0.18) + 0.1 * severity,
    )
    patch = chest.ellipse(x, y, width, height, edge=0.5)
    cloud = np.clip(0.6 + 0.5 * chest.noise(14), 0, 1.5)
    chest.thickness += (0.2 + 0.24 * severity) * patch * cloud * chest.lungs


_FINDINGS = {
    "consolidation": _consolidation,
    "effusion": _effusion,
    "nodule": _nodule,
    "pneumothorax": _pneumothorax,
}


def _film(chest: _Chest, size_px: int) -> np.ndarray:
    """Exposure, scatter, noise, characteristic curve, marker and collimation; uint16 [H, W]."""
    rng = chest.rng
    thickness = chest.thickness + 0.06 * chest.noise(3)
    grain = rng.uniform(0.01, 0.03) * np.exp(0.5 * thickness)
    thickness = thickness + grain * (
        0.8 * rng.standard_normal(thickness.shape, dtype=np.float32)
        + 0.4 * chest.noise(size_px // 3)
    )
    centre, width = rng.uniform(0.55, 0.95), rng.uniform(0.22, 0.42)
    film = 1 / (1 + np.exp(-(thickness - centre) / width))
    film = film ** rng.uniform(0.75, 1.35)
    _marker(film, rng, size_px)
    top, left, right = (int(size_px * max(0.0, rng.normal(0, 0.025))) for _ in range(3))
    film[:top], film[:, :left], film[:, size_px - right :] = 0, 0, 0
    return np.round(np.clip(film, 0, 1) * (2**BITS - 1)).astype(np.uint16)


def _marker(film: np.ndarray, rng: np.random.Generator, size_px: int) -> None:
    """A lead letter L in a corner."""
    unit = max(size_px // 40, 1)
    row, column = int(size_px * rng.uniform(0.05, 0.15)), int(size_px * rng.uniform(0.82, 0.88))
    film[row : row + 4 * unit, column : column + unit] = 0.97
    film[row + 3 * unit : row + 4 * unit, column : column + 3 * unit] = 0.97


def _step(distance: np.ndarray, edge: float) -> np.ndarray:
    """A soft step: 0 far below zero, 1 far above, about `edge` wide."""
    return 0.5 + 0.5 * np.tanh(distance / edge)
