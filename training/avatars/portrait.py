"""Rendering of an avatar, from the background to the fringe.

Input: an avatar, its motion and its mouth curve. Output: frames. All shapes are in this module.

Lengths are in head units, half a head's height; `u` right and `v` down from the middle of the face.
Axes: C channels, T video frames, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from training.avatars.avatars import Avatar, blend, dim
from training.avatars.canvas import PICTURE, Canvas, Colour, Patch, Space
from training.avatars.motion import Motion
from training.avatars.mouth import MOUTH_COLOUR, MouthCurve
from turbotalk_core.errors import MismatchError

MOUTH_V = 0.50  # Height at which the closed lips meet.
MOUTH_HEIGHT = 0.37  # Height of the fully open mouth.
WHITE: Colour = (0.97, 0.96, 0.93)
INK: Colour = (0.13, 0.10, 0.09)


@dataclass(frozen=True, slots=True, kw_only=True)
class Painting:
    """Rendered clip.

    Attributes:
        frames_CTHW: float32 red, green and blue in [-1, 1].
        still_mask_HW: True where no moving shape ever covered the pixel or its neighbours in the
            blur.
    """

    frames_CTHW: Tensor
    still_mask_HW: Tensor


def render(avatar: Avatar, motion: Motion, mouth: MouthCurve, size: int = 128) -> Tensor:
    """Render the frames of a clip; see `paint`."""
    return paint(avatar, motion, mouth, size).frames_CTHW


def paint(avatar: Avatar, motion: Motion, mouth: MouthCurve, size: int = 128) -> Painting:
    """Render a clip, and find the pixels that stand still in it.

    Args:
        avatar: the avatar.
        motion: motion over T frames.
        mouth: mouth curve over T frames.
        size: height and width in pixels.

    Returns:
        T square frames and the still pixels.

    Raises:
        MismatchError: if motion and mouth curve differ in length.
    """
    num_frames = motion.head_x_T.shape[0]
    if mouth.opening_T.shape[0] != num_frames:
        raise MismatchError(
            f"got {num_frames} frames of motion and {mouth.opening_T.shape[0]} of mouth; "
            "they must be equally many"
        )
    canvas = Canvas(_paint_backdrop(avatar, size), num_frames)
    figure = _Figure(avatar, motion, mouth, canvas)
    figure.paint()
    touched = F.max_pool2d(canvas.touched_HW[None].float(), 3, stride=1, padding=1)[0]
    return Painting(
        frames_CTHW=_see_through_lens(canvas.frames_CTHW).mul_(2).sub_(1).clamp_(-1, 1),
        still_mask_HW=touched == 0,
    )


def _see_through_lens(frames_CTHW: Tensor) -> Tensor:
    """Blur by [1/4, 1/2, 1/4] in both directions, as a lens limits the sharpness of edges."""
    for axis in (-1, -2):
        before, after = frames_CTHW.clone(), frames_CTHW.clone()
        length = frames_CTHW.shape[axis]
        before.narrow(axis, 1, length - 1).copy_(frames_CTHW.narrow(axis, 0, length - 1))
        after.narrow(axis, 0, length - 1).copy_(frames_CTHW.narrow(axis, 1, length - 1))
        frames_CTHW = before.add_(after).mul_(0.25).add_(frames_CTHW, alpha=0.5)
    return frames_CTHW


def _paint_backdrop(avatar: Avatar, size: int) -> Tensor:
    """Paint a gradient with one large disc and a hill, `[3, H, W]`."""
    grid = (torch.arange(size) + 0.5) * (PICTURE / size)
    y_H1, x_W = grid[:, None], grid
    top, bottom, shape = (torch.tensor(colour)[:, None, None] for colour in avatar.backdrop)
    share_HW = ((y_H1 + 0.25 * avatar.light * (x_W - 64)) / PICTURE).clamp(0, 1)
    picture = top + (bottom - top) * share_HW
    x, y, radius = avatar.backdrop_shape
    distance_HW = ((x_W - x) ** 2 + (y_H1 - y) ** 2).sqrt() - radius
    picture = picture.lerp(shape, (0.5 - distance_HW / 2.0).clamp(0, 1) * 0.8)
    hill_HW = y_H1 - (104 + 0.004 * (x_W - x) ** 2)
    return picture.lerp(bottom * 0.93, (0.5 + hill_HW / 2.0).clamp(0, 1) * 0.7)


def _smoothstep(value: Tensor) -> Tensor:
    value = value.clamp(0, 1)
    return value * value * (3 - 2 * value)


class _Figure:
    """Coordinate spaces of one clip, and the layers painted in them, back to front."""

    def __init__(self, avatar: Avatar, motion: Motion, mouth: MouthCurve, canvas: Canvas) -> None:
        self.avatar, self.motion, self.mouth, self.canvas = avatar, motion, mouth, canvas
        zero_T = torch.zeros_like(motion.head_x_T)
        x, y = avatar.centre
        scale = avatar.scale
        self.body = Space(
            x_T=x + scale * motion.body_x_T, y_T=y + scale * motion.body_y_T,
            u_T=zero_T, v_T=zero_T, roll_T=zero_T, scale=scale,
        )  # fmt: skip
        # The pivot of the head is the top of the neck.
        self.head = Space(
            x_T=x + scale * (motion.head_x_T + 0.4 * motion.body_x_T),
            y_T=y + scale * (motion.head_y_T + 0.95),
            u_T=zero_T, v_T=zero_T + 0.95, roll_T=motion.roll_T, scale=scale,
        )  # fmt: skip
        # Parallax: parts nearer to the camera move further when the head turns.
        self.face = self._turn(0.10, 0.05)
        self.tip = self._turn(0.155, 0.075)
        self.front = self._turn(0.045, 0.03)
        self.back = self._turn(-0.05, -0.02)
        self.shadow = self._shade_skin(0.80)

    def _turn(self, by_yaw: float, by_pitch: float) -> Space:
        return self.head.shift(by_yaw * self.motion.yaw_T, by_pitch * self.motion.pitch_T)

    def _shade_skin(self, amount: float) -> Colour:
        """Return the skin colour in shadow, which becomes warmer as it darkens."""
        red, green, blue = self.avatar.skin
        return red * (0.35 + 0.65 * amount), green * amount * 0.97, blue * amount * 0.94

    def _draw(
        self,
        space: Space,
        box: tuple[float, float, float, float],
        cover: Callable[[Patch], Tensor],
        colour: Colour | Callable[[Patch], Tensor],
    ) -> None:
        """Paint one shape that lies inside `box` (left, top, right, bottom) of a space."""
        patch = space.patch(self.canvas.size, *box)
        if patch is not None:
            painted = colour(patch) if callable(colour) else colour
            self.canvas.lay(patch, cover(patch), painted)

    def _lit(self, base: Colour, strength: float) -> Callable[[Patch], Tensor]:
        """Return a colour that is brighter towards the light."""
        slope_u, slope_v = strength * self.avatar.light, -0.6 * strength

        def colour(patch: Patch) -> Tensor:
            light_THW = (patch.u_THW * slope_u).add_(patch.v_THW * slope_v).add_(1)
            return torch.stack([light_THW * channel for channel in base]).clamp_(max=1)

        return colour

    def paint(self) -> None:
        """Paint all layers."""
        self._paint_back_hair()
        self._paint_body()
        self._paint_neck()
        self._paint_collar()
        self._paint_wrap()
        self._paint_ears()
        self._paint_face()
        self._paint_cheeks()
        self._paint_eyes()
        self._paint_nose()
        self._paint_beard()
        self._paint_mouth()
        self._paint_front_hair()
        self._paint_brows()
        self._paint_glasses()
        if self.avatar.is_half_body:
            self._paint_hand()

    # ---- body -------------------------------------------------------------------------------

    def _paint_body(self) -> None:
        avatar = self.avatar
        reach = avatar.shoulders

        def cover(patch: Patch) -> Tensor:
            q = (patch.u_THW.abs() / reach).clamp(max=1.4)
            top = 1.17 + 0.26 * q.square() + 0.95 * q**8
            slope = (0.52 * q + 7.6 * q**7) / reach
            return patch.cover((top - patch.v_THW) / (1 + slope.square()).sqrt())

        self._draw(self.body, (-2.4, 1.1, 2.4, 4.5), cover, self._lit(avatar.clothes[0], 0.07))
        if avatar.is_half_body:
            crease = dim(avatar.clothes[0], 0.78)
            for side in (-1.0, 1.0):
                start, stop = (side * reach * 0.70, 2.15), (side * reach * 0.66, 4.0)
                box = (min(start[0], stop[0]) - 0.1, 2.0, max(start[0], stop[0]) + 0.1, 4.2)
                self._draw(
                    self.body,
                    box,
                    lambda p, s=start, e=stop: p.cover(p.capsule(s, e, 0.02), 2.5) * 0.6,
                    crease,
                )

    def _paint_neck(self) -> None:
        avatar = self.avatar
        if avatar.collar == "vee":

            def wedge(patch: Patch) -> Tensor:
                beside = patch.u_THW.abs() * 0.85 - (1.80 - patch.v_THW) * 0.5
                return patch.cover(torch.maximum(beside, 1.24 - patch.v_THW))

            self._draw(self.body, (-0.6, 1.0, 0.6, 2.0), wedge, avatar.skin)
        elif avatar.collar != "turtle":
            self._draw(
                self.body, (-0.6, 1.0, 0.6, 1.6),
                lambda p: p.cover(p.ellipse(0, 1.24, 0.42, 0.17)), avatar.skin,
            )  # fmt: skip

        def neck(patch: Patch) -> Tensor:
            width = 0.31 + 0.10 * ((patch.v_THW - 0.95) / 0.4).clamp(0, 1).square()
            return patch.cover(torch.maximum(patch.u_THW.abs() - width, patch.v_THW - 1.32))

        self._draw(self.body, (-0.6, 0.3, 0.6, 1.45), neck, avatar.skin)
        # The head's shadow stays on the neck and moves with the head.
        ahead_T11 = (self.motion.head_x_T - 0.6 * self.motion.body_x_T)[:, None, None]

        def shade(patch: Patch) -> Tensor:
            under = replace(patch, u_THW=patch.u_THW - ahead_T11)
            return neck(patch) * patch.cover(under.ellipse(0, 0.45, 0.62, 0.80), 5.0)

        self._draw(self.body, (-0.6, 0.3, 0.6, 1.45), shade, self._shade_skin(0.76))

    def _paint_collar(self) -> None:
        avatar = self.avatar
        main, trim = avatar.clothes
        body = self.body
        if avatar.collar in ("crew", "hood"):
            thick, colour = (
                (0.05, dim(main, 0.82)) if avatar.collar == "crew" else (0.12, dim(main, 0.88))
            )

            def ring(patch: Patch) -> Tensor:
                rim = patch.ellipse(0, 1.24, 0.45 + thick, 0.20 + thick).abs() - thick
                return patch.cover(torch.maximum(rim, 1.20 - patch.v_THW))

            self._draw(body, (-0.9, 1.1, 0.9, 1.8), ring, colour)
            if avatar.collar == "hood":
                for side in (-0.22, 0.22):
                    self._draw(
                        body, (side - 0.1, 1.5, side + 0.1, 2.2),
                        lambda p, s=side: p.cover(p.capsule((s, 1.58), (s * 1.1, 2.0), 0.03)),
                        WHITE,
                    )  # fmt: skip
        elif avatar.collar == "vee":

            def edge(patch: Patch) -> Tensor:
                rim = (patch.u_THW.abs() * 0.85 - (1.80 - patch.v_THW) * 0.5 - 0.02).abs() - 0.035
                return patch.cover(torch.maximum(rim, 1.25 - patch.v_THW))

            self._draw(body, (-0.7, 1.1, 0.7, 2.0), edge, dim(main, 0.80))
        elif avatar.collar == "turtle":

            def tube(patch: Patch) -> Tensor:
                x = (patch.u_THW.abs() - 0.33).clamp(min=0)
                y = ((patch.v_THW - 1.18).abs() - 0.09).clamp(min=0)
                return patch.cover((x.square() + y.square()).sqrt() - 0.10)

            self._draw(body, (-0.6, 0.9, 0.6, 1.5), tube, self._lit(dim(main, 0.90), 0.06))
        else:
            self._paint_lapels(trim if avatar.collar == "jacket" else WHITE)

    def _paint_lapels(self, colour: Colour) -> None:
        """Paint a shirt's collar, and under a jacket the whole shirt front."""
        avatar, body = self.avatar, self.body
        if avatar.collar == "jacket":

            def front(patch: Patch) -> Tensor:
                wedge = patch.u_THW.abs() - (0.52 - 0.10 * (patch.v_THW - 1.2))
                return patch.cover(
                    torch.maximum(wedge, 1.30 - patch.v_THW + 0.25 * patch.u_THW.abs())
                )

            self._draw(body, (-0.8, 1.2, 0.8, 4.5), front, colour)
            for side in (-1.0, 1.0):
                self._draw(
                    body, (-0.9, 1.1, 0.9, 3.2),
                    lambda p, s=side: p.cover(p.capsule((s * 0.50, 1.22), (s * 0.40, 3.0), 0.07)),
                    dim(avatar.clothes[0], 0.80),
                )  # fmt: skip
        for side in (-1.0, 1.0):

            def flap(patch: Patch, side: float = side) -> Tensor:
                u = side * patch.u_THW
                lower = patch.v_THW - (1.62 - 0.55 * u)
                upper = (1.42 - 0.62 * u) - patch.v_THW
                return patch.cover(
                    torch.maximum(
                        torch.maximum(lower, upper) * 0.85, torch.maximum(0.01 - u, u - 0.50)
                    )
                )

            self._draw(
                body,
                (-0.6, 1.0, 0.6, 1.8),
                flap,
                blend(colour, INK, 0.0 if side == avatar.light else 0.10),
            )

    def _paint_hand(self) -> None:
        avatar, motion = self.avatar, self.motion
        side = avatar.hand_side
        hand = Space(
            x_T=self.body.x_T + avatar.scale * (side * 0.80 + motion.hand_x_T),
            y_T=self.body.y_T + avatar.scale * (2.60 + motion.hand_y_T),
            u_T=torch.zeros_like(motion.hand_x_T), v_T=torch.zeros_like(motion.hand_x_T),
            roll_T=side * motion.hand_roll_T, scale=avatar.scale,
        )  # fmt: skip
        elbow = (side * 0.35, 1.9)
        # A soft shadow separates the sleeve from the chest, which has the same colour.
        self._draw(
            hand, (-0.9, -0.2, 0.9, 2.4),
            lambda p: p.cover(p.capsule((0.05, 0.44), elbow, 0.31), 5.0) * 0.35,
            dim(avatar.clothes[0], 0.55),
        )  # fmt: skip
        self._draw(
            hand, (-0.8, 0.0, 0.8, 2.3), lambda p: p.cover(p.capsule((0, 0.42), elbow, 0.27)),
            self._lit(dim(avatar.clothes[0], 0.84), 0.08),
        )  # fmt: skip
        self._draw(
            hand, (-0.5, 0.0, 0.5, 0.6),
            lambda p: p.cover(p.capsule((-0.2, 0.24), (0.2, 0.24), 0.075)),
            dim(avatar.clothes[0], 0.75),
        )  # fmt: skip

        def fingers(patch: Patch) -> Tensor:
            distance = patch.ellipse(0, 0.0, 0.21, 0.23)
            for start, stop, radius in (
                ((-0.15, -0.05), (-0.21, -0.36), 0.055), ((-0.05, -0.1), (-0.07, -0.45), 0.058),
                ((0.05, -0.1), (0.07, -0.44), 0.058), ((0.14, -0.05), (0.20, -0.36), 0.052),
                ((-side * 0.14, 0.10), (-side * 0.36, -0.10), 0.062),
            ):  # fmt: skip
                distance = torch.minimum(distance, patch.capsule(start, stop, radius))
            return patch.cover(distance)

        self._draw(hand, (-0.5, -0.6, 0.5, 0.35), fingers, self._lit(avatar.skin, 0.10))

    def _paint_wrap(self) -> None:
        """Paint the part of a scarf that lies around neck and shoulders."""
        avatar = self.avatar
        if avatar.hair_style == "scarf":
            self._draw(
                self.body, (-1.2, 0.6, 1.2, 1.9), lambda p: p.cover(p.ellipse(0, 1.15, 0.86, 0.46)),
                self._lit(dim(avatar.hair, 0.90), 0.10),
            )  # fmt: skip
            self._draw(
                self.body, (-1.0, 0.9, 1.0, 1.7),
                lambda p: p.cover(p.capsule((-0.55, 1.12), (0.45, 1.42), 0.022)) * 0.8,
                dim(avatar.hair, 0.74),
            )  # fmt: skip

    # ---- head -------------------------------------------------------------------------------

    def _egg(self, patch: Patch, side: float, above: float) -> Tensor:
        """Compute the signed distance to the head's outline plus margins; speech lowers the jaw."""
        avatar = self.avatar
        chin_T11 = (1.0 + 0.055 * self.mouth.opening_T)[:, None, None]
        below = patch.v_THW.clamp(min=0) / chin_T11
        height = below - patch.v_THW.clamp(max=0) / (1.0 + above)
        narrowing = 1 - avatar.jaw * below.square().clamp(max=1.2)
        width = patch.u_THW.abs() / ((avatar.face_width + side) * narrowing)
        power = avatar.roundness
        radius = (width**power + height.abs() ** power) ** (1 / power)
        return (radius - 1) * (avatar.face_width + side)

    def _paint_ears(self) -> None:
        avatar = self.avatar
        if avatar.hair_style == "scarf":
            return
        size = avatar.ears
        for side in (-1.0, 1.0):
            u = side * (avatar.face_width + 0.03)
            box = (u - 0.3, -0.3, u + 0.3, 0.5)
            self._draw(
                self.back, box,
                lambda p, u=u: p.cover(p.ellipse(u, 0.10, 0.13 * size, 0.20 * size)),
                self._shade_skin(0.96 if side == avatar.light else 0.86),
            )  # fmt: skip
            self._draw(
                self.back, box,
                lambda p, u=u: p.cover(p.ellipse(u, 0.11, 0.06 * size, 0.11 * size), 2.5) * 0.6,
                self.shadow,
            )  # fmt: skip
            if avatar.has_earrings:
                self._draw(
                    self.back, (u - 0.2, 0.2, u + 0.2, 0.6),
                    lambda p, u=u: p.cover(p.ellipse(u, 0.38, 0.06, 0.075)), (0.95, 0.80, 0.42),
                )  # fmt: skip

    def _paint_face(self) -> None:
        avatar = self.avatar
        skin, dark = avatar.skin, self._shade_skin(0.84)

        def colour(patch: Patch) -> Tensor:
            # One broad shadow on the side away from the light, as in flat illustration.
            edge = avatar.light * patch.u_THW + 0.42 + 0.16 * (patch.v_THW - 0.2).square()
            share = _smoothstep(0.5 - edge * 3.0).mul_(0.85)
            if avatar.hair_style not in ("bald", "buzz"):
                under_hair = 0.09 - self._forehead(patch)
                share = torch.maximum(share, _smoothstep(0.5 + under_hair * 8.0).mul_(0.75))
            return torch.stack([share * (d - s) + s for s, d in zip(skin, dark, strict=True)])

        self._draw(
            self.head, (-1.0, -1.1, 1.0, 1.15), lambda p: p.cover(self._egg(p, 0, 0)), colour
        )

    def _paint_cheeks(self) -> None:
        avatar = self.avatar
        rosy = blend(avatar.skin, (0.95, 0.42, 0.34), 0.6)
        for side in (-1.0, 1.0):
            u = side * avatar.face_width * 0.58
            self._draw(
                self.face, (u - 0.3, 0.05, u + 0.3, 0.6),
                lambda p, u=u: p.glow(u, 0.33, 0.26, 0.20) * avatar.blush, rosy,
            )  # fmt: skip
            if avatar.has_freckles:

                def dots(patch: Patch, u: float = u) -> Tensor:
                    spots = [patch.glow(u + du, 0.27 + dv, 0.045, 0.045)
                             for du, dv in _FRECKLES]  # fmt: skip
                    return torch.stack(spots).amax(0) * 0.7

                self._draw(
                    self.face,
                    (u - 0.3, 0.1, u + 0.3, 0.5),
                    dots,
                    blend(self.shadow, (0.5, 0.25, 0.1), 0.4),
                )

    def _paint_eyes(self) -> None:
        for side in (-1.0, 1.0):
            self._paint_eye(side)

    def _paint_eye(self, side: float) -> None:
        avatar, motion = self.avatar, self.motion
        half_width, half_height, tilt, apart = avatar.eye_shape
        u = side * apart
        patch = self.face.patch(self.canvas.size, u - 0.32, -0.30, u + 0.32, 0.26)
        if patch is None:
            return
        q = (patch.u_THW - u) / half_width
        profile = (1 - q.square()).clamp_(min=0).pow_(0.75)
        rest = 0.02 - tilt * side * q
        lower = rest + 0.62 * half_height * profile
        open_T11 = motion.lids_T[:, None, None]
        upper = rest + profile * half_height * (0.55 - 1.55 * open_T11)
        # Shading of the eye socket gives depth to flat skin.
        self.canvas.lay(patch, patch.glow(u, -0.06, 0.27, 0.20) * 0.30, self.shadow)
        white = patch.band(upper, lower)
        self.canvas.lay(patch, white, WHITE)
        radius = 0.78 * half_height
        gaze_u = patch.u_THW - (u + 0.052 * motion.gaze_x_T[:, None, None])
        gaze_v = patch.v_THW - (0.0 + 0.032 * motion.gaze_y_T[:, None, None])
        distance = (gaze_u.square() + gaze_v.square()).sqrt_()
        self.canvas.lay(patch, patch.cover(distance - radius) * white, avatar.eyes)
        self.canvas.lay(patch, patch.cover(distance - 0.55 * radius) * white, INK)
        glint_u, glint_v = gaze_u - avatar.light * 0.35 * radius, gaze_v + 0.38 * radius
        glint = (glint_u.square() + glint_v.square()).sqrt_() - 0.30 * radius
        self.canvas.lay(patch, patch.cover(glint) * white, (1.0, 1.0, 1.0))
        lash = 0.032 if avatar.has_lashes else 0.021
        line = profile.pow(0.35) * lash
        self.canvas.lay(patch, patch.band(upper - line, upper + line * 0.5), INK)
        if avatar.has_lashes:
            corner = (u + side * half_width * 0.92, 0.02 - tilt - 0.01)
            tip = (u + side * (half_width + 0.055), 0.02 - tilt - 0.075)
            wing = patch.cover(patch.capsule(corner, tip, 0.016)) * (0.3 + 0.7 * open_T11)
            self.canvas.lay(patch, wing, INK)

    def _paint_brows(self) -> None:
        avatar, motion = self.avatar, self.motion
        thickness, arch, tilt = avatar.brow_shape
        apart = avatar.eye_shape[3]
        for side in (-1.0, 1.0):
            u = side * (apart + 0.01)

            def stroke(patch: Patch, u: float = u, side: float = side) -> Tensor:
                q = (patch.u_THW - u) * (side / 0.20)
                lift_T11 = (0.065 * motion.brow_T)[:, None, None]
                middle = -0.235 - lift_T11 - arch * (1 - q.square()) - tilt * q
                thick = thickness * (0.62 - 0.38 * q) + 0.010
                return patch.cover(
                    torch.maximum((patch.v_THW - middle).abs() - thick, (q.abs() - 1) * 0.20)
                )

            self._draw(self.face, (u - 0.30, -0.55, u + 0.30, -0.05), stroke, avatar.brows)

    def _paint_nose(self) -> None:
        avatar = self.avatar
        half_width, height = avatar.nose_shape
        v = MOUTH_V - height
        dark = self._shade_skin(0.72)

        def bridge(patch: Patch) -> Tensor:
            u = -avatar.light * 0.045
            return patch.cover(patch.capsule((u, -0.02), (u * 1.6, v - 0.03), 0.035), 3.5) * 0.30

        self._draw(self.tip, (-0.2, -0.2, 0.2, 0.4), bridge, dark)

        def under(patch: Patch) -> Tensor:
            q = patch.u_THW / half_width
            profile = (1 - q.square()).clamp_(min=0)
            curve = v + 0.035 * profile
            return patch.band(curve - 0.024 * profile, curve + 0.026 * profile) * 0.85

        self._draw(self.tip, (-0.25, 0.1, 0.25, 0.5), under, dark)
        self._draw(
            self.tip, (-0.2, 0.0, 0.2, 0.4),
            lambda p: p.glow(avatar.light * 0.02, v - 0.055, 0.075, 0.065) * 0.40,
            blend(avatar.skin, (1.0, 0.97, 0.90), 0.6),
        )  # fmt: skip

    def _paint_beard(self) -> None:
        avatar = self.avatar
        if avatar.beard in (1, 2):
            strength = 0.30 if avatar.beard == 1 else 1.0

            def cover(patch: Patch) -> Tensor:
                q = (patch.u_THW.abs() / avatar.face_width).clamp(max=1.05)
                q = (q.square() + 0.02).sqrt()
                line = 0.27 + 0.98 * q - 1.38 * q.square()
                grown = self._egg(patch, 0.02 if avatar.beard == 2 else -0.01, 0)
                return patch.cover(torch.maximum(grown, (line - patch.v_THW) * 0.8), 2.0) * strength

            self._draw(self.head, (-1.0, -0.2, 1.0, 1.2), cover, self._lit(avatar.brows, 0.10))
        elif avatar.beard == 3:

            def moustache(patch: Patch) -> Tensor:
                q = patch.u_THW / 0.30
                profile = (1 - q.square()).clamp_(min=0).pow_(0.6)
                top = 0.335 + 0.06 * q.square() + 0.02 * torch.exp(-(q / 0.12).square())
                return patch.band(top + 0.02 - 0.02 * profile, top + 0.105 * profile)

            self._draw(self.face, (-0.4, 0.25, 0.4, 0.6), moustache, avatar.brows)

    def _paint_mouth(self) -> None:
        """Paint the lips, and between them the dark mouth, its area proportional to the aperture.

        Every part of the opening is a band between curves that scale with its height and width.
        Therefore teeth and tongue cover a constant fraction of it, and the visible dark area stays
        proportional to the aperture, which the evaluation measures.
        """
        avatar, mouth = self.avatar, self.mouth
        half_width, fullness, smile = avatar.mouth_shape
        patch = self.face.patch(self.canvas.size, -0.45, 0.20, 0.45, 1.05)
        if patch is None:
            return
        opening_T11 = mouth.opening_T[:, None, None]
        rounding_T11 = mouth.rounding_T[:, None, None]
        width_T11 = half_width / 0.825 * (0.65 + 0.35 * mouth.width_T)[:, None, None]
        q = patch.u_THW / width_T11
        squared = q.square()
        inner = (1 - squared).clamp(min=0).pow_(0.62)
        outer = (1 - squared / 1.28).clamp_(min=0).pow_(0.70)
        rest = MOUTH_V - smile * squared.clamp(max=1.4) * (1 - 0.6 * opening_T11)
        height = MOUTH_HEIGHT * opening_T11 * inner
        upper, lower = rest - 0.22 * height, rest + 0.78 * height
        bow = 1 - 0.30 * torch.exp(-(q / 0.20).square())
        pout = fullness * (0.85 + 0.35 * rounding_T11)
        lip_top = upper - 0.060 * pout * outer * bow
        lip_bottom = lower + 0.078 * pout * outer
        lay = self.canvas.lay
        lay(
            patch, patch.glow(0, MOUTH_V + 0.19, 0.20, 0.07) * (1 - opening_T11) * 0.35, self.shadow
        )
        lay(patch, patch.band(lip_top, upper + 0.008 * outer), dim(avatar.lips, 0.90))
        lay(patch, patch.band(lower - 0.008 * outer, lip_bottom), avatar.lips)
        lay(
            patch,
            patch.band(lower + 0.026 * outer, lower + 0.050 * outer) * 0.35,
            blend(avatar.lips, WHITE, 0.5),
        )
        seam = 0.016 * (1 - (squared / 1.15)).clamp_(min=0).sqrt_()
        closed_T11 = (1 - 6 * opening_T11).clamp(0, 1)
        lay(patch, patch.band(rest - seam, rest + seam) * closed_T11, dim(avatar.lips, 0.55))
        hole = patch.band(upper, lower)
        lay(patch, hole, MOUTH_COLOUR)
        tongue = (1 - (q / 0.72).square()).clamp_(min=0).sqrt_()
        lay(
            patch,
            patch.band(lower - 0.24 * MOUTH_HEIGHT * opening_T11 * tongue, lower) * hole,
            (0.82, 0.40, 0.36),
        )
        lay(patch, patch.band(upper, upper + 0.20 * height) * hole, WHITE)

    # ---- hair -------------------------------------------------------------------------------

    def _hairline(self, u_THW: Tensor) -> Tensor:
        """Compute the lower edge of the hair on the forehead, as `v` of `u`."""
        avatar = self.avatar
        q = u_THW / (avatar.face_width + 0.02)
        style, side = avatar.hair_style, avatar.hair_side
        if style in ("fringe_bob", "curls"):
            line = -0.36 + 0.05 * q.square()
        elif style in ("centre_long", "bob"):
            line = -0.74 + 0.62 * q.abs()
        elif style in ("swept", "long", "ponytail"):
            line = -0.52 - 0.26 * side * q + 0.10 * torch.sin(3 * q * side)
        elif style == "quiff":
            line = -0.64 + 0.08 * side * q
        else:
            line = -0.60 + 0.06 * q.square()
        return line

    def _forehead(self, patch: Patch) -> Tensor:
        """Compute the signed distance to the front hair: above the hairline, or a side lock."""
        avatar = self.avatar
        style = avatar.hair_style
        if style == "scarf":
            return -patch.ellipse(0, 0.12, 0.66 * avatar.face_width / 0.78, 0.84)
        above = (patch.v_THW - self._hairline(patch.u_THW)) * 0.8
        low = {"long": 1.05, "centre_long": 1.05, "bob": 0.75, "fringe_bob": 0.70, "curls": 0.35}
        fall = patch.v_THW.clamp(min=-0.4) + 0.4
        inner = avatar.face_width * (0.80 + (0.06 if style in low else 0.16) * fall)
        lock = torch.maximum(inner - patch.u_THW.abs(), patch.v_THW - low.get(style, 0.14))
        # A smooth union of the two shapes rounds the corner at the temple.
        near = (0.5 + (lock - above) / 0.24).clamp_(0, 1)
        return lock + (above - lock) * near - 0.12 * near * (1 - near)

    def _paint_front_hair(self) -> None:
        avatar = self.avatar
        style, volume = avatar.hair_style, avatar.hair_volume
        if style == "bald":
            return
        above = {
            "buzz": 0.04,
            "crop": 0.12,
            "quiff": 0.16,
            "curls": 0.24,
            "afro": 0.12,
            "scarf": 0.12,
        }
        margin = {"buzz": 0.02, "crop": 0.05, "quiff": 0.04, "scarf": 0.12, "curls": 0.12}
        top, beside = above.get(style, 0.13) * volume, margin.get(style, 0.07) * volume

        def cover(patch: Patch) -> Tensor:
            outside = self._egg(patch, beside, top)
            if style == "curls":
                outside = outside - 0.03 * torch.cos(22 * patch.u_THW) * torch.cos(9 * patch.v_THW)
            if style == "quiff":
                crest = patch.ellipse(avatar.hair_side * 0.10, -0.86, 0.62, 0.36 * volume)
                outside = torch.minimum(outside, crest)
            return patch.cover(torch.maximum(outside, self._forehead(patch)))

        colour = self._hair_colour()
        self._draw(self.front, (-1.1, -1.45, 1.1, 1.1), cover, colour)
        if style in (
            "swept",
            "long",
            "centre_long",
            "bob",
            "ponytail",
            "bun",
            "quiff",
            "fringe_bob",
        ):
            shine = blend(avatar.hair, (1.0, 0.95, 0.85), 0.35)
            u = avatar.light * 0.30

            def gleam(patch: Patch) -> Tensor:
                arc = patch.ellipse(0, -0.05, avatar.face_width - 0.02, 0.88).abs() - 0.025
                return patch.cover(arc, 2.5) * patch.glow(u, -0.80, 0.42, 0.40) * 0.65

            self._draw(self.front, (-0.8, -1.2, 0.8, -0.4), gleam, shine)

    def _hair_colour(self) -> Callable[[Patch], Tensor]:
        avatar = self.avatar

        def colour(patch: Patch) -> Tensor:
            light_THW = patch.glow(avatar.light * 0.45, -0.85, 1.1, 0.9).mul_(0.28).add_(0.96)
            return torch.stack([light_THW * channel for channel in avatar.hair]).clamp_(max=1)

        return colour

    def _paint_back_hair(self) -> None:
        avatar = self.avatar
        style, volume, side = avatar.hair_style, avatar.hair_volume, avatar.hair_side
        sway_T11 = self.motion.sway_T[:, None, None]
        wide = avatar.face_width

        def hanging(patch: Patch) -> Patch:
            """Shift the patch with the swing of the hair, more the lower it hangs."""
            swing = sway_T11 * (patch.v_THW + 0.4).clamp(min=0) * 0.9
            return replace(patch, u_THW=patch.u_THW - swing)

        def slab(patch: Patch, half: float, top: float, bottom: float, flare: float) -> Tensor:
            swung = hanging(patch)
            middle, reach = (top + bottom) / 2, (bottom - top) / 2
            y = (swung.v_THW - middle) / reach
            x = swung.u_THW / (half * (1 + flare * y))
            return ((x.square().square_() + y.square().square_()).sqrt_().sqrt_() - 1) * half

        def lumps(patch: Patch, spots: list[tuple[float, float, float]]) -> Tensor:
            swung = hanging(patch)
            # (d^2 - r^2) / 2r has the value and slope of the distance d - r at the rim, without a
            # square root.
            distance = torch.full_like(patch.u_THW, 9.0)
            for u, v, radius in spots:
                squared = (swung.u_THW - u).square_().add_((swung.v_THW - v).square_())
                distance = torch.minimum(distance, squared.sub_(radius**2).div_(2 * radius))
            return distance

        shapes: dict[str, Callable[[Patch], Tensor]] = {
            "bob": lambda p: slab(p, wide + 0.20 * volume, -1.13, 0.85, 0.08),
            "fringe_bob": lambda p: slab(p, wide + 0.16 * volume, -1.13, 0.75, 0.04),
            "long": lambda p: slab(p, wide + 0.20 * volume, -1.13, 2.1, 0.10),
            "centre_long": lambda p: slab(p, wide + 0.17 * volume, -1.13, 1.8, 0.06),
            "scarf": lambda p: slab(p, wide + 0.10, -0.9, 1.6, 0.16),
            "bun": lambda p: lumps(p, [(0.12 * side, -1.20, 0.33 * volume)]),
            "afro": lambda p: lumps(
                p,
                [(0.0, -0.32, 0.84 + 0.1 * volume)]
                + [((0.81 + 0.1 * volume) * x, -0.32 + (0.81 + 0.1 * volume) * y, 0.20)
                   for x, y in _RING],
            ),
            "curls": lambda p: lumps(
                p,
                [(s * (wide - x), v, r * volume) for s in (-1, 1)
                 for x, v, r in _LOCKS],
            ),
            "ponytail": lambda p: lumps(p, [(side * x, y, r * volume) for x, y, r in _TAIL]),
        }  # fmt: skip
        shape = shapes.get(style)
        if shape is not None:
            shade = dim(avatar.hair, 0.80 if style not in ("afro", "bun") else 0.92)
            self._draw(self.back, (-1.7, -1.8, 1.7, 2.3), lambda p: p.cover(shape(p)), shade)

    def _paint_glasses(self) -> None:
        avatar = self.avatar
        if avatar.glasses == 0:
            return
        apart = avatar.eye_shape[3]
        for side in (-1.0, 1.0):
            u = side * apart

            def lens(patch: Patch, u: float = u) -> Tensor:
                if avatar.glasses == 1:
                    return patch.ellipse(u, 0.03, 0.255, 0.245)
                x, y = (patch.u_THW - u) / 0.26, (patch.v_THW - 0.03) / 0.20
                return ((x.square().square_() + y.square().square_()).sqrt_().sqrt_() - 1) * 0.22

            box = (u - 0.36, -0.32, u + 0.36, 0.38)
            self._draw(
                self.face, box, lambda p, lens=lens: p.cover(lens(p)) * 0.10, (0.85, 0.95, 1.0)
            )
            self._draw(
                self.face, box, lambda p, lens=lens: p.cover(lens(p).abs() - 0.022), avatar.frames
            )
            start, stop = (u + side * 0.26, -0.02), (side * (avatar.face_width - 0.02), -0.04)
            box = (min(start[0], stop[0]) - 0.06, -0.15, max(start[0], stop[0]) + 0.06, 0.1)
            self._draw(
                self.face,
                box,
                lambda p, s=start, e=stop: p.cover(p.capsule(s, e, 0.018)),
                avatar.frames,
            )
        inner = apart - 0.25
        self._draw(
            self.face, (-0.2, -0.15, 0.2, 0.15),
            lambda p: p.cover(p.capsule((-inner, 0.0), (inner, 0.0), 0.020)), avatar.frames,
        )  # fmt: skip


_FRECKLES = ((-0.13, 0.0), (-0.03, 0.06), (0.06, -0.01), (0.13, 0.07))
# Curls at the sides: distance inside the face's edge, height, radius.
_LOCKS = ((0.05, -0.6, 0.30), (-0.02, -0.25, 0.29), (-0.03, 0.1, 0.29), (0.02, 0.42, 0.27))
# A ponytail that starts at the crown and narrows downwards: overlapping discs.
_TAIL = [
    (
        0.55 + 0.55 * math.sin(1.9 * t),
        -0.85 + 1.85 * t**1.5,
        0.19 + 0.09 * math.sin(2.6 * t) - 0.10 * t,
    )
    for t in torch.linspace(0, 1, 20).tolist()
]
# Unit vectors of a ring of curls around the head, open at the bottom.
_RING = [
    (float(torch.tensor(angle).sin()), -float(torch.tensor(angle).cos()))
    for angle in torch.linspace(-2.2, 2.2, 12).tolist()
]
