"""Atlas: the pixels of images of any sizes in one tensor, so that a batch of patches is cut out in few operations."""

import numpy as np
import torch
from torch import Tensor

View = tuple[int, int, int, int]  # start, height, width, stride


class Atlas:
    """Pixels of images. A view is an image, or the part of an image below and to the right of some pixel.

    Pixel (y, x) of a view is pixel start + y * stride + x of the atlas.

    Parameters
    ----------
    size : number of pixels there is room for
    device : device of the pixels
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.pixels = torch.empty(size, 3, dtype=torch.uint8, device=device)

    def write(self, start: int, image: np.ndarray) -> int:
        """Write an image of shape (h, w, 3) starting at pixel ``start``, and return the index after its last pixel."""
        end = start + image.shape[0] * image.shape[1]
        self.pixels[start:end] = torch.from_numpy(image).view(-1, 3)
        return end

    def set_views(self, views: list[View]) -> None:
        self.starts, self.heights, self.widths, self.strides = torch.tensor(
            views, device=self.pixels.device
        ).T.unsqueeze(2)  # (views, 1) each

    def cut(self, view: Tensor, corner: Tensor, size: int, flips: Tensor) -> Tensor:
        """Cut out square patches. Rows and columns outside a view repeat its edge.

        Parameters
        ----------
        view : (N,), indices of views
        corner : (N, 2), top and left
        size : side of the patches
        flips : bool Tensor of shape (N, 3), whether to flip the rows, to flip the columns, and to transpose

        Returns
        -------
        (N, 3, size, size)
        """
        along = torch.arange(size, device=view.device)
        flip_rows, flip_columns, transpose = flips.T.unsqueeze(2)  # (N, 1) each
        rows = corner[:, :1] + torch.where(flip_rows, size - 1 - along, along)  # (N, size)
        columns = corner[:, 1:] + torch.where(flip_columns, size - 1 - along, along)
        rows = torch.minimum(rows.clamp(min=0), self.heights[view] - 1)
        columns = torch.minimum(columns.clamp(min=0), self.widths[view] - 1)
        down, right = self.starts[view] + rows * self.strides[view], columns
        down, right = torch.where(transpose, right, down), torch.where(transpose, down, right)
        return self.pixels[down[:, :, None] + right[:, None, :]].permute(0, 3, 1, 2)
