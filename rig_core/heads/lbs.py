"""Linear blend skinning with pose correctives (Loper et al., "SMPL", 2015, section 3; as FLAME uses it)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..face import axis_angle_to_matrix


def chain(rotation: Tensor, joints: Tensor, parents: list[int]) -> Tensor:
    """World transforms [B,J,4,4] of a kinematic tree.

    rotation [B,J,3,3] of each joint in its parent's frame, joints [B,J,3] at rest; parents[0] is ignored.
    """
    b, j = rotation.shape[:2]
    offset = joints.clone()
    offset[:, 1:] = joints[:, 1:] - joints[:, parents[1:]]
    local = torch.zeros(b, j, 4, 4, dtype=rotation.dtype, device=rotation.device)
    local[..., :3, :3], local[..., :3, 3], local[..., 3, 3] = rotation, offset, 1
    world = [local[:, 0]]
    for i in range(1, j):
        world.append(world[parents[i]] @ local[:, i])
    return torch.stack(world, 1)


def lbs(
    betas: Tensor,
    pose: Tensor,
    template: Tensor,
    shapedirs: Tensor,
    posedirs: Tensor,
    regressor: Tensor,
    parents: list[int],
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Pose a skinned model.

    betas [B,K], pose [B,3J] axis-angle per joint, template [V,3], shapedirs [V,3,K], posedirs [9(J-1),3V]
    (rows: entries of R - I of joints 1.., row-major), regressor [J,V] (shaped vertices -> joints), weights
    [V,J].
    Returns vertices [B,V,3] and posed joints [B,J,3].
    """
    b, j = len(pose), len(regressor)
    shaped = template + (betas @ shapedirs.flatten(0, 1).T).view(b, -1, 3)
    joints = torch.einsum("jv,bvc->bjc", regressor, shaped)
    rotation = axis_angle_to_matrix(pose.view(b, j, 3))
    feature = rotation[:, 1:] - torch.eye(3, dtype=pose.dtype, device=pose.device)
    posed = shaped + (feature.flatten(1) @ posedirs).view(b, -1, 3)
    world = chain(rotation, joints, parents)
    # skinning transforms move rest positions: take the rest joint away first
    move = world[..., :3, 3] - torch.einsum("bjrc,bjc->bjr", world[..., :3, :3], joints)
    turn = torch.einsum("vj,bjrc->bvrc", weights, world[..., :3, :3])
    verts = torch.einsum("bvrc,bvc->bvr", turn, posed) + torch.einsum("vj,bjr->bvr", weights, move)
    return verts, world[..., :3, 3]
